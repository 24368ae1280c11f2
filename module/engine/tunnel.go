// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// This file is the connection after a 101 (Switching Protocols): both
// directions pass without framing, and so do both FINs, because nobody else
// will ever use the server connection. The endpoints close it as they would
// without the engine, which forgets it when both FINs are acknowledged.

// mayTunnel reports whether a 101 is an answer to what the client asked: it
// wants another protocol, and the server has the whole request. Anything else
// would let bytes reach a server that no policy has seen.
func (e *Engine) mayTunnel(c *splice.Client, v *splice.Server) bool {
	return c.Flags&(splice.ClientUpgrade|splice.ClientFINSeen) == splice.ClientUpgrade && !early(v)
}

// openTunnel lets both directions pass after a 101, and only then (Pingora
// CVE-2026-2833). What the client sent behind its request was held until now.
func (e *Engine) openTunnel(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server) {
	e.Count.add(ReasonTunnel)
	v.Flags |= splice.ServerTunnel
	v.Flags &^= splice.ServerReqEnd
	c.Flags &^= splice.ClientReqEndKnown | splice.ClientExpect
	c.Pace = 0
	c.ReqBody.Start(http1.BodyUntilClose, 0)
	// The server has acknowledged the request: count from its end.
	c.Epoch.ReqBase, c.Epoch.SndBase, c.Epoch.InsOff, c.Epoch.InsLen = c.ReqEnd, v.ReqEnd, 0, 0
	v.SndBase = v.ReqEnd
	if c.Side == 0 {
		return
	}
	d := e.sides.at(c.Side)
	if len(d.next) == 0 {
		e.freeSide(c)
		return
	}
	d.held, d.next = append(d.held[:0], d.next...), d.next[:0]
	d.sent, d.sentOK = d.held, true
	if c.Epoch.ReqBase.Less(c.RcvAcked) {
		c.Flags |= splice.ClientEarlyAck
	}
	c.Due = 0
	e.resend(r, c, s, v, v.SndBase)
}

// tunnelToServer passes a client's data or FIN.
func (e *Engine) tunnelToServer(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server, p *packet.TCP, ev *Event) {
	seq, n := p.Seq(), p.PayloadLen()
	fin := p.Flags().Has(packet.FIN)
	end := seq.Add(packet.Size(n))
	if c.Flags&splice.ClientFINPassed != 0 && c.CliFIN.Less(end) {
		e.challengeClient(r, c) // nothing follows a FIN
		return
	}
	if n > 0 && end.LessEq(c.Epoch.ReqBase) {
		e.dupACK(r, c, seq)
		return
	}
	whole := true
	if out := c.Epoch.SeqToServer(end); v.SndEdge.Less(out) && n > 1 {
		// The server gets what it has room for; the FIN stands behind the rest.
		e.Count.add(ReasonBeyondWindow)
		room := int(int32(v.SndEdge - c.Epoch.SeqToServer(seq)))
		if room <= 0 || seq.Add(packet.Size(room)).LessEq(c.Epoch.ReqBase) {
			e.probeWindow(c, s, v, c.Epoch.SeqToServer(seq))
			return
		}
		n, whole, fin = room, false, false
		end = seq.Add(packet.Size(n))
	}
	last := end
	if fin {
		c.CliFIN = end
		c.Flags |= splice.ClientFINPassed
		last = end.Add(1)
	}
	if seq.LessEq(c.RcvNxt) {
		c.RcvNxt = packet.MaxSeq(c.RcvNxt, last)
	}
	body, from := p.Payload()[:n], seq
	if from.Less(c.Epoch.ReqBase) {
		body, from, whole = body[seq.To(c.Epoch.ReqBase):], c.Epoch.ReqBase, false
	}
	if n > 0 && e.sideHolds(c, from) {
		// A repetition of what came before the 101: the server gets our copy.
		e.resend(r, c, s, v, again(c, v, from))
		held := c.Epoch.ReqBase.Add(packet.Size(len(e.sides.at(c.Side).held)))
		k := min(len(body), int(from.To(held)))
		body, from, whole = body[k:], from.Add(packet.Size(k)), false
	}
	if whole && !tooLong(p, ev, n, v.MSS, e.narrowServer(v)) {
		e.forwardToServer(r, c, s, v, p, ev, false)
	} else {
		e.partToServer(r, c, s, v, body, c.Epoch.SeqToServer(from))
		if fin {
			e.sendServer(s, v, packet.FIN|packet.ACK, c.Epoch.SeqToServer(end), nil, c)
		}
	}
	v.SndNxt = packet.MaxSeq(v.SndNxt, c.Epoch.SeqToServer(last))
	e.tunnelOver(r, c, s, v)
}

