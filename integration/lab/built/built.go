// SPDX-License-Identifier: Apache-2.0

// Package built finds the executables that the integration tests run: those in
// the directory that WEIR_BIN names (weir, and the plugins under plugins/), or,
// where it is not set, those that it builds once per test process. It must not
// start any of them.
//
// A package that uses it has
//
//	func TestMain(m *testing.M) { built.Main(m) }
package built

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"sync"
	"testing"

	"github.com/weirgate/weir/internal/require"
)

const module = "github.com/weirgate/weir/"

var (
	mu       sync.Mutex
	dir      string              // of what was built here, removed by Main
	programs = map[string]made{} // by package
)

// made is a program that was built, or why it could not be.
type made struct {
	path string
	err  error
}

// Main runs the tests of a package, removes what was built for them, and ends
// the process.
func Main(m *testing.M) {
	code := m.Run()
	if dir != "" {
		if err := os.RemoveAll(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
	}
	os.Exit(code)
}

// Weir returns the absolute path of the weir executable, with the project's
// plugins in plugins/ beside it. The test fails where WEIR_BIN names a
// directory without it or it cannot be built, and is skipped where there is no
// go command.
func Weir(t testing.TB) string {
	t.Helper()
	if bin := os.Getenv("WEIR_BIN"); bin != "" {
		p, err := filepath.Abs(filepath.Join(bin, "weir"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(p); err != nil {
			t.Fatalf("WEIR_BIN: %v", err)
		}
		return p
	}
	for _, name := range []string{"path", "load", "state", "bandwidth"} {
		build(t, module+"plugins/"+name, "plugins/"+name)
	}
	return build(t, module+"cmd/weir", "weir")
}

// Program builds the main package of an import path, or of a directory relative
// to the test's, and returns the path of the executable. It is built once per
// process.
func Program(t testing.TB, pkg string) string {
	t.Helper()
	return build(t, pkg, "other/"+path.Base(pkg))
}

// build makes a package's program below dir, the first time that it is asked.
func build(t testing.TB, pkg, name string) string {
	t.Helper()
	gotool := require.Tool(t, "go")
	mu.Lock()
	defer mu.Unlock()
	p, done := programs[pkg]
	if !done {
		p.path, p.err = compile(gotool, pkg, name)
		programs[pkg] = p
	}
	if p.err != nil {
		t.Fatal(p.err)
	}
	return p.path
}

func compile(gotool, pkg, name string) (string, error) {
	if dir == "" {
		d, err := os.MkdirTemp("", "weir-built-")
		if err != nil {
			return "", err
		}
		dir = d
		// Past the umask: plugins run as another user.
		err = os.Chmod(dir, 0o755)
		for _, sub := range []string{"plugins", "other"} {
			err = errors.Join(err, os.Mkdir(filepath.Join(dir, sub), 0o755), os.Chmod(filepath.Join(dir, sub), 0o755))
		}
		if err != nil {
			return "", err
		}
	}
	p := filepath.Join(dir, name)
	cmd := exec.Command(gotool, "build", "-o", p, pkg)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%v: %w\n%s", cmd.Args, err, out)
	}
	return p, nil
}
