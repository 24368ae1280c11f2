// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/pool"
	"github.com/weirgate/weir/module/splice"
)

// preopenEvery is how often min_idle is looked after.
const preopenEvery = 100 * millisecond

func (e *Engine) preopenTimer() uint32 { return uint32(e.opt.Clients+e.opt.Servers) + 2 }

// armPreopen starts the timer if a farm of the present database wants
// connections opened ahead.
func (e *Engine) armPreopen() {
	e.preopening = true
	for _, f := range e.db.Farms {
		if f.Pool.MinIdle > 0 {
			e.wheel.set(e.preopenTimer(), 1) // at once
			return
		}
	}
	e.wheel.clear(e.preopenTimer())
}

// preopen opens this shard's share of min_idle connections to every ready
// server (FIG 7 step 702).
func (e *Engine) preopen() {
	if e.stopping {
		return
	}
	again := false
	for _, f := range e.db.Farms {
		if f.Pool.MinIdle == 0 {
			continue
		}
		again = true
		for _, sv := range f.Servers {
			if sv.Live.Usable(e.now) {
				e.fill(f, sv)
			}
		}
	}
	if again {
		e.wheel.set(e.preopenTimer(), e.now+preopenEvery)
	}
}

// preopenClass is what most clients need.
var preopenClass = pool.ClassOf(pool.LargeMSS, true)

func (e *Engine) fill(f *farm.Farm, sv *farm.Server) {
	shards := max(e.opt.Shards, 1)
	share := (int(f.Pool.MinIdle) + shards - 1 - e.opt.Shard) / shards
	// Connections in their handshake count as if they were idle: those of
	// this shard that were opened ahead will be.
	for n := e.idle.Idle(sv.ID) + e.opening(sv.ID); n < share; n++ {
		if s, why := e.open(f, sv, preopenClass); s == 0 {
			e.Count.add(why)
			return
		}
		e.Count.add(ReasonPreopened)
		e.commit()
	}
}

// opening counts this shard's connections to a server that are in their
// handshake for nobody.
func (e *Engine) opening(id uint16) int {
	n := 0
	if sv := e.db.Server(id); sv != nil && sv.Stats.Connecting.Load() > 0 {
		e.servers.Range(func(_ splice.Ref, v *splice.Server) bool {
			if v.ID == id && v.Cli == 0 && v.State == splice.ServerConnecting {
				n++
			}
			return true
		})
	}
	return n
}

// relieve gives back one idle connection to every server of which another
// shard wants one, and lets the waiting lines look again.
func (e *Engine) relieve() {
	for _, f := range e.db.Farms {
		for _, sv := range f.Servers {
			if !sv.Stats.Wanted.Load() {
				continue
			}
			if s := e.idle.Oldest(sv.ID); s != 0 && sv.Stats.Wanted.CompareAndSwap(true, false) {
				e.closeServer(s, e.servers.At(s), ReasonMaxIdle)
				e.commit()
			}
		}
		e.wake(f.ID)
	}
}
