// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"fmt"
	"math"
	"sync/atomic"
)

// Budgets bound the payload bytes of servers and of the whole farm, both ways
// together, by token buckets. What was begun goes on: a bucket goes into debt,
// and while it is there the server gets no new request.
type Budgets struct {
	Servers []Budget // a server that is not listed has none
	Farm    *Budget  // for all servers together; Server does not matter; may be nil
}

// Budget is a token bucket.
type Budget struct {
	Server string
	Rate   float64 // bytes per second, above 0
	Burst  float64 // bytes that a bucket holds at most, above 0
	AtCap  AtCap
}

// AtCap says what happens to new requests while a bucket is in debt.
type AtCap uint8

// What a bucket in debt does. Where it leaves no candidate, the policy's
// OnEmpty says more; without one, AtCapWait waits and AtCapSkip is ignored.
const (
	AtCapSkip   AtCap = iota // the server is no candidate
	AtCapWait                // the same, and a request that finds no other waits
	AtCapIgnore              // nothing: it is only counted
)

var atCapNames = [...]string{"skip", "wait", "ignore"}

// String returns the word of configurations.
func (a AtCap) String() string {
	if int(a) < len(atCapNames) {
		return atCapNames[a]
	}
	return fmt.Sprintf("at_cap(%d)", uint8(a))
}

// bucket is the compiled form of a Budget. Its level at a time is
//
//	rate × (time − begun) − spent − forfeit
//
// with spent from the live counters, which everybody who passes bytes on adds
// to, and forfeit raised whenever the level is found above the burst. So a
// packet costs one addition, a choice a few, and nothing is locked. The bucket
// outlives the Selector that made it; see adopt.
type bucket struct {
	rate, burst float64
	atCap       AtCap
	state       *bucketState
}

// bucketState is shared by all Selectors that have the bucket, and by shards.
type bucketState struct {
	begun   atomic.Int64 // when the first choice looked at it, ns; 0: none has
	forfeit atomic.Int64 // bytes; unset before the first look
	before  *bucket      // whose level it takes over, nil: it begins full
}

const unset = math.MinInt64

func newBucket(b *Budget) bucket {
	k := bucket{rate: b.Rate, burst: b.Burst, atCap: b.AtCap, state: &bucketState{}}
	k.state.forfeit.Store(unset)
	return k
}

// level returns how many bytes the bucket holds; below zero is a debt.
func (b *bucket) level(now, spent int64) float64 {
	st := b.state
	begun := st.begun.Load()
	if begun == 0 {
		begun = now
		if !st.begun.CompareAndSwap(0, now) {
			begun = st.begun.Load()
		}
	}
	earned := b.rate * (float64(now-begun) / 1e9)
	f := st.forfeit.Load()
	if f == unset {
		level := b.burst
		if st.before != nil {
			level = min(level, st.before.level(now, spent))
		}
		if !st.forfeit.CompareAndSwap(unset, int64(earned-level)-spent) {
			f = st.forfeit.Load()
		} else {
			return level
		}
	}
	level := earned - float64(spent) - float64(f)
	if over := level - b.burst; over > 0 {
		// Of two shards that find the same surplus only one takes it away.
		st.forfeit.CompareAndSwap(f, f+int64(over))
		level = b.burst
	}
	return level
}

// adopt takes over the state of the bucket that stood here before, so that a
// debt is not forgiven whenever a plugin sends something new.
func (b *bucket) adopt(old *bucket) {
	if b.rate == old.rate && b.burst == old.burst {
		b.state = old.state
		return
	}
	if b.state.begun.Load() != 0 {
		return // in use already
	}
	if old.state.begun.Load() == 0 {
		b.state.before = old.state.before // nobody has looked at the old one
		return
	}
	b.state.before = &bucket{rate: old.rate, burst: old.burst, state: old.state}
	// The one before that is not needed any more, and would make a chain.
	if old.state.forfeit.Load() != unset {
		b.state.before.state = old.state.alone()
	}
}

// alone returns the state without its past. It shares nothing: what the old
// Selector still forfeits is what this one would.
func (s *bucketState) alone() *bucketState {
	c := &bucketState{}
	c.begun.Store(s.begun.Load())
	c.forfeit.Store(s.forfeit.Load())
	return c
}

// budgetTable is the compiled form of Budgets.
type budgetTable struct {
	servers []bucket // in no order
	index   []uint16 // of servers: the server's number
	names   []string
	farm    *bucket
}

