// SPDX-License-Identifier: Apache-2.0

package policies

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/weirgate/weir/policies/policypb"
	"github.com/weirgate/weir/policies/snapshot"
)

// FarmFromProto returns the farm of a message.
func FarmFromProto(p *policypb.Farm) Farm {
	f := Farm{Name: p.GetName()}
	for _, s := range p.GetServers() {
		f.Servers = append(f.Servers, Server{Name: s.GetName(), Address: s.GetAddress(), Weight: s.GetWeight(), Backup: s.GetBackup()})
	}
	return f
}

// FarmToProto returns the message of a farm.
func FarmToProto(f Farm) *policypb.Farm {
	p := &policypb.Farm{Name: f.Name}
	for _, s := range f.Servers {
		p.Servers = append(p.Servers, &policypb.Server{Name: s.Name, Address: s.Address, Weight: s.Weight, Backup: s.Backup})
	}
	return p
}

// SnapshotToProto returns the message of a snapshot, without its generation.
// Routes with the same servers share one set. Expires becomes the time that is
// left, in whole seconds.
func SnapshotToProto(s *Snapshot) *policypb.Snapshot {
	p := &policypb.Snapshot{}
	if s.Expires != 0 {
		left := time.Until(time.Unix(0, s.Expires))
		p.ValidMs = uint64(max(math.Ceil(left.Seconds()), 1)) * 1000
	}
	if s.Routes != nil {
		p.Routes = routesToProto(s.Routes)
	}
	if s.Affinity != nil {
		p.Affinity = affinityToProto(s.Affinity)
	}
	if s.Budgets != nil {
		p.Budgets = budgetsToProto(s.Budgets)
	}
	if s.Eligibility != nil {
		p.Eligibility = &policypb.Eligibility{}
		for _, e := range s.Eligibility.Servers {
			p.Eligibility.Servers = append(p.Eligibility.Servers, &policypb.EligibleServer{Server: e.Server, Eligible: e.Eligible, Reason: e.Reason})
		}
	}
	if s.Scores != nil {
		p.Scores = &policypb.Scores{}
		for _, e := range s.Scores.Servers {
			p.Scores.Servers = append(p.Scores.Servers, &policypb.ServerScore{Server: e.Server, Score: e.Score})
		}
	}
	return p
}

func routesToProto(in *Routes) *policypb.Routes {
	p := &policypb.Routes{}
	sets := map[string]uint32{}
	set := func(names []string) uint32 {
		key := strings.Join(names, "\x00")
		n, ok := sets[key]
		if !ok {
			n = uint32(len(p.Sets))
			sets[key] = n
			p.Sets = append(p.Sets, &policypb.ServerSet{Servers: names})
		}
		return n
	}
	for i := range in.Routes {
		r := &in.Routes[i]
		m := &policypb.Route{Host: r.Host, Path: r.Path, Prefix: r.Prefix}
		for _, f := range r.Fields {
			m.Fields = append(m.Fields, &policypb.FieldMatch{Field: &policypb.Field{Name: f.Field.Name, Cookie: f.Field.Cookie}, Value: f.Value})
		}
		switch {
		case r.Reject != 0:
			m.Action = &policypb.Route_Reject{Reject: &policypb.Reject{Status: uint32(r.Reject), RetryAfter: r.RetryAfter}}
		case r.Redirect != 0:
			m.Action = &policypb.Route_Redirect{Redirect: &policypb.Redirect{Status: uint32(r.Redirect), Location: r.Location}}
		default:
			m.Action = &policypb.Route_Set{Set: set(r.Servers)}
		}
		p.Routes = append(p.Routes, m)
	}
	if len(in.Default) > 0 {
		n := set(in.Default)
		p.DefaultSet = &n
	}
	return p
}

// SnapshotFromProto returns the snapshot of a message. received is when it
// came and expiry how long eligibility, budgets and scores hold at most; 0 is for ever.
// Whether the snapshot fits a farm is for snapshot.NewSelector to say.
func SnapshotFromProto(plugin string, p *policypb.Snapshot, received time.Time, expiry time.Duration) (*Snapshot, error) {
	s := &Snapshot{Plugin: plugin, Generation: p.GetGeneration(), Expires: Expires(p, received, expiry)}
	if p.GetRoutes() != nil {
		r, err := routesFromProto(plugin, p.GetRoutes())
		if err != nil {
			return nil, err
		}
		s.Routes = r
	}
	if p.GetAffinity() != nil {
		a, err := affinityFromProto(plugin, p.GetAffinity())
		if err != nil {
			return nil, err
		}
		s.Affinity = a
	}
	if p.GetBudgets() != nil {
		b, err := budgetsFromProto(plugin, p.GetBudgets())
		if err != nil {
			return nil, err
		}
		s.Budgets = b
	}
	if p.GetEligibility() != nil {
		s.Eligibility = &Eligibility{}
		for _, e := range p.GetEligibility().GetServers() {
			s.Eligibility.Servers = append(s.Eligibility.Servers, Eligible{Server: e.GetServer(), Eligible: e.GetEligible(), Reason: e.GetReason()})
		}
	}
	if p.GetScores() != nil {
		s.Scores = &Scores{}
		for _, e := range p.GetScores().GetServers() {
			s.Scores.Servers = append(s.Scores.Servers, Score{Server: e.GetServer(), Score: e.GetScore()})
		}
	}
	return s, nil
}

