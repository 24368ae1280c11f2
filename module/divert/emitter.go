// SPDX-License-Identifier: Apache-2.0

package divert

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// emitBatch is how many packets one system call carries at most.
	emitBatch = 64
	// emitBuffer is the send buffer of a raw socket, in bytes. It fills when a
	// device is slower than we are.
	emitBuffer = 4 << 20
)

// Emitter sends crafted IP packets through raw sockets, with our mark.
//
// The header of a packet names its source and destination. The source is given
// to routing as well, so that rules by source address apply; it need not be an
// address of this host. A packet that cannot be sent is lost, as any packet may
// be, and counted by reason.
//
// Send belongs to one goroutine at a time; Stats and Close to any.
type Emitter struct {
	io     sync.Mutex // held by Send, and by Close
	closed bool
	v4, v6 rawSocket

	// tooBig is told the destination and the limit of a packet that was too
	// long for its way; see OnTooBig.
	tooBig func(dst netip.Addr, mtu int)

	tally emitTally
}

// rawSocket is one family's socket and the tables for a batch.
type rawSocket struct {
	fd   int
	err  error // why fd is -1
	msgs [emitBatch]unix.Mmsghdr
	iov  [emitBatch]unix.Iovec

	name4 [emitBatch]unix.RawSockaddrInet4
	ctl4  [emitBatch]control4
	name6 [emitBatch]unix.RawSockaddrInet6
	ctl6  [emitBatch]control6

	// For the error queue.
	errMsg unix.Msghdr
	errCtl [256]byte
}

// control4 is the ancillary message that gives IPv4 routing the source.
type control4 struct {
	hdr  unix.Cmsghdr
	info unix.Inet4Pktinfo
}

// control6 does the same for IPv6.
type control6 struct {
	hdr  unix.Cmsghdr
	info unix.Inet6Pktinfo
}

type emitTally struct {
	sent, bytes                           atomic.Uint64
	tooBig, notPermitted, noBuffers, busy atomic.Uint64
	unreachable, malformed, unsupported   atomic.Uint64
	other                                 atomic.Uint64
	lastErrno, lastMTU                    atomic.Uint32
}

// EmitStats counts what became of emitted packets. All but the last two fields
// only grow.
type EmitStats struct {
	Sent  uint64 // packets that the kernel took
	Bytes uint64 // their bytes

	TooBig       uint64 // EMSGSIZE: longer than the device's or the path's MTU
	NotPermitted uint64 // EPERM, EACCES: dropped by an output rule, or a broadcast address
	NoBuffers    uint64 // ENOBUFS, ENOMEM: dropped by the device's queue
	Busy         uint64 // EAGAIN: the socket's send buffer is full
	Unreachable  uint64 // EHOSTUNREACH, ENETUNREACH, ENETDOWN: no way to the destination
	Malformed    uint64 // not a complete IPv4 or IPv6 packet
	Unsupported  uint64 // of a family that this host does not have
	Other        uint64 // any other error

	LastErrno unix.Errno // the latest error, 0 if there was none
	LastMTU   int        // the latest limit reported with TooBig, in bytes, 0 if none was
}

// Each calls f for every counter, with a name that stays over versions.
func (s *EmitStats) Each(f func(name string, n *uint64)) {
	f("sent", &s.Sent)
	f("bytes", &s.Bytes)
	f("too_big", &s.TooBig)
	f("not_permitted", &s.NotPermitted)
	f("no_buffers", &s.NoBuffers)
	f("busy", &s.Busy)
	f("unreachable", &s.Unreachable)
	f("malformed", &s.Malformed)
	f("unsupported", &s.Unsupported)
	f("other", &s.Other)
}

// Failed returns the number of packets that were not sent.
func (s *EmitStats) Failed() uint64 {
	return s.TooBig + s.NotPermitted + s.NoBuffers + s.Busy + s.Unreachable + s.Malformed + s.Unsupported + s.Other
}

