// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
)

// The catalogue: bugs that other programs between clients and shared server
// connections have had, each played against the engine with a control that
// shows the innocent case next to it.

const nothing = packet.Seq(0)

// served is a pair whose exchange of one plain GET is over; its server
// connection is idle.
func served(t *testing.T, change ...func(*farm.Spec)) (*rig, *pair) {
	t.Helper()
	g := newRig(t, append([]func(*farm.Spec){oneServer, keepIdle}, change...)...)
	g.iss = []packet.Seq{1999, 700_000, 800_000, 900_000}
	a := g.dial(c1, 100)
	a.ask(get("/a", 60), 499)
	a.answer(marked(100, "A"))
	if g.e.Usage().Idle != 1 || !strings.HasSuffix(string(a.fromServer), "A") {
		t.Fatalf("a plain exchange: %q, %+v", a.fromServer, g.e.Usage())
	}
	return g, a
}

// second lets another client ask and answers it; it reports whether the old
// server connection was used.
func (g *rig) second(a *pair) (b *pair, reused bool) {
	g.t.Helper()
	b = g.dial(c2, 7000)
	b.srv, b.port, b.sseq, b.sack = a.srv, a.port, a.sseq, a.sack
	b.ask(get("/b", 70), 5_000_000)
	if string(b.fromClient) != get("/b", 70) {
		g.t.Fatalf("the second request is %q at the server", b.fromClient)
	}
	want := marked(120, "B")
	b.answer(want)
	if string(b.fromServer) != want {
		g.t.Fatalf("the second client gets %q", b.fromServer)
	}
	return b, b.port == a.port
}

// TestHAProxy583: a response to the wrong client. A leaves while its response
// is due; whatever comes of it later, B gets its own. Also where the response
// crosses B's request on the way.
func TestHAProxy583(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999, 700_000}
	a := g.dial(c1, 100)
	a.ask(get("/a", 60), 499)
	g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack, seq: a.sseq, ack: a.sack}))
	g.play(g.raw(a.cli, vip, seg{fl: rst, seq: a.cseq}))
	if _, reused := g.second(a); reused {
		t.Error("B is served by a connection whose response belongs to A")
	}
	for _, s := range g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack | psh, seq: a.sseq, ack: a.sack, data: marked(100, "A")})) {
		if s.dst.Addr() != snip && s.dst.Addr() != s1.Addr() && len(s.data) > 0 {
			t.Errorf("A's response goes to %v", s.dst)
		}
	}
	// The control: drained, the connection is as good as new.
	if g.e.Usage().Idle != 2 {
		t.Errorf("after the drain: %+v", g.e.Usage())
	}
}

// TestHAProxy176: bytes left over behind a response are parsed as the next
// one. Behind the end in the same segment, or while idle, they end the
// connection.
func TestHAProxy176(t *testing.T) {
	left := "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nleft"
	t.Run("same segment", func(t *testing.T) {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{1999, 700_000}
		a := g.dial(c1, 100)
		a.ask(get("/a", 60), 499)
		want := marked(100, "A")
		a.note(g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack | psh, seq: a.sseq, ack: a.sack, data: want + left})), nothing)
		if string(a.fromServer) != want {
			t.Fatalf("the client gets %q", a.fromServer)
		}
		g.play(g.raw(a.cli, vip, seg{fl: ack, seq: a.cseq, ack: a.cack}))
		if _, reused := g.second(a); reused {
			t.Error("the connection is used again")
		}
	})
	t.Run("idle", func(t *testing.T) {
		g, a := served(t)
		g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack | psh, seq: a.sseq, ack: a.sack, data: left}))
		if _, reused := g.second(a); reused {
			t.Error("the connection is used again")
		}
	})
	t.Run("control", func(t *testing.T) {
		g, a := served(t)
		if _, reused := g.second(a); !reused {
			t.Error("a clean connection is not used again")
		}
	})
}

