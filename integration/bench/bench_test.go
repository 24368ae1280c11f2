// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestHistogram: quantiles are right to 2 %.
func TestHistogram(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var h histogram
	var all []int64
	for range 100_000 {
		v := int64(1) << rnd.IntN(40)
		v += rnd.Int64N(v)
		all = append(all, v)
		h.add(v)
	}
	slices.Sort(all)
	for _, q := range []float64{0, 0.01, 0.5, 0.99, 0.999} {
		want, got := all[int(q*float64(len(all)))], int64(h.quantile(q))
		if got > want || float64(got) < 0.98*float64(want) {
			t.Errorf("quantile %v is %d, want %d", q, got, want)
		}
	}
	if h := (histogram{}); h.quantile(0.5) != 0 {
		t.Error("a histogram without entries has a median")
	}
}

// TestParse: a head may come in pieces; what is no good response is told.
func TestParse(t *testing.T) {
	const good = "HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 12\r\nA: b\r\n\r\nbody"
	for cut := range len(good) {
		c := client{missing: -1}
		rest, err := c.parse([]byte(good[:cut]))
		if err == nil && c.missing < 0 {
			rest, err = c.parse([]byte(good[cut:]))
		} else {
			rest = append(rest, good[cut:]...)
		}
		if err != nil || c.missing != 12 || string(rest) != "body" {
			t.Errorf("cut at %d: %d missing, rest %q, %v", cut, c.missing, rest, err)
		}
	}
	for _, bad := range []string{"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n", "nonsense\r\n\r\n"} {
		c := client{missing: -1}
		if _, err := c.parse([]byte(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

// TestLoad: the load generator counts what a server has answered, over kept
// connections and over one for each request.
func TestLoad(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var requests, connections atomic.Int64
	srv := &http.Server{
		ReadHeaderTimeout: time.Minute,
		ConnState: func(_ net.Conn, s http.ConnState) {
			if s == http.StateNew {
				connections.Add(1)
			}
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			requests.Add(1)
			_, _ = w.Write(make([]byte, 500))
		}),
	}
	go func() { _ = srv.Serve(ln) }()
	defer srv.Close()
	for _, close := range []bool{false, true} {
		requests.Store(0)
		connections.Store(0)
		job := loadJob{
			Target: netip.MustParseAddrPort(ln.Addr().String()), Sources: []netip.Addr{netip.MustParseAddr("127.0.0.1")},
			Paths: []string{"/"}, Connections: 4, Close: close, Warm: 20 * time.Millisecond, Measure: 200 * time.Millisecond,
		}
		var out bytes.Buffer
		if err := runLoad(job.args()[1:], &out); err != nil {
			t.Fatal(err)
		}
		var res loadResult
		if err := json.Unmarshal(out.Bytes(), &res); err != nil {
			t.Fatalf("the load generator writes %q: %v", out.String(), err)
		}
		n, c := requests.Load(), connections.Load()
		if res.Errors > 0 || res.Requests == 0 || res.AllRequests <= res.Requests || int64(res.AllRequests) > n || n > int64(res.AllRequests)+8 || res.P50 <= 0 || res.P99 < res.P50 {
			t.Errorf("close %v: %+v; the server had %d requests", close, res, n)
		}
		if !close && c != 4 || close && c+4 < n { // four requests may be left from before
			t.Errorf("close %v: %d connections for %d requests", close, c, n)
		}
		if res.Bytes < 500*(res.Requests-1) {
			t.Errorf("close %v: %d bytes", close, res.Bytes)
		}
	}
	if _, err := (loadJob{Target: netip.MustParseAddrPort("127.0.0.1:1"), Paths: []string{"/"}, Connections: 1, Measure: 10 * time.Millisecond}).run(); err != nil {
		t.Errorf("a server that refuses ends the run: %v; it should be counted", err)
	}
}

// TestRate: requests with a rate come at that rate, over as many connections as
// there are.
func TestRate(t *testing.T) {
	var requests, connections atomic.Int64
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		requests.Add(1)
		_, _ = w.Write([]byte("ok"))
	}))
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			connections.Add(1)
		}
	}
	srv.Start()
	defer srv.Close()
	job := loadJob{
		Target: netip.MustParseAddrPort(srv.Listener.Addr().String()), Paths: []string{"/a", "/b"}, Connections: 300, Rate: 500,
		Warm: 50 * time.Millisecond, Measure: 400 * time.Millisecond,
	}
	var out bytes.Buffer
	if err := runLoad(job.args()[1:], &out); err != nil {
		t.Fatal(err)
	}
	var res loadResult
	if err := json.Unmarshal(out.Bytes(), &res); err != nil {
		t.Fatal(err)
	}
	// Each of the 300 asks once at first. A slow machine answers late, and no
	// more often.
	if res.Errors > 0 || connections.Load() > 300 || res.AllRequests == 0 || float64(res.Requests) > 500*res.Elapsed.Seconds()+310 {
		t.Errorf("%+v over %d connections", res, connections.Load())
	}
}

