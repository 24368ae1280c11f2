// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"fmt"
	"math/bits"
	"strings"
)

// Step is one step of a choice, for people.
type Step struct {
	Policy     string // the policy's name; "" where the farm itself decides
	Text       string
	Candidates int // ready servers left behind this step
}

// Explain makes the choice that Choose would make from the same arguments and
// returns every step on the way; the last one is the outcome. It runs the code
// of Choose, with a recorder, so that the two cannot differ. It allocates and
// is not for the packet path.
func (s *Selector) Explain(r *Request, live []*Live, tried *Tried, rnd uint64) []Step {
	rec := &recorder{}
	c := s.decide(r, live, tried, rnd, new(Scratch), rec)
	text := ""
	switch c.Kind {
	case ChoiceServer:
		text = fmt.Sprintf("server %s", s.servers[c.Server].Name)
	case ChoiceReject:
		text = fmt.Sprintf("reject %d", c.Status)
		if c.RetryAfter > 0 {
			text += fmt.Sprintf(", retry after %d s", c.RetryAfter)
		}
	case ChoiceRedirect:
		text = fmt.Sprintf("redirect %d to %s", c.Status, c.Location)
	case ChoiceWait:
		text = "wait and ask again"
	case ChoiceAsk:
		text = "ask the plugin, then go on with its answer"
	}
	name := ""
	if c.Policy != NoPolicy {
		name = s.policies[c.Policy].name
	}
	rec.add(name, fmt.Sprintf("%s (%s)", text, c.Reason))
	return rec.steps
}

// recorder collects the steps of one choice. Every method does nothing on a nil
// recorder, which is what the packet path has.
type recorder struct {
	s         *Selector
	remaining int
	steps     []Step
}

func (c *recorder) add(policy, text string) {
	c.steps = append(c.steps, Step{Policy: policy, Text: text, Candidates: c.remaining})
}

func (c *recorder) start(s *Selector, live []*Live, tried *Tried, cand []uint64) {
	if c == nil {
		return
	}
	c.s = s
	c.remaining = readyCount(cand, live)
	var out []string
	for i, sv := range s.servers {
		if st := State(live[i].State.Load()); st != Ready {
			out = append(out, sv.Name+" "+st.String())
		} else if tried != nil && tried.Has(i) {
			out = append(out, sv.Name+" tried")
		}
	}
	c.add("", fmt.Sprintf("%d of %d servers are candidates%s", c.remaining, len(s.servers), enumerate(": not ", out)))
}

func (c *recorder) pending(p *policy) {
	if c != nil {
		c.add(p.name, "has not sent its routes yet")
	}
}

func (c *recorder) noRoute(p *policy) {
	if c != nil {
		c.add(p.name, "no route matches"+onEmptyText(p))
	}
}

func (c *recorder) route(p *policy, t *target) {
	if c == nil {
		return
	}
	switch t.kind {
	case ChoiceServer:
		set := p.routes.sets[t.set : t.set+p.routes.words]
		c.add(p.name, fmt.Sprintf("route %s: servers %s", t.name, strings.Join(c.names(set), " ")))
	case ChoiceReject:
		c.add(p.name, fmt.Sprintf("route %s: reject %d", t.name, t.status))
	case ChoiceRedirect:
		c.add(p.name, fmt.Sprintf("route %s: redirect %d", t.name, t.status))
	}
}

func (c *recorder) emptied(p *policy) {
	if c != nil {
		c.add(p.name, "leaves no candidate"+onEmptyText(p))
	}
}

func (c *recorder) left(p *policy, cand []uint64, live []*Live) {
	if c != nil {
		c.remaining = readyCount(cand, live)
		c.steps[len(c.steps)-1].Candidates = c.remaining
	}
}

func (c *recorder) expired(p *policy) {
	if c == nil {
		return
	}
	switch {
	case p.missing:
		c.add(p.name, "has not sent a snapshot yet: skipped")
	case p.eligible != nil || p.scores != nil || p.budgets != nil:
		c.add(p.name, fmt.Sprintf("generation %d has expired: skipped", p.gen))
	}
}

func (c *recorder) eligibility(p *policy, cand []uint64) {
	if c == nil {
		return
	}
	var out []string
	for i, sv := range c.s.servers {
		if cand[i>>6]&(1<<(i&63)) != 0 && p.eligible[i>>6]&(1<<(i&63)) == 0 {
			name := sv.Name
			if p.reasons[i] != "" {
				name += " (" + p.reasons[i] + ")"
			}
			out = append(out, name)
		}
	}
	if len(out) == 0 {
		c.add(p.name, "all are eligible")
	} else {
		c.add(p.name, "not eligible"+enumerate(": ", out))
	}
}

