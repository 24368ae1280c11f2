// SPDX-License-Identifier: Apache-2.0

package farm

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/policies/snapshot"
)

func ap(s string) netip.AddrPort      { return netip.MustParseAddrPort(s) }
func ep(s string) packet.Endpoint     { return packet.EndpointFrom(ap(s)) }
func addr(s string) netip.Addr        { return netip.MustParseAddr(s) }
func paddr(s string) packet.Addr      { return packet.AddrFrom(addr(s)) }
func names(list []*Server) []string   { return mapNames(list, func(s *Server) string { return s.Name }) }
func farmNames(list []*Farm) []string { return mapNames(list, func(f *Farm) string { return f.Name }) }

func mapNames[T any](list []T, name func(T) string) []string {
	out := []string{}
	for _, e := range list {
		out = append(out, name(e))
	}
	return out
}

// spec makes a Spec from words: "web@203.0.113.10:80 s1=198.51.100.11:80 …".
func spec(farms ...string) Spec {
	out := Spec{SNIPs: []netip.Addr{addr("198.51.100.1"), addr("198.51.100.2"), addr("2001:db8:1::1")}}
	for _, text := range farms {
		var f FarmSpec
		for i, word := range strings.Fields(text) {
			if i == 0 {
				name, vips, _ := strings.Cut(word, "@")
				f.Name = name
				for _, v := range strings.Split(vips, ",") {
					f.VIPs = append(f.VIPs, ap(v))
				}
				continue
			}
			name, a, _ := strings.Cut(word, "=")
			f.Servers = append(f.Servers, ServerSpec{Name: name, Endpoint: ap(a)})
		}
		out.Farms = append(out.Farms, f)
	}
	return out
}

func build(t testing.TB, prev *DB, s Spec) *DB {
	t.Helper()
	db, err := Build(prev, s)
	if err != nil {
		t.Fatal(err)
	}
	check(t, db)
	return db
}

// check tests what holds in every generation.
func check(t testing.TB, db *DB) {
	t.Helper()
	for _, f := range db.Farms {
		if f.ID == 0 || f.Removed || db.FarmByID(f.ID) != f || db.FarmByName(f.Name) != f {
			t.Errorf("farm %q (%d) is not found as itself", f.Name, f.ID)
		}
		if f.Selector.Load() == nil || len(f.Selector.Load().Servers()) != len(f.Servers) || len(f.Lives) != len(f.Servers) {
			t.Errorf("farm %q: selector, servers and lives differ", f.Name)
		}
		for i, s := range f.Servers {
			if s.ID == 0 || db.Server(s.ID) != s || int(s.Index) != i || s.Farm != f || s.Live != f.Lives[i] || s.Removed() || s.Stats == nil {
				t.Errorf("farm %q: server %d (%q, %d) is not in its place", f.Name, i, s.Name, s.ID)
			}
		}
		for _, v := range f.VIPs {
			if db.ByVIP(v) != f {
				t.Errorf("farm %q: VIP %v leads elsewhere", f.Name, v)
			}
		}
	}
	for _, s := range db.Draining {
		if !s.Removed() || db.Server(s.ID) != s || s.Farm == nil || db.FarmByID(s.Farm.ID) != s.Farm {
			t.Errorf("removed server %q (%d) is not in its place", s.Name, s.ID)
		}
	}
	for _, f := range db.Removed {
		if !f.Removed || db.FarmByID(f.ID) != f || f.Selector.Load() == nil {
			t.Errorf("removed farm %q (%d) is not in its place", f.Name, f.ID)
		}
		for _, s := range f.Servers {
			if s == nil || s.Stats == nil {
				t.Errorf("removed farm %q lost a server", f.Name)
			}
		}
	}
}

