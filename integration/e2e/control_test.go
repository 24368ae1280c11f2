// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/control/capture"
)

// TestDrainUnderLoad: a server that is drained gets nothing new at once, what
// runs finishes, and its idle connections are gone within a second; ready
// brings it back.
func TestDrainUnderLoad(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	release := r.halves()
	w := r.startWith(r.text(setup{servers: []string{"s1=0", "s2=1"}}))
	l := r.drive(r.VIP(), 4)
	for _, word := range []string{"drain", "maint"} {
		until(t, 10*time.Second, "idle connections of both servers", func() bool { return r.server("s1").Idle > 0 && r.server("s2").Idle > 0 })
		// Exchanges until one is at each server.
		var running []*half
		until(t, 10*time.Second, "a running exchange at s1", func() bool {
			running = append(running, r.begin(t))
			out := r.mustWeir("flows", "--client", running[len(running)-1].local, "-o", "json")
			var f control.Flow
			if err := json.Unmarshal([]byte(out), &f); err != nil {
				t.Fatalf("%v:\n%s", err, out)
			}
			return f.Server == "s1"
		})
		r.mustWeir("servers", word, "s1")
		set := time.Now()
		after := r.server("s1").Requests
		until(t, 5*time.Second, "no idle connection of s1", func() bool { return r.server("s1").Idle == 0 })
		if took := time.Since(set); took > time.Second {
			t.Errorf("%s: idle connections were there for %s", word, took)
		}
		// Nothing new at once: what was under way when the command returned is
		// at most one request per client.
		l.progress(100)
		if n := r.server("s1").Requests - after; n > 8 {
			t.Errorf("%s: %d requests reached the server after the command", word, n)
		}
		if n := r.server("s1").Idle; n != 0 {
			t.Errorf("%s: %d idle connections again", word, n)
		}
		if s := r.server("s1"); s.State != word || s.Active == 0 {
			t.Errorf("%s: %+v, want a running exchange", word, s)
		}
		for range running {
			release <- struct{}{}
		}
		for _, h := range running {
			if err := h.rest(); err != nil {
				t.Errorf("%s: a running exchange: %v", word, err)
			}
		}
		until(t, 5*time.Second, "no connection of s1", func() bool { return r.server("s1").Open == 0 })
		before := l.by("s1")
		r.mustWeir("servers", "ready", "s1")
		until(t, 10*time.Second, "answers of s1", func() bool { return l.by("s1") > before })
	}
	l.end()
	r.stop(w)
}

