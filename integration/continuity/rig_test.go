// SPDX-License-Identifier: Apache-2.0

package continuity

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/built"
	"github.com/weirgate/weir/integration/lab/trial"
	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module/divert"
)

// What the tests wait by, and draw by.
var (
	within = trial.Within
)

func TestMain(m *testing.M) { built.Main(m) }

// rig is a farm with a supervised weir on its router.
type rig struct {
	*lab.Farm
	t      *testing.T
	bin    string // the weir executable
	dir    string // configuration and temporary files of the daemon
	run    string // its run-time directory
	before state  // the router's, before weir was started
	w      *lab.Weir

	servers []*lab.Server
	posts   posts    // of the load
	streams *leavers // set before weir is started, if at all
}

// newRig builds the standard topology, with servers that answer with their
// name, and skips the test where that is impossible. Everything goes away with
// the test.
func newRig(t *testing.T, o lab.FarmOptions) *rig {
	t.Helper()
	require.NFQueue(t)
	r := &rig{t: t, bin: built.Weir(t)}
	l := trial.Lab(t, "weircont")
	var err error
	r.Farm, err = l.Farm(o)
	r.must(err)
	r.dir, err = l.Subdir("weir")
	r.must(err)
	r.run, err = l.Subdir("weir/run")
	r.must(err)
	for i, h := range r.Servers {
		s, err := lab.HTTPServer(h, r.Server(i).String(), http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			switch {
			case r.streams != nil && r.streams.find(q) != nil:
				r.streams.ServeHTTP(w, q)
			case !r.posts.serve(w, q):
				fmt.Fprintf(w, "%s has %s", h.Name(), q.URL.Path)
			}
		}))
		r.must(err)
		r.servers = append(r.servers, s)
	}
	r.before = r.state()
	return r
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// withPath is a configuration that needs a plugin process.
var withPath = lab.ConfigOptions{
	Policies: "[{use: path, config: {routes: [{prefix: /, servers: [s1, s2]}]}}]",
	Plugins:  "[{name: path}]",
}

// start runs weir under a supervisor and waits until it serves. What it wrote
// is shown when the test fails.
func (r *rig) start(c lab.ConfigOptions, args ...string) {
	r.t.Helper()
	r.launch(c, append([]string{"--supervise"}, args...)...)
}

// launch runs weir with these arguments, and waits until it serves.
func (r *rig) launch(c lab.ConfigOptions, args ...string) {
	r.t.Helper()
	c.Dir = r.run
	r.launchText(r.Config(c), args...)
}

// launchText is launch with a configuration that has the run-time directory of
// the rig and the socket in it.
func (r *rig) launchText(config string, args ...string) {
	r.t.Helper()
	w, err := lab.StartWeir(within(r.t, 30*time.Second), r.Router, lab.WeirOptions{
		Binary: r.bin, Config: config, Dir: r.dir, Socket: lab.ConfigOptions{Dir: r.run}.Socket(), Args: args,
	})
	r.must(err)
	r.w = w
	r.t.Cleanup(func() {
		if r.t.Failed() {
			r.t.Logf("weir (process %d) wrote:\n%s", w.Proc.Pid(), w.Log())
		}
	})
}

// engine is the process that serves, 0 if none answers.
func (r *rig) engine() int {
	b, err := r.w.Status(r.t.Context())
	if err != nil {
		return 0
	}
	var st struct {
		PID       int    `json:"pid"`
		Condition string `json:"condition"`
	}
	r.must(json.Unmarshal(b, &st))
	if st.Condition == "starting" || st.Condition == "stopping" {
		return 0
	}
	return st.PID
}

// serving waits for an engine and returns its process.
func (r *rig) serving() (pid int) {
	r.t.Helper()
	pid = r.running()
	if pid == r.w.Proc.Pid() {
		r.t.Fatalf("process %d supervises and serves", pid)
	}
	return pid
}

// running waits for an engine, supervised or not.
func (r *rig) running() (pid int) {
	r.t.Helper()
	r.until("an engine that serves", func() bool { pid = r.engine(); return pid != 0 })
	return pid
}

// successor waits for another engine than that of the process old.
func (r *rig) successor(old int) (pid int) {
	r.t.Helper()
	r.until(fmt.Sprintf("a successor of process %d", old), func() bool {
		pid = r.engine()
		return pid != 0 && pid != old
	})
	return pid
}

// signal sends a signal to a process of weir.
func (r *rig) signal(pid int, sig syscall.Signal) {
	r.t.Helper()
	if pid <= 1 {
		r.t.Fatalf("there is no process %d to get a signal", pid) // 0 is this group
	}
	r.must(syscall.Kill(pid, sig))
}

