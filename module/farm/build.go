// SPDX-License-Identifier: Apache-2.0

package farm

import (
	"fmt"
	"math"
	"net/netip"
	"slices"

	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/policies/snapshot"
)

// Spec describes a generation in plain data.
type Spec struct {
	SNIPs []netip.Addr
	Farms []FarmSpec
}

// FarmSpec describes one farm.
type FarmSpec struct {
	Name      string
	VIPs      []netip.AddrPort
	Servers   []ServerSpec
	Pool      PoolLimits
	Timeouts  Timeouts
	Limits    Limits
	Forwarded ForwardedMode
	// ForwardedTrust and RouteSafety are as in Farm.
	ForwardedTrust []netip.Prefix
	RouteSafety    RouteSafety

	// Policies are the farm's policies in their order, with the snapshots that
	// are at hand. If they are the same as before, but without snapshots, and
	// the servers are the same too, the previous selector is taken over;
	// otherwise a new one is compiled from them.
	Policies []snapshot.Policy
}

// ServerSpec describes one server.
type ServerSpec struct {
	Name     string
	Endpoint netip.AddrPort
	Weight   uint32 // 0 means 1
	Backup   bool
}

// Error says what in a Spec is wrong.
type Error struct {
	Farm   string // empty if it is not about a farm
	Server string // empty if it is not about a server
	Msg    string
}

func (e *Error) Error() string {
	switch {
	case e.Server != "":
		return fmt.Sprintf("farm %q: server %q: %s", e.Farm, e.Server, e.Msg)
	case e.Farm != "":
		return fmt.Sprintf("farm %q: %s", e.Farm, e.Msg)
	}
	return e.Msg
}

// serverKey is what makes a server the same one in the next generation.
type serverKey struct {
	farm, name string
	endpoint   packet.Endpoint
}

// Build makes the generation that follows prev (nil for the first one). A farm
// keeps its ID and counters while its name lives, a server while its farm,
// name and address do; one that comes back before it was forgotten is the same
// one again. Neither prev nor anything that it shares is changed, so an error
// leaves everything as it was. The error is an *Error, or wraps a
// *snapshot.Error where a policy's snapshot does not fit the servers.
//
// Generations must follow each other in one line: prev is the one in use.
func Build(prev *DB, spec Spec) (*DB, error) {
	if prev == nil {
		prev = &DB{}
	}
	b := builder{
		prev: prev,
		db: &DB{
			Generation: prev.Generation + 1,
			snips:      make(map[packet.Addr]struct{}, len(spec.SNIPs)),
			vips:       map[packet.Endpoint]*Farm{},
			nextFarm:   prev.nextFarm,
			nextServer: prev.nextServer,
		},
		oldFarms:   map[string]*Farm{},
		oldServers: map[serverKey]*Server{},
		farms:      map[uint16]*Farm{},
		servers:    map[uint16]*Server{},
	}
	for _, f := range prev.farms {
		if f != nil {
			b.oldFarms[f.Name] = f
		}
	}
	for _, s := range prev.servers {
		if s != nil {
			b.oldServers[serverKey{s.Farm.Name, s.Name, s.Endpoint}] = s
		}
	}
	for _, a := range spec.SNIPs {
		b.db.snips[packet.AddrFrom(a)] = struct{}{}
	}
	names := map[string]bool{}
	for i := range spec.Farms {
		if names[spec.Farms[i].Name] {
			return nil, &Error{Farm: spec.Farms[i].Name, Msg: "there are two farms of this name"}
		}
		names[spec.Farms[i].Name] = true
		if err := b.farm(&spec.Farms[i], spec.SNIPs); err != nil {
			return nil, err
		}
	}
	b.drain()
	b.db.index(b.farms, b.servers)
	return b.db, nil
}

type builder struct {
	prev, db   *DB
	oldFarms   map[string]*Farm
	oldServers map[serverKey]*Server
	farms      map[uint16]*Farm // of the new generation, by ID
	servers    map[uint16]*Server
}

