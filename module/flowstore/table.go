// SPDX-License-Identifier: Apache-2.0

// Package flowstore is the flow table: records of fixed size under a 4-tuple,
// without pointers, found by open addressing. The table does not care where
// its memory comes from, so that records can live where they outlive the
// process.
//
// A table belongs to one shard and is not safe for concurrent use. It never
// grows: when it is full, Insert says so and established flows are untouched
// (INV-7).
package flowstore

import (
	"math/bits"

	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// Ref names a record. The zero Ref names none.
type Ref = splice.Ref

// Table maps 4-tuples to records of type T. A Ref stays valid, and At returns
// the same address, until Remove.
type Table[T any] struct {
	recs  []T            // recs[0] is not used
	keys  []packet.Tuple // keys[ref] belongs to recs[ref]
	hash  []uint32       // low half of the key's hash, per ref
	live  []uint64       // bitmap of used refs
	free  []Ref          // stack of unused refs
	index []Ref          // open addressing, linear probing; 0 = empty
	mask  uint32
	seed  uint64
	n     int
}

// New makes a table for up to capacity records. The memory is reserved at
// once and touched only as it is used. The seed keeps the order of the index
// from being guessed by those who choose ports.
func New[T any](capacity int, seed uint64) *Table[T] {
	capacity = max(capacity, 1)
	size := 1 << bits.Len(uint(2*capacity-1))
	t := &Table[T]{
		recs:  make([]T, capacity+1),
		keys:  make([]packet.Tuple, capacity+1),
		hash:  make([]uint32, capacity+1),
		live:  make([]uint64, (capacity+64)/64),
		free:  make([]Ref, 0, 64),
		index: make([]Ref, size),
		mask:  uint32(size - 1),
		seed:  seed,
	}
	return t
}

// Len is the number of records in use.
func (t *Table[T]) Len() int { return t.n }

// Cap is the number of records that fit.
func (t *Table[T]) Cap() int { return len(t.recs) - 1 }

// At returns the record of a Ref, to be changed in place.
func (t *Table[T]) At(r Ref) *T { return &t.recs[r] }

// Key returns the 4-tuple of a record.
func (t *Table[T]) Key(r Ref) *packet.Tuple { return &t.keys[r] }

// Live reports whether r names a record in use.
func (t *Table[T]) Live(r Ref) bool {
	return r != 0 && int(r) < len(t.recs) && t.live[r/64]&(1<<(r%64)) != 0
}

// Lookup returns the Ref of a 4-tuple, or 0.
func (t *Table[T]) Lookup(k *packet.Tuple) Ref {
	h := uint32(k.Hash(t.seed))
	for i := h & t.mask; ; i = (i + 1) & t.mask {
		r := t.index[i]
		if r == 0 {
			return 0
		}
		if t.hash[r] == h && t.keys[r] == *k {
			return r
		}
	}
}

// Insert makes a zeroed record under a 4-tuple that has none yet. It returns
// 0 when the table is full.
func (t *Table[T]) Insert(k *packet.Tuple) Ref {
	var r Ref
	switch {
	case len(t.free) > 0:
		r = t.free[len(t.free)-1]
		t.free = t.free[:len(t.free)-1]
	case t.n < t.Cap():
		// Refs are handed out densely: with an empty free stack exactly the
		// first n are in use.
		r = Ref(t.n + 1)
	default:
		return 0
	}
	h := uint32(k.Hash(t.seed))
	i := h & t.mask
	for t.index[i] != 0 {
		i = (i + 1) & t.mask
	}
	t.index[i] = r
	t.hash[r] = h
	t.keys[r] = *k
	t.live[r/64] |= 1 << (r % 64)
	var zero T
	t.recs[r] = zero
	t.n++
	return r
}

// Remove forgets a record; its Ref may be handed out again.
func (t *Table[T]) Remove(r Ref) {
	if !t.Live(r) {
		return
	}
	i := t.hash[r] & t.mask
	for t.index[i] != r {
		i = (i + 1) & t.mask
	}
	// Close the gap by moving back what was pushed past it (Knuth, 6.4 R), so
	// that no tombstones collect in the index.
	for j := i; ; {
		j = (j + 1) & t.mask
		s := t.index[j]
		if s == 0 {
			break
		}
		home := t.hash[s] & t.mask
		if (j-home)&t.mask >= (j-i)&t.mask {
			t.index[i] = s
			i = j
		}
	}
	t.index[i] = 0
	t.live[r/64] &^= 1 << (r % 64)
	t.free = append(t.free, r)
	t.n--
}

// Each calls f for every record in use, in the order of their Refs, until f
// returns false. f may remove the record that it was given.
func (t *Table[T]) Each(f func(Ref, *T) bool) {
	for w := range t.live {
		for b := t.live[w]; b != 0; b &= b - 1 {
			r := Ref(w*64 + bits.TrailingZeros64(b))
			if !f(r, &t.recs[r]) {
				return
			}
		}
	}
}
