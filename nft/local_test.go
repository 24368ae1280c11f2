// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/weirgate/weir/module/packet"
)

func TestLocal(t *testing.T) {
	newRouter(t)
	l, err := WatchLocal()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	has := func(s string) bool { return l.Has(packet.AddrFrom(netip.MustParseAddr(s))) }
	for s, want := range map[string]bool{
		"203.0.113.10": true, "198.18.0.1": true, "2001:db8:203::10": true, "127.0.0.1": true, "127.1.2.3": true, "::1": true,
		"198.18.0.2": false, "203.0.113.11": false, "2001:db8:203::11": false,
	} {
		if got := has(s); got != want {
			t.Errorf("%s: %v, want %v", s, got, want)
		}
	}
	address(t, "lo", "203.0.113.11/32")
	eventually(t, "a new address", func() bool { return has("203.0.113.11") })
	lo := up(t, "lo")
	old, err := netlink.ParseAddr("203.0.113.11/32")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrDel(lo, old); err != nil {
		t.Fatal(err)
	}
	eventually(t, "an address that went", func() bool { return !has("203.0.113.11") })
	a := packet.AddrFrom(netip.MustParseAddr("198.18.0.1"))
	if n := testing.AllocsPerRun(100, func() { l.Has(a) }); n != 0 {
		t.Errorf("Has makes %v allocations", n)
	}
}
