// SPDX-License-Identifier: Apache-2.0

package snapshot

import "math/bits"

// Scratch is the working memory of Choose. Its owner (a shard) keeps one and
// lends it to each call; nothing in it lives from one call to the next.
type Scratch struct {
	cand   [MaxServers / 64]uint64
	saved  [MaxServers / 64]uint64
	levels [maxLevels]uint32
	host   [maxHost]byte
	scored [MaxPolicies]uint8 // the policies whose scores count
	nscore int
	said   [MaxAsks]*CompiledAnswer // the answers whose scores count
	nsaid  int
	list   [MaxServers]uint16
	sum    [MaxServers]float64
}

// fewServers is the size up to which a set is listed with the state of each
// server. In a larger one the draw picks a member and looks at that one alone.
const fewServers = 32

// drawTries is how often a draw from a large set may hit a server that is not
// ready, or is turned down for its small weight, before the set is listed.
const drawTries = 16

// Choose picks the server for a request, or says what to answer instead, or
// which plugin to ask first.
//
// The candidates are the servers in state Ready that were not tried. Each
// policy in the farm's order narrows them or multiplies their weights. Of the
// candidates left, backup servers count only when no other is there. Then two
// different ones are drawn in proportion to weight × Π score, and one of them is
// taken: see better.
//
// live has one entry for each server of the farm, by number; tried may be nil;
// rnd is one random number, from which the same choice follows every time. It
// neither allocates nor locks. It takes time in proportion to the servers only
// where large sets have few ready servers.
func (s *Selector) Choose(r *Request, live []*Live, tried *Tried, rnd uint64, sc *Scratch) Choice {
	return s.decide(r, live, tried, rnd, sc, nil)
}

// decide chooses, and then lets the shadows look at it.
func (s *Selector) decide(r *Request, live []*Live, tried *Tried, rnd uint64, sc *Scratch, rec *recorder) Choice {
	c := s.choose(r, live, tried, rnd, sc, rec)
	if s.shadows && c.Kind != ChoiceAsk {
		s.compare(&c, r, live, rnd, sc, rec)
	}
	return c
}

