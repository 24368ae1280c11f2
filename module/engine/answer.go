// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"strconv"

	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// Times of the engine's own small TCP toward clients, nanoseconds.
const (
	firstRTO   = 300 * millisecond
	maxTries   = 6
	lingerTime = 10 * second // from our FIN until a client that stays is forgotten
)

func rto(tries uint8) int64 { return firstRTO << min(tries, 6) }

// reply says what the engine itself answers.
type reply struct {
	status   int
	retry    uint32 // Retry-After, seconds; 0 = none
	location string
	close    bool // the framing is lost: the connection cannot be kept
}

// refuse answers a request whose head cannot be trusted.
func (e *Engine) refuse(r splice.Ref, c *splice.Client, d *side) {
	status := d.req.Reason.HTTPStatus()
	if status == 0 {
		status = 400
	}
	e.Count.add(refused(d.req.Reason))
	e.answer(r, c, reply{status: status, close: true})
}

// answer sends a response of the engine's own inside the client's sequence
// space and acknowledges the request. The connection is kept if its framing is
// certain and nothing of the request is still to come.
func (e *Engine) answer(r splice.Ref, c *splice.Client, a reply) {
	e.Count.add(ReasonOwnAnswer)
	e.Count.add(answered(a.status))
	if f := e.db.FarmByID(c.Farm); f != nil {
		f.Stats.OwnAnswers.Add(1)
		e.leaveLine(c, f)
	}
	d := e.sideOf(c)
	known := c.Flags&splice.ClientReqEndKnown != 0
	if !known || c.RcvNxt.Less(c.ReqEnd) || c.Flags&(splice.ClientWantClose|splice.ClientReqBad) != 0 || e.stopping {
		a.close = true
	}
	// An answer to HEAD has no body (RFC 9110 section 9.3.2), to a head that
	// was refused behind its method too. The side may be a new one: the record
	// has the method of a complete head.
	method := d.req.Method
	if c.HeadLen > 0 {
		method = c.Method
	}
	d.answer = appendAnswer(d.answer[:0], a, method == http1.HEAD)
	if e.access != nil {
		e.access.answered(e, r, c, d, a.status)
	}
	c.AnswerSeq = c.SndNxt
	c.SndNxt = c.SndNxt.Add(packet.Size(len(d.answer)))
	c.Srv = 0
	c.Tries = 0
	c.State = splice.ClientAnswering
	d.sentOK, d.sent = false, nil
	d.held = d.held[:0]
	if a.close {
		d.next = d.next[:0]
		c.Flags |= splice.ClientWantClose | splice.ClientFINSent
		c.OurFIN = c.SndNxt
		c.SndNxt = c.SndNxt.Add(1)
		c.CloseBy = e.now + lingerTime
	}
	e.sendAnswer(r, c, d)
}

