// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/weirgate/weir/policies"
)

// The test binary itself plays plugins that misbehave. How, stands in PATH,
// one of the few variables that the host passes on.
const faultyMode = "/weir-test-mode/"

func faulty(mode string) {
	switch mode {
	case "garbage":
		fmt.Println(strings.Repeat("\x00\xffgarbage", 20000))
		time.Sleep(time.Hour)
	case "silent":
		time.Sleep(time.Hour)
	case "exits":
		fmt.Fprintln(os.Stderr, "no licence found")
		os.Exit(3)
	case "version":
		fmt.Println("1|7|unix|/proc/self/fd/3/x|grpc|")
		time.Sleep(time.Hour)
	case "netrpc":
		fmt.Println("1|1|unix|/proc/self/fd/3/x|netrpc|")
		time.Sleep(time.Hour)
	case "mute": // takes the connection and never says a word
		l, err := net.Listen("unix", "/proc/self/fd/3/x")
		if err != nil {
			os.Exit(1)
		}
		fmt.Println("1|1|unix|/proc/self/fd/3/x|grpc|")
		for {
			if _, err := l.Accept(); err != nil {
				os.Exit(1)
			}
		}
	case "vanishes": // says where it listens and dies
		fmt.Println("1|1|unix|/proc/self/fd/3/x|grpc|")
		os.Exit(0)
	case "forks": // leaves a descendant that holds its output open
		cmd := exec.Command("/bin/sleep", "5")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		_ = cmd.Start()
		os.Exit(4)
	case "prints", "wrong-server", "tick-error", "panics", "huge":
		policies.Serve(policies.Plugin{Name: mode, Version: "0", New: func() policies.Policy { return bad(mode) }})
	case "hesitates":
		policies.Serve(policies.Plugin{Name: mode, Version: "0", New: func() policies.Policy { return bad(mode) }, Sends: []policies.Kind{policies.SendsScores}})
	case "asked":
		policies.Serve(policies.Plugin{
			Name: mode, Version: "0", New: func() policies.Policy { return asked{} },
			Ask: &policies.AskKey{Path: true}, Tick: 100 * time.Millisecond,
		})
	case "host-both", "host-pipe", "host-signal", "host-none":
		orphanMaker(strings.TrimPrefix(mode, "host-"))
	}
}

// bad is a policy that misbehaves in one way.
type bad string

func (b bad) Configure(policies.Farm, []byte) error { return nil }

func (b bad) Tick(policies.Farm, *policies.Telemetry) (*policies.Snapshot, error) {
	switch b {
	case "prints":
		fmt.Println("hello from the plugin")
		fmt.Print(strings.Repeat("x", 200000))
		return nil, nil
	case "wrong-server":
		return &policies.Snapshot{Scores: &policies.Scores{Servers: []policies.Score{{Server: "s9", Score: 1}}}}, nil
	case "tick-error":
		return nil, errors.New("the weather is bad")
	case "huge":
		return &policies.Snapshot{Eligibility: &policies.Eligibility{Servers: []policies.Eligible{{Server: "s1", Reason: strings.Repeat("x", policies.MaxMessage)}}}}, nil
	case "hesitates": // for so many ticks it knows nothing
		if hesitated++; hesitated < 5 {
			return nil, nil
		}
		return &policies.Snapshot{Scores: &policies.Scores{Servers: []policies.Score{{Server: "s1", Score: 7}}}}, nil
	}
	panic("out of cheese")
}

var hesitated int

// orphanMaker is a host that waits to be killed.
func orphanMaker(protection string) {
	testCommand = func(c *exec.Cmd) {
		if protection == "pipe" || protection == "none" {
			c.SysProcAttr.Pdeathsig = 0
		}
		if protection == "signal" || protection == "none" {
			c.Env = append(c.Env, policies.EnvParentStdin+"=0")
		}
	}
	h := New(Options{Dirs: []string{os.Getenv("WEIR_TEST_PLUGINS")}, RuntimeDir: os.Getenv("WEIR_TEST_DIR")})
	err := h.Start(context.Background(), nil, []FarmSpec{farmSpec("s1", PolicyUse{Plugin: "path", Config: routes("/", "s1")})})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(h.Status()[0].PID)
	time.Sleep(time.Hour)
}

// as makes the host's plugins misbehave in that way.
func as(t *testing.T, mode string) PluginSpec {
	t.Setenv("PATH", faultyMode+mode)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return PluginSpec{Name: "p", Command: []string{exe}, StartTimeout: 300 * time.Millisecond}
}

