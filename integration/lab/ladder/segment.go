// SPDX-License-Identifier: Apache-2.0

// Package ladder draws captured TCP segments the way the patent draws them: a
// ladder with the client on the left, the interface unit in the middle and the
// server on the right, each segment written as type:sequence,acknowledgment
// (length). It also checks what it draws: the pairs of a segment before and
// after translation must obey the patent's equations.
//
// The package decodes packets by itself. It must not use the module's own
// views, because it is there to judge what the module has done.
package ladder

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"
)

// TCP flags, as in the thirteenth byte of the TCP header (RFC 9293, 3.1).
const (
	FIN = 0x01
	SYN = 0x02
	RST = 0x04
	PSH = 0x08
	ACK = 0x10
	URG = 0x20
)

// A Side tells on which leg of the interface unit a segment was seen.
type Side uint8

// The two legs.
const (
	ClientSide Side = iota
	ServerSide
)

// A Segment is one TCP segment as it was on the wire.
type Segment struct {
	Time     time.Time
	Side     Side
	Src, Dst netip.AddrPort
	Seq, Ack uint32
	Flags    uint8
	Window   uint16
	Len      int    // payload length on the wire, in bytes
	Payload  []byte // the part of the payload that was captured; may be shorter than Len
}

// Reasons why a packet has no Segment.
var (
	ErrNotTCP   = errors.New("ladder: not a TCP segment")
	ErrFragment = errors.New("ladder: a fragment")
	ErrShort    = errors.New("ladder: shorter than its headers")
)

// Decode reads a segment from an IPv4 or IPv6 packet. The packet may be cut
// off behind the TCP header: lengths come from the IP header. Payload points
// into b.
func Decode(b []byte) (Segment, error) {
	var s Segment
	src, dst, tcp, total, err := split(b)
	if err != nil {
		return s, err
	}
	if len(tcp) < 20 {
		return s, ErrShort
	}
	off := int(tcp[12]>>4) * 4
	if off < 20 || off > total {
		return s, ErrShort
	}
	s.Src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(tcp[0:]))
	s.Dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(tcp[2:]))
	s.Seq = binary.BigEndian.Uint32(tcp[4:])
	s.Ack = binary.BigEndian.Uint32(tcp[8:])
	s.Flags = tcp[13]
	s.Window = binary.BigEndian.Uint16(tcp[14:])
	s.Len = total - off
	if len(tcp) > off {
		s.Payload = tcp[off:min(len(tcp), total)]
	}
	return s, nil
}

// split finds the TCP part of a packet. total is its length by the IP header.
func split(b []byte) (src, dst netip.Addr, tcp []byte, total int, err error) {
	if len(b) < 20 {
		return src, dst, nil, 0, ErrShort
	}
	var hdr int
	switch b[0] >> 4 {
	case 4:
		hdr = int(b[0]&0x0f) * 4
		total = int(binary.BigEndian.Uint16(b[2:])) - hdr
		if binary.BigEndian.Uint16(b[6:])&0x3fff != 0 {
			return src, dst, nil, 0, ErrFragment
		}
		if b[9] != 6 {
			return src, dst, nil, 0, ErrNotTCP
		}
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	case 6:
		hdr = 40
		if len(b) < hdr {
			return src, dst, nil, 0, ErrShort
		}
		total = int(binary.BigEndian.Uint16(b[4:]))
		// TCP behind extension headers does not occur in the lab.
		if b[6] != 6 {
			return src, dst, nil, 0, ErrNotTCP
		}
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	default:
		return src, dst, nil, 0, ErrNotTCP
	}
	if hdr < 20 || len(b) < hdr || total < 20 {
		return src, dst, nil, 0, ErrShort
	}
	return src, dst, b[hdr:min(len(b), hdr+total)], total, nil
}

// ChecksumsOK computes the checksums of a whole TCP packet from scratch and
// reports whether they are right (RFC 1071; RFC 9293, 3.1). A packet that is
// cut off cannot be verified and is reported as wrong.
func ChecksumsOK(b []byte) bool {
	src, dst, tcp, total, err := split(b)
	if err != nil || len(tcp) < total {
		return false
	}
	if b[0]>>4 == 4 && fold(sum(0, b[:int(b[0]&0x0f)*4])) != 0xffff {
		return false
	}
	s := sum(0, src.AsSlice())
	s = sum(s, dst.AsSlice())
	s += 6 + uint64(total)
	return fold(sum(s, tcp)) == 0xffff
}

func sum(s uint64, b []byte) uint64 {
	for ; len(b) >= 2; b = b[2:] {
		s += uint64(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	return s
}

func fold(s uint64) uint16 {
	for s>>16 != 0 {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
