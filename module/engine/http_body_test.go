// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

const (
	okEmpty  = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
	goOn     = "HTTP/1.1 100 Continue\r\n\r\n"
	refused1 = "HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n"
)

// expectHead is a request that waits, with the framing of its body.
func expectHead(framing string) string {
	return http("POST /up HTTP/1.1\nHost: a\nExpect: 100-continue\n" + framing + "\n\n")
}

// TestExpect: the body of a request that expects 100 (Continue) passes when
// the server has asked for it and not before, however early the client sends
// it, whole, and once.
func TestExpect(t *testing.T) {
	const chunked = "5\r\nhello\r\n0\r\nX: y\r\n\r\n"
	for _, c := range []struct{ framing, body string }{
		{"Content-Length: 5", "hello"}, {"Transfer-Encoding: chunked", chunked},
		{"Content-Length: 9000", strings.Repeat("b", 9000)},
	} {
		for early := 0; early <= len(c.body); early += 1 + len(c.body)/20 {
			for _, mode := range []fwd{{}, {farm.ForwardedXFF, "X-Forwarded-For: 198.18.0.1\r\n"}} {
				g := newRig(t, oneServer, keepIdle, mode.set)
				k := newChat(g, c1, 100)
				head := expectHead(c.framing)
				sent := strings.TrimSuffix(head, "\r\n") + mode.line + "\r\n"
				k.send(head + c.body[:early])
				v := k.server(0)
				k.want("before the 100", string(v.got), sent)
				k.wait(2 * second)
				k.want("after two seconds", string(v.got), sent)
				k.reply(v, goOn)
				k.want("after the 100", string(v.got), sent+c.body[:early])
				k.send(c.body[early:])
				k.want("all", string(v.got), sent+c.body)
				k.reply(v, okEmpty)
				k.want("the client", string(k.got), goOn+okEmpty)
				if k.pooled() != 1 || k.fin || k.rst || v.rst {
					t.Fatalf("%q, %d early: not pooled", c.framing, early)
				}
			}
		}
	}
	// Sent again while it is held, and the next request behind it.
	g := newRig(t, oneServer, keepIdle)
	k := newChat(g, c1, 100)
	head := expectHead("Content-Length: 5")
	k.send(head)
	v := k.server(0)
	k.send("hello")
	k.at(-5, "HELLO", ack|psh) // another text: the first copy counts
	k.send(http("GET /next HTTP/1.1\nHost: a\n\n"))
	k.at(-len(http("GET /next HTTP/1.1\nHost: a\n\n"))-5, "jello", ack|psh)
	k.reply(v, goOn)
	k.want("the server", string(v.got), head+"hello")
	k.reply(v, okEmpty)
	k.want("the server", string(v.got), head+"hello"+http("GET /next HTTP/1.1\nHost: a\n\n"))
}

// fwd is a mode of the forwarded option with the line that it inserts.
type fwd struct {
	mode farm.ForwardedMode
	line string
}

func (f fwd) set(s *farm.Spec) { s.Farms[0].Forwarded = f.mode }

// TestExpectRefused: a final answer without the body is delivered, and that is
// the end of both connections: nothing that the client sends behind it, its
// body or a new request, reaches the server. The control is the same request
// without the wait.
func TestExpectRefused(t *testing.T) {
	const smuggled = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
	for _, waits := range []bool{true, false} {
		for _, when := range []string{"before", "with", "after"} {
			g := newRig(t, oneServer, keepIdle)
			k := newChat(g, c1, 100)
			head := expectHead(fmt.Sprintf("Content-Length: %d", len(smuggled)))
			k.send(head)
			v := k.server(0)
			if !waits {
				g.e.clients.At(1).Flags &^= splice.ClientExpect
			}
			if when == "before" {
				k.send(smuggled)
			}
			k.lazy = when == "with"
			k.reply(v, refused1)
			k.lazy = false
			if when != "before" {
				k.send(smuggled)
			}
			k.raw(seg{fl: ack})
			reached := strings.Contains(string(v.got), "/smuggled")
			if waits && (reached || !v.rst || !k.fin || k.pooled() != 0) {
				t.Errorf("body sent %s the answer: reached the server %v, server reset %v, client closed %v, pooled %d", when, reached, v.rst, k.fin, k.pooled())
			}
			if !waits && when == "before" && !reached {
				t.Error("the control holds the body, too")
			}
			if !strings.HasPrefix(string(k.got), refused1) {
				t.Errorf("the client got %q", k.got)
			}
		}
	}
}

