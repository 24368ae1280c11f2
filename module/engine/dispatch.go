// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/netip"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/pool"
	"github.com/weirgate/weir/module/splice"
	"github.com/weirgate/weir/policies/snapshot"
)

// maxAttempts bounds how often one request is dispatched.
const maxAttempts = 5

// keepAlive is what is inserted into the head of an HTTP/1.0 request whose
// client does not ask to keep the connection (the patent's case 3 of
// maximising offload).
const keepAlive = "Connection: Keep-Alive\r\n"

// neutral replaces the name of a Connection field that must not reach a
// pooled server: same length, no meaning.
const neutral = "Weir-Close"

// neutralForwarded does the same for the two forwarding fields.
const (
	neutralXFF       = "Weir-Forwarded1" // X-Forwarded-For
	neutralForwarded = "Weir-Fwdd"       // Forwarded
)

// request handles a complete head: FIG 3 steps 302 and 304, FIG 7 step 704.
func (e *Engine) request(r splice.Ref, c *splice.Client, d *side, p *packet.TCP, ev *Event) {
	h := &d.req
	if e.access != nil {
		e.access.begin(e, r, c, d)
	}
	c.Method = h.Method
	c.Attempts = 0
	d.tried.Reset()
	d.answered, d.question = d.answered[:0], 0
	c.Flags &^= splice.ClientResponded | splice.ClientReqBad | splice.ClientReqEndKnown |
		splice.ClientIdempotent | splice.ClientWantClose | splice.ClientFresh | splice.ClientUpgrade | splice.ClientExpect
	c.ReqBody.Start(h.Body, h.Length)
	switch {
	case h.Body == http1.BodyNone:
		c.ReqEnd = c.Epoch.ReqBase.Add(packet.Size(c.HeadLen))
		c.Flags |= splice.ClientReqEndKnown
		d.next = append(d.next[:0], d.held[c.HeadLen:]...)
		d.held = d.held[:c.HeadLen]
		if h.Method.Idempotent() {
			c.Flags |= splice.ClientIdempotent
		}
	default:
		e.followBody(c, d, int(c.HeadLen))
		nearReqEnd(c)
	}
	// HTTP/1.0 closes unless asked not to, HTTP/1.1 the other way round
	// (RFC 9112 section 9.3). What must not be shared is closed too.
	if h.Close || h.Minor == 0 && !h.KeepAlive || h.Outcome == http1.Isolate {
		c.Flags |= splice.ClientWantClose
	}
	if h.Upgrade {
		c.Flags |= splice.ClientUpgrade
	}
	if h.Expect {
		c.Flags |= splice.ClientExpect
	}
	c.State = splice.ClientBinding
	c.Due = c.Started + holdWait
	c.Started = e.now
	if c.Flags&splice.ClientFINSeen != 0 && (c.Flags&splice.ClientReqEndKnown == 0 || c.CliFIN.Less(c.ReqEnd)) {
		// It was pipelined, and the client's FIN stands inside it: it can
		// never be completed.
		e.Count.add(ReasonAbortedRequest)
		e.resetHeld(r, c)
		return
	}
	if c.Flags&splice.ClientReqBad != 0 {
		e.refuseBody(r, c)
		return
	}
	if f := e.db.FarmByID(c.Farm); f != nil {
		if why := e.screen(r, f, d); why != ReasonNone {
			e.Count.add(why)
			e.answer(r, c, reply{status: 400})
			return
		}
		f.Stats.Requests.Add(1)
	}
	e.dispatch(r, c, p, ev)
}

