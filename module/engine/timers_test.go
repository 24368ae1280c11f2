// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/packet"
)

// TestMovedDeadline: a timer that fires for a deadline that moved since is set
// for the new one, and no record changes: with a million idle clients it is in
// no cache. The control: when that one comes, the connection is closed.
func TestMovedDeadline(t *testing.T) {
	g := newRig(t, oneServer, keepIdle, func(s *farm.Spec) { s.Farms[0].Timeouts.Idle = 3600 * second })
	g.outlive(flowstore.NewHeap())
	a := g.dial(c1, 100)
	a.ask(get("/a", 100), 5000)
	a.answer(okEmpty)
	r := g.e.clients.Lookup(&packet.Tuple{Src: ep(c1), Dst: ep(vip)})
	if r == 0 {
		t.Fatal("no connection")
	}
	fires, idle := g.e.wheel.at(g.e.clientTimer(r)), g.e.clientDeadline(r, g.e.clients.Peek(r))
	if fires > g.now+60*second || idle < g.now+3500*second {
		t.Fatalf("at %d the timer is set to %d, and the deadline is %d: nothing to test", g.now, fires, idle)
	}
	touched := 0
	g.e.OnJournal(func() { touched++ })
	if out := g.wait(61 * second); len(out) != 0 || touched != 0 {
		t.Errorf("%q leaves, and records were touched %d times", out, touched)
	}
	if at := g.e.wheel.at(g.e.clientTimer(r)); at != idle {
		t.Errorf("the timer is set to %d, want %d", at, idle)
	}
	if g.wait(3600 * second); g.e.Count.Get(ReasonClientIdle) != 1 || touched == 0 {
		t.Errorf("closed %d idle connections, and records were touched %d times", g.e.Count.Get(ReasonClientIdle), touched)
	}
}
