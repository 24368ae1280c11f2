// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"errors"
	"fmt"
	"math"
	"slices"
)

// Selector is the compiled form of a farm's servers and policies. It never
// changes and may be used by any number of goroutines, each with a Scratch of
// its own.
type Selector struct {
	servers   []ServerConfig
	weights   []float64
	maxWeight float64
	words     int      // words of a bit set over the servers
	all       []uint64 // every server
	backup    []uint64 // the backup servers
	policies  []policy
	fields    []string       // wanted of a request, in the order of Request.Fields
	budgeted  []uint64       // the servers whose bytes count against a budget
	shadows   bool           // some policy is one
	byName    map[string]int // for compiling only
}

// policy is one compiled policy.
type policy struct {
	name    string
	gen     uint64
	onEmpty OnEmpty
	missing bool // no snapshot yet
	pending bool // a route policy without routes
	shadow  bool // decides nothing

	source   *Routes     // what routes was compiled from
	routes   *routeTable // nil: none
	pinned   *Affinity   // what affinity was compiled from
	affinity *affinityTable
	expires  int64     // of what follows; 0: never
	eligible []uint64  // bit set; nil: no word about it
	reasons  []string  // by server: why not eligible
	scores   []float64 // by server; nil: none
	maxScore float64
	budgets  *budgetTable

	ask      *askRef // nil: the plugin does not want to be asked
	fallback Fallback
}

// Error says which word of which plugin does not fit the farm.
type Error struct {
	Plugin string
	Route  string // the route as host and path; "" where it is not about one
	Server string // the server named; "" where it is not about one
	Msg    string
}

func (e *Error) Error() string {
	s := fmt.Sprintf("plugin %q: ", e.Plugin)
	if e.Route != "" {
		s += fmt.Sprintf("route %q: ", e.Route)
	}
	if e.Server != "" {
		s += fmt.Sprintf("server %q ", e.Server)
	}
	return s + e.Msg
}

const notOfFarm = "is not a server of the farm"

// NewSelector compiles a farm's servers and its policies, in the farm's order.
// It fails with an *Error where a snapshot does not fit the farm; the error
// names the plugin, the route and the server. Both slices are copied, the
// snapshots are not.
func NewSelector(servers []ServerConfig, policies []Policy) (*Selector, error) {
	if len(servers) > MaxServers {
		return nil, fmt.Errorf("a farm has at most %d servers, this one has %d", MaxServers, len(servers))
	}
	n := len(servers)
	s := &Selector{
		servers: append([]ServerConfig(nil), servers...),
		weights: make([]float64, n),
		words:   (n + 63) / 64,
		byName:  make(map[string]int, n),
	}
	s.all = make([]uint64, s.words)
	s.backup = make([]uint64, s.words)
	for i, c := range servers {
		if _, twice := s.byName[c.Name]; twice {
			return nil, fmt.Errorf("server %q is there twice", c.Name)
		}
		if c.Weight > 256 {
			return nil, fmt.Errorf("server %q: weight %d is not within 1 to 256", c.Name, c.Weight)
		}
		s.byName[c.Name] = i
		s.weights[i] = float64(max(c.Weight, 1))
		s.maxWeight = max(s.maxWeight, s.weights[i])
		setBit(s.all, i)
		if c.Backup {
			setBit(s.backup, i)
		}
	}
	if err := s.compile(policies, nil); err != nil {
		return nil, err
	}
	return s, nil
}

// With returns a Selector for the same servers with other policies. Routes that
// s already compiled are taken over, so that a plugin which sends new scores
// every second does not cost a table of ten thousand routes each time, and so
// are the levels of budgets.
func (s *Selector) With(policies []Policy) (*Selector, error) {
	c := *s
	// What was compiled before names fields by their places, so these stay
	// while there is room.
	c.fields = slices.Clip(s.fields)
	if err := c.compile(policies, s.policies); err != nil {
		if len(s.fields) == 0 {
			return nil, err
		}
		c.fields = nil
		if err := c.compile(policies, nil); err != nil {
			return nil, err
		}
	}
	c.Adopt(s)
	return &c, nil
}

