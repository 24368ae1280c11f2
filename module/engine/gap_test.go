// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/packet"
)

// blocks lists the SACK blocks of the last step's packet number i, as offsets
// from base.
func (g *rig) blocks(i int, base packet.Seq) (out []packet.Seq) {
	p, _ := packet.ParseTCP(g.out.Packet(i))
	off, n := p.SACK()
	for j := range n {
		b := p.SACKBlock(off, j)
		out = append(out, b.Left-base, b.Right-base)
	}
	return out
}

func wantBlocks(t *testing.T, got []packet.Seq, want ...packet.Seq) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("SACK blocks %v, want %v", got, want)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("SACK blocks %v, want %v", got, want)
		}
	}
}

// TestHeadOutOfOrder: pieces of a head in any order are kept, reported by
// SACK, and reach the server once, in order.
func TestHeadOutOfOrder(t *testing.T) {
	req := get("/sales/forecast.html", 90)
	orders := [][3]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}}
	for _, o := range orders {
		g := newRig(t, oneServer)
		g.iss = []packet.Seq{1999}
		seq, a := g.open(c1, 100, 9000)
		// The first piece creates the record: data of a stranger counts only
		// right behind the handshake.
		g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: req[:1]})
		var syns int
		for _, i := range o {
			lo, hi := max(i*30, 1), i*30+30
			for _, line := range g.client(c1, seg{fl: ack | psh, seq: seq + packet.Seq(lo), ack: a, data: req[lo:hi]}) {
				if strings.Contains(line, "SYN") {
					syns++
				}
			}
		}
		if syns != 1 {
			t.Fatalf("order %v: %d connections", o, syns)
		}
		out := g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
		if len(out) != 2 || g.payload(1) != req {
			t.Fatalf("order %v: the server gets %q, %q", o, out, g.payload(1))
		}
		if u := g.e.Usage(); u.Kept != 0 {
			t.Errorf("order %v: %d still kept", o, u.Kept)
		}
	}
}

// TestGapInHeadIsSACKed: the duplicate ACK names what is kept.
func TestGapInHeadIsSACKed(t *testing.T) {
	req := get("/", 90)
	g := newRig(t, oneServer)
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: req[:10]})
	g.expect("gap", g.client(c1, seg{fl: ack | psh, seq: seq + 20, ack: a, data: req[20:30]}), "C1 ACK:9001,111(0)")
	wantBlocks(t, g.blocks(0, seq), 20, 30)
	g.client(c1, seg{fl: ack | psh, seq: seq + 40, ack: a, data: req[40:50]})
	wantBlocks(t, g.blocks(0, seq), 40, 50, 20, 30)
	g.client(c1, seg{fl: ack | psh, seq: seq + 30, ack: a, data: req[30:40]})
	wantBlocks(t, g.blocks(0, seq), 20, 50)
}

// TestResponseHeadOutOfOrder: INV-5 toward the client. What lies beyond a gap
// before the end is known is kept and answered with SACK, then delivered.
func TestResponseHeadOutOfOrder(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	r := resp(300)
	g.expect("beyond the gap", g.server(s1, 10240, seg{fl: ack | psh, seq: 700, ack: 2050, data: r[200:]}), "S1 ACK:2050,500(0)")
	wantBlocks(t, g.blocks(0, 500), 200, 300)
	// The gap is filled: this packet goes on in place, the kept one follows.
	g.expect("the gap", g.server(s1, 10240, seg{fl: ack, seq: 500, ack: 2050, data: r[:200]}),
		"C1 DATA:9201,151(100)", "C1 RESP:9001,151(200)")
	g.expect("done", g.client(c1, seg{fl: ack, seq: seq + 50, ack: a + 300}), "S1 ACK:2050,800(0)")
	g.client(c1, seg{fl: rst, seq: seq + 50})
	g.idle(1)
}

