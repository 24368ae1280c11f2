// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"cmp"
	"slices"

	"github.com/weirgate/weir/module/packet"
)

// Ports hands out the source ports of one SNIP in one shard's slice of the
// range. The port that was free longest comes first, so that a reused port has
// rested as long as possible; before its quarantine is over it is not handed
// out at all (RFC 6191, RFC 6528 section 1: an old segment must not fit a new
// connection).
type Ports struct {
	Addr  packet.Addr
	lo    uint16
	free  []freePort // circular, oldest at head
	head  int
	n     int
	quiet int64
	since []int64 // by port: where a successor reads when it was freed, 0 = rested; may be nil
}

type freePort struct {
	port  uint16
	since int64 // freed at; ports never used count as rested
	fresh bool
}

// NewPorts makes an allocator for lo ≤ port ≤ hi with a quarantine in
// nanoseconds. skip names ports that others hold (nil = none).
func NewPorts(addr packet.Addr, lo, hi uint16, quarantine int64, skip func(uint16) bool) *Ports {
	p := &Ports{Addr: addr, lo: lo, quiet: quarantine, free: make([]freePort, int(hi)-int(lo)+1)}
	for port := int(lo); port <= int(hi); port++ {
		if skip == nil || !skip(uint16(port)) {
			p.free[p.n] = freePort{port: uint16(port), fresh: true}
			p.n++
		}
	}
	return p
}

// Free is the number of ports that are not in use, those in quarantine
// included.
func (p *Ports) Free() int { return p.n }

// Take returns a port, or 0 when none is free and rested.
func (p *Ports) Take(now int64) uint16 {
	if p.n == 0 {
		return 0
	}
	f := p.free[p.head]
	if !f.fresh && now-f.since < p.quiet {
		return 0
	}
	p.head = (p.head + 1) % len(p.free)
	p.n--
	return f.port
}

// Put gives a port back; its quarantine begins. A port that never carried a
// connection past its SYN may be given back as rested.
func (p *Ports) Put(port uint16, now int64, rested bool) {
	if p.since != nil {
		at := now
		if rested {
			at = 0
		}
		p.since[port-p.lo] = at
	}
	p.free[(p.head+p.n)%len(p.free)] = freePort{port: port, since: now, fresh: rested}
	p.n++
}

// Has reports whether the port lies in this allocator's slice.
func (p *Ports) Has(port uint16) bool { return port >= p.lo && int(port) < int(p.lo)+len(p.free) }

// Size is the number of ports of the slice, in use or not.
func (p *Ports) Size() int { return len(p.free) }

// Keep has the times of quarantine live in memory that a successor finds, one
// number per port of the slice, and takes over what a predecessor left there.
// used says which ports are in use. It comes before the first Take.
func (p *Ports) Keep(since []int64, now int64, used func(port uint16) bool) {
	p.since = since
	rest := p.free[:0]
	for _, f := range p.free[:p.n] {
		if used(f.port) {
			continue
		}
		at := since[f.port-p.lo]
		if at > now || at < 0 {
			at = now // not written by us: let it rest
		}
		rest = append(rest, freePort{port: f.port, since: at, fresh: at == 0})
	}
	p.head, p.n = 0, len(rest)
	slices.SortStableFunc(rest, func(a, b freePort) int { return cmp.Compare(a.since, b.since) })
}
