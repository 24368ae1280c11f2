// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// MaxShards is the largest number of shard queues that a ruleset can serve.
const MaxShards = 64

// hashSeed is the fixed seed of the jhash that spreads clients over shards.
// It never changes: a successor of a killed process must send each flow to
// the shard whose records hold it.
const hashSeed = 0x57454952

// Params is everything that the ruleset depends on besides the kernel's
// features. A value is plain data; Build, Install and Update keep no reference
// to the slices after they return.
type Params struct {
	// Table is the name of our table in family inet, and of its companions.
	// No other table is ever touched.
	Table string

	// Mark and MarkMask: a packet with (meta mark & MarkMask) == Mark was
	// translated or emitted by the engine.
	Mark, MarkMask uint32

	// VIPs are the listen addresses of all farms, of both families.
	VIPs []netip.AddrPort

	// Servers are the addresses of all servers of all farms, those that drain
	// included.
	Servers []netip.AddrPort

	// SNIPs are the router's own source addresses toward the servers.
	SNIPs []netip.Addr

	// PortFirst and PortLast bound the SNIP port range, both included.
	PortFirst, PortLast uint16

	// ExceptPorts are ports within the range that stay with the router's own
	// sockets, because these used them before the engine started (see
	// LocalPortsInRange). Packets to them are neither queued nor dropped.
	ExceptPorts []uint16

	// Shared is source.shared: an SNIP that masquerading or SNAT of other
	// tables can use too. The engine then accepts what it does not know; the
	// rules are the same.
	Shared bool

	// QueueFirst is the SYN queue; the control (ICMP) queue is the next
	// number, and shard i has QueueFirst+2+i.
	QueueFirst uint16

	// Shards is the number of shard queues, 1 to MaxShards.
	Shards int

	// InspectAll is firewall.inspect: all. The packets of clients then meet
	// the existing rules as their SYNs do, untracked, and come to the shard
	// queues in input or forward, where a rewritten packet is not routed any
	// more: the engine has to emit it instead.
	InspectAll bool

	// SYNToLo: plain SYNs to a VIP that is an address of the router, except those
	// that come by lo, are handed to a program at lo's output instead of to the
	// SYN queue. What that program lets pass comes in by lo and goes to the SYN
	// queue then.
	SYNToLo bool

	// StrictRPFilter names the interfaces on which the kernel's reverse path
	// filter was strict before ApplySysctls loosened it (StrictInterfaces
	// finds them). The antispoof chain takes over its work there.
	StrictRPFilter []string
}

// SYNQueue is the number of the queue that plain SYNs to a VIP go to.
func (p *Params) SYNQueue() uint16 { return p.QueueFirst }

// ControlQueue is the number of the queue that ICMP errors go to.
func (p *Params) ControlQueue() uint16 { return p.QueueFirst + 1 }

// ShardQueue is the number of shard i's queue, 0 <= i < Shards.
func (p *Params) ShardQueue(i int) uint16 { return p.QueueFirst + 2 + uint16(i) }

// Queues is how many consecutive queue numbers from QueueFirst are ours.
func (p *Params) Queues() int { return 2 + p.Shards }

// Slice gives the part of the SNIP port range first..last that shard i of
// shards owns, both ends included. The slices are disjoint, in order, cover
// the range, and differ in size by at most one port. The ruleset sends a
// server's packet to the shard whose slice holds the destination port, so the
// engine must open connections of shard i only from that slice. It panics when
// i is not in 0..shards-1 or the range holds fewer ports than shards: Validate
// refuses both.
func Slice(first, last uint16, shards, i int) (lo, hi uint16) {
	n := int(last) - int(first) + 1
	if shards < 1 || i < 0 || i >= shards || n < shards {
		panic(fmt.Sprintf("nft: no slice %d of %d in ports %d-%d", i, shards, first, last))
	}
	return first + uint16(i*n/shards), first + uint16((i+1)*n/shards-1)
}

