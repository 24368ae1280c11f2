// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/pool"
	"github.com/weirgate/weir/module/splice"
)

// Times of the hold rules (DESIGN.md section 3.2), nanoseconds.
const (
	// nagleWait: a segment shorter than the client's MSS that does not
	// complete the head is acknowledged after this, because a client with
	// Nagle's algorithm would never send the rest otherwise.
	nagleWait = 40 * millisecond
	// holdWait: nothing stays unacknowledged longer, or the client's
	// retransmission timer would take a slow server for loss.
	holdWait = second
	// challengeEvery limits ACKs that answer unacceptable segments
	// (RFC 5961 section 7).
	challengeEvery = 500 * millisecond
)

// fromClient handles a packet to a VIP.
func (e *Engine) fromClient(key *packet.Tuple, p *packet.TCP, ev *Event) {
	r := e.clients.Lookup(key)
	if r == 0 {
		r = e.stranger(key, p)
		if r == 0 {
			return
		}
	}
	c := e.clients.At(r)
	fl := p.Flags()
	if c.Flags&splice.ClientWasReset != 0 {
		e.afterReset(key, r, c, p, ev)
		return
	}
	if fl.Has(packet.RST) {
		e.clientRST(r, c, p)
		return
	}
	if fl.Has(packet.SYN) || !fl.Has(packet.ACK) {
		// A plain SYN never comes here; what else has SYN is nonsense on a
		// synchronised connection (RFC 5961 section 4: challenge).
		e.challengeClient(r, c)
		return
	}
	// RFC 9293 section 3.10.7.4, fifth: an acknowledgment of what was never
	// sent is answered and dropped. It must not mark a response complete.
	ack := p.Ack()
	if !ack.In(c.SndUna.Sub(nearby), c.SndNxt.Add(1)) || !p.Seq().In(c.RcvNxt.Sub(nearby), c.RcvNxt.Add(nearby)) {
		if e.reincarnated(key, c, p) {
			e.Count.add(ReasonReincarnated)
			e.dropClient(r, c)
			e.fromClient(key, p, ev)
			return
		}
	}
	// RFC 5961 section 5: nor may it be older than the largest window that the
	// client could ever have offered.
	if c.SndNxt.Less(ack) || ack.Less(c.SndUna.Sub(packet.Size(splice.TrueWindow(0xffff, c.Scale)))) {
		e.Count.add(ReasonAckBeyond)
		e.challengeClient(r, c)
		return
	}
	if !acceptable(c, p) {
		e.Count.add(ReasonOutOfWindow)
		e.challengeClient(r, c)
		return
	}
	// Probes and repetitions are no sign of progress.
	if c.SndUna.Less(ack) || c.RcvNxt.Less(p.End()) {
		c.Last = e.now
	}
	if c.SndUna.LessEq(ack) {
		c.SndUna = ack
		c.SndWnd = splice.TrueWindow(p.Window(), c.Scale)
	}
	switch c.State {
	case splice.ClientSpliced:
		e.clientSpliced(r, c, p, ev)
	case splice.ClientHead, splice.ClientBinding:
		e.clientHeld(r, c, p, ev)
	case splice.ClientAnswering:
		e.clientAnswering(r, c, p, ev)
	case splice.ClientClosing:
		e.clientClosing(r, c, p)
	}
}

// reincarnated says whether a segment belongs to a new connection on the
// 4-tuple of an old one: a valid cookie, and both numbers differ (SPLICING.md,
// incarnations). A late segment of one before this has all that too, but for
// its tombstone.
func (e *Engine) reincarnated(key *packet.Tuple, c *splice.Client, p *packet.TCP) bool {
	isn, iss := p.Seq().Sub(1), p.Ack().Sub(1)
	if isn == c.IRS || iss == c.ISS || !e.fresh(key, isn, iss) || e.tombs.Match(key, isn, iss, e.seconds()) != nil {
		return false
	}
	// One before that never asked for anything has no tombstone. Where it is
	// still known when the SYNs were answered, the later one counts.
	its, ours := e.opt.Handshake.RTT(key, isn, e.now), e.opt.Handshake.RTT(key, c.IRS, e.now)
	return its == 0 || ours == 0 || its <= ours
}