// TestBodyInAnyOrder: the bytes of a known length pass in any order, and the
// client's acknowledgment moves the engine's view over them.
func TestBodyInAnyOrder(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	r := resp(900)
	g.server(s1, 10240, seg{fl: ack, seq: 500, ack: 2050, data: r[:300]})
	g.expect("last third", g.server(s1, 10240, seg{fl: ack | psh, seq: 1100, ack: 2050, data: r[600:]}), "C1 DATA:9601,151(300)")
	g.expect("second third", g.server(s1, 10240, seg{fl: ack, seq: 800, ack: 2050, data: r[300:600]}), "C1 DATA:9301,151(300)")
	g.expect("done", g.client(c1, seg{fl: ack, seq: seq + 50, ack: a + 900}), "S1 ACK:2050,1400(0)")
	g.client(c1, seg{fl: rst, seq: seq + 50})
	g.idle(1)
}

// TestSACKMapped: SACK blocks cross the splice in both directions, edges
// inside an insertion at its start.
func TestSACKMapped(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: "POST /x HTTP/1.0\r\nContent-Length: 100\r\n\r\n"})
	const head = 41
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	added := packet.Seq(len(keepAlive))
	send := packet.AppendSACKOption(nil,
		packet.SACKBlock{Left: 2000 + head + added + 10, Right: 2000 + head + added + 20},
		packet.SACKBlock{Left: 2000 + head - 2 + 5, Right: 2000 + head + added})
	g.step(Packet, g.raw(s1, ep2(10240), seg{fl: ack, seq: 500, ack: 2000, opts: send}))
	ev := g.last
	p, _ := packet.ParseTCP(ev)
	off, n := p.SACK()
	if n != 2 {
		t.Fatalf("%d blocks reach the client", n)
	}
	if b := p.SACKBlock(off, 0); b.Left != seq+head+10 || b.Right != seq+head+20 {
		t.Errorf("behind the insertion: %d-%d", b.Left-seq, b.Right-seq)
	}
	if b := p.SACKBlock(off, 1); b.Left != seq+head-2 || b.Right != seq+head {
		t.Errorf("from inside the insertion: %d-%d", b.Left-seq, b.Right-seq)
	}
	// A block that lies inside an insertion disappears, wherever it stands.
	inside := packet.SACKBlock{Left: 2000 + head + 3, Right: 2000 + head + 9}
	behind := packet.SACKBlock{Left: 2000 + head + added + 10, Right: 2000 + head + added + 20}
	for i, blocks := range [][]packet.SACKBlock{{inside, behind}, {behind, inside}, {inside}, {inside, inside}} {
		g.step(Packet, g.raw(s1, ep2(10240), seg{fl: ack, seq: 500, ack: 2000, opts: packet.AppendSACKOption(nil, blocks...)}))
		g.describe(g.last)
		p, problem := packet.ParseTCP(g.last)
		off, n := p.SACK()
		if want := 1 - i/2; problem != packet.OK || n != want {
			t.Fatalf("case %d: %d blocks, %v", i, n, problem)
		}
		if n == 1 {
			if b := p.SACKBlock(off, 0); b.Left != seq+head+10 || b.Right != seq+head+20 {
				t.Errorf("case %d: the block %d-%d is left", i, b.Left-seq, b.Right-seq)
			}
		}
	}
	_ = a
}

func icmpTooBig(router netip.Addr, about []byte, mtu uint16) []byte {
	dst := [4]byte(about[12:16])
	body := append([]byte{3, 4, 0, 0, 0, 0, byte(mtu >> 8), byte(mtu)}, about[:28]...)
	sum := ^packet.Fold(packet.Sum(body, 0))
	body[2], body[3] = byte(sum>>8), byte(sum)
	h := []byte{0x45, 0, 0, byte(20 + len(body)), 0, 0, 0, 0, 64, 1, 0, 0}
	src := router.As4()
	h = append(append(h, src[:]...), dst[:]...)
	sum = ^packet.Fold(packet.Sum(h, 0))
	h[10], h[11] = byte(sum>>8), byte(sum)
	return append(h, body...)
}

