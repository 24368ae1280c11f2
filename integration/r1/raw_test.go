// SPDX-License-Identifier: Apache-2.0

package r1

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
	"github.com/weirgate/weir/integration/wire"
)

const (
	flagFIN = 1
	flagSYN = 2
	flagPSH = 8
	flagACK = 16
)

// A forger sends whole IPv4 packets from a host.
type forger struct{ fd int }

func newForger(t *testing.T, h *lab.Host) *forger {
	t.Helper()
	f := &forger{fd: -1}
	err := h.Do(func() (err error) {
		f.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(f.fd) })
	return f
}

func (f *forger) send(t *testing.T, p []byte) {
	t.Helper()
	for {
		err := unix.Sendto(f.fd, p, 0, &unix.SockaddrInet4{Addr: [4]byte(p[16:20])})
		if err == unix.ENOBUFS || err == unix.EINTR {
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return
	}
}

// firstSegment makes a POST on a connection of its own, waits until that is over,
// by a reset if asked, and returns the packet with its first data.
func firstSegment(r *rig, t *testing.T, rnd *rand.Rand, closing, reset bool) (first []byte, nonce uint64) {
	t.Helper()
	tap, err := r.Clients[0].Capture("lan", lab.CaptureOptions{})
	if err != nil {
		t.Fatal(err)
	}
	k, err := dial(t.Context(), r.Clients[0], &net.Dialer{}, r.vip(portWeb))
	if err != nil {
		t.Fatal(err)
	}
	q := request{nonce: rnd.Uint64() >> 1, close: closing}
	q.post, q.want = body(q.nonce+1, 200), body(q.nonce, 100)
	q.path = fmt.Sprintf("/n/%d/100", q.nonce)
	if _, err := k.do(&q); err != nil {
		t.Fatal(err)
	}
	if reset {
		_ = k.c.SetLinger(0)
	}
	local := k.c.LocalAddr().(*net.TCPAddr).AddrPort()
	_ = k.c.Close()
	recs, err := tap.Stop()
	if err != nil {
		t.Fatal(err)
	}
	for _, rec := range recs {
		if s, err := ladder.Decode(rec.Data); err == nil && rec.Outgoing && s.Src == local && s.Len > 0 {
			first = rec.Data
			break
		}
	}
	if first == nil {
		t.Fatalf("no data segment of %s in %d packets", local, len(recs))
	}
	// The record may take a moment to become a tombstone.
	until(t, 20*time.Second, "the end of the connection", func() bool { return r.metrics()["weir_client_connections"] == 0 })
	return first, q.nonce
}

// lateFirstSegments: a copy of a connection's first data segment comes again
// after its close, again and again. The POST in it is executed once, and the
// engine knows the copies for what they are.
func lateFirstSegments(r *rig, t *testing.T) {
	f := newForger(t, r.Clients[0])
	rnd := rand.New(rand.NewPCG(r.seed, 5<<32))
	before := events(r.metrics(), "tombstone")
	const copies = 20
	var firsts [][]byte
	var nonces []uint64
	for i := range 6 {
		first, nonce := firstSegment(r, t, rnd, i%3 == 0, i%3 == 2)
		firsts, nonces = append(firsts, first), append(nonces, nonce)
	}
	for range copies {
		for _, p := range firsts {
			f.send(t, p)
		}
		time.Sleep(20 * time.Millisecond) // so that they come at different times
	}
	want := before + copies*len(firsts)
	until(t, 20*time.Second, "the copies to be met by tombstones", func() bool { return events(r.metrics(), "tombstone") >= want })
	for _, n := range nonces {
		if x := r.web.executed(n); x != 1 {
			t.Errorf("POST %d was executed %d times", n, x)
		}
	}
}

// lineByLine: a client with Nagle's algorithm on writes its head line by line.
// Its kernel keeps the second line back until the first is acknowledged, and
// nobody else would acknowledge it. How long that takes on a machine that does
// nothing else is what the fastest of several shows.
func lineByLine(r *rig, t *testing.T) {
	took := byLines(r, t, 20)
	t.Logf("the fastest took %s, half of them at most %s, the slowest %s", took[0], took[len(took)/2], took[len(took)-1])
	if took[0] > served {
		t.Errorf("no request was served within %s, the fastest took %s", served, took[0])
	}
}

// served is the time within which a client that writes line by line is served.
const served = 100 * time.Millisecond

// byLines makes so many requests, each written line by line on one connection,
// and returns how long they took, the fastest first.
func byLines(r *rig, t *testing.T, n int) (took []time.Duration) {
	t.Helper()
	k, err := dial(t.Context(), r.Clients[0], &net.Dialer{}, r.vip(portWeb))
	if err != nil {
		t.Fatal(err)
	}
	defer k.c.Close()
	if err := k.c.SetNoDelay(false); err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(r.seed, 6<<32))
	for i := range n {
		q := newRequest(rnd, 0)
		q.want = q.want[:1]
		q.path = fmt.Sprintf("/n/%d/1", q.nonce)
		_ = k.c.SetDeadline(time.Now().Add(patience))
		begun := time.Now()
		for line := range strings.Lines(string(q.text())) {
			if _, err := io.WriteString(k.c, line); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := k.read(&q); err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
		took = append(took, time.Since(begun))
	}
	slices.Sort(took)
	return took
}

// windowHandOver: a client with a window of about 8 KB follows one of 1 MB on
// the same server connection. It is never sent more than its window and two
// segments.
func windowHandOver(r *rig, t *testing.T) {
	rnd := rand.New(rand.NewPCG(r.seed, 7<<32))
	before := r.metrics()
	for round := range 3 {
		beyond, segments := r.handOver(t, rnd, nil)
		t.Logf("round %d: %d segments, at most %d bytes beyond the window", round, segments, beyond)
		if beyond > tolerated {
			t.Errorf("round %d: a segment reaches %d bytes beyond the client's window", round, beyond)
		}
		if segments < smallAnswer/1500 {
			t.Errorf("round %d: only %d segments were seen", round, segments)
		}
	}
	opened := func(m map[string]float64) float64 {
		return m[`weir_farm_server_connections_opened_total{farm="one"}`]
	}
	if n := opened(r.metrics()) - opened(before); n > 3 {
		t.Errorf("%g server connections: the clients did not share one", n)
	}
}

const (
	// smallAnswer is what the client with the small window gets, in bytes.
	smallAnswer = 200_000
	// tolerated is how far beyond its window a client may be sent: two segments.
	tolerated = 2 * 1400
)

// handOver is one round: how far the client with the small window was sent
// beyond it, in bytes, and how many segments came to it. If spoil is not nil it
// is called between the two clients, and that the server fills what it takes for
// the window is all that the second one waits for.
func (r *rig) handOver(t *testing.T, rnd *rand.Rand, spoil func()) (beyond, segments int) {
	t.Helper()
	big, err := dial(t.Context(), r.Clients[0], dialerWithBuffer(1<<20), r.vip(portOne))
	if err != nil {
		t.Fatal(err)
	}
	defer big.c.Close()
	q := request{nonce: rnd.Uint64() >> 1}
	const n = 3 << 20
	q.path, q.want = fmt.Sprintf("/n/%d/%d", q.nonce, n), body(q.nonce, n)
	if _, err := big.do(&q); err != nil {
		t.Fatal(err)
	}
	if spoil != nil {
		spoil()
	}
	tap, err := r.Clients[1].Capture("lan", lab.CaptureOptions{SnapLen: 120})
	if err != nil {
		t.Fatal(err)
	}
	small, err := dial(t.Context(), r.Clients[1], dialerWithBuffer(8<<10), r.vip(portOne))
	if err != nil {
		t.Fatal(err)
	}
	defer small.c.Close()
	q = request{nonce: rnd.Uint64() >> 1}
	q.path, q.want = fmt.Sprintf("/n/%d/%d", q.nonce, smallAnswer), body(q.nonce, smallAnswer)
	_ = small.c.SetDeadline(time.Now().Add(patience))
	came := r.lan.Stats(wire.AB).Packets
	if _, err := small.c.Write(q.text()); err != nil {
		t.Fatal(err)
	}
	if spoil != nil {
		const burst = 30 // segments: several times what the window takes
		until(t, patience, "the server's burst", func() bool { return r.lan.Stats(wire.AB).Packets >= came+burst })
	} else {
		time.Sleep(200 * time.Millisecond) // the server fills what it takes for the window
		if _, err := small.read(&q); err != nil {
			t.Fatal(err)
		}
	}
	recs, err := tap.Stop()
	if err != nil {
		t.Fatal(err)
	}
	return overshoot(t, recs, small.c.LocalAddr().(*net.TCPAddr).AddrPort())
}

// overshoot is how far beyond the right edge that a client had advertised any
// segment to it reached, in bytes, and how many segments with data came.
func overshoot(t *testing.T, recs []lab.Record, local netip.AddrPort) (beyond, segments int) {
	t.Helper()
	edge, known, shift := uint32(0), false, uint8(0)
	for _, rec := range recs {
		s, err := ladder.Decode(rec.Data)
		if err != nil {
			continue
		}
		switch {
		case s.Src == local && rec.Outgoing && s.Flags&flagSYN != 0:
			shift = windowScale(rec.Data)
		case s.Src == local && rec.Outgoing && s.Flags&flagACK != 0:
			e := s.Ack + uint32(s.Window)<<shift
			if !known || int32(e-edge) > 0 {
				edge, known = e, true
			}
		case s.Dst == local && !rec.Outgoing && s.Len > 0:
			segments++
			if over := int(int32(s.Seq + uint32(s.Len) - edge)); known && over > beyond {
				beyond = over
			}
		}
	}
	return beyond, segments
}

// windowScale reads the option of a SYN in an IPv4 packet; 0 where there is
// none.
func windowScale(p []byte) uint8 {
	tcp := p[int(p[0]&15)*4:]
	o := tcp[20 : int(tcp[12]>>4)*4]
	for len(o) > 0 {
		switch {
		case o[0] == 1:
			o = o[1:]
		case o[0] == 0 || len(o) < 2 || int(o[1]) < 2 || int(o[1]) > len(o):
			return 0
		case o[0] == 3 && o[1] == 3:
			return o[2]
		default:
			o = o[o[1]:]
		}
	}
	return 0
}

// icmpErrors reads how many ICMP errors "destination unreachable" a host has
// received.
func icmpErrors(t *testing.T, h *lab.Host) (n int) {
	t.Helper()
	err := h.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		var names []string
		for line := range strings.Lines(string(b)) {
			fields := strings.Fields(line)
			if len(fields) == 0 || fields[0] != "Icmp:" {
				continue
			}
			if names == nil {
				names = fields
				continue
			}
			_, err := fmt.Sscan(fields[slices.Index(names, "InDestUnreachs")], &n)
			return err
		}
		return fmt.Errorf("no Icmp line in %q", b)
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// fragNeeded forges the error of a router that says that a segment between two
// ends does not fit into an MTU.
func fragNeeded(router netip.Addr, src, dst netip.AddrPort, seq uint32, mtu int) []byte {
	inner := make([]byte, 28)
	inner[0], inner[8], inner[9] = 0x45, 60, 6
	binary.BigEndian.PutUint16(inner[2:], 1500)
	binary.BigEndian.PutUint16(inner[6:], 0x4000)
	s, d := src.Addr().As4(), dst.Addr().As4()
	copy(inner[12:], s[:])
	copy(inner[16:], d[:])
	binary.BigEndian.PutUint16(inner[10:], checksum(inner[:20]))
	binary.BigEndian.PutUint16(inner[20:], src.Port())
	binary.BigEndian.PutUint16(inner[22:], dst.Port())
	binary.BigEndian.PutUint32(inner[24:], seq)
	p := make([]byte, 28, 56)
	p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_ICMP
	from := router.As4()
	copy(p[12:], from[:])
	copy(p[16:], s[:])
	p[20], p[21] = 3, 4
	binary.BigEndian.PutUint16(p[26:], uint16(mtu))
	p = append(p, inner...)
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	binary.BigEndian.PutUint16(p[10:], checksum(p[:20]))
	binary.BigEndian.PutUint16(p[22:], checksum(p[20:]))
	return p
}

func checksum(b []byte) uint16 {
	s := uint32(0)
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}
