// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const example = "../../docs/examples/weir.yaml"

const minimal = `source: {addresses: [198.51.100.1]}
farms:
  - name: web
    listen: 203.0.113.10:80
    servers: [{name: s1, address: 198.51.100.11:80}]
`

// write makes files in a new directory and returns it.
func write(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func load(t *testing.T, opts LoadOptions) *Config {
	t.Helper()
	cfg, err := Load(opts)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// TestExample loads the example of the documentation and checks every kind of
// value in it.
func TestExample(t *testing.T) {
	c := load(t, LoadOptions{Files: []string{example}})
	check := func(name string, got, want any) {
		t.Helper()
		if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
	check("runtime_dir", c.RuntimeDir, "/run/weir")
	check("stop_timeout", c.StopTimeout.Std(), 10*time.Second)
	check("addresses", c.Source.Addresses, []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:1::1")})
	check("ports", c.Source.Ports, PortRange{10240, 32767})
	check("farms", len(c.Farms), 2)
	web := c.Farm("web")
	check("listen", web.Listen, []netip.AddrPort{netip.MustParseAddrPort("203.0.113.10:80")})
	check("protocol", web.Protocol, "http")
	check("servers", web.Servers, []Server{
		{"s1", netip.MustParseAddrPort("198.51.100.11:80"), 1, false},
		{"s2", netip.MustParseAddrPort("198.51.100.12:80"), 2, false},
		{"spare", netip.MustParseAddrPort("198.51.100.13:80"), 1, true},
	})
	check("policies", []string{web.Policies[0].Use, web.Policies[1].Use, web.Policies[1].OnEmpty, web.Policies[3].Use}, []string{"state", "path", "reject", "load"})
	check("routes", web.Policies[1].Config["routes"].([]any)[0], any(map[string]any{"prefix": "/sales/", "servers": []any{"s1"}}))
	check("pool", web.Pool, Pool{64, 512, 0, 16, Duration(30 * time.Second), 0, 0, 1024, Duration(5 * time.Second), 1 << 20, Duration(10 * time.Second)})
	check("timeouts", web.Timeouts, Timeouts{Duration(5 * time.Second), Duration(15 * time.Second), Duration(20 * time.Second), Duration(60 * time.Second), Duration(60 * time.Second), Duration(time.Hour), Duration(60 * time.Second)})
	check("limits", web.Limits, Limits{64 << 10, 100, 8000, 4 << 10, 8 << 10, 500, 0, 8192, 256 << 20})
	check("second farm has the same defaults", c.Farm("web6").Pool, web.Pool)
	check("listen list", len(c.Farm("web6").Listen), 2)
	var names []string
	for _, p := range c.UsedPlugins() {
		names = append(names, strings.TrimSpace(fmt.Sprintln(p.Name, p.Implied, p.Command, p.StartTimeout)))
	}
	check("plugins", names, []string{"state false [state] 5s", "bandwidth false [bandwidth] 5s", "load false [load] 5s", "path true [path] 5s"})
	check("queue", c.Queue, Queue{22272, ShardsAuto, true, "batched", "auto", 16384, 262144, 16384})
	check("firewall", c.Firewall, Firewall{"weir", Mark{0x57000000, 0xff000000}, "syn", "close", "auto"})
	check("log", c.Log, Log{"info", "text", Access{"", "common", 1}})
	check("admin", c.Admin, Admin{"/run/weir/admin.sock", netip.MustParseAddrPort("127.0.0.1:9464")})
	check("shards of 8 processors", c.ShardCount(8), 4)
	check("shards of 1 processor", c.ShardCount(1), 1)

	file, line := c.Where("farms[0].policies[1].config.routes[1].prefix")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Split(string(text), "\n")[line-1]; !strings.Contains(got, "/products/") {
		t.Errorf("Where points at line %d: %q", line, got)
	}
}

// TestDefaults: without any file there is a complete configuration that does
// nothing.
func TestDefaults(t *testing.T) {
	c := load(t, LoadOptions{})
	if c.StopTimeout.Std() != 10*time.Second || c.Queue.First != 22272 || len(c.Farms) != 0 || c.Admin.Socket != "/run/weir/admin.sock" {
		t.Errorf("%+v", c)
	}
	if file, line := c.Where("stop_timeout"); file != "" || line != 0 {
		t.Errorf("a default is at %s:%d", file, line)
	}
}

// TestLayers: a higher layer replaces single values and lists; farms and
// plugins are appended; the order is files, directory, environment, overrides.
func TestLayers(t *testing.T) {
	dir := write(t, map[string]string{
		"weir.yaml": minimal + "stop_timeout: 1s\nqueue: {first: 100, length: 1000}\nplugins: [{name: mine, config: {a: 1}}]\n",
		"conf.d/10-shop.yaml": `source: {addresses: [198.51.100.2, 198.51.100.3]}
stop_timeout: 2s
farms:
  - name: shop
    listen: 203.0.113.11:80
    servers: [{name: s1, address: 198.51.100.11:80}]
    policies: [mine, yours]
`,
		"conf.d/20-plugin.yaml": "plugins: [{name: yours}]\nqueue: {first: 300}\n",
		"conf.d/.hidden.yaml":   "banana: 1\n",
		"conf.d/notes.txt":      "banana: 1\n",
		"conf.d/empty.yaml":     "# nothing yet\n",
		"conf.d/null.yaml":      "farms:\nsource:\nplugins:\n",
	})
	c := load(t, LoadOptions{
		Files:     []string{dir + "/weir.yaml"},
		Dir:       dir + "/conf.d",
		Env:       []string{"WEIR_STOP_TIMEOUT=3s", "WEIR_ADMIN__SOCKET=/run/a/b.sock", "WEIR_LOG__ACCESS__SAMPLE=7", "PATH=/bin"},
		Overrides: map[string]any{"admin.socket": "/run/c/d.sock", "queue.gso": false, "queue.shards": 3},
	})
	got := fmt.Sprintln(c.Farms[0].Name, c.Farms[1].Name, c.Plugins[0].Name, c.Plugins[1].Name, c.Source.Addresses,
		c.StopTimeout, c.Queue.First, c.Queue.Length, c.Queue.GSO, c.Queue.Shards, c.Admin.Socket, c.RuntimeDir, c.Log.Access.Sample)
	want := "web shop mine yours [198.51.100.2 198.51.100.3] 3s 300 1000 false 3 /run/c/d.sock /run/c 7"
	if d := cmp.Diff(want, strings.TrimSpace(got)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if len(c.Files) != 5 {
		t.Errorf("files %q", c.Files)
	}
	for key, want := range map[string]string{
		"farms[1].name":       "10-shop.yaml:4",
		"plugins[1].name":     "20-plugin.yaml:1",
		"source.addresses[1]": "10-shop.yaml:1",
		"queue.first":         "20-plugin.yaml:2",
		"queue.length":        "weir.yaml:7",
		"stop_timeout":        "environment variable WEIR_STOP_TIMEOUT:0",
		"admin.socket":        "command line:0",
	} {
		file, line := c.Where(key)
		if got := fmt.Sprintf("%s:%d", filepath.Base(file), line); got != want {
			t.Errorf("%s is at %s, want %s", key, got, want)
		}
	}
	// The same two layers as a directory.
	c = load(t, LoadOptions{Files: []string{dir + "/weir.yaml", dir + "/conf.d"}})
	if len(c.Farms) != 2 || c.StopTimeout.Std() != 2*time.Second {
		t.Errorf("directory: %d farms, %s", len(c.Farms), c.StopTimeout)
	}
}

// TestEnvironment shows which variables are meant for the configuration, and
// what happens to those that do not fit.
func TestEnvironment(t *testing.T) {
	for _, tc := range []struct {
		env  string
		want string // error, "" for none
	}{
		{"WEIR_RUNTIME_DIR=/run/x", ""},
		{"WEIR_LOG__LEVEL=debug", ""},
		{"WEIR_ADMIN__METRICS=", ""},
		{"WEIR_REQUIRE=netns,nfqueue", ""},
		{"WEIR_SEED=7", ""},
		{"WEIR_SOAK=1", ""},
		{"WEIR_CORPORA=/tmp", ""},
		{"WEIR_LOG_TEST=1", ""},
		{"WEIR_", ""},
		{"WEIR_LOG_LEVEL=debug", "environment variable WEIR_LOG_LEVEL: log_level: unknown key; expected a key outside lists; did you mean WEIR_LOG__LEVEL?"},
		{"WEIR_LOG_ACCESS_PATH=x", "environment variable WEIR_LOG_ACCESS_PATH: log_access_path: unknown key; expected a key outside lists; did you mean WEIR_LOG__ACCESS__PATH?"},
		{"WEIR_ADMN__SOCKET=x", "environment variable WEIR_ADMN__SOCKET: admn.socket: unknown key; expected a key outside lists; did you mean WEIR_ADMIN__SOCKET?"},
		{"WEIR_LOG__LEVLE=x", "environment variable WEIR_LOG__LEVLE: log.levle: unknown key; expected one of level, format or access in log; did you mean WEIR_LOG__LEVEL?"},
		{"WEIR_LOG__LEVEL=loud", `environment variable WEIR_LOG__LEVEL: log.level: "loud" is not allowed here; expected one of debug, info, warn or error`},
		{"WEIR_LOG__LEVEL__X=1", "environment variable WEIR_LOG__LEVEL__X: log.level.x: unknown key; expected nothing in level; did you mean WEIR_LOG__LEVEL?"},
		{"WEIR_QUEUE=1", "environment variable WEIR_QUEUE: queue: this is a section; expected one of its keys, such as WEIR_QUEUE__FIRST"},
		{"WEIR_FARMS=web", "environment variable WEIR_FARMS: farms: this is a list; expected the list in a file; only single values can be set here"},
		{"WEIR_SOURCE__ADDRESSES=198.51.100.1", "environment variable WEIR_SOURCE__ADDRESSES: source.addresses: this is a list; expected the list in a file; only single values can be set here"},
		{"WEIR_FARMS__0__NAME=web", "environment variable WEIR_FARMS__0__NAME: farms.0.name: keys inside the list farms cannot be set here; expected the key in a file"},
		{"WEIR_QUEUE__FIRST=1e3", `environment variable WEIR_QUEUE__FIRST: queue.first: "1e3" is not a whole number; expected a whole number from 0 to 65532`},
	} {
		_, err := Load(LoadOptions{Env: []string{tc.env}})
		got := ""
		if err != nil {
			got = err.Error()
		}
		if got != tc.want {
			t.Errorf("%s\n got: %s\nwant: %s", tc.env, got, tc.want)
		}
	}
}

// TestEnvironmentOfTheProcess: Load looks at what it is given and nowhere else.
func TestEnvironmentOfTheProcess(t *testing.T) {
	t.Setenv("WEIR_STOP_TIMEOUT", "99s")
	if c := load(t, LoadOptions{}); c.StopTimeout.Std() != 10*time.Second {
		t.Errorf("stop_timeout %s came from the process's environment", c.StopTimeout)
	}
}

func TestOverrideErrors(t *testing.T) {
	_, err := Load(LoadOptions{Overrides: map[string]any{"queue.frist": 1, "log": "x", "stop_timeout": "soon"}})
	want := `command line: log: this is a section; expected one of its keys, such as log.level
command line: queue.frist: unknown key; expected one of first, shards, gso, backend, syn, length, clients or servers in queue; did you mean queue.first?
command line: stop_timeout: cannot read "soon"; expected a duration with its unit, such as 300ms, 10s or 1h30m`
	if err == nil || err.Error() != want {
		t.Errorf("got:\n%v\nwant:\n%s", err, want)
	}
}

func TestMissingFile(t *testing.T) {
	_, err := Load(LoadOptions{Files: []string{"/nonexistent/weir.yaml"}})
	want := "/nonexistent/weir.yaml: cannot be read: no such file or directory; expected a readable configuration file"
	if err == nil || err.Error() != want {
		t.Errorf("got %v", err)
	}
	// An absent conf.d is no mistake.
	load(t, LoadOptions{Dir: "/nonexistent/conf.d"})
}

func TestStandardOptions(t *testing.T) {
	o := StandardOptions([]string{"a.yaml", "b"}, nil)
	if !slices.Equal(o.Files, []string{"a.yaml", "b"}) || o.Dir != "" {
		t.Errorf("%+v", o)
	}
	if o = StandardOptions(nil, []string{"A=b"}); o.Dir != StandardDir || len(o.Env) != 1 {
		t.Errorf("%+v", o)
	}
}

// TestDump: what Dump writes loads as the same configuration, and has every
// key of the schema that a value or default exists for.
func TestDump(t *testing.T) {
	c := load(t, LoadOptions{Files: []string{example}, Overrides: map[string]any{"admin.metrics": ""}})
	first, err := c.Dump()
	if err != nil {
		t.Fatal(err)
	}
	dir := write(t, map[string]string{"dump.yaml": string(first)})
	again := load(t, LoadOptions{Files: []string{dir + "/dump.yaml"}})
	second, err := again.Dump()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, second) {
		t.Errorf("(-first +second):\n%s", cmp.Diff(string(first), string(second)))
	}
	compact, err := c.Compact()
	if err != nil {
		t.Fatal(err)
	}
	if compact[0] != '{' {
		t.Errorf("not compact: %s", compact)
	}
	if again, err := loadBytes(compact); err != nil {
		t.Error(err)
	} else if third, err := again.Dump(); err != nil || !bytes.Equal(first, third) {
		t.Errorf("%v (-first +compact):\n%s", err, cmp.Diff(string(first), string(third)))
	}
	for _, line := range []string{"runtime_dir: /run/weir", "stop_timeout: 10s", "drain_limit: 1MiB", "mark: 0x57000000/0xff000000", "ports: 10240-32767", `metrics: ""`, "shards: auto", "- name: path"} {
		if !strings.Contains(string(first), line+"\n") {
			t.Errorf("the dump lacks %q:\n%s", line, first)
		}
	}
}

// TestCompact: what YAML and JSON understand differently is read back as it was.
func TestCompact(t *testing.T) {
	for _, value := range []string{
		`{f: 1.5, i: 1, big: 18446744073709551615, e: 1e21, b: true, n: null, s: "1", t: "true", empty: ""}`,
		`"a\u007fb"`, `"\u0085\u2028\ufeff"`, `"<&>\"\\/\t"`, `"😀 ä"`, `2001-12-15T02:59:43.1Z`, `[[], {}, [[1]]]`, `{"with space": x, "a: b": "c # d"}`,
		`{? ` + strings.Repeat("k", 2000) + ` : x}`, `[` + strings.Repeat("v", 2000) + `]`,
	} {
		c, err := loadBytes([]byte(minimal + `    policies: [{use: mine, config: {x: ` + value + `}}]
plugins: [{name: mine}]
`))
		if err != nil {
			t.Fatalf("%s: %v", value, err)
		}
		b, err := c.Compact()
		if err != nil {
			t.Fatalf("%s: %v", value, err)
		}
		again, err := loadBytes(b)
		if err != nil {
			t.Fatalf("%s: %v\n%s", value, err, b)
		}
		if diff := cmp.Diff(c.Farms[0].Policies[0].Config, again.Farms[0].Policies[0].Config); diff != "" {
			t.Errorf("%s (-was +is):\n%s", value, diff)
		}
	}
}

// TestRedacted: secrets are hidden at every depth, the configuration itself is
// untouched.
func TestRedacted(t *testing.T) {
	dir := write(t, map[string]string{"weir.yaml": minimal + `    policies: [{use: mine, config: {list: [{API_Token: hunter2}], plain: seen}}]
plugins: [{name: mine, config: {db: {password: hunter2, host: h}}}]
`})
	c := load(t, LoadOptions{Files: []string{dir + "/weir.yaml"}})
	r, err := c.Redacted()
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(r, []byte("hunter2")) || !bytes.Contains(r, []byte("seen")) || bytes.Count(r, []byte(hidden)) != 2 {
		t.Errorf("%s", r)
	}
	d, err := c.Dump()
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Count(d, []byte("hunter2")) != 2 {
		t.Errorf("the dump lost a value:\n%s", d)
	}
}

// TestPolicyConfig: the farm's mapping lies over the plugin's, key by key, and
// the caller's copy is his own.
func TestPolicyConfig(t *testing.T) {
	dir := write(t, map[string]string{"weir.yaml": minimal + `    policies: [{use: mine, config: {a: {x: 1}, list: [1]}}]
plugins: [{name: mine, config: {a: {x: 0, y: 2}, list: [5, 6], b: true, "d.o.t": 1.5}}]
`})
	c := load(t, LoadOptions{Files: []string{dir + "/weir.yaml"}})
	want := map[string]any{"a": map[string]any{"x": 1, "y": 2}, "list": []any{1}, "b": true, "d.o.t": 1.5}
	got := c.PolicyConfig(&c.Farms[0], "mine")
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	got["a"].(map[string]any)["y"] = 99
	got["list"].([]any)[0] = 99
	if d := cmp.Diff(want, c.PolicyConfig(&c.Farms[0], "mine")); d != "" {
		t.Errorf("the configuration changed (-want +got):\n%s", d)
	}
}

// TestSecondNet: the typed decoding refuses what the schema would have let
// through. Without ErrorUnused this passes silently.
func TestSecondNet(t *testing.T) {
	b := newBuilder()
	b.load(mapProvider{"admin": map[string]any{"sokcet": "/x"}}, nil, newLayer("x", 1))
	if _, err := b.finish(nil); err == nil || !strings.Contains(err.Error(), "sokcet") {
		t.Errorf("got %v", err)
	}
}

// TestAliases: aliases are followed, but neither loops nor bombs.
func TestAliases(t *testing.T) {
	dir := write(t, map[string]string{
		"good.yaml": minimal + "    pool: &p {max_idle: 5}\n  - name: b\n    listen: 203.0.113.11:80\n    servers: [{name: s1, address: 198.51.100.11:80}]\n    pool: *p\n",
		"loop.yaml": "plugins: [{name: mine, config: &a {x: *a}}]\n",
	})
	if c := load(t, LoadOptions{Files: []string{dir + "/good.yaml"}}); c.Farms[1].Pool.MaxIdle != 5 {
		t.Errorf("alias: %+v", c.Farms[1].Pool)
	}
	bomb := "plugins:\n  - name: mine\n    config:\n      a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n"
	for i := 1; i < 10; i++ {
		bomb += fmt.Sprintf("      a%d: &a%d [%s]\n", i, i, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d,", i-1), 10), ","))
	}
	deep := "plugins: [{name: mine, config: {a: " + strings.Repeat("[", 100) + strings.Repeat("]", 100) + "}}]\n"
	for name, text := range map[string]string{"loop": "plugins: [{name: mine, config: &a {x: *a}}]\n", "bomb": bomb, "deep": deep} {
		if _, err := loadBytes([]byte(text)); err == nil || !strings.Contains(err.Error(), "too many values or levels") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func loadBytes(b []byte) (*Config, error) {
	bld := newBuilder()
	bld.addFile("fuzz.yaml", bytesProvider(b))
	return bld.finish([]string{"fuzz.yaml"})
}

// FuzzLoad: no input panics; what loads can be dumped and loads again as the
// same; what does not load says why.
func FuzzLoad(f *testing.F) {
	for _, pattern := range []string{"testdata/broken/*.yaml", "testdata/broken/*/*.yaml", example} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			f.Fatalf("%s: %v", pattern, err)
		}
		for _, name := range files {
			b, err := os.ReadFile(name)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := loadBytes(b)
		if err != nil {
			if c != nil || err.Error() == "" {
				t.Fatalf("%v with %+v", err, c)
			}
			return
		}
		first, err := c.Dump()
		if err != nil {
			t.Fatal(err)
		}
		again, err := loadBytes(first)
		if err != nil {
			t.Fatalf("the dump does not load: %v\n%s", err, first)
		}
		second, err := again.Dump()
		if err != nil || !bytes.Equal(first, second) {
			t.Fatalf("the dump changed (-first +second): %v\n%s", err, cmp.Diff(string(first), string(second)))
		}
		compact, err := c.Compact()
		if err != nil {
			t.Fatal(err)
		}
		if again, err = loadBytes(compact); err != nil {
			t.Fatalf("the compact dump does not load: %v\n%s", err, compact)
		}
		if third, err := again.Dump(); err != nil || !bytes.Equal(first, third) {
			t.Fatalf("the compact dump changed (-first +third): %v\n%s", err, cmp.Diff(string(first), string(third)))
		}
	})
}

// TestReference: docs/config.md is what the types say.
func TestReference(t *testing.T) {
	const path = "../../docs/config.md"
	if *update {
		if err := os.WriteFile(path, Reference(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(have), string(Reference())); d != "" {
		t.Errorf("docs/config.md is not current; run: go test ./module/config -run TestReference -update\n(-file +types):\n%s", d)
	}
}

// TestSchemaIsDocumented: every key has a sentence, and every default can be
// read.
func TestSchemaIsDocumented(t *testing.T) {
	var walk func(f *field)
	n := 0
	walk = func(f *field) {
		for _, c := range f.fields {
			n++
			if c.doc == "" || !strings.HasSuffix(c.doc, ".") {
				t.Errorf("%s has no sentence of documentation", c.path)
			}
			if c.kind == kindScalar && !c.hasDef && c.need == "" && !c.isText() {
				t.Errorf("%s has neither a default nor a need", c.path)
			}
			walk(c)
		}
	}
	walk(schema)
	if n < 50 {
		t.Errorf("only %d keys", n)
	}
	if !maps.Equal(map[string]any{"level": "info", "format": "text", "access": nil}, func() map[string]any {
		m := schema.defaults()["log"].(map[string]any)
		m["access"] = nil
		return m
	}()) {
		t.Error("defaults of log")
	}
}
