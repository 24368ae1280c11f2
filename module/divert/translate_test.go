// SPDX-License-Identifier: Apache-2.0

package divert_test

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/module/divert"
	"github.com/weirgate/weir/module/packet"
)

// This file is a tiny translator: addresses and ports of TCP and UDP, without
// options or extension headers in front of them. It computes checksums in its
// own, slow way, so that the tests do not lean on what they may be used to
// test.

// header says where things are in a packet; ok is false for anything else.
type header struct {
	v6       bool
	l4, sum  int // transport header, checksum field
	src, dst netip.AddrPort
	payload  int
}

func parse(b []byte) (h header, ok bool) {
	var proto byte
	var src, dst netip.Addr
	switch {
	case len(b) >= 28 && b[0] == 0x45:
		h.l4, proto = 20, b[9]
		src, _ = netip.AddrFromSlice(b[12:16])
		dst, _ = netip.AddrFromSlice(b[16:20])
	case len(b) >= 48 && b[0]>>4 == 6:
		h.v6, h.l4, proto = true, 40, b[6]
		src, _ = netip.AddrFromSlice(b[8:24])
		dst, _ = netip.AddrFromSlice(b[24:40])
	default:
		return h, false
	}
	t := b[h.l4:]
	switch proto {
	case unix.IPPROTO_UDP:
		h.sum, h.payload = h.l4+6, h.l4+8
	case unix.IPPROTO_TCP:
		if len(t) < 20 {
			return h, false
		}
		h.sum, h.payload = h.l4+16, h.l4+int(t[12]>>4)*4
	default:
		return h, false
	}
	h.src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(t))
	h.dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(t[2:]))
	return h, h.payload <= len(b)
}

// add sums 16-bit words (RFC 1071).
func add(sum uint32, b []byte) uint32 {
	for len(b) >= 2 {
		sum += uint32(b[0])<<8 | uint32(b[1])
		b = b[2:]
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return sum
}

// pseudo sums the pseudo header of a packet.
func (h *header) pseudo(b []byte) uint32 {
	proto, n := uint32(b[9]), uint32(len(b)-h.l4)
	if h.v6 {
		return add(add(uint32(b[6])+n&0xffff+n>>16, b[8:24]), b[24:40])
	}
	return add(proto+n, b[12:20])
}

// fill computes the transport checksum in full.
func (h *header) fill(b []byte) {
	binary.BigEndian.PutUint16(b[h.sum:], 0)
	sum := ^uint16(add(h.pseudo(b), b[h.l4:]))
	if sum == 0 {
		sum = 0xffff // zero means "none" in UDP and is the same in TCP
	}
	binary.BigEndian.PutUint16(b[h.sum:], sum)
}

// valid tells whether the transport checksum is right.
func (h *header) valid(b []byte) bool { return add(h.pseudo(b), b[h.l4:]) == 0xffff }

// fixIP sets the length fields and IPv4's header checksum.
func (h *header) fixIP(b []byte) {
	if h.v6 {
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-40))
		return
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], ^uint16(add(0, b[:20])))
}

// rewrite gives a packet new endpoints. A checksum that is complete is updated
// by the difference (RFC 1624), one that is not ready is filled in, and that of
// a super-packet is left to segmentation.
func (h *header) rewrite(p *divert.Packet, src, dst netip.AddrPort) {
	b := p.Data
	before := add(add(0, addrs(h, b)), b[h.l4:h.l4+4])
	if h.v6 {
		copy(b[8:24], src.Addr().AsSlice())
		copy(b[24:40], dst.Addr().AsSlice())
	} else {
		copy(b[12:16], src.Addr().AsSlice())
		copy(b[16:20], dst.Addr().AsSlice())
	}
	binary.BigEndian.PutUint16(b[h.l4:], src.Port())
	binary.BigEndian.PutUint16(b[h.l4+2:], dst.Port())
	h.fixIP(b)
	switch {
	case p.Checksum == packet.ChecksumPartial && !p.GSO:
		h.fill(b)
	case p.Checksum != packet.ChecksumPartial:
		after := add(add(0, addrs(h, b)), b[h.l4:h.l4+4])
		sum := add(uint32(^binary.BigEndian.Uint16(b[h.sum:]))+uint32(^uint16(before))+after, nil)
		binary.BigEndian.PutUint16(b[h.sum:], ^uint16(sum))
	}
	p.Mark = testMark
	p.Verdict = divert.Rewritten
}

func addrs(h *header, b []byte) []byte {
	if h.v6 {
		return b[8:40]
	}
	return b[12:20]
}

// translator maps a client's connections to VIP:port to ones of a SNIP to
// server:port, keeping the client's port.
type translator struct {
	client, vip, snip, server netip.Addr
	vipPort, serverPort       uint16

	noFill bool // negative control: leaves checksums that are not ready

	partial, verified, unknown, gso, gsoBytes atomic.Uint64
}

func newTranslator(v6 bool) *translator {
	if v6 {
		return &translator{client: client6, vip: vip6, snip: snip6, server: server6, vipPort: 80, serverPort: 8080}
	}
	return &translator{client: client4, vip: vip4, snip: snip4, server: server4, vipPort: 80, serverPort: 8080}
}

func (x *translator) handle(p *divert.Packet) {
	h, ok := parse(p.Data)
	if !ok || p.Truncated {
		return // Drop
	}
	switch {
	case p.GSO:
		x.gso.Add(1)
		x.gsoBytes.Add(uint64(len(p.Data)))
	case p.Checksum == packet.ChecksumPartial:
		x.partial.Add(1)
	case p.Checksum == packet.ChecksumVerified:
		x.verified.Add(1)
	default:
		x.unknown.Add(1)
	}
	if x.noFill && p.Checksum == packet.ChecksumPartial {
		p.GSO = true // leave it alone
	}
	switch {
	case h.dst == netip.AddrPortFrom(x.vip, x.vipPort):
		h.rewrite(p, netip.AddrPortFrom(x.snip, h.src.Port()), netip.AddrPortFrom(x.server, x.serverPort))
	case h.src == netip.AddrPortFrom(x.server, x.serverPort) && h.dst.Addr() == x.snip:
		h.rewrite(p, netip.AddrPortFrom(x.vip, x.vipPort), netip.AddrPortFrom(x.client, h.dst.Port()))
	}
}
