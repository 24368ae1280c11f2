// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// spliced brings a client into a long response.
func spliced(b testing.TB, stored bool) (*rig, []byte, []byte) {
	g := newRig(&testing.T{}, oneServer)
	if stored {
		g.outlive(flowstore.NewHeap())
	}
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: "HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"})
	return g, g.raw(s1, ep2(10240), seg{fl: ack, seq: 500 + 48, ack: 2050, data: strings.Repeat("x", 1000)}),
		g.raw(c1, vip, seg{fl: ack, seq: seq + 50, ack: a + 48 + 1000})
}

func BenchmarkTranslate(b *testing.B) {
	g, data, acks := spliced(b, false)
	stored, _, _ := spliced(b, true)
	buf := make([]byte, 2048)
	var out Output
	var ev Event
	for _, c := range []struct {
		name string
		g    *rig
		b    []byte
		st   packet.ChecksumState
	}{
		{"data", g, data, packet.ChecksumVerified}, {"dataStored", stored, data, packet.ChecksumVerified},
		{"dataUnverified", g, data, packet.ChecksumUnknown}, {"dataUnverifiedStored", stored, data, packet.ChecksumUnknown},
		{"ack", g, acks, packet.ChecksumVerified}, {"ackStored", stored, acks, packet.ChecksumVerified},
	} {
		b.Run(c.name, func(b *testing.B) {
			g := c.g
			b.ReportAllocs()
			for b.Loop() {
				out.Reset()
				ev = Event{Kind: Packet, Checksum: c.st, Data: buf[:copy(buf, c.b)]}
				g.e.Step(g.now, &ev, &out)
			}
		})
	}
}

// BenchmarkExchange is a whole request and response of a kept-alive client:
// three packets.
func BenchmarkExchange(b *testing.B) {
	b.Run("plain", func(b *testing.B) { benchmarkExchange(b, false) })
	b.Run("stored", func(b *testing.B) { benchmarkExchange(b, true) })
}

func benchmarkExchange(b *testing.B, stored bool) {
	g := newRig(&testing.T{}, oneServer, keepIdle)
	if stored {
		g.outlive(flowstore.NewHeap())
	}
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 100)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	sseq, sack := packet.Seq(500), packet.Seq(2100)
	body := resp(1000)
	req := get("/", 100)
	var out Output
	var ev Event
	buf := make([]byte, 4096)
	step := func(p []byte) {
		out.Reset()
		ev = Event{Kind: Packet, Checksum: packet.ChecksumVerified, Data: buf[:copy(buf, p)]}
		g.e.Step(g.now, &ev, &out)
	}
	rt := g.raw(s1, ep2(10240), seg{fl: ack | psh, seq: 0, ack: 0, data: body})
	ct := g.raw(c1, vip, seg{fl: ack | psh, seq: 0, ack: 0, data: req})
	b.ReportAllocs()
	for b.Loop() {
		set(rt, sseq, sack)
		step(rt)
		sseq, sack = sseq+1000, sack+100
		seq, a = seq+100, a+1000
		set(ct, seq, a)
		step(ct)
		if ev.Verdict != Rewrite {
			b.Fatal("not rewritten")
		}
	}
}

// BenchmarkHeadByteByByte is a head whose bytes come one in a segment; the time
// for a byte must not grow with the head.
func BenchmarkHeadByteByByte(b *testing.B) {
	for _, size := range []int{4 << 10, 16 << 10, 64 << 10} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			head := longHead(size)
			var out Output
			for b.Loop() {
				g := newRigOf(&testing.T{}, 16, oneServer)
				seq, a := g.open(c1, 100, 9000)
				p := g.raw(c1, vip, seg{fl: ack | psh, seq: seq, ack: a, data: "x"})
				n := len(p)
				for i := range size {
					set(p, seq+packet.Seq(i), a)
					p[n-1] = head[i]
					out.Reset()
					ev := Event{Kind: Packet, Checksum: packet.ChecksumVerified, Data: p}
					g.e.Step(g.now, &ev, &out)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(size), "ns/byte")
		})
	}
}

func set(b []byte, seq, ack packet.Seq) {
	for i := range 4 {
		b[24+i] = byte(seq >> (24 - 8*i))
		b[28+i] = byte(ack >> (24 - 8*i))
	}
}

// BenchmarkFlowsSlice is what packets may have to wait for when somebody lists
// 100,000 connections: one slice of it, of as many as the control API copies
// between two batches, and one that finds none.
func BenchmarkFlowsSlice(b *testing.B) {
	const n = 100_000
	g := newRigOf(&testing.T{}, n, oneServer)
	for i := range n {
		client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}), uint16(1000+(i>>16)))
		g.cookies[packet.Seq(i)] = 7000
		g.SYN(client, packet.Seq(i))
		g.client(client, seg{fl: ack | psh, seq: packet.Seq(i + 1), ack: 7001, data: "GET /half"})
	}
	b.Run("full", func(b *testing.B) {
		list := make([]Flow, 0, 512)
		var from splice.Ref
		for b.Loop() {
			list, from = g.e.Flows(from, list[:0])
		}
	})
	g = newRigOf(&testing.T{}, n, oneServer)
	b.Run("empty", func(b *testing.B) {
		list := make([]Flow, 0, 512)
		var from splice.Ref
		for b.Loop() {
			list, from = g.e.Flows(from, list[:0])
		}
	})
}

// BenchmarkRecover is what stands between a successor's start and its first
// packet, with so many client connections.
func BenchmarkRecover(b *testing.B) {
	for _, n := range []int{1_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			g := newRig(&testing.T{}, oneServer)
			mem := flowstore.NewHeap()
			open := func(mem *flowstore.Memory) *Engine {
				e, err := Open(g.options(n), mem, g.db)
				if err != nil {
					b.Fatal(err)
				}
				return e
			}
			e := open(mem)
			e.Recover(g.now)
			for i := range n {
				k := packet.Tuple{Src: packet.Endpoint{Addr: packet.AddrFrom(c1.Addr()), Port: uint16(i)}, Dst: ep(vip)}
				k.Src.Addr[14], k.Src.Addr[13] = byte(i>>16), byte(i>>24)
				r := e.clients.Insert(&k)
				*e.clients.At(r) = splice.Client{
					State: splice.ClientHead, Farm: 1, MSS: 1400, IRS: packet.Seq(i), ISS: packet.Seq(i), Started: g.now, Last: g.now,
				}
				e.commit()
			}
			for b.Loop() {
				b.StopTimer()
				image := mem.Image()
				b.StartTimer()
				e := open(image)
				if took := e.Recover(g.now); took.Clients != n {
					b.Fatalf("%+v", took)
				}
				b.StopTimer()
				image.Free()
				b.StartTimer()
			}
		})
	}
}
