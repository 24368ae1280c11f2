// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// This file is what request bodies need beyond translation: the wait for 100
// (Continue), the copies of framing bytes, bodies that cannot be framed,
// responses that overtake the request, and the least pace.

// sendable is how many bytes of side.sent may go to the server: all of them,
// or the head alone while the body waits for 100 (Continue).
func (e *Engine) sendable(c *splice.Client, d *side) int {
	if c.Flags&splice.ClientExpect != 0 {
		return min(int(c.HeadLen+c.Epoch.InsLen), len(d.sent))
	}
	return len(d.sent)
}

// expecting handles bytes of a client whose body waits for 100 (Continue). The
// client may send it without waiting (RFC 9110 section 10.1.1), the server may
// refuse it and take what comes for the next request: so nothing of it passes
// before the server has said that it wants it. It is held like a request that
// waits for its server. body begins at seq, which is in the present request.
func (e *Engine) expecting(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server, p *packet.TCP, ev *Event, body []byte, seq packet.Seq) {
	end := seq.Add(packet.Size(len(body)))
	fin := p.Flags().Has(packet.FIN)
	headEnd := v.SndBase.Add(packet.Size(c.HeadLen + c.Epoch.InsLen))
	switch {
	case c.RcvNxt.Less(seq):
		if int(c.RcvNxt.To(end)) > e.holdCap(c) {
			e.Count.add(ReasonOutOfWindow)
			e.challengeClient(r, c)
			return
		}
		e.keepClient(r, c, p, ev)
		return
	case c.RcvNxt.Less(end):
		e.Count.add(ReasonExpectHeld)
		e.holdBody(c, v, body[seq.To(c.RcvNxt):])
		if c.Flags&splice.ClientReqBad != 0 {
			e.refuseBody(r, c)
			return
		}
		if c.Due == 0 {
			c.Due = e.now + holdWait
			e.touchClient(r, c)
		}
	case len(body) > 0 && v.SndUna.Less(headEnd):
		// The head again, and the server has not acknowledged it.
		e.Count.add(ReasonRetransmitted)
		e.resend(r, c, s, v, again(c, v, seq))
	case len(body) > 0:
		// The client's timer fired: from now on these bytes are ours to keep.
		e.earlyACK(r, c)
	}
	if fin && c.RcvNxt == end && c.Flags&splice.ClientFINSeen == 0 {
		if c.Flags&splice.ClientReqEndKnown == 0 || end.Less(c.ReqEnd) {
			e.unfinished(r, c, s, v)
			return
		}
		e.clientFIN(r, c)
		e.ackFIN(r, c, v)
	}
	e.bareToServer(r, c, s, v)
	e.progress(r, c, s, v, nil, nil)
}

// holdBody appends in-order bytes of a bound request's body to what is held
// of it, and to what the server will get.
func (e *Engine) holdBody(c *splice.Client, v *splice.Server, b []byte) {
	d := e.sides.at(c.Side) // copies are kept while the body waits
	edited := len(d.sent) > 0 && &d.sent[0] != &d.held[0]
	from := len(d.held)
	b = b[:e.room(c, d, len(b))]
	d.held = append(d.held, b...)
	if c.Flags&splice.ClientReqEndKnown != 0 {
		// Everything up to the end is body, what follows is the next request.
		if k := int(c.RcvNxt.To(packet.MaxSeq(c.ReqEnd, c.RcvNxt))); k < len(b) {
			d.next = append(d.next, b[k:]...)
			d.held = d.held[:from+k]
		}
	} else {
		e.followBody(c, d, from)
	}
	c.RcvNxt = c.RcvNxt.Add(packet.Size(len(b)))
	e.charge(c, d)
	if edited {
		d.edited = append(d.edited, d.held[from:]...)
		d.sent = d.edited
	} else {
		d.sent = d.held
	}
	e.setReqEnd(c, v)
}

// continued lets the body of a request pass, because the server asked for it.
func (e *Engine) continued(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server) {
	c.Flags &^= splice.ClientExpect
	c.Due = 0
	e.keepPace(c)
	e.resend(r, c, s, v, v.SndBase.Add(packet.Size(c.HeadLen+c.Epoch.InsLen)))
	e.touchClient(r, c)
}

// refuseBody ends an exchange whose request has a body that cannot be framed:
// neither side may believe that there is an end.
func (e *Engine) refuseBody(r splice.Ref, c *splice.Client) {
	why := c.ReqBody.Reason()
	e.Count.add(ReasonBodyRefused)
	e.Count.add(refused(why))
	status := why.HTTPStatus()
	if status == 0 {
		status = 400
	}
	c.Flags |= splice.ClientReqBad
	e.giveBack(r, c, status)
}

