// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/weirgate/weir/module/divert"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/nft"
	"github.com/weirgate/weir/plugins/host"
	"github.com/weirgate/weir/policies/snapshot"
)

// source is one with something of everything.
func source(t *testing.T) Source {
	t.Helper()
	spec := farm.Spec{SNIPs: []netip.Addr{netip.MustParseAddr("198.51.100.1")}, Farms: []farm.FarmSpec{{
		Name: "web", VIPs: []netip.AddrPort{netip.MustParseAddrPort("203.0.113.10:80")},
		Servers: []farm.ServerSpec{
			{Name: "s1", Endpoint: netip.MustParseAddrPort("198.51.100.11:80"), Weight: 2},
			{Name: "s2", Endpoint: netip.MustParseAddrPort("198.51.100.12:80")},
		},
		Policies: []snapshot.Policy{{Name: "path"}},
		Timeouts: farm.Timeouts{Connect: 1, Head: 1, Idle: 1, Response: 1},
		Pool:     farm.PoolLimits{MaxConnections: 512, MaxWaiting: 1024},
	}}}
	db, err := farm.Build(nil, spec)
	if err != nil {
		t.Fatal(err)
	}
	db.Farms[0].Servers[0].Stats.Failed[farm.FailReset].Add(3)
	db.Farms[0].Servers[0].Stats.Latency.Add(40_000)
	db.Farms[0].Servers[0].Stats.Latency.Add(1e12)
	// The same name with another address: the old one drains.
	spec.Farms[0].Servers[1].Endpoint = netip.MustParseAddrPort("198.51.100.13:80")
	db.Farms[0].Servers[1].Stats.Open.Add(5)
	if db, err = farm.Build(db, spec); err != nil {
		t.Fatal(err)
	}
	if len(db.Draining) != 1 {
		t.Fatalf("%d servers drain", len(db.Draining))
	}
	var counts [2]engine.Counters
	counts[0][engine.ReasonServed].Add(7)
	counts[1][engine.ReasonServed].Add(8)
	stats := func() divert.Stats {
		return divert.Stats{Received: 10, Rewritten: 9, Dropped: 1, Kernel: divert.KernelStats{DroppedQueueFull: 4, Waiting: 2}}
	}
	emit := func() divert.EmitStats { return divert.EmitStats{Sent: 6, TooBig: 1} }
	var spent farm.Histogram
	return Source{
		Version: "1.2.3", Started: time.Unix(1_700_000_000, 0), Farms: func() *farm.DB { return db },
		Handshake: engine.NewHandshake(engine.NewMACCookies([16]byte{}), 1, 1, nil),
		State:     func() State { return State{Condition: "degraded", Generation: 2, Refused: true, Waiting: 1} },
		Queues: []Queue{
			{Name: "syn", Spent: &spent, Stats: stats, Emit: emit}, {Name: "control", Stats: stats, Emit: emit},
			{Name: "0", Engine: &counts[0], Stats: stats, Emit: emit}, {Name: "1", Engine: &counts[1], Stats: stats, Emit: emit},
		},
		Usage: func(context.Context) ([]engine.Usage, error) {
			return []engine.Usage{{Clients: 3}, {Clients: 4}}, nil
		},
		MaxClients: 100, MaxServers: 10,
		Firewall: func(context.Context) (map[string]nft.Counter, error) {
			return map[string]nft.Counter{nft.CounterClient: {Packets: 1, Bytes: 40}, nft.CounterSYN: {}, nft.CounterSpoof: {}}, nil
		},
		Plugins: func() []host.Status {
			return []host.Status{{Plugin: "path", State: host.StateUp, Restarts: 2, Farms: []host.FarmStatus{{Farm: "web", Generation: 5, LastTick: time.Unix(1_700_000_100, 0)}}}}
		},
		Rules:  func() Rules { return Rules{Restored: 13, GuardDropped: 14, Foreign: 15} },
		Access: func() AccessLog { return AccessLog{Written: 11, Dropped: 12} },
	}
}

// scraped returns what a scrape of a source has, by name.
func scraped(t *testing.T, s Source) (map[string]*dto.MetricFamily, string) {
	t.Helper()
	w := httptest.NewRecorder()
	Handler(s).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if w.Code != http.StatusOK {
		t.Fatalf("status %d: %s", w.Code, w.Body)
	}
	text := w.Body.String()
	p := expfmt.NewTextParser(model.UTF8Validation)
	all, err := p.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return all, text
}

func value(t *testing.T, all map[string]*dto.MetricFamily, name string, labels ...string) float64 {
	t.Helper()
	f := all[name]
	if f == nil {
		t.Fatalf("no metric %s", name)
	}
	for _, m := range f.Metric {
		fits := len(m.Label)*2 == len(labels)
		for i := 0; i < len(labels); i += 2 {
			fits = fits && slices.ContainsFunc(m.Label, func(l *dto.LabelPair) bool { return l.GetName() == labels[i] && l.GetValue() == labels[i+1] })
		}
		if fits {
			if m.Counter != nil {
				return m.Counter.GetValue()
			}
			return m.Gauge.GetValue()
		}
	}
	t.Fatalf("%s has nothing with %q", name, labels)
	return 0
}

