// SPDX-License-Identifier: Apache-2.0

package packet

import "encoding/binary"

// Flags are the control bits of a TCP header.
type Flags uint8

// The control bits of RFC 9293 section 3.1.
const (
	FIN Flags = 1
	SYN Flags = 2
	RST Flags = 4
	PSH Flags = 8
	ACK Flags = 16
	URG Flags = 32
	ECE Flags = 64
	CWR Flags = 128
)

// Has reports whether all bits of f are set.
func (g Flags) Has(f Flags) bool { return g&f == f }

// String returns one letter per bit, in the notation of tcpdump: "S.", "P.",
// "F." and so on, "-" when none is set.
func (g Flags) String() string {
	if g == 0 {
		return "-"
	}
	const letters = "FSRP.UEW"
	var b [8]byte
	n := 0
	for i := range 8 {
		if g&(1<<i) != 0 {
			b[n] = letters[i]
			n++
		}
	}
	return string(b[:n])
}

// TCP is a view of one IP packet that holds a TCP segment. It is small and
// lives on the stack; it owns nothing. Raw is the packet, cut to the length
// that the IP header gives, and belongs to whoever called ParseTCP.
type TCP struct {
	Raw  []byte
	l4   uint16 // offset of the TCP header
	data uint16 // offset of the payload
	v6   bool
}

// ParseTCP looks at the IP packet b and returns a view of it. b may have
// trailing padding. For the problems that only the TCP header shows
// (BadOptions, NullFlags, SYNFIN, DataWithoutACK) the view is complete and may
// be looked at; for the others it must not be used. Checksums are not looked
// at: see IPHeaderOK and VerifyChecksum.
func ParseTCP(b []byte) (TCP, Problem) {
	raw, v6, l4, proto, prob := walkIP(b, false)
	if prob != OK {
		return TCP{}, prob
	}
	if proto != protoTCP {
		return TCP{}, NotTCP
	}
	if l4+tcpMinLen > len(raw) {
		return TCP{}, Truncated
	}
	h := raw[l4:]
	data := l4 + int(h[12]>>4)*4
	if data < l4+tcpMinLen || data > len(raw) {
		return TCP{}, BadDataOffset
	}
	p := TCP{Raw: raw, v6: v6, l4: uint16(l4), data: uint16(data)}
	if !optionsOK(h[tcpMinLen : data-l4]) {
		return p, BadOptions
	}
	f := Flags(h[13])
	switch {
	case f&(FIN|SYN|RST|PSH|ACK|URG) == 0:
		return p, NullFlags
	case f.Has(SYN | FIN):
		return p, SYNFIN
	case f&ACK == 0 && len(raw) > data:
		return p, DataWithoutACK
	}
	return p, OK
}

// header returns the TCP header and what follows it.
func (p *TCP) header() []byte { return p.Raw[p.l4:] }

// V6 reports whether the packet is an IPv6 one.
func (p *TCP) V6() bool { return p.v6 }

// Src returns the sender.
func (p *TCP) Src() Endpoint {
	e := Endpoint{Port: binary.BigEndian.Uint16(p.Raw[p.l4:])}
	if p.v6 {
		e.Addr = Addr(p.Raw[8:24])
	} else {
		e.Addr = addr4(p.Raw[12:16])
	}
	return e
}

// Dst returns the receiver.
func (p *TCP) Dst() Endpoint {
	e := Endpoint{Port: binary.BigEndian.Uint16(p.Raw[p.l4+2:])}
	if p.v6 {
		e.Addr = Addr(p.Raw[24:40])
	} else {
		e.Addr = addr4(p.Raw[16:20])
	}
	return e
}

// Tuple returns both.
func (p *TCP) Tuple() Tuple { return Tuple{Src: p.Src(), Dst: p.Dst()} }

// Seq returns the sequence number of the segment's first place.
func (p *TCP) Seq() Seq { return Seq(binary.BigEndian.Uint32(p.header()[4:])) }

// Ack returns the acknowledgment number; it means something only with ACK.
func (p *TCP) Ack() Seq { return Seq(binary.BigEndian.Uint32(p.header()[8:])) }

// Flags returns the control bits.
func (p *TCP) Flags() Flags { return Flags(p.header()[13]) }

// Window returns the window field, not scaled.
func (p *TCP) Window() uint16 { return binary.BigEndian.Uint16(p.header()[14:]) }

