// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// rootFS is the module's directory.
type rootFS = interface {
	fs.ReadFileFS
	fs.ReadDirFS
}

// row is one row of a table that has a column "test".
type row struct {
	line    int    // in the document
	subject string // its first cell
	tests   []string
	open    bool
}

// testName is "module/engine.TestFigure6A": directory, dot, function.
var testName = regexp.MustCompile("^`([a-z0-9_./-]+)\\.(Test[A-Za-z0-9_]+)`$")

// parse reads the tables of the document. A row without a test that is not
// open, and a cell that is neither, is a finding.
func parse(name, text string) (rows []row, findings []string) {
	column := -1 // of the tests, in the table that is being read
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") {
			column = -1
			continue
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for j := range cells {
			cells[j] = strings.TrimSpace(cells[j])
		}
		if column < 0 {
			column = slices.Index(cells, "test")
			continue
		}
		if strings.Trim(line, "|-: ") == "" {
			continue
		}
		r := row{line: i + 1, subject: cells[0]}
		bad := func(format string, args ...any) {
			findings = append(findings, fmt.Sprintf("%s:%d: %s: %s", name, r.line, r.subject, fmt.Sprintf(format, args...)))
		}
		if column >= len(cells) {
			bad("the row has no cell for its test")
			continue
		}
		for c := range strings.SplitSeq(cells[column], ",") {
			c = strings.TrimSpace(c)
			switch m := testName.FindStringSubmatch(c); {
			case c == "open" || strings.HasPrefix(c, "open: "):
				r.open = true
			case m != nil:
				r.tests = append(r.tests, m[1]+"."+m[2])
			default:
				bad("%q is neither a test such as `module/engine.TestName` nor \"open\"", c)
			}
		}
		rows = append(rows, r)
	}
	return rows, findings
}

const claims = 38

var (
	claimCell  = regexp.MustCompile(`^claims? ([0-9, –-]+)$`)
	figureCell = regexp.MustCompile(`^FIG ([0-9]+)[A-Z]?\b`)
)

// complete looks for a row for every claim and every figure from 3 to 9.
func complete(doc string, rows []row) (findings []string) {
	claim, figure := map[int]bool{}, map[int]bool{}
	for _, r := range rows {
		if m := claimCell.FindStringSubmatch(r.subject); m != nil {
			for part := range strings.SplitSeq(m[1], ",") {
				from, to, _ := strings.Cut(strings.ReplaceAll(part, "–", "-"), "-")
				a, err := strconv.Atoi(strings.TrimSpace(from))
				if err != nil {
					findings = append(findings, fmt.Sprintf("%s:%d: %q names no claims", doc, r.line, r.subject))
					continue
				}
				b := a
				if to != "" {
					if b, err = strconv.Atoi(strings.TrimSpace(to)); err != nil || b < a || b > claims {
						findings = append(findings, fmt.Sprintf("%s:%d: %q names no claims", doc, r.line, r.subject))
						continue
					}
				}
				for n := a; n <= b; n++ {
					claim[n] = true
				}
			}
		}
		if m := figureCell.FindStringSubmatch(r.subject); m != nil {
			n, _ := strconv.Atoi(m[1])
			figure[n] = true
		}
	}
	for n := 1; n <= claims; n++ {
		if !claim[n] {
			findings = append(findings, fmt.Sprintf("%s: no row for claim %d", doc, n))
		}
	}
	for n := 3; n <= 9; n++ {
		if !figure[n] {
			findings = append(findings, fmt.Sprintf("%s: no row for FIG %d", doc, n))
		}
	}
	return findings
}

// tests knows the test functions of the directories that were asked about.
type tests struct {
	fsys rootFS
	dirs map[string]map[string]bool
}

func newTests(fsys rootFS) *tests { return &tests{fsys: fsys, dirs: map[string]map[string]bool{}} }

// exists reports why the test "dir.TestName" is not there.
func (t *tests) exists(name string) error {
	dir, function := path.Split(strings.ReplaceAll(name, ".Test", "/Test"))
	dir = path.Clean(dir)
	known, ok := t.dirs[dir]
	if !ok {
		var err error
		if known, err = t.read(dir); err != nil {
			return err
		}
		t.dirs[dir] = known
	}
	if !known[function] {
		return fmt.Errorf("there is no test %s in %s", function, dir)
	}
	return nil
}

func (t *tests) read(dir string) (map[string]bool, error) {
	entries, err := t.fsys.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	found := map[string]bool{}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		src, err := t.fsys.ReadFile(path.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path.Join(dir, e.Name()), src, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && isTest(fn) {
				found[fn.Name.Name] = true
			}
		}
	}
	return found, nil
}

// isTest: func TestName(x *testing.T) with a body that does something.
func isTest(fn *ast.FuncDecl) bool {
	if fn.Recv != nil || fn.Type.Params.NumFields() != 1 || fn.Body == nil || len(fn.Body.List) == 0 {
		return false
	}
	star, ok := fn.Type.Params.List[0].Type.(*ast.StarExpr)
	if !ok {
		return false
	}
	sel, ok := star.X.(*ast.SelectorExpr)
	return ok && sel.Sel.Name == "T"
}

// parseResults reads "RESULT importpath TestName" lines. Keys are as in the
// document, so the module's path is cut off. A test that ran twice passed only
// if it passed both times; a skip in the second pass, under the race detector,
// says nothing.
func parseResults(text string) map[string]string {
	const module = "github.com/weirgate/weir/"
	out := map[string]string{}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 3 {
			continue
		}
		again := len(f) == 4 // "RESULT path (race) TestName"
		key := strings.TrimPrefix(f[1], module) + "." + f[len(f)-1]
		if again && (f[0] == "SKIP" || out[key] == "FAIL") {
			continue
		}
		out[key] = f[0]
	}
	return out
}
