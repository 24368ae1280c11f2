// SPDX-License-Identifier: Apache-2.0

package divert

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A slot is the buffer of one packet:
//
//	lead | message of the kernel: headers, attributes, packet | tail
//
// The verdict is written over the message's attributes, right before the
// packet, so that header, attributes and packet leave as one piece without
// being copied. The lead guarantees the room for it, the tail is what a handler
// may add, plus the padding of the verdict's last attribute.
const (
	slotLead = 64
	slotMeta = 512 // attributes before the packet; 120 bytes are usual
	slotTail = Headroom + 4

	// batchSeq is the sequence number of verdict batches, which may find
	// nothing to drop. Packets' verdicts carry the packet's id, which begins at
	// 1 and takes years to get here.
	batchSeq = 0xffffffff

	// sendBuffer bounds the size of one message of verdicts. The kernel's
	// default allows three full packets.
	sendBuffer = 4 << 20
)

// batched is the fast queue. It binds and configures through mdlayher/netlink
// and then uses the socket by itself: recvmmsg into fixed slots, sendmmsg of
// verdicts that are built in these slots, ppoll to wait. Nothing is allocated
// after OpenBatched.
//
// The socket is kept out of Go's network poller: a thread that waits there would
// be woken along with ours by packets that no goroutine waits for.
type batched struct {
	// io is held by Receive and Send, and by Close at its end. It is free of
	// contention as long as the queue is used as it should be.
	io     sync.Mutex
	closed atomic.Bool
	cfg    Config
	fd     int

	wakeMu  sync.Mutex  // guards the life of wakeFD against Wake
	wakeFD  int         // eventfd, -1 after Close
	pending atomic.Bool // an event is written and not yet seen

	mem     []byte // all slots
	slotLen int
	ids     []uint32 // id of the packet in a slot, valid while it is open
	held    []bool   // slot holds a packet without an answer
	order   []int32  // slots of the last Receive in order of arrival
	next    int      // position in order of the packet to be answered next
	open    int      // packets of the last Receive without an answer
	lastID  uint32   // newest packet received
	started bool     // a packet has been received
	opened  time.Time
	linger  linger
	owed    bool   // packets up to lastID may be stuck in the kernel (see sweep)
	resume  bool   // the socket was taken over: see takeOver
	stale   uint32 // packets up to this one were queued again; 0: none were

	rx    []unix.Mmsghdr // one per slot
	rxIov []unix.Iovec
	polls [2]unix.PollFd
	wait  unix.Timespec

	tx      []unix.Mmsghdr // groups of verdicts
	txIov   []unix.Iovec   // verdicts
	sweepIO [1]unix.Iovec
	sweepTX [1]unix.Mmsghdr
	sweepB  [verdictLen]byte

	tally  tally
	kernel counters
}

// OpenBatched opens a queue that reads and answers in batches.
func OpenBatched(cfg Config) (Queue, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	q := &batched{cfg: cfg, fd: -1, wakeFD: -1, opened: time.Now(), linger: linger{most: cfg.Linger}}
	start := q.start
	if cfg.FD != 0 {
		start = q.adopt
	}
	if err := start(); err != nil {
		if q.fd >= 0 {
			_ = unix.Close(q.fd)
		}
		if q.wakeFD >= 0 {
			_ = unix.Close(q.wakeFD)
		}
		return nil, err
	}
	q.kernel = openCounters(cfg.Queue)
	return q, nil
}

// start makes the socket, the buffers and the binding.
func (q *batched) start() error {
	var err error
	if q.fd, err = Bind(q.cfg); err != nil {
		return err
	}
	return q.buffers()
}

// setOptions prepares the socket. For the reasons see plain.start.
func setOptions(fd int, cfg *Config) error {
	for _, o := range []int{unix.NETLINK_NO_ENOBUFS, unix.NETLINK_CAP_ACK} {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, o, 1); err != nil {
			return err
		}
	}
	if err := setBuffer(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, cfg.BufferBytes); err != nil {
		return err
	}
	return setBuffer(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, sendBuffer)
}

// setBuffer sets a socket's buffer beyond the system's limit where the process
// may, and up to the limit otherwise.
func setBuffer(fd, force, ordinary, size int) error {
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, size)
	if errors.Is(err, unix.EPERM) {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, ordinary, size)
	}
	return err
}