// OpenEmitter opens raw sockets for both families in the network namespace of
// the calling thread. Packets carry mark. It succeeds if at least IPv4 is
// there. The error matches ErrPermission or ErrUnsupported where that is the
// reason.
func OpenEmitter(mark uint32) (*Emitter, error) {
	e := &Emitter{}
	e.v4.fd, e.v4.err = openRaw(unix.AF_INET, mark)
	if e.v4.err != nil {
		return nil, e.v4.err
	}
	e.v6.fd, e.v6.err = openRaw(unix.AF_INET6, mark)
	if e.v6.err != nil && !errors.Is(e.v6.err, unix.EAFNOSUPPORT) {
		_ = unix.Close(e.v4.fd)
		return nil, e.v6.err
	}
	e.v4.prepare(false)
	e.v6.prepare(true)
	return e, nil
}

// rawOptions are the options of one family's socket, in order.
//
// A socket of IPPROTO_RAW takes packets with their headers. TRANSPARENT permits
// sources that are not ours. RECVERR makes the kernel tell about a full device
// queue (otherwise it reports success) and about the MTU.
func rawOptions(family int, mark uint32) []struct{ level, name, value int } {
	o := []struct{ level, name, value int }{
		{unix.SOL_SOCKET, unix.SO_MARK, int(int32(mark))},
		{unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1},
		{unix.IPPROTO_IP, unix.IP_RECVERR, 1},
	}
	if family == unix.AF_INET6 {
		o[1].level, o[1].name = unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT
		o[2].level, o[2].name = unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	}
	return o
}

func openRaw(family int, mark uint32) (fd int, err error) {
	name := "IPv4"
	if family == unix.AF_INET6 {
		name = "IPv6"
	}
	fd, err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if err != nil {
		return -1, emitError(name, "open", err)
	}
	for _, o := range rawOptions(family, mark) {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			_ = unix.Close(fd)
			return -1, emitError(name, fmt.Sprintf("set option %d/%d of", o.level, o.name), err)
		}
	}
	// Packets of IP protocol 255 would be delivered here and stay: refuse all.
	refuse := [1]unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
	prog := unix.SockFprog{Len: 1, Filter: &refuse[0]}
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog)
	if err == nil {
		err = setBuffer(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, emitBuffer)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, emitError(name, "set up", err)
	}
	return fd, nil
}

func emitError(family, op string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("divert: %s the raw %s socket: %w (%w)", op, family, ErrPermission, err)
	case errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.ENOPROTOOPT):
		return fmt.Errorf("divert: %s the raw %s socket: %w (%w)", op, family, ErrUnsupported, err)
	}
	return fmt.Errorf("divert: %s the raw %s socket: %w", op, family, err)
}

// prepare fills in what stays the same in each message.
func (s *rawSocket) prepare(v6 bool) {
	for i := range s.msgs {
		h := &s.msgs[i].Hdr
		h.Iov = &s.iov[i]
		h.SetIovlen(1)
		if v6 {
			s.name6[i].Family = unix.AF_INET6
			c := &s.ctl6[i]
			c.hdr.Level, c.hdr.Type = unix.IPPROTO_IPV6, unix.IPV6_PKTINFO
			c.hdr.SetLen(unix.CmsgLen(unix.SizeofInet6Pktinfo))
			h.Name, h.Namelen = (*byte)(unsafe.Pointer(&s.name6[i])), unix.SizeofSockaddrInet6
			h.Control = (*byte)(unsafe.Pointer(c))
			h.SetControllen(int(unsafe.Sizeof(*c)))
			continue
		}
		s.name4[i].Family = unix.AF_INET
		c := &s.ctl4[i]
		c.hdr.Level, c.hdr.Type = unix.IPPROTO_IP, unix.IP_PKTINFO
		c.hdr.SetLen(unix.CmsgLen(unix.SizeofInet4Pktinfo))
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&s.name4[i])), unix.SizeofSockaddrInet4
		h.Control = (*byte)(unsafe.Pointer(c))
		h.SetControllen(int(unsafe.Sizeof(*c)))
	}
}

