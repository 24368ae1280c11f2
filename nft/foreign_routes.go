// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// endpoint is an address and the interface toward it; "lo" for the router's own.
type endpoint struct {
	addr netip.AddrPort
	dev  string
}

// routeTable is what the routes say, as far as a walk asks.
type routeTable struct {
	index   map[string]int
	names   map[int]string
	kinds   map[netip.Addr]uint32
	vias    map[netip.Addr]devices
	clients map[*ipFamily][]endpoint
	servers map[*ipFamily][]endpoint
}

type devices []string

func (d devices) through(dev string) bool { return dev != "" && slices.Contains(d, dev) }

// Addresses beyond the default route that are in no special registry, so that
// no list of addresses that must not appear on the Internet has them. No
// packet is ever sent to them.
var (
	somewhere4 = netip.MustParseAddr("8.0.0.77")
	somewhere6 = netip.MustParseAddr("2600::77")
)

const (
	somePort     = 40000
	mostClients  = 32 // that are followed, of each family
	mostServers  = 256
	reachableLen = 11 // the number of a host within its network
)

func readRoutes(p *Params) (*routeTable, error) {
	r := &routeTable{
		index: map[string]int{}, names: map[int]string{}, kinds: map[netip.Addr]uint32{}, vias: map[netip.Addr]devices{},
		clients: map[*ipFamily][]endpoint{}, servers: map[*ipFamily][]endpoint{},
	}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("nft: listing interfaces: %w", err)
	}
	for _, l := range links {
		r.index[l.Attrs().Name] = l.Attrs().Index
		r.names[l.Attrs().Index] = l.Attrs().Name
	}
	for _, fam := range families {
		r.readServers(fam, p)
		if err := r.readClients(fam, p); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func (r *routeTable) readServers(fam *ipFamily, p *Params) {
	for _, s := range p.Servers {
		if s.Addr().Is4() != (fam == &family4) || len(r.servers[fam]) >= mostServers {
			continue
		}
		kind, ok := r.kind(s.Addr(), "", false)
		switch via := r.via(s.Addr()); {
		case ok && kind == unix.RTN_LOCAL:
			r.servers[fam] = append(r.servers[fam], endpoint{s, "lo"})
		case len(via) > 0:
			r.servers[fam] = append(r.servers[fam], endpoint{s, via[0]})
		}
	}
}

// readClients finds places where clients may be: the networks of interfaces
// that lead to no server, all interfaces where there are no others, and the
// world behind a default route.
func (r *routeTable) readClients(fam *ipFamily, p *Params) error {
	nl := netlink.FAMILY_V4
	if fam == &family6 {
		nl = netlink.FAMILY_V6
	}
	routes, err := netlink.RouteList(nil, nl)
	if err != nil {
		return fmt.Errorf("nft: listing routes: %w", err)
	}
	towardServers := serverDevices(r.servers[fam])
	var quiet, busy []endpoint
	add := func(a netip.Addr, dev string) {
		e := endpoint{netip.AddrPortFrom(a, somePort), dev}
		if slices.Contains(towardServers, dev) {
			busy = append(busy, e)
		} else {
			quiet = append(quiet, e)
		}
	}
	for _, rt := range routes {
		dev := r.names[rt.LinkIndex]
		if rt.Type != unix.RTN_UNICAST || dev == "" || dev == "lo" {
			continue
		}
		if rt.Dst == nil || isDefault(rt.Dst) {
			continue
		}
		if a, ok := r.hostIn(rt.Dst, p); ok {
			add(a, dev)
		}
	}
	world := somewhere4
	if fam == &family6 {
		world = somewhere6
	}
	if via := r.via(world); len(via) > 0 {
		// A default route counts even when the servers are behind it too.
		quiet = append(quiet, endpoint{netip.AddrPortFrom(world, somePort), via[0]})
	}
	if len(quiet) == 0 {
		quiet = busy
	}
	r.clients[fam] = quiet[:min(len(quiet), mostClients)]
	return nil
}

func isDefault(n *net.IPNet) bool {
	ones, _ := n.Mask.Size()
	return ones == 0
}

// hostIn gives an address in the network that is neither the router's nor a
// server's, and no multicast or link-local one.
func (r *routeTable) hostIn(n *net.IPNet, p *Params) (netip.Addr, bool) {
	base, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	if !ok || base.Unmap().IsLinkLocalUnicast() || base.Unmap().IsMulticast() {
		return netip.Addr{}, false
	}
	net := netip.PrefixFrom(base.Unmap(), ones)
	taken := func(a netip.Addr) bool {
		kind, ok := r.kind(a, "", false)
		return !ok || kind != unix.RTN_UNICAST || slices.ContainsFunc(p.Servers, func(s netip.AddrPort) bool { return s.Addr() == a }) ||
			slices.ContainsFunc(p.VIPs, func(s netip.AddrPort) bool { return s.Addr() == a })
	}
	a := net.Addr()
	for range reachableLen {
		a = a.Next()
	}
	for range 64 {
		if !net.Contains(a) {
			break
		}
		if !taken(a) {
			return a, true
		}
		a = a.Next()
	}
	for a = net.Addr(); net.Contains(a); a = a.Next() {
		if !taken(a) {
			return a, true
		}
		if a.Compare(net.Addr()) > 0 && net.Bits() < net.Addr().BitLen()-4 {
			break
		}
	}
	return netip.Addr{}, false
}

// ask fills in what the kernel says about the way to an address.
func (r *routeTable) ask(a netip.Addr) {
	if _, ok := r.kinds[a]; ok {
		return
	}
	r.kinds[a], r.vias[a] = unix.RTN_UNREACHABLE, nil
	if a.IsMulticast() {
		r.kinds[a] = unix.RTN_MULTICAST
		return
	}
	routes, err := netlink.RouteGet(net.IP(a.AsSlice()))
	if err != nil {
		return
	}
	for _, rt := range routes {
		r.kinds[a] = uint32(rt.Type)
		if rt.Type == unix.RTN_UNICAST {
			if name := r.names[rt.LinkIndex]; name != "" {
				r.vias[a] = append(r.vias[a], name)
			}
		}
	}
}

// kind is the route type of an address. With an interface the answer depends
// on the addresses of that one alone and is not known here, unless the address
// is nobody's.
func (r *routeTable) kind(a netip.Addr, _ string, onInterface bool) (uint32, bool) {
	r.ask(a)
	k := r.kinds[a]
	return k, !onInterface || k != unix.RTN_LOCAL
}

// via lists the interfaces through which an address is routed; none for the
// router's own and for what cannot be reached.
func (r *routeTable) via(a netip.Addr) devices {
	r.ask(a)
	return r.vias[a]
}
