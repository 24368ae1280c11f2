// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/weirgate/weir/internal/corpora"
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
)

// The corpora as TCP streams: whole, one byte in a segment, cut at random, out
// of order, overlapping. What comes of a stream must not depend on its segments:
// which messages reach a server, which is refused, what is pooled.

// A piece is a segment's place in a stream.
type piece struct{ lo, hi int }

// segments cuts a stream of n bytes.
func segments(n int, size func(left int) int) (out []piece) {
	for at := 0; at < n; {
		k := min(max(size(n-at), 1), n-at)
		out = append(out, piece{at, at + k})
		at += k
	}
	return out
}

// A way is a manner of cutting.
type way struct {
	name string
	cut  func(n int, rnd *rand.Rand) []piece
}

func randomCut(n int, rnd *rand.Rand) []piece {
	return segments(n, func(left int) int { return 1 + rnd.IntN(1+rnd.IntN(min(left, 64))) })
}

// ways are those that every case is played in. The first one is whole.
var ways = append([]way{
	{"whole", func(n int, _ *rand.Rand) []piece { return segments(n, func(int) int { return 1000 }) }},
	{"one byte", func(n int, _ *rand.Rand) []piece { return segments(n, func(int) int { return 1 }) }},
	{"backwards", func(n int, rnd *rand.Rand) []piece {
		p := randomCut(n, rnd)
		slices.Reverse(p)
		return p
	}},
}, slices.Concat(slices.Repeat([]way{{"cut", randomCut}}, 50), slices.Repeat([]way{
	{"reordered", func(n int, rnd *rand.Rand) []piece {
		p := randomCut(n, rnd)
		rnd.Shuffle(len(p), func(i, j int) { p[i], p[j] = p[j], p[i] })
		return p
	}},
	{"overlapping", func(n int, rnd *rand.Rand) []piece {
		p := randomCut(n, rnd)
		for i := range p { // each may reach back, forward, or both
			p[i].lo = max(0, p[i].lo-rnd.IntN(20))
			p[i].hi = min(n, p[i].hi+rnd.IntN(20))
		}
		if rnd.IntN(2) == 0 {
			k := rnd.IntN(len(p))
			p[0], p[k] = p[k], p[0]
		}
		return p
	}},
}, 10))...)

// fate is what came of a stream of requests.
type fate struct {
	served string // the requests that were answered by a server, one behind the other
	status string // of the engine's own answer, or nothing
	closed bool   // the client's connection was ended
	pooled int
}

// playRequests sends a stream as the pieces say, repeats as a client does what
// is not acknowledged, and has servers answer each of the messages.
func playRequests(t *testing.T, msg []byte, messages []string, pieces []piece) (f fate, spilt string) {
	t.Helper()
	g := newRigOf(t, 16, oneServer, keepIdle)
	k := newChat(g, c1, 100)
	base := k.seq
	send := func(p piece) {
		if k.fin || k.rst {
			return
		}
		end := base.Add(packet.Size(p.hi))
		k.seq = packet.MaxSeq(k.seq, end)
		k.inject(k.addr, vip, seg{fl: ack | psh, seq: base.Add(packet.Size(p.lo)), ack: k.ack, data: string(msg[p.lo:p.hi])})
	}
	answered, continued := 0, -1
	// serve has servers answer what is complete, and ask for what waits.
	serve := func() bool {
		if answered == len(messages) {
			return false
		}
		want := messages[answered]
		for _, v := range k.first().order {
			switch got := string(v.got); {
			case v.rst || got == "":
			case got == want:
				f.served += want
				answered++
				v.got = nil
				k.reply(v, okEmpty)
				return true
			case continued != answered && strings.HasSuffix(got, "\r\n\r\n") && strings.Contains(strings.ToLower(got), "\r\nexpect:"):
				continued = answered
				k.reply(v, "HTTP/1.1 100 Continue\r\n\r\n")
				return true
			}
		}
		return false
	}
	for _, p := range pieces {
		send(p)
		for serve() {
		}
	}
	for before := fate(f); ; before = f {
		acked := k.acked
		for at := int(acked - base); at < len(msg) && acked.Less(base.Add(packet.Size(len(msg)))); at += 700 {
			send(piece{at, min(at+700, len(msg))})
		}
		for serve() {
		}
		if k.acked == acked && f == before {
			break
		}
	}
	for _, v := range k.first().order {
		if v.rst {
			spilt += string(v.got)
		} else if len(v.got) > 0 && !v.fin {
			spilt += string(v.got) // a message that has not ended
		}
	}
	if i := strings.LastIndex(string(k.got), "HTTP/1.1 "); i >= 0 && !strings.HasSuffix(string(k.got), okEmpty) && !strings.HasSuffix(string(k.got), " Continue\r\n\r\n") {
		f.status = string(k.got)[i+9 : i+12]
	}
	f.closed, f.pooled = k.fin || k.rst, k.pooled()
	return f, spilt
}

