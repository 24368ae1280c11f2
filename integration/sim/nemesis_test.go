// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"runtime"
	"sync"
	"testing"

	"github.com/weirgate/weir/module/flowstore"
)

// TestKills: the engine dies again and again, at every kind of instant, and
// with it the packets that waited for it. All invariants hold, and every
// exchange is answered as if nothing had happened.
func TestKills(t *testing.T) {
	base := seedOf(t)
	want := 20_000
	if soak {
		want = 1_000_000
	} else if testing.Short() {
		want = 2_000
	}
	sum := runAll(t, func(_ int, s *tally) bool { return s.Kills < want }, func(i int) (*Scenario, Hooks) {
		s := Random(base + uint64(i))
		s.Kills = []float64{0.002, 0.01, 0.05}[i%3]
		for k := range s.Conns {
			// Who loses the acknowledgment of the handshake has as long as a
			// cookie lives, whoever lost it.
			s.Conns[k].Wait = min(s.Conns[k].Wait, 5*second)
		}
		return s, Hooks{}
	})
	t.Logf("%d runs: %d deaths, %d of them inside a step, %d records put back, %d connections given up; %d exchanges, %d given up by plan",
		sum.runs, sum.Kills, sum.Inside, sum.Undone, sum.Lost, sum.Exchanges, sum.Excused)
}

// TestEveryDeath: one death at every instant of small runs, times the loss of
// the next 0 to 3 packets: at least 100,000 schedules.
func TestEveryDeath(t *testing.T) {
	base := seedOf(t)
	want := 100_000
	if soak {
		want = 2_000_000
	} else if testing.Short() {
		want = 5_000
	}
	// small is a run of few packets, each with a head of its own kind.
	small := func(seed uint64) *Scenario {
		s := Random(seed)
		s.Clients, s.Tables = 16, 16
		s.Conns = s.Conns[:min(len(s.Conns), 1+int(seed%2))]
		for i := range s.Conns {
			c := &s.Conns[i]
			c.After, c.Wait, c.Start = 0, min(c.Wait, 5*second), int64(i)*millisecond
			c.Requests = c.Requests[:min(len(c.Requests), 2)]
			for k := range c.Requests {
				q := &c.Requests[k]
				q.Body, q.Reply.Body = q.Body%4000, q.Reply.Body%5000
			}
		}
		return s
	}
	// A run is followed from instant to instant: the one before says how many
	// there are.
	type place struct {
		seed  uint64
		steps int
	}
	var runs []place
	total := 0
	for seed := base; total < want; seed++ {
		s := small(seed)
		s.Kill = Kill{Step: 1 << 30}
		r := Run(s, Hooks{})
		if r.Violation != nil {
			t.Fatalf("WEIR_SEED=%d: without any death: %v", seed, r.Violation)
		}
		if r.Steps > 400 {
			continue
		}
		runs = append(runs, place{seed, r.Steps})
		total += r.Steps * 5 // at least
	}
	var next, done, inside int
	var mu sync.Mutex
	var group sync.WaitGroup
	var failed []*Scenario
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				stop := i >= len(runs) || len(failed) >= maxStories || done >= want
				mu.Unlock()
				if stop {
					return
				}
				n, in, bad := everyDeath(small, runs[i].seed, runs[i].steps)
				mu.Lock()
				done += n
				inside += in
				if bad != nil {
					failed = append(failed, bad)
				}
				mu.Unlock()
			}
		})
	}
	group.Wait()
	for _, s := range failed {
		t.Errorf("seed %d, %+v:\n%s", s.Seed, s.Kill, Explain(s, Hooks{}, 60))
	}
	t.Logf("%d runs, %d schedules, %d with a death inside a step", len(runs), done, inside)
	if len(failed) == 0 && done < want*9/10 {
		t.Errorf("only %d schedules", done)
	}
}

// everyDeath plays all deaths of one run, and returns the first that is bad.
func everyDeath(small func(uint64) *Scenario, seed uint64, steps int) (n, inside int, bad *Scenario) {
	for step := 1; step <= steps; step++ {
		for point, last := 0, false; !last; point++ {
			for lose := range 4 {
				s := small(seed)
				s.Kill = Kill{step, point, lose}
				w := NewWorld(s, Hooks{})
				r := w.Run()
				n++
				inside += r.Inside
				if r.Violation != nil {
					return n, inside, s
				}
				// After the last instant inside comes the one after the step.
				last = point > 0 && r.Inside == 0
			}
		}
	}
	return n, inside, nil
}

// TestKillControls: the deaths are found out where a successor gets less than
// it should: half of a step, or nothing.
func TestKillControls(t *testing.T) {
	base := seedOf(t)
	for name, inherit := range map[string]func(*flowstore.Memory) *flowstore.Memory{
		"a step half done": func(m *flowstore.Memory) *flowstore.Memory { m.LoseJournal(); return m },
		"nothing":          func(*flowstore.Memory) *flowstore.Memory { return flowstore.NewHeap() },
	} {
		bad := 0
		for i := range uint64(200) {
			s := Random(base + i)
			s.Kills = 0.05
			if Run(s, Hooks{Inherit: inherit}).Violation != nil {
				bad++
			}
		}
		t.Logf("%s: %d of 200 runs are bad", name, bad)
		if bad == 0 {
			t.Errorf("%s: nobody notices", name)
		}
	}
}