func (b *builder) farm(spec *FarmSpec, snips []netip.Addr) error {
	fail := func(msg string, args ...any) error {
		return &Error{Farm: spec.Name, Msg: fmt.Sprintf(msg, args...)}
	}
	switch {
	case spec.Name == "":
		return &Error{Msg: "a farm has no name"}
	case len(spec.VIPs) == 0:
		return fail("it has no VIP")
	case len(spec.Servers) > snapshot.MaxServers:
		return fail("it has %d servers, and %d is the most", len(spec.Servers), snapshot.MaxServers)
	}
	f := &Farm{
		Name: spec.Name, Generation: b.db.Generation,
		Pool: spec.Pool, Timeouts: spec.Timeouts, Limits: spec.Limits, Forwarded: spec.Forwarded,
		ForwardedTrust: slices.Clone(spec.ForwardedTrust), RouteSafety: spec.RouteSafety,
		Policies: slices.Clone(spec.Policies),
	}
	old := b.oldFarms[spec.Name]
	if old != nil {
		f.ID, f.Stats = old.ID, old.Stats
	} else {
		id, ok := nextID(&b.db.nextFarm, func(id uint16) bool { return b.farms[id] != nil || b.prev.FarmByID(id) != nil })
		if !ok {
			return fail("there is no farm number left")
		}
		f.ID, f.Stats = id, new(FarmStats)
	}

	is4 := spec.VIPs[0].Addr().Unmap().Is4()
	for _, v := range spec.VIPs {
		ep := packet.EndpointFrom(v)
		if !v.IsValid() || v.Port() == 0 || ep.Addr.Is4() != is4 {
			return fail("the VIP %s is not a port of an address of the farm's family", v)
		}
		if other := b.db.vips[ep]; other != nil {
			return fail("the VIP %s is taken by farm %q", v, other.Name)
		}
		b.db.vips[ep] = f
		f.VIPs = append(f.VIPs, ep)
	}
	for _, a := range snips {
		if a.Unmap().Is4() == is4 {
			f.SNIPs = append(f.SNIPs, packet.AddrFrom(a))
		}
	}
	if len(f.SNIPs) == 0 {
		return fail("there is no SNIP of its family")
	}

	configs := make([]snapshot.ServerConfig, 0, len(spec.Servers))
	for i := range spec.Servers {
		s, err := b.server(f, &spec.Servers[i], i)
		if err != nil {
			return err
		}
		f.Servers = append(f.Servers, s)
		f.Lives = append(f.Lives, s.Live)
		configs = append(configs, snapshot.ServerConfig{Name: s.Name, Weight: s.Weight, Backup: s.Backup})
	}

	sel := keptSelector(old, spec.Policies, configs)
	if sel == nil {
		var err error
		if sel, err = snapshot.NewSelector(configs, spec.Policies); err != nil {
			return fmt.Errorf("farm %q: %w", spec.Name, err)
		}
		if old != nil {
			sel.Adopt(old.Selector.Load())
		}
	}
	if err := f.SetSelector(sel); err != nil {
		return err
	}
	for i := range f.Policies {
		st := old.policyStats(f.Policies[i].Name)
		if st == nil {
			st = new(PolicyStats)
		}
		f.PolicyStats = append(f.PolicyStats, st)
	}
	b.farms[f.ID] = f
	b.db.Farms = append(b.db.Farms, f)
	return nil
}

// policyStats returns the counters of a policy by its name, nil if there are
// none. f may be nil.
func (f *Farm) policyStats(name string) *PolicyStats {
	if f == nil {
		return nil
	}
	for i := range f.Policies {
		if f.Policies[i].Name == name {
			return f.PolicyStats[i]
		}
	}
	return nil
}

// keptSelector returns the selector of the previous generation if it still is
// what servers and policies ask for, else nil.
func keptSelector(old *Farm, policies []snapshot.Policy, servers []snapshot.ServerConfig) *snapshot.Selector {
	if old == nil || old.Removed {
		return nil
	}
	sel := old.Selector.Load()
	if !slices.Equal(sel.Servers(), servers) {
		return nil
	}
	same := slices.EqualFunc(old.Policies, policies, func(o, n snapshot.Policy) bool {
		return n.Snapshot == nil && o.Name == n.Name && o.OnEmpty == n.OnEmpty && o.RoutePolicy == n.RoutePolicy &&
			o.Shadow == n.Shadow && o.Fallback == n.Fallback && o.Ask.Equal(n.Ask)
	})
	if !same {
		return nil
	}
	return sel
}

func (b *builder) server(f *Farm, spec *ServerSpec, index int) (*Server, error) {
	fail := func(msg string, args ...any) error {
		return &Error{Farm: f.Name, Server: spec.Name, Msg: fmt.Sprintf(msg, args...)}
	}
	s := &Server{
		Index: uint16(index), Name: spec.Name, Farm: f,
		Endpoint: packet.EndpointFrom(spec.Endpoint),
		Weight:   max(spec.Weight, 1), Backup: spec.Backup,
	}
	switch {
	case spec.Name == "":
		return nil, &Error{Farm: f.Name, Msg: "a server has no name"}
	case !spec.Endpoint.IsValid() || spec.Endpoint.Port() == 0 || s.Endpoint.Addr.Is4() != f.Is4():
		return nil, fail("%s is not a port of an address of the farm's family", spec.Endpoint)
	case s.Weight > 256:
		return nil, fail("the weight %d is above 256", s.Weight)
	}
	for _, other := range f.Servers {
		if other.Name == s.Name {
			return nil, fail("there are two servers of this name")
		}
	}
	if old := b.oldServers[serverKey{f.Name, s.Name, s.Endpoint}]; old != nil {
		s.ID, s.Live, s.Stats = old.ID, old.Live, old.Stats
	} else {
		id, ok := nextID(&b.db.nextServer, func(id uint16) bool { return b.servers[id] != nil || b.prev.Server(id) != nil })
		if !ok {
			return nil, fail("there is no server number left")
		}
		s.ID, s.Live, s.Stats = id, new(snapshot.Live), new(ServerStats)
	}
	b.servers[s.ID] = s
	return s, nil
}

