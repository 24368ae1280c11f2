// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module/config"
)

// helperEnv makes the test binary build a lab, tell of it and wait to be
// killed.
const helperEnv = "LAB_TEST_HELPER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(helperEnv); dir != "" {
		os.Exit(helper(dir))
	}
	os.Exit(m.Run())
}

func helper(dir string) int {
	if err := os.Setenv("TMPDIR", dir); err != nil {
		return 1
	}
	l, err := New("weirtest")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	f, err := l.Farm(FarmOptions{})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	for _, h := range []*Host{f.Router, f.Servers[0]} {
		p, err := h.Start(h.Command("sleep", "1000"))
		if err != nil {
			fmt.Println(err)
			return 1
		}
		fmt.Println(p.Pid())
	}
	select {}
}

// TestKilledLabLeavesNoProcess: the death of the lab's process takes its
// programs along, and with them the last holders of the namespaces.
func TestKilledLabLeavesNoProcess(t *testing.T) {
	require.Netns(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), helperEnv+"="+t.TempDir())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	sc := bufio.NewScanner(out)
	var pids []int
	for len(pids) < 2 && sc.Scan() {
		pid := 0
		if _, err := fmt.Sscan(sc.Text(), &pid); err != nil {
			t.Fatalf("the helper says %q", sc.Text())
		}
		pids = append(pids, pid)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if len(pids) != 2 {
		t.Fatalf("the helper started %d programs", len(pids))
	}
	deadline := time.Now().Add(10 * time.Second)
	for _, pid := range pids {
		for {
			err := unix.Kill(pid, 0)
			if errors.Is(err, unix.ESRCH) || isZombie(pid) {
				break
			}
			if time.Now().After(deadline) {
				_ = unix.Kill(pid, unix.SIGKILL)
				t.Fatalf("program %d outlives the lab that was killed", pid)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// TestConfigIsValid: the configuration that a farm writes is one that weir
// takes, whatever goes into it.
func TestConfigIsValid(t *testing.T) {
	l := newLab(t)
	f, err := l.Farm(FarmOptions{Clients: 1, Servers: 2})
	if err != nil {
		t.Fatal(err)
	}
	for i, o := range []ConfigOptions{
		{},
		{IPv6: true},
		{Policies: "[{use: path, config: {routes: [{prefix: /, servers: [s1]}]}}]", Plugins: "[{name: path}]"},
		{Pool: "{max_idle: 4, max_connections: 8}", Extra: "log: {level: debug}\n"},
	} {
		o.Dir = l.Dir()
		file := filepath.Join(l.Dir(), fmt.Sprintf("weir-%d.yaml", i))
		if err := os.WriteFile(file, []byte(f.Config(o)), 0o644); err != nil {
			t.Fatal(err)
		}
		c, err := config.Load(config.LoadOptions{Files: []string{file}})
		if err != nil {
			t.Errorf("%v\n%s", err, f.Config(o))
			continue
		}
		if len(c.Farms) == 0 || c.Farms[0].Name != "web" || c.Admin.Socket != o.Socket() {
			t.Errorf("loaded %d farms, admin socket %s", len(c.Farms), c.Admin.Socket)
		}
	}
}
