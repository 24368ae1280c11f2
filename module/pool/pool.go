// SPDX-License-Identifier: Apache-2.0

// Package pool keeps the idle server connections of a shard and the rules of
// their use: which option classes fit together, when a connection may serve
// another request, and which SNIP port a new connection takes.
//
// It holds no TCP state and does no I/O; the engine owns the records that the
// lists name.
package pool

import (
	"math/bits"

	"github.com/weirgate/weir/module/splice"
)

// Class is what must agree between a client and the server connection that it
// uses, because it was negotiated in the server connection's handshake.
//
// A SACK sender ignores duplicate ACKs without blocks, so a client without
// SACK needs a server connection without it; the reverse is allowed (blocks are
// stripped). The MSS that we announced to a server bounds the segments which
// the client will get.
type Class uint8

const (
	classSACK  Class = 1 << iota
	classLarge       // MSS of LargeMSS, else SmallMSS
	Classes    = 4
)

// The two MSS classes, payload bytes per segment (RFC 9293 section 3.7.1: 536
// is what every IPv4 host must take). Segments for clients below the small one
// are cut by the engine.
const (
	LargeMSS = 1400
	SmallMSS = 536
)

// ClassOf gives the class that a client needs.
func ClassOf(clientMSS uint16, sack bool) Class {
	var c Class
	if clientMSS >= LargeMSS {
		c |= classLarge
	}
	if sack {
		c |= classSACK
	}
	return c
}

// SACK reports whether connections of the class offer SACK.
func (c Class) SACK() bool { return c&classSACK != 0 }

// MSS is what a connection of the class announces to the server.
func (c Class) MSS() uint16 {
	if c&classLarge != 0 {
		return LargeMSS
	}
	return SmallMSS
}

// fallbacks lists, per wanted class, the classes that serve it, best first.
var fallbacks = [Classes][]Class{
	0:                      {0},
	classSACK:              {classSACK, 0},
	classLarge:             {classLarge, 0},
	classLarge | classSACK: {classLarge | classSACK, classLarge},
}

// Pool holds idle connections by server and class. The most recently used one
// is taken first, so that the surplus ages and can be closed.
type Pool struct {
	heads []list // server ID * Classes + class
	links []link // by splice.Ref
	n     int
}

type list struct {
	first, last splice.Ref // most and least recently used
	n           int32
}

type link struct {
	prev, next splice.Ref
	list       int32 // index into heads plus one, 0 = not idle
	octave     uint8 // round-trip time of the last client, see Octave
}

// Octave classes a round-trip time, nanoseconds: clients of one octave leave a
// connection's congestion window in a state that suits the next one (SPLICING,
// inherited congestion state). 0 is unknown.
func Octave(rtt int64) uint8 {
	if rtt <= 0 {
		return 0
	}
	return uint8(max(bits.Len64(uint64(rtt)>>18), 1)) // everything below half a millisecond is alike
}

// similar bounds how many idle connections are looked at for one of the same
// octave.
const similar = 8

// New makes a pool for references up to capacity.
func New(capacity int) *Pool {
	return &Pool{links: make([]link, capacity+1)}
}

// Len is the number of idle connections.
func (p *Pool) Len() int { return p.n }

// Put adds an idle connection as the most recently used one. octave is that of
// its last client.
func (p *Pool) Put(server uint16, class Class, octave uint8, r splice.Ref) {
	i := int(server)*Classes + int(class)
	for len(p.heads) <= i {
		p.heads = append(p.heads, list{})
	}
	l := &p.heads[i]
	p.links[r] = link{next: l.first, list: int32(i + 1), octave: octave}
	if l.first != 0 {
		p.links[l.first].prev = r
	} else {
		l.last = r
	}
	l.first = r
	l.n++
	p.n++
}

// Take removes and returns an idle connection of the server that fits the
// class, or 0: the most recently used one, but among the first few one whose
// last client had a round-trip time like this one's.
func (p *Pool) Take(server uint16, want Class, octave uint8) splice.Ref {
	for _, c := range fallbacks[want] {
		i := int(server)*Classes + int(c)
		if i >= len(p.heads) || p.heads[i].first == 0 {
			continue
		}
		r := p.heads[i].first
		if octave != 0 {
			for s, n := r, 0; s != 0 && n < similar; s, n = p.links[s].next, n+1 {
				if p.links[s].octave == octave {
					r = s
					break
				}
			}
		}
		p.Remove(r)
		return r
	}
	return 0
}

// Remove takes a connection out of its list; it reports whether it was idle.
func (p *Pool) Remove(r splice.Ref) bool {
	k := p.links[r]
	if k.list == 0 {
		return false
	}
	l := &p.heads[k.list-1]
	if k.prev != 0 {
		p.links[k.prev].next = k.next
	} else {
		l.first = k.next
	}
	if k.next != 0 {
		p.links[k.next].prev = k.prev
	} else {
		l.last = k.prev
	}
	p.links[r] = link{}
	l.n--
	p.n--
	return true
}

// Idle is the number of idle connections to a server.
func (p *Pool) Idle(server uint16) int {
	n := 0
	for c := range Classes {
		if i := int(server)*Classes + c; i < len(p.heads) {
			n += int(p.heads[i].n)
		}
	}
	return n
}

// Oldest returns the least recently used idle connection to a server, of any
// class but with the fullest class first, or 0.
func (p *Pool) Oldest(server uint16) splice.Ref {
	var r splice.Ref
	var most int32
	for c := range Classes {
		if i := int(server)*Classes + c; i < len(p.heads) && p.heads[i].n > most {
			most, r = p.heads[i].n, p.heads[i].last
		}
	}
	return r
}
