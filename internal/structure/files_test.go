// SPDX-License-Identifier: Apache-2.0

package structure

import (
	"bytes"
	"io/fs"
	"slices"
	"strings"
	"testing"
)

const spdx = "SPDX-License-Identifier: Apache-2.0"

// maxLines is where a file surely holds more than one thing.
const maxLines = 900

// topEntries are the directories that the tree has; bin and build are made.
var topEntries = []string{
	".ci", ".git", ".github", "bin", "build", "cmd", "docs", "integration", "internal", "module", "nft", "plugins", "policies",
}

func TestTopDirectories(t *testing.T) {
	entries, err := fs.ReadDir(top, ".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() && !slices.Contains(topEntries, e.Name()) {
			t.Errorf("directory %s: the tree's parts are %s", e.Name(), strings.Join(topEntries, ", "))
		}
	}
}

// The program that runs in the kernel is offered under the kernel's licence too:
// the kernel lends the lookup of routes to nobody else.
const (
	kernelProgram  = "module/syncookie/program.go"
	kernelLicences = " OR MIT OR GPL-2.0-only"
)

// TestLicence looks for the SPDX line: the first one of a Go file and of a
// .proto, among the first three of a script or Makefile.
func TestLicence(t *testing.T) {
	for _, f := range tree(t) {
		line := firstLine(f.src)
		if f.path == kernelProgram {
			line = strings.TrimSuffix(line, kernelLicences)
		}
		if line != "// "+spdx && !(f.generated && bytes.Contains(f.src, []byte("// "+spdx))) {
			t.Errorf("%s: the first line must be \"// %s\", is %q", f.path, spdx, line)
		}
	}
	err := fs.WalkDir(top, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && skipped(p) {
			return fs.SkipDir
		}
		name := d.Name()
		if d.IsDir() || !strings.HasSuffix(name, ".sh") && !strings.HasSuffix(name, ".proto") && name != "Makefile" && p != ".ci/run" {
			return nil
		}
		b, err := fs.ReadFile(top, p)
		if err != nil {
			return err
		}
		lines := strings.SplitN(string(b), "\n", 4)
		if !strings.Contains(strings.Join(lines[:min(3, len(lines))], "\n"), spdx) {
			t.Errorf("%s: no line with %q among the first three", p, spdx)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestPackageComments: a package says what it is for and what it must not do.
func TestPackageComments(t *testing.T) {
	type state struct {
		comment, generated bool
		name               string
	}
	dirs := map[string]*state{}
	for _, f := range tree(t) {
		s := dirs[f.dir]
		if s == nil {
			s = &state{generated: true}
			dirs[f.dir] = s
		}
		s.generated = s.generated && f.generated
		if !f.test {
			s.name = f.ast.Name.Name
		}
		if f.ast.Doc == nil {
			continue
		}
		text := strings.TrimSpace(f.ast.Doc.Text())
		name := strings.TrimSuffix(f.ast.Name.Name, "_test")
		if strings.HasPrefix(text, "Package "+name) || f.ast.Name.Name == "main" && strings.HasPrefix(text, "Command ") {
			s.comment = true
		}
	}
	for dir, s := range dirs {
		if !s.comment && !s.generated {
			t.Errorf("%s: no package comment that begins with \"Package NAME\" (\"Command NAME\" for a program)", dir)
		}
	}
}

func TestFileLength(t *testing.T) {
	for _, f := range tree(t) {
		if n := bytes.Count(f.src, []byte("\n")); n > maxLines && !f.generated {
			t.Errorf("%s: %d lines, more than %d: does it hold two things?", f.path, n, maxLines)
		}
	}
}