// Expires returns when what a message says ceases to hold, in nanoseconds since
// 1970, or 0 for never: routes and affinity never do.
func Expires(p *policypb.Snapshot, received time.Time, expiry time.Duration) int64 {
	if p.GetEligibility() == nil && p.GetScores() == nil && p.GetBudgets() == nil {
		return 0
	}
	if ms := p.GetValidMs(); ms > 0 && ms < math.MaxInt64/uint64(time.Millisecond) {
		if valid := time.Duration(ms) * time.Millisecond; expiry <= 0 || valid < expiry {
			expiry = valid
		}
	}
	if expiry <= 0 {
		return 0
	}
	return received.Add(expiry).UnixNano()
}

func routesFromProto(plugin string, p *policypb.Routes) (*Routes, error) {
	r := &Routes{Routes: make([]Route, 0, len(p.GetRoutes()))}
	sets := p.GetSets()
	for _, m := range p.GetRoutes() {
		route := Route{Host: m.GetHost(), Path: m.GetPath(), Prefix: m.GetPrefix()}
		for _, f := range m.GetFields() {
			route.Fields = append(route.Fields, FieldMatch{Field: Field{Name: f.GetField().GetName(), Cookie: f.GetField().GetCookie()}, Value: f.GetValue()})
		}
		fail := func(format string, args ...any) error {
			return &snapshot.Error{Plugin: plugin, Route: route.String(), Msg: fmt.Sprintf(format, args...)}
		}
		switch a := m.GetAction().(type) {
		case *policypb.Route_Set:
			if int64(a.Set) >= int64(len(sets)) {
				return nil, fail("names set %d of %d", a.Set, len(sets))
			}
			route.Servers = sets[a.Set].GetServers()
		case *policypb.Route_Reject:
			if st := a.Reject.GetStatus(); st < 400 || st > 599 {
				return nil, fail("rejects with status %d, which is not within 400 to 599", st)
			}
			route.Reject, route.RetryAfter = uint16(a.Reject.GetStatus()), a.Reject.GetRetryAfter()
		case *policypb.Route_Redirect:
			if st := a.Redirect.GetStatus(); st < 300 || st > 399 {
				return nil, fail("redirects with status %d", st)
			}
			route.Redirect, route.Location = uint16(a.Redirect.GetStatus()), a.Redirect.GetLocation()
		default:
			return nil, fail("has no action that this version knows")
		}
		r.Routes = append(r.Routes, route)
	}
	if p.DefaultSet != nil {
		n := p.GetDefaultSet()
		if int64(n) >= int64(len(sets)) {
			return nil, &snapshot.Error{Plugin: plugin, Route: "default", Msg: fmt.Sprintf("names set %d of %d", n, len(sets))}
		}
		r.Default = sets[n].GetServers()
	}
	return r, nil
}

func affinityToProto(in *Affinity) *policypb.Affinity {
	p := &policypb.Affinity{Hash: in.Hash, HashServers: in.Servers, Key: &policypb.AffinityKey{Bits4: uint32(in.Key.Bits4), Bits6: uint32(in.Key.Bits6)}}
	if f := in.Key.Field; f.Name != "" {
		p.Key.Field = &policypb.Field{Name: f.Name, Cookie: f.Cookie}
	}
	for _, e := range in.Table {
		p.Table = append(p.Table, &policypb.Pin{Value: e.Value, Server: e.Server})
	}
	return p
}

func affinityFromProto(plugin string, p *policypb.Affinity) (*Affinity, error) {
	k := p.GetKey()
	if k.GetBits4() > 32 || k.GetBits6() > 128 {
		return nil, &snapshot.Error{Plugin: plugin, Msg: fmt.Sprintf("has an affinity to %d bits of an IPv4 and %d of an IPv6 address", k.GetBits4(), k.GetBits6())}
	}
	a := &Affinity{
		Key:  AffinityKey{Field: Field{Name: k.GetField().GetName(), Cookie: k.GetField().GetCookie()}, Bits4: uint8(k.GetBits4()), Bits6: uint8(k.GetBits6())},
		Hash: p.GetHash(), Servers: p.GetHashServers(),
	}
	for _, e := range p.GetTable() {
		a.Table = append(a.Table, Pin{Value: e.GetValue(), Server: e.GetServer()})
	}
	return a, nil
}

func budgetsToProto(in *Budgets) *policypb.Budgets {
	p := &policypb.Budgets{}
	one := func(b *Budget) *policypb.Budget {
		return &policypb.Budget{Server: b.Server, BytesPerSecond: b.Rate, Burst: b.Burst, AtCap: policypb.AtCap(b.AtCap)}
	}
	for i := range in.Servers {
		p.Servers = append(p.Servers, one(&in.Servers[i]))
	}
	if in.Farm != nil {
		p.Farm = one(in.Farm)
	}
	return p
}

func budgetsFromProto(plugin string, p *policypb.Budgets) (*Budgets, error) {
	out := &Budgets{}
	one := func(b *policypb.Budget) (Budget, error) {
		if c := b.GetAtCap(); c < policypb.AtCap_AT_CAP_SKIP || c > policypb.AtCap_AT_CAP_IGNORE {
			return Budget{}, &snapshot.Error{Plugin: plugin, Server: b.GetServer(), Msg: fmt.Sprintf("has a budget with at_cap %d, which this version does not know", c)}
		}
		return Budget{Server: b.GetServer(), Rate: b.GetBytesPerSecond(), Burst: b.GetBurst(), AtCap: snapshot.AtCap(b.GetAtCap())}, nil
	}
	for _, b := range p.GetServers() {
		v, err := one(b)
		if err != nil {
			return nil, err
		}
		out.Servers = append(out.Servers, v)
	}
	if p.GetFarm() != nil {
		v, err := one(p.GetFarm())
		if err != nil {
			return nil, err
		}
		out.Farm = &v
	}
	return out, nil
}