func (c *recorder) scores(p *policy, cand []uint64) {
	if c == nil {
		return
	}
	var out []string
	for i, sv := range c.s.servers {
		if cand[i>>6]&(1<<(i&63)) != 0 {
			out = append(out, fmt.Sprintf("%s %.3g", sv.Name, p.scores[i]))
		}
	}
	c.add(p.name, "scores"+enumerate(": ", out))
}

func (c *recorder) affinity(p *policy, server int, present bool) {
	switch {
	case c == nil:
	case server >= 0:
		c.add(p.name, fmt.Sprintf("%s belongs to server %s", p.affinity.name, c.s.servers[server].Name))
	case present:
		c.add(p.name, fmt.Sprintf("%s belongs to no server", p.affinity.name))
	default:
		c.add(p.name, fmt.Sprintf("the request has no %s", p.affinity.name))
	}
}

func (c *recorder) pinned(p *policy, server int) {
	if c != nil {
		c.add(p.name, fmt.Sprintf("server %s is a candidate: taken", c.s.servers[server].Name))
	}
}

func (c *recorder) unpinned(p *policy, server int) {
	if c != nil {
		c.add(p.name, fmt.Sprintf("server %s is no candidate: the affinity is skipped", c.s.servers[server].Name))
	}
}

func (c *recorder) answer(p *policy, a *CompiledAnswer) {
	switch {
	case c == nil:
	case a.failed:
		c.add(p.name, "has not answered in time")
	default:
		c.add(p.name, "answers: "+a.text)
	}
}

func (c *recorder) budget(p *policy) {
	if c != nil {
		n := len(p.budgets.servers)
		if p.budgets.farm != nil {
			n++
		}
		c.add(p.name, fmt.Sprintf("budgets: %d", n))
	}
}

func (c *recorder) debt(who string, level float64, b *bucket) {
	if c != nil {
		c.steps[len(c.steps)-1].Text += fmt.Sprintf("; %s is %.0f bytes in debt (%s)", who, -level, b.atCap)
	}
}

func (c *recorder) shadow(p *policy, agrees bool) {
	if c == nil {
		return
	}
	text := "shadow: would have decided otherwise"
	if agrees {
		text = "shadow: agrees"
	}
	c.add(p.name, text)
}

func (c *recorder) noServer() {
	if c != nil {
		c.add("", "no server of the farm is left")
	}
}

func (c *recorder) noBackup(cand []uint64, live []*Live) {
	if c != nil {
		c.remaining = readyCount(cand, live)
		c.add("", "backup servers are not needed")
	}
}

func (c *recorder) picked(s *Selector, sc *Scratch, a, b, take int, live []*Live) {
	if c == nil {
		return
	}
	show := func(i int) string {
		return fmt.Sprintf("%s (active %d, waiting %d, idle %d, weight %.4g)", s.servers[i].Name,
			live[i].Active.Load(), live[i].Waiting.Load(), live[i].Idle.Load(), s.weight(sc, i))
	}
	if a == b {
		c.add("", "the only one to draw: "+show(a))
		return
	}
	c.add("", fmt.Sprintf("drawn: %s and %s: %s", show(a), show(b), s.servers[take].Name))
}

func (c *recorder) names(set []uint64) []string {
	var out []string
	for i, word := range set {
		for ; word != 0; word &= word - 1 {
			out = append(out, c.s.servers[i<<6+bits.TrailingZeros64(word)].Name)
		}
	}
	return out
}

func onEmptyText(p *policy) string {
	switch p.onEmpty {
	case OnEmptyIgnore:
		return ": ignored"
	case OnEmptyWait:
		return ": wait"
	}
	return ""
}

func enumerate(head string, items []string) string {
	if len(items) == 0 {
		return ""
	}
	const most = 20
	if n := len(items); n > most {
		items = append(items[:most:most], fmt.Sprintf("and %d more", n-most))
	}
	return head + strings.Join(items, ", ")
}

func readyCount(set []uint64, live []*Live) int {
	n := 0
	for i, word := range set {
		for ; word != 0; word &= word - 1 {
			if ready(live[i<<6+bits.TrailingZeros64(word)]) {
				n++
			}
		}
	}
	return n
}
