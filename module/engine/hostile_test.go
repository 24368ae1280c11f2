// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
)

// seeded returns a generator whose seed is printed, and replayed when
// WEIR_SEED names one.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("WEIR_SEED"); s != "" {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("WEIR_SEED: %v", err)
		}
		seed = v
	}
	t.Logf("WEIR_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// sent is one packet that an engine let out.
type sent struct {
	src, dst  netip.AddrPort
	fl        packet.Flags
	seq, ack  packet.Seq
	win       uint16
	data      []byte
	hasBlocks bool
}

// play gives an engine one packet and returns what it lets out, checked as
// describe does, without a text of it.
func (g *rig) play(b []byte) []sent {
	g.t.Helper()
	g.out.Reset()
	ev := Event{Kind: Packet, Data: append(make([]byte, 0, len(b)+256), b...)}
	g.e.Step(g.now, &ev, &g.out)
	return g.gather(&ev)
}

func (g *rig) gather(ev *Event) []sent {
	g.t.Helper()
	var all []sent
	take := func(b []byte) {
		p, problem := packet.ParseTCP(b)
		if problem != packet.OK || !p.IPHeaderOK() || !p.VerifyChecksum() {
			g.t.Fatalf("the engine let out a packet that its receiver would drop: %v", problem)
		}
		_, blocks := p.SACK()
		src, dst := p.Src(), p.Dst()
		all = append(all, sent{src.AddrPort(), dst.AddrPort(), p.Flags(), p.Seq(), p.Ack(), p.Window(), bytes.Clone(p.Payload()), blocks > 0})
	}
	for i := range g.out.Len() {
		take(g.out.Packet(i))
	}
	if ev != nil && ev.Verdict == Rewrite {
		take(ev.Data)
	}
	return all
}

// A pair is one client with the server connection that its request got. The
// numbers are what the next segment of each end carries.
type pair struct {
	g          *rig
	cli, srv   netip.AddrPort
	isn        packet.Seq
	cseq, cack packet.Seq
	port       uint16
	sseq, sack packet.Seq
	fromClient []byte // what the server got
	fromServer []byte // what the client got
}

// user is the n-th client of a crowd.
func user(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, byte(1 + n/50000), byte(n / 200 % 250)}), uint16(20000+n%200))
}

// dial opens a client's connection.
func (g *rig) dial(cli netip.AddrPort, isn packet.Seq) *pair {
	g.t.Helper()
	iss := isn*2654435761 + 77
	g.cookies[isn] = iss
	g.SYN(cli, isn)
	g.play(g.raw(cli, vip, seg{fl: ack, seq: isn + 1, ack: iss + 1}))
	return &pair{g: g, cli: cli, isn: isn, cseq: isn + 1, cack: iss + 1}
}

// ask sends a request in one segment and, where a server connection is opened
// for it, completes that one's handshake with the given ISN.
func (p *pair) ask(req string, serverISN packet.Seq) {
	p.g.t.Helper()
	p.note(p.g.play(p.g.raw(p.cli, vip, seg{fl: ack | psh, seq: p.cseq, ack: p.cack, data: req})), serverISN)
	p.cseq += packet.Seq(len(req))
}

// note takes in what was let out because of this pair.
func (p *pair) note(all []sent, serverISN packet.Seq) {
	p.g.t.Helper()
	for _, s := range all {
		switch {
		case s.src.Addr() == snip && s.fl.Has(packet.SYN):
			p.srv, p.port, p.fromClient = s.dst, s.src.Port(), nil
			p.sseq, p.sack = serverISN+1, s.seq+1
			p.note(p.g.play(p.g.raw(p.srv, ep2(p.port), seg{fl: syn | ack, seq: serverISN, ack: p.sack, win: 65535, opts: sackPermitted})), serverISN)
		case s.src.Addr() == snip && len(s.data) > 0 && !s.fl.Has(packet.RST):
			if s.src.Port() != p.port {
				p.srv, p.port, p.fromClient = s.dst, s.src.Port(), nil
				p.sseq, p.sack = s.ack, s.seq
			}
			p.sack, p.fromClient = receive(p.sack, p.fromClient, &s)
		case s.dst == p.cli && len(s.data) > 0:
			p.cack, p.fromServer = receive(p.cack, p.fromServer, &s)
		}
	}
}

