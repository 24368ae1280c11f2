// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/pool"
)

const (
	ack = packet.ACK
	syn = packet.SYN
	fin = packet.FIN
	psh = packet.PSH
	rst = packet.RST
)

// figure6A plays FIG 6A of WO 00/28433 with every number of it, up to the
// close of C1, and leaves the connection to the server idle.
func figure6A(t *testing.T) *rig {
	g := newRig(t, oneServer, func(s *farm.Spec) { s.Farms[0].Pool.IdleTimeout = 0 })
	g.cookies[2000] = 4000
	g.iss = []packet.Seq{1950}
	g.expect("602A", g.SYN(c1, 2000), "C1 SYN ACK:4000,2001(0)")
	g.expect("602C", g.client(c1, seg{fl: ack, seq: 2001, ack: 4001}))
	g.expect("604", g.client(c1, seg{fl: ack | psh, seq: 2001, ack: 4001, data: get("/sales/forecast.html", 49)}),
		"S1 SYN:1950,0(0)") // 606A
	g.expect("606B", g.server(s1, 10240, seg{fl: syn | ack, seq: 6000, ack: 1951}),
		"S1 ACK:1951,6001(0)",  // 606C
		"S1 GET:1951,6001(49)") // 608
	g.expect("610", g.server(s1, 10240, seg{fl: ack | psh, seq: 6001, ack: 2000, data: resp(999)}),
		"C1 RESP:4001,2050(999)") // 612A
	g.expect("612B", g.client(c1, seg{fl: ack, seq: 2050, ack: 5000}),
		"S1 ACK:2000,7000(0)") // 612C
	g.expect("614A", g.client(c1, seg{fl: fin | ack, seq: 2050, ack: 5000}),
		"C1 FIN:5000,2051(0)") // 614B and C in one segment
	g.expect("614D", g.client(c1, seg{fl: ack, seq: 2051, ack: 5001}))
	return g
}

// TestFigure6A: the first client opens a connection to the server and closes
// its own; the server's stays.
func TestFigure6A(t *testing.T) {
	g := figure6A(t)
	if f := g.db.Farms[0]; f.Stats.Opened.Load() != 1 || f.Stats.Reused.Load() != 0 {
		t.Errorf("opened %d, reused %d, want 1 and 0", f.Stats.Opened.Load(), f.Stats.Reused.Load())
	}
	g.idle(1)
}

// TestFigure6B: the second client uses the connection that the first one
// opened; its numbers go on where flow 612C left them.
func TestFigure6B(t *testing.T) {
	g := figure6A(t)
	g.cookies[999] = 4999
	g.expect("616A", g.SYN(c2, 999), "C2 SYN ACK:4999,1000(0)")
	g.expect("616C", g.client(c2, seg{fl: ack, seq: 1000, ack: 5000}))
	g.expect("618", g.client(c2, seg{fl: ack | psh, seq: 1000, ack: 5000, data: get("/sales/forecast.html", 50)}),
		"S1 GET:2000,7000(50)") // 620
	g.expect("622", g.server(s1, 10240, seg{fl: ack | psh, seq: 7000, ack: 2050, data: resp(500)}),
		"C2 RESP:5000,1050(500)") // 624A
	g.expect("624B", g.client(c2, seg{fl: ack, seq: 1050, ack: 5500}),
		"S1 ACK:2050,7500(0)") // 624C
	g.expect("626A", g.client(c2, seg{fl: fin | ack, seq: 1050, ack: 5500}),
		"C2 FIN:5500,1051(0)")
	g.expect("626D", g.client(c2, seg{fl: ack, seq: 1051, ack: 5501}))
	f := g.db.Farms[0]
	if f.Stats.Opened.Load() != 1 || f.Stats.Reused.Load() != 1 {
		t.Errorf("opened %d, reused %d, want 1 and 1", f.Stats.Opened.Load(), f.Stats.Reused.Load())
	}
	g.idle(1)
}

// TestFigure9: two requests on one client connection go to two servers, by
// path, over connections that were opened ahead (FIG 7 step 702).
func TestFigure9(t *testing.T) {
	g := newRig(t, figure8, func(s *farm.Spec) { s.Farms[0].Pool.IdleTimeout = 0 })
	f := g.db.Farms[0]
	g.iss = []packet.Seq{1999, 2999}
	g.e.now, g.e.out = g.now, &g.out
	for i, sv := range f.Servers {
		if s, why := g.e.open(f, sv, pool.ClassOf(1400, true)); s == 0 {
			t.Fatalf("server %d: %v", i, why)
		}
	}
	g.expect("702 S1", g.server(s1, 10240, seg{fl: syn | ack, seq: 6999, ack: 2000, opts: sackPermitted}), "S1 ACK:2000,7000(0)")
	g.expect("702 S2", g.server(s2, 10241, seg{fl: syn | ack, seq: 3999, ack: 3000, opts: sackPermitted}), "S2 ACK:3000,4000(0)")

	g.cookies[999] = 4999
	g.expect("902A", g.SYN(c2, 999), "C2 SYN ACK:4999,1000(0)")
	g.expect("902C", g.client(c2, seg{fl: ack, seq: 1000, ack: 5000}))
	g.expect("904", g.client(c2, seg{fl: ack | psh, seq: 1000, ack: 5000, data: get("/sales/forecast.html", 50)}),
		"S1 GET:2000,7000(50)") // 906
	g.expect("908", g.server(s1, 10240, seg{fl: ack | psh, seq: 7000, ack: 2050, data: resp(500)}),
		"C2 RESP:5000,1050(500)") // 910A
	g.expect("910B", g.client(c2, seg{fl: ack, seq: 1050, ack: 5500}),
		"S1 ACK:2050,7500(0)") // 910C
	g.expect("912", g.client(c2, seg{fl: ack | psh, seq: 1050, ack: 5500, data: get("/products/new.html", 50)}),
		"S2 GET:3000,4000(50)") // 914
	g.expect("916", g.server(s2, 10241, seg{fl: ack | psh, seq: 4000, ack: 3050, data: resp(400)}),
		"C2 RESP:5500,1100(400)") // 918A
	g.expect("918B", g.client(c2, seg{fl: ack, seq: 1100, ack: 5900}),
		"S2 ACK:3050,4400(0)") // 918C
	g.expect("920A", g.client(c2, seg{fl: fin | ack, seq: 1100, ack: 5900}), "C2 FIN:5900,1101(0)")
	g.expect("920D", g.client(c2, seg{fl: ack, seq: 1101, ack: 5901}))
	g.idle(2)
}

var sackPermitted = packet.AppendSYNOptions(nil, packet.SYNOptions{MSS: 1460, WindowScale: 7, SACKPermitted: true})