// choose is Choose with an optional recorder, whose methods do nothing on nil.
func (s *Selector) choose(r *Request, live []*Live, tried *Tried, rnd uint64, sc *Scratch, rec *recorder) Choice {
	cand := sc.cand[:s.words]
	copy(cand, s.all)
	if tried != nil {
		for i := range cand {
			cand[i] &^= tried[i]
		}
	}
	// Without any candidate the policies are still asked: a route that
	// redirects or rejects needs no server.
	alive := anyReady(cand, live)
	rec.start(s, live, tried, cand)
	sc.nscore, sc.nsaid = 0, 0
	var notes Choice     // Emptied, Mark and Ban so far
	pinned, pin := -1, 0 // the affinity's server, and whose it is
	for i := range s.policies {
		p := &s.policies[i]
		if p.shadow {
			continue
		}
		if p.pending {
			rec.pending(p)
			return Choice{Kind: ChoiceReject, Reason: ReasonRoutesPending, Policy: uint8(i), Status: 503, RetryAfter: RetryAfter}
		}
		if p.routes != nil {
			v := p.routes.find(r, sc)
			if v < 0 {
				rec.noRoute(p)
				switch p.onEmpty {
				case OnEmptyWait:
					return Choice{Kind: ChoiceWait, Reason: ReasonNoRoute, Policy: uint8(i)}
				case OnEmptyIgnore:
				default:
					return Choice{Kind: ChoiceReject, Reason: ReasonNoRoute, Policy: uint8(i), Status: 404}
				}
			} else {
				t := &p.routes.targets[v]
				rec.route(p, t)
				switch t.kind {
				case ChoiceReject:
					return Choice{Kind: ChoiceReject, Reason: ReasonRouteReject, Policy: uint8(i), Status: t.status, RetryAfter: t.retry}
				case ChoiceRedirect:
					return Choice{Kind: ChoiceRedirect, Reason: ReasonRouteRedirect, Policy: uint8(i), Status: t.status, Location: t.location}
				}
				if !s.narrow(sc, p.routes.sets[t.set:t.set+s.words], live, alive) {
					rec.emptied(p)
					if c, done := onEmpty(p, i, ReasonRouteEmpty); done {
						return c
					}
					notes.Emptied |= 1 << i
					copy(cand, sc.saved[:s.words])
				}
				rec.left(p, cand, live)
			}
		}
		if p.affinity != nil && pinned < 0 {
			n, present := p.affinity.server(r)
			rec.affinity(p, n, present)
			if n >= 0 {
				pinned, pin = n, i
			}
		}
		if p.ask != nil {
			a := r.answer(p.name)
			if a == nil {
				return Choice{Kind: ChoiceAsk, Reason: ReasonAsked, Policy: uint8(i)}
			}
			if c, done := s.take(p, i, a, sc, live, alive, rec); done {
				c.Mark, c.Ban = a.mark, a.ban
				return c
			}
			if a.mark != 0 {
				notes.Mark = a.mark
			}
			notes.Ban = max(notes.Ban, a.ban)
			rec.left(p, cand, live)
		}
		if (p.eligible == nil && p.scores == nil && p.budgets == nil) || (p.expires != 0 && r.Now >= p.expires) {
			rec.expired(p)
			continue
		}
		if p.eligible != nil {
			rec.eligibility(p, cand)
			if !s.narrow(sc, p.eligible, live, alive) {
				rec.emptied(p)
				if c, done := onEmpty(p, i, ReasonNotEligible); done {
					return c
				}
				notes.Emptied |= 1 << i
				copy(cand, sc.saved[:s.words])
			}
			rec.left(p, cand, live)
		}
		if p.budgets != nil {
			rec.budget(p)
			if ok, wait := s.narrowBudget(p.budgets, r, live, sc, alive, rec); !ok {
				rec.emptied(p)
				switch {
				case p.onEmpty == OnEmptyReject:
					return Choice{Kind: ChoiceReject, Reason: ReasonOverBudget, Policy: uint8(i), Status: 503, RetryAfter: RetryAfter}
				case p.onEmpty == OnEmptyWait, wait && p.onEmpty == OnEmptyDefault:
					return Choice{Kind: ChoiceWait, Reason: ReasonOverBudget, Policy: uint8(i)}
				}
				notes.Emptied |= 1 << i
				copy(cand, sc.saved[:s.words])
			}
			rec.left(p, cand, live)
		}
		if p.scores != nil {
			sc.scored[sc.nscore] = uint8(i)
			sc.nscore++
			rec.scores(p, cand)
		}
	}
	if !alive {
		rec.noServer()
		return Choice{Kind: ChoiceReject, Reason: ReasonNoServer, Policy: NoPolicy, Status: 503, RetryAfter: RetryAfter}
	}
	if pinned >= 0 {
		if cand[pinned>>6]&(1<<(pinned&63)) != 0 && ready(live[pinned]) {
			rec.pinned(&s.policies[pin], pinned)
			notes.Reason, notes.Policy, notes.Server, notes.Candidates = ReasonAffinity, uint8(pin), uint16(pinned), 1
			return notes
		}
		rec.unpinned(&s.policies[pin], pinned)
		notes.Skipped |= 1 << pin
	}
	s.preferPrimary(sc, live, rec)
	c := s.pick(sc, live, rnd, rec)
	c.Mark, c.Ban, c.Emptied, c.Skipped = notes.Mark, notes.Ban, notes.Emptied, notes.Skipped
	return c
}

// take applies an answer of the plugin: it narrows the candidates, adds scores,
// or ends the choice.
func (s *Selector) take(p *policy, index int, a *CompiledAnswer, sc *Scratch, live []*Live, alive bool, rec *recorder) (c Choice, done bool) {
	rec.answer(p, a)
	switch {
	case a.failed && p.fallback == FallbackReject:
		return Choice{Kind: ChoiceReject, Reason: ReasonUnanswered, Policy: uint8(index), Status: 503, RetryAfter: RetryAfter}, true
	case a.failed:
		return Choice{}, false
	case a.kind == ChoiceReject:
		return Choice{Kind: ChoiceReject, Reason: ReasonAsked, Policy: uint8(index), Status: a.status, RetryAfter: a.retry}, true
	case a.kind == ChoiceRedirect:
		return Choice{Kind: ChoiceRedirect, Reason: ReasonAsked, Policy: uint8(index), Status: a.status, Location: a.location}, true
	case a.set == nil:
		return Choice{}, false
	}
	if !s.narrow(sc, a.set, live, alive) {
		rec.emptied(p)
		if c, done := onEmpty(p, index, ReasonAnswerEmpty); done {
			return c, true
		}
		copy(sc.cand[:s.words], sc.saved[:s.words])
	}
	if a.scores != nil && sc.nsaid < len(sc.said) {
		sc.said[sc.nsaid] = a
		sc.nsaid++
	}
	return Choice{}, false
}

