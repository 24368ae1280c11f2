// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/binary"

	"github.com/dchest/siphash"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/pool"
	"github.com/weirgate/weir/module/splice"
)

// Times of the engine's own small TCP toward servers, nanoseconds.
const (
	firstSYNRetry = 300 * millisecond
	firstFINRetry = 200 * millisecond
	maxFINTries   = 5
)

// fromServer handles a packet from a server to a SNIP port.
func (e *Engine) fromServer(key *packet.Tuple, p *packet.TCP, ev *Event) {
	s := e.servers.Lookup(key)
	if s == 0 {
		e.Count.add(ReasonUnknownServer)
		if e.opt.ShareSNIP {
			ev.Verdict = Accept
			return
		}
		e.statelessReset(key, p)
		return
	}
	v := e.servers.At(s)
	if v.State == splice.ServerConnecting {
		e.connecting(s, v, p)
		return
	}
	fl := p.Flags()
	seq := p.Seq()
	if fl.Has(packet.RST) {
		// RFC 5961 section 3.2: an exact hit resets, anything else is
		// answered with what a real server's reset would match.
		if seq != v.RcvNxt && seq != v.RcvAcked && seq != v.RcvHigh {
			e.Count.add(ReasonBlindReset)
			e.challengeServer(s, v)
			return
		}
		e.serverReset(s, v, p)
		return
	}
	if fl.Has(packet.SYN) || !fl.Has(packet.ACK) {
		if fl.Has(packet.SYN|packet.ACK) && v.RcvNxt == v.IRS.Add(1) {
			e.ackServer(s, v) // our handshake ACK was lost
			return
		}
		e.challengeServer(s, v)
		return
	}
	ack := p.Ack()
	// RFC 5961 section 5: neither of what was never sent, nor older than the
	// largest window that the server could ever have offered.
	if v.SndNxt.Less(ack) || ack.Less(v.SndUna.Sub(packet.Size(splice.TrueWindow(0xffff, v.Scale)))) {
		e.Count.add(ReasonAckBeyond)
		e.challengeServer(s, v)
		return
	}
	// RFC 9293 section 3.10.7.4, first: the segment's place must be one that
	// the server can be at: inside the largest window that it was given, with a
	// probe or a FIN behind its edge, or something old.
	const reach = packet.Size(0xffff) << splice.ScaleToServer
	if !seq.In(v.RcvNxt.Sub(reach), v.RcvEdge.Add(2)) {
		e.Count.add(ReasonOutOfWindow)
		e.challengeServer(s, v)
		return
	}
	advance := v.SndUna.Less(ack)
	news := advance || p.PayloadLen() > 0 || fl.Has(packet.FIN)
	if v.SndUna.LessEq(ack) {
		v.SndUna = ack
		if edge := ack.Add(packet.Size(splice.TrueWindow(p.Window(), v.Scale))); v.SndEdge.Less(edge) {
			v.SndEdge = edge
		}
	}
	switch v.State {
	case splice.ServerActive:
		c := e.clients.At(v.Cli)
		if news {
			v.Last = e.now
		}
		e.serverAcked(c, v)
		e.dropCopies(c, v)
		e.push(v.Cli, c, s, v, advance)
		if v.RcvBase.To(v.RcvNxt) > rebaseAt || v.SndBase.To(v.SndNxt) > rebaseAt {
			e.rebase(c, v)
		}
		e.serverActive(s, v, p, ev)
	case splice.ServerIdle:
		e.serverIdle(s, v, p)
	case splice.ServerDraining:
		e.serverDraining(s, v, p, ev)
	case splice.ServerClosing:
		e.serverClosing(s, v, p)
	}
}

