// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"math"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// Timers are named by reference: clients first, then servers, then the sweep
// of embryos and tombstones.
func (e *Engine) clientTimer(r splice.Ref) uint32 { return uint32(r) }
func (e *Engine) serverTimer(s splice.Ref) uint32 { return uint32(e.opt.Clients) + uint32(s) }
func (e *Engine) sweepTimer() uint32              { return uint32(e.opt.Clients+e.opt.Servers) + 1 }

const never = int64(math.MaxInt64)

func (e *Engine) timeouts(farmID uint16) *farm.Timeouts {
	if f := e.db.FarmByID(farmID); f != nil {
		return &f.Timeouts
	}
	return &farm.DefaultTimeouts
}

// clientDeadline is when the client's timer must fire at the latest.
func (e *Engine) clientDeadline(r splice.Ref, c *splice.Client) int64 {
	t := e.timeouts(c.Farm)
	d := never
	if c.Due != 0 {
		d = c.Due
	}
	switch c.State {
	case splice.ClientHead:
		if c.Side != 0 {
			d = min(d, e.since(c.Started)+t.Head)
		} else {
			d = min(d, c.Started+t.Idle) // keep-alive probes do not postpone it
		}
	case splice.ClientBinding:
		if c.Flags&splice.ClientWaiting != 0 {
			d = min(d, e.waitsUntil(c))
		}
	case splice.ClientSpliced:
		last, quiet := c.Last, t.Response
		if c.Srv != 0 {
			v := e.servers.Peek(c.Srv)
			last, quiet = e.since(max(last, v.Last)), e.patience(c, v)
		}
		d = min(d, last+quiet)
		if c.Srv != 0 {
			d = min(d, e.unacknowledged(c, e.servers.Peek(c.Srv)))
		}
		if c.SndUna != c.SndNxt {
			d = min(d, c.Last+2*quiet)
		}
		if c.Pace != 0 {
			d = min(d, c.Pace+t.Body)
		}
	case splice.ClientClosing:
		d = min(d, c.CloseBy)
	}
	return d
}

// resumeWait is how long a request waits at least after a pause, in which the
// line could not move.
const resumeWait = second

// waitsUntil is when a request in the line is answered with 503.
func (e *Engine) waitsUntil(c *splice.Client) int64 {
	if e.resumed == 0 {
		return c.Waits
	}
	return max(c.Waits, e.resumed+resumeWait)
}

// touchClient makes sure that the timer fires early enough. A deadline that
// moved later costs nothing here.
func (e *Engine) touchClient(r splice.Ref, c *splice.Client) {
	e.touch(e.clientTimer(r), e.clientDeadline(r, c))
}

func (e *Engine) touch(id uint32, due int64) {
	if due == never {
		return
	}
	if at := e.wheel.at(id); at == 0 || due < at {
		e.wheel.set(id, due)
	}
}

func (e *Engine) serverDeadline(v *splice.Server) int64 {
	d := never
	if v.Due != 0 {
		d = v.Due
	}
	switch v.State {
	case splice.ServerConnecting:
		d = min(d, e.since(v.Opened)+e.timeouts(v.Farm).Connect)
	case splice.ServerIdle:
		if v.Flags&splice.ServerPrivate != 0 {
			break // it lives as long as its client's connection
		}
		f, sv := e.db.FarmByID(v.Farm), e.db.Server(v.ID)
		if f != nil && f.Pool.IdleTimeout > 0 {
			d = min(d, v.Idle+f.Pool.IdleTimeout)
		}
		if surplus(f, sv) {
			d = min(d, v.Idle+surplusLife)
		}
		if sv != nil {
			if h := sv.Stats.Horizon.Load(); h != 0 {
				d = min(d, v.Idle+h)
			}
		}
		if v.HorizonMS != 0 {
			// Retire before the server does; it counts from its own last byte.
			h := int64(v.HorizonMS) * millisecond
			d = min(d, v.Idle+h-min(h/4, second))
		}
	}
	return d
}

// surplusLife is how long a connection above max_idle stays all the same: when
// a burst of responses ends, the next requests want these connections at once.
// The most recently used are taken first, so that the surplus ages.
const surplusLife = second

func surplus(f *farm.Farm, sv *farm.Server) bool {
	return f != nil && sv != nil && f.Pool.MaxIdle > 0 && sv.Live.Idle.Load() > f.Pool.MaxIdle
}

func (e *Engine) touchServer(s splice.Ref, v *splice.Server) {
	e.touch(e.serverTimer(s), e.serverDeadline(v))
}

// armSweep makes sure that embryos and tombstones are dropped in time.
func (e *Engine) armSweep() {
	if e.wheel.at(e.sweepTimer()) == 0 {
		e.wheel.set(e.sweepTimer(), e.now+4*second)
	}
}