// Urgent returns the urgent pointer.
func (p *TCP) Urgent() uint16 { return binary.BigEndian.Uint16(p.header()[18:]) }

// Payload returns the data, a part of Raw.
func (p *TCP) Payload() []byte { return p.Raw[p.data:] }

// PayloadLen returns the number of bytes of data.
func (p *TCP) PayloadLen() int { return len(p.Raw) - int(p.data) }

// HeaderLen returns the number of bytes before the data, IP and TCP together.
func (p *TCP) HeaderLen() int { return int(p.data) }

// TTL returns the IPv4 time to live or the IPv6 hop limit.
func (p *TCP) TTL() uint8 {
	if p.v6 {
		return p.Raw[7]
	}
	return p.Raw[8]
}

// Options returns the option bytes, padding included, a part of Raw.
func (p *TCP) Options() []byte { return p.Raw[p.l4+tcpMinLen : p.data] }

// End returns the place after the segment's last one: payload, SYN and FIN
// each count (RFC 9293 section 3.4).
func (p *TCP) End() Seq {
	n := Size(p.PayloadLen())
	f := p.Flags()
	n += Size(f&FIN) + Size(f&SYN)>>1
	return p.Seq().Add(n)
}

// IPHeaderOK verifies the IPv4 header's checksum; an IPv6 header has none.
func (p *TCP) IPHeaderOK() bool { return p.v6 || ip4HeaderOK(p.Raw) }

// pseudo returns the sum of the pseudo header.
func (p *TCP) pseudo() uint32 {
	n := len(p.Raw) - int(p.l4)
	if p.v6 {
		return pseudo6(p.Raw[8:40], protoTCP, n)
	}
	return pseudo4(p.Raw[12:16], p.Raw[16:20], protoTCP, n)
}

// Checksum returns the checksum field as it stands.
func (p *TCP) Checksum() uint16 { return binary.BigEndian.Uint16(p.header()[16:]) }

func (p *TCP) setChecksum(c uint16) { binary.BigEndian.PutUint16(p.header()[16:], c) }

// VerifyChecksum sums the pseudo header and the whole segment and reports
// whether the checksum is right.
func (p *TCP) VerifyChecksum() bool { return Fold(Sum(p.header(), p.pseudo())) == 0xffff }

// FillChecksum computes the checksum over the whole segment and writes it: for
// packets that we made, and for those in state ChecksumPartial which no
// hardware or segmentation of the kernel will finish.
func (p *TCP) FillChecksum() {
	p.setChecksum(0)
	p.setChecksum(^Fold(Sum(p.header(), p.pseudo())))
}

// FillPartial writes the pseudo header's sum, uncomplemented, which is what
// the kernel expects in a packet of state ChecksumPartial.
func (p *TCP) FillPartial() { p.setChecksum(Fold(p.pseudo())) }

// change applies the sum of all ~m + m' of words inside the TCP header to the
// checksum. A partial checksum does not cover the TCP header.
func (p *TCP) change(diff uint64, st ChecksumState) {
	if st != ChecksumPartial {
		p.setChecksum(adjust(p.Checksum(), diff))
	}
}

// SetSeq writes the sequence number.
func (p *TCP) SetSeq(s Seq, st ChecksumState) {
	b := p.header()[4:8]
	old := binary.BigEndian.Uint32(b)
	binary.BigEndian.PutUint32(b, uint32(s))
	p.change(uint64(^old)+uint64(s), st)
}

// SetAck writes the acknowledgment number.
func (p *TCP) SetAck(s Seq, st ChecksumState) {
	b := p.header()[8:12]
	old := binary.BigEndian.Uint32(b)
	binary.BigEndian.PutUint32(b, uint32(s))
	p.change(uint64(^old)+uint64(s), st)
}

// SetWindow writes the window field, not scaled.
func (p *TCP) SetWindow(w uint16, st ChecksumState) {
	b := p.header()[14:16]
	old := binary.BigEndian.Uint16(b)
	binary.BigEndian.PutUint16(b, w)
	p.change(uint64(^old)+uint64(w), st)
}

// SetFlags writes the control bits.
func (p *TCP) SetFlags(f Flags, st ChecksumState) {
	b := p.header()[12:14]
	old := binary.BigEndian.Uint16(b)
	b[1] = uint8(f)
	p.change(uint64(^old)+uint64(old&0xff00|uint16(f)), st)
}

