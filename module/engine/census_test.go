// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
)

func addrOf(s string) packet.Addr { return packet.AddrFrom(netip.MustParseAddr(s)) }

// TestCensusLikeMap: random arrivals and departures, compared with a map. The
// whole /64 of an IPv6 address is one client, in each farm for itself.
func TestCensusLikeMap(t *testing.T) {
	rnd := seeded(t)
	type key struct {
		net  netip.Prefix
		farm uint16
	}
	c := NewCensus(500, rnd.Uint64())
	model := map[key]int{}
	type conn struct {
		addr netip.Addr
		key
	}
	var open []conn
	const limit = 7
	refused := 0
	for range 200_000 {
		if len(open) > 0 && (len(open) >= 500 || rnd.IntN(5) < 2) {
			i := rnd.IntN(len(open))
			o := open[i]
			open[i] = open[len(open)-1]
			open = open[:len(open)-1]
			c.remove(packet.AddrFrom(o.addr), o.farm)
			if model[o.key]--; model[o.key] == 0 {
				delete(model, o.key)
			}
			continue
		}
		var a netip.Addr
		var net netip.Prefix
		if rnd.IntN(2) == 0 {
			a = netip.AddrFrom4([4]byte{198, 18, 0, byte(rnd.IntN(60))})
			net, _ = a.Prefix(32)
		} else {
			a = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 7: byte(rnd.IntN(60)), 12: byte(rnd.Uint32()), 15: byte(rnd.Uint32())})
			net, _ = a.Prefix(64)
		}
		k := key{net, uint16(1 + rnd.IntN(2))}
		counted, ok := c.add(packet.AddrFrom(a), k.farm, limit)
		if ok != (model[k] < limit) || counted != ok {
			t.Fatalf("%v of farm %d has %d connections: one more is counted %v, admitted %v", a, k.farm, model[k], counted, ok)
		}
		if !ok {
			refused++
			continue
		}
		model[k]++
		open = append(open, conn{a, k})
	}
	if clients, connections := c.Clients(); clients != len(model) || connections != len(open) {
		t.Errorf("%d clients with %d connections, want %d with %d", clients, connections, len(model), len(open))
	}
	if refused == 0 {
		t.Error("the limit was never met")
	}
	for _, o := range open {
		c.remove(packet.AddrFrom(o.addr), o.farm)
	}
	if clients, connections := c.Clients(); clients != 0 || connections != 0 {
		t.Errorf("%d clients with %d connections are left when all are gone", clients, connections)
	}
}

// TestCensusShards: shards that count at the same time lose nothing, and
// exceed a limit by their number less one at most.
func TestCensusShards(t *testing.T) {
	const shards, limit, each = 4, 100, 20_000
	c := NewCensus(1000, 7)
	addr := addrOf("198.18.0.9")
	var wg sync.WaitGroup
	var most [shards]int
	for i := range shards {
		wg.Go(func() {
			mine := 0
			for n := range each {
				if _, ok := c.add(addr, 1, limit); ok {
					mine++
				}
				// What the others have is not seen, but the sum is.
				_, sum := c.Clients()
				most[i] = max(most[i], sum)
				if n%3 == 0 && mine > 0 {
					c.remove(addr, 1)
					mine--
				}
			}
			for range mine {
				c.remove(addr, 1)
			}
		})
	}
	wg.Wait()
	for i, n := range most {
		if n > limit+shards-1 {
			t.Errorf("shard %d saw %d connections, the limit is %d", i, n, limit)
		}
	}
	if clients, sum := c.Clients(); clients != 0 || sum != 0 {
		t.Errorf("%d clients with %d connections are left", clients, sum)
	}
}

// TestCensusRoom: as many clients as it is made for are all counted.
func TestCensusRoom(t *testing.T) {
	const clients = 100_000
	c := NewCensus(clients, 99)
	lost := 0
	for i := range clients {
		a := packet.AddrFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
		if counted, _ := c.add(a, 1, 1); !counted {
			lost++
		}
	}
	if lost > 0 {
		t.Errorf("%d of %d clients found no room", lost, clients)
	}
}

