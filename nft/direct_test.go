// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/internal/require"
)

// TestDirect: the table that stands in for an instance takes its place in one
// step, sends new connections of both families to the server, under the SNIP,
// and goes when an instance comes or cleans up.
func TestDirect(t *testing.T) {
	l := newLab(t)
	k := probed(t)
	if !k.NAT {
		require.Missing(t, "nft-nat", ErrNoNAT.Error())
	}
	p := labParams()
	list := []Direct{
		{VIP: p.VIPs[0], Server: p.Servers[0], SNIP: snip4},
		{VIP: p.VIPs[1], Server: p.Servers[1], SNIP: snip6},
	}
	l.in(t, l.server, func() {
		ln, err := net.Listen("tcp", ":8080")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, c.RemoteAddr().String())
				c.Close()
			}
		}()
	})
	// ask is the client's address as the server sees it.
	ask := func(from func(func()), vip netip.AddrPort) (addr netip.Addr, err error) {
		from(func() {
			var c net.Conn
			if c, err = net.DialTimeout("tcp", vip.String(), 2*time.Second); err != nil {
				return
			}
			defer c.Close()
			var b []byte
			if b, err = io.ReadAll(c); err != nil {
				return
			}
			var ap netip.AddrPort
			ap, err = netip.ParseAddrPort(string(b))
			addr = ap.Addr().Unmap()
		})
		return addr, err
	}
	fromClient := func(f func()) { l.in(t, l.client, f) }
	fromRouter := func(f func()) { f() }

	for _, owned := range []bool{true, false} {
		k := k
		k.Owner = k.Owner && owned
		f, err := Install(p, k)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.RemoveTo(list); err != nil {
			t.Fatal(err)
		}
		for i, vip := range p.VIPs {
			want := list[i].SNIP
			for who, from := range map[string]func(func()){"client": fromClient, "router": fromRouter} {
				if got, err := ask(from, vip); err != nil || got != want {
					t.Errorf("owned=%v: %s to %v: the server sees %v (%v), want %v", owned, who, vip, got, err, want)
				}
			}
		}
		if err := f.Remove(); err != nil {
			t.Errorf("Remove afterwards: %v", err)
		}
		if list := nftList(t, "tables"); list != "table inet weir\n" {
			t.Errorf("the tables are now %q", list)
		}
	}
	got := strings.ReplaceAll(nftList(t, "table", "inet", "weir"), "priority dstnat", "priority -100")
	got = strings.ReplaceAll(got, "priority srcnat", "priority 100")
	r, err := BuildDirect("weir", list)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Cleanup("weir"); err != nil {
		t.Fatal(err)
	}
	nftLoad(t, r.Text())
	want := strings.ReplaceAll(nftList(t, "table", "inet", "weir"), "priority dstnat", "priority -100")
	want = strings.ReplaceAll(want, "priority srcnat", "priority 100")
	if got != want {
		t.Errorf("through netlink:\n%s\nfrom the text:\n%s", got, want)
	}
	f := install(t, p, k, nil)
	if list := nftList(t, "chains"); strings.Contains(list, "direct") {
		t.Errorf("a new instance leaves the stand-in: %s", list)
	}
	if _, err := ask(fromClient, p.VIPs[0]); err == nil {
		t.Error("with the rules of an instance that does not run, somebody answers")
	}
	if err := f.Remove(); err != nil {
		t.Fatal(err)
	}
}

func TestBuildDirectRefuses(t *testing.T) {
	ap := netip.MustParseAddrPort
	for _, d := range []Direct{
		{VIP: ap("203.0.113.10:80"), Server: ap("[2001:db8::1]:80")},
		{VIP: ap("203.0.113.10:80"), Server: ap("198.51.100.1:80"), SNIP: netip.MustParseAddr("2001:db8::1")},
		{VIP: ap("203.0.113.10:0"), Server: ap("198.51.100.1:80")},
	} {
		if _, err := BuildDirect("weir", []Direct{d}); err == nil {
			t.Errorf("%+v is accepted", d)
		}
	}
	if _, err := BuildDirect("a b", nil); err == nil {
		t.Error("a wrong table name is accepted")
	}
	f := &Firewall{p: fixed(1), k: Kernel{}}
	if err := f.RemoveTo([]Direct{{VIP: ap("203.0.113.10:80"), Server: ap("198.51.100.1:80")}}); !errors.Is(err, ErrNoNAT) {
		t.Errorf("without NAT: %v", err)
	}
}