// dispatch selects a server and finds a connection to it: FIG 3 step 306,
// FIG 7 step 706. p is the packet under verdict if it holds all of the
// request, or nil. It reports whether the request left the line of those that
// wait for capacity.
func (e *Engine) dispatch(r splice.Ref, c *splice.Client, p *packet.TCP, ev *Event) bool {
	f := e.db.FarmByID(c.Farm)
	if f == nil || f.Removed {
		e.answer(r, c, reply{status: 503, retry: 1, close: true})
		return true
	}
	d := e.sides.at(c.Side)
	if c.Attempts >= maxAttempts {
		e.giveUp(r, c, d)
		return true
	}
	h := &d.req
	req := snapshot.Request{
		Method: h.MethodSpan.Of(d.held), Host: h.Host.Of(d.held), Path: h.Path.Of(d.held),
		Client: e.clients.Key(r).Src.Addr, Now: e.now,
	}
	sel := f.Selector.Load()
	req.Fields, req.Answers, req.Farm = e.fields(f, sel, c, d), e.answers(d, sel), &f.Stats.Live
	class := pool.ClassOf(c.MSS, c.Flags&splice.ClientSACK != 0)
	tried := &d.tried
	full := false
	if c.Own != 0 && c.Flags&splice.ClientFresh == 0 {
		if s, sv := e.ownServer(c, f, sel, &req, tried); s != 0 {
			e.bindOwn(r, c, s, sv, p, ev)
			return true
		}
	}
again:
	choice := sel.Choose(&req, f.Lives, tried, e.random(), &e.scratch)
	if choice.Kind == snapshot.ChoiceAsk {
		if !e.ask(r, c, f, d, sel, &req, int(choice.Policy)) {
			return true
		}
		req.Answers = e.answers(d, sel)
		goto again
	}
	if choice.Kind != snapshot.ChoiceWait || c.Flags&splice.ClientWaiting == 0 {
		noted(f, &choice)
	}
	if choice.Ban != 0 {
		e.out.Bans = append(e.out.Bans, Ban{e.clients.Key(r).Src.Addr, choice.Ban})
	}
	switch choice.Kind {
	case snapshot.ChoiceReject:
		if full {
			return e.wait(r, c, f)
		}
		if d.why != ReasonNone {
			// Every server was tried: say what happened there.
			e.giveUp(r, c, d)
			return true
		}
		e.answer(r, c, reply{status: int(choice.Status), retry: choice.RetryAfter})
		return true
	case snapshot.ChoiceRedirect:
		e.answer(r, c, reply{status: int(choice.Status), location: choice.Location})
		return true
	case snapshot.ChoiceWait:
		return e.waitForPolicy(r, c, f)
	}
	c.Mark = choice.Mark
	sv := f.Servers[choice.Server]
	s := splice.Ref(0)
	if c.Flags&splice.ClientFresh == 0 {
		s = e.idle.Take(sv.ID, class, c.Octave)
	}
	if s != 0 {
		sv.Live.Idle.Add(-1)
		f.Stats.Reused.Add(1)
		sv.Stats.Reused.Add(1)
		e.leaveLine(c, f)
		c.Attempts++
		d.tried.Set(int(choice.Server))
		sv.Live.Active.Add(1)
		e.bind(r, c, s, e.servers.At(s), p, ev)
		return true
	}
	s, why := e.open(f, sv, class)
	if s == 0 {
		// No capacity there: the policies may allow another server.
		e.Count.add(why)
		if !full {
			full = true
			e.skip = d.tried
			tried = &e.skip
		}
		tried.Set(int(choice.Server))
		goto again
	}
	e.leaveLine(c, f)
	c.Attempts++
	d.tried.Set(int(choice.Server))
	sv.Live.Active.Add(1)
	c.Srv = s
	e.servers.At(s).Cli = r
	e.touchClient(r, c)
	return true
}

// giveUp answers for a request that no server took.
func (e *Engine) giveUp(r splice.Ref, c *splice.Client, d *side) {
	status := 502
	if d.why == ReasonConnectTimeout || d.why == ReasonServerSilent {
		status = 504
	}
	e.answer(r, c, reply{status: status})
}

// line is the waiting line of a farm: requests that found no capacity, first
// come first served, at most pool.max_waiting of them.
type line struct {
	refs []splice.Ref // may hold clients that left; their flag says so
	head int
	n    int
	// retry: some wait for a policy, so that time alone may let them move.
	retry bool
}

// wait puts a request into the farm's line. It returns false where the request
// stands in the line already and did not move.
func (e *Engine) wait(r splice.Ref, c *splice.Client, f *farm.Farm) bool {
	if c.Flags&splice.ClientWaiting != 0 {
		return false
	}
	l := e.waits[f.ID]
	if l == nil {
		l = &line{}
		e.waits[f.ID] = l
	}
	if f.Pool.MaxWaiting > 0 && f.Stats.Waiting.Load() >= f.Pool.MaxWaiting {
		e.Count.add(ReasonWaitingFull)
		f.Stats.WaitRefused.Add(1)
		e.answer(r, c, reply{status: 503, retry: 1})
		return true
	}
	f.Stats.Waited.Add(1)
	f.Stats.Waiting.Add(1)
	c.Flags |= splice.ClientWaiting
	c.Waits = e.now + f.Pool.WaitTimeout
	e.Count.add(ReasonWaited)
	l.n++
	if l.head > 64 && l.head*2 > len(l.refs) {
		l.refs = append(l.refs[:0], l.refs[l.head:]...)
		l.head = 0
	}
	l.refs = append(l.refs, r)
	e.touchClient(r, c)
	e.armLines()
	return true
}

