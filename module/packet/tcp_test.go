// SPDX-License-Identifier: Apache-2.0

package packet_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/weirgate/weir/module/packet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func TestAccessorsAgainstReference(t *testing.T) {
	r := random(t)
	for i := range 4000 {
		v6 := i%2 == 1
		b := randomSegment(r, v6)
		padded := append(bytes.Clone(b), 0, 0, 0, 0, 0, 0)
		p := parse(t, padded)
		ref, src, dst, _ := refTCP(b)
		if len(p.Raw) != len(b) || p.V6() != v6 {
			t.Fatalf("Raw has %d bytes, want %d without padding", len(p.Raw), len(b))
		}
		if !bytes.Equal(p.Src().Addr.Netip().AsSlice(), src.AsSlice()) ||
			!bytes.Equal(p.Dst().Addr.Netip().AsSlice(), dst.AsSlice()) ||
			p.Src().Port != ref.SourcePort() || p.Dst().Port != ref.DestinationPort() ||
			p.Tuple() != (packet.Tuple{Src: p.Src(), Dst: p.Dst()}) {
			t.Fatalf("endpoints %v", p.Tuple())
		}
		if uint32(p.Seq()) != ref.SequenceNumber() || uint32(p.Ack()) != ref.AckNumber() ||
			uint8(p.Flags()) != uint8(ref.Flags()) || p.Window() != ref.WindowSize() ||
			p.Urgent() != binary.BigEndian.Uint16(ref[18:]) || p.Checksum() != ref.Checksum() {
			t.Fatalf("fields of %x", b)
		}
		if !bytes.Equal(p.Payload(), ref.Payload()) || p.PayloadLen() != len(ref.Payload()) ||
			!bytes.Equal(p.Options(), ref.Options()) || p.HeaderLen() != len(b)-len(ref.Payload()) {
			t.Fatalf("lengths of %x", b)
		}
		end := ref.SequenceNumber() + uint32(len(ref.Payload()))
		if p.Flags().Has(packet.FIN) {
			end++
		}
		if uint32(p.End()) != end {
			t.Fatalf("End %d, want %d", p.End(), end)
		}
		ttl := b[8]
		if v6 {
			ttl = b[7]
		}
		if p.TTL() != ttl || !p.IPHeaderOK() || !p.VerifyChecksum() {
			t.Fatalf("ttl, checksums of %x", b)
		}
	}
}

func TestEndCountsSYN(t *testing.T) {
	s := packet.Segment{Src: ep("198.51.100.1:1"), Dst: ep("203.0.113.1:2"), Seq: 0xffffffff, Flags: packet.SYN}
	p := parse(t, packet.AppendSegment(nil, &s, nil))
	if p.End() != 0 {
		t.Errorf("End %d, want 0", p.End())
	}
}

func TestVerifyChecksumSeesEveryBit(t *testing.T) {
	r := random(t)
	for i := range 60 {
		b := randomSegment(r, i%2 == 1)
		p := parse(t, b)
		start := 12
		if p.V6() {
			start = 8
		}
		for bit := start * 8; bit < len(b)*8; bit++ {
			b[bit/8] ^= 1 << (bit % 8)
			if p.VerifyChecksum() {
				t.Fatalf("bit %d of %x was flipped and nobody saw it", bit, b)
			}
			b[bit/8] ^= 1 << (bit % 8)
		}
		if !p.V6() {
			b[8] ^= 1
			if p.IPHeaderOK() {
				t.Fatal("a wrong IPv4 header checksum passes")
			}
		}
	}
}

// TestRewrite compares the incremental update with a whole computation by
// gvisor, on random packets whose words are often 0 and 0xffff.
func TestRewrite(t *testing.T) {
	r := random(t)
	for i := range 20000 {
		b := randomSegment(r, i%2 == 1)
		p := parse(t, b)
		payload, options, offset := bytes.Clone(p.Payload()), bytes.Clone(p.Options()), b[p.HeaderLen()-len(p.Options())-8]
		urgent := p.Urgent()
		rw := packet.Rewrite{
			Src: endpoint(r, p.V6()), Dst: endpoint(r, p.V6()), Seq: packet.Seq(word(r)), Ack: packet.Seq(word(r)),
			Window: uint16(word(r)), Flags: packet.Flags(r.Uint32()), ClearUrgent: r.IntN(2) == 0,
		}
		if rw.ClearUrgent {
			urgent = 0
		}
		st := packet.ChecksumVerified
		if r.IntN(2) == 0 {
			st = packet.ChecksumUnknown
		}
		p.Rewrite(&rw, st)
		_, _, _, want := refTCP(b)
		if p.Checksum() != want {
			t.Fatalf("checksum %#04x, want %#04x after %+v", p.Checksum(), want, rw)
		}
		if !p.V6() && !header.IPv4(b).IsChecksumValid() {
			t.Fatalf("IPv4 header checksum after %+v", rw)
		}
		if p.Tuple() != (packet.Tuple{Src: rw.Src, Dst: rw.Dst}) || p.Seq() != rw.Seq || p.Ack() != rw.Ack ||
			p.Window() != rw.Window || p.Flags() != rw.Flags || p.Urgent() != urgent {
			t.Fatalf("fields after %+v", rw)
		}
		if !bytes.Equal(p.Payload(), payload) || !bytes.Equal(p.Options(), options) ||
			b[p.HeaderLen()-len(p.Options())-8] != offset {
			t.Fatal("something else was changed")
		}
	}
}

