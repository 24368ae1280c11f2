// SPDX-License-Identifier: Apache-2.0

// Package flowstore is the flow table: records of fixed size under a 4-tuple,
// without pointers, found by open addressing. Records, their keys, and what is
// remembered of connections without a record can live in memory that outlives
// the process (Memory); a Journal makes every step of the engine atomic there,
// and Recover rebuilds from it what a process needs beside: indexes, free
// lists, chains.
//
// It must not know what a record means: who opens a file says which records
// are sound.
//
// A table belongs to one shard and is not safe for concurrent use. It never
// grows: when it is full, Insert says so and established flows are untouched
// (INV-7).
package flowstore

import (
	"errors"
	"math/bits"
	"unsafe"

	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// Ref names a record. The zero Ref names none.
type Ref = splice.Ref

var errNoRoom = errors.New("flow store: no room for it in the directory's file system")

// Table maps 4-tuples to records of type T. A Ref stays valid, and At returns
// the same address, until Remove.
type Table[T any] struct {
	slots []slot[T] // slots[0] is not used
	step  uint32    // of the journal; records with another one are copied first
	kind  uint32
	j     *Journal
	sec   *Section
	high  Ref      // records up to here have been in use
	live  []uint64 // bitmap of used refs
	free  []Ref    // stack of unused refs up to high
	index []place  // open addressing, linear probing
	mask  uint32
	seed  uint64
	n     int
}

// place is an entry of the index. A search compares hashes here, so that it
// waits for one line of cache before that of the record.
type place struct {
	ref  Ref    // 0 = empty
	hash uint32 // low half of the key's hash
}

// slot is a record with its key as it stands in memory.
type slot[T any] struct {
	sum  uint32 // of all that follows step, when no step is under way
	step uint32 // of the journal when it was copied last; means nothing to a successor
	used uint32
	_    uint32
	key  packet.Tuple
	rec  T
}

// New makes a table for up to capacity records in ordinary memory, without a
// journal. The memory is touched only as it is used. The seed keeps the order
// of the index from being guessed by those who choose ports.
func New[T any](capacity int, seed uint64) *Table[T] {
	t := newTable[T](capacity, seed)
	t.slots = make([]slot[T], max(capacity, 1)+1)
	return t
}

// NewIn makes a table in the next section of a Memory, under a journal. What a
// predecessor left there counts after Recover.
func NewIn[T any](m *Memory, j *Journal, tag uint32, capacity int, seed uint64) (*Table[T], error) {
	t := newTable[T](capacity, seed)
	sec, err := m.Section(tag, max(capacity, 1)+1, unsafe.Sizeof(slot[T]{}))
	if err != nil {
		return nil, err
	}
	t.slots, t.sec = cast[slot[T]](sec)[:max(capacity, 1)+1], sec
	if !sec.Ensure(int(unsafe.Sizeof(slot[T]{}))) {
		return nil, errNoRoom
	}
	t.j = j
	t.kind = j.add(t)
	return t, nil
}

// SlotSize is what a record of type T takes in a table and in a journal, bytes.
func SlotSize[T any]() uintptr { return unsafe.Sizeof(slot[T]{}) }

func newTable[T any](capacity int, seed uint64) *Table[T] {
	capacity = max(capacity, 1)
	size := 1 << bits.Len(uint(2*capacity-1))
	return &Table[T]{
		live:  make([]uint64, (capacity+64)/64),
		free:  make([]Ref, 0, 64),
		index: make([]place, size),
		mask:  uint32(size - 1),
		seed:  seed,
	}
}

// Len is the number of records in use.
func (t *Table[T]) Len() int { return t.n }

// Cap is the number of records that fit.
func (t *Table[T]) Cap() int { return len(t.slots) - 1 }

// At returns the record of a Ref, to be changed in place.
func (t *Table[T]) At(r Ref) *T {
	s := &t.slots[r]
	if s.step != t.step {
		t.capture(s, r)
	}
	return &s.rec
}

// Peek returns the record of a Ref to be read only.
func (t *Table[T]) Peek(r Ref) *T { return &t.slots[r].rec }

// capture copies a record into the journal before a step changes it.
//
//go:noinline
func (t *Table[T]) capture(s *slot[T], r Ref) {
	if t.j == nil {
		return
	}
	if e := t.j.entry(t.kind, r); e != nil {
		*(*slot[T])(e) = *s
		t.j.publish()
	}
	s.step = t.step
}

func (t *Table[T]) touch(r Ref) *slot[T] {
	s := &t.slots[r]
	if s.step != t.step {
		t.capture(s, r)
	}
	return s
}

// Key returns the 4-tuple of a record.
func (t *Table[T]) Key(r Ref) *packet.Tuple { return &t.slots[r].key }

// Live reports whether r names a record in use.
func (t *Table[T]) Live(r Ref) bool {
	return r != 0 && int(r) < len(t.slots) && t.live[r/64]&(1<<(r%64)) != 0
}

// Held is Live for a record that the step under way has touched: it looks at
// the record alone.
func (t *Table[T]) Held(r Ref) bool { return t.slots[r].used != 0 }

// Lookup returns the Ref of a 4-tuple, or 0.
func (t *Table[T]) Lookup(k *packet.Tuple) Ref {
	h := uint32(k.Hash(t.seed))
	for i := h & t.mask; ; i = (i + 1) & t.mask {
		p := t.index[i]
		if p.ref == 0 {
			return 0
		}
		if p.hash == h && t.slots[p.ref].key == *k {
			return p.ref
		}
	}
}

// Insert makes a zeroed record under a 4-tuple that has none yet. It returns
// 0 when the table is full, or when there is no more room for its memory.
func (t *Table[T]) Insert(k *packet.Tuple) Ref {
	var r Ref
	switch {
	case len(t.free) > 0:
		r = t.free[len(t.free)-1]
		t.free = t.free[:len(t.free)-1]
	case int(t.high) < t.Cap():
		r = t.high + 1
		if t.sec != nil && !t.sec.Ensure(int(unsafe.Sizeof(slot[T]{}))*int(r+1)) {
			return 0
		}
		t.high = r
	default:
		return 0
	}
	s := t.touch(r)
	var zero T
	s.used, s.key, s.rec = 1, *k, zero
	t.link(r, k)
	return r
}

// link enters a record into the index.
func (t *Table[T]) link(r Ref, k *packet.Tuple) {
	h := uint32(k.Hash(t.seed))
	i := h & t.mask
	for t.index[i].ref != 0 {
		i = (i + 1) & t.mask
	}
	t.index[i] = place{r, h}
	t.live[r/64] |= 1 << (r % 64)
	t.n++
}

// Remove forgets a record; its Ref may be handed out again.
func (t *Table[T]) Remove(r Ref) {
	if !t.Live(r) {
		return
	}
	// A key that others wrote into only makes the search longer.
	i := uint32(t.slots[r].key.Hash(t.seed)) & t.mask
	for t.index[i].ref != r {
		i = (i + 1) & t.mask
	}
	// Close the gap by moving back what was pushed past it (Knuth, 6.4 R), so
	// that no tombstones collect in the index.
	for j := i; ; {
		j = (j + 1) & t.mask
		s := t.index[j]
		if s.ref == 0 {
			break
		}
		home := s.hash & t.mask
		if (j-home)&t.mask >= (j-i)&t.mask {
			t.index[i] = s
			i = j
		}
	}
	t.index[i] = place{}
	t.live[r/64] &^= 1 << (r % 64)
	t.touch(r).used = 0
	t.free = append(t.free, r)
	t.n--
}

// Range calls f for every record in use, to be read only, in the order of
// their Refs, until f returns false.
func (t *Table[T]) Range(f func(Ref, *T) bool) {
	for w := range t.live {
		for b := t.live[w]; b != 0; b &= b - 1 {
			r := Ref(w*64 + bits.TrailingZeros64(b))
			if !f(r, &t.slots[r].rec) {
				return
			}
		}
	}
}

// Each calls f for every record in use, in the order of their Refs, until f
// returns false. f may remove the record that it was given.
func (t *Table[T]) Each(f func(Ref, *T) bool) {
	for w := range t.live {
		for b := t.live[w]; b != 0; b &= b - 1 {
			r := Ref(w*64 + bits.TrailingZeros64(b))
			if !f(r, t.At(r)) {
				return
			}
		}
	}
}

// seal implements journaled.
func (t *Table[T]) seal(r Ref) {
	s := &t.slots[r]
	s.sum = s.checksum()
}

func (t *Table[T]) begin(step uint32) { t.step = step }

func (t *Table[T]) restore(b []byte, r Ref) {
	if r == 0 || int(r) >= len(t.slots) || t.sec.ready < int(unsafe.Sizeof(slot[T]{}))*int(r+1) {
		return
	}
	t.slots[r] = *(*slot[T])(unsafe.Pointer(&b[0]))
}

// checksum notices memory that others wrote into. It is no defence against
// somebody who computes it.
func (s *slot[T]) checksum() uint32 {
	const k = 0x9e3779b97f4a7c15
	words := unsafe.Slice((*uint64)(unsafe.Pointer(s)), unsafe.Sizeof(*s)/8)[1:]
	a, b, c, d := uint64(1), uint64(2), uint64(3), uint64(4)
	for len(words) >= 4 {
		a = (a ^ words[0]) * k
		b = (b ^ words[1]) * k
		c = (c ^ words[2]) * k
		d = (d ^ words[3]) * k
		words = words[4:]
	}
	for _, w := range words {
		a = (a ^ w) * k
	}
	a ^= bits.RotateLeft64(b, 16) ^ bits.RotateLeft64(c, 32) ^ bits.RotateLeft64(d, 48)
	return uint32(a>>32) ^ uint32(a)
}

// Recovered says what a successor found.
type Recovered struct {
	Taken   int
	Refused int // records whose checksum is wrong or that sound did not accept
}

// Recover takes over what a predecessor left: the records whose checksum is
// right and that sound accepts, which may change them. The others are
// forgotten. It is called once, after Journal.Undo and before anything else. An
// empty table costs nothing.
func (t *Table[T]) Recover(sound func(Ref, *packet.Tuple, *T) bool) (rec Recovered) {
	// All that has memory is looked at: a number of those that were in use could
	// be wrong, and a look at the others costs nearly nothing.
	high := Ref(max(min(t.sec.ready/int(unsafe.Sizeof(slot[T]{}))-1, t.Cap()), 0))
	t.high = high
	for r := Ref(1); r <= high; r++ {
		s := &t.slots[r]
		s.step = 0
		if s.used == 0 {
			continue
		}
		if s.used == 1 && s.sum == s.checksum() && t.Lookup(&s.key) == 0 && sound(r, &s.key, &s.rec) {
			s.sum = s.checksum()
			t.link(r, &s.key)
			rec.Taken++
			continue
		}
		rec.Refused++
		s.used = 0
	}
	for r := high; r > 0; r-- {
		if !t.Live(r) {
			t.free = append(t.free, r)
		}
	}
	return rec
}
