// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/policypb"
)

func farmOf(addresses ...string) policies.Farm {
	f := policies.Farm{Name: "web"}
	for i, a := range addresses {
		f.Servers = append(f.Servers, policies.Server{Name: fmt.Sprint("s", i+1), Address: a, Weight: 1})
	}
	return f
}

func TestConfigErrors(t *testing.T) {
	farm := farmOf("198.51.100.1:80", "198.51.100.2:80")
	for _, c := range []struct{ config, want string }{
		{`{"prob": {}}`, "config.prob: unknown key"},
		{`{"probe": {}}`, "config.probe: has none of tcp and http"},
		{`{"probe": {"tcp": true, "http": "/"}}`, "config.probe: has both of tcp and http"},
		{`{"probe": {"tcp": true, "expect": {"body": "x"}}}`, "config.probe: has method, host or expect"},
		{`{"probe": {"http": "healthz"}}`, `config.probe.http: is "healthz", expected a path`},
		{`{"probe": {"http": "/", "method": "POST"}}`, `config.probe.method: is "POST"`},
		{`{"probe": {"http": "/", "method": "HEAD", "expect": {"body": "x"}}}`, "config.probe.expect.body: cannot"},
		{`{"probe": {"http": "/", "expect": {"status": ["20x"]}}}`, `config.probe.expect.status[0]: "20x" is neither`},
		{`{"probe": {"http": "/", "expect": {"status": ["300-200"]}}}`, `config.probe.expect.status[0]`},
		{`{"probe": {"http": "/", "host": "a b"}}`, "config.probe.host"},
		{`{"probe": {"tcp": true, "interval": "1ms"}}`, "config.probe.interval: is 1ms, expected 50ms to 1h0m0s"},
		{`{"probe": {"tcp": true, "fast_interval": "5s"}}`, "config.probe.fast_interval"},
		{`{"probe": {"tcp": true, "jitter": 0.9}}`, "config.probe.jitter: is 0.9"},
		{`{"probe": {"tcp": true, "fall": -1}}`, "config.probe.fall: is -1"},
		{`{"passive": {"ratio": 2}}`, "config.passive.ratio: is 2"},
		{`{"passive": {"window": "1ms"}}`, "config.passive.window"},
		{`{"damping": {"hold": "1h"}}`, "config.damping.max"},
		{`{"servers": {"s9": "drain"}}`, `config.servers.s9: server "s9" is not in farm "web"`},
		{`{"servers": {"s1": "off"}}`, `config.servers.s1: is "off", expected one of ready, drain, maint, down`},
	} {
		s := newState(time.Now)
		if err := s.Configure(farm, []byte(c.config)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", c.config, err, c.want)
		}
	}
	c, err := read(farm, []byte(`{"probe": {"http": "/healthz", "interval": "1s", "jitter": 0}}`))
	if err != nil {
		t.Fatal(err)
	}
	if p := c.Probe; p.Timeout != time.Second || p.FastInterval != 250*time.Millisecond || p.Fall != 3 || p.Rise != 2 || p.Method != "GET" || p.pause(false) != time.Second {
		t.Errorf("%+v", p)
	}
}

