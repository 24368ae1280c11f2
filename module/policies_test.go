// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/plugins/host"
	"github.com/weirgate/weir/policies/policypb"
	"github.com/weirgate/weir/policies/snapshot"
)

func policyFarm(t *testing.T, policies ...snapshot.Policy) *farm.DB {
	t.Helper()
	db, err := farm.Build(nil, farm.Spec{SNIPs: []netip.Addr{netip.MustParseAddr("198.51.100.1")}, Farms: []farm.FarmSpec{{
		Name: "web", VIPs: []netip.AddrPort{netip.MustParseAddrPort("203.0.113.10:80")}, Policies: policies,
		Servers: []farm.ServerSpec{
			{Name: "s1", Endpoint: netip.MustParseAddrPort("198.51.100.11:80")}, {Name: "s2", Endpoint: netip.MustParseAddrPort("198.51.100.12:80")},
		},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	return db
}

// TestPluginEvents: what becomes of plugins is told, also what lies between two
// looks.
func TestPluginEvents(t *testing.T) {
	m := &Module{log: slog.New(slog.DiscardHandler)}
	o := &observer{m: m}
	var was *host.Status
	for _, c := range []struct {
		now         host.Status
		level, want string // "": no event
	}{
		{host.Status{State: host.StateStarting}, "", ""},
		{host.Status{State: host.StateUp, PID: 7, Version: "1"}, "info", "plugin p is up, version 1"},
		{host.Status{State: host.StateUp, PID: 7}, "", ""},
		{host.Status{State: host.StateDown, LastError: "exit status 1"}, "warn", "plugin p is down: exit status 1"},
		{host.Status{State: host.StateUp, PID: 8, Restarts: 1, LastError: "exit status 1"}, "warn", "started again, 1 times: exit status 1"},
		{host.Status{State: host.StateUp, PID: 12, Restarts: 4, LastError: "x"}, "warn", "started again, 3 times"},
		{host.Status{State: host.StateUp, PID: 13, Restarts: 4, Version: "2"}, "info", "is another process: 13 instead of 12, version 2"},
		{host.Status{State: host.StateDown, Restarts: 9, Resting: true, LastError: "y"}, "warn", "once in 30s from now on: y"},
		{host.Status{State: host.StateDown, Restarts: 9, Resting: true}, "", ""},
	} {
		c.now.Plugin = "p"
		seq := m.events.Last()
		o.plugin(&c.now, was)
		was = &c.now
		list, _, _ := m.events.After(seq)
		switch {
		case c.want == "" && len(list) > 0, c.want != "" && len(list) != 1:
			t.Errorf("%+v: %v", c.now, list)
		case c.want != "" && (list[0].Plugin != "p" || list[0].Name != control.EventPlugin || list[0].Level != c.level || !strings.Contains(list[0].Text, c.want)):
			t.Errorf("%+v, want %s", list[0], c.want)
		}
	}
}

func TestTelemetry(t *testing.T) {
	m := &Module{clock: newClock()}
	m.db.Store(policyFarm(t))
	if m.telemetry("none") != nil {
		t.Error("telemetry of a farm that is not there")
	}
	f := m.db.Load().Farms[0]
	s := f.Servers[1]
	f.Stats.Requests.Store(7)
	f.Stats.Waiting.Store(-1) // for a moment, between two shards
	s.Live.Active.Store(3)
	s.Live.AvoidUntil.Store(1 << 62)
	s.Stats.Failed[farm.FailReset].Store(2)
	s.Stats.Failed[farm.FailSilent].Store(1)
	s.Stats.FirstByte.Add(40_000)
	s.Stats.FirstByte.Add(1_000)
	tel := m.telemetry("web")
	if tel.Requests != 7 || tel.Waiting != 0 || len(tel.Servers) != 2 || tel.ClientRoundTrip != nil {
		t.Errorf("%v", tel)
	}
	if a := tel.Servers[0]; a.Name != "s1" || !a.Available || a.State != policypb.ServerState_SERVER_STATE_READY {
		t.Errorf("%v", a)
	}
	b := tel.Servers[1]
	if b.Available || b.Active != 3 || b.Failures != 3 || len(b.FailuresByKind) != 2 || b.FailuresByKind[0].Kind != policypb.FailureKind_FAILURE_KIND_RESET {
		t.Errorf("%v", b)
	}
	if h := b.FirstByte; h.GetSumNanos() != 41_000 || len(h.GetCounts()) != 2 || h.Counts[0] != 1 || h.Counts[1] != 1 {
		t.Errorf("%v", h)
	}
}

func TestBans(t *testing.T) {
	var b bans
	seg := func(src string) []byte {
		ep := packet.EndpointFrom(netip.MustParseAddrPort(src))
		dst := "203.0.113.10:80"
		if !ep.Addr.Is4() {
			dst = "[2001:db8::10]:80"
		}
		return packet.AppendSegment(nil, &packet.Segment{Src: ep, Dst: packet.EndpointFrom(netip.MustParseAddrPort(dst)), Flags: packet.SYN, TTL: 64}, nil)
	}
	if b.has(seg("198.18.0.1:1000"), 5) {
		t.Error("banned before any ban")
	}
	b.add(packet.AddrFrom(netip.MustParseAddr("198.18.0.1")), 10, 1)
	b.add(packet.AddrFrom(netip.MustParseAddr("2001:db8::1")), 20, 1)
	for _, c := range []struct {
		src  string
		now  int64
		want bool
	}{
		{"198.18.0.1:1000", 5, true}, {"198.18.0.1:1000", 10, false}, {"198.18.0.2:1000", 5, false},
		{"[2001:db8::1]:9", 15, true}, {"[2001:db8::2]:9", 15, false},
	} {
		if got := b.has(seg(c.src), c.now); got != c.want {
			t.Errorf("%s at %d: %v", c.src, c.now, got)
		}
	}
	if b.has([]byte{0x45}, 5) || b.has(nil, 5) {
		t.Error("a stump is banned")
	}
	b.add(packet.AddrFrom(netip.MustParseAddr("198.18.0.9")), 30, 12)
	if n := len(*b.list.Load()); n != 2 {
		t.Errorf("%d bans are kept, want the two that hold", n)
	}
}

// TestExplain: the farm is found, the request is what was asked for, and wrong
// questions are told.
func TestExplain(t *testing.T) {
	db := policyFarm(t, snapshot.Policy{Name: "path", Snapshot: &snapshot.Snapshot{Routes: &snapshot.Routes{Routes: []snapshot.Route{
		{Host: "shop.example", Prefix: "/a/", Fields: []snapshot.FieldMatch{{Field: snapshot.Field{Name: "x-tenant"}, Value: "blue"}}, Target: snapshot.Target{Servers: []string{"s2"}}},
		{Path: "/a%2Fb", Target: snapshot.Target{Reject: 403}},
	}}}})
	h := host.New(host.Options{})
	ask := func(q control.PolicyQuery) (*control.PolicyExplanation, error) {
		return explain(context.Background(), db, h, 1, q)
	}
	x, err := ask(control.PolicyQuery{Method: "GET", URL: "http://shop.example/a/b?c", Headers: []string{"X-Tenant: blue", "x-tenant: red"}})
	if err != nil || x.Farm != "web" || x.Outcome != "server" || x.Server != "s2" {
		t.Errorf("%+v, %v", x, err)
	}
	x, err = ask(control.PolicyQuery{Method: "GET", URL: "http://203.0.113.10/a%2Fb"})
	if err != nil || x.Outcome != "reject" || x.Status != 403 || x.Reason != "route_reject" {
		t.Errorf("%+v, %v", x, err)
	}
	x, err = ask(control.PolicyQuery{Method: "GET", URL: "/a/b", Headers: []string{"Host: shop.example"}})
	if err != nil || x.Status != 404 {
		t.Errorf("%+v, %v", x, err)
	}
	for _, q := range []control.PolicyQuery{
		{URL: "/"}, {Method: "get", URL: "/"}, {Method: "GET"}, {Method: "GET", URL: "/", Client: "me"},
		{Method: "GET", URL: "/", Headers: []string{"none"}}, {Method: "GET", URL: "/", Farm: "other"},
	} {
		if x, err := ask(q); err == nil {
			t.Errorf("%+v: %+v", q, x)
		}
	}
	if h.Close() != nil {
		t.Error("close")
	}
}
