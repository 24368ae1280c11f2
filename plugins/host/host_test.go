// SPDX-License-Identifier: Apache-2.0

package host

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/policies/policypb"
	"github.com/weirgate/weir/policies/snapshot"
)

// binaries holds the real plugins, built once.
var binaries string

func TestMain(m *testing.M) {
	// With this set we are a plugin that misbehaves; see faulty_test.go.
	if mode := os.Getenv("PATH"); strings.HasPrefix(mode, faultyMode) {
		faulty(strings.TrimPrefix(mode, faultyMode))
		return
	}
	gotool, err := exec.LookPath("go")
	if err != nil {
		os.Exit(m.Run()) // start asks for it
	}
	dir, err := os.MkdirTemp("", "weir-host-test-")
	if err == nil {
		binaries = dir
		out, berr := exec.Command(gotool, "build", "-o", dir+"/", "github.com/weirgate/weir/plugins/path", "github.com/weirgate/weir/policies/examples/prefer").CombinedOutput()
		if err = berr; err != nil {
			fmt.Fprintf(os.Stderr, "%s\n", out)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "build the plugins:", err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// received collects snapshots.
type received struct {
	mu   sync.Mutex
	all  []*snapshot.Snapshot
	wake chan struct{}
}

func (r *received) on(_, _ string, s *snapshot.Snapshot) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, s)
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *received) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for: %s", what)
		}
	}
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start makes a host that is closed, and checked for leaks, at the end.
func start(t *testing.T, change func(*Options)) (*Host, *received, *logBuffer) {
	t.Helper()
	if binaries == "" {
		require.Tool(t, "go")
		t.Fatal("go is not in the PATH of this test")
	}
	before := goleak.IgnoreCurrent()
	rec, logs := &received{wake: make(chan struct{}, 1)}, &logBuffer{}
	dir := t.TempDir()
	o := Options{
		Log:        slog.New(slog.NewTextHandler(logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Dirs:       []string{binaries, "/nonexistent/plugins"},
		RuntimeDir: dir,
		OnSnapshot: rec.on,
		Tick:       50 * time.Millisecond,
		BackoffMin: 10 * time.Millisecond,
		Restarts:   -1,
	}
	if change != nil {
		change(&o)
	}
	h := New(o)
	t.Cleanup(func() {
		pids := pidsOf(h)
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		for _, pid := range pids {
			if err := syscall.Kill(pid, 0); err == nil {
				t.Errorf("process %d of a plugin is left", pid)
			}
		}
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("left in the runtime directory: %v", left)
		}
		goleak.VerifyNone(t, before)
		if t.Failed() {
			t.Log(logs.String())
		}
	})
	return h, rec, logs
}

func pidsOf(h *Host) []int {
	var out []int
	for _, s := range h.Status() {
		if s.PID != 0 {
			out = append(out, s.PID)
		}
	}
	return out
}

func farmSpec(servers string, policies ...PolicyUse) FarmSpec {
	f := FarmSpec{Name: "web", Policies: policies}
	for i, s := range strings.Fields(servers) {
		f.Servers = append(f.Servers, ServerInfo{Name: s, Address: fmt.Sprintf("198.51.100.%d:80", i+1), Weight: 1})
	}
	return f
}

// routes is a configuration for path: prefix, server, prefix, server …
func routes(pairs ...string) map[string]any {
	var rs []any
	for i := 0; i < len(pairs); i += 2 {
		rs = append(rs, map[string]any{"prefix": pairs[i], "servers": []any{pairs[i+1]}})
	}
	return map[string]any{"routes": rs}
}

var ctx = context.Background()

func mustApply(t *testing.T, h *Host, plugins []PluginSpec, farms ...FarmSpec) {
	t.Helper()
	if err := h.Apply(ctx, plugins, farms); err != nil {
		t.Fatal(err)
	}
}

func TestHostPathSnapshot(t *testing.T) {
	h, rec, logs := start(t, nil)
	mustApply(t, h, nil, farmSpec("s1 s2", PolicyUse{Plugin: "path", Config: routes("/sales/", "s1", "/products/", "s2")}))
	eventually(t, "the first snapshot", func() bool { return rec.count() > 0 })
	s := h.Snapshot("web", "path")
	if s.Generation != 1 || s.Plugin != "path" || s.Expires != 0 || len(s.Routes.Routes) != 2 || s.Routes.Routes[0].Servers[0] != "s1" {
		t.Errorf("%+v %+v", s, s.Routes)
	}
	if !h.About("path").Routes || !h.About("unknown").Routes {
		t.Error("path is a route policy, and so is what is unknown")
	}
	st := h.Status()
	if len(st) != 1 || st[0].State != StateUp || st[0].PID == 0 || st[0].Version == "" || len(st[0].Farms) != 1 || st[0].Farms[0].Generation != 1 {
		t.Errorf("status: %+v", st)
	}
	// Ticks go on, and nothing new is said.
	tick := st[0].Farms[0].LastTick
	eventually(t, "three more ticks", func() bool { return h.Status()[0].Farms[0].LastTick.Sub(tick) > 150*time.Millisecond })
	if rec.count() != 1 {
		t.Errorf("%d snapshots although nothing changed", rec.count())
	}
	if !strings.Contains(logs.String(), "plugin is up") {
		t.Error("the start was not logged")
	}
}

// TestHostUnprivileged looks at the process that runs: its user, capabilities,
// environment and group.
func TestHostUnprivileged(t *testing.T) {
	t.Setenv("WEIR_TEST_SECRET", "hunter2")
	h, rec, _ := start(t, nil)
	mustApply(t, h, nil, farmSpec("s1", PolicyUse{Plugin: "path", Config: routes("/", "s1")}))
	eventually(t, "the first snapshot", func() bool { return rec.count() > 0 })
	pid := h.Status()[0].PID
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		key, value, _ := strings.Cut(line, ":")
		f := strings.Fields(value)
		switch key {
		case "Uid":
			if os.Geteuid() == 0 && slices.Contains(f, "0") {
				t.Errorf("the plugin runs as root: %s", line)
			}
		case "CapAmb", "CapInh", "CapEff", "CapPrm":
			if strings.Trim(f[0], "0") != "" {
				t.Errorf("the plugin has capabilities: %s", line)
			}
		case "NoNewPrivs":
			if f[0] != "1" {
				t.Error("the plugin can gain privileges")
			}
		case "Name":
			if f[0] != "path" {
				t.Errorf("the process is called %q", f[0])
			}
		case "Groups":
			if os.Geteuid() == 0 && len(f) > 0 {
				t.Errorf("the plugin has groups: %s", line)
			}
		}
	}
	if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); err != nil || bytes.Contains(env, []byte("hunter2")) {
		t.Errorf("the plugin can read our environment (%v)", err)
	}
	if pgid, err := syscall.Getpgid(pid); err != nil || pgid != pid {
		t.Errorf("the plugin is in process group %d (%v)", pgid, err)
	}
}