func TestProbes(t *testing.T) {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ok":
			fmt.Fprint(w, "all is well")
		case "/host":
			if r.Host != "health.example" {
				w.WriteHeader(400)
			}
		case "/raw%2Fpath", "/raw/path":
			if r.RequestURI != "/raw%2Fpath?q=1" {
				w.WriteHeader(400)
			}
		case "/moved":
			http.Redirect(w, r, "/ok", http.StatusFound)
		case "/short":
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "x")
		case "/slow":
			<-r.Context().Done()
		default:
			w.WriteHeader(503)
		}
	}))
	defer web.Close()
	addr := web.Listener.Addr().String()
	// A port on which nobody listens, and one that never answers.
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	deadAddr := dead.Addr().String()
	dead.Close()
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	for _, c := range []struct{ config, address, want string }{
		{`{"tcp": true}`, addr, ""},
		{`{"tcp": true}`, deadAddr, "connection refused"},
		{`{"http": "/ok"}`, addr, ""},
		{`{"http": "/ok", "method": "HEAD"}`, addr, ""},
		{`{"http": "/ok", "expect": {"body": "is well"}}`, addr, ""},
		{`{"http": "/ok", "expect": {"body": "is ill"}}`, addr, `the body is without "is ill"`},
		{`{"http": "/ok", "expect": {"status": ["404", "500-599"]}}`, addr, "status 200"},
		{`{"http": "/none"}`, addr, "status 503"},
		{`{"http": "/none", "expect": {"status": ["503"]}}`, addr, ""},
		{`{"http": "/moved"}`, addr, ""},
		{`{"http": "/moved", "expect": {"status": ["200"]}}`, addr, "status 302"},
		{`{"http": "/host", "host": "health.example"}`, addr, ""},
		{`{"http": "/host"}`, addr, "status 400"},
		{`{"http": "/raw%2Fpath?q=1"}`, addr, ""},
		{`{"http": "/short"}`, addr, "breaks off"},
		{`{"http": "/slow", "timeout": "50ms"}`, addr, "no answer within 50ms"},
		{`{"http": "/ok", "timeout": "50ms"}`, mute.Addr().String(), "no answer within 50ms"},
		{fmt.Sprintf(`{"http": "/ok", "port": %s}`, addr[strings.LastIndexByte(addr, ':')+1:]), "127.0.0.1:1", ""},
	} {
		p, err := read(farmOf(addr), []byte(`{"probe": `+c.config+`}`))
		if err != nil {
			t.Fatal(err)
		}
		err = p.Probe.probe(t.Context(), c.address)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.config, err, c.want)
		}
	}
}

// story plays probes and evidence to a machine: + and - are probes, a digit is
// a tick with ten requests of which so many failed, . is a tick without any; one
// second passes with each. The result has a letter per step: u for in use.
func story(t *testing.T, config, steps string) string {
	t.Helper()
	c, err := read(farmOf("a"), []byte(config))
	if err != nil {
		t.Fatal(err)
	}
	h := &health{}
	now := time.Unix(1000, 0)
	var out strings.Builder
	for _, s := range steps {
		now = now.Add(time.Second)
		switch {
		case s == '+':
			h.probe(c.Probe, nil)
		case s == '-':
			h.probe(c.Probe, errors.New("no"))
		case s >= '0' && s <= '9':
			h.evidence(&c.Passive, mark{at: now, bad: uint64(s - '0'), good: uint64('9' - s + 1), kind: "reset"})
			if why, guilty := h.guilty(&c.Passive); guilty && !now.Before(h.ejected) {
				h.eject(&c.Passive, now, why)
			}
		}
		if ok, why := h.verdict(c, now); ok {
			out.WriteByte('u')
		} else if strings.Contains(why, "taken out") {
			out.WriteByte('h')
		} else {
			out.WriteByte('d')
		}
	}
	return out.String()
}

