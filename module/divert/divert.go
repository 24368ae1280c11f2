// SPDX-License-Identifier: Apache-2.0

// Package divert moves packets between the kernel and an engine: packets come
// in through NFQUEUE (nfnetlink_queue), go back with a verdict, and crafted
// packets leave through raw sockets.
//
// The life of a packet, in order:
//
//  1. An nftables rule queues it. The kernel keeps the packet and sends a copy
//     over a netlink socket, up to [MaxPacket] bytes.
//  2. [Queue.Receive] hands out up to a batch of such copies. Their bytes
//     belong to the queue and are writable by the caller until Send returns.
//  3. The caller sets the verdict of each: Drop, Accept, AcceptMarked, or
//     Rewritten after changing the bytes in place.
//  4. [Queue.Send] answers in order of arrival. A rewritten packet replaces the
//     kernel's one, which then goes on from the hook where it was queued, so
//     that at prerouting it is routed by its new addresses.
//  5. What cannot be made by rewriting (answers, pieces of a packet that had
//     to be cut) leaves through an [Emitter].
//
// There are two queues with the same behaviour: [OpenPlain], a plain use of
// go-nfqueue, easy to read and the reference in tests, and [OpenBatched], which
// reads and answers many packets per system call and allocates nothing.
//
// A queue's socket can outlive the process that reads it: [Bind] makes one that
// somebody else holds open too, and Config.FD hands it to a successor, which
// has the kernel queue again whatever its predecessor left without an answer.
//
// The package never parses beyond the IP version and the addresses, keeps no
// state about flows, installs no rules, and never fails open: a packet that
// nobody answers is dropped by the kernel when its queue closes, and a verdict
// that cannot be carried out becomes a drop.
//
// All sockets are opened in the network namespace of the calling thread, and
// belong to it from then on, whichever thread uses them.
package divert

import (
	"fmt"
	"time"

	"github.com/weirgate/weir/module/packet"
)

// MaxPacket is the longest packet, in bytes with its IP header, that NFQUEUE
// carries in either direction: a netlink attribute's length has 16 bits and
// counts its own header of four bytes. Longer packets arrive truncated and can
// only be dropped or accepted unchanged.
const MaxPacket = 0xffff - 4

// Headroom is the number of bytes that a handler may always add at the end of
// a packet's data, as far as MaxPacket allows.
const Headroom = 256

// Verdict is what becomes of a queued packet.
type Verdict uint8

// The zero value is Drop, so that a packet which a handler forgot is lost (and
// sent again by its sender) instead of passing untranslated.
const (
	// Drop discards the packet.
	Drop Verdict = iota
	// Accept lets the kernel's packet continue, unchanged and with its mark.
	Accept
	// Rewritten replaces the packet by Data, sets Mark and lets it continue.
	Rewritten
	// AcceptMarked lets the kernel's packet continue unchanged but with Mark.
	AcceptMarked
)

// String returns the verdict's name.
func (v Verdict) String() string {
	switch v {
	case Drop:
		return "drop"
	case Accept:
		return "accept"
	case Rewritten:
		return "rewritten"
	case AcceptMarked:
		return "accept-marked"
	}
	return fmt.Sprintf("verdict(%d)", uint8(v))
}