// tunnelToClient passes a server's segment: b begins at seq; cut says that it
// is not the whole packet any more.
func (e *Engine) tunnelToClient(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server, p *packet.TCP, ev *Event, seq packet.Seq, b []byte, cut bool) {
	last := seq.Add(packet.Size(len(b)))
	if len(b) > 0 {
		c.Flags |= splice.ClientResponded
		if v.RcvHigh.Less(last) {
			if e.access != nil {
				e.access.passed(e, r, v.RcvHigh.To(last))
			}
			e.seen(v, v.RcvHigh, last)
		}
	}
	if p.Flags().Has(packet.FIN) {
		c.OurFIN = c.Epoch.SeqToClient(last)
		c.Flags |= splice.ClientFINSent
		last = last.Add(1)
	}
	if seq.LessEq(v.RcvNxt) {
		v.RcvNxt = packet.MaxSeq(v.RcvNxt, last)
	}
	v.RcvHigh = packet.MaxSeq(v.RcvHigh, last)
	e.forwardToClient(r, c, s, v, p, ev, seq, b, cut)
	c.SndNxt = packet.MaxSeq(c.SndNxt, c.Epoch.SeqToClient(last))
	e.dropCopies(c, v)
	e.tunnelOver(r, c, s, v)
}

// tunnelOver forgets both connections when both FINs have passed and are
// acknowledged.
func (e *Engine) tunnelOver(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server) {
	const both = splice.ClientFINPassed | splice.ClientFINSent
	if c.Flags&both != both || c.SndUna.LessEq(c.OurFIN) || v.SndUna.LessEq(c.Epoch.SeqToServer(c.CliFIN)) {
		return
	}
	e.served(c, v)
	e.Count.add(ReasonServed)
	if e.access != nil {
		e.access.served(e, r, c)
	}
	e.closing(v, Reason(v.Reason))
	v.Cli, c.Srv = 0, 0
	e.removeServer(s, v, false)
	e.removeClient(r, c)
}

// tunnelTimeout is how long a tunnel may be silent where the farm does not
// say.
const tunnelTimeout = 3600 * second

// patience is how long the two sides of an exchange may say nothing.
func (e *Engine) patience(c *splice.Client, v *splice.Server) int64 {
	t := e.timeouts(c.Farm)
	if v.Flags&splice.ServerTunnel == 0 {
		return t.Response
	}
	if t.Tunnel == 0 {
		return tunnelTimeout
	}
	return t.Tunnel
}

// closeTunnel ends a tunnel in which nobody says anything any more.
func (e *Engine) closeTunnel(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server) {
	e.killServer(s, v, ReasonTunnelSilent)
	c.Srv = 0
	e.resetClient(r, c, ReasonTunnelSilent)
}

// rebaseAt is how far an exchange may get from its starting numbers: they
// compare only within 2 GiB (RFC 9293 section 3.4).
const rebaseAt = 1 << 30

// rebaseMargin stays below what is acknowledged, so that no test for the very
// first byte of an exchange comes out true again.
const rebaseMargin = 1 << 20

// rebase moves the starting numbers of a long exchange forward, both of a
// direction by as much, so that the equations stay what they are. What lies
// below is acknowledged by its receiver.
func (e *Engine) rebase(c *splice.Client, v *splice.Server) {
	if v.RcvBase.To(v.RcvNxt) > rebaseAt {
		if k := c.Epoch.RespBase.To(c.SndUna); k > rebaseMargin && k < 1<<31 {
			k -= rebaseMargin
			v.RcvBase, c.Epoch.RcvBase, c.Epoch.RespBase = v.RcvBase.Add(k), c.Epoch.RcvBase.Add(k), c.Epoch.RespBase.Add(k)
		}
	}
	if v.SndBase.To(v.SndNxt) > rebaseAt && c.Epoch.InsLen == 0 && (c.Side == 0 || !e.sides.at(c.Side).sentOK) {
		if k := v.SndBase.To(v.SndUna); k > rebaseMargin && k < 1<<31 {
			k -= rebaseMargin
			v.SndBase, c.Epoch.SndBase, c.Epoch.ReqBase = v.SndBase.Add(k), c.Epoch.SndBase.Add(k), c.Epoch.ReqBase.Add(k)
		}
	}
}