func TestHostKilledPlugin(t *testing.T) {
	h, rec, logs := start(t, nil)
	mustApply(t, h, nil, farmSpec("s1", PolicyUse{Plugin: "path", Config: routes("/", "s1")}))
	eventually(t, "the first snapshot", func() bool { return rec.count() > 0 })
	s := h.Snapshot("web", "path")
	for i := range 3 {
		st := h.Status()[0]
		if err := syscall.Kill(st.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "another process", func() bool {
			n := h.Status()[0]
			return n.State == StateUp && n.PID != st.PID && n.Restarts == uint64(i+1) && n.Farms[0].LastTick.After(n.Since)
		})
		if h.Snapshot("web", "path") != s {
			t.Fatal("the snapshot did not stay")
		}
	}
	if rec.count() != 1 {
		t.Errorf("%d snapshots, although each process said the same", rec.count())
	}
	if !strings.Contains(logs.String(), "signal: killed") {
		t.Error("the death was not logged")
	}
}

func TestHostStoppedPlugin(t *testing.T) {
	h, rec, _ := start(t, func(o *Options) { o.TickTimeout = 50 * time.Millisecond })
	mustApply(t, h, nil, farmSpec("s1", PolicyUse{Plugin: "path", Config: routes("/", "s1")}))
	eventually(t, "the first snapshot", func() bool { return rec.count() > 0 })
	old := h.Status()[0].PID
	if err := syscall.Kill(old, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another process", func() bool { n := h.Status()[0]; return n.State == StateUp && n.PID != old })
	if err := syscall.Kill(old, 0); err == nil {
		t.Error("the stopped process is left")
	}
	if !strings.Contains(h.Status()[0].LastError, "3 ticks in a row") {
		t.Errorf("last error: %s", h.Status()[0].LastError)
	}
}

// TestHostCloseStopped: a process that cannot answer does not hold up Close.
func TestHostCloseStopped(t *testing.T) {
	h, rec, _ := start(t, nil)
	mustApply(t, h, nil, farmSpec("s1", PolicyUse{Plugin: "path", Config: routes("/", "s1")}))
	eventually(t, "the first snapshot", func() bool { return rec.count() > 0 })
	pid := h.Status()[0].PID
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, 0); err == nil {
		t.Error("the process is left")
	}
	if err := h.Apply(ctx, nil, []FarmSpec{farmSpec("s1", PolicyUse{Plugin: "path"})}); err == nil {
		t.Error("a closed host applies")
	}
}