// Adopt takes over the levels of budgets from the Selector that s replaces,
// which may have had other servers. It must come before s is in use.
func (s *Selector) Adopt(old *Selector) {
	for i := range s.policies {
		p := &s.policies[i]
		if p.budgets == nil || old == nil {
			continue
		}
		for j := range old.policies {
			if old.policies[j].name == p.name {
				p.budgets.adopt(old.policies[j].budgets)
			}
		}
	}
}

// Servers returns the farm's servers by number. The caller must not change them.
func (s *Selector) Servers() []ServerConfig { return s.servers }

// Missing returns the names of the policies that sent no snapshot yet. A farm
// takes new connections when there is none left.
func (s *Selector) Missing() []string {
	var names []string
	for i := range s.policies {
		if p := &s.policies[i]; !p.shadow && (p.missing || p.pending) {
			names = append(names, s.policies[i].name)
		}
	}
	return names
}

func (s *Selector) compile(policies []Policy, before []policy) error {
	if len(policies) > MaxPolicies {
		return fmt.Errorf("a farm has at most %d policies, this one has %d", MaxPolicies, len(policies))
	}
	s.policies = make([]policy, len(policies))
	s.shadows = false
	s.budgeted = nil
	var errs []error
	asks := 0
	for i := range policies {
		if err := s.compilePolicy(&s.policies[i], &policies[i], before); err != nil {
			errs = append(errs, err)
		}
		p := &s.policies[i]
		s.shadows = s.shadows || p.shadow
		if p.ask != nil {
			if asks++; asks > MaxAsks {
				errs = append(errs, &Error{Plugin: p.name, Msg: fmt.Sprintf("is one of more than %d that want to be asked", MaxAsks)})
			}
		}
		s.countBudgets(p.budgets)
	}
	return errors.Join(errs...)
}

// countBudgets notes which servers have a budget.
func (s *Selector) countBudgets(t *budgetTable) {
	if t == nil {
		return
	}
	if s.budgeted == nil {
		s.budgeted = make([]uint64, s.words)
	}
	for _, n := range t.index {
		setBit(s.budgeted, int(n))
	}
	if t.farm != nil {
		copy(s.budgeted, s.all)
	}
}

func (s *Selector) compilePolicy(out *policy, in *Policy, before []policy) error {
	out.name, out.onEmpty = in.Name, in.OnEmpty
	out.shadow, out.fallback = in.Shadow, in.Fallback
	snap := in.Snapshot
	out.missing = snap == nil
	out.pending = in.RoutePolicy && (snap == nil || snap.Routes == nil)
	// A shadow is compared and never waited for, so it is not asked.
	if in.Ask != nil && !in.Shadow {
		var err error
		if out.ask, err = s.compileAsk(in.Name, in.Ask); err != nil {
			return err
		}
	}
	if snap == nil {
		return nil
	}
	out.gen, out.expires = snap.Generation, snap.Expires
	if snap.Routes != nil {
		out.source = snap.Routes
		for i := range before {
			if before[i].source == snap.Routes {
				out.routes = before[i].routes
			}
		}
		if out.routes == nil {
			t, err := s.compileRoutes(in.Name, snap.Routes)
			if err != nil {
				return err
			}
			out.routes = t
		}
	}
	if snap.Affinity != nil {
		out.pinned = snap.Affinity
		for i := range before {
			if before[i].pinned == snap.Affinity {
				out.affinity = before[i].affinity
			}
		}
		if out.affinity == nil {
			t, err := s.compileAffinity(in.Name, snap.Affinity)
			if err != nil {
				return err
			}
			out.affinity = t
		}
	}
	if snap.Budgets != nil {
		t, err := s.compileBudgets(in.Name, snap.Budgets)
		if err != nil {
			return err
		}
		out.budgets = t
	}
	if snap.Eligibility != nil {
		out.eligible = append([]uint64(nil), s.all...)
		out.reasons = make([]string, len(s.servers))
		for _, e := range snap.Eligibility.Servers {
			i, ok := s.byName[e.Server]
			if !ok {
				return &Error{Plugin: in.Name, Server: e.Server, Msg: notOfFarm}
			}
			if !e.Eligible {
				out.eligible[i>>6] &^= 1 << (i & 63)
				out.reasons[i] = e.Reason
			}
		}
	}
	if snap.Scores != nil {
		out.scores = make([]float64, len(s.servers))
		for i := range out.scores {
			out.scores[i] = 1
		}
		for _, e := range snap.Scores.Servers {
			i, ok := s.byName[e.Server]
			if !ok {
				return &Error{Plugin: in.Name, Server: e.Server, Msg: notOfFarm}
			}
			if math.IsNaN(e.Score) {
				return &Error{Plugin: in.Name, Server: e.Server, Msg: "has a score that is not a number"}
			}
			out.scores[i] = min(max(e.Score, MinScore), MaxScore)
		}
		for _, v := range out.scores {
			out.maxScore = max(out.maxScore, v)
		}
	}
	return nil
}

