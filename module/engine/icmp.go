// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// Smallest segments that a path error can bring a flow down to, payload bytes:
// a forged error must not make a flow crawl. IPv4: 552 is the smallest MTU
// that Linux believes by default; IPv6: RFC 8200 section 5.
const (
	leastMSS4 = 552 - 40
	leastMSS6 = 1280 - 60
)

// An oldSegment is one that passed although its receiver had acknowledged it:
// the acknowledgment was lost, and it makes the receiver repeat it. An error
// about it counts as one about a segment under way, or a path that became
// narrow meanwhile would swallow it for ever. The latest of each direction is
// remembered: who sends such a segment sends it again.
type oldSegment struct {
	to  splice.Ref
	seq packet.Seq
}

const (
	toServer = iota
	toClient
)

// icmp handles an ICMP error to a VIP or a SNIP. An error about a flow that is
// not ours belongs to somebody else on this host and goes on unmarked.
//
// Only "too big" has an effect, and never the end of a flow. The engine cuts
// segments itself where the path behind it is narrow: a server is not told,
// because its route cache is shared by all clients behind the SNIP; a client
// is told, because its cache is its own.
func (e *Engine) icmp(ev *Event) {
	p, problem := packet.ParseICMPError(ev.Data)
	if problem != packet.OK || !p.VerifyChecksum() {
		e.Count.add(ReasonICMPForeign)
		ev.Verdict = Accept
		return
	}
	sent := p.Embedded()
	back := sent.Reverse()
	seq := p.EmbeddedSeq()
	mtu := int(p.MTU())
	if s := e.servers.Lookup(&back); s != 0 {
		v := e.servers.At(s)
		if mtu == 0 || !seq.In(v.SndUna, v.SndNxt) && e.lastOld[toServer] != (oldSegment{s, seq}) {
			e.Count.add(ReasonICMPIgnored)
			return
		}
		mss, ok := pathMSS(mtu, p.V6(), v.MSS)
		if !ok {
			e.Count.add(ReasonICMPIgnored)
			return
		}
		v.MSS = mss
		e.Count.add(ReasonICMPTranslated)
		if v.State != splice.ServerActive || v.Cli == 0 {
			return
		}
		c := e.clients.At(v.Cli)
		k := e.clients.Key(v.Cli)
		src := p.OuterSrc()
		if src == sent.Src.Addr {
			src = k.Dst.Addr // our own router speaks with the VIP's voice
		}
		p.Rewrite(src, k.Src.Addr, packet.Tuple{Src: k.Src, Dst: k.Dst}, c.Epoch.AckToClient(seq))
		e.out.raw(p.Raw)
		return
	}
	if r := e.clients.Lookup(&back); r != 0 {
		c := e.clients.At(r)
		if mtu == 0 || !seq.In(c.SndUna, c.SndNxt) && e.lastOld[toClient] != (oldSegment{r, seq}) {
			e.Count.add(ReasonICMPIgnored)
			return
		}
		if mss, ok := pathMSS(mtu, p.V6(), c.MSS); ok {
			c.MSS = mss
			e.Count.add(ReasonICMPTranslated)
		} else {
			e.Count.add(ReasonICMPIgnored)
		}
		return
	}
	e.Count.add(ReasonICMPForeign)
	ev.Verdict = Accept
}

// pathMSS is the payload that fits into an MTU, if that is less than now.
func pathMSS(mtu int, v6 bool, now uint16) (uint16, bool) {
	mss := max(mtu-40, leastMSS4)
	if v6 {
		if mtu < 1280 {
			return 0, false // RFC 8201 section 4
		}
		mss = max(mtu-60, leastMSS6)
	}
	return uint16(mss), mss < int(now)
}

// TooBig tells the engine that an emitted packet did not fit the way to a
// destination: an MTU of the router's own, without an ICMP error.
func (e *Engine) TooBig(dst packet.Addr, mtu int) {
	e.clients.Range(func(r splice.Ref, c *splice.Client) bool {
		if e.clients.Key(r).Src.Addr == dst {
			if mss, ok := pathMSS(mtu, !dst.Is4(), c.MSS); ok {
				e.clients.At(r).MSS = mss
				e.commit()
			}
		}
		return true
	})
	e.servers.Range(func(s splice.Ref, v *splice.Server) bool {
		if e.servers.Key(s).Src.Addr == dst && v.State != splice.ServerConnecting {
			if mss, ok := pathMSS(mtu, !dst.Is4(), v.MSS); ok {
				e.servers.At(s).MSS = mss
				e.commit()
			}
		}
		return true
	})
}