// TestPathMTU: an error about a segment in flight makes the engine cut what it
// passes on; a forged one has no effect.
func TestPathMTU(t *testing.T) {
	router := netip.MustParseAddr("198.18.9.9")
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	r := resp(5000)
	g.server(s1, 10240, seg{fl: ack, seq: 500, ack: 2050, data: r[:1400]})
	sent := append([]byte(nil), g.last...)
	icmp := func(about []byte, mtu uint16) []string {
		g.out.Reset()
		ev := Event{Kind: ICMP, Data: icmpTooBig(router, about, mtu)}
		g.e.Step(g.now, &ev, &g.out)
		if ev.Verdict != Drop {
			t.Error("an error about our flow goes on untranslated")
		}
		return nil
	}
	forged := append([]byte(nil), sent...)
	forged[24] ^= 0x40 // another sequence number
	icmp(forged, 600)
	g.expect("forged", g.server(s1, 10240, seg{fl: ack, seq: 1900, ack: 2050, data: r[1400:2800]}), "C1 DATA:10401,151(1400)")
	icmp(sent, 1000)
	g.expect("cut", g.server(s1, 10240, seg{fl: ack, seq: 3300, ack: 2050, data: r[2800:4200]}),
		"C1 DATA:11801,151(960)", "C1 DATA:12761,151(440)")
	// Options count, though the sender does not leave room for them.
	blocks := packet.AppendSACKOption(nil, packet.SACKBlock{Left: 2060, Right: 2070})
	for _, n := range []int{960 - len(blocks), 950, 960} {
		g.server(s1, 10240, seg{fl: ack, seq: 3300, ack: 2050, opts: blocks, data: r[2800 : 2800+n]})
		for i := range g.out.Len() {
			if size := len(g.out.Packet(i)); size > 1000 {
				t.Errorf("%d bytes with options: a packet of %d bytes on a way of 1000", n, size)
			}
		}
		if size := len(g.last); g.out.Len() == 0 && size > 1000 {
			t.Errorf("%d bytes with options: passed on as %d bytes", n, size)
		}
	}
	// Toward the server: the client is told, in its own numbers.
	about := g.raw(ep2(10240), s1, seg{fl: ack, seq: 2000, ack: 500})
	g.client(c1, seg{fl: ack, seq: seq + 50, ack: a + 1400})
	g.e.servers.At(1).SndUna = 2000 // the request is in flight
	g.out.Reset()
	ev := Event{Kind: ICMP, Data: icmpTooBig(router, about, 1300)}
	g.e.Step(g.now, &ev, &g.out)
	if g.out.Len() != 1 {
		t.Fatal("the client is not told")
	}
	p, problem := packet.ParseICMPError(g.out.Packet(0))
	if problem != packet.OK || !p.VerifyChecksum() || p.OuterDst() != ep(c1).Addr || p.EmbeddedSeq() != seq ||
		p.Embedded() != (packet.Tuple{Src: ep(c1), Dst: ep(vip)}) || p.MTU() != 1300 {
		t.Errorf("the client is told %v seq %d", p.Embedded(), p.EmbeddedSeq())
	}
	// Somebody else's.
	other := g.raw(netip.MustParseAddrPort("192.0.2.1:9"), s1, seg{fl: ack})
	ev = Event{Kind: ICMP, Data: icmpTooBig(router, other, 600)}
	g.e.Step(g.now, &ev, &g.out)
	if ev.Verdict != Accept {
		t.Error("an error about a foreign flow is swallowed")
	}
}

// TestACKLoop: two ends that acknowledge each other for ever are stopped.
func TestACKLoop(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	passed := 0
	for range 100 {
		passed += len(g.client(c1, seg{fl: ack, seq: seq + 50, ack: a}))
		passed += len(g.server(s1, 10240, seg{fl: ack, seq: 500, ack: 2050}))
	}
	if passed > 24 {
		t.Errorf("%d ACKs of a loop passed", passed)
	}
	if g.e.Count.Get(ReasonACKLoop) == 0 {
		t.Error("the loop is not counted")
	}
	// It goes on as soon as there is news.
	g.expect("news", g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: resp(100)}), "C1 RESP:9001,151(100)")
	// Duplicate ACKs of one side are no loop: they make the other one repair.
	for i := range 50 {
		if len(g.client(c1, seg{fl: ack, seq: seq + 50, ack: a + 10})) != 1 {
			t.Fatalf("duplicate ACK %d is swallowed", i)
		}
	}
}