func TestHostRefusedConfig(t *testing.T) {
	h, rec, _ := start(t, nil)
	good := farmSpec("s1", PolicyUse{Plugin: "path", Config: routes("/", "s1")})
	mustApply(t, h, nil, good)
	eventually(t, "the first snapshot", func() bool { return rec.count() > 0 })
	s, pid := h.Snapshot("web", "path"), h.Status()[0].PID

	bad := farmSpec("s1", PolicyUse{Plugin: "path", Config: map[string]any{"routes": []any{
		map[string]any{"prefix": "/", "servers": []any{"s1"}},
		map[string]any{"prefix": "/a/", "servers": []any{"s9"}},
		map[string]any{"perfix": "/b/"},
	}}})
	for name, apply := range map[string]func() error{
		"Apply":       func() error { return h.Apply(ctx, nil, []FarmSpec{bad}) },
		"CheckConfig": func() error { return h.CheckConfig(ctx, nil, []FarmSpec{bad}) },
	} {
		err := apply()
		var e *ConfigError
		if !errors.As(err, &e) || e.Farm != "web" || e.Plugin != "path" {
			t.Fatalf("%s: %v", name, err)
		}
		if want := `farm "web": plugin "path": config.routes[2].perfix: unknown key`; !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", name, err, want)
		}
	}
	bad.Policies[0].Config = routes("/", "s1", "/a/", "s9")
	err := h.Apply(ctx, nil, []FarmSpec{bad})
	if err == nil || err.Error() != `farm "web": plugin "path": config.routes[1].servers[0]: server "s9" is not in farm "web", which has s1` {
		t.Errorf("%v", err)
	}
	if h.Snapshot("web", "path") != s || h.Status()[0].PID != pid {
		t.Error("a refused configuration changed something")
	}
	if err := h.CheckConfig(ctx, nil, []FarmSpec{good}); err != nil {
		t.Errorf("a good configuration is refused: %v", err)
	}
	if n := len(h.Status()); n != 1 {
		t.Errorf("%d plugins after checks", n)
	}
}