func TestLookups(t *testing.T) {
	db := build(t, nil, spec("web@203.0.113.10:80,203.0.113.10:8080 s1=198.51.100.11:80 s2=198.51.100.12:80", "web6@[2001:db8::10]:80 s1=[2001:db8:1::11]:80"))
	web, web6 := db.FarmByName("web"), db.FarmByName("web6")
	for in, want := range map[string]*Farm{"203.0.113.10:80": web, "203.0.113.10:8080": web, "203.0.113.10:81": nil, "203.0.113.11:80": nil, "[2001:db8::10]:80": web6} {
		if got := db.ByVIP(ep(in)); got != want {
			t.Errorf("%s leads to %v", in, got)
		}
	}
	if !db.IsSNIP(paddr("198.51.100.2")) || !db.IsSNIP(paddr("2001:db8:1::1")) || db.IsSNIP(paddr("203.0.113.10")) {
		t.Error("IsSNIP")
	}
	if len(web.SNIPs) != 2 || len(web6.SNIPs) != 1 || !web.Is4() || web6.Is4() {
		t.Errorf("SNIPs %v and %v", web.SNIPs, web6.SNIPs)
	}
	if db.FarmByID(0) != nil || db.FarmByID(99) != nil || db.Server(0) != nil || db.Server(0xffff) != nil || db.FarmByName("x") != nil {
		t.Error("something is found that is not there")
	}
	// The same name in two farms is two servers.
	if web.Servers[0].ID == web6.Servers[0].ID || web.Servers[0].Live == web6.Servers[0].Live {
		t.Error("two farms share a server")
	}
	var zero DB
	if zero.ByVIP(ep("203.0.113.10:80")) != nil || zero.Server(1) != nil || zero.IsSNIP(packet.Addr{}) {
		t.Error("the zero DB is not empty")
	}
}

// TestGenerations follows servers through changes: what stays is the same,
// what goes drains and can come back, what is forgotten is gone.
func TestGenerations(t *testing.T) {
	one := build(t, nil, spec("web@203.0.113.10:80 s1=198.51.100.11:80 s2=198.51.100.12:80", "shop@203.0.113.11:80 s1=198.51.100.11:80"))
	w1, s1, s2, shop := one.Farms[0], one.Farms[0].Servers[0], one.Farms[0].Servers[1], one.Farms[1]
	s2.Stats.Requests.Add(5)
	s2.Live.State.Store(uint32(snapshot.Maint))

	// s1 goes, s2 moves to the front, s3 is new, the farm gets another VIP.
	two := build(t, one, spec("web@203.0.113.12:80 s2=198.51.100.12:80 s3=198.51.100.13:80", "shop@203.0.113.11:80 s1=198.51.100.11:80"))
	w2 := two.Farms[0]
	if w2.ID != w1.ID || w2.Stats != w1.Stats || two.Generation != one.Generation+1 {
		t.Error("the farm did not stay the same")
	}
	n2 := w2.Servers[0]
	if n2.ID != s2.ID || n2.Live != s2.Live || n2.Stats != s2.Stats || n2.Index != 0 || n2.Stats.Requests.Load() != 5 || n2.Live.State.Load() != uint32(snapshot.Maint) {
		t.Errorf("s2 did not stay the same: %+v", n2)
	}
	if s2.Index != 1 || one.Farms[0] != w1 || one.ByVIP(ep("203.0.113.10:80")) != w1 {
		t.Error("the old generation changed")
	}
	if two.ByVIP(ep("203.0.113.10:80")) != nil || two.ByVIP(ep("203.0.113.12:80")) != w2 {
		t.Error("VIPs")
	}
	gone := two.Server(s1.ID)
	if gone == nil || !gone.Removed() || gone.Live != s1.Live || gone.Farm != w2 || fmt.Sprint(names(two.Draining)) != "[s1]" {
		t.Errorf("s1 does not drain: %+v", gone)
	}
	if id := w2.Servers[1].ID; id == s1.ID || id == s2.ID || id == shop.Servers[0].ID {
		t.Errorf("s3 has the number %d of another", id)
	}

	// s1 comes back while it drains: the same server. The farm shop goes.
	three := build(t, two, spec("web@203.0.113.12:80 s2=198.51.100.12:80 s3=198.51.100.13:80 s1=198.51.100.11:80"))
	back := three.Farms[0].Servers[2]
	if back.ID != s1.ID || back.Live != s1.Live || back.Removed() {
		t.Errorf("s1 did not come back: %+v", back)
	}
	f := three.FarmByID(shop.ID)
	if f == nil || !f.Removed || f.Stats != shop.Stats || three.ByVIP(ep("203.0.113.11:80")) != nil || !f.Servers[0].Removed() || f.Servers[0].Farm != f || shop.Removed {
		t.Errorf("the farm shop does not drain: %+v", f)
	}
	if fmt.Sprint(farmNames(three.Removed), names(three.Draining)) != "[shop] [s1]" {
		t.Errorf("draining: %v %v", farmNames(three.Removed), names(three.Draining))
	}

	// Nothing is forgotten while it has connections.
	shop.Servers[0].Stats.Open.Add(1)
	done := func(s *Server) bool { return s.Stats.Open.Load() == 0 }
	if three.Forget(done) != three {
		t.Error("Forget made a generation of nothing")
	}
	shop.Servers[0].Stats.Open.Add(-1)
	four := three.Forget(done)
	check(t, four)
	if four.FarmByID(shop.ID) != nil || four.Server(shop.Servers[0].ID) != nil || len(four.Draining)+len(four.Removed) != 0 || four.Generation != three.Generation+1 {
		t.Error("shop is not forgotten")
	}
	if four.Farms[0] != three.Farms[0] {
		t.Error("Forget changed a farm that lives")
	}
	// After that the name is a new farm with new numbers.
	five := build(t, four, spec("web@203.0.113.12:80 s2=198.51.100.12:80", "shop@203.0.113.11:80 s1=198.51.100.11:80"))
	if n := five.Farms[1]; n.ID == shop.ID || n.Stats == shop.Stats || n.Servers[0].ID == shop.Servers[0].ID {
		t.Error("a forgotten farm came back")
	}
}

