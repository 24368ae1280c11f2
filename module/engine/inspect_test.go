// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
	"github.com/weirgate/weir/policies/snapshot"
)

// active brings a client to a request that is at s1, of whose response the
// first 300 of 999 bytes have passed.
func active(t *testing.T, change ...func(*farm.Spec)) *rig {
	t.Helper()
	g := newRig(t, append([]func(*farm.Spec){oneServer}, change...)...)
	seq, ackn := g.open(c1, 2000, 4000)
	g.iss = []packet.Seq{1950}
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: ackn, data: get("/x", 49)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 6000, ack: 1951})
	g.server(s1, 10240, seg{fl: ack, seq: 6001, ack: 2000, data: resp(999)[:300]})
	return g
}

// finish lets the rest of the response pass.
func (g *rig) finish() []string {
	g.t.Helper()
	got := g.server(s1, 10240, seg{fl: ack | psh, seq: 6301, ack: 2000, data: resp(999)[300:]})
	return append(got, g.client(c1, seg{fl: ack, seq: 2050, ack: 5000})...)
}

func (g *rig) do(f func(out *Output)) []string {
	g.t.Helper()
	g.out.Reset()
	f(&g.out)
	return g.collect(nil)
}

// change puts another generation into force, as a reload does.
func (g *rig) change(edit func(*farm.Spec)) {
	g.t.Helper()
	spec := farm.Spec{SNIPs: []netip.Addr{snip}}
	for _, f := range g.db.Farms {
		fs := farm.FarmSpec{Name: f.Name, Pool: f.Pool, Timeouts: f.Timeouts}
		for _, v := range f.VIPs {
			fs.VIPs = append(fs.VIPs, v.AddrPort())
		}
		for _, s := range f.Servers {
			fs.Servers = append(fs.Servers, farm.ServerSpec{Name: s.Name, Endpoint: s.Endpoint.AddrPort()})
		}
		spec.Farms = append(spec.Farms, fs)
	}
	edit(&spec)
	db, err := farm.Build(g.db, spec)
	if err != nil {
		g.t.Fatal(err)
	}
	g.db = db
	g.e.SetDB(db)
}

// has reports whether one of the packets begins like this.
func has(got []string, prefix string) bool {
	for _, s := range got {
		if strings.HasPrefix(s, prefix) {
			return true
		}
	}
	return false
}

// TestInspect: flows and connections are what the packets made of them.
func TestInspect(t *testing.T) {
	g := active(t)
	list, next := g.e.Flows(0, make([]Flow, 0, 8))
	if len(list) != 1 || next != 0 {
		t.Fatalf("%d flows, next %d", len(list), next)
	}
	f := list[0]
	if f.Client != ep(c1) || f.VIP != ep(vip) || f.State != splice.ClientSpliced || f.Server != g.db.Farms[0].Servers[0].ID ||
		f.ServerState != splice.ServerActive || f.SNIP != ep(ep2(10240)) || f.Remote != ep(s1) || f.Farm != g.db.Farms[0].ID {
		t.Errorf("%+v", f)
	}
	if one, ok := g.e.FlowOf(ep(c1), ep(vip)); !ok || one != f {
		t.Errorf("FlowOf: %+v, %t", one, ok)
	}
	if _, ok := g.e.FlowOf(ep(c2), ep(vip)); ok {
		t.Error("a flow of a client that never came")
	}
	conns, next := g.e.Conns(0, make([]Conn, 0, 8))
	if len(conns) != 1 || next != 0 || conns[0].State != splice.ServerActive || conns[0].Server != f.Server || conns[0].Requests != 1 {
		t.Errorf("%+v, next %d", conns, next)
	}
}

