// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"errors"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/nft"
	"github.com/weirgate/weir/plugins/host"
	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/snapshot"
)

// This file carries the engines' questions to plugins and the answers back.
// The shard's thread never waits: each question has a goroutine of its own, as
// long as the plugin's deadline, and the answer comes by the shard's mail.

// answered is the answer to a question; nil where none came.
type answered struct {
	id     uint64
	answer *snapshot.Answer
	ttl    time.Duration
	busy   bool // not asked: as many questions are open there as may be
}

// askPlugins sends off what the last steps want to know.
func (s *shard) askPlugins() {
	for i := range s.out.Questions {
		q := s.out.Questions[i]
		go func() {
			a := answered{id: q.ID}
			a.answer, a.ttl, a.busy = s.m.askPlugin(&q)
			select {
			case s.answers <- a:
				s.queue.Wake()
			case <-s.ended:
			}
		}()
	}
	for _, b := range s.out.Bans {
		d := time.Duration(b.Seconds) * time.Second
		s.m.bans.add(b.Client, s.m.clock.now()+int64(d), s.m.clock.now())
		select {
		case s.m.banned <- nft.Ban{Client: b.Client.Netip(), For: d}:
		default: // there are too many for the kernel's set; the list has it
		}
	}
}

// banLoop puts banned clients into the kernel's sets, many at a time, until ctx
// ends. Until that is done, and where it cannot be done, the list of bans keeps
// them away.
func (m *Module) banLoop(ctx context.Context) {
	for {
		var list []nft.Ban
		select {
		case <-ctx.Done():
			return
		case b := <-m.banned:
			list = append(list, b)
		}
		for more := true; more && len(list) < cap(m.banned); {
			select {
			case b := <-m.banned:
				list = append(list, b)
			default:
				more = false
			}
		}
		if err := m.onThread(ctx, func() error { return m.firewall.Ban(list) }); err != nil && ctx.Err() == nil {
			m.log.Warn("banned clients are kept away by this process alone", "clients", len(list), "error", err)
		}
	}
}

// askPlugin asks; without an answer it returns nil. busy says that the plugin
// was not asked because of ask.concurrency.
func (m *Module) askPlugin(q *engine.Question) (a *snapshot.Answer, ttl time.Duration, busy bool) {
	key := m.host.About(q.Policy).Ask
	if key == nil {
		return nil, 0, false
	}
	k, err := key.ParseKey(q.Key)
	if err != nil {
		return nil, 0, false // the plugin asks for something else by now
	}
	a, ttl, err = m.host.Ask(context.Background(), q.Farm.Name, q.Policy, &policies.Question{Key: k, Attempt: q.Attempt, Tried: q.Tried})
	if err != nil {
		return nil, 0, errors.Is(err, host.ErrBusy) // the host counts it, and why
	}
	return a, ttl, false
}

// bans are the clients that plugins want to be kept away: their packets are
// dropped until the ban is over, also those that were queued before the kernel
// knew.
type bans struct {
	mu   sync.Mutex                            // of those who change it
	list atomic.Pointer[map[packet.Addr]int64] // never changed in place; nil: none
}

// maxBans bounds the bans. What comes beyond is not banned.
const maxBans = nft.MaxBans

func (b *bans) add(a packet.Addr, until, now int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := map[packet.Addr]int64{}
	if old := b.list.Load(); old != nil {
		maps.Copy(next, *old)
		maps.DeleteFunc(next, func(_ packet.Addr, until int64) bool { return until <= now })
	}
	if len(next) < maxBans {
		next[a] = max(next[a], until)
	}
	b.list.Store(&next)
}

// has reports whether the sender of an IP packet is banned.
func (b *bans) has(data []byte, now int64) bool {
	list := b.list.Load()
	if list == nil || len(*list) == 0 || len(data) < 20 {
		return false
	}
	var a packet.Addr
	switch {
	case data[0]>>4 == 4:
		a[10], a[11] = 0xff, 0xff
		copy(a[12:], data[12:16])
	case len(data) >= 40:
		copy(a[:], data[8:24])
	}
	return now < (*list)[a]
}
