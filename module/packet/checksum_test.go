// SPDX-License-Identifier: Apache-2.0

package packet_test

import (
	"encoding/binary"
	"testing"

	"github.com/weirgate/weir/module/packet"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// naive is RFC 1071 word by word.
func naive(b []byte, initial uint32) uint16 {
	s := uint64(initial)
	for i := 0; i+1 < len(b); i += 2 {
		s += uint64(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		s += uint64(b[len(b)-1]) << 8
	}
	for s>>16 != 0 {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

func TestSum(t *testing.T) {
	r := random(t)
	buf := make([]byte, 4096+16)
	for n := range 400 {
		for _, kind := range []string{"random", "zero", "ones"} {
			off := r.IntN(16)
			b := buf[off : off+n]
			switch kind {
			case "random":
				fill(r, b)
			case "zero":
				clear(b)
			case "ones":
				for i := range b {
					b[i] = 0xff
				}
			}
			initial := word(r)
			got, want := packet.Fold(packet.Sum(b, initial)), naive(b, initial)
			// Two forms of zero: the fast sum keeps them apart as the slow one
			// does, because a computed checksum must come out identical.
			if got != want {
				t.Fatalf("%d bytes %s, initial %#x: %#04x, want %#04x", n, kind, initial, got, want)
			}
			if ref := checksum.Checksum(b, uint16(naive(nil, initial))); ref != got {
				t.Fatalf("%d bytes %s: gvisor %#04x, ours %#04x", n, kind, ref, got)
			}
		}
	}
	// In two parts, the first one even.
	fill(r, buf)
	for i := 0; i < 200; i += 2 {
		whole := packet.Fold(packet.Sum(buf[:999], 0))
		if got := packet.Fold(packet.Sum(buf[i:999], packet.Sum(buf[:i], 0))); got != whole {
			t.Fatalf("parts at %d: %#x, want %#x", i, got, whole)
		}
	}
}

// TestUpdate changes one value of a text and compares with a whole
// computation, many of the values being 0 and 0xffff.
func TestUpdate(t *testing.T) {
	r := random(t)
	for range 50000 {
		b := make([]byte, 8+2*r.IntN(12))
		fill(r, b)
		if r.IntN(3) == 0 {
			clear(b)
		}
		b[0] = 0x45 // what is summed is never all zero
		check := ^naive(b, 0)
		old, now := word(r), word(r)
		switch r.IntN(3) {
		case 0:
			i := 2 + 2*r.IntN(len(b)/2-1)
			binary.BigEndian.PutUint16(b[i:], uint16(old))
			check = ^naive(b, 0)
			binary.BigEndian.PutUint16(b[i:], uint16(now))
			check = packet.Update16(check, uint16(old), uint16(now))
		case 1:
			i := 2 + 2*r.IntN(len(b)/2-2)
			binary.BigEndian.PutUint32(b[i:], old)
			check = ^naive(b, 0)
			binary.BigEndian.PutUint32(b[i:], now)
			check = packet.Update32(check, old, now)
		case 2:
			i := 1 + 2*r.IntN(len(b)/2-2)
			binary.BigEndian.PutUint32(b[i:], old)
			check = ^naive(b, 0)
			binary.BigEndian.PutUint32(b[i:], now)
			check = packet.Update32Odd(check, old, now)
		}
		if want := ^naive(b, 0); check != want {
			t.Fatalf("%#x -> %#x in %x: %#04x, want %#04x", old, now, b, check, want)
		}
	}
}

// TestUpdateTrap is the example of RFC 1624 section 4: HC = 0xDD2F, m = 0x5555,
// m' = 0x3285. The equation of RFC 1141 gives 0xFFFF, the right value is 0.
func TestUpdateTrap(t *testing.T) {
	if got := packet.Update16(0xdd2f, 0x5555, 0x3285); got != 0 {
		t.Errorf("got %#04x, want 0x0000", got)
	}
	// The negative control: the older equation, HC' = HC + m + ~m'.
	rfc1141 := func(hc, m, n uint16) uint16 { return packet.Fold(uint32(hc) + uint32(m) + uint32(^n)) }
	if got := rfc1141(0xdd2f, 0x5555, 0x3285); got != 0xffff {
		t.Errorf("the old equation should fall into the trap, got %#04x", got)
	}
	// A sender's unusual zero is corrected.
	if got := packet.Update16(0xffff, 0xffff, 0); got != 0 {
		t.Errorf("from 0xffff: got %#04x, want 0x0000", got)
	}
}
