// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Errors of the checks before the start; match with errors.Is.
var (
	// ErrListener: another program listens where the engine is to serve.
	ErrListener = errors.New("another program listens there")

	// ErrQueueInUse: a queue number has an owner already.
	ErrQueueInUse = errors.New("the queue is in use")

	// ErrLocalServer: a server is its own VIP, and this host has the address.
	ErrLocalServer = errors.New("it is also a listen address, and an address of this host")

	// ErrForwarding: the kernel does not forward packets.
	ErrForwarding = errors.New("forwarding is off")
)

// CheckVIPListeners reports every VIP that a program of this host listens on,
// by its address or, where the VIP is an address of the host, by a wildcard.
// It is to be asked before anything is changed, on a thread of the network
// namespace in question. The error wraps ErrListener and names the address and,
// if this process may know, the program.
func CheckVIPListeners(vips []netip.AddrPort) error {
	return checkVIPListeners(vips, tcpListeners)
}

func checkVIPListeners(vips []netip.AddrPort, listeners func() ([]socket, error)) error {
	if len(vips) == 0 {
		return nil
	}
	socks, err := listeners()
	if err != nil {
		return err
	}
	var errs []error
	for _, v := range vips {
		v = unmap(v)
		for i := range socks {
			s := &socks[i]
			if s.local.Port() != v.Port() {
				continue
			}
			switch l := s.local.Addr(); {
			case l == v.Addr():
			case l.IsUnspecified() && (l.Is6() || v.Addr().Is4()):
				local, err := isLocal(v.Addr())
				if err != nil {
					return err
				}
				if !local || l.Is4() != v.Addr().Is4() && !bindTaken(v) {
					continue
				}
			default:
				continue
			}
			errs = append(errs, fmt.Errorf("nft: listen %v: %s is listened on%s: %w: stop it, or bind it to another address", v, s.local, byProgram(owner(s.inode)), ErrListener))
			break
		}
	}
	return errors.Join(errs...)
}

// bindTaken asks the kernel whether a listener would be in the way at the
// address. The tables in /proc do not say whether a listener on [::] takes
// IPv4 connections too (IPV6_V6ONLY); a bind that nobody will ever listen on
// does.
func bindTaken(a netip.AddrPort) bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return true
	}
	defer unix.Close(fd)
	// With SO_REUSEADDR only a listener is in the way, not a connection.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return true
	}
	return errors.Is(unix.Bind(fd, &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}), unix.EADDRINUSE)
}

// isLocal reports whether packets to the address are delivered on this host.
func isLocal(a netip.Addr) (bool, error) {
	routes, err := netlink.RouteGet(net.IP(a.AsSlice()))
	if unreachable(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("nft: route to %v: %w", a, err)
	}
	for _, r := range routes {
		if r.Type == unix.RTN_LOCAL {
			return true, nil
		}
	}
	return false, nil
}

func unreachable(err error) bool {
	return errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EINVAL)
}

// LocalPortsInRange looks at the TCP ports first..last that the router's own
// sockets use, in the network namespace of the calling thread. used lists, in
// order, those of connections: they belong into Params.ExceptPorts and are not
// for the engine. A listener there is an error (ErrListener) naming the program,
// because its clients' packets would be dropped: one on a wildcard address, or
// on one of the SNIPs when these are given, else on any address. One on a
// loopback address never meets us.
func LocalPortsInRange(first, last uint16, snips ...netip.Addr) (used []uint16, listeners error) {
	socks, err := tcpSockets(procNet)
	if err != nil {
		return nil, err
	}
	return localPorts(socks, first, last, snips)
}

func localPorts(socks []socket, first, last uint16, snips []netip.Addr) (used []uint16, listeners error) {
	concerns := func(a netip.Addr) bool {
		if len(snips) == 0 {
			return true
		}
		return slices.ContainsFunc(snips, func(s netip.Addr) bool { return s.Unmap() == a })
	}
	var errs []error
	for i := range socks {
		s := &socks[i]
		a, port := s.local.Addr(), s.local.Port()
		if port < first || port > last || a.IsLoopback() && !slices.Contains(snips, a) {
			continue
		}
		switch {
		case !s.listens() && (a.IsUnspecified() || concerns(a)):
			used = append(used, port)
		case s.listens() && (a.IsUnspecified() || concerns(a)):
			errs = append(errs, fmt.Errorf("nft: source.ports %d-%d: port %d is listened on at %v%s: %w: choose a range without it", first, last, port, a, byProgram(owner(s.inode)), ErrListener))
		}
	}
	slices.Sort(used)
	return slices.Compact(used), errors.Join(errs...)
}

// CheckQueues reports those of the n queue numbers from first that somebody in
// this network namespace has bound. The error wraps ErrQueueInUse and names
// the number and the owner. Those that this process holds itself, by sockets of
// a predecessor, are told in held.
func CheckQueues(first uint16, n int, held ...uint16) error {
	return checkQueues(filepath.Join(procNet, "netfilter/nfnetlink_queue"), first, n, held)
}

