// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestReport(t *testing.T) {
	in := strings.Join([]string{
		"\x16=== RUN   TestA",
		"not ended\x16--- PASS: TestA (0.00s)",
		"--- FAIL: TestForged (0.00s)", // a test printed this
		"\x16=== RUN   TestB",
		"    b_test.go:12: skipped: needs netns: root",
		"\x16--- SKIP: TestB (0.00s)",
		"\x16=== RUN   TestC/sub",
		"    \x16--- FAIL: TestC/sub (0.00s)",
		"\x16--- FAIL: TestC (0.10s)",
		"\x16FAIL",
	}, "\n")
	var r report
	r.read(bufio.NewReader(strings.NewReader(in)))
	want := []test{
		{"TestA", "PASS", ""}, {"TestB", "SKIP", "needs netns: root"},
		{"TestC", "FAIL", ""},
	}
	if !slices.Equal(r.tests, want) || !r.failed {
		t.Errorf("got %+v, want %+v", r.tests, want)
	}
	if strings.Contains(r.output.String(), "\x16") || !strings.Contains(r.output.String(), "not ended\n--- PASS") {
		t.Errorf("output:\n%s", r.output.String())
	}
}

func TestDecode(t *testing.T) {
	in := `{"ImportPath":"x/a","TestGoFiles":["a_test.go"],"TestImports":["x/internal/require"]}
{"ImportPath":"x/b","XTestGoFiles":["b_test.go"]}
{"ImportPath":"x/c"}`
	pkgs, err := decode([]byte(in), "")
	if err != nil || len(pkgs) != 2 || !pkgs[0].kernel || pkgs[1].kernel {
		t.Errorf("%+v, %v", pkgs, err)
	}
	if pkgs, _ = decode([]byte(in), "/b,"); len(pkgs) != 1 || pkgs[0].ImportPath != "x/b" {
		t.Errorf("only /b: %+v", pkgs)
	}
	if _, err := decode([]byte("{"), ""); err == nil {
		t.Error("half an answer was taken")
	}
}

// TestWhole runs the program's main part on a module with a package of each
// kind, and looks at what it says and whether it tells failure from success.
func TestWhole(t *testing.T) {
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("needs the go command in PATH")
	}
	dir := t.TempDir()
	files := map[string]string{
		"go.mod":             "module x\n\ngo 1.21\n",
		"good/good_test.go":  "package good\nimport \"testing\"\nfunc TestGood(*testing.T) {}\nfunc TestNot(t *testing.T) { t.Skip(\"needs the moon\") }\n",
		"bad/bad_test.go":    "package bad\nimport \"testing\"\nfunc TestBad(t *testing.T) { t.Error(\"it is bad\") }\n",
		"dies/dies_test.go":  "package dies\nimport (\"os\"; \"testing\")\nfunc TestDies(*testing.T) { os.Exit(3) }\n",
		"broken/b_test.go":   "package broken\nfunc broken() { undefined() }\n",
		"slow/slow_test.go":  "package slow\nimport \"testing\"\nfunc TestSlow(*testing.T) { select {} }\n",
		"data/testdata/x":    "here",
		"data/data_test.go":  "package data\nimport (\"os\"; \"testing\")\nfunc TestData(t *testing.T) { if _, err := os.ReadFile(\"testdata/x\"); err != nil { t.Fatal(err) } }\n",
		"none/none.go":       "package none\n",
		"leak/leak_test.go":  "package leak\nimport (\"os\"; \"os/exec\"; \"testing\")\nfunc TestLeak(t *testing.T) { c := exec.Command(\"sleep\", \"30\"); c.Stdout = os.Stdout; if err := c.Start(); err != nil { t.Fatal(err) } }\n",
		"alone/a_test.go":    "package alone\nimport \"testing\"\nfunc TestAlone(*testing.T) {}\n",
		"alone/forgery.go":   "package alone\n",
		"good/doc.go":        "package good\n",
		"build/keep":         "",
		"build/tests/.keep":  "",
		"good/testdata/keep": "",
	}
	for name, text := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	t.Setenv("GOFLAGS", "-mod=mod")
	run := func(only string, timeout time.Duration) (bool, string) {
		t.Helper()
		o := options{goCommand: "go", dir: "build/tests", timeout: timeout, race: "off", only: only, results: "build/results.txt"}
		var out bytes.Buffer
		ok, err := runAll(context.Background(), &o, &out)
		if err != nil {
			t.Fatalf("%v\n%s", err, out.String())
		}
		return ok, out.String()
	}
	for _, c := range []struct {
		only    string
		ok      bool
		want    []string
		timeout time.Duration
	}{
		{"good,data", true, []string{"ok  \tx/good", "skipped 1: needs the moon", "\n2 passed, 0 failed, 1 skipped\n"}, time.Minute},
		{"good,bad", false, []string{"it is bad", "FAIL\tx/bad", "\n1 passed, 1 failed, 1 skipped\n"}, time.Minute},
		{"dies", false, []string{"exit status 3", "\n0 passed, 1 failed, 0 skipped\n"}, time.Minute},
		{"broken,alone", false, []string{"undefined", "[build failed]", "\n1 passed, 1 failed, 0 skipped\n"}, time.Minute},
		{"slow", false, []string{"test timed out after", "TestSlow", " 1 failed,"}, 200 * time.Millisecond},
		{"leak", false, []string{"a process that they started did not", " 1 failed,"}, time.Minute},
	} {
		ok, out := run(c.only, c.timeout)
		if ok != c.ok {
			t.Errorf("%s: ok %v, want %v", c.only, ok, c.ok)
		}
		for _, w := range c.want {
			if !strings.Contains(out, w) {
				t.Errorf("%s: %q is missing in\n%s", c.only, w, out)
			}
		}
	}
	run("good", time.Minute)
	if b, err := os.ReadFile("build/results.txt"); err != nil || string(b) != "PASS x/good TestGood\nSKIP x/good TestNot\n" {
		t.Errorf("results: %q, %v", b, err)
	}
}
