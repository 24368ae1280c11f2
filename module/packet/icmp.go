// SPDX-License-Identifier: Apache-2.0

package packet

import "encoding/binary"

// Types of ICMP errors.
const (
	ICMP4Unreachable      = 3
	ICMP4SourceQuench     = 4
	ICMP4Redirect         = 5
	ICMP4TimeExceeded     = 11
	ICMP4ParameterProblem = 12

	ICMP6Unreachable      = 1
	ICMP6PacketTooBig     = 2
	ICMP6TimeExceeded     = 3
	ICMP6ParameterProblem = 4

	// ICMP4FragNeeded is the code of ICMP4Unreachable that carries an MTU.
	ICMP4FragNeeded = 4
)

const icmpHeaderLen = 8

// ICMPError is a view of an ICMP error about a TCP segment. Like TCP it owns
// nothing. Raw is the packet, cut to the length that the IP header gives.
type ICMPError struct {
	Raw   []byte
	l4    uint16 // offset of the ICMP header
	inner uint16 // offset of the quoted IP header
	tcp   uint16 // offset of the quoted TCP header, of which at least 8 bytes are there
	v6    bool
}

// ParseICMPError looks at the IP packet b and returns a view of it. It accepts
// the errors of IPv4 of types 3, 11 and 12 and those of IPv6 of types 1 to 4,
// and of these only the ones that quote a TCP segment of the same family, down
// to ports and sequence number. Source quench (RFC 6633) and redirects tell a
// translated flow nothing and are NotICMPError.
func ParseICMPError(b []byte) (ICMPError, Problem) {
	raw, v6, l4, proto, prob := walkIP(b, false)
	if prob != OK {
		return ICMPError{}, prob
	}
	if v6 && proto != protoICMPv6 || !v6 && proto != protoICMP {
		return ICMPError{}, NotICMP
	}
	if l4+icmpHeaderLen > len(raw) {
		return ICMPError{}, Truncated
	}
	if !icmpIsError(v6, raw[l4]) {
		return ICMPError{}, NotICMPError
	}
	inner := l4 + icmpHeaderLen
	quoted, qv6, qoff, qproto, prob := walkIP(raw[inner:], true)
	switch {
	case prob != OK:
		return ICMPError{}, prob
	case qv6 != v6:
		return ICMPError{}, BadIPHeader
	case qproto != protoTCP:
		return ICMPError{}, NotTCP
	case qoff+8 > len(quoted):
		return ICMPError{}, Truncated
	}
	return ICMPError{Raw: raw, v6: v6, l4: uint16(l4), inner: uint16(inner), tcp: uint16(inner + qoff)}, OK
}

func icmpIsError(v6 bool, typ uint8) bool {
	if v6 {
		return typ >= ICMP6Unreachable && typ <= ICMP6ParameterProblem
	}
	return typ == ICMP4Unreachable || typ == ICMP4TimeExceeded || typ == ICMP4ParameterProblem
}

// V6 reports whether the packet is an IPv6 one.
func (p *ICMPError) V6() bool { return p.v6 }

// Type returns the ICMP type.
func (p *ICMPError) Type() uint8 { return p.Raw[p.l4] }

// Code returns the ICMP code.
func (p *ICMPError) Code() uint8 { return p.Raw[p.l4+1] }

// OuterSrc returns who sends the error.
func (p *ICMPError) OuterSrc() Addr {
	if p.v6 {
		return Addr(p.Raw[8:24])
	}
	return addr4(p.Raw[12:16])
}

// OuterDst returns to whom the error goes.
func (p *ICMPError) OuterDst() Addr {
	if p.v6 {
		return Addr(p.Raw[24:40])
	}
	return addr4(p.Raw[16:20])
}

// MTU returns the next hop's MTU in bytes when the error is "fragmentation
// needed" (RFC 1191) or "packet too big" (RFC 8201), and 0 otherwise, or when
// an old router did not fill it in.
func (p *ICMPError) MTU() uint32 {
	h := p.Raw[p.l4:]
	switch {
	case p.v6 && h[0] == ICMP6PacketTooBig:
		return binary.BigEndian.Uint32(h[4:])
	case !p.v6 && h[0] == ICMP4Unreachable && h[1] == ICMP4FragNeeded:
		return uint32(binary.BigEndian.Uint16(h[6:]))
	}
	return 0
}

