// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrSysctlPermission: a sysctl has to change and this process may not.
var ErrSysctlPermission = errors.New("no permission to change it")

// Names of the sysctls that we read or change, in the path form: an interface
// name may hold a dot. /proc/sys/net shows the network namespace of the thread
// that opens a file in it, so the caller's thread has to be in the right one.
const (
	sysctlReserved  = "net/ipv4/ip_local_reserved_ports"
	sysctlForward4  = "net/ipv4/conf/%s/forwarding"
	sysctlForward6  = "net/ipv6/conf/%s/forwarding"
	sysctlAccept    = "net/ipv4/conf/%s/accept_local"
	sysctlRPFilter  = "net/ipv4/conf/%s/rp_filter"
	forwardCommand4 = "sysctl -w net.ipv4.ip_forward=1"
	forwardCommand6 = "sysctl -w net.ipv6.conf.all.forwarding=1"
)

// SysctlKind says what a Sysctl asks for.
type SysctlKind uint8

const (
	// AcceptLocal: packets with a local source may come in through the
	// interface. The kernel takes conf/all or conf/IF, so nothing changes
	// where all is set.
	AcceptLocal SysctlKind = iota + 1

	// LooseRPFilter: the reverse path filter of the interface is off or
	// loose. The kernel takes the larger of conf/all and conf/IF; 1, strict,
	// becomes 2, loose, on this interface alone.
	LooseRPFilter

	// ReservePorts: First to Last are not given to the router's own sockets.
	ReservePorts
)

// Sysctl is one thing that a sysctl has to say; whether it must change for
// that depends on what it says now.
type Sysctl struct {
	Kind        SysctlKind
	Interface   string // AcceptLocal, LooseRPFilter
	First, Last uint16 // ReservePorts
}

// Needs lists what the ruleset needs of the kernel's sysctls where packets are
// rewritten to local sources: on these interfaces (see Interfaces), and for
// the SNIP ports. IPv6 has neither source validation nor a reverse path
// filter. It never asks for forwarding: see CheckForwarding.
func Needs(p Params, ifaces ...string) []Sysctl {
	var out []Sysctl
	if p.hasFamily4() {
		for _, name := range ifaces {
			out = append(out, Sysctl{Kind: AcceptLocal, Interface: name}, Sysctl{Kind: LooseRPFilter, Interface: name})
		}
	}
	return append(out, Sysctl{Kind: ReservePorts, First: p.PortFirst, Last: p.PortLast})
}

func (p *Params) hasFamily4() bool {
	for _, v := range p.VIPs {
		if v.Addr().Unmap().Is4() {
			return true
		}
	}
	for _, a := range p.SNIPs {
		if a.Unmap().Is4() {
			return true
		}
	}
	return false
}

func (s Sysctl) name() string {
	switch s.Kind {
	case AcceptLocal:
		return fmt.Sprintf(sysctlAccept, s.Interface)
	case LooseRPFilter:
		return fmt.Sprintf(sysctlRPFilter, s.Interface)
	}
	return sysctlReserved
}

// want gives the value that satisfies s where old stood before we came. It is
// old itself when nothing has to change.
func (s Sysctl) want(sys procSys, old string) (string, error) {
	switch s.Kind {
	case AcceptLocal:
		all, err := sys.read(fmt.Sprintf(sysctlAccept, "all"))
		if err != nil {
			return "", err
		}
		if all != "0" || old != "0" {
			return old, nil
		}
		return "1", nil
	case LooseRPFilter:
		strict, err := strictRPFilter(sys, old)
		if err != nil {
			return "", err
		}
		if strict {
			return "2", nil
		}
		return old, nil
	case ReservePorts:
		have, err := parsePorts(old)
		if err != nil {
			return "", fmt.Errorf("nft: %s: %w", dotted(sysctlReserved), err)
		}
		if have.covers(s.First, s.Last) {
			return old, nil
		}
		return have.union(portSet{{s.First, s.Last}}).String(), nil
	}
	return "", fmt.Errorf("nft: unknown kind %d of sysctl", s.Kind)
}

