// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"encoding/binary"

	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/packet"
)

// narrow says whether a packet does not fit into what the wire takes now. A
// super-packet is cut before it gets there.
func (x *wire) narrow(p *parcel) bool {
	s := &x.spec
	return s.MTU > 0 && p.mss == 0 && len(p.b) > s.MTU && x.w.now >= startTime+s.Narrows &&
		(p.b[0]>>4 == 6 || p.b[6]&0x40 != 0) // what may be cut is cut, and put together again
}

// tooBig answers a packet that does not fit, as the router in the middle of the
// wire does (RFC 1191 section 4, RFC 4443 section 3.2).
func (x *wire) tooBig(p *parcel) {
	x.lost++
	x.w.noteParcel(noteLost, x.dir, p)
	if x.w.Hooks.NoICMP {
		return
	}
	b := appendTooBig(nil, p.b, x.spec.MTU)
	x.w.after(x.spec.Delay, func() {
		if x.dir == ToClient || x.dir == ToServer {
			x.w.InjectICMP(b)
		} else {
			x.w.icmpArrives(b)
		}
	})
}

// appendTooBig makes the error about a packet, from a router of its own.
func appendTooBig(b, about []byte, mtu int) []byte {
	if about[0]>>4 == 4 {
		quote := about[:28]
		h := make([]byte, 28)
		h[0], h[8], h[9] = 0x45, 64, 1
		binary.BigEndian.PutUint16(h[2:], uint16(28+len(quote)))
		copy(h[12:], []byte{198, 18, 255, 1})
		copy(h[16:], about[12:16])
		binary.BigEndian.PutUint16(h[10:], ^packet.Fold(packet.Sum(h[:20], 0)))
		h[20], h[21] = packet.ICMP4Unreachable, packet.ICMP4FragNeeded
		binary.BigEndian.PutUint16(h[26:], uint16(mtu))
		h = append(h, quote...)
		binary.BigEndian.PutUint16(h[22:], ^packet.Fold(packet.Sum(h[20:], 0)))
		return append(b, h...)
	}
	quote := about[:60]
	h := make([]byte, 48)
	h[0], h[6], h[7] = 0x60, 58, 64
	binary.BigEndian.PutUint16(h[4:], uint16(8+len(quote)))
	copy(h[8:], []byte{0x20, 0x01, 0x0d, 0xb8, 0xff, 0xff})
	h[23] = 1
	copy(h[24:], about[8:24])
	h[40] = packet.ICMP6PacketTooBig
	binary.BigEndian.PutUint32(h[44:], uint32(mtu))
	h = append(h, quote...)
	sum := packet.Sum(h[40:], packet.Sum(h[8:40], uint32(58+len(h)-40)))
	binary.BigEndian.PutUint16(h[42:], ^packet.Fold(sum))
	return append(b, h...)
}

// InjectICMP hands an ICMP error to the engine, as the kernel's queue does.
func (w *World) InjectICMP(b []byte) {
	ev := engine.Event{Kind: engine.ICMP, Data: append([]byte(nil), b...)}
	w.step(&ev, FromClient, nil)
}

// isICMP says whether a packet is an ICMP error and not a segment.
func isICMP(b []byte) bool {
	return len(b) > 20 && (b[0]>>4 == 4 && b[9] == 1 || b[0]>>4 == 6 && b[6] == 58)
}

// icmpOut checks an error that the engine passes on: it goes to a client, is
// about a segment of its own that is under way, and in its own numbers. Servers
// are never told.
func (w *World) icmpOut(b []byte) {
	p, problem := packet.ParseICMPError(b)
	if problem != packet.OK || !p.VerifyChecksum() {
		w.fail("INV-6", "the engine lets out an ICMP error that is %v or has a wrong checksum", problem)
		return
	}
	about := p.Embedded()
	flows := w.obs.clients[about.Src]
	if about.Dst != w.vip || len(flows) == 0 || p.OuterDst() != about.Src.Addr {
		w.fail("INV-3", "an ICMP error about %s goes to %v", about, p.OuterDst())
		return
	}
	// The engine may not know yet that the client uses its port again.
	f := last(flows)
	ok := false
	for i := len(flows) - 1; i >= 0 && !ok; i-- {
		at := wide(p.EmbeddedSeq(), flows[i].iss, flows[i].in.End())
		ok = at >= 1 && uint64(at) <= flows[i].in.End()
	}
	if !ok {
		w.failFlow(about.Src, packet.Tuple{}, "INV-6", "an ICMP error for %s is about position %d; it has sent up to %d", f.c,
			wide(p.EmbeddedSeq(), f.iss, f.in.End()), f.in.End())
		return
	}
	c := append([]byte(nil), b...)
	w.after(w.wires[ToClient].spec.Delay, func() { w.icmpArrives(c) })
}

// icmpArrives hands an ICMP error to the host that it is for.
func (w *World) icmpArrives(b []byte) {
	p, problem := packet.ParseICMPError(b)
	if problem != packet.OK {
		w.fail("simulator", "an ICMP error is %v", problem)
		return
	}
	if h := w.hosts[p.OuterDst()]; h != nil {
		about := p.Embedded()
		h.TooBig(about.Src, about.Dst, uint32(p.EmbeddedSeq()), int(p.MTU()), p.V6())
	}
}