// Validate reports everything that is wrong with the parameters, joined into
// one error, each part with the name of the configuration key.
func (p *Params) Validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf("nft: "+format, a...)) }

	if !validName(p.Table) {
		bad("firewall.table %q: want 1 to 64 letters, digits, '_' or '-', beginning with a letter", p.Table)
	}
	switch {
	case p.MarkMask == 0 || p.Mark == 0:
		bad("firewall.mark %#x/%#x: mark and mask must not be zero, an unmarked packet would count as ours", p.Mark, p.MarkMask)
	case p.Mark&^p.MarkMask != 0:
		bad("firewall.mark %#x/%#x: the mark has bits outside the mask, so no packet would ever match", p.Mark, p.MarkMask)
	}
	if p.PortFirst < 1024 || p.PortFirst > p.PortLast {
		bad("source.ports %d-%d: want first <= last, and no port below 1024", p.PortFirst, p.PortLast)
	}
	switch {
	case p.Shards < 1 || p.Shards > MaxShards:
		bad("queue.shards %d: want 1 to %d", p.Shards, MaxShards)
	case int(p.QueueFirst)+p.Queues() > 1<<16:
		bad("queue.first %d: %d queues from there pass the last queue number 65535", p.QueueFirst, p.Queues())
	case int(p.PortLast)-int(p.PortFirst)+1 < p.Shards:
		bad("source.ports %d-%d: fewer ports than the %d shards", p.PortFirst, p.PortLast, p.Shards)
	}

	vips := make(map[netip.AddrPort]bool, len(p.VIPs))
	snips := make(map[netip.Addr]bool, len(p.SNIPs))
	var has4, has6 bool
	for _, a := range p.SNIPs {
		if why := badAddr(a); why != "" {
			bad("source.addresses %v: %s", a, why)
		} else if snips[a.Unmap()] {
			bad("source.addresses %v: given twice", a)
		}
		snips[a.Unmap()] = true
		has4 = has4 || a.Unmap().Is4()
		has6 = has6 || !a.Unmap().Is4()
	}
	for _, v := range p.VIPs {
		v = unmap(v)
		if why := badAddrPort(v); why != "" {
			bad("listen %v: %s", v, why)
		} else if vips[v] {
			bad("listen %v: given twice", v)
		} else if snips[v.Addr()] && v.Port() >= p.PortFirst && v.Port() <= p.PortLast {
			// The same packet would be a client's and a server's.
			bad("listen %v: lies within source.ports %d-%d of the source address %v", v, p.PortFirst, p.PortLast, v.Addr())
		}
		vips[v] = true
	}
	for _, s := range p.Servers {
		s = unmap(s)
		if why := badAddrPort(s); why != "" {
			bad("server address %v: %s", s, why)
			continue
		}
		if is4 := s.Addr().Is4(); len(p.SNIPs) > 0 && (is4 && !has4 || !is4 && !has6) {
			bad("server address %v: source.addresses has no address of its family", s)
		}
	}
	for _, port := range p.ExceptPorts {
		if port < p.PortFirst || port > p.PortLast {
			bad("excepted port %d: outside source.ports %d-%d", port, p.PortFirst, p.PortLast)
		}
	}
	for _, name := range p.StrictRPFilter {
		if name == "" || len(name) > 15 || strings.ContainsAny(name, "/\" \t\n\x00") {
			bad("interface %q: not an interface name", name)
		}
	}
	return errors.Join(errs...)
}

// clone returns a copy that shares no memory with p, with addresses unmapped,
// sorted and free of duplicates, so that equal parameters give equal rulesets.
func (p *Params) clone() Params {
	c := *p
	c.VIPs = normalPorts(p.VIPs)
	c.Servers = normalPorts(p.Servers)
	c.SNIPs = make([]netip.Addr, len(p.SNIPs))
	for i, a := range p.SNIPs {
		c.SNIPs[i] = a.Unmap()
	}
	slices.SortFunc(c.SNIPs, netip.Addr.Compare)
	c.SNIPs = slices.Compact(c.SNIPs)
	c.ExceptPorts = slices.Clone(p.ExceptPorts)
	slices.Sort(c.ExceptPorts)
	c.ExceptPorts = slices.Compact(c.ExceptPorts)
	c.StrictRPFilter = slices.Clone(p.StrictRPFilter)
	slices.Sort(c.StrictRPFilter)
	c.StrictRPFilter = slices.Compact(c.StrictRPFilter)
	return c
}

func normalPorts(in []netip.AddrPort) []netip.AddrPort {
	out := make([]netip.AddrPort, len(in))
	for i, a := range in {
		out[i] = unmap(a)
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

func badAddrPort(a netip.AddrPort) string {
	if a.Port() == 0 {
		return "the port must be 1 to 65535"
	}
	return badAddr(a.Addr())
}

func badAddr(a netip.Addr) string {
	switch {
	case !a.IsValid():
		return "not an address"
	case a.IsUnspecified():
		return "must be one literal address, not the unspecified one"
	case a.IsMulticast():
		return "is a multicast address"
	case a.Zone() != "" || a.IsLinkLocalUnicast():
		return "link-local addresses are not routed"
	}
	return ""
}

func validName(s string) bool {
	if len(s) < 1 || len(s) > 64 {
		return false
	}
	for i, c := range []byte(s) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !letter && (i == 0 || !(c >= '0' && c <= '9' || c == '_' || c == '-')) {
			return false
		}
	}
	return true
}
