// SPDX-License-Identifier: Apache-2.0

package packet_test

import (
	"bytes"
	"testing"

	"github.com/weirgate/weir/module/packet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func TestAppendSegment(t *testing.T) {
	r := random(t)
	for i := range 4000 {
		v6 := i%2 == 1
		payload := make([]byte, r.IntN(1600))
		fill(r, payload)
		s := packet.Segment{
			Src: endpoint(r, v6), Dst: endpoint(r, v6), Seq: packet.Seq(word(r)), Ack: packet.Seq(word(r)),
			Flags: packet.ACK | packet.PSH, Window: uint16(word(r)), Options: randomOptions(r),
			TTL: uint8(r.IntN(256)), IPID: uint16(word(r)), ClearDF: r.IntN(2) == 0,
		}
		prefix := []byte("before")
		out := packet.AppendSegment(prefix, &s, payload)
		if !bytes.Equal(out[:6], []byte("before")) {
			t.Fatal("what was there is gone")
		}
		b := out[6:]
		p := parse(t, b)
		if len(p.Raw) != len(b) || p.Tuple() != (packet.Tuple{Src: s.Src, Dst: s.Dst}) || p.Seq() != s.Seq ||
			p.Ack() != s.Ack || p.Flags() != s.Flags || p.Window() != s.Window ||
			!bytes.Equal(p.Options(), s.Options) || !bytes.Equal(p.Payload(), payload) {
			t.Fatalf("%+v came out as %x", s, b)
		}
		ttl := s.TTL
		if ttl == 0 {
			ttl = 64
		}
		if p.TTL() != ttl || !p.VerifyChecksum() || !p.IPHeaderOK() {
			t.Fatalf("ttl %d, checksums %v %v", p.TTL(), p.VerifyChecksum(), p.IPHeaderOK())
		}
		if _, _, _, full := refTCP(b); p.Checksum() != full {
			t.Fatalf("checksum %#04x, want %#04x", p.Checksum(), full)
		}
		if v6 {
			if ip := header.IPv6(b); !ip.IsValid(len(b)) {
				t.Fatal("gvisor finds the IPv6 header invalid")
			}
			continue
		}
		ip := header.IPv4(b)
		if !ip.IsValid(len(b)) || !ip.IsChecksumValid() || ip.ID() != s.IPID ||
			ip.Flags()&header.IPv4FlagDontFragment != 0 == s.ClearDF {
			t.Fatalf("IPv4 header %x", b[:20])
		}
	}
}

// TestAppendSegmentReusesDirtyBuffer: nothing of what the buffer held before
// comes through.
func TestAppendSegmentReusesDirtyBuffer(t *testing.T) {
	for _, s := range []packet.Segment{
		{Src: ep("198.51.100.1:1"), Dst: ep("203.0.113.1:2"), Flags: packet.ACK},
		{Src: ep("[2001:db8::1]:1"), Dst: ep("[2001:db8::2]:2"), Flags: packet.ACK},
	} {
		clean := packet.AppendSegment(nil, &s, []byte("hello"))
		dirty := bytes.Repeat([]byte{0xee}, 200)
		if got := packet.AppendSegment(dirty[:0], &s, []byte("hello")); !bytes.Equal(got, clean) {
			t.Errorf("%x\nwant %x", got, clean)
		}
	}
}
