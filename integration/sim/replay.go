// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"fmt"
	"strings"
)

// Explain runs a scenario that fails once more with a trace, after having made
// it as small as it gets, and tells the story.
func Explain(s *Scenario, h Hooks, lines int) string {
	res := Run(s, h)
	if res.Violation == nil {
		return "the run does not fail"
	}
	small := shrink(s, h, res.Violation.Invariant)
	w := NewWorld(small, h)
	w.trace = &trace{}
	w.Run()
	var b strings.Builder
	fmt.Fprintf(&b, "%v\n", res.Violation)
	if w.viol == nil {
		b.WriteString("the smaller run does not fail; this is the simulator's fault\n")
		return b.String()
	}
	fmt.Fprintf(&b, "made smaller: %d of %d connections, %d servers\n%v\n", len(small.Conns), len(s.Conns), len(small.Servers), w.viol)
	for i := range small.Conns {
		c := &small.Conns[i]
		fmt.Fprintf(&b, "client %d: end %d abort %d(%d,%d) pipeline %d opt %+v\n", i, c.End, c.Abort, c.AbortSent, c.AbortRead, c.Pipeline, c.Opt)
		for k := range c.Requests {
			fmt.Fprintf(&b, "  request %d: %+v\n", k, c.Requests[k])
		}
	}
	for i := range small.Servers {
		fmt.Fprintf(&b, "server %d: %+v\n", i, small.Servers[i])
	}
	fmt.Fprintf(&b, "wires %+v\n", small.Wires)
	b.WriteString(w.Ladder(lines))
	return b.String()
}

// maxShrink bounds the runs that making a scenario smaller may take.
const maxShrink = 400

// shrink leaves out what is not needed for the failure: connections, requests,
// impairments, servers. A connection keeps its own random numbers, because they
// follow from its index: what is left out is only emptied.
func shrink(s *Scenario, h Hooks, invariant string) *Scenario {
	best := s
	runs := 0
	try := func(change func(*Scenario)) {
		if runs++; runs > maxShrink {
			return
		}
		c := best.clone()
		change(c)
		if r := Run(c, h); r.Violation != nil && r.Violation.Invariant == invariant {
			best = c
		}
	}
	for i := len(s.Conns) - 1; i >= 0; i-- {
		used := false
		for k := range best.Conns {
			used = used || best.Conns[k].After == i+1
		}
		if !used && len(best.Conns) > 1 {
			try(func(c *Scenario) {
				c.Conns = append(c.Conns[:i], c.Conns[i+1:]...)
				for k := range c.Conns {
					if c.Conns[k].After > i+1 {
						c.Conns[k].After--
					}
				}
			})
		}
	}
	for i := range best.Conns {
		for len(best.Conns[i].Requests) > 1 {
			n := len(best.Conns[i].Requests)
			try(func(c *Scenario) { c.Conns[i].Requests = c.Conns[i].Requests[:n-1] })
			if len(best.Conns[i].Requests) == n {
				break
			}
		}
		for len(best.Conns[i].Requests) > 1 {
			n := len(best.Conns[i].Requests)
			try(func(c *Scenario) { c.Conns[i].Requests = c.Conns[i].Requests[1:] })
			if len(best.Conns[i].Requests) == n {
				break
			}
		}
	}
	for d := range best.Wires {
		for _, f := range []func(*Wire){
			func(w *Wire) { w.Loss = 0 }, func(w *Wire) { w.Duplicate = 0 }, func(w *Wire) { w.Reorder = 0 },
			func(w *Wire) { w.Corrupt = 0 }, func(w *Wire) { w.Cut = 0 }, func(w *Wire) { w.Join = 0 },
			func(w *Wire) { w.Partial = 0 }, func(w *Wire) { w.Jitter = 0 },
		} {
			try(func(c *Scenario) { f(&c.Wires[d]) })
		}
	}
	for len(best.Servers) > 1 {
		n := len(best.Servers)
		try(func(c *Scenario) { c.Servers = c.Servers[:n-1] })
		if len(best.Servers) == n {
			break
		}
	}
	return best
}

// clone copies a scenario so far that a change of the copy leaves the original.
func (s *Scenario) clone() *Scenario {
	c := *s
	c.Conns = append([]ConnPlan(nil), s.Conns...)
	for i := range c.Conns {
		c.Conns[i].Requests = append([]ReqPlan(nil), s.Conns[i].Requests...)
	}
	c.Servers = append([]ServerPlan(nil), s.Servers...)
	return &c
}
