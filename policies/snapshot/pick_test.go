// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"math"
	"math/rand/v2"
	"testing"
)

func TestPickLoadAndTies(t *testing.T) {
	servers := farm(2)
	servers[1].Weight = 2
	s := mustSelector(t, servers)
	live := lives(2)
	both := func() map[string]int {
		m := map[string]int{}
		for rnd := range uint64(1000) {
			m[outcome(s, s.Choose(&Request{}, live, nil, rnd, new(Scratch)))]++
		}
		return m
	}
	for _, c := range []struct {
		name        string
		active      [2]int32
		waiting     int32
		idle        [2]int32
		least, most int // requests of 1000 at s1
	}{
		{"both idle: by weight", [2]int32{0, 0}, 0, [2]int32{}, 270, 400},
		{"s2 is busier: 4/1 <= 8/2", [2]int32{3, 8}, 0, [2]int32{}, 1000, 1000},
		{"those that wait count", [2]int32{3, 5}, 3, [2]int32{}, 1000, 1000},
		{"s1 is busier: 6/2 <= 4/1", [2]int32{4, 5}, 0, [2]int32{}, 0, 0},
		{"neither is clearly busier: 4/1 > 7/2, 8/2 > 3/1", [2]int32{3, 7}, 0, [2]int32{}, 270, 400},
		// (3+1)/1 = (7+1)/2: half of s2's third goes to where a connection is.
		{"a tie, s1 has an idle connection", [2]int32{3, 7}, 0, [2]int32{1, 0}, 600, 730},
		{"a tie, s2 has an idle connection", [2]int32{3, 7}, 0, [2]int32{0, 1}, 110, 230},
		{"a tie, both have", [2]int32{3, 7}, 0, [2]int32{1, 5}, 270, 400},
		{"no tie, s1 has one", [2]int32{3, 6}, 0, [2]int32{1, 0}, 270, 400},
		// Counters that run below zero by a race do not turn the order round.
		{"below zero", [2]int32{-5, 2}, -3, [2]int32{}, 1000, 1000},
	} {
		for i := range live {
			live[i].Active.Store(c.active[i])
			live[i].Idle.Store(c.idle[i])
		}
		live[1].Waiting.Store(c.waiting)
		if n := both()["s1"]; n < c.least || n > c.most {
			t.Errorf("%s: %d of 1000 at s1, want %d to %d", c.name, n, c.least, c.most)
		}
	}
}

// TestPickDistribution compares the shares of both draws with the weights, in
// the listed and in the rejecting way, by a chi-square test.
func TestPickDistribution(t *testing.T) {
	rnd := seeded(t)
	for _, n := range []int{2, 3, fewServers, fewServers + 1, 200} {
		servers := farm(n)
		scores := &Scores{}
		for i := range servers {
			servers[i].Weight = uint32(1 + rnd.IntN(8))
			if i%2 == 0 {
				scores.Servers = append(scores.Servers, Score{servers[i].Name, 0.5 + rnd.Float64()})
			}
		}
		s := mustSelector(t, servers, Policy{Name: "load", Snapshot: &Snapshot{Scores: scores}})
		live := lives(n)
		var sc Scratch
		s.scoredAll(&sc)
		total := 0.0
		for i := range n {
			total += s.weight(&sc, i)
		}
		// want is the chance of each server to be the first, and the second.
		want := [2][]float64{make([]float64, n), make([]float64, n)}
		for i := range n {
			w := s.weight(&sc, i)
			want[0][i] = w / total
			for j := range n {
				if j != i {
					want[1][j] += w / total * s.weight(&sc, j) / (total - w)
				}
			}
		}
		const draws = 200000
		got := [2][]float64{make([]float64, n), make([]float64, n)}
		state := rnd.Uint64()
		for range draws {
			copy(sc.cand[:], s.all)
			a, b := -1, -1
			if n > fewServers {
				if a, state = s.drawOne(&sc, n, live, -1, state); a >= 0 {
					b, state = s.drawOne(&sc, n, live, a, state)
				}
			}
			if b < 0 {
				s.list(&sc, live)
				a, b, state = drawListed(&sc, n, a, state)
			}
			if a == b {
				t.Fatalf("%d servers: server %d is drawn twice", n, a)
			}
			got[0][a]++
			got[1][b]++
		}
		for draw := range want {
			chi := 0.0
			for i := range n {
				w := draws * want[draw][i]
				chi += (got[draw][i] - w) * (got[draw][i] - w) / w
			}
			// Mean n-1, standard deviation √2(n-1); six of them.
			if limit := float64(n-1) + 6*math.Sqrt(2*float64(n-1)); chi > limit {
				t.Errorf("%d servers, draw %d: chi-square %.1f, limit %.1f", n, draw+1, chi, limit)
			}
		}
	}
}