// giveBack takes a request away from its server for good and answers it with a
// status, or resets the client if it has got a part of a response.
func (e *Engine) giveBack(r splice.Ref, c *splice.Client, status int) {
	can := e.canAnswer(c)
	e.dropServer(c)
	if !can {
		e.resetClient(r, c, ReasonAbortedRequest)
		return
	}
	e.answer(r, c, reply{status: status, close: true})
}

// canAnswer reports whether an answer of the engine's own may follow what the
// client has got: nothing, or whole interim responses.
func (e *Engine) canAnswer(c *splice.Client) bool {
	if c.Flags&splice.ClientResponded == 0 || c.Srv == 0 {
		return c.Flags&splice.ClientResponded == 0
	}
	v := e.servers.At(c.Srv)
	return v.Flags&splice.ServerHeadDone == 0 && v.Resp.Len == 0 && c.SndUna == c.SndNxt
}

// dropServer takes a request away from its server for good. What was sent of
// it cannot be taken back, so a connection that has seen a byte is killed.
func (e *Engine) dropServer(c *splice.Client) {
	s := c.Srv
	if s == 0 {
		return
	}
	v := e.servers.At(s)
	if v.State == splice.ServerConnecting {
		e.orphan(s, v, c) // it goes to the pool when it is established
		return
	}
	e.killServer(s, v, ReasonAbortedRequest)
	c.Srv = 0
}

// unfinished handles a client's FIN inside a request: it can never be
// completed. A response that has begun all the same is delivered first, the
// FIN is not acknowledged before.
func (e *Engine) unfinished(r splice.Ref, c *splice.Client, s splice.Ref, v *splice.Server) {
	if v.Flags&splice.ServerHeadDone != 0 {
		e.bareToServer(r, c, s, v)
		e.progress(r, c, s, v, nil, nil)
		return
	}
	e.Count.add(ReasonAbortedRequest)
	e.killServer(s, v, ReasonAbortedRequest)
	c.Srv = 0
	e.resetClient(r, c, ReasonAbortedRequest)
}

// early reports whether a response began before the server had the whole
// request: its acknowledgment says how much it had. Such a server may take the
// rest of the body for a request.
func early(v *splice.Server) bool {
	return v.Flags&splice.ServerReqEnd == 0 || v.SndUna.Less(v.ReqEnd)
}

// overtaken reports whether the response is complete and the request is not
// at the server: what is left of it is of no use, and must not reach a server
// that may read it as the next request.
func overtaken(v *splice.Server) bool {
	return v.Flags&splice.ServerRespEnd != 0 && v.RespEnd.LessEq(v.RcvNxt) &&
		(v.Flags&splice.ServerReqEnd == 0 || v.SndNxt.Less(v.ReqEnd))
}

// frame is a run of framing bytes of a chunked request body: chunk lines, the
// line ends behind chunks, trailers.
type frame struct {
	seq packet.Seq // the client's number of the first byte
	off uint32     // in side.frameBytes
	n   uint32
}

func (f *frame) end() packet.Seq { return f.seq.Add(packet.Size(f.n)) }

// maxFrameBytes bounds the framing bytes that are kept of one request. A body
// of tiny chunks waits for the server's acknowledgments when it is reached.
const maxFrameBytes = 64 << 10

// feedBody moves the body cursor over in-order bytes. The framing bytes of a
// chunked body are kept until the server has acknowledged them: the bytes that
// were parsed are the bytes that the server gets, whatever a retransmission
// says. It returns how many bytes belong to the request.
func (e *Engine) feedBody(c *splice.Client, b []byte) (int, http1.Status) {
	lim := e.limits(c.Farm)
	if c.ReqBody.Kind != http1.BodyChunked {
		return c.ReqBody.Feed(b, lim)
	}
	i := 0
	for {
		n, framing, st := c.ReqBody.Next(b[i:], lim)
		if framing && n > 0 {
			d := e.sideOf(c)
			d.frames = append(d.frames, frame{c.RcvNxt.Add(packet.Size(i)), uint32(len(d.frameBytes)), uint32(n)})
			d.frameBytes = append(d.frameBytes, b[i:i+n]...)
		}
		i += n
		if st != http1.More || i == len(b) {
			return i, st
		}
	}
}

// tooManyFrames says that a segment has to wait until the server has
// acknowledged more. To the client it is lost.
func (e *Engine) tooManyFrames(c *splice.Client, n int) bool {
	if c.ReqBody.Kind != http1.BodyChunked || c.Side == 0 {
		return false
	}
	d := e.sides.at(c.Side)
	return len(d.frames) > 0 && len(d.frameBytes)+n > maxFrameBytes
}

