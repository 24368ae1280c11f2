// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// This file is for operators: looking at records without changing them, and
// the few things that an operator may do to them. Nothing here is called on
// the packet path. Like Step, all of it belongs to the engine's thread, between
// two steps; visits come in slices of bounded work, so that packets never wait
// for a large table.

// Flow is one client connection, copied out of the records.
type Flow struct {
	Client, VIP packet.Endpoint
	State       splice.ClientState
	Waiting     bool // stands in the farm's line for a connection
	Farm        uint16
	Method      http1.Method // of the present or last request
	Attempts    uint8        // dispatches of the present request
	Started     int64        // of the present request, or since when idle
	Last        int64        // last packet of the client
	Held        int          // bytes of the client that are held

	// The server connection, where there is one: Server is farm.Server.ID, 0
	// for none.
	Server       uint16
	ServerState  splice.ServerState
	SNIP, Remote packet.Endpoint
	Epoch        splice.Epoch
	UntilClose   bool // the response ends with the server's connection
}

// sliceSlots bounds how many places of a table one slice of a visit looks at,
// used or not.
const sliceSlots = 8192

// Flows appends the client connections from the place from on (0 begins) to
// list until it is full or enough places were looked at. next is where to go
// on, 0 when all were seen. A connection that comes or goes between two slices
// may be missed; none is seen twice unless its place was given to another.
func (e *Engine) Flows(from splice.Ref, list []Flow) (out []Flow, next splice.Ref) {
	r := max(from, 1)
	for n := 0; int(r) <= e.clients.Cap(); n, r = n+1, r+1 {
		if n >= sliceSlots || len(list) == cap(list) {
			return list, r
		}
		if e.clients.Live(r) {
			list = append(list, e.flow(r))
		}
	}
	return list, 0
}

func (e *Engine) flow(r splice.Ref) Flow {
	c, k := e.clients.Peek(r), e.clients.Key(r)
	f := Flow{
		Client: k.Src, VIP: k.Dst, State: c.State, Waiting: c.Flags&splice.ClientWaiting != 0, Farm: c.Farm,
		Method: c.Method, Attempts: c.Attempts, Started: c.Started, Last: c.Last, Epoch: c.Epoch,
	}
	if c.Side != 0 {
		d := e.sides.at(c.Side)
		f.Held = len(d.held) + len(d.next)
	}
	if c.Srv != 0 {
		v, sk := e.servers.Peek(c.Srv), e.servers.Key(c.Srv)
		f.Server, f.ServerState, f.SNIP, f.Remote = v.ID, v.State, sk.Dst, sk.Src
		f.UntilClose = v.Flags&splice.ServerUntilClose != 0
	}
	return f
}

// Conn is one server connection, copied out of the records.
type Conn struct {
	Server   uint16 // farm.Server.ID
	State    splice.ServerState
	SNIP     packet.Endpoint
	Requests uint32
	Opened   int64
	Idle     int64 // since when idle, in state idle
	Last     int64
	MSS      uint16
	SACK     bool
}

// Conns is Flows for server connections.
func (e *Engine) Conns(from splice.Ref, list []Conn) (out []Conn, next splice.Ref) {
	s := max(from, 1)
	for n := 0; int(s) <= e.servers.Cap(); n, s = n+1, s+1 {
		if n >= sliceSlots || len(list) == cap(list) {
			return list, s
		}
		if !e.servers.Live(s) {
			continue
		}
		v, k := e.servers.Peek(s), e.servers.Key(s)
		list = append(list, Conn{
			Server: v.ID, State: v.State, SNIP: k.Dst, Requests: v.Requests, Opened: v.Opened,
			Idle: v.Idle, Last: v.Last, MSS: v.MSS, SACK: v.Flags&splice.ServerSACK != 0,
		})
	}
	return list, 0
}

// act runs f as a part of a step: timers before it, waiting lines and owed
// acknowledgments after it.
func (e *Engine) act(now int64, out *Output, f func()) {
	ev := Event{Kind: Tick}
	e.Step(now, &ev, out)
	e.now, e.out = now, out
	f()
	e.Step(now, &ev, out)
}

// Kill resets one client connection and what serves it. It reports whether
// there was one.
func (e *Engine) Kill(now int64, client, vip packet.Endpoint, out *Output) (found bool) {
	r := e.clients.Lookup(&packet.Tuple{Src: client, Dst: vip})
	if r == 0 {
		return false
	}
	e.act(now, out, func() {
		if e.clients.Live(r) { // its timer may have fired
			e.cut(r, e.clients.At(r), ReasonKilled)
		}
	})
	return true
}

