// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"context"
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"go.yaml.in/yaml/v3"

	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/nft"
)

// expression is a query with the place where it stands.
type expression struct{ where, text string }

func dashboard(t *testing.T) (all []expression) {
	t.Helper()
	b, err := os.ReadFile("../../docs/monitoring/grafana.json")
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Title  string
		Panels []struct {
			ID      int
			Title   string
			Type    string
			GridPos struct{ H, W, X, Y int }
			Targets []struct{ RefID, Expr string }
		}
		Templating struct {
			List []struct{ Name, Query string }
		}
	}
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	ids := map[int]bool{}
	for _, p := range d.Panels {
		if ids[p.ID] {
			t.Errorf("two panels have the number %d", p.ID)
		}
		ids[p.ID] = true
		if p.Type != "row" && len(p.Targets) == 0 || p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("panel %q: no query, or beyond the grid", p.Title)
		}
		for _, q := range p.Targets {
			all = append(all, expression{"panel " + p.Title, q.Expr})
		}
	}
	for _, v := range d.Templating.List {
		if strings.Contains(v.Query, "weir_") {
			all = append(all, expression{"variable " + v.Name, v.Query})
		}
	}
	return all
}

func alerts(t *testing.T) (all []expression) {
	t.Helper()
	f, err := os.Open("../../docs/monitoring/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var d struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	dec := yaml.NewDecoder(f)
	dec.KnownFields(true)
	if err := dec.Decode(&d); err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, g := range d.Groups {
		for _, r := range g.Rules {
			if names[r.Alert] || !strings.HasPrefix(r.Alert, "Weir") || r.Annotations["summary"] == "" {
				t.Errorf("alert %q: a name of its own beginning with Weir, and a summary, are missing", r.Alert)
			}
			names[r.Alert] = true
			if !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) {
				t.Errorf("alert %s: severity %q", r.Alert, r.Labels["severity"])
			}
			if _, err := time.ParseDuration(r.For); r.For != "" && err != nil {
				t.Errorf("alert %s: %v", r.Alert, err)
			}
			all = append(all, expression{"alert " + r.Alert, r.Expr})
		}
	}
	if len(all) < 10 {
		t.Errorf("only %d alerts", len(all))
	}
	return all
}

var (
	metricWord = regexp.MustCompile(`\b(weir|process|go)_[a-z0-9_]+`)
	matcher    = regexp.MustCompile(`([a-z_]+)(=~|!~|!=|=)"([^"]*)"`)
	selector   = regexp.MustCompile(`\b(weir_[a-z0-9_]+)\{([^}]*)\}`)
	grouping   = regexp.MustCompile(`\b(?:by|on|without|ignoring|group_left|group_right) ?\(([^)]*)\)`)
)

// exists reports whether a scrape has a series of that name.
func exists(all map[string]*dto.MetricFamily, name string) *dto.MetricFamily {
	if f := all[name]; f != nil {
		return f
	}
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		if base, ok := strings.CutSuffix(name, suffix); ok && all[base] != nil && all[base].GetType() == dto.MetricType_HISTOGRAM {
			return all[base]
		}
	}
	return nil
}