// advance fires what is due.
func (e *Engine) advance() {
	for {
		id, ok := e.wheel.pop(e.now)
		if !ok {
			return
		}
		switch {
		case id == e.preopenTimer():
			e.preopen()
		case id == e.lineTimer():
			e.retryLines()
		case id == e.policyTimer():
			e.retryPolicies()
		case id == e.sweepTimer():
			e.tombs.Expire(e.seconds())
			e.embryos.Expire(e.seconds())
			if e.tombs.Len() > 0 || e.embryos.Len() > 0 {
				e.armSweep()
			}
		case id <= uint32(e.opt.Clients):
			r := splice.Ref(id)
			if !e.clients.Live(r) {
				break
			}
			if c := e.clients.Peek(r); e.now < e.clientDeadline(r, c) {
				// It moved since: the record, which is in no cache, stays as it is.
				e.touchClient(r, c)
				continue
			}
			e.clientFires(r, e.clients.At(r))
		default:
			s := splice.Ref(id - uint32(e.opt.Clients))
			if !e.servers.Live(s) {
				break
			}
			if v := e.servers.Peek(s); e.now < e.serverDeadline(v) {
				e.touchServer(s, v)
				continue
			}
			e.serverFires(s, e.servers.At(s))
		}
		e.payOwed()
		e.commit()
	}
}

// clientFires does what is due for a client and sets the timer again.
func (e *Engine) clientFires(r splice.Ref, c *splice.Client) {
	t := e.timeouts(c.Farm)
	due := c.Due != 0 && c.Due <= e.now
	if due {
		c.Due = 0
	}
	switch c.State {
	case splice.ClientHead:
		switch {
		case c.Side == 0 && c.Started+t.Idle <= e.now:
			e.Count.add(ReasonClientIdle)
			e.finishClient(r, c)
			return
		case c.Side != 0 && e.since(c.Started)+t.Head <= e.now:
			e.Count.add(ReasonHeadTimeout)
			e.answer(r, c, reply{status: 408, close: true})
			return
		case due:
			e.earlyACK(r, c)
			return
		}
	case splice.ClientBinding:
		if c.Flags&splice.ClientWaiting != 0 && e.waitsUntil(c) <= e.now {
			e.Count.add(ReasonWaitTimeout)
			if f := e.db.FarmByID(c.Farm); f != nil {
				f.Stats.WaitTimedOut.Add(1)
			}
			e.answer(r, c, reply{status: 503, retry: 1})
			return
		}
		if due {
			e.earlyACK(r, c)
			return
		}
	case splice.ClientSpliced:
		v := e.servers.At(c.Srv)
		quiet := e.patience(c, v)
		switch {
		case e.since(max(c.Last, v.Last))+quiet <= e.now && v.Flags&splice.ServerTunnel != 0:
			e.closeTunnel(r, c, c.Srv, v)
			return
		case e.since(max(c.Last, v.Last))+quiet <= e.now, e.unacknowledged(c, v) <= e.now:
			e.silent(r, c, c.Srv, v)
			return
		case c.Pace != 0 && c.Pace+t.Body <= e.now && e.slow(r, c, v):
			return
		case c.SndUna != c.SndNxt && c.Last+2*quiet <= e.now:
			// The server talks, the client is gone without a word.
			e.orphan(c.Srv, v, c)
			e.resetClient(r, c, ReasonClientSilent)
			return
		case due:
			e.splicedDue(r, c, c.Srv, v)
			return
		}
	case splice.ClientAnswering:
		if due {
			if c.Tries++; c.Tries > maxTries {
				e.resetClient(r, c, ReasonClientSilent)
				return
			}
			e.sendAnswer(r, c, e.sides.at(c.Side))
			return
		}
	case splice.ClientClosing:
		if c.Flags&splice.ClientWasReset != 0 {
			if c.Tries++; c.Tries > resetTries || e.stopping {
				e.removeClient(r, c)
				return
			}
			e.sendReset(r, c)
			c.Due = e.now + rto(c.Tries)
			break
		}
		if c.CloseBy <= e.now {
			e.resetClient(r, c, ReasonClientSilent)
			return
		}
		if due && c.SndUna.LessEq(c.OurFIN) {
			c.Tries++
			e.sendClient(r, c, packet.FIN|packet.ACK, c.OurFIN, nil)
			c.Due = e.now + rto(c.Tries)
		}
	}
	e.touchClient(r, c)
}