// Keep returns the snapshot without the servers that the function does not
// know, for the time between the removal of a server and the plugin's next
// snapshot. A route whose servers are all gone stays and has none. s is
// returned as it is when nothing is to be left out.
func (s *Snapshot) Keep(known func(server string) bool) *Snapshot {
	changed := false
	names := func(in []string) []string {
		var out []string
		for i, name := range in {
			switch ok := known(name); {
			case !ok && out == nil:
				changed = true
				out = append(make([]string, 0, len(in)), in[:i]...)
			case ok && out != nil:
				out = append(out, name)
			}
		}
		if out == nil {
			return in
		}
		return out
	}
	c := *s
	if s.Routes != nil {
		r := Routes{Default: names(s.Routes.Default), Routes: append([]Route(nil), s.Routes.Routes...)}
		for i := range r.Routes {
			r.Routes[i].Servers = names(r.Routes[i].Servers)
		}
		if changed {
			c.Routes = &r
		}
	}
	if s.Eligibility != nil {
		e := &Eligibility{}
		for _, v := range s.Eligibility.Servers {
			if known(v.Server) {
				e.Servers = append(e.Servers, v)
			}
		}
		if len(e.Servers) != len(s.Eligibility.Servers) {
			changed, c.Eligibility = true, e
		}
	}
	if a := s.Affinity; a != nil {
		n := *a
		n.Table = nil
		for _, p := range a.Table {
			if known(p.Server) {
				n.Table = append(n.Table, p)
			}
		}
		before := changed
		changed = len(n.Table) != len(a.Table)
		n.Servers = names(a.Servers)
		if len(a.Servers) > 0 && len(n.Servers) == 0 {
			n.Hash = false // an empty list would stand for all
		}
		if changed {
			c.Affinity = &n
		}
		changed = changed || before
	}
	if b := s.Budgets; b != nil {
		n := *b
		n.Servers = nil
		for _, v := range b.Servers {
			if known(v.Server) {
				n.Servers = append(n.Servers, v)
			}
		}
		if len(n.Servers) != len(b.Servers) {
			changed, c.Budgets = true, &n
		}
	}
	if s.Scores != nil {
		e := &Scores{}
		for _, v := range s.Scores.Servers {
			if known(v.Server) {
				e.Servers = append(e.Servers, v)
			}
		}
		if len(e.Servers) != len(s.Scores.Servers) {
			changed, c.Scores = true, e
		}
	}
	if !changed {
		return s
	}
	return &c
}

func setBit(set []uint64, i int) { set[i>>6] |= 1 << (i & 63) }
