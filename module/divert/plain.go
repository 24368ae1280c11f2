// SPDX-License-Identifier: Apache-2.0

package divert

import (
	"context"
	"errors"
	"io/fs"
	"sync"
	"time"

	nfqueue "github.com/florianl/go-nfqueue/v2"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// plain is the reference queue: go-nfqueue as its documentation shows it. The
// library's goroutine reads the socket and calls hook for each packet; hook
// puts the packet into a bounded ring, from which Receive takes it.
//
// When the ring is full, hook waits. Packets then pile up where they are
// counted and bounded: in the kernel's queue.
type plain struct {
	cfg    Config
	nf     *nfqueue.Nfqueue
	ring   chan Packet
	wake   chan struct{} // holds one token while a Wake is not yet seen
	closed chan struct{}
	once   sync.Once

	timer      *time.Timer // used by Receive only
	open       int         // packets handed out and not yet answered
	firstSeen  bool        // used by hook only
	lastID     uint32      // newest packet handed out
	owed       bool        // a verdict could not be sent
	tally      tally
	kernel     counters
	closeError error
}

var errPlain = errors.New("the plain queue opens its own socket")

// OpenPlain opens a queue over go-nfqueue, without batching. It serves as the
// reference for OpenBatched, which is several times as fast. It cannot take over
// a socket: the library opens its own and binds it, which the kernel refuses for
// one that is bound.
func OpenPlain(cfg Config) (Queue, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if cfg.FD != 0 {
		return nil, &QueueError{Queue: cfg.Queue, Op: "take over a socket", Reason: ErrUnsupported, Err: errPlain}
	}
	var flags uint32
	if cfg.GSO {
		flags |= nfqueue.NfQaCfgFlagGSO
	}
	nf, err := nfqueue.Open(&nfqueue.Config{
		NfQueue:      cfg.Queue,
		MaxQueueLen:  cfg.Length,
		MaxPacketLen: cfg.CopyRange,
		Copymode:     nfqueue.NfQnlCopyPacket,
		Flags:        flags,
	})
	if err != nil {
		return nil, openError(cfg.Queue, "open a netlink socket", err)
	}
	q := &plain{
		cfg: cfg, nf: nf,
		ring:   make(chan Packet, 2*cfg.Batch),
		wake:   make(chan struct{}, 1),
		closed: make(chan struct{}),
		timer:  time.NewTimer(time.Hour),
	}
	if err := q.start(); err != nil {
		_ = nf.Con.Close()
		return nil, err
	}
	q.kernel = openCounters(cfg.Queue)
	return q, nil
}

// start sets the socket's options and binds the queue. The filter keeps packets
// away while the library waits for acknowledgments (see ackGate).
func (q *plain) start() error {
	con := q.nf.Con
	if err := probe(con, q.cfg.Queue); err != nil {
		return err
	}
	gate, err := ackGate()
	if err == nil {
		err = con.SetBPF(gate)
	}
	if err == nil {
		// Without this an overflow is reported as an error of the next read,
		// and the socket refuses packets until it has been emptied.
		err = con.SetOption(netlink.NoENOBUFS, true)
	}
	if err == nil {
		// An error report repeats the header of a refused verdict only, not
		// its 64 KiB of payload.
		err = con.SetOption(netlink.CapAcknowledge, true)
	}
	if err == nil {
		// This is SO_RCVBUFFORCE where the process may, SO_RCVBUF elsewhere.
		err = con.SetReadBuffer(q.cfg.BufferBytes)
	}
	if err == nil {
		err = con.SetWriteBuffer(sendBuffer)
	}
	if err != nil {
		return openError(q.cfg.Queue, "set socket options", err)
	}
	if err := q.nf.RegisterWithErrorFunc(context.Background(), q.hook, q.readError); err != nil {
		return bindError(q.cfg.Queue, err)
	}
	if err := con.RemoveBPF(); err != nil {
		_ = q.nf.Close()
		return openError(q.cfg.Queue, "remove the socket filter", err)
	}
	return nil
}

// hook runs in the library's goroutine, once per packet. A result other than
// zero would end the goroutine and unbind the queue.
func (q *plain) hook(a nfqueue.Attribute) int {
	if a.PacketID == nil {
		q.tally.malformed.Add(1)
		return 0
	}
	if !q.firstSeen {
		q.firstSeen = true
		if *a.PacketID > 1 {
			// What the filter swallowed while the queue was opened.
			q.early(q.nf.SetVerdictBatch(*a.PacketID-1, nfqueue.NfDrop))
		}
	}
	if a.Payload == nil || len(*a.Payload) == 0 {
		q.tally.malformed.Add(1)
		q.early(q.nf.SetVerdict(*a.PacketID, nfqueue.NfDrop))
		return 0
	}
	p := Packet{ID: *a.PacketID, Data: make([]byte, len(*a.Payload), len(*a.Payload)+Headroom)}
	copy(p.Data, *a.Payload)
	if a.Mark != nil {
		p.Mark = *a.Mark
	}
	if a.InDev != nil {
		p.InIf = *a.InDev
	}
	var flags uint32
	if a.SkbInfo != nil && len(*a.SkbInfo) == 4 {
		flags = be.Uint32(*a.SkbInfo)
	}
	var hook uint8
	if a.Hook != nil {
		hook = *a.Hook
	}
	p.Hook = hook
	p.Checksum = checksumState(flags, hook)
	p.GSO = flags&skbGSO != 0
	p.Truncated = a.CapLen != nil
	select {
	case q.ring <- p:
	case <-q.closed:
		return 1
	}
	return 0
}

// early counts a verdict of the library's goroutine that could not be sent.
func (q *plain) early(err error) {
	if err != nil {
		q.tally.sendErrors.Add(1)
	}
}

// readError runs in the library's goroutine when a read fails or the kernel
// reports a refused verdict. A result other than zero ends the goroutine.
func (q *plain) readError(err error) int {
	select {
	case <-q.closed:
		return 1
	default:
	}
	switch {
	case errors.Is(err, unix.ENOBUFS):
		q.tally.noBuffers.Add(1)
	case errors.Is(err, fs.ErrClosed), errors.Is(err, unix.EBADF):
		return 1
	case errors.Is(err, unix.ENOENT):
		q.tally.verdictErrors.Add(1)
	default:
		q.tally.receiveErrors.Add(1)
	}
	return 0
}

// Receive implements Queue.
func (q *plain) Receive(batch []Packet, timeout time.Duration) (int, error) {
	select {
	case <-q.closed:
		return 0, ErrClosed
	default:
	}
	if q.open > 0 {
		q.tally.unanswered.Add(uint64(q.open))
		q.tally.dropped.Add(uint64(q.open))
		q.answer(q.nf.SetVerdictBatch(q.lastID, nfqueue.NfDrop))
		q.open = 0
	}
	if len(batch) > q.cfg.Batch {
		batch = batch[:q.cfg.Batch]
	}
	if len(batch) == 0 {
		return 0, nil
	}
	n := 0
	select {
	case batch[0] = <-q.ring:
		n = 1
	default:
		if timeout <= 0 {
			return 0, nil
		}
		q.timer.Reset(timeout)
		select {
		case batch[0] = <-q.ring:
			n = 1
		case <-q.wake:
			q.tally.wakes.Add(1)
		case <-q.timer.C:
		case <-q.closed:
			return 0, ErrClosed
		}
		q.timer.Stop()
	}
	for n > 0 && n < len(batch) {
		select {
		case batch[n] = <-q.ring:
			n++
			continue
		default:
		}
		break
	}
	if n > 0 {
		q.count(batch[:n])
	}
	return n, nil
}

// count adds what Receive hands out to the counters.
func (q *plain) count(batch []Packet) {
	for i := range batch {
		p := &batch[i]
		q.tally.receivedBytes.Add(uint64(len(p.Data)))
		if p.GSO {
			q.tally.gso.Add(1)
		}
		if p.Truncated {
			q.tally.truncated.Add(1)
		}
	}
	q.open = len(batch)
	q.lastID = batch[len(batch)-1].ID
	q.tally.received.Add(uint64(len(batch)))
	q.tally.batches.Add(1)
}

// Send implements Queue.
func (q *plain) Send(batch []Packet) error {
	select {
	case <-q.closed:
		return ErrClosed
	default:
	}
	for i := range batch {
		p := &batch[i]
		if p.Verdict == Rewritten && refusal(p) {
			q.tally.refused.Add(1)
			p.Verdict = Drop
		}
		switch p.Verdict {
		case Rewritten:
			q.tally.rewritten.Add(1)
			q.answer(q.nf.SetVerdictWithOption(p.ID, nfqueue.NfAccept,
				nfqueue.WithMark(p.Mark), nfqueue.WithAlteredPacket(p.Data)))
		case Accept:
			q.tally.accepted.Add(1)
			q.answer(q.nf.SetVerdict(p.ID, nfqueue.NfAccept))
		case AcceptMarked:
			q.tally.accepted.Add(1)
			q.answer(q.nf.SetVerdictWithOption(p.ID, nfqueue.NfAccept, nfqueue.WithMark(p.Mark)))
		default:
			q.tally.dropped.Add(1)
			q.answer(q.nf.SetVerdict(p.ID, nfqueue.NfDrop))
		}
	}
	q.open = max(0, q.open-len(batch))
	if q.owed && q.open == 0 {
		// Verdicts were lost: drop what still waits for one.
		q.owed = false
		q.answer(q.nf.SetVerdictBatch(q.lastID, nfqueue.NfDrop))
	}
	return nil
}

// answer notes that a verdict could not be sent. Its packet waits in the kernel
// until Send makes up for it.
func (q *plain) answer(err error) {
	if err != nil {
		q.tally.sendErrors.Add(1)
		q.owed = true
	}
}

// Wake implements Queue.
func (q *plain) Wake() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// Stats implements Queue.
func (q *plain) Stats() Stats {
	s := q.tally.stats()
	s.Kernel, s.KernelErr = q.kernel.read()
	return s
}

// Close implements Queue. It returns when the library's goroutines have ended.
func (q *plain) Close() error {
	q.once.Do(func() {
		close(q.closed)
		q.closeError = q.nf.Close()
		q.kernel.close()
	})
	return q.closeError
}