// A judgement is what the scanners make of a stream of requests.
type judgement struct {
	messages []string // up to the first one behind which the connection is closed, as servers get them
	rest     string   // what follows them, as servers get it if they get any of it
	refused  bool     // the rest is refused
	isolated bool     // the last message may not be pooled
	closes   bool     // the client's connection is closed
}

func judge(msg []byte) (j judgement) {
	lim := http1.DefaultLimits()
	for len(msg) > 0 {
		var h http1.RequestHead
		n, st := h.Scan(msg, &lim, nil)
		if st != http1.Done {
			j.rest, j.refused, j.closes = string(msg), st == http1.Bad, st == http1.Bad
			return j
		}
		var b http1.Body
		b.Start(h.Body, h.Length)
		k, st := b.Feed(msg[n:], &lim)
		m := edited(&h, msg[:n]) + string(msg[n:n+k])
		if st != http1.Done {
			j.rest, j.refused, j.closes = m+string(msg[n+k:]), st == http1.Bad, st == http1.Bad
			return j
		}
		j.messages = append(j.messages, m)
		msg = msg[n+k:]
		if h.Outcome == http1.Isolate || !h.Persistent() {
			j.isolated, j.closes = h.Outcome == http1.Isolate, true
			return j
		}
	}
	return j
}

// edited is a head as the server gets it: without the options that are between
// the client and the engine.
func edited(h *http1.RequestHead, head []byte) string {
	out := append([]byte(nil), head...)
	for _, s := range h.ConnFields[:h.NConn] {
		copy(s.Of(out), neutral)
	}
	if h.Minor == 0 && !h.KeepAlive && h.Outcome == http1.Accept {
		return string(out[:len(out)-2]) + keepAlive + "\r\n"
	}
	return string(out)
}

// playStream plays a stream of requests in all ways and checks its fate.
func playStream(t *testing.T, rnd *rand.Rand, name string, msg []byte) {
	t.Helper()
	j := judge(msg)
	var first fate
	for i, w := range ways {
		f, spilt := playRequests(t, msg, j.messages, w.cut(len(msg), rnd))
		what := fmt.Sprintf("%s, %s: %.300q", name, w.name, msg)
		if want := strings.Join(j.messages, ""); f.served != want {
			t.Fatalf("%s: servers answered %q, want %q", what, f.served, want)
		}
		// Whether a part of the last message is with a server depends on what
		// the segments let pass; never whether it ends there.
		if !strings.HasPrefix(j.rest, spilt) || j.refused && spilt == j.rest {
			t.Fatalf("%s: a server got %q of %q", what, spilt, j.rest)
		}
		if own := f.status != ""; own != j.refused || f.closed != j.closes {
			t.Fatalf("%s: status %q, closed %v; the scanner: %+v", what, f.status, f.closed, j)
		}
		if len(j.messages) == 1 && j.isolated && f.pooled != 0 || j.refused && spilt != "" && f.pooled != 0 {
			t.Fatalf("%s: %d connections are pooled; the scanner: %+v", what, f.pooled, j)
		}
		f.pooled = 0
		if i == 0 {
			first = f
		} else if f != first {
			t.Fatalf("%s: %+v, whole %+v", what, f, first)
		}
	}
}

