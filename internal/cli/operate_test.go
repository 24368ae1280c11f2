// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/control/capture"
)

// operated is an instance that remembers what it was asked to do.
type operated struct {
	status *control.Status
	asked  []string
	reload *control.ReloadResult
	plan   *control.PlanResult
	events control.Events
	flows  int
	trace  []control.TraceRecord
}

func (o *operated) Status(context.Context) (*control.Status, error) { return o.status, nil }
func (o *operated) Reload(context.Context) (*control.ReloadResult, error) {
	return o.reload, nil
}

func (o *operated) Plan(_ context.Context, dump []byte) (*control.PlanResult, error) {
	if _, err := config.Parse("sent", dump); err != nil {
		return nil, err
	}
	return o.plan, nil
}

func (o *operated) Flows(_ context.Context, want control.FlowFilter, emit func(*control.Flow) error) error {
	o.asked = append(o.asked, "flows "+want.Query().Encode())
	for range o.flows {
		f := control.Flow{Client: "198.18.0.11:40001", VIP: "203.0.113.10:80", Farm: "web", State: "spliced", Server: "s1", SNIP: "198.51.100.1:10240", Method: "GET", AgeMS: 1234, IdleMS: 61_000}
		if err := emit(&f); err != nil {
			return err
		}
	}
	return nil
}

func (o *operated) Pools(context.Context) ([]control.Pool, error) {
	return []control.Pool{{Farm: "web", Server: "s1", State: "ready", Idle: 2, OldestIdleMS: 12_000, MaxIdle: 64, Closed: map[string]uint64{"idle": 3, "aborted": 1}}}, nil
}

func (o *operated) Kill(_ context.Context, client, vip netip.AddrPort) (int, error) {
	o.asked = append(o.asked, "kill "+client.String()+" "+vip.String())
	return 1, nil
}

func (o *operated) ChangeServer(_ context.Context, farm, server string, c control.ServerChange) (*control.Override, error) {
	b, err := json.Marshal(c)
	o.asked = append(o.asked, "change "+farm+"/"+server+" "+string(b))
	return &control.Override{}, err
}

func (o *operated) AddServer(_ context.Context, farm string, s control.ServerSpec) (*control.Override, error) {
	b, err := json.Marshal(s)
	o.asked = append(o.asked, "add "+farm+" "+string(b))
	return &control.Override{}, err
}

func (o *operated) RemoveServer(_ context.Context, farm, server string, persist bool) (*control.Override, error) {
	o.asked = append(o.asked, "remove "+farm+"/"+server)
	return &control.Override{}, nil
}

func (o *operated) Overrides(context.Context) ([]control.Override, error) {
	return []control.Override{{Farm: "web", Server: "s2", State: "drain", Persist: true}, {Farm: "web", Server: "old", Removed: true}}, nil
}

func (o *operated) DropOverrides(_ context.Context, farm, server string) (int, error) {
	o.asked = append(o.asked, "drop "+farm+"/"+server)
	return 1, nil
}

func (o *operated) Events() *control.Events { return &o.events }

func (o *operated) Trace(ctx context.Context, _ control.TraceFilter, emit func(*control.TraceRecord) error) error {
	for i := range o.trace {
		if err := emit(&o.trace[i]); err != nil {
			return err
		}
	}
	<-ctx.Done()
	return nil
}

func (o *operated) Rules(context.Context) (string, error) { return "table inet weir {\n}\n", nil }

// operate serves o and returns a function that runs a command against it.
func operate(t *testing.T, o *operated) func(args ...string) (code int, stdout, stderr string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "admin.sock")
	l, err := control.Listen(path, o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return func(args ...string) (int, string, string) {
		t.Helper()
		var out, errs bytes.Buffer
		code := Main(append([]string{"weir"}, append(args, "--socket", path)...), nil, &out, &errs, Hooks{})
		return code, out.String(), errs.String()
	}
}

