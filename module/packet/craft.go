// SPDX-License-Identifier: Apache-2.0

package packet

import "encoding/binary"

// Segment describes a TCP segment that the router makes itself.
type Segment struct {
	Src, Dst Endpoint // of one family
	Seq, Ack Seq
	Flags    Flags
	Window   uint16
	Options  []byte // padded to a multiple of 4, at most 40 bytes; only read
	TTL      uint8  // 0: 64
	IPID     uint16 // IPv4 identification; matters only with ClearDF
	ClearDF  bool   // IPv4: allow fragmentation
}

// defaultTTL is the recommended time to live (RFC 1700).
const defaultTTL = 64

var zeros [ip6Len + 60]byte

// AppendSegment appends to dst a complete IPv4 or IPv6 packet with right
// checksums and returns dst. It does not allocate when the capacity suffices.
// Neither s nor payload is kept. Segments of more than 65535 bytes, IP header
// included, are the caller's mistake.
func AppendSegment(dst []byte, s *Segment, payload []byte) []byte {
	v4 := s.Src.Addr.Is4()
	ipLen := ip6Len
	if v4 {
		ipLen = ip4MinLen
	}
	data := ipLen + tcpMinLen + len(s.Options)
	total := data + len(payload)
	start := len(dst)
	dst = append(dst, zeros[:ipLen+tcpMinLen]...)
	dst = append(dst, s.Options...)
	dst = append(dst, payload...)
	b := dst[start:]

	ttl := s.TTL
	if ttl == 0 {
		ttl = defaultTTL
	}
	if v4 {
		b[0] = 0x45
		binary.BigEndian.PutUint16(b[2:], uint16(total))
		binary.BigEndian.PutUint16(b[4:], s.IPID)
		if !s.ClearDF {
			b[6] = 0x40
		}
		b[8] = ttl
		b[9] = protoTCP
		copy(b[12:16], s.Src.Addr[12:])
		copy(b[16:20], s.Dst.Addr[12:])
		binary.BigEndian.PutUint16(b[10:], ^Fold(Sum(b[:ip4MinLen], 0)))
	} else {
		b[0] = 0x60
		binary.BigEndian.PutUint16(b[4:], uint16(total-ip6Len))
		b[6] = protoTCP
		b[7] = ttl
		copy(b[8:24], s.Src.Addr[:])
		copy(b[24:40], s.Dst.Addr[:])
	}
	h := b[ipLen:]
	binary.BigEndian.PutUint16(h[0:], s.Src.Port)
	binary.BigEndian.PutUint16(h[2:], s.Dst.Port)
	binary.BigEndian.PutUint32(h[4:], uint32(s.Seq))
	binary.BigEndian.PutUint32(h[8:], uint32(s.Ack))
	h[12] = uint8((tcpMinLen+len(s.Options))/4) << 4
	h[13] = uint8(s.Flags)
	binary.BigEndian.PutUint16(h[14:], s.Window)
	p := TCP{Raw: b, v6: !v4, l4: uint16(ipLen), data: uint16(data)}
	p.FillChecksum()
	return dst
}