func TestHostOverlay(t *testing.T) {
	h, rec, _ := start(t, nil)
	spec := PluginSpec{Name: "path", Config: map[string]any{"default": []any{"s2"}, "routes": []any{}}}
	mustApply(t, h, []PluginSpec{spec}, farmSpec("s1 s2", PolicyUse{Plugin: "path", Config: routes("/", "s1")}))
	eventually(t, "the first snapshot", func() bool { return rec.count() > 0 })
	r := h.Snapshot("web", "path").Routes
	if len(r.Routes) != 1 || len(r.Default) != 1 || r.Default[0] != "s2" {
		t.Errorf("%+v", r)
	}
	got := overlay(map[string]any{"a": map[string]any{"b": 1, "c": 2}, "d": 1}, map[string]any{"a": map[string]any{"c": 3}, "e": 4})
	if fmt.Sprint(got) != "map[a:map[b:1 c:3] d:1 e:4]" {
		t.Error(got)
	}
}

func TestHostReload(t *testing.T) {
	h, rec, _ := start(t, nil)
	use := PolicyUse{Plugin: "path", Config: routes("/", "s1")}
	mustApply(t, h, nil, farmSpec("s1 s2", use))
	eventually(t, "the first snapshot", func() bool { return rec.count() == 1 })
	pid := h.Status()[0].PID

	// The same again: nothing new.
	mustApply(t, h, nil, farmSpec("s1 s2", use))
	// Another farm on the same process.
	other := farmSpec("s7", PolicyUse{Plugin: "path", Config: routes("/", "s7")})
	other.Name = "shop"
	mustApply(t, h, nil, farmSpec("s1 s2", use), other)
	eventually(t, "the second farm", func() bool { return h.Snapshot("shop", "path") != nil })
	if rec.count() != 2 || h.Status()[0].PID != pid {
		t.Errorf("%d snapshots; process %d, was %d", rec.count(), h.Status()[0].PID, pid)
	}
	// Other routes: the next generation.
	use.Config = routes("/", "s2")
	mustApply(t, h, nil, farmSpec("s1 s2", use), other)
	eventually(t, "new routes", func() bool { return h.Snapshot("web", "path").Routes.Routes[0].Servers[0] == "s2" })
	if g := h.Snapshot("web", "path").Generation; g != 2 {
		t.Errorf("generation %d", g)
	}
	// Other servers, one farm less.
	mustApply(t, h, nil, farmSpec("s2", use))
	eventually(t, "a snapshot for the new servers", func() bool { return h.Snapshot("web", "path").Generation == 3 })
	if h.Snapshot("shop", "path") != nil {
		t.Error("a farm that is gone has a snapshot")
	}
	// A plugin that nobody uses ends.
	mustApply(t, h, nil, farmSpec("s2"))
	if len(h.Status()) != 0 {
		t.Error("an unused plugin runs")
	}
	if err := syscall.Kill(pid, 0); err == nil {
		t.Error("the process of an unused plugin is left")
	}
}

// TestHostReplace: another command means another process; the snapshot stays
// while it starts, and a successor that does not run changes nothing.
func TestHostReplace(t *testing.T) {
	h, rec, _ := start(t, nil)
	f := farmSpec("s1", PolicyUse{Plugin: "p", Config: routes("/", "s1")})
	mustApply(t, h, []PluginSpec{{Name: "p", Command: []string{"path"}}}, f)
	eventually(t, "the first snapshot", func() bool { return rec.count() > 0 })
	old := h.Status()[0].PID
	err := h.Apply(ctx, []PluginSpec{{Name: "p", Command: []string{"/bin/false"}}}, []FarmSpec{f})
	var run *RunError
	if !errors.As(err, &run) || h.Status()[0].PID != old {
		t.Fatalf("a successor that does not run: %v", err)
	}
	mustApply(t, h, []PluginSpec{{Name: "p", Command: []string{"path", "-unused"}}}, f)
	if n := h.Status()[0]; n.PID == old || n.Farms[0].Generation != 1 {
		t.Errorf("%+v", n)
	}
	if err := syscall.Kill(old, 0); err == nil {
		t.Error("the old process is left")
	}
	if rec.count() != 1 {
		t.Errorf("%d snapshots", rec.count())
	}
}

