// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// documented returns the fenced block of a document below docs whose fence says
// info, without its indentation. Tests run what people are told to write.
func documented(t *testing.T, file, info string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../../docs", file))
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	inside, found := false, false
	indent := ""
	for line := range strings.Lines(string(b)) {
		text := strings.TrimSpace(line)
		switch {
		case !inside && text == "```"+info:
			if found {
				t.Fatalf("docs/%s has two blocks %q", file, info)
			}
			inside, found = true, true
			indent = line[:strings.Index(line, "```")]
		case inside && text == "```":
			inside = false
		case inside:
			out.WriteString(strings.TrimPrefix(line, indent))
		}
	}
	if !found || inside {
		t.Fatalf("docs/%s has no block %q, or it has no end", file, info)
	}
	return out.String()
}