// cut resets a client and the server connection that it is bound to.
func (e *Engine) cut(r splice.Ref, c *splice.Client, why Reason) {
	if s := c.Srv; s != 0 {
		c.Srv = 0
		if v := e.servers.At(s); v.State == splice.ServerConnecting {
			e.inactive(v)
			v.Cli = 0 // it goes to the pool when it is established
		} else {
			e.killServer(s, v, why)
		}
	}
	if c.State == splice.ClientClosing {
		e.Count.add(why)
		e.removeClient(r, c)
		return
	}
	e.resetClient(r, c, why)
}

// closeAtOnce bounds how many idle connections one call closes.
const closeAtOnce = 256

// CloseIdle closes idle connections to a server, which takes nothing new, in
// good order. It reports whether some are left for another call.
func (e *Engine) CloseIdle(now int64, server uint16, out *Output) (more bool) {
	e.act(now, out, func() {
		for range closeAtOnce {
			s := e.idle.Oldest(server)
			if s == 0 {
				return
			}
			e.closeServer(s, e.servers.At(s), ReasonServerGone)
			e.commit()
		}
		more = e.idle.Oldest(server) != 0
	})
	return more
}

// CutServer ends what is left of a server's connections when its time to drain
// is over, beginning at the place from (0 begins); next is 0 when all were
// seen. A request of which the client has seen nothing yet goes to another
// server where the rules for failures allow that; any other one is reset.
func (e *Engine) CutServer(now int64, server uint16, from splice.Ref, out *Output) (next splice.Ref) {
	s := max(from, 1)
	e.act(now, out, func() {
		for n := 0; int(s) <= e.servers.Cap(); n, s = n+1, s+1 {
			if n >= sliceSlots {
				return
			}
			if e.servers.Live(s) && e.servers.Peek(s).ID == server {
				e.cutServer(s, e.servers.At(s))
				e.commit()
			}
		}
		s = 0
	})
	return s
}

func (e *Engine) cutServer(s splice.Ref, v *splice.Server) {
	r := v.Cli
	switch {
	case r != 0 && v.State == splice.ServerConnecting:
		e.inactive(v)
		v.Cli = 0
		e.killServer(s, v, ReasonServerGone)
		e.redispatch(r, e.clients.At(r), ReasonServerGone, ReasonRedispatchConnect)
	case r != 0 && v.State == splice.ServerActive:
		k := e.servers.Key(s)
		e.out.segment(&packet.Segment{
			Src: k.Dst, Dst: k.Src, Seq: v.SndNxt, Ack: v.RcvNxt, Flags: packet.RST | packet.ACK, TTL: 64,
		}, nil)
		e.Count.add(ReasonServerGone)
		e.failed(r, e.clients.At(r), s, v, false, ReasonServerGone)
	default:
		e.killServer(s, v, ReasonServerGone)
	}
}

// LeaveVIP has the clients of a VIP that is not served any more go, beginning
// at the place from (0 begins): one between two requests gets a FIN, one in an
// exchange gets it after its response, or a reset at once with cut. next is 0
// when all were seen; left is how many clients of this slice are still there.
func (e *Engine) LeaveVIP(now int64, vip packet.Endpoint, from splice.Ref, cut bool, out *Output) (next splice.Ref, left int) {
	r := max(from, 1)
	e.act(now, out, func() {
		for n := 0; int(r) <= e.clients.Cap(); n, r = n+1, r+1 {
			if n >= sliceSlots {
				return
			}
			if !e.clients.Live(r) || e.clients.Key(r).Dst != vip {
				continue
			}
			c := e.clients.At(r)
			switch {
			case cut:
				e.cut(r, c, ReasonVIPGone)
			case c.State == splice.ClientHead && c.Side == 0:
				e.Count.add(ReasonVIPGone)
				e.finishClient(r, c)
			default:
				c.Flags |= splice.ClientWantClose
			}
			e.commit()
			if e.clients.Live(r) {
				left++
			}
		}
		r = 0
	})
	return r, left
}

// FlowOf returns one client connection.
func (e *Engine) FlowOf(client, vip packet.Endpoint) (f Flow, ok bool) {
	r := e.clients.Lookup(&packet.Tuple{Src: client, Dst: vip})
	if r == 0 {
		return f, false
	}
	return e.flow(r), true
}
