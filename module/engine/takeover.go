// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"slices"

	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/pool"
	"github.com/weirgate/weir/module/splice"
)

// This file is how a successor goes on with what it finds. Records are believed
// one by one: what is not sound, or does not fit together, is forgotten or
// reset alone, and the rest goes on.

// Takeover says what a successor found.
type Takeover struct {
	Clients, Servers int // connections that go on, those that Lost counts included
	Idle             int // of Servers, in the pool
	Embryos, Tombs   int
	Undone           int // records of an unfinished step, as before it again
	Refused          int // records that are not sound
	Lost             int // connections that cannot go on, because bytes of theirs are gone
}

// Any reports whether there was anything.
func (t *Takeover) Any() bool { return *t != (Takeover{}) }

// resumption is what the first step does about a client, or about a server
// connection that lost its client.
type resumption struct {
	client, server splice.Ref
	again          bool // dispatch the client's request; else reset it
}

// Recover takes over what a predecessor left in the engine's memory. now is the
// time of the clock that the predecessor used.
func (e *Engine) Recover(now int64) (t Takeover) {
	s := &e.store
	if s.mem == nil {
		return t
	}
	e.now = now
	e.wheel.pop(now) // the wheel must stand at now before the first timer is set
	// What the last step of a predecessor was about, if it died of that.
	suspects := map[[2]uint32]bool{}
	var note func(uint32, splice.Ref)
	if s.mem.Failed() {
		note = func(table uint32, r splice.Ref) { suspects[[2]uint32{table, uint32(r)}] = true }
	}
	t.Undone = s.journal.Undo(note)
	sv := e.servers.Recover(func(r splice.Ref, k *packet.Tuple, v *splice.Server) bool {
		if suspects[[2]uint32{serverTable, uint32(r)}] {
			e.suspect(&v.Suspect, &v.SuspectAt)
		}
		return e.soundServer(k, v)
	})
	cl := e.clients.Recover(func(r splice.Ref, k *packet.Tuple, c *splice.Client) bool {
		if suspects[[2]uint32{clientTable, uint32(r)}] {
			e.suspect(&c.Suspect, &c.SuspectAt)
		}
		return e.soundClient(k, c)
	})
	t.Refused = sv.Refused + cl.Refused
	t.Embryos, t.Tombs = e.embryos.Recover(e.seconds()), e.tombs.Recover(e.seconds())
	if t.Embryos+t.Tombs > 0 {
		e.armSweep()
	}
	e.match()
	e.forgive()
	s.vips = map[packet.Endpoint]uint16{}
	e.clients.Range(func(r splice.Ref, _ *splice.Client) bool {
		e.takeClient(r, e.clients.At(r))
		e.commit()
		return true
	})
	e.sides.fill()
	e.takeServers(&t)
	e.keepPorts()
	s.ports = nil
	e.takeLines()
	for i := range s.resume {
		if !s.resume[i].again {
			t.Lost++
		}
	}
	t.Clients, t.Servers, t.Idle = e.clients.Len(), e.servers.Len(), e.idle.Len()
	return t
}

// TakenVIPs are the ends, on this side, of the clients' connections that Recover
// took over, with the farm of one of the connections. The caller may keep the
// map.
func (e *Engine) TakenVIPs() map[packet.Endpoint]uint16 { return e.store.vips }

// A connection that an engine died of this often is not taken over again: it
// would only kill the next one. Deaths that lie further apart do not add up.
const (
	maxSuspect    = 2
	suspectMemory = 60 * second
)

func (e *Engine) suspect(n *uint8, at *int64) {
	if e.now-*at > suspectMemory {
		*n = 0
	}
	*n++
	*at = e.now
}

// ahead is how far a time may lie in the future of the clock: half a step.
const ahead = second

func (e *Engine) soundServer(k *packet.Tuple, v *splice.Server) bool {
	own := false
	for _, p := range e.opt.SNIPs {
		own = own || p.Addr == k.Dst.Addr && p.Has(k.Dst.Port)
	}
	v.Kept = 0
	// The buckets began anew with this process.
	v.Flags &^= splice.ServerReserved
	limit := e.now + ahead
	return own && v.State > splice.ServerFree && v.State <= splice.ServerClosing && v.Class < pool.Classes &&
		v.Opened <= limit && v.Last <= limit && v.Idle <= limit && v.Bound <= limit && int(v.Cli) <= e.clients.Cap()
}