// OnTooBig sets a function that Send calls when a packet was longer than the
// MTU of the device it should leave by, with the destination and that MTU. (A
// path MTU below the device's makes EMSGSIZE without a report: the host then
// answers itself with an ICMP error, as a router on the path would.) Set it
// before the first Send. It must not call Send.
func (e *Emitter) OnTooBig(fn func(dst netip.Addr, mtu int)) { e.tooBig = fn }

// Send sends complete IPv4 and IPv6 packets in order and returns how many the
// kernel took. Packets that could not be sent are skipped and counted. The
// packets' bytes are not kept. The only error is ErrClosed.
func (e *Emitter) Send(pkts [][]byte) (sent int, err error) {
	e.io.Lock()
	if e.closed {
		e.io.Unlock()
		return 0, ErrClosed
	}
	var bytes uint64
	for i := 0; i < len(pkts); {
		switch ipVersion(pkts[i]) {
		case 4:
			n, k, b := e.run4(pkts[i:])
			i, sent, bytes = i+n, sent+k, bytes+b
		case 6:
			n, k, b := e.run6(pkts[i:])
			i, sent, bytes = i+n, sent+k, bytes+b
		default:
			e.tally.malformed.Add(1)
			i++
		}
	}
	e.tally.sent.Add(uint64(sent))
	e.tally.bytes.Add(bytes)
	e.io.Unlock()
	return sent, nil
}

// ipVersion returns 4 or 6, or 0 if b is too short for a header.
func ipVersion(b []byte) int {
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		return 4
	case len(b) >= 40 && b[0]>>4 == 6:
		return 6
	}
	return 0
}

// run4 sends the IPv4 packets at the beginning of pkts, at most a batch. It
// returns how many it dealt with, how many went out, and their bytes.
func (e *Emitter) run4(pkts [][]byte) (n, sent int, bytes uint64) {
	s := &e.v4
	for n < len(pkts) && n < emitBatch && ipVersion(pkts[n]) == 4 {
		p := pkts[n]
		copy(s.ctl4[n].info.Spec_dst[:], p[12:16])
		copy(s.name4[n].Addr[:], p[16:20])
		s.iov[n].Base = unsafe.SliceData(p)
		s.iov[n].SetLen(len(p))
		n++
	}
	sent, bytes = e.write(s, pkts[:n])
	return n, sent, bytes
}

// run6 is run4 for IPv6.
func (e *Emitter) run6(pkts [][]byte) (n, sent int, bytes uint64) {
	s := &e.v6
	for n < len(pkts) && n < emitBatch && ipVersion(pkts[n]) == 6 {
		p := pkts[n]
		copy(s.ctl6[n].info.Addr[:], p[8:24])
		copy(s.name6[n].Addr[:], p[24:40])
		s.iov[n].Base = unsafe.SliceData(p)
		s.iov[n].SetLen(len(p))
		n++
	}
	if s.fd < 0 {
		e.tally.unsupported.Add(uint64(n))
		return n, 0, 0
	}
	sent, bytes = e.write(s, pkts[:n])
	return n, sent, bytes
}

// write sends the prepared messages of pkts. sendmmsg stops at the first packet
// that fails; that one is skipped.
func (e *Emitter) write(s *rawSocket, pkts [][]byte) (sent int, bytes uint64) {
	for at := 0; at < len(pkts); {
		r, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(s.fd),
			uintptr(unsafe.Pointer(&s.msgs[at])), uintptr(len(pkts)-at), unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			for _, p := range pkts[at : at+int(r)] {
				bytes += uint64(len(p))
			}
			sent += int(r)
			at += int(r)
		case unix.EINTR:
		case unix.EAGAIN:
			// The buffer stays full for longer than this batch takes.
			e.tally.busy.Add(uint64(len(pkts) - at))
			e.tally.lastErrno.Store(uint32(errno))
			at = len(pkts)
		default:
			e.failed(s, pkts[at], errno)
			at++
		}
	}
	// The caller's memory is not kept alive by our tables.
	for i := range pkts {
		s.iov[i].Base = nil
	}
	return sent, bytes
}

