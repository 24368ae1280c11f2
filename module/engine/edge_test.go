// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"strings"
	"testing"

	"github.com/weirgate/weir/module/packet"
)

// TestLostReset: a reset that truncates a response is repeated by itself,
// because nobody acknowledges a reset, and a client that waits for the rest
// says nothing. What the client says meanwhile is answered with one too.
func TestLostReset(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: resp(300)[:200]})
	g.client(c1, seg{fl: ack, seq: seq + 50, ack: a + 200})
	out := g.server(s1, 10240, seg{fl: fin | ack, seq: 700, ack: 2050})
	resets := func(out []string) (n int) {
		for _, line := range out {
			if strings.HasPrefix(line, "C1 RST:9201") {
				n++
			}
		}
		return n
	}
	if resets(out) != 1 {
		t.Fatalf("the truncation leads to %q", out)
	}
	if out := g.wait(5 * second); resets(out) != resetTries {
		t.Errorf("afterwards, without a word of the client: %q", out)
	}
	if n := g.e.Usage().Clients; n != 0 {
		t.Errorf("%d records are left", n)
	}
	g.idle(0)
}

// TestAfterReset: while a reset may have to be repeated, the client's segments
// are answered with resets, its own reset ends it, and a new connection on its
// port takes its place.
func TestAfterReset(t *testing.T) {
	truncate := func() (*rig, packet.Seq, packet.Seq) {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{1999, 7999}
		seq, a := g.open(c1, 100, 9000)
		g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
		g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
		g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: resp(300)[:200]})
		g.server(s1, 10240, seg{fl: fin | ack, seq: 700, ack: 2050})
		if g.e.Usage().Clients != 1 {
			t.Fatal("the record is gone at once")
		}
		return g, seq, a
	}
	g, seq, a := truncate()
	g.expect("a late acknowledgment", g.client(c1, seg{fl: ack, seq: seq + 50, ack: a + 100}), "C1 RST:9101,0(0)")
	g.expect("its reset", g.client(c1, seg{fl: rst, seq: seq + 50}))
	if g.e.Usage().Clients != 0 {
		t.Error("a reset of the client's does not end it")
	}
	g.idle(0)

	g, _, _ = truncate()
	seq, a = g.open(c1, 5_000_000, 90_000_000)
	if out := g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)}); len(out) != 1 || !strings.HasPrefix(out[0], "S1 SYN") {
		t.Errorf("a new connection on the port leads to %q", out)
	}
	for _, line := range g.wait(second) {
		if strings.HasPrefix(line, "C1 RST") {
			t.Errorf("the new connection is reset: %q", line)
		}
	}
	g.client(c1, seg{fl: rst, seq: seq + 50})
}

// TestBeyondEdge: of a segment that reaches beyond the server's window, the
// server gets what it has room for. A client that cuts its segments once, and
// sends them again as they were, would never get further otherwise.
func TestBeyondEdge(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	head := "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2000\r\n\r\n"
	n := packet.Seq(len(head))
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: head})
	// Without a window scale: the field is the window, the head and 400 bytes.
	plain := packet.AppendSYNOptions(nil, packet.SYNOptions{MSS: 1460, WindowScale: -1, SACKPermitted: true})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, win: uint16(n) + 400, opts: plain})
	g.server(s1, 10240, seg{fl: ack, seq: 500, ack: 2000 + n, win: 400})
	body := strings.Repeat("b", 1000)
	for range 2 { // as it was, again
		out := g.client(c1, seg{fl: ack | psh, seq: seq + n, ack: a, data: body})
		if len(out) == 0 || !strings.HasSuffix(out[0], "(400)") || !strings.HasPrefix(out[0], "S1 DATA:") {
			t.Fatalf("the server, with room for 400 bytes, gets %q", out)
		}
		for _, line := range out[1:] {
			if !strings.HasPrefix(line, "S1 ACK") {
				t.Errorf("and %q", line)
			}
		}
	}
	g.server(s1, 10240, seg{fl: ack, seq: 500, ack: 2400 + n, win: 5000})
	out := g.client(c1, seg{fl: ack | psh, seq: seq + n, ack: a, data: body})
	if len(out) != 1 || !strings.HasPrefix(out[0], "S1 DATA:") || !strings.HasSuffix(out[0], "(1000)") {
		t.Errorf("with room for all of it, the server gets %q", out)
	}
	// A closed window, and then all of it beyond: it is asked, nothing more.
	g.server(s1, 10240, seg{fl: ack, seq: 500, ack: 3000 + n, win: 1})
	out = g.client(c1, seg{fl: ack | psh, seq: seq + n + 1000 + 5000, ack: a, data: body[:500]})
	for _, line := range out {
		if strings.Contains(line, "DATA") {
			t.Errorf("beyond the window the server gets %q", line)
		}
	}
	g.client(c1, seg{fl: rst, seq: seq + n + 1000})
}

// TestFarBehind: a client repeats what the server lacks though it lies farther
// behind its newest byte than most windows are large: much of its next request
// is held already. It is not taken for a stranger's segment.
func TestFarBehind(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	const size = 100_000
	head := "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
	n := packet.Seq(len(head))
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: head})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	g.server(s1, 10240, seg{fl: ack, seq: 500, ack: 2000 + n, win: 2000}) // scale 7
	piece := strings.Repeat("b", 1000)
	for at := packet.Seq(0); at < size; at += 1000 {
		g.client(c1, seg{fl: ack | psh, seq: seq + n + at, ack: a, data: piece})
	}
	// The server lacks the first piece, and acknowledges none of the others.
	g.expect("repeated", g.client(c1, seg{fl: ack | psh, seq: seq + n, ack: a, data: piece}), "S1 DATA:2053,500(1000)")
	if n := g.e.Count.Get(ReasonOutOfWindow); n != 0 {
		t.Errorf("%d segments were out of the window", n)
	}
	g.client(c1, seg{fl: rst, seq: seq + n + size})
}

// TestErrorAboutOldSegment: the server has a segment, its acknowledgment was
// lost, and the path became narrow. The error about the repetition counts, or
// it would be swallowed for ever; one about any other old number does not.
func TestErrorAboutOldSegment(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	head := "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3000\r\n\r\n"
	n := packet.Seq(len(head))
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: head})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	g.server(s1, 10240, seg{fl: ack, seq: 500, ack: 2000 + n})
	piece := strings.Repeat("b", 1300)
	g.client(c1, seg{fl: ack | psh, seq: seq + n, ack: a, data: piece})
	g.server(s1, 10240, seg{fl: ack, seq: 500, ack: 2000 + n + 1300}) // lost on its way on
	tell := func(at packet.Seq) {
		t.Helper()
		about := g.raw(ep2(10240), s1, seg{fl: ack, seq: at, ack: 500, data: piece})
		g.out.Reset()
		ev := Event{Kind: ICMP, Data: icmpTooBig(snip, about, 1000)}
		g.e.Step(g.now, &ev, &g.out)
	}
	again := seg{fl: ack | psh, seq: seq + n, ack: a, data: piece}
	g.expect("repeated", g.client(c1, again), "S1 DATA:2051,500(1300)")
	tell(2000 + n - 10)
	g.expect("another old number", g.client(c1, again), "S1 DATA:2051,500(1300)")
	tell(2000 + n)
	g.expect("its own number", g.client(c1, again), "S1 DATA:2051,500(960)", "S1 DATA:3011,500(340)")
	g.client(c1, seg{fl: rst, seq: seq + n + 1300})
}