// TestExpectTimes: a server that never answers is given up, and a client that
// goes away ends the wait.
func TestExpectTimes(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	k := newChat(g, c1, 100)
	k.send(expectHead("Content-Length: 5") + "hello")
	k.wait(61 * second)
	if !strings.HasPrefix(string(k.got), "HTTP/1.1 504 ") || strings.Contains(string(k.server(0).got), "hello") || !k.server(0).rst {
		t.Errorf("after the response timeout: %q, the server has %q", k.got, k.server(0).got)
	}
	g = newRig(t, oneServer, keepIdle)
	k = newChat(g, c1, 100)
	k.send(expectHead("Content-Length: 5"))
	k.close()
	if !k.rst || !k.server(0).rst {
		t.Error("a client's FIN inside the request did not end it")
	}
}

// TestChunkedRequests: chunked bodies of any shape, cut anywhere, reach the
// server as they are, and what follows is the next request.
func TestChunkedRequests(t *testing.T) {
	rnd := seeded(t)
	next := http("GET /next HTTP/1.1\nHost: a\n\n")
	for range 300 {
		g := newRig(t, oneServer, keepIdle)
		k := newChat(g, c1, 100)
		text := http("POST / HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\n\n") + chunks(rnd)
		for all := text + next; all != ""; {
			n := 1 + rnd.IntN(min(len(all), 1+rnd.IntN(500)))
			k.send(all[:n])
			all = all[n:]
		}
		v := k.server(0)
		k.want("the server", string(v.got), text)
		k.reply(v, okEmpty)
		k.want("the server", string(v.got), text+next)
		k.reply(v, okEmpty)
		if k.pooled() != 1 {
			t.Fatal("not pooled")
		}
	}
}

// chunks draws a chunked body.
func chunks(rnd *rand.Rand) string {
	var b strings.Builder
	for range rnd.IntN(8) {
		n := 1 + rnd.IntN(1<<rnd.IntN(10))
		fmt.Fprintf(&b, "%s%x%s\r\n%s\r\n", strings.Repeat("0", rnd.IntN(3)), n, []string{"", ";a", ";a=b", ";a=\"q;\\\"\""}[rnd.IntN(4)], strings.Repeat("0\r\n\r\n", n)[:n])
	}
	b.WriteString("0\r\n")
	for i := range rnd.IntN(3) {
		fmt.Fprintf(&b, "X-%d: t\r\n", i)
	}
	b.WriteString("\r\n")
	return b.String()
}

// TestFramingBytesStay: a client that repeats bytes of a chunked body with
// another text cannot change what the server believes to be its framing: the
// bytes that were parsed are what it gets. The control repeats data, which no
// length depends on: that passes.
func TestFramingBytesStay(t *testing.T) {
	rnd := seeded(t)
	head := http("POST / HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\n\n")
	for n := range 300 {
		g := newRig(t, oneServer, keepIdle)
		k := newChat(g, c1, 100)
		k.send(head)
		v := k.server(0)
		k.deaf = true // the server acknowledges nothing of what follows
		body := chunks(rnd)
		k.cut(body, 1+rnd.IntN(200))
		if n%2 == 0 {
			v.got, v.ack = v.got[:len(head)], v.ack.Sub(packet.Size(len(body)))
		}
		// The attack: the whole body again, in other pieces, with other chunk
		// lines and a request behind.
		evil := strings.NewReplacer("0\r\n", "9\r\n", "\r\n0", "\r\nf", "X-", "GE").Replace(body)
		for i := 0; i < len(body); {
			k2 := min(len(body), i+1+rnd.IntN(100))
			k.at(i-len(body), evil[i:k2], ack|psh)
			i = k2
		}
		if n%2 == 0 {
			k.want("the server", framing(string(v.got[len(head):])), framing(body))
		}
		// What the server has acknowledged is not kept any more.
		k.deaf = false
		k.fromServer(v, seg{fl: ack})
		if u := g.e.Usage(); u.Held != 0 {
			t.Fatalf("%d sides are held of a body that the server has", u.Held)
		}
	}
	// The negative control: without the copies the server reads other sizes.
	for _, defence := range []bool{true, false} {
		g := newRig(t, oneServer, keepIdle)
		k := newChat(g, c1, 100)
		k.send(head)
		v := k.server(0)
		k.deaf = true
		k.send("5\r\nhello\r\n0\r\n\r\n")
		v.got, v.ack = v.got[:len(head)], v.ack.Sub(15)
		if !defence {
			g.e.sides.at(g.e.clients.At(1).Side).frames = nil
		}
		k.at(-15, "a\r\nhello\r\n0\r\n\r\n", ack|psh)
		if same := framing(string(v.got[len(head):])) == "5 0 \r\n"; same != defence {
			t.Errorf("defence %v: the server got %q", defence, v.got[len(head):])
		}
	}
	// Control.
	g := newRig(t, oneServer, keepIdle)
	k := newChat(g, c1, 100)
	k.send(head)
	v := k.server(0)
	k.deaf = true
	k.send("5\r\nhello\r\n")
	v.got, v.ack = v.got[:len(head)], v.ack.Sub(10)
	k.at(-10, "6\r\njelloXX", ack|psh)
	k.want("the control", string(v.got[len(head):]), "5\r\njello\r\n")
	if k.count(ReasonFramingKept) != 1 {
		t.Error("not counted")
	}
}

