// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"github.com/weirgate/weir/integration/sim/tcp"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/packet"
)

func (w *World) redispatched() uint64 { return w.eng.Count.Get(engine.ReasonRedispatchIdempotent) }

// toClient checks a packet from the engine to a client.
func (o *observer) toClient(t *packet.TCP) {
	w := o.w
	fl := t.Flags()
	flows := o.clients[t.Dst()]
	f := last(flows)
	fail := func(inv, format string, args ...any) {
		w.failFlow(t.Dst(), packet.Tuple{}, inv, format, args...)
	}
	if fl.Has(packet.SYN) {
		o.synACK(t, flows, fail)
		return
	}
	if fl.Has(packet.RST) {
		f.reset = true
		return // the client's application judges it
	}
	if !fl.Has(packet.ACK) {
		fail("INV-3", "a packet to %s has no acknowledgment", t.Dst())
		return
	}
	var at, ack int64
	ok := false
	for i := len(flows) - 1; i >= 0 && !ok; i-- {
		f = flows[i]
		c := f.c.conn
		if c == nil || !c.Synchronised() {
			continue
		}
		at, ack = wide(t.Seq(), c.IRS(), f.top), wide(t.Ack(), f.iss, f.acked)
		ok = at >= 0 && at <= int64(f.top)+1<<26 && ack >= 1 && ack <= int64(f.acked)+1<<26
	}
	if !ok {
		fail("INV-3", "a packet to %s (seq %d, ack %d) fits none of its connections", t.Dst(), t.Seq(), t.Ack())
		return
	}
	// INV-6: nothing is acknowledged that was not seen.
	if have := f.in.Prefix(0); uint64(ack) > have {
		fail("INV-6", "byte %d of %s's stream is acknowledged, and only %d were seen", ack-2, f.c, have-1)
		return
	}
	f.acked = max(f.acked, uint64(ack))
	// INV-6: no window that nobody has.
	o.windowToClient(t, f, uint64(ack), fail)
	o.sackBlocks(t, f.iss, &f.in, uint64(ack), fail)
	// INV-1 and INV-2: the payload.
	n := uint64(t.PayloadLen())
	if n > 0 {
		if at < 1 {
			fail("INV-1", "%d bytes for %s stand before its stream", n, f.c)
			return
		}
		if f.closed && uint64(at)+n > f.fin {
			fail("INV-1", "%d bytes for %s stand behind the FIN", n, f.c)
			return
		}
		if limit := f.edge + handOver; uint64(at)+n > limit {
			fail("INV-6", "%s gets %d bytes up to position %d; its window ends at %d", f.c, n, uint64(at)+n, f.edge)
			return
		}
		o.payloadToClient(f, uint64(at), t.Payload(), fail)
	}
	end := uint64(at) + n
	if fl.Has(packet.FIN) {
		o.finToClient(f, end, fail)
		end++
	}
	f.top = max(f.top, end)
}

type failure func(inv, format string, args ...any)

// synACK: only what was offered is agreed to.
func (o *observer) synACK(t *packet.TCP, flows []*clientFlow, fail failure) {
	f := last(flows)
	opt := t.SYNOptions()
	p := &f.c.plan.Opt
	if c := f.c.conn; len(flows) > 1 && c != nil && uint32(t.Ack()) != c.ISS()+1 {
		// A late duplicate of an earlier connection's SYN on this port is
		// answered like any SYN; the client knows better.
		for _, old := range flows {
			if uint32(t.Ack()) == old.iss+1 {
				p = &old.c.plan.Opt
			}
		}
	}
	switch {
	case !t.Flags().Has(packet.SYN|packet.ACK) || t.PayloadLen() != 0:
		fail("INV-3", "a SYN with flags %v and %d bytes goes to a client", t.Flags(), t.PayloadLen())
	case opt.WindowScale >= 0 && p.Scale < 0, opt.SACKPermitted && !p.SACK, opt.Timestamps:
		fail("TCP", "a SYN-ACK offers %+v to a client that did not ask for it", opt)
	case t.Window() > holdWindow:
		fail("INV-6", "a SYN-ACK offers a window of %d", t.Window())
	}
}