// TestReloadCommand: the result is told, and the exit code says which it is.
func TestReloadCommand(t *testing.T) {
	o := &operated{status: exampleStatus()}
	weir := operate(t, o)
	change := func(class config.Class) config.Change {
		return config.Change{Action: config.Changed, Class: class, Path: "farms[web].pool.max_idle", From: "64", To: "3", File: "weir.yaml", Line: 9}
	}
	for _, c := range []struct {
		res  control.ReloadResult
		code int
		out  string
		err  string
	}{
		{control.ReloadResult{Outcome: control.Applied, Generation: 4, Changes: []config.Change{change(config.Hot)}}, 0,
			"CHANGE                                TAKEN OVER  AT\n~ farms[web].pool.max_idle: 64 -> 3  at once     weir.yaml:9\nconfiguration 4 is in force\n", ""},
		{control.ReloadResult{Outcome: control.Applied, Generation: 4, Changes: []config.Change{change(config.Hot), change(config.Restart)}}, 3, "1 change left for a restart", ""},
		{control.ReloadResult{Outcome: control.Unchanged}, 0, "nothing to change\n", ""},
		{control.ReloadResult{Outcome: control.Unchanged, Changes: []config.Change{change(config.Restart)}}, 3, "nothing to change without a restart\n", ""},
		{control.ReloadResult{Outcome: control.Refused, Problems: []control.Problem{{Text: "weir.yaml:7: wrong"}, {Text: "weir.yaml:8: too"}}}, 2, "", "weir.yaml:7: wrong\nweir.yaml:8: too\nweir: the configuration is refused; the old one stays in force\n"},
	} {
		o.reload = &c.res
		code, out, errs := weir("reload")
		if code != c.code || !strings.Contains(strings.ReplaceAll(out, "  ", " "), strings.ReplaceAll(c.out, "  ", " ")) || errs != c.err {
			t.Errorf("%+v: exit code %d\n%s%s", c.res, code, out, errs)
		}
		code, out, _ = weir("reload", "-o", "json")
		var back control.ReloadResult
		if err := json.Unmarshal([]byte(out), &back); err != nil || back.Outcome != c.res.Outcome || code != c.code {
			t.Errorf("%+v as JSON: exit code %d, %v\n%s", c.res, code, err, out)
		}
	}
}

// TestServersCommand: what is asked for is what the instance hears.
func TestServersCommand(t *testing.T) {
	o := &operated{status: exampleStatus()}
	weir := operate(t, o)
	for _, c := range []struct{ args, asked string }{
		{"servers drain s1", `change web/s1 {"state":"drain"}`},
		{"servers ready web/s2 --persist", `change web/s2 {"state":"ready","persist":true}`},
		{"servers weight s1 9", `change web/s1 {"weight":9}`},
		{"servers remove web/s1", `remove web/s1`},
		{"servers add web/s7 198.51.100.17:80 --weight 3", `add web {"name":"s7","address":"198.51.100.17:80","weight":3}`},
		{"servers reset web/old", `drop web/old`},
		{"servers reset old", `drop web/old`},
		{"flows kill 198.18.0.11:4 --vip 203.0.113.10:80", `kill 198.18.0.11:4 203.0.113.10:80`},
		{"flows --client 198.18.0.0/16 --state head --limit 3", `flows client=198.18.0.0%2F16&limit=3&state=head`},
	} {
		o.asked = nil
		code, out, errs := weir(strings.Fields(c.args)...)
		if code != 0 || len(o.asked) != 1 || o.asked[0] != c.asked {
			t.Errorf("weir %s: exit code %d, asked %q, want %q\n%s%s", c.args, code, o.asked, c.asked, out, errs)
		}
	}
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"servers drain s9", 1, "there is no server s9; there are web/s1, web/s2"},
		{"servers weight s1 heavy", 2, "expected a number from 1 to 256"},
		{"servers add s7 198.51.100.17:80", 2, "expected FARM/SERVER"},
		{"servers add web/s7 s7.example:80", 2, "expected a literal ADDRESS:PORT"},
		{"servers drain", 2, "accepts 1 arg"},
		{"flows kill nobody", 2, "expected the ADDRESS:PORT"},
		{"flows --client nobody", 2, "expected ADDRESS, ADDRESS:PORT or NETWORK/BITS"},
		{"top -i 1ms", 2, "at least 100ms"},
		{"farms -o yaml", 2, "expected table or json"},
	} {
		code, _, errs := weir(strings.Fields(c.args)...)
		if code != c.code || !strings.Contains(errs, c.want) {
			t.Errorf("weir %s: exit code %d, want %d with %q:\n%s", c.args, code, c.code, c.want, errs)
		}
	}
}

