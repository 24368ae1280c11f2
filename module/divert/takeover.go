// SPDX-License-Identifier: Apache-2.0

package divert

import (
	"fmt"
	"unsafe"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The kernel gives a queue to a socket, not to a process: as long as anybody
// holds a copy of the descriptor the queue stays bound, packets go on being
// queued, and those that were read and never answered go on waiting. So a holder
// that does nothing else keeps every packet of an engine that dies, and the
// next engine finds in the socket:
//
//  1. messages that nobody has read: the kernel holds their packets too;
//  2. packets without a message: it was read by the dead engine, or did not
//     fit into the buffer, or was swallowed while the queue was bound.
//
// takeOver throws the messages of 1 away and answers all that wait with
// NF_REPEAT: the hook function that queued a packet, our chain, runs for it once
// more (nf_reinject), with the mark and interface it came with, and queues it
// again behind a new number. It passes no rule twice that it has passed before,
// and no chain is skipped. What arrives in the meantime may come before it. A
// packet whose predecessor's answer had been made but
// not sent is handled twice by that, as if the network had doubled it.

// Bind makes a socket that holds a queue, in the network namespace of the
// calling thread, with the settings that OpenBatched would give it, and reads
// nothing. The descriptor is closed on exec and belongs to the caller; pass it
// on in Config.FD. It must be kept out of Go's network poller, which would wake
// a thread for every packet; so do not make an os.File of it. The errors are
// those of OpenBatched.
func Bind(cfg Config) (fd int, err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return -1, err
	}
	number := cfg.Queue
	fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return -1, openError(number, "open a netlink socket", err)
	}
	if err := bindTo(fd, &cfg); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// bindTo binds and configures the queue.
func bindTo(fd int, cfg *Config) error {
	number := cfg.Queue
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return openError(number, "bind the netlink socket", err)
	}
	port, err := netlinkPort(fd)
	if err != nil {
		return openError(number, "read the netlink socket's name", err)
	}
	con := netlink.NewConn(&configSocket{fd: fd}, port)
	if err := probe(con, number); err != nil {
		return err
	}
	if err := setOptions(fd, cfg); err != nil {
		return openError(number, "set socket options", err)
	}
	gate, err := ackGate()
	if err != nil {
		return openError(number, "assemble the socket filter", err)
	}
	filter := make([]unix.SockFilter, len(gate))
	for i, g := range gate {
		filter[i] = unix.SockFilter{Code: g.Op, Jt: g.Jt, Jf: g.Jf, K: g.K}
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog); err != nil {
		return openError(number, "attach the socket filter", err)
	}
	bind, err := bindMessage(*cfg)
	if err == nil {
		_, err = con.Execute(bind)
	}
	if err != nil {
		return bindError(number, err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0); err != nil {
		return openError(number, "detach the socket filter", err)
	}
	return nil
}

// netlinkPort is the address of a bound netlink socket, by which the kernel
// knows the owner of a queue.
func netlinkPort(fd int) (uint32, error) {
	name, err := unix.Getsockname(fd)
	if err != nil {
		return 0, err
	}
	port, ok := name.(*unix.SockaddrNetlink)
	if !ok {
		return 0, fmt.Errorf("unexpected type %T", name)
	}
	return port.Pid, nil
}

// adopt checks and configures a socket that was handed over.
func (q *batched) adopt() error {
	q.fd = q.cfg.FD
	number := q.cfg.Queue
	refuse := func(err error) error {
		return &QueueError{Queue: number, Op: "take over a socket", Reason: ErrNotHeld, Err: err}
	}
	unix.CloseOnExec(q.fd)
	port, err := netlinkPort(q.fd)
	if err != nil {
		return refuse(err)
	}
	k, err := ReadKernelStats(number)
	if err != nil {
		return openError(number, "read the kernel's counters", err)
	}
	if len(k) != 1 || k[0].PortID != port {
		return refuse(fmt.Errorf("it is at port %d, and the kernel has %+v", port, k))
	}
	if err := unix.SetNonblock(q.fd, true); err != nil {
		return openError(number, "set socket options", err)
	}
	if err := setOptions(q.fd, &q.cfg); err != nil {
		return openError(number, "set socket options", err)
	}
	m, err := paramsMessage(q.cfg)
	if err == nil {
		err = (&configSocket{fd: q.fd}).Send(m)
	}
	if err != nil {
		return openError(number, "configure the queue", err)
	}
	q.resume, q.started = true, true
	return q.buffers()
}

// takeOver has the kernel queue again what waits, as told above. It is called
// by the first Receive, so that whoever installs rules has done so: packets that
// wait at a hook are dropped by the kernel when the hook goes.
func (q *batched) takeOver() {
	last, seen := uint32(0), false
	// The bound is for a flood that comes faster than it is read.
	for range 2 + 2*int(q.cfg.Length)/len(q.rx) {
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(q.fd),
			uintptr(unsafe.Pointer(&q.rx[0])), uintptr(len(q.rx)), unix.MSG_DONTWAIT, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			break
		}
		for i := range int(n) {
			m, kind := parseMessage(q.slot(int32(i))[slotLead:slotLead+int(q.rx[i].Len)], q.rx[i].Hdr.Flags&unix.MSG_TRUNC != 0)
			if (kind == kindPacket || kind == kindMalformed) && m.id != 0 && (!seen || int32(m.id-last) > 0) {
				last, seen = m.id, true
			}
		}
	}
	waiting := uint64(0)
	if k, err := q.kernel.read(); err == nil {
		waiting = k.Waiting
		// Packets have numbers of which no message tells.
		if id := uint32(k.LastID); !seen || int32(id-last) > 0 {
			last = id
		}
	}
	q.resume = false
	if last == 0 {
		return
	}
	q.sweepIO[0].SetLen(putVerdict(q.sweepB[:], msgVerdictBatch, q.cfg.Queue, batchSeq, last, nfRepeat))
	_, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(q.fd),
		uintptr(unsafe.Pointer(&q.sweepTX[0])), 1, unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		q.tally.sendErrors.Add(1)
		q.resume = true // the next call tries again
		return
	}
	q.tally.requeued.Add(waiting)
	q.stale = last
}