// payloadToClient compares bytes with the answers that this client is owed.
func (o *observer) payloadToClient(f *clientFlow, at uint64, b []byte, fail failure) {
	for len(b) > 0 && o.w.viol == nil {
		a, i := f.locate(at)
		if a == nil {
			end := uint64(1)
			if n := len(f.answers); n > 0 {
				end = f.answers[n-1].end()
			}
			// The engine may let out what it has kept before the packet that
			// filled the gap: raw emissions come first.
			if at < end || at > end+1<<20 || len(f.answers) >= f.c.next {
				inv, x := o.foreign(b, f.c)
				owner := ""
				if x != nil {
					owner = " (of " + x.conn.String() + ")"
				}
				fail(inv, "%s, who has asked %d times, gets %d bytes at position %d beyond its answers, which end at %d: %.60q%s",
					f.c, f.c.next, len(b), at, end, b, owner)
				return
			}
			if at > end {
				f.begin(nil, o.w.now)
				if at >= f.answers[len(f.answers)-1].end() {
					fail("INV-1", "%s gets %d bytes at position %d, and the answer before is not complete", f.c, len(b), at)
				}
				continue
			}
			f.begin(b, o.w.now)
			continue
		}
		x := f.c.exchanges[i]
		if a.own {
			o.ownToClient(f, a, x, at, b, fail)
			return
		}
		n := min(uint64(len(b)), a.end()-at)
		if bad := x.reply.match(at-a.start, b[:n], &o.scratch); bad >= 0 {
			inv, other := o.foreign(b[:n], f.c)
			owner := ""
			if other != nil {
				owner = " of " + other.conn.String()
			}
			fail(inv, "%s gets a wrong byte at position %d of the answer to request %d (%s)%s: %.80q", f.c, at-a.start+uint64(bad), i, x.Nonce, owner, b[bad:n])
			return
		}
		at, b = at+n, b[n:]
	}
}

// locate finds the answer to which a position belongs.
func (f *clientFlow) locate(at uint64) (*answer, int) {
	for i := len(f.answers) - 1; i >= 0; i-- {
		a := &f.answers[i]
		if at >= a.start {
			if at < a.end() || a.own && !a.whole && at == a.end() {
				return a, i
			}
			return nil, 0
		}
	}
	return nil, 0
}

// begin notes the first bytes of an answer: a server's or, if they are not
// that, the engine's own.
func (f *clientFlow) begin(b []byte, now int64) {
	start := uint64(1)
	if n := len(f.answers); n > 0 {
		start = f.answers[n-1].end()
	}
	x := f.c.exchanges[len(f.answers)]
	a := answer{start: start, size: x.reply.size(), stood: now - f.news}
	var scratch []byte
	k := min(len(b), 12)
	a.own = k > 0 && x.reply.match(0, b[:k], &scratch) >= 0 && string(b[:min(k, 9)]) == "HTTP/1.1 "[:min(k, 9)]
	f.answers = append(f.answers, a)
}

// ownToClient collects an answer of the engine's own.
func (o *observer) ownToClient(f *clientFlow, a *answer, x *Exchange, at uint64, b []byte, fail failure) {
	k := at - a.start
	have := uint64(len(a.bytes))
	if k > have {
		fail("INV-1", "%s gets the engine's own answer with a gap", f.c)
		return
	}
	for i, c := range b {
		if j := k + uint64(i); j < have {
			if a.bytes[j] != c {
				fail("INV-1", "%s gets byte %d of the engine's own answer in two forms", f.c, j)
				return
			}
		} else if a.whole {
			fail("INV-1", "%s gets more than the engine's own answer: %.60q", f.c, b[i:])
			return
		} else {
			a.bytes = append(a.bytes, c)
			have++
			if c == '\n' {
				a.ownHead(x.Method == "HEAD" && f.in.Prefix(0) >= f.requestStart(x.index)+x.headLen)
			}
		}
	}
	if _, other := o.foreign(b, nil); other != nil {
		fail("INV-2", "an answer of the engine's own holds the nonce %s", other.Nonce)
	}
}

// finToClient: a FIN stands where an answer ends, never inside one.
func (o *observer) finToClient(f *clientFlow, at uint64, fail failure) {
	if f.closed && f.fin != at {
		fail("TCP", "%s gets a FIN at position %d after one at %d", f.c, at, f.fin)
		return
	}
	f.closed, f.fin = true, at
	end := uint64(1)
	if n := len(f.answers); n > 0 {
		end = f.answers[n-1].end()
	}
	if at < end || at > end {
		fail("INV-1", "%s gets a FIN at position %d; its answers end at %d", f.c, at, end)
	}
}