// open starts a new connection to a server: FIG 3 step 308, FIG 6A flow 606A.
// It returns 0 and the reason when there is no capacity.
func (e *Engine) open(f *farm.Farm, sv *farm.Server, class pool.Class) (splice.Ref, Reason) {
	if limit := int32(f.Pool.MaxConnections); sv.Stats.Open.Add(1) > limit && limit > 0 {
		sv.Stats.Open.Add(-1)
		// An idle connection of another class, or in another shard, may make
		// room.
		if old := e.idle.Oldest(sv.ID); old != 0 {
			e.closeServer(old, e.servers.At(old), ReasonMaxIdle)
		} else if e.opt.Shards > 1 && sv.Stats.Wanted.CompareAndSwap(false, true) {
			// Told once, it stands until one is given back: were each try told,
			// two shards with lines would wake each other without end.
			e.out.Relieve = true
		}
		return 0, ReasonWaited
	}
	// A burst must not open a connection per request: those that wait a round
	// trip find released ones.
	if limit := f.Pool.MaxConnecting; sv.Stats.Connecting.Add(1) > limit && limit > 0 {
		sv.Stats.Connecting.Add(-1)
		sv.Stats.Open.Add(-1)
		return 0, ReasonSurge
	}
	var ports *pool.Ports
	var port uint16
	for _, cand := range e.opt.SNIPs {
		if cand.Addr.Is4() == sv.Endpoint.Addr.Is4() {
			if port = cand.Take(e.now); port != 0 {
				ports = cand
				break
			}
		}
	}
	if port == 0 {
		sv.Stats.Open.Add(-1)
		sv.Stats.Connecting.Add(-1)
		return 0, ReasonNoPort
	}
	key := packet.Tuple{Src: sv.Endpoint, Dst: packet.Endpoint{Addr: ports.Addr, Port: port}}
	s := e.servers.Insert(&key)
	if s == 0 {
		ports.Put(port, e.now, true)
		sv.Stats.Open.Add(-1)
		sv.Stats.Connecting.Add(-1)
		return 0, ReasonTableFull
	}
	v := e.servers.At(s)
	iss := e.iss(&key)
	*v = splice.Server{
		State: splice.ServerConnecting, Scale: splice.NoScale, Class: uint8(class), Farm: f.ID, ID: sv.ID,
		ISS: iss, SndUna: iss, SndNxt: iss.Add(1), Opened: e.now, Last: e.now,
	}
	f.Stats.Opened.Add(1)
	sv.Stats.Opened.Add(1)
	e.sendSYN(s, v)
	e.touchServer(s, v)
	return s, ReasonNone
}

// iss chooses an initial sequence number: RFC 6528 section 3, a clock of 4
// microseconds plus a keyed function of the connection, so that the numbers of
// a reused port go up.
func (e *Engine) iss(t *packet.Tuple) packet.Seq {
	if e.opt.ISS != nil {
		return e.opt.ISS(t, e.now)
	}
	var b [36]byte
	copy(b[0:], t.Src.Addr[:])
	copy(b[16:], t.Dst.Addr[:])
	binary.BigEndian.PutUint16(b[32:], t.Src.Port)
	binary.BigEndian.PutUint16(b[34:], t.Dst.Port)
	return packet.Seq(uint32(e.now/4000) + uint32(siphash.Hash(mix(e.opt.Seed, 11), mix(e.opt.Seed, 12), b[:])))
}

func (e *Engine) sendSYN(s splice.Ref, v *splice.Server) {
	k := e.servers.Key(s)
	class := pool.Class(v.Class)
	o := packet.SYNOptions{MSS: class.MSS(), WindowScale: splice.ScaleToServer, SACKPermitted: class.SACK()}
	e.out.segment(&packet.Segment{
		Src: k.Dst, Dst: k.Src, Seq: v.ISS, Flags: packet.SYN, Window: 0xffff, TTL: 64,
		Options: packet.AppendSYNOptions(e.opts[:0], o),
	}, nil)
	v.Due = e.now + firstSYNRetry<<min(v.Tries, 6)
}

