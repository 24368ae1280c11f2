// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"math/rand/v2"

	"github.com/weirgate/weir/module/packet"
)

// Direction is one of the four ways a packet can go.
type Direction uint8

// The directions.
const (
	FromClient Direction = iota
	ToClient
	FromServer
	ToServer
	directions
)

func (d Direction) String() string {
	return [...]string{"from client", "to client", "from server", "to server"}[d]
}

// Wire is what one direction of a path does to packets. Probabilities are per
// packet, times in nanoseconds.
type Wire struct {
	Delay     int64
	Jitter    int64 // added at random; does not change the order
	Loss      float64
	Duplicate float64
	Reorder   float64
	Late      int64 // how late a reordered packet or a duplicate comes, at most
	Corrupt   float64
	Cut       float64 // a segment becomes two
	Join      float64 // neighbours become one super-packet, as GRO does
	JoinWait  int64   // how long the first of them waits
	Whole     bool    // super-packets stay whole
	Partial   float64 // the checksum is left to the receiver, as on a virtual link
	MTU       int     // bytes of an IP packet; larger ones are answered by ICMP; 0: none
	Narrows   int64   // when, from the start, the MTU begins to count
}

// parcel is a packet on its way.
type parcel struct {
	b       []byte
	mss     int  // size into which a super-packet is cut, 0 for an ordinary one
	partial bool // its checksum is not ready
	spoilt  bool
	dir     Direction // of a packet that the engine lets out
}

type wire struct {
	w    *World
	dir  Direction
	spec Wire
	rnd  *rand.Rand
	last int64 // arrival of the newest packet, to keep the order
	held *parcel
	turn int // changes when the held parcel leaves
	// count
	sent, lost, spoilt int
}

// send takes a packet over from its sender.
func (x *wire) send(p *parcel) {
	x.sent++
	s := &x.spec
	if x.dir == FromClient || x.dir == FromServer {
		if p.mss > 0 {
			if s.Whole || s.Join > 0 && x.rnd.Float64() < 0.5 {
				p.ready(false)
			} else {
				for _, part := range segments(p) {
					x.one(part)
				}
				return
			}
		} else if s.Join > 0 && x.join(p) {
			return
		}
	} else if p.mss > 0 && !s.Whole {
		for _, part := range segments(p) {
			x.one(part)
		}
		return
	}
	x.one(p)
}

// ready leaves the checksum of a packet to somebody else, or completes it.
func (p *parcel) ready(done bool) {
	t, _ := packet.ParseTCP(p.b)
	if done {
		t.FillChecksum()
	} else {
		t.FillPartial()
	}
	p.partial = !done
}

// one sends a packet that is not joined with others any more.
func (x *wire) one(p *parcel) {
	s := &x.spec
	if s.Cut > 0 && p.mss == 0 && x.rnd.Float64() < s.Cut {
		t, _ := packet.ParseTCP(p.b)
		if n := t.PayloadLen(); n > 1 {
			k := 1 + x.rnd.IntN(n-1)
			a, b := split(p, k)
			x.whole(a)
			x.whole(b)
			return
		}
	}
	x.whole(p)
}

func (x *wire) whole(p *parcel) {
	s := &x.spec
	if s.MTU > 0 && x.narrow(p) {
		x.tooBig(p)
		return
	}
	if tamper := x.w.lose; tamper != nil && tamper(x.dir, p.b) || s.Loss > 0 && x.rnd.Float64() < s.Loss {
		x.lost++
		x.w.noteParcel(noteLost, x.dir, p)
		return
	}
	x.schedule(p)
	if s.Duplicate > 0 && x.rnd.Float64() < s.Duplicate {
		again := *p
		again.b = append([]byte(nil), p.b...)
		x.late(&again)
	}
}

func (x *wire) schedule(p *parcel) {
	s := &x.spec
	if s.Corrupt > 0 && !p.partial && x.rnd.Float64() < s.Corrupt {
		x.spoil(p)
	}
	if s.Partial > 0 && p.mss == 0 && !p.spoilt && x.rnd.Float64() < s.Partial {
		p.ready(false)
	}
	if s.Reorder > 0 && x.rnd.Float64() < s.Reorder {
		x.late(p)
		return
	}
	at := x.w.now + s.Delay
	if s.Jitter > 0 {
		at += x.rnd.Int64N(s.Jitter)
	}
	if x.w.Hooks.Delay != nil {
		at += x.w.Hooks.Delay(x.dir, p.b)
	}
	at = max(at, x.last)
	x.last = at
	x.w.q.push(happening{at: at, wire: x, p: p})
}

