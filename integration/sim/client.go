// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/weirgate/weir/integration/sim/tcp"
	"github.com/weirgate/weir/module/packet"
)

// client is the application behind one client connection.
type client struct {
	w         *World
	index     int
	plan      *ConnPlan
	rnd       *rand.Rand
	exchanges []*Exchange
	local     packet.Endpoint
	conn      *tcp.Conn
	flow      *clientFlow

	next     int // request to begin next
	done     int // responses that are complete
	cur      *Exchange
	off      uint64 // of cur that is written
	cuts     []uint64
	sending  bool // a request is being written, or is about to be
	awaiting bool // for 100 Continue
	stop     bool // nothing more is asked
	left     bool // broke off
	cut      bool // left a request unfinished, because its answer came early
	read     uint64
	paused   bool
	eof      bool
	through  bool
	progress int64
	scratch  []byte
}

func newClient(w *World, i int) *client {
	p := &w.Scenario.Conns[i]
	c := &client{w: w, index: i, plan: p, rnd: stream(w.Scenario.Seed, partBytes, uint64(i))}
	c.local = packet.EndpointFrom(w.clientEnd(i))
	fwd := ""
	if w.Scenario.Forward {
		fwd = c.local.Addr.String()
	}
	for k := range p.Requests {
		x := &Exchange{ReqPlan: p.Requests[k], conn: c, index: k, Nonce: newNonce(c.rnd)}
		x.write(fwd, c.rnd)
		w.byNonce[x.Nonce] = x
		c.exchanges = append(c.exchanges, x)
	}
	return c
}

func (c *client) String() string {
	return fmt.Sprintf("client %d (%s, %d of %d requests answered)", c.index, c.local, c.done, len(c.exchanges))
}

func (c *client) schedule(d int64) { c.w.after(d, c.dial) }

func (c *client) dial() {
	opt := c.plan.Opt
	h := c.w.host(c.local.Addr, FromClient)
	if c.plan.After != 0 {
		// Numbers go up from incarnation to incarnation (RFC 6528).
		old := c.w.clients[c.plan.After-1].conn
		opt.ISS = old.ISS() + uint32(old.Written()) + 2 + uint32(c.rnd.IntN(1<<20))
	}
	c.progress = c.w.now
	c.flow = c.w.obs.dialled(c)
	c.conn = h.Dial(c.local, c.w.vip, opt, c)
	c.flow.iss = c.conn.ISS()
	c.watch()
}

// watch looks whether the client waits for too long.
func (c *client) watch() {
	if c.through {
		return
	}
	bound := c.w.Scenario.Bound
	if c.w.now-c.progress > bound && c.done < c.next && !c.left {
		c.fail("liveness", "%s has waited %.1f s for the answer to request %d (%s)", c, float64(c.w.now-c.progress)/1e9, c.done, c.exchanges[c.done].Nonce)
		return
	}
	c.w.after(bound/4+1, c.watch)
}

func (c *client) fail(inv, format string, args ...any) {
	c.w.failFlow(c.local, packet.Tuple{}, inv, format, args...)
}

// Connected implements tcp.App.
func (c *client) Connected(*tcp.Conn) {
	c.progress = c.w.now
	c.sending = true
	c.w.after(c.plan.Wait, func() {
		c.sending = false
		c.pump()
	})
}

// pump begins the next request if it may.
func (c *client) pump() {
	if c.sending || c.stop || c.through || c.next >= len(c.exchanges) || c.next-c.done >= c.plan.Pipeline {
		return
	}
	x := c.exchanges[c.next]
	c.next++
	c.sending = true
	c.progress = c.w.now
	if x.Pause == 0 {
		c.begin(x)
		return
	}
	c.w.after(x.Pause, func() { c.begin(x) })
}

func (c *client) begin(x *Exchange) {
	if c.through || c.stop {
		return
	}
	x.started = c.w.now
	c.progress = c.w.now
	c.cur, c.off = x, 0
	c.cuts = c.cuts[:0]
	if c.plan.Lines {
		for i := uint64(0); i < x.headLen; {
			k := bytes.Index(x.request.head[i:], []byte("\r\n"))
			i += uint64(k) + 2
			c.cuts = append(c.cuts, i)
		}
	} else {
		for range c.plan.Pieces - 1 {
			c.cuts = append(c.cuts, 1+c.rnd.Uint64N(x.request.size()))
		}
	}
	if x.Expect {
		c.cuts = append(c.cuts, x.headLen)
	}
	c.piece(x)
}