// connecting handles the answer to our SYN.
func (e *Engine) connecting(s splice.Ref, v *splice.Server, p *packet.TCP) {
	fl := p.Flags()
	switch {
	case fl.Has(packet.RST):
		if fl.Has(packet.ACK) && p.Ack() == v.ISS.Add(1) {
			e.connectFailed(s, v, ReasonConnectRefused)
		}
	case fl.Has(packet.SYN | packet.ACK):
		if p.Ack() != v.ISS.Add(1) {
			if e.mayAnswer(v) {
				e.resetFor(s, p)
			}
			return
		}
		o := p.SYNOptions()
		v.IRS = p.Seq()
		v.RcvEdge = v.IRS.Add(1 + 0xffff) // the window of our SYN
		v.RcvNxt, v.RcvHigh, v.RcvAcked = v.IRS.Add(1), v.IRS.Add(1), v.IRS.Add(1)
		v.SndUna, v.SndNxt = p.Ack(), p.Ack()
		if o.WindowScale >= 0 {
			v.Scale = uint8(o.WindowScale)
		}
		// RFC 7323 section 2.2: the window of a SYN-ACK is not scaled.
		v.SndEdge = v.SndUna.Add(packet.Size(p.Window()))
		v.MSS = o.MSS
		if v.MSS == 0 {
			v.MSS = 536
		}
		v.MSS = min(v.MSS, pool.LargeMSS+60)
		if o.SACKPermitted && pool.Class(v.Class).SACK() {
			v.Flags |= splice.ServerSACK
		}
		again := v.Tries > 0 // then nobody knows which SYN was answered (RFC 6298 section 3)
		v.Tries, v.Due = 0, 0
		v.Last = e.now
		v.State = splice.ServerIdle // until it is bound
		if sv := e.db.Server(v.ID); sv != nil {
			sv.Stats.Connecting.Add(-1)
			sv.Stats.Established.Add(1)
			if !again {
				sv.Stats.ConnectTime.Add(e.now - v.Opened)
			}
		}
		e.wake(v.Farm)
		e.ackServer(s, v)
		if r := v.Cli; r != 0 {
			c := e.clients.At(r)
			e.bind(r, c, s, v, nil, nil)
			return
		}
		v.Flags |= splice.ServerPreopened
		e.settle(s, v)
	case fl.Has(packet.ACK):
		// The server has an old connection on this 4-tuple (RFC 9293 section
		// 3.5.1): reset it, then ask again.
		if e.mayAnswer(v) {
			e.resetFor(s, p)
			e.sendSYN(s, v)
		}
	}
}

// mayAnswer limits the answers to unacceptable segments of a server connection
// (RFC 5961 section 7).
func (e *Engine) mayAnswer(v *splice.Server) bool {
	if e.now-v.LastACK < challengeEvery && v.LastACK != 0 {
		return false
	}
	v.LastACK = e.now
	e.Count.add(ReasonChallengeACK)
	return true
}

// resetFor sends the RST that the segment's own acknowledgment asks for.
func (e *Engine) resetFor(s splice.Ref, p *packet.TCP) {
	k := e.servers.Key(s)
	e.out.segment(&packet.Segment{Src: k.Dst, Dst: k.Src, Seq: p.Ack(), Flags: packet.RST, TTL: 64}, nil)
}

// connectFailed gives up a connection that never was.
func (e *Engine) connectFailed(s splice.Ref, v *splice.Server, why Reason) {
	e.Count.add(why)
	r := v.Cli
	if sv := e.db.Server(v.ID); sv != nil {
		kind := farm.FailRefused
		if why == ReasonConnectTimeout {
			kind = farm.FailUnreachable
		}
		sv.Stats.Failed[kind].Add(1)
	}
	if r != 0 {
		e.inactive(v)
	}
	e.removeServer(s, v, true)
	if r != 0 {
		e.redispatch(r, e.clients.At(r), why, ReasonRedispatchConnect)
	}
}

// serverIdle handles a segment on a pooled connection.
func (e *Engine) serverIdle(s splice.Ref, v *splice.Server, p *packet.TCP) {
	seq, n := p.Seq(), p.PayloadLen()
	end := seq.Add(packet.Size(n))
	switch {
	case v.RcvNxt.Less(end):
		// A word nobody asked for (a 408 too): whose would it be?
		e.Count.add(ReasonIdleBytes)
		e.killServer(s, v, ReasonIdleBytes)
	case n > 0 || seq.Less(v.RcvNxt):
		// A retransmission whose ACK was lost, or a keep-alive probe.
		e.ackServer(s, v)
	case p.Flags().Has(packet.FIN) && seq == v.RcvNxt:
		v.Flags |= splice.ServerFINSeen
		e.learnHorizon(v)
		e.closeServer(s, v, ReasonServerFIN)
	}
}

// leastHorizon: what a server closes sooner is not a keep-alive time.
const leastHorizon = 100 * millisecond

