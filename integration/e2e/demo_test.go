// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/demo"
	"github.com/weirgate/weir/internal/require"
)

// TestDemoScenes: every scene of the demo keeps its promise, and its drawing
// its size. FIG 5 of the patent is among them, live.
func TestDemoScenes(t *testing.T) {
	require.NFQueue(t)
	bin := binary(t)
	for _, s := range demo.Scenes() {
		t.Run(s[0], func(t *testing.T) {
			var out strings.Builder
			if err := demo.Run(within(t, 60*time.Second), &out, s[0], demo.Options{Weir: bin}); err != nil {
				t.Fatalf("%v\n%s", err, out.String())
			}
			figure := 0
			for line := range strings.Lines(out.String()) {
				line = strings.TrimRight(line, "\n")
				if len(line) > 100 {
					t.Errorf("%d columns: %s", len(line), line)
				}
				if figure++; line == "" {
					figure = 0
				}
				if figure > 16 {
					t.Errorf("a figure goes beyond 16 lines at: %s", line)
				}
			}
			if !strings.Contains(out.String(), "PASS") {
				t.Errorf("no verdict:\n%s", out.String())
			}
		})
	}
}