func TestHealth(t *testing.T) {
	const probe = `{"probe": {"tcp": true, "fall": 3, "rise": 2}}`
	for _, c := range []struct{ name, config, steps, want string }{
		{"fall and rise", probe, "+--+---+-++", "uuuuuuddddu"},
		{"the first probe decides", probe, "-+-++", "ddddu"},
		{"evidence", `{"passive": {"hold": "3s"}}`, "9....0", "ddduuu"},
		{"few of many", `{"passive": {"hold": "3s"}}`, "112112211", "uuuuuuuuu"},
		{"too few", `{"passive": {"errors": 10}}`, "9", "u"},
		{"long ago", `{"passive": {"window": "2s", "errors": 8}}`, "4...4...4", "uuuuuuuuu"},
		{"within the window", `{"passive": {"window": "9s", "errors": 8, "ratio": 0.4}}`, "4...4", "uuuud"},
		{"while it is out, nothing counts", `{"passive": {"hold": "3s", "errors": 8}}`, "899..0", "ddduuu"},
		{"flaps", `{"probe": {"tcp": true, "fall": 1, "rise": 1}, "damping": {"flaps": 2, "hold": "4s", "window": "60s"}}`, "+-+-++++++", "ududhhhuuu"},
		{"flaps again, twice as long", `{"probe": {"tcp": true, "fall": 1, "rise": 1}, "damping": {"flaps": 2, "hold": "2s", "window": "60s"}}`, "+-+-+++-++++++", "ududhuudhhhuuu"},
		{"calm after the window", `{"probe": {"tcp": true, "fall": 1, "rise": 1}, "damping": {"flaps": 2, "hold": "3s", "window": "4s"}}`, "+-+....-+", "uduuuuudu"},
	} {
		if got := story(t, c.config, c.steps); got != c.want {
			t.Errorf("%s: %s\n got %s\nwant %s", c.name, c.steps, got, c.want)
		}
	}
}

// clock is a time that the test sets.
type clock struct{ ns atomic.Int64 }

func (c *clock) now() time.Time { return time.Unix(1000, c.ns.Load()) }

func reasons(t *testing.T, snap *policies.Snapshot) string {
	t.Helper()
	if snap == nil {
		return "nothing"
	}
	var out []string
	for _, e := range snap.Eligibility.Servers {
		out = append(out, e.Server+" "+e.Reason)
	}
	return strings.Join(out, "; ")
}

// TestTickProbes: the first word waits for the first probes, a server that goes
// is taken out, one that comes back is let in, and nothing is left behind.
func TestTickProbes(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	var broken atomic.Bool
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if broken.Load() {
			w.WriteHeader(500)
		}
	}))
	defer web.Close()
	farm := farmOf(web.Listener.Addr().String(), web.Listener.Addr().String())
	s := newState(time.Now)
	config := []byte(`{"probe": {"http": "/", "interval": "60ms", "fast_interval": "20ms", "timeout": "5s"}, "servers": {"s2": "drain"}}`)
	if err := s.Configure(farm, config); err != nil {
		t.Fatal(err)
	}
	wait := func(want string) {
		t.Helper()
		var got string
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			snap, err := s.Tick(farm, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got = reasons(t, snap); strings.Contains(got, want) {
				return
			}
		}
		t.Fatalf("%q, want %q", got, want)
	}
	if snap, _ := s.Tick(farm, nil); snap != nil {
		t.Error("it speaks before it knows anything")
	}
	wait("s2 drain: by the configuration")
	broken.Store(true)
	wait("s1 down: 3 probes failed: status 500; s2 drain")
	broken.Store(false)
	if err := s.Configure(farm, []byte(`{"probe": {"http": "/", "interval": "60ms", "rise": 2}}`)); err != nil {
		t.Fatal(err)
	}
	if got := reasons(t, must(s.Tick(farm, nil))); !strings.Contains(got, "s1 down") {
		t.Errorf("a new configuration forgives: %s", got)
	}
	for end := time.Now().Add(10 * time.Second); reasons(t, must(s.Tick(farm, nil))) != ""; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the server does not come back")
		}
	}
	s.Close()
}

func must(s *policies.Snapshot, err error) *policies.Snapshot {
	if err != nil {
		panic(err)
	}
	return s
}

