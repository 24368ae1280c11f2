// SPDX-License-Identifier: Apache-2.0

package policytest_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/policies/policytest"
)

// codeOf returns the code block that follows a comment in a document.
func codeOf(t *testing.T, document, mark string) string {
	t.Helper()
	b, err := os.ReadFile("../../" + document)
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile("(?s)<!-- " + regexp.QuoteMeta(mark) + " -->\n```[a-z]*\n(.*?)```\n").FindSubmatch(b)
	if m == nil {
		t.Fatalf("%s has no code marked %q", document, mark)
	}
	return string(m[1])
}

// TestTutorial: the plugin of the tutorial has at most 40 lines, is the example
// of the tree, builds as it stands there, and keeps the contract.
func TestTutorial(t *testing.T) {
	const file = "policies/examples/prefer/main.go"
	code := codeOf(t, "docs/plugins.md", file)
	if codeOf(t, "README.md", file) != code {
		t.Error("README.md has another plugin than docs/plugins.md")
	}
	if n := strings.Count(code, "\n"); n > 40 {
		t.Errorf("the tutorial's plugin has %d lines", n)
	}
	if b, err := os.ReadFile("../../" + file); err != nil || string(b) != code {
		t.Errorf("docs/plugins.md and %s differ (%v)", file, err)
	}
	// What stands in the text is what is built, without a file in the tree.
	dir := t.TempDir()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(here, "tutorial", "main.go"): filepath.Join(dir, "main.go")}})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{"main.go": []byte(code), "overlay.json": overlay} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	bin := filepath.Join(dir, "prefer")
	if out, err := exec.Command(require.Tool(t, "go"), "build", "-overlay", filepath.Join(dir, "overlay.json"), "-o", bin, "./tutorial").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	policytest.Run(t, policytest.Options{Command: []string{bin}, Config: `{"server": "s1", "score": 3}`, Bad: []string{`{"server": "s9"}`}})
}
