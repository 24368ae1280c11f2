// SPDX-License-Identifier: Apache-2.0

package flowstore

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"unsafe"

	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

func tuple(i uint32) packet.Tuple {
	var t packet.Tuple
	binary.BigEndian.PutUint32(t.Src.Addr[12:], i)
	t.Src.Port = uint16(i)
	t.Dst.Port = 80
	return t
}

func seed(t *testing.T) *rand.Rand {
	s := rand.Uint64()
	if v, err := strconv.ParseUint(os.Getenv("WEIR_SEED"), 10, 64); err == nil {
		s = v
	}
	t.Logf("WEIR_SEED=%d", s)
	return rand.New(rand.NewPCG(s, 1))
}

// TestRemoveDamaged: a record whose key others wrote into can be removed, and the
// others are found as before.
func TestRemoveDamaged(t *testing.T) {
	tab := New[uint32](100, 7)
	var refs []Ref
	for i := range uint32(100) {
		k := tuple(i + 1)
		refs = append(refs, tab.Insert(&k))
	}
	tab.Key(refs[50]).Src.Port ^= 0x5555
	tab.Remove(refs[50])
	if tab.Held(refs[50]) || tab.Live(refs[50]) || tab.Len() != 99 {
		t.Errorf("it is still there, one of %d", tab.Len())
	}
	for i := range uint32(100) {
		k := tuple(i + 1)
		want := refs[i]
		if i == 50 {
			want = 0
		}
		if r := tab.Lookup(&k); r != want {
			t.Errorf("record %d is %d, want %d", i, r, want)
		}
	}
}

// The table must answer like a Go map under random inserts and removals, with
// an index so full that chains are long and wrap.
func TestTableLikeMap(t *testing.T) {
	rnd := seed(t)
	for _, capacity := range []int{1, 7, 100} {
		tab := New[uint32](capacity, rnd.Uint64())
		model := map[packet.Tuple]Ref{}
		for step := range 20000 {
			k := tuple(rnd.Uint32N(uint32(2 * capacity)))
			r := tab.Lookup(&k)
			if want := model[k]; r != want {
				t.Fatalf("step %d: lookup gives %d, the model %d", step, r, want)
			}
			switch {
			case r != 0 && rnd.IntN(2) == 0:
				tab.Remove(r)
				delete(model, k)
			case r == 0:
				r = tab.Insert(&k)
				if (r == 0) != (len(model) == capacity) {
					t.Fatalf("step %d: insert gives %d with %d of %d in use", step, r, len(model), capacity)
				}
				if r != 0 {
					if *tab.At(r) != 0 {
						t.Fatal("a new record is not zeroed")
					}
					*tab.At(r) = uint32(step) + 1
					model[k] = r
				}
			}
			if tab.Len() != len(model) {
				t.Fatalf("step %d: %d records, the model has %d", step, tab.Len(), len(model))
			}
		}
		n := 0
		tab.Each(func(r Ref, _ *uint32) bool {
			if model[*tab.Key(r)] != r {
				t.Errorf("Each gives a record that the model lacks")
			}
			n++
			return true
		})
		if n != len(model) {
			t.Errorf("Each gives %d records of %d", n, len(model))
		}
	}
}

func TestRing(t *testing.T) {
	g := NewRing(4, 10, 99)
	for i := range uint32(4) {
		if g.Put(Brief{Key: tuple(i + 1), IRS: packet.Seq(i)}, 100) {
			t.Error("evicted from a ring with room")
		}
	}
	k1, k2, k5 := tuple(1), tuple(2), tuple(5)
	if b := g.Get(&k1, 109); b == nil || b.IRS != 0 {
		t.Error("a live entry is not found")
	}
	if g.Get(&k1, 110) != nil {
		t.Error("an expired entry is found")
	}
	if !g.Put(Brief{Key: k5}, 101) || g.Get(&k1, 101) != nil || g.Get(&k5, 101) == nil {
		t.Error("the oldest was not evicted first")
	}
	g.Remove(&k2)
	if g.Get(&k2, 101) != nil || g.Len() != 3 {
		t.Error("a removed entry is found")
	}
	g.Expire(110)
	if g.Len() != 1 {
		t.Errorf("%d entries after expiry, want the youngest", g.Len())
	}
	g.Expire(111)
	if g.Len() != 0 {
		t.Errorf("%d entries after all expired", g.Len())
	}
	g.Expire(112)
}

// The ring must answer like a list under random use.
func TestRingLikeList(t *testing.T) {
	rnd := seed(t)
	g := NewRing(50, 20, rnd.Uint64())
	type entry struct {
		k    packet.Tuple
		born uint32
		gone bool
	}
	var list []entry
	for now := uint32(1); now < 5000; now++ {
		k := tuple(1 + rnd.Uint32N(70))
		switch rnd.IntN(5) {
		case 0, 1:
			g.Put(Brief{Key: k, IRS: packet.Seq(now)}, now)
			list = append(list, entry{k: k, born: now})
			if len(list) > 50 {
				list = list[1:]
			}
		case 2:
			g.Remove(&k)
			for i := range list {
				list[i].gone = list[i].gone || list[i].k == k
			}
		case 3:
			g.Expire(now)
		}
		var want uint32
		for _, e := range list {
			if e.k == k && !e.gone && now-e.born < 20 {
				want = e.born
			}
		}
		var got uint32
		if b := g.Get(&k, now); b != nil {
			got = uint32(b.IRS)
		}
		if got != want {
			t.Fatalf("at %d: ring gives %d, list %d", now, got, want)
		}
	}
}

func TestSizes(t *testing.T) {
	for _, s := range []struct {
		name  string
		size  uintptr
		limit uintptr
	}{
		{"client record", unsafe.Sizeof(splice.Client{}), 320},
		{"server record", unsafe.Sizeof(splice.Server{}), 512},
		{"brief", unsafe.Sizeof(Brief{}), 64},
	} {
		t.Logf("%s: %d bytes", s.name, s.size)
		if s.size > s.limit {
			t.Errorf("a %s takes %d bytes, at most %d are planned", s.name, s.size, s.limit)
		}
	}
}

func TestTableAllocatesNothing(t *testing.T) {
	tab := New[splice.Client](1000, 1)
	k := tuple(5)
	tab.Remove(tab.Insert(&k))
	if n := testing.AllocsPerRun(1000, func() {
		r := tab.Insert(&k)
		if tab.Lookup(&k) != r {
			t.Fatal("not found")
		}
		tab.Remove(r)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Expiry in a large ring that is nearly empty costs what was put, not what
// fits: it is counted in places looked at, not in time.
func TestRingExpiryIsLocal(t *testing.T) {
	g := NewRing(1<<18, 10, 7)
	const n = 2000
	for i := range uint32(n) {
		g.Put(Brief{Key: tuple(i + 1)}, 100)
	}
	for i := range uint32(n / 2) {
		k := tuple(2*i + 1)
		g.Remove(&k)
	}
	before := g.tail
	g.Expire(200)
	if g.Len() != 0 || g.tail-before > n {
		t.Errorf("%d left, the tail moved %d places for %d entries", g.Len(), g.tail-before, n)
	}
}
