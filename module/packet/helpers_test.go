// SPDX-License-Identifier: Apache-2.0

package packet_test

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/weirgate/weir/module/packet"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// random returns a generator and prints its seed; WEIR_SEED replays one.
func random(t testing.TB) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("WEIR_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 0, 64)
		if err != nil {
			t.Fatalf("WEIR_SEED=%q is no number: %v", s, err)
		}
		seed = n
	}
	t.Logf("WEIR_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func fill(r *rand.Rand, b []byte) {
	for i := range b {
		b[i] = byte(r.Uint32())
	}
}

// word returns a number that is often at an edge of 16-bit words, where the
// two zeros of one's complement are.
func word(r *rand.Rand) uint32 {
	edges := []uint32{0, 0xffffffff, 0xffff, 0xffff0000, 1, 0xfffe, 0x80000000, 0x7fffffff}
	if r.IntN(3) == 0 {
		return edges[r.IntN(len(edges))]
	}
	return r.Uint32()
}

func endpoint(r *rand.Rand, v6 bool) packet.Endpoint {
	e := packet.Endpoint{Port: uint16(word(r))}
	if v6 {
		fill(r, e.Addr[:])
		e.Addr[0] = 0x20
	} else {
		e.Addr[10], e.Addr[11] = 0xff, 0xff
		binary.BigEndian.PutUint32(e.Addr[12:], word(r))
	}
	return e
}

// randomSegment returns a segment with right checksums and random contents:
// payload length odd or even, options possibly with SACK at any alignment.
func randomSegment(r *rand.Rand, v6 bool) []byte {
	payload := make([]byte, r.IntN(200))
	fill(r, payload)
	if r.IntN(4) == 0 {
		clear(payload)
	}
	s := packet.Segment{
		Src: endpoint(r, v6), Dst: endpoint(r, v6), Seq: packet.Seq(word(r)), Ack: packet.Seq(word(r)),
		Flags: packet.ACK | packet.Flags(r.Uint32())&^packet.SYN, Window: uint16(word(r)),
		Options: randomOptions(r), TTL: uint8(1 + r.IntN(255)), IPID: uint16(word(r)), ClearDF: r.IntN(2) == 0,
	}
	b := packet.AppendSegment(nil, &s, payload)
	if r.IntN(3) == 0 {
		// An urgent pointer.
		p, _ := packet.ParseTCP(b)
		binary.BigEndian.PutUint16(b[p.HeaderLen()-len(p.Options())-2:], uint16(word(r)))
		p.FillChecksum()
	}
	return b
}

func randomOptions(r *rand.Rand) []byte {
	var o []byte
	for range r.IntN(4) {
		o = append(o, packet.OptNOP)
	}
	if r.IntN(2) == 0 {
		o = append(o, packet.OptTimestamps, 10)
		o = binary.BigEndian.AppendUint64(o, r.Uint64())
	}
	for range r.IntN(4) {
		o = append(o, packet.OptNOP)
	}
	if n := (40 - len(o) - 2) / 8; n > 0 && r.IntN(2) == 0 {
		n = 1 + r.IntN(n)
		o = append(o, packet.OptSACK, byte(2+8*n))
		for range 2 * n {
			o = binary.BigEndian.AppendUint32(o, word(r))
		}
	}
	for len(o)%4 != 0 {
		o = append(o, packet.OptNOP)
	}
	return o
}

func parse(t testing.TB, b []byte) packet.TCP {
	t.Helper()
	p, prob := packet.ParseTCP(b)
	if prob != packet.OK {
		t.Fatalf("ParseTCP: %v in %x", prob, b)
	}
	return p
}

// refTCP returns gvisor's views of the same packet and the transport checksum
// that gvisor computes over it.
func refTCP(b []byte) (tcp header.TCP, src, dst tcpip.Address, full uint16) {
	var l4 []byte
	if b[0]>>4 == 4 {
		ip := header.IPv4(b)
		src, dst, l4 = ip.SourceAddress(), ip.DestinationAddress(), ip.Payload()
	} else {
		ip := header.IPv6(b)
		src, dst, l4 = ip.SourceAddress(), ip.DestinationAddress(), ip.Payload()
	}
	c := append([]byte(nil), l4...)
	c[16], c[17] = 0, 0
	full = ^checksum.Checksum(c, header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, uint16(len(l4))))
	return header.TCP(l4), src, dst, full
}

func ep(s string) packet.Endpoint { return packet.EndpointFrom(netip.MustParseAddrPort(s)) }