// failed counts a packet that was not sent.
func (e *Emitter) failed(s *rawSocket, p []byte, errno unix.Errno) {
	t := &e.tally
	t.lastErrno.Store(uint32(errno))
	switch errno {
	case unix.EMSGSIZE:
		t.tooBig.Add(1)
		mtu := s.readMTU()
		if mtu == 0 {
			return
		}
		t.lastMTU.Store(uint32(mtu))
		if e.tooBig == nil {
			return
		}
		if p[0]>>4 == 4 {
			e.tooBig(netip.AddrFrom4([4]byte(p[16:20])), mtu)
		} else {
			e.tooBig(netip.AddrFrom16([16]byte(p[24:40])), mtu)
		}
	case unix.EPERM, unix.EACCES:
		t.notPermitted.Add(1)
	case unix.ENOBUFS, unix.ENOMEM:
		t.noBuffers.Add(1)
	case unix.EHOSTUNREACH, unix.ENETUNREACH, unix.ENETDOWN:
		t.unreachable.Add(1)
	case unix.EINVAL:
		t.malformed.Add(1)
	default:
		t.other.Add(1)
	}
}

// readMTU empties the socket's error queue and returns the newest MTU in it, 0
// if there is none.
func (s *rawSocket) readMTU() (mtu int) {
	for {
		s.errMsg = unix.Msghdr{Control: &s.errCtl[0]}
		s.errMsg.SetControllen(len(s.errCtl))
		_, _, errno := unix.Syscall(unix.SYS_RECVMSG, uintptr(s.fd),
			uintptr(unsafe.Pointer(&s.errMsg)), unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return mtu
		}
		const ext = int(unsafe.Sizeof(unix.SockExtendedErr{}))
		if int(s.errMsg.Controllen) < unix.CmsgLen(ext) {
			continue
		}
		h := (*unix.Cmsghdr)(unsafe.Pointer(&s.errCtl[0]))
		v4 := h.Level == unix.IPPROTO_IP && h.Type == unix.IP_RECVERR
		v6 := h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_RECVERR
		if !v4 && !v6 {
			continue
		}
		x := (*unix.SockExtendedErr)(unsafe.Pointer(&s.errCtl[unix.CmsgLen(0)]))
		if unix.Errno(x.Errno) == unix.EMSGSIZE && x.Info > 0 {
			mtu = int(x.Info)
		}
	}
}

// Stats returns the counters since the emitter was opened.
func (e *Emitter) Stats() EmitStats {
	t := &e.tally
	return EmitStats{
		Sent: t.sent.Load(), Bytes: t.bytes.Load(),
		TooBig: t.tooBig.Load(), NotPermitted: t.notPermitted.Load(), NoBuffers: t.noBuffers.Load(),
		Busy: t.busy.Load(), Unreachable: t.unreachable.Load(), Malformed: t.malformed.Load(),
		Unsupported: t.unsupported.Load(), Other: t.other.Load(),
		LastErrno: unix.Errno(t.lastErrno.Load()), LastMTU: int(t.lastMTU.Load()),
	}
}

// Close closes the sockets. It waits for a Send that is under way.
func (e *Emitter) Close() {
	e.io.Lock()
	defer e.io.Unlock()
	if e.closed {
		return
	}
	e.closed = true
	_ = unix.Close(e.v4.fd)
	if e.v6.fd >= 0 {
		_ = unix.Close(e.v6.fd)
	}
}
