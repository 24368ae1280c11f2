// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"math/rand/v2"

	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/flowstore"
)

// nemesis kills the engine: before a step, after it, or in the middle of it,
// where it is about to change another record. What the step let out is lost,
// so is the packet that it was about, and some that come after it. A successor
// starts with the memory as it stood at that instant.
type nemesis struct {
	w     *World
	rnd   *rand.Rand
	steps int
	// points is how many instants the step of Scenario.Kill has.
	points int
	lose   int   // packets that are lost yet,
	until  int64 // if they come before
	took   engine.Takeover
	kills  int
	// inside counts the deaths in the middle of a step.
	inside int
	undone int
	lostBy int
}

// mortal says whether the engine may die.
func (s *Scenario) mortal() bool { return s.Kills > 0 || s.Kill.Step > 0 }

// deadTime is how long nobody may be there at most.
const deadTime = 200 * millisecond

func (n *nemesis) init(w *World) {
	n.w, n.rnd = w, stream(w.Scenario.Seed, partNemesis, 0)
}

// strikes says whether this step is the last one of the present engine.
func (n *nemesis) strikes() bool {
	n.steps++
	if k := n.w.Scenario.Kill; k.Step > 0 {
		return n.steps == k.Step
	}
	return n.rnd.Float64() < n.w.Scenario.Kills
}

// lost says whether a packet found nobody.
func (n *nemesis) lost() bool {
	if n.lose == 0 || n.until < n.w.now {
		return false
	}
	n.lose--
	return true
}

// kill has the engine die at some instant of a step.
func (n *nemesis) kill(ev *engine.Event) {
	w := n.w
	n.kills++
	var image *flowstore.Memory
	at, lose := n.rnd.IntN(12), n.rnd.IntN(4)
	if k := w.Scenario.Kill; k.Step > 0 {
		at, lose = k.Point, k.Lose
	}
	seen := 0
	w.eng.OnJournal(func() {
		if seen++; seen == at {
			image = w.mem.Image()
		}
	})
	if at > 0 {
		w.eng.Step(w.now, ev, &w.out)
	}
	w.eng.OnJournal(nil)
	n.points = seen
	switch {
	case image != nil:
		n.inside++
	case at > 0:
		// The step is complete: to everybody, what it let out was lost.
		image = w.mem.Image()
		w.collect(ev, 0)
		w.observe()
	default:
		image = w.mem.Image()
	}
	n.lose, n.until = lose, w.now+n.rnd.Int64N(deadTime)
	counters := &w.eng.Count
	before := w.db
	var err error
	if w.db, err = farm.Build(nil, w.spec); err != nil {
		panic("sim: " + err.Error())
	}
	// Farms and servers keep their counters, as the module has them do.
	for i, f := range w.db.Farms {
		f.Stats.Opened.Store(before.Farms[i].Stats.Opened.Load())
		f.Stats.Reused.Store(before.Farms[i].Stats.Reused.Load())
	}
	if w.Hooks.Inherit != nil {
		image = w.Hooks.Inherit(image)
	}
	w.mem.Free()
	w.mem = image
	w.renew()
	for i := range counters {
		w.eng.Count[i].Add(counters.Get(engine.Reason(i)))
	}
	n.undone += n.took.Undone
	n.lostBy += n.took.Lost
	if n.took.Refused > 0 {
		w.fail("durability", "the successor refuses %d records", n.took.Refused)
	}
	w.out.Reset()
}
