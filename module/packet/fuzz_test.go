// SPDX-License-Identifier: Apache-2.0

package packet_test

import (
	"bytes"
	"testing"

	"github.com/weirgate/weir/module/packet"
)

func seeds() [][]byte {
	seg4 := packet.Segment{Src: ep("198.51.100.1:1025"), Dst: ep("203.0.113.10:80"), Seq: 7, Ack: 9, Flags: packet.ACK}
	seg6 := packet.Segment{Src: ep("[2001:db8::1]:1025"), Dst: ep("[2001:db8::10]:80"), Seq: 7, Ack: 9, Flags: packet.ACK}
	v4 := packet.AppendSegment(nil, &seg4, []byte("GET / HTTP/1.1\r\n"))
	v6 := packet.AppendSegment(nil, &seg6, []byte("GET / HTTP/1.1\r\n"))
	seg4.Options = packet.AppendSACKOption(nil, packet.SACKBlock{Left: 1, Right: 2}, packet.SACKBlock{Left: 5, Right: 9})
	sack := packet.AppendSegment(nil, &seg4, nil)
	seg4.Flags, seg4.Options = packet.SYN, packet.AppendSYNOptions(nil, packet.SYNOptions{MSS: 1460, WindowScale: 7, SACKPermitted: true})
	syn := packet.AppendSegment(nil, &seg4, nil)
	return [][]byte{
		v4, v6, sack, syn, insert6(v6, 0, 0), insert6(v6, 43, 2), insert6(v6, 44, 0), v4[:30], append(bytes.Clone(v4), 0, 0),
		icmpError(seg4.Src.Addr, seg4.Dst.Addr, 3, 4, 1400, v4, 100),
		icmpError(seg6.Src.Addr, seg6.Dst.Addr, 2, 0, 1280, v6, 100),
		icmpError(seg6.Src.Addr, seg6.Dst.Addr, 1, 0, 0, insert6(v6, 60, 0), 60),
	}
}

// FuzzParseTCP: whatever was accepted can be read and rewritten without going
// beyond the packet, and a rewrite keeps a right checksum right and a wrong
// one wrong.
func FuzzParseTCP(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		padding := bytes.Clone(b)
		p, prob := packet.ParseTCP(b)
		if p.Raw == nil {
			if prob == packet.OK {
				t.Fatal("accepted without a view")
			}
			return
		}
		if p.HeaderLen()+p.PayloadLen() != len(p.Raw) || len(p.Raw) > len(b) || p.HeaderLen() < 40 {
			t.Fatalf("lengths %d %d %d", p.HeaderLen(), p.PayloadLen(), len(p.Raw))
		}
		if p.V6() == p.Src().Addr.Is4() || p.V6() == p.Dst().Addr.Is4() {
			t.Fatal("an address of the other family")
		}
		tu := p.Tuple()
		_, _, _, _, _, _ = tu.Hash(1), p.End(), p.TTL(), p.IPHeaderOK(), p.SYNOptions(), p.Urgent()
		right, ipRight := p.VerifyChecksum(), p.IPHeaderOK()
		rw := packet.Rewrite{Src: tu.Dst, Dst: tu.Src, Seq: p.Ack() + 1, Ack: p.Seq() - 1, Window: ^p.Window(), Flags: packet.ACK, ClearUrgent: true}
		rw.Src.Port++
		p.Rewrite(&rw, packet.ChecksumUnknown)
		if p.VerifyChecksum() != right || p.IPHeaderOK() != ipRight {
			t.Fatalf("checksums were %v %v, are %v %v", right, ipRight, p.VerifyChecksum(), p.IPHeaderOK())
		}
		p.ClearDF(9)
		if p.IPHeaderOK() != ipRight {
			t.Fatal("ClearDF")
		}
		p.FillChecksum()
		if !p.VerifyChecksum() {
			t.Fatal("FillChecksum")
		}
		if !bytes.Equal(b[len(p.Raw):], padding[len(p.Raw):]) {
			t.Fatal("wrote beyond the packet")
		}
	})
}

// FuzzOptions: option bytes as they come, at their real place in a segment.
func FuzzOptions(f *testing.F) {
	for _, s := range [][]byte{
		{2, 4, 5, 0xb4, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7},
		{1, 1, 5, 10, 0, 0, 0, 1, 0, 0, 0, 2},
		{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2, 1, 1, 5, 10, 0, 0, 0, 1, 0, 0, 0, 2},
		{1, 5, 10, 0, 0, 0, 1, 0, 0, 0, 2, 1}, {5, 34}, {0}, {254, 3, 1, 1}, {1, 1, 5, 255},
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, o []byte) {
		o = o[:min(len(o), 40)&^3]
		s := packet.Segment{Src: ep("198.51.100.1:1025"), Dst: ep("203.0.113.10:80"), Seq: 7, Ack: 9, Flags: packet.ACK, Options: o}
		b := packet.AppendSegment(nil, &s, []byte("payload"))
		p, prob := packet.ParseTCP(b)
		if prob != packet.OK && prob != packet.BadOptions {
			t.Fatal(prob)
		}
		if so := p.SYNOptions(); so.WindowScale < -1 || so.WindowScale > 14 {
			t.Fatalf("%+v", so)
		}
		off, n := p.SACK()
		if n < 0 || n > packet.MaxSACKBlocks {
			t.Fatalf("%d blocks", n)
		}
		for i := range n {
			if off+8*i+8 > p.HeaderLen() {
				t.Fatalf("block %d lies beyond the header", i)
			}
			p.SetSACKBlock(off, i, packet.SACKBlock{Left: 0xffffffff, Right: packet.Seq(i)}, packet.ChecksumVerified)
			if !p.VerifyChecksum() {
				t.Fatalf("checksum after block %d", i)
			}
		}
		p.StripSACK(packet.ChecksumVerified)
		p.BlankOption(packet.OptTimestamps, packet.ChecksumVerified)
		if _, again := p.SACK(); again != 0 || !p.VerifyChecksum() || string(p.Payload()) != "payload" {
			t.Fatal("after blanking")
		}
		if prob == packet.OK {
			if _, prob := packet.ParseTCP(b); prob != packet.OK {
				t.Fatalf("blanking made it %v", prob)
			}
		}
	})
}

// FuzzICMP: what was accepted can be rewritten, and its checksum is then right.
func FuzzICMP(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		padding := bytes.Clone(b)
		p, prob := packet.ParseICMPError(b)
		if prob != packet.OK {
			return
		}
		tu := p.Embedded()
		if p.V6() == tu.Src.Addr.Is4() || p.V6() == tu.Dst.Addr.Is4() {
			t.Fatal("an address of the other family")
		}
		_, _, _, _ = p.Type(), p.Code(), p.MTU(), p.EmbeddedSeq()
		outer := p.V6() || p.VerifyChecksum()
		p.Rewrite(p.OuterDst(), p.OuterSrc(), tu.Reverse(), p.EmbeddedSeq()+9)
		if outer && !p.VerifyChecksum() {
			t.Fatal("checksum after Rewrite")
		}
		if p.Embedded() != tu.Reverse() {
			t.Fatal("embedded tuple after Rewrite")
		}
		if !bytes.Equal(b[len(p.Raw):], padding[len(p.Raw):]) {
			t.Fatal("wrote beyond the packet")
		}
	})
}
