// SPDX-License-Identifier: Apache-2.0

package structure

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"testing"
)

const modulePath = "github.com/weirgate/weir"

// file is one Go file of the tree, parsed whatever its build tags say.
type file struct {
	path      string // from the top, with slashes
	dir       string
	test      bool
	generated bool
	imports   map[string]string // import path -> the name in this file
	ast       *ast.File
	src       []byte
}

// ours returns the import path below the module's, "" for a foreign one.
func ours(importPath string) string {
	if importPath == modulePath {
		return "."
	}
	if rest, ok := strings.CutPrefix(importPath, modulePath+"/"); ok {
		return rest
	}
	return ""
}

// within reports whether dir is one of the roots or lies below one.
func within(dir string, roots ...string) bool {
	for _, r := range roots {
		if dir == r || strings.HasPrefix(dir, r+"/") {
			return true
		}
	}
	return false
}

var top = os.DirFS("../..")

// skipped are directories that hold nothing of the source tree.
func skipped(p string) bool {
	base := path.Base(p)
	return p == "bin" || p == "build" || base == "testdata" || base == ".git"
}

func parseSource(name string, src []byte) (*file, error) {
	a, err := parser.ParseFile(token.NewFileSet(), name, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	f := &file{path: name, dir: path.Dir(name), test: strings.HasSuffix(name, "_test.go"),
		generated: ast.IsGenerated(a), imports: map[string]string{}, ast: a, src: src}
	for _, i := range a.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err != nil {
			return nil, err
		}
		local := path.Base(p)
		if strings.HasPrefix(local, "v") && len(local) == 2 {
			local = path.Base(path.Dir(p)) // math/rand/v2 is rand
		}
		if i.Name != nil {
			local = i.Name.Name
		}
		f.imports[p] = local
	}
	return f, nil
}

// tree parses every Go file.
func tree(t *testing.T) []*file {
	t.Helper()
	var files []*file
	err := fs.WalkDir(top, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && skipped(p) {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(p, ".go") {
			return nil
		}
		src, err := fs.ReadFile(top, p)
		if err != nil {
			return err
		}
		f, err := parseSource(p, src)
		if err != nil {
			return err
		}
		files = append(files, f)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 20 {
		t.Fatalf("only %d Go files were found", len(files))
	}
	return files
}

// report fails the test with every finding.
func report(t *testing.T, findings []string) {
	t.Helper()
	for _, f := range findings {
		t.Error(f)
	}
}

func firstLine(src []byte) string {
	line, _, _ := bytes.Cut(src, []byte("\n"))
	return string(line)
}

func finding(f *file, format string, args ...any) string {
	return f.path + ": " + fmt.Sprintf(format, args...)
}
