// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/weirgate/weir/module/packet"
)

// The crowd of the canary tests.
const canaryClients, canaryConnections = 200, 4

// TestCanary: 100,000 requests of crowds of two hundred clients over four
// server connections, 10 million with WEIR_SOAK. No byte of an exchange reaches
// another client (INV-2), no request runs twice without a count (INV-4).
func TestCanary(t *testing.T) {
	base := seedOf(t)
	want := 100_000
	if soak {
		want = 10_000_000
	} else if testing.Short() {
		want = 10_000
	}
	// A run that its time limit would cut says how far it came.
	limit, limited := t.Deadline()
	sum := runAll(t, func(_ int, s *tally) bool {
		return s.Requests < want && !(limited && time.Until(limit) < 20*time.Second)
	}, func(i int) (*Scenario, Hooks) {
		return Canary(base+uint64(i), canaryClients, canaryConnections), Hooks{}
	})
	t.Logf("%d crowds, %d requests: %d answered, %d answered by the engine, %d given up by plan; %d packets, %d server connections opened, %d reuses",
		sum.runs, sum.Requests, sum.Exchanges, sum.Owned, sum.Excused, sum.Packets, sum.Opened, sum.Reused)
	if sum.Requests < want {
		t.Errorf("%d of %d requests: the time is over", sum.Requests, want)
	}
	if sum.Exchanges < sum.Requests/2 || sum.Reused < uint64(sum.Requests)/2 || sum.Excused == 0 {
		t.Error("the rig tests nothing: too few answers, reuses, or clients that left")
	}
}

// TestCanaryFindsLeaks: the control. In a crowd in which packets hold bytes of
// another client's answer the observer finds them. Any two lines of a body hold
// a whole nonce, so what is stolen is short enough for the segments of servers
// of the small class, too.
func TestCanaryFindsLeaks(t *testing.T) {
	const theft = 3 * line
	base := seedOf(t)
	for i := range uint64(20) {
		var stolen []byte
		var robbed packet.Endpoint
		changed := 0
		r := Run(Canary(base+i, canaryClients, canaryConnections), Hooks{Emitted: func(_ *World, d Direction, b []byte) []byte {
			p, _ := packet.ParseTCP(b)
			if d != ToClient || p.PayloadLen() < theft {
				return b
			}
			if stolen == nil {
				stolen, robbed = bytes.Clone(p.Payload()[:theft]), p.Dst()
			} else if p.Dst() != robbed {
				changed++
				copy(p.Payload(), stolen)
				p.FillChecksum()
			}
			return b
		}})
		if changed == 0 {
			t.Errorf("seed %d: no packet was changed: the control shows nothing", base+i)
		} else if r.Violation == nil || !slices.Contains([]string{"INV-1", "INV-2"}, r.Violation.Invariant) {
			t.Errorf("seed %d: another's bytes in an answer, and the observer says %v", base+i, r.Violation)
		}
	}
}