// windowToClient: what is advertised to a client is what its server has, or
// W_hold.
func (o *observer) windowToClient(t *packet.TCP, f *clientFlow, ack uint64, fail failure) {
	w := uint64(t.Window())
	if f.c.conn.Options().Scale >= 0 {
		w <<= 7
	}
	if c := f.c.conn; c.FINSent() && ack > c.Written()+1 {
		ack-- // the FIN takes a place in the stream but none in a buffer
	}
	edge := ack + w
	limit := ack + holdWindow
	for _, x := range f.c.exchanges {
		for _, s := range x.flows {
			for i := range s.bindings {
				b := &s.bindings[i]
				if b.x != x || b.client != f || s.edge < b.start {
					continue
				}
				// Positions of the request in the client's stream.
				start := f.requestStart(x.index)
				limit = max(limit, start+s.edge-b.start)
			}
		}
	}
	if edge > limit {
		fail("INV-6", "%s is offered a window up to position %d; nobody can take more than up to %d", f.c, edge, limit)
	}
}

// requestStart is the position of a request in the client's stream.
func (f *clientFlow) requestStart(i int) uint64 {
	at := uint64(1)
	for _, x := range f.c.exchanges[:i] {
		at += x.request.size()
	}
	return at
}

// sackBlocks: a SACK block reports only bytes that were seen.
func (o *observer) sackBlocks(t *packet.TCP, iss uint32, in *tcp.Ranges, ack uint64, fail failure) {
	off, n := t.SACK()
	for i := range n {
		b := t.SACKBlock(off, i)
		l, r := wide(b.Left, iss, ack), wide(b.Right, iss, ack)
		if r <= int64(ack) && r > l {
			// A duplicate's report (RFC 2883). The insertion before it may be
			// folded into the difference, and its edges InsLen too low.
			continue
		}
		if l < 1 || r <= l || !in.Has(uint64(l), uint64(r)) {
			fail("INV-6", "a SACK block for %s reports positions %d to %d, which were not all seen", t.Dst(), l, r)
			return
		}
	}
}

// toServer checks a packet from the engine to a server.
func (o *observer) toServer(t *packet.TCP) {
	w := o.w
	key := packet.Tuple{Src: t.Dst(), Dst: t.Src()}
	fl := t.Flags()
	var owner packet.Endpoint
	fail := func(inv, format string, args ...any) { w.failFlow(owner, key, inv, format, args...) }
	if fl.Has(packet.SYN) {
		if fl != packet.SYN || t.PayloadLen() != 0 || t.SYNOptions().Timestamps || t.SYNOptions().MSS == 0 {
			fail("INV-3", "a SYN to a server has flags %v, %d bytes and options %+v", fl, t.PayloadLen(), t.SYNOptions())
		}
		return
	}
	flows := o.servers[key]
	f := last(flows)
	if f == nil {
		if !fl.Has(packet.RST) {
			fail("INV-3", "a packet goes to a server that knows no such connection: %s", t.Tuple())
		}
		return
	}
	if b := f.current(); b != nil {
		owner = b.client.c.local
	}
	if fl.Has(packet.RST) {
		f.reset = true
		return
	}
	var at, ack int64
	ok := false
	for i := len(flows) - 1; i >= 0 && !ok; i-- {
		f = flows[i]
		at, ack = wide(t.Seq(), f.ess, f.top), wide(t.Ack(), f.iss, f.acked)
		ok = at >= 0 && at <= int64(f.top)+1<<26 && ack >= 1 && ack <= int64(f.acked)+1<<26
	}
	if !ok {
		fail("INV-3", "a packet %s (seq %d, ack %d) fits no connection of the server", t.Tuple(), t.Seq(), t.Ack())
		return
	}
	if have := f.in.Prefix(0); uint64(ack) > have {
		fail("INV-6", "byte %d of the stream of %s is acknowledged, and only %d were seen", ack-2, f.key, have-1)
		return
	}
	f.acked = max(f.acked, uint64(ack))
	n := uint64(t.PayloadLen())
	if n > 0 {
		if at < 1 {
			fail("INV-1", "%d bytes stand before the stream of %s", n, f.key)
			return
		}
		// One byte beyond the window is a probe.
		if end := uint64(at) + n; end > f.edge && !(n == 1 && uint64(at) <= f.edge) {
			fail("INV-6", "%s gets %d bytes up to position %d; its window ends at %d", f.key, n, end, f.edge)
			return
		}
		o.payloadToServer(f, uint64(at), uint64(ack), t.Payload(), fail)
		if b := f.current(); b != nil {
			owner = b.client.c.local
		}
	}
	o.windowToServer(t, f, uint64(ack), fail)
	o.sackBlocks(t, f.iss, &f.in, uint64(ack), fail)
	f.top = max(f.top, uint64(at)+n)
}

