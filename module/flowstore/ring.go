// SPDX-License-Identifier: Apache-2.0

package flowstore

import (
	"math/bits"
	"unsafe"

	"github.com/weirgate/weir/module/packet"
)

// Brief is what is remembered of a connection that has no record: a handshake
// that is complete but has not asked for anything (an embryo), or a connection
// that is over (a tombstone, which is also the engine's TIME-WAIT).
type Brief struct {
	Key      packet.Tuple
	IRS, ISS packet.Seq
	SndNxt   packet.Seq // of a tombstone: end of what we sent
	Options  uint8      // cookie option bits of an embryo
	Octave   uint8      // of an embryo's round-trip time
	dead     bool
	next     uint32 // chain of the same bucket
	born     uint32 // seconds of the engine's clock
}

// Ring remembers the last n Briefs; the oldest is evicted first. Lookups are
// by 4-tuple and return the newest.
type Ring struct {
	items   []Brief
	sec     *Section // nil: ordinary memory
	note    *uint32  // where a successor reads head
	buckets []uint32 // index+1 into items, 0 = empty
	mask    uint32
	seed    uint64
	head    uint32 // next place to write
	tail    uint32 // oldest place that may be in use: entries lie in [tail, head)
	n       int
	life    uint32 // seconds
}

// NewRing makes a ring for n entries that live for the given seconds.
func NewRing(n int, lifeSeconds uint32, seed uint64) *Ring {
	g := newRing(n, lifeSeconds, seed)
	g.items = make([]Brief, max(n, 2))
	g.note = new(uint32)
	return g
}

// NewRingIn makes a ring in the next section of a Memory. What a predecessor
// left there counts after Recover.
func NewRingIn(m *Memory, tag uint32, n int, lifeSeconds uint32, seed uint64) (*Ring, error) {
	g := newRing(n, lifeSeconds, seed)
	sec, err := m.Section(tag, max(n, 2)+1, unsafe.Sizeof(Brief{}))
	if err != nil {
		return nil, err
	}
	if !sec.Ensure(3 * int(unsafe.Sizeof(Brief{}))) {
		return nil, errNoRoom
	}
	all := cast[Brief](sec)
	g.items, g.sec, g.note = all[1:max(n, 2)+1], sec, &all[0].next
	return g, nil
}

func newRing(n int, lifeSeconds uint32, seed uint64) *Ring {
	size := 1 << bits.Len(uint(max(n, 2)-1))
	return &Ring{
		buckets: make([]uint32, size),
		mask:    uint32(size - 1),
		seed:    seed,
		life:    lifeSeconds,
	}
}

// Len is the number of entries, expired ones included until they are evicted
// or Expire finds them.
func (g *Ring) Len() int { return g.n }

func (g *Ring) bucket(k *packet.Tuple) *uint32 {
	return &g.buckets[uint32(k.Hash(g.seed))&g.mask]
}

// Put remembers an entry; nowSeconds is its birth. It reports whether a live
// entry had to be evicted for it.
func (g *Ring) Put(b Brief, nowSeconds uint32) (evicted bool) {
	if g.sec != nil && !g.sec.Ensure((int(g.head)+2)*int(unsafe.Sizeof(Brief{}))) {
		// No memory for more: the ring is as long as it has become.
		g.items = g.items[:g.head]
		g.head = 0
		if int(g.tail) >= len(g.items) {
			g.tail = 0
		}
	}
	it := &g.items[g.head]
	if it.used() {
		evicted = nowSeconds-it.born < g.life
		g.unlink(g.head)
	}
	switch {
	case g.n == 0:
		g.tail = g.head
	case g.head == g.tail:
		g.tail = g.after(g.tail)
	}
	b.born, b.dead = nowSeconds, false
	bk := g.bucket(&b.Key)
	b.next = *bk
	*bk = g.head + 1
	*it = b
	g.n++
	g.head = g.after(g.head)
	*g.note = g.head
	return evicted
}

// Get returns the newest live entry of a 4-tuple, or nil. The entry may be
// read until the next Put.
func (g *Ring) Get(k *packet.Tuple, nowSeconds uint32) *Brief {
	for i := *g.bucket(k); i != 0; i = g.items[i-1].next {
		if it := &g.items[i-1]; it.Key == *k && nowSeconds-it.born < g.life {
			return it
		}
	}
	return nil
}

// Match returns the newest live entry of a 4-tuple that has one of these initial
// numbers, or nil: a port may have been used more than once within the life of
// an entry.
func (g *Ring) Match(k *packet.Tuple, irs, iss packet.Seq, nowSeconds uint32) *Brief {
	for i := *g.bucket(k); i != 0; i = g.items[i-1].next {
		if it := &g.items[i-1]; it.Key == *k && (it.IRS == irs || it.ISS == iss) && nowSeconds-it.born < g.life {
			return it
		}
	}
	return nil
}

// Remove forgets all entries of a 4-tuple.
func (g *Ring) Remove(k *packet.Tuple) {
	for i := *g.bucket(k); i != 0; {
		next := g.items[i-1].next
		if g.items[i-1].Key == *k {
			g.unlink(i - 1)
		}
		i = next
	}
}

// Expire drops the entries that are past their life. It costs no more than
// the entries put since they were.
func (g *Ring) Expire(nowSeconds uint32) {
	for g.n > 0 {
		it := &g.items[g.tail]
		if it.used() {
			if nowSeconds-it.born < g.life {
				return
			}
			g.unlink(g.tail)
		}
		g.tail = g.after(g.tail)
	}
}

// after is the place behind i.
func (g *Ring) after(i uint32) uint32 {
	if i++; int(i) == len(g.items) {
		return 0
	}
	return i
}

func (b *Brief) used() bool { return b.Key != (packet.Tuple{}) && !b.dead }

func (g *Ring) unlink(i uint32) {
	it := &g.items[i]
	for p := g.bucket(&it.Key); *p != 0; p = &g.items[*p-1].next {
		if *p == i+1 {
			*p = it.next
			break
		}
	}
	it.dead = true
	g.n--
}

// Recover takes over what a predecessor left and that is not past its life.
// It returns how many entries that were.
func (g *Ring) Recover(nowSeconds uint32) int {
	if limit := g.sec.ready/int(unsafe.Sizeof(Brief{})) - 1; limit < len(g.items) && int(*g.note) > limit {
		*g.note = 0 // not written by us
	}
	usable := min(len(g.items), g.sec.ready/int(unsafe.Sizeof(Brief{}))-1)
	g.head = *g.note
	if int(g.head) >= len(g.items) {
		g.head = 0
	}
	g.tail = g.head
	// From the oldest to the newest, so that chains begin with the newest.
	i, short := g.head, false
	for range g.items {
		if int(i) < usable {
			it := &g.items[i]
			if it.used() && it.born <= nowSeconds && nowSeconds-it.born < g.life {
				if g.n == 0 {
					g.tail = i
				}
				short = short || i >= g.head
				bk := g.bucket(&it.Key)
				it.next = *bk
				*bk = i + 1
				g.n++
			} else if *it != (Brief{}) {
				*it = Brief{}
			}
		}
		i = g.after(i)
	}
	if short {
		// It has come round, so that it was as long as its memory. Between the
		// tail and the head must be nothing that has none: a look there may find
		// no room for it, which is a signal.
		g.items = g.items[:usable]
	}
	return g.n
}
