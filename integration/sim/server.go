// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bytes"
	"math/rand/v2"

	"github.com/weirgate/weir/integration/sim/tcp"
	"github.com/weirgate/weir/module/packet"
)

// server is one server of the farm.
type server struct {
	w     *World
	index int
	plan  *ServerPlan
	end   packet.Endpoint
	rnd   *rand.Rand
	iss   uint32
	conns int
}

func newServer(w *World, i int) *server {
	s := &server{w: w, index: i, plan: &w.Scenario.Servers[i], end: packet.EndpointFrom(serverAddr(w.Scenario.V6, i))}
	s.rnd = stream(w.Scenario.Seed, partServer, uint64(i)+1000)
	s.iss = s.plan.Opt.ISS
	w.host(s.end.Addr, FromServer).Listen(s.end, s.accept)
	return s
}

func (s *server) accept(remote packet.Endpoint) (tcp.Options, tcp.App, bool) {
	if s.plan.Refuse > 0 && s.rnd.Float64() < s.plan.Refuse {
		return tcp.Options{}, nil, false
	}
	opt := s.plan.Opt
	opt.ISS = s.iss
	s.iss += 70000 + uint32(s.rnd.IntN(1<<22))
	s.conns++
	c := &serverConn{s: s}
	c.flow = s.w.obs.accepted(c, packet.Tuple{Src: s.end, Dst: remote}, opt.ISS)
	return opt, c, true
}

// serverConn is the application behind one server connection.
type serverConn struct {
	s      *server
	conn   *tcp.Conn
	flow   *serverFlow
	buf    []byte // the beginning of a request whose nonce is not complete
	cur    *Exchange
	off    uint64 // bytes of cur that were read
	head   bool   // its head was read
	busy   bool   // from the first byte of a request to the last one of its response
	early  bool   // the response is written, the request not read to its end
	turn   int    // counts requests
	left   bool   // closed or reset by this end while idle, or after a response
	paused bool
	over   bool
	scr    []byte
}

// Connected implements tcp.App.
func (c *serverConn) Connected(conn *tcp.Conn) {
	c.conn = conn
	c.flow.opened(conn)
}

// Readable implements tcp.App.
func (c *serverConn) Readable(conn *tcp.Conn) {
	if c.paused {
		return
	}
	if p := c.s.plan.Lazy; p > 0 && c.s.rnd.IntN(4) == 0 {
		c.paused = true
		c.s.w.after(1+c.s.rnd.Int64N(p), func() {
			c.paused = false
			if !c.over {
				c.consume()
			}
		})
		return
	}
	c.consume()
}

func (c *serverConn) consume() {
	for c.conn.Unread() > 0 && !c.over && c.s.w.viol == nil {
		c.got(c.conn.Read(c.conn.Unread()))
	}
}

func (c *serverConn) fail(inv, format string, args ...any) {
	var end packet.Endpoint
	if c.cur != nil {
		end = c.cur.conn.local
	}
	c.s.w.failFlow(end, c.flow.key, inv, format, args...)
}

var nonceMark = []byte(" /n/")

// got takes bytes of the stream: they must be whole requests, one at a time
// (INV-1).
func (c *serverConn) got(b []byte) {
	w := c.s.w
	for len(b) > 0 && w.viol == nil && !c.over {
		if c.cur == nil {
			if c.busy {
				c.fail("INV-1", "server s%d gets a request before it has answered the one before", c.s.index+1)
				return
			}
			if c.left {
				return // nobody reads any more
			}
			c.buf = append(c.buf, b...)
			x := w.findNonce(c.buf)
			if x == nil {
				if len(c.buf) > 100 {
					c.fail("INV-1", "server s%d gets what is no request: %.60q", c.s.index+1, c.buf)
				}
				return
			}
			c.cur, c.off, c.head, c.busy = x, 0, false, true
			c.turn++
			b, c.buf = c.buf, nil
		}
		x := c.cur
		n := min(uint64(len(b)), x.served.size()-c.off)
		if bad := x.served.match(c.off, b[:n], &c.scr); bad >= 0 {
			c.fail("INV-1", "server s%d: byte %d of request %s is wrong", c.s.index+1, c.off+uint64(bad), x.Nonce)
			return
		}
		c.off += n
		b = b[n:]
		if !c.head && c.off >= x.headLen+x.insLen {
			c.head = true
			c.reached(x)
		}
		if c.off == x.served.size() {
			x.executed++
			c.cur = nil
			if !x.Reply.Early {
				c.respond(x)
			} else if c.early {
				c.busy, c.early = false, false
			}
		}
	}
}