func (e *Engine) soundClient(k *packet.Tuple, c *splice.Client) bool {
	c.Kept = 0
	limit := e.now + ahead
	return c.State > splice.ClientFree && c.State <= splice.ClientClosing && k.Dst.Port != 0 &&
		c.Started <= limit && c.Last <= limit && int(c.Srv) <= e.servers.Cap()
}

// commitRecords is commit while the held bytes of clients are only in their mirrors.
func (e *Engine) commitRecords() { e.store.journal.Commit(nil) }

// match cuts what does not point at each other, and notes the ports in use.
func (e *Engine) match() {
	s := &e.store
	s.ports = map[packet.Endpoint]bool{}
	e.servers.Range(func(r splice.Ref, v *splice.Server) bool {
		s.ports[e.servers.Key(r).Dst] = true
		if v.Cli == 0 {
			return true
		}
		ok := e.clients.Live(v.Cli)
		if ok {
			c := e.clients.Peek(v.Cli)
			switch v.State {
			case splice.ServerConnecting:
				ok = c.Srv == r && c.State == splice.ClientBinding
			case splice.ServerActive:
				ok = c.Srv == r && c.State == splice.ClientSpliced
			case splice.ServerIdle:
				ok = v.Flags&splice.ServerPrivate != 0 && e.owns(c, r)
			default:
				ok = false
			}
		}
		if !ok {
			e.servers.At(r).Cli = 0
			e.commitRecords()
		}
		return true
	})
	e.clients.Range(func(r splice.Ref, c *splice.Client) bool {
		if c.Srv != 0 && (!e.servers.Live(c.Srv) || e.servers.Peek(c.Srv).Cli != r) {
			e.clients.At(r).Srv = 0
		}
		for o, n := c.Own, 0; o != 0; o, n = e.servers.Peek(o).Next, n+1 {
			if n > maxOwn || !e.servers.Live(o) || e.servers.Peek(o).Cli != r {
				e.clients.At(r).Own = 0 // those servers are found without a client
				break
			}
		}
		e.commitRecords()
		return true
	})
}

// forgive has whatever waited for an endpoint too long wait anew: while nobody
// was here nobody could answer, and what was sent may be lost. Who has time left
// keeps what it has, so that one death after the other is no excuse for ever.
// What endpoints count by themselves (how long a connection rests in the pool)
// goes on.
func (e *Engine) forgive() {
	e.servers.Range(func(r splice.Ref, v *splice.Server) bool {
		late := e.now - e.timeouts(v.Farm).Connect
		switch {
		case v.State == splice.ServerConnecting && v.Opened <= late:
			e.servers.At(r).Opened = e.now
		case v.State == splice.ServerActive && v.Bound <= late:
			e.servers.At(r).Bound = e.now
		}
		e.commitRecords()
		return true
	})
	first := never
	e.clients.Range(func(r splice.Ref, c *splice.Client) bool {
		t := e.timeouts(c.Farm)
		switch c.State {
		case splice.ClientHead:
			if c.Side != 0 && c.Started+t.Head <= e.now || c.Started+t.Idle <= e.now {
				e.clients.At(r).Started = e.now
			}
		case splice.ClientBinding:
			if c.Flags&splice.ClientWaiting != 0 {
				first = min(first, c.Waits)
			}
		case splice.ClientSpliced:
			if c.Srv == 0 {
				break
			}
			v := e.servers.Peek(c.Srv)
			if max(c.Last, v.Last)+e.patience(c, v) <= e.now {
				e.clients.At(r).Last = e.now
			}
			if c.Pace != 0 && c.Pace+t.Body <= e.now {
				e.clients.At(r).Pace = e.now
			}
		}
		e.commitRecords()
		return true
	})
	if first >= e.now {
		return
	}
	// All move together, because their order is that of their lines.
	e.clients.Range(func(r splice.Ref, c *splice.Client) bool {
		if c.State == splice.ClientBinding && c.Flags&splice.ClientWaiting != 0 {
			e.clients.At(r).Waits += e.now - first + second
			e.commitRecords()
		}
		return true
	})
}

// owns says whether a private connection is on its client's list.
func (e *Engine) owns(c *splice.Client, s splice.Ref) bool {
	for o, n := c.Own, 0; o != 0 && n <= maxOwn && e.servers.Live(o); o, n = e.servers.Peek(o).Next, n+1 {
		if o == s {
			return true
		}
	}
	return false
}