// receive takes in what is next in order, as a TCP does.
func receive(next packet.Seq, got []byte, s *sent) (packet.Seq, []byte) {
	end := s.seq.Add(packet.Size(len(s.data)))
	if next.Less(s.seq) || !next.Less(end) {
		return next, got
	}
	return end, append(got, s.data[s.seq.To(next):]...)
}

// answer lets the server send a response, in pieces of at most 1,000 bytes,
// and the client acknowledge it.
func (p *pair) answer(data string) {
	p.g.t.Helper()
	for len(data) > 0 {
		n := min(len(data), 1000)
		p.note(p.g.play(p.g.raw(p.srv, ep2(p.port), seg{fl: ack | psh, seq: p.sseq, ack: p.sack, data: data[:n]})), 0)
		p.sseq += packet.Seq(n)
		data = data[n:]
	}
	p.note(p.g.play(p.g.raw(p.cli, vip, seg{fl: ack, seq: p.cseq, ack: p.cack})), 0)
}

// hangUp closes the client's side in good order.
func (p *pair) hangUp() {
	p.g.t.Helper()
	p.g.play(p.g.raw(p.cli, vip, seg{fl: fin | ack, seq: p.cseq, ack: p.cack}))
	p.g.play(p.g.raw(p.cli, vip, seg{fl: ack, seq: p.cseq + 1, ack: p.cack + 1}))
}

// marked is a response of about n bytes whose body is one letter.
func marked(n int, letter string) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", n) + strings.Repeat(letter, n)
}

// TestStraddlingRetransmission: a server whose last acknowledgment was lost
// repeats segments that hold the tail of A's response and the head of B's, cut
// anywhere, in any order. B's response is complete, and no byte of A is in it.
func TestStraddlingRetransmission(t *testing.T) {
	rnd := seeded(t)
	const crafted = 5000
	both := 0 // segments with bytes of both
	n := 0
	for n < crafted {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{packet.Seq(rnd.Uint32())}
		a := g.dial(c1, packet.Seq(rnd.Uint32()))
		a.ask(get("/a", 60), packet.Seq(rnd.Uint32()))
		respA := marked(200+rnd.IntN(2500), "A")
		a.answer(respA)
		if string(a.fromServer) != respA {
			t.Fatalf("A got %d of %d bytes", len(a.fromServer), len(respA))
		}
		b := g.dial(c2, packet.Seq(rnd.Uint32()))
		b.srv, b.port, b.sseq, b.sack = a.srv, a.port, a.sseq, a.sack
		b.ask(get("/b", 70), 0)
		if b.port != a.port || len(b.fromClient) != 70 {
			t.Fatalf("B's request did not take A's connection: %+v", b)
		}
		respB := marked(200+rnd.IntN(2500), "B")
		base := b.sseq
		stream := respA + respB
		at := func(off int) packet.Seq { return base + packet.Seq(off-len(respA)) }
		sent := 0 // of B's response, in order
		for sent < len(respB) && n < crafted {
			n++
			// From somewhere in A, or in what B has already, a little beyond.
			from := rnd.IntN(len(respA) + sent + 1)
			if rnd.IntN(2) == 0 {
				from = len(respA) - min(len(respA), rnd.IntN(100))
			}
			to := min(len(stream), max(from+1, len(respA)+sent+rnd.IntN(200)), from+1400)
			if from < len(respA) && to > len(respA) {
				both++
			}
			got := g.play(g.raw(b.srv, ep2(b.port), seg{fl: ack | psh, seq: at(from), ack: b.sack, data: stream[from:to]}))
			if bytesOf(got, b.cli, "A") {
				t.Fatalf("straddling %d..%d: bytes of A leave toward B", from-len(respA), to-len(respA))
			}
			b.note(got, 0)
			if to > len(respA)+sent && from <= len(respA)+sent {
				sent = to - len(respA)
			}
			if string(b.fromServer) != respB[:len(b.fromServer)] {
				t.Fatalf("straddling %d..%d: B has %q", from-len(respA), to-len(respA), b.fromServer)
			}
			b.note(g.play(g.raw(b.cli, vip, seg{fl: ack, seq: b.cseq, ack: b.cack})), 0)
		}
		if sent == len(respB) && string(b.fromServer) != respB {
			t.Fatalf("B got %d of %d bytes", len(b.fromServer), len(respB))
		}
	}
	if both < crafted/10 {
		t.Errorf("only %d of %d segments held bytes of both", both, crafted)
	}
	t.Logf("%d crafted, %d with bytes of both responses", n, both)

	// The negative control: without the epoch filter, translation alone puts
	// bytes of A into segments for B, and the check sees them.
	g, a := served(t)
	b := g.dial(c2, 7000)
	b.srv, b.port, b.sseq, b.sack = a.srv, a.port, a.sseq, a.sack
	b.ask(get("/b", 70), 0)
	v := g.e.servers.At(g.e.servers.Lookup(&packet.Tuple{Src: ep(b.srv), Dst: ep(ep2(b.port))}))
	v.RcvBase = v.RcvBase.Sub(50)
	straddling := strings.Repeat("A", 50) + marked(100, "B")
	if !bytesOf(g.play(g.raw(b.srv, ep2(b.port), seg{fl: ack | psh, seq: b.sseq - 50, ack: b.sack, data: straddling})), b.cli, "A") {
		t.Error("without the filter nothing is found: the check sees nothing")
	}
}