// learnHorizon notes how long a server keeps idle connections, so that they
// are retired before it closes them in the face of a request.
func (e *Engine) learnHorizon(v *splice.Server) {
	sv := e.db.Server(v.ID)
	kept := e.now - v.Idle
	if sv == nil || kept < leastHorizon {
		return
	}
	h := kept - kept/4
	if old := sv.Stats.Horizon.Load(); old == 0 || h < old {
		sv.Stats.Horizon.Store(h)
	}
}

// serverReset handles an acceptable RST.
func (e *Engine) serverReset(s splice.Ref, v *splice.Server, p *packet.TCP) {
	e.Count.add(ReasonServerReset)
	r := v.Cli
	if v.State != splice.ServerActive || r == 0 {
		e.leavePool(s, v)
		e.removeServer(s, v, false)
		return
	}
	c := e.clients.At(r)
	proof := p.Flags().Has(packet.ACK) && p.Ack().LessEq(v.SndBase) && v.SndUna.LessEq(v.SndBase)
	e.failed(r, c, s, v, proof, ReasonServerReset)
}

// failed ends an exchange whose server connection is gone. proof says that the
// server's own acknowledgment number shows that it never had the request.
func (e *Engine) failed(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server, proof bool, why Reason) {
	if sv := e.db.Server(v.ID); sv != nil {
		kind := farm.FailReset
		switch why {
		case ReasonServerFIN:
			kind = farm.FailClosed
		case ReasonServerSilent:
			kind = farm.FailSilent
		}
		sv.Stats.Failed[kind].Add(1)
	}
	e.stale(c, v)
	e.inactive(v)
	// The client may have the whole response although the server has not
	// acknowledged the last of the request: to it nothing has failed.
	whole := v.Flags&splice.ServerRespEnd != 0 && e.respEndClient(c, v).LessEq(c.SndUna)
	v.Cli = 0
	c.Srv = 0
	if v.Flags&splice.ServerFINSeen != 0 {
		e.closeServer(s, v, why)
	} else {
		e.removeServer(s, v, false)
	}
	switch {
	case c.Flags&splice.ClientResponded != 0 && whole:
		e.finishClient(r, c)
	case c.Flags&splice.ClientResponded != 0:
		e.resetClient(r, c, why)
	case proof:
		e.redispatch(r, c, why, ReasonRedispatchProof)
	case c.Flags&splice.ClientIdempotent != 0:
		e.redispatch(r, c, why, ReasonRedispatchIdempotent)
	default:
		status := 502
		if why == ReasonServerSilent {
			status = 504
		}
		e.answer(r, c, reply{status: status, close: true})
	}
}

// stale lets the next attempt of a request go to the same server again, over a
// connection of its own: a pooled connection that went stale says nothing about
// its server.
func (e *Engine) stale(c *splice.Client, v *splice.Server) {
	if v.Requests > 1 && c.Side != 0 {
		c.Flags |= splice.ClientFresh
		if sv := e.db.Server(v.ID); sv != nil && !sv.Removed() {
			e.sides.at(c.Side).tried[sv.Index>>6] &^= 1 << (sv.Index & 63)
		}
	}
}

// orphan turns the server connection of a client that is gone into a drain:
// the engine acknowledges the rest of the response on the client's behalf (the
// patent: it "calculates the unacknowledged bytes, and sends an ACK").
func (e *Engine) orphan(s splice.Ref, v *splice.Server, c *splice.Client) {
	c.Srv = 0
	if v.State == splice.ServerConnecting {
		e.inactive(v)
		v.Cli = 0
		return
	}
	if v.State != splice.ServerActive {
		return
	}
	if v.Flags&splice.ServerReqEnd == 0 || v.SndUna.Less(v.ReqEnd) || v.Flags&splice.ServerUntilClose != 0 {
		// Nobody will repeat the rest of the request.
		e.killServer(s, v, ReasonAbortedRequest)
		return
	}
	e.inactive(v)
	v.Cli = 0
	v.State = splice.ServerDraining
	v.Due = e.now + e.drainTimeout(v)
	e.Count.add(ReasonDrained)
	// Bytes seen in order may be acknowledged; what passed beyond a gap is
	// asked for again.
	e.ackServer(s, v)
	e.drained(s, v)
	e.touchServer(s, v)
}