// TestHostFaultyStart: a plugin that does not come up is no error of Apply, is
// started again and again, and is one of CheckConfig.
func TestHostFaultyStart(t *testing.T) {
	for mode, want := range map[string]string{
		"garbage":  "Unrecognized remote plugin message",
		"silent":   "was not ready within 300ms",
		"exits":    "its last words: no licence found",
		"version":  "Plugin version: 7",
		"netrpc":   `unsupported plugin protocol "netrpc"`,
		"mute":     "was not ready within 300ms",
		"vanishes": "",
		"forks":    "",
	} {
		t.Run(mode, func(t *testing.T) {
			h, rec, _ := start(t, nil)
			spec := as(t, mode)
			if mode != "silent" && mode != "mute" {
				spec.StartTimeout = 5 * time.Second
			}
			farm := farmSpec("s1", PolicyUse{Plugin: "p"})
			var run *RunError
			if err := h.CheckConfig(ctx, []PluginSpec{spec}, []FarmSpec{farm}); !errors.As(err, &run) || !strings.Contains(err.Error(), want) {
				t.Errorf("CheckConfig: %v, want %s", err, want)
			}
			if err := h.Apply(ctx, []PluginSpec{spec}, []FarmSpec{farm}); err != nil {
				t.Errorf("Apply: %v", err)
			}
			eventually(t, "two restarts", func() bool { return h.Status()[0].Restarts >= 2 })
			if !h.About("p").Routes {
				t.Error("what has never been up may be a route policy")
			}
			if rec.count() != 0 {
				t.Error("a snapshot from nowhere")
			}
		})
	}
}

// TestHostCrashLoop: many crashes leave no goroutine, file or process behind,
// whatever moment they come at.
func TestHostCrashLoop(t *testing.T) {
	before := goleak.IgnoreCurrent()
	h, _, _ := start(t, func(o *Options) { o.BackoffMin, o.BackoffMax = time.Millisecond, time.Millisecond })
	spec := as(t, "vanishes")
	if err := h.Apply(ctx, []PluginSpec{spec}, []FarmSpec{farmSpec("s1", PolicyUse{Plugin: "p"})}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "40 restarts", func() bool { return h.Status()[0].Restarts >= 40 })
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	if len(fds) > 60 {
		t.Errorf("%d open files", len(fds))
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	goleak.VerifyNone(t, before)
}

// TestHostForgottenConnection: a process dies between saying where it listens
// and being connected to. go-plugin then makes a connection, fails and forgets
// it; it would try to connect for ever.
func TestHostForgottenConnection(t *testing.T) {
	h, _, _ := start(t, nil)
	before := goleak.IgnoreCurrent()
	if err := h.prepare(true); err != nil {
		t.Fatal(err)
	}
	spec, err := h.resolveSpec(PluginSpec{Name: "path"})
	if err != nil {
		t.Fatal(err)
	}
	p := newSupervisor(h, *spec, h.dir, h.thread).newProcess()
	if _, err := p.client.Start(); err != nil {
		t.Fatal(err)
	}
	p.child.kill()
	eventually(t, "go-plugin to see that", p.client.Exited)
	// It cancels the context of its calls a moment after that, by a deferred
	// function, which nothing tells us of.
	time.Sleep(50 * time.Millisecond)
	if _, err := p.client.Client(); err == nil {
		t.Error("a dead process was connected to; the test shows nothing")
	}
	p.stop()
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	goleak.VerifyNone(t, before)
}

func TestHostFaultyTicks(t *testing.T) {
	for mode, want := range map[string]string{
		"wrong-server": `server "s9" is not a server of the farm`,
		"tick-error":   "the weather is bad",
		"huge":         "larger than max",
	} {
		t.Run(mode, func(t *testing.T) {
			h, rec, _ := start(t, nil)
			spec := as(t, mode)
			spec.StartTimeout = 0
			mustApply(t, h, []PluginSpec{spec}, farmSpec("s1", PolicyUse{Plugin: "p"}))
			eventually(t, "a note", func() bool { return strings.Contains(h.Status()[0].Farms[0].LastError, want) })
			if rec.count() != 0 || h.Status()[0].State != StateUp {
				t.Errorf("%d snapshots, %s", rec.count(), h.Status()[0].State)
			}
		})
	}
	t.Run("panics", func(t *testing.T) {
		h, _, logs := start(t, nil)
		spec := as(t, "panics")
		spec.StartTimeout = 0
		mustApply(t, h, []PluginSpec{spec}, farmSpec("s1", PolicyUse{Plugin: "p"}))
		eventually(t, "a restart", func() bool { return h.Status()[0].Restarts >= 1 })
		if !strings.Contains(logs.String(), "out of cheese") {
			t.Error("the panic is not in the log")
		}
	})
	t.Run("prints", func(t *testing.T) {
		h, _, logs := start(t, nil)
		spec := as(t, "prints")
		spec.StartTimeout = 0
		mustApply(t, h, []PluginSpec{spec}, farmSpec("s1", PolicyUse{Plugin: "p"}))
		eventually(t, "what it printed", func() bool { return strings.Count(logs.String(), "hello from the plugin") >= 3 })
		if h.Status()[0].Restarts != 0 {
			t.Error("a plugin that prints was restarted")
		}
	})
}

// TestHostUnreachable: neither the plugin's directory nor the runtime directory
// need be open to the plugin's user, and their paths may be long.
func TestHostUnreachable(t *testing.T) {
	private := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	run, bin := filepath.Join(private, "run"), filepath.Join(private, "bin")
	for _, d := range []string{run, bin} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(filepath.Join(binaries, "path"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bin, "path"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	h, rec, _ := start(t, func(o *Options) { o.RuntimeDir, o.Dirs = run, []string{bin} })
	mustApply(t, h, nil, farmSpec("s1", PolicyUse{Plugin: "path", Config: routes("/", "s1")}))
	eventually(t, "the first snapshot", func() bool { return rec.count() > 0 })
}