// bytesOf reports whether data that leave toward a client hold ten times that
// letter, in a row.
func bytesOf(all []sent, client netip.AddrPort, letter string) bool {
	for _, s := range all {
		if s.dst == client && bytes.Contains(s.data, []byte(strings.Repeat(letter, 10))) {
			return true
		}
	}
	return false
}

// TestLateBytesReachNobody: bytes of A's exchange that come after A is gone,
// at any moment, never reach B, and B is not served by that connection while
// there is doubt about it.
func TestLateBytesReachNobody(t *testing.T) {
	rnd := seeded(t)
	for n := range 2000 {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{packet.Seq(rnd.Uint32()), packet.Seq(rnd.Uint32()), packet.Seq(rnd.Uint32())}
		a := g.dial(c1, packet.Seq(rnd.Uint32()))
		a.ask(get("/a", 60), packet.Seq(rnd.Uint32()))
		respA := marked(100+rnd.IntN(3000), "A")
		late := "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nAAAA"
		when := rnd.IntN(3)
		switch when {
		case 0: // A leaves before its response: what comes is drained
			g.play(g.raw(a.cli, vip, seg{fl: rst, seq: a.cseq}))
		case 1: // a second response, while the connection is idle
			a.answer(respA)
			a.hangUp()
			g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack | psh, seq: a.sseq, ack: a.sack, data: late}))
		case 2: // a second response that crosses B's request
			a.answer(respA)
		}
		b := g.dial(c2, packet.Seq(rnd.Uint32()))
		if when == 2 {
			b.srv, b.port, b.sseq, b.sack = a.srv, a.port, a.sseq, a.sack
		}
		b.ask(get("/b", 70), packet.Seq(rnd.Uint32()))
		if when != 2 && b.port == a.port {
			t.Fatalf("trial %d: B is served by a connection in doubt", n)
		}
		old := b.port
		switch when {
		case 0:
			b.note(g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack | psh, seq: a.sseq, ack: a.sack, data: respA[:100]})), 0)
		case 2:
			// It acknowledges nothing of B's request, so it was sent before.
			b.note(g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack | psh, seq: a.sseq, ack: a.sack, data: late})), packet.Seq(rnd.Uint32()))
			if b.port == old {
				t.Fatalf("trial %d: B stays on the connection", n)
			}
		}
		respB := marked(150, "B")
		b.answer(respB)
		if string(b.fromServer) != respB || len(b.fromClient) != 70 {
			t.Fatalf("trial %d, case %d: B got %q, its server %q", n, when, b.fromServer, b.fromClient)
		}
	}
}