// TestHostReplaceWaits: the old process goes only when its successor has sent
// its first snapshot.
func TestHostReplaceWaits(t *testing.T) {
	var old atomic.Int64 // process
	there := func() bool { return syscall.Kill(int(old.Load()), 0) == nil }
	first, seen := make(chan bool, 1), make(chan bool, 1)
	h, _, _ := start(t, func(o *Options) {
		o.OnSnapshot = func(_, _ string, s *snapshot.Snapshot) {
			to, saw := first, true
			if s.Scores.Servers[0].Score == 7 {
				to, saw = seen, there() // at the moment of the successor's first snapshot
			}
			select {
			case to <- saw:
			default:
			}
		}
	})
	f := farmSpec("s1", PolicyUse{Plugin: "p", Config: map[string]any{"server": "s1"}})
	mustApply(t, h, []PluginSpec{{Name: "p", Command: []string{"prefer"}}}, f)
	<-first
	old.Store(int64(h.Status()[0].PID))
	spec := as(t, "hesitates")
	spec.StartTimeout = 10 * time.Second
	mustApply(t, h, []PluginSpec{spec}, f)
	select {
	case was := <-seen:
		if !was {
			t.Error("the old process was gone before its successor had spoken")
		}
	default:
		t.Error("Apply is over before the successor has spoken")
	}
	if there() {
		t.Error("the old process is left")
	}
	if s := h.Snapshot("web", "p"); s == nil || s.Scores.Servers[0].Score != 7 {
		t.Errorf("%+v", s)
	}
}

func TestHostScoresExpireAndRenew(t *testing.T) {
	h, rec, _ := start(t, func(o *Options) { o.Tick = 20 * time.Millisecond })
	spec := PluginSpec{Name: "prefer", Expiry: 400 * time.Millisecond}
	mustApply(t, h, []PluginSpec{spec}, farmSpec("s1 s2", PolicyUse{Plugin: "prefer", Config: map[string]any{"server": "s2"}}))
	eventually(t, "a renewed snapshot", func() bool { return rec.count() >= 3 })
	rec.mu.Lock()
	defer rec.mu.Unlock()
	a, b := rec.all[0], rec.all[1]
	if a.Generation != 1 || b.Generation != 1 || b.Expires <= a.Expires || a.Scores.Servers[0] != (snapshot.Score{Server: "s2", Score: 10}) {
		t.Errorf("%+v then %+v", a, b)
	}
	if h.About("prefer").Routes {
		t.Error("prefer is no route policy")
	}
}

// TestHostKnowsInCallback: what a receiver asks while it gets the very first
// snapshot is answered right.
func TestHostKnowsInCallback(t *testing.T) {
	var h *Host
	answers := make(chan bool, 100)
	h, _, _ = start(t, func(o *Options) {
		o.OnSnapshot = func(_, plugin string, _ *snapshot.Snapshot) { answers <- h.About(plugin).Routes }
	})
	var farms []FarmSpec
	for i := range 5 {
		f := farmSpec("s1", PolicyUse{Plugin: "prefer", Config: map[string]any{"server": "s1"}})
		f.Name = fmt.Sprint("farm", i)
		farms = append(farms, f)
	}
	mustApply(t, h, nil, farms...)
	for range farms {
		if <-answers {
			t.Error("a plugin without routes was taken for a route policy")
		}
	}
}

