// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"flag"
	"os"
	"strconv"
	"testing"
	"time"
)

var (
	replaySeed = flag.String("seed", "", "the seed of a run that TestReplay repeats")
	exchanges  = flag.Int("exchanges", 0, "the `number` of exchanges that TestRandomExchanges is to reach, instead of its own")
)

// seedOf prints the seed of a random test; WEIR_SEED chooses it.
func seedOf(t testing.TB) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("WEIR_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 0, 64)
		if err != nil {
			t.Fatalf("WEIR_SEED=%q is no number: %v", s, err)
		}
		seed = n
	}
	t.Logf("WEIR_SEED=%d", seed)
	return seed
}

// TestReplay repeats the run of one seed and, if it fails, tells its story.
func TestReplay(t *testing.T) {
	s := *replaySeed
	if s == "" {
		s = os.Getenv("WEIR_SEED")
	}
	if s == "" {
		t.Skip("skipped: it needs -seed N or WEIR_SEED=N")
	}
	seed, err := strconv.ParseUint(s, 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	res := Run(Random(seed), Hooks{})
	if res.Violation != nil {
		t.Fatal(Explain(Random(seed), Hooks{}, 120))
	}
	t.Logf("%+v", res)
}