// TestHAProxy290: fields swapped between connections. A hundred heads arrive
// in pieces, all at once, taking turns; each server connection gets one of
// them, whole.
func TestHAProxy290(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	const n, size = 100, 200
	var all []*pair
	var req []string
	for i := range n {
		g.iss = append(g.iss, packet.Seq(1_000_000*(i+1)))
		all = append(all, g.dial(user(i), packet.Seq(5000*(i+1))))
		mine := fmt.Sprintf("Owner: %03d\r\n", i)
		req = append(req, get("/", size, strings.Repeat(mine, 5)))
	}
	for off := 0; off < size; off += 40 {
		for i, p := range all {
			p.note(g.play(g.raw(p.cli, vip, seg{fl: ack | psh, seq: p.cseq + packet.Seq(off), ack: p.cack, data: req[i][off : off+40]})), packet.Seq(9000*i+1))
		}
	}
	for i, p := range all {
		if string(p.fromClient) != req[i] {
			t.Fatalf("client %d: its server got %q", i, p.fromClient)
		}
	}
}

// TestPingora4366 (CVE-2025-4366): a request body that was not read is taken
// for the next request. A response that is over before its request ends the
// server connection, and the rest of the body goes nowhere.
func TestPingora4366(t *testing.T) {
	const hidden = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
	for _, whole := range []bool{false, true} {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{1999, 700_000}
		a := g.dial(c1, 100)
		head := fmt.Sprintf("POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", 50+len(hidden))
		body := strings.Repeat("p", 50)
		if whole { // the control: the server had all of the body
			body += hidden
		}
		a.ask(head+body, 499)
		want := marked(10, "A")
		a.note(g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack | psh, seq: a.sseq, ack: a.sack, data: want})), nothing)
		a.sseq += packet.Seq(len(want))
		a.note(g.play(g.raw(a.cli, vip, seg{fl: ack, seq: a.cseq, ack: a.cack})), nothing)
		if !whole {
			at := len(a.fromClient)
			a.note(g.play(g.raw(a.cli, vip, seg{fl: ack | psh, seq: a.cseq, ack: a.cack, data: hidden})), nothing)
			if strings.Contains(string(a.fromClient[at:]), "smuggled") && g.e.Usage().Idle > 0 {
				t.Error("the rest of the body reached a connection that is used again")
			}
		}
		if _, reused := g.second(a); reused != whole {
			t.Errorf("whole body %v: connection used again %v", whole, reused)
		}
	}
}

// TestPingora2833 (CVE-2026-2833): bytes behind a request to upgrade pass
// before the server has agreed. They wait for the 101; after any other answer
// they are the next request, and the connection is not shared.
func TestPingora2833(t *testing.T) {
	upgrade := "GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n"
	for _, agreed := range []bool{false, true} {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{1999, 700_000}
		a := g.dial(c1, 100)
		a.ask(upgrade+"early bytes", 499)
		if string(a.fromClient) != upgrade {
			t.Fatalf("before the 101 the server has %q", a.fromClient)
		}
		if agreed { // the control
			a.answer("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n")
			if string(a.fromClient) != upgrade+"early bytes" {
				t.Errorf("after the 101 the server has %q", a.fromClient)
			}
			continue
		}
		a.answer(marked(10, "A"))
		if strings.Contains(string(a.fromClient), "early bytes") {
			t.Errorf("without a 101 the server has %q", a.fromClient)
		}
		if _, reused := g.second(a); reused {
			t.Error("the connection is used again")
		}
	}
}

// TestPingora2835 (CVE-2026-2835): Transfer-Encoding in HTTP/1.0, alone or
// with a length: nobody knows where such a request ends, so it is refused.
func TestPingora2835(t *testing.T) {
	for _, c := range []struct {
		req    string
		refuse bool
	}{
		{"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", true},
		{"POST / HTTP/1.0\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", true},
		{"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", true},
		{"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n", true},
		{"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", false},
		{"POST / HTTP/1.0\r\nHost: a\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", false},
	} {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{1999}
		a := g.dial(c1, 100)
		a.ask(c.req, 499)
		refused := strings.HasPrefix(string(a.fromServer), "HTTP/1.1 4") || strings.HasPrefix(string(a.fromServer), "HTTP/1.1 501")
		if refused != c.refuse || refused == (a.port != 0) {
			t.Errorf("%q: answered %q, server connection %d", c.req, a.fromServer, a.port)
		}
	}
}

