// SPDX-License-Identifier: Apache-2.0

package ladder

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

var (
	client = netip.MustParseAddrPort("198.18.0.11:40001")
	vip    = netip.MustParseAddrPort("203.0.113.10:80")
	snip   = netip.MustParseAddrPort("198.51.100.1:10240")
	server = netip.MustParseAddrPort("198.51.100.11:80")
)

// script makes segments one millisecond apart.
type script struct{ segs []Segment }

func (s *script) add(side Side, toServer bool, flags uint8, seq, ack uint32, n int, payload string) {
	seg := Segment{Time: time.Unix(0, int64(len(s.segs))*1e6), Side: side, Seq: seq, Ack: ack, Flags: flags, Len: n, Payload: []byte(payload)}
	seg.Src, seg.Dst = client, vip
	if side == ServerSide {
		seg.Src, seg.Dst = snip, server
	}
	if !toServer {
		seg.Src, seg.Dst = seg.Dst, seg.Src
	}
	s.segs = append(s.segs, seg)
}

// fig6a is FIG 6A of the patent, flows 602A to 614D, with its numbers; the
// figure's numbers for the closing flows follow from these.
func fig6a() []Segment {
	var s script
	s.add(ClientSide, true, SYN, 2000, 2000, 0, "")
	s.add(ClientSide, false, SYN|ACK, 4000, 2001, 0, "")
	s.add(ClientSide, true, ACK, 2001, 4001, 0, "")
	s.add(ClientSide, true, ACK|PSH, 2001, 4001, 49, "GET /sales/forecast.html HTTP/1.1\r\n")
	s.add(ServerSide, true, SYN, 1950, 1950, 0, "")
	s.add(ServerSide, false, SYN|ACK, 6000, 1951, 0, "")
	s.add(ServerSide, true, ACK, 1951, 6001, 0, "")
	s.add(ServerSide, true, ACK|PSH, 1951, 6001, 49, "GET /sales/forecast.html HTTP/1.1\r\n")
	s.add(ServerSide, false, ACK|PSH, 6001, 2000, 999, "HTTP/1.1 200 OK\r\n")
	s.add(ClientSide, false, ACK|PSH, 4001, 2050, 999, "HTTP/1.1 200 OK\r\n")
	s.add(ClientSide, true, ACK, 2050, 5000, 0, "")
	s.add(ServerSide, true, ACK, 2000, 7000, 0, "")
	s.add(ClientSide, true, FIN|ACK, 2050, 5000, 0, "")
	s.add(ClientSide, false, ACK, 5000, 2051, 0, "")
	s.add(ClientSide, false, FIN|ACK, 5000, 2051, 0, "")
	s.add(ClientSide, true, ACK, 2051, 5001, 0, "")
	return s.segs
}

func figure() Figure {
	return Figure{
		Title: "FIG 6A", Client: Peer{"C1", client}, VIP: vip,
		Servers: []Peer{{"S", server}},
	}
}

func TestFigure6ADrawn(t *testing.T) {
	want := strings.TrimPrefix(`
FIG 6A  C1 198.18.0.11:40001    interface unit 203.0.113.10:80              S 198.51.100.11:80
 |-- SYN:2000,2000(0) ------------------------>|                                             |
 |<-- SYN ACK:4000,2001(0) --------------------|                                             |
 |-- ACK:2001,4001(0) ------------------------>|                                             |
 |-- GET:2001,4001(49) ----------------------->|                                             |
 |                                             |-- SYN:1950,1950(0) ------------------------>|
 |                                             |<-- SYN ACK:6000,1951(0) --------------------|
 |                                             |-- ACK:1951,6001(0) ------------------------>|
 |                                             |-- GET:1951,6001(49) ----------------------->|
 |<-- RESP:4001,2050(999) ---------------------|<-- RESP:6001,2000(999) ---------------------|
 |-- RESP ACK:2050,5000(0) ------------------->|-- RESP ACK:2000,7000(0) ------------------->|
 |-- FIN:2050,5000(0) ------------------------>|                                             |
 |<-- FIN ACK:5000,2051(0) --------------------|                                             |
 |<-- FIN:5000,2051(0) ------------------------|                                             |
 |-- FIN ACK:2051,5001(0) -------------------->|                                             |
`, "\n")
	var b strings.Builder
	if err := figure().Write(&b, fig6a()); err != nil {
		t.Fatal(err)
	}
	if b.String() != want {
		t.Errorf("drawn:\n%s\nwant:\n%s", b.String(), want)
	}
	for l := range strings.Lines(b.String()) {
		if len(l) > 101 {
			t.Errorf("%d columns: %s", len(l)-1, l)
		}
	}
}