// TestMoved: a server with another address is another server, although its
// name is the same.
func TestMoved(t *testing.T) {
	one := build(t, nil, spec("web@203.0.113.10:80 s1=198.51.100.11:80"))
	two := build(t, one, spec("web@203.0.113.10:80 s1=198.51.100.99:80"))
	a, b := one.Farms[0].Servers[0], two.Farms[0].Servers[0]
	if a.ID == b.ID || a.Live == b.Live || two.Server(a.ID) == nil || two.Server(a.ID).Endpoint != a.Endpoint {
		t.Error("the moved server kept its identity")
	}
	// A removed farm with a server that was forgotten alone.
	three := build(t, two, spec("web@203.0.113.10:80 s1=198.51.100.99:80 s2=198.51.100.12:80"))
	four := build(t, three, spec())
	four = four.Forget(func(s *Server) bool { return s.Name == "s2" })
	check(t, four)
	five := build(t, four, spec())
	if five.FarmByID(one.Farms[0].ID) == nil || len(five.FarmByID(one.Farms[0].ID).Servers) != 2 {
		t.Error("the removed farm lost its servers")
	}
	six := five.Forget(func(*Server) bool { return true })
	if check(t, six); len(six.Removed)+len(six.Draining) != 0 {
		t.Error("not all is forgotten")
	}
}

