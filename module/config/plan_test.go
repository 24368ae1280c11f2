// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

const planBase = `
source: {addresses: [198.51.100.1, 198.51.100.2]}
farms:
  - name: web
    listen: [203.0.113.10:80, 203.0.113.11:80]
    servers:
      - {name: s1, address: 198.51.100.11:80}
      - {name: s2, address: 198.51.100.12:80, weight: 2}
    policies: [state, {use: path, config: {routes: [{prefix: /, servers: [s1]}], token: one}}]
  - name: old
    listen: 203.0.113.12:80
    servers: [{name: s1, address: 198.51.100.11:80}]
plugins:
  - {name: bandwidth, config: {servers: {s1: {rate: 100Mbit}}}}
`

func parsed(t *testing.T, text string) *Config {
	t.Helper()
	file := filepath.Join(t.TempDir(), "weir.yaml")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	cfg, err := Load(LoadOptions{Files: []string{file}})
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// TestCompare: every kind of difference, its class and its place.
func TestCompare(t *testing.T) {
	next := `
stop_timeout: 3s
source: {addresses: [198.51.100.1, 198.51.100.3], ports: 20000-21000}
farms:
  - name: new
    listen: 203.0.113.13:80
    servers: [{name: s1, address: 198.51.100.11:80}]
  - name: web
    listen: [203.0.113.11:80, 203.0.113.14:80]
    servers:
      - {name: s3, address: 198.51.100.13:80, weight: 3, backup: true}
      - {name: s2, address: 198.51.100.12:8080, weight: 1}
    policies: [{use: path, config: {routes: [{prefix: /, servers: [s2]}], token: two}}, state, load]
    pool: {max_idle: 7}
plugins:
  - {name: bandwidth, config: {servers: {s1: {rate: 200Mbit}, s2: {rate: 1Mbit}}}}
queue: {first: 100, syn: queue}
firewall: {mark: 0x11000000/0xff000000}
log: {level: debug}
`
	now, then := parsed(t, planBase), parsed(t, next)
	var got []string
	for _, c := range Compare(now, then) {
		got = append(got, string(c.Class)+" "+c.String())
		if c.File == "" || c.Line == 0 {
			t.Errorf("no place: %+v", c)
		}
		if file, line := then.WhereNamed(c.Path); c.Action != Removed && (file != c.File || line != c.Line) {
			t.Errorf("%s stands at line %d, WhereNamed says %s:%d", c.Path, c.Line, file, line)
		}
	}
	want := []string{
		"hot ~ stop_timeout: 10s -> 3s",
		"restart - source.addresses[198.51.100.2]",
		"restart + source.addresses[198.51.100.3]",
		"restart ~ source.ports: 10240-32767 -> 20000-21000",
		"drain - farms[old]",
		"hot + farms[new]: 203.0.113.13:80, 1 server",
		"drain - farms[web].listen[203.0.113.10:80]",
		"hot + farms[web].listen[203.0.113.14:80]",
		"drain - farms[web].servers[s1]",
		"hot + farms[web].servers[s3]: 198.51.100.13:80, weight 3, backup",
		"drain ~ farms[web].servers[s2].address: 198.51.100.12:80 -> 198.51.100.12:8080",
		"hot ~ farms[web].servers[s2].weight: 2 -> 1",
		"hot ~ farms[web].policies[path].config.routes: [{prefix: /, servers: [s1]}] -> [{prefix: /, servers: [s2]}]",
		"hot ~ farms[web].policies[path].config.token: (hidden) -> (hidden)",
		"hot + farms[web].policies[load]",
		"hot ~ farms[web].policies: state, path -> path, state",
		"hot ~ farms[web].pool.max_idle: 64 -> 7",
		"hot ~ plugins[bandwidth].config.servers.s1.rate: 100Mbit -> 200Mbit",
		"hot + plugins[bandwidth].config.servers.s2: {rate: 1Mbit}",
		"restart ~ queue.first: 22272 -> 100",
		"restart ~ queue.syn: auto -> queue",
		"restart ~ firewall.mark: 0x57000000/0xff000000 -> 0x11000000/0xff000000",
		"hot ~ log.level: info -> debug",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if p := Compare(now, parsed(t, planBase)); len(p) != 0 {
		t.Errorf("the same text: %v", p)
	}
	// Order alone is no change, but for policies.
	swapped := strings.NewReplacer("203.0.113.10:80, 203.0.113.11:80", "203.0.113.11:80, 203.0.113.10:80").Replace(planBase)
	if p := Compare(now, parsed(t, swapped)); len(p) != 0 {
		t.Errorf("another order: %v", p)
	}
}

// TestRestartKeys: what the reference calls a restart is of that class, and
// nothing else; and a running instance keeps exactly these.
func TestRestartKeys(t *testing.T) {
	var walk func(f *field, above bool)
	walk = func(f *field, above bool) {
		for _, c := range f.fields {
			says := above || strings.HasSuffix(c.doc, "Restart.")
			if got := classOf(c.path, Changed) == Restart; got != says && c.path != "farms" {
				t.Errorf("%s: class restart %t, the reference says %t", c.path, got, says)
			}
			if c.kind == kindSection {
				walk(c, says)
			}
		}
	}
	walk(schema, false)

	now := parsed(t, planBase)
	next := parsed(t, planBase+"queue: {first: 7, shards: 2, gso: false, syn: queue, length: 100}\nadmin: {socket: /tmp/x.sock, metrics: 127.0.0.1:1}\nruntime_dir: /tmp/x\nfirewall: {table: other, mark: 0x1/0x1}\nlog: {level: warn}\n")
	next.Source = Source{}
	all := Compare(now, next)
	if n := len(all.Of(Restart)); n < 10 {
		t.Fatalf("only %d changes: %v", n, all)
	}
	got := Compare(now, WithRestartKeys(now, next))
	if len(got) != 1 || got[0].Path != "log.level" {
		t.Errorf("a running instance takes over %v", got)
	}
}

// TestParse: what Dump writes is the same configuration.
func TestParse(t *testing.T) {
	now := parsed(t, planBase)
	b, err := now.Dump()
	if err != nil {
		t.Fatal(err)
	}
	again, err := Parse("dump", b)
	if err != nil {
		t.Fatal(err)
	}
	if p := Compare(now, again); len(p) != 0 {
		t.Errorf("after Dump and Parse: %v", p)
	}
	// A plugin that is only implied makes no line of its own.
	plain := parsed(t, strings.Replace(planBase, "policies: [state, {use: path", "policies: [{use: path", 1))
	for _, c := range Compare(plain, again) {
		if strings.HasPrefix(c.Path, "plugins") {
			t.Errorf("implied plugin: %v", c)
		}
	}
}

// TestClone: a changed clone leaves the original alone and is checked.
func TestClone(t *testing.T) {
	now := parsed(t, planBase)
	c := now.Clone()
	c.Farms[0].Servers[0].Weight = 9
	c.Farms[0].Servers = append(c.Farms[0].Servers, Server{Name: "s9", Address: now.Farms[0].Servers[0].Address, Weight: 1})
	if now.Farms[0].Servers[0].Weight != 1 || len(now.Farms[0].Servers) != 2 {
		t.Error("the original changed")
	}
	if err := c.Check(); err == nil || !strings.Contains(err.Error(), "is given twice") {
		t.Errorf("a server twice: %v", err)
	}
	if err := now.Check(); err != nil {
		t.Errorf("a good configuration: %v", err)
	}
}

// TestLongText: of a long list as much is shown as of a short one, and the text
// is what stands at the beginning of the whole.
func TestLongText(t *testing.T) {
	var routes []any
	for i := range 1000 {
		routes = append(routes, map[string]any{"prefix": fmt.Sprintf("/%d", i), "to": []any{"red", i, true, 1.5}})
	}
	for name, c := range map[string]struct {
		value any
		mark  bool
	}{
		"long list":   {routes, true},
		"short list":  {routes[:1], false},
		"in mappings": {map[string]any{"b": map[string]any{"a": routes}, "a": "x"}, true},
		"in lists":    {[]any{[]any{routes}, "behind"}, true},
		"empty":       {[]any{}, false},
		"number":      {7, false},
	} {
		n := new(yaml.Node)
		if err := n.Encode(c.value); err != nil {
			t.Fatal(err)
		}
		if got, want := freeText("routes", c.value), flow(n); got != want || strings.HasSuffix(got, cutMark) != c.mark {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if len(routes) != 1000 {
		t.Error("the value was changed")
	}
	// White space is shown as one space, so that this text is shorter than the
	// room; it has to say all the same that there is more.
	spaces := []any{"a" + strings.Repeat(" ", 200) + "b", "c", "d"}
	if got := freeText("routes", spaces); !strings.HasSuffix(got, cutMark) {
		t.Errorf("%q does not say that there is more", got)
	}
}