// nearby is how far from the present place a segment's numbers may lie without
// a look at its cookie: the numbers of a new incarnation can be as near as that
// to those of the old one, but not both.
const nearby = packet.Size(64 << 10)

// acceptable says whether a segment's place is one that the client can be at
// (RFC 9293 section 3.10.7.4, first). Nothing of any other segment counts: a
// guess of nothing but an acknowledgment number would mark bytes as delivered
// that never arrived.
func acceptable(c *splice.Client, p *packet.TCP) bool {
	// What it may repeat begins where it was last acknowledged, which is as far
	// behind as the server's window is large.
	low := packet.MinSeq(c.RcvNxt, c.RcvAcked).Sub(nearby)
	edge := c.RcvNxt.Add(nearby)
	if c.State == splice.ClientSpliced {
		if c.Flags&splice.ClientReqEndKnown != 0 {
			edge = packet.MaxSeq(edge, c.ReqEnd.Add(nearby))
		} else {
			edge = c.RcvNxt.Add(packet.Size(splice.TrueWindow(0xffff, splice.ScaleToClient)))
		}
	}
	return p.Seq().In(low, edge) || low.Less(p.End()) && p.Seq().Less(c.RcvNxt)
}

// stranger handles a segment to a VIP that has no record: the end of a
// handshake, the first data of a preconnected client, or nothing of ours. It
// returns the record that was made, or 0.
func (e *Engine) stranger(key *packet.Tuple, p *packet.TCP) splice.Ref {
	fl := p.Flags()
	if fl.Has(packet.RST) || fl.Has(packet.SYN) || !fl.Has(packet.ACK) {
		if fl.Has(packet.RST) {
			if b := e.embryos.Get(key, e.seconds()); b != nil && p.Seq() == b.IRS.Add(1) {
				e.embryos.Remove(key)
			}
		}
		e.Count.add(ReasonUnknownClient)
		return 0
	}
	// The first segment after the handshake carries these two numbers; what
	// lies beyond them is not accepted from an unknown connection.
	isn, iss := p.Seq().Sub(1), p.Ack().Sub(1)
	if b := e.embryos.Get(key, e.seconds()); b != nil && b.ISS == iss && isn.Add(1) == b.IRS && p.PayloadLen() == 0 && !fl.Has(packet.FIN) {
		// A preconnected client's keep-alive probe (RFC 9293 section 3.8.4).
		e.out.segment(&packet.Segment{
			Src: key.Dst, Dst: key.Src, Seq: p.Ack(), Ack: b.IRS.Add(1), Flags: packet.ACK,
			Window: splice.WindowField(HoldWindow, embryoShift(b)), TTL: 64,
		}, nil)
		return 0
	}
	if b := e.tombs.Match(key, isn, iss, e.seconds()); b != nil {
		e.tombstoned(key, p, options(b.Options) == tombReset)
		return 0
	}
	if b := e.tombs.Get(key, e.seconds()); b != nil {
		old := p.Ack().In(b.ISS, b.SndNxt.Add(1))
		if !old && !e.fresh(key, isn, iss) && e.opt.Handshake.Recent(key, e.now) {
			// It may have overtaken the first segment of a new incarnation.
			e.Count.add(ReasonBadCookie)
			return 0
		}
		if !e.fresh(key, isn, iss) {
			e.tombstoned(key, p, options(b.Options) == tombReset)
			return 0
		}
	}
	opt, ok := options(0), false
	octave, rtt := uint8(0), int64(0)
	if b := e.embryos.Get(key, e.seconds()); b != nil && b.ISS == iss && isn.In(b.IRS, b.IRS.Add(HoldWindow)) {
		// The first data segment, or one that overtook it.
		opt, ok, octave = options(b.Options), true, b.Octave
		isn = b.IRS
	} else {
		opt, ok = e.opt.Handshake.Validate(key, isn, iss, e.now)
		rtt = e.opt.Handshake.RTT(key, isn, e.now)
		octave = pool.Octave(rtt)
	}
	f := e.db.ByVIP(key.Dst)
	if !ok || f == nil || e.stopping {
		if !ok {
			e.Count.add(ReasonBadCookie)
			if e.opt.Handshake.Recent(key, e.now) {
				return 0 // its first segment is on its way, or comes again
			}
		}
		e.statelessReset(key, p)
		return 0
	}
	if rtt > 0 {
		f.Stats.ClientRoundTrip.Add(rtt)
	}
	if p.PayloadLen() == 0 {
		if fl.Has(packet.FIN) {
			if p.Seq() != isn.Add(1) {
				return 0 // it overtook data, which must not be acknowledged
			}
			// Connected and gone without a word: answered without state.
			e.Count.add(ReasonStatelessFIN)
			e.out.segment(&packet.Segment{
				Src: key.Dst, Dst: key.Src, Seq: p.Ack(), Ack: p.End(),
				Flags: packet.FIN | packet.ACK, Window: HoldWindow >> splice.ScaleToClient, TTL: 64,
			}, nil)
			e.embryos.Remove(key)
			return 0
		}
		if b := e.embryos.Get(key, e.seconds()); b == nil || b.IRS != isn || b.ISS != iss {
			b := flowBrief(key, isn, iss, opt)
			b.Octave = octave
			if e.embryos.Put(b, e.seconds()) {
				// The evicted one can still ask while its cookie lives.
				e.Count.add(ReasonEmbryosFull)
			}
			e.armSweep()
		}
		return 0
	}
	counted, why := e.admit(f, key.Src.Addr)
	if why != ReasonNone {
		e.Count.add(why)
		e.statelessReset(key, p)
		return 0
	}
	r := e.clients.Insert(key)
	if r == 0 {
		// INV-7: refuse the new connection cleanly.
		e.leave(key.Src.Addr, &splice.Client{Farm: f.ID, Flags: counted})
		e.Count.add(ReasonTableFull)
		e.statelessReset(key, p)
		return 0
	}
	e.embryos.Remove(key)
	c := e.clients.At(r)
	*c = splice.Client{
		State: splice.ClientHead, Scale: opt.scale(), Flags: counted, Farm: f.ID, MSS: opt.mss(), Octave: octave,
		IRS: isn, ISS: iss, RcvNxt: isn.Add(1), RcvAcked: isn.Add(1),
		SndUna: iss.Add(1), SndNxt: iss.Add(1),
		Started: e.now, Last: e.now,
	}
	if opt.sack() {
		c.Flags |= splice.ClientSACK
	}
	if own := e.clientMSS(p); own < c.MSS {
		c.MSS = own
	}
	c.Epoch.ReqBase = c.RcvNxt
	f.Stats.ClientConnections.Add(1)
	// Where this segment only overtook the first one, nothing else would end the
	// record of a client that is never heard of again (INV-9).
	e.touchClient(r, c)
	return r
}

