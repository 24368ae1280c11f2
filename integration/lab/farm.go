// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/weirgate/weir/integration/lab/ladder"
)

// The addresses of the standard topology. All of them come from networks that
// are reserved for tests and documentation.
var (
	clientNet4 = netip.MustParsePrefix("198.18.0.1/16")
	clientNet6 = netip.MustParsePrefix("2001:db8:18::1/64")
	serverNet4 = netip.MustParsePrefix("198.51.100.1/24")
	serverNet6 = netip.MustParsePrefix("2001:db8:51::1/64")
	vip4       = netip.MustParseAddr("203.0.113.10")
	vip6       = netip.MustParseAddr("2001:db8:203::10")
)

const firstHost = 11 // the last number of the first client's and the first server's address

// FarmOptions says how large the standard topology is. The zero value has one
// client, three servers, both address families and the VIP on the router.
type FarmOptions struct {
	Clients int // 0 means 1; at most 200
	Servers int // 0 means 3; at most 200
	// Routed has the VIP behind the router, by a route to the first server,
	// instead of making it an address of the router.
	Routed bool
	NoIPv6 bool
	Link   LinkOptions // of every link; the names are ignored
}

// A Farm is the standard topology: clients on one Ethernet segment, servers on
// another, and a router, the interface unit, between them.
//
//	c1 198.18.0.11 --+                                          +-- s1 198.51.100.11
//	c2 198.18.0.12 --+-- lan [198.18.0.1 router 198.51.100.1] dmz --+-- s2 198.51.100.12
//	...              |        VIP 203.0.113.10                  |   ...
//
// The router forwards between them, so that everything can be reached without
// Weir too. IPv6 has the same numbers: 2001:db8:18::, 2001:db8:51:: and the
// VIP 2001:db8:203::10.
type Farm struct {
	Lab       *Lab
	Router    *Host
	Clients   []*Host // c1, c2, …
	Servers   []*Host // s1, s2, …
	ClientLeg string  // the router's interface toward the clients
	ServerLeg string  // the router's interface toward the servers
	options   FarmOptions
}

// Farm builds the standard topology in the lab.
func (l *Lab) Farm(o FarmOptions) (*Farm, error) {
	if o.Clients == 0 {
		o.Clients = 1
	}
	if o.Servers == 0 {
		o.Servers = 3
	}
	if o.Clients > 200 || o.Servers > 200 {
		return nil, errors.New("lab: a farm has at most 200 clients and 200 servers")
	}
	o.Link.AName, o.Link.BName = "", ""
	f := &Farm{Lab: l, ClientLeg: "lan", ServerLeg: "dmz", options: o}
	if err := f.build(); err != nil {
		return nil, err
	}
	return f, nil
}

// Sides tells which side of the interface unit the router's interfaces are on.
func (f *Farm) Sides() map[string]ladder.Side {
	return map[string]ladder.Side{f.ClientLeg: ladder.ClientSide, f.ServerLeg: ladder.ServerSide}
}

func (f *Farm) build() error {
	l, o := f.Lab, f.options
	lan, err := l.Switch("lan")
	if err != nil {
		return err
	}
	dmz, err := l.Switch("dmz")
	if err != nil {
		return err
	}
	if f.Router, err = l.NewHost("router"); err != nil {
		return err
	}
	if _, err := l.Plug(f.Router, lan, f.family(clientNet4, clientNet6), o.Link); err != nil {
		return err
	}
	if _, err := l.Plug(f.Router, dmz, f.family(serverNet4, serverNet6), o.Link); err != nil {
		return err
	}
	if err := f.Router.Forwarding(true); err != nil {
		return err
	}
	attach := func(name string, n int, sw *Host, net4, net6 netip.Prefix) (*Host, error) {
		h, err := l.NewHost(name)
		if err != nil {
			return nil, err
		}
		a4 := netip.PrefixFrom(nth(net4.Addr(), n), net4.Bits())
		a6 := netip.PrefixFrom(nth(net6.Addr(), n), net6.Bits())
		if _, err := l.Plug(h, sw, f.family(a4, a6), o.Link); err != nil {
			return nil, err
		}
		if err := h.AddRoute(netip.Prefix{}, net4.Addr()); err != nil || o.NoIPv6 {
			return h, err
		}
		return h, h.AddRoute(netip.MustParsePrefix("::/0"), net6.Addr())
	}
	for i := range o.Clients {
		h, err := attach(fmt.Sprintf("c%d", i+1), i, lan, clientNet4, clientNet6)
		if err != nil {
			return err
		}
		f.Clients = append(f.Clients, h)
	}
	for i := range o.Servers {
		h, err := attach(fmt.Sprintf("s%d", i+1), i, dmz, serverNet4, serverNet6)
		if err != nil {
			return err
		}
		f.Servers = append(f.Servers, h)
	}
	vips := f.family(netip.PrefixFrom(vip4, 32), netip.PrefixFrom(vip6, 128))
	for _, v := range vips {
		if !o.Routed {
			err = f.Router.AddAddr("lo", v)
		} else if v.Addr().Is4() {
			err = f.Router.AddRoute(v, f.ServerAddr(0))
		} else {
			err = f.Router.AddRoute(v, f.ServerAddr6(0))
		}
		if err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, h := range append(append([]*Host{f.Router}, f.Clients...), f.Servers...) {
		if err := h.Settle(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (f *Farm) family(v4, v6 netip.Prefix) []netip.Prefix {
	if f.options.NoIPv6 {
		return []netip.Prefix{v4}
	}
	return []netip.Prefix{v4, v6}
}

// nth returns the address of the n-th host, counted from 0, beside a router's.
func nth(router netip.Addr, n int) netip.Addr {
	b := router.AsSlice()
	b[len(b)-1] = byte(firstHost + n)
	a, _ := netip.AddrFromSlice(b)
	return a
}

// VIP returns the address and port that clients use, over IPv4.
func (f *Farm) VIP() netip.AddrPort { return netip.AddrPortFrom(vip4, 80) }

// VIP6 returns the address and port that clients use, over IPv6.
func (f *Farm) VIP6() netip.AddrPort { return netip.AddrPortFrom(vip6, 80) }

// SNIP returns the router's own address toward the servers, over IPv4.
func (f *Farm) SNIP() netip.Addr { return serverNet4.Addr() }

// SNIP6 returns the router's own address toward the servers, over IPv6.
func (f *Farm) SNIP6() netip.Addr { return serverNet6.Addr() }

// ClientAddr returns the IPv4 address of the i-th client, counted from 0.
func (f *Farm) ClientAddr(i int) netip.Addr { return nth(clientNet4.Addr(), i) }

// ClientAddr6 returns the IPv6 address of the i-th client, counted from 0.
func (f *Farm) ClientAddr6(i int) netip.Addr { return nth(clientNet6.Addr(), i) }

// ServerAddr returns the IPv4 address of the i-th server, counted from 0.
func (f *Farm) ServerAddr(i int) netip.Addr { return nth(serverNet4.Addr(), i) }

// ServerAddr6 returns the IPv6 address of the i-th server, counted from 0.
func (f *Farm) ServerAddr6(i int) netip.Addr { return nth(serverNet6.Addr(), i) }

// Server returns the IPv4 address and port 80 of the i-th server.
func (f *Farm) Server(i int) netip.AddrPort { return netip.AddrPortFrom(f.ServerAddr(i), 80) }

// Server6 returns the IPv6 address and port 80 of the i-th server.
func (f *Farm) Server6(i int) netip.AddrPort { return netip.AddrPortFrom(f.ServerAddr6(i), 80) }
