// SPDX-License-Identifier: Apache-2.0

package module

import (
	"errors"
	"net"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/weirgate/weir/module/divert"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/flowstore"
)

// role says what a thread does with the packets of its queue.
type role uint8

const (
	roleSYN     role = iota // answers SYNs, without state
	roleControl             // ICMP errors
	roleShard               // everything else, with an engine of its own
)

// shard is one queue with the thread that serves it. Only that thread touches
// the engine; others post to it.
type shard struct {
	m      *Module
	role   role
	queue  divert.Queue
	emit   *divert.Emitter
	mark   uint32
	mask   uint32
	engine *engine.Engine    // roleShard
	store  *flowstore.Memory // of the engine; nil: it goes with the process
	lo     uint32            // index of the loopback interface

	mail    atomic.Uint32 // bits of engine.Kind to step, see post
	done    atomic.Bool
	clients atomic.Int32 // of the last batch, while stopping
	servers atomic.Int32

	work  chan func(now int64) // for this thread, see do
	ended chan struct{}        // closed when run has returned
	tap   *engine.Tap          // while somebody watches packets; of this thread

	ev      engine.Event
	errors  chan []byte   // ICMP errors that may be about a flow of this shard
	narrow  chan narrowed // destinations that emitted packets did not fit to
	answers chan answered // of plugins
	out     engine.Output
	pkts    [][]byte
	spent   farm.Histogram // per batch of packets, until its verdicts
	pause   pause

	before     divert.Stats // what predecessors counted
	beforeEmit divert.EmitStats
}

// batchSize is how many packets are handled between two looks at the clock.
const batchSize = 64

// longestWait bounds a wait for packets, so that a lost wake-up costs little.
const longestWait = time.Second

func newShard(m *Module, q divert.Queue, em *divert.Emitter, mark, mask uint32, r role) *shard {
	s := &shard{
		m: m, role: r, queue: q, emit: em, mark: mark, mask: mask,
		errors: make(chan []byte, letterBox), narrow: make(chan narrowed, letterBox),
		answers: make(chan answered, letterBox),
		work:    make(chan func(int64), workWaiting), ended: make(chan struct{}),
	}
	em.OnTooBig(s.tooBig)
	if ifc, err := net.InterfaceByName("lo"); err == nil {
		s.lo = uint32(ifc.Index)
	}
	return s
}

// post asks the shard's engine for a step of that kind.
func (s *shard) post(k engine.Kind) {
	if s.role != roleShard {
		return
	}
	s.mail.Or(1 << k)
	s.queue.Wake()
}

// quit ends the thread.
func (s *shard) quit() {
	s.done.Store(true)
	s.queue.Wake()
}

// running is how many connections the engine still holds; for a stop.
func (s *shard) running() (clients, servers int) {
	if s.role != roleShard {
		return 0, 0
	}
	if s.mail.Load() != 0 {
		return 1, 1 // it has not even begun
	}
	return int(s.clients.Load()), int(s.servers.Load())
}

