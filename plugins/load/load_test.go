// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"math"
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

func TestConfigErrors(t *testing.T) {
	for _, c := range []struct{ config, want string }{
		{`{"half": "1s"}`, "config.half: unknown key"},
		{`{"half_life": "1ms"}`, "config.half_life: is 1ms"},
		{`{"peak": 2}`, "config.peak: is 2, expected 0 to 1"},
		{`{"min": 0}`, "config.min: is 0, expected 0.01 to 1"},
		{`{"max": 0.5}`, "config.max: is 0.5"},
		{`{"tolerance": -1}`, "config.tolerance: is -1"},
		{`{"slow_start": "-1s"}`, "config.slow_start: is -1s"},
		{`{"agent": {}}`, "config.agent: has none of http and line"},
		{`{"agent": {"http": "/", "line": true}}`, "config.agent: has both of"},
		{`{"agent": {"line": true}}`, "config.agent.port: is needed"},
		{`{"agent": {"http": "load"}}`, `config.agent.http: is "load"`},
		{`{"agent": {"http": "/load", "send": "x"}}`, "config.agent.send: is for line"},
		{`{"agent": {"http": "/load", "interval": "1s", "expiry": "1ms"}}`, "config.agent.expiry: is 1ms"},
	} {
		if err := newLoad(time.Now).Configure(policies.Farm{}, []byte(c.config)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", c.config, err, c.want)
		}
	}
}

// bench plays seconds of traffic to a policy.
type bench struct {
	t    *testing.T
	l    *load
	farm policies.Farm
	now  atomic.Int64
	tel  *policies.Telemetry
}

func newBench(t *testing.T, config string, n int) *bench {
	t.Helper()
	b := &bench{t: t, farm: policies.Farm{Name: "web"}, tel: &policies.Telemetry{}}
	for i := range n {
		name := fmt.Sprint("s", i+1)
		b.farm.Servers = append(b.farm.Servers, policies.Server{Name: name, Address: "198.51.100.1:80", Weight: 1})
		b.tel.Servers = append(b.tel.Servers, &policies.ServerTelemetry{
			Name: name, State: policypb.ServerState_SERVER_STATE_READY, Available: true, FirstByte: &policies.Histogram{Counts: make([]uint64, 30)},
		})
	}
	b.l = newLoad(func() time.Time { return time.Unix(1000, b.now.Load()) })
	if err := b.l.Configure(b.farm, []byte(config)); err != nil {
		t.Fatal(err)
	}
	b.tick()
	return b
}

// requests adds n requests to a server that took d each.
func (b *bench) requests(server, n int, d time.Duration) {
	h := b.tel.Servers[server].FirstByte
	h.SumNanos += uint64(n) * uint64(d)
	i := 0
	for policies.BoundOf(i) <= d {
		i++
	}
	h.Counts[i] += uint64(n)
}

// tick lets a second pass and returns the scores.
func (b *bench) tick() []float64 {
	b.t.Helper()
	b.now.Add(int64(time.Second))
	copied := &policies.Telemetry{}
	for _, s := range b.tel.Servers {
		copied.Servers = append(copied.Servers, &policies.ServerTelemetry{
			Name: s.Name, State: s.State, Available: s.Available, Active: s.Active, Waiting: s.Waiting,
			FirstByte: &policies.Histogram{SumNanos: s.FirstByte.SumNanos, Counts: append([]uint64(nil), s.FirstByte.Counts...)},
		})
	}
	snap, err := b.l.Tick(b.farm, copied)
	if err != nil {
		b.t.Fatal(err)
	}
	out := make([]float64, len(b.farm.Servers))
	for i, f := range b.farm.Servers {
		out[i] = 1
		for _, s := range snap.Scores.Servers {
			if s.Server == f.Name {
				out[i] = s.Score
			}
		}
	}
	return out
}