// narrow intersects the candidates with a set and keeps the old ones in saved.
// It reports false when the set took the last ready candidate.
func (s *Selector) narrow(sc *Scratch, set []uint64, live []*Live, alive bool) bool {
	cand := sc.cand[:s.words]
	copy(sc.saved[:s.words], cand)
	for i := range cand {
		cand[i] &= set[i]
	}
	return !alive || anyReady(cand, live)
}

// onEmpty is the answer of a policy that left no candidate; done is false where
// it is to be ignored. What was asked for exists, so it is 503 and not 404.
func onEmpty(p *policy, index int, why Reason) (c Choice, done bool) {
	switch p.onEmpty {
	case OnEmptyIgnore:
		return Choice{}, false
	case OnEmptyWait:
		return Choice{Kind: ChoiceWait, Reason: why, Policy: uint8(index)}, true
	}
	return Choice{Kind: ChoiceReject, Reason: why, Policy: uint8(index), Status: 503, RetryAfter: RetryAfter}, true
}

// preferPrimary takes the backup servers out while another candidate is there.
func (s *Selector) preferPrimary(sc *Scratch, live []*Live, rec *recorder) {
	cand := sc.cand[:s.words]
	some := false
	for i := range cand {
		sc.saved[i] = cand[i] &^ s.backup[i]
		some = some || sc.saved[i] != cand[i]
	}
	if some && anyReady(sc.saved[:s.words], live) {
		copy(cand, sc.saved[:s.words])
		rec.noBackup(cand, live)
	}
}

// pick draws two of the candidates, at least one of which is ready, and takes
// the better one. They are different ones wherever there are two: a server that
// answers nothing and keeps all that it gets would otherwise, whenever it was
// drawn twice, get one more, until it has every client that waits for an answer.
func (s *Selector) pick(sc *Scratch, live []*Live, rnd uint64, rec *recorder) Choice {
	n := count(sc.cand[:s.words])
	a, b := -1, -1
	if n > fewServers {
		if a, rnd = s.drawOne(sc, n, live, -1, rnd); a >= 0 {
			b, rnd = s.drawOne(sc, n, live, a, rnd)
		}
	}
	if b < 0 {
		n = s.list(sc, live)
		if n == 0 {
			// The last ready server left while we looked at it.
			return Choice{Kind: ChoiceReject, Reason: ReasonNoServer, Policy: NoPolicy, Status: 503, RetryAfter: RetryAfter}
		}
		a, b, rnd = drawListed(sc, n, a, rnd)
	}
	take := a
	if a != b && s.better(sc, b, a, live, rnd) {
		take = b
	}
	rec.picked(s, sc, a, b, take, live)
	return Choice{Kind: ChoiceServer, Reason: ReasonPicked, Policy: NoPolicy, Server: uint16(take), Candidates: uint16(n)}
}

// better reports whether server x is to be taken instead of y, which was drawn
// first. It is where x, with this request, would be no busier for its weight
// than y is without it: (load(x) + 1) / weight(x) <= load(y) / weight(y). Among
// equal weights that is the server with less to do. Where weights differ, a
// server that has nothing to do keeps what was drawn for it: if the two were
// compared with the request at each, (load + 1) / weight, the one with the
// small weight would get nothing as long as the other is idle.
//
// Of two that are equally loaded the one that has an idle connection is taken
// half of the time, if the other has none. Always would be too often: where
// requests come one at a time, the other would never get a connection.
func (s *Selector) better(sc *Scratch, x, y int, live []*Live, rnd uint64) bool {
	// Compared crosswise, without dividing: equal loads are exactly equal.
	lx, ly := load(live[x]), load(live[y])
	wx, wy := s.weight(sc, x), s.weight(sc, y)
	if (lx+1)*wy <= ly*wx {
		return true
	}
	if (lx+1)*wy != (ly+1)*wx || live[x].Idle.Load() <= 0 || live[y].Idle.Load() > 0 {
		return false
	}
	_, coin := random(rnd)
	return coin>>63 == 0
}

func load(l *Live) float64 {
	return float64(max(l.Active.Load(), 0)) + float64(max(l.Waiting.Load(), 0))
}

