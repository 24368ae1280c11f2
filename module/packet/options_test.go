// SPDX-License-Identifier: Apache-2.0

package packet_test

import (
	"bytes"
	"testing"

	"github.com/weirgate/weir/module/packet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func segmentWith(t testing.TB, f packet.Flags, options []byte) packet.TCP {
	t.Helper()
	s := packet.Segment{Src: ep("198.51.100.1:1025"), Dst: ep("203.0.113.10:80"), Seq: 7, Ack: 9, Flags: f, Options: options}
	p, _ := packet.ParseTCP(packet.AppendSegment(nil, &s, nil))
	if p.Raw == nil {
		t.Fatalf("no view of a segment with options %x", options)
	}
	return p
}

func TestSYNOptions(t *testing.T) {
	none := packet.SYNOptions{WindowScale: -1}
	for _, c := range []struct {
		name string
		o    []byte
		want packet.SYNOptions
	}{
		{"none", nil, none},
		{"linux", []byte{2, 4, 5, 0xb4, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7},
			packet.SYNOptions{MSS: 1460, WindowScale: 7, SACKPermitted: true, Timestamps: true}},
		{"scale 15 counts as 14", []byte{3, 3, 15, 0}, packet.SYNOptions{WindowScale: 14}},
		{"scale 200 counts as 14", []byte{3, 3, 200, 0}, packet.SYNOptions{WindowScale: 14}},
		{"scale 0", []byte{3, 3, 0, 0}, packet.SYNOptions{}},
		{"wrong lengths", []byte{2, 3, 5, 3, 2, 4, 3, 1, 8, 4, 0, 0}, none},
		{"unknown ones, fast open, MPTCP", []byte{34, 2, 30, 4, 0, 0, 2, 4, 2, 0x18}, packet.SYNOptions{MSS: 536, WindowScale: -1}},
		{"behind the end", []byte{0, 0, 2, 4, 5, 0xb4, 0, 0}, none},
		{"cut", []byte{2, 4, 5, 0xb4, 4, 2, 3, 9}, packet.SYNOptions{MSS: 1460, WindowScale: -1, SACKPermitted: true}},
	} {
		for len(c.o)%4 != 0 {
			c.o = append(c.o, 0)
		}
		p := segmentWith(t, packet.SYN, c.o)
		if got := p.SYNOptions(); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

func TestAppendSYNOptions(t *testing.T) {
	for _, o := range []packet.SYNOptions{
		{WindowScale: -1}, {MSS: 1460, WindowScale: -1}, {MSS: 536, WindowScale: 7, SACKPermitted: true},
		{MSS: 65535, WindowScale: 0}, {WindowScale: 14, SACKPermitted: true}, {MSS: 88, WindowScale: -1, SACKPermitted: true},
	} {
		b := packet.AppendSYNOptions(nil, o)
		if len(b)%4 != 0 {
			t.Errorf("%+v: %d bytes", o, len(b))
		}
		p := segmentWith(t, packet.SYN, b)
		if got := p.SYNOptions(); got != o {
			t.Errorf("%+v read back as %+v", o, got)
		}
		ref := header.ParseSynOptions(b, false)
		if o.MSS != 0 && ref.MSS != o.MSS || ref.WS != int(o.WindowScale) || ref.SACKPermitted != o.SACKPermitted {
			t.Errorf("%+v read by gvisor as %+v", o, ref)
		}
	}
	if b := packet.AppendSYNOptions(nil, packet.SYNOptions{WindowScale: 99}); b[3] != 14 {
		t.Errorf("a scale of %d is written", b[3])
	}
}

func TestSACK(t *testing.T) {
	b1, b2 := packet.SACKBlock{Left: 100, Right: 200}, packet.SACKBlock{Left: 0xffffff00, Right: 5}
	one := packet.AppendSACKOption(nil, b1)
	two := packet.AppendSACKOption(nil, b1, b2)
	ts := []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}
	bare := two[2:]
	for _, c := range []struct {
		name string
		o    []byte
		off  int // in the options
		n    int
	}{
		{"none", nil, 0, 0},
		{"timestamps only", ts, 0, 0},
		{"one", one, 4, 1},
		{"two", two, 4, 2},
		{"timestamps and two", append(bytes.Clone(ts), two...), 16, 2},
		{"timestamps, two unaligned", append(append([]byte{8, 10, 0, 0, 0, 1, 0, 0, 0, 2}, bare...), 1, 1, 1, 1), 12, 2},
		{"odd", append(append([]byte{1}, bare...), 1), 3, 2},
		{"odd behind timestamps", append(append(bytes.Clone(ts), append([]byte{1}, bare...)...), 1), 15, 2},
		{"behind the end", append([]byte{0, 0, 0, 0}, two...), 0, 0},
		{"wrong length", append([]byte{1, 1, 5, 11}, make([]byte, 12)...), 0, 0},
		{"length of the fast layout beyond the header", []byte{1, 1, 5, 34, 0, 0, 0, 0, 0, 0, 0, 0}, 0, 0},
	} {
		p := segmentWith(t, packet.ACK, c.o)
		off, n := p.SACK()
		if n != c.n || n > 0 && off != 40+c.off {
			t.Errorf("%s: offset %d, %d blocks, want %d, %d", c.name, off, n, 40+c.off, c.n)
			continue
		}
		if n > 0 && p.SACKBlock(off, 0) != b1 || n > 1 && p.SACKBlock(off, 1) != b2 {
			t.Errorf("%s: blocks %v", c.name, p.SACKBlock(off, 0))
		}
	}
	many := packet.AppendSACKOption(nil, b1, b2, b1, b2, b1, b2)
	if len(many) != 4+8*packet.MaxSACKBlocks || packet.AppendSACKOption(nil) != nil {
		t.Errorf("%d bytes of SACK option", len(many))
	}
}

// TestOptionSettersChecksum: blocks at even and odd offsets, stripping, and
// blanking against gvisor's whole computation.
func TestOptionSettersChecksum(t *testing.T) {
	r := random(t)
	odd, sacks, stamps := 0, 0, 0
	for i := range 30000 {
		b := randomSegment(r, i%2 == 1)
		p := parse(t, b)
		payload := bytes.Clone(p.Payload())
		off, n := p.SACK()
		if n > 0 {
			sacks++
			if (off-p.HeaderLen())&1 != 0 {
				odd++
			}
			k := r.IntN(n)
			want := packet.SACKBlock{Left: packet.Seq(word(r)), Right: packet.Seq(word(r))}
			p.SetSACKBlock(off, k, want, packet.ChecksumVerified)
			if p.SACKBlock(off, k) != want {
				t.Fatalf("block %d: %v, want %v", k, p.SACKBlock(off, k), want)
			}
			if _, _, _, full := refTCP(b); p.Checksum() != full {
				t.Fatalf("SetSACKBlock at %d: %#04x, want %#04x", off, p.Checksum(), full)
			}
		}
		had := n > 0
		if r.IntN(2) == 0 {
			p.StripSACK(packet.ChecksumUnknown)
			if _, n := p.SACK(); n != 0 {
				t.Fatal("SACK survived StripSACK")
			}
		} else if p.BlankOption(packet.OptSACK, packet.ChecksumUnknown) != had {
			t.Fatalf("BlankOption said the opposite of %v", had)
		}
		if p.BlankOption(packet.OptTimestamps, packet.ChecksumUnknown) {
			stamps++
		}
		if o := p.SYNOptions(); o.Timestamps {
			t.Fatal("timestamps survived")
		}
		if _, _, _, full := refTCP(b); p.Checksum() != full {
			t.Fatalf("after blanking: %#04x, want %#04x in %x", p.Checksum(), full, b)
		}
		if !bytes.Equal(p.Payload(), payload) {
			t.Fatal("payload changed")
		}
	}
	if odd == 0 || sacks == odd || stamps == 0 {
		t.Fatalf("the random packets had %d SACKs, %d of them odd, %d timestamps", sacks, odd, stamps)
	}
}
