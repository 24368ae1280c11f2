// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/internal/require"
)

// guarded makes a guard or skips the test where the kernel cannot run one.
func guarded(t *testing.T, p Params) *Guard {
	t.Helper()
	g, err := NewGuard(p)
	if errors.Is(err, ErrNoGuard) {
		require.Missing(t, "bpf", err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// refused says whether a connection attempt is answered with a reset; an
// attempt that nobody answers is given up quickly.
func refused(l *lab, t *testing.T, from int, to netip.AddrPort) (yes bool) {
	t.Helper()
	try := func() {
		c, err := net.DialTimeout("tcp", to.String(), 300*time.Millisecond)
		switch {
		case err == nil:
			c.Close()
			t.Errorf("somebody accepts connections to %v", to)
		case errors.Is(err, unix.ECONNREFUSED):
			yes = true
		}
	}
	switch from {
	case 0:
		try()
	case 1:
		l.in(t, l.client, try)
	case 2:
		l.in(t, l.server, try)
	}
	return yes
}

// TestEgressGuard: the router's own TCP answers for the engine's addresses until the
// guard stands, and never while it stands; everything else passes.
func TestEgressGuard(t *testing.T) {
	const router, client, server = 0, 1, 2
	cases := []struct {
		what string
		from int
		to   netip.AddrPort
		held bool // by the guard
	}{
		{"VIP", client, netip.AddrPortFrom(vip4, 80), true},
		{"VIP, IPv6", client, netip.AddrPortFrom(vip6, 80), true},
		{"VIP from the router itself", router, netip.AddrPortFrom(vip4, 80), true},
		{"another port of the VIP's address", client, netip.AddrPortFrom(vip4, 81), false},
		{"SNIP", server, netip.AddrPortFrom(snip4, 10240), true},
		{"SNIP, last port", server, netip.AddrPortFrom(snip4, 32767), true},
		{"SNIP, IPv6", server, netip.AddrPortFrom(snip6, 20000), true},
		{"SNIP, beyond the range", server, netip.AddrPortFrom(snip4, 32768), false},
		{"SNIP, below the range", server, netip.AddrPortFrom(snip6, 10239), false},
		{"SNIP, an excepted port", server, netip.AddrPortFrom(snip4, 11111), false},
		{"another address of the router", client, netip.MustParseAddrPort("198.18.1.1:20000"), false},
	}
	for _, how := range []string{"tcx", "clsact"} {
		t.Run(how, func(t *testing.T) {
			l := newLab(t)
			p := labParams()
			p.ExceptPorts = []uint16{11111}
			for _, c := range cases {
				if !refused(l, t, c.from, c.to) {
					t.Errorf("%s: nobody answers without the guard", c.what)
				}
			}
			g := guarded(t, p)
			attachBy(t, g, how)
			before := g.Drops()
			for _, c := range cases {
				if refused(l, t, c.from, c.to) == c.held {
					t.Errorf("%s: held back: %v, want %v", c.what, !c.held, c.held)
				}
			}
			if g.Drops() == before {
				t.Error("the guard counts nothing")
			}
			// Other addresses: the tables follow.
			p.VIPs = []netip.AddrPort{netip.AddrPortFrom(vip4, 81)}
			if err := g.Update(p); err != nil {
				t.Fatal(err)
			}
			if refused(l, t, client, netip.AddrPortFrom(vip4, 81)) || !refused(l, t, client, netip.AddrPortFrom(vip4, 80)) {
				t.Error("Update does not change the VIPs")
			}
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
			for _, c := range cases {
				if !refused(l, t, c.from, c.to) {
					t.Errorf("%s: nobody answers after the guard is gone", c.what)
				}
			}
			links, err := netlink.LinkList()
			if err != nil {
				t.Fatal(err)
			}
			for _, k := range links {
				qdiscs, err := netlink.QdiscList(k)
				if err != nil {
					t.Fatal(err)
				}
				for _, q := range qdiscs {
					if q.Type() == "clsact" {
						t.Errorf("a clsact is left on %s", k.Attrs().Name)
					}
				}
			}
		})
	}
}

// attachBy puts the guard on all interfaces in one of the two ways.
func attachBy(t *testing.T, g *Guard, how string) {
	t.Helper()
	if how == "tcx" {
		if err := g.Attach(); err != nil {
			t.Fatal(err)
		}
		for _, a := range g.links {
			if a.tcx == nil {
				require.Missing(t, "tcx", "a kernel with tcx (6.6)")
			}
		}
		return
	}
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		// Twice: what a killed process left is replaced.
		for range 2 {
			a, err := g.attachClsact(l.Attrs().Index)
			if err != nil {
				require.Missing(t, "clsact", fmt.Sprint(err))
			}
			a.qdisc = true
			g.links[l.Attrs().Index] = a
		}
	}
}

// TestEgressGuardRouted: on the way to a VIP that is routed through, nothing
// untranslated passes, whatever its flags.
func TestEgressGuardRouted(t *testing.T) {
	l := newLab(t)
	lo := up(t, "lo")
	for _, a := range []string{"203.0.113.10/32", "2001:db8:9::10/128"} {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.AddrDel(lo, addr); err != nil {
			t.Fatal(err)
		}
	}
	// The server has the VIP and refuses what comes there.
	l.in(t, l.server, func() { address(t, "lo", "203.0.113.10/32") })
	if err := netlink.RouteAdd(&netlink.Route{Dst: netlink.NewIPNet(net.IP(vip4.AsSlice())), Gw: net.IP(server4.AsSlice())}); err != nil {
		t.Fatal(err)
	}
	if !refused(l, t, 1, netip.AddrPortFrom(vip4, 80)) {
		t.Fatal("the VIP is not routed through")
	}
	g := guarded(t, labParams())
	if err := g.Attach(); err != nil {
		t.Fatal(err)
	}
	if refused(l, t, 1, netip.AddrPortFrom(vip4, 80)) {
		t.Error("an unmarked packet passes to the VIP")
	}
	if !refused(l, t, 1, netip.AddrPortFrom(vip4, 81)) {
		t.Error("another port of the address is not reached any more")
	}
}

func TestProbeGuard(t *testing.T) {
	newNetns(t)
	if err := ProbeGuard(); errors.Is(err, ErrNoGuard) {
		require.Missing(t, "bpf", err.Error())
	} else if err != nil {
		t.Fatal(err)
	}
}
