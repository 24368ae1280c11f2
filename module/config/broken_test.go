// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write golden files and docs/config.md anew")

// TestBroken loads every broken configuration of testdata/broken and compares
// the whole message with the golden file beside it. A directory is loaded as
// one.
func TestBroken(t *testing.T) {
	entries, err := os.ReadDir("testdata/broken")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		name, isYAML := strings.CutSuffix(e.Name(), ".yaml")
		if !isYAML && !e.IsDir() {
			continue
		}
		n++
		t.Run(name, func(t *testing.T) {
			path := "testdata/broken/" + e.Name()
			cfg, err := Load(LoadOptions{Files: []string{path}})
			if err == nil {
				t.Fatalf("no error; loaded %+v", cfg)
			}
			var list Errors
			var one *Error
			if !errors.As(err, &list) || len(list) == 0 || !errors.As(err, &one) {
				t.Fatalf("error of type %T, want Errors", err)
			}
			for _, e := range list {
				if !strings.HasPrefix(e.File, "testdata/broken/") || e.Problem == "" || e.Expected == "" {
					t.Errorf("incomplete: %+v", e)
				}
			}
			got := err.Error() + "\n"
			golden := filepath.Join("testdata/broken", name+".txt")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), got); d != "" {
				t.Errorf("message differs (-want +got):\n%s", d)
			}
		})
	}
	if n < 20 {
		t.Errorf("only %d broken configurations", n)
	}
}