// ownFraming writes the framing bytes that were parsed over those of a segment
// that repeats them. b begins at seq; it reports whether b was another text.
func (e *Engine) ownFraming(c *splice.Client, seq packet.Seq, b []byte) (changed bool) {
	if c.Side == 0 {
		return false
	}
	d := e.sides.at(c.Side)
	end := seq.Add(packet.Size(len(b)))
	for i := range d.frames {
		f := &d.frames[i]
		if f.end().LessEq(seq) {
			continue
		}
		if end.LessEq(f.seq) {
			break
		}
		own := d.frameBytes[f.off : f.off+f.n]
		at := 0
		if f.seq.Less(seq) {
			own = own[f.seq.To(seq):]
		} else {
			at = int(seq.To(f.seq))
		}
		own = own[:min(len(own), len(b)-at)]
		if string(b[at:at+len(own)]) != string(own) {
			copy(b[at:], own)
			changed = true
		}
	}
	if changed {
		e.Count.add(ReasonFramingKept)
	}
	return changed
}

// dropFrames forgets the framing bytes that the server has acknowledged.
func (d *side) dropFrames(acked packet.Seq) {
	k := 0
	for k < len(d.frames) && d.frames[k].end().LessEq(acked) {
		k++
	}
	switch {
	case k == len(d.frames):
		d.frames, d.frameBytes = d.frames[:0], d.frameBytes[:0]
	case k > 0 && (2*k > len(d.frames) || len(d.frameBytes) > maxFrameBytes/2):
		from := d.frames[k].off
		d.frames = append(d.frames[:0], d.frames[k:]...)
		d.frameBytes = append(d.frameBytes[:0], d.frameBytes[from:]...)
		for i := range d.frames {
			d.frames[i].off -= from
		}
	}
}

// keepPace begins to measure the pace of a request's body, if it has one to
// keep.
func (e *Engine) keepPace(c *splice.Client) {
	c.Pace = 0
	if c.Flags&splice.ClientReqEndKnown != 0 && c.ReqEnd.LessEq(c.RcvNxt) {
		return
	}
	if f := e.db.FarmByID(c.Farm); f != nil && f.Limits.BodyRate > 0 && f.Timeouts.Body > 0 {
		c.Pace, c.PaceSeq = e.now, c.RcvNxt
	}
}

// slow looks at the pace of a request's body. It returns true when it was too
// slow, and the exchange is over. A client is not blamed while the server
// takes no more, while the body waits for 100 (Continue), or when the response
// has begun: then the server sets the pace.
func (e *Engine) slow(r splice.Ref, c *splice.Client, v *splice.Server) bool {
	f := e.db.FarmByID(c.Farm)
	got := int64(0)
	if c.PaceSeq.Less(c.RcvNxt) {
		got = int64(c.PaceSeq.To(c.RcvNxt))
	}
	if f == nil || c.Flags&splice.ClientExpect != 0 || v.Flags&splice.ServerHeadDone != 0 ||
		v.SndEdge.Less(v.SndNxt.Add(packet.Size(v.MSS))) || got*1000 >= f.Limits.BodyRate*(f.Timeouts.Body/millisecond) {
		e.keepPace(c)
		return false
	}
	if c.Flags&splice.ClientReqEndKnown != 0 && c.ReqEnd.LessEq(c.RcvNxt) {
		c.Pace = 0
		return false
	}
	e.Count.add(ReasonSlowBody)
	e.giveBack(r, c, 408)
	return true
}

// bodyAnyway reports whether bytes behind the end of a response, from seq on,
// are the body that a response to HEAD, a 204 or a 304 must not have (RFC 9112
// section 6.3). They are delivered as the server sent them, and that is the
// end of both connections; but not to a client that has asked again already
// and would take them for its next response.
func (e *Engine) bodyAnyway(c *splice.Client, v *splice.Server, seq packet.Seq) bool {
	h := &v.Resp
	asked := c.RcvNxt // to where the client has sent
	if c.Flags&splice.ClientFINSeen != 0 {
		asked = c.CliFIN
	}
	return (c.Method == http1.HEAD || h.Status == 204 || h.Status == 304) && h.Body == http1.BodyNone &&
		seq.LessEq(v.RespEnd) && v.RcvNxt == v.RespEnd && asked == c.ReqEnd &&
		c.Flags&(splice.ClientReqEndKnown|splice.ClientFINSent) == splice.ClientReqEndKnown
}

// stuck reports whether a client goes on behind a response whose framing is in
// doubt: it believes that it has all of it, and the server says nothing more.
// The engine cannot know, so it waits no longer than that. If neither, it
// looks again.
func (e *Engine) stuck(c *splice.Client, v *splice.Server) bool {
	h := &v.Resp
	if v.Flags&(splice.ServerUntilClose|splice.ServerRespEnd) != splice.ServerUntilClose || h.Outcome != http1.Isolate ||
		h.Reason == http1.ReasonNoLength {
		return false // without any length, the client waits for the close too
	}
	if c.SndUna == c.SndNxt && e.now-v.Last >= holdWait {
		return true
	}
	c.Due = e.now + holdWait
	return false
}