// buffers makes the eventfd, the slots and the tables that point into them.
func (q *batched) buffers() error {
	var err error
	if q.wakeFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return openError(q.cfg.Queue, "make an eventfd", err)
	}
	n := q.cfg.Batch
	q.slotLen = slotLead + slotMeta + int(q.cfg.CopyRange) + slotTail
	q.slotLen += -q.slotLen & 63
	q.mem = make([]byte, n*q.slotLen)
	q.ids = make([]uint32, n)
	q.held = make([]bool, n)
	q.order = make([]int32, 0, n)
	q.rx = make([]unix.Mmsghdr, n)
	q.rxIov = make([]unix.Iovec, n)
	q.tx = make([]unix.Mmsghdr, n)
	q.txIov = make([]unix.Iovec, n)
	for i := range q.rx {
		s := q.slot(int32(i))
		q.rxIov[i].Base = &s[slotLead]
		q.rxIov[i].SetLen(q.slotLen - slotLead - slotTail)
		q.rx[i].Hdr.Iov = &q.rxIov[i]
		q.rx[i].Hdr.SetIovlen(1)
	}
	q.sweepIO[0].Base = &q.sweepB[0]
	q.sweepTX[0].Hdr.Iov = &q.sweepIO[0]
	q.sweepTX[0].Hdr.SetIovlen(1)
	q.polls[0] = unix.PollFd{Fd: int32(q.fd), Events: unix.POLLIN}
	q.polls[1] = unix.PollFd{Fd: int32(q.wakeFD), Events: unix.POLLIN}
	return nil
}

func (q *batched) slot(i int32) []byte {
	return q.mem[int(i)*q.slotLen : (int(i)+1)*q.slotLen : (int(i)+1)*q.slotLen]
}

// Receive implements Queue.
func (q *batched) Receive(batch []Packet, timeout time.Duration) (int, error) {
	q.io.Lock()
	n, err := q.receive(batch, timeout)
	q.io.Unlock()
	return n, err
}

func (q *batched) receive(batch []Packet, timeout time.Duration) (int, error) {
	if q.closed.Load() {
		return 0, ErrClosed
	}
	if q.resume {
		q.takeOver()
	}
	if q.open > 0 {
		// Their slots are needed; a packet that nobody answered is dropped.
		q.tally.unanswered.Add(uint64(q.open))
		q.tally.dropped.Add(uint64(q.open))
		q.open = 0
		q.owed = true
		clear(q.held)
	}
	if q.owed {
		q.sweep()
	}
	waited := false
	var slept time.Duration
	for spin := 0; ; spin++ {
		n, empty := q.read(batch)
		if waited {
			q.linger.slept(slept, n > 0)
		}
		if n > 0 {
			q.linger.over()
			return n, nil
		}
		if timeout <= 0 || waited {
			return 0, nil
		}
		if !empty {
			continue
		}
		now := time.Since(q.opened)
		if timeout > q.cfg.Linger && !q.pending.Load() && q.linger.goOn(now) {
			_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
			continue
		}
		if spin < q.cfg.Spin && !q.pending.Load() {
			continue
		}
		q.linger.over()
		waited = true
		woken := q.sleep(timeout)
		slept = time.Since(q.opened) - now
		if woken {
			q.linger.slept(slept, false)
			q.tally.wakes.Add(1)
			if q.closed.Load() {
				return 0, ErrClosed
			}
			return 0, nil
		}
	}
}

// sleep waits for a packet, a wake or the timeout, and tells whether it was a
// wake. A signal, such as those by which Go's scheduler preempts a thread, does
// not end it: Linux leaves the time that remains in the timeout it was given
// (ppoll(2)), with which the wait goes on.
func (q *batched) sleep(timeout time.Duration) (woken bool) {
	q.wait = unix.NsecToTimespec(int64(timeout))
	q.polls[0].Revents, q.polls[1].Revents = 0, 0
	n, err := unix.Ppoll(q.polls[:], &q.wait, nil)
	for err == unix.EINTR {
		n, err = unix.Ppoll(q.polls[:], &q.wait, nil)
	}
	if n <= 0 || q.polls[1].Revents == 0 {
		return false
	}
	var count [8]byte
	// The event is read before pending is cleared: a Wake in between finds it
	// set, writes nothing, and is covered by the return that follows.
	_, _ = unix.Read(q.wakeFD, count[:])
	q.pending.Store(false)
	return true
}