// piece writes up to the next cut.
func (c *client) piece(x *Exchange) {
	for c.cur == x && !c.through && !c.stop {
		to := x.request.size()
		for _, k := range c.cuts {
			if k > c.off {
				to = min(to, k)
			}
		}
		n := to - c.off
		end := false
		if a := c.plan.AbortSent; c.plan.Abort != AbortNone && a != 0 && c.conn.Written()+n >= a {
			n = min(n, a-min(a, c.conn.Written()))
			end = true
		}
		c.progress = c.w.now
		at := c.off
		c.off += n
		c.conn.WriteSource(&x.request, at, n)
		if end {
			c.breakOff()
			return
		}
		if c.through || c.cur != x {
			return
		}
		if c.off == x.request.size() {
			c.cur, c.sending = nil, false
			if c.plan.End == EndHalf && c.next == len(c.exchanges) {
				c.conn.CloseWrite()
			}
			c.pump()
			return
		}
		if x.Expect && c.off == x.headLen {
			c.awaiting = true
			c.w.after(second, func() { c.proceed(x) })
			return
		}
		if c.plan.Gap > 0 {
			c.w.after(c.plan.Gap, func() { c.piece(x) })
			return
		}
	}
}

// proceed goes on after 100 Continue, or after having waited for it.
func (c *client) proceed(x *Exchange) {
	if c.awaiting && c.cur == x {
		c.awaiting = false
		c.piece(x)
	}
}

// breakOff leaves as the plan says.
func (c *client) breakOff() {
	if c.left {
		return
	}
	c.left, c.stop, c.cur = true, true, nil
	for _, x := range c.exchanges {
		if !x.answered && x.own == 0 {
			x.excuse = "the client broke off"
		}
	}
	switch c.plan.Abort {
	case AbortReset:
		c.conn.Abort()
	case AbortClose:
		c.conn.Close()
	case AbortVanish:
		c.conn.Vanish()
	case AbortHalf:
		c.conn.CloseWrite()
		// Whatever comes is read; then the other side closes or resets. The
		// reset may be lost, so the client waits for a time only.
		c.w.after(c.w.Scenario.Bound, func() {
			if !c.through {
				c.conn.Abort()
			}
		})
	}
}

// Readable implements tcp.App.
func (c *client) Readable(conn *tcp.Conn) {
	if c.paused {
		return
	}
	if p := c.plan.ReadPause; p > 0 && c.rnd.IntN(8) == 0 {
		c.paused = true
		c.w.after(c.rnd.Int64N(p)+1, func() {
			c.paused = false
			if !c.through {
				c.consume(conn)
			}
		})
		return
	}
	c.consume(conn)
}

func (c *client) consume(conn *tcp.Conn) {
	for conn.Unread() > 0 && c.w.viol == nil {
		b := conn.Read(conn.Unread())
		if a := c.plan.AbortRead; c.plan.Abort != AbortNone && a != 0 && !c.left && c.read+uint64(len(b)) >= a {
			c.got(b)
			c.breakOff()
			if c.conn.State() == tcp.Closed {
				return
			}
			continue
		}
		c.got(b)
	}
	if c.eof {
		c.peerClosed()
	}
}

// got takes bytes of the stream: they must be the answers to this client's
// requests, one after the other (INV-1).
func (c *client) got(b []byte) {
	c.progress = c.w.now
	for len(b) > 0 && c.w.viol == nil {
		if c.done >= c.next {
			c.fail("INV-1", "%s gets %d bytes that it did not ask for: %.60q", c, len(b), b)
			return
		}
		x := c.exchanges[c.done]
		r := c.flow.answer(c.done)
		if r == nil {
			c.fail("INV-1", "%s gets bytes %d of its stream, which no observed packet brought", c, c.read)
			return
		}
		n := min(uint64(len(b)), r.end()-1-c.read)
		var bad int
		if r.own {
			bad = -1
			if !bytes.Equal(r.bytes[c.read+1-r.start:][:n], b[:n]) {
				bad = 0
			}
		} else {
			bad = x.reply.match(c.read+1-r.start, b[:n], &c.scratch)
		}
		if bad >= 0 {
			c.fail("INV-1", "%s: byte %d of the answer to request %d is wrong", c, c.read+1-r.start+uint64(bad), c.done)
			return
		}
		c.read += n
		b = b[n:]
		if !r.own && x.interim > 0 && c.awaiting && c.read+1-r.start >= min(x.interim, 25) {
			c.proceed(x)
		}
		if c.read == r.end()-1 && (!r.own || r.whole) {
			c.complete(x, r)
		}
	}
}

// complete ends an exchange whose last byte was read.
func (c *client) complete(x *Exchange, r *answer) {
	c.done++
	x.finished = c.w.now
	if r.own {
		x.own = r.status
		if r.status == 504 && r.stood >= patience && x.excuse == "" {
			x.excuse = "nothing new came from anybody for the timeout of a response"
		}
		if why := x.mayBeRefused(); why == "" && !c.left {
			c.fail("INV-4", "%s: request %d (%s %s) is answered %d by the engine itself without a reason", c, x.index, x.Method, x.Nonce, r.status)
			return
		}
	} else {
		x.answered = true
	}
	if c.cur == x {
		// Answered before it was asked to the end.
		c.cur, c.awaiting, c.sending = nil, false, false
		c.stop, c.cut = true, true
	}
	if x.closing() || r.own && r.closes {
		c.stop = true
	}
	if c.done == len(c.exchanges) || c.stop {
		c.finish(x, r)
		return
	}
	c.pump()
}

