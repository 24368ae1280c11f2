// SPDX-License-Identifier: Apache-2.0

package packet_test

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/weirgate/weir/module/packet"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// icmpError builds an ICMP error with right checksums that quotes the first n
// bytes of quoted.
func icmpError(src, dst packet.Addr, typ, code byte, rest uint32, quoted []byte, n int) []byte {
	q := quoted[:min(n, len(quoted))]
	var b []byte
	if src.Is4() {
		b = make([]byte, 20+8+len(q))
		ip := header.IPv4(b)
		ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(b)), TTL: 64, Protocol: 1,
			SrcAddr: tcpip.AddrFrom4Slice(src[12:]), DstAddr: tcpip.AddrFrom4Slice(dst[12:])})
		ip.SetChecksum(^ip.CalculateChecksum())
	} else {
		b = make([]byte, 40+8+len(q))
		header.IPv6(b).Encode(&header.IPv6Fields{PayloadLength: uint16(8 + len(q)), HopLimit: 64,
			TransportProtocol: header.ICMPv6ProtocolNumber,
			SrcAddr:           tcpip.AddrFrom16(src), DstAddr: tcpip.AddrFrom16(dst)})
	}
	m := b[len(b)-8-len(q):]
	m[0], m[1] = typ, code
	binary.BigEndian.PutUint32(m[4:], rest)
	copy(m[8:], q)
	binary.BigEndian.PutUint16(m[2:], refICMP(b))
	return b
}

// refICMP returns the ICMP checksum as gvisor computes it.
func refICMP(b []byte) uint16 {
	if b[0]>>4 == 4 {
		m := bytes.Clone(b[20:])
		m[2], m[3] = 0, 0
		return header.ICMPv4Checksum(m, 0)
	}
	m := bytes.Clone(b[40:])
	m[2], m[3] = 0, 0
	return header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: m,
		Src: tcpip.AddrFromSlice(b[8:24]), Dst: tcpip.AddrFromSlice(b[24:40])})
}

func errorType(r *rand.Rand, v6 bool) byte {
	if v6 {
		return byte(1 + r.IntN(4))
	}
	return []byte{3, 11, 12}[r.IntN(3)]
}

func TestICMPError(t *testing.T) {
	r := random(t)
	for i := range 6000 {
		v6 := i%2 == 1
		quoted := randomSegment(r, v6)
		inner := parse(t, bytes.Clone(quoted))
		ipLen := 20
		if v6 {
			ipLen = 40
		}
		n := ipLen + 8
		if r.IntN(2) == 0 {
			n += r.IntN(300)
		}
		src, dst := endpoint(r, v6).Addr, endpoint(r, v6).Addr
		typ, code := errorType(r, v6), byte(r.IntN(6))
		b := icmpError(src, dst, typ, code, 1280, quoted, n)
		if r.IntN(2) == 0 {
			b = append(b, 0, 0, 0)
		}
		p, prob := packet.ParseICMPError(b)
		if prob != packet.OK {
			t.Fatalf("%v in %x", prob, b)
		}
		if p.V6() != v6 || p.Type() != typ || p.Code() != code || p.OuterSrc() != src || p.OuterDst() != dst ||
			p.Embedded() != inner.Tuple() || p.EmbeddedSeq() != inner.Seq() || !p.VerifyChecksum() {
			t.Fatalf("accessors on %x", b)
		}
		wantMTU := uint32(0)
		if v6 && typ == 2 || !v6 && typ == 3 && code == 4 {
			wantMTU = 1280
		}
		if p.MTU() != wantMTU {
			t.Fatalf("type %d code %d: MTU %d", typ, code, p.MTU())
		}

		newSrc, newDst := endpoint(r, v6).Addr, endpoint(r, v6).Addr
		tu := packet.Tuple{Src: endpoint(r, v6), Dst: endpoint(r, v6)}
		seq := packet.Seq(word(r))
		p.Rewrite(newSrc, newDst, tu, seq)
		if p.OuterSrc() != newSrc || p.OuterDst() != newDst || p.Embedded() != tu || p.EmbeddedSeq() != seq {
			t.Fatalf("fields after Rewrite of %x", b)
		}
		m := p.Raw[ipLen:]
		if binary.BigEndian.Uint16(m[2:]) != refICMP(p.Raw) || !p.VerifyChecksum() {
			t.Fatalf("ICMP checksum after Rewrite of %x", b)
		}
		if !v6 && (!header.IPv4(p.Raw).IsChecksumValid() || !header.IPv4(m[8:]).IsChecksumValid()) {
			t.Fatalf("an IPv4 header checksum after Rewrite of %x", b)
		}
		if n >= len(quoted) {
			// All of it is quoted: its TCP checksum must have come along.
			if q := parse(t, bytes.Clone(m[8:])); !q.VerifyChecksum() {
				t.Fatalf("the quoted TCP checksum after Rewrite of %x", b)
			}
		}
		p.Raw[len(p.Raw)-1] ^= 4
		if p.VerifyChecksum() {
			t.Fatal("a wrong ICMP checksum passes")
		}
	}
}