// TestRewriteKeepsWrongChecksumWrong: an update must not launder corruption.
func TestRewriteKeepsWrongChecksumWrong(t *testing.T) {
	r := random(t)
	for i := range 2000 {
		b := randomSegment(r, i%2 == 1)
		b[len(b)-1] ^= 0x10
		p, _ := packet.ParseTCP(b)
		if p.VerifyChecksum() {
			t.Fatal("the corruption was not seen before")
		}
		rw := randomRewriteFor(r.Uint64(), &p)
		p.Rewrite(&rw, packet.ChecksumUnknown)
		if p.VerifyChecksum() {
			t.Fatalf("the rewrite made a corrupt packet look right")
		}
	}
}

func randomRewriteFor(n uint64, p *packet.TCP) packet.Rewrite {
	rw := packet.Rewrite{Src: p.Dst(), Dst: p.Src(), Seq: packet.Seq(n), Ack: packet.Seq(n >> 32), Window: uint16(n >> 7), Flags: packet.ACK}
	rw.Src.Port ^= uint16(n)
	return rw
}

func TestPartialChecksum(t *testing.T) {
	r := random(t)
	for i := range 4000 {
		b := randomSegment(r, i%2 == 1)
		p := parse(t, b)
		p.FillPartial()
		_, src, dst, _ := refTCP(b)
		n := len(b) - (p.HeaderLen() - len(p.Options()) - 20)
		if want := header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, uint16(n)); p.Checksum() != want {
			t.Fatalf("FillPartial: %#04x, gvisor's pseudo header sum %#04x", p.Checksum(), want)
		}
		rw := randomRewriteFor(r.Uint64(), &p)
		p.Rewrite(&rw, packet.ChecksumPartial)
		p.SetWindow(77, packet.ChecksumPartial)
		if off, m := p.SACK(); m > 0 {
			p.SetSACKBlock(off, 0, packet.SACKBlock{Left: 1, Right: 2}, packet.ChecksumPartial)
		}
		p.StripSACK(packet.ChecksumPartial)
		_, src, dst, full := refTCP(b)
		if want := header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, uint16(n)); p.Checksum() != want {
			t.Fatalf("after Rewrite: %#04x, want the pseudo header sum %#04x", p.Checksum(), want)
		}
		// What the kernel or a card does with it: add the segment, complement.
		if got := ^packet.Fold(packet.Sum(b[len(b)-n:], 0)); got != full {
			t.Fatalf("finished by hardware: %#04x, want %#04x", got, full)
		}
		p.FillChecksum()
		if p.Checksum() != full || !p.VerifyChecksum() {
			t.Fatalf("FillChecksum: %#04x, want %#04x", p.Checksum(), full)
		}
	}
}

func TestSetters(t *testing.T) {
	r := random(t)
	for i := range 8000 {
		b := randomSegment(r, i%2 == 1)
		p := parse(t, b)
		n := word(r)
		var what string
		var ok bool
		switch i / 2 % 5 {
		case 0:
			what = "seq"
			p.SetSeq(packet.Seq(n), packet.ChecksumVerified)
			ok = p.Seq() == packet.Seq(n)
		case 1:
			what = "ack"
			p.SetAck(packet.Seq(n), packet.ChecksumVerified)
			ok = p.Ack() == packet.Seq(n)
		case 2:
			what = "window"
			p.SetWindow(uint16(n), packet.ChecksumUnknown)
			ok = p.Window() == uint16(n)
		case 3:
			what = "flags"
			p.SetFlags(packet.Flags(n), packet.ChecksumVerified)
			ok = p.Flags() == packet.Flags(n)
		case 4:
			what = "df"
			was := bytes.Clone(b)
			p.ClearDF(uint16(n))
			ok = p.V6() && bytes.Equal(b, was) || !p.V6() && header.IPv4(b).Flags()&header.IPv4FlagDontFragment == 0 &&
				header.IPv4(b).ID() == uint16(n) && header.IPv4(b).IsChecksumValid()
		}
		if _, _, _, want := refTCP(b); !ok || p.Checksum() != want {
			t.Fatalf("%s = %#x: checksum %#04x, want %#04x", what, n, p.Checksum(), want)
		}
	}
}