func (x *wire) late(p *parcel) {
	at := x.w.now + x.spec.Delay + 1
	if x.spec.Late > 0 {
		at += x.rnd.Int64N(x.spec.Late)
	}
	x.w.q.push(happening{at: at, wire: x, p: p})
}

// spoil changes bits of one byte, which no Internet checksum overlooks. The
// bytes of IPv6 that no checksum covers are spared.
func (x *wire) spoil(p *parcel) {
	b := append([]byte(nil), p.b...)
	i := x.rnd.IntN(len(b))
	if b[0]>>4 == 6 && (i < 4 || i == 7) {
		i = 40
	}
	b[i] ^= byte(1 + x.rnd.IntN(255))
	p.b, p.spoilt = b, true
	x.spoilt++
	x.w.noteParcel(noteSpoilt, x.dir, p)
}

// join holds a segment for its successor; it reports whether the packet was
// taken.
func (x *wire) join(p *parcel) bool {
	t, problem := packet.ParseTCP(p.b)
	plain := problem == packet.OK && t.PayloadLen() > 0 && t.Flags()&^packet.PSH == packet.ACK
	if x.held != nil {
		h, _ := packet.ParseTCP(x.held.b)
		if plain && h.Tuple() == t.Tuple() && h.End() == t.Seq() && h.Ack() == t.Ack() && h.Window() == t.Window() &&
			len(h.Options()) == 0 && len(t.Options()) == 0 && len(x.held.b)+t.PayloadLen() < 60000 &&
			t.PayloadLen() <= max(x.held.mss, h.PayloadLen()) {
			if x.held.mss == 0 {
				x.held.mss = h.PayloadLen()
			}
			x.held = glue(x.held, &h, &t)
			if t.PayloadLen() < x.held.mss {
				x.release()
			}
			return true
		}
		x.release()
	}
	if !plain || x.rnd.Float64() >= x.spec.Join {
		return false
	}
	x.held = p
	turn := x.turn
	x.w.after(x.spec.JoinWait, func() {
		if x.turn == turn && x.held != nil {
			x.release()
		}
	})
	return true
}

func (x *wire) release() {
	p := x.held
	x.held = nil
	x.turn++
	if p.mss > 0 {
		p.ready(false)
	}
	x.one(p)
}

// glue appends the data of t to the super-packet h.
func glue(p *parcel, h, t *packet.TCP) *parcel {
	data := append(append(make([]byte, 0, h.PayloadLen()+t.PayloadLen()), h.Payload()...), t.Payload()...)
	s := packet.Segment{
		Src: h.Src(), Dst: h.Dst(), Seq: h.Seq(), Ack: t.Ack(), Flags: h.Flags() | t.Flags(), Window: t.Window(), TTL: h.TTL(),
	}
	return &parcel{b: packet.AppendSegment(make([]byte, 0, 60+len(data)), &s, data), mss: p.mss}
}

// segments cuts a super-packet as the kernel does: the flags FIN and PSH go
// with the last piece.
func segments(p *parcel) []*parcel {
	t, _ := packet.ParseTCP(p.b)
	if p.mss == 0 || t.PayloadLen() <= p.mss {
		p.mss = 0
		if p.partial {
			p.ready(true)
		}
		return []*parcel{p}
	}
	var out []*parcel
	data := t.Payload()
	s := header(&t)
	for len(data) > 0 {
		n := min(p.mss, len(data))
		s.Flags = t.Flags() &^ (packet.FIN | packet.PSH)
		if n == len(data) {
			s.Flags = t.Flags()
		}
		out = append(out, &parcel{b: packet.AppendSegment(make([]byte, 0, 60+len(s.Options)+n), &s, data[:n]), spoilt: p.spoilt})
		s.Seq = s.Seq.Add(packet.Size(n))
		data = data[n:]
	}
	return out
}

// split cuts a segment after k bytes of data.
func split(p *parcel, k int) (a, b *parcel) {
	t, _ := packet.ParseTCP(p.b)
	s := header(&t)
	s.Flags = t.Flags() &^ (packet.FIN | packet.PSH)
	a = &parcel{b: packet.AppendSegment(nil, &s, t.Payload()[:k])}
	s.Flags = t.Flags()
	s.Seq = s.Seq.Add(packet.Size(k))
	b = &parcel{b: packet.AppendSegment(nil, &s, t.Payload()[k:])}
	return a, b
}

func header(t *packet.TCP) packet.Segment {
	return packet.Segment{
		Src: t.Src(), Dst: t.Dst(), Seq: t.Seq(), Ack: t.Ack(), Flags: t.Flags(), Window: t.Window(), TTL: t.TTL(),
		Options: append([]byte(nil), t.Options()...),
	}
}