// complain says what is wrong with a query: brackets, names of metrics and
// labels, words that a label never has.
func complain(all map[string]*dto.MetricFamily, text string) (problems []string) {
	var open []rune
	quoted := false
	for _, r := range text {
		switch {
		case r == '"':
			quoted = !quoted
		case quoted:
		case strings.ContainsRune("([{", r):
			open = append(open, r)
		case strings.ContainsRune(")]}", r):
			if len(open) == 0 || open[len(open)-1] != map[rune]rune{')': '(', ']': '[', '}': '{'}[r] {
				return []string{"the brackets do not fit"}
			}
			open = open[:len(open)-1]
		}
	}
	if len(open) > 0 || quoted {
		return []string{"the brackets or quotes are not closed"}
	}
	for _, name := range metricWord.FindAllString(text, -1) {
		f := exists(all, name)
		switch {
		case f == nil:
			problems = append(problems, "there is no metric "+name)
		case strings.HasSuffix(f.GetName(), "_total") && !regexp.MustCompile(`(rate|increase)\(`+name+`\b`).MatchString(text) && !strings.HasPrefix(text, "label_values("):
			problems = append(problems, name+" is a counter, and used without rate")
		}
	}
	for _, m := range selector.FindAllStringSubmatch(text, -1) {
		f := exists(all, m[1])
		if f == nil {
			continue
		}
		have := map[string][]string{"instance": nil, "job": nil, "le": nil}
		for _, x := range f.Metric {
			for _, l := range x.Label {
				have[l.GetName()] = append(have[l.GetName()], l.GetValue())
			}
		}
		for _, l := range matcher.FindAllStringSubmatch(m[2], -1) {
			values, ok := have[l[1]]
			if !ok {
				problems = append(problems, m[1]+" has no label "+l[1])
				continue
			}
			if strings.HasPrefix(l[3], "$") || values == nil {
				continue
			}
			for _, w := range strings.Split(l[3], "|") {
				if !slices.Contains(values, w) {
					problems = append(problems, m[1]+": "+l[1]+" is never "+w)
				}
			}
		}
	}
	for _, g := range grouping.FindAllStringSubmatch(text, -1) {
		for l := range strings.SplitSeq(g[1], ",") {
			if l = strings.TrimSpace(l); l != "" && !slices.Contains([]string{
				"instance", "le", labelFarm, labelServer, labelReason, labelQueue, labelPlugin, labelVerdict, labelCounter,
			}, l) {
				problems = append(problems, "grouped by "+l+", which is no label")
			}
		}
	}
	return problems
}

// everything is a scrape of a source with all the named counters.
func everything(t *testing.T) map[string]*dto.MetricFamily {
	t.Helper()
	s := source(t)
	s.Firewall = func(context.Context) (map[string]nft.Counter, error) {
		out := map[string]nft.Counter{}
		for _, c := range []string{
			nft.CounterClient, nft.CounterServer, nft.CounterSYN, nft.CounterICMP, nft.CounterFragment, nft.CounterSpoof,
			nft.CounterReversePath, nft.CounterMisplaced, nft.CounterGuard, nft.CounterUntracked, nft.CounterBanned,
		} {
			out[c] = nft.Counter{}
		}
		return out, nil
	}
	all, _ := scraped(t, s)
	return all
}

// TestMonitoring: the dashboard and the alert rules can be parsed, and speak of
// metrics and labels that a scrape has.
func TestMonitoring(t *testing.T) {
	all := everything(t)
	for _, e := range append(dashboard(t), alerts(t)...) {
		for _, p := range complain(all, e.text) {
			t.Errorf("%s: %s: %s", e.where, p, e.text)
		}
	}
	if engine.ReasonTableFull.String() != "table-full" {
		t.Error("the alert WeirTableFull has another word for it")
	}
}

// TestMonitoringControl is the negative control.
func TestMonitoringControl(t *testing.T) {
	all := everything(t)
	for _, c := range []struct{ text, want string }{
		{`rate(weir_nothing_total[5m])`, "no metric"},
		{`weir_farm_requests_total`, "without rate"},
		{`rate(weir_farm_requests_total{server="a"}[5m])`, "no label server"},
		{`rate(weir_engine_events_total{reason="no-such"}[5m])`, "never no-such"},
		{`sum by (client) (weir_condition)`, "grouped by client"},
		{`sum(weir_condition`, "not closed"},
		{`sum(weir_condition]`, "do not fit"},
		{`weir_farm_requests_bucket`, "no metric"},
	} {
		if got := strings.Join(complain(all, c.text), "\n"); !strings.Contains(got, c.want) {
			t.Errorf("%s: got %q, want %q", c.text, got, c.want)
		}
	}
	if got := complain(all, `sum by (le) (rate(weir_server_first_byte_seconds_bucket{farm=~"$farm"}[5m]))`); len(got) != 0 {
		t.Errorf("a good query is accused: %q", got)
	}
}

// TestDocumentedMetrics: the operator's guide names metrics that exist.
func TestDocumentedMetrics(t *testing.T) {
	all := everything(t)
	b, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile(`\bweir_[a-z0-9_]+`).FindAllString(string(b), -1)
	for _, name := range names {
		if exists(all, name) == nil && name != "weir_" {
			t.Errorf("docs/operations.md names %s, which no scrape has", name)
		}
	}
	if len(names) < 10 {
		t.Errorf("only %d metrics are named", len(names))
	}
}
