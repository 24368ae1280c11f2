// SPDX-License-Identifier: Apache-2.0

package packet_test

import (
	"math/bits"
	"net/netip"
	"testing"
	"unsafe"

	"github.com/weirgate/weir/module/packet"
)

func TestAddr(t *testing.T) {
	for _, c := range []struct {
		in string
		v4 bool
	}{{"203.0.113.10", true}, {"0.0.0.0", true}, {"2001:db8::1", false}, {"::", false}, {"::1", false}} {
		a := netip.MustParseAddr(c.in)
		f := packet.AddrFrom(a)
		if f.Netip() != a || f.Is4() != c.v4 || f.String() != c.in {
			t.Errorf("%s: got %v, Is4 %v", c.in, f, f.Is4())
		}
	}
	if packet.AddrFrom(netip.Addr{}) != (packet.Addr{}) {
		t.Error("the zero netip.Addr must give the zero Addr")
	}
	if packet.AddrFrom(netip.MustParseAddr("::ffff:192.0.2.1")) != packet.AddrFrom(netip.MustParseAddr("192.0.2.1")) {
		t.Error("mapped and plain IPv4 must be one address")
	}
	e := ep("[2001:db8::1]:80")
	if e.String() != "[2001:db8::1]:80" || e.AddrPort() != netip.MustParseAddrPort("[2001:db8::1]:80") {
		t.Errorf("endpoint: %v", e)
	}
	tu := packet.Tuple{Src: ep("198.51.100.1:1"), Dst: e}
	if tu.Reverse().Reverse() != tu || tu.Reverse().Src != e {
		t.Error("Reverse")
	}
}

// TestFlat holds the sizes: flow records contain these types.
func TestFlat(t *testing.T) {
	if s := unsafe.Sizeof(packet.Tuple{}); s != 36 {
		t.Errorf("a Tuple has %d bytes, want 36 without padding", s)
	}
	if s := unsafe.Sizeof(packet.TCP{}); s > 32 {
		t.Errorf("a TCP view has %d bytes, want at most 32", s)
	}
}

// TestHash fills buckets with the tuples that a farm sees, which differ in few
// bits, and looks at how evenly they fall and at how many bits one bit changes.
func TestHash(t *testing.T) {
	const buckets = 1 << 10
	var full [buckets]int
	n := 0
	for host := range 16 {
		for port := range 4096 {
			tu := packet.Tuple{Src: ep("198.51.100.0:0"), Dst: ep("203.0.113.10:80")}
			tu.Src.Addr[15], tu.Src.Port = byte(host), uint16(10240+port)
			full[tu.Hash(1)%buckets]++
			n++
		}
	}
	// Chi square with 1023 degrees of freedom: mean 1023, deviation 45.
	var chi float64
	want := float64(n) / buckets
	for _, c := range full {
		chi += (float64(c) - want) * (float64(c) - want) / want
	}
	if chi > 1023+6*45 {
		t.Errorf("uneven buckets: chi square %.0f", chi)
	}

	r := random(t)
	flips, cases := 0, 0
	for range 500 {
		v6 := r.IntN(2) == 0
		a := packet.Tuple{Src: endpoint(r, v6), Dst: endpoint(r, v6)}
		h := a.Hash(7)
		for _, f := range []func(*packet.Tuple, int){
			func(x *packet.Tuple, b int) { x.Src.Addr[12+b/8] ^= 1 << (b % 8) },
			func(x *packet.Tuple, b int) { x.Dst.Addr[12+b/8] ^= 1 << (b % 8) },
			func(x *packet.Tuple, b int) { x.Src.Port ^= 1 << (b % 16) },
			func(x *packet.Tuple, b int) { x.Dst.Port ^= 1 << (b % 16) },
		} {
			b := a
			f(&b, r.IntN(32))
			d := bits.OnesCount64(h ^ b.Hash(7))
			if d < 8 {
				t.Errorf("one bit of %v changed only %d bits of the hash", a, d)
			}
			flips += d
			cases++
		}
		if a.Hash(8) == h {
			t.Errorf("the seed does not count for %v", a)
		}
		if rev := a.Reverse(); rev != a && rev.Hash(7) == h {
			t.Errorf("both directions of %v have one hash", a)
		}
	}
	if mean := float64(flips) / float64(cases); mean < 30 || mean > 34 {
		t.Errorf("one bit changes %.1f bits on average, want about 32", mean)
	}
}
