// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"

	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

func TestMostRecentFirst(t *testing.T) {
	p := New(10)
	c := ClassOf(1460, true)
	for r := splice.Ref(1); r <= 3; r++ {
		p.Put(7, c, 0, r)
	}
	if got := p.Oldest(7); got != 1 {
		t.Errorf("oldest is %d", got)
	}
	for want := splice.Ref(3); want >= 1; want-- {
		if got := p.Take(7, c, 0); got != want {
			t.Errorf("took %d, want %d", got, want)
		}
	}
	if p.Take(7, c, 0) != 0 || p.Len() != 0 {
		t.Error("an empty pool gives something")
	}
}

// A client never gets a connection whose handshake does not suit it.
func TestClasses(t *testing.T) {
	for _, c := range []struct {
		mss         uint16
		sack        bool
		connection  Class
		served      bool
		explanation string
	}{
		{1460, true, classLarge | classSACK, true, "the same class"},
		{1460, true, classLarge, true, "SACK may be stripped"},
		{1460, false, classLarge | classSACK, false, "a SACK sender ignores duplicate ACKs without blocks"},
		{1200, true, classLarge | classSACK, false, "its segments would be too large"},
		{1200, true, classSACK, true, "the small class"},
		{1460, true, classSACK, false, "small segments for a large client"},
	} {
		p := New(1)
		p.Put(0, c.connection, 0, 1)
		if got := p.Take(0, ClassOf(c.mss, c.sack), 0) == 1; got != c.served {
			t.Errorf("%s: client MSS %d SACK %v on class %d: %v", c.explanation, c.mss, c.sack, c.connection, got)
		}
	}
}

func TestSimilarRoundTripFirst(t *testing.T) {
	p := New(20)
	c := ClassOf(1460, true)
	near, far := Octave(1e6), Octave(100e6)
	p.Put(0, c, near, 1)
	p.Put(0, c, far, 2)
	p.Put(0, c, far, 3)
	if got := p.Take(0, c, near); got != 1 {
		t.Errorf("took %d, want the one of a near client", got)
	}
	if got := p.Take(0, c, near); got != 3 {
		t.Errorf("took %d, want the most recent one", got)
	}
	for r := splice.Ref(10); r < 10+similar; r++ {
		p.Put(0, c, far, r)
	}
	p.Put(0, c, near, 1)
	for r := splice.Ref(1); p.Len() > 0; r++ {
		p.Take(0, c, 0)
	}
	if Octave(0) != 0 || Octave(1) != 1 || Octave(4e6) == Octave(9e6) || Octave(1<<62) < Octave(1<<40) {
		t.Error("octaves are wrong")
	}
}

// The lists must answer like slices under random use.
func TestPoolLikeSlices(t *testing.T) {
	seed := rand.Uint64()
	if v, err := strconv.ParseUint(os.Getenv("WEIR_SEED"), 10, 64); err == nil {
		seed = v
	}
	t.Logf("WEIR_SEED=%d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	const refs, servers = 50, 3
	p := New(refs)
	model := map[int][]splice.Ref{}
	where := map[splice.Ref]int{}
	for range 50000 {
		r := splice.Ref(1 + rnd.IntN(refs))
		s, c := uint16(rnd.IntN(servers)), Class(rnd.IntN(Classes))
		k := int(s)*Classes + int(c)
		switch rnd.IntN(3) {
		case 0:
			if _, in := where[r]; !in {
				p.Put(s, c, 0, r)
				model[k] = append(model[k], r)
				where[r] = k
			}
		case 1:
			at, in := where[r]
			if p.Remove(r) != in {
				t.Fatal("Remove disagrees")
			}
			if in {
				model[at] = slices.DeleteFunc(model[at], func(x splice.Ref) bool { return x == r })
				delete(where, r)
			}
		case 2:
			got := p.Take(s, c, 0)
			want := splice.Ref(0)
			for _, f := range fallbacks[c] {
				if l := model[int(s)*Classes+int(f)]; len(l) > 0 {
					want = l[len(l)-1]
					model[int(s)*Classes+int(f)] = l[:len(l)-1]
					delete(where, want)
					break
				}
			}
			if got != want {
				t.Fatalf("took %d, want %d", got, want)
			}
		}
		if p.Len() != len(where) {
			t.Fatalf("%d idle, want %d", p.Len(), len(where))
		}
	}
}

func TestPorts(t *testing.T) {
	p := NewPorts(packet.Addr{15: 1}, 100, 104, 10, func(p uint16) bool { return p == 102 })
	if p.Free() != 4 || !p.Has(100) || !p.Has(104) || p.Has(105) || p.Has(99) {
		t.Fatal("the range is wrong")
	}
	for _, want := range []uint16{100, 101, 103, 104, 0} {
		if got := p.Take(0); got != want {
			t.Fatalf("took %d, want %d", got, want)
		}
	}
	p.Put(103, 5, false)
	if got := p.Take(14); got != 0 {
		t.Errorf("a port in quarantine is handed out: %d", got)
	}
	if got := p.Take(15); got != 103 {
		t.Errorf("a rested port is not handed out: %d", got)
	}
	p.Put(104, 20, true)
	if got := p.Take(20); got != 104 {
		t.Errorf("a port that never carried a connection must not rest: %d", got)
	}
}