func TestParseICMPErrorProblems(t *testing.T) {
	seg4 := packet.Segment{Src: ep("203.0.113.10:80"), Dst: ep("198.51.100.1:1025"), Seq: 7, Flags: packet.ACK}
	seg6 := packet.Segment{Src: ep("[2001:db8::10]:80"), Dst: ep("[2001:db8::1]:1025"), Seq: 7, Flags: packet.ACK}
	q4, q6 := packet.AppendSegment(nil, &seg4, nil), packet.AppendSegment(nil, &seg6, nil)
	a4, b4, a6, b6 := ep("198.51.100.9:0").Addr, seg4.Src.Addr, ep("[2001:db8::9]:0").Addr, seg6.Src.Addr
	udp4 := bytes.Clone(q4)
	udp4[9] = 17
	frag, first := bytes.Clone(q4), bytes.Clone(q4)
	frag[7] = 9
	first[6] = 0x20
	opts := append(append(bytes.Clone(q4[:20]), 1, 1, 1, 0), q4[20:]...)
	opts[0] = 0x46
	for _, c := range []struct {
		name string
		b    []byte
		want packet.Problem
	}{
		{"unreachable", icmpError(a4, b4, 3, 1, 0, q4, 28), packet.OK},
		{"v6 too big", icmpError(a6, b6, 2, 0, 1280, q6, 48), packet.OK},
		{"a first fragment quoted", icmpError(a4, b4, 11, 1, 0, first, 28), packet.OK},
		{"IPv4 options quoted", icmpError(a4, b4, 3, 4, 1400, opts, 32), packet.OK},
		{"extension header quoted", icmpError(a6, b6, 2, 0, 1280, insert6(q6, 0, 0), 56), packet.OK},
		{"source quench", icmpError(a4, b4, 4, 0, 0, q4, 28), packet.NotICMPError},
		{"redirect", icmpError(a4, b4, 5, 0, 0, q4, 28), packet.NotICMPError},
		{"echo", icmpError(a4, b4, 8, 0, 0, q4, 28), packet.NotICMPError},
		{"v6 echo", icmpError(a6, b6, 128, 0, 0, q6, 48), packet.NotICMPError},
		{"v6 type 0", icmpError(a6, b6, 0, 0, 0, q6, 48), packet.NotICMPError},
		{"tcp", q4, packet.NotICMP},
		{"v6 tcp", q6, packet.NotICMP},
		{"seven bytes quoted", icmpError(a4, b4, 3, 1, 0, q4, 27), packet.Truncated},
		{"half an IP header quoted", icmpError(a4, b4, 3, 1, 0, q4, 10), packet.Truncated},
		{"half the options quoted", icmpError(a4, b4, 3, 1, 0, opts, 22), packet.Truncated},
		{"half an extension header quoted", icmpError(a6, b6, 1, 0, 0, insert6(q6, 0, 2), 50), packet.Truncated},
		{"nothing quoted", icmpError(a4, b4, 3, 1, 0, nil, 0), packet.NotIP},
		{"udp quoted", icmpError(a4, b4, 3, 1, 0, udp4, 28), packet.NotTCP},
		{"later fragment quoted", icmpError(a4, b4, 3, 1, 0, frag, 28), packet.Fragment},
		{"v6 quoted in v4", icmpError(a4, b4, 3, 1, 0, q6, 48), packet.BadIPHeader},
		{"v4 quoted in v6", icmpError(a6, b6, 1, 1, 0, q4, 28), packet.BadIPHeader},
		{"icmp header cut", icmpError(a4, b4, 3, 1, 0, nil, 0)[:24], packet.Truncated},
		{"not ip", []byte{0}, packet.NotIP},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, got := packet.ParseICMPError(c.b)
			if got != c.want {
				t.Fatalf("got %v, want %v", got, c.want)
			}
			if got == packet.OK && (p.EmbeddedSeq() != 7 || p.Embedded().Src.Port != 80) {
				t.Errorf("embedded %v, seq %d", p.Embedded(), p.EmbeddedSeq())
			}
		})
	}
}