// TestRuntimeServers: what is changed at run time stands until the file says
// something else about just that, and over a restart if that is asked for.
func TestRuntimeServers(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 3})
	r.hello()
	base := setup{servers: []string{"s1=0", "s2=1"}}
	w := r.startWith(r.text(base))
	l := r.drive(r.VIP(), 2)

	r.mustWeir("servers", "add", "web/extra", r.Server(2).String(), "--weight", "3")
	until(t, 10*time.Second, "answers of the server that was added", func() bool { return l.by("s3") > 0 })
	r.mustWeir("servers", "weight", "s1", "7", "--persist")
	r.mustWeir("servers", "drain", "web/s2", "--persist")
	if s := r.server("s1"); s.Weight != 7 {
		t.Errorf("weight: %+v", s)
	}
	// A reload that says nothing about them leaves them alone.
	r.rewrite(r.text(setup{servers: base.servers, farm: "    pool: {max_idle: 9}\n"}))
	r.mustWeir("reload")
	if r.server("s1").Weight != 7 || r.server("s2").State != "drain" || r.server("extra") == nil {
		t.Errorf("a reload took back what was changed at run time: %+v", r.status().Farms)
	}
	out := r.mustWeir("servers")
	for _, want := range []string{"added", "weight,kept", "state,kept"} {
		if !strings.Contains(out, want) {
			t.Errorf("weir servers does not say %q:\n%s", want, out)
		}
	}
	// Now the file gives s1 a weight: it counts.
	r.rewrite(strings.Replace(r.text(base), "name: s1,", "name: s1, weight: 2,", 1))
	if out := r.mustWeir("reload"); !strings.Contains(out, "run-time change of server s1") {
		t.Errorf("weir reload does not tell what it drops:\n%s", out)
	}
	if s := r.server("s1"); s.Weight != 2 {
		t.Errorf("the file's new weight: %+v", s)
	}
	r.mustWeir("servers", "weight", "s1", "5", "--persist")
	r.mustWeir("servers", "remove", "extra")
	until(t, 10*time.Second, "the end of the server that was removed", func() bool { return r.server("extra") == nil })
	l.end()

	// Refused wishes change nothing and are told.
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"servers", "drain", "s9"}, 1, "there is no server s9; there are web/s1, web/s2"},
		{[]string{"servers", "weight", "s1", "300"}, 2, "expected 1 to 256"},
		{[]string{"servers", "weight", "s1", "x"}, 2, "expected a number"},
		{[]string{"servers", "add", "web/s1", "198.51.100.13:80"}, 1, `farm "web" has a server "s1"`},
		{[]string{"servers", "add", "nofarm/s7", "198.51.100.13:80"}, 1, `there is no farm "nofarm"`},
		{[]string{"servers", "add", "web/s7", r.Server(0).String()}, 2, "is given twice in this farm"},
		{[]string{"servers", "add", "web/s7", r.SNIP().String() + ":20000"}, 2, "is a SNIP with a port inside"},
		{[]string{"servers", "add", "web/s7", "[2001:db8::7]:80"}, 2, "is IPv6 in a farm of IPv4"},
		{[]string{"servers", "reset", "web/s9"}, 1, "was not changed at run time"},
		{[]string{"flows", "kill", "198.18.0.99:1"}, 1, "there is no connection"},
		{[]string{"flows", "--state", "odd"}, 2, "expected one of head, binding"},
		{[]string{"trace"}, 2, "--client is missing"},
	} {
		if code, _, errs := r.weir(c.args...); code != c.code || !strings.Contains(errs, c.want) {
			t.Errorf("weir %s: exit code %d, want %d with %q:\n%s", strings.Join(c.args, " "), code, c.code, c.want, errs)
		}
	}
	if n := len(r.status().Farms[0].Servers); n != 2 {
		t.Errorf("%d servers", n)
	}
	r.stop(w)

	// After a restart what was kept is in force again, the rest is gone.
	r.rewrite(strings.Replace(r.text(base), "name: s1,", "name: s1, weight: 2,", 1))
	text, err := os.ReadFile(r.file())
	if err != nil {
		t.Fatal(err)
	}
	w = r.startWith(string(text))
	if r.server("s1").Weight != 5 || r.server("s2").State != "drain" || r.server("extra") != nil {
		t.Errorf("after a restart: %+v", r.status().Farms[0].Servers)
	}
	r.mustAsk("/x")
	r.mustWeir("servers", "reset", "s1")
	r.mustWeir("servers", "reset", "web/s2")
	if r.server("s1").Weight != 2 || r.server("s2").State != "ready" {
		t.Errorf("after reset: %+v", r.status().Farms[0].Servers)
	}
	r.stop(w)
	if list, err := lab.Files(r.run); err != nil || len(list) > 0 {
		t.Errorf("files are left: %q, %v", list, err)
	}
}