// TestBlindInjection: a million resets, SYNs, data segments, FINs and bare
// acknowledgments with right addresses and drawn numbers, from either side,
// while a head is incomplete, a server connection is opened, a request and its
// response run, and both connections are idle. None breaks anything, none adds
// a byte.
func TestBlindInjection(t *testing.T) {
	rnd := seeded(t)
	total := 1_000_000
	if testing.Short() {
		total = 100_000
	}
	const flows = 50
	kinds := []packet.Flags{rst, rst | ack, syn, syn | ack, ack | psh, ack, fin | ack}
	junk := strings.Repeat("Z", 500)
	per := total / flows
	retired, played := 0, 0
	for f := range flows {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{packet.Seq(rnd.Uint32()), packet.Seq(rnd.Uint32())}
		a := g.dial(user(f), packet.Seq(rnd.Uint32()))
		request, response := get("/blind", 1200, "X-Pad: "+strings.Repeat("p", 1000)+"\r\n"), marked(40_000, "A")
		blind := func(n int) {
			for range n {
				s := seg{fl: kinds[rnd.IntN(len(kinds))], seq: packet.Seq(rnd.Uint32()), ack: packet.Seq(rnd.Uint32())}
				if s.fl.Has(ack | psh) {
					s.data = junk
				}
				src, dst := a.cli, vip
				if a.port != 0 && rnd.IntN(2) == 0 {
					src, dst = a.srv, ep2(a.port)
				}
				g.out.Reset()
				if played++; s.fl == syn && dst == vip {
					g.hs.SYN(g.now, g.raw(src, dst, s), packet.ChecksumUnknown, &g.out) // it never comes to a shard
				} else {
					ev := Event{Kind: Packet, Data: append(make([]byte, 0, 2048), g.raw(src, dst, s)...)}
					g.e.Step(g.now, &ev, &g.out)
				}
				g.now += millisecond / 10
			}
		}
		a.note(g.play(g.raw(a.cli, vip, seg{fl: ack | psh, seq: a.cseq, ack: a.cack, data: request[:600]})), 4242)
		a.cseq += 600
		blind(per / 5)
		all := g.play(g.raw(a.cli, vip, seg{fl: ack | psh, seq: a.cseq, ack: a.cack, data: request[600:]}))
		a.cseq += packet.Seq(len(request) - 600)
		// An early acknowledgment of what is held may be due.
		all = slices.DeleteFunc(all, func(s sent) bool { return s.dst == a.cli && s.fl == ack && len(s.data) == 0 })
		if len(all) != 1 || !all[0].fl.Has(syn) {
			t.Fatalf("flow %d: a complete head gives %+v", f, all)
		}
		a.srv, a.port = all[0].dst, all[0].src.Port()
		blind(per / 5)
		a.note(all, 4242)
		blind(per / 5)
		for off := 0; off < len(response); off += 1000 {
			end := min(off+1000, len(response))
			a.note(g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack | psh, seq: a.sseq, ack: a.sack, data: response[off:end]})), 0)
			a.sseq += packet.Seq(end - off)
			blind(per / 200)
		}
		if string(a.fromClient) != request {
			t.Fatalf("flow %d: the server got %d bytes, not the request of %d; %v, %+v, %v", f, len(a.fromClient), len(request), a, g.e.Usage(), g.counts())
		}
		if string(a.fromServer) != response {
			t.Fatalf("flow %d: the client got %d bytes that are not the response of %d", f, len(a.fromServer), len(response))
		}
		if u := g.e.Usage(); u.Idle != 0 || u.Servers != 1 {
			t.Fatalf("flow %d: the exchange counts as over before the client has the response: %+v", f, u)
		}
		a.note(g.play(g.raw(a.cli, vip, seg{fl: ack, seq: a.cseq, ack: a.cack})), 0)
		if g.e.Count.Get(ReasonExtraBytes) > 0 {
			// A guess that lies in both windows is doubt, as from any server:
			// the connection ends after the response, in good order.
			if retired++; retired > flows/5 {
				t.Fatalf("%d connections were retired for guessed bytes", retired)
			}
			continue
		}
		port := a.port
		blind(per / 5)
		if u := g.e.Usage(); u.Idle != 1 || u.Clients != 1 {
			t.Fatalf("flow %d: after the exchange: %+v; %v", f, u, g.counts())
		}
		a.fromClient, a.fromServer = nil, nil
		a.ask(get("/next", 80), 0)
		a.answer(marked(100, "N"))
		if string(a.fromServer) != marked(100, "N") || a.port != port {
			t.Fatalf("flow %d: the next request gets %q on port %d, was %d", f, a.fromServer, a.port, port)
		}
		if g.e.Count.Get(ReasonBlindReset) == 0 {
			t.Fatalf("flow %d: no reset was recognised as blind", f)
		}
		// The negative control: the same reset with the right number counts.
		g.play(g.raw(a.cli, vip, seg{fl: rst, seq: a.cseq}))
		if u := g.e.Usage(); u.Clients != 0 {
			t.Fatalf("flow %d: a true reset changes nothing: %+v", f, u)
		}
	}
	t.Logf("%d forged segments, %d connections retired", played, retired)
	if played < total-retired*per {
		t.Errorf("only %d of %d were played", played, total)
	}
}