// weight is the configured weight times the scores that count.
func (s *Selector) weight(sc *Scratch, server int) float64 {
	w := s.weights[server]
	for _, p := range sc.scored[:sc.nscore] {
		w *= s.policies[p].scores[server]
	}
	for _, a := range sc.said[:sc.nsaid] {
		w *= a.scores[server]
	}
	return w
}

// list writes the ready candidates and the running sum of their weights, and
// returns how many there are.
func (s *Selector) list(sc *Scratch, live []*Live) int {
	n, sum := 0, 0.0
	for i, word := range sc.cand[:s.words] {
		for ; word != 0; word &= word - 1 {
			server := i<<6 + bits.TrailingZeros64(word)
			if !ready(live[server]) {
				continue
			}
			sum += s.weight(sc, server)
			sc.list[n], sc.sum[n] = uint16(server), sum
			n++
		}
	}
	return n
}

// drawListed draws two different ones of the n listed servers in proportion to
// weight, the second from the rest; of one it returns that twice. first is the
// one that was drawn already, or -1.
func drawListed(sc *Scratch, n, first int, rnd uint64) (a, b int, next uint64) {
	i := n
	if first >= 0 {
		for i = 0; i < n && int(sc.list[i]) != first; i++ {
		}
	}
	var x uint64
	if i == n {
		rnd, x = random(rnd)
		i = sc.above(n, unit(x)*sc.sum[n-1])
	}
	a = int(sc.list[i])
	if n == 1 {
		return a, a, rnd
	}
	// The second draw is from the line without the first one's part.
	before := 0.0
	if i > 0 {
		before = sc.sum[i-1]
	}
	part := sc.sum[i] - before
	rnd, x = random(rnd)
	at := unit(x) * (sc.sum[n-1] - part)
	if at >= before {
		at += part
	}
	j := sc.above(n, at)
	if j == i { // by rounding
		j = (i + 1) % n
	}
	return a, int(sc.list[j]), rnd
}

// above returns the first of the n listed servers whose sum is above at, or the
// last.
func (sc *Scratch) above(n int, at float64) int {
	lo, hi := 0, n-1
	for lo < hi {
		if mid := (lo + hi) / 2; sc.sum[mid] > at {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo
}

// drawOne draws from a large set by rejection: any member with equal chance,
// turned down if it is the one not to be drawn (-1: none), not ready or, in
// proportion, for a weight below the greatest. What comes through has the same
// distribution as a draw from the list; -1 says that nothing came through.
func (s *Selector) drawOne(sc *Scratch, n int, live []*Live, not int, rnd uint64) (server int, next uint64) {
	top := s.maxWeight
	for _, p := range sc.scored[:sc.nscore] {
		top *= s.policies[p].maxScore
	}
	for _, a := range sc.said[:sc.nsaid] {
		top *= a.maxScore
	}
	var x uint64
	for range drawTries {
		rnd, x = random(rnd)
		server = nth(sc.cand[:s.words], int(x>>32*uint64(n)>>32))
		if server == not || !ready(live[server]) {
			continue
		}
		if w := s.weight(sc, server); w < top {
			rnd, x = random(rnd)
			if unit(x)*top >= w {
				continue
			}
		}
		return server, rnd
	}
	return -1, rnd
}

// random is splitmix64: a state and a number from it.
func random(state uint64) (next, x uint64) {
	state += 0x9e3779b97f4a7c15
	x = (state ^ state>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return state, x ^ x>>31
}

// unit maps a random number to [0, 1).
func unit(x uint64) float64 { return float64(x>>11) / (1 << 53) }

func ready(l *Live) bool { return State(l.State.Load()) == Ready }

func anyReady(set []uint64, live []*Live) bool {
	for i, word := range set {
		for ; word != 0; word &= word - 1 {
			if ready(live[i<<6+bits.TrailingZeros64(word)]) {
				return true
			}
		}
	}
	return false
}

func count(set []uint64) int {
	n := 0
	for _, word := range set {
		n += bits.OnesCount64(word)
	}
	return n
}

// nth returns the k-th member of the set, counted from 0.
func nth(set []uint64, k int) int {
	for i, word := range set {
		if n := bits.OnesCount64(word); k >= n {
			k -= n
			continue
		}
		for ; k > 0; k-- {
			word &= word - 1
		}
		return i<<6 + bits.TrailingZeros64(word)
	}
	return -1
}
