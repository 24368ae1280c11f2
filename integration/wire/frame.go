// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/binary"
	"net/netip"
)

const (
	etherLen  = 14
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
	protoICMP = 1
	protoTCP  = 6
	protoND   = 58
	dontFrag  = 0x4000
	moreFrags = 0x2000
)

// ipPacket returns the IP packet in a frame, without what pads the frame, or
// nil where there is none that a wire impairs: ARP, neighbour discovery.
func ipPacket(frame []byte) []byte {
	if len(frame) < etherLen+20 {
		return nil
	}
	p := frame[etherLen:]
	switch binary.BigEndian.Uint16(frame[12:]) {
	case etherIPv4:
		n := int(binary.BigEndian.Uint16(p[2:]))
		if n < 20 || n > len(p) {
			return nil
		}
		return p[:n]
	case etherIPv6:
		if len(p) < 40 {
			return nil
		}
		n := 40 + int(binary.BigEndian.Uint16(p[4:]))
		// Types 133 to 137 (RFC 4861 section 4), and multicast listeners,
		// which have a hop-by-hop header before them.
		if n > len(p) || p[6] == 0 || p[6] == protoND && n > 40 && p[40] >= 133 && p[40] <= 137 {
			return nil
		}
		return p[:n]
	}
	return nil
}

// sum adds up 16-bit words in network order (RFC 1071), not yet folded.
func sum(b []byte) (s uint64) {
	for ; len(b) >= 4; b = b[4:] {
		s += uint64(binary.BigEndian.Uint32(b))
	}
	switch len(b) {
	case 3:
		s += uint64(b[0])<<24 | uint64(b[1])<<16 | uint64(b[2])<<8
	case 2:
		s += uint64(b[0])<<24 | uint64(b[1])<<16
	case 1:
		s += uint64(b[0]) << 24
	}
	return s
}

func fold(s uint64) uint16 {
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// checksumOK says whether the IPv4 header's and, of unfragmented TCP, the
// segment's checksum are right.
func checksumOK(p []byte) bool {
	var proto byte
	var addrs, l4 []byte
	if p[0]>>4 == 4 {
		h := int(p[0]&15) * 4
		if h < 20 || h > len(p) || fold(sum(p[:h])) != 0xffff {
			return false
		}
		if binary.BigEndian.Uint16(p[6:])&^dontFrag != 0 {
			return true // a fragment
		}
		proto, addrs, l4 = p[9], p[12:20], p[h:]
	} else {
		proto, addrs, l4 = p[6], p[8:40], p[40:]
		if int(binary.BigEndian.Uint16(p[4:])) != len(l4) {
			return false
		}
	}
	if proto != protoTCP {
		return true
	}
	return fold(sum(addrs)+uint64(protoTCP)+uint64(len(l4))+sum(l4)) == 0xffff
}

// FillTCP makes the checksum of a TCP segment anew, over an unfragmented IPv4 or
// IPv6 packet without extension headers: for those that tamper with one.
func FillTCP(p []byte) {
	addrs, l4 := p[8:40], p[40:]
	if p[0]>>4 == 4 {
		addrs, l4 = p[12:20], p[int(p[0]&15)*4:]
	}
	l4[16], l4[17] = 0, 0
	binary.BigEndian.PutUint16(l4[16:], ^fold(sum(addrs)+protoTCP+uint64(len(l4))+sum(l4)))
}

// corrupt changes a byte that a checksum covers. Of IPv6, the traffic class,
// the flow label and the hop limit are not.
func corrupt(p []byte, f *Fate) {
	i := int(f.Place) % len(p)
	if p[0]>>4 == 6 && (i < 4 || i == 7) {
		i = 40 + i
		if i >= len(p) {
			i = 8
		}
	}
	p[i] ^= f.Different
}

// answerTooBig makes the ICMP error to a frame that is larger than the MTU
// (RFC 1191 section 4, RFC 4443 section 3.2), as a frame back to its sender.
func answerTooBig(frame, p []byte, mtu int, hop4, hop6 netip.Addr) []byte {
	out := make([]byte, 0, 1500)
	out = append(out, frame[6:12]...)
	out = append(out, frame[:6]...)
	if p[0]>>4 == 4 {
		quote := p[:min(len(p), 548)]
		out = binary.BigEndian.AppendUint16(out, etherIPv4)
		src := hop4.As4()
		h := make([]byte, 28, 28+len(quote))
		h[0], h[8], h[9] = 0x45, 64, protoICMP
		binary.BigEndian.PutUint16(h[2:], uint16(28+len(quote)))
		copy(h[12:], src[:])
		copy(h[16:], p[12:16])
		binary.BigEndian.PutUint16(h[10:], ^fold(sum(h[:20])))
		h[20], h[21] = 3, 4
		binary.BigEndian.PutUint16(h[26:], uint16(mtu))
		h = append(h, quote...)
		binary.BigEndian.PutUint16(h[22:], ^fold(sum(h[20:])))
		return append(out, h...)
	}
	quote := p[:min(len(p), 1232)]
	out = binary.BigEndian.AppendUint16(out, etherIPv6)
	src := hop6.As16()
	h := make([]byte, 48, 48+len(quote))
	h[0], h[6], h[7] = 0x60, protoND, 64
	binary.BigEndian.PutUint16(h[4:], uint16(8+len(quote)))
	copy(h[8:], src[:])
	copy(h[24:], p[8:24])
	h[40] = 2
	binary.BigEndian.PutUint32(h[44:], uint32(mtu))
	h = append(h, quote...)
	binary.BigEndian.PutUint16(h[42:], ^fold(sum(h[8:40])+uint64(len(h)-40)+protoND+sum(h[40:])))
	return append(out, h...)
}

// fragments cuts an IPv4 packet without DF (RFC 791 section 3.2) into frames
// whose packets have at most mtu bytes.
func fragments(frame, p []byte, mtu int) [][]byte {
	h := int(p[0]&15) * 4
	size := (mtu - h) &^ 7
	if size <= 0 {
		return nil
	}
	was := binary.BigEndian.Uint16(p[6:])
	var out [][]byte
	for data, at := p[h:], 0; len(data) > 0; {
		n := min(size, len(data))
		f := append([]byte(nil), frame[:etherLen]...)
		f = append(f, p[:h]...)
		f = append(f, data[:n]...)
		q := f[etherLen:]
		place := was + uint16(at/8)
		if n < len(data) {
			place |= moreFrags
		}
		binary.BigEndian.PutUint16(q[2:], uint16(h+n))
		binary.BigEndian.PutUint16(q[6:], place)
		q[10], q[11] = 0, 0
		binary.BigEndian.PutUint16(q[10:], ^fold(sum(q[:h])))
		out = append(out, f)
		data, at = data[n:], at+n
	}
	return out
}