// TestDesynchronisingACK: one forged acknowledgment in each of a thousand
// running exchanges, with every plausible lie. The ends answer as real TCPs
// do; no flow sees more than ten packets because of it, and all complete.
func TestDesynchronisingACK(t *testing.T) {
	rnd := seeded(t)
	most := 0
	for f := range 1000 {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{packet.Seq(rnd.Uint32())}
		a := g.dial(c1, packet.Seq(rnd.Uint32()))
		a.ask(get("/", 100), packet.Seq(rnd.Uint32()))
		response := marked(4000, "A")
		a.note(g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack | psh, seq: a.sseq, ack: a.sack, data: response[:1000]})), 0)
		a.sseq += 1000
		a.note(g.play(g.raw(a.cli, vip, seg{fl: ack, seq: a.cseq, ack: a.cack})), 0)
		lie := packet.Seq(1 + rnd.IntN(100_000))
		forged := seg{fl: ack, seq: a.cseq, ack: a.cack}
		src, dst := a.cli, vip
		if f%2 == 1 {
			forged = seg{fl: ack, seq: a.sseq, ack: a.sack}
			src, dst = a.srv, ep2(a.port)
		}
		switch f / 2 % 4 {
		case 0:
			forged.seq += lie
		case 1:
			forged.seq -= lie
		case 2:
			forged.ack += lie
		case 3:
			forged.ack -= lie
		}
		// Real ends: a segment whose numbers are not acceptable, or an
		// acknowledgment of what was never sent, is answered with an ACK.
		passed := a.converse(g.play(g.raw(src, dst, forged)))
		most = max(most, passed)
		if passed > 10 {
			t.Fatalf("flow %d: %d packets after one forged acknowledgment", f, passed)
		}
		g.now += second
		a.answer(response[1000:])
		if string(a.fromServer) != response {
			t.Fatalf("flow %d (%+v): the client got %d of %d bytes", f, forged, len(a.fromServer), len(response))
		}
	}
	t.Logf("at most %d packets after a forged acknowledgment", most)

	// The negative control: with a wrong delta, as a bug would leave it, one
	// acknowledgment sets both ends talking. The count stops that too; without
	// the count it has no end, and the test sees it.
	for _, defended := range []bool{true, false} {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{1999}
		a := g.dial(c1, 100)
		a.ask(get("/", 100), 499)
		c := g.e.clients.At(g.e.clients.Lookup(&packet.Tuple{Src: ep(a.cli), Dst: ep(vip)}))
		c.Epoch.RespBase, c.Epoch.SndBase = c.Epoch.RespBase.Sub(3), c.Epoch.SndBase.Sub(3)
		n := a.converse(g.play(g.raw(a.cli, vip, seg{fl: ack, seq: a.cseq, ack: a.cack})), func() {
			if !defended {
				c.Loop = 0
			}
		})
		if (n <= 10) != defended {
			t.Errorf("a wrong delta, repeated ACKs counted: %v: %d packets", defended, n)
		}
	}
}