// TestNginx437: a server's FIN crosses a request, and a RST follows. The
// acknowledgment number proves that the server never had it: any method goes
// to a fresh connection, once. The control: where the server had it, a POST is
// not repeated.
func TestNginx437(t *testing.T) {
	for _, had := range []bool{false, true} {
		g, a := served(t)
		b := g.dial(c2, 7000)
		b.srv, b.port, b.sseq, b.sack = a.srv, a.port, a.sseq, a.sack
		req := "POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody"
		before := b.sack
		b.ask(req, 5_000_000)
		if b.port != a.port {
			t.Fatal("not the idle connection")
		}
		acked := before
		if had {
			acked = b.sack
		}
		b.note(g.play(g.raw(a.srv, ep2(a.port), seg{fl: fin | ack, seq: a.sseq, ack: acked})), 5_000_000)
		if had {
			if !strings.Contains(string(b.fromServer), " 502 ") {
				t.Errorf("the server had the request: the client gets %q", b.fromServer)
			}
			continue
		}
		g.play(g.raw(a.srv, ep2(a.port), seg{fl: rst, seq: a.sseq + 1}))
		if b.port == a.port || string(b.fromClient) != req {
			t.Fatalf("not redispatched: port %d, %q", b.port, b.fromClient)
		}
		want := marked(10, "B")
		b.answer(want)
		if string(b.fromServer) != want {
			t.Errorf("the client gets %q", b.fromServer)
		}
	}
}

// TestEnvoy2715: a connection is used although the server's FIN has
// come.
func TestEnvoy2715(t *testing.T) {
	g, a := served(t)
	g.play(g.raw(a.srv, ep2(a.port), seg{fl: fin | ack, seq: a.sseq, ack: a.sack}))
	if _, reused := g.second(a); reused {
		t.Error("a connection with a FIN is used again")
	}
}

// TestEnvoy6815: the same, with the FIN on the response's last segment.
func TestEnvoy6815(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999, 700_000}
	a := g.dial(c1, 100)
	a.ask(get("/a", 60), 499)
	want := marked(10, "A")
	a.note(g.play(g.raw(a.srv, ep2(a.port), seg{fl: fin | ack | psh, seq: a.sseq, ack: a.sack, data: want})), nothing)
	g.play(g.raw(a.cli, vip, seg{fl: ack, seq: a.cseq, ack: a.cack}))
	if _, reused := g.second(a); reused || string(a.fromServer) != want {
		t.Errorf("used again: %v; the first client got %q", reused, a.fromServer)
	}
}

// TestEnvoy28105: "Keep-Alive: timeout=" is ignored, and requests meet the
// server's close. The connection is retired before the server's time is up.
func TestEnvoy28105(t *testing.T) {
	for _, hint := range []string{"Keep-Alive: timeout=5\r\n", ""} {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{1999}
		a := g.dial(c1, 100)
		a.ask(get("/a", 60), 499)
		a.answer(resp(100, hint))
		closed := false
		for _, line := range g.wait(4900 * millisecond) {
			closed = closed || strings.HasPrefix(line, "S1 FIN")
		}
		if closed != (hint != "") {
			t.Errorf("hint %q: closed before its time: %v", hint, closed)
		}
	}
}