// TestTickPassive: failures in the telemetry take servers out, but never more
// than the share that is allowed.
func TestTickPassive(t *testing.T) {
	farm := farmOf("a:1", "b:1", "c:1", "d:1")
	clk := &clock{}
	s := newState(clk.now)
	if err := s.Configure(farm, []byte(`{"passive": {"hold": "5s", "late": "1s", "most": 0.5}}`)); err != nil {
		t.Fatal(err)
	}
	tel := &policies.Telemetry{}
	for _, f := range farm.Servers {
		tel.Servers = append(tel.Servers, &policies.ServerTelemetry{Name: f.Name, FirstByte: &policies.Histogram{Counts: make([]uint64, 20)}})
	}
	tick := func() string {
		clk.ns.Add(int64(time.Second))
		// What the policy was given stays as it was.
		copied := &policies.Telemetry{}
		for _, st := range tel.Servers {
			n := &policies.ServerTelemetry{Name: st.Name, Responses: st.Responses, ServerErrors: st.ServerErrors, FirstByte: &policies.Histogram{Counts: append([]uint64(nil), st.FirstByte.Counts...)}}
			for _, f := range st.FailuresByKind {
				n.FailuresByKind = append(n.FailuresByKind, &policypb.FailureCount{Kind: f.Kind, Count: f.Count})
			}
			copied.Servers = append(copied.Servers, n)
		}
		return reasons(t, must(s.Tick(farm, copied)))
	}
	refused := &policypb.FailureCount{Kind: policypb.FailureKind_FAILURE_KIND_REFUSED, Count: 1000}
	tel.Servers[0].FailuresByKind = []*policypb.FailureCount{refused}
	if got := tick(); got != "" {
		t.Errorf("what was before counts: %s", got)
	}
	refused.Count += 7
	if got := tick(); got != "s1 down: 7 of 7 requests failed within 10s: connection refused" {
		t.Error(got)
	}
	tel.Servers[1].Responses, tel.Servers[1].ServerErrors = 10, 6
	tel.Servers[2].Responses = 10
	tel.Servers[2].FirstByte.Counts[10] = 10 // fast enough
	if got := tick(); !strings.Contains(got, "s2 down: 6 of 10 requests failed within 10s: status 5xx") || strings.Contains(got, "s3") {
		t.Error(got)
	}
	tel.Servers[2].Responses += 10
	tel.Servers[2].FirstByte.Counts[17] += 10 // two seconds and more
	if got := tick(); strings.Contains(got, "s3") {
		t.Errorf("more than half are out: %s", got)
	}
	for range 4 {
		tick()
	}
	if got := tick(); strings.Contains(got, "s1") || strings.Contains(got, "s2") {
		t.Errorf("still out: %s", got)
	}
	tel.Servers[2].Responses += 20
	tel.Servers[2].FirstByte.Counts[17] += 20
	if got := tick(); !strings.Contains(got, "s3 down: ") || !strings.Contains(got, "later than 1s") {
		t.Error(got)
	}
}

// TestHurry: a failed request brings the next probe forward.
func TestHurry(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { // until the test closes it
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, c)
			c.Close()
		}
	}()
	farm := farmOf(ln.Addr().String())
	s := newState(time.Now)
	defer s.Close()
	if err := s.Configure(farm, []byte(`{"probe": {"tcp": true, "interval": "1h", "fast_interval": "10ms", "timeout": "1s"}}`)); err != nil {
		t.Fatal(err)
	}
	count := uint64(0)
	tick := func() string {
		return reasons(t, must(s.Tick(farm, &policies.Telemetry{Servers: []*policies.ServerTelemetry{{Name: "s1", FailuresByKind: []*policypb.FailureCount{{Kind: policypb.FailureKind_FAILURE_KIND_RESET, Count: count}}}}})))
	}
	for tick() == "nothing" {
		time.Sleep(time.Millisecond)
	}
	ln.Close()
	count = 1
	for end := time.Now().Add(10 * time.Second); !strings.Contains(tick(), "3 probes failed"); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("an hour is an hour")
		}
	}
}

func TestProbeStops(t *testing.T) {
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	c, err := read(farmOf("a"), []byte(`{"probe": {"http": "/", "timeout": "1h", "interval": "1h"}}`))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	if err := c.Probe.probe(ctx, mute.Addr().String()); err == nil {
		t.Error("no error")
	}
}