// TestPickExtremes: weights that a sum of floating-point numbers cannot hold
// together still give two different servers.
func TestPickExtremes(t *testing.T) {
	servers := farm(3)
	servers[1].Weight = 256
	var policies []Policy
	for i := range 8 {
		policies = append(policies, Policy{Name: string(rune('a' + i)), Snapshot: &Snapshot{Scores: &Scores{Servers: []Score{{"s1", MinScore}, {"s2", MaxScore}, {"s3", MinScore}}}}})
	}
	s := mustSelector(t, servers, policies...)
	var sc Scratch
	s.scoredAll(&sc)
	live := lives(3)
	for rnd := range uint64(1000) {
		copy(sc.cand[:], s.all)
		s.list(&sc, live)
		if a, b, _ := drawListed(&sc, 3, -1, rnd); a != 1 || b == 1 {
			t.Fatalf("drawn: %d and %d", a, b)
		}
	}
}

func (s *Selector) scoredAll(sc *Scratch) {
	sc.nscore = 0
	for i := range s.policies {
		if s.policies[i].scores != nil {
			sc.scored[sc.nscore] = uint8(i)
			sc.nscore++
		}
	}
}

// oldPick is how servers were picked before: two draws with replacement, and
// the request counted at both. It is the control of the simulations.
func oldPick(s *Selector, sc *Scratch, live []*Live, rnd uint64, replace bool) int {
	copy(sc.cand[:], s.all)
	n := s.list(sc, live)
	a, b, next := drawListed(sc, n, -1, rnd)
	if replace {
		b, _, _ = drawListed(sc, n, -1, next)
	}
	if (load(live[b])+1)*s.weight(sc, a) < (load(live[a])+1)*s.weight(sc, b) {
		return b
	}
	return a
}

// simulation is a farm whose clients ask one after the other.
type simulation struct {
	clients  int
	requests int
	took     []int // how long each server takes at least; 0: it never answers
	warm     int   // servers from this number on begin without a connection
}

// run returns how many requests each server got.
func (m simulation) run(rnd *rand.Rand, pick func(live []*Live, rnd uint64) int) (got []int, live []*Live) {
	n := len(m.took)
	live, got = lives(n), make([]int, n)
	opened := make([]int32, n)
	for i := range m.warm {
		opened[i] = 1
		live[i].Idle.Store(1)
	}
	type client struct{ server, until int }
	clients := make([]client, m.clients)
	for i := range clients {
		clients[i].server = -1
	}
	asked, stuck := 0, 0
	for now := 0; asked < m.requests && stuck < m.clients; now++ {
		for _, i := range rnd.Perm(len(clients)) {
			c := &clients[i]
			if c.server >= 0 {
				if c.until != now {
					continue
				}
				live[c.server].Active.Add(-1)
			}
			sv := pick(live, rnd.Uint64())
			got[sv]++
			asked++
			*c = client{sv, -1}
			if d := m.took[sv]; d > 0 {
				c.until = now + d + rnd.IntN(d)
			} else {
				stuck++
			}
			live[sv].Active.Add(1)
			opened[sv] = max(opened[sv], live[sv].Active.Load())
			for i := range live {
				live[i].Idle.Store(opened[i] - live[i].Active.Load())
			}
		}
	}
	return got, live
}

func times(n, d int) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = d
	}
	return out
}

// TestPickStuck: a server that never answers does not collect all clients that
// ask one after the other. With replacement it did, because both draws may hit
// it, whatever it has already.
func TestPickStuck(t *testing.T) {
	rnd := seeded(t)
	for _, c := range []struct{ servers, clients int }{{2, 8}, {3, 9}, {3, 64}, {10, 64}} {
		took := times(c.servers, 10)
		took[0] = 0
		m := simulation{clients: c.clients, requests: 20000, took: took}
		s := mustSelector(t, farm(c.servers))
		var sc Scratch
		_, live := m.run(rnd, func(live []*Live, rnd uint64) int {
			return int(s.Choose(&Request{}, live, nil, rnd, &sc).Server)
		})
		stuck := int(live[0].Active.Load())
		// It gets one more only while another has as many at least.
		if most := (c.clients + 1) / 2; stuck > most {
			t.Errorf("%d servers: %d of %d clients are stuck, at most %d may be", c.servers, stuck, c.clients, most)
		}
		_, live = m.run(rnd, func(live []*Live, rnd uint64) int { return oldPick(s, &sc, live, rnd, true) })
		before := int(live[0].Active.Load())
		if c.servers < 10 && before < c.clients {
			t.Errorf("%d servers: with replacement %d of %d clients are stuck, all were expected; the test shows nothing", c.servers, before, c.clients)
		}
		t.Logf("%d servers, %d clients: %d stuck; with replacement %d", c.servers, c.clients, stuck, before)
	}
}

