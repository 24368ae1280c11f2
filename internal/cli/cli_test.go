// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"weir": func() { os.Exit(Main(os.Args, os.Environ(), os.Stdout, os.Stderr, testHooks)) },
		"weir-without-hooks": func() {
			os.Exit(Main(os.Args, os.Environ(), os.Stdout, os.Stderr, Hooks{}))
		},
	})
}

// testHooks behave as the configuration's queue number asks.
var testHooks = Hooks{
	Run: func(ctx context.Context, in Instance) (int, error) {
		switch in.Config.Queue.First {
		case 1:
			return 0, errors.New("queue 1 is in use")
		case 2:
			return 0, &config.Error{File: "good.yaml", Line: 1, Key: "source.addresses[0]", Problem: "not an address of this host"}
		}
		in.Log.Info("quiet")
		in.Log.Warn("running", "first", in.Config.Queue.First)
		if in.Supervise {
			in.Log.Warn("supervised", "hang", in.HangTimeout, "configuration", strings.Join(in.ConfigArgs, " "))
			return ExitDegraded, nil
		}
		return 0, nil
	},
	Upgrade: func(_ context.Context, cfg *config.Config, path string, out io.Writer) error {
		if cfg.Queue.First == 1 {
			return errors.New("no supervisor answers")
		}
		_, err := fmt.Fprintln(out, "upgraded to", path)
		return err
	},
	Demo: func(_ context.Context, o DemoOptions, out io.Writer) error {
		_, err := fmt.Fprintln(out, "scene", o.Scene)
		return err
	},
	Cleanup: func(_ context.Context, cfg *config.Config, out io.Writer) error {
		_, err := fmt.Fprintln(out, "removed table", cfg.Firewall.Table)
		return err
	},
	CheckPlugins: func(_ context.Context, cfg *config.Config) error {
		if cfg.Queue.First == 2 {
			return errors.New("the plugin says no")
		}
		return nil
	},
}

// exits runs a program and wants this exit code: exits CODE PROGRAM ARG…
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARG...")
	}
	want, err := strconv.Atoi(args[0])
	if err != nil {
		ts.Fatalf("exits: %v", err)
	}
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		got = ee.ExitCode()
	} else if err != nil {
		ts.Fatalf("exits: %v", err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

type provider control.Status

func (p *provider) Status(context.Context) (*control.Status, error) { return (*control.Status)(p), nil }

// instance serves a status on a socket until the test ends.
func instance(t *testing.T, dir string, st *control.Status) string {
	t.Helper()
	path := filepath.Join(dir, "admin.sock")
	l, err := control.Listen(path, (*provider)(st))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return path
}

func exampleStatus() *control.Status {
	return &control.Status{
		Version: "1.2.3", PID: 42, Started: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Generation: 3, Condition: control.Ready, Shards: 1,
		Farms: []control.Farm{
			{Name: "web", Listen: []string{"203.0.113.10:80"}, Requests: 2000, Opened: 20, Reused: 1980, ReuseRatio: 0.99, Servers: []control.Server{
				{Name: "s1", Address: "198.51.100.11:80", State: "ready", Idle: 3, Active: 1, Opened: 12},
				{Name: "s2", Address: "198.51.100.12:80", State: "drain", Active: 2, Opened: 8},
			}},
			{Name: "new", Listen: []string{"203.0.113.11:80"}},
		},
		Plugins: []control.Plugin{{Name: "path", Version: "1.0.0", State: "running"}},
	}
}

func TestScripts(t *testing.T) {
	ready := instance(t, t.TempDir(), exampleStatus())
	st := exampleStatus()
	st.Condition, st.Reasons = control.Degraded, []string{"plugin path is not running"}
	degraded := instance(t, t.TempDir(), st)
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits,
		},
		Setup: func(env *testscript.Env) error {
			env.Setenv("SOCKET", ready)
			env.Setenv("DEGRADED", degraded)
			env.Setenv("TZ", "UTC")
			return nil
		},
	})
}

// TestStatusJSON: the program's JSON is the API's.
func TestStatusJSON(t *testing.T) {
	want := exampleStatus()
	path := instance(t, t.TempDir(), want)
	var out, errOut bytes.Buffer
	if code := Main([]string{"weir", "status", "--socket", path, "-o", "json"}, nil, &out, &errOut, Hooks{}); code != ExitOK {
		t.Fatalf("exit code %d: %s", code, errOut.String())
	}
	var got control.Status
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	a, errA := json.Marshal(want)
	b, errB := json.Marshal(got)
	if errA != nil || errB != nil || !bytes.Equal(a, b) {
		t.Errorf("got  %s\nwant %s (%v, %v)", b, a, errA, errB)
	}
}

// TestVersionOf names a release, a revision, or says that nobody knows.
func TestVersionOf(t *testing.T) {
	rev := []debug.BuildSetting{{Key: "vcs.revision", Value: "0123456789abcdef"}}
	dirty := append(rev[:1:1], debug.BuildSetting{Key: "vcs.modified", Value: "true"})
	for _, tc := range []struct {
		version  string
		settings []debug.BuildSetting
		want     string
	}{
		{"v1.2.3", rev, "v1.2.3"}, {"(devel)", rev, "devel-0123456789ab"}, {"", dirty, "devel-0123456789ab+changes"}, {"(devel)", nil, "devel"},
	} {
		info := &debug.BuildInfo{Main: debug.Module{Version: tc.version}, Settings: tc.settings}
		if got := versionOf(info); got != tc.want {
			t.Errorf("%q: got %q, want %q", tc.version, got, tc.want)
		}
	}
}
