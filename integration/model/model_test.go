// SPDX-License-Identifier: Apache-2.0

package model

import (
	"os"
	"testing"
)

func budget() Budget {
	if os.Getenv("WEIR_SOAK") != "" {
		return Budget{Losses: 2, Duplicates: 2, Retransmissions: 3, Crashes: 1, Closes: 1}
	}
	return Budget{Losses: 1, Duplicates: 1, Retransmissions: 2, Crashes: 1, Closes: 1}
}

// TestDispatchAndRelease: with all rules no schedule breaks an invariant.
func TestDispatchAndRelease(t *testing.T) {
	n, v := Check(All(), budget())
	t.Logf("%d states", n)
	if v != nil {
		t.Fatal(v)
	}
	if n < 100_000 {
		t.Errorf("only %d states: the budgets are too small to mean anything", n)
	}
}

// TestEveryRuleCounts is the negative control: without any one of the rules
// the model finds a schedule that breaks an invariant.
func TestEveryRuleCounts(t *testing.T) {
	for _, c := range []struct {
		name string
		off  func(*Rules)
	}{
		{"record before dispatch", func(r *Rules) { r.RecordFirst = false }},
		{"tombstones", func(r *Rules) { r.Tombstones = false }},
		{"tombstones survive a crash", func(r *Rules) { r.DurableTombs = false }},
		{"epoch filter", func(r *Rules) { r.EpochFilter = false }},
		{"redispatch only with proof", func(r *Rules) { r.ProofOnly = false }},
	} {
		t.Run(c.name, func(t *testing.T) {
			rules := All()
			c.off(&rules)
			n, v := Check(rules, budget())
			if v == nil {
				t.Fatalf("%d states and no violation", n)
			}
			t.Logf("%d states: %v", n, v)
		})
	}
}