// read takes what waits in the socket, without waiting, and hands out the
// packets among it. empty tells that nothing at all waited there.
func (q *batched) read(batch []Packet) (n int, empty bool) {
	want := min(len(batch), len(q.rx))
	if want == 0 {
		return 0, true
	}
	// Blocking is excluded, but the copying can take long: the runtime is told.
	r, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(q.fd),
		uintptr(unsafe.Pointer(&q.rx[0])), uintptr(want), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		switch errno {
		case unix.EAGAIN, unix.EINTR:
		case unix.ENOBUFS:
			q.tally.noBuffers.Add(1)
		default:
			q.tally.receiveErrors.Add(1)
		}
		return 0, true
	}
	q.order = q.order[:0]
	q.next = 0
	var bytes, gso, truncated uint64
	for i := range int(r) {
		p := &batch[n]
		if !q.parse(int32(i), int(q.rx[i].Len), q.rx[i].Hdr.Flags&unix.MSG_TRUNC != 0, p) {
			continue
		}
		bytes += uint64(len(p.Data))
		if p.GSO {
			gso++
		}
		if p.Truncated {
			truncated++
		}
		q.ids[i] = p.ID
		q.held[i] = true
		q.order = append(q.order, int32(i))
		q.lastID = p.ID
		n++
	}
	q.open = n
	if n > 0 {
		q.tally.received.Add(uint64(n))
		q.tally.receivedBytes.Add(bytes)
		q.tally.batches.Add(1)
		if gso > 0 {
			q.tally.gso.Add(gso)
		}
		if truncated > 0 {
			q.tally.truncated.Add(truncated)
		}
	}
	return n, false
}

// parse reads the message of n bytes in slot i into p. It returns false if the
// message is not a packet.
func (q *batched) parse(i int32, n int, cut bool, p *Packet) bool {
	s := q.slot(i)
	m, kind := parseMessage(s[slotLead:slotLead+n], cut)
	switch kind {
	case kindPacket:
	case kindVerdictError:
		q.tally.verdictErrors.Add(1)
		return false
	case kindNothing:
		return false
	default:
		// A packet that we cannot read waits for its verdict too.
		q.tally.malformed.Add(1)
		if m.id != 0 {
			q.lastID = m.id
			q.owed = true
		}
		return false
	}
	if q.stale != 0 {
		if int32(m.id-q.stale) <= 0 {
			return false // it comes again under another number
		}
		q.stale = 0
	}
	if !q.started {
		q.started = true
		// What the filter swallowed while the queue was opened is stuck.
		q.owed = q.owed || m.id > 1
	}
	off := slotLead + m.payload
	*p = Packet{
		Data: s[off : off+m.length : q.slotLen-4],
		ID:   m.id, Mark: m.mark, InIf: m.inIf, Hook: m.hook,
		Checksum:  checksumState(m.flags, m.hook),
		GSO:       m.flags&skbGSO != 0,
		Truncated: m.truncated,
		slot:      i, off: uint32(off),
	}
	return true
}

// Wake implements Queue.
func (q *batched) Wake() {
	if q.pending.Swap(true) {
		return
	}
	q.wakeMu.Lock()
	if q.wakeFD >= 0 {
		one := [8]byte{}
		ne.PutUint64(one[:], 1)
		_, _ = unix.Write(q.wakeFD, one[:])
	}
	q.wakeMu.Unlock()
}

// Stats implements Queue.
func (q *batched) Stats() Stats {
	s := q.tally.stats()
	s.Kernel, s.KernelErr = q.kernel.read()
	return s
}

// Close implements Queue. It returns when no other call uses the sockets.
func (q *batched) Close() error {
	if q.closed.Swap(true) {
		return nil
	}
	q.Wake()
	q.io.Lock()
	err := unix.Close(q.fd)
	q.fd = -1
	q.io.Unlock()
	q.wakeMu.Lock()
	_ = unix.Close(q.wakeFD)
	q.wakeFD = -1
	q.wakeMu.Unlock()
	q.kernel.close()
	if err != nil {
		return &QueueError{Queue: q.cfg.Queue, Op: "close", Err: err}
	}
	return nil
}
