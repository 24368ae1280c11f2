// SPDX-License-Identifier: Apache-2.0

package packet_test

import (
	"testing"

	"github.com/weirgate/weir/module/packet"
)

// TestNoAllocation is the allocation budget of everything that the packet
// loop calls: none.
func TestNoAllocation(t *testing.T) {
	seg := packet.Segment{Src: ep("198.51.100.1:1025"), Dst: ep("203.0.113.10:80"), Seq: 7, Ack: 9, Flags: packet.ACK,
		Options: packet.AppendSACKOption(nil, packet.SACKBlock{Left: 1, Right: 2})}
	seg6 := seg
	seg6.Src, seg6.Dst = ep("[2001:db8::1]:1025"), ep("[2001:db8::10]:80")
	b := packet.AppendSegment(nil, &seg, make([]byte, 1200))
	b6 := packet.AppendSegment(nil, &seg6, make([]byte, 1200))
	odd := seg
	odd.Options = []byte{1, 5, 10, 0, 0, 0, 1, 0, 0, 0, 2, 1}
	bOdd := packet.AppendSegment(nil, &odd, nil)
	icmp := icmpError(seg.Src.Addr, seg.Dst.Addr, 3, 4, 1400, b, 200)
	icmp6 := icmpError(seg6.Src.Addr, seg6.Dst.Addr, 2, 0, 1280, b6, 200)
	buf := make([]byte, 0, 4096)
	opts := make([]byte, 0, 40)
	var sink uint64

	tcp := func(b []byte) func() {
		return func() {
			p, prob := packet.ParseTCP(b)
			if prob != packet.OK {
				t.Fatal(prob)
			}
			tu := p.Tuple()
			sink += tu.Hash(3) + uint64(p.End()) + uint64(len(p.Payload())) + uint64(p.SYNOptions().MSS)
			if !p.IPHeaderOK() || !p.VerifyChecksum() {
				t.Fatal("checksum")
			}
			if off, n := p.SACK(); n > 0 {
				blk := p.SACKBlock(off, 0)
				blk.Left++
				p.SetSACKBlock(off, 0, blk, packet.ChecksumVerified)
			}
			rw := packet.Rewrite{Src: tu.Dst, Dst: tu.Src, Seq: p.Ack(), Ack: p.Seq(), Window: p.Window() + 1, Flags: packet.ACK}
			p.Rewrite(&rw, packet.ChecksumVerified)
			p.SetSeq(1, packet.ChecksumVerified)
			p.SetAck(2, packet.ChecksumVerified)
			p.SetWindow(3, packet.ChecksumVerified)
			p.SetFlags(packet.ACK|packet.PSH, packet.ChecksumVerified)
			p.BlankOption(packet.OptTimestamps, packet.ChecksumVerified)
			p.ClearDF(5)
			p.FillPartial()
			p.FillChecksum()
		}
	}
	icmpRun := func(b []byte) func() {
		return func() {
			p, prob := packet.ParseICMPError(b)
			if prob != packet.OK || !p.VerifyChecksum() {
				t.Fatal(prob)
			}
			tu := p.Embedded()
			sink += uint64(p.MTU()) + uint64(p.EmbeddedSeq()) + uint64(p.Type()) + uint64(p.Code())
			p.Rewrite(p.OuterDst(), p.OuterSrc(), tu.Reverse(), 5)
		}
	}
	for _, c := range []struct {
		name string
		f    func()
	}{
		{"tcp4", tcp(b)}, {"tcp6", tcp(b6)}, {"odd SACK", tcp(bOdd)}, {"icmp4", icmpRun(icmp)}, {"icmp6", icmpRun(icmp6)},
		{"craft", func() {
			s := seg
			o := packet.AppendSYNOptions(opts[:0], packet.SYNOptions{MSS: 1460, WindowScale: 7, SACKPermitted: true})
			s.Options = packet.AppendSACKOption(o, packet.SACKBlock{Left: 1, Right: 2})
			sink += uint64(len(packet.AppendSegment(buf[:0], &s, b[:100])))
		}},
		{"strip", func() {
			p, _ := packet.ParseTCP(bOdd)
			p.StripSACK(packet.ChecksumVerified)
		}},
	} {
		if n := testing.AllocsPerRun(200, c.f); n != 0 {
			t.Errorf("%s: %v allocations, want 0", c.name, n)
		}
	}
	_ = sink
}