// TestEnvoy47468: a server closes connections that were idle for 200 ms, without
// having announced it, and a request is on its way to it at that moment. A proxy
// that has written the request cannot tell that nobody read it, and answers 503
// unless it may repeat whatever failed. Here the acknowledgment numbers tell: in
// every order of the crossing the request, POST too, goes once to a connection
// that answers it, and connections are retired before their time from then on.
// The controls: of a request that the server had, and of a bare reset, which
// proves nothing, only what is idempotent is repeated.
func TestEnvoy47468(t *testing.T) {
	const kept = 200 * millisecond
	for _, c := range []struct {
		name   string
		before bool // the FIN comes before the request
		fl     packet.Flags
		acked  bool // it acknowledges the request
		then   bool // a reset in answer to the request follows
		proof  bool
	}{
		{name: "FIN before the request", before: true, fl: fin | ack},
		{name: "FIN crosses", fl: fin | ack, proof: true},
		{name: "FIN crosses, reset follows", fl: fin | ack, then: true, proof: true},
		{name: "reset with its number crosses", fl: rst | ack, proof: true},
		{name: "FIN lost, bare reset", fl: rst},
		{name: "FIN behind the request", fl: fin | ack, acked: true},
	} {
		for _, method := range []string{"GET", "POST"} {
			t.Run(c.name+", "+method, func(t *testing.T) {
				g, a := served(t)
				g.now += kept
				over := seg{fl: c.fl, seq: a.sseq, ack: a.sack}
				if c.fl == rst {
					over.ack = 0
				}
				if c.before {
					g.play(g.raw(a.srv, ep2(a.port), over))
				}
				req := method + " /b HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
				b := g.dial(c2, 7000)
				b.srv, b.port, b.sseq, b.sack = a.srv, a.port, a.sseq, a.sack
				b.ask(req, 5_000_000)
				if (b.port == a.port) == c.before || string(b.fromClient) != req {
					t.Fatalf("the request is %q on port %d, the idle connection's was %d", b.fromClient, b.port, a.port)
				}
				if !c.before {
					if c.acked {
						over.ack = b.sack
					}
					b.note(g.play(g.raw(a.srv, ep2(a.port), over)), 5_000_000)
					if c.then {
						b.note(g.play(g.raw(a.srv, ep2(a.port), seg{fl: rst, seq: a.sseq + 1})), 5_000_000)
					}
				}
				if !c.before && !c.proof && method == "POST" {
					if !strings.HasPrefix(string(b.fromServer), "HTTP/1.1 502 ") || g.e.Usage().Servers > 1 {
						t.Errorf("a POST whose fate is unknown: the client gets %q, %+v", b.fromServer, g.e.Usage())
					}
					return
				}
				if b.port == a.port || string(b.fromClient) != req {
					t.Fatalf("not redispatched: %q on port %d: %s", b.fromClient, b.port, g.counts())
				}
				want := marked(120, "B")
				if b.answer(want); string(b.fromServer) != want {
					t.Errorf("the client gets %q", b.fromServer)
				}
				proofs := g.e.Count.Get(ReasonRedispatchProof)
				if c.proof != (proofs == 1) || (!c.before && !c.proof) != (g.e.Count.Get(ReasonRedispatchIdempotent) == 1) {
					t.Errorf("redispatches: %s", g.counts())
				}
				if !c.before {
					return
				}
				// What was seen of the server's time is kept to.
				told := false
				for _, line := range g.wait(kept - millisecond) {
					told = told || strings.HasPrefix(line, "S1 FIN")
				}
				if !told {
					t.Errorf("the next idle connection is not closed before the server does: %s", g.counts())
				}
			})
		}
	}
}

// TestTCPSPWithoutSACK: a splicer that does not map SACK blocks gives the
// sender numbers of another space. They are mapped, and stripped for an end
// that did not agree on them.
func TestTCPSPWithoutSACK(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	a := g.dial(c1, 100)
	a.ask(get("/a", 60), 499)
	response := marked(5000, "A")
	first := a.sseq
	for off := 0; off < 3000; off += 1000 {
		g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack, seq: first + packet.Seq(off), ack: a.sack, data: response[off : off+1000]}))
	}
	blocks := packet.AppendSACKOption(nil, packet.SACKBlock{Left: a.cack + 1000, Right: a.cack + 3000})
	ev := Event{Kind: Packet, Data: g.raw(a.cli, vip, seg{fl: ack, seq: a.cseq, ack: a.cack, opts: blocks})}
	g.out.Reset()
	g.e.Step(g.now, &ev, &g.out)
	p, _ := packet.ParseTCP(ev.Data)
	off, n := p.SACK()
	if ev.Verdict != Rewrite || n != 1 {
		t.Fatalf("verdict %v, %d blocks", ev.Verdict, n)
	}
	if b := p.SACKBlock(off, 0); b.Left != first+1000 || b.Right != first+3000 {
		t.Errorf("the server is told %d..%d, want %d..%d", b.Left, b.Right, first+1000, first+3000)
	}
}