// embryoShift is the window shift toward a preconnected client.
func embryoShift(b *flowstore.Brief) uint8 {
	if options(b.Options).scale() == splice.NoScale {
		return splice.NoScale
	}
	return splice.ScaleToClient
}

// clientMSS bounds what we send to clients by what our own side of the path
// takes.
func (e *Engine) clientMSS(p *packet.TCP) uint16 {
	if p.V6() {
		return e.opt.Handshake.MSS6
	}
	return e.opt.Handshake.MSS4
}

// fresh says whether a segment on a tombstoned 4-tuple opens a new
// incarnation. Both numbers must differ from the old ones: every duplicate of
// the old first segment has a valid cookie too, and would run a request twice.
func (e *Engine) fresh(key *packet.Tuple, isn, iss packet.Seq) bool {
	if b := e.embryos.Get(key, e.seconds()); b != nil && b.ISS == iss && isn.In(b.IRS, b.IRS.Add(HoldWindow)) {
		return true // its handshake was validated while its cookie lived
	}
	_, ok := e.opt.Handshake.Validate(key, isn, iss, e.now)
	return ok
}

// clientHeld handles a segment of a client whose request is not at a server:
// the head is incomplete, or a connection is still being opened. Its bytes are
// held and, as a rule, not acknowledged: the client keeps them.
func (e *Engine) clientHeld(r splice.Ref, c *splice.Client, p *packet.TCP, ev *Event) {
	n := p.PayloadLen()
	fin := p.Flags().Has(packet.FIN)
	seq := p.Seq()
	if n == 0 && !fin {
		if seq.Less(c.RcvNxt) && seq.Add(1) == c.RcvNxt {
			e.ackClient(r, c) // keep-alive probe (RFC 9293 section 3.8.4)
		}
		return
	}
	if c.Flags&splice.ClientFINSeen != 0 {
		e.challengeClient(r, c)
		return
	}
	if c.RcvNxt.Less(seq) {
		if int(c.RcvNxt.To(seq)) > e.holdCap(c) {
			e.Count.add(ReasonOutOfWindow)
			e.challengeClient(r, c)
			return
		}
		e.keepClient(r, c, p, ev)
		return
	}
	skip := int(seq.To(c.RcvNxt))
	if skip > n || skip == n && !fin {
		// Held already: the client's timer fired, so acknowledge early; the
		// bytes become ours to keep (DESIGN.md 3.2 b).
		e.repeated(c, nil)
		e.earlyACK(r, c)
		return
	}
	if n > skip {
		e.hold(r, c, p.Payload()[skip:])
		if c.State == splice.ClientFree {
			return
		}
		if c.State == splice.ClientBinding && c.Flags&splice.ClientReqBad != 0 {
			e.refuseBody(r, c)
			return
		}
	}
	if fin && c.RcvNxt == seq.Add(packet.Size(n)) { // else it will come again
		if c.State == splice.ClientBinding && (c.Flags&splice.ClientReqEndKnown == 0 || c.RcvNxt.Less(c.ReqEnd)) {
			// A FIN inside a request: it can never be completed.
			e.Count.add(ReasonAbortedRequest)
			e.resetHeld(r, c)
			return
		}
		e.clientFIN(r, c)
	}
	switch c.State {
	case splice.ClientHead:
		e.scanHead(r, c, p, ev)
	case splice.ClientBinding:
		e.touchClient(r, c)
	}
}

