// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"slices"

	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// Bounds of what is kept beyond a gap, per direction of a connection and in
// total. Nothing that was kept, and so reported by SACK, is evicted.
const (
	maxKeptPackets = 64
	maxKeptBytes   = 256 << 10
	maxKeptTotal   = 32 << 20
)

// kept holds the packets of one direction whose place relative to the present
// message's end is not known yet because something before them is missing
// (INV-5). They are handled as if they came again once the gap is filled.
type kept struct {
	list  []keptPacket // by first number
	bytes int
}

type keptPacket struct {
	seq, end packet.Seq // data and FIN
	checksum packet.ChecksumState
	gso      bool
	data     []byte
}

// kepts is a free list of kept.
type kepts struct {
	list  []*kept
	free  []uint32
	used  int
	bytes int
}

func (s *kepts) get() uint32 {
	s.used++
	if n := len(s.free); n > 0 {
		i := s.free[n-1]
		s.free = s.free[:n-1]
		return i
	}
	if len(s.list) == 0 {
		s.list = append(s.list, nil)
	}
	s.list = append(s.list, &kept{})
	return uint32(len(s.list) - 1)
}

// drop forgets everything that is kept under *i.
func (s *kepts) drop(i *uint32) {
	if *i == 0 {
		return
	}
	k := s.list[*i]
	s.bytes -= k.bytes
	clear(k.list)
	k.list, k.bytes = k.list[:0], 0
	s.free = append(s.free, *i)
	s.used--
	*i = 0
}

// keep copies a packet. It reports whether the packet is kept now, so that its
// sender may be told.
func (s *kepts) keep(i *uint32, p *packet.TCP, ev *Event) bool {
	if *i == 0 {
		*i = s.get()
	}
	k := s.list[*i]
	seq, end := p.Seq(), p.End()
	for j := range k.list {
		if o := &k.list[j]; o.seq.LessEq(seq) && end.LessEq(o.end) {
			return true
		}
	}
	if len(k.list) >= maxKeptPackets || k.bytes+len(p.Raw) > maxKeptBytes || s.bytes+len(p.Raw) > maxKeptTotal {
		if len(k.list) == 0 {
			s.drop(i) // nothing to remember
		}
		return false
	}
	at := len(k.list)
	for at > 0 && seq.Less(k.list[at-1].seq) {
		at--
	}
	k.list = slices.Insert(k.list, at, keptPacket{seq, end, ev.Checksum, ev.GSO, slices.Clone(p.Raw)})
	k.bytes += len(p.Raw)
	s.bytes += len(p.Raw)
	return true
}

// next takes out the first packet that begins at or before rcvNxt.
func (s *kepts) next(i *uint32, rcvNxt packet.Seq) (keptPacket, bool) {
	k := s.list[*i]
	if len(k.list) == 0 || rcvNxt.Less(k.list[0].seq) {
		return keptPacket{}, false
	}
	o := k.list[0]
	k.list = slices.Delete(k.list, 0, 1)
	k.bytes -= len(o.data)
	s.bytes -= len(o.data)
	if len(k.list) == 0 {
		s.drop(i)
	}
	return o, true
}

// sackOption appends the SACK option that a receiver would send: the block
// with the newest segment first (RFC 2018 section 4).
func (s *kepts) sackOption(dst []byte, i uint32, newest packet.Seq) []byte {
	if i == 0 {
		return dst
	}
	var blocks [8]packet.SACKBlock
	n := 0
	for _, o := range s.list[i].list {
		if n > 0 && o.seq.LessEq(blocks[n-1].Right) {
			blocks[n-1].Right = packet.MaxSeq(blocks[n-1].Right, o.end)
		} else if n < len(blocks) {
			blocks[n] = packet.SACKBlock{Left: o.seq, Right: o.end}
			n++
		}
	}
	if n == 0 {
		return dst
	}
	for j := range n {
		if newest.In(blocks[j].Left, blocks[j].Right) {
			first := blocks[j]
			copy(blocks[1:j+1], blocks[:j])
			blocks[0] = first
			break
		}
	}
	return packet.AppendSACKOption(dst, blocks[:min(n, 3)]...)
}

// keepClient keeps a client's segment beyond a gap and answers it with the
// duplicate ACK that makes the client repair the gap within a round trip.
func (e *Engine) keepClient(r splice.Ref, c *splice.Client, p *packet.TCP, ev *Event) {
	e.Count.add(ReasonBeyondFrontier)
	if !e.kepts.keep(&c.Kept, p, ev) {
		e.Count.add(ReasonKeptFull)
	}
	e.dupACK(r, c, p.Seq())
}

// keepServer does the same for a server's segment.
func (e *Engine) keepServer(s splice.Ref, v *splice.Server, p *packet.TCP, ev *Event) {
	e.Count.add(ReasonBeyondFrontier)
	if !e.kepts.keep(&v.Kept, p, ev) {
		e.Count.add(ReasonKeptFull)
	}
	e.gapServer(s, v, p.Seq())
}

// replay handles what was kept of a connection and is in order now. Its
// packets have no verdict any more, so what becomes of them is emitted.
func (e *Engine) replay(key *packet.Tuple, fromServer bool) {
	for {
		var o keptPacket
		var ok bool
		if fromServer {
			s := e.servers.Lookup(key)
			if s == 0 || e.servers.At(s).Kept == 0 {
				return
			}
			v := e.servers.At(s)
			o, ok = e.kepts.next(&v.Kept, v.RcvNxt)
		} else {
			r := e.clients.Lookup(key)
			if r == 0 || e.clients.At(r).Kept == 0 {
				return
			}
			c := e.clients.At(r)
			o, ok = e.kepts.next(&c.Kept, c.RcvNxt)
		}
		if !ok {
			return
		}
		ev := Event{Kind: Packet, Checksum: o.checksum, GSO: o.gso, Loopback: true, Data: o.data}
		p, problem := packet.ParseTCP(o.data)
		if problem != packet.OK {
			continue
		}
		if fromServer {
			e.fromServer(key, &p, &ev)
		} else {
			e.fromClient(key, &p, &ev)
		}
	}
}
