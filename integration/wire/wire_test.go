// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/trial"
	"github.com/weirgate/weir/internal/require"
)

// A pair is two hosts with a wire between them.
type pair struct {
	t    *testing.T
	a, b *lab.Host
	w    *Wire
}

var (
	aAddr4, bAddr4 = netip.MustParsePrefix("198.18.7.1/24"), netip.MustParsePrefix("198.18.7.2/24")
	aAddr6, bAddr6 = netip.MustParsePrefix("2001:db8:7::1/64"), netip.MustParsePrefix("2001:db8:7::2/64")
)

func newPair(t *testing.T, o Options, link lab.LinkOptions) *pair {
	t.Helper()
	require.Netns(t)
	l, err := lab.New("weirwire")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	p := &pair{t: t, a: l.Host("a"), b: l.Host("b")}
	m := l.Host("m")
	if err := m.SetSysctl("net/ipv6/conf/default/disable_ipv6", "1"); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Link(p.a, m, []netip.Prefix{aAddr4, aAddr6}, nil, link); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Link(p.b, m, []netip.Prefix{bAddr4, bAddr6}, nil, link); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, h := range []*lab.Host{p.a, p.b} {
		if err := h.Settle(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if p.w, err = Join(m, "a", "b", o); err != nil {
		t.Fatal(err)
	}
	return p
}

var offloadOff = lab.LinkOptions{NoOffload: true}

// udp is a socket in host a that is connected to one in host b.
func (p *pair) udp(v6 bool) (from net.Conn, to net.PacketConn) {
	p.t.Helper()
	addr := bAddr4.Addr()
	if v6 {
		addr = bAddr6.Addr()
	}
	to, err := p.b.ListenPacket("udp", netip.AddrPortFrom(addr, 5000).String())
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = to.Close() })
	if u, ok := to.(*net.UDPConn); ok {
		_ = u.SetReadBuffer(4 << 20)
	}
	if from, err = p.a.Dial(p.t.Context(), "udp", to.LocalAddr().String()); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = from.Close() })
	return from, to
}

// numbered sends n packets from a to b and returns the numbers in the order in
// which they arrived; want of them are due. It never has more under way than
// the kernel keeps: while the neighbour is being looked for some 270 packets
// wait, of a queue between two namespaces 1000, and what does not fit is lost
// before the wire has seen it, so that another packet takes its fate.
func (p *pair) numbered(n, want int) []int {
	p.t.Helper()
	from, to := p.udp(false)
	defer func() { _, _ = from.Close(), to.Close() }()
	arrived := make(chan []int)
	end := time.Now().Add(patience)
	_ = to.SetReadDeadline(end)
	go func() {
		var got []int
		b := make([]byte, 100)
		for {
			if len(got) == want {
				// Nothing more is due, and a little time shows it.
				_ = to.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			}
			if _, _, err := to.ReadFrom(b); err != nil {
				arrived <- got
				return
			}
			got = append(got, int(binary.BigEndian.Uint32(b)))
		}
	}()
	b := make([]byte, 60)
	for i := range n {
		binary.BigEndian.PutUint32(b, uint32(i))
		if _, err := from.Write(b); err != nil {
			p.t.Fatal(err)
		}
		if i > 0 && i%50 != 49 {
			continue
		}
		for p.w.Stats(AB).Packets < uint64(i+1) {
			if time.Now().After(end) {
				p.t.Fatalf("the wire has seen %d of %d packets", p.w.Stats(AB).Packets, i+1)
			}
			time.Sleep(100 * time.Microsecond)
		}
	}
	return <-arrived
}

// patience bounds what a test waits for.
const patience = 30 * time.Second