func (e *Engine) drainTimeout(v *splice.Server) int64 {
	if f := e.db.FarmByID(v.Farm); f != nil && f.Pool.DrainTimeout > 0 {
		return f.Pool.DrainTimeout
	}
	return 10 * second
}

// serverDraining handles a segment whose client is gone.
func (e *Engine) serverDraining(s splice.Ref, v *splice.Server, p *packet.TCP, ev *Event) {
	seq, n := p.Seq(), p.PayloadLen()
	end := seq.Add(packet.Size(n))
	if n > 0 && seq.LessEq(v.RcvNxt) && v.RcvNxt.Less(end) {
		b := p.Payload()[seq.To(v.RcvNxt):]
		v.Drained += uint32(len(b))
		if !e.followDrain(s, v, b) {
			return
		}
		v.RcvHigh = packet.MaxSeq(v.RcvHigh, v.RcvNxt)
		if f := e.db.FarmByID(v.Farm); f != nil && f.Pool.DrainLimit > 0 && int64(v.Drained) > f.Pool.DrainLimit {
			e.Count.add(ReasonDrainLimit)
			e.killServer(s, v, ReasonDrainLimit)
			return
		}
	}
	if n > 0 && v.RcvNxt.Less(seq) {
		e.keepServer(s, v, p, ev)
		return
	}
	if n > 0 {
		e.ackServer(s, v)
	}
	if p.Flags().Has(packet.FIN) && end == v.RcvNxt {
		v.Flags |= splice.ServerFINSeen
		e.closeServer(s, v, ReasonServerFIN)
		return
	}
	e.drained(s, v)
}

// followDrain scans drained bytes; false means that the connection was killed.
func (e *Engine) followDrain(s splice.Ref, v *splice.Server, b []byte) bool {
	for len(b) > 0 && v.Flags&splice.ServerRespEnd == 0 {
		var n int
		var st http1.Status
		if v.Flags&splice.ServerHeadDone == 0 {
			n, st = v.Resp.Scan(b, &e.opt.Limits)
			if st == http1.Done {
				if v.Resp.Interim() {
					v.RcvNxt = v.RcvNxt.Add(packet.Size(n))
					b = b[n:]
					v.Resp.Again()
					continue
				}
				v.Flags |= splice.ServerHeadDone
				if v.Flags&splice.ServerEarly != 0 || v.Resp.Outcome != http1.Accept || v.Resp.Close || v.Resp.Minor == 0 && !v.Resp.KeepAlive || v.Resp.ConnAuth || v.Resp.Body == http1.BodyUntilClose {
					e.killServer(s, v, ReasonDrainLimit)
					return false
				}
				v.Body.Start(v.Resp.Body, v.Resp.Length)
				if v.Resp.Body == http1.BodyNone || v.Resp.Body == http1.BodyLength && v.Resp.Length == 0 {
					v.RespEnd = v.RcvNxt.Add(packet.Size(n))
					v.Flags |= splice.ServerRespEnd
				}
			}
		} else {
			n, st = v.Body.Feed(b, &e.opt.Limits)
			if st == http1.Done {
				v.RespEnd = v.RcvNxt.Add(packet.Size(n))
				v.Flags |= splice.ServerRespEnd
			}
		}
		if st == http1.Bad {
			e.killServer(s, v, ReasonBadResponse)
			return false
		}
		v.RcvNxt = v.RcvNxt.Add(packet.Size(n))
		b = b[n:]
	}
	if v.Flags&splice.ServerRespEnd != 0 {
		k := 0
		if v.RcvNxt.Less(v.RespEnd) {
			k = min(len(b), int(v.RcvNxt.To(v.RespEnd)))
			v.RcvNxt = v.RcvNxt.Add(packet.Size(k))
		}
		if k < len(b) {
			e.Count.add(ReasonExtraBytes)
			e.killServer(s, v, ReasonExtraBytes)
			return false
		}
	}
	return true
}

// drained releases a connection whose orphaned response is complete.
func (e *Engine) drained(s splice.Ref, v *splice.Server) {
	if v.State == splice.ServerDraining && v.Flags&splice.ServerRespEnd != 0 && v.RcvNxt == v.RespEnd {
		e.settle(s, v)
	}
}

