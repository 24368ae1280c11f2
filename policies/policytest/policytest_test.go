// SPDX-License-Identifier: Apache-2.0

package policytest_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/policies/policytest"
)

// built holds the plugins, built once and together.
var built struct {
	once sync.Once
	dir  string
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		_ = os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// build builds the plugins and returns the path of one.
func build(t *testing.T, name string) string {
	t.Helper()
	gotool := require.Tool(t, "go")
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "weir-kit-plugins-"); built.err != nil {
			return
		}
		const ours = "github.com/weirgate/weir/"
		out, err := exec.Command(gotool, "build", "-o", built.dir+"/", ours+"plugins/path", ours+"plugins/state", ours+"plugins/load", ours+"plugins/bandwidth",
			ours+"policies/examples/prefer", ours+"policies/examples/tenant", ours+"policies/policytest/testdata/broken").CombinedOutput()
		if err != nil {
			built.err = fmt.Errorf("%w\n%s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return filepath.Join(built.dir, name)
}

// TestPlugins: the plugins that come with Weir, and the examples, pass.
func TestPlugins(t *testing.T) {
	web, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer web.Close()
	for _, c := range []struct {
		name, config string
		bad          []string
	}{
		{"path", `{"routes": [{"prefix": "/a/", "headers": {"X-Tenant": "blue"}, "servers": ["s1"]}], "default": ["s2", "s3"], "affinity": {"cookie": "sid"}}`, []string{`{}`, `{"default": ["s9"]}`}},
		{"state", `{"probe": {"tcp": true, "interval": "100ms"}}`, []string{`{"probe": {}}`, `{"servers": {"s9": "drain"}}`}},
		{"load", `{"agent": {"http": "/load", "interval": "100ms"}}`, []string{`{"min": 2}`}},
		{"bandwidth", `{"each": {"rate": "10Mbit"}, "farm": {"rate": "1Gbit"}}`, []string{`{}`, `{"servers": {"s9": {"rate": "1Mbit"}}}`}},
		{"prefer", `{"server": "s1"}`, []string{`{"server": "s9"}`, `[]`}},
		{"tenant", `{"tenants": {"a": ["s1"], "c": ["s2", "s3"]}}`, []string{`{"tenants": {"a": ["s9"]}}`, `{"unknown": 200}`, `{"other": 1}`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			policytest.Run(t, policytest.Options{Command: []string{build(t, c.name)}, Config: c.config, Bad: c.bad})
		})
	}
}

// TestPython: a plugin that was written from the proto alone passes.
func TestPython(t *testing.T) {
	protoc := require.Tool(t, "protoc")
	const python = "/usr/bin/python3" // the one that has Debian's modules
	if out, err := exec.Command(python, "-c", "import grpc, google.protobuf").CombinedOutput(); err != nil {
		require.Missing(t, "python3-grpcio", strings.TrimSpace(string(out)))
	}
	dir := t.TempDir()
	if out, err := exec.Command(protoc, "--proto_path=../policypb", "--python_out="+dir, "policy.proto").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	script, err := filepath.Abs("../examples/tenant-python/tenant.py")
	if err != nil {
		t.Fatal(err)
	}
	policytest.Run(t, policytest.Options{
		Command: []string{python, script}, Env: []string{"PYTHONPATH=" + dir},
		Config: `{"tenants": {"a": ["s1"], "c": ["s2", "s3"]}}`, Bad: []string{`{"tenants": {"a": ["s9"]}}`, `{"unknown": 200}`, `{"other": 1}`},
	})
}

// TestKitFinds is the negative control: plugins that break a promise fail, and
// the kit says which.
func TestKitFinds(t *testing.T) {
	if mode := os.Getenv("WEIR_KIT_INNER"); mode != "" {
		policytest.Run(t, policytest.Options{Command: []string{os.Getenv("WEIR_KIT_BROKEN"), mode}, Bad: []string{`{"bad": 1}`}, Patience: 1e9})
		return
	}
	broken := build(t, "broken")
	for mode, want := range map[string]string{
		"":           "",
		"mute":       "no line on standard output",
		"greets":     `the first line on standard output is "hello"`,
		"nameless":   "people need both",
		"lenient":    `{"bad": 1} is accepted`,
		"undeclared": "Describe does not say so",
		"stranger":   "does not fit the farm",
		"silent":     "no snapshot within",
		"slow":       "Weir counts it as missed",
		"stays":      "after the end of standard input",
		"dies":       "telemetry",
	} {
		t.Run("mode "+mode, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(os.Args[0], "-test.run=^TestKitFinds$", "-test.v")
			cmd.Env = append(os.Environ(), "WEIR_KIT_INNER="+mode, "WEIR_KIT_BROKEN="+broken)
			if mode == "" {
				cmd.Env = append(cmd.Env, "WEIR_KIT_INNER=well")
			}
			out, err := cmd.CombinedOutput()
			if (err == nil) != (want == "") || !strings.Contains(string(out), want) {
				t.Errorf("%v, want %q in:\n%s", err, want, out)
			}
		})
	}
}