// TestFlowsInSlices: however small the slices are, each flow comes once, and
// a slice looks at a bounded number of places.
func TestFlowsInSlices(t *testing.T) {
	g := newRig(t)
	const n = 300
	for i := range n {
		client := netip.AddrPortFrom(netip.MustParseAddr("198.18.1.1"), uint16(1000+i))
		g.cookies[packet.Seq(i)] = 7000
		g.SYN(client, packet.Seq(i))
		g.client(client, seg{fl: ack | psh, seq: packet.Seq(i + 1), ack: 7001, data: "GET /half"})
	}
	for _, size := range []int{1, 7, n, 2 * n} {
		seen := map[packet.Endpoint]int{}
		slices := 0
		for from := splice.Ref(0); ; slices++ {
			var list []Flow
			list, from = g.e.Flows(from, make([]Flow, 0, size))
			for _, f := range list {
				seen[f.Client]++
				if f.Held != 9 || f.State != splice.ClientHead {
					t.Fatalf("%+v", f)
				}
			}
			if from == 0 {
				break
			}
		}
		if len(seen) != n {
			t.Errorf("slices of %d: %d flows, want %d", size, len(seen), n)
		}
		for c, k := range seen {
			if k != 1 {
				t.Errorf("slices of %d: %v came %d times", size, c, k)
			}
		}
	}
	list, next := g.e.Flows(0, make([]Flow, 0, 5))
	if len(list) != 5 || next == 0 {
		t.Errorf("%d flows, next %d", len(list), next)
	}
}

// TestKill: both ends of a killed connection are reset, and nothing is left.
func TestKill(t *testing.T) {
	g := active(t)
	found := false
	got := g.do(func(out *Output) { found = g.e.Kill(g.now, ep(c1), ep(vip), out) })
	if !found || !has(got, "C1 RST") || !has(got, "S1 RST") {
		t.Errorf("found %t: %q", found, got)
	}
	if got := g.do(func(out *Output) { found = g.e.Kill(g.now, ep(c1), ep(vip), out) }); found || len(got) != 0 {
		t.Errorf("again: %t, %q", found, got)
	}
	if g.e.Count.Get(ReasonKilled) == 0 {
		t.Error("it is not counted")
	}
	g.idle(0)
}

// TestKillConnecting: a client that is killed while its server connection is
// being opened leaves that to the pool.
func TestKillConnecting(t *testing.T) {
	g := newRig(t, oneServer)
	seq, ackn := g.open(c1, 2000, 4000)
	g.iss = []packet.Seq{1950}
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: ackn, data: get("/x", 49)})
	got := g.do(func(out *Output) { g.e.Kill(g.now, ep(c1), ep(vip), out) })
	if !has(got, "C1 RST") {
		t.Errorf("%q", got)
	}
	g.expect("handshake", g.server(s1, 10240, seg{fl: syn | ack, seq: 6000, ack: 1951}), "S1 ACK:1951,6001(0)")
	if u := g.e.Usage(); u.Clients != 0 || u.Idle != 1 {
		t.Errorf("%+v", u)
	}
}

// TestCloseIdle: the idle connections to one server are closed in good order.
func TestCloseIdle(t *testing.T) {
	g := active(t)
	g.finish()
	id := g.db.Farms[0].Servers[0].ID
	if u := g.e.Usage(); u.Idle != 1 {
		t.Fatalf("%+v", u)
	}
	if got := g.do(func(out *Output) {
		if g.e.CloseIdle(g.now, id+1, out) {
			t.Error("more of another server")
		}
	}); len(got) != 0 {
		t.Errorf("another server: %q", got)
	}
	got := g.do(func(out *Output) {
		if g.e.CloseIdle(g.now, id, out) {
			t.Error("more after the last one")
		}
	})
	if !has(got, "S1 FIN") || g.e.Usage().Idle != 0 {
		t.Errorf("%q, %+v", got, g.e.Usage())
	}
}

// TestRemovedServerIsNotPooled: a connection to a server that was removed, or
// takes nothing new, is closed after its exchange instead of going idle. The
// control: with the server ready it does go idle.
func TestRemovedServerIsNotPooled(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(g *rig)
		idle int
	}{
		{"ready", func(*rig) {}, 1},
		{"removed", func(g *rig) {
			g.change(func(s *farm.Spec) { s.Farms[0].Servers[0] = farm.ServerSpec{Name: "s2", Endpoint: s2} })
		}, 0},
		{"farm removed", func(g *rig) { g.change(func(s *farm.Spec) { s.Farms = nil }) }, 0},
		{"drain", func(g *rig) { g.db.Farms[0].Servers[0].Live.State.Store(uint32(snapshot.Drain)) }, 0},
		{"maint", func(g *rig) { g.db.Farms[0].Servers[0].Live.State.Store(uint32(snapshot.Maint)) }, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := active(t)
			sv := g.db.Farms[0].Servers[0]
			c.do(g)
			got := g.finish()
			if !has(got, "C1 DATA:4301,2050(699)") {
				t.Errorf("the exchange does not finish: %q", got)
			}
			if n := g.e.Usage().Idle; n != c.idle {
				t.Errorf("%d idle connections, want %d: %q", n, c.idle, got)
			}
			if c.idle == 0 && !has(got, "S1 FIN") {
				t.Errorf("no FIN: %q", got)
			}
			if sv.Live.Active.Load() != 0 {
				t.Errorf("%d active", sv.Live.Active.Load())
			}
		})
	}
}

