// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
)

// whole returns a document that has a row for everything, with the cell for
// the tests of claim 1.
func whole(cell string) string {
	s := "| what | rule | test |\n| --- | --- | --- |\n| claim 1 | x | " + cell + " |\n| claims 2–38 | x | open |\n"
	for _, f := range []string{"3", "4", "5", "6A", "6B", "7", "8", "9"} {
		s += "| FIG " + f + ", pooling | x | open: later |\n"
	}
	return s + "\n| other | table |\n| --- | --- |\n| a | b |\n"
}

func TestRun(t *testing.T) {
	const engine = "package engine\nimport \"testing\"\nfunc TestThere(t *testing.T) { t.Log(1) }\n" +
		"func TestEmpty(t *testing.T) {}\nfunc TestHelper(n int) { _ = n }\nfunc (x y) TestMethod(t *testing.T) { t.Log(1) }\n"
	for _, c := range []struct {
		name, doc, results, want string
	}{
		{"good", whole("`module/engine.TestThere`"), "", ""},
		{"passed", whole("`module/engine.TestThere`"), "PASS github.com/weirgate/weir/module/engine TestThere\n", ""},
		{"passed twice", whole("`module/engine.TestThere`"), "PASS github.com/weirgate/weir/module/engine TestThere\nSKIP github.com/weirgate/weir/module/engine (race) TestThere\n", ""},
		{"failed under race", whole("`module/engine.TestThere`"), "PASS github.com/weirgate/weir/module/engine TestThere\nFAIL github.com/weirgate/weir/module/engine (race) TestThere\n", "TestThere: FAIL"},
		{"skipped", whole("`module/engine.TestThere`"), "SKIP github.com/weirgate/weir/module/engine TestThere\n", "TestThere: SKIP"},
		{"not run", whole("`module/engine.TestThere`"), "PASS github.com/weirgate/weir/module/pool TestThere\n", "was not run"},
		{"absent", whole("`module/engine.TestAbsent`"), "", "no test TestAbsent"},
		{"empty", whole("`module/engine.TestEmpty`"), "", "no test TestEmpty"},
		{"helper", whole("`module/engine.TestHelper`"), "", "no test TestHelper"},
		{"method", whole("`module/engine.TestMethod`"), "", "no test TestMethod"},
		{"no directory", whole("`module/nowhere.TestX`"), "", "nowhere"},
		{"one of two", whole("`module/engine.TestThere`, `module/engine.TestAbsent`"), "", "no test TestAbsent"},
		{"nothing", whole(""), "", "neither a test"},
		{"prose", whole("see above"), "", "neither a test"},
		{"claim missing", strings.Replace(whole("open"), "2–38", "2–37", 1), "", "no row for claim 38"},
		{"claim beyond", strings.Replace(whole("open"), "2–38", "2–39", 1), "", "names no claims"},
		{"figure missing", strings.Replace(whole("open"), "FIG 7", "Figure 7", 1), "", "no row for FIG 7"},
		{"short row", whole("open") + "\n| what | test |\n| - | - |\n| x |\n", "", "no cell"},
	} {
		t.Run(c.name, func(t *testing.T) {
			fsys := fstest.MapFS{
				"docs/patent.md":               {Data: []byte(c.doc)},
				"module/engine/engine_test.go": {Data: []byte(engine)},
				"module/engine/engine.go":      {Data: []byte("package engine\n")},
			}
			results := ""
			if c.results != "" {
				results = filepath.Join(t.TempDir(), "results")
				if err := os.WriteFile(results, []byte(c.results), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			var out bytes.Buffer
			err := run(fsys, "docs/patent.md", results, &out)
			if (err == nil) != (c.want == "") || !strings.Contains(out.String(), c.want) {
				t.Errorf("error %v, want %q in\n%s", err, c.want, out.String())
			}
			if err == nil && !strings.Contains(out.String(), "1 tests") {
				t.Errorf("summary: %s", out.String())
			}
		})
	}
}