// mayBeRefused gives a reason for which the engine may answer instead of a
// server.
func (x *Exchange) mayBeRefused() string {
	switch {
	case x.excuse != "":
		return x.excuse
	case x.Reply.Fault != FaultNone:
		return "the server fails by plan"
	case x.repeatable():
		return ""
	}
	for _, f := range x.flows {
		if f.server != nil && f.server.left {
			return "the server closed its connection at the same time"
		}
	}
	return ""
}

// finish is what a client does that has everything.
func (c *client) finish(x *Exchange, r *answer) {
	c.stop = true
	if c.left || c.eof {
		return
	}
	if x.closing() && !x.Reply.Early && !r.own || r.own && r.closes {
		return // the other side closes
	}
	switch c.plan.End {
	case EndClose:
		c.conn.Close()
	case EndHalf:
		c.conn.CloseWrite()
	case EndReset:
		c.conn.Abort()
	case EndVanish:
		c.conn.Vanish()
	}
}

// PeerClosed implements tcp.App.
func (c *client) PeerClosed(conn *tcp.Conn) {
	c.eof = true
	if !c.paused {
		c.consume(conn)
	}
}

// peerClosed judges the end of the stream: it must be that of an answer.
func (c *client) peerClosed() {
	c.eof = false
	c.progress = c.w.now
	if !c.left && c.w.viol == nil && c.done < len(c.exchanges) {
		x := c.exchanges[c.done]
		r := c.flow.answer(c.done)
		switch {
		case r != nil && c.read >= r.start:
			c.fail("INV-1", "%s: the answer to request %d ends with a FIN after %d of %d bytes", c, c.done, c.read+1-r.start, r.end()-r.start)
			return
		case c.done > 0 && c.exchanges[c.done-1].mayEnd():
			c.excuse("the server closed after the answer before")
		default:
			c.fail("INV-4", "%s: closed without an answer to request %d (%s %s)", c, c.done, x.Method, x.Nonce)
			return
		}
	}
	c.stop, c.cur = true, nil
	c.conn.Close()
}

// mayEnd says whether a server that answered this closed its connection after
// it, which ends the client's too.
func (x *Exchange) mayEnd() bool {
	if x.closing() || x.own != 0 || x.Reply.Fault != FaultNone {
		return true
	}
	for _, f := range x.flows {
		if f.server != nil && f.server.left {
			return true
		}
	}
	return false
}

func (c *client) excuse(why string) {
	for _, x := range c.exchanges[c.done:] {
		if x.excuse == "" {
			x.excuse = why
		}
	}
}

// Closed implements tcp.App.
func (c *client) Closed(_ *tcp.Conn, why error) {
	if c.through {
		return
	}
	if c.paused && (why == nil || errors.Is(why, tcp.ErrReset)) {
		c.paused = false
		c.consume(c.conn) // what came before the end can still be read
	}
	c.through = true
	c.w.open--
	for _, o := range c.w.clients {
		if o.plan.After == c.index+1 {
			o.schedule(1 + o.plan.Start/100)
		}
	}
	if c.w.viol != nil || why == nil || c.left {
		if why == nil && c.done < len(c.exchanges) && c.exchanges[c.done].excuse == "" && !c.stop {
			c.fail("INV-4", "%s is over, but request %d has no answer", c, c.done)
		}
		return
	}
	switch {
	case errors.Is(why, tcp.ErrAborted):
		return
	case c.done < len(c.exchanges) && c.exchanges[c.done].excuse != "":
		return
	case c.done < len(c.exchanges) && c.exchanges[c.done].Reply.Fault != FaultNone && c.exchanges[c.done].reached > 0:
		c.excuse("the server failed by plan")
		return
	case c.done < len(c.exchanges) && c.done > 0 && c.exchanges[c.done-1].mayEnd():
		// The server's close ended both sides; requests that crossed it are
		// answered by a reset.
		c.excuse("the server closed after the answer before")
		return
	case c.flow.silent || c.w.now-c.flow.heard > silence:
		c.excuse("nothing of the client's arrived for two minutes")
		return
	case c.done == len(c.exchanges) && !c.w.Scenario.Strict:
		if errors.Is(why, tcp.ErrReset) && c.w.gentle() && !c.cut {
			c.fail("TCP", "%s has all its answers and is reset all the same", c)
		}
		return
	}
	c.fail("INV-4", "%s ends with %q, request %d has no answer", c, why, c.done)
}

// gentle says whether the wires lose nothing.
func (w *World) gentle() bool {
	for _, s := range w.Scenario.Wires {
		if s.Loss+s.Duplicate+s.Reorder+s.Corrupt > 0 {
			return false
		}
	}
	return true
}