// Embedded returns the tuple of the quoted segment, in the direction in which
// that was sent.
func (p *ICMPError) Embedded() Tuple {
	q := p.Raw[p.inner:]
	t := Tuple{
		Src: Endpoint{Port: binary.BigEndian.Uint16(p.Raw[p.tcp:])},
		Dst: Endpoint{Port: binary.BigEndian.Uint16(p.Raw[p.tcp+2:])},
	}
	if p.v6 {
		t.Src.Addr, t.Dst.Addr = Addr(q[8:24]), Addr(q[24:40])
	} else {
		t.Src.Addr, t.Dst.Addr = addr4(q[12:16]), addr4(q[16:20])
	}
	return t
}

// EmbeddedSeq returns the sequence number of the quoted segment.
func (p *ICMPError) EmbeddedSeq() Seq { return Seq(binary.BigEndian.Uint32(p.Raw[p.tcp+4:])) }

// sum returns the sum over what the ICMP checksum covers.
func (p *ICMPError) sum() uint16 {
	var initial uint32
	if p.v6 {
		// RFC 4443 section 2.3: ICMPv6 has a pseudo header, ICMP has none.
		initial = pseudo6(p.Raw[8:40], protoICMPv6, len(p.Raw)-int(p.l4))
	}
	return Fold(Sum(p.Raw[p.l4:], initial))
}

// VerifyChecksum reports whether the ICMP checksum and, for IPv4, that of the
// outer header are right.
func (p *ICMPError) VerifyChecksum() bool {
	return p.sum() == 0xffff && (p.v6 || ip4HeaderOK(p.Raw))
}

// Rewrite maps the error onto another connection, in place: the outer
// addresses, and in the quoted segment addresses, ports and sequence number
// (a Linux host ignores errors whose quoted number is outside its window). The
// checksums of the quoted headers, where they are quoted, are updated
// incrementally, the ICMP checksum is computed afresh: verify it before.
// All addresses must be of the packet's family.
func (p *ICMPError) Rewrite(outerSrc, outerDst Addr, embedded Tuple, embeddedSeq Seq) {
	q := p.Raw[p.inner:]
	var diff uint64
	if p.v6 {
		copy(p.Raw[8:24], outerSrc[:])
		copy(p.Raw[24:40], outerDst[:])
		diff = change128(q[8:24], &embedded.Src.Addr) + change128(q[24:40], &embedded.Dst.Addr)
	} else {
		rewrite4(p.Raw, &outerSrc, &outerDst)
		diff = rewrite4(q, &embedded.Src.Addr, &embedded.Dst.Addr)
	}
	t := p.Raw[p.tcp:]
	ports := uint32(embedded.Src.Port)<<16 | uint32(embedded.Dst.Port)
	diff += uint64(^binary.BigEndian.Uint32(t)) + uint64(ports) +
		uint64(^binary.BigEndian.Uint32(t[4:])) + uint64(embeddedSeq)
	binary.BigEndian.PutUint32(t, ports)
	binary.BigEndian.PutUint32(t[4:], uint32(embeddedSeq))
	// RFC 5508 section 4.2: routers that quote more than 8 bytes quote the
	// TCP checksum too. It is only a quotation, so a wrong one stays wrong.
	if len(t) >= 18 {
		binary.BigEndian.PutUint16(t[16:], adjust(binary.BigEndian.Uint16(t[16:]), diff))
	}
	c := p.Raw[p.l4+2:]
	binary.BigEndian.PutUint16(c, 0)
	binary.BigEndian.PutUint16(c, ^p.sum())
}

// rewrite4 writes both addresses of the IPv4 header at the start of b, updates
// its checksum and returns the sum of all ~m + m'.
func rewrite4(b []byte, src, dst *Addr) uint64 {
	a := b[10:20]
	ns, nd := binary.BigEndian.Uint32(src[12:]), binary.BigEndian.Uint32(dst[12:])
	diff := uint64(^binary.BigEndian.Uint32(a[2:])) + uint64(ns) +
		uint64(^binary.BigEndian.Uint32(a[6:])) + uint64(nd)
	binary.BigEndian.PutUint32(a[2:], ns)
	binary.BigEndian.PutUint32(a[6:], nd)
	binary.BigEndian.PutUint16(a, adjust(binary.BigEndian.Uint16(a), diff))
	return diff
}