// takeClient gives a client what is not in its record, or notes what has to be
// done about it.
func (e *Engine) takeClient(r splice.Ref, c *splice.Client) {
	c.Flags &^= splice.ClientCounted
	if vip := e.clients.Key(r).Dst; len(e.store.vips) == 0 || vip != e.store.lastVIP {
		e.store.vips[vip], e.store.lastVIP = c.Farm, vip
	}
	if f := e.db.FarmByID(c.Farm); f != nil {
		f.Stats.Clients.Add(1)
		// What is established is not refused, whatever the limits are now.
		if counted, _ := e.opt.Census.add(e.clients.Key(r).Src.Addr, f.ID, 0); counted {
			c.Flags |= splice.ClientCounted
		}
	}
	whole := true
	side := c.Side != 0
	if side {
		whole = e.restore(c)
		if c.Side != 0 {
			e.charge(c, e.sides.at(c.Side))
		}
	}
	ok := c.Suspect < maxSuspect && (c.Srv == 0 || e.servers.Peek(c.Srv).Suspect < maxSuspect)
	if !ok {
		e.Count.add(ReasonQuarantined)
	}
	switch c.State {
	case splice.ClientHead:
		if side && !whole {
			ok = e.forgetHeld(c) && ok
		}
	case splice.ClientBinding:
		ok = e.takeBinding(r, c, whole) && ok
	case splice.ClientSpliced:
		ok = ok && c.Srv != 0 && e.takeSpliced(r, c, e.servers.At(c.Srv), side, whole)
	case splice.ClientAnswering:
		ok = ok && whole
	}
	if !ok {
		e.store.resume = append(e.store.resume, resumption{client: r})
	}
	e.touchClient(r, c)
}

// forgetHeld goes back to where the client's present request begins: it has all
// of it still, if nothing was acknowledged.
func (e *Engine) forgetHeld(c *splice.Client) bool {
	if c.Epoch.ReqBase.Less(c.RcvAcked) {
		return false
	}
	e.freeSide(c)
	c.State = splice.ClientHead
	c.RcvNxt = c.Epoch.ReqBase
	c.Flags &^= splice.ClientFINSeen | splice.ClientReqEndKnown | splice.ClientReqBad | splice.ClientWaiting | splice.ClientEarlyAck
	c.HeadLen, c.Attempts = 0, 0
	c.Started = e.now
	return true
}

// reread scans the held head again: a scanner is not in the record.
func (e *Engine) reread(c *splice.Client) bool {
	d := e.sides.at(c.Side)
	if f := e.db.FarmByID(c.Farm); f != nil {
		d.want = f.Wanted.Load()
	}
	d.req.Reset()
	n, st := d.req.Scan(d.held, e.limits(c.Farm), d.want)
	d.scanned = n
	return st == http1.Done && uint32(n) == c.HeadLen && d.req.Outcome != http1.Reject
}

func (e *Engine) takeBinding(r splice.Ref, c *splice.Client, whole bool) bool {
	if !whole || c.Side == 0 || !e.reread(c) {
		if s := c.Srv; s != 0 {
			e.servers.At(s).Cli = 0 // it goes to the pool when it is established
			c.Srv = 0
		}
		return e.forgetHeld(c)
	}
	if c.Srv == 0 && c.Flags&splice.ClientWaiting == 0 {
		// It waited for a plugin, or for a connection that is gone.
		e.store.resume = append(e.store.resume, resumption{client: r, again: true})
	}
	return true
}

func (e *Engine) takeSpliced(r splice.Ref, c *splice.Client, v *splice.Server, side, whole bool) bool {
	if !side {
		return true
	}
	if whole && c.Flags&splice.ClientCopy == 0 {
		return true // only bytes of the next request, or framing that the client has
	}
	if whole {
		ins := c.Epoch
		if e.reread(c) {
			d := e.sides.at(c.Side)
			if e.overlay(r, c, d); c.Epoch == ins {
				return true
			}
		}
		c.Epoch = ins
		d := e.sides.at(c.Side)
		d.sentOK, d.sent, d.held = false, nil, d.held[:0]
	}
	// There is no copy. What the server has not acknowledged must come from
	// the client, and as it was.
	if c.Flags&splice.ClientCopy != 0 && c.Flags&splice.ClientEdited != 0 && v.SndUna.Less(v.SndBase.Add(packet.Size(c.HeadLen+c.Epoch.InsLen))) {
		return false
	}
	if c.Epoch.AckToClient(v.SndUna).Less(packet.MinSeq(c.RcvAcked, c.RcvNxt)) {
		return false
	}
	if c.Epoch.InsLen != 0 && c.Flags&splice.ClientCopy == 0 {
		return false
	}
	if c.Flags&splice.ClientReqEndKnown != 0 && c.ReqEnd.Less(c.RcvNxt) && !whole {
		// Bytes of the next request that nobody has but the client.
		if c.ReqEnd.Less(c.RcvAcked) {
			return false
		}
		c.RcvNxt = c.ReqEnd
		c.Flags &^= splice.ClientFINSeen
	}
	return true
}

