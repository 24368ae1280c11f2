// SPDX-License-Identifier: Apache-2.0

package r1

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/wire"
)

// dialerWithBuffer has a receive buffer of n bytes before its SYN leaves, as
// the kernel counts them: it doubles the number and offers about the half.
func dialerWithBuffer(n int) *net.Dialer {
	return &net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		_ = c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, n) })
		return err
	}}
}

// forgedErrors: 10,000 ICMP errors about connections that exist, with numbers
// that nobody has in flight, change nothing and reach nobody.
func forgedErrors(r *rig, t *testing.T) {
	f := newForger(t, r.Clients[1])
	before := r.metrics()
	clientErrors, serverErrors := icmpErrors(t, r.Clients[0]), icmpErrors(t, r.Servers[0])
	rnd := rand.New(rand.NewPCG(r.seed, 8<<32))
	k, err := dial(t.Context(), r.Clients[0], &net.Dialer{}, r.vip(portOne))
	if err != nil {
		t.Fatal(err)
	}
	defer k.c.Close()
	local := k.c.LocalAddr().(*net.TCPAddr).AddrPort()
	exchange := func(n int) {
		t.Helper()
		q := request{nonce: rnd.Uint64() >> 1}
		q.path, q.want = fmt.Sprintf("/n/%d/%d", q.nonce, n), body(q.nonce, n)
		if _, err := k.do(&q); err != nil {
			t.Fatal(err)
		}
	}
	exchange(10)
	// The server's connection is another one after each second without a
	// request, which a busy machine may let pass.
	server := func() (snip netip.AddrPort) {
		t.Helper()
		until(t, patience, "a connection to the server", func() bool {
			exchange(10)
			for _, s := range sockets(t, r) {
				if s.Addr() == r.SNIP() {
					snip = s
				}
			}
			return snip.IsValid()
		})
		return snip
	}
	router := r.ClientAddr(1)
	judged := func() int {
		m := r.metrics()
		return events(m, "icmp-ignored") + events(m, "icmp-translated") - events(before, "icmp-ignored") - events(before, "icmp-translated")
	}
	// An engine takes letterBox (64) errors at a time and leaves others aside,
	// so the next few come when it has judged these. A device's queue may drop
	// some all the same: then there are others.
	const forged, few = 10_000, 60
	sent, have := 0, 0
	for have < forged {
		if sent >= 2*forged {
			t.Fatalf("of %d forged errors %d reached the engine", sent, have)
		}
		snip := server() // the client's connection lives, and stays the same
		for i := range few {
			mtu := []int{68, 552, 576, 1000, 1280}[rnd.IntN(5)]
			if i%2 == 0 {
				f.send(t, fragNeeded(router, netip.AddrPortFrom(r.VIP().Addr(), portOne), local, rnd.Uint32(), mtu))
			} else {
				f.send(t, fragNeeded(router, snip, netip.AddrPortFrom(r.ServerAddr(0), portOne), rnd.Uint32(), mtu))
			}
		}
		sent += few
		want := have + few
		for end := time.Now().Add(time.Second); have < want && time.Now().Before(end); time.Sleep(time.Millisecond) {
			have = judged()
		}
	}
	after := r.metrics()
	t.Logf("%d forged errors, %d were judged", sent, have)
	if n := events(after, "icmp-translated") - events(before, "icmp-translated"); n != 0 {
		t.Errorf("%d forged errors were believed", n)
	}
	if c, s := icmpErrors(t, r.Clients[0])-clientErrors, icmpErrors(t, r.Servers[0])-serverErrors; c+s != 0 {
		t.Errorf("%d errors reached the client, %d the server", c, s)
	}
	// Segments are as large as ever: a wire for 1440 would say so.
	stats := r.lan.Stats(wire.AB)
	r.lan.Set(wire.AB, wire.Impairment{MTU: 1439})
	exchange(100_000)
	if n := r.lan.Stats(wire.AB).TooBig - stats.TooBig; n == 0 {
		t.Error("no segment of full size came: an error had its effect")
	}
	// The control: these errors, about segments that are under way, are believed.
	if n := events(r.metrics(), "icmp-translated") - events(after, "icmp-translated"); n == 0 {
		t.Error("true errors were not believed either: the case shows nothing")
	}
}

// sockets are the remote ends of the connections of the first server.
func sockets(t *testing.T, r *rig) (remote []netip.AddrPort) {
	t.Helper()
	all, err := r.Servers[0].Sockets()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		if s.Local.Port() == portOne && s.Remote.Port() != 0 && s.State == 1 {
			remote = append(remote, s.Remote)
		}
	}
	return remote
}

// recovery is how long a transfer may stand still when the path narrows.
const recovery = 3 * time.Second

