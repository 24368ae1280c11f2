// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"bytes"
	"container/heap"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/weirgate/weir/module/packet"
)

// event is something that happens at a time.
type event struct {
	at  int64
	seq int
	do  func()
}

type events []event

func (q events) Len() int { return len(q) }
func (q events) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}
func (q events) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *events) Push(x any)   { *q = append(*q, x.(event)) }
func (q *events) Pop() any {
	v := *q
	e := v[len(v)-1]
	*q = v[:len(v)-1]
	return e
}

// pair is two hosts and a wire that loses, repeats and reorders.
type pair struct {
	t     *testing.T
	rnd   *rand.Rand
	now   int64
	q     events
	n     int
	hosts map[packet.Addr]*Host
	loss  float64
	other func(b []byte) // takes what is for no host of these
}

func (w *pair) after(d int64, do func()) {
	w.n++
	heap.Push(&w.q, event{w.now + d, w.n, do})
}

func newPair(t *testing.T, seed uint64, loss float64) *pair {
	w := &pair{t: t, rnd: rand.New(rand.NewPCG(seed, 1)), now: second, hosts: map[packet.Addr]*Host{}, loss: loss}
	return w
}

func (w *pair) host(a netip.AddrPort) *Host {
	env := &Env{
		Now: func() int64 { return w.now },
		Emit: func(b []byte, mss int) {
			w.carry(b)
		},
		Arm: func(c *Conn, at int64) { w.after(at-w.now, c.Timer) },
	}
	h := NewHost(env)
	w.hosts[packet.AddrFrom(a.Addr())] = h
	return h
}

// carry puts a packet onto the wire.
func (w *pair) carry(b []byte) {
	for range 1 + btoi(w.rnd.Float64() < w.loss/2) {
		if w.rnd.Float64() < w.loss {
			continue
		}
		d := millisecond
		if w.rnd.Float64() < w.loss {
			d += w.rnd.Int64N(5 * millisecond)
		}
		w.after(d, func() {
			p, _ := packet.ParseTCP(b)
			if h := w.hosts[p.Dst().Addr]; h != nil {
				h.Packet(b)
			} else if w.other != nil {
				w.other(b)
			}
		})
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// run lets time pass until nothing is left to happen.
func (w *pair) run(limit int64) {
	end := w.now + limit
	for len(w.q) > 0 && w.q[0].at <= end {
		e := heap.Pop(&w.q).(event)
		w.now = e.at
		e.do()
	}
}

// user sends what it is given, reads everything in steps and closes.
type user struct {
	w      *pair
	send   []byte
	got    []byte
	slow   bool // reads by and by
	closed bool
	why    error
	eof    bool
}

func (u *user) Connected(c *Conn) {
	c.Write(u.send)
	c.CloseWrite()
}

func (u *user) Readable(c *Conn) {
	if !u.slow {
		u.got = append(u.got, c.Read(c.Unread())...)
		return
	}
	if c.Unread() > 0 {
		u.w.after(int64(20+u.w.rnd.IntN(80))*millisecond, func() { u.take(c) })
	}
}

func (u *user) take(c *Conn) {
	u.got = append(u.got, c.Read(c.Unread())...)
}

func (u *user) PeerClosed(c *Conn) {
	u.got = append(u.got, c.Read(c.Unread())...)
	u.eof = true
}

func (u *user) Closed(c *Conn, why error) { u.closed, u.why = true, why }

var (
	left  = netip.MustParseAddrPort("198.18.0.1:40001")
	right = netip.MustParseAddrPort("198.18.0.2:80")
)

func randomOptions(r *rand.Rand) Options {
	o := Options{
		ISS: r.Uint32(), MSS: []uint16{1460, 536, 100, 8960, 0}[r.IntN(5)], Scale: int8(r.IntN(16) - 1), SACK: r.IntN(2) == 0,
		Buffer: []int{2000, 8 << 10, 64 << 10, 1 << 20}[r.IntN(4)], PathMSS: 1400, Nagle: r.IntN(2) == 0,
		DSACK: r.IntN(2) == 0, ProbeByte: r.IntN(2) == 0, WL1: r.IntN(2) == 0,
	}
	if r.IntN(2) == 0 {
		o.DelayedACK = 40 * millisecond
	}
	if r.IntN(3) == 0 {
		o.ISS = ^uint32(0) - uint32(r.IntN(3000))
	}
	if r.IntN(4) == 0 {
		o.GSO = 65000
	}
	if o.Scale > 7 {
		o.Buffer = max(o.Buffer, 4<<uint(o.Scale))
	}
	return o
}

// TestPair: two models exchange random bytes over a bad wire; everything
// arrives, both ends close in order and nothing is left.
func TestPair(t *testing.T) {
	base, n := seedOf(t), 1500
	for i := range n {
		seed := base + uint64(i)
		r := rand.New(rand.NewPCG(seed, 2))
		w := newPair(t, seed, []float64{0, 0.02, 0.1}[r.IntN(3)])
		a, b := w.host(left), w.host(right)
		mk := func() *user {
			u := &user{w: w, send: make([]byte, r.IntN(1<<uint(r.IntN(18)))), slow: r.IntN(4) == 0}
			for i := range u.send {
				u.send[i] = byte(r.Uint32())
			}
			return u
		}
		ua, ub := mk(), mk()
		oa, ob := randomOptions(r), randomOptions(r)
		b.Listen(packet.EndpointFrom(right), func(packet.Endpoint) (Options, App, bool) { return ob, ub, true })
		a.Dial(packet.EndpointFrom(left), packet.EndpointFrom(right), oa, ua)
		w.run(3000 * second)
		fail := func(format string, args ...any) {
			t.Helper()
			t.Fatalf("WEIR_SEED=%d: %s\n%+v\n%+v", seed, fmt.Sprintf(format, args...), oa, ob)
		}
		if !bytes.Equal(ua.send, ub.got) || !bytes.Equal(ub.send, ua.got) {
			fail("%d of %d and %d of %d bytes arrived", len(ub.got), len(ua.send), len(ua.got), len(ub.send))
		}
		if !ua.closed || !ub.closed || ua.why != nil || ub.why != nil || a.Len()+b.Len() != 0 {
			fail("closed %v %v, %v %v, %d and %d connections are left", ua.closed, ub.closed, ua.why, ub.why, a.Len(), b.Len())
		}
	}
}

// seedOf prints the seed of a random test and lets WEIR_SEED choose it.
func seedOf(t testing.TB) uint64 {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("WEIR_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 0, 64)
		if err != nil {
			t.Fatalf("WEIR_SEED=%q is no number: %v", s, err)
		}
		seed = n
	}
	t.Logf("WEIR_SEED=%d", seed)
	return seed
}