// Rewrite is a whole translation of a segment from one connection to another.
type Rewrite struct {
	Src, Dst    Endpoint // of the family that the packet has
	Seq, Ack    Seq
	Window      uint16 // the field, already scaled for the receiver
	Flags       Flags
	ClearUrgent bool // write 0 into the urgent pointer
}

// Rewrite carries out the translation in place, with one incremental update of
// the TCP checksum and, for IPv4, one of the header checksum. In state
// ChecksumPartial the field is left as the pseudo header's uncomplemented sum
// for the new addresses; FillChecksum then finishes a packet that the kernel
// will not. A checksum that was wrong stays wrong, so that the receiver sees
// it. The data offset and the reserved bits stay as they are.
func (p *TCP) Rewrite(r *Rewrite, st ChecksumState) {
	var diff uint64
	if p.v6 {
		a := p.Raw[8:40]
		diff = change128(a[:16], &r.Src.Addr) + change128(a[16:], &r.Dst.Addr)
	} else {
		// The addresses count in both checksums.
		a := p.Raw[10:20]
		oldSrc, oldDst := binary.BigEndian.Uint32(a[2:]), binary.BigEndian.Uint32(a[6:])
		newSrc, newDst := binary.BigEndian.Uint32(r.Src.Addr[12:]), binary.BigEndian.Uint32(r.Dst.Addr[12:])
		binary.BigEndian.PutUint32(a[2:], newSrc)
		binary.BigEndian.PutUint32(a[6:], newDst)
		diff = uint64(^oldSrc) + uint64(newSrc) + uint64(^oldDst) + uint64(newDst)
		binary.BigEndian.PutUint16(a, adjust(binary.BigEndian.Uint16(a), diff))
	}
	h := p.header()[:tcpMinLen]
	ports := uint32(r.Src.Port)<<16 | uint32(r.Dst.Port)
	// Data offset, reserved bits, flags and window are one 32-bit word.
	ctl := binary.BigEndian.Uint32(h[12:])
	newCtl := ctl&0xff000000 | uint32(r.Flags)<<16 | uint32(r.Window)
	diff += uint64(^binary.BigEndian.Uint32(h[0:])) + uint64(ports) +
		uint64(^binary.BigEndian.Uint32(h[4:])) + uint64(r.Seq) +
		uint64(^binary.BigEndian.Uint32(h[8:])) + uint64(r.Ack) +
		uint64(^ctl) + uint64(newCtl)
	binary.BigEndian.PutUint32(h[0:], ports)
	binary.BigEndian.PutUint32(h[4:], uint32(r.Seq))
	binary.BigEndian.PutUint32(h[8:], uint32(r.Ack))
	binary.BigEndian.PutUint32(h[12:], newCtl)
	if r.ClearUrgent {
		diff += uint64(^binary.BigEndian.Uint16(h[18:]))
		binary.BigEndian.PutUint16(h[18:], 0)
	}
	if st == ChecksumPartial {
		p.FillPartial()
		return
	}
	binary.BigEndian.PutUint16(h[16:], adjust(binary.BigEndian.Uint16(h[16:]), diff))
}

// change128 writes a into b and returns the sum of all ~m + m'.
func change128(b []byte, a *Addr) (diff uint64) {
	_ = b[15]
	for i := 0; i < 16; i += 4 {
		o, n := binary.BigEndian.Uint32(b[i:]), binary.BigEndian.Uint32(a[i:])
		diff += uint64(^o) + uint64(n)
		binary.BigEndian.PutUint32(b[i:], n)
	}
	return diff
}

// ClearDF clears the IPv4 don't-fragment bit, for a client whose path is
// narrower than 1280 bytes; an IPv6 packet is left alone. The identification,
// which a sender may leave 0 while DF is set, is written too, since fragments
// need one.
func (p *TCP) ClearDF(id uint16) {
	if p.v6 {
		return
	}
	b := p.Raw[4:12]
	old := binary.BigEndian.Uint32(b)
	now := uint32(id)<<16 | old&0xbfff
	binary.BigEndian.PutUint32(b, now)
	binary.BigEndian.PutUint16(b[6:], Update32(binary.BigEndian.Uint16(b[6:]), old, now))
}
