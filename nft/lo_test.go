// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/weirgate/weir/internal/require"
)

// requireSYNToLo skips on a kernel that cannot.
func requireSYNToLo(t *testing.T, k Kernel) {
	t.Helper()
	if !k.SYNToLo() {
		require.Missing(t, "nft-dup", ErrNoDup.Error())
	}
}

// TestSYNToLoNeeds: without one of the kernel's features there are no rules.
func TestSYNToLoNeeds(t *testing.T) {
	p := fixed(1)
	p.SYNToLo = true
	for name, c := range map[string]struct {
		change     func(*Kernel)
		ok         bool
		companions int
	}{
		"all":            {func(*Kernel) {}, true, 2},
		"not owned":      {func(k *Kernel) { k.Owner = false }, false, 0},
		"no destroy":     {func(k *Kernel) { k.Destroy = false }, false, 0},
		"no dup ip":      {func(k *Kernel) { k.Dup4 = false }, false, 0},
		"no dup ip6":     {func(k *Kernel) { k.Dup6 = false }, false, 0},
		"no IPv6 at all": {func(k *Kernel) { k.Dup6, k.IPv6 = false, false }, true, 1},
	} {
		k := full
		c.change(&k)
		r, err := Build(p, k)
		if k.SYNToLo() != c.ok || (err == nil) != c.ok || err != nil && !errors.Is(err, ErrNoDup) {
			t.Errorf("%s: SYNToLo %v, Build: %v", name, k.SYNToLo(), err)
			continue
		}
		if err != nil {
			continue
		}
		if len(r.Companions) != c.companions {
			t.Errorf("%s: %d companions, want %d", name, len(r.Companions), c.companions)
		}
		// A marked SYN that no companion takes would come to the router's TCP.
		if n := strings.Count(r.Text(), "meta mark set "); n != c.companions {
			t.Errorf("%s: SYNs are marked %d times for %d companions", name, n, c.companions)
		}
	}
	q := fixed(1)
	if key := fixedDifference(&p, &q); key == "" {
		t.Error("a change of SYNToLo is taken for one of elements")
	}
}

// passed is how many packets went out by lo to port 80, where countLoopback
// has been loaded.
func passed(t *testing.T) int {
	t.Helper()
	c, err := dialReader()
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	all, err := c.counters("watch")
	if err != nil {
		t.Fatal(err)
	}
	return int(all["lo"].Packets)
}

const countLoopback = `table inet watch {
	counter lo { }
	chain output {
		type filter hook output priority filter; policy accept;
		oif lo tcp dport 80 counter name "lo"
	}
}`

// TestSYNToLo: a SYN that the administrator's rules let through goes out by lo
// with our mark. Where no program takes it there, it comes to the SYN queue by
// lo. One that they refuse is not seen on lo. No one is answered by the router's
// own TCP, or routed on. A SYN to a routed VIP goes to the SYN queue at once.
func TestSYNToLo(t *testing.T) {
	for _, routed := range []bool{false, true} {
		t.Run(fmt.Sprintf("routed=%v", routed), func(t *testing.T) {
			eachFamily(t, func(t *testing.T, e ends) { testSYNToLo(t, e, routed) })
		})
	}
}