// lineEvery is how often the lines of a shard look again by themselves where
// several shards share the servers: a place that gets free in another shard at
// the wrong moment is not announced to them.
const lineEvery = 20 * millisecond

func (e *Engine) lineTimer() uint32 { return uint32(e.opt.Clients+e.opt.Servers) + 4 }

func (e *Engine) armLines() {
	if e.opt.Shards > 1 && e.wheel.at(e.lineTimer()) == 0 {
		e.wheel.set(e.lineTimer(), e.now+lineEvery)
	}
}

// retryLines lets all lines move, and sets the timer again while one stands.
func (e *Engine) retryLines() {
	standing := false
	for _, f := range e.db.Farms { // not the map: its order is not the same twice
		if l := e.waits[f.ID]; l != nil && l.n > 0 {
			e.wakeFarm(f.ID)
			standing = standing || l.n > 0
		}
	}
	if standing {
		e.out.Relieve = true // a connection may lie idle there after all
		e.armLines()
	}
}

func (e *Engine) leaveLine(c *splice.Client, f *farm.Farm) {
	if c.Flags&splice.ClientWaiting != 0 {
		c.Flags &^= splice.ClientWaiting
		f.Stats.Waiting.Add(-1)
		if l := e.waits[f.ID]; l != nil {
			l.n--
		}
	}
}

// wakeFarm lets the farm's line move as far as there is capacity.
func (e *Engine) wakeFarm(id uint16) {
	l := e.waits[id]
	if l == nil {
		return
	}
	// Those behind may want another server than the first one, so a few are
	// asked; who cannot move keeps his place.
	stuck := 0
	for i := l.head; i < len(l.refs) && stuck < maxStuck; i++ {
		r := l.refs[i]
		if r == 0 {
			continue
		}
		if e.clients.Live(r) {
			c := e.clients.At(r)
			if c.Flags&splice.ClientWaiting != 0 && c.Farm == id && c.State == splice.ClientBinding {
				moved := e.dispatch(r, c, nil, nil)
				e.commit()
				if !moved {
					stuck++
					continue
				}
			}
		}
		l.refs[i] = 0
	}
	for l.head < len(l.refs) && l.refs[l.head] == 0 {
		l.head++
	}
	if l.head == len(l.refs) {
		l.refs, l.head = l.refs[:0], 0
	}
}

// maxStuck bounds how many waiting requests are tried in vain at once.
const maxStuck = 16

// bind starts an epoch: the request goes to the server connection s (FIG 3
// step 310, FIG 7 step 708). If p is the packet under verdict and holds all of
// what is held, it is rewritten in place; else the bytes are emitted.
func (e *Engine) bind(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server, p *packet.TCP, ev *Event) {
	d := e.sides.at(c.Side)
	e.keepPace(c)
	v.State = splice.ServerActive
	v.Cli, c.Srv = r, s
	v.Requests++
	if e.access != nil {
		e.access.bound(e, r, c, v)
	}
	v.Bound = e.now
	v.Flags &^= splice.ServerBudgeted | splice.ServerReserved
	if sv := e.db.Server(v.ID); sv != nil {
		sv.Stats.Requests.Add(1)
		sv.Farm.Stats.Dispatch.Add(e.now - c.Started)
		if sv.Farm.Selector.Load().Budgeted(int(sv.Index)) {
			v.Flags |= splice.ServerBudgeted
		}
	}
	v.Flags &^= splice.ServerReqSent | splice.ServerReqEnd | splice.ServerRespEnd |
		splice.ServerHeadDone | splice.ServerUntilClose | splice.ServerPreopened
	v.SndBase, v.RcvBase, v.RcvHigh = v.SndNxt, v.RcvNxt, v.RcvNxt
	v.Resp.Reset(c.Method)
	v.Last = e.now
	v.Drained = 0
	v.Octave = c.Octave
	c.State = splice.ClientSpliced
	// What is held is repeated by us, whoever acknowledged it: sooner than the
	// client would, and a loss says nothing about the server.
	c.Due = e.now + rto(0)
	c.Tries = 0
	c.Epoch = splice.Epoch{ReqBase: c.Epoch.ReqBase, SndBase: v.SndNxt, RcvBase: v.RcvNxt, RespBase: c.SndNxt}
	e.overlay(r, c, d)
	e.setReqEnd(c, v)
	if d.req.Outcome == http1.Isolate {
		e.noReuse(v, ReasonIsolated)
	}
	if d.req.ConnAuth {
		e.private(v)
	}
	e.touchServer(s, v)
	e.touchClient(r, c)

	if p != nil && c.Epoch.InsLen == 0 && len(d.next) == 0 && e.sendable(c, d) == len(d.sent) && p.Seq() == c.Epoch.ReqBase &&
		p.PayloadLen() == len(d.held) && (ev.GSO || p.PayloadLen() <= int(v.MSS)) && e.fits(v, packet.Size(len(d.sent))) {
		changed := &d.sent[0] != &d.held[0]
		if changed {
			copy(p.Payload(), d.sent)
		}
		e.forwardToServer(r, c, s, v, p, ev, changed)
		return
	}
	e.resend(r, c, s, v, v.SndBase)
}