// settle decides what becomes of a connection whose exchange is over: the
// release rules of SPLICING.md section C.
func (e *Engine) settle(s splice.Ref, v *splice.Server) {
	v.Cli = 0
	f := e.db.FarmByID(v.Farm)
	sv := e.db.Server(v.ID)
	why := Reason(v.Reason)
	switch {
	case v.Flags&splice.ServerNoReuse != 0 || v.Flags&splice.ServerFINSeen != 0:
	case v.Flags&splice.ServerPrivate != 0:
		why = ReasonPrivate // its client is gone
	case e.stopping:
		why = ReasonStopped
	case f == nil || sv == nil:
		why = ReasonServerGone
	case sv.Removed() || !sv.Live.Usable(e.now):
		why = ReasonServerGone // nothing new would ever take it
	case f.Pool.MaxRequests > 0 && v.Requests >= uint32(f.Pool.MaxRequests):
		why = ReasonMaxRequests
	case f.Pool.MaxAge > 0 && e.now-v.Opened >= f.Pool.MaxAge:
		why = ReasonMaxAge
	default:
		e.toPool(s, v)
		return
	}
	if why == ReasonEarlyResponse && v.Flags&splice.ServerFINSeen == 0 {
		// It answered before it had the request, and may take the rest of the
		// body for another one: it is not given the time.
		e.killServer(s, v, why)
		return
	}
	e.closeServer(s, v, why)
}

// toPool makes a connection idle.
func (e *Engine) toPool(s splice.Ref, v *splice.Server) {
	e.kepts.drop(&v.Kept)
	v.State = splice.ServerIdle
	v.Idle = e.now
	v.Due = 0
	v.RcvHigh = v.RcvNxt
	e.idle.Put(v.ID, pool.Class(v.Class), v.Octave, s)
	if sv := e.db.Server(v.ID); sv != nil {
		sv.Live.Idle.Add(1)
	}
	e.touchServer(s, v)
	if e.yields(v) {
		e.closeServer(s, v, ReasonMaxIdle)
		return
	}
	e.wake(v.Farm)
}

// yields says whether a connection that has just become idle is given back
// for another shard that found max_connections reached. A shard with a line of
// its own gives one in sixteen, so that neither starves.
func (e *Engine) yields(v *splice.Server) bool {
	if e.opt.Shards < 2 {
		return false
	}
	sv := e.db.Server(v.ID)
	if sv == nil || !sv.Stats.Wanted.Load() {
		return false
	}
	if l := e.waits[v.Farm]; l != nil && l.n > 0 && e.random()>>60 != 0 {
		return false
	}
	return sv.Stats.Wanted.CompareAndSwap(true, false)
}

// leavePool takes a connection out of the idle list if it is in it.
func (e *Engine) leavePool(s splice.Ref, v *splice.Server) {
	e.unlinkOwn(s, v)
	if e.idle.Remove(s) {
		if sv := e.db.Server(v.ID); sv != nil {
			sv.Live.Idle.Add(-1)
		}
	}
}

// wake notes that a farm's waiting line may move.
func (e *Engine) wake(id uint16) {
	if l := e.waits[id]; l != nil && l.n > 0 {
		e.wakes = append(e.wakes, id)
	}
}

// noReuse marks a connection that must not serve anybody else.
func (e *Engine) noReuse(v *splice.Server, why Reason) {
	if v.Flags&splice.ServerNoReuse == 0 {
		v.Flags |= splice.ServerNoReuse
		v.Reason = uint8(why)
	}
}

// served and inactive end a server's share in a request.
func (e *Engine) served(c *splice.Client, v *splice.Server) {
	e.inactive(v)
	if f := e.db.FarmByID(v.Farm); f != nil {
		f.Stats.Responses.Add(1)
	}
	if sv := e.db.Server(v.ID); sv != nil {
		sv.Stats.Responses.Add(1)
	}
}

func (e *Engine) inactive(v *splice.Server) {
	if sv := e.db.Server(v.ID); sv != nil {
		sv.Live.Active.Add(-1)
	}
}

