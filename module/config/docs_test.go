// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// block is a fenced block of a document.
type block struct {
	file string
	line int    // of its first line of text
	info string // what stands behind the fence
	text string
}

var fence = regexp.MustCompile("^( *)```(.*)$")

// blocks reads the fenced blocks of a Markdown file, without the indentation of
// their fence.
func blocks(t *testing.T, path string) (out []block) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var open *block
	indent := ""
	for i, line := range strings.Split(string(b), "\n") {
		m := fence.FindStringSubmatch(line)
		switch {
		case m != nil && open == nil:
			open, indent = &block{file: path, line: i + 2, info: strings.TrimSpace(m[2])}, m[1]
		case m != nil:
			out = append(out, *open)
			open = nil
		case open != nil:
			open.text += strings.TrimPrefix(line, indent) + "\n"
		}
	}
	if open != nil {
		t.Errorf("%s:%d: the block has no end", path, open.line)
	}
	return out
}

// documents are the files that people read.
func documents(t *testing.T) []string {
	t.Helper()
	all, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(all) < 4 {
		t.Fatalf("documents: %q, %v", all, err)
	}
	return append(all, "../../README.md")
}

// TestDocumentedConfigs loads every block that is marked as a whole
// configuration (```yaml weir), and every configuration that is shipped.
func TestDocumentedConfigs(t *testing.T) {
	dir := t.TempDir()
	n := 0
	for _, path := range documents(t) {
		for _, b := range blocks(t, path) {
			if b.info != "yaml weir" {
				// A configuration without the mark would not be checked.
				if strings.HasPrefix(b.info, "yaml") && strings.Contains(b.text, "farms:") {
					t.Errorf("%s:%d: a configuration without the mark: ```yaml weir", b.file, b.line)
				}
				continue
			}
			n++
			file := filepath.Join(dir, fmt.Sprintf("%d.yaml", n))
			// Lines count as in the document.
			if err := os.WriteFile(file, []byte(strings.Repeat("\n", b.line-1)+b.text), 0o644); err != nil {
				t.Fatal(err)
			}
			loads(t, file, b.file)
		}
	}
	if n < 5 {
		t.Errorf("only %d configurations in documents", n)
	}
	for _, path := range []string{"../../docs/examples/weir.yaml", "../../cmd/weir/packaging/weir.yaml"} {
		loads(t, path, path)
	}
}

func loads(t *testing.T, file, name string) {
	t.Helper()
	if _, err := Load(LoadOptions{Files: []string{file}}); err != nil {
		t.Errorf("%s: %s", name, strings.ReplaceAll(err.Error(), file, name))
	}
	if p := fitsFile(t, file); len(p) > 0 {
		t.Errorf("%s: the JSON Schema refuses it:\n%s", name, strings.Join(p, "\n"))
	}
}

var link = regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)

// TestDocumentedPlaces: what a document links to is there, and the keys that
// the operator's guide names exist.
func TestDocumentedPlaces(t *testing.T) {
	for _, path := range documents(t) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(b), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), m[1])); err != nil {
				t.Errorf("%s links to %s: %v", path, m[1], err)
			}
		}
	}
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	farm := schemaAt("farms[0]")
	for _, m := range regexp.MustCompile("`([a-z]+)\\.([a-z_]+)(?:: [a-z]+)?`").FindAllStringSubmatch(string(text), -1) {
		section := schema.child(m[1])
		if section == nil {
			section = farm.child(m[1])
		}
		if section == nil || section.child(m[2]) == nil {
			t.Errorf("docs/operations.md names the key %s.%s, which does not exist", m[1], m[2])
		}
	}
}
