// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"sync/atomic"

	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// This file is the engine's side of the access log: one record of fixed size
// per exchange, begun when the request's head is complete and put into a ring
// when the exchange is over. Somebody else takes it out, gives it a form and
// writes it. The engine never waits: what finds no room is dropped and counted.

// AccessEnd says how an exchange ended.
type AccessEnd uint8

// The ends of an exchange.
const (
	AccessServed   AccessEnd = iota // a server's response was delivered and acknowledged
	AccessAnswered                  // the engine itself answered
	AccessAborted                   // one of the sides went away, or was reset
)

var accessEndNames = [...]string{"served", "answered", "aborted"}

// String returns the word for logs.
func (e AccessEnd) String() string {
	if int(e) < len(accessEndNames) {
		return accessEndNames[e]
	}
	return "unknown"
}

const (
	accessMethod = 16  // bytes of a method that a record holds
	accessTarget = 384 // bytes of a target that a record holds
)

// AccessRecord is one exchange. Times are the engine's clock in nanoseconds, 0
// where nothing happened.
type AccessRecord struct {
	Client, VIP packet.Endpoint

	Started int64 // first byte of the request
	Head    int64 // its head was complete
	Bound   int64 // it got the server connection that answered
	First   int64 // first byte of the response
	Ended   int64

	In  uint64 // bytes of the request, head included
	Out uint64 // bytes of the response that were passed on, head included

	Farm, Server uint16 // IDs in the database of farms, 0 = none
	Status       uint16 // 0 = no response
	End          AccessEnd
	Minor        uint8 // of the request's HTTP/1 version
	Attempts     uint8 // servers that were tried
	Reused       bool  // the server connection had served before

	methodLen uint8
	targetLen uint32 // of the whole target
	method    [accessMethod]byte
	target    [accessTarget]byte

	want uint64 // bytes of a request with a Content-Length, 0 = it says itself where it ends
}

// Method returns the method, cut to what a record holds; empty if the request
// line was not complete.
func (a *AccessRecord) Method() []byte { return a.method[:a.methodLen] }

// Target returns the request target as it was sent. cut says that it was
// longer than what a record holds.
func (a *AccessRecord) Target() (target []byte, cut bool) {
	n := min(a.targetLen, accessTarget)
	return a.target[:n], n < a.targetLen
}

// SetRequest copies the method and the target, as far as they fit.
func (a *AccessRecord) SetRequest(method, target []byte) {
	a.methodLen = uint8(copy(a.method[:], method))
	a.targetLen = uint32(len(target))
	copy(a.target[:], target)
}

// AccessRing carries records from one engine to one reader.
type AccessRing struct {
	sample uint32
	recs   []AccessRecord
	mask   uint64
	_      [64]byte
	tail   atomic.Uint64 // records written
	lost   atomic.Uint64
	_      [64]byte
	head   atomic.Uint64 // records read
}

// NewAccessRing makes a ring for at least size records, of which one request
// of every sample gets one.
func NewAccessRing(size int, sample int) *AccessRing {
	n := 1
	for n < size {
		n <<= 1
	}
	return &AccessRing{sample: uint32(max(sample, 1)), recs: make([]AccessRecord, n), mask: uint64(n - 1)}
}

// Dropped is the number of records that found no room.
func (q *AccessRing) Dropped() uint64 { return q.lost.Load() }

// Drain calls f for every record that is there, oldest first, and returns how
// many. The record belongs to f until it returns.
func (q *AccessRing) Drain(f func(*AccessRecord)) int {
	head, tail := q.head.Load(), q.tail.Load()
	for i := head; i != tail; i++ {
		f(&q.recs[i&q.mask])
		q.head.Store(i + 1)
	}
	return int(tail - head)
}

// Push copies a record into the ring, or drops it where there is no room.
func (q *AccessRing) Push(a *AccessRecord) {
	tail := q.tail.Load()
	if tail-q.head.Load() == uint64(len(q.recs)) {
		q.lost.Add(1)
		return
	}
	q.recs[tail&q.mask] = *a
	q.tail.Store(tail + 1)
}

// maxAccessOpen bounds the exchanges under way of which a record is kept.
const maxAccessOpen = 1 << 16

// access is what an engine with an access log has beside its records.
type access struct {
	ring  *AccessRing
	turn  uint32          // requests since the last one with a record
	of    []uint32        // slot by client, 0 = none
	slots []*AccessRecord // slots[0] is not used
	free  []uint32
}

// SetAccess gives the engine a ring for its access log; nil ends it. Records of
// exchanges under way are lost.
func (e *Engine) SetAccess(q *AccessRing) {
	if q == nil {
		e.access = nil
		return
	}
	e.access = &access{ring: q, of: make([]uint32, e.opt.Clients+1), slots: make([]*AccessRecord, 1)}
}

