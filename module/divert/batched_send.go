// SPDX-License-Identifier: Apache-2.0

package divert

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// groupBytes is how many bytes of verdicts share one message of sendmmsg. The
// kernel copies each message into one buffer and works through the verdicts in
// it. For small packets groups of this size save a quarter of the processor time
// that messages of one verdict take; beyond 32 KiB the kernel's buffers are no
// longer contiguous. A longer verdict makes a group of its own.
const groupBytes = 30 << 10

// Send implements Queue.
func (q *batched) Send(batch []Packet) error {
	q.io.Lock()
	err := q.send(batch)
	q.io.Unlock()
	return err
}

func (q *batched) send(batch []Packet) error {
	if q.closed.Load() {
		return ErrClosed
	}
	verdicts, groups, room := 0, 0, 0
	var dropped, accepted, rewritten, refused uint64
	for i := 0; i < len(batch); i++ {
		p := &batch[i]
		if uint(p.slot) >= uint(len(q.held)) || !q.held[p.slot] || q.ids[p.slot] != p.ID {
			continue // not one of ours, or answered already
		}
		if p.Verdict == Rewritten && (refusal(p) || !q.inPlace(p)) {
			refused++
			p.Verdict = Drop
		}
		// The header goes right before the packet, over what was parsed.
		head := q.slot(p.slot)[p.off-rewriteLen:]
		var n int
		switch p.Verdict {
		case Rewritten:
			rewritten++
			putVerdict(head, msgVerdict, q.cfg.Queue, p.ID, p.ID, nfAccept)
			putMark(head, p.Mark)
			n = putPayload(head, len(p.Data))
		case Accept:
			accepted++
			n = putVerdict(head, msgVerdict, q.cfg.Queue, p.ID, p.ID, nfAccept)
		case AcceptMarked:
			accepted++
			putVerdict(head, msgVerdict, q.cfg.Queue, p.ID, p.ID, nfAccept)
			n = putMark(head, p.Mark)
		default:
			run := q.dropRun(batch[i:])
			dropped += uint64(run)
			if run > 1 {
				// One message drops all up to the last of the run.
				last := &batch[i+run-1]
				n = putVerdict(head, msgVerdictBatch, q.cfg.Queue, batchSeq, last.ID, nfDrop)
				for j := i; j < i+run-1; j++ {
					q.answered(&batch[j])
				}
				i += run - 1
				p = last
			} else {
				n = putVerdict(head, msgVerdict, q.cfg.Queue, p.ID, p.ID, nfDrop)
			}
		}
		q.answered(p)
		q.txIov[verdicts].Base = &head[0]
		q.txIov[verdicts].SetLen(n)
		if groups > 0 && n <= room {
			room -= n
			g := &q.tx[groups-1].Hdr
			g.SetIovlen(int(g.Iovlen) + 1)
		} else {
			q.tx[groups].Hdr.Iov = &q.txIov[verdicts]
			q.tx[groups].Hdr.SetIovlen(1)
			groups++
			room = groupBytes - n
		}
		verdicts++
	}
	if groups > 0 {
		q.write(groups)
	}
	if dropped > 0 {
		q.tally.dropped.Add(dropped)
	}
	if accepted > 0 {
		q.tally.accepted.Add(accepted)
	}
	if rewritten > 0 {
		q.tally.rewritten.Add(rewritten)
	}
	if refused > 0 {
		q.tally.refused.Add(refused)
	}
	if q.owed && q.open == 0 {
		q.sweep()
	}
	return nil
}

// inPlace makes sure that the packet's data stand where they were received, so
// that the header can stand before them. Data from elsewhere are copied there
// if they fit.
func (q *batched) inPlace(p *Packet) bool {
	s := q.slot(p.slot)
	if unsafe.SliceData(p.Data) == &s[p.off] {
		return true
	}
	room := s[p.off : q.slotLen-4]
	if len(p.Data) > len(room) {
		return false
	}
	p.Data = room[:copy(room, p.Data)]
	return true
}

// dropRun returns how many packets at the beginning of batch, at least 1, may
// be dropped by one verdict batch. Such a batch drops every packet that waits
// up to an id, so all earlier ones must have their answers, and the run must
// have no gaps. There are no batches of Accept: a packet that got stuck must
// never be let through by somebody else's verdict.
func (q *batched) dropRun(batch []Packet) int {
	n := 0
	for n < len(batch) && q.next+n < len(q.order) && batch[n].Verdict == Drop &&
		batch[n].slot == q.order[q.next+n] && q.held[batch[n].slot] && batch[n].ID == q.ids[batch[n].slot] {
		n++
	}
	return max(n, 1)
}

// answered closes a packet's slot.
func (q *batched) answered(p *Packet) {
	q.held[p.slot] = false
	q.open--
	// Out of order, next stays where it is, and no run begins any more.
	if q.next < len(q.order) && q.order[q.next] == p.slot {
		q.next++
	}
}

// write sends groups of verdicts in order. The kernel carries them out before
// the system call returns. A group that cannot be sent is skipped, and its
// packets are dropped by the sweep.
func (q *batched) write(groups int) {
	for first := 0; first < groups; {
		r, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(q.fd),
			uintptr(unsafe.Pointer(&q.tx[first])), uintptr(groups-first), unix.MSG_DONTWAIT, 0, 0)
		switch {
		case errno == 0:
			first += int(r)
		case errno == unix.EINTR:
		default:
			q.tally.sendErrors.Add(1)
			q.owed = true
			first++
		}
	}
}

// sweep drops every packet up to the newest one received. It is called when all
// of these have been answered, so it finds only those whose answer was lost,
// whose message could not be read, or which arrived before the queue was ready.
func (q *batched) sweep() {
	q.sweepIO[0].SetLen(putVerdict(q.sweepB[:], msgVerdictBatch, q.cfg.Queue, batchSeq, q.lastID, nfDrop))
	_, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(q.fd),
		uintptr(unsafe.Pointer(&q.sweepTX[0])), 1, unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		q.tally.sendErrors.Add(1)
		return // owed stays, the next call tries again
	}
	q.owed = false
}