// closeServer closes a connection in good order: FIN, wait, reset only as the
// last resort.
func (e *Engine) closeServer(s splice.Ref, v *splice.Server, why Reason) {
	e.leavePool(s, v)
	e.closing(v, why)
	v.State = splice.ServerClosing
	v.Cli = 0
	v.Tries = 0
	if v.Flags&splice.ServerFINSeen != 0 {
		v.RcvNxt = v.RcvNxt.Add(1)
	}
	if e.owed == s {
		e.owed = 0
	}
	fin := v.SndNxt
	v.SndNxt = fin.Add(1)
	e.sendServer(s, v, packet.FIN|packet.ACK, fin, nil, nil)
	v.Due = e.now + firstFINRetry
	e.touchServer(s, v)
	// The place in max_connections is free once the server is told.
	e.wake(v.Farm)
}

// closing counts the end of a connection by its reason.
func (e *Engine) closing(v *splice.Server, why Reason) {
	e.Count.add(why)
	if sv := e.db.Server(v.ID); sv != nil && v.State != splice.ServerClosing {
		sv.Stats.Closed[closeKind(why)].Add(1)
	}
}

func closeKind(why Reason) farm.CloseKind {
	switch why {
	case ReasonIdleTimeout:
		return farm.CloseIdle
	case ReasonMaxIdle:
		return farm.CloseSurplus
	case ReasonMaxAge, ReasonMaxRequests:
		return farm.CloseRetired
	case ReasonServerClose, ReasonServerFIN, ReasonServerReset, ReasonServerSilent:
		return farm.CloseServer
	case ReasonAbortedRequest, ReasonDrainLimit:
		return farm.CloseAborted
	case ReasonServerGone:
		return farm.CloseRemoved
	case ReasonStopped:
		return farm.CloseStopped
	}
	return farm.CloseIsolated
}

// serverClosing handles what a server still says after our FIN.
func (e *Engine) serverClosing(s splice.Ref, v *splice.Server, p *packet.TCP) {
	seq, n := p.Seq(), p.PayloadLen()
	end := seq.Add(packet.Size(n))
	if v.Flags&splice.ServerFINSeen == 0 && n > 0 && v.RcvNxt.Less(end) {
		// Data for nobody.
		e.killServer(s, v, ReasonIdleBytes)
		return
	}
	if p.Flags().Has(packet.FIN) && v.Flags&splice.ServerFINSeen == 0 && end == v.RcvNxt {
		v.Flags |= splice.ServerFINSeen
		v.RcvNxt = v.RcvNxt.Add(1)
		e.ackServer(s, v)
	} else if p.Flags().Has(packet.FIN) || n > 0 {
		e.ackServer(s, v)
	}
	if v.SndUna == v.SndNxt && v.Flags&splice.ServerFINSeen != 0 {
		e.removeServer(s, v, false)
	}
}

// killServer resets a connection: on any doubt it is killed, never guessed
// (INV-2).
func (e *Engine) killServer(s splice.Ref, v *splice.Server, why Reason) {
	e.leavePool(s, v)
	e.closing(v, why)
	if v.State == splice.ServerActive && v.Cli != 0 {
		e.inactive(v)
	}
	if e.owed == s {
		e.owed = 0
	}
	k := e.servers.Key(s)
	e.out.segment(&packet.Segment{
		Src: k.Dst, Dst: k.Src, Seq: v.SndNxt, Ack: v.RcvNxt, Flags: packet.RST | packet.ACK, TTL: 64,
	}, nil)
	e.removeServer(s, v, false)
}

// removeServer forgets a connection; its port rests. rested says that the
// connection was never established, so that no segment of it can be under way.
func (e *Engine) removeServer(s splice.Ref, v *splice.Server, rested bool) {
	e.refund(v)
	k := *e.servers.Key(s)
	for _, ports := range e.opt.SNIPs {
		if ports.Addr == k.Dst.Addr && ports.Has(k.Dst.Port) {
			ports.Put(k.Dst.Port, e.now, rested)
			break
		}
	}
	if sv := e.db.Server(v.ID); sv != nil {
		sv.Stats.Open.Add(-1)
		if v.State == splice.ServerConnecting {
			sv.Stats.Connecting.Add(-1)
		}
		if e.opt.Shards > 1 && e.out != nil {
			e.out.Relieve = e.out.Relieve || sv.Farm.Stats.Waiting.Load() > 0
		}
	}
	if e.owed == s {
		e.owed = 0
	}
	e.kepts.drop(&v.Kept)
	e.wheel.clear(e.serverTimer(s))
	farmID := v.Farm
	v.State = splice.ServerFree
	e.servers.Remove(s)
	e.wake(farmID)
}

