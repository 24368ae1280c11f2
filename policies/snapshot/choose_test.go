// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"
)

// One server's counters fill a cache line.
var _ [64]byte = [unsafe.Sizeof(Live{})]byte{}

// seeded returns a generator whose seed a failing test prints; WEIR_SEED
// replays one.
func seeded(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("WEIR_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("WEIR_SEED=%q is not a number", v)
		}
		seed = n
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("replay with WEIR_SEED=%d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 1))
}

func farm(n int) []ServerConfig {
	out := make([]ServerConfig, n)
	for i := range out {
		out[i] = ServerConfig{Name: "s" + strconv.Itoa(i+1), Weight: 1}
	}
	return out
}

func lives(n int) []*Live {
	out := make([]*Live, n)
	for i := range out {
		out[i] = new(Live)
	}
	return out
}

func mustSelector(t testing.TB, servers []ServerConfig, policies ...Policy) *Selector {
	t.Helper()
	s, err := NewSelector(servers, policies)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func routePolicy(routes ...Route) Policy {
	return Policy{Name: "path", RoutePolicy: true, Snapshot: &Snapshot{Plugin: "path", Generation: 1, Routes: &Routes{Routes: routes}}}
}

func to(servers ...string) Target { return Target{Servers: servers} }

// outcome is a choice in one word.
func outcome(s *Selector, c Choice) string {
	switch c.Kind {
	case ChoiceServer:
		return s.servers[c.Server].Name
	case ChoiceReject:
		return strconv.Itoa(int(c.Status))
	case ChoiceRedirect:
		return strconv.Itoa(int(c.Status)) + " " + c.Location
	}
	return c.Kind.String()
}

func TestChooseRoutes(t *testing.T) {
	p := routePolicy(
		Route{Prefix: "/sales/", Target: to("s1")},
		Route{Prefix: "/products", Target: to("s2")},
		Route{Prefix: "/products/new", Target: to("s3")},
		Route{Path: "/products/new", Target: to("s4")},
		Route{Path: "/", Target: to("s5")},
		Route{Host: "www.example.org", Prefix: "/sales/", Target: to("s6")},
		Route{Host: "*.example.org", Prefix: "/", Target: to("s7")},
		Route{Host: "*.deep.example.org", Prefix: "/", Target: to("s8")},
		Route{Host: "admin.example.net", Target: Target{Reject: 403, RetryAfter: 9}},
		Route{Host: "old.example.net", Target: Target{Redirect: 308, Location: "https://new.example.net/"}},
		Route{Host: "[2001:db8::1]", Target: to("s9")},
	)
	s := mustSelector(t, farm(9), p)
	live := lives(9)
	for _, c := range []struct{ host, path, want string }{
		{"", "/sales/forecast.html", "s1"},
		{"", "/sales/", "s1"},
		{"", "/sales", "404"}, // the prefix ends with its '/'
		{"", "/salesman", "404"},
		{"", "/Sales/", "404"}, // paths are compared as they are
		{"", "/%73ales/", "404"},
		{"", "/products", "s2"},
		{"", "/products/", "s2"},
		{"", "/products/old.html", "s2"},
		{"", "/productsandmore", "404"}, // not at a segment's border
		{"", "/products/new", "s4"},     // exact before prefix
		{"", "/products/new?x=/y", "s4"},
		{"", "/products/new/", "s3"}, // the longest prefix
		{"", "/products/newer", "s2"},
		{"", "/", "s5"},
		{"", "/?a", "s5"},
		{"", "/other", "404"},
		{"", "", "404"},
		{"", "*", "404"},
		{"www.example.org", "/sales/x", "s6"},
		{"WWW.Example.ORG.:8080", "/sales/x", "s6"},
		{"www.example.org", "/x", "s7"}, // the next host that says less
		{"a.b.example.org", "/sales/x", "s7"},
		{"a.deep.example.org", "/x", "s8"},
		{"deep.example.org", "/x", "s7"},
		{"example.org", "/sales/x", "s1"}, // not below itself
		{"notexample.org", "/sales/x", "s1"},
		{"admin.example.net", "/sales/", "403"},
		{"old.example.net", "/", "308 https://new.example.net/"},
		{"[2001:DB8::1]:80", "/any", "s9"},
		{"[2001:db8::1]", "*", "s9"},
		{strings.Repeat("a", 300) + ".example.org", "/sales/", "s1"},
		{"...............", "/sales/", "s1"},
	} {
		r := &Request{Host: []byte(c.host), Path: []byte(c.path)}
		var sc Scratch
		if got := outcome(s, s.Choose(r, live, nil, 1, &sc)); got != c.want {
			t.Errorf("host %q path %q: %s, want %s", c.host, c.path, got, c.want)
		}
	}
	if c := s.Choose(&Request{Host: []byte("admin.example.net"), Path: []byte("/")}, live, nil, 1, new(Scratch)); c.RetryAfter != 9 || c.Reason != ReasonRouteReject || c.Policy != 0 {
		t.Errorf("reject: %+v", c)
	}
}

func TestChooseRoutesDefault(t *testing.T) {
	p := routePolicy(Route{Path: "/a", Target: to("s1")})
	p.Snapshot.Routes.Default = []string{"s2"}
	s := mustSelector(t, farm(3), p)
	if got := outcome(s, s.Choose(&Request{Path: []byte("/b")}, lives(3), nil, 1, new(Scratch))); got != "s2" {
		t.Errorf("default servers: %s", got)
	}
}

// TestChooseOnEmpty walks what can leave no candidate through each on_empty.
func TestChooseOnEmpty(t *testing.T) {
	eligible := func(names ...string) Policy {
		e := &Eligibility{}
		for _, n := range names {
			e.Servers = append(e.Servers, Eligible{Server: n, Reason: "3 probes failed"})
		}
		return Policy{Name: "state", Snapshot: &Snapshot{Eligibility: e}}
	}
	routes := routePolicy(Route{Prefix: "/a/", Target: to("s1")}, Route{Prefix: "/r/", Target: Target{Reject: 410}}, Route{Prefix: "/none/"})
	pending := Policy{Name: "path", RoutePolicy: true}
	with := func(p Policy, o OnEmpty) Policy { p.OnEmpty = o; return p }
	for _, c := range []struct {
		name     string
		policies []Policy
		down     []int
		path     string
		want     string
		reason   Reason
	}{
		{"no policies", nil, nil, "/", "s", ReasonPicked},
		{"farm down", nil, []int{0, 1}, "/", "503", ReasonNoServer},
		{"no route", []Policy{routes}, nil, "/x", "404", ReasonNoRoute},
		{"no route, ignore", []Policy{with(routes, OnEmptyIgnore)}, nil, "/x", "s", ReasonPicked},
		{"no route, wait", []Policy{with(routes, OnEmptyWait)}, nil, "/x", "wait", ReasonNoRoute},
		{"route's server down", []Policy{routes}, []int{0}, "/a/", "503", ReasonRouteEmpty},
		{"route's server down, ignore", []Policy{with(routes, OnEmptyIgnore)}, []int{0}, "/a/", "s2", ReasonPicked},
		{"route's server down, wait", []Policy{with(routes, OnEmptyWait)}, []int{0}, "/a/", "wait", ReasonRouteEmpty},
		{"route without servers", []Policy{routes}, nil, "/none/x", "503", ReasonRouteEmpty},
		{"farm down, route rejects", []Policy{routes}, []int{0, 1}, "/r/", "410", ReasonRouteReject},
		{"farm down, route has servers", []Policy{routes}, []int{0, 1}, "/a/", "503", ReasonNoServer},
		{"farm down, no route", []Policy{routes}, []int{0, 1}, "/x", "404", ReasonNoRoute},
		{"routes pending", []Policy{pending}, nil, "/", "503", ReasonRoutesPending},
		{"other pending", []Policy{{Name: "load"}}, nil, "/", "s", ReasonPicked},
		{"one eligible", []Policy{eligible("s1")}, nil, "/", "s2", ReasonPicked},
		{"none eligible", []Policy{eligible("s1", "s2")}, nil, "/", "503", ReasonNotEligible},
		{"none eligible, ignore", []Policy{with(eligible("s1", "s2"), OnEmptyIgnore)}, nil, "/", "s", ReasonPicked},
		{"none eligible, wait", []Policy{with(eligible("s1", "s2"), OnEmptyWait)}, nil, "/", "wait", ReasonNotEligible},
		{"ignored restores only its own", []Policy{eligible("s2"), with(eligible("s1"), OnEmptyIgnore)}, nil, "/", "s1", ReasonPicked},
		{"order decides who is empty", []Policy{eligible("s1"), routes}, nil, "/a/", "503", ReasonRouteEmpty},
		{"order decides who is empty, other way", []Policy{routes, eligible("s1")}, nil, "/a/", "503", ReasonNotEligible},
	} {
		s := mustSelector(t, farm(2), c.policies...)
		live := lives(2)
		for _, d := range c.down {
			live[d].State.Store(uint32(Down))
		}
		got := s.Choose(&Request{Path: []byte(c.path)}, live, nil, 7, new(Scratch))
		if o := outcome(s, got); (o != c.want && !(c.want == "s" && o[0] == 's')) || got.Reason != c.reason {
			t.Errorf("%s: %s %s, want %s %s", c.name, o, got.Reason, c.want, c.reason)
		}
		if got.Status == 503 && got.RetryAfter != RetryAfter {
			t.Errorf("%s: 503 without Retry-After", c.name)
		}
	}
}

func TestChooseStates(t *testing.T) {
	s := mustSelector(t, farm(5))
	live := lives(5)
	live[0].State.Store(uint32(Drain))
	live[1].State.Store(uint32(Maint))
	live[2].State.Store(uint32(Down))
	var tried Tried
	tried.Set(3)
	for rnd := range uint64(50) {
		if c := s.Choose(&Request{}, live, &tried, rnd, new(Scratch)); outcome(s, c) != "s5" || c.Candidates != 1 {
			t.Fatalf("%s of %d", outcome(s, c), c.Candidates)
		}
	}
	tried.Set(4)
	if c := s.Choose(&Request{}, live, &tried, 1, new(Scratch)); c.Reason != ReasonNoServer {
		t.Fatalf("all tried: %s", c.Reason)
	}
	tried.Reset()
	if tried.Has(4) {
		t.Fatal("Reset kept a server")
	}
}

func TestChooseBackup(t *testing.T) {
	servers := farm(4)
	servers[2].Backup, servers[3].Backup = true, true
	s := mustSelector(t, servers)
	live := lives(4)
	seen := func() map[string]bool {
		m := map[string]bool{}
		for rnd := range uint64(200) {
			m[outcome(s, s.Choose(&Request{}, live, nil, rnd, new(Scratch)))] = true
		}
		return m
	}
	if m := seen(); len(m) != 2 || !m["s1"] || !m["s2"] {
		t.Errorf("with primaries: %v", m)
	}
	live[0].State.Store(uint32(Down))
	live[1].State.Store(uint32(Drain))
	if m := seen(); len(m) != 2 || !m["s3"] || !m["s4"] {
		t.Errorf("without primaries: %v", m)
	}
}

// TestChooseExpiry: eligibility and scores end, routes do not.
func TestChooseExpiry(t *testing.T) {
	p := routePolicy(Route{Prefix: "/a/", Target: to("s1", "s2")})
	p.Snapshot.Eligibility = &Eligibility{Servers: []Eligible{{Server: "s1"}}}
	p.Snapshot.Expires = 1000
	s := mustSelector(t, farm(3), p)
	seen := func(now int64) map[string]bool {
		m := map[string]bool{}
		for rnd := range uint64(100) {
			m[outcome(s, s.Choose(&Request{Path: []byte("/a/"), Now: now}, lives(3), nil, rnd, new(Scratch)))] = true
		}
		return m
	}
	if m := seen(999); len(m) != 1 || !m["s2"] {
		t.Errorf("before: %v", m)
	}
	if m := seen(1000); len(m) != 2 || m["s3"] {
		t.Errorf("after: %v", m)
	}
}

func TestSelectorErrors(t *testing.T) {
	long := strings.Repeat("x", maxRoutePath)
	for _, c := range []struct {
		policy Policy
		want   string
	}{
		{routePolicy(Route{Prefix: "/sales/", Target: to("s9")}), `plugin "path": route "/sales/": server "s9" is not a server of the farm`},
		{routePolicy(Route{Host: "a.example", Path: "/x", Target: to("s1")}, Route{Host: "A.example.", Path: "/x", Target: to("s2")}), `plugin "path": route "A.example./x": is there twice`},
		{routePolicy(Route{Prefix: "sales", Target: to("s1")}), `route "sales": "sales" does not begin with /`},
		{routePolicy(Route{Prefix: "/a?b", Target: to("s1")}), `routes compare the path alone`},
		{routePolicy(Route{Prefix: "/ä", Target: to("s1")}), `percent-encoded`},
		{routePolicy(Route{Prefix: "/" + long, Target: to("s1")}), `longer than 4096`},
		{routePolicy(Route{Prefix: "/a", Path: "/a", Target: to("s1")}), `both a path and a prefix`},
		{routePolicy(Route{Host: "a:80", Target: to("s1")}), `has a port`},
		{routePolicy(Route{Host: "a.*", Target: to("s1")}), `neither a name nor`},
		{routePolicy(Route{Host: "*.", Target: to("s1")}), `empty label`},
		{routePolicy(Route{Target: Target{Reject: 200}}), `route "*": rejects with status 200`},
		{routePolicy(Route{Target: Target{Redirect: 304, Location: "/"}}), `none of 301`},
		{routePolicy(Route{Target: Target{Redirect: 302}}), `without a location`},
		{routePolicy(Route{Target: Target{Redirect: 302, Location: "/a\r\nX: y"}}), `a byte that a URI never has`},
		{routePolicy(Route{Target: Target{Reject: 403, Servers: []string{"s1"}}}), `more than one of`},
		{Policy{Name: "path", Snapshot: &Snapshot{Routes: &Routes{Default: []string{"s9"}}}}, `route "default": server "s9"`},
		{Policy{Name: "state", Snapshot: &Snapshot{Eligibility: &Eligibility{Servers: []Eligible{{Server: "s9"}}}}}, `plugin "state": server "s9" is not`},
		{Policy{Name: "load", Snapshot: &Snapshot{Scores: &Scores{Servers: []Score{{"s9", 1}}}}}, `plugin "load": server "s9" is not`},
		{Policy{Name: "load", Snapshot: &Snapshot{Scores: &Scores{Servers: []Score{{"s1", math.NaN()}}}}}, `not a number`},
	} {
		_, err := NewSelector(farm(2), []Policy{c.policy})
		var e *Error
		if err == nil || !strings.Contains(err.Error(), c.want) || !errors.As(err, &e) {
			t.Errorf("error %v, want %s", err, c.want)
		}
	}
	for _, c := range []struct {
		servers []ServerConfig
		want    string
	}{
		{farm(MaxServers + 1), "at most 1024"},
		{[]ServerConfig{{Name: "a"}, {Name: "a"}}, "twice"},
		{[]ServerConfig{{Name: "a", Weight: 257}}, "weight 257"},
	} {
		if _, err := NewSelector(c.servers, nil); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("error %v, want %s", err, c.want)
		}
	}
	if _, err := NewSelector(farm(1), make([]Policy, MaxPolicies+1)); err == nil {
		t.Error("too many policies are accepted")
	}
	s := mustSelector(t, nil)
	if c := s.Choose(&Request{Path: []byte("/")}, nil, nil, 1, new(Scratch)); c.Reason != ReasonNoServer {
		t.Errorf("a farm without servers: %s", c.Reason)
	}
}

func TestSelectorWith(t *testing.T) {
	p := routePolicy(Route{Prefix: "/a/", Target: to("s1")})
	s := mustSelector(t, farm(2), p, Policy{Name: "load"})
	if m := s.Missing(); len(m) != 1 || m[0] != "load" {
		t.Errorf("missing: %v", m)
	}
	n, err := s.With([]Policy{p, {Name: "load", Snapshot: &Snapshot{Scores: &Scores{}}}})
	if err != nil {
		t.Fatal(err)
	}
	if n.policies[0].routes != s.policies[0].routes {
		t.Error("the same routes were compiled again")
	}
	if len(n.Missing()) != 0 || len(s.Missing()) != 1 {
		t.Error("With changed the old selector, or did not take the new snapshot")
	}
}

func TestSnapshotKeep(t *testing.T) {
	in := &Snapshot{
		Routes:      &Routes{Routes: []Route{{Prefix: "/a/", Target: to("s1", "s2")}, {Prefix: "/b/", Target: to("s2")}}, Default: []string{"s2", "s1"}},
		Eligibility: &Eligibility{Servers: []Eligible{{Server: "s2"}}},
		Scores:      &Scores{Servers: []Score{{"s1", 2}, {"s2", 3}}},
	}
	if in.Keep(func(string) bool { return true }) != in {
		t.Error("a snapshot that fits was copied")
	}
	out := in.Keep(func(s string) bool { return s != "s2" })
	if got := fmt.Sprint(*out.Routes, *out.Eligibility, *out.Scores); got != "{[{  /a/ [] {[s1] 0 0 0 }} {  /b/ [] {[] 0 0 0 }}] [s1]} {[]} {[{s1 2}]}" {
		t.Error(got)
	}
	if len(in.Routes.Routes[0].Servers) != 2 || in.Routes.Default[0] != "s2" {
		t.Error("the old snapshot was changed")
	}
	if _, err := NewSelector(farm(1), []Policy{{Name: "x", Snapshot: out}}); err != nil {
		t.Error(err)
	}
}

func TestExplain(t *testing.T) {
	p := routePolicy(Route{Prefix: "/sales/", Target: to("s1", "s2", "s3")})
	e := Policy{Name: "state", Snapshot: &Snapshot{Eligibility: &Eligibility{Servers: []Eligible{{Server: "s2", Reason: "3 probes failed"}}}}}
	l := Policy{Name: "load", Snapshot: &Snapshot{Scores: &Scores{Servers: []Score{{"s1", 0.5}}}}}
	old := Policy{Name: "old", Snapshot: &Snapshot{Generation: 4, Expires: 5, Scores: &Scores{}}}
	servers := farm(4)
	servers[2].Backup = true
	s := mustSelector(t, servers, p, e, l, old, Policy{Name: "new"})
	live := lives(4)
	live[3].State.Store(uint32(Down))
	var lines []string
	for _, st := range s.Explain(&Request{Path: []byte("/sales/"), Now: 10}, live, nil, 3) {
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("%s: %s [%d]", st.Policy, st.Text, st.Candidates)))
	}
	want := `: 3 of 4 servers are candidates: not s4 down [3]
path: route /sales/: servers s1 s2 s3 [3]
state: not eligible: s2 (3 probes failed) [2]
load: scores: s1 0.5, s3 1 [2]
old: generation 4 has expired: skipped [2]
new: has not sent a snapshot yet: skipped [2]
: backup servers are not needed [1]
: the only one to draw: s1 (active 0, waiting 0, idle 0, weight 0.5) [1]
: server s1 (picked) [1]`
	if got := strings.Join(lines, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