func TestSlowServer(t *testing.T) {
	for _, n := range []int{2, 3, 10} {
		b := newBench(t, `{}`, n)
		var got []float64
		for range 10 {
			for i := range n {
				d := 10 * time.Millisecond
				if i == 0 {
					d *= 5
				}
				b.requests(i, 20, d)
			}
			got = b.tick()
		}
		if got[0] < 0.1 || got[0] > 0.35 {
			t.Errorf("%d servers: a server five times as slow has the score %g", n, got[0])
		}
		for i := 1; i < n; i++ {
			if got[i] != 1 {
				t.Errorf("%d servers: server %d has the score %g", n, i, got[i])
			}
		}
		// It recovers, and is forgiven soon.
		for range 30 {
			for i := range n {
				b.requests(i, 20, 10*time.Millisecond)
			}
			got = b.tick()
		}
		if got[0] != 1 {
			t.Errorf("%d servers: the score stays %g", n, got[0])
		}
	}
}

// TestNoise: what differs little, or takes no time worth to speak of, is equal.
func TestNoise(t *testing.T) {
	for _, d := range [][]time.Duration{
		{10 * time.Millisecond, 13 * time.Millisecond, 9 * time.Millisecond},
		{100 * time.Microsecond, 500 * time.Microsecond, 50 * time.Microsecond},
	} {
		b := newBench(t, `{}`, 3)
		for range 20 {
			for i := range 3 {
				b.requests(i, 10, d[i])
			}
			if got := b.tick(); got[0] != 1 || got[1] != 1 || got[2] != 1 {
				t.Fatalf("%v: scores %v", d, got)
			}
		}
	}
}

// TestNoStarvation: a server of which nothing was seen for long is tried again.
func TestNoStarvation(t *testing.T) {
	b := newBench(t, `{"half_life": "1s"}`, 2)
	for range 5 {
		b.requests(0, 10, 10*time.Second)
		b.requests(1, 10, 10*time.Millisecond)
		b.tick()
	}
	if got := b.tick(); math.Abs(got[0]-0.1) > 0.01 {
		t.Fatalf("a server a thousand times as slow has the score %g, want the least", got[0])
	}
	for range 12 {
		b.requests(1, 10, 10*time.Millisecond)
		b.tick()
	}
	if got := b.tick(); got[0] != 1 {
		t.Errorf("it is never tried again: %g", got[0])
	}
}

func TestPeakAndQueue(t *testing.T) {
	b := newBench(t, `{"peak": 1, "half_life": "2s"}`, 2)
	for range 5 {
		b.requests(0, 100, 10*time.Millisecond)
		b.requests(0, 1, time.Second)
		b.requests(1, 101, 20*time.Millisecond) // the same mean
		b.tick()
	}
	if got := b.tick(); got[0] >= 0.5 {
		t.Errorf("peaks do not count: %v", got)
	}
	b = newBench(t, `{}`, 2)
	b.tel.Servers[0].Waiting, b.tel.Servers[0].Active = 30, 9
	for range 3 {
		b.requests(0, 10, 10*time.Millisecond)
		b.requests(1, 10, 10*time.Millisecond)
		b.tick()
	}
	if got := b.tick(); got[0] >= 0.5 {
		t.Errorf("a queue does not count: %v", got)
	}
}

func TestSlowStart(t *testing.T) {
	b := newBench(t, `{"slow_start": "10s"}`, 2)
	if got := b.tick(); got[0] != 1 {
		t.Errorf("at the very start: %v", got)
	}
	b.tel.Servers[0].Available = false
	b.tick()
	b.tel.Servers[0].Available = true
	last := 0.0
	for i := range 10 {
		got := b.tick()
		if got[0] < last || got[1] != 1 || i == 0 && got[0] > 0.11 || i < 9 && got[0] >= 1 {
			t.Fatalf("second %d: %v after %g", i, got, last)
		}
		last = got[0]
	}
	if got := b.tick(); got[0] != 1 {
		t.Errorf("after ten seconds: %v", got)
	}
}