func checkQueues(path string, first uint16, n int, held []uint16) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nfnetlink_queue is not loaded yet, so nobody has a queue
	}
	if err != nil {
		return fmt.Errorf("nft: reading queues in use: %w", err)
	}
	defer f.Close()
	var errs []error
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		// Queue number, netlink port of the owner, and counters. The port of
		// a process's first netlink socket is its process id.
		fields := strings.Fields(sc.Text())
		if len(fields) < 2 {
			continue
		}
		num, err := strconv.ParseUint(fields[0], 10, 16)
		if err != nil {
			return fmt.Errorf("nft: reading queues in use: line %q: %w", sc.Text(), err)
		}
		if int(num) >= int(first) && int(num) < int(first)+n && !slices.Contains(held, uint16(num)) {
			errs = append(errs, fmt.Errorf("nft: queue.first %d: queue %d is bound%s (netlink port %s): %w: stop that program, or choose other numbers", first, num, byProgram(program(fields[1])), fields[1], ErrQueueInUse))
		}
	}
	if err := sc.Err(); err != nil {
		return fmt.Errorf("nft: reading queues in use: %w", err)
	}
	return errors.Join(errs...)
}

// CheckForwarding reports families whose packets the kernel would have to
// forward and does not. A family needs it when one of its servers is not on
// the router itself. Forwarding counts as on when it is on for all interfaces
// or, with IPv4, for each of the given ones. We never switch it on: a router that suddenly
// forwards is the administrator's decision.
func CheckForwarding(p Params, ifaces ...string) error {
	return checkForwarding(hostSysctls, p, ifaces)
}

func checkForwarding(sys procSys, p Params, ifaces []string) error {
	var need4, need6 bool
	for _, s := range p.Servers {
		a := s.Addr().Unmap()
		local, err := isLocal(a)
		if err != nil {
			return err
		}
		need4 = need4 || !local && a.Is4()
		need6 = need6 || !local && a.Is6()
	}
	var err error
	var off4, off6 bool
	if need4 {
		if off4, err = forwardingOff(sys, sysctlForward4, ifaces); err != nil {
			return err
		}
	}
	if need6 {
		// IPv6 asks conf/all alone.
		if off6, err = forwardingOff(sys, sysctlForward6, nil); err != nil {
			return err
		}
	}
	return ForwardingError(off4, off6)
}

// forwardingOff: neither all interfaces nor each of these forward.
func forwardingOff(sys procSys, format string, ifaces []string) (bool, error) {
	all, err := sys.read(fmt.Sprintf(format, "all"))
	if err != nil {
		return false, err
	}
	off := all == "0"
	for _, name := range ifaces {
		v, err := sys.read(fmt.Sprintf(format, name))
		if err != nil {
			return false, err
		}
		if v == "0" {
			return off, nil
		}
	}
	return off && len(ifaces) == 0, nil
}

// ForwardingError is the sentence about the families that are not forwarded,
// with the command for each; nil for none. It wraps ErrForwarding.
func ForwardingError(ipv4Off, ipv6Off bool) error {
	var errs []error
	if ipv4Off {
		errs = append(errs, fmt.Errorf("nft: IPv4 %w, and Weir does not switch it on: run: %s", ErrForwarding, forwardCommand4))
	}
	if ipv6Off {
		errs = append(errs, fmt.Errorf("nft: IPv6 %w, and Weir does not switch it on: run: %s", ErrForwarding, forwardCommand6))
	}
	return errors.Join(errs...)
}

// CheckTransparent reports servers at a VIP that is an address of this host. A
// server may be its own VIP, so that clients keep the address they know, where
// the router stands on the way to it; on the router itself nobody could tell
// the server's packets from the engine's. The error wraps ErrLocalServer.
func CheckTransparent(p Params) error {
	p = p.clone()
	var errs []error
	for _, s := range p.Servers {
		if !slices.Contains(p.VIPs, s) {
			continue
		}
		local, err := isLocal(s.Addr())
		if err != nil {
			return err
		}
		if local {
			errs = append(errs, fmt.Errorf("nft: server address %v: %w: give the server another address or port than the VIP", s, ErrLocalServer))
		}
	}
	return errors.Join(errs...)
}

// Interfaces names, sorted, the interfaces on which packets arrive that will be
// rewritten to a local source: those that the servers are routed through, and
// all others that clients can come in by. The latter cannot be told from a
// configuration, so it is every interface that is up, is not lo, not a port of
// a bridge, bond or the like, and has an address of a family that we serve.
func Interfaces(p Params) ([]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("nft: listing interfaces: %w", err)
	}
	names := make(map[int]string, len(links))
	found := make(map[string]bool)
	has4, has6 := p.hasFamily4(), slices.ContainsFunc(p.VIPs, func(v netip.AddrPort) bool { return v.Addr().Unmap().Is6() })
	for _, l := range links {
		a := l.Attrs()
		names[a.Index] = a.Name
		if a.Flags&net.FlagLoopback != 0 || a.Flags&net.FlagUp == 0 || a.MasterIndex != 0 {
			continue
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, fmt.Errorf("nft: addresses of %s: %w", a.Name, err)
		}
		for _, ad := range addrs {
			if is4 := ad.IP.To4() != nil; is4 && has4 || !is4 && has6 {
				found[a.Name] = true
			}
		}
	}
	for _, s := range p.Servers {
		routes, err := netlink.RouteGet(net.IP(s.Addr().Unmap().AsSlice()))
		if unreachable(err) {
			continue // an unreachable server is a matter of health, not of the start
		}
		if err != nil {
			return nil, fmt.Errorf("nft: route to server %v: %w", s.Addr(), err)
		}
		for _, r := range routes {
			if name := names[r.LinkIndex]; name != "" && name != "lo" {
				found[name] = true
			}
		}
	}
	out := make([]string, 0, len(found))
	for name := range found {
		out = append(out, name)
	}
	slices.Sort(out)
	return out, nil
}