// strictRPFilter: the kernel uses the larger of conf/all and conf/IF.
func strictRPFilter(sys procSys, iface string) (bool, error) {
	all, err := sys.read(fmt.Sprintf(sysctlRPFilter, "all"))
	if err != nil {
		return false, err
	}
	a, err1 := strconv.Atoi(all)
	i, err2 := strconv.Atoi(iface)
	if err := errors.Join(err1, err2); err != nil {
		return false, fmt.Errorf("nft: rp_filter: %w", err)
	}
	return max(a, i) == 1, nil
}

// procSys reads and writes sysctls below a directory.
type procSys struct{ root string }

var hostSysctls = procSys{root: "/proc/sys"}

// path takes both forms of a name: when its first separator is a dot, dots and
// slashes change places, as sysctl(8) has it.
func (s procSys) path(name string) string {
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '.' {
		name = swapped(name)
	}
	return filepath.Join(s.root, name)
}

// dotted gives the form with dots, as sysctl(8) prints it.
func dotted(name string) string {
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '.' {
		return name
	}
	return swapped(name)
}

// swapped turns one form of the name into the other.
func swapped(name string) string {
	return strings.Map(func(r rune) rune {
		switch r {
		case '.':
			return '/'
		case '/':
			return '.'
		}
		return r
	}, name)
}

func (s procSys) read(name string) (string, error) {
	b, err := os.ReadFile(s.path(name))
	if err != nil {
		return "", fmt.Errorf("nft: reading sysctl: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func (s procSys) write(name, value string) error {
	f, err := os.OpenFile(s.path(name), os.O_WRONLY|os.O_TRUNC, 0)
	if err == nil {
		// A lone newline empties a list; writing nothing would do nothing.
		_, err = f.WriteString(value + "\n")
		err = errors.Join(err, f.Close())
	}
	if err == nil {
		return nil
	}
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) {
		return fmt.Errorf("nft: sysctl %s: %w: run with more rights, or run: sysctl -w %s=%q", dotted(name), ErrSysctlPermission, dotted(name), value)
	}
	return fmt.Errorf("nft: writing sysctl: %w", err)
}

// portSet is a sorted list of disjoint port ranges that do not touch.
type portSet []portRange

type portRange struct{ first, last uint16 }

// parsePorts reads the kernel's form, "80,10240-32767" or nothing.
func parsePorts(s string) (portSet, error) {
	var out portSet
	for part := range strings.SplitSeq(s, ",") {
		part = strings.TrimSpace(part)
		if part == "" {
			continue
		}
		a, b, dash := strings.Cut(part, "-")
		if !dash {
			b = a
		}
		lo, err1 := strconv.ParseUint(a, 10, 16)
		hi, err2 := strconv.ParseUint(b, 10, 16)
		if err1 != nil || err2 != nil || lo > hi {
			return nil, fmt.Errorf("%q is not a list of port ranges", s)
		}
		out = out.union(portSet{{uint16(lo), uint16(hi)}})
	}
	return out, nil
}

func (s portSet) String() string {
	parts := make([]string, len(s))
	for i, r := range s {
		if parts[i] = strconv.Itoa(int(r.first)); r.first != r.last {
			parts[i] += "-" + strconv.Itoa(int(r.last))
		}
	}
	return strings.Join(parts, ",")
}

func (s portSet) covers(first, last uint16) bool {
	for _, r := range s {
		if r.first <= first && last <= r.last {
			return true
		}
	}
	return false
}

func (s portSet) union(t portSet) portSet {
	return combine(s, t, func(a, b bool) bool { return a || b })
}
func (s portSet) minus(t portSet) portSet {
	return combine(s, t, func(a, b bool) bool { return a && !b })
}

// combine walks all 65,536 ports: it runs at start and stop only.
func combine(s, t portSet, keep func(a, b bool) bool) portSet {
	var a, b [1 << 16]bool
	for set, m := range map[*[1 << 16]bool]portSet{&a: s, &b: t} {
		for _, r := range m {
			for p := int(r.first); p <= int(r.last); p++ {
				set[p] = true
			}
		}
	}
	var out portSet
	for p := range a {
		if !keep(a[p], b[p]) {
			continue
		}
		if n := len(out); n > 0 && int(out[n-1].last) == p-1 {
			out[n-1].last = uint16(p)
		} else {
			out = append(out, portRange{uint16(p), uint16(p)})
		}
	}
	return out
}