// converse lets both ends answer as TCPs do whose numbers are not met, and
// returns how many packets that takes, a hundred at most. each is called before
// every one.
func (p *pair) converse(queue []sent, each ...func()) (passed int) {
	p.g.t.Helper()
	for len(queue) > 0 && passed < 100 {
		for _, f := range each {
			f()
		}
		s := queue[0]
		queue = queue[1:]
		passed++
		switch {
		case s.dst == p.cli:
			if s.seq != p.cack || p.cseq.Less(s.ack) {
				queue = append(queue, p.g.play(p.g.raw(p.cli, vip, seg{fl: ack, seq: p.cseq, ack: p.cack}))...)
			}
		case s.dst == p.srv:
			if s.seq != p.sack || p.sseq.Less(s.ack) {
				queue = append(queue, p.g.play(p.g.raw(p.srv, ep2(p.port), seg{fl: ack, seq: p.sseq, ack: p.sack}))...)
			}
		}
	}
	return passed
}

// TestOptimisticACK: acknowledgments of bytes that were never sent neither
// complete a response nor reach the server.
func TestOptimisticACK(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	a := g.dial(c1, 100)
	a.ask(get("/", 100), 499)
	response := marked(9000, "A")
	a.note(g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack | psh, seq: a.sseq, ack: a.sack, data: response[:1000]})), 0)
	sent := a.sseq + 1000
	for ahead := packet.Seq(1); ahead < 20_000; ahead += 37 {
		for _, s := range g.play(g.raw(a.cli, vip, seg{fl: ack, seq: a.cseq, ack: a.cack + ahead})) {
			if s.dst == a.srv && sent.Less(s.ack) {
				t.Fatalf("the server is told that %d bytes arrived that it never sent", sent.To(s.ack))
			}
		}
		g.now += millisecond
	}
	if u := g.e.Usage(); u.Idle != 0 {
		t.Fatalf("the response counts as delivered: %+v", u)
	}
	if g.e.Count.Get(ReasonAckBeyond) == 0 {
		t.Error("not counted")
	}
	a.sseq += 1000
	a.answer(response[1000:])
	if string(a.fromServer) != response || g.e.Usage().Idle != 1 {
		t.Errorf("the client got %d bytes, %+v", len(a.fromServer), g.e.Usage())
	}
}

// TestOneByteSegments: a hostile pair that speaks one byte at a time, each one
// twice, is served like any other.
func TestOneByteSegments(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	a := g.dial(c1, 100)
	req, response := get("/", 60), marked(400, "A")
	for i := range len(req) {
		for range 2 {
			a.note(g.play(g.raw(a.cli, vip, seg{fl: ack, seq: a.cseq + packet.Seq(i), ack: a.cack, data: req[i : i+1]})), 499)
		}
	}
	a.cseq += packet.Seq(len(req))
	if string(a.fromClient) != req {
		t.Fatalf("the server got %q", a.fromClient)
	}
	for i := range len(response) {
		for range 2 {
			a.note(g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack, seq: a.sseq + packet.Seq(i), ack: a.sack, data: response[i : i+1]})), 0)
		}
	}
	a.sseq += packet.Seq(len(response))
	a.note(g.play(g.raw(a.cli, vip, seg{fl: ack, seq: a.cseq, ack: a.cack})), 0)
	if string(a.fromServer) != response {
		t.Fatalf("the client got %q", a.fromServer)
	}
	a.hangUp()
	g.idle(1)
}

