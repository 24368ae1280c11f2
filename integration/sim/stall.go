// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"github.com/weirgate/weir/module/packet"
)

// This file is an engine that stands still: its process is stopped, or others
// have all the processors. What comes meanwhile waits in queues of a bounded
// length; what finds them full is lost.

// Stall is one such time.
type Stall struct {
	At, For int64 // after the start of the run; For 0: none. At least two seconds, or the threads would not notice (module.pause)
	Queue   int   // packets that each queue holds
}

// stall is what waits.
type stall struct {
	on       bool
	syns     []arrival
	packets  []arrival
	overflow int // packets that found a queue full
	peak     int // packets in the longest queue
}

type arrival struct {
	d Direction
	p *parcel
}

// plan has the engine stand still when it is time.
func (l *stall) plan(w *World) {
	if w.Scenario.Stall.For == 0 {
		return
	}
	w.after(w.Scenario.Stall.At, func() { l.on = true })
	w.after(w.Scenario.Stall.At+w.Scenario.Stall.For, func() { l.end(w) })
}

// takes says whether a packet has to wait, or is lost.
func (l *stall) takes(w *World, d Direction, p *parcel) bool {
	if !l.on {
		return false
	}
	q := &l.packets
	if t, problem := packet.ParseTCP(p.b); problem == packet.OK && d == FromClient && t.Flags()&(packet.SYN|packet.ACK) == packet.SYN {
		q = &l.syns
	}
	if len(*q) == w.Scenario.Stall.Queue {
		l.overflow++
		return true
	}
	*q = append(*q, arrival{d, p})
	l.peak = max(l.peak, len(*q))
	return true
}

// end lets the engine go on, as the module does: timers wait until the queue
// has been read.
func (l *stall) end(w *World) {
	l.on = false
	for _, a := range l.syns {
		w.handle(a.d, a.p)
	}
	w.eng.HoldTimers(w.now, true)
	for _, a := range l.packets {
		w.handle(a.d, a.p)
	}
	w.eng.HoldTimers(w.now, false)
	l.syns, l.packets = nil, nil
}
