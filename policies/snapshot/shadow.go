// SPDX-License-Identifier: Apache-2.0

package snapshot

// compare lets the shadows among the policies say what they think of a choice
// that was made without them. A shadow agrees if it would have allowed the
// choice; it is not asked whether it would have made the same one. One that has
// nothing to compare with is left out.
func (s *Selector) compare(c *Choice, r *Request, live []*Live, rnd uint64, sc *Scratch, rec *recorder) {
	for i := range s.policies {
		p := &s.policies[i]
		if !p.shadow || p.missing || p.pending {
			continue
		}
		opinion, agrees := s.opinion(p, i, c, r, live, rnd, sc)
		if !opinion {
			continue
		}
		c.Compared |= 1 << i
		if !agrees {
			c.Disagreed |= 1 << i
		}
		rec.shadow(p, agrees)
	}
}

// opinion returns whether the shadow has something to say about the choice,
// and whether it would have allowed it.
func (s *Selector) opinion(p *policy, index int, c *Choice, r *Request, live []*Live, rnd uint64, sc *Scratch) (opinion, agrees bool) {
	if p.routes != nil {
		kind, status, set := ChoiceReject, uint16(404), []uint64(nil)
		v := p.routes.find(r, sc)
		switch {
		case v >= 0:
			t := &p.routes.targets[v]
			kind, status = t.kind, t.status
			if kind == ChoiceServer {
				set = p.routes.sets[t.set : t.set+s.words]
			}
		case p.onEmpty == OnEmptyIgnore || p.onEmpty == OnEmptyWait:
			kind = ChoiceServer // it would not have decided
		}
		routed := c.Reason == ReasonNoRoute || c.Reason == ReasonRouteReject || c.Reason == ReasonRouteRedirect
		switch {
		case c.Kind == ChoiceServer:
			opinion = true
			if kind != ChoiceServer || set != nil && set[c.Server>>6]&(1<<(c.Server&63)) == 0 {
				return true, false
			}
		case routed:
			opinion = true
			if kind != c.Kind || status != c.Status {
				return true, false
			}
		}
	}
	if c.Kind != ChoiceServer {
		return opinion, opinion
	}
	n := int(c.Server)
	if p.affinity != nil {
		if at, _ := p.affinity.server(r); at >= 0 && sc.cand[at>>6]&(1<<(at&63)) != 0 && ready(live[at]) {
			opinion = true
			if at != n {
				return true, false
			}
		}
	}
	if p.expires != 0 && r.Now >= p.expires {
		return opinion, opinion
	}
	if p.eligible != nil {
		opinion = true
		if p.eligible[n>>6]&(1<<(n&63)) == 0 {
			return true, false
		}
	}
	if p.budgets != nil {
		opinion = true
		if p.budgets.inDebt(n, r, live) {
			return true, false
		}
	}
	if p.scores != nil && c.Reason == ReasonPicked {
		opinion = true
		sc.scored[sc.nscore] = uint8(index)
		sc.nscore++
		other := s.pick(sc, live, rnd, nil)
		sc.nscore--
		if other.Server != c.Server {
			return true, false
		}
	}
	return opinion, opinion
}