func TestLimitsAndSelection(t *testing.T) {
	f := figure()
	f.MaxLines = 8
	lines := f.Lines(fig6a())
	if len(lines) != 8 {
		t.Errorf("%d lines, want 8:\n%s", len(lines), strings.Join(lines, "\n"))
	}
	if !strings.Contains(strings.Join(lines, "\n"), "8 more lines") {
		t.Errorf("no count of what is left out:\n%s", strings.Join(lines, "\n"))
	}
	if !strings.Contains(lines[7], "FIN ACK:2051,5001(0)") {
		t.Errorf("the last line is not the last segment: %s", lines[7])
	}

	f = figure()
	f.Relative = true
	text := strings.Join(f.Lines(fig6a()), "\n")
	for _, want := range []string{" SYN:0,2000(0)", " SYN ACK:0,1(0)", " GET:1,1(49)", " RESP ACK:50,1000(0)"} {
		if !strings.Contains(text, want) {
			t.Errorf("relative drawing lacks %q:\n%s", want, text)
		}
	}

	f = figure()
	f.Client.Addr = netip.MustParseAddrPort("198.18.0.12:0")
	f.Servers = nil
	if lines := f.Lines(fig6a()); len(lines) != 1 {
		t.Errorf("another client's figure has %d lines, want the heading alone", len(lines))
	}
	// Two servers: lines of the server side carry the name, and nothing is
	// wider than 100 columns with the largest numbers.
	f = figure()
	f.Servers = []Peer{{"s1", server}, {"s2", netip.MustParseAddrPort("198.51.100.12:80")}}
	var s script
	s.add(ServerSide, true, ACK, 1<<32-1, 1<<32-1, 65535, "OPTIONS / HTTP/1.1")
	last := f.Lines(s.segs)[1]
	if !strings.HasSuffix(last, "| s1") || len(last) > 100 || !strings.Contains(last, "OPTIONS:4294967295,4294967295(65535)") {
		t.Errorf("%d columns: %s", len(last), last)
	}
}

// TestPairsAcrossOthers: a segment is paired with its translation although
// others come in meanwhile, and the acknowledgment that ends the client's
// handshake is not taken for that of the server's.
func TestPairsAcrossOthers(t *testing.T) {
	var s script
	s.segs = fig6a()[:8]
	s.add(ServerSide, false, ACK, 6001, 2000, 0, "")
	s.add(ServerSide, false, ACK|PSH, 6001, 2000, 999, "HTTP/1.1 200 OK\r\n")
	s.add(ClientSide, false, ACK, 4001, 2050, 0, "")
	s.add(ClientSide, false, ACK|PSH, 4001, 2050, 999, "HTTP/1.1 200 OK\r\n")
	pairs := figure().Pairs(s.segs)
	var types []string
	for _, p := range pairs {
		types = append(types, p.Type)
	}
	if got := strings.Join(types, ","); got != "ACK,RESP" {
		t.Errorf("pairs %s, want ACK,RESP", got)
	}
	if err := Check(pairs, 0); err != nil {
		t.Error(err)
	}
	// A connection that is opened before the client asks.
	segs := fig6a()
	segs = append(append(segs[:3:3], segs[4:7]...), segs[3], segs[7])
	for i := range segs {
		segs[i].Time = time.Unix(0, int64(i))
	}
	pairs = figure().Pairs(segs)
	if len(pairs) != 1 || pairs[0].Type != "GET" {
		t.Errorf("pairs %+v, want the request alone", pairs)
	}
}

