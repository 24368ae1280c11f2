// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/pool"
)

// TestEveryLimit drives each limit of an engine to its number and to twice
// that: who is established keeps going to the end, who comes too late is
// refused cleanly (RST or 503), and a second after the pressure is gone new
// clients are served again.
func TestEveryLimit(t *testing.T) {
	const limit = 50
	for _, c := range []struct {
		name    string
		spec    func(*farm.Spec)
		shrink  func(*rig)
		refused string // how a refusal looks
		counted Reason
	}{
		{name: "client table", refused: "RST", counted: ReasonTableFull,
			shrink: func(g *rig) { g.shrink(limit, 1000, 1000) }},
		{name: "server table", refused: "503", counted: ReasonTableFull,
			shrink: func(g *rig) { g.shrink(1000, limit, 1000) }},
		{name: "ports", refused: "503", counted: ReasonNoPort,
			shrink: func(g *rig) { g.shrink(1000, 1000, limit) }},
		{name: "pool and line", refused: "503", counted: ReasonWaitingFull,
			spec: small(func(p *farm.PoolLimits) { p.MaxConnections, p.MaxWaiting = limit-10, 10 })},
		{name: "pool, no time to wait", refused: "503", counted: ReasonWaitTimeout,
			spec: small(func(p *farm.PoolLimits) { p.MaxConnections, p.WaitTimeout = limit, millisecond })},
	} {
		t.Run(c.name, func(t *testing.T) {
			// A line that waits is refused quickly, so that the test need not.
			quick := small(func(p *farm.PoolLimits) { p.WaitTimeout, p.MaxConnecting = 500*millisecond, 0 })
			change := []func(*farm.Spec){oneServer, keepIdle, quick}
			if c.spec != nil {
				change = append(change, c.spec)
			}
			g := newRig(t, change...)
			if c.shrink != nil {
				c.shrink(g)
			}
			var all []*pair
			established, refused := 0, 0
			for i := range 2 * limit {
				g.iss = []packet.Seq{packet.Seq(1_000_000 * (i + 1))}
				p := g.dial(user(i), packet.Seq(5000*(i+1)))
				p.ask(get(fmt.Sprintf("/%d", i), 60), packet.Seq(77_000*(i+1)))
				if p.port != 0 {
					established++
				}
				all = append(all, p)
			}
			// All the packets that the engine makes while time passes.
			resets := map[string]bool{}
			for _, line := range g.wait(600 * millisecond) {
				if strings.Contains(line, "RESP") {
					refused++
				}
				if strings.Contains(line, "RST") {
					resets[strings.Fields(line)[0]] = true
				}
			}
			for i, p := range all {
				switch {
				case p.port != 0:
					// INV-7: what is established runs to its end.
					want := marked(3000, "E")
					p.answer(want)
					if string(p.fromServer) != want {
						t.Fatalf("client %d was established and got %d of %d bytes", i, len(p.fromServer), len(want))
					}
				case strings.HasPrefix(string(p.fromServer), "HTTP/1.1 503 "):
					refused++
					if !strings.Contains(string(p.fromServer), "Retry-After: ") {
						t.Errorf("a 503 without Retry-After: %q", p.fromServer)
					}
				}
			}
			if len(resets) > 0 {
				t.Errorf("resets to %v", resets)
			}
			if established < limit-10 || established > limit {
				t.Errorf("%d were served of %d, the limit is %d", established, 2*limit, limit)
			}
			if n := g.e.Count.Get(c.counted); n == 0 {
				t.Errorf("%v is not counted: %s", c.counted, g.counts())
			}
			if c.refused == "503" && refused < limit {
				t.Errorf("%d refusals by 503, want %d", refused, limit)
			}
			if c.refused == "RST" && g.e.Count.Get(ReasonStatelessReset) != limit {
				t.Errorf("%d refusals by RST, want %d", g.e.Count.Get(ReasonStatelessReset), limit)
			}
			// The clients go; a second later new ones are served.
			for _, p := range all {
				p.hangUp()
			}
			g.wait(second)
			g.iss = nil
			for i := range limit - 10 {
				p := g.dial(user(500+i), packet.Seq(5000*(i+1)+3))
				p.ask(get("/again", 60), packet.Seq(99_000*(i+1)))
				if p.port == 0 || string(p.fromClient) != get("/again", 60) {
					t.Fatalf("a second later client %d is not served: %q %+v", i, p.fromServer, g.e.Usage())
				}
			}
		})
	}
}