// TestFlows: connections are listed with what they are spliced to, filtered,
// and killed on both sides.
func TestFlows(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	release := r.halves()
	w := r.startWith(r.text(setup{servers: []string{"s1=0"}}))
	r.mustAsk("/x")
	one, two := r.begin(t), r.begin(t)
	list := func(args ...string) []control.Flow {
		t.Helper()
		var out []control.Flow
		d := json.NewDecoder(strings.NewReader(r.mustWeir(append([]string{"flows", "-o", "json"}, args...)...)))
		for {
			var f control.Flow
			if err := d.Decode(&f); err == io.EOF {
				return out
			} else if err != nil {
				t.Fatal(err)
			}
			out = append(out, f)
		}
	}
	for _, c := range []struct {
		args []string
		n    int
	}{
		{nil, 2}, {[]string{"--client", one.local}, 1}, {[]string{"--client", r.ClientAddr(0).String()}, 2},
		{[]string{"--client", "198.18.0.0/16"}, 2}, {[]string{"--client", "198.19.0.0/16"}, 0},
		{[]string{"--farm", "web"}, 2}, {[]string{"--farm", "no"}, 0}, {[]string{"--server", "s1"}, 2}, {[]string{"--server", "s2"}, 0},
		{[]string{"--state", "spliced"}, 2}, {[]string{"--state", "closing"}, 0}, {[]string{"--vip", r.VIP().String()}, 2},
		{[]string{"--vip", "203.0.113.99:80"}, 0}, {[]string{"--limit", "1"}, 1},
	} {
		got := list(c.args...)
		// The client of mustAsk may linger.
		n := 0
		for _, f := range got {
			if f.State != "closing" {
				n++
			}
		}
		if n != c.n {
			t.Errorf("weir flows %v: %d, want %d: %+v", c.args, n, c.n, got)
		}
	}
	f := list("--client", one.local)[0]
	if f.Client != one.local || f.VIP != r.VIP().String() || f.Farm != "web" || f.Server != "s1" || f.Remote != r.Server(0).String() ||
		!strings.HasPrefix(f.SNIP, r.SNIP().String()+":") || f.ServerState != "active" || f.Method != "GET" {
		t.Errorf("flow: %+v", f)
	}
	table := r.mustWeir("flows")
	if !strings.Contains(table, one.local) || !strings.Contains(table, "spliced") {
		t.Errorf("the table:\n%s", table)
	}
	r.mustWeir("flows", "kill", one.local)
	if err := one.rest(); err == nil {
		t.Error("a connection that was killed goes on")
	}
	release <- struct{}{}
	if err := two.rest(); err != nil {
		t.Errorf("the other connection: %v", err)
	}
	until(t, 5*time.Second, "one idle connection", func() bool { s := r.server("s1"); return s.Active == 0 && s.Open == s.Idle })
	for _, c := range []struct{ args, want string }{
		{"pool", "OLDEST IDLE"}, {"farms", "203.0.113.10:80"}, {"top -n 1 -i 200ms", "REQ/S"}, {"rules show", "table inet weir"},
		{"events", "flow-killed"}, {"status", "REUSE RATIO"}, {"servers", "198.51.100.11:80"},
	} {
		if out := r.mustWeir(strings.Fields(c.args)...); !strings.Contains(out, c.want) {
			t.Errorf("weir %s has no %q:\n%s", c.args, c.want, out)
		}
	}
	var pools []control.Pool
	if err := json.Unmarshal([]byte(r.mustWeir("pool", "-o", "json")), &pools); err != nil || len(pools) != 1 || pools[0].Server != "s1" {
		t.Errorf("pools: %+v, %v", pools, err)
	}
	r.stop(w)
}