// until waits for a condition, which must come in time.
func (r *rig) until(what string, cond func() bool) {
	r.t.Helper()
	for end := time.Now().Add(30 * time.Second); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("did not happen: %s", what)
		}
		select {
		case <-r.w.Proc.Done():
			r.t.Fatalf("weir ended with exit code %d while waiting for %s", r.w.Proc.ExitCode(), what)
		default:
		}
	}
}

// ask makes a request through the VIP on a new connection, which must succeed.
func (r *rig) ask(path string) {
	r.t.Helper()
	client := r.Clients[0].HTTPClient(lab.HTTPClientOptions{Close: true, Timeout: 20 * time.Second})
	resp, err := client.Get("http://" + r.VIP().String() + path)
	r.must(err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	r.must(err)
	if resp.StatusCode != http.StatusOK || !strings.HasSuffix(string(b), " has "+path) {
		r.t.Fatalf("GET %s: %s, %q", path, resp.Status, b)
	}
}

// weir runs another command of weir on this configuration.
func (r *rig) weir(args ...string) (code int, output string) {
	r.t.Helper()
	cmd := exec.CommandContext(within(r.t, 90*time.Second), r.bin, append(args, "--config", filepath.Join(r.dir, "weir.yaml"))...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		r.t.Fatalf("weir %v: %v", args, err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

// stop ends weir in order, and nothing is left of it.
func (r *rig) stop() {
	r.t.Helper()
	code, err := r.w.Stop(within(r.t, 30*time.Second))
	r.must(err)
	if code != 0 {
		r.t.Errorf("weir ended with exit code %d:\n%s", code, r.w.Log())
	}
	r.same("after the stop")
}

// queues are the kernel's counters of the queues in the router.
func (r *rig) queues() []divert.KernelStats {
	r.t.Helper()
	var all []divert.KernelStats
	r.must(r.Router.Do(func() (err error) {
		all, err = divert.ReadKernelStats()
		return err
	}))
	return all
}

// each looks at every queue.
func (r *rig) each(f func(divert.KernelStats)) {
	r.t.Helper()
	for _, q := range r.queues() {
		f(q)
	}
}

// noDrops: no packet has been dropped by a full queue or a full buffer.
func (r *rig) noDrops() {
	r.t.Helper()
	for _, q := range r.queues() {
		if q.DroppedQueueFull != 0 || q.DroppedUser != 0 {
			r.t.Errorf("queue %d dropped %d and %d packets", q.Queue, q.DroppedQueueFull, q.DroppedUser)
		}
	}
}

// state is what a weir can leave behind.
type state struct {
	network   lab.Snapshot
	processes []int
	files     []string
}

func (r *rig) state() (s state) {
	r.t.Helper()
	var err error
	s.network, err = r.Router.Snapshot()
	r.must(err)
	s.processes, err = r.Router.Processes()
	r.must(err)
	entries, err := os.ReadDir(r.run)
	r.must(err)
	for _, e := range entries {
		s.files = append(s.files, e.Name())
	}
	return s
}

// same: the router is as it was before the start.
func (r *rig) same(when string) {
	r.t.Helper()
	now := r.state()
	for _, d := range r.before.network.Diff(now.network) {
		r.t.Errorf("%s: %s", when, clip(d))
	}
	if len(now.processes) != len(r.before.processes) {
		r.t.Errorf("%s: processes %v, before %v", when, now.processes, r.before.processes)
	}
	if strings.Join(now.files, " ") != strings.Join(r.before.files, " ") {
		r.t.Errorf("%s: files %q, before %q", when, now.files, r.before.files)
	}
}

func clip(s string) string {
	if len(s) > 300 {
		return s[:300] + "…"
	}
	return s
}

// copyBinary puts a second executable with its plugins into a directory and
// returns its path.
func (r *rig) copyBinary(name string) string {
	r.t.Helper()
	dir := filepath.Join(r.dir, name)
	r.must(os.MkdirAll(filepath.Join(dir, "plugins"), 0o755))
	for _, f := range []string{"weir", "plugins/path"} {
		b, err := os.ReadFile(filepath.Join(filepath.Dir(r.bin), f))
		r.must(err)
		r.must(os.WriteFile(filepath.Join(dir, f), b, 0o755))
	}
	return filepath.Join(dir, "weir")
}

// nextBinary is copyBinary for a program whose records are of the next version.
func (r *rig) nextBinary(name string) string {
	r.t.Helper()
	path := r.copyBinary(name)
	cmd := exec.Command(require.Tool(r.t, "go"), "build", "-tags", "weir_next", "-o", path, "github.com/weirgate/weir/cmd/weir")
	if out, err := cmd.CombinedOutput(); err != nil {
		r.t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return path
}

// executable is the file that a process runs; empty if it is just going over to
// another one.
func (r *rig) executable(pid int) string {
	path, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return path
}

// alive tells whether a process is there and no zombie.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := bytes.Cut(b, []byte(") "))
	return !bytes.HasPrefix(rest, []byte("Z"))
}