// TestTables: every command that lists has a table for people and JSON for
// programs.
func TestTables(t *testing.T) {
	o := &operated{status: exampleStatus(), flows: 2}
	o.events.Add(control.Event{Name: "reloaded", Text: "3 changes", Time: time.Unix(0, 0)})
	weir := operate(t, o)
	for _, c := range []struct{ args, want string }{
		{"farms", "99.0 %"}, {"servers", "state,kept"}, {"servers", "web/old was removed at run time"}, {"pool", "aborted 1, idle 3"},
		{"flows", "2 connections"}, {"flows", "1.23s     1m1s"}, {"events", "3 changes"}, {"rules show", "table inet weir"}, {"top -n 1 -i 100ms", "OPENED/S"},
	} {
		code, out, errs := weir(strings.Fields(c.args)...)
		if code != 0 || !strings.Contains(out, c.want) {
			t.Errorf("weir %s: exit code %d, no %q:\n%s%s", c.args, code, c.want, out, errs)
		}
		for line := range strings.Lines(out) {
			if strings.HasSuffix(line, " \n") {
				t.Errorf("weir %s: a line is padded: %q", c.args, line)
			}
		}
	}
	for _, args := range []string{"farms", "servers", "pool", "flows", "events"} {
		code, out, errs := weir(args, "-o", "json")
		d := json.NewDecoder(strings.NewReader(out))
		for {
			var v any
			if err := d.Decode(&v); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("weir %s -o json: exit code %d, %v\n%s%s", args, code, err, out, errs)
			}
		}
	}
}

// TestDiff: the plan names the lines of the caller's own files.
func TestDiff(t *testing.T) {
	o := &operated{status: exampleStatus(), plan: &control.PlanResult{
		Changes:   []config.Change{{Action: config.Added, Class: config.Hot, Path: "farms[web].servers[s2]", To: "198.51.100.12:80"}, {Action: config.Removed, Class: config.Drain, Path: "farms[old]"}},
		Overrides: []control.Override{{Farm: "web", Server: "s1", State: "drain"}},
	}}
	weir := operate(t, o)
	dir := t.TempDir()
	put := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	text := "source: {addresses: [198.51.100.1]}\nfarms:\n  - name: web\n    listen: 203.0.113.10:80\n    servers:\n      - {name: s1, address: 198.51.100.11:80}\n"
	a := put("a.yaml", text)
	b := put("b.yaml", text+"      - {name: s2, address: 198.51.100.12:80}\n")
	code, out, errs := weir("check", "--config", b, "--diff")
	for _, want := range []string{"+ farms[web].servers[s2]: 198.51.100.12:80", "b.yaml:7", "at once", "- farms[old]", "by draining", "web/s1 was changed at run time"} {
		if code != 0 || !strings.Contains(out, want) {
			t.Errorf("exit code %d, no %q:\n%s%s", code, want, out, errs)
		}
	}
	code, out, errs = weir("check", "--config", b, "--from", a)
	if code != 0 || !strings.Contains(out, "b.yaml:7") || strings.Count(out, "\n") != 2 {
		t.Errorf("between files: exit code %d:\n%s%s", code, out, errs)
	}
	// A long list leaves place for the other columns.
	routes := strings.Repeat("{prefix: /some/where/, servers: [s1]}, ", 20)
	c := put("c.yaml", text+"    policies: [{use: path, config: {routes: ["+routes+"]}}]\n")
	d := put("d.yaml", text+"    policies: [{use: path, config: {routes: ["+routes+"{path: /x, servers: [s1]}]}}]\n")
	code, out, errs = weir("check", "--no-plugins", "--config", d, "--from", c)
	if rows := strings.Split(out, "\n"); code != 0 || len(rows) != 3 || !strings.Contains(rows[1], "… -> [{prefix") || len(rows[1]) > 240 {
		t.Errorf("a long value: exit code %d:\n%s%s", code, out, errs)
	}
	if code, out, _ = weir("check", "--config", b, "--from", b); code != 0 || out != "nothing to change\n" {
		t.Errorf("the same file: exit code %d: %q", code, out)
	}
	if code, _, errs = weir("check", "--config", b, "--from", filepath.Join(dir, "none.yaml")); code != 2 || !strings.Contains(errs, "none.yaml") {
		t.Errorf("no such file: exit code %d: %s", code, errs)
	}
}

