// SPDX-License-Identifier: Apache-2.0

package module

import (
	"testing"
	"time"
)

// TestPauseNoticed: after a pause timers wait for what is in the queue, and for
// nothing else.
func TestPauseNoticed(t *testing.T) {
	const s = int64(time.Second)
	type pass struct {
		at   int64
		n    int
		wait bool
	}
	for name, passes := range map[string][]pass{
		"never before":      {{100 * s, batchSize, false}, {100*s + 1, 0, false}},
		"idle":              {{s, 0, false}, {2 * s, 0, false}, {3 * s, 5, false}, {4 * s, batchSize, false}},
		"busy":              {{s, batchSize, false}, {s + 1, batchSize, false}, {s + 2, 0, false}},
		"a long queue":      {{s, 3, false}, {8 * s, batchSize, true}, {8*s + 1, batchSize, true}, {8*s + 2, 7, true}, {8*s + 3, batchSize, false}},
		"an empty queue":    {{s, 3, false}, {8 * s, 0, true}, {8*s + 1, 0, false}, {8*s + 2, 9, false}},
		"seen a bit late":   {{s, 3, false}, {8 * s, 0, true}, {8*s + 1, 9, true}, {8*s + 2, 9, false}},
		"again":             {{s, 3, false}, {8 * s, 5, true}, {8*s + 1, 0, false}, {18 * s, 5, true}, {18*s + 1, 3, true}, {18*s + 2, 3, false}},
		"a jump of no time": {{s, 3, false}, {s, 3, false}},
	} {
		var p pause
		for i, c := range passes {
			if wait := p.look(c.at, c.n); wait != c.wait {
				t.Errorf("%s, pass %d: timers wait: %v", name, i, wait)
			}
		}
	}
	// A queue that never ends does not stop time for ever.
	p := pause{last: s}
	n := 0
	for at := 8 * s; p.look(at, batchSize); at++ {
		if n += batchSize; n > 2*pauseBacklog {
			t.Fatal("timers wait for ever")
		}
	}
}
