// SPDX-License-Identifier: Apache-2.0

package flowstore

import (
	"unsafe"

	"github.com/weirgate/weir/module/packet"
)

// A table with hundreds of thousands of records lies in memory, not in a cache:
// each record that a packet needs is waited for several times, first for the
// index, then for what it names. Warm asks for those of a whole batch, so that
// the processor waits for them all at once.

const cacheLine = 64

// Home is where the search for a key begins, for Warm.
func (t *Table[T]) Home(k *packet.Tuple) uint32 { return uint32(k.Hash(t.seed)) }

// Warm reads what Lookup and At will read of the records with these homes, and
// changes nothing. It replaces each home by the Ref that was found there, 0 for
// none, which is a guess: keys are not compared. The result means nothing; it
// keeps the reading from being optimised away.
func (t *Table[T]) Warm(homes []uint32) (waste uint64) {
	// Each loop's reads do not wait for each other.
	for _, h := range homes {
		waste += uint64(t.index[h&t.mask].ref)
	}
	size := unsafe.Sizeof(t.slots[0])
	for n, h := range homes {
		homes[n] = 0
		for i := h & t.mask; t.index[i].ref != 0; i = (i + 1) & t.mask {
			p := t.index[i]
			if p.hash != h {
				continue
			}
			homes[n] = uint32(p.ref)
			s := unsafe.Pointer(&t.slots[p.ref])
			for off := uintptr(0); off < size; off += cacheLine {
				waste += uint64(*(*uint32)(unsafe.Add(s, off)))
			}
			waste += uint64(*(*uint32)(unsafe.Add(s, size-4)))
			break
		}
	}
	return waste
}
