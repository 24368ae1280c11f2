// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Traffic counts what an interface has carried. A packet is what the host
// sees: a super-packet of a virtual link is one.
type Traffic struct {
	InPackets, OutPackets uint64
	InBytes, OutBytes     uint64
}

// Packets is the number of packets both ways.
func (t Traffic) Packets() uint64 { return t.InPackets + t.OutPackets }

// Since returns what has come since an earlier count.
func (t Traffic) Since(e Traffic) Traffic {
	return Traffic{t.InPackets - e.InPackets, t.OutPackets - e.OutPackets, t.InBytes - e.InBytes, t.OutBytes - e.OutBytes}
}

// Traffic reads the counters of an interface.
func (h *Host) Traffic(iface string) (Traffic, error) {
	k, err := h.nl.LinkByName(iface)
	if err != nil {
		return Traffic{}, fmt.Errorf("lab: host %s: interface %s: %w", h.name, iface, err)
	}
	s := k.Attrs().Statistics
	if s == nil {
		return Traffic{}, fmt.Errorf("lab: host %s: interface %s has no counters", h.name, iface)
	}
	return Traffic{s.RxPackets, s.TxPackets, s.RxBytes, s.TxBytes}, nil
}

// Accepted returns how many TCP connections have been made to the namespace,
// of both families, answered by its kernel.
func (h *Host) Accepted() (int, error) {
	var b []byte
	err := h.Do(func() (err error) {
		b, err = os.ReadFile("/proc/thread-self/net/snmp")
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("lab: host %s: accepted connections: %w", h.name, err)
	}
	// Two lines for each protocol: names, then numbers.
	var names []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != "Tcp:" {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		if i := slices.Index(names, "PassiveOpens"); i > 0 && i < len(f) {
			return strconv.Atoi(f[i])
		}
	}
	return 0, fmt.Errorf("lab: host %s: accepted connections: %q", h.name, b)
}

// States of a TCP socket, as the kernel numbers them (include/net/tcp_states.h).
const (
	TCPEstablished = 1
	TCPTimeWait    = 6
	TCPCloseWait   = 8
	TCPListen      = 10
)

// A Socket is one line of the kernel's table of TCP sockets.
type Socket struct {
	Local, Remote netip.AddrPort
	State         int
}

// Sockets reads the TCP sockets in the namespace, of both families. The table
// is read in pieces: it is no snapshot of one instant.
func (h *Host) Sockets() ([]Socket, error) {
	var tables [2][]byte
	err := h.Do(func() error {
		for i, name := range [2]string{"tcp", "tcp6"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			tables[i] = b
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("lab: host %s: sockets: %w", h.name, err)
	}
	var socks []Socket
	for _, b := range tables {
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) < 4 || !strings.HasSuffix(f[0], ":") {
				continue // the heading
			}
			state, err := strconv.ParseInt(f[3], 16, 0)
			local, lerr := procAddr(f[1])
			remote, rerr := procAddr(f[2])
			if err := errors.Join(err, lerr, rerr); err != nil {
				return nil, fmt.Errorf("lab: host %s: sockets: %q: %w", h.name, line, err)
			}
			socks = append(socks, Socket{local, remote, int(state)})
		}
	}
	return socks, nil
}

// procAddr reads an address as /proc/net/tcp writes it: 32-bit words in the
// machine's order, then the port.
func procAddr(s string) (netip.AddrPort, error) {
	a, p, ok := strings.Cut(s, ":")
	b, err := hex.DecodeString(a)
	if err != nil || !ok || len(b) != 4 && len(b) != 16 {
		return netip.AddrPort{}, fmt.Errorf("address %q: %w", s, err)
	}
	for i := 0; i < len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
	}
	port, err := strconv.ParseUint(p, 16, 16)
	addr, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(addr.Unmap(), uint16(port)), err
}

// A PacketQueue is one line of the kernel's table of packet queues.
type PacketQueue struct {
	Number  int
	Waiting int    // packets that are with the reader or wait for it
	Full    uint64 // packets dropped because the queue was full
	Missed  uint64 // packets dropped because the reader's socket was full
	Seen    uint64 // packets that came, dropped ones included
}

// PacketQueues reads the NFQUEUE queues of the namespace, none where there
// are none.
func (h *Host) PacketQueues() ([]PacketQueue, error) {
	var b []byte
	err := h.Do(func() (err error) {
		b, err = os.ReadFile("/proc/thread-self/net/netfilter/nfnetlink_queue")
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("lab: host %s: packet queues: %w", h.name, err)
	}
	var qs []PacketQueue
	for line := range strings.Lines(string(b)) {
		// number, port id, length, copy mode, copy range, queue dropped, user
		// dropped, last id, 1
		var q PacketQueue
		var port, mode, size int
		if _, err := fmt.Sscan(line, &q.Number, &port, &q.Waiting, &mode, &size, &q.Full, &q.Missed, &q.Seen); err != nil {
			return nil, fmt.Errorf("lab: host %s: packet queues: %q: %w", h.name, line, err)
		}
		qs = append(qs, q)
	}
	return qs, nil
}

// CPU is the processor time, user and system, that a process and all its
// threads, ended ones included, have used so far. It can be asked for while
// the process runs.
func (p *Process) CPU() (time.Duration, error) {
	// A process's clock is its id, inverted, with the kind in the low three
	// bits: 2 is what the scheduler counted (include/linux/posix-timers.h).
	const cpuclockSched = 2
	id := int32(^uint32(p.Pid())<<3 | cpuclockSched)
	var ts unix.Timespec
	if err := unix.ClockGettime(id, &ts); err != nil {
		return 0, fmt.Errorf("lab: host %s: CPU time of %s: %w", p.host.name, p.Cmd.Path, err)
	}
	return time.Duration(ts.Nano()), nil
}
