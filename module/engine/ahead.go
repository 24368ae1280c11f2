// SPDX-License-Identifier: Apache-2.0

package engine

import "github.com/weirgate/weir/module/packet"

// crowdedFrom is how many client connections an engine has when looking ahead
// begins to pay: fewer stay in the processor's caches.
const crowdedFrom = 16 << 10

// mostAhead bounds how many packets are looked at ahead.
const mostAhead = 64

// Ahead reads what the steps of a batch of packets will need of the client
// table, and changes nothing: with a million connections their records are not
// in any cache, and waiting for one after the other takes longer than a step.
// packets gives the i-th of n packets; it returns nil for one to be left out.
// With few connections it does nothing.
func (e *Engine) Ahead(n int, packets func(i int) []byte) {
	if n < 2 || e.clients.Len() < crowdedFrom {
		return
	}
	var homes [mostAhead]uint32
	k := 0
	for i := range min(n, mostAhead) {
		p, problem := packet.ParseTCP(packets(i))
		if problem != packet.OK {
			continue
		}
		key := p.Tuple()
		homes[k] = e.clients.Home(&key)
		k++
	}
	waste := e.clients.Warm(homes[:k])
	for _, r := range homes[:k] {
		waste += uint64(e.wheel.timers[r].when)
	}
	e.waste = waste
}