// TestSecondSegmentOnly: a client of which nothing arrives but a segment that
// overtook the first one is not kept for ever.
func TestSecondSegmentOnly(t *testing.T) {
	for _, embryo := range []bool{true, false} {
		g := newRig(t, oneServer)
		g.cookies[100] = 9000
		g.SYN(c1, 100)
		if embryo {
			g.client(c1, seg{fl: ack, seq: 101, ack: 9001})
		}
		g.client(c1, seg{fl: ack | psh, seq: 141, ack: 9001, data: get("/", 90)[40:]})
		if u := g.e.Usage(); embryo && (u.Clients != 1 || u.Kept != 1) {
			t.Fatalf("the segment is not kept: %+v", u)
		}
		g.wait(300 * second)
		if u := g.e.Usage(); u.Clients != 0 || u.Kept != 0 {
			t.Errorf("embryo %v: after five minutes the engine still holds %+v", embryo, u)
		}
	}
}

// TestSecondSegmentFirst: a segment that overtook the first one of its
// connection does not get it reset, whether the handshake's ACK came or not.
func TestSecondSegmentFirst(t *testing.T) {
	req := get("/", 90)
	for _, embryo := range []bool{true, false} {
		g := newRig(t, oneServer)
		g.iss = []packet.Seq{1999}
		g.cookies[100] = 9000
		g.SYN(c1, 100)
		if embryo {
			g.client(c1, seg{fl: ack, seq: 101, ack: 9001})
		}
		out := g.client(c1, seg{fl: ack | psh, seq: 141, ack: 9001, data: req[40:]})
		for _, line := range out {
			if strings.Contains(line, "RST") {
				t.Fatalf("embryo %v: reset", embryo)
			}
		}
		out = g.client(c1, seg{fl: ack | psh, seq: 101, ack: 9001, data: req[:40]})
		if !embryo {
			out = g.client(c1, seg{fl: ack | psh, seq: 141, ack: 9001, data: req[40:]})
		}
		g.expect("complete", out, "S1 SYN:1999,0(0)")
	}
	// The negative control: nobody knocked, so it belongs to nothing.
	g := newRig(t, oneServer)
	g.expect("unknown", g.client(c1, seg{fl: ack | psh, seq: 141, ack: 9001, data: req}), "C1 RST:9001,0(0)")
}

// TestProbeOverHeldBytes: a client's keep-alive probe stays one where the client
// is further than the server: the next request is held, and the number before
// its end would not make the server answer.
func TestProbeOverHeldBytes(t *testing.T) {
	g := newRig(t, oneServer)
	g.iss = []packet.Seq{1999}
	seq, at := g.open(c1, 100, 9000)
	req := get("/", 90)
	n := packet.Seq(len(req))
	g.expect("connect", g.client(c1, seg{fl: ack | psh, seq: seq, ack: at, data: req}), "S1 SYN:1999,0(0)")
	g.server(s1, 10240, seg{fl: packet.SYN | ack, seq: 2999, ack: 2000})
	g.server(s1, 10240, seg{fl: ack, seq: 3000, ack: 2000 + n})
	bare := fmt.Sprintf("S1 ACK:%d,3000(0)", 2000+n)
	probe := fmt.Sprintf("S1 ACK:%d,3000(0)", 2000+n-1)
	g.expect("probe", g.client(c1, seg{fl: ack, seq: seq + n - 1, ack: at}), probe)
	g.client(c1, seg{fl: ack | psh, seq: seq + n, ack: at, data: req})
	g.expect("acknowledgment behind what is held", g.client(c1, seg{fl: ack, seq: seq + 2*n, ack: at}), bare)
	g.expect("probe behind what is held", g.client(c1, seg{fl: ack, seq: seq + 2*n - 1, ack: at}), probe)
	// The server's answer is the client's.
	g.expect("answer", g.server(s1, 10240, seg{fl: ack, seq: 3000, ack: 2000 + n}), fmt.Sprintf("C1 ACK:%d,%d(0)", at, seq+n))
}
