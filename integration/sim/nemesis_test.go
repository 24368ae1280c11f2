// SPDX-License-Identifier: Apache-2.0

package sim

import "testing"

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
