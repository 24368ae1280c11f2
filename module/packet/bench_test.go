// SPDX-License-Identifier: Apache-2.0

package packet_test

import (
	"fmt"
	"testing"

	"github.com/weirgate/weir/module/packet"
)

func BenchmarkParse(b *testing.B) {
	for _, c := range []struct {
		name string
		opts []byte
	}{{"plain", nil}, {"sack", packet.AppendSACKOption(nil, packet.SACKBlock{Left: 1, Right: 2})}} {
		b.Run(c.name, func(b *testing.B) {
			s := packet.Segment{Src: ep("198.51.100.1:1025"), Dst: ep("203.0.113.10:80"), Flags: packet.ACK, Options: c.opts}
			raw := packet.AppendSegment(nil, &s, make([]byte, 1400))
			b.ReportAllocs()
			for b.Loop() {
				if _, prob := packet.ParseTCP(raw); prob != packet.OK {
					b.Fatal(prob)
				}
			}
		})
	}
}

func BenchmarkRewrite(b *testing.B) {
	for _, v6 := range []bool{false, true} {
		b.Run(fmt.Sprintf("v6=%v", v6), func(b *testing.B) {
			s := packet.Segment{Src: ep("198.51.100.1:1025"), Dst: ep("203.0.113.10:80"), Flags: packet.ACK}
			if v6 {
				s.Src, s.Dst = ep("[2001:db8::1]:1025"), ep("[2001:db8::10]:80")
			}
			p := parse(b, packet.AppendSegment(nil, &s, make([]byte, 1400)))
			rw := packet.Rewrite{Src: s.Dst, Dst: s.Src, Seq: 1, Ack: 2, Window: 3, Flags: packet.ACK}
			b.ReportAllocs()
			for b.Loop() {
				rw.Seq++
				p.Rewrite(&rw, packet.ChecksumVerified)
			}
		})
	}
}

func BenchmarkSum(b *testing.B) {
	for _, n := range []int{20, 64, 1460, 65000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			buf := make([]byte, n)
			b.SetBytes(int64(n))
			var s uint32
			for b.Loop() {
				s += packet.Sum(buf, 0)
			}
			_ = s
		})
	}
}

func BenchmarkHash(b *testing.B) {
	t := packet.Tuple{Src: ep("198.51.100.1:1025"), Dst: ep("203.0.113.10:80")}
	var s uint64
	for b.Loop() {
		s += t.Hash(s)
	}
	_ = s
}