// TestSelector: the compiled policies stay while servers and policies do.
func TestSelector(t *testing.T) {
	s := spec("web@203.0.113.10:80 s1=198.51.100.11:80 s2=198.51.100.12:80")
	s.Farms[0].Policies = []snapshot.Policy{{Name: "path", RoutePolicy: true}}
	one := build(t, nil, s)
	sel := one.Farms[0].Selector.Load()
	if got := sel.Missing(); len(got) != 1 || got[0] != "path" {
		t.Errorf("missing %v", got)
	}
	routes := &snapshot.Snapshot{Plugin: "path", Generation: 1, Routes: &snapshot.Routes{Default: []string{"s1"}}}
	with, err := sel.With([]snapshot.Policy{{Name: "path", RoutePolicy: true, Snapshot: routes}})
	if err != nil {
		t.Fatal(err)
	}
	one.Farms[0].Selector.Store(with)

	s.Farms[0].Pool.MaxIdle = 7
	two := build(t, one, s)
	if two.Farms[0].Selector.Load() != with || two.Farms[0].Pool.MaxIdle != 7 {
		t.Error("the selector was not taken over")
	}
	for name, change := range map[string]func(f *FarmSpec){
		"servers":  func(f *FarmSpec) { f.Servers = f.Servers[:1] },
		"weight":   func(f *FarmSpec) { f.Servers[0].Weight = 9 },
		"on_empty": func(f *FarmSpec) { f.Policies[0].OnEmpty = snapshot.OnEmptyIgnore },
		"policies": func(f *FarmSpec) { f.Policies = nil },
		"snapshot": func(f *FarmSpec) { f.Policies[0].Snapshot = routes },
	} {
		c := spec("web@203.0.113.10:80 s1=198.51.100.11:80 s2=198.51.100.12:80")
		c.Farms[0].Policies = []snapshot.Policy{{Name: "path", RoutePolicy: true}}
		change(&c.Farms[0])
		if build(t, two, c).Farms[0].Selector.Load() == with {
			t.Errorf("%s: the selector was taken over although it does not fit", name)
		}
	}
	c := spec("web@203.0.113.10:80 s3=198.51.100.13:80")
	c.Farms[0].Policies = []snapshot.Policy{{Name: "path", RoutePolicy: true, Snapshot: routes}}
	var se *snapshot.Error
	if _, err := Build(two, c); !errors.As(err, &se) || !strings.Contains(err.Error(), `farm "web"`) {
		t.Errorf("a snapshot that does not fit: %v", err)
	}
}

func TestErrors(t *testing.T) {
	for _, tc := range []struct{ spec, want string }{
		{"@203.0.113.10:80", "a farm has no name"},
		{"web@203.0.113.10:80|web@203.0.113.11:80", `farm "web": there are two farms of this name`},
		{"web@203.0.113.10:80|shop@203.0.113.10:80", `farm "shop": the VIP 203.0.113.10:80 is taken by farm "web"`},
		{"web@203.0.113.10:80,[2001:db8::1]:80", `farm "web": the VIP [2001:db8::1]:80 is not a port of an address of the farm's family`},
		{"web@203.0.113.10:0", `farm "web": the VIP 203.0.113.10:0 is not a port of an address of the farm's family`},
		{"web@203.0.113.10:80 s1=[2001:db8::1]:80", `farm "web": server "s1": [2001:db8::1]:80 is not a port of an address of the farm's family`},
		{"web@203.0.113.10:80 =198.51.100.11:80", `farm "web": a server has no name`},
		{"web@203.0.113.10:80 a=198.51.100.11:80 a=198.51.100.12:80", `farm "web": server "a": there are two servers of this name`},
	} {
		_, err := Build(nil, spec(strings.Split(tc.spec, "|")...))
		var fe *Error
		if !errors.As(err, &fe) || err.Error() != tc.want {
			t.Errorf("%s\n got: %v\nwant: %s", tc.spec, err, tc.want)
		}
	}
	s := spec("web@203.0.113.10:80")
	s.SNIPs = s.SNIPs[2:]
	if _, err := Build(nil, s); err == nil || !strings.Contains(err.Error(), "no SNIP") {
		t.Errorf("no SNIP: %v", err)
	}
	s = spec("web@203.0.113.10:80 s=198.51.100.11:80")
	s.Farms[0].VIPs = nil
	if _, err := Build(nil, s); err == nil || !strings.Contains(err.Error(), "no VIP") {
		t.Errorf("no VIP: %v", err)
	}
	s = spec("web@203.0.113.10:80 s=198.51.100.11:80")
	s.Farms[0].Servers[0].Weight = 257
	if _, err := Build(nil, s); err == nil || !strings.Contains(err.Error(), "above 256") {
		t.Errorf("weight: %v", err)
	}
}