// TestFates: what happens is as often as it should be, and Fate says which
// packets it happens to. A second wire with the seed does the same again.
func TestFates(t *testing.T) {
	seed := trial.Seed(t)
	const n = 3000
	bad := Impairment{Loss: 0.05, Duplicate: 0.05, Corrupt: 0.05, Reorder: 0.05}
	var want []int // each number as often as it arrives
	var lost, duplicated, corrupted, reordered uint64
	for i := range n {
		f := bad.Fate(seed, AB, uint64(i))
		switch {
		case f.Lost:
			lost++
			continue
		case f.Corrupted:
			corrupted++ // the receiver's kernel drops it
		default:
			want = append(want, i)
		}
		if f.Reordered {
			reordered++
		}
		if f.Duplicated {
			duplicated++
			if !f.Corrupted {
				want = append(want, i)
			}
		}
	}
	for what, k := range map[string]uint64{"lost": lost, "duplicated": duplicated, "corrupted": corrupted, "reordered": reordered} {
		if k < n/40 || k > n/11 {
			t.Errorf("%d of %d packets are %s, the probability is 0.05", k, n, what)
		}
	}
	for range 2 {
		p := newPair(t, Options{Seed: seed, Impair: [2]Impairment{bad, {}}}, offloadOff)
		got := p.numbered(n, len(want))
		if slices.IsSorted(got) {
			t.Error("nothing was overtaken")
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%d packets arrive, want %d, or others", len(got), len(want))
		}
		s := p.w.Stats(AB)
		if s.Packets != n || s.Lost != lost || s.Duplicated != duplicated || s.Corrupted != corrupted || s.Reordered != reordered || s.Overrun+s.BadChecksum != 0 {
			t.Errorf("counters: %+v", s)
		}
	}
	var clean Impairment
	if f := clean.Fate(seed, AB, 7); f.Lost || f.Reordered || f.Duplicated || f.Corrupted {
		t.Errorf("without impairments: %+v", f)
	}
	if bad.Fate(seed, AB, 7) == bad.Fate(seed, BA, 7) || bad.Fate(seed, AB, 7) == bad.Fate(seed+1, AB, 7) {
		t.Error("another direction or seed has the same fate")
	}
}

// TestBegin: after Begin the fates are those of its seed, from the first packet
// on, whatever came before.
func TestBegin(t *testing.T) {
	seed := trial.Seed(t)
	const n = 200 // as many as a queue keeps
	bad := Impairment{Loss: 0.2}
	var want []int
	for i := range n {
		if !bad.Fate(seed, AB, uint64(i)).Lost {
			want = append(want, i)
		}
	}
	p := newPair(t, Options{Seed: seed + 1}, offloadOff)
	if got := p.numbered(7, 7); len(got) != 7 {
		t.Fatalf("%d of 7 packets arrive over a good wire", len(got))
	}
	p.w.Set(AB, bad)
	p.w.Begin(seed)
	if got := p.numbered(n, len(want)); !slices.Equal(got, want) {
		t.Errorf("%d packets arrive, want %d, or others", len(got), len(want))
	}
	if p.w.Seed() != seed {
		t.Errorf("the seed is %d, want %d", p.w.Seed(), seed)
	}
}