// TestTrace: the packets of one client are shown on both legs in the patent's
// notation, those of others are not, and the file opens elsewhere.
func TestTrace(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 2, Servers: 1, NoIPv6: true})
	r.hello()
	w := r.startWith(r.text(setup{servers: []string{"s1=0"}}))
	file := filepath.Join(r.dir, "trace.pcapng")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cmd := exec.CommandContext(ctx, r.bin, "trace", "--client", r.ClientAddr(0).String(), "--pcap", file, "--socket", r.socket())
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	br := bufio.NewReader(pipe)
	head, err := br.ReadString('\n')
	if err != nil || !strings.Contains(head, "CLIENT SIDE") {
		t.Fatalf("%q, %v: %s", head, err, errs.String())
	}
	if code, _, e := r.weir("trace", "--client", "198.18.0.99"); code != 1 || !strings.Contains(e, "another trace is running") {
		t.Errorf("a second trace: exit code %d: %s", code, e)
	}
	// One client after the other.
	for _, c := range []*lab.Host{r.Clients[1], r.Clients[0]} {
		resp, err := c.HTTPClient(lab.HTTPClientOptions{Close: true}).Get("http://" + r.VIP().String() + "/traced")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Fatal(err)
		}
	}
	var text strings.Builder
	for !strings.Contains(text.String(), "RESP") {
		line, err := br.ReadString('\n')
		if err != nil {
			t.Fatalf("%v: %s\n%s", err, errs.String(), text.String())
		}
		text.WriteString(line)
	}
	cancel() // an interrupt ends it in good order
	rest, err := io.ReadAll(br)
	if err != nil {
		t.Fatal(err)
	}
	text.Write(rest)
	if err := cmd.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("weir trace: %v: %s", err, errs.String())
	}
	for _, want := range []string{" SYN:", " SYN ACK:", "GET:", "RESP", r.ClientAddr(0).String(), r.Server(0).String()} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the trace has no %q:\n%s", want, text.String())
		}
	}
	both := 0
	for line := range strings.Lines(text.String()) {
		if strings.Count(line, "GET:") == 2 || strings.Count(line, "RESP") == 2 {
			both++
		}
	}
	if both < 2 {
		t.Errorf("no request and response on both sides:\n%s", text.String())
	}
	if strings.Contains(text.String(), r.ClientAddr(1).String()) {
		t.Errorf("the trace has another client:\n%s", text.String())
	}

	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	in, err := capture.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	legs := map[int]string{}
	for {
		k, err := in.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		legs[k.Interface] += " " + capture.Segment(k.Data)
	}
	for i := range 2 {
		for _, want := range []string{"GET:", "RESP"} {
			if !strings.Contains(legs[i], want) {
				t.Errorf("leg %d has no %s: %s", i, want, legs[i])
			}
		}
	}
	// The file can be played again, also under another configuration.
	replay := func(config string) string {
		t.Helper()
		b, err := exec.CommandContext(t.Context(), r.bin, "replay", file, "--config", config).CombinedOutput()
		if err != nil {
			t.Fatalf("weir replay: %v\n%s", err, b)
		}
		return string(b)
	}
	if out := replay(r.file()); !strings.Contains(out, "GET /traced") || !strings.Contains(out, "web/s1") || !strings.Contains(out, "1 request on 1 connection,") {
		t.Errorf("weir replay:\n%s", out)
	}
	other := filepath.Join(r.dir, "other.yaml")
	what := r.text(setup{servers: []string{"s1=0"}, farm: "    policies: [{use: path, config: {routes: [{prefix: /other/, servers: [s1]}]}}]\n"})
	if err := os.WriteFile(other, []byte(what), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := replay(other); !strings.Contains(out, "answer 404") {
		t.Errorf("weir replay with another configuration:\n%s", out)
	}
	r.mustAsk("/after") // without a tap
	r.stop(w)
	t.Run("tshark", func(t *testing.T) {
		tshark := require.Tool(t, "tshark")
		out, err := exec.Command(tshark, "-nr", file, "-Y", "http.request", "-T", "fields", "-e", "frame.interface_name", "-e", "http.request.uri").CombinedOutput()
		if err != nil || !strings.Contains(string(out), "client side\t/traced") || !strings.Contains(string(out), "server side\t/traced") {
			t.Errorf("tshark: %v\n%s", err, out)
		}
	})
}

// TestEventsFollow: events come to a reader as they happen, and the stop of
// the instance ends the stream in good order.
func TestEventsFollow(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.hello()
	w := r.startWith(r.text(setup{servers: []string{"s1=0", "s2=1"}}))
	cmd := exec.CommandContext(t.Context(), r.bin, "events", "-f", "-o", "json", "--socket", r.socket())
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d := json.NewDecoder(pipe)
	next := func(name string) control.Event {
		t.Helper()
		for {
			var e control.Event
			if err := d.Decode(&e); err != nil {
				t.Fatalf("waiting for %s: %v", name, err)
			}
			if e.Name == name {
				return e
			}
		}
	}
	next(control.EventReady)
	r.mustWeir("servers", "drain", "s1")
	if e := next(control.EventServerState); e.Server != "s1" || e.Farm != "web" || e.Seq == 0 || e.Time.IsZero() {
		t.Errorf("%+v", e)
	}
	r.rewrite("nonsense")
	if e := next(control.EventReloadRefused); e.Level != control.LevelError || !strings.Contains(e.Text, "weir.yaml:1") {
		t.Errorf("%+v", e)
	}
	r.stop(w)
	if err := cmd.Wait(); err != nil {
		t.Errorf("weir events -f, after the stop of the instance: %v", err)
	}
}