// TestTraceCommand: both legs are written down and kept in a file.
func TestTraceCommand(t *testing.T) {
	get := "GET / HTTP/1.1\r\n\r\n"
	in := ipPacket("198.18.0.11:40001", "203.0.113.10:80", 1, 2, get)
	on := ipPacket("198.51.100.1:10240", "198.51.100.11:80", 500, 600, get)
	back := ipPacket("198.51.100.11:80", "198.51.100.1:10240", 600, 518, "HTTP/1.1 204 No Content\r\n\r\n")
	home := ipPacket("203.0.113.10:80", "198.18.0.11:40001", 2, 19, "HTTP/1.1 204 No Content\r\n\r\n")
	at := time.Unix(100, 0)
	o := &operated{status: exampleStatus(), trace: []control.TraceRecord{
		{SNIPs: []netip.Addr{netip.MustParseAddr("198.51.100.1")}, SNIPPorts: []uint16{10240, 32767}},
		{Time: at, In: in, Out: []control.Bytes{on}, Reasons: []string{"accepted"}, Server: "s1"},
		{Time: at.Add(time.Millisecond), In: back, Out: []control.Bytes{home}, Lost: 3},
	}}
	weir := operate(t, o)
	file := filepath.Join(t.TempDir(), "t.pcapng")
	code, out, errs := weir("trace", "--client", "198.18.0.11", "--count", "2", "--pcap", file)
	for _, want := range []string{
		"GET:1,2(18)                        -> GET:500,600(18)", "RESP:2,19(27)                      <- RESP:600,518(27)",
		"s1 198.51.100.11:80 from 10240  [accepted]", "3 steps were lost", "0.001000",
	} {
		if code != 0 || !strings.Contains(out, want) {
			t.Errorf("exit code %d, no %q:\n%s%s", code, want, out, errs)
		}
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := capture.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		iface int
		data  []byte
	}{{0, in}, {1, on}, {1, back}, {0, home}} {
		k, err := r.Next()
		if err != nil || k.Interface != want.iface || !bytes.Equal(k.Data, want.data) {
			t.Errorf("packet %d: %+v, %v", i, k, err)
		}
	}
	if code, _, errs := weir("trace"); code != 2 || !strings.Contains(errs, "--client is missing") {
		t.Errorf("no client: exit code %d: %s", code, errs)
	}
}

// ipPacket makes an IPv4 packet without checksums, which nothing here looks at.
func ipPacket(from, to string, seq, ack uint32, data string) []byte {
	src, dst := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
	b := make([]byte, 40, 40+len(data))
	b[0], b[8], b[9], b[32], b[33] = 0x45, 64, 6, 0x50, 0x18
	n := 40 + len(data)
	b[2], b[3] = byte(n>>8), byte(n)
	a, z := src.Addr().As4(), dst.Addr().As4()
	copy(b[12:], a[:])
	copy(b[16:], z[:])
	b[20], b[21], b[22], b[23] = byte(src.Port()>>8), byte(src.Port()), byte(dst.Port()>>8), byte(dst.Port())
	for i := range 4 {
		b[24+i], b[28+i] = byte(seq>>(24-8*i)), byte(ack>>(24-8*i))
	}
	return append(b, data...)
}

// TestEventsCommand: the past, and what comes until the instance ends.
func TestEventsCommand(t *testing.T) {
	o := &operated{status: exampleStatus()}
	for range 30 {
		o.events.Add(control.Event{Name: "old", Text: "old"})
	}
	weir := operate(t, o)
	if _, out, _ := weir("events"); strings.Count(out, "\n") != 30 {
		t.Errorf("all:\n%s", out)
	}
	if _, out, _ := weir("events", "-n", "4"); strings.Count(out, "\n") != 4 {
		t.Errorf("the last four:\n%s", out)
	}
}