// TestTransfer: TCP brings every byte through, over both families, and a good
// wire changes nothing: neither order nor number.
func TestTransfer(t *testing.T) {
	seed := trial.Seed(t)
	bad := Impairment{Loss: 0.01, Reorder: 0.02, Duplicate: 0.01, Corrupt: 0.005}
	for name, i := range map[string]Impairment{"good": {}, "bad": bad, "delay": {Delay: 5 * time.Millisecond}} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, Options{Seed: seed, Impair: Bad(i)}, offloadOff)
			for _, addr := range []netip.Addr{bAddr4.Addr(), bAddr6.Addr()} {
				ln, err := p.b.Listen("tcp", netip.AddrPortFrom(addr, 7000).String())
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					for {
						c, err := ln.Accept()
						if err != nil {
							return
						}
						_, _ = io.Copy(c, c)
						_ = c.Close()
					}
				}()
				c, err := p.a.Dial(t.Context(), "tcp", ln.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				data := make([]byte, 1<<20)
				_, _ = rand.NewChaCha8([32]byte{1}).Read(data)
				begun := time.Now()
				go func() {
					_, _ = c.Write(data)
					_ = c.(*net.TCPConn).CloseWrite()
				}()
				_ = c.SetDeadline(time.Now().Add(60 * time.Second))
				got, err := io.ReadAll(c)
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s: %d of %d bytes, or wrong ones: %v", addr, len(got), len(data), err)
				}
				if d := time.Since(begun); i.Delay > 0 && d < 2*i.Delay {
					t.Errorf("%s: took %s, a round trip takes %s", addr, d, 2*i.Delay)
				}
				_ = c.Close()
				_ = ln.Close()
			}
			for _, d := range []Direction{AB, BA} {
				s := p.w.Stats(d)
				if s.Packets == 0 || s.BadChecksum != 0 || (s.Lost+s.Corrupted+s.Duplicated+s.Reordered > 0) != (name == "bad") {
					t.Errorf("%s: %+v", d, s)
				}
			}
		})
	}
}

// TestMTU: a packet that may not be cut is answered by an error from which the
// kernel learns the MTU; one that may be cut arrives in fragments.
func TestMTU(t *testing.T) {
	const mtu = 1320
	p := newPair(t, Options{Impair: [2]Impairment{{MTU: mtu}, {}}}, offloadOff)
	for _, v6 := range []bool{false, true} {
		from, to := p.udp(v6)
		raw, err := from.(*net.UDPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		level, discover, get := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_MTU
		if v6 {
			level, discover, get = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_MTU
		}
		_ = raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), level, discover, unix.IP_PMTUDISC_DO)
		})
		if err != nil {
			t.Fatal(err)
		}
		learnt := 0
		for try := 0; try < 200 && learnt != mtu; try++ {
			_, _ = from.Write(make([]byte, 1400))
			time.Sleep(5 * time.Millisecond)
			_ = raw.Control(func(fd uintptr) { learnt, err = unix.GetsockoptInt(int(fd), level, get) })
			if err != nil {
				t.Fatal(err)
			}
		}
		if learnt != mtu {
			t.Errorf("IPv6 %v: the sender's path has an MTU of %d, want %d", v6, learnt, mtu)
		}
		_ = to.Close()
	}
	if s := p.w.Stats(AB); s.TooBig == 0 || s.Fragmented != 0 {
		t.Errorf("counters: %+v", s)
	}
	// Without DF.
	p = newPair(t, Options{Impair: [2]Impairment{{MTU: 600}, {}}}, offloadOff)
	from, to := p.udp(false)
	raw, err := from.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)
	})
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 1400)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(data)
	if _, err := from.Write(data); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 2000)
	_ = to.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, _, err := to.ReadFrom(got)
	if err != nil || !bytes.Equal(got[:n], data) {
		t.Errorf("in fragments %d bytes arrive: %v", n, err)
	}
	if s := p.w.Stats(AB); s.Fragmented != 1 || s.TooBig != 0 {
		t.Errorf("counters: %+v", s)
	}
}

// TestUnfinishedChecksums: what an interface with offload sends is found out.
func TestUnfinishedChecksums(t *testing.T) {
	p := newPair(t, Options{}, lab.LinkOptions{})
	ln, err := p.b.Listen("tcp", netip.AddrPortFrom(bAddr4.Addr(), 7000).String())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if c, err := p.a.Dial(ctx, "tcp", ln.Addr().String()); err == nil {
		_ = c.Close()
	}
	if s := p.w.Stats(AB); s.BadChecksum == 0 {
		t.Errorf("counters: %+v", s)
	}
}