// insert6 puts an extension header of the given kind, 8*(n+1) bytes long,
// behind the fixed header of an IPv6 packet.
func insert6(b []byte, kind, n byte) []byte {
	ext := make([]byte, 8*(int(n)+1))
	ext[0], ext[1] = b[6], n
	c := append(bytes.Clone(b[:40]), ext...)
	c = append(c, b[40:]...)
	c[6] = kind
	binary.BigEndian.PutUint16(c[4:], uint16(len(c)-40))
	return c
}

func TestParseTCPProblems(t *testing.T) {
	seg4 := packet.Segment{Src: ep("198.51.100.1:1025"), Dst: ep("203.0.113.10:80"), Seq: 7, Ack: 9, Flags: packet.ACK}
	seg6 := packet.Segment{Src: ep("[2001:db8::1]:1025"), Dst: ep("[2001:db8::10]:80"), Seq: 7, Ack: 9, Flags: packet.ACK}
	v4 := packet.AppendSegment(nil, &seg4, []byte("x"))
	v6 := packet.AppendSegment(nil, &seg6, []byte("x"))
	opt := func(o ...byte) []byte {
		s := seg4
		s.Options = o
		return packet.AppendSegment(nil, &s, nil)
	}
	flags := func(f packet.Flags, payload string) []byte {
		s := seg4
		s.Flags = f
		return packet.AppendSegment(nil, &s, []byte(payload))
	}
	with := func(b []byte, at int, v ...byte) []byte {
		c := bytes.Clone(b)
		copy(c[at:], v)
		return c
	}
	routing := insert6(v6, 43, 0)
	routing[40+3] = 1
	endless := v6
	for range 20 {
		endless = insert6(endless, 60, 15)
	}
	ip4opts := append(append(bytes.Clone(v4[:20]), 1, 1, 1, 0), v4[20:]...)
	ip4opts[0], ip4opts[3] = 0x46, byte(len(ip4opts))

	for _, c := range []struct {
		name string
		b    []byte
		want packet.Problem
	}{
		{"ipv4", v4, packet.OK},
		{"ipv6", v6, packet.OK},
		{"ipv4 with options", ip4opts, packet.OK},
		{"ipv6 hop-by-hop", insert6(v6, 0, 0), packet.OK},
		{"ipv6 hop-by-hop, destination, routing used up", insert6(insert6(insert6(v6, 43, 2), 60, 1), 0, 0), packet.OK},
		{"nothing", nil, packet.NotIP},
		{"version 5", with(v4, 0, 0x55), packet.NotIP},
		{"one byte of ipv4", v4[:1], packet.Truncated},
		{"one byte of ipv6", v6[:1], packet.Truncated},
		{"ipv4 cut", v4[:len(v4)-1], packet.Truncated},
		{"ipv6 cut", v6[:len(v6)-1], packet.Truncated},
		{"ipv4 header length 4", with(v4, 0, 0x44), packet.BadIPHeader},
		{"ipv4 total length 0", with(v4, 2, 0, 0), packet.BadIPHeader},
		{"ipv4 total length within TCP header", with(v4, 3, 39), packet.Truncated},
		{"ipv6 payload length 0", with(v6, 4, 0, 0), packet.Truncated},
		{"ipv6 mapped source", with(v6, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff), packet.BadIPHeader},
		{"ipv6 mapped destination", with(v6, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff), packet.BadIPHeader},
		{"ipv6 routing header in use", routing, packet.BadIPHeader},
		{"ipv6 endless headers", endless, packet.BadIPHeader},
		{"ipv6 header beyond the packet", with(insert6(v6, 0, 0), 41, 9), packet.Truncated},
		{"ipv6 nothing behind the header", with(v6, 5, 4), packet.Truncated},
		{"ipv4 first fragment", with(v4, 6, 0x20), packet.Fragment},
		{"ipv4 later fragment", with(v4, 6, 0, 1), packet.Fragment},
		{"ipv6 fragment", insert6(v6, 44, 0), packet.Fragment},
		{"ipv4 udp", with(v4, 9, 17), packet.NotTCP},
		{"ipv6 udp", with(v6, 6, 17), packet.NotTCP},
		{"ipv6 esp", with(v6, 6, 50), packet.NotTCP},
		{"data offset 4", with(v4, 32, 0x40), packet.BadDataOffset},
		{"data offset beyond", with(v4, 32, 0x60), packet.BadDataOffset},
		{"option of length 0", opt(9, 0, 1, 1), packet.BadOptions},
		{"option of length 1", opt(9, 1, 1, 1), packet.BadOptions},
		{"option beyond", opt(9, 5, 1, 1), packet.BadOptions},
		{"option without length", opt(1, 1, 1, 9), packet.BadOptions},
		{"anything behind the end", opt(0, 9, 0, 9), packet.OK},
		{"unknown option", opt(254, 4, 1, 2), packet.OK},
		{"SACK without blocks", opt(5, 2, 1, 1), packet.BadOptions},
		{"SACK with half a block", opt(5, 6, 0, 0, 0, 0, 1, 1), packet.BadOptions},
		{"two SACKs", opt(append(bytes.Repeat([]byte{5, 10, 0, 0, 0, 0, 0, 0, 0, 0}, 2), 1, 1, 1, 1)...), packet.BadOptions},
		{"no flag", flags(0, ""), packet.NullFlags},
		{"only ECE and CWR", flags(packet.ECE|packet.CWR, ""), packet.NullFlags},
		{"SYN and FIN", flags(packet.SYN|packet.FIN, ""), packet.SYNFIN},
		{"SYN, FIN and ACK", flags(packet.SYN|packet.FIN|packet.ACK, ""), packet.SYNFIN},
		{"SYN with ECN", flags(packet.SYN|packet.ECE|packet.CWR, ""), packet.OK},
		{"data without ACK", flags(packet.PSH, "x"), packet.DataWithoutACK},
		{"data in a SYN", flags(packet.SYN, "x"), packet.DataWithoutACK},
		{"data in a SYN-ACK", flags(packet.SYN|packet.ACK, "x"), packet.OK},
		{"bare RST", flags(packet.RST, ""), packet.OK},
		{"FIN without ACK", flags(packet.FIN, ""), packet.OK},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, got := packet.ParseTCP(c.b)
			if got != c.want {
				t.Fatalf("got %v, want %v", got, c.want)
			}
			if got == packet.OK && p.Dst().Port != 80 {
				t.Errorf("port %d, want 80", p.Dst().Port)
			}
		})
	}
}

