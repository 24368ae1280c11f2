// SPDX-License-Identifier: Apache-2.0

package host

import (
	"testing"
	"time"
)

// TestPacing: the pauses double from 100 ms to 5 s, begin anew after a process
// that lived for 30 s, and are 30 s after ten starts within a minute, until one
// lives again.
func TestPacing(t *testing.T) {
	p := pacing{min: DefaultBackoffMin, max: DefaultBackoffMax}
	now := time.Unix(1_000_000, 0)
	died := func(lived time.Duration) time.Duration {
		p.started(now)
		up := now
		now = now.Add(lived)
		d := p.ended(up, now)
		now = now.Add(d)
		return d
	}
	const ms = time.Millisecond
	for i, want := range []time.Duration{100 * ms, 200 * ms, 400 * ms, 800 * ms, 1600 * ms, 3200 * ms, 5000 * ms, 5000 * ms, 5000 * ms, 5000 * ms, 5000 * ms, 5000 * ms} {
		if d := died(10 * ms); d != want {
			t.Errorf("pause %d: %s, want %s", i+1, d, want)
		}
	}
	if d := died(backoffReset - 1); d != 5*time.Second {
		t.Errorf("after almost 30 s: %s", d)
	}
	if d := died(backoffReset); d != 100*ms {
		t.Errorf("after 30 s: %s", d)
	}
	if d := died(0); d != 200*ms {
		t.Errorf("and once more: %s", d)
	}

	p = pacing{min: DefaultBackoffMin, max: DefaultBackoffMax, limit: DefaultRestarts}
	for i := range DefaultRestarts - 1 {
		if d := died(0); d >= DefaultRestartRest || p.resting {
			t.Fatalf("a rest of %s after %d starts", d, i+1)
		}
	}
	for i := range 10 {
		if d := died(time.Second); d != DefaultRestartRest || !p.resting {
			t.Errorf("try %d: a pause of %s", i+1, d)
		}
	}
	if d := died(backoffReset); d != 100*ms || p.resting {
		t.Errorf("after it lived: %s", d)
	}

	// Starts that lie apart are no reason.
	p = pacing{min: DefaultBackoffMin, max: DefaultBackoffMax, limit: DefaultRestarts}
	for range 50 {
		if died(7 * time.Second); p.resting {
			t.Fatal("a rest although there were fewer than ten starts a minute")
		}
	}
}