// TestRandomGenerations builds generations at random and compares numbers with
// a model: a number belongs to one identity as long as it is not forgotten,
// and a forgotten number does not come back.
func TestRandomGenerations(t *testing.T) {
	n := rand.Uint64()
	if s := os.Getenv("WEIR_SEED"); s != "" {
		var err error
		if n, err = strconv.ParseUint(s, 0, 64); err != nil {
			t.Fatalf("WEIR_SEED: %v", err)
		}
	}
	t.Logf("WEIR_SEED=%d", n)
	r := rand.New(rand.NewPCG(n, 1))

	var db *DB
	owner := map[uint16]string{} // every number ever given out
	live := map[string]uint16{}  // identities that are not forgotten
	for range 300 {
		var farms []string
		for f := range 4 {
			if r.IntN(4) == 0 {
				continue
			}
			text := fmt.Sprintf("f%d@203.0.113.%d:80", f, f+1)
			for s := range 5 {
				if r.IntN(3) > 0 {
					text += fmt.Sprintf(" s%d=198.51.100.%d:%d", s, 10+s, 80+r.IntN(2))
				}
			}
			farms = append(farms, text)
		}
		db = build(t, db, spec(farms...))
		for _, s := range db.servers {
			if s == nil {
				continue
			}
			who := fmt.Sprint(s.Farm.Name, s.Name, s.Endpoint)
			if had, ok := owner[s.ID]; ok && had != who {
				t.Fatalf("number %d was %s and is %s", s.ID, had, who)
			}
			if id, ok := live[who]; ok && id != s.ID {
				t.Fatalf("%s was %d and is %d", who, id, s.ID)
			}
			owner[s.ID], live[who] = who, s.ID
		}
		db = db.Forget(func(s *Server) bool {
			if r.IntN(2) == 0 {
				return false
			}
			delete(live, fmt.Sprint(s.Farm.Name, s.Name, s.Endpoint))
			return true
		})
		check(t, db)
		count := 0
		for _, s := range db.servers {
			if s != nil {
				count++
			}
		}
		if count != len(live) {
			t.Fatalf("%d servers, the model has %d", count, len(live))
		}
	}
}

// TestNumbersGoRound: numbers skip 0 and those in use, and run out cleanly.
func TestNumbersGoRound(t *testing.T) {
	last := uint16(65533)
	used := map[uint16]bool{65535: true, 1: true}
	for _, want := range []uint16{65534, 2, 3} {
		got, ok := nextID(&last, func(id uint16) bool { return used[id] })
		if !ok || got != want {
			t.Errorf("got %d, want %d", got, want)
		}
		used[got] = true
	}
	if _, ok := nextID(&last, func(uint16) bool { return true }); ok {
		t.Error("a number where all are in use")
	}
}