// sendServer emits one segment of ours to a server. c is the client whose
// window counts, or nil.
func (e *Engine) sendServer(s splice.Ref, v *splice.Server, fl packet.Flags, seq packet.Seq, payload []byte, c *splice.Client) {
	k := e.servers.Key(s)
	ack := v.RcvNxt
	window := splice.WindowField(ownWindow, toServerShift(v))
	if c != nil {
		ack = e.ackForServer(c, v)
		window = e.windowForServer(c, v)
	}
	e.out.segment(&packet.Segment{
		Src: k.Dst, Dst: k.Src, Seq: seq, Ack: ack, Flags: fl, Window: window, TTL: 64,
	}, payload)
	offer(v, ack, window)
	if e.owed == s {
		e.owed = 0
	}
}

// offer notes what a segment to a server acknowledges and how far its window
// reaches.
func offer(v *splice.Server, ack packet.Seq, window uint16) {
	v.RcvAcked = packet.MaxSeq(v.RcvAcked, ack)
	v.RcvEdge = packet.MaxSeq(v.RcvEdge, ack.Add(packet.Size(splice.TrueWindow(window, toServerShift(v)))))
}

// ownWindow is what the engine advertises to a server when no client stands
// behind: small, because the server keeps it for the next client.
const ownWindow = 2 * pool.LargeMSS

// drainWindow is what it advertises while it drains.
const drainWindow = 64 << 10

// ackServer sends a bare ACK of everything that was seen in order and is
// safe: with a client bound, only what that client acknowledged.
func (e *Engine) ackServer(s splice.Ref, v *splice.Server) {
	var c *splice.Client
	if v.State == splice.ServerActive && v.Cli != 0 {
		c = e.clients.At(v.Cli)
	}
	if v.State == splice.ServerDraining {
		// Keep the response flowing; its end leaves a small window behind.
		window := uint32(drainWindow)
		if v.Flags&splice.ServerRespEnd != 0 && v.RcvNxt == v.RespEnd {
			window = ownWindow
		}
		k, field := e.servers.Key(s), splice.WindowField(window, toServerShift(v))
		e.out.segment(&packet.Segment{
			Src: k.Dst, Dst: k.Src, Seq: v.SndNxt, Ack: v.RcvNxt, Flags: packet.ACK, Window: field, TTL: 64,
		}, nil)
		offer(v, v.RcvNxt, field)
		return
	}
	e.sendServer(s, v, packet.ACK, v.SndNxt, nil, c)
}

// gapServer answers a server's segment beyond a gap as the client would.
func (e *Engine) gapServer(s splice.Ref, v *splice.Server, newest packet.Seq) {
	if v.Flags&splice.ServerSACK == 0 || v.Kept == 0 {
		e.ackServer(s, v)
		return
	}
	a, window := v.RcvNxt, splice.WindowField(drainWindow, toServerShift(v))
	if v.State == splice.ServerActive && v.Cli != 0 {
		c := e.clients.At(v.Cli)
		a, window = e.ackForServer(c, v), e.windowForServer(c, v)
	}
	offer(v, a, window)
	k := e.servers.Key(s)
	e.out.segment(&packet.Segment{
		Src: k.Dst, Dst: k.Src, Seq: v.SndNxt, Ack: a, Flags: packet.ACK, Window: window, TTL: 64,
		Options: e.kepts.sackOption(e.opts[:0], v.Kept, newest),
	}, nil)
}

func (e *Engine) challengeServer(s splice.Ref, v *splice.Server) {
	if e.mayAnswer(v) {
		e.ackServer(s, v)
	}
}

// owe notes that a server connection needs an ACK which may ride on the next
// request.
func (e *Engine) owe(s splice.Ref) {
	e.payOwed()
	e.owed = s
}

// payOwed sends the ACK if nothing took it along.
func (e *Engine) payOwed() {
	if s := e.owed; s != 0 {
		e.owed = 0
		if e.servers.Live(s) {
			e.ackServer(s, e.servers.At(s))
		}
	}
}