// TestControlAPI: the paths that docs/control.md names answer as it says,
// without our client.
func TestControlAPI(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.hello()
	w := r.startWith(r.text(setup{servers: []string{"s1=0", "s2=1"}}))
	st, err := os.Stat(r.socket())
	if err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("the socket: %v, %v", st, err)
	}
	client := &http.Client{Transport: &http.Transport{DialContext: unixDialer(r.socket())}}
	defer client.CloseIdleConnections()
	for _, c := range []struct {
		method, path, body string
		code               int
		want               string
	}{
		{"GET", "/v1/status", "", 200, `"condition":"ready"`},
		{"GET", "/v1/farms", "", 200, `[{"name":"web"`},
		{"GET", "/v1/farms/web", "", 200, `{"name":"web"`},
		{"GET", "/v1/farms/none", "", 404, `there is no farm`},
		{"GET", "/v1/farms/web/servers", "", 200, `[{"name":"s1"`},
		{"GET", "/v1/farms/web/servers/s2", "", 200, `{"name":"s2"`},
		{"GET", "/v1/farms/web/servers/s9", "", 404, `there is no server`},
		{"PATCH", "/v1/farms/web/servers/s1", `{"state":"drain","weight":4}`, 200, `"state":"drain"`},
		{"PATCH", "/v1/farms/web/servers/s1", `{"state":"asleep"}`, 400, `expected ready, drain or maint`},
		{"PATCH", "/v1/farms/web/servers/s1", `{"colour":"red"}`, 400, `unknown field`},
		{"POST", "/v1/farms/web/servers", `{"name":"s3","address":"198.51.100.77:80"}`, 200, `"added":true`},
		{"POST", "/v1/farms/web/servers", `{"name":"s/3","address":"198.51.100.78:80"}`, 400, `expected a letter or digit`},
		{"GET", "/v1/overrides", "", 200, `"server":"s3"`},
		{"DELETE", "/v1/overrides/web/s1", "", 200, `{"count":1}`},
		{"DELETE", "/v1/farms/web/servers/s3", "", 200, `"server":"s3"`},
		{"GET", "/v1/pools", "", 200, `"server":"s1"`},
		{"GET", "/v1/flows?limit=5", "", 200, ""},
		{"GET", "/v1/flows?client=x", "", 400, "expected ADDRESS"},
		{"DELETE", "/v1/flows?client=198.18.0.9:1", "", 404, "there is no connection"},
		{"GET", "/v1/events?last=2", "", 200, `"seq":`},
		{"GET", "/v1/trace?client=x", "", 400, "expected ADDRESS"},
		{"POST", "/v1/reload", "", 200, `"outcome":"unchanged"`},
		{"POST", "/v1/plan", "farms: []\n", 200, `"action":"removed"`},
		{"POST", "/v1/plan", "farms: 7\n", 400, `expected a list`},
		{"GET", "/v1/rules", "", 200, "table inet weir"},
		{"DELETE", "/v1/status", "", 405, "use GET or HEAD"},
		{"GET", "/v2/status", "", 404, "in this version"},
	} {
		req, err := http.NewRequestWithContext(within(t, 20*time.Second), c.method, "http://weir"+c.path, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatalf("%s %s: %v", c.method, c.path, err)
		}
		b, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || resp.StatusCode != c.code || !strings.Contains(string(b), c.want) {
			t.Errorf("%s %s: %d, %v, want %d with %q:\n%s", c.method, c.path, resp.StatusCode, err, c.code, c.want, clip(string(b), 500))
		}
	}
	r.stop(w)
}

func unixDialer(socket string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
}