// TestCutServer: at the end of its time a server's exchange is reset on both
// sides once the client has seen a part, and goes to another server before.
func TestCutServer(t *testing.T) {
	t.Run("begun", func(t *testing.T) {
		g := active(t)
		id := g.db.Farms[0].Servers[0].ID
		got := g.do(func(out *Output) {
			if next := g.e.CutServer(g.now, id, 0, out); next != 0 {
				t.Errorf("next %d", next)
			}
		})
		if !has(got, "S1 RST") || !has(got, "C1 RST") {
			t.Errorf("%q", got)
		}
		g.idle(0)
	})
	t.Run("not begun", func(t *testing.T) {
		g := newRig(t)
		seq, ackn := g.open(c1, 2000, 4000)
		g.iss = []packet.Seq{1950}
		got := g.client(c1, seg{fl: ack | psh, seq: seq, ack: ackn, data: get("/x", 49)})
		first, second := s1, "S2"
		if has(got, "S2 SYN") {
			first, second = s2, "S1"
		}
		g.server(first, 10240, seg{fl: syn | ack, seq: 6000, ack: 1951})
		sv := g.db.Farms[0].Servers[0]
		if first == s2 {
			sv = g.db.Farms[0].Servers[1]
		}
		got = g.do(func(out *Output) { g.e.CutServer(g.now, sv.ID, 0, out) })
		if has(got, "C1") || !has(got, second+" SYN") {
			t.Errorf("%q, want a SYN to %s and nothing to the client", got, second)
		}
	})
	t.Run("connecting", func(t *testing.T) {
		g := newRig(t, oneServer)
		seq, ackn := g.open(c1, 2000, 4000)
		g.client(c1, seg{fl: ack | psh, seq: seq, ack: ackn, data: get("/x", 49)})
		sv := g.db.Farms[0].Servers[0]
		got := g.do(func(out *Output) { g.e.CutServer(g.now, sv.ID, 0, out) })
		if !has(got, "S1 RST") || sv.Live.Active.Load() != 0 || sv.Stats.Open.Load() != 0 {
			t.Errorf("%q, %d active, %d open", got, sv.Live.Active.Load(), sv.Stats.Open.Load())
		}
	})
}

// TestLeaveVIP: clients between two requests get a FIN at once, running ones
// after their response, and at the deadline a reset.
func TestLeaveVIP(t *testing.T) {
	leave := func(g *rig, cut bool) (got []string, left int) {
		got = g.do(func(out *Output) {
			var next splice.Ref
			if next, left = g.e.LeaveVIP(g.now, ep(vip), 0, cut, out); next != 0 {
				t.Errorf("next %d", next)
			}
		})
		return got, left
	}
	t.Run("between requests", func(t *testing.T) {
		g := active(t)
		g.finish()
		got, left := leave(g, false)
		if !has(got, "C1 FIN:5000,2050(0)") || left != 1 {
			t.Errorf("%q, %d left", got, left)
		}
		g.client(c1, seg{fl: fin | ack, seq: 2050, ack: 5001})
		if got, left := leave(g, false); len(got) != 0 || left != 0 {
			t.Errorf("after the client's FIN: %q, %d left", got, left)
		}
	})
	t.Run("running", func(t *testing.T) {
		g := active(t)
		if got, left := leave(g, false); len(got) != 0 || left != 1 {
			t.Errorf("%q, %d left", got, left)
		}
		// The FIN rides on the end of the response.
		if got := g.finish(); !has(got, "C1 DATA FIN:4301,2050(699)") && !has(got, "C1 FIN") {
			t.Errorf("%q", got)
		}
	})
	t.Run("cut", func(t *testing.T) {
		g := active(t)
		got, left := leave(g, true)
		if !has(got, "C1 RST") || !has(got, "S1 RST") || left != 0 {
			t.Errorf("%q, %d left", got, left)
		}
		g.idle(0)
	})
	t.Run("another VIP", func(t *testing.T) {
		g := active(t)
		var left int
		got := g.do(func(out *Output) {
			_, left = g.e.LeaveVIP(g.now, ep(netip.MustParseAddrPort("203.0.113.99:80")), 0, true, out)
		})
		if len(got) != 0 || left != 0 {
			t.Errorf("%q, %d left", got, left)
		}
	})
}