// TestLongHeadByteByByte: the largest head that is accepted, one byte in a
// segment, is served; one byte more is refused. BenchmarkHeadByteByByte says
// what a byte costs.
func TestLongHeadByteByByte(t *testing.T) {
	limit := int(http1.DefaultLimits().Head)
	for _, size := range []int{limit, limit + 1} {
		g := newRigOf(t, 16, oneServer, keepIdle)
		k := newChat(g, c1, 100)
		head := longHead(size)
		k.cut(head, 1)
		if size > limit {
			if !strings.HasPrefix(string(k.got), "HTTP/1.1 431 ") || len(k.order) != 0 {
				t.Errorf("%d bytes: %q, %d server connections", size, k.got, len(k.order))
			}
			continue
		}
		k.want("the server", string(k.server(0).got), head)
		k.reply(k.server(0), okEmpty)
		if string(k.got) != okEmpty || k.pooled() != 1 {
			t.Errorf("%d bytes: %q, %d pooled", size, k.got, k.pooled())
		}
	}
}

// longHead is a request head of n bytes.
func longHead(n int) string {
	const start, end = "GET / HTTP/1.1\r\nHost: a\r\nX: ", "\r\n\r\n"
	return start + strings.Repeat("x", n-len(start)-len(end)) + end
}

// TestStatelessFlood: data, ACK, FIN and RST segments of connections that
// never were leave nothing behind, and answers are limited.
func TestStatelessFlood(t *testing.T) {
	rnd := seeded(t)
	g := newRig(t, oneServer, keepIdle)
	real := MACCookies{k0: rnd.Uint64(), k1: rnd.Uint64()}
	g.hs.Cookies = &real
	before := g.e.Usage()
	answers := 0
	const packets = 200_000
	for i := range packets {
		s := seg{fl: []packet.Flags{ack, ack | psh, fin | ack, rst, rst | ack}[i%5], seq: packet.Seq(rnd.Uint32()), ack: packet.Seq(rnd.Uint32())}
		if i%5 == 1 {
			s.data = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
		}
		g.out.Reset()
		ev := Event{Kind: Packet, Data: g.raw(user(rnd.IntN(1_000_000)), vip, s)}
		g.e.Step(g.now, &ev, &g.out)
		answers += g.out.Len()
		g.now += 50_000 // 20,000 a second
	}
	if u := g.e.Usage(); u != before {
		t.Errorf("the flood left %+v, before %+v", u, before)
	}
	seconds := int(packets * 50_000 / second)
	if answers > (seconds+2)*1000 { // the rate limit of stateless resets
		t.Errorf("%d answers in %d seconds", answers, seconds)
	}
	if g.e.Count.Get(ReasonResetLimit) == 0 {
		t.Errorf("the limit of resets is not counted: %s", g.counts())
	}
	// A second later, resets are to be had again.
	g.now += second
	if got := g.play(g.raw(c2, vip, seg{fl: ack | psh, seq: 1, ack: 2, data: "x"})); len(got) != 1 || !got[0].fl.Has(rst) {
		t.Errorf("after the flood a stray segment gets %+v", got)
	}
	// The negative control: a request behind a true handshake gets a record.
	g.hs.Cookies = g.cookies
	a := g.dial(c1, 100)
	a.ask(get("/", 60), 499)
	if g.e.Usage().Clients != 1 {
		t.Error("a true client gets no record")
	}
}

// A text for a failing exchange.
func (p *pair) String() string {
	return fmt.Sprintf("%v %d,%d ↔ %v:%d %d,%d", p.cli, p.cseq, p.cack, p.srv, p.port, p.sseq, p.sack)
}

// small shrinks an engine to its limits.
func small(pool func(*farm.PoolLimits)) func(*farm.Spec) {
	return func(s *farm.Spec) { pool(&s.Farms[0].Pool) }
}

// counts lists the counters that are not zero.
func (g *rig) counts() string {
	var b strings.Builder
	for r := range Reason(Reasons) {
		if n := g.e.Count.Get(r); n > 0 {
			fmt.Fprintf(&b, "%v %d ", r, n)
		}
	}
	return b.String()
}
