// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bufio"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// soak says whether the full sizes are asked for.
var soak = os.Getenv("WEIR_SOAK") != ""

// tally adds up results.
type tally struct {
	Result
	runs   int
	failed []uint64 // the seeds
}

func (a *tally) add(r *Result) {
	a.runs++
	a.Exchanges += r.Exchanges
	a.Requests += r.Requests
	a.Owned += r.Owned
	a.Excused += r.Excused
	a.Opened += r.Opened
	a.Reused += r.Reused
	a.Packets += r.Packets
	a.Steps += r.Steps
	a.Time += r.Time
	a.Kills += r.Kills
	a.Inside += r.Inside
	a.Undone += r.Undone
	a.Lost += r.Lost
	for i := range r.Counters {
		a.Counters[i] += r.Counters[i]
	}
}

// maxStories bounds how many failed runs are told in full.
const maxStories = 3

// runAll runs scenarios, which are numbered from 0, until more says that there
// are enough, and tells the story of those that fail.
func runAll(t *testing.T, more func(done int, sum *tally) bool, make func(i int) (*Scenario, Hooks)) *tally {
	t.Helper()
	var sum tally
	var mu sync.Mutex
	var next atomic.Int64
	var failed []int
	var group sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() {
			for {
				mu.Lock()
				ok := more(sum.runs, &sum) && len(failed) < maxStories
				mu.Unlock()
				if !ok {
					return
				}
				i := int(next.Add(1) - 1)
				s, h := make(i)
				r := Run(s, h)
				mu.Lock()
				sum.add(r)
				if r.Violation != nil {
					failed = append(failed, i)
				}
				mu.Unlock()
			}
		})
	}
	group.Wait()
	for _, i := range failed {
		s, h := make(i)
		sum.failed = append(sum.failed, s.Seed)
		t.Errorf("case %d, seed %d:\n%s", i, s.Seed, Explain(s, h, 60))
	}
	return &sum
}

// upTo is for runAll: so many runs.
func upTo(n int) func(int, *tally) bool {
	var begun int
	return func(int, *tally) bool { begun++; return begun <= n }
}

// freshSeed is seedOf, but for one thing: where WEIR_FRESH is set, as in .ci/run,
// the seed is drawn anew each time, whatever WEIR_SEED says for all other tests.
func freshSeed(t *testing.T) uint64 {
	t.Helper()
	if os.Getenv("WEIR_FRESH") == "" {
		return seedOf(t)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("WEIR_SEED=%d", seed)
	return seed
}

// TestRandomExchanges: at least 50,000 exchanges over fresh seeds, 5 million
// with WEIR_SOAK. A case that fails prints its own seed, which belongs into
// testdata/seeds.txt when the bug is mended.
func TestRandomExchanges(t *testing.T) {
	base := freshSeed(t)
	want := 50_000
	switch {
	case *exchanges > 0:
		want = *exchanges
	case soak:
		want = 5_000_000
	case testing.Short():
		want = 5_000
	}
	sum := runAll(t, func(_ int, s *tally) bool { return s.Exchanges < want }, func(i int) (*Scenario, Hooks) {
		return Random(base + uint64(i)), Hooks{}
	})
	t.Logf("%d runs: %d exchanges, %d answered by the engine, %d given up by plan; %d packets, %d steps, %d s of virtual time",
		sum.runs, sum.Exchanges, sum.Owned, sum.Excused, sum.Packets, sum.Steps, sum.Time/second)
	for _, seed := range sum.failed {
		t.Logf("to repeat it: go test ./integration/sim -run TestReplay -seed %d", seed)
	}
}

// regressionSeeds reads testdata/seeds.txt: one seed a line, with a remark
// behind it.
func regressionSeeds(t *testing.T) []uint64 {
	t.Helper()
	f, err := os.Open("testdata/seeds.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var seeds []uint64
	for sc := bufio.NewScanner(f); sc.Scan(); {
		word, _, _ := strings.Cut(strings.TrimSpace(sc.Text()), " ")
		if word == "" || word[0] == '#' {
			continue
		}
		n, err := strconv.ParseUint(word, 10, 64)
		if err != nil {
			t.Fatalf("testdata/seeds.txt: %q: %v", word, err)
		}
		seeds = append(seeds, n)
	}
	return seeds
}

// TestRegressionSeeds runs the fixed seeds, among them every one that has ever
// found a bug.
func TestRegressionSeeds(t *testing.T) {
	seeds := regressionSeeds(t)
	if len(seeds) < 1000 {
		t.Errorf("there are only %d seeds", len(seeds))
	}
	sum := runAll(t, upTo(len(seeds)), func(i int) (*Scenario, Hooks) { return Random(seeds[i]), Hooks{} })
	t.Logf("%d runs, %d exchanges", sum.runs, sum.Exchanges)
}

// TestDeterminism: the same scenario twice, the same outputs (INV-8). The
// control: another seed of the engine's own choices, and they differ.
func TestDeterminism(t *testing.T) {
	base := seedOf(t)
	differ := 0
	for i := range uint64(60) {
		a, b := Run(Random(base+i), Hooks{}), Run(Random(base+i), Hooks{})
		if a.Violation == nil && b.Violation == nil && (a.Hash != b.Hash || a.Steps != b.Steps) {
			t.Errorf("WEIR_SEED=%d: two runs differ: %x after %d steps, %x after %d", base+i, a.Hash, a.Steps, b.Hash, b.Steps)
		}
		other := Random(base + i)
		other.Servers = append(other.Servers, other.Servers[0])
		if Run(other, Hooks{}).Hash != a.Hash {
			differ++
		}
	}
	if differ == 0 {
		t.Error("the hash says nothing: no changed scenario has another one")
	}
}
