// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"math/bits"
	"sync/atomic"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// Census counts the client connections of each client, so that nobody can take
// all of a farm's (SPLICING.md section E). A client is an IPv4 address or the
// /64 of an IPv6 address (RFC 6177: what one site has at least), in one farm.
//
// All shards of an instance share one, because a client's connections are
// spread over them. It takes no lock and never grows: each counter is one word,
// a tag of the client in the upper 40 bits and the count in the lower 24, in
// one of two buckets of a cache line each that the client's hash names. Words
// change by compare-and-swap only. Two shards that count the same client at the
// same instant may both take the last place, so a limit may be exceeded by the
// number of shards less one, never by more.
type Census struct {
	words []atomic.Uint64
	mask  uint64 // of buckets
	seed  uint64
}

const (
	bucketWords = 8
	countBits   = 24
	countMask   = 1<<countBits - 1
)

// NewCensus makes a census with room for so many clients at once, those of all
// shards together. One that finds no room is not counted, and not refused.
func NewCensus(clients int, seed uint64) *Census {
	// Half full at most: then two buckets of eight are both full for fewer
	// than one client in a million.
	buckets := 1 << bits.Len(uint(max(2*clients/bucketWords, 2)-1))
	return &Census{words: make([]atomic.Uint64, buckets*bucketWords), mask: uint64(buckets - 1), seed: mix(seed, 21)}
}

// place says where a client's counter is: the first words of its two buckets,
// and its tag, shifted.
func (c *Census) place(addr packet.Addr, farmID uint16) (a, b, tag uint64) {
	if !addr.Is4() {
		clear(addr[8:])
	}
	t := packet.Tuple{Src: packet.Endpoint{Addr: addr}, Dst: packet.Endpoint{Port: farmID}}
	h, g := t.Hash(c.seed), t.Hash(^c.seed)
	return (h & c.mask) * bucketWords, (h >> 32 & c.mask) * bucketWords, g &^ countMask
}

// add counts one more connection unless the client has limit already (0 is no
// limit). counted says that remove must be called for it.
func (c *Census) add(addr packet.Addr, farmID uint16, limit uint32) (counted, ok bool) {
	a, b, tag := c.place(addr, farmID)
	for {
		var sum uint64
		var old uint64
		var own *atomic.Uint64     // the client's word
		var free [2]*atomic.Uint64 // an empty word of each bucket
		var used [2]int
		for i, start := range [2]uint64{a, b} {
			if i == 1 && a == b {
				break
			}
			for j := range uint64(bucketWords) {
				w := &c.words[start+j]
				switch v := w.Load(); {
				case v == 0:
					free[i] = w
				case v&^countMask == tag:
					sum += v & countMask
					own, old = w, v
					used[i]++
				default:
					used[i]++
				}
			}
		}
		if limit > 0 && sum >= uint64(limit) {
			return false, false
		}
		switch {
		case own != nil && old&countMask < countMask:
			if own.CompareAndSwap(old, old+1) {
				return true, true
			}
		case free[0] != nil && (free[1] == nil || used[0] <= used[1]):
			if free[0].CompareAndSwap(0, tag|1) {
				return true, true
			}
		case free[1] != nil:
			if free[1].CompareAndSwap(0, tag|1) {
				return true, true
			}
		default:
			return false, true
		}
	}
}

// remove takes back one add that counted.
func (c *Census) remove(addr packet.Addr, farmID uint16) {
	a, b, tag := c.place(addr, farmID)
	for again := true; again; {
		again = false
		for _, start := range [2]uint64{a, b} {
			for j := range uint64(bucketWords) {
				w := &c.words[start+j]
				v := w.Load()
				if v == 0 || v&^countMask != tag {
					continue
				}
				next := v - 1
				if next&countMask == 0 {
					next = 0
				}
				if w.CompareAndSwap(v, next) {
					return
				}
				again = true
			}
		}
	}
}

// Clients is how many clients the census holds, and connections how many
// connections these have. It is not for the packet path.
func (c *Census) Clients() (clients, connections int) {
	for i := range c.words {
		if v := c.words[i].Load(); v != 0 {
			clients++
			connections += int(v & countMask)
		}
	}
	return clients, connections
}

// admit counts a new client connection, or says why there is no place for it:
// ReasonNone if there is. What is established is not looked at again, so that a
// limit which a reload lowers cuts nobody off.
func (e *Engine) admit(f *farm.Farm, addr packet.Addr) (splice.ClientFlags, Reason) {
	if n := f.Stats.Clients.Add(1); f.Limits.Connections > 0 && n > f.Limits.Connections {
		f.Stats.Clients.Add(-1)
		f.Stats.ConnectionsRefused[farm.RefuseTotal].Add(1)
		return 0, ReasonConnectionLimit
	}
	counted, ok := e.opt.Census.add(addr, f.ID, uint32(max(f.Limits.PerClient, 0)))
	if !ok {
		f.Stats.Clients.Add(-1)
		f.Stats.ConnectionsRefused[farm.RefuseClient].Add(1)
		return 0, ReasonClientLimit
	}
	if counted {
		return splice.ClientCounted, ReasonNone
	}
	return 0, ReasonNone
}

// leave takes a client connection out of the counts.
func (e *Engine) leave(addr packet.Addr, c *splice.Client) {
	if f := e.db.FarmByID(c.Farm); f != nil {
		f.Stats.Clients.Add(-1)
	}
	if c.Flags&splice.ClientCounted != 0 {
		e.opt.Census.remove(addr, c.Farm)
	}
}