// TestCheck holds the patent's equations against FIG 6A, and shows that a
// segment that breaks them is found.
func TestCheck(t *testing.T) {
	f := figure()
	pairs := f.Pairs(fig6a())
	if len(pairs) != 2 {
		t.Fatalf("%d pairs, want 612A and 612C", len(pairs))
	}
	// The request is a pair too where no connection had to be opened for it.
	segs := fig6a()
	segs[3].Time = segs[7].Time.Add(-1)
	pairs = f.Pairs(segs)
	if len(pairs) != 3 {
		t.Fatalf("%d pairs, want the request, 612A and 612C", len(pairs))
	}
	if err := Check(pairs, 0); err != nil {
		t.Error(err)
	}
	for i := range pairs {
		pairs[i].Out.Len++
		if Check(pairs, 0) == nil {
			t.Errorf("pair %d with a byte too many passes", i)
		}
		pairs[i].Out.Len--
		for _, field := range []*uint32{&pairs[i].Out.Seq, &pairs[i].Out.Ack} {
			*field++
			if Check(pairs, 0) == nil {
				t.Errorf("pair %d with a number off by one passes", i)
			}
			*field--
		}
	}
	// With 24 bytes inserted into the request, the server's acknowledgment and
	// the client's later sequence numbers move apart by as much.
	pairs[0].Out.Len += 24
	pairs[1].In.Ack += 24
	pairs[2].Out.Seq += 24
	if err := Check(pairs, 24); err != nil {
		t.Error(err)
	}
	if Check(pairs, 0) == nil {
		t.Error("an insertion that was not declared passes")
	}
}

// tcp4 is a real SYN, 198.18.0.11:40001 to 203.0.113.10:80, without payload.
func tcp4(payload string) []byte {
	b := make([]byte, 40, 40+len(payload))
	b[0], b[8], b[9] = 0x45, 64, 6
	b = append(b, payload...)
	b[2], b[3] = byte(len(b)>>8), byte(len(b))
	copy(b[12:], client.Addr().AsSlice())
	copy(b[16:], vip.Addr().AsSlice())
	b[20], b[21], b[22], b[23] = 40001>>8, 40001&0xff, 0, 80
	b[27], b[31], b[32], b[33] = 7, 9, 0x50, SYN
	ip := ^fold(sum(0, b[:20]))
	b[10], b[11] = byte(ip>>8), byte(ip)
	s := sum(sum(0, client.Addr().AsSlice()), vip.Addr().AsSlice()) + 6 + uint64(len(b)-20)
	c := ^fold(sum(s, b[20:]))
	b[36], b[37] = byte(c>>8), byte(c)
	return b
}

func TestDecode(t *testing.T) {
	b := tcp4("odd")
	s, err := Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	if s.Src != client || s.Dst != vip || s.Seq != 7 || s.Ack != 9 || s.Flags != SYN || s.Len != 3 || string(s.Payload) != "odd" {
		t.Errorf("decoded %+v", s)
	}
	if !ChecksumsOK(b) {
		t.Error("a right checksum is called wrong")
	}
	for i := range b {
		if i == 8 {
			continue // the time to live has its own place in the sum; any byte would do
		}
		b[i] ^= 0x01
		if ChecksumsOK(b) {
			t.Errorf("a flipped bit in byte %d goes unseen", i)
		}
		b[i] ^= 0x01
	}
	// A cut-off packet keeps its length, and every prefix is safe to decode.
	if s, err := Decode(b[:40]); err != nil || s.Len != 3 || len(s.Payload) != 0 {
		t.Errorf("cut off behind the header: %+v, %v", s, err)
	}
	for i := range b {
		_, err := Decode(b[:i])
		if (err == nil) != (i >= 40) {
			t.Errorf("%d bytes: %v", i, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(tcp4("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte{0x60, 0, 0, 0, 0, 20, 6, 64})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Decode(b)
		if err == nil && (len(s.Payload) > s.Len || s.Len < 0) {
			t.Errorf("%d bytes of payload captured, %d on the wire", len(s.Payload), s.Len)
		}
		ChecksumsOK(b)
	})
}
