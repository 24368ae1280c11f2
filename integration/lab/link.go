// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// LinkOptions says how a link behaves. The zero value is a plain veth pair.
type LinkOptions struct {
	MTU int // bytes; 0 leaves the kernel's 1500
	// NoOffload switches segmentation and checksum offload off at both ends, so
	// that packets look as they would on a real wire: none above the MTU, all
	// with a finished checksum. TSO, GSO, GRO and the transmit checksum go.
	NoOffload bool
	// AName and BName replace the names of the interfaces, which are by default
	// the names of the hosts that they lead to.
	AName, BName string
}

// A Link is a veth pair between two hosts.
type Link struct {
	A, B         *Host
	AName, BName string // the interfaces in A and B
}

// Link joins two hosts with a veth pair, gives both ends addresses and sets
// them up. The interface in a is called after b and the other way round; a
// second link between the same hosts gets a number after the name.
func (l *Lab) Link(a, b *Host, aAddrs, bAddrs []netip.Prefix, o LinkOptions) (*Link, error) {
	k := &Link{A: a, B: b, AName: o.AName, BName: o.BName}
	if k.AName == "" {
		k.AName = a.ifaceName(b)
	}
	if k.BName == "" {
		k.BName = b.ifaceName(a)
	}
	wrap := func(err error) error { return fmt.Errorf("lab: link %s–%s: %w", a.name, b.name, err) }

	attrs := netlink.NewLinkAttrs()
	attrs.Name = k.AName
	attrs.MTU = o.MTU
	veth := netlink.NewVeth(attrs)
	veth.PeerName = k.BName
	veth.PeerNamespace = netlink.NsFd(b.fd)
	veth.PeerMTU = uint32(o.MTU)
	if err := a.nl.LinkAdd(veth); err != nil {
		return nil, wrap(err)
	}
	for _, end := range []struct {
		h     *Host
		name  string
		addrs []netip.Prefix
	}{{a, k.AName, aAddrs}, {b, k.BName, bAddrs}} {
		if o.NoOffload {
			if err := end.h.SetOffload(end.name, false); err != nil {
				return nil, wrap(err)
			}
		}
		for _, p := range end.addrs {
			if err := end.h.AddAddr(end.name, p); err != nil {
				return nil, wrap(err)
			}
		}
		if err := end.h.SetUp(end.name); err != nil {
			return nil, wrap(err)
		}
	}
	return k, nil
}

func (h *Host) ifaceName(peer *Host) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.links[peer.name]++
	if n := h.links[peer.name]; n > 1 {
		return fmt.Sprintf("%s-%d", peer.name, n)
	}
	return peer.name
}

// Switch makes a host that is nothing but an Ethernet switch: a bridge without
// addresses. Plug connects hosts to it.
func (l *Lab) Switch(name string) (*Host, error) {
	h, err := l.NewHost(name)
	if err != nil {
		return nil, err
	}
	if h.hasIPv6() {
		if err := h.SetSysctl("net/ipv6/conf/all/disable_ipv6", "1"); err != nil {
			return nil, err
		}
		if err := h.SetSysctl("net/ipv6/conf/default/disable_ipv6", "1"); err != nil {
			return nil, err
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "br0"
	off := false
	// With snooping the bridge would drop neighbour solicitations for groups
	// whose membership report it has not seen yet.
	if err := h.nl.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &off}); err != nil {
		return nil, fmt.Errorf("lab: switch %s: %w", name, err)
	}
	return h, h.SetUp("br0")
}

// Plug connects a host to a switch. The interface in the host is called after
// the switch.
func (l *Lab) Plug(h, sw *Host, addrs []netip.Prefix, o LinkOptions) (*Link, error) {
	k, err := l.Link(h, sw, addrs, nil, o)
	if err != nil {
		return nil, err
	}
	port, err := sw.nl.LinkByName(k.BName)
	if err != nil {
		return nil, fmt.Errorf("lab: switch %s: port %s: %w", sw.name, k.BName, err)
	}
	br, err := sw.nl.LinkByName("br0")
	if err != nil {
		return nil, fmt.Errorf("lab: switch %s: %w", sw.name, err)
	}
	if err := sw.nl.LinkSetMaster(port, br); err != nil {
		return nil, fmt.Errorf("lab: switch %s: port %s: %w", sw.name, k.BName, err)
	}
	return k, nil
}

// SetUp sets an interface up.
func (h *Host) SetUp(iface string) error { return h.setLink(iface, "up", h.nl.LinkSetUp) }

// SetDown sets an interface down.
func (h *Host) SetDown(iface string) error { return h.setLink(iface, "down", h.nl.LinkSetDown) }

// SetMTU sets the MTU of an interface, in bytes.
func (h *Host) SetMTU(iface string, mtu int) error {
	return h.setLink(iface, "mtu", func(k netlink.Link) error { return h.nl.LinkSetMTU(k, mtu) })
}