// TestCorporaRequests plays every strict request of the llhttp corpus and every
// case of desync-guardian as segments.
func TestCorporaRequests(t *testing.T) {
	rnd := seeded(t)
	n := 0
	for _, c := range corpora.LLHTTP(t, false) {
		if c.Request() {
			msg, _ := c.Stream()
			playStream(t, rnd, c.ID, msg)
			n++
		}
	}
	for _, c := range corpora.DesyncGuardian(t) {
		playStream(t, rnd, c.Name, c.Messages()[0])
		n++
	}
	t.Logf("%d streams in %d ways", n, len(ways))
}

// TestCorporaResponses plays every strict response of the llhttp corpus as a
// server's segments, and then its FIN.
func TestCorporaResponses(t *testing.T) {
	rnd := seeded(t)
	n := 0
	for _, c := range corpora.LLHTTP(t, false) {
		if c.Request() {
			continue
		}
		msg, _ := c.Stream()
		end, clean := firstResponse(msg)
		for _, w := range ways {
			g := newRigOf(t, 16, oneServer, keepIdle)
			k := newChat(g, c1, 100)
			k.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
			v := k.server(0)
			base := v.seq
			for round := range 2 { // what lay beyond a limit is repeated
				pieces := w.cut(len(msg), rnd)
				if round == 1 {
					pieces = ways[0].cut(len(msg), rnd)
				}
				for _, p := range pieces {
					if v.rst {
						break
					}
					v.seq = packet.MaxSeq(v.seq, base.Add(packet.Size(p.hi)))
					k.inject(v.addr, ep2(v.port), seg{fl: ack | psh, seq: base.Add(packet.Size(p.lo)), ack: v.ack, win: 60000, data: string(msg[p.lo:p.hi])})
				}
			}
			what := fmt.Sprintf("%s, %s: %.300q", c.ID, w.name, msg)
			if pooled := k.pooled(); pooled != 0 && !(clean && end == len(msg)) || pooled == 0 && clean && end == len(msg) && !k.fin {
				t.Fatalf("%s: %d pooled; framed beyond doubt: %v, %d of %d bytes", what, pooled, clean, end, len(msg))
			}
			if !v.rst {
				k.hangUp(v)
			}
			got := string(k.got)
			switch {
			case strings.HasPrefix(got, "HTTP/1.1 502 ") && !strings.HasPrefix(string(msg), "HTTP/1.1 502 "):
				if clean || end > 0 {
					t.Fatalf("%s: refused", what)
				}
			case !strings.HasPrefix(string(msg), got):
				t.Fatalf("%s: the client got %q", what, got)
			case end > len(got) && !k.rst:
				t.Fatalf("%s: the client got %q, and %d bytes were framed", what, got, end)
			}
		}
		n++
	}
	t.Logf("%d streams in %d ways", n, len(ways))
}

// firstResponse says where the first final response of a stream ends, and
// whether that is beyond doubt. What lasts until the server closes ends with
// the stream; what has no end here, or is no response, ends at 0.
func firstResponse(msg []byte) (end int, clean bool) {
	lim := http1.DefaultLimits()
	var h http1.ResponseHead
	h.Reset(http1.GET)
	at := 0
	for {
		n, st := h.Scan(msg[at:], &lim)
		if st != http1.Done {
			return 0, false
		}
		at += n
		if !h.Interim() {
			break
		}
		h.Again()
	}
	if h.Status == 101 {
		return 0, false // nobody has asked for another protocol
	}
	if h.Body == http1.BodyUntilClose {
		return len(msg), false
	}
	var b http1.Body
	b.Start(h.Body, h.Length)
	n, st := b.Feed(msg[at:], &lim)
	switch st {
	case http1.Done:
		return at + n, h.Outcome == http1.Accept
	case http1.Bad:
		return len(msg), false
	}
	return 0, false
}