// fits reports whether n more bytes lie inside the server's window.
func (e *Engine) fits(v *splice.Server, n packet.Size) bool {
	return v.SndNxt.Add(n).LessEq(v.SndEdge)
}

// setReqEnd brings the end of the request into the server's numbers once it is
// known.
func (e *Engine) setReqEnd(c *splice.Client, v *splice.Server) {
	if c.Flags&splice.ClientReqEndKnown != 0 && v.Flags&splice.ServerReqEnd == 0 {
		v.ReqEnd = c.Epoch.SeqToServer(c.ReqEnd)
		v.Flags |= splice.ServerReqEnd
	}
}

// overlay decides what the server gets for the held bytes: the edits of the
// patent's "three cases" and of the farm's forwarded option. All insertions
// stand at one place, before the empty line that ends the head.
func (e *Engine) overlay(r splice.Ref, c *splice.Client, d *side) {
	h := &d.req
	d.sent, d.sentOK = d.held, true
	c.Flags &^= splice.ClientEdited
	var mode farm.ForwardedMode
	trusted := false
	if f := e.db.FarmByID(c.Farm); f != nil {
		mode = f.Forwarded
		trusted = f.Trusts(e.clients.Key(r).Src.Addr)
	}
	insertKeepAlive := h.Minor == 0 && !h.KeepAlive && h.Outcome == http1.Accept
	if !insertKeepAlive && h.NConn == 0 && mode == farm.ForwardedNone {
		return
	}
	out := append(d.edited[:0], d.held[:c.HeadLen-2]...)
	for i := range min(int(h.NConn), len(h.ConnFields)) {
		copy(h.ConnFields[i].Of(out), neutral)
	}
	ins := len(out)
	if insertKeepAlive {
		out = append(out, keepAlive...)
	}
	if mode != farm.ForwardedNone {
		// What a proxy in front says is kept, and comes first: several lines
		// are one list (RFC 9110 section 5.3). Anybody else could claim to be
		// somebody, in either of the two fields.
		for i := range min(int(h.NForwarded), len(h.ForwardedNames)) {
			if trusted {
				break
			}
			name := h.ForwardedNames[i].Of(out)
			if len(name) == len(neutralXFF) {
				copy(name, neutralXFF)
			} else {
				copy(name, neutralForwarded)
			}
		}
		a := e.clients.Key(r).Src.Addr.Netip()
		out = appendForwarded(out, mode, a)
	}
	c.Epoch.InsOff, c.Epoch.InsLen = uint32(ins), uint32(len(out)-ins)
	d.edited = append(out, d.held[c.HeadLen-2:]...)
	c.Flags |= splice.ClientEdited
	d.sent = d.edited
}

// appendForwarded writes the field that tells the server the client's address:
// the customary X-Forwarded-For or RFC 7239 section 4.
func appendForwarded(b []byte, mode farm.ForwardedMode, a netip.Addr) []byte {
	if mode == farm.ForwardedXFF {
		b = append(b, "X-Forwarded-For: "...)
		b = a.AppendTo(b)
		return append(b, "\r\n"...)
	}
	b = append(b, "Forwarded: for="...)
	if a.Is6() {
		b = append(b, "\"["...)
		b = a.AppendTo(b)
		return append(b, "]\"\r\n"...)
	}
	b = a.AppendTo(b)
	return append(b, "\r\n"...)
}