// TestCorrupt: every corruption of a TCP packet is seen by the checksums.
func TestCorrupt(t *testing.T) {
	seed := trial.Seed(t)
	i := Impairment{Corrupt: 1}
	for n := range uint64(20_000) {
		r := rand.New(rand.NewPCG(seed, n))
		p := tcpPacket(r)
		if !checksumOK(p) {
			t.Fatalf("packet %d is wrong already", n)
		}
		was := bytes.Clone(p)
		f := i.Fate(seed, AB, n)
		corrupt(p, &f)
		if bytes.Equal(was, p) {
			t.Fatalf("packet %d did not change", n)
		}
		// A changed protocol or place of a fragment is no TCP segment any more,
		// and a changed version or length no packet.
		if checksumOK(p) && p[0] == was[0] && (p[0]>>4 == 4 || p[6] == was[6]) {
			t.Fatalf("packet %d: the corruption %+v is not seen", n, f)
		}
	}
}

func tcpPacket(r *rand.Rand) []byte {
	data := make([]byte, 20+r.IntN(100))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	data[16], data[17] = 0, 0
	var p []byte
	if r.IntN(2) == 0 {
		p = make([]byte, 20, 200)
		p[0], p[8], p[9] = 0x45, 64, protoTCP
		binary.BigEndian.PutUint16(p[2:], uint16(20+len(data)))
		binary.BigEndian.PutUint32(p[12:], r.Uint32())
		binary.BigEndian.PutUint32(p[16:], r.Uint32())
		binary.BigEndian.PutUint16(p[10:], ^fold(sum(p)))
		binary.BigEndian.PutUint16(data[16:], ^fold(sum(p[12:20])+protoTCP+uint64(len(data))+sum(data)))
	} else {
		p = make([]byte, 40, 200)
		p[0], p[6], p[7] = 0x60, protoTCP, 64
		binary.BigEndian.PutUint16(p[4:], uint16(len(data)))
		for i := 8; i < 40; i++ {
			p[i] = byte(r.Uint32())
		}
		binary.BigEndian.PutUint16(data[16:], ^fold(sum(p[8:40])+protoTCP+uint64(len(data))+sum(data)))
	}
	return append(p, data...)
}

// TestSum: the sum is that of RFC 1071, byte by byte.
func TestSum(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for n := range 300 {
		b := make([]byte, n)
		var want uint64
		for i := range b {
			b[i] = byte(r.Uint32())
			want += uint64(b[i]) << (8 * (1 - i%2))
		}
		if fold(sum(b)) != fold(want) {
			t.Fatalf("%d bytes: %#x, want %#x", n, fold(sum(b)), fold(want))
		}
	}
}

// TestInto: a wire between a switch and its port is on every way through it.
func TestInto(t *testing.T) {
	require.Netns(t)
	l, err := lab.New("weirwire")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	f, err := l.Farm(lab.FarmOptions{Servers: 1, NoIPv6: true, Link: offloadOff})
	if err != nil {
		t.Fatal(err)
	}
	w, err := Into(l.Host("lan"), "router", Options{})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := f.Servers[0].Listen("tcp", f.Server(0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for lossy := range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(10-9*lossy)*time.Second)
		c, err := f.Clients[0].Dial(ctx, "tcp", f.Server(0).String())
		cancel()
		if (err != nil) != (lossy == 1) {
			t.Errorf("loss %v: %v", lossy == 1, err)
		}
		if err == nil {
			_ = c.Close()
		}
		w.Set(AB, Impairment{Loss: math.Nextafter(1, 2)})
	}
	for _, d := range []Direction{AB, BA} {
		if s := w.Stats(d); s.Packets < 2 || s.BadChecksum != 0 {
			t.Errorf("%s: %+v", d, s)
		}
	}
	if _, err := Into(l.Host("lan"), "router", Options{}); err == nil {
		t.Error("a port that is not plugged in gets a wire")
	}
	if fmt.Sprint(AB, BA, AB.Other()) != "a to b b to a b to a" {
		t.Error("names of directions")
	}
}