// shrink rebuilds the rig's engine with these sizes.
func (g *rig) shrink(clients, servers, ports int) {
	opt := g.e.opt
	opt.Clients, opt.Servers = clients, servers
	opt.SNIPs = []*pool.Ports{pool.NewPorts(packet.AddrFrom(snip), 10240, uint16(10240+ports-1), second, nil)}
	g.e = New(opt, g.db)
}

// TestSlowClients: two thousand that never finish their head, five hundred
// that never finish their body and five hundred that read nothing. The memory
// of each is what it has sent and little more, all are told to go in their
// time, and others are served meanwhile.
func TestSlowClients(t *testing.T) {
	const heads, bodies, readers = 2000, 500, 500
	g := newRig(t, oneServer, keepIdle, func(s *farm.Spec) {
		s.Farms[0].Timeouts = farm.Timeouts{Connect: 5 * second, Head: 15 * second, Body: 10 * second, Idle: 60 * second, Response: 20 * second}
		s.Farms[0].Limits.BodyRate = 500
		s.Farms[0].Pool.MaxConnections = 5000
	})
	g.shrink(5000, 5000, 5000)
	began := g.now
	measure := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := measure()
	n := 0
	fresh := func() *pair {
		n++
		g.iss = []packet.Seq{packet.Seq(1_000_000 * n)}
		return g.dial(user(n), packet.Seq(5000*n))
	}
	for range heads {
		p := fresh()
		g.play(g.raw(p.cli, vip, seg{fl: ack | psh, seq: p.cseq, ack: p.cack, data: "GET / HTTP/1.1\r\nHost: slow\r\nX: y"}))
	}
	for range bodies {
		p := fresh()
		p.ask("POST / HTTP/1.1\r\nHost: slow\r\nContent-Length: 100000\r\n\r\nx", packet.Seq(7000*n))
		g.play(g.raw(p.srv, ep2(p.port), seg{fl: ack, seq: p.sseq, ack: p.sack, win: 65535}))
	}
	// They have a window of zero after the first segment.
	for range readers {
		p := fresh()
		p.ask(get("/", 60), packet.Seq(7000*n))
		g.play(g.raw(p.srv, ep2(p.port), seg{fl: ack, seq: p.sseq, ack: p.sack, data: marked(5000, "R")[:1400]}))
		shut := g.raw(p.cli, vip, seg{fl: ack, seq: p.cseq, ack: p.cack + 1400})
		q, _ := packet.ParseTCP(shut)
		q.SetWindow(0, packet.ChecksumUnknown)
		q.FillChecksum()
		g.play(shut)
	}
	if u := g.e.Usage(); u.Clients != heads+bodies+readers {
		t.Fatalf("%+v", u)
	}
	each := (measure() - before) / (heads + bodies + readers)
	t.Logf("%d bytes for each slow connection, with the rig's own", each)
	if each > 4096+64 {
		t.Errorf("%d bytes for each slow connection", each)
	}
	var gone [3]int64 // when the last of each kind was told
	told := func() (h, b, r uint64) {
		return g.e.Count.Get(ReasonHeadTimeout), g.e.Count.Get(ReasonSlowBody), g.e.Count.Get(ReasonServerSilent)
	}
	for g.now-began < 60*second {
		g.wait(250 * millisecond)
		h, b, r := told()
		for i, done := range []bool{h == heads, b == bodies, r >= readers} {
			if done && gone[i] == 0 {
				gone[i] = g.now - began
			}
		}
		if i := (g.now - began) / (250 * millisecond); i%20 == 0 && i < 120 {
			p := fresh()
			p.ask(get("/", 60), packet.Seq(7000*n))
			want := marked(100, "H")
			p.answer(want)
			if string(p.fromServer) != want {
				t.Fatalf("an honest client among the slow ones gets %q", p.fromServer)
			}
			p.hangUp()
		}
	}
	for i, c := range []struct {
		kind  string
		limit int64
	}{{"heads", 15 * second}, {"bodies", 10 * second}, {"readers", 20 * second}} {
		if gone[i] == 0 || gone[i] > c.limit+second || gone[i] < c.limit-second {
			t.Errorf("slow %s were gone after %v ms, the limit is %v ms: %s", c.kind, gone[i]/millisecond, c.limit/millisecond, g.counts())
		}
	}
}
