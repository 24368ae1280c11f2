// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"strings"
	"testing"

	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// TestBeyondTheWindow: a segment with a server's addresses, a right
// acknowledgment and a place behind the window that the server was given says
// nothing about the response: the connection is used again. The controls: the
// same segment inside the window is doubt, which ends the connection in good
// order, and a bare acknowledgment there does not close the client's.
func TestBeyondTheWindow(t *testing.T) {
	for _, c := range []struct {
		name   string
		data   string
		off    func(v *splice.Server) packet.Size // from the end of the response
		reused bool
		stays  bool // the client's connection
	}{
		{"data behind the window", strings.Repeat("Z", 100), func(v *splice.Server) packet.Size { return v.RespEnd.To(v.RcvEdge) + 2 }, true, true},
		{"data far behind the window", "Z", func(*splice.Server) packet.Size { return 8 << 20 }, true, true},
		{"bare ACK behind the window", "", func(v *splice.Server) packet.Size { return v.RespEnd.To(v.RcvEdge) + 2 }, true, true},
		{"control: data in the window", strings.Repeat("Z", 100), func(*splice.Server) packet.Size { return 500 }, false, false},
		{"control: bare ACK in the window", "", func(*splice.Server) packet.Size { return 500 }, false, true},
		{"control: bare ACK at the end", "", func(*splice.Server) packet.Size { return 0 }, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newRig(t, oneServer, keepIdle)
			g.iss = []packet.Seq{1999, 700_000}
			a := g.dial(c1, 100)
			a.ask(get("/a", 60), 499)
			response := marked(3000, "A")
			a.note(g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack | psh, seq: a.sseq, ack: a.sack, data: response[:1000]})), nothing)
			v := g.e.servers.At(1)
			if v.State != splice.ServerActive || v.Flags&splice.ServerRespEnd == 0 {
				t.Fatalf("%v, flags %b", v.State, v.Flags)
			}
			end := a.sseq + packet.Seq(len(response))
			g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack, seq: end.Add(c.off(v)), ack: a.sack, data: c.data}))
			a.sseq += 1000
			a.answer(response[1000:])
			if string(a.fromServer) != response {
				t.Fatalf("the client gets %d of %d bytes", len(a.fromServer), len(response))
			}
			if kept := g.e.Usage().Clients == 1 && g.e.clients.At(1).State == splice.ClientHead; kept != c.stays {
				t.Errorf("the client's connection stays: %v", kept)
			}
			if _, reused := g.second(a); reused != c.reused {
				t.Errorf("used again: %v", reused)
			}
		})
	}
}

// TestIdleBeyondTheWindow: the same for a connection that nobody uses: it is
// not taken from the pool by bytes that its server could not have sent. The
// control: by bytes that it could, it is.
func TestIdleBeyondTheWindow(t *testing.T) {
	for _, inside := range []bool{false, true} {
		g, a := served(t)
		v := g.e.servers.At(1)
		at := v.RcvEdge.Add(2)
		if inside {
			at = v.RcvNxt.Add(100)
		}
		g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack | psh, seq: at, ack: a.sack, data: "Z"}))
		if _, reused := g.second(a); reused == inside {
			t.Errorf("inside the window %v: used again %v", inside, reused)
		}
	}
}

// TestConnectingFlood: a thousand acknowledgments that fit nothing, and SYN-ACKs
// to numbers that we never sent, on a connection in its handshake get an answer
// each half second, not each. The old connection that a real one is about is
// reset, and the handshake completes.
func TestConnectingFlood(t *testing.T) {
	rnd := seeded(t)
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	a := g.dial(c1, 100)
	req := get("/a", 60)
	g.play(g.raw(a.cli, vip, seg{fl: ack | psh, seq: a.cseq, ack: a.cack, data: req}))
	a.cseq += packet.Seq(len(req))
	answers, resets, asked := 0, 0, 0
	count := func(all []sent) {
		for _, s := range all {
			answers++
			if s.fl.Has(packet.RST) {
				resets++
			} else if s.fl.Has(packet.SYN) {
				asked++
			}
		}
	}
	const flood, pace = 1000, 2 * millisecond
	for i := range flood {
		s := seg{fl: ack, seq: packet.Seq(rnd.Uint32()), ack: packet.Seq(rnd.Uint32())}
		if i%2 == 1 {
			s.fl = syn | ack
		}
		if s.ack == 2000 {
			continue
		}
		count(g.play(g.raw(s1, ep2(10240), s)))
		g.now += pace
	}
	// RST and SYN for each half second, and the SYN's own repetitions.
	limit := int(flood*pace/challengeEvery) + 1
	if resets < 1 || resets > limit || answers > 2*limit+5 {
		t.Errorf("%d answers, %d of them resets, %d SYNs, to %d segments in %d ms", answers, resets, asked, flood, flood*pace/millisecond)
	}
	if g.e.Count.Get(ReasonChallengeACK) == 0 {
		t.Error("not counted")
	}
	a.srv, a.port, a.sseq, a.sack = s1, 10240, 500, 2000
	a.note(g.play(g.raw(s1, ep2(10240), seg{fl: syn | ack, seq: 499, ack: 2000, win: 65535, opts: sackPermitted})), nothing)
	if string(a.fromClient) != req {
		t.Fatalf("after the flood the server gets %q", a.fromClient)
	}
	want := marked(100, "A")
	a.answer(want)
	if string(a.fromServer) != want {
		t.Errorf("the client gets %q", a.fromServer)
	}
}
