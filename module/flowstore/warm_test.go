// SPDX-License-Identifier: Apache-2.0

package flowstore

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/weirgate/weir/module/packet"
)

type bigRecord [34]uint64

func nth(i int) packet.Tuple {
	var k packet.Tuple
	k.Src.Addr[12], k.Src.Addr[13], k.Src.Addr[14], k.Src.Port = byte(i>>24), byte(i>>16), byte(i>>8), uint16(i)
	k.Dst.Port = 80
	return k
}

// TestWarm: it finds what Lookup finds, also where chains of the index are
// long, and changes nothing.
func TestWarm(t *testing.T) {
	const n = 5000
	tab := New[bigRecord](n, 7)
	refs := map[int]Ref{}
	for i := range n {
		k := nth(i)
		if refs[i] = tab.Insert(&k); refs[i] == 0 {
			t.Fatal("full")
		}
		tab.At(refs[i])[5] = uint64(i)
	}
	for i := 0; i < n; i += 3 {
		tab.Remove(refs[i])
		delete(refs, i)
	}
	before := slices.Clone(tab.slots)
	var homes []uint32
	for i := range 2 * n {
		k := nth(i)
		homes = append(homes, tab.Home(&k))
	}
	tab.Warm(homes)
	for i, r := range homes {
		if want := refs[i]; Ref(r) != want && want != 0 {
			t.Errorf("key %d: record %d, want %d", i, r, want)
		}
	}
	if !slices.Equal(before, tab.slots) {
		t.Error("a record has changed")
	}
	if n := testing.AllocsPerRun(100, func() { tab.Warm(homes[:0]) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkLookup finds records that are drawn at random, one by one and with
// those of a batch read ahead.
func BenchmarkLookup(b *testing.B) {
	for _, n := range []int{1_000, 1_000_000} {
		tab := New[bigRecord](n, 7)
		for i := range n {
			k := nth(i)
			tab.Insert(&k)
		}
		keys := make([]packet.Tuple, 1<<16)
		rnd := rand.New(rand.NewPCG(1, 2))
		for i := range keys {
			keys[i] = nth(rnd.IntN(n))
		}
		find := func(b *testing.B, ahead bool) {
			b.ReportAllocs()
			var homes [64]uint32
			i := 0
			for b.Loop() {
				if i%64 == 0 && ahead {
					for k := range homes {
						homes[k] = tab.Home(&keys[(i+k)%len(keys)])
					}
					tab.Warm(homes[:])
				}
				r := tab.Lookup(&keys[i%len(keys)])
				tab.At(r)[7]++
				i++
			}
		}
		b.Run(fmt.Sprintf("%d", n), func(b *testing.B) { find(b, false) })
		b.Run(fmt.Sprintf("%d/ahead", n), func(b *testing.B) { find(b, true) })
	}
}
