// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/built"
)

// goodConfig is a configuration without a fault. %s is a directory.
const goodConfig = `runtime_dir: %[1]q
source: {addresses: [198.51.100.1]}
farms:
  - name: web
    listen: 203.0.113.10:80
    servers:
      - {name: s1, address: 198.51.100.11:80}
      - {name: s2, address: 198.51.100.12:80}
    pool: {max_idle: 64}
admin: {socket: %[2]q}
`

// runWeir runs weir and returns its exit code and all that it wrote. Where the
// test has privileges, it runs in a namespace of its own: a daemon that starts
// although it should not must not find the machine's own network.
func runWeir(t *testing.T, args ...string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, built.Weir(t), args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	run := cmd.Run
	if os.Geteuid() == 0 {
		l, err := lab.New("weire2e")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		h, err := l.NewHost("alone")
		if err != nil {
			t.Fatal(err)
		}
		run = func() error {
			p, err := h.Start(cmd)
			if err != nil {
				return err
			}
			return p.Wait()
		}
	}
	err := run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if err == nil {
		return 0, out.String()
	}
	return exit.ExitCode(), out.String()
}

// TestBadConfig: a fault in the configuration is told with file, line, key
// path and what is expected, by check and by run alike, with exit code 2. It
// needs no privileges: nothing is touched before the configuration is right.
func TestBadConfig(t *testing.T) {
	dir := t.TempDir()
	good := fmt.Sprintf(goodConfig, dir, filepath.Join(dir, "admin.sock"))
	replace := func(old, new string) string {
		if strings.Count(good, old) != 1 {
			t.Fatalf("%q is not in the configuration once", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	for _, c := range []struct {
		name, text string
		line       int
		want       []string
	}{
		{"unknown key", replace("max_idle", "max_idel"), 9, []string{"farms[0].pool.max_idel", "expected", "max_idle"}},
		{"wrong type", replace("max_idle: 64", "max_idle: many"), 9, []string{"farms[0].pool.max_idle", "expected"}},
		{"address", replace("198.51.100.11:80", "s1.example:80"), 7, []string{"farms[0].servers[0].address", "expected"}},
		{"same name twice", replace("name: s2", "name: s1"), 8, []string{"farms[0].servers[1].name"}},
		{"syntax", replace("listen: 203", "listen: [203"), 5, nil},
		{"value missing", replace("listen: 203.0.113.10:80", "protocol: http"), 4, []string{"listen"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "weir.yaml")
			if err := os.WriteFile(file, []byte(c.text), 0o644); err != nil {
				t.Fatal(err)
			}
			for _, args := range [][]string{{"check", "--no-plugins", "--config", file}, {"run", "--config", file}} {
				code, out := runWeir(t, args...)
				if code != 2 {
					t.Errorf("weir %s: exit code %d, want 2", args[0], code)
				}
				for _, w := range append(c.want, fmt.Sprintf("weir.yaml:%d", c.line)) {
					if !strings.Contains(out, w) {
						t.Errorf("weir %s: no %q in:\n%s", args[0], w, out)
					}
				}
			}
		})
	}
	// The negative control.
	file := filepath.Join(dir, "weir.yaml")
	if err := os.WriteFile(file, []byte(good), 0o644); err != nil {
		t.Fatal(err)
	}
	if code, out := runWeir(t, "check", "--no-plugins", "--config", file); code != 0 {
		t.Errorf("a configuration without a fault: exit code %d:\n%s", code, out)
	}
	if code, out := runWeir(t, "check", "--config", filepath.Join(dir, "none.yaml")); code != 2 || !strings.Contains(out, "none.yaml") {
		t.Errorf("a file that does not exist: exit code %d:\n%s", code, out)
	}
	if code, _ := runWeir(t, "no-such-command"); code != 2 {
		t.Errorf("a command that does not exist: exit code %d, want 2", code)
	}
}
