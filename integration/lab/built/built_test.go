// SPDX-License-Identifier: Apache-2.0

package built

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestMain(m *testing.M) { Main(m) }

// TestGiven: WEIR_BIN is taken as it is, by its absolute path.
func TestGiven(t *testing.T) {
	bin := t.TempDir()
	want := filepath.Join(bin, "weir")
	if err := os.WriteFile(want, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Chdir(filepath.Dir(bin))
	t.Setenv("WEIR_BIN", filepath.Base(bin))
	if got := Weir(t); got != want {
		t.Errorf("found %s, want %s", got, want)
	}
}

// TestProgram: what is built can be run, and is built once.
func TestProgram(t *testing.T) {
	const pkg = module + "internal/cmd/patentcheck"
	p := Program(t, pkg)
	before, err := os.Stat(p)
	if err != nil {
		t.Fatal(err)
	}
	if again := Program(t, pkg); again != p {
		t.Errorf("built a second time, as %s", again)
	}
	if after, err := os.Stat(p); err != nil || after.ModTime() != before.ModTime() {
		t.Errorf("built a second time: %v", err)
	}
	if out, err := exec.Command(p, "-h").CombinedOutput(); len(out) == 0 {
		t.Errorf("%s -h says nothing: %v", p, err)
	}
	if _, err := compile("false", pkg, "other/none"); err == nil {
		t.Error("a build that fails gives no error")
	}
}