func (h *Host) setLink(iface, what string, f func(netlink.Link) error) error {
	k, err := h.nl.LinkByName(iface)
	if err == nil {
		err = f(k)
	}
	if err != nil {
		return fmt.Errorf("lab: host %s: interface %s %s: %w", h.name, iface, what, err)
	}
	return nil
}

// AddAddr adds an address to an interface. IPv6 addresses can be used at once.
func (h *Host) AddAddr(iface string, p netip.Prefix) error {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return h.setLink(iface, "address "+p.String(), func(k netlink.Link) error { return h.nl.AddrAdd(k, a) })
}

// DelAddr takes an address from an interface.
func (h *Host) DelAddr(iface string, p netip.Prefix) error {
	a := &netlink.Addr{IPNet: ipNet(p)}
	return h.setLink(iface, "address "+p.String(), func(k netlink.Link) error { return h.nl.AddrDel(k, a) })
}

// Settle waits until the kernel has done what it does by itself, and later,
// after addresses were added and links set up: link-local addresses are there,
// no IPv6 address is tentative, and each has its local route. A snapshot that
// is taken earlier would see these come as changes.
func (h *Host) Settle(ctx context.Context) error {
	if !h.hasIPv6() {
		return nil
	}
	calm := 0 // polls in a row that found nothing missing and nothing new
	seen := -1
	for calm < 3 {
		missing, routes, err := h.unsettled()
		if err != nil {
			return fmt.Errorf("lab: host %s: settle: %w", h.name, err)
		}
		if missing == "" && routes == seen {
			calm++
		} else {
			calm = 0
		}
		seen = routes
		select {
		case <-ctx.Done():
			return fmt.Errorf("lab: host %s: does not settle (%s): %w", h.name, missing, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// unsettled names something that is not there yet, and counts IPv6 routes.
func (h *Host) unsettled() (missing string, routes int, err error) {
	links, err := h.nl.LinkList()
	if err != nil {
		return "", 0, err
	}
	table, err := h.nl.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return "", 0, err
	}
	local := map[string]bool{}
	for _, r := range table {
		if r.Table == unix.RT_TABLE_LOCAL && r.Dst != nil {
			local[fmt.Sprint(r.Dst.IP, " ", r.LinkIndex)] = true
		}
	}
	for _, k := range links {
		a := k.Attrs()
		if a.Flags&net.FlagUp == 0 {
			continue
		}
		if off, err := h.Sysctl("net/ipv6/conf/" + a.Name + "/disable_ipv6"); err != nil || off == "1" {
			continue
		}
		addrs, err := h.nl.AddrList(k, netlink.FAMILY_V6)
		if err != nil {
			return "", 0, err
		}
		linkLocal := a.Flags&net.FlagLoopback != 0
		for _, x := range addrs {
			linkLocal = linkLocal || x.IP.IsLinkLocalUnicast()
			if x.Flags&unix.IFA_F_TENTATIVE != 0 {
				missing = x.IPNet.String() + " is tentative"
			}
			if !local[fmt.Sprint(x.IP, " ", a.Index)] {
				missing = x.IPNet.String() + " has no route"
			}
		}
		if !linkLocal {
			missing = a.Name + " has no link-local address"
		}
	}
	return missing, len(table), nil
}

// AddRoute adds a route to dst by way of the next hop via. An invalid dst (the
// zero Prefix) means the default route of via's family.
func (h *Host) AddRoute(dst netip.Prefix, via netip.Addr) error {
	r := &netlink.Route{Gw: via.AsSlice()}
	if dst.IsValid() {
		r.Dst = ipNet(dst)
	}
	if err := h.nl.RouteAdd(r); err != nil {
		return fmt.Errorf("lab: host %s: route %s via %s: %w", h.name, dst, via, err)
	}
	return nil
}

// SetSysctl writes a value below /proc/sys, as the namespace sees it. The key
// is written with slashes, for instance "net/ipv4/ip_forward".
func (h *Host) SetSysctl(key, value string) error {
	return h.Do(func() error {
		if err := os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0); err != nil {
			return fmt.Errorf("lab: host %s: sysctl %s=%s: %w", h.name, key, value, err)
		}
		return nil
	})
}

// Sysctl reads a value below /proc/sys, as the namespace sees it.
func (h *Host) Sysctl(key string) (string, error) {
	var v string
	err := h.Do(func() error {
		b, err := os.ReadFile(filepath.Join("/proc/sys", key))
		if err != nil {
			return fmt.Errorf("lab: host %s: sysctl %s: %w", h.name, key, err)
		}
		v = strings.TrimSpace(string(b))
		return nil
	})
	return v, err
}

// Forwarding makes the host a router, or stops it being one, for both address
// families.
func (h *Host) Forwarding(on bool) error {
	v := "0"
	if on {
		v = "1"
	}
	if err := h.SetSysctl("net/ipv4/ip_forward", v); err != nil {
		return err
	}
	if !h.hasIPv6() {
		return nil
	}
	return h.SetSysctl("net/ipv6/conf/all/forwarding", v)
}

func (h *Host) hasIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