func TestParseLine(t *testing.T) {
	for _, c := range []struct {
		line   string
		factor float64
		away   string
		bad    bool
	}{
		{"75%", 0.75, "", false},
		{"ready 50%", 0.5, "", false},
		{"up,maxconn:30\t150%", 1.5, "", false},
		{"drain", 1, "agent: drain", false},
		{"down # disk full", 1, "agent: down (disk full)", false},
		{"0%", 0, "agent: weight 0", false},
		{"", 0, "", true},
		{"# only words", 0, "", true},
		{"fine", 0, "", true},
		{"x%", 0, "", true},
		{"-5%", 0, "", true},
		{"NaN%", 0, "", true},
	} {
		r, err := parseLine(c.line)
		if (err != nil) != c.bad || !c.bad && (r.factor != c.factor || r.away != c.away) {
			t.Errorf("%q: %+v, %v", c.line, r, err)
		}
	}
	for _, c := range []struct {
		in     string
		factor float64
		away   string
		bad    bool
	}{
		{`{"load": 0.25}`, 0.75, "", false},
		{`{"load": 7}`, 0.05, "", false},
		{`{"weight": 50, "load": 0.5, "other": []}`, 0.25, "", false},
		{`{"state": "MAINT"}`, 1, "agent: maint", false},
		{`{"weight": 0}`, 0, "agent: weight 0", false},
		{`{}`, 0, "", true},
		{`{"state": "odd"}`, 0, "", true},
		{`{"load": -1}`, 0, "", true},
		{`{"load": "x"}`, 0, "", true},
		{`x`, 0, "", true},
	} {
		r, err := parseJSON([]byte(c.in))
		if (err != nil) != c.bad || !c.bad && (r.factor != c.factor || r.away != c.away) {
			t.Errorf("%s: %+v, %v", c.in, r, err)
		}
	}
}

// TestAgents: reports count while they are fresh, whatever way they come.
func TestAgents(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	var say atomic.Value
	say.Store("50%")
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		switch v := say.Load().(string); v {
		case "":
			w.WriteHeader(500)
		case "drain":
			fmt.Fprint(w, `{"state": "drain"}`)
		default:
			fmt.Fprint(w, `{"weight": 50}`)
		}
	}))
	defer web.Close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			b := make([]byte, 6)
			if _, err := io.ReadFull(c, b); err == nil && string(b) == "hello\n" && say.Load().(string) != "" {
				fmt.Fprintf(c, "%s\n", say.Load())
			}
			c.Close()
		}
	}()
	port := func(a net.Addr) string { return a.String()[strings.LastIndexByte(a.String(), ':')+1:] }
	for _, agent := range []string{
		`{"http": "/load", "interval": "50ms", "expiry": "400ms"}`,
		`{"line": true, "send": "hello\n", "port": ` + port(ln.Addr()) + `, "interval": "50ms", "expiry": "400ms"}`,
	} {
		say.Store("50%")
		l := newLoad(time.Now)
		farm := policies.Farm{Servers: []policies.Server{{Name: "s1", Address: web.Listener.Addr().String()}}}
		if err := l.Configure(farm, []byte(`{"agent": `+agent+`}`)); err != nil {
			t.Fatal(err)
		}
		wait := func(want string) {
			t.Helper()
			var got string
			for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
				snap, err := l.Tick(farm, nil)
				if err != nil {
					t.Fatal(err)
				}
				if got = fmt.Sprintf("%v%v", snap.Scores.Servers, snap.Eligibility.Servers); got == want {
					return
				}
			}
			t.Fatalf("%s: %s, want %s", agent, got, want)
		}
		wait("[{s1 0.5}][]")
		say.Store("drain")
		wait("[][{s1 false agent: drain}]")
		say.Store("")
		wait("[][]") // stale
		l.Close()
	}
}