// resend emits what the server gets for the held bytes, from the server-side
// number from on, as far as the server's window reaches: the first
// transmission when the head came in several packets or is edited, and every
// retransmission of bytes that the client sent us but the server did not
// acknowledge. The bytes that were parsed are the bytes that the server gets.
func (e *Engine) resend(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server, from packet.Seq) {
	d := e.sides.at(c.Side)
	if !d.sentOK {
		return
	}
	if from.Less(v.SndBase) {
		from = v.SndBase
	}
	base := v.SndBase
	i := int(base.To(from))
	size := e.sendable(c, d)
	for i < size {
		n := min(size-i, int(v.MSS))
		seq := base.Add(packet.Size(i))
		if end := seq.Add(packet.Size(n)); v.SndEdge.Less(end) {
			if v.SndEdge.LessEq(seq) {
				e.Count.add(ReasonBeyondWindow)
				e.probeWindow(c, s, v, from)
				break
			}
			n = int(seq.To(v.SndEdge))
		}
		fl := packet.ACK
		if i+n == size {
			fl |= packet.PSH
		}
		e.sendServer(s, v, fl, seq, d.sent[i:i+n], c)
		e.sent(v, seq.Add(packet.Size(n)))
		i += n
	}
	if c.Due == 0 {
		c.Due = e.now + rto(c.Tries)
		e.touchClient(r, c)
	}
}

// push goes on with held bytes as the server's acknowledgments make room for
// them: the client does not send again what we acknowledged. news says that
// the server acknowledged something.
func (e *Engine) push(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server, news bool) {
	if c.Side == 0 {
		return
	}
	d := e.sides.at(c.Side)
	if !d.sentOK {
		return
	}
	end := v.SndBase.Add(packet.Size(e.sendable(c, d)))
	if !v.SndUna.Less(end) {
		return
	}
	if news {
		c.Tries, c.Due = 0, e.now+rto(0) // RFC 6298 section 5.3
		e.touchClient(r, c)
	}
	if v.SndNxt.Less(end) && v.SndNxt.Less(v.SndEdge) {
		e.resend(r, c, s, v, v.SndNxt)
	}
}

// redispatch takes a request away from a server connection that failed and
// gives it to another one. The caller has established the evidence; the
// request is still held, or unacknowledged at the client.
func (e *Engine) redispatch(r splice.Ref, c *splice.Client, why, evidence Reason) {
	d := e.sideOf(c)
	d.why = why
	d.answered, d.question = d.answered[:0], 0
	c.Srv = 0
	// A request that was never bound is held whole.
	if c.State != splice.ClientBinding && (!d.sentOK || !e.rewindable(c, d)) {
		e.answer(r, c, reply{status: 502, close: true})
		return
	}
	if evidence != ReasonNone {
		e.Count.add(evidence)
		if f := e.db.FarmByID(c.Farm); f != nil {
			f.Stats.Redispatched.Add(1)
		}
	}
	c.State = splice.ClientBinding
	c.Tries = 0
	c.Due = e.now + holdWait
	if c.Epoch.ReqBase.Less(c.RcvAcked) {
		// The failed server acknowledged the first bytes, and the client knows:
		// it will not repeat them, so they are ours.
		c.Flags |= splice.ClientEarlyAck
	}
	e.dispatch(r, c, nil, nil)
}

// rewindable goes back to the held bytes: what was passed on beyond them is
// still the client's to retransmit, unless it was acknowledged.
func (e *Engine) rewindable(c *splice.Client, d *side) bool {
	end := c.Epoch.ReqBase.Add(packet.Size(len(d.held)))
	if end.Less(c.RcvAcked) && !(c.Flags&splice.ClientReqEndKnown != 0 && c.ReqEnd == end) {
		return false
	}
	if c.Flags&splice.ClientReqEndKnown != 0 && c.ReqEnd == end {
		return true // all of the request is held; next follows it
	}
	c.Flags &^= splice.ClientReqEndKnown | splice.ClientReqBad | splice.ClientFINSeen
	d.next = d.next[:0]
	d.nextMirrored = 0
	d.frames, d.frameBytes = d.frames[:0], d.frameBytes[:0]
	c.RcvNxt = end
	c.ReqBody.Start(d.req.Body, d.req.Length)
	if d.req.Body != http1.BodyNone {
		e.followBody(c, d, int(c.HeadLen))
		nearReqEnd(c)
	}
	return true
}