// TestExtensionHeadersRewrite: the checksums of packets with IPv4 options and
// IPv6 extension headers are those of packets without.
func TestExtensionHeadersRewrite(t *testing.T) {
	r := random(t)
	for range 200 {
		b := randomSegment(r, true)
		c := insert6(insert6(b, 60, byte(r.IntN(3))), 0, 0)
		p, q := parse(t, b), parse(t, c)
		if !q.VerifyChecksum() || q.Tuple() != p.Tuple() || q.HeaderLen() <= p.HeaderLen() {
			t.Fatal("extension headers change what is seen")
		}
		rw := randomRewriteFor(r.Uint64(), &p)
		p.Rewrite(&rw, packet.ChecksumVerified)
		q.Rewrite(&rw, packet.ChecksumVerified)
		if !q.VerifyChecksum() || q.Checksum() != p.Checksum() {
			t.Fatal("extension headers change the checksum")
		}
	}
}

func TestNames(t *testing.T) {
	seen := map[string]bool{}
	for p := packet.OK; p < packet.ProblemCount; p++ {
		if s := p.String(); s == "" || seen[s] {
			t.Errorf("problem %d has the name %q", p, s)
		} else {
			seen[s] = true
		}
	}
	for f, want := range map[packet.Flags]string{0: "-", packet.SYN: "S", packet.SYN | packet.ACK: "S.", packet.FIN | packet.PSH | packet.ACK: "FP.", 255: "FSRP.UEW"} {
		if f.String() != want {
			t.Errorf("%08b: %q, want %q", f, f.String(), want)
		}
	}
	if s := fmt.Sprint(packet.ChecksumUnknown, packet.ChecksumVerified, packet.ChecksumPartial, packet.ChecksumState(9), packet.Problem(99)); s != "unknown verified partial invalid invalid" {
		t.Error(s)
	}
}
