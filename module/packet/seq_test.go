// SPDX-License-Identifier: Apache-2.0

package packet_test

import (
	"testing"

	"github.com/weirgate/weir/module/packet"
	"gvisor.dev/gvisor/pkg/tcpip/seqnum"
)

func TestSeqAgainstReference(t *testing.T) {
	r := random(t)
	for range 20000 {
		a, b, n := packet.Seq(word(r)), packet.Seq(word(r)), packet.Size(word(r))
		ra, rb := seqnum.Value(a), seqnum.Value(b)
		if a.Less(b) != ra.LessThan(rb) || a.LessEq(b) != ra.LessThanEq(rb) {
			t.Fatalf("%d %d: Less %v LessEq %v", a, b, a.Less(b), a.LessEq(b))
		}
		if uint32(a.Add(n)) != uint32(ra.Add(seqnum.Size(n))) || a.Add(n).Sub(n) != a {
			t.Fatalf("%d + %d", a, n)
		}
		if a.To(a.Add(n)) != n {
			t.Fatalf("To: %d + %d", a, n)
		}
		c := packet.Seq(word(r))
		if c.In(a, b) != seqnum.Value(c).InRange(ra, rb) {
			t.Fatalf("In: %d in [%d,%d) = %v", c, a, b, c.In(a, b))
		}
		d := a.DeltaTo(b)
		if a.Shift(d) != b || b.Unshift(d) != a {
			t.Fatalf("delta %d %d %d", a, b, d)
		}
		hi, lo := packet.MaxSeq(a, b), packet.MinSeq(a, b)
		// Places exactly 2^31 apart are each before the other; nothing else is
		// asked of them than that one of the two comes out.
		if a-b != 1<<31 && (hi.Less(lo) || hi+lo != a+b) {
			t.Fatalf("max %d min %d of %d %d", hi, lo, a, b)
		}
	}
}

func TestSeqWraps(t *testing.T) {
	const top = packet.Seq(0xffffffff)
	if !top.Less(0) || packet.Seq(0).Less(top) || top.Add(1) != 0 || packet.Seq(0).Sub(1) != top {
		t.Error("0xffffffff is before 0")
	}
	if packet.MaxSeq(top, 5) != 5 || packet.MinSeq(top, 5) != top {
		t.Error("5 is the later one")
	}
	if !packet.Seq(2).In(top, 3) || packet.Seq(3).In(top, 3) || packet.Seq(7).In(7, 7) {
		t.Error("In across the wrap")
	}
	if top.To(4) != 5 {
		t.Error("5 places from 0xffffffff up to 4")
	}
}