// TestDPVS835: a SYN-ACK with window zero, and a request that was held until
// then. Nothing is sent beyond the window; when it opens, the request goes out
// and is answered.
func TestDPVS835(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	a := g.dial(c1, 100)
	req := get("/a", 60)
	g.play(g.raw(a.cli, vip, seg{fl: ack | psh, seq: a.cseq, ack: a.cack, data: req}))
	a.srv, a.port, a.sseq, a.sack = s1, 10240, 500, 2000
	zero := func(s seg) []byte {
		p := g.raw(s1, ep2(10240), s)
		q, _ := packet.ParseTCP(p)
		q.SetWindow(0, packet.ChecksumUnknown)
		q.FillChecksum()
		return p
	}
	for _, s := range g.play(zero(seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})) {
		if s.dst == s1 && len(s.data) > 1 {
			t.Fatalf("%d bytes go into a window of zero", len(s.data))
		}
	}
	a.note(g.play(g.raw(s1, ep2(10240), seg{fl: ack, seq: 500, ack: 2000, win: 30_000})), nothing)
	for i := 0; len(a.fromClient) == 0 && i < 3; i++ {
		// The client's own timer, at the latest.
		g.now += second
		a.note(g.play(g.raw(a.cli, vip, seg{fl: ack | psh, seq: a.cseq, ack: a.cack, data: req})), nothing)
	}
	if string(a.fromClient) != req {
		t.Fatalf("the server got %q", a.fromClient)
	}
	a.cseq += packet.Seq(len(req))
	want := marked(10, "A")
	a.answer(want)
	if string(a.fromServer) != want {
		t.Errorf("the client got %q", a.fromServer)
	}
}

// TestCloseAtAnyMoment: a server's FIN or RST at every place of an exchange and
// behind it (the family of Envoy #2715, #6815 and #6190). A gets its response,
// or sees that it does not get all of it; the connection is never used for B,
// who gets exactly its own response, from a server that had its request once.
func TestCloseAtAnyMoment(t *testing.T) {
	response := marked(2500, "A")
	for _, kind := range []packet.Flags{fin | ack, rst, rst | ack} {
		for moment := range 6 {
			t.Run(fmt.Sprintf("%v at %d", kind, moment), func(t *testing.T) {
				g := newRig(t, oneServer, keepIdle)
				g.iss = []packet.Seq{1999, 700_000, 800_000}
				a := g.dial(c1, 100)
				a.ask(get("/a", 60), 499)
				over, told := false, false
				end := func(at int) {
					if at == moment {
						over = true
						all := g.play(g.raw(a.srv, ep2(a.port), seg{fl: kind, seq: a.sseq, ack: a.sack}))
						for _, s := range all {
							told = told || s.dst == a.cli && s.fl.Has(rst)
						}
						a.note(all, 499_000)
					}
				}
				port := a.port
				for off := 0; off < len(response) && !over; off += 1000 {
					end(off / 1000) // before each piece: 0, 1, 2
					if over {
						break
					}
					piece := response[off:min(off+1000, len(response))]
					a.note(g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack | psh, seq: a.sseq, ack: a.sack, data: piece})), nothing)
					a.sseq += packet.Seq(len(piece))
				}
				end(3) // the client has not acknowledged it
				a.note(g.play(g.raw(a.cli, vip, seg{fl: ack, seq: a.cseq, ack: a.cack})), nothing)
				end(4) // idle
				if moment >= 3 && string(a.fromServer) != response {
					t.Errorf("A gets %d of %d bytes", len(a.fromServer), len(response))
				}
				if moment > 0 && moment < 3 && (string(a.fromServer) != response[:moment*1000] || !told) {
					t.Errorf("A gets %d bytes of %d that were sent, told that there is no more: %v; %s", len(a.fromServer), moment*1000, told, g.counts())
				}
				b := g.dial(c2, 7000)
				b.srv, b.port, b.sseq, b.sack = a.srv, port, a.sseq, a.sack
				if moment == 5 { // it crosses B's request
					b.ask(get("/b", 70), 5_000_000)
					b.note(g.play(g.raw(a.srv, ep2(port), seg{fl: kind, seq: a.sseq, ack: a.sack})), 5_000_000)
				} else {
					b.ask(get("/b", 70), 5_000_000)
				}
				if b.port == port || string(b.fromClient) != get("/b", 70) {
					t.Fatalf("B's request is %q on port %d, A's was %d: %s", b.fromClient, b.port, port, g.counts())
				}
				want := marked(120, "B")
				b.answer(want)
				if string(b.fromServer) != want {
					t.Errorf("B gets %q", b.fromServer)
				}
			})
		}
	}
}