// run serves the queue until quit. The order per batch is: records, then
// emissions, then verdicts.
func (s *shard) run() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(s.ended)
	defer func() {
		if r := recover(); r != nil {
			if s.store != nil {
				s.store.MarkFailed() // the successor looks at what the step was about
			}
			panic(r)
		}
	}()
	batch := make([]divert.Packet, batchSize)
	var db *farm.DB // another one than the engine was made with, maybe
	stopping := false
	for !s.done.Load() {
		n, err := s.queue.Receive(batch, s.patience())
		if errors.Is(err, divert.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		now := s.m.clock.now()
		s.out.Reset()
		if s.role == roleShard {
			s.engine.HoldTimers(now, s.pause.look(now, n))
			if d := s.m.db.Load(); d != db {
				db = d
				s.engine.SetDB(db)
			}
			// A request to relieve may come again while this one is served; the
			// others come once, and a stop looks whether they are done.
			mail := s.mail.And(^uint32(1 << engine.Relieve))
			for k := engine.Stop; k <= engine.Relieve; k++ {
				if mail&(1<<k) != 0 {
					s.ev = engine.Event{Kind: k}
					s.engine.Step(now, &s.ev, &s.out)
					stopping = stopping || k != engine.Relieve
				}
			}
			s.letters(now)
			if n == 0 {
				s.ev = engine.Event{Kind: engine.Tick}
				s.step(now, &s.ev)
			}
			s.handle(now, batch[:n])
			if stopping {
				c, v := s.engine.Running()
				s.clients.Store(int32(c))
				s.servers.Store(int32(v))
			}
			if s.store != nil && !s.store.Owned() {
				return ErrRevoked // nothing of this batch leaves
			}
			s.flush()
			s.mail.And(^(mail &^ (1 << engine.Relieve)))
		} else {
			s.handle(now, batch[:n])
			if !s.m.keep.owned() {
				return ErrRevoked
			}
			s.flush()
		}
		if n > 0 {
			if err := s.queue.Send(batch[:n]); err != nil && !errors.Is(err, divert.ErrClosed) {
				return err
			}
			s.spent.Add(s.m.clock.now() - now)
		}
		if len(s.work) > 0 {
			s.workOff(&db)
		}
	}
	return nil
}

// step is a step of the engine, seen by whoever watches.
func (s *shard) step(now int64, ev *engine.Event) {
	if s.tap != nil {
		s.tap.Step(s.engine, now, ev, &s.out)
		return
	}
	s.engine.Step(now, ev, &s.out)
}

// patience is how long to wait for packets.
func (s *shard) patience() time.Duration {
	if len(s.work) > 0 {
		return 0
	}
	if s.role != roleShard {
		return longestWait
	}
	due := s.engine.NextDue()
	if due == 0 {
		return longestWait
	}
	return min(max(time.Duration(due-s.m.clock.now()), 0), longestWait)
}

// handle sets the verdicts of a batch.
func (s *shard) handle(now int64, batch []divert.Packet) {
	ev := &s.ev
	if s.role == roleShard {
		s.engine.Ahead(len(batch), func(i int) []byte { return batch[i].Data })
	}
	for i := range batch {
		p := &batch[i]
		if s.role != roleControl && s.m.bans.has(p.Data, now) {
			p.Verdict = divert.Drop
			continue
		}
		switch s.role {
		case roleSYN:
			if s.tap != nil {
				s.tap.SYN(s.m.handshake, now, p.Data, p.Checksum, &s.out)
			} else {
				s.m.handshake.SYN(now, p.Data, p.Checksum, &s.out)
			}
			p.Verdict = divert.Drop
			continue
		case roleControl:
			s.icmp(p)
			continue
		}
		*ev = engine.Event{
			Kind: engine.Packet, Checksum: p.Checksum, GSO: p.GSO, Short: p.Truncated,
			Loopback: p.InIf == s.lo || p.Hook != 0, Data: p.Data,
		}
		s.step(now, ev)
		switch ev.Verdict {
		case engine.Accept:
			p.Verdict = divert.Accept
		case engine.Rewrite:
			p.Verdict = divert.Rewritten
			p.Data = ev.Data
			if p.GSO {
				s.m.finishLocal(p.Data)
			}
			p.Mark = p.Mark&^s.mask | s.mark
			if ev.Mark != 0 {
				// The rest of the mark is the policies', where they use it.
				p.Mark = s.mark | ev.Mark&^s.mask
			}
		default:
			p.Verdict = divert.Drop
		}
	}
}

// flush emits what the steps of the batch made.
func (s *shard) flush() {
	s.pkts = s.pkts[:0]
	if len(s.out.Questions)+len(s.out.Bans) > 0 {
		s.askPlugins()
	}
	if s.out.Relieve {
		for _, o := range s.m.shards {
			if o != s {
				o.post(engine.Relieve)
			}
		}
	}
	for i := range s.out.Len() {
		s.pkts = append(s.pkts, s.out.Packet(i))
	}
	if len(s.pkts) > 0 {
		// Failures are counted by the emitter; to TCP they are losses.
		_, _ = s.emit.Send(s.pkts)
	}
}