func TestHostTelemetry(t *testing.T) {
	asked := make(chan string, 100)
	h, rec, _ := start(t, func(o *Options) {
		o.Telemetry = func(farm string) *policypb.Telemetry {
			select {
			case asked <- farm:
			default:
			}
			return &policypb.Telemetry{Requests: 7, Servers: []*policypb.ServerTelemetry{{Name: "s1", Active: 3}}}
		}
	})
	mustApply(t, h, nil, farmSpec("s1", PolicyUse{Plugin: "path", Config: routes("/", "s1")}))
	eventually(t, "the first snapshot", func() bool { return rec.count() > 0 })
	if f := <-asked; f != "web" {
		t.Errorf("asked for farm %q", f)
	}
}

func TestHostSpecErrors(t *testing.T) {
	h, _, _ := start(t, nil)
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		spec PluginSpec
		want []string
	}{
		{PluginSpec{Name: "p", Command: []string{"no-such-plugin"}}, []string{`plugin "p": command "no-such-plugin" is neither in ` + binaries + ` nor in /nonexistent/plugins`}},
		{PluginSpec{Name: "p", Command: []string{"./no/such"}}, []string{"there is no file", "host/no/such"}},
		{PluginSpec{Name: "p", Command: []string{plain}}, []string{plain + " is not executable"}},
		{PluginSpec{Name: "p", Command: []string{"path"}, Checksum: "abc"}, []string{"64 digits"}},
		{PluginSpec{Name: "p", Command: []string{"path"}, Checksum: strings.Repeat("0", 64)}, []string{"checksum: ", "expected 0000"}},
		{PluginSpec{Name: "p", Command: []string{"path"}, User: "no-such-user-here"}, []string{`no user "no-such-user-here"`}},
		{PluginSpec{Name: "p", Command: []string{"path"}, User: "1:x"}, []string{"uid:gid"}},
	} {
		err := h.Start(ctx, []PluginSpec{c.spec}, []FarmSpec{farmSpec("s1", PolicyUse{Plugin: "p", Config: routes("/", "s1")})})
		var e *SpecError
		if !errors.As(err, &e) || e.Plugin != "p" {
			t.Errorf("%+v: %v", c.spec, err)
			continue
		}
		for _, w := range c.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%v, want %s", err, w)
			}
		}
	}
	use := PolicyUse{Plugin: "path", Config: routes("/", "s1")}
	if err := h.Apply(ctx, nil, []FarmSpec{farmSpec("s1", use, use)}); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("the same policy twice: %v", err)
	}
	// The default directories are those that the manual names.
	if d := DefaultDirs(); len(d) != 2 || !strings.HasSuffix(d[0], "/plugins") || d[1] != "/usr/lib/weir/plugins" {
		t.Errorf("%v", d)
	}
}

func TestHostChecksum(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(binaries, "path"))
	if err != nil {
		t.Fatal(err)
	}
	h, rec, _ := start(t, nil)
	spec := PluginSpec{Name: "path", Checksum: fmt.Sprintf("sha256:%x", sha256.Sum256(b))}
	mustApply(t, h, []PluginSpec{spec}, farmSpec("s1", PolicyUse{Plugin: "path", Config: routes("/", "s1")}))
	eventually(t, "the first snapshot", func() bool { return rec.count() > 0 })
}

// TestHostOrphan kills a host and looks whether its plugin goes too: by both
// protections, by each alone, and, as a control, by none.
func TestHostOrphan(t *testing.T) {
	for _, watch := range []string{"both", "pipe", "signal", "none"} {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{"PATH=" + faultyMode + "host-" + watch, "WEIR_TEST_PLUGINS=" + binaries, "WEIR_TEST_DIR=" + t.TempDir()}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var pid int
		if _, err := fmt.Fscan(out, &pid); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, 0); err != nil {
			t.Fatalf("the plugin does not run: %v", err)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		gone := func() bool {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			return err != nil || bytes.Contains(b, []byte(") Z "))
		}
		if watch == "none" {
			// The death signal comes with the host's end, which Wait saw.
			if gone() {
				t.Error("an orphan without protection ended; the test shows nothing")
			}
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		eventually(t, "the orphan's end by "+watch, gone)
	}
}
