// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/built"
	"github.com/weirgate/weir/integration/lab/trial"
	"github.com/weirgate/weir/internal/require"
)

// What the tests wait by, and draw by.
var (
	within = trial.Within
	until  = trial.Until
)

func TestMain(m *testing.M) { built.Main(m) }

// A rig is a farm with what a test needs to run weir on its router.
type rig struct {
	*lab.Farm
	t   *testing.T
	bin string // the weir executable
	dir string // configuration and temporary files of the daemon
	run string // its run-time directory
}

// newRig builds the standard topology and skips the test where that is
// impossible. Everything goes away with the test.
func newRig(t *testing.T, o lab.FarmOptions) *rig {
	t.Helper()
	require.NFQueue(t)
	r := &rig{t: t, bin: built.Weir(t)}
	l := trial.Lab(t, "weire2e")
	var err error
	if r.Farm, err = l.Farm(o); err != nil {
		t.Fatal(err)
	}
	if r.dir, err = l.Subdir("weir"); err != nil {
		t.Fatal(err)
	}
	if r.run, err = l.Subdir("weir/run"); err != nil {
		t.Fatal(err)
	}
	return r
}

// options fills in the places of the rig.
func (r *rig) options(c lab.ConfigOptions) lab.WeirOptions {
	c.Dir = r.run
	return lab.WeirOptions{Binary: r.bin, Config: r.Config(c), Dir: r.dir, Socket: c.Socket()}
}

// start runs weir and waits until it is ready. What it wrote is shown when the
// test fails.
func (r *rig) start(c lab.ConfigOptions) *lab.Weir {
	r.t.Helper()
	w, err := lab.StartWeir(within(r.t, 20*time.Second), r.Router, r.options(c))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if r.t.Failed() {
			r.t.Logf("weir (process %d) wrote:\n%s", w.Proc.Pid(), w.Log())
		}
	})
	return w
}

// stop ends weir by SIGTERM, which must succeed.
func (r *rig) stop(w *lab.Weir) {
	r.t.Helper()
	code, err := w.Stop(within(r.t, 20*time.Second))
	if err != nil {
		r.t.Fatal(err)
	}
	if code != 0 {
		r.t.Errorf("exit code %d after SIGTERM, want 0", code)
	}
}

// nginxAll starts nginx on every server, all with the same files.
func (r *rig) nginxAll(root string) []*lab.NginxServer {
	r.t.Helper()
	var ns []*lab.NginxServer
	for i, s := range r.Servers {
		n, err := lab.Nginx(s, lab.NginxOptions{Addrs: addrs(r.Farm, i), Root: root})
		if err != nil {
			r.t.Fatal(err)
		}
		ns = append(ns, n)
	}
	return ns
}

// state is everything that weir must leave as it found it.
type state struct {
	network   lab.Snapshot
	files     []string
	temporary []string
	processes []int
}

func (r *rig) state() state {
	r.t.Helper()
	var s state
	var err error
	if s.network, err = r.Router.Snapshot(); err != nil {
		r.t.Fatal(err)
	}
	if s.files, err = lab.Files(r.run); err != nil {
		r.t.Fatal(err)
	}
	if s.temporary, err = lab.Files(filepath.Join(r.dir, "tmp")); err != nil {
		r.t.Fatal(err)
	}
	if s.processes, err = r.Router.Processes(); err != nil {
		r.t.Fatal(err)
	}
	return s
}

// sameAs reports everything in which the rig differs from an earlier state.
func (r *rig) sameAs(before state, when string) {
	r.t.Helper()
	now := r.state()
	for _, d := range before.network.Diff(now.network) {
		r.t.Errorf("%s: %s", when, clip(d, 300))
	}
	for _, p := range []struct {
		what     string
		was, now []string
	}{{"files in the run-time directory", before.files, now.files}, {"temporary files", before.temporary, now.temporary}} {
		if strings.Join(p.was, " ") != strings.Join(p.now, " ") {
			r.t.Errorf("%s: %s: %q, before: %q", when, p.what, p.now, p.was)
		}
	}
	if len(now.processes) != len(before.processes) {
		for _, pid := range now.processes {
			cmd, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			r.t.Errorf("%s: process %d: %q", when, pid, cmd)
		}
	}
}

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n] + "…"
	}
	return s
}

// content returns n reproducible bytes that no two offsets share.
func content(seed byte, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}