func testSYNToLo(t *testing.T, e ends, routed bool) {
	l := newLab(t)
	k := probed(t)
	requireSYNToLo(t, k)
	p := labParams()
	p.SYNToLo = true
	hook := "input"
	if routed {
		hook = "forward"
		e.vip = netip.MustParseAddr("198.51.100.80")
		bits := 32
		if e.client.Is6() {
			e.vip, bits = netip.MustParseAddr("2001:db8:80::80"), 128
		}
		p.VIPs = append(p.VIPs, at(e.vip, 80))
		if err := netlink.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: e.vip.AsSlice(), Mask: net.CIDRMask(bits, bits)}, Gw: e.server.AsSlice()}); err != nil {
			t.Fatal(err)
		}
	}
	nftLoad(t, countLoopback)
	nftLoad(t, fmt.Sprintf(`table inet admin {
	chain refuse {
		type filter hook %s priority filter + 199; policy accept;
		tcp sport 40001 drop
	}
}`, hook))
	f, err := Install(p, k)
	if err != nil {
		t.Fatal(err)
	}
	q := listen(t, p.QueueFirst, p.Queues(), nil)
	arrived := l.tap(t, l.server, e.client.Is4())
	before := resets(t)

	sent := e.fromClient(40002, syn)
	l.send(t, l.client, 0, e.fromClient(40001, syn), sent)
	got := q.wait(t, 1)[0]
	if mark := got.mark & p.MarkMask; got.queue != p.SYNQueue() || (got.hook == hookInput) == routed || (got.in == 1) == routed || (mark == p.Mark) == routed {
		t.Errorf("the SYN came to queue %d at hook %d by interface %d with mark %#x", got.queue, got.hook, got.in, got.mark)
	}
	// The kernel has taken one off the TTL, and made a new checksum for it.
	if head := len(sent) - 20; !slices.Equal(got.data[head:], sent[head:]) {
		t.Errorf("the SYN came as %x, want %x", got.data, sent)
	}
	want := 1
	if routed {
		want = 0
	}
	if n := passed(t); n != want {
		t.Errorf("%d packets on lo, want %d", n, want)
	}
	if n := counter(t, f, CounterSYN); n != 1 {
		t.Errorf("%d SYNs counted, want 1", n)
	}
	// A running connection's packets never see lo.
	l.send(t, l.client, 0, e.fromClient(40002, ackFlag))
	if got := q.wait(t, 2)[1]; got.queue != p.ShardQueue(0) {
		t.Errorf("the ACK came to queue %d", got.queue)
	}
	if !routed {
		// The router's own clients come by lo from the start.
		l.send(t, l.router, 0, tcpPacket(at(e.vip, 40003), at(e.vip, 80), syn, ""))
		if got := q.wait(t, 3)[2]; got.queue != p.SYNQueue() || got.in != 1 || got.mark != 0 {
			t.Errorf("the router's own SYN came to queue %d by interface %d with mark %#x", got.queue, got.in, got.mark)
		}
		waitCounter(t, f, CounterSYN, 2)
	}
	// A packet that nothing diverts shows that the ones before it are done.
	l.send(t, l.client, 0, tcpPacket(at(e.client, 40004), at(e.snip, 81), ackFlag, ""))
	eventually(t, "a RST", func() bool { return resets(t) > before })
	if n := resets(t) - before; n != 1 {
		t.Errorf("%d RSTs, want 1", n)
	}
	if n := len(arrived()); n != 0 {
		t.Errorf("%d packets were routed on", n)
	}
	if err := f.Remove(); err != nil {
		t.Fatal(err)
	}
	if list := nftList(t, "tables"); list != "table inet watch\ntable inet admin\n" {
		t.Errorf("left behind:\n%s", list)
	}
	if !routed {
		l.send(t, l.client, 0, sent)
		eventually(t, "the control: a RST", func() bool { return resets(t) == before+2 })
	}
}

// TestCompanions: a start without SYNToLo removes what one with it has left,
// whichever way the table is installed, and one with it replaces a table that
// is no companion; both of them and Cleanup leave nothing behind.
func TestCompanions(t *testing.T) {
	newNetns(t)
	k := probed(t)
	requireSYNToLo(t, k)
	with, without := fixed(2), fixed(2)
	with.SYNToLo = true
	const all = "table inet weir\ntable ip weir\ntable ip6 weir\n"
	tables := func(when, want string) {
		t.Helper()
		if got := nftList(t, "tables"); got != want {
			t.Errorf("%s:\n%s\nwant\n%s", when, got, want)
		}
	}
	start := func(p Params) *Firewall {
		t.Helper()
		f, err := Install(p, k)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	leave := func(f *Firewall) {
		t.Helper()
		if err := f.Leave(); err != nil {
			t.Fatal(err)
		}
	}

	f := start(with)
	tables("installed", all)
	if _, err := nftRun(t, "", "delete", "table", "ip", "weir"); err == nil {
		t.Error("somebody else could delete a companion")
	}
	if _, err := Install(with, k); !errors.Is(err, ErrOwned) {
		t.Errorf("Install beside a living owner: %v", err)
	}
	if _, err := Cleanup("weir"); !errors.Is(err, ErrOwned) {
		t.Errorf("Cleanup beside a living owner: %v", err)
	}
	if err := f.Reinstall(); err != nil {
		t.Fatal(err)
	}
	tables("installed again", all)
	leave(f)
	tables("left", all)
	if found, err := Cleanup("weir"); err != nil || !found {
		t.Errorf("Cleanup: %v, %v", found, err)
	}
	tables("cleaned up", "")

	leave(start(with))
	f = start(without) // in place
	tables("renewed without", "table inet weir\n")
	leave(f)
	f = start(with) // in place
	tables("renewed with", all)
	leave(f)
	other := without
	other.Shards = 3
	f = start(other) // whole
	tables("replaced without", "table inet weir\n")
	if err := f.Remove(); err != nil {
		t.Fatal(err)
	}

	leave(start(with))
	if out, err := nftRun(t, "", "add", "chain", "ip", "weir", "other"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	f = start(with)
	if list := nftList(t, "chains"); strings.Contains(list, "other") {
		t.Errorf("a table with other chains stayed:\n%s", list)
	}
	if k.NAT {
		if err := f.RemoveTo([]Direct{{VIP: with.VIPs[0], Server: with.Servers[0], SNIP: with.SNIPs[0]}}); err != nil {
			t.Fatal(err)
		}
		tables("direct", "table inet weir\n")
		if _, err := Cleanup("weir"); err != nil {
			t.Fatal(err)
		}
	} else if err := f.Remove(); err != nil {
		t.Fatal(err)
	}
	tables("at the end", "")
}