// TestPickShares: of servers that are as fast as each other each gets at least
// half of its weighted share, whatever the load, and also where only one of them
// has a connection at first.
func TestPickShares(t *testing.T) {
	rnd := seeded(t)
	for _, weights := range [][]uint32{{1, 1}, {1, 1, 1}, {1, 2}, {1, 2, 4}, {1, 10}, {1, 1, 1, 1, 1, 5, 5, 5, 5, 5}} {
		servers := farm(len(weights))
		total := 0.0
		for i, w := range weights {
			servers[i].Weight = w
			total += float64(w)
		}
		s := mustSelector(t, servers)
		var sc Scratch
		for _, clients := range []int{1, 2, 4, 12, 100} {
			m := simulation{clients: clients, requests: 10000, took: times(len(weights), 10), warm: 1}
			got, _ := m.run(rnd, func(live []*Live, rnd uint64) int {
				return int(s.Choose(&Request{}, live, nil, rnd, &sc).Server)
			})
			asked := 0
			for _, g := range got {
				asked += g
			}
			for i, g := range got {
				share := float64(g) / float64(asked) / (float64(weights[i]) / total)
				if share < 0.5 || share > 2 {
					t.Errorf("weights %v, %d clients: server %d got %.2f of its share: %v", weights, clients, i+1, share, got)
				}
			}
		}
	}
	// The control: different draws and the request counted at both, and the
	// server with the small weight gets nothing from a client that comes alone.
	servers := farm(2)
	servers[1].Weight = 2
	s := mustSelector(t, servers)
	var sc Scratch
	got, _ := simulation{clients: 1, requests: 1000, took: times(2, 10)}.run(rnd, func(live []*Live, rnd uint64) int {
		return oldPick(s, &sc, live, rnd, false)
	})
	if got[0] != 0 {
		t.Errorf("the control gives %v; the test shows nothing", got)
	}
}

// TestPickSlow: a slow server gets less, but not nothing.
func TestPickSlow(t *testing.T) {
	rnd := seeded(t)
	for _, n := range []int{2, 3, 10} {
		s := mustSelector(t, farm(n))
		var sc Scratch
		took := times(n, 10)
		took[0] = 50
		for _, clients := range []int{n, 4 * n} {
			m := simulation{clients: clients, requests: 10000, took: took}
			got, _ := m.run(rnd, func(live []*Live, rnd uint64) int {
				return int(s.Choose(&Request{}, live, nil, rnd, &sc).Server)
			})
			if got[0] < 100 || got[0] > 10000/n*3/4 {
				t.Errorf("%d servers, %d clients: the slow server got %d of 10,000", n, clients, got[0])
			}
		}
	}
}

// TestPickFairness plays arrivals that do not wait for anything: of equal
// servers each gets at least half of its share, and a slow one gets less but not
// nothing.
func TestPickFairness(t *testing.T) {
	rnd := seeded(t)
	for _, slow := range []int{1, 5} {
		const n, requests = 10, 10000
		s := mustSelector(t, farm(n))
		live := lives(n)
		got := make([]int, n)
		ends := make([][]int, requests*2+1000)
		var sc Scratch
		for now := range requests {
			for _, sv := range ends[now] {
				live[sv].Active.Add(-1)
			}
			c := s.Choose(&Request{}, live, nil, rnd.Uint64(), &sc)
			got[c.Server]++
			live[c.Server].Active.Add(1)
			d := 10 + rnd.IntN(20)
			if c.Server == 0 {
				d *= slow
			}
			ends[now+d] = append(ends[now+d], int(c.Server))
		}
		for i, g := range got {
			if g < requests/n/2 && (i > 0 || slow == 1) {
				t.Errorf("slow %d: server %d got %d of %d", slow, i, g, requests)
			}
		}
		if slow > 1 && (got[0] == 0 || got[0] > requests/n*2/3) {
			t.Errorf("the slow server got %d of %d", got[0], requests)
		}
	}
}
