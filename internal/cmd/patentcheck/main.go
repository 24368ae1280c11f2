// SPDX-License-Identifier: Apache-2.0

// Command patentcheck holds docs/patent.md to its word: every row of its tables
// names tests, and every named test exists and, when results of a run are given,
// passed in it. A row may say "open" instead; open rows are counted and printed.
// The document must have a row for each claim and each figure.
//
// It reads the document, the test files that it names and the results, and
// nothing else.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path"
)

func main() {
	root := flag.String("root", ".", "`directory` of the module")
	doc := flag.String("doc", "docs/patent.md", "the document, below root")
	results := flag.String("results", "", "`file` of results that the test runner wrote; without it tests need only exist")
	flag.Parse()
	if err := run(os.DirFS(*root).(rootFS), *doc, *results, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "patentcheck:", err)
		os.Exit(1)
	}
}

var errFindings = errors.New("the document promises what is not there")

func run(fsys rootFS, doc, results string, out io.Writer) error {
	text, err := fsys.ReadFile(doc)
	if err != nil {
		return err
	}
	rows, findings := parse(path.Base(doc), string(text))
	findings = append(findings, complete(doc, rows)...)
	tests := newTests(fsys)
	var outcome map[string]string
	if results != "" {
		b, err := os.ReadFile(results)
		if err != nil {
			return fmt.Errorf("results of the tests: %w", err)
		}
		outcome = parseResults(string(b))
	}
	open, named := 0, map[string]bool{}
	for _, r := range rows {
		if r.open {
			open++
			fmt.Fprintf(out, "open: %s:%d: %s\n", doc, r.line, r.subject)
		}
		for _, name := range r.tests {
			named[name] = true
			if err := tests.exists(name); err != nil {
				findings = append(findings, fmt.Sprintf("%s:%d: %s: %v", doc, r.line, r.subject, err))
				continue
			}
			if outcome == nil {
				continue
			}
			if got := outcome[name]; got != "PASS" {
				if got == "" {
					got = "was not run"
				}
				findings = append(findings, fmt.Sprintf("%s:%d: %s: test %s: %s", doc, r.line, r.subject, name, got))
			}
		}
	}
	for _, f := range findings {
		fmt.Fprintln(out, f)
	}
	if len(findings) > 0 {
		return errFindings
	}
	fmt.Fprintf(out, "%s: %d rows, %d tests, %d rows open\n", doc, len(rows), len(named), open)
	return nil
}
