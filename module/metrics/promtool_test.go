// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weirgate/weir/internal/require"
)

// promtool runs Prometheus' own tool with a text on standard input.
func promtool(t *testing.T, stdin string, args ...string) (string, error) {
	t.Helper()
	c := exec.Command(require.Tool(t, "promtool"), args...)
	c.Stdin = strings.NewReader(stdin)
	out, err := c.CombinedOutput()
	return string(out), err
}

// TestPromtool has Prometheus itself read what is made for it: the alert rules
// and their tests, every query of the dashboard, and a scrape.
func TestPromtool(t *testing.T) {
	const rules = "../../docs/monitoring/alerts.yaml"
	if out, err := promtool(t, "", "check", "rules", rules); err != nil {
		t.Errorf("promtool check rules: %v\n%s", err, out)
	}
	t.Run("alerts fire", func(t *testing.T) {
		out, err := promtool(t, "", "test", "rules", "testdata/alerts_test.yaml")
		if err != nil {
			t.Errorf("promtool test rules: %v\n%s", err, out)
		}
		cases, err := os.ReadFile("testdata/alerts_test.yaml")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range alerts(t) {
			name := strings.TrimPrefix(e.where, "alert ")
			if !strings.Contains(string(cases), `alertname="`+name+`"`) {
				t.Errorf("no case has %s fire", name)
			}
		}
	})
	t.Run("dashboard", func(t *testing.T) {
		var b strings.Builder
		b.WriteString("groups:\n  - name: dashboard\n    rules:\n")
		n := 0
		for _, e := range dashboard(t) {
			if strings.HasPrefix(e.text, "label_values(") {
				continue // Grafana's, not PromQL
			}
			n++
			fmt.Fprintf(&b, "      - {record: \"q:%d\", expr: %q}\n", n, strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*", "$farm", ".*").Replace(e.text))
		}
		file := filepath.Join(t.TempDir(), "dashboard.yaml")
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		if out, err := promtool(t, "", "check", "rules", file); err != nil || !strings.Contains(out, fmt.Sprintf("%d rules found", n)) {
			t.Errorf("promtool check rules: %v\n%s\n%s", err, out, b.String())
		}
	})
	t.Run("scrape", func(t *testing.T) {
		_, text := scraped(t, source(t))
		if out, err := promtool(t, text, "check", "metrics"); err != nil || out != "" {
			t.Errorf("promtool check metrics: %v\n%s", err, out)
		}
		// The control: a name against the conventions.
		if _, err := promtool(t, "# HELP x_total A counter.\n# TYPE x_total gauge\nx_total 1\n", "check", "metrics"); err == nil {
			t.Error("a gauge with the name of a counter is taken")
		}
	})
}