// hold appends in-order bytes to what is held of the client.
func (e *Engine) hold(r splice.Ref, c *splice.Client, b []byte) {
	d := e.sideOf(c)
	// The advertised window is never larger than what is left of this, so an
	// honest client does not reach it.
	b = b[:e.room(c, d, len(b))]
	if len(d.held) == 0 && c.State == splice.ClientHead {
		d.req.Reset()
		d.scanned = 0
		c.Started = e.now
	}
	if c.Flags&splice.ClientReqEndKnown != 0 || c.State == splice.ClientSpliced {
		// The present request's end is known: split there.
		k := 0
		if c.RcvNxt.Less(c.ReqEnd) {
			k = min(len(b), int(c.RcvNxt.To(c.ReqEnd)))
		}
		d.held = append(d.held, b[:k]...)
		d.next = append(d.next, b[k:]...)
		c.RcvNxt = c.RcvNxt.Add(packet.Size(len(b)))
		e.charge(c, d)
		return
	}
	d.held = append(d.held, b...)
	c.RcvNxt = c.RcvNxt.Add(packet.Size(len(b)))
	e.charge(c, d)
	if c.State == splice.ClientBinding {
		e.followBody(c, d, len(d.held)-len(b))
	}
}

// followBody moves the body cursor over held bytes from index i on and, when
// the end of the request is found, splits what follows off into next.
func (e *Engine) followBody(c *splice.Client, d *side, i int) {
	n, st := c.ReqBody.Feed(d.held[i:], e.limits(c.Farm))
	switch st {
	case http1.Done:
		c.ReqEnd = c.Epoch.ReqBase.Add(packet.Size(i + n))
		c.Flags |= splice.ClientReqEndKnown
		d.next = append(d.next, d.held[i+n:]...)
		d.held = d.held[:i+n]
	case http1.Bad:
		c.Flags |= splice.ClientReqBad
	}
}

// freeHold is how many bytes are held of a client whatever others have: an
// ordinary head.
const freeHold = 4 << 10

