// SPDX-License-Identifier: Apache-2.0

package packet

import "encoding/binary"

// Problem says why a packet was refused. OK means that it was not.
type Problem uint8

const (
	// OK: the packet may be used.
	OK Problem = iota
	// Truncated: the packet is shorter than its headers say.
	Truncated
	// NotIP: the first nibble is neither 4 nor 6, or nothing is there.
	NotIP
	// BadIPHeader: a header length that cannot be, an IPv6 packet with
	// IPv4-mapped addresses, a routing header with segments left (the
	// destination is not the final one, so it cannot be translated), or an
	// endless chain of extension headers.
	BadIPHeader
	// Fragment: a fragment, which the kernel should have reassembled.
	Fragment
	// NotTCP: another protocol.
	NotTCP
	// BadDataOffset: the TCP header is shorter than 20 bytes or longer than
	// the segment.
	BadDataOffset
	// BadOptions: an option's length is below 2 or reaches beyond the header,
	// a SACK option's length is none that RFC 2018 allows, or there are two
	// SACK options, of which a receiver might read the one that we did not
	// translate.
	BadOptions
	// NullFlags: none of FIN, SYN, RST, PSH, ACK, URG.
	NullFlags
	// SYNFIN: SYN together with FIN.
	SYNFIN
	// DataWithoutACK: payload in a segment without ACK, a SYN included.
	DataWithoutACK
	// NotICMP: not ICMP for IPv4, not ICMPv6 for IPv6.
	NotICMP
	// NotICMPError: an ICMP message that is no error, or one that RFC 6633 or
	// RFC 1122 tell a host not to heed (source quench, redirect).
	NotICMPError

	// ProblemCount is the number of Problems, for tables of counters.
	ProblemCount
)

var problemNames = [ProblemCount]string{
	OK: "ok", Truncated: "truncated", NotIP: "not-ip", BadIPHeader: "bad-ip-header",
	Fragment: "fragment", NotTCP: "not-tcp", BadDataOffset: "bad-data-offset",
	BadOptions: "bad-options", NullFlags: "null-flags", SYNFIN: "syn-fin",
	DataWithoutACK: "data-without-ack", NotICMP: "not-icmp", NotICMPError: "not-icmp-error",
}

// String returns a name that serves as a counter's label.
func (p Problem) String() string {
	if p < ProblemCount {
		return problemNames[p]
	}
	return "invalid"
}

// Protocol numbers of IP.
const (
	protoHopByHop    = 0
	protoICMP        = 1
	protoTCP         = 6
	protoRouting     = 43
	protoFragment    = 44
	protoICMPv6      = 58
	protoDestination = 60
)

const (
	ip4MinLen = 20
	ip6Len    = 40
	tcpMinLen = 20
	// maxL4 bounds the IPv6 extension headers: more than this is nothing that
	// a TCP sends, and offsets fit 16 bits.
	maxL4 = 2048
)

// walkIP finds what follows the IP headers of b. raw is b cut to the packet's
// own length, l4 the offset of the upper header in it, proto its protocol.
// With quote, b is the beginning of a packet quoted by an ICMP error: it may
// be shorter than its length field says, which must be read as the length of
// what was sent, not of what is quoted.
func walkIP(b []byte, quote bool) (raw []byte, v6 bool, l4 int, proto uint8, prob Problem) {
	if len(b) == 0 {
		return b, false, 0, 0, NotIP
	}
	switch b[0] >> 4 {
	case 4:
		return walkIP4(b, quote)
	case 6:
		return walkIP6(b, quote)
	}
	return b, false, 0, 0, NotIP
}

func walkIP4(b []byte, quote bool) (raw []byte, v6 bool, l4 int, proto uint8, prob Problem) {
	if len(b) < ip4MinLen {
		return b, false, 0, 0, Truncated
	}
	l4 = int(b[0]&0x0f) * 4
	total := int(binary.BigEndian.Uint16(b[2:]))
	if l4 < ip4MinLen || total < l4 {
		return b, false, 0, 0, BadIPHeader
	}
	if total > len(b) {
		if !quote || l4 > len(b) {
			return b, false, 0, 0, Truncated
		}
		total = len(b)
	}
	proto = b[9]
	// A quoted first fragment still names its connection; a later one does
	// not.
	frag := binary.BigEndian.Uint16(b[6:])
	if frag&0x1fff != 0 || (frag&0x2000 != 0 && !quote) {
		return b[:total], false, l4, proto, Fragment
	}
	return b[:total], false, l4, proto, OK
}

func walkIP6(b []byte, quote bool) (raw []byte, v6 bool, l4 int, proto uint8, prob Problem) {
	if len(b) < ip6Len {
		return b, true, 0, 0, Truncated
	}
	total := ip6Len + int(binary.BigEndian.Uint16(b[4:]))
	if total > len(b) {
		if !quote {
			return b, true, 0, 0, Truncated
		}
		total = len(b)
	}
	raw = b[:total]
	if mapped(b[8:24]) || mapped(b[24:40]) {
		return raw, true, 0, 0, BadIPHeader
	}
	proto, l4 = b[6], ip6Len
	for {
		switch proto {
		case protoHopByHop, protoDestination, protoRouting:
			if l4+8 > total {
				return raw, true, l4, proto, Truncated
			}
			if proto == protoRouting && raw[l4+3] != 0 {
				return raw, true, l4, proto, BadIPHeader
			}
			proto, l4 = raw[l4], l4+8+int(raw[l4+1])*8
			if l4 > maxL4 {
				return raw, true, l4, proto, BadIPHeader
			}
			if l4 > total {
				return raw, true, l4, proto, Truncated
			}
		case protoFragment:
			return raw, true, l4, proto, Fragment
		default:
			return raw, true, l4, proto, OK
		}
	}
}

// mapped reports whether the 16 bytes are an IPv4-mapped IPv6 address, which
// must not appear on a wire (RFC 4291 section 2.5.5.2, RFC 8504) and would be
// taken for an IPv4 one by Addr.
func mapped(b []byte) bool {
	return binary.BigEndian.Uint64(b) == 0 && binary.BigEndian.Uint32(b[8:]) == 0xffff
}

// ip4HeaderOK verifies the checksum of the IPv4 header at the start of b.
func ip4HeaderOK(b []byte) bool {
	return Fold(Sum(b[:int(b[0]&0x0f)*4], 0)) == 0xffff
}