// TestTap: a watched client's steps are recorded with what came and what went,
// on both legs; another client's are not; and the engine does the same with and
// without.
func TestTap(t *testing.T) {
	play := func(tap *Tap) (log []string) {
		g := newRig(t, oneServer)
		step := func(src, dst netip.AddrPort, s seg) {
			g.out.Reset()
			b := g.raw(src, dst, s)
			ev := Event{Kind: Packet, Data: append(make([]byte, 0, len(b)+256), b...)}
			if tap != nil {
				tap.Step(g.e, g.now, &ev, &g.out)
			} else {
				g.e.Step(g.now, &ev, &g.out)
			}
			log = append(log, strings.Join(g.collect(&ev), " "))
		}
		for i, c := range []netip.AddrPort{c1, c2} {
			isn := packet.Seq(1000 * (i + 1))
			seq, ackn := g.open(c, isn, 500)
			g.iss = []packet.Seq{packet.Seq(3000 * (i + 1))}
			port := uint16(10240 + i)
			step(c, vip, seg{fl: ack | psh, seq: seq, ack: ackn, data: get("/x", 49)})
			step(s1, ep2(port), seg{fl: syn | ack, seq: 6000, ack: g.lastISS(i) + 1})
			step(s1, ep2(port), seg{fl: ack | psh, seq: 6001, ack: g.lastISS(i) + 50, data: resp(99)})
		}
		return log
	}
	var got []Passage
	with := play(&Tap{Client: func(a packet.Addr) bool { return a == ep(c1).Addr }, Record: func(p Passage) { got = append(got, p) }})
	if without := play(nil); fmt.Sprint(with) != fmt.Sprint(without) {
		t.Errorf("the engine behaves differently:\n%q\n%q", with, without)
	}
	if len(got) != 3 {
		t.Fatalf("%d steps of the watched client, want 3: %+v", len(got), got)
	}
	for i, p := range got {
		if p.In == nil || len(p.Out) == 0 {
			t.Errorf("step %d: %+v", i, p)
		}
		for _, b := range p.Out {
			if v, problem := packet.ParseTCP(b); problem != packet.OK || !v.VerifyChecksum() || v.Dst() == ep(c2) {
				t.Errorf("step %d: %v", i, v.Tuple())
			}
		}
	}
	if got[2].Decided == 0 {
		t.Errorf("the server is not told: %+v", got[2])
	}
}

// lastISS is the first number of the i-th server connection of TestTap.
func (g *rig) lastISS(i int) packet.Seq { return packet.Seq(3000 * (i + 1)) }

// TestGoneVIP: a SYN to a VIP that is not served any more is refused as RFC
// 9293 says it of a port without a listener; one to an address that nobody
// knows is dropped, and so is everything that is no SYN or is damaged.
func TestGoneVIP(t *testing.T) {
	g := newRig(t)
	gone := false
	g.hs.Known = func(packet.Endpoint) bool { return false }
	g.expect("unknown", g.SYN(c1, 2000))
	g.hs.Gone = func(v packet.Endpoint) bool { return gone && v == ep(vip) }
	g.expect("another one is gone", g.SYN(c1, 2000))
	gone = true
	g.expect("gone", g.SYN(c1, 2000), "C1 RST:0,2001(0)")
	syn := func(s seg) []string {
		g.out.Reset()
		g.hs.SYN(g.now, g.raw(c1, vip, s), packet.ChecksumUnknown, &g.out)
		return g.collect(nil)
	}
	g.expect("the last number", syn(seg{fl: packet.SYN, seq: 0xffffffff}), "C1 RST:0,0(0)")
	g.expect("damaged", syn(seg{fl: packet.SYN, seq: 1, bad: true}))
	g.expect("a reset", syn(seg{fl: packet.SYN | packet.RST, seq: 1}))
	if a, i, r := g.hs.Answered.Load(), g.hs.Ignored.Load(), g.hs.Refused.Load(); a != 0 || i != 4 || r != 2 {
		t.Errorf("%d answered, %d ignored, %d refused; want 0, 4, 2", a, i, r)
	}
}