// TestManAndCompletion: the pages name the commands, and the shells' scripts
// are there.
func TestManAndCompletion(t *testing.T) {
	run := func(args ...string) string {
		t.Helper()
		var out, errs bytes.Buffer
		if code := Main(append([]string{"weir"}, args...), nil, &out, &errs, testHooks); code != 0 {
			t.Fatalf("weir %v: exit code %d: %s", args, code, errs.String())
		}
		return out.String()
	}
	page := run("man")
	for _, want := range []string{`.TH "WEIR" "8"`, "weir-servers(8)", "weir-trace(8)", ".SH EXIT STATUS", ".SH FILES", "/etc/weir/conf.d/*.yaml", "WEIR_LOG__LEVEL"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page has no %q:\n%s", want, page)
		}
	}
	dir := t.TempDir()
	run("man", "--dir", dir)
	files, err := filepath.Glob(filepath.Join(dir, "*.8"))
	if err != nil || len(files) < 20 {
		t.Errorf("%d pages, %v", len(files), err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "weir.8")); err != nil || string(b) != page {
		t.Errorf("the page in the directory is another one: %v", err)
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if out := run("completion", shell); !strings.Contains(out, "weir") {
			t.Errorf("%s: %s", shell, out)
		}
	}
	if out := run("__complete", "servers", ""); !strings.Contains(out, "drain") {
		t.Errorf("completion of servers:\n%s", out)
	}
}

// TestDoctorCommand: the exit code is that of the worst finding.
func TestDoctorCommand(t *testing.T) {
	file := filepath.Join(t.TempDir(), "weir.yaml")
	if err := os.WriteFile(file, []byte("source: {addresses: [198.51.100.1]}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		list []Finding
		code int
		want string
	}{
		{[]Finding{{Check: "kernel", Level: LevelOK, Text: "fine", Why: "hidden"}}, 0, "ok    kernel       fine\nnothing is in the way\n"},
		{[]Finding{{Check: "a", Level: LevelNote, Text: "n", Command: "c"}}, 0, "mend it: c"},
		{[]Finding{{Check: "a", Level: LevelWarn, Text: "w", Why: "because", Command: "sysctl x"}}, 3, "warn  a            w\n                   because\n                   mend it: sysctl x\n1 thing to look after\n"},
		{[]Finding{{Check: "a", Level: LevelFail, Text: "f"}, {Check: "b", Level: LevelWarn, Text: "w"}}, 1, "2 things to look after"},
	} {
		var out, errs bytes.Buffer
		code := Main([]string{"weir", "doctor", "--config", file}, nil, &out, &errs, Hooks{
			Doctor: func(context.Context, *config.Config, bool) ([]Finding, error) { return c.list, nil },
		})
		if code != c.code || !strings.Contains(out.String(), c.want) {
			t.Errorf("%+v: exit code %d\n%s%s", c.list, code, out.String(), errs.String())
		}
	}
}

// TestSwitchedLogger: level and format follow a reload, attributes stay.
func TestSwitchedLogger(t *testing.T) {
	var b bytes.Buffer
	log, set := SwitchedLogger(config.Log{Level: "warn", Format: "text"}, &b)
	log = log.With("a", 1)
	log.Info("hidden")
	set(config.Log{Level: "debug", Format: "json"})
	log.WithGroup("g").Debug("shown", "b", 2)
	if got := b.String(); !strings.Contains(got, `"msg":"shown","a":1,"g":{"b":2}`) || strings.Contains(got, "hidden") {
		t.Errorf("%s", got)
	}
}

// TestBrokenConfigs: check says of every broken configuration what its golden
// file says, with exit code 2: file, line, key and what would be right.
func TestBrokenConfigs(t *testing.T) {
	t.Chdir("../../module/config")
	golden, err := filepath.Glob("testdata/broken/*.txt")
	if err != nil || len(golden) < 30 {
		t.Fatalf("%d broken configurations, %v", len(golden), err)
	}
	for _, g := range golden {
		path := strings.TrimSuffix(g, ".txt")
		if st, err := os.Stat(path); err != nil || !st.IsDir() {
			path += ".yaml"
		}
		want, err := os.ReadFile(g)
		if err != nil {
			t.Fatal(err)
		}
		for _, command := range []string{"check", "run", "doctor"} {
			var out, errs bytes.Buffer
			code := Main([]string{"weir", command, "--config", path}, nil, &out, &errs, Hooks{
				Run:    func(context.Context, Instance) (int, error) { t.Error("it runs"); return 0, nil },
				Doctor: func(context.Context, *config.Config, bool) ([]Finding, error) { t.Error("it looks"); return nil, nil },
			})
			if code != ExitUsage || errs.String() != string(want) || out.Len() > 0 {
				t.Errorf("weir %s --config %s: exit code %d\n%s%s\nwant\n%s", command, path, code, out.String(), errs.String(), want)
			}
		}
	}
}