// splicedDue retransmits what is ours of a request, or acknowledges what we
// hold of the next one.
func (e *Engine) splicedDue(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server) {
	if c.Side != 0 {
		d := e.sides.at(c.Side)
		if d.sentOK && v.SndUna.Less(v.SndBase.Add(packet.Size(e.sendable(c, d)))) {
			if c.Tries++; c.Tries > maxTries {
				e.silent(r, c, s, v)
				return
			}
			e.Count.add(ReasonRetransmitted)
			e.resend(r, c, s, v, v.SndUna)
			return
		}
		if c.Flags&splice.ClientExpect != 0 && c.RcvAcked.Less(c.RcvNxt) {
			// The body that waits for 100 (Continue) is ours to keep now.
			e.earlyACK(r, c)
		} else if len(d.next) > 0 {
			if e.stuck(c, v) {
				e.killServer(s, v, ReasonStuckInDoubt)
				c.Srv = 0
				e.resetClient(r, c, ReasonStuckInDoubt)
				return
			}
			e.dupACK(r, c, c.RcvNxt)
		}
	}
	e.touchClient(r, c)
}

// silent ends an exchange in which the server says nothing any more.
func (e *Engine) silent(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server) {
	e.Count.add(ReasonServerSilent)
	k := e.servers.Key(s)
	e.out.segment(&packet.Segment{
		Src: k.Dst, Dst: k.Src, Seq: v.SndNxt, Ack: v.RcvNxt, Flags: packet.RST | packet.ACK, TTL: 64,
	}, nil)
	e.failed(r, c, s, v, false, ReasonServerSilent)
}

// serverFires does what is due for a server connection.
func (e *Engine) serverFires(s splice.Ref, v *splice.Server) {
	due := v.Due != 0 && v.Due <= e.now
	if due {
		v.Due = 0
	}
	switch v.State {
	case splice.ServerConnecting:
		if e.since(v.Opened)+e.timeouts(v.Farm).Connect <= e.now {
			e.connectFailed(s, v, ReasonConnectTimeout)
			return
		}
		if due {
			v.Tries++
			e.sendSYN(s, v)
		}
	case splice.ServerIdle:
		if v.Flags&splice.ServerPrivate != 0 {
			e.checkOwn(s, v)
			return
		}
		if v.Idle+surplusLife <= e.now && surplus(e.db.FarmByID(v.Farm), e.db.Server(v.ID)) {
			e.closeServer(s, v, ReasonMaxIdle)
			return
		}
		if sv := e.db.Server(v.ID); sv != nil {
			// Nothing was lost by this horizon: try a little more next time.
			if h := sv.Stats.Horizon.Load(); h != 0 && v.Idle+h <= e.now {
				sv.Stats.Horizon.CompareAndSwap(h, h+h/64)
			}
		}
		e.closeServer(s, v, ReasonIdleTimeout)
		return
	case splice.ServerDraining:
		if due {
			e.Count.add(ReasonDrainLimit)
			e.killServer(s, v, ReasonDrainLimit)
			return
		}
	case splice.ServerClosing:
		if due {
			if v.Tries++; v.Tries > maxFINTries {
				e.killServer(s, v, ReasonServerSilent)
				return
			}
			if v.SndUna != v.SndNxt {
				e.sendServer(s, v, packet.FIN|packet.ACK, v.SndNxt.Sub(1), nil, nil)
			}
			v.Due = e.now + firstFINRetry<<v.Tries
		}
	}
	e.touchServer(s, v)
}

// stop begins to stop: idle connections of both sides are closed, running
// exchanges finish and are closed then.
func (e *Engine) stop() {
	e.stopping = true
	e.opt.Handshake.Stopped.Store(true)
	e.clients.Each(func(r splice.Ref, c *splice.Client) bool {
		if c.State == splice.ClientHead && c.Side == 0 {
			e.Count.add(ReasonStopped)
			e.finishClient(r, c)
		} else {
			c.Flags |= splice.ClientWantClose
		}
		e.commit()
		return true
	})
	e.servers.Each(func(s splice.Ref, v *splice.Server) bool {
		switch {
		case v.State == splice.ServerIdle:
			e.closeServer(s, v, ReasonStopped)
		case v.State == splice.ServerConnecting && v.Cli == 0:
			e.killServer(s, v, ReasonStopped)
		case v.State == splice.ServerDraining:
			e.killServer(s, v, ReasonStopped)
		}
		e.commit()
		return true
	})
}

// abort resets everything that is left.
func (e *Engine) abort() {
	e.stopping = true
	e.clients.Each(func(r splice.Ref, c *splice.Client) bool {
		if c.State == splice.ClientClosing {
			e.removeClient(r, c)
			return true
		}
		if s := c.Srv; s != 0 {
			e.killServer(s, e.servers.At(s), ReasonStopped)
			c.Srv = 0
		}
		e.resetClient(r, c, ReasonStopped)
		e.commit()
		return true
	})
	e.servers.Each(func(s splice.Ref, v *splice.Server) bool {
		e.killServer(s, v, ReasonStopped)
		e.commit()
		return true
	})
}
