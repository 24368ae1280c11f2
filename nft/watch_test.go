// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/internal/require"
)

// watched is an installed ruleset with a watcher, whose events come on a
// channel.
func watched(t *testing.T, p Params, k Kernel) (*Firewall, *Watcher, <-chan Event) {
	t.Helper()
	f := install(t, p, k, nil)
	w, err := f.Watcher()
	if err != nil {
		t.Fatal(err)
	}
	events := make(chan Event, 1000)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx, func(e Event) { events <- e }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		if err := w.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return f, w, events
}

// expect waits for an event of that kind and skips others.
func expect(t *testing.T, events <-chan Event, kind EventKind) Event {
	t.Helper()
	timeout := time.After(10 * time.Second)
	for {
		select {
		case e := <-events:
			if e.Kind == kind {
				return e
			}
			if e.Err != nil {
				t.Logf("%v: %v", e.Kind, e.Err)
			}
		case <-timeout:
			t.Fatalf("no event %v", kind)
		}
	}
}

// ourRules is our table as nft lists it, without counters' values and handles.
func ourRules(t *testing.T) string {
	t.Helper()
	list := nftList(t, "table", "inet", "weir")
	return regexp.MustCompile(`packets \d+ bytes \d+`).ReplaceAllString(list, "")
}

// TestWatchEndsWhole: when Run has returned, nothing of it is at work any more:
// what it used is closed then.
func TestWatchEndsWhole(t *testing.T) {
	newNetns(t)
	k := probed(t)
	k.Owner = true // no guard, which takes time
	f := install(t, fixed(1), k, nil)
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // a start that fails right after this one
	for range 300 {
		w, err := f.Watcher()
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(w.Run(ctx, func(Event) {}), w.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWatchRestores: whatever somebody does to a table that is not owned, it is
// put back, and an event names the program.
func TestWatchRestores(t *testing.T) {
	newNetns(t)
	k := probed(t)
	k.Owner = false
	f, _, events := watched(t, fixed(2), k)
	want := ourRules(t)
	for i, attack := range []string{
		"flush ruleset",
		"delete table inet weir",
		"flush table inet weir",
		"flush chain inet weir from_client4",
		"flush chain inet weir divert\nflush chain inet weir shard0",
		"flush set inet weir vips4",
		"delete element inet weir snips4 { 198.51.100.1 }",
		"add element inet weir except_ports { 12345 }",
		"insert rule inet weir divert accept",
		"add chain inet weir mine",
		"flush ruleset\ntable inet weir {\n}\n",
		"flush ruleset\ntable inet other {\nchain c {\ntype filter hook input priority 0;\n}\n}\n",
	} {
		out, err := nftRun(t, attack, "-f", "-")
		if err != nil {
			t.Fatalf("%q: %v %s", attack, err, out)
		}
		e := expect(t, events, Restored)
		if e.By != "nft" {
			t.Errorf("%q: the event names %q", attack, e.By)
		}
		if got := ourRules(t); got != want {
			t.Fatalf("after %q the table is\n%s\nwant\n%s", attack, got, want)
		}
		if got := f.Restored(); got != uint64(i+1) {
			t.Errorf("after %q: restored %d times, want %d", attack, got, i+1)
		}
		t.Logf("%-40q took %v", strings.ReplaceAll(attack, "\n", " "), e.Took)
	}
	// Our own changes are none of these.
	p := fixed(2)
	p.VIPs = p.VIPs[:1]
	if err := f.Update(p); err != nil {
		t.Fatal(err)
	}
	want = ourRules(t)
	nftLoad(t, "table inet marker {\n}\n")
	nftLoad(t, "flush ruleset")
	expect(t, events, Restored)
	if got := ourRules(t); got != want {
		t.Fatalf("after Update and a flush the table is\n%s\nwant\n%s", got, want)
	}
	if got := f.Restored(); got != 13 {
		t.Errorf("restored %d times, want 13: our own change counts", got)
	}
}

// TestWatchControl: without a watcher nothing comes back.
func TestWatchControl(t *testing.T) {
	newNetns(t)
	k := probed(t)
	k.Owner = false
	install(t, fixed(1), k, nil)
	nftLoad(t, "flush ruleset")
	if list := nftList(t, "tables"); list != "" {
		t.Errorf("there is %s", list)
	}
}

// TestWatchOwned: an owned table is neither removed nor installed again, and
// has no guard.
func TestWatchOwned(t *testing.T) {
	newRouter(t)
	k := probed(t)
	if !k.Owner {
		require.Missing(t, "nft-owner", "a kernel with owned tables (6.9)")
	}
	f, w, events := watched(t, citizenParams(), k)
	want := ourRules(t)
	for range 10 {
		nftLoad(t, "table inet other {\nchain c {\ntype filter hook forward priority 0; policy drop;\n}\n}\n")
		if e := expect(t, events, OthersChanged); len(e.Findings) != 1 {
			t.Fatalf("findings: %v", e.Findings)
		}
		if out, err := nftRun(t, "", "flush", "ruleset"); err != nil {
			t.Logf("foreign flush: %v %s", err, out)
		}
		if e := expect(t, events, OthersChanged); len(e.Findings) != 0 {
			t.Fatalf("findings: %v", e.Findings)
		}
	}
	if got := ourRules(t); got != want || f.Restored() != 0 || w.Drops() != 0 {
		t.Errorf("restored %d times; the table is\n%s", f.Restored(), got)
	}
}

// TestWatchFindings: rules that come and go while we run are told of.
func TestWatchFindings(t *testing.T) {
	newRouter(t)
	k := probed(t)
	_, _, events := watched(t, citizenParams(), k)
	nftFile(t, "router.nft")
	e := expect(t, events, OthersChanged)
	if len(e.Findings) != 3 {
		t.Errorf("%d findings, want 3: %v", len(e.Findings), e.Findings)
	}
	for _, f := range e.Findings {
		carryOut(t, f.Fix)
	}
	for e = expect(t, events, OthersChanged); len(e.Findings) > 0; e = expect(t, events, OthersChanged) {
	}
}

// TestWatchGuards: interfaces that come later get the guard too, and with it
// the router's own TCP stays silent through any number of flushes, with a
// client that sends all the time.
func TestWatchGuards(t *testing.T) {
	l := newLab(t)
	k := probed(t)
	k.Owner = false
	_, w, events := watched(t, labParams(), k)
	if !w.Guarded() {
		require.Missing(t, "bpf", fmt.Sprint(w.guardErr))
	}
	// Nobody serves the queue: what comes there is dropped. What slips
	// through a gap would be answered with a reset.
	stop := make(chan struct{})
	resets := make(chan int, 1)
	l.in(t, l.client, func() {
		fd := rawResetCounter(t)
		go func() { resets <- countResets(fd, stop) }()
	})
	sent := make(chan struct{})
	l.in(t, l.client, func() {
		fd := rawSender(t)
		go func() {
			defer close(sent)
			flood(fd, client4, netip.AddrPortFrom(vip4, 80), stop)
		}()
	})
	for range 20 {
		nftLoad(t, "flush ruleset")
		expect(t, events, Restored)
	}
	close(stop)
	<-sent
	if n := <-resets; n > 0 {
		t.Errorf("%d resets came through", n)
	}
	t.Logf("the guard dropped %d packets", w.Drops())
	if w.Drops() == 0 {
		t.Error("no packet met the gap: the test shows nothing")
	}
	before := w.guard.Interfaces()
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "later"}, PeerName: "later-peer"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "new interfaces have the guard", func() bool { return w.guard.Interfaces() == before+2 })
}

// rawSender is a socket that sends IP packets as they are.
func rawSender(t *testing.T) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// flood sends acknowledgments of connections that do not exist.
func flood(fd int, from netip.Addr, to netip.AddrPort, stop <-chan struct{}) {
	for port := uint16(1024); ; port++ {
		select {
		case <-stop:
			return
		default:
		}
		tr := &trial{family: unix.NFPROTO_IPV4, src: netip.AddrPortFrom(from, max(port, 1024)), dst: to, flags: flagACK}
		tr.assemble()
		checksum(tr.bytes)
		_ = unix.Sendto(fd, tr.bytes, 0, &unix.SockaddrInet4{Addr: to.Addr().As4()})
	}
}

// checksum fills in the TCP checksum of an IPv4 packet.
func checksum(b []byte) {
	var s uint32
	for i := 12; i < 20; i += 2 {
		s += uint32(b[i])<<8 | uint32(b[i+1])
	}
	tcp := b[20:]
	tcp[16], tcp[17] = 0, 0
	s += unix.IPPROTO_TCP + uint32(len(tcp))
	for i := 0; i+1 < len(tcp); i += 2 {
		s += uint32(tcp[i])<<8 | uint32(tcp[i+1])
	}
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	tcp[16], tcp[17] = byte(^s>>8), byte(^s)
}

// rawResetCounter is a socket that sees the TCP packets that arrive.
func rawResetCounter(t *testing.T) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		t.Fatal(err)
	}
	tv := unix.Timeval{Usec: 20000}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func countResets(fd int, stop <-chan struct{}) (n int) {
	b := make([]byte, 1<<16)
	for {
		got, _, err := unix.Recvfrom(fd, b, 0)
		if err == nil && got >= 40 && b[20+13]&flagRST != 0 {
			n++
		}
		select {
		case <-stop:
			if err != nil {
				return n
			}
		default:
		}
	}
}