// Packet is one queued packet between Receive and Send.
type Packet struct {
	// Data is the IP packet. It is writable, owned by the queue, and valid
	// until Send returns. A handler may shorten it at the end, or grow it in
	// place up to cap(Data); at least Headroom bytes are free behind it. Its
	// start must not move.
	Data []byte
	// ID is the kernel's number of the packet; it grows with arrival.
	ID uint32
	// Mark is the packet's mark on arrival. Rewritten and AcceptMarked set it.
	Mark uint32
	// InIf is the index of the interface it arrived on, 0 when it has none.
	InIf uint32
	// Hook is the netfilter hook whose rule queued it, NF_INET_PRE_ROUTING
	// (0) to NF_INET_POST_ROUTING (4). Behind the first, a packet that is
	// rewritten is not routed again.
	Hook uint8
	// Checksum tells what is known about the transport checksum: Partial when
	// the field holds no complete checksum yet, Verified when the kernel or the
	// network card has checked it, Unknown otherwise.
	//
	// The kernel takes the checksum of a rewritten packet as final, so a
	// Partial one without GSO needs a complete checksum in its verdict. Of a
	// GSO packet the checksum is filled in by segmentation.
	Checksum packet.ChecksumState
	// GSO tells that this is a super-packet which is cut into segments when it
	// leaves. Its payload must not be shortened to one segment or less: the
	// kernel then refuses to cut it and drops it.
	GSO bool
	// Truncated tells that Data is only the beginning of the packet. It cannot
	// be rewritten, because a shorter payload would trim the kernel's packet:
	// Send turns Rewritten into Drop here.
	Truncated bool
	// Verdict is set by the handler.
	Verdict Verdict

	slot int32  // batched: the buffer that holds it
	off  uint32 // batched: where Data starts in that buffer
}

// Config describes one queue. Zero values mean the defaults.
type Config struct {
	// Queue is the number in the rule.
	Queue uint16
	// Length is how many packets may wait in the kernel for a verdict; more are
	// dropped and counted. Default 16384.
	Length uint32
	// BufferBytes is the size of the socket's receive buffer, which bounds the
	// memory of waiting packets (the kernel counts its overhead too and allows
	// twice this number). Default 64 MiB.
	BufferBytes int
	// Batch is how many packets one Receive returns at most, from 1 to 1024.
	// Default 64. The batched queue holds a buffer of 66 KiB for each.
	Batch int
	// GSO asks for super-packets as they are. Without it the kernel cuts them
	// into segments, and fills in checksums, before it queues them.
	GSO bool
	// CopyRange is how many bytes of a packet are copied at most. Default and
	// maximum MaxPacket.
	CopyRange uint32
	// Linger is how long the batched queue goes on looking for packets, giving
	// way to other threads in between, while they come at shorter intervals
	// than this; at most a millisecond. 0: not at all. DefaultLinger suits a
	// thread that connections wait for.
	Linger time.Duration
	// Spin is how many times it looks after that, without giving way, before it
	// goes to sleep. Default DefaultSpin; negative: never look twice.
	Spin int
	// FD is a socket of Bind for this queue, mostly inherited from a process
	// that was killed. What waits in the kernel without an answer comes anew
	// with the first Receive. 0 stands for none. OpenBatched owns it from the
	// call on, even if it fails; OpenPlain refuses it.
	FD int
}

// Defaults of a Config.
const (
	DefaultLength      = 16384
	DefaultBufferBytes = 64 << 20
	DefaultBatch       = 64
	DefaultSpin        = 4
	DefaultLinger      = 100 * time.Microsecond
	maxLinger          = time.Millisecond
	maxBatch           = 1024
	minCopyRange       = 128
)

// withDefaults fills in the defaults and checks the ranges.
func (c Config) withDefaults() (Config, error) {
	if c.Length == 0 {
		c.Length = DefaultLength
	}
	if c.BufferBytes == 0 {
		c.BufferBytes = DefaultBufferBytes
	}
	if c.Batch == 0 {
		c.Batch = DefaultBatch
	}
	if c.CopyRange == 0 || c.CopyRange > MaxPacket {
		c.CopyRange = MaxPacket
	}
	switch {
	case c.Spin == 0:
		c.Spin = DefaultSpin
	case c.Spin < 0:
		c.Spin = 0
	}
	switch {
	case c.Batch < 1 || c.Batch > maxBatch:
		return c, fmt.Errorf("divert: queue %d: batch %d is not between 1 and %d", c.Queue, c.Batch, maxBatch)
	case c.Linger < 0 || c.Linger > maxLinger:
		return c, fmt.Errorf("divert: queue %d: lingering for %v is not between 0 and %v", c.Queue, c.Linger, maxLinger)
	case c.BufferBytes < 0:
		return c, fmt.Errorf("divert: queue %d: negative buffer size %d", c.Queue, c.BufferBytes)
	case c.CopyRange < minCopyRange:
		return c, fmt.Errorf("divert: queue %d: a copy range of %d bytes does not hold the headers (at least %d)", c.Queue, c.CopyRange, minCopyRange)
	}
	return c, nil
}