// findNonce looks for the nonce of a request at its beginning.
func (w *World) findNonce(b []byte) *Exchange {
	i := bytes.Index(b, nonceMark)
	if i < 0 || len(b) < i+4+32 {
		return nil
	}
	return w.byNonce[Nonce(b[i+4:])]
}

// reached notes that a server application has seen a request (INV-4).
func (c *serverConn) reached(x *Exchange) {
	x.reached++
	if x.reached > 1 && !x.repeatable() {
		c.fail("INV-4", "request %s, a %s, has reached a server application %d times", x.Nonce, x.Method, x.reached)
		return
	}
	if x.Expect && !x.Reply.Early {
		c.conn.WriteSource(&x.reply, 0, 25) // 100 Continue
	}
	if x.Reply.Early {
		c.respond(x)
	}
}

// respond answers.
func (c *serverConn) respond(x *Exchange) {
	if x.Reply.Fault == FaultMute {
		return
	}
	if x.Reply.Think == 0 {
		c.begin(x)
		return
	}
	c.s.w.after(x.Reply.Think, func() { c.begin(x) })
}

func (c *serverConn) begin(x *Exchange) {
	if c.over {
		return
	}
	from := uint64(0)
	if x.Expect && !x.Reply.Early {
		from = 25
	}
	to := x.reply.size()
	if x.Reply.Fault == FaultReset || x.Reply.Fault == FaultTrunc {
		to = max(from, uint64(x.Reply.At*float64(to)))
	}
	var cuts []uint64
	for range x.Reply.Pieces - 1 {
		cuts = append(cuts, from+c.s.rnd.Uint64N(to-from+1))
	}
	c.piece(x, from, to, cuts)
}

func (c *serverConn) piece(x *Exchange, at, end uint64, cuts []uint64) {
	if c.over {
		return
	}
	to := end
	for _, k := range cuts {
		if k > at {
			to = min(to, k)
		}
	}
	c.conn.WriteSource(&x.reply, at, to-at)
	if to < end {
		c.s.w.after(x.Reply.Gap, func() { c.piece(x, to, end, cuts) })
		return
	}
	c.answered(x)
}

// answered is what a server does after the last byte of a response.
func (c *serverConn) answered(x *Exchange) {
	if c.over {
		return
	}
	switch x.Reply.Fault {
	case FaultReset:
		c.left = true
		c.conn.Abort()
		return
	case FaultTrunc:
		c.left = true
		c.conn.CloseWrite()
		return
	case FaultExtra:
		more := func() { c.conn.Write([]byte("HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")) }
		if x.Reply.Lag > 0 {
			c.s.w.after(x.Reply.Lag, more)
			break
		}
		more()
		c.left = true
	}
	c.early = x.Reply.Early && c.cur != nil // the rest of the request is still to come
	c.busy = c.early
	p := c.s.plan
	switch {
	case x.Reply.Close || x.Reply.Kind == KindUntilClose && !x.bodyless() || p.MaxReq > 0 && c.turn >= p.MaxReq || c.conn.PeerFIN():
		c.left = true
		c.conn.CloseWrite()
	case p.IdleClose > 0:
		c.closeIdle(c.turn)
	}
}

// closeIdle closes a connection on which nothing was asked for some time. The
// time counts from the end of the response at the earliest: a server that
// resets what it has not delivered has only itself to blame.
func (c *serverConn) closeIdle(turn int) {
	c.s.w.after(1+c.s.rnd.Int64N(c.s.plan.IdleClose), func() {
		switch {
		case c.over || c.turn != turn || c.busy || len(c.buf) > 0 || c.conn.Unread() > 0:
		case c.conn.Acked() < c.conn.Written():
			c.closeIdle(turn)
		case c.s.plan.CloseReset:
			c.left = true
			c.conn.Abort()
		default:
			c.left = true
			c.conn.Close()
		}
	})
}

// PeerClosed implements tcp.App.
func (c *serverConn) PeerClosed(conn *tcp.Conn) {
	c.consume()
	if !c.busy && !c.over {
		conn.Close()
	}
}

// Closed implements tcp.App.
func (c *serverConn) Closed(*tcp.Conn, error) { c.over = true }