func TestScrape(t *testing.T) {
	all, _ := scraped(t, source(t))
	for _, c := range []struct {
		want   float64
		name   string
		labels []string
	}{
		{1, "weir_build_info", []string{"version", "1.2.3"}},
		{1_700_000_000, "weir_start_time_seconds", nil},
		{1, "weir_condition", []string{"condition", "degraded"}},
		{0, "weir_condition", []string{"condition", "ready"}},
		{0, "weir_config_last_reload_successful", nil},
		{13, "weir_firewall_restored_total", nil},
		{14, "weir_firewall_guard_dropped_packets_total", nil},
		{15, "weir_firewall_foreign_findings", nil},
		{15, "weir_engine_events_total", []string{"reason", "served"}},
		{4, "weir_queue_kernel_dropped_packets_total", []string{"queue", "0", "reason", "queue_full"}},
		{9, "weir_queue_verdicts_total", []string{"queue", "1", "verdict", "rewrite"}},
		{1, "weir_emit_failures_total", []string{"queue", "syn", "reason", "too_big"}},
		{4, "weir_client_connections", []string{"queue", "1"}},
		{100, "weir_client_connections_capacity", []string{"queue", "1"}},
		{5, "weir_farm_draining_connections", []string{"farm", "web"}},
		{3, "weir_server_failures_total", []string{"farm", "web", "server", "s1", "reason", "reset"}},
		{1, "weir_server_state", []string{"farm", "web", "server", "s2", "state", "ready"}},
		{2, "weir_server_weight", []string{"farm", "web", "server", "s1"}},
		{40, "weir_firewall_bytes_total", []string{"counter", "client"}},
		{1, "weir_firewall_up", nil},
		{2, "weir_plugin_restarts_total", []string{"plugin", "path"}},
		{1_700_000_100, "weir_plugin_last_answer_time_seconds", []string{"plugin", "path", "farm", "web"}},
		{12, "weir_access_log_dropped_total", nil},
	} {
		if got := value(t, all, c.name, c.labels...); got != c.want {
			t.Errorf("%s %q is %v, want %v", c.name, c.labels, got, c.want)
		}
	}
}

// TestHistogram: buckets are cumulative, and the last one has everything.
func TestHistogram(t *testing.T) {
	all, _ := scraped(t, source(t))
	for _, m := range all["weir_server_first_byte_seconds"].Metric {
		h := m.Histogram
		if m.Label[1].GetValue() != "s1" {
			continue
		}
		if h.GetSampleCount() != 2 || h.GetSampleSum() != 1000.00004 || h.Bucket[0].GetUpperBound() != 65536e-9 || h.Bucket[0].GetCumulativeCount() != 1 {
			t.Errorf("%v", h)
		}
		return
	}
	t.Error("no histogram of s1")
}

// TestConventions: names and units are Prometheus's, every family is there, and
// labels are those of the list: nothing that may have any number of values.
func TestConventions(t *testing.T) {
	all, text := scraped(t, source(t))
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "weir_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
	for _, d := range families {
		name := strings.SplitN(strings.TrimPrefix(d.String(), "Desc{fqName: \""), "\"", 2)[0]
		if all[name] == nil {
			t.Errorf("%s is defined and not shown", name)
		}
	}
	labels := []string{
		labelFarm, labelServer, labelReason, labelQueue, labelPlugin, labelState, labelVerdict, labelCounter, labelVersion, labelCondition,
	}
	for name, f := range all {
		if !strings.HasPrefix(name, "weir_") {
			continue
		}
		for _, m := range f.Metric {
			for _, l := range m.Label {
				if !slices.Contains(labels, l.GetName()) {
					t.Errorf("%s has the label %s, which is not in the list", name, l.GetName())
				}
			}
		}
	}
}

// TestPartial: what cannot be read leaves the rest.
func TestPartial(t *testing.T) {
	s := source(t)
	s.Firewall = func(context.Context) (map[string]nft.Counter, error) { return nil, nft.ErrTableGone }
	s.Usage = func(context.Context) ([]engine.Usage, error) { return nil, errors.New("ending") }
	s.Queues[2].Stats = func() divert.Stats { return divert.Stats{Received: 10, KernelErr: divert.ErrClosed} }
	all, _ := scraped(t, s)
	if value(t, all, "weir_firewall_up") != 0 || value(t, all, "weir_queue_received_packets_total", "queue", "0") != 10 {
		t.Error("the rest is wrong")
	}
	if all["weir_client_connections"] != nil {
		t.Error("gauges without a source")
	}
	scraped(t, Source{}) // nothing at all
}

func TestServe(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, source(t)) }()
	res, err := http.Get("http://" + l.Addr().String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(res.Body)
	_ = res.Body.Close()
	if err != nil || !strings.Contains(string(b), "weir_build_info{version=\"1.2.3\"} 1") {
		t.Errorf("%v: %.200s", err, b)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