// payloadToServer compares bytes with the requests that run over the
// connection, and notes a new one.
func (o *observer) payloadToServer(f *serverFlow, at, ack uint64, b []byte, fail failure) {
	for len(b) > 0 && o.w.viol == nil {
		k := f.locate(at)
		if k == nil {
			end := uint64(1)
			if cur := f.current(); cur != nil {
				end = cur.end()
			}
			if at > end+uint64(len(f.head)) || at < end {
				fail("INV-1", "%d bytes for %s stand at position %d; its requests end at %d: %.60q", len(b), f.key, at, end, b)
				return
			}
			// A request begins: which?
			f.head = append(f.head[:at-end], b...)
			x := o.w.findNonce(f.head)
			if x == nil {
				if len(f.head) > 100 {
					fail("INV-1", "%s gets what is no request: %.60q", f.key, f.head)
				}
				return
			}
			o.bind(f, x, end, ack, fail)
			f.head = f.head[:0]
			continue
		}
		n := min(uint64(len(b)), k.end()-at)
		if has := f.has(); at < has {
			// The server has this. The engine may place the client's
			// retransmission of what stands before an insertion InsLen too
			// high (splice.Epoch.Fold).
			old := min(n, has-at)
			at, b = at+old, b[old:]
			continue
		}
		if bad := k.x.served.match(at-k.start, b[:n], &o.scratch); bad >= 0 {
			inv, _ := o.foreign(b[:n], k.client.c)
			fail(inv, "%s gets a wrong byte at position %d of request %s: %.80q", f.key, at-k.start+uint64(bad), k.x.Nonce, b[bad:n])
			return
		}
		at, b = at+n, b[n:]
	}
}

// has is the position up to which the server has the stream.
func (f *serverFlow) has() uint64 {
	if f.conn == nil {
		return 1
	}
	return 1 + f.conn.Received()
}

func (f *serverFlow) locate(at uint64) *binding {
	for i := len(f.bindings) - 1; i >= 0; i-- {
		b := &f.bindings[i]
		if at >= b.start {
			if at < b.end() {
				return b
			}
			return nil
		}
	}
	return nil
}

// bind notes the beginning of a request on a server connection. The exchange
// before must be over: all of its response seen, and acknowledged to the server
// (SPLICING.md section C).
func (o *observer) bind(f *serverFlow, x *Exchange, at, ack uint64, fail failure) {
	resp := uint64(1)
	if cur := f.current(); cur != nil {
		resp = cur.respStart + cur.x.reply.size()
		if f.in.Prefix(0) < resp {
			fail("INV-2", "request %s begins on %s, and the response of request %s, which ends at %d, is seen up to %d only",
				x.Nonce, f.key, cur.x.Nonce, resp, f.in.Prefix(0))
			return
		}
	}
	if ack != resp {
		fail("INV-2", "request %s begins on %s with acknowledgment %d; the responses before end at %d", x.Nonce, f.key, ack, resp)
		return
	}
	cf := x.conn.flow
	b := binding{x: x, start: at, respStart: resp, client: cf, cliResp: 1}
	if n := len(cf.answers); n > 0 {
		b.cliResp = cf.answers[n-1].end()
	}
	f.bindings = append(f.bindings, b)
	x.flows = append(x.flows, f)
}

// windowToServer: what is advertised to a server is what the client has, the
// two segments of the hand-over, or the drain's.
func (o *observer) windowToServer(t *packet.TCP, f *serverFlow, ack uint64, fail failure) {
	w := uint64(t.Window())
	if f.conn != nil && f.conn.PeerScaled() {
		w <<= 7
	}
	edge := ack + w
	limit := ack + handOver
	if b := f.current(); b != nil {
		if e := b.client.edge; e > b.cliResp {
			limit = max(limit, b.respStart+e-b.cliResp)
		}
		if b.client.c.through || b.client.c.left {
			limit = max(limit, ack+drainWindow)
		}
	}
	if edge > limit {
		fail("INV-6", "%s is offered a window up to position %d; nobody can take more than up to %d", f.key, edge, limit)
	}
}
