// SPDX-License-Identifier: Apache-2.0

package engine

import "math/bits"

// wheel is a hierarchical timer wheel (Varghese and Lauck, scheme 7): four
// levels of 256 slots, one timer per record, lists threaded through arrays.
// Setting and clearing cost a few stores; time passing costs nothing per
// packet. Timers are named by a number below the size given to init.
//
// A record whose deadline moves later does not touch the wheel: when its timer
// fires, the engine computes the true deadline and sets it again.
type wheel struct {
	timers []timer
	slot   [levels * slots]int32
	busy   [levels][slots / 64]uint64
	tick   int64 // the tick up to which timers have fired
	armed  int
}

// timer is one of them. All of it lies in one line of cache: the timers of a
// million clients are in none.
type timer struct {
	when       int64 // due time, 0 = not armed
	prev, succ int32 // list neighbours; negative = slot head
}

const (
	tickNanos = 4 * millisecond
	levels    = 4
	slots     = 256
	nobody    = int32(-1 << 31)
)

func (w *wheel) init(n int) {
	w.timers = make([]timer, n)
	for i := range w.slot {
		w.slot[i] = nobody
	}
}

// at returns the due time of a timer, 0 when it is not armed.
func (w *wheel) at(id uint32) int64 { return w.timers[id].when }

// set arms a timer, wherever it stood before. A time that has passed fires at
// the next advance.
func (w *wheel) set(id uint32, when int64) {
	x := &w.timers[id]
	if x.when != 0 {
		w.clear(id)
	}
	x.when = max(when, 1)
	w.armed++
	w.link(id, w.tick+1)
}

// link puts an armed timer into the slot of its due time, but not before the
// tick earliest.
func (w *wheel) link(id uint32, earliest int64) {
	// Round up: a timer never fires early.
	x := &w.timers[id]
	t := max((x.when+tickNanos-1)/tickNanos, earliest)
	d := t - w.tick
	level := 0
	for level < levels-1 && d >= 1<<(8*(level+1)) {
		level++
	}
	if d >= 1<<(8*levels) {
		t = w.tick + 1<<(8*levels) - 1
	}
	i := level*slots + int(t>>(8*level))&(slots-1)
	first := w.slot[i]
	x.prev, x.succ = int32(-1-i), first
	if first != nobody {
		w.timers[first].prev = int32(id)
	}
	w.slot[i] = int32(id)
	w.busy[level][i%slots/64] |= 1 << (i % 64)
}

// clear disarms a timer.
func (w *wheel) clear(id uint32) {
	x := &w.timers[id]
	if x.when == 0 {
		return
	}
	w.unlink(id)
	x.when = 0
	w.armed--
}

func (w *wheel) unlink(id uint32) {
	p, n := w.timers[id].prev, w.timers[id].succ
	if n != nobody {
		w.timers[n].prev = p
	}
	if p >= 0 {
		w.timers[p].succ = n
		return
	}
	i := int(-1 - p)
	w.slot[i] = n
	if n == nobody {
		w.busy[i/slots][i%slots/64] &^= 1 << (i % 64)
	}
}

// pop advances to now and returns one timer that is due, disarmed, or ok =
// false when no more are due. Call it until then.
func (w *wheel) pop(now int64) (id uint32, ok bool) {
	target := now / tickNanos
	if w.armed == 0 {
		w.tick = max(w.tick, target)
		return 0, false
	}
	for {
		if f := w.slot[int(w.tick)&(slots-1)]; f != nobody && w.fires(uint32(f)) {
			w.clear(uint32(f))
			return uint32(f), true
		}
		if w.tick >= target {
			return 0, false
		}
		w.step(target)
	}
}

// fires reports whether the timer at the head of the present slot of level 0
// is due: with a wheel of 256 ticks all timers of the slot are.
func (w *wheel) fires(id uint32) bool {
	return (w.timers[id].when+tickNanos-1)/tickNanos <= w.tick
}

// step moves to the next tick that has work, at most to target, and brings
// timers of the higher levels down when their slot begins.
func (w *wheel) step(target int64) {
	n := w.tick + 1
	// Skip empty slots of level 0, but stop where a higher level cascades.
	for n < target && n&(slots-1) != 0 && w.busy[0][n&(slots-1)/64]&(1<<(n%64)) == 0 {
		n++
	}
	w.tick = n
	for level := 1; level < levels && n&(1<<(8*level)-1) == 0; level++ {
		i := level*slots + int(n>>(8*level))&(slots-1)
		for w.slot[i] != nobody {
			id := uint32(w.slot[i])
			w.unlink(id)
			w.link(id, w.tick)
		}
	}
}

// next returns the time at which pop may find something, or 0 when nothing is
// armed. It may be early (a cascade), never late.
func (w *wheel) next() int64 {
	if w.armed == 0 {
		return 0
	}
	if f := w.slot[int(w.tick)&(slots-1)]; f != nobody && w.fires(uint32(f)) {
		return w.tick * tickNanos
	}
	// The next busy slot of level 0 before it wraps, else the next cascade.
	pos := int(w.tick) & (slots - 1)
	for i := pos + 1; i < slots; {
		word := w.busy[0][i/64] >> (i % 64)
		if word != 0 {
			return (w.tick + int64(i-pos+bits.TrailingZeros64(word))) * tickNanos
		}
		i += 64 - i%64
	}
	return (w.tick + int64(slots-pos)) * tickNanos
}