func TestLookupsDoNotAllocate(t *testing.T) {
	db := build(t, nil, spec("web@203.0.113.10:80 s1=198.51.100.11:80"))
	vip, snip := ep("203.0.113.10:80"), paddr("198.51.100.1")
	if n := testing.AllocsPerRun(100, func() {
		f := db.ByVIP(vip)
		if db.FarmByID(f.ID) != f || db.Server(f.Servers[0].ID) == nil || !db.IsSNIP(snip) || f.Selector.Load() == nil {
			t.Error("not found")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestWords(t *testing.T) {
	for m := ForwardedNone; m <= ForwardedRFC7239; m++ {
		if got, ok := ParseForwarded(m.String()); !ok || got != m {
			t.Errorf("%v reads back as %v", m, got)
		}
	}
	if _, ok := ParseForwarded("x"); ok || ForwardedMode(9).String() != "unknown" {
		t.Error("an unknown word was read")
	}
	seen := map[string]bool{}
	for k := range CloseKind(CloseKinds) {
		seen[k.String()] = true
	}
	for k := range FailKind(FailKinds) {
		seen["fail "+k.String()] = true
	}
	if len(seen) != CloseKinds+FailKinds || seen[""] || seen["unknown"] {
		t.Errorf("words %v", seen)
	}
}

func TestHistogram(t *testing.T) {
	var h Histogram
	for d, bucket := range map[int64]int{-5: 0, 0: 0, 1<<15 - 1: 0, 1 << 15: 1, 1<<16 - 1: 1, 1 << 16: 2, 1 << 62: HistogramBuckets - 1} {
		before := h.Counts[bucket].Load()
		h.Add(d)
		if h.Counts[bucket].Load() != before+1 {
			t.Errorf("%d ns is not counted in bucket %d", d, bucket)
		}
		if b := HistogramBound(bucket); b != 0 && d >= b {
			t.Errorf("%d ns is in bucket %d, whose bound is %d", d, bucket, b)
		}
	}
	if n := testing.AllocsPerRun(100, func() { h.Add(77) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestPolicyStatsAndFields: counters follow a policy's name over generations,
// and the wanted fields follow the selector.
func TestPolicyStatsAndFields(t *testing.T) {
	s := spec("web@203.0.113.10:80 s1=198.51.100.11:80")
	s.Farms[0].Policies = []snapshot.Policy{{Name: "a"}, {Name: "b"}}
	one := build(t, nil, s)
	f := one.Farms[0]
	f.PolicyStats[1].Decided.Store(7)
	if f.Wanted.Load() != nil {
		t.Error("fields are wanted although no policy looks at any")
	}
	sel, err := f.Selector.Load().With([]snapshot.Policy{{Name: "b", Snapshot: &snapshot.Snapshot{Affinity: &snapshot.Affinity{
		Key: snapshot.AffinityKey{Field: snapshot.Field{Name: "sid", Cookie: true}}, Hash: true,
	}}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.SetSelector(sel); err != nil {
		t.Fatal(err)
	}
	w := f.Wanted.Load()
	if w == nil || w.Index("cookie") != 0 || w.Index("sid") != -1 {
		t.Fatalf("%+v", w)
	}
	if err := f.SetSelector(sel); err != nil || f.Wanted.Load() != w {
		t.Error("the same fields make a new set")
	}
	s.Farms[0].Policies = []snapshot.Policy{{Name: "b"}, {Name: "c"}}
	two := build(t, one, s)
	if g := two.Farms[0]; g.StatsOf("b").Decided.Load() != 7 || g.StatsOf("a") != nil || g.StatsOf("c").Decided.Load() != 0 {
		t.Error("the counters do not follow the name")
	}
}

// TestRecall: a successor that has another Spec knows what the records of the
// farms that are gone mean, and has their exchanges go on by the same terms.
func TestRecall(t *testing.T) {
	spec := FarmSpec{
		Name: "gone", VIPs: []netip.AddrPort{ap("203.0.113.10:80")},
		Servers:  []ServerSpec{{Name: "s1", Endpoint: ap("198.51.100.11:80")}},
		Pool:     PoolLimits{DrainLimit: 77},
		Timeouts: Timeouts{Connect: 1, Head: 2, Body: 3, Idle: 4, Response: 5, Tunnel: 6, Drain: 7},
		Limits:   Limits{Held: 88}, Forwarded: 1, RouteSafety: RouteSafetyPass,
		ForwardedTrust: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/16")},
	}
	snips := []netip.Addr{addr("198.51.100.1")}
	db, err := Build(nil, Spec{SNIPs: snips, Farms: []FarmSpec{spec}})
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(db.Numbers())
	if err != nil {
		t.Fatal(err)
	}
	recall := func(b []byte) *Farm {
		t.Helper()
		var n Numbers
		if err := json.Unmarshal(b, &n); err != nil {
			t.Fatal(err)
		}
		next, err := Build(Recall(n), Spec{SNIPs: snips})
		if err != nil {
			t.Fatal(err)
		}
		if s := next.Server(1); s == nil || !s.Removed() || s.Endpoint != db.Server(1).Endpoint || len(next.Draining) != 1 {
			t.Fatalf("server 1 is %+v, %d drain", s, len(next.Draining))
		}
		return next.Server(1).Farm
	}
	was, now := db.Farms[0], recall(b)
	if !now.Removed || now.Pool != was.Pool || now.Timeouts != was.Timeouts || now.Limits != was.Limits ||
		now.Forwarded != was.Forwarded || now.RouteSafety != was.RouteSafety || !slices.Equal(now.ForwardedTrust, was.ForwardedTrust) {
		t.Errorf("the farm was %+v, and is %+v", was, now)
	}
	// A program that left no terms must not have all of it end at once.
	var plain map[string]any
	if err := json.Unmarshal(b, &plain); err != nil {
		t.Fatal(err)
	}
	delete(plain["farms"].([]any)[0].(map[string]any), "terms")
	if b, err = json.Marshal(plain); err != nil {
		t.Fatal(err)
	}
	if now := recall(b); now.Timeouts != DefaultTimeouts {
		t.Errorf("without terms the timeouts are %+v", now.Timeouts)
	}
}