// left is how many more bytes may be held of a client: as many as its own limit
// allows, and beyond freeHold as many as all clients of the farm leave.
func (e *Engine) left(c *splice.Client, d *side) int {
	own := len(d.held) + len(d.next)
	n := e.holdCap(c) - own
	if own+n > freeHold {
		if f := e.db.FarmByID(c.Farm); f != nil && f.Limits.Held > 0 {
			n = min(n, max(freeHold-own, 0)+int(max(f.Limits.Held-f.Stats.Held.Load(), 0)))
		}
	}
	return max(n, 0)
}

// room is how many of n more bytes are held; what is not is as if lost.
func (e *Engine) room(c *splice.Client, d *side, n int) int {
	if len(d.held)+len(d.next)+n <= freeHold {
		return n
	}
	k := e.left(c, d)
	if k >= n {
		return n
	}
	if len(d.held)+len(d.next)+n > e.holdCap(c) {
		e.Count.add(ReasonBeyondWindow)
	} else {
		e.Count.add(ReasonHeldFull)
	}
	return k
}

// charge counts what is held of a client beyond freeHold.
func (e *Engine) charge(c *splice.Client, d *side) {
	n := max(len(d.held)+len(d.next)-freeHold, 0)
	if n == d.charged {
		return
	}
	if f := e.db.FarmByID(c.Farm); f != nil {
		f.Stats.Held.Add(int64(n - d.charged))
		d.charged, d.account = n, f.Stats
	}
}

// holdCap is how many bytes are held of one client at most.
func (e *Engine) holdCap(c *splice.Client) int { return int(e.limits(c.Farm).Head) + HoldWindow }

// scanHead scans what is held of a head. p is the packet under verdict that
// brought the last bytes, or nil.
func (e *Engine) scanHead(r splice.Ref, c *splice.Client, p *packet.TCP, ev *Event) {
	d := e.sideOf(c)
	from := d.scanned
	if from == 0 {
		d.want = nil
		if f := e.db.FarmByID(c.Farm); f != nil {
			d.want = f.Wanted.Load()
		}
	}
	n, st := d.req.Scan(d.held[from:], e.limits(c.Farm), d.want)
	d.scanned += n
	switch st {
	case http1.More:
		if len(d.held) == 0 && c.Flags&splice.ClientFINSeen != 0 {
			// The FIN of a client that asked for nothing (more).
			e.Count.add(ReasonClientFIN)
			e.finishClient(r, c)
			return
		}
		if c.Flags&splice.ClientFINSeen != 0 {
			e.Count.add(ReasonAbortedRequest)
			e.answer(r, c, reply{status: 400, close: true})
			return
		}
		e.waitForMore(r, c, d, p)
	case http1.Bad:
		e.refuse(r, c, d)
	case http1.Done:
		c.HeadLen = uint32(from + n)
		if d.req.Outcome == http1.Reject {
			e.refuse(r, c, d)
			return
		}
		e.request(r, c, d, p, ev)
	}
}

// waitForMore decides when an incomplete head is acknowledged early
// (DESIGN.md 3.2): at once when W_hold is reached, soon when the last segment
// is a short one.
func (e *Engine) waitForMore(r splice.Ref, c *splice.Client, d *side, p *packet.TCP) {
	unacked := int(c.RcvAcked.To(c.RcvNxt))
	switch {
	case unacked >= HoldWindow-int(c.MSS):
		e.earlyACK(r, c)
	case p != nil && p.PayloadLen() < int(c.MSS):
		c.Due = e.now + nagleWait
	default:
		c.Due = c.Started + holdWait
	}
	e.touchClient(r, c)
}

// earlyACK acknowledges everything that is held: from now on these bytes are
// ours to keep and to retransmit.
func (e *Engine) earlyACK(r splice.Ref, c *splice.Client) {
	if c.RcvAcked != c.RcvNxt {
		c.Flags |= splice.ClientEarlyAck
		e.Count.add(ReasonEarlyACK)
	}
	c.Due = 0
	e.ackClient(r, c)
	e.touchClient(r, c)
}

// clientRST handles a reset from a client (RFC 5961 section 3.2, with the
// numbers that a real client's reset can have).
func (e *Engine) clientRST(r splice.Ref, c *splice.Client, p *packet.TCP) {
	if seq := p.Seq(); seq != c.RcvNxt && seq != c.RcvAcked {
		e.Count.add(ReasonBlindReset)
		e.challengeClient(r, c)
		return
	}
	e.Count.add(ReasonClientReset)
	e.dropClient(r, c)
}

