// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// request is one request of a pipeline with what its server answers.
type request struct {
	text, answer string
	server       netip.AddrPort
}

// draw makes a request of any kind whose answer names it.
func draw(rnd *rand.Rand, n int) request {
	var q request
	path, text := "/sales/", ""
	q.server = s1
	if rnd.IntN(2) == 0 {
		path, q.server = "/products/", s2
	}
	path += fmt.Sprint(n)
	method, body := "GET", fmt.Sprintf("answer %d from %v", n, q.server)
	switch rnd.IntN(6) {
	case 0:
		method = "HEAD"
		text = fmt.Sprintf("HEAD %s HTTP/1.1\r\nHost: a\r\n\r\n", path)
	case 1:
		b := strings.Repeat("b", rnd.IntN(300))
		text = fmt.Sprintf("POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", path, len(b), b)
	case 2:
		text = fmt.Sprintf("PUT %s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", path)
		for range rnd.IntN(4) {
			b := strings.Repeat("GET / HTTP/1.1\r\n", 1+rnd.IntN(5))
			text += fmt.Sprintf("%x;x=\"y\"\r\n%s\r\n", len(b), b)
		}
		text += "0\r\nX-Trailer: t\r\n\r\n"
	case 3:
		text = fmt.Sprintf("DELETE %s HTTP/1.1\r\nHost: a\r\n\r\n", path)
	default:
		text = fmt.Sprintf("GET %s?q=%d HTTP/1.1\r\nHost: a\r\n\r\n", path, n)
	}
	q.text = text
	switch k := rnd.IntN(6); {
	case method == "HEAD":
		q.answer = fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", len(body))
	case k == 0:
		q.answer = fmt.Sprintf("HTTP/1.1 204 No Content\r\nX-Is: %s\r\n\r\n", path)
	case k == 1:
		q.answer = fmt.Sprintf("HTTP/1.1 304 Not Modified\r\nContent-Length: 999\r\nX-Is: %s\r\n\r\n", path)
	case k == 2:
		q.answer = fmt.Sprintf("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\nT: v\r\n\r\n", len(body), body)
	default:
		q.answer = fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
	return q
}

// TestPipelining: requests of all methods, 1 to 100 at once, over two paths
// that different servers have. Each reaches its own server, whole and alone,
// and the answers come in the order of the requests.
func TestPipelining(t *testing.T) {
	rnd := seeded(t)
	for _, depth := range []int{1, 2, 3, 5, 10, 33, 100} {
		for range 6 {
			pipeline(t, rnd, depth)
		}
	}
}

func pipeline(t *testing.T, rnd *rand.Rand, depth int) {
	t.Helper()
	g := newRig(t, figure8, keepIdle)
	for i := range 2*depth + 2 {
		g.iss = append(g.iss, packet.Seq(10_000_000*(i+1)))
	}
	k := newChat(g, c1, 100)
	var list []request
	all := ""
	for i := range depth {
		list = append(list, draw(rnd, i))
		all += list[i].text
	}
	size := 1 + rnd.IntN(1400)
	if depth > 10 {
		size = 200 + rnd.IntN(1200)
	}
	k.cut(all, size)
	want := ""
	for i, q := range list {
		// Nothing of a request reaches a server before the answer before it
		// was delivered, and then all of this one and nothing else.
		var at *chatServer
		for _, v := range k.first().order {
			if v.addr == q.server && len(v.got) > 0 {
				at = v
			}
			if v.addr != q.server && len(v.got) > 0 {
				t.Fatalf("request %d of %d: server %v got %q", i, depth, v.addr, v.got)
			}
		}
		if at == nil || string(at.got) != q.text {
			t.Fatalf("request %d of %d: server %v did not get %q alone", i, depth, q.server, q.text)
		}
		at.got = nil
		k.reply(at, q.answer)
		want += q.answer
		k.want(fmt.Sprintf("answers up to request %d of %d", i, depth), string(k.got), want)
	}
	if k.count(ReasonServed) != uint64(depth) {
		t.Errorf("%d requests served, %d sent", k.count(ReasonServed), depth)
	}
	if k.fin || k.rst {
		t.Error("the client's connection was ended")
	}
}

// TestNoBody: HEAD, 204 and 304 end with their heads, whatever these say, and
// the connection is reused at once. The control is the same head as an answer
// to GET, which is waited for.
func TestNoBody(t *testing.T) {
	for _, c := range []struct {
		method, answer string
		ends           bool
	}{
		{"HEAD", "HTTP/1.1 200 OK\nContent-Length: 5\n\n", true},
		{"HEAD", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n", true},
		{"GET", "HTTP/1.1 204 No Content\n\n", true},
		{"GET", "HTTP/1.1 304 Not Modified\nContent-Length: 5\n\n", true},
		{"GET", "HTTP/1.1 304 Not Modified\nTransfer-Encoding: chunked\n\n", true},
		{"GET", "HTTP/1.1 200 OK\nContent-Length: 5\n\n", false},
		{"GET", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n", false},
	} {
		g := newRig(t, oneServer, keepIdle)
		k := newChat(g, c1, 100)
		k.send(http(c.method + " / HTTP/1.1\nHost: a\n\n"))
		k.reply(k.server(0), http(c.answer))
		k.want("delivered", string(k.got), http(c.answer))
		if got := k.pooled() == 1; got != c.ends {
			t.Errorf("%s, %q: back in the pool: %v", c.method, c.answer, got)
		}
	}
}

// TestInterim: a hundred interim responses are passed on, end nothing and cost
// nothing. An incomplete one is no end either.
func TestInterim(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	k := newChat(g, c1, 100)
	k.send(http("GET / HTTP/1.1\nHost: a\n\n"))
	all := ""
	for i := range 100 {
		all += fmt.Sprintf("HTTP/1.1 %d Interim\r\nX: %d\r\n\r\n", []int{100, 102, 103, 199}[i%4], i)
		k.reply(k.server(0), all[len(k.got):])
		k.want("interim", string(k.got), all)
		if k.pooled() != 0 {
			t.Fatal("an interim response ended the exchange")
		}
	}
	final := http("HTTP/1.1 200 OK\nContent-Length: 2\n\nok")
	k.reply(k.server(0), final)
	k.want("all", string(k.got), all+final)
	if k.pooled() != 1 || k.fin {
		t.Error("the connections were not kept")
	}
}

// TestEndsAnywhere: a response that is cut at every byte ends at the same one,
// and nothing beyond it passes.
func TestEndsAnywhere(t *testing.T) {
	for _, r := range []string{
		"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
		"HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5;a=b\nhello\n0\nX: y\n\n",
		"HTTP/1.1 100 Continue\n\nHTTP/1.1 200 OK\nContent-Length: 0\n\n",
	} {
		whole := http(r)
		for cut := 1; cut < len(whole); cut++ {
			g := newRig(t, oneServer, keepIdle)
			k := newChat(g, c1, 100)
			k.send(http("GET / HTTP/1.1\nHost: a\n\n"))
			v := k.server(0)
			k.reply(v, whole[:cut])
			if k.pooled() != 0 {
				t.Fatalf("%q ended after %d bytes", whole, cut)
			}
			k.reply(v, whole[cut:])
			k.want("delivered", string(k.got), whole)
			if k.pooled() != 1 {
				t.Fatalf("%q, cut at %d, did not end", whole, cut)
			}
		}
	}
}

// TestExtraBytes: what a server says behind the end of its response never
// reaches a client, not this one either, and the connection is not reused;
// with the response in one segment, after it, and on the idle connection.
func TestExtraBytes(t *testing.T) {
	const response = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	for _, extra := range []string{"x", "\r\n", "HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n", response} {
		for _, when := range []string{"at once", "before the client has acknowledged", "idle"} {
			g := newRig(t, oneServer, keepIdle)
			k := newChat(g, c1, 100)
			k.send(http("GET / HTTP/1.1\nHost: a\n\n"))
			v := k.server(0)
			switch when {
			case "at once":
				k.fromServer(v, seg{fl: ack | psh, data: response + extra})
			case "idle":
				k.reply(v, response)
				k.reply(v, extra)
			default:
				k.lazy = true
				k.reply(v, response)
				k.reply(v, extra)
				k.lazy = false
				k.raw(seg{fl: ack})
			}
			k.want(when, string(k.got), response)
			if k.pooled() != 0 || k.count(ReasonExtraBytes)+k.count(ReasonIdleBytes) == 0 {
				t.Errorf("%s, %q: the connection is in the pool", when, extra)
			}
			if k.fin == (when == "idle") || !v.rst && !v.fin {
				t.Errorf("%s, %q: client closed %v, server reset %v, closed %v", when, extra, k.fin, v.rst, v.fin)
			}
		}
	}
}

// TestBodyAnyway: the body that a response must not have is delivered as the
// server sent it, and both connections end; unless the client has asked again.
func TestBodyAnyway(t *testing.T) {
	for _, c := range []struct{ method, answer string }{
		{"HEAD", "HTTP/1.1 200 OK\nContent-Length: 5\n\nhello"},
		{"HEAD", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n"},
		{"GET", "HTTP/1.1 204 No Content\n\nhello"},
		{"GET", "HTTP/1.1 304 Not Modified\nContent-Length: 5\n\nhello"},
	} {
		for _, pipelined := range []bool{false, true} {
			g := newRig(t, oneServer, keepIdle)
			k := newChat(g, c1, 100)
			req := http(c.method + " / HTTP/1.1\nHost: a\n\n")
			k.send(req)
			want := http(c.answer)
			if pipelined {
				k.send(http("GET /next HTTP/1.1\nHost: a\n\n"))
				want = want[:strings.Index(want, "\r\n\r\n")+4]
			}
			v := k.server(0)
			k.fromServer(v, seg{fl: ack | psh, data: http(c.answer)})
			k.want(c.method, string(k.got), want)
			if k.pooled() != 0 || !k.fin || strings.Contains(string(v.got), "/next") {
				t.Errorf("%s, %q, pipelined %v: %d in the pool, client closed %v, server got %q", c.method, c.answer, pipelined, k.pooled(), k.fin, v.got)
			}
		}
	}
}

// TestDoubtfulResponses: a response whose framing can be read in two ways is
// delivered byte by byte as it came, up to the server's close, and its
// connection is never used again.
func TestDoubtfulResponses(t *testing.T) {
	for _, r := range []string{
		"HTTP/1.1 200 OK\nContent-Length: 5\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n",
		"HTTP/1.0 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n",
		"HTTP/1.1 204 No Content\nTransfer-Encoding: chunked\n\n0\n\n",
		"HTTP/1.1 204 No Content\nContent-Length: 5\n\nhello",
		"HTTP/1.1 200 OK\nContent-Length: 5\nContent-Length: 6\n\nhello",
		"HTTP/1.1 200 OK\nContent-Length: 5\nContent-Length: 5\n\nhello",
		"HTTP/1.1 200 OK\nContent-Length: 5, 5\n\nhello",
		"HTTP/1.1 200 OK\nContent-Length: +5\n\nhello",
		"HTTP/1.1 200 OK\nContent-Length: 0x5\n\nhello",
		"HTTP/1.1 200 OK\nContent-Length: 05\n\nhello",
		"HTTP/1.1 200 OK\nContent-Length: 5 5\n\nhello",
		"HTTP/1.1 200 OK\nContent-Length: 9223372036854775808\n\nhello",
		"HTTP/1.1 200 OK\nContent-Length : 5\n\nhello",
		"HTTP/1.1 200 OK\n Content-Length: 5\n\nhello",
		"HTTP/1.1 200 OK\nX: a\n b\nContent-Length: 5\n\nhello",
		"HTTP/1.1 200 OK\nX: a\x00b\nContent-Length: 5\n\nhello",
		"HTTP/1.1 200 OK\nX: a\rb\nContent-Length: 5\n\nhello",
		"HTTP/1.1 200 OK\nTransfer-Encoding: gzip, chunked\n\n0\n\n",
		"HTTP/1.1 200 OK\nTransfer-Encoding: xchunked\n\n0\n\n",
		"HTTP/1.1 200 OK\nTransfer-Encoding: chunked\nTransfer-Encoding: chunked\n\n0\n\n",
		"HTTP/1.1 200 OK\nTransfer_Encoding: chunked\nContent-Length: 5\n\nhello",
		"HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5 \nhello\n0\n\n",
		"HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n0x5\nhello\n0\n\n",
		"HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhelloXX0\n\n",
		"HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\nfffffffffffffffff\nhello",
		"HTTP/1.1 200 OK\nConnection: x-weird\nContent-Length: 5\n\nhello",
		"HTTP/1.1 200 OK\nConnection: close\nContent-Length: 5\n\nhello",
		"HTTP/1.1 200 OK\n\nhello",
		"HTTP/1.9 200 OK\nContent-Length: 5\n\nhello",
		"HTTP/1.1 999 What\nContent-Length: 5\n\nhello",
		"HTTP/1.1 103 Hints\nContent-Length: 5\n\nhello",
	} {
		for _, bare := range []bool{false, true} {
			text := http(r)
			if bare {
				text = r // with bare LF all over
			}
			g := newRig(t, oneServer, keepIdle)
			k := newChat(g, c1, 100)
			k.send(http("GET / HTTP/1.1\nHost: a\n\n"))
			v := k.server(0)
			k.reply(v, text)
			k.hangUp(v)
			k.want("delivered", string(k.got), text)
			if k.pooled() != 0 || k.rst || !k.fin {
				t.Errorf("%q: pooled %d, client closed %v, reset %v", text, k.pooled(), k.fin, k.rst)
			}
			if o := k.join(c2, 200); true {
				o.send(http("GET /other HTTP/1.1\nHost: a\n\n"))
				if strings.Contains(string(v.got), "/other") {
					t.Errorf("%q: its connection was used again", text)
				}
			}
		}
	}
	// The control: the same way with a plain response keeps the connection.
	g := newRig(t, oneServer, keepIdle)
	k := newChat(g, c1, 100)
	k.send(http("GET / HTTP/1.1\nHost: a\n\n"))
	k.reply(k.server(0), http("HTTP/1.1 200 OK\nContent-Length: 5\n\nhello"))
	o := k.join(c2, 200)
	o.send(http("GET /other HTTP/1.1\nHost: a\n\n"))
	if !strings.Contains(string(k.server(0).got), "/other") {
		t.Error("the control's connection was not used again")
	}
}

// TestNoResponse: what is not HTTP/1.x NNN is not passed on.
func TestNoResponse(t *testing.T) {
	for _, r := range []string{"HTTP/2 200 OK\r\n\r\n", "HTTP/1.1  200 OK\r\n\r\n", "HTTP/1.1 20 OK\r\n\r\n", "ICY 200 OK\r\n\r\n", "\r\nHTTP/1.1 200 OK\r\n\r\n", "hello"} {
		g := newRig(t, oneServer, keepIdle)
		k := newChat(g, c1, 100)
		k.send(http("GET / HTTP/1.1\nHost: a\n\n"))
		v := k.server(0)
		k.reply(v, r)
		if !strings.HasPrefix(string(k.got), "HTTP/1.1 502 ") || !v.rst || k.pooled() != 0 || !k.fin {
			t.Errorf("%q: the client got %q, server reset %v", r, k.got, v.rst)
		}
	}
}

// TestLateGarbage: what is no response, and comes over a connection that has
// served before, may be late words of the exchange before: a request that may
// be repeated goes to another connection, any other one gets 502.
func TestLateGarbage(t *testing.T) {
	for _, c := range []struct {
		request string
		again   bool
	}{{"GET /2 HTTP/1.1\nHost: a\n\n", true}, {"POST /2 HTTP/1.1\nHost: a\nContent-Length: 0\n\n", false}} {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{1000, 2000}
		k := newChat(g, c1, 100)
		k.send(http("GET /1 HTTP/1.1\nHost: a\n\n"))
		v := k.server(0)
		k.reply(v, okEmpty)
		k.got = nil
		k.send(http(c.request))
		k.reply(v, "late words")
		if !v.rst || k.pooled() != 0 || c.again != (len(k.order) == 2) {
			t.Fatalf("%q: reset %v, %d connections", c.request, v.rst, len(k.order))
		}
		if c.again {
			k.want("the other connection", string(k.server(1).got), http(c.request))
			k.reply(k.server(1), okEmpty)
			k.want("the client", string(k.got), okEmpty)
		} else if !strings.HasPrefix(string(k.got), "HTTP/1.1 502 ") {
			t.Errorf("%q: the client got %q", c.request, k.got)
		}
	}
}

// TestStuckInDoubt: a client that takes a doubtful response for complete, and
// asks again, is not left alone with it for the whole response timeout. One
// that waits for the close is.
func TestStuckInDoubt(t *testing.T) {
	for _, c := range []struct {
		response string
		stuck    bool
	}{
		{"HTTP/1.1 200 OK\nContent-Length: 5\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n", true},
		{"HTTP/1.1 200 OK\n\nhello", false},
	} {
		g := newRig(t, oneServer, keepIdle)
		k := newChat(g, c1, 100)
		k.send(http("GET / HTTP/1.1\nHost: a\n\n"))
		k.reply(k.server(0), http(c.response))
		k.send(http("GET /next HTTP/1.1\nHost: a\n\n"))
		k.wait(3 * second)
		if k.rst != c.stuck || k.server(0).rst != c.stuck {
			t.Errorf("%q: client reset %v, server reset %v", c.response, k.rst, k.server(0).rst)
		}
		if strings.Contains(string(k.server(0).got), "/next") {
			t.Errorf("%q: the next request followed", c.response)
		}
	}
}

// TestTruncated: a response that ends before its end is shown as a reset, at
// every place where it can be cut.
func TestTruncated(t *testing.T) {
	for _, r := range []string{
		"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
		"HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n0\nX: y\n\n",
	} {
		whole := http(r)
		for cut := 1; cut <= len(whole); cut++ {
			g := newRig(t, oneServer, keepIdle)
			k := newChat(g, c1, 100)
			k.send(http("POST / HTTP/1.1\nHost: a\nContent-Length: 0\n\n"))
			v := k.server(0)
			k.reply(v, whole[:cut])
			k.hangUp(v)
			if cut == len(whole) { // the control
				if k.rst || v.rst {
					t.Errorf("%q: a complete response ends with a reset", whole)
				}
				continue
			}
			if !k.rst || k.fin {
				t.Errorf("%q, cut at %d: client reset %v, closed %v", whole, cut, k.rst, k.fin)
			}
		}
	}
}

// TestKeepAliveHint: a server's Keep-Alive field retires the connection before
// the server does.
func TestKeepAliveHint(t *testing.T) {
	for _, c := range []struct {
		field string
		idle  int64
		alive bool
	}{
		{"Keep-Alive: timeout=4, max=100\n", 2 * second, true},
		{"Keep-Alive: timeout=4, max=100\n", 4 * second, false},
		{"Keep-Alive: timeout=4, max=1\n", 0, false},
		{"", 4 * second, true},
	} {
		g := newRig(t, oneServer, keepIdle)
		k := newChat(g, c1, 100)
		k.send(http("GET / HTTP/1.1\nHost: a\n\n"))
		k.reply(k.server(0), http("HTTP/1.1 200 OK\n"+c.field+"Content-Length: 0\n\n"))
		k.wait(c.idle)
		if got := k.pooled() == 1; got != c.alive {
			t.Errorf("%q after %d s: pooled %v", c.field, c.idle/second, got)
		}
	}
}

// TestLongExchange: numbers compare only within 2 GiB; an exchange that is
// longer goes on, in both directions. The control is what a bare comparison
// with the start would say.
func TestLongExchange(t *testing.T) {
	const size, piece = 5 << 30 / 2, 60_000
	step := strings.Repeat("x", piece)
	long := func(up bool) {
		g := newRig(t, oneServer, keepIdle)
		k := newChat(g, c1, 100)
		request, response := "GET / HTTP/1.1\nHost: a\n\n", fmt.Sprintf("HTTP/1.1 200 OK\nContent-Length: %d\n\n", size)
		if up {
			request, response = fmt.Sprintf("PUT / HTTP/1.1\nHost: a\nContent-Length: %d\n\n", size), "HTTP/1.1 200 OK\nContent-Length: 0\n\n"
		}
		k.send(http(request))
		v := k.server(0)
		if !up {
			k.reply(v, http(response))
		}
		c := g.e.clients.At(1)
		start, bare := c.Epoch, 0
		var ev Event
		buf := make([]byte, 1<<16)
		// Super-packets out of two moulds: only the numbers differ.
		moulds := map[[2]bool][]byte{}
		move := func(src, dst netip.AddrPort, seq, a packet.Seq, n int) {
			kind := [2]bool{src == c1, n == piece}
			if n != 0 && n != piece || moulds[kind] == nil {
				moulds[kind] = g.raw(src, dst, seg{fl: ack, data: step[:n], win: 60000})
			}
			b := buf[:copy(buf, moulds[kind])]
			binary.BigEndian.PutUint32(b[24:], uint32(seq))
			binary.BigEndian.PutUint32(b[28:], uint32(a))
			g.out.Reset()
			ev = Event{Kind: Packet, Checksum: packet.ChecksumVerified, GSO: n > 0, Data: b}
			g.e.Step(g.now, &ev, &g.out)
			if ev.Verdict != Rewrite {
				t.Fatalf("upload %v: not translated at %d", up, seq)
			}
		}
		for sent := 0; sent < size; {
			n := min(piece, size-sent)
			if up {
				move(c1, vip, k.seq, k.ack, n)
				k.seq = k.seq.Add(packet.Size(n))
				v.ack = v.ack.Add(packet.Size(n))
				move(s1, ep2(v.port), v.seq, v.ack, 0)
				if k.seq.Less(start.ReqBase) {
					bare++
				}
			} else {
				move(s1, ep2(v.port), v.seq, v.ack, n)
				v.seq = v.seq.Add(packet.Size(n))
				k.ack = k.ack.Add(packet.Size(n))
				move(c1, vip, k.seq, k.ack, 0)
				if v.seq.Less(start.RcvBase) {
					bare++
				}
			}
			sent += n
		}
		if up {
			k.reply(v, http(response))
		}
		if bare == 0 {
			t.Errorf("upload %v: the control never compared wrongly", up)
		}
		if k.pooled() != 1 || k.rst || k.fin {
			t.Errorf("upload %v: pooled %d, client reset %v", up, k.pooled(), k.rst)
		}
	}
	long(false)
	long(true)
}

// TestRefusalsCounted: every refusal has a counter of its own, named as the
// scanner names it, and every answer one by its status.
func TestRefusalsCounted(t *testing.T) {
	for i := range Reasons {
		if i < int(reasonRefused)+http1.Reasons() && Reason(i).String() == "unknown" {
			t.Errorf("reason %d has no name", i)
		}
	}
	if http1.Reasons() > refusedRoom || ReasonAnswerOther.String() != "answer-other" || refused(http1.ReasonBareLF).String() != "refused-bare-lf" {
		t.Error("names and reasons do not fit together")
	}
	names := map[string]bool{}
	for _, r := range Refusals() {
		if names[r.String()] || r.String() == "unknown" {
			t.Errorf("reason %d: the name %q is not its own", r, r)
		}
		names[r.String()] = true
	}
	for _, c := range []struct {
		request string
		why     http1.Reason
		status  int
	}{
		{"GET / HTTP/1.1\n\n", http1.ReasonNoHost, 400},
		{"GET / HTTP/1.1\nHost: a\nHost: a\n\n", http1.ReasonTwoHosts, 400},
		{"GET / HTTP/1.2\nHost: a\n\n", http1.ReasonUnsupportedVersion, 505},
		{"CONNECT a:1 HTTP/1.1\nHost: a:1\n\n", http1.ReasonConnect, 501},
		{"POST / HTTP/1.1\nHost: a\nTransfer-Encoding: gzip\n\n", http1.ReasonUnknownTransferEncoding, 501},
		{"GET /" + strings.Repeat("x", 9000) + " HTTP/1.1\nHost: a\n\n", http1.ReasonTargetTooLong, 414},
		{"GET / HTTP/1.1\nHost: a\n" + strings.Repeat("X: y\n", 101) + "\n", http1.ReasonTooManyFields, 431},
		{"GET / HTTP/1.1\nHost: a\nX: " + strings.Repeat("x", 70000) + "\n\n", http1.ReasonHeadTooLarge, 431},
	} {
		g := newRig(t, oneServer)
		k := newChat(g, c1, 100)
		k.send(http(c.request))
		if !strings.HasPrefix(string(k.got), fmt.Sprintf("HTTP/1.1 %d ", c.status)) || !strings.Contains(string(k.got), "Connection: close") || !k.fin {
			t.Errorf("%.60q: got %q, closed %v", c.request, k.got, k.fin)
		}
		if k.count(refused(c.why)) != 1 || k.count(answered(c.status)) != 1 || k.count(ReasonOwnAnswer) != 1 {
			t.Errorf("%.60q: not counted as %v and %d", c.request, refused(c.why), c.status)
		}
		if len(k.order) != 0 {
			t.Errorf("%.60q: a server connection was opened", c.request)
		}
	}
}

// TestHeadOnlyAnswers: an answer of the engine's own to HEAD has the length of
// a body and no body, after a refused head too, where the method was read.
func TestHeadOnlyAnswers(t *testing.T) {
	for _, tail := range []string{
		" /none HTTP/1.1\nHost: a\n\n",               // 404 by the routes, kept open
		" / HTTP/1.1\nHost: a\nHost: b\n\n",          // 400
		" /" + strings.Repeat("x", 9000) + " HTTP/1", // 414
	} {
		for _, method := range []string{"HEAD", "GET"} {
			g := newRig(t, figure8)
			k := newChat(g, c1, 100)
			k.send(http(method + tail))
			head, body, ok := strings.Cut(string(k.got), "\r\n\r\n")
			if !ok || !strings.Contains(head, "Content-Length: ") || (body == "") != (method == "HEAD") {
				t.Errorf("%s%.20s: %q", method, tail, k.got)
			}
		}
	}
	// A 502 after the request's copies are gone.
	for _, method := range []string{"HEAD", "POST"} {
		g := newRig(t, oneServer)
		k := newChat(g, c1, 100)
		k.send(http(method + " / HTTP/1.1\nHost: a\nContent-Length: 0\n\n"))
		c := g.e.clients.At(1)
		c.Flags &^= splice.ClientIdempotent
		v := k.server(0)
		k.fromServer(v, seg{fl: ack})
		k.fromServer(v, seg{fl: rst | ack})
		if _, body, _ := strings.Cut(string(k.got), "\r\n\r\n"); !strings.HasPrefix(string(k.got), "HTTP/1.1 502 ") || (body == "") != (method == "HEAD") {
			t.Errorf("%s: %q", method, k.got)
		}
	}
}

// TestAnswersKeepOpen: where the framing is certain and the request complete,
// an answer of the engine's own is no end; where a body is still to come, it is.
func TestAnswersKeepOpen(t *testing.T) {
	for _, c := range []struct {
		request string
		open    bool
	}{
		{"GET /none HTTP/1.1\nHost: a\n\n", true},
		{"POST /none HTTP/1.1\nHost: a\nContent-Length: 3\n\nabc", true},
		{"POST /none HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\n\n3\nabc\n0\n\n", true},
		{"POST /none HTTP/1.1\nHost: a\nContent-Length: 4\n\nabc", false},
		{"POST /none HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\n\n3\nabc\n0\n", false},
		{"GET /none HTTP/1.1\nHost: a\nConnection: close\n\n", false},
		{"GET /none HTTP/1.0\nHost: a\n\n", false},
		{"GET /none HTTP/1.1\nHost: a\nUpgrade: x\nConnection: upgrade\n\n", false},
	} {
		g := newRig(t, figure8, keepIdle)
		k := newChat(g, c1, 100)
		k.send(http(c.request))
		if !strings.HasPrefix(string(k.got), "HTTP/1.1 404 ") || k.fin == c.open || strings.Contains(string(k.got), "Connection: close") == c.open {
			t.Errorf("%q: got %q, closed %v", c.request, k.got, k.fin)
			continue
		}
		if !c.open {
			continue
		}
		k.got = nil
		k.send(http("GET /sales/next HTTP/1.1\nHost: a\n\n"))
		k.reply(k.server(0), http("HTTP/1.1 200 OK\nContent-Length: 2\n\nok"))
		k.want("after it", string(k.got), http("HTTP/1.1 200 OK\nContent-Length: 2\n\nok"))
	}
	// In a pipeline the answer has its place.
	g := newRig(t, figure8, keepIdle)
	g.iss = []packet.Seq{1000, 2000}
	k := newChat(g, c1, 100)
	k.send(http("GET /sales/1 HTTP/1.1\nHost: a\n\nGET /none HTTP/1.1\nHost: a\n\nGET /products/3 HTTP/1.1\nHost: a\n\n"))
	k.reply(k.server(0), http("HTTP/1.1 200 OK\nContent-Length: 3\n\none"))
	k.reply(k.server(1), http("HTTP/1.1 200 OK\nContent-Length: 5\n\nthree"))
	if got := string(k.got); !strings.Contains(got, "one") || strings.Index(got, "404 Not Found") < strings.Index(got, "one") || !strings.HasSuffix(got, "three") {
		t.Errorf("in a pipeline: %q", got)
	}
}

// TestTimeouts: a head that does not come in time is answered with 408, a
// connection without a request is closed without a word.
func TestTimeouts(t *testing.T) {
	for _, c := range []struct {
		text string
		wait int64
		want string
		fin  bool
	}{
		{"GET / HTT", 14 * second, "", false},
		{"GET / HTT", 16 * second, "HTTP/1.1 408 Request Timeout", true},
		{"\r\n", 16 * second, "HTTP/1.1 408 Request Timeout", true},
	} {
		g := newRig(t, oneServer)
		k := newChat(g, c1, 100)
		k.send(c.text)
		k.wait(c.wait)
		if !strings.HasPrefix(string(k.got), c.want) || c.want == "" && len(k.got) > 0 || k.fin != c.fin {
			t.Errorf("%q after %d s: %q, closed %v", c.text, c.wait/second, k.got, k.fin)
		}
	}
	g := newRig(t, oneServer, keepIdle, func(s *farm.Spec) { s.Farms[0].Timeouts.Idle = 7 * second })
	k := newChat(g, c1, 100)
	k.send(http("GET / HTTP/1.1\nHost: a\n\n"))
	k.reply(k.server(0), http("HTTP/1.1 204 No Content\n\n"))
	k.got = nil
	k.wait(6 * second)
	if k.fin {
		t.Error("closed before its idle time is over")
	}
	k.wait(2 * second)
	if !k.fin || len(k.got) > 0 {
		t.Errorf("after its idle time: closed %v, got %q", k.fin, k.got)
	}
}
