// SPDX-License-Identifier: Apache-2.0

package structure

import (
	"io/fs"
	"path"
	"regexp"
	"strings"
	"testing"
)

var testName = regexp.MustCompile("`((?:module|integration|nft|plugins|policies|internal)(?:/[a-z0-9_]+)*)\\.(Test[A-Za-z0-9_]+)`")

// TestNamedTests: every test by which a document shows a guarantee exists in the
// package that it names.
func TestNamedTests(t *testing.T) {
	have := map[string]bool{}
	for _, f := range tree(t) {
		if !f.test {
			continue
		}
		for line := range strings.Lines(string(f.src)) {
			if name, ok := strings.CutPrefix(line, "func "); ok {
				name, _, _ = strings.Cut(name, "(")
				have[path.Clean(f.dir)+"."+name] = true
			}
		}
	}
	for doc, least := range map[string]int{"docs/security.md": 20, "docs/testing.md": 40} {
		b, err := fs.ReadFile(top, doc)
		if err != nil {
			t.Fatal(err)
		}
		names := testName.FindAllStringSubmatch(string(b), -1)
		if len(names) < least {
			t.Errorf("%s: only %d tests are named", doc, len(names))
		}
		for _, m := range names {
			if !have[m[1]+"."+m[2]] {
				t.Errorf("%s names %s.%s, which does not exist", doc, m[1], m[2])
			}
		}
	}
}