func TestCensusAllocs(t *testing.T) {
	c := NewCensus(1000, 3)
	a := addrOf("2001:db8::1")
	if n := testing.AllocsPerRun(1000, func() {
		c.add(a, 1, 10)
		c.remove(a, 1)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestConnectionLimits: one client, and all clients together, at their limit
// and at twice that. What is established runs to its end, what comes too late
// is reset, others are served, and a place that gets free is given again.
func TestConnectionLimits(t *testing.T) {
	const limit = 20
	for _, c := range []struct {
		name    string
		change  func(*farm.Limits)
		who     func(i int) netip.AddrPort
		counted Reason
		kind    farm.RefuseKind
		other   bool // another client is served while the limit is reached
	}{
		{"of one client", func(l *farm.Limits) { l.PerClient = limit },
			func(i int) netip.AddrPort { return netip.AddrPortFrom(c1.Addr(), uint16(20000+i)) }, ReasonClientLimit, farm.RefuseClient, true},
		{"in total", func(l *farm.Limits) { l.Connections = limit }, user, ReasonConnectionLimit, farm.RefuseTotal, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newRig(t, oneServer, keepIdle, func(s *farm.Spec) { c.change(&s.Farms[0].Limits) })
			f := g.db.Farms[0]
			var all []*pair
			for i := range 2 * limit {
				g.iss = []packet.Seq{packet.Seq(1_000_000 * (i + 1))}
				p := g.dial(c.who(i), packet.Seq(5000*(i+1)))
				p.ask(get(fmt.Sprintf("/%d", i), 60), packet.Seq(77_000*(i+1)))
				if (p.port != 0) != (i < limit) {
					t.Fatalf("client %d: server connection %d: %s", i, p.port, g.counts())
				}
				all = append(all, p)
			}
			if n := g.e.Count.Get(c.counted); n != limit || f.Stats.ConnectionsRefused[c.kind].Load() != limit {
				t.Errorf("%d refusals are counted, %d of the farm's, want %d", n, f.Stats.ConnectionsRefused[c.kind].Load(), limit)
			}
			if n := g.e.Count.Get(ReasonStatelessReset); n != limit {
				t.Errorf("%d were reset, want %d", n, limit)
			}
			g.iss = []packet.Seq{900_000_000}
			o := g.dial(c2, 4_000_000_000)
			o.ask(get("/other", 60), 3_999_000_000)
			if (o.port != 0) != c.other {
				t.Errorf("another client is served: %v", o.port != 0)
			}
			for i, p := range all[:limit] {
				want := marked(2000, "E")
				p.answer(want)
				if string(p.fromServer) != want {
					t.Fatalf("client %d was established and got %d of %d bytes", i, len(p.fromServer), len(want))
				}
			}
			// One goes, and one place is free.
			all[0].hangUp()
			for i := range 2 {
				p := g.dial(c.who(3*limit+i), packet.Seq(3_000_000_000+i*1000))
				p.g.cookies[p.isn] = p.cack - 1
				served := strings.HasPrefix(fmt.Sprint(g.client(p.cli, seg{fl: ack | psh, seq: p.cseq, ack: p.cack, data: get("/next", 60)})), "[S1 GET")
				if served != (i == 0) {
					t.Errorf("newcomer %d is served: %v, %s", i, served, g.counts())
				}
			}
			if n := f.Stats.Clients.Load(); int(n) != g.e.Usage().Clients {
				t.Errorf("%d clients are counted, there are %d", n, g.e.Usage().Clients)
			}
			// Everybody goes: the counts are back at nothing.
			g.step(Abort, nil)
			if clients, sum := g.e.opt.Census.Clients(); clients != 0 || sum != 0 || f.Stats.Clients.Load() != 0 {
				t.Errorf("when all are gone, %d clients with %d connections are left, %d of the farm", clients, sum, f.Stats.Clients.Load())
			}
		})
	}
}

// TestConnectionLimitsReload: a limit that is lowered cuts nobody off.
func TestConnectionLimitsReload(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999, 700_000}
	a := g.dial(c1, 100)
	a.ask(get("/a", 60), 499)
	g.db.Farms[0].Limits.PerClient, g.db.Farms[0].Limits.Connections = 1, 1
	b := g.dial(netip.AddrPortFrom(c1.Addr(), 50_000), 9000)
	b.ask(get("/b", 60), 5000)
	if b.port != 0 {
		t.Error("a second connection of the client is admitted")
	}
	want := marked(3000, "A")
	a.answer(want)
	if string(a.fromServer) != want {
		t.Errorf("the first one gets %d of %d bytes", len(a.fromServer), len(want))
	}
	a.ask(get("/a2", 60), 0)
	a.fromServer = nil
	a.answer(want)
	if string(a.fromServer) != want {
		t.Errorf("its next request gets %d of %d bytes", len(a.fromServer), len(want))
	}
}
