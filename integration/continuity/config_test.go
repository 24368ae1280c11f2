// SPDX-License-Identifier: Apache-2.0

package continuity

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/weirgate/weir/integration/lab"
)

// TestKilledWithBadConfig: an engine that dies while the configuration's files
// are wrong, or cannot be in force, has a successor with what was in force, and
// loses nothing. Files that are right again are taken. An upgrade, and a start
// of the operator's, believe nothing but the files.
func TestKilledWithBadConfig(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.start(loaded)
	l := r.load(6, 2)
	pid := r.serving()
	file := filepath.Join(r.dir, "weir.yaml")
	good, err := os.ReadFile(file)
	r.must(err)
	write := func(text string) {
		t.Helper()
		r.must(os.WriteFile(file+".new", []byte(text), 0o644))
		r.must(os.Rename(file+".new", file))
	}
	goesOn := func() {
		t.Helper()
		n := l.requests.Load()
		r.until("requests go on", func() bool { return l.requests.Load() > n+30 || t.Failed() })
	}
	for name, text := range map[string]string{
		"no configuration": "farms: 7\n",
		"half of a file":   string(good[:len(good)/2]) + "\n  [",
		"of no plugin":     strings.Replace(string(good), "prefix: /", "prefix: 7", 1),
	} {
		if text == string(good) {
			t.Fatalf("%s: it is the same", name)
		}
		write(text)
		for range 2 {
			died := strings.Count(r.w.Log(), "the engine died")
			r.signal(pid, syscall.SIGKILL)
			pid = r.successor(pid)
			goesOn()
			if n := strings.Count(r.w.Log(), "the engine died") - died; n != 1 {
				t.Errorf("%s: the engine died %d times", name, n)
			}
			r.until(name+": it is told", func() bool {
				b, err := r.w.Status(t.Context()) // which needs no configuration
				return err == nil && strings.Contains(string(b), "degraded")
			})
		}
		// What only a plugin sees comes to light when the old engine is gone.
		if code, out := r.weir("upgrade"); code == 0 || r.serving() != pid && name != "of no plugin" {
			t.Errorf("%s: upgrade: exit code %d: %s", name, code, out)
		}
		pid = r.serving()
		goesOn()
	}
	heavy := regexp.MustCompile(`"weight": ?7\b`)
	write(strings.Replace(string(good), "{name: s2,", "{name: s2, weight: 7,", 1))
	r.until("right files are taken", func() bool { _, out := r.weir("servers", "-o", "json"); return heavy.MatchString(out) })
	r.signal(pid, syscall.SIGKILL)
	r.successor(pid)
	if _, out := r.weir("servers", "-o", "json"); !heavy.MatchString(out) {
		t.Errorf("the successor has other weights:\n%s", out)
	}
	goesOn()
	l.whole()
	write("farms: 7\n")
	r.must(r.w.Crash())
	w, err := lab.NewWeir(r.Router, lab.WeirOptions{Binary: r.bin, Config: "farms: 7\n", Dir: r.dir, Socket: filepath.Join(r.run, "admin.sock"), Args: []string{"--supervise"}})
	r.must(err)
	if code := w.Proc.ExitCode(); code != 2 {
		t.Errorf("a start with a wrong configuration: exit code %d, want 2: %s", code, w.Log())
	}
	r.start(loaded)
	r.stop()
}