// takeServers brings lists, counters and timers in line with the records.
func (e *Engine) takeServers(t *Takeover) {
	var idle []splice.Ref
	e.servers.Range(func(s splice.Ref, v *splice.Server) bool {
		if sv := e.db.Server(v.ID); sv != nil {
			sv.Stats.Open.Add(1)
			switch {
			case v.State == splice.ServerConnecting:
				sv.Stats.Connecting.Add(1)
				if v.Cli != 0 {
					sv.Live.Active.Add(1)
				}
			case v.State == splice.ServerActive && v.Cli != 0:
				sv.Live.Active.Add(1)
			}
		}
		switch {
		case v.Suspect >= maxSuspect && v.Cli == 0:
			e.Count.add(ReasonQuarantined)
			e.store.resume = append(e.store.resume, resumption{server: s})
		case v.State == splice.ServerIdle && v.Flags&splice.ServerPrivate == 0:
			idle = append(idle, s)
		case v.Cli == 0 && (v.State == splice.ServerActive || v.State == splice.ServerIdle):
			e.store.resume = append(e.store.resume, resumption{server: s})
		}
		e.touchServer(s, v)
		return true
	})
	// The most recently used one is the first again.
	slices.SortStableFunc(idle, func(a, b splice.Ref) int { return cmp.Compare(e.servers.Peek(a).Idle, e.servers.Peek(b).Idle) })
	for _, s := range idle {
		v := e.servers.Peek(s)
		e.idle.Put(v.ID, pool.Class(v.Class), v.Octave, s)
		if sv := e.db.Server(v.ID); sv != nil {
			sv.Live.Idle.Add(1)
		}
	}
}

// takeLines makes the waiting lines: who came first has the earliest end.
func (e *Engine) takeLines() {
	var waiting []splice.Ref
	e.clients.Range(func(r splice.Ref, c *splice.Client) bool {
		if c.Flags&splice.ClientWaiting != 0 {
			waiting = append(waiting, r)
		}
		return true
	})
	slices.SortStableFunc(waiting, func(a, b splice.Ref) int { return cmp.Compare(e.clients.Peek(a).Waits, e.clients.Peek(b).Waits) })
	for _, r := range waiting {
		c := e.clients.At(r)
		f := e.db.FarmByID(c.Farm)
		if f == nil || c.State != splice.ClientBinding {
			c.Flags &^= splice.ClientWaiting
			e.commit()
			continue
		}
		l := e.waits[f.ID]
		if l == nil {
			l = &line{}
			e.waits[f.ID] = l
		}
		l.refs = append(l.refs, r)
		l.n++
		l.retry = true // whatever it waited for
		f.Stats.Waiting.Add(1)
		e.armLines()
		e.armPolicyTimer(retryEvery)
		e.commit()
	}
}

// goOn does what Recover could not, because it has no output.
func (e *Engine) goOn() {
	list := e.store.resume
	e.store.resume = nil
	for _, x := range list {
		switch {
		case x.server != 0:
			if e.servers.Live(x.server) {
				if v := e.servers.At(x.server); v.Cli == 0 {
					e.killServer(x.server, v, ReasonTakeover)
				}
			}
		case !e.clients.Live(x.client):
		case x.again:
			c := e.clients.At(x.client)
			if c.State == splice.ClientBinding && c.Srv == 0 && c.Flags&splice.ClientWaiting == 0 {
				e.dispatch(x.client, c, nil, nil)
			}
		default:
			c := e.clients.At(x.client)
			if s := c.Srv; s != 0 {
				e.dropServer(c)
			}
			e.resetClient(x.client, c, ReasonTakeover)
		}
		e.commit()
	}
}
