// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
	"github.com/weirgate/weir/policies/snapshot"
)

// This file is connection-bound authentication (NTLM, Negotiate): it belongs
// to the TCP connection, so whoever sends the next request over that
// connection is the one who logged in. From the first word of such a scheme on
// a server connection is private to its client for ever: between requests it
// waits for that client alone, it goes when the client goes, and it never
// enters the pool. To close it after each response would be as safe, but the
// three messages of such a handshake must meet the same connection.

// private marks a server connection as its client's own.
func (e *Engine) private(v *splice.Server) {
	if v.Flags&splice.ServerPrivate == 0 {
		v.Flags |= splice.ServerPrivate
		e.Count.add(ReasonPrivate)
	}
}

// maxOwn bounds the idle connections that are private to one client: one for
// each server that it uses in turn.
const maxOwn = 8

// keepPrivate has a private connection whose exchange is over wait for the
// next request of its client. It returns false where it must not, or cannot.
func (e *Engine) keepPrivate(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server) bool {
	if v.Flags&(splice.ServerPrivate|splice.ServerNoReuse|splice.ServerFINSeen) != splice.ServerPrivate ||
		c.Flags&(splice.ClientWantClose|splice.ClientFINSeen) != 0 || e.stopping {
		return false
	}
	sv := e.db.Server(v.ID)
	if sv == nil || sv.Removed() || !sv.Live.Usable(e.now) {
		return false
	}
	n := 0
	for o := c.Own; o != 0; o = e.servers.At(o).Next {
		n++
	}
	if n >= maxOwn {
		return false
	}
	e.kepts.drop(&v.Kept)
	v.State = splice.ServerIdle
	v.Idle, v.Due = e.now, e.now+ownCheck
	v.RcvHigh = v.RcvNxt
	v.Cli, v.Next, c.Own = r, c.Own, s
	e.touchServer(s, v)
	return true
}

// ownCheck is how often an idle private connection looks whether its server
// still takes requests.
const ownCheck = second

// checkOwn closes an idle private connection whose server takes nothing new.
// Nothing else ends it but its client and its server.
func (e *Engine) checkOwn(s splice.Ref, v *splice.Server) {
	if sv := e.db.Server(v.ID); sv == nil || sv.Removed() || sv.Live.State.Load() != uint32(snapshot.Ready) {
		e.closeServer(s, v, ReasonServerGone)
		return
	}
	v.Due = e.now + ownCheck
	e.touchServer(s, v)
}

// ownServer returns an idle private connection of the client to a server that
// the policies allow for this request, and that server, or 0. A client stays
// with the server where it logged in, wherever the balance would send it.
func (e *Engine) ownServer(c *splice.Client, f *farm.Farm, sel *snapshot.Selector, req *snapshot.Request, tried *snapshot.Tried) (splice.Ref, *farm.Server) {
	for o := c.Own; o != 0; o = e.servers.At(o).Next {
		v := e.servers.At(o)
		sv := e.db.Server(v.ID)
		if sv == nil || sv.Removed() || v.Farm != f.ID || tried.Has(int(sv.Index)) {
			continue
		}
		// Ask the policies about this server alone.
		for i := range e.skip {
			e.skip[i] = ^uint64(0)
		}
		e.skip[sv.Index>>6] &^= 1 << (sv.Index & 63)
		choice := sel.Choose(req, f.Lives, &e.skip, e.random(), &e.scratch)
		if choice.Kind == snapshot.ChoiceServer && choice.Server == sv.Index {
			e.Count.add(ReasonPrivateReused)
			e.unlinkOwn(o, v)
			return o, sv
		}
	}
	return 0, nil
}

// unlinkOwn takes an idle private connection out of its client's list.
func (e *Engine) unlinkOwn(s splice.Ref, v *splice.Server) {
	if v.Flags&splice.ServerPrivate == 0 || v.State != splice.ServerIdle || v.Cli == 0 {
		return
	}
	c := e.clients.At(v.Cli)
	for at := &c.Own; *at != 0; at = &e.servers.At(*at).Next {
		if *at == s {
			*at = v.Next
			break
		}
	}
	v.Cli, v.Next = 0, 0
}

// closeOwn closes the idle private connections of a client that will not ask
// again.
func (e *Engine) closeOwn(c *splice.Client) {
	for c.Own != 0 {
		o := c.Own
		e.closeServer(o, e.servers.At(o), ReasonPrivate)
	}
}

// bindOwn sends a request over a private connection.
func (e *Engine) bindOwn(r splice.Ref, c *splice.Client, s splice.Ref, sv *farm.Server, p *packet.TCP, ev *Event) {
	e.leaveLine(c, sv.Farm)
	c.Attempts++
	e.sides.at(c.Side).tried.Set(int(sv.Index))
	sv.Live.Active.Add(1)
	e.bind(r, c, s, e.servers.At(s), p, ev)
}