// Queue is one NFQUEUE. Receive and Send belong to one goroutine at a time and
// alternate: every packet of a Receive is answered, in order of arrival, before
// the next Receive, which drops those that were not. Wake, Stats and Close may
// be called from any goroutine.
type Queue interface {
	// Receive fills batch with waiting packets and returns how many. If there
	// are none it waits for one, at most for timeout (zero or less: not at
	// all), or until Wake or Close. It may return 0 earlier than that. After
	// Close it returns ErrClosed.
	Receive(batch []Packet, timeout time.Duration) (n int, err error)
	// Send delivers the verdicts of batch, which holds packets of the last
	// Receive in their order of arrival. A packet whose verdict could not be
	// delivered is dropped and counted, which is no error of Send. The only
	// error is ErrClosed.
	Send(batch []Packet) error
	// Wake makes a waiting Receive, or the next one that would wait, return.
	Wake()
	// Stats returns the counters since the queue was opened.
	Stats() Stats
	// Close unbinds the queue. The kernel drops what still waits in it.
	Close() error
}

// Stats are counters of one queue since it was opened. All but Kernel only
// grow.
type Stats struct {
	Received      uint64 // packets handed out by Receive
	ReceivedBytes uint64 // their bytes, as far as they were copied
	Batches       uint64 // calls of Receive that returned packets
	GSO           uint64 // super-packets among Received
	Truncated     uint64 // packets among Received of which only a part was copied

	Dropped   uint64 // verdicts Drop, those made by the queue itself included
	Accepted  uint64 // verdicts Accept and AcceptMarked
	Rewritten uint64 // verdicts Rewritten

	Refused    uint64 // Rewritten turned into Drop: truncated, empty or longer than MaxPacket
	Requeued   uint64 // packets that waited when a bound socket was taken over, and were queued again
	Unanswered uint64 // packets dropped because no Send answered them before the next Receive
	Malformed  uint64 // messages of the kernel that could not be read

	VerdictErrors uint64 // verdicts that the kernel refused, mostly because the packet was gone
	SendErrors    uint64 // failed system calls that carried verdicts
	ReceiveErrors uint64 // failed receiving system calls other than NoBuffers
	NoBuffers     uint64 // reports by the kernel that the receive buffer overflowed (ENOBUFS)
	Wakes         uint64 // waits that were ended by Wake

	// Kernel holds the kernel's own counters, its drops among them. KernelErr
	// tells why they could not be read.
	Kernel    KernelStats
	KernelErr error
}

// Each calls f for every counter that this process keeps, with a name that
// stays over versions.
func (s *Stats) Each(f func(name string, n *uint64)) {
	f("received", &s.Received)
	f("received_bytes", &s.ReceivedBytes)
	f("batches", &s.Batches)
	f("gso", &s.GSO)
	f("truncated", &s.Truncated)
	f("dropped", &s.Dropped)
	f("accepted", &s.Accepted)
	f("rewritten", &s.Rewritten)
	f("refused", &s.Refused)
	f("requeued", &s.Requeued)
	f("unanswered", &s.Unanswered)
	f("malformed", &s.Malformed)
	f("verdict_errors", &s.VerdictErrors)
	f("send_errors", &s.SendErrors)
	f("receive_errors", &s.ReceiveErrors)
	f("no_buffers", &s.NoBuffers)
	f("wakes", &s.Wakes)
}