// TestUpload: the sink takes all of a body and keeps the connection.
func TestUpload(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	served := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			served <- err
			return
		}
		served <- swallow(c.(*net.TCPConn))
		c.Close()
	}()
	job := loadJob{
		Target: netip.MustParseAddrPort(ln.Addr().String()), Paths: []string{"/up"}, Connections: 1, Upload: 3 << 20, Measure: 200 * time.Millisecond,
	}
	var out bytes.Buffer
	if err := runLoad(job.args()[1:], &out); err != nil {
		t.Fatal(err)
	}
	var res loadResult
	if err := json.Unmarshal(out.Bytes(), &res); err != nil {
		t.Fatal(err)
	}
	if res.Errors > 0 || res.AllRequests == 0 || res.AllBytes < res.AllRequests*3<<20 {
		t.Errorf("%+v", res)
	}
}

// TestPlots: every picture is XML, and has a bar for each contender.
func TestPlots(t *testing.T) {
	r := &report{contenders: contenders, workloads: workloads}
	for _, l := range workloads {
		for i, c := range contenders {
			for round := range 3 {
				n := uint64(1000 + 100*i + round)
				r.samples = append(r.samples, sample{
					round: round, contender: c.name, workload: l.name, bulk: l.bulk, serverCPU: time.Microsecond, packets: 3,
					loadResult: loadResult{Requests: n, Bytes: n, AllRequests: n, Elapsed: time.Second, P50: time.Millisecond, P99: time.Second},
				})
			}
		}
	}
	for name, f := range map[string]func(io.Writer) error{"speed": r.plotSpeed, "latency": r.plotLatency, "cpu": r.plotCPU} {
		var b bytes.Buffer
		if err := f(&b); err != nil {
			t.Fatal(err)
		}
		bars := 0
		for d := xml.NewDecoder(&b); ; {
			tok, err := d.Token()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if e, ok := tok.(xml.StartElement); ok && e.Name.Local == "rect" {
				bars++
			}
		}
		if bars < 1+len(contenders)*len(workloads)/2 {
			t.Errorf("%s: %d bars", name, bars)
		}
	}
	var md bytes.Buffer
	if err := r.markdown(&md); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"| bulk, speed | bulk | ≥ 2 × nginx |", "**missed**", "reached"} {
		if !strings.Contains(md.String(), want) {
			t.Errorf("no %q in the report", want)
		}
	}
}

func TestReport(t *testing.T) {
	at := func(round int, who string, n uint64) sample {
		return sample{round: round, contender: who, workload: "kept-1k", loadResult: loadResult{Requests: n, Elapsed: time.Second, P50: time.Millisecond}}
	}
	who, err := choose(contenders, "direct,haproxy,weir", nil)
	if err != nil {
		t.Fatal(err)
	}
	what, err := choose(workloads, "kept-1k", nil)
	if err != nil {
		t.Fatal(err)
	}
	r := &report{contenders: who, workloads: what, samples: []sample{
		at(0, "direct", 80_000), at(0, "haproxy", 40_000), at(0, "weir", 30_000),
		at(1, "weir", 10_000), at(1, "direct", 20_000), at(1, "haproxy", 10_000), // a slow round
		at(2, "haproxy", 40_000), at(2, "weir", 36_000), at(2, "direct", 60_000),
	}}
	var md, table bytes.Buffer
	if err := r.markdown(&md); err != nil {
		t.Fatal(err)
	}
	if want := "| weir | 30.0 k/s (10.0–36.0) | 0.50 (0.38–0.60) | 0.90 (0.75–1.00) | – | 1 ms |"; !strings.Contains(md.String(), want) {
		t.Errorf("no %q in\n%s", want, md.String())
	}
	if err := r.table(&table); err != nil {
		t.Fatal(err)
	}
	rows, err := csv.NewReader(&table).ReadAll()
	if err != nil || len(rows) != 10 {
		t.Errorf("%d rows, %v", len(rows), err)
	}
}

func TestArguments(t *testing.T) {
	if _, err := choose(contenders, "direct,apache", nil); err == nil || !strings.Contains(err.Error(), "haproxy") {
		t.Errorf("an unknown contender: %v", err)
	}
	quick, err := choose(workloads, "", func(l workload) bool { return l.quick })
	if err != nil || len(quick) == 0 || len(quick) >= len(workloads) {
		t.Errorf("%d of %d workloads, %v", len(quick), len(workloads), err)
	}
	if err := run(t.Context(), []string{"-rounds", "-1"}, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("fewer than no rounds: %v", err)
	}
}
