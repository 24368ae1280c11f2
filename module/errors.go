// SPDX-License-Identifier: Apache-2.0

package module

import (
	"net/netip"
	"slices"

	"github.com/weirgate/weir/module/divert"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/packet"
)

// letterBox bounds how many path errors wait for a shard; more are lost, as
// any packet may be.
const letterBox = 64

// narrowed is a destination whose way takes only packets of mtu bytes.
type narrowed struct {
	dst packet.Addr
	mtu int
}

// icmp handles an ICMP error on the control thread: an error about a flow of
// ours goes to the shards, of which the one that has the flow translates it;
// anything else goes on as it came.
func (s *shard) icmp(p *divert.Packet) {
	p.Verdict = divert.Accept
	e, problem := packet.ParseICMPError(p.Data)
	if problem != packet.OK {
		return
	}
	sent := e.Embedded().Src
	db := s.m.db.Load()
	ports := s.m.config().Source.Ports
	ours := db.ByVIP(sent) != nil
	if db.IsSNIP(sent.Addr) && sent.Port >= ports.Low && sent.Port <= ports.High {
		ours = !s.m.config().Source.Shared
	}
	if !ours {
		return
	}
	p.Verdict = divert.Drop
	for _, o := range s.m.shards {
		if o.role != roleShard {
			continue
		}
		select {
		case o.errors <- slices.Clone(p.Data):
			o.queue.Wake()
		default:
		}
	}
}

// tooBig notes that an emitted packet did not fit its way.
func (s *shard) tooBig(dst netip.Addr, mtu int) {
	select {
	case s.narrow <- narrowed{packet.AddrFrom(dst), mtu}:
	default:
	}
}

// letters hands what came for the engine to it.
func (s *shard) letters(now int64) {
	for {
		select {
		case b := <-s.errors:
			s.ev = engine.Event{Kind: engine.ICMP, Data: b}
			s.engine.Step(now, &s.ev, &s.out)
		case n := <-s.narrow:
			s.engine.TooBig(n.dst, n.mtu)
		case a := <-s.answers:
			if a.busy {
				s.engine.Busy(now, a.id, &s.out)
				continue
			}
			s.engine.Answer(now, a.id, a.answer, int64(a.ttl), &s.out)
		default:
			return
		}
	}
}