// nextID gives out the next number from 1 to 65535 that is not in use. Numbers
// go round, so that one is not used again before all others were.
func nextID(last *uint16, used func(uint16) bool) (uint16, bool) {
	id := *last
	for range math.MaxUint16 {
		if id++; id == 0 {
			id = 1
		}
		if !used(id) {
			*last = id
			return id, true
		}
	}
	return 0, false
}

// drain takes over what the new generation does not have, as removed.
func (b *builder) drain() {
	for _, old := range b.prev.farms {
		if old != nil && b.farms[old.ID] == nil {
			b.farms[old.ID] = removedFarm(old)
		}
	}
	for _, old := range b.prev.servers {
		if old != nil && b.servers[old.ID] == nil {
			b.servers[old.ID] = removedServer(old, b.farms[old.Farm.ID])
		}
	}
	// A removed farm's list keeps its places, because its selector has them;
	// servers that were forgotten stay in it as they were last.
	for _, f := range b.farms {
		if !f.Removed {
			continue
		}
		for i, s := range f.Servers {
			if now := b.servers[s.ID]; now != nil && now.Farm == f {
				f.Servers[i] = now
			}
		}
	}
}

// removedFarm copies a farm as a removed one.
func removedFarm(old *Farm) *Farm {
	f := &Farm{
		ID: old.ID, Name: old.Name, Generation: old.Generation, Removed: true,
		VIPs: old.VIPs, Servers: slices.Clone(old.Servers), Lives: old.Lives, SNIPs: old.SNIPs,
		Pool: old.Pool, Timeouts: old.Timeouts, Limits: old.Limits, Forwarded: old.Forwarded,
		ForwardedTrust: old.ForwardedTrust, RouteSafety: old.RouteSafety, Policies: old.Policies,
		Stats: old.Stats, PolicyStats: old.PolicyStats,
	}
	f.Wanted.Store(old.Wanted.Load())
	f.Selector.Store(old.Selector.Load())
	return f
}

func removedServer(old *Server, f *Farm) *Server {
	s := *old
	s.Index, s.Farm = NoIndex, f
	return &s
}

// index makes the tables by ID and the lists of what is removed.
func (db *DB) index(farms map[uint16]*Farm, servers map[uint16]*Server) {
	for id, f := range farms {
		for len(db.farms) < int(id) {
			db.farms = append(db.farms, nil)
		}
		db.farms[id-1] = f
	}
	for id, s := range servers {
		for len(db.servers) < int(id) {
			db.servers = append(db.servers, nil)
		}
		db.servers[id-1] = s
	}
	for _, f := range db.farms {
		if f != nil && f.Removed {
			db.Removed = append(db.Removed, f)
		}
	}
	for _, s := range db.servers {
		if s != nil && s.Removed() {
			db.Draining = append(db.Draining, s)
		}
	}
}

// Forget makes the generation that follows db without the removed servers for
// which done says true (no connection of any shard is left), and without the
// removed farms that have no server any more. It returns db itself if there is
// nothing to forget.
func (db *DB) Forget(done func(*Server) bool) *DB {
	gone := map[uint16]bool{}
	for _, s := range db.Draining {
		if done(s) {
			gone[s.ID] = true
		}
	}
	left := map[uint16]bool{} // farms that still have a server
	for _, s := range db.Draining {
		left[s.Farm.ID] = left[s.Farm.ID] || !gone[s.ID]
	}
	farms, servers := map[uint16]*Farm{}, map[uint16]*Server{}
	changed := false
	for _, f := range db.farms {
		switch {
		case f == nil:
		case f.Removed && !left[f.ID]:
			changed = true
		default:
			farms[f.ID] = f
		}
	}
	for _, s := range db.servers {
		switch {
		case s == nil:
		case gone[s.ID]:
			changed = true
		default:
			servers[s.ID] = s
		}
	}
	if !changed {
		return db
	}
	next := &DB{
		Generation: db.Generation + 1, Farms: db.Farms, snips: db.snips, vips: db.vips,
		nextFarm: db.nextFarm, nextServer: db.nextServer,
	}
	next.index(farms, servers)
	return next
}
