// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// This file is what the engine makes of a response: its heads, its end, and
// what it cannot be trusted in.

// follow feeds in-order bytes of a response to the scanners. It returns false
// when the connection had to be given up.
func (e *Engine) follow(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server, b []byte) bool {
	for len(b) > 0 && v.Flags&(splice.ServerRespEnd|splice.ServerUntilClose) == 0 {
		if v.Flags&splice.ServerHeadDone == 0 {
			if v.Resp.Len == 0 {
				v.Flags &^= splice.ServerEarly
				if early(v) {
					v.Flags |= splice.ServerEarly
				}
			}
			n, st := v.Resp.Scan(b, &e.opt.Limits)
			v.RcvNxt = v.RcvNxt.Add(packet.Size(n))
			b = b[n:]
			switch st {
			case http1.Bad:
				e.badResponse(r, c, s, v)
				return false
			case http1.More:
				return true
			}
			if v.Resp.Interim() {
				if v.Resp.Status == 100 && c.Flags&splice.ClientExpect != 0 {
					e.continued(r, c, s, v)
				}
				v.Resp.Again()
				continue
			}
			if v.Resp.Status == 101 && !e.mayTunnel(c, v) {
				e.Count.add(ReasonUnaskedSwitch)
				e.badResponse(r, c, s, v)
				return false
			}
			e.responseHead(c, v)
			if v.Resp.Status == 101 {
				e.openTunnel(r, c, s, v)
			}
			continue
		}
		n, st := v.Body.Feed(b, &e.opt.Limits)
		v.RcvNxt = v.RcvNxt.Add(packet.Size(n))
		b = b[n:]
		switch st {
		case http1.Bad:
			// A chunk line that cannot be trusted: the end will never be
			// known. What was passed stays, the rest passes until the close.
			e.noReuse(v, ReasonIsolated)
			c.Flags |= splice.ClientWantClose
			v.Flags |= splice.ServerUntilClose
		case http1.Done:
			v.RespEnd = v.RcvNxt
			v.Flags |= splice.ServerRespEnd
		case http1.More:
			e.nearEnd(v)
		}
	}
	if v.Flags&splice.ServerUntilClose != 0 {
		v.RcvNxt = v.RcvNxt.Add(packet.Size(len(b)))
	} else if len(b) > 0 && v.Flags&splice.ServerRespEnd != 0 && v.RcvNxt.Less(v.RespEnd) {
		k := min(len(b), int(v.RcvNxt.To(v.RespEnd)))
		v.Body.Skip(uint64(k))
		v.RcvNxt = v.RcvNxt.Add(packet.Size(k))
	}
	return true
}

// responseHead takes over what a final response head says.
func (e *Engine) responseHead(c *splice.Client, v *splice.Server) {
	h := &v.Resp
	if e.access != nil {
		e.access.status(v)
	}
	v.Flags |= splice.ServerHeadDone
	v.Body.Start(h.Body, h.Length)
	e.headSeen(c, v)
	e.reserve(v)
	if v.Flags&splice.ServerEarly != 0 {
		e.noReuse(v, ReasonEarlyResponse)
	}
	persistent := !h.Close && (h.Minor == 1 || h.KeepAlive)
	if !persistent {
		e.noReuse(v, ReasonServerClose)
		c.Flags |= splice.ClientWantClose
	}
	if h.Outcome != http1.Accept || h.Status == 101 {
		e.noReuse(v, ReasonIsolated)
		c.Flags |= splice.ClientWantClose
	}
	if h.ConnAuth {
		e.private(v)
	}
	if h.KeepAliveTimeout > 0 {
		v.HorizonMS = h.KeepAliveTimeout * 1000
	}
	if h.KeepAliveMax == 1 {
		e.noReuse(v, ReasonMaxRequests)
	}
	switch h.Body {
	case http1.BodyNone:
		v.RespEnd = v.RcvNxt
		v.Flags |= splice.ServerRespEnd
	case http1.BodyUntilClose:
		e.noReuse(v, ReasonServerClose)
		v.Flags |= splice.ServerUntilClose
		c.Flags |= splice.ClientWantClose
	case http1.BodyLength:
		if h.Length == 0 {
			v.RespEnd = v.RcvNxt
			v.Flags |= splice.ServerRespEnd
		} else {
			e.nearEnd(v)
		}
	}
}

// badResponse handles bytes that are no HTTP/1 response.
func (e *Engine) badResponse(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server) {
	e.Count.add(ReasonBadResponse)
	// On a connection that has served before, these may be late bytes of an
	// exchange before: the request has not been answered, and goes to another
	// connection where that is allowed.
	again := v.Requests > 1 && c.Flags&(splice.ClientResponded|splice.ClientIdempotent) == splice.ClientIdempotent
	e.stale(c, v)
	e.killServer(s, v, ReasonBadResponse)
	c.Srv = 0
	switch {
	case again:
		e.redispatch(r, c, ReasonBadResponse, ReasonRedispatchIdempotent)
	case c.Flags&splice.ClientResponded == 0:
		e.answer(r, c, reply{status: 502, close: true})
	default:
		e.resetClient(r, c, ReasonBadResponse)
	}
}

// serverFINActive handles a server's FIN, at the number end, during an
// exchange. It returns false when nothing is left to forward.
func (e *Engine) serverFINActive(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server, p *packet.TCP, end packet.Seq) bool {
	switch {
	case v.RcvNxt != end:
		// Not in order: the server repeats it.
		return true
	case v.RcvNxt == v.RcvBase && v.Flags&splice.ServerHeadDone == 0 && v.Resp.Len == 0 && c.Flags&splice.ClientResponded == 0:
		// Closed instead of answered: the keep-alive race.
		v.Flags |= splice.ServerFINSeen
		e.failed(r, c, s, v, p.Ack().LessEq(v.SndBase), ReasonServerFIN)
		return false
	case v.Flags&splice.ServerUntilClose != 0:
		v.RespEnd = end
		v.Flags |= splice.ServerRespEnd | splice.ServerFINSeen
		v.RcvHigh = packet.MaxSeq(v.RcvHigh, end)
		e.noReuse(v, ReasonServerClose)
		c.Flags |= splice.ClientWantClose
		return true
	case v.Flags&splice.ServerRespEnd != 0 && v.RespEnd == end:
		// Complete. If the response's head has not announced the end, it is that
		// of the server connection alone: the client has not been told not to
		// ask again, and its next request may be under way.
		v.Flags |= splice.ServerFINSeen
		e.noReuse(v, ReasonServerFIN)
		return true
	}
	// Truncated: the client must see that (a clean FIN would hide it).
	e.Count.add(ReasonTruncatedResponse)
	e.killServer(s, v, ReasonTruncatedResponse)
	c.Srv = 0
	e.resetClient(r, c, ReasonTruncatedResponse)
	return false
}