// TestChunkedUploadAllocatesNothing: keeping the framing bytes of a running
// chunked upload costs no allocation once it runs.
func TestChunkedUploadAllocatesNothing(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	k := newChat(g, c1, 100)
	k.send(http("POST / HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\n\n"))
	v := k.server(0)
	part := fmt.Sprintf("%x\r\n%s\r\n", 990, strings.Repeat("x", 990))
	up := g.raw(c1, vip, seg{fl: ack, seq: k.seq, ack: k.ack, data: part})
	down := g.raw(s1, ep2(v.port), seg{fl: ack, seq: v.seq, ack: v.ack, win: 60000})
	buf := make([]byte, 2048)
	var out Output
	var ev Event
	step := func(b []byte, seq, a packet.Seq) {
		out.Reset()
		b = buf[:copy(buf, b)]
		binary.BigEndian.PutUint32(b[24:], uint32(seq))
		binary.BigEndian.PutUint32(b[28:], uint32(a))
		ev = Event{Kind: Packet, Checksum: packet.ChecksumVerified, Data: b}
		g.e.Step(g.now, &ev, &out)
		if ev.Verdict != Rewrite {
			t.Fatal("not translated")
		}
	}
	n := testing.AllocsPerRun(2000, func() {
		for range 3 {
			step(up, k.seq, k.ack)
			k.seq, v.ack = k.seq.Add(packet.Size(len(part))), v.ack.Add(packet.Size(len(part)))
		}
		step(down, v.seq, v.ack)
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
	if u := g.e.Usage(); u.Held != 0 {
		t.Errorf("%d sides are held of what the server has", u.Held)
	}
}

// framing is what a plain parser says about a chunked body: the sizes, and
// where it ends.
func framing(b string) string {
	var out strings.Builder
	for {
		line, rest, ok := strings.Cut(b, "\r\n")
		if !ok {
			return out.String() + "!"
		}
		size, _, _ := strings.Cut(line, ";")
		n := 0
		if _, err := fmt.Sscanf(size, "%x", &n); err != nil || n > len(rest) {
			return out.String() + "?" + size
		}
		fmt.Fprintf(&out, "%d ", n)
		if n == 0 {
			return out.String() + rest
		}
		b = strings.TrimPrefix(rest[n:], "\r\n")
	}
}

// TestBadChunks: a body that cannot be framed is refused: before it has a
// server nothing of the request is sent, later the server connection is
// killed; no byte at or behind the doubtful one ever passes.
func TestBadChunks(t *testing.T) {
	head := http("POST / HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\n\n")
	for _, good := range []string{"", "5\r\nhello\r\n"} {
		for _, bad := range []string{
			"g\r\n", "5 \r\nhello", "0x5\r\nhello", "+5\r\nhello", "-1\r\n", "5\nhello\r\n", "5\rhello", "5;a\nGET / HTTP/1.1\r\n\r\n", "5;a b\r\nhello",
			"11111111111111111\r\n", "4000000000000000\r\n", "\r\n", " 5\r\nhello", "5\r\nhelloGET /smuggled", "5\r\nhello\n0\r\n\r\n",
			"0\r\nbad name: x\r\n\r\n", "0\r\n x\r\n\r\n", "0\r\nno-colon\r\n\r\n", "0\r\nX: a\nY: b\r\n\r\n", "0\r\n\n", "0\n\r\n",
			"5;" + strings.Repeat("x", 5000) + "\r\nhello", "0\r\nX: " + strings.Repeat("x", 9000) + "\r\n\r\n",
		} {
			for _, bound := range []bool{false, true} {
				g := newRig(t, oneServer, keepIdle)
				k := newChat(g, c1, 100)
				if bound {
					k.send(head)
					k.send(good + bad)
				} else {
					k.send(head + good + bad)
				}
				seen := ""
				for _, v := range k.order {
					seen += string(v.got)
					if !v.rst && len(v.got) > 0 {
						t.Errorf("%q, bound %v: the server connection lives", bad, bound)
					}
				}
				if !strings.HasPrefix(string(k.got), "HTTP/1.1 400 ") || !k.fin {
					t.Errorf("%q, bound %v: the client got %q", bad, bound, k.got)
				}
				if !strings.HasPrefix(head+good+bad, seen) || strings.Contains(seen, "GET /") || k.pooled() != 0 {
					t.Errorf("%q, bound %v: the server got %q, pooled %d", bad, bound, seen, k.pooled())
				}
				if k.count(ReasonBodyRefused) != 1 {
					t.Errorf("%q, bound %v: not counted", bad, bound)
				}
			}
		}
	}
}

// TestEarlyResponse: a final answer while the body is still coming is
// delivered, then both connections end. What comes of the body after the
// answer is complete does not pass: a server may take it for a request.
func TestEarlyResponse(t *testing.T) {
	const answer = "HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig"
	const smuggled = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
	for _, framing := range []string{"Content-Length: 100000", "Transfer-Encoding: chunked"} {
		g := newRig(t, oneServer, keepIdle)
		k := newChat(g, c1, 100)
		head := http("POST / HTTP/1.1\nHost: a\n" + framing + "\n\n")
		start := "400\r\n" // either data or a chunk line
		k.send(head + start)
		v := k.server(0)
		k.lazy = true // the answer is on its way
		k.reply(v, answer)
		k.lazy = false
		k.send(smuggled)
		k.want("the client", string(k.got), answer)
		if strings.Contains(string(v.got), "smuggled") || !v.rst || !k.fin || k.rst || k.pooled() != 0 {
			t.Errorf("%s: server got %q, reset %v; client closed %v, reset %v; pooled %d", framing, v.got, v.rst, k.fin, k.rst, k.pooled())
		}
		// The client may go on sending for a while: it is acknowledged and
		// thrown away, so that no reset destroys the answer.
		k.at(-len(smuggled), smuggled, ack|psh) // nobody has acknowledged it
		k.send(strings.Repeat("x", 3000))
		if k.rst || k.acked != k.seq {
			t.Errorf("%s: what follows is not acknowledged, reset %v", framing, k.rst)
		}
	}
}

// TestOvertakenButComplete: an answer that began before the server had the
// whole request, and a request that was completed before the answer was: the
// client goes on, the server connection does not. The control acknowledges
// the request first.
func TestOvertakenButComplete(t *testing.T) {
	for cut, late := range map[int]bool{1: true, 10: true, 41: true, 0: false} {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{1000, 2000}
		k := newChat(g, c1, 100)
		k.send(http("POST / HTTP/1.1\nHost: a\nContent-Length: 10\n\n") + "01234")
		v := k.server(0)
		const answer = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone"
		if late {
			// The head is complete before the request, or only begun.
			k.reply(v, answer[:cut])
			k.send("56789")
			k.reply(v, answer[cut:])
		} else {
			k.send("56789")
			k.reply(v, answer)
		}
		k.want("the client", string(k.got), answer)
		if k.fin || k.rst || (k.pooled() == 0) != late || v.rst != late {
			t.Errorf("late %v: client closed %v, pooled %d", late, k.fin, k.pooled())
		}
		k.send(http("GET /next HTTP/1.1\nHost: a\n\n"))
		if strings.Contains(string(v.got), "/next") == late {
			t.Errorf("late %v: the server connection was used again: %v", late, !late)
		}
	}
}

// TestEchoStream: a server that answers while it reads, with as many bytes, is
// no early answer that would be cut off.
func TestEchoStream(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	k := newChat(g, c1, 100)
	k.send(http("POST / HTTP/1.1\nHost: a\nContent-Length: 50000\n\n"))
	v := k.server(0)
	k.reply(v, http("HTTP/1.1 200 OK\nContent-Length: 50000\n\n"))
	all := ""
	for i := range 50 {
		part := strings.Repeat(string(rune('a'+i%26)), 1000)
		k.send(part)
		k.reply(v, part)
		all += part
	}
	k.want("the echo", string(k.got[len(k.got)-50000:]), all)
	if k.rst || !strings.HasSuffix(string(v.got), all) {
		t.Error("the stream was cut off")
	}
}

// TestBodyPace: a body that comes slower than the farm allows is given up,
// with an answer; a server that takes no more is not the client's fault.
func TestBodyPace(t *testing.T) {
	pace := func(s *farm.Spec) {
		s.Farms[0].Timeouts.Body = 10 * second
		s.Farms[0].Limits.BodyRate = 100
		s.Farms[0].Timeouts.Response = 3600 * second
	}
	for _, c := range []struct {
		name      string
		perSecond int
		full      bool // the server's window is closed
		hold      bool // the body waits for 100
		limited   bool
		slow      bool
	}{
		{"slow", 50, false, false, true, true},
		{"fast enough", 150, false, false, true, false},
		{"no limit", 1, false, false, false, false},
		{"nothing", 0, false, false, true, true},
		{"blocked by the server", 0, true, false, true, false},
		{"waiting for 100", 0, false, true, true, false},
	} {
		change := pace
		if !c.limited {
			change = func(s *farm.Spec) { pace(s); s.Farms[0].Limits.BodyRate = 0 }
		}
		g := newRig(t, oneServer, keepIdle, change)
		k := newChat(g, c1, 100)
		expect := ""
		if c.hold {
			expect = "Expect: 100-continue\n"
		}
		k.send(http("POST / HTTP/1.1\nHost: a\n" + expect + "Content-Length: 100000\n\n"))
		v := k.server(0)
		if c.full {
			k.window = 1
			k.g.e.servers.At(1).SndEdge = k.g.e.servers.At(1).SndNxt
		}
		for range 30 {
			if k.fin {
				break
			}
			k.send(strings.Repeat("x", c.perSecond))
			k.wait(second)
		}
		if c.slow != k.fin || c.slow != strings.HasPrefix(string(k.got), "HTTP/1.1 408 ") || c.slow != v.rst {
			t.Errorf("%s: closed %v, got %q, server reset %v", c.name, k.fin, k.got, v.rst)
		}
		if (k.count(ReasonSlowBody) == 1) != c.slow {
			t.Errorf("%s: slow-body is %d", c.name, k.count(ReasonSlowBody))
		}
	}
}

// TestRepeatFarBehind: a client with a large window repeats what it has heard
// no acknowledgment of, however far the engine has seen it go on.
func TestRepeatFarBehind(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	k := newChat(g, c1, 100)
	k.deaf = true
	const size = 300_000
	head := http(fmt.Sprintf("POST /up HTTP/1.1\nHost: a\nContent-Length: %d\n\n", size))
	k.send(head)
	v := k.server(0)
	k.send(strings.Repeat("b", size))
	before := g.e.Count.Get(ReasonOutOfWindow)
	sent := g.play(g.raw(k.addr, vip, seg{fl: ack, seq: k.seq.Sub(size), ack: k.ack, data: strings.Repeat("b", 1000)}))
	passed := false
	for _, s := range sent {
		passed = passed || s.dst == v.addr && len(s.data) == 1000
	}
	if n := g.e.Count.Get(ReasonOutOfWindow) - before; !passed || n != 0 {
		t.Errorf("the first segment, repeated: passed %v, out of the window %d; let out: %v", passed, n, sent)
	}
	// The control: a guess beyond every window is still one.
	g.play(g.raw(k.addr, vip, seg{fl: ack, seq: k.seq.Sub(packet.Size(size+len(head)) + 2<<16), ack: k.ack, data: "x"}))
	if n := g.e.Count.Get(ReasonOutOfWindow) - before; n != 1 {
		t.Errorf("a segment from before the window is not refused")
	}
}