func appendAnswer(b []byte, a reply, head bool) []byte {
	text := statusText(a.status)
	b = append(b, "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(a.status), 10)
	b = append(b, ' ')
	b = append(b, text...)
	if a.location != "" {
		b = append(b, "\r\nLocation: "...)
		b = append(b, a.location...)
	}
	if a.retry > 0 {
		b = append(b, "\r\nRetry-After: "...)
		b = strconv.AppendUint(b, uint64(a.retry), 10)
	}
	if a.close {
		b = append(b, "\r\nConnection: close"...)
	}
	b = append(b, "\r\nContent-Type: text/plain\r\nContent-Length: "...)
	b = strconv.AppendInt(b, int64(3+1+len(text)+1), 10)
	b = append(b, "\r\n\r\n"...)
	if head {
		return b
	}
	b = strconv.AppendInt(b, int64(a.status), 10)
	b = append(b, ' ')
	b = append(b, text...)
	return append(b, '\n')
}

// sendAnswer sends, or sends again, what the client has not acknowledged.
func (e *Engine) sendAnswer(r splice.Ref, c *splice.Client, d *side) {
	i := 0
	if c.AnswerSeq.Less(c.SndUna) {
		i = min(int(c.AnswerSeq.To(c.SndUna)), len(d.answer))
	}
	for {
		n := min(len(d.answer)-i, int(c.MSS))
		fl := packet.ACK
		if i+n == len(d.answer) {
			fl |= packet.PSH
			if c.Flags&splice.ClientFINSent != 0 {
				fl |= packet.FIN
			}
		}
		e.sendClient(r, c, fl, c.AnswerSeq.Add(packet.Size(i)), d.answer[i:i+n])
		i += n
		if i >= len(d.answer) {
			break
		}
	}
	c.Due = e.now + rto(c.Tries)
	e.touchClient(r, c)
}

// clientAnswering handles a segment while our own response is on its way.
func (e *Engine) clientAnswering(r splice.Ref, c *splice.Client, p *packet.TCP, ev *Event) {
	d := e.sides.at(c.Side)
	if c.Flags&splice.ClientFINSent != 0 {
		if c.OurFIN.LessEq(c.SndUna) {
			e.freeSide(c)
			c.State = splice.ClientClosing
			c.Tries = 0
		}
		e.clientClosing(r, c, p)
		return
	}
	end := c.AnswerSeq.Add(packet.Size(len(d.answer)))
	n := p.PayloadLen()
	if n > 0 && p.Seq() == c.RcvNxt {
		e.hold(r, c, p.Payload())
		n = 0
	}
	if p.Flags().Has(packet.FIN) && p.Seq().Add(packet.Size(p.PayloadLen())) == c.RcvNxt && c.Flags&splice.ClientFINSeen == 0 {
		e.clientFIN(r, c)
		e.ackClient(r, c)
	}
	if end.LessEq(c.SndUna) {
		d.answer = d.answer[:0]
		if c.Flags&splice.ClientFINSeen != 0 && len(d.next) == 0 {
			e.finishClient(r, c)
			return
		}
		e.nextRequest(r, c, d, nil, nil)
		return
	}
	if n > 0 {
		e.dupACK(r, c, p.Seq())
	}
}

// finishClient sends our FIN to a client that has got everything.
func (e *Engine) finishClient(r splice.Ref, c *splice.Client) {
	e.closeOwn(c)
	e.freeSide(c)
	e.kepts.drop(&c.Kept)
	c.Srv = 0
	c.State = splice.ClientClosing
	c.Tries = 0
	c.CloseBy = e.now + lingerTime
	if c.Flags&splice.ClientFINSent == 0 {
		c.Flags |= splice.ClientFINSent
		c.OurFIN = c.SndNxt
		c.SndNxt = c.SndNxt.Add(1)
		e.sendClient(r, c, packet.FIN|packet.ACK, c.OurFIN, nil)
	} else if c.RcvAcked != c.RcvNxt {
		e.ackClient(r, c)
	}
	if e.closed(r, c) {
		return
	}
	c.Due = e.now + rto(0)
	e.touchClient(r, c)
}

// clientClosing handles a segment after our FIN: data is acknowledged and
// thrown away, so that the client reads our response before a reset.
func (e *Engine) clientClosing(r splice.Ref, c *splice.Client, p *packet.TCP) {
	seq, n := p.Seq(), p.PayloadLen()
	end := seq.Add(packet.Size(n))
	fin := p.Flags().Has(packet.FIN)
	if n > 0 || fin {
		if c.Flags&splice.ClientFINSeen == 0 && seq.LessEq(c.RcvNxt) && c.RcvNxt.LessEq(end) {
			c.RcvNxt = end
			if fin {
				e.clientFIN(r, c)
			}
		}
		e.ackClient(r, c)
	}
	if !e.closed(r, c) {
		e.touchClient(r, c)
	}
}

// closed forgets the connection when both FINs are acknowledged.
func (e *Engine) closed(r splice.Ref, c *splice.Client) bool {
	if c.Flags&splice.ClientFINSeen == 0 || c.Flags&splice.ClientFINSent == 0 || c.SndUna.LessEq(c.OurFIN) {
		return false
	}
	e.removeClient(r, c)
	return true
}

// resetClient resets a client's connection. One that is believed to be there is
// remembered for a moment, because nobody acknowledges a reset: a client that
// only waits for the rest of a response would not learn that none comes.
func (e *Engine) resetClient(r splice.Ref, c *splice.Client, why Reason) {
	e.Count.add(why)
	e.sendReset(r, c)
	c.Flags |= splice.ClientWasReset
	if e.stopping || why == ReasonClientSilent || why == ReasonStopped || why == ReasonKilled || why == ReasonVIPGone {
		e.removeClient(r, c)
		return
	}
	if e.access != nil {
		e.access.gone(e, r, c)
	}
	if f := e.db.FarmByID(c.Farm); f != nil {
		e.leaveLine(c, f)
	}
	e.closeOwn(c)
	e.freeSide(c)
	e.kepts.drop(&c.Kept)
	c.Srv = 0
	c.State = splice.ClientClosing
	c.Tries = 0
	c.Due = e.now + rto(0)
	c.CloseBy = e.now + lingerTime
	e.touchClient(r, c)
}

// resetTries is how often a reset is repeated.
const resetTries = 3

func (e *Engine) sendReset(r splice.Ref, c *splice.Client) {
	k := e.clients.Key(r)
	e.out.segment(&packet.Segment{
		Src: k.Dst, Dst: k.Src, Seq: c.SndNxt, Ack: c.RcvNxt, Flags: packet.RST | packet.ACK, TTL: 64,
	}, nil)
	// Segments may still be under way to a client that has not got all: a
	// reset beyond a gap is answered with a challenge by RFC 5961, so send one
	// at the place which it expects, too.
	if c.SndUna != c.SndNxt {
		e.out.segment(&packet.Segment{
			Src: k.Dst, Dst: k.Src, Seq: c.SndUna, Ack: c.RcvNxt, Flags: packet.RST | packet.ACK, TTL: 64,
		}, nil)
	}
}

// afterReset handles a segment of a client whose connection we reset: a new
// incarnation takes its place, anything else is answered with a reset.
func (e *Engine) afterReset(key *packet.Tuple, r splice.Ref, c *splice.Client, p *packet.TCP, ev *Event) {
	isn, iss := p.Seq().Sub(1), p.Ack().Sub(1)
	old := isn == c.IRS || iss == c.ISS || p.Ack().In(c.ISS, c.SndNxt.Add(1))
	switch {
	case p.Flags().Has(packet.RST):
		e.clientRST(r, c, p)
	case e.reincarnated(key, c, p):
		e.Count.add(ReasonReincarnated)
		e.dropClient(r, c)
		e.fromClient(key, p, ev)
	case !old && e.opt.Handshake.Recent(key, e.now):
		// It may have overtaken the first segment of a new incarnation.
		e.Count.add(ReasonBadCookie)
	default:
		e.tombstoned(key, p, true)
	}
}

// removeClient forgets a record and leaves a tombstone, so that no duplicate
// of its first segment can run its request again.
func (e *Engine) removeClient(r splice.Ref, c *splice.Client) {
	if e.access != nil {
		e.access.gone(e, r, c)
	}
	if f := e.db.FarmByID(c.Farm); f != nil {
		e.leaveLine(c, f)
	}
	e.closeOwn(c)
	e.freeSide(c)
	e.kepts.drop(&c.Kept)
	e.wheel.clear(e.clientTimer(r))
	var how options
	if c.Flags&splice.ClientWasReset != 0 {
		how = tombReset
	}
	b := flowBrief(e.clients.Key(r), c.IRS, c.ISS, how)
	b.SndNxt = c.SndNxt
	if e.tombs.Put(b, e.seconds()) {
		e.Count.add(ReasonTombsFull)
	}
	e.armSweep()
	e.leave(e.clients.Key(r).Src.Addr, c)
	c.State = splice.ClientFree
	e.clients.Remove(r)
}

func flowBrief(k *packet.Tuple, irs, iss packet.Seq, opt options) flowstore.Brief {
	return flowstore.Brief{Key: *k, IRS: irs, ISS: iss, Options: uint8(opt)}
}

// tombReset marks the tombstone of a connection that we reset.
const tombReset options = 1

// tombstoned answers a segment of a connection that is over: a repeated FIN
// gets its ACK again, data a reset, a bare ACK nothing. Where we reset the
// connection, anything is answered with a reset: ours may have been lost, or
// have missed the number that the client expected (RFC 5961 section 3.2).
func (e *Engine) tombstoned(key *packet.Tuple, p *packet.TCP, reset bool) {
	e.Count.add(ReasonTombstone)
	switch {
	case p.PayloadLen() > 0 || reset:
		e.statelessReset(key, p)
	case p.Flags().Has(packet.FIN):
		e.out.segment(&packet.Segment{
			Src: key.Dst, Dst: key.Src, Seq: p.Ack(), Ack: p.End(), Flags: packet.ACK,
			Window: HoldWindow >> splice.ScaleToClient, TTL: 64,
		}, nil)
	}
}