// resetHeld resets a client whose request is not at a server.
func (e *Engine) resetHeld(r splice.Ref, c *splice.Client) {
	if s := c.Srv; s != 0 {
		e.orphan(s, e.servers.At(s), c)
	}
	e.resetClient(r, c, ReasonAbortedRequest)
}

// dropClient forgets a client that is gone: its response is drained, its
// record becomes a tombstone. Nothing is sent to it.
func (e *Engine) dropClient(r splice.Ref, c *splice.Client) {
	if s := c.Srv; s != 0 {
		e.orphan(s, e.servers.At(s), c)
	}
	e.removeClient(r, c)
}

// clientFIN notes a FIN that is next in order.
func (e *Engine) clientFIN(r splice.Ref, c *splice.Client) {
	c.Flags |= splice.ClientFINSeen
	c.CliFIN = c.RcvNxt
	c.RcvNxt = c.RcvNxt.Add(1)
}

// sideOf returns the connection's side memory and makes it if there is none.
func (e *Engine) sideOf(c *splice.Client) *side {
	if c.Side == 0 {
		c.Side = e.sides.get()
		d := e.sides.at(c.Side)
		d.req.Reset()
		return d
	}
	return e.sides.at(c.Side)
}

func (e *Engine) freeSide(c *splice.Client) {
	if c.Side != 0 {
		e.sides.put(c.Side)
		c.Side = 0
	}
}

// clientWindow is the window field that we advertise on our own segments.
func (e *Engine) clientWindow(c *splice.Client) uint16 {
	room := HoldWindow
	if c.Side != 0 {
		d := e.sides.at(c.Side)
		room = min(room, e.left(c, d))
	}
	return splice.WindowField(uint32(max(room, 0)), toClientShift(c))
}

func toClientShift(c *splice.Client) uint8 {
	if c.Scale == splice.NoScale {
		return splice.NoScale
	}
	return splice.ScaleToClient
}

// ackClient sends a bare ACK of everything that came in order.
func (e *Engine) ackClient(r splice.Ref, c *splice.Client) {
	e.sendClient(r, c, packet.ACK, c.SndNxt, nil)
}

// sendClient emits one segment of our own to the client.
func (e *Engine) sendClient(r splice.Ref, c *splice.Client, fl packet.Flags, seq packet.Seq, payload []byte) {
	k := e.clients.Key(r)
	e.out.segment(&packet.Segment{
		Src: k.Dst, Dst: k.Src, Seq: seq, Ack: c.RcvNxt, Flags: fl,
		Window: e.clientWindow(c), TTL: 64,
	}, payload)
	c.RcvAcked = c.RcvNxt
}

// challengeClient answers an unacceptable segment with an ACK, rate limited
// per flow. It acknowledges no more than was acknowledged before.
func (e *Engine) challengeClient(r splice.Ref, c *splice.Client) {
	if e.now-c.LastACK < challengeEvery && c.LastACK != 0 {
		return
	}
	c.LastACK = e.now
	e.Count.add(ReasonChallengeACK)
	k := e.clients.Key(r)
	e.out.segment(&packet.Segment{
		Src: k.Dst, Dst: k.Src, Seq: c.SndNxt, Ack: c.RcvAcked, Flags: packet.ACK,
		Window: e.clientWindow(c), TTL: 64,
	}, nil)
}

// statelessReset answers a segment that belongs to nothing: RST with SEQ =
// SEG.ACK (RFC 9293 section 3.10.7.1), rate limited over all flows.
func (e *Engine) statelessReset(key *packet.Tuple, p *packet.TCP) {
	if p.Flags().Has(packet.RST) {
		return
	}
	if s := e.now / second; s != e.rstSlot {
		e.rstSlot, e.rstCount = s, 0
	}
	if e.rstCount >= 1000 {
		e.Count.add(ReasonResetLimit)
		return
	}
	e.rstCount++
	e.Count.add(ReasonStatelessReset)
	e.out.segment(&packet.Segment{Src: key.Dst, Dst: key.Src, Seq: p.Ack(), Flags: packet.RST, TTL: 64}, nil)
}
