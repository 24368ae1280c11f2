// SPDX-License-Identifier: Apache-2.0

package continuity

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/module/divert"
)

// TestKilled: an engine that is killed has a successor at once, in the same
// queues, which nobody ever closes; a stop leaves nothing.
func TestKilled(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.start(withPath)
	r.ask("/before")
	first := r.queues()
	pid := r.serving()
	for range 3 {
		r.signal(pid, syscall.SIGKILL)
		r.ask("/during") // a SYN that waits in the queue is answered as well
		pid = r.successor(pid)
	}
	r.noDrops()
	for i, q := range r.queues() {
		if q.PortID != first[i].PortID || q.Queue != first[i].Queue {
			t.Errorf("queue %d at port %d was bound anew, as queue %d at port %d", first[i].Queue, first[i].PortID, q.Queue, q.PortID)
		}
	}
	r.stop()
}

// TestStopped: an engine that stands still is replaced, and is dead when it
// would wake up.
func TestStopped(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.start(lab.ConfigOptions{}, "--hang-timeout", "1s")
	r.ask("/before")
	pid := r.serving()
	r.signal(pid, syscall.SIGSTOP)
	r.ask("/during")
	if r.successor(pid); alive(pid) {
		t.Errorf("process %d is still there", pid)
	}
	if !strings.Contains(r.w.Log(), "no sign of life") {
		t.Error("nobody said why")
	}
	r.noDrops()
	r.stop()
}

// TestUpgrade goes to and fro between two executables. The supervisor goes with
// them and stays the same process.
func TestUpgrade(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.start(withPath)
	bins := []string{r.copyBinary("other"), r.bin}
	pid := r.serving()
	for i := range 20 {
		code, out := r.weir("upgrade", bins[i%2])
		if code != 0 || !strings.Contains(out, "serves") {
			t.Fatalf("upgrade %d: exit code %d: %s", i, code, out)
		}
		if alive(pid) {
			t.Errorf("upgrade %d: the old engine is still there", i)
		}
		r.ask("/after")
		next := r.successor(pid)
		if exe := r.executable(next); exe != bins[i%2] {
			t.Errorf("upgrade %d: the engine runs from %s", i, exe)
		}
		r.until("the supervisor's new executable", func() bool { return r.executable(r.w.Proc.Pid()) == bins[i%2] })
		pid = next
	}
	// A restart is one of the new executable, even if a package has replaced
	// the file meanwhile.
	code, out := r.weir("upgrade", bins[0])
	if code != 0 {
		t.Fatalf("upgrade: exit code %d: %s", code, out)
	}
	r.must(os.Rename(bins[0], bins[0]+".old"))
	pid = r.serving()
	r.signal(pid, syscall.SIGKILL)
	pid = r.successor(pid)
	if exe := r.executable(pid); exe != bins[0]+".old" {
		t.Errorf("after the kill the engine runs from %s", exe)
	}
	r.ask("/kill")
	r.noDrops()
	r.stop()
}

// TestUpgradeRefused: whatever the new executable is, the old one serves on.
func TestUpgradeRefused(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.start(lab.ConfigOptions{})
	pid := r.serving()
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(r.dir, name)
		r.must(os.WriteFile(path, []byte(text), mode))
		r.must(os.Chmod(path, mode))
		return path
	}
	for _, c := range []struct{ path, want string }{
		{filepath.Join(r.dir, "missing"), "no such file"},
		{write("text", "no program", 0o755), "exec format error"},
		{write("data", "#!/bin/sh\n", 0o644), "not an executable"},
		{write("loose", "#!/bin/sh\n", 0o777), "can be changed by others"},
		{write("fails", "#!/bin/sh\nexit 7\n", 0o755), "exit status 7"},
		{write("ends", "#!/bin/sh\nexit 0\n", 0o755), "exit status 0"},
	} {
		code, out := r.weir("upgrade", c.path)
		if code != 1 || !strings.Contains(out, c.want) || !strings.Contains(out, "old one") {
			t.Errorf("upgrade to %s: exit code %d: %s", filepath.Base(c.path), code, out)
		}
	}
	// The configuration does not suit the new one.
	file := filepath.Join(r.dir, "weir.yaml")
	good, err := os.ReadFile(file)
	r.must(err)
	fails := write("config", "#!/bin/sh\nexec "+r.bin+" run --config /dev/null --set source.addresses=nonsense\n", 0o755)
	if code, out := r.weir("upgrade", fails); code != 1 {
		t.Errorf("upgrade with a bad configuration: exit code %d: %s", code, out)
	}
	r.must(os.WriteFile(file, good, 0o644))
	// It cannot read what the old one keeps.
	kept := filepath.Join(r.run, "flows", "instance")
	b, err := os.ReadFile(kept)
	r.must(err)
	r.must(os.WriteFile(kept, []byte(strings.Replace(string(b), `"version":1`, `"version":9`, 1)), 0o600)) // of another sum too
	if code, out := r.weir("upgrade"); code != 1 || !strings.Contains(r.w.Log(), "is damaged") {
		t.Errorf("upgrade with an unknown store: exit code %d: %s", code, out)
	}
	r.must(os.WriteFile(kept, b, 0o600))
	if now := r.serving(); now != pid {
		t.Errorf("process %d serves, not %d", now, pid)
	}
	r.ask("/after")
	r.stop()
}

// TestStartFails: what a first start says is the supervisor's exit code, and
// nothing is left.
func TestStartFails(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	c := lab.ConfigOptions{Dir: r.run}
	fails := func(name, config string, want int) {
		t.Helper()
		w, err := lab.NewWeir(r.Router, lab.WeirOptions{Binary: r.bin, Config: config, Dir: r.dir, Socket: c.Socket(), Args: []string{"--supervise"}})
		r.must(err)
		select {
		case <-w.Proc.Done():
			if code := w.Proc.ExitCode(); code != want {
				t.Errorf("%s: exit code %d, want %d: %s", name, code, want, w.Log())
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: it does not end: %s", name, w.Log())
		}
	}
	fails("a configuration with an error", "farms: 7\n", 2)
	// Only the engine sees that.
	var fd int
	r.must(r.Router.Do(func() (err error) {
		fd, err = divert.Bind(divert.Config{Queue: 22272})
		return err
	}))
	fails("a queue in use", r.Config(c), 1)
	r.must(syscall.Close(fd))
	r.same("after failed starts")
	r.start(c)
	fails("a second supervisor", r.Config(c), 1)
	r.ask("/still")
	r.stop()
}

// TestSupervisorKilled: an engine does not outlive its supervisor, and the next
// start takes over what both left.
func TestSupervisorKilled(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.start(withPath)
	pid := r.serving()
	r.must(r.w.Crash())
	for end := time.Now().Add(20 * time.Second); alive(pid); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the engine lives on")
		}
	}
	r.start(withPath)
	r.ask("/after")
	// After an upgrade the supervisor is the engine's parent as before.
	if code, out := r.weir("upgrade"); code != 0 {
		t.Fatalf("upgrade: exit code %d: %s", code, out)
	}
	pid = r.successor(pid)
	r.must(r.w.Crash())
	for end := time.Now().Add(20 * time.Second); alive(pid); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("after an upgrade the engine lives on")
		}
	}
	r.start(withPath)
	r.stop()
}