// begin makes the record of a request whose head is complete, or refused.
func (a *access) begin(e *Engine, r splice.Ref, c *splice.Client, d *side) *AccessRecord {
	a.drop(r)
	if a.turn++; a.turn < a.ring.sample {
		return nil
	}
	a.turn = 0
	var i uint32
	switch n := len(a.free); {
	case n > 0:
		i = a.free[n-1]
		a.free = a.free[:n-1]
	case len(a.slots) > maxAccessOpen:
		a.ring.lost.Add(1)
		return nil
	default:
		i = uint32(len(a.slots))
		a.slots = append(a.slots, &AccessRecord{})
	}
	a.of[r] = i
	k, h, rec := e.clients.Key(r), &d.req, a.slots[i]
	rec.Client, rec.VIP = k.Src, k.Dst
	rec.Started, rec.Head, rec.Bound, rec.First, rec.Ended = c.Started, e.now, 0, 0, 0
	rec.In, rec.Out = 0, 0
	rec.Farm, rec.Server, rec.Status = c.Farm, 0, 0
	rec.End, rec.Minor, rec.Attempts, rec.Reused = AccessAborted, h.Minor, 0, false
	rec.methodLen, rec.targetLen, rec.want = 0, 0, 0
	if h.Body == http1.BodyLength && c.HeadLen > 0 {
		rec.want = uint64(c.HeadLen) + h.Length
	}
	if h.LineEnd != 0 {
		rec.SetRequest(h.MethodSpan.Of(d.held), h.Target.Of(d.held))
	}
	return rec
}

// at returns the record of a client's request under way, nil if it has none.
func (a *access) at(r splice.Ref) *AccessRecord {
	if i := a.of[r]; i != 0 {
		return a.slots[i]
	}
	return nil
}

// drop frees the record of a request.
func (a *access) drop(r splice.Ref) {
	i := a.of[r]
	if i == 0 {
		return
	}
	a.of[r] = 0
	a.free = append(a.free, i)
}

// finish puts the record into the ring.
func (a *access) finish(e *Engine, r splice.Ref, end AccessEnd) {
	rec := a.at(r)
	if rec == nil {
		return
	}
	rec.End, rec.Ended = end, e.now
	a.ring.Push(rec)
	a.drop(r)
}

// bound notes the server connection that a request got.
func (a *access) bound(e *Engine, r splice.Ref, c *splice.Client, v *splice.Server) {
	if rec := a.at(r); rec != nil {
		rec.Bound, rec.First, rec.Out, rec.Status = e.now, 0, 0, 0
		rec.Server, rec.Attempts, rec.Reused = v.ID, c.Attempts, v.Requests > 1
	}
}

// passed notes bytes of a response that pass for the first time.
func (a *access) passed(e *Engine, r splice.Ref, n packet.Size) {
	if rec := a.at(r); rec != nil {
		if rec.First == 0 {
			rec.First = e.now
		}
		rec.Out += uint64(n)
	}
}

// status notes what a response head says.
func (a *access) status(v *splice.Server) {
	if rec := a.at(v.Cli); rec != nil {
		rec.Status = uint16(v.Resp.Status)
	}
}

// sized notes the request's size, as far as it is known at the end.
func (a *access) sized(r splice.Ref, c *splice.Client) {
	rec := a.at(r)
	if rec == nil {
		return
	}
	end := c.RcvNxt
	if c.Flags&splice.ClientReqEndKnown != 0 && c.ReqEnd.LessEq(end) {
		end = c.ReqEnd
		if rec.want != 0 {
			// Sequence numbers tell lengths below 2 GiB only.
			rec.In = rec.want
			return
		}
	}
	if c.Epoch.ReqBase.Less(end) {
		rec.In = uint64(c.Epoch.ReqBase.To(end))
	}
}

// answered ends the record of a request that the engine itself answers with
// what stands in the side. A request that was refused before its head was
// complete has none yet.
func (a *access) answered(e *Engine, r splice.Ref, c *splice.Client, d *side, status int) {
	rec := a.at(r)
	if rec == nil && c.State == splice.ClientHead {
		rec = a.begin(e, r, c, d)
	}
	if rec == nil {
		return
	}
	a.sized(r, c)
	rec.Status, rec.First, rec.Out, rec.Server = uint16(status), e.now, uint64(len(d.answer)), 0
	a.finish(e, r, AccessAnswered)
}

// served ends the record of a request whose response was delivered.
func (a *access) served(e *Engine, r splice.Ref, c *splice.Client) {
	a.sized(r, c)
	a.finish(e, r, AccessServed)
}

// gone ends the record of a request whose client connection ends.
func (a *access) gone(e *Engine, r splice.Ref, c *splice.Client) {
	a.sized(r, c)
	a.finish(e, r, AccessAborted)
}