// pathMTU: the path narrows from 1500 to 1280 bytes in the middle of a
// transfer, behind the router: toward the client during a response, toward the
// server during a request. The transfer goes on within three seconds, and all
// bytes are right.
func pathMTU(r *rig, t *testing.T) {
	narrow := wire.Impairment{MTU: 1280, Delay: time.Millisecond}
	for i, c := range []transfer{
		{"response, IPv4", r.VIP(), false}, {"response, IPv6", r.VIP6(), false},
		{"request, IPv4", r.VIP(), true}, {"request, IPv6", r.VIP6(), true},
	} {
		standstill := r.narrows(t, c, r.seed>>1+uint64(i)<<40, narrow, func(time.Duration) {})
		if standstill > recovery {
			t.Errorf("%s: no progress for %s", c.name, standstill)
		}
	}
	for _, w := range r.web.wrong {
		t.Error(w)
	}
}

// A transfer is a large response, or a large request (up).
type transfer struct {
	name string
	vip  netip.AddrPort
	up   bool
}

// narrows has a transfer's path, behind the router, become as bad as i in the
// middle of it, and returns for how long the transfer stood still at most. All
// the time it is told of a standstill that lasts.
func (r *rig) narrows(t *testing.T, c transfer, nonce uint64, i wire.Impairment, lasts func(time.Duration)) (standstill time.Duration) {
	t.Helper()
	w := r.lan
	if c.up {
		w = r.dmz
	}
	// A round trip of some milliseconds, so that the transfer takes a while.
	r.impair(wire.Impairment{Delay: time.Millisecond})
	before := events(r.metrics(), "icmp-translated")
	tooBig := w.Stats(wire.AB).TooBig
	k, err := dial(t.Context(), r.Clients[0], dialerWithBuffer(256<<10), c.vip.String())
	if err != nil {
		t.Fatal(err)
	}
	defer k.c.Close()
	var moved atomic.Int64 // bytes that the receiver has got
	narrowed := make(chan struct{})
	const n = 12 << 20
	q := request{nonce: nonce}
	result := make(chan error, 1)
	if c.up {
		q.post, q.want = body(q.nonce+1, n), body(q.nonce, 10)
		q.path = fmt.Sprintf("/n/%d/10", q.nonce)
		go func() { _, err := k.do(&q); result <- err }()
		// What the wire has carried to the servers tells how far it is.
		go func() {
			from := w.Stats(wire.AB).Packets
			for {
				moved.Store(int64(w.Stats(wire.AB).Packets-from) * 1200)
				select {
				case <-narrowed:
					return
				case <-time.After(5 * time.Millisecond):
				}
			}
		}()
	} else {
		q.path = fmt.Sprintf("/n/%d/%d", q.nonce, n)
		want := body(q.nonce, n)
		go func() { result <- k.watched(&q, want, &moved) }()
	}
	until(t, 20*time.Second, "the transfer to begin", func() bool { return moved.Load() > n/10 })
	close(narrowed)
	w.Set(wire.AB, i)
	count := moved.Load
	if c.up {
		count = func() int64 { s := w.Stats(wire.AB); return int64(s.Packets - s.TooBig) }
	}
	standstill = r.progress(t, result, count, lasts)
	believed := events(r.metrics(), "icmp-translated") - before
	t.Logf("%s: stood still for at most %s; %d packets too big, %d errors believed", c.name, standstill, w.Stats(wire.AB).TooBig-tooBig, believed)
	if w.Stats(wire.AB).TooBig == tooBig || (believed == 0) != i.BlackHole {
		t.Errorf("%s: nothing was too big, or its errors were not believed: the case shows nothing", c.name)
	}
	if c.up && r.web.executed(q.nonce) != 1 {
		t.Errorf("%s: executed %d times", c.name, r.web.executed(q.nonce))
	}
	return standstill
}

// progress waits for the end of a transfer and returns the longest time in
// which a counter did not move; lasts is told of it while it lasts.
func (r *rig) progress(t *testing.T, result chan error, count func() int64, lasts func(time.Duration)) (longest time.Duration) {
	t.Helper()
	last, since := count(), time.Now()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-result:
			if err != nil {
				t.Error(err)
			}
			return longest
		case <-tick.C:
			now := count()
			longest = max(longest, time.Since(since))
			if now != last {
				last, since = now, time.Now()
			}
			lasts(time.Since(since))
			if time.Since(since) > patience {
				t.Fatal("the transfer stands still")
			}
		}
	}
}

// watched is do for a large GET, of which moved counts the bytes that came.
func (k *caller) watched(q *request, want []byte, moved *atomic.Int64) error {
	_ = k.c.SetDeadline(time.Now().Add(patience))
	if _, err := k.c.Write(q.text()); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(k.br), nil)
	if err != nil {
		return err
	}
	if n := resp.Header.Get("Content-Length"); n != strconv.Itoa(len(want)) {
		return fmt.Errorf("%s: %s, Content-Length %s", q.path, resp.Status, n)
	}
	buf := make([]byte, 64<<10)
	for at := 0; at < len(want); {
		n, err := resp.Body.Read(buf)
		if !bytes.Equal(buf[:n], want[at:at+n]) {
			return fmt.Errorf("%s: wrong bytes at %d", q.path, at)
		}
		at += n
		moved.Store(int64(at))
		if err != nil && (err != io.EOF || at < len(want)) {
			return fmt.Errorf("%s: %d of %d bytes: %w", q.path, at, len(want), err)
		}
	}
	return nil
}