func (s *Selector) compileBudgets(plugin string, in *Budgets) (*budgetTable, error) {
	t := &budgetTable{}
	fail := func(server, format string, args ...any) error {
		return &Error{Plugin: plugin, Server: server, Msg: fmt.Sprintf(format, args...)}
	}
	check := func(b *Budget) error {
		// Written so that what is not a number fails.
		if !(b.Rate > 0 && b.Rate <= 1e12) {
			return fail(b.Server, "has a budget of %g bytes per second, which is not within 0 and 1e12", b.Rate)
		}
		if !(b.Burst > 0 && b.Burst <= 1e15) {
			return fail(b.Server, "has a burst of %g bytes, which is not within 0 and 1e15", b.Burst)
		}
		if b.AtCap > AtCapIgnore {
			return fail(b.Server, "has an unknown %s", b.AtCap)
		}
		return nil
	}
	seen := map[int]bool{}
	for i := range in.Servers {
		b := &in.Servers[i]
		n, ok := s.byName[b.Server]
		if !ok {
			return nil, fail(b.Server, notOfFarm)
		}
		if seen[n] {
			return nil, fail(b.Server, "has two budgets")
		}
		seen[n] = true
		if err := check(b); err != nil {
			return nil, err
		}
		t.servers = append(t.servers, newBucket(b))
		t.index = append(t.index, uint16(n))
		t.names = append(t.names, b.Server)
	}
	if in.Farm != nil {
		b := *in.Farm
		b.Server = "of the whole farm"
		if err := check(&b); err != nil {
			return nil, err
		}
		k := newBucket(&b)
		t.farm = &k
	}
	return t, nil
}

// adopt takes over the state of the buckets of the same names.
func (t *budgetTable) adopt(old *budgetTable) {
	if old == nil || old == t {
		return
	}
	if t.farm != nil && old.farm != nil {
		t.farm.adopt(old.farm)
	}
	at := make(map[string]int, len(old.names))
	for i, n := range old.names {
		at[n] = i
	}
	for i, n := range t.names {
		if j, ok := at[n]; ok {
			t.servers[i].adopt(&old.servers[j])
		}
	}
}

// narrow takes the servers in debt out of the candidates. It returns false if
// that leaves none that is ready, and then whether the buckets say to wait.
func (s *Selector) narrowBudget(t *budgetTable, r *Request, live []*Live, sc *Scratch, alive bool, rec *recorder) (left, wait bool) {
	cand := sc.cand[:s.words]
	copy(sc.saved[:s.words], cand)
	changed := false
	for i := range t.servers {
		n, b := int(t.index[i]), &t.servers[i]
		if cand[n>>6]&(1<<(n&63)) == 0 {
			continue
		}
		if level := b.level(r.Now, live[n].Spent.Load()); level < 0 {
			rec.debt(s.servers[n].Name, level, b)
			if b.atCap != AtCapIgnore {
				cand[n>>6] &^= 1 << (n & 63)
				changed = true
				wait = wait || b.atCap == AtCapWait && ready(live[n])
			}
		}
	}
	if t.farm != nil && r.Farm != nil {
		if level := t.farm.level(r.Now, r.Farm.Spent.Load()); level < 0 {
			rec.debt("the farm", level, t.farm)
			if t.farm.atCap != AtCapIgnore {
				clear(cand)
				changed = true
				wait = wait || t.farm.atCap == AtCapWait
			}
		}
	}
	return !changed || !alive || anyReady(cand, live), wait
}

// inDebt reports whether the server may not be used by these budgets; for
// shadows.
func (t *budgetTable) inDebt(server int, r *Request, live []*Live) bool {
	for i := range t.servers {
		if b := &t.servers[i]; int(t.index[i]) == server && b.atCap != AtCapIgnore && b.level(r.Now, live[server].Spent.Load()) < 0 {
			return true
		}
	}
	f := t.farm
	return f != nil && r.Farm != nil && f.atCap != AtCapIgnore && f.level(r.Now, r.Farm.Spent.Load()) < 0
}

// Budgeted reports whether any policy has a budget for the server or for the
// farm, so that bytes which are certain to come are worth to be counted ahead.
func (s *Selector) Budgeted(server int) bool {
	if server>>6 >= len(s.budgeted) {
		return false
	}
	return s.budgeted[server>>6]&(1<<(server&63)) != 0
}
