// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
	"github.com/weirgate/weir/nft"
	"github.com/weirgate/weir/policies/snapshot"
)

// drains are the servers and VIPs that are gone from the configuration and
// whose connections still run. The ruleset has them until the last one ended,
// because their packets must not reach the router's own TCP.
type drains struct {
	servers map[uint16]drainingServer // by farm.Server.ID
	vips    map[netip.AddrPort]drainingVIP
}

type drainingServer struct {
	farm, name string
	addr       netip.AddrPort
	until      time.Time
}

type drainingVIP struct {
	farm  string
	until time.Time
}

func (d *drains) empty() bool { return len(d.servers) == 0 && len(d.vips) == 0 }

// with returns what drains after a change of the configuration. What came back
// does not drain any more.
func (d *drains) with(now, next *config.Config, db *farm.DB, at time.Time) drains {
	out := drains{servers: maps.Clone(d.servers), vips: maps.Clone(d.vips)}
	if out.servers == nil {
		out.servers = map[uint16]drainingServer{}
	}
	if out.vips == nil {
		out.vips = map[netip.AddrPort]drainingVIP{}
	}
	serves := map[netip.AddrPort]bool{}
	has := map[[2]string]netip.AddrPort{}
	for i := range next.Farms {
		f := &next.Farms[i]
		for _, v := range f.Listen {
			serves[v] = true
		}
		for _, s := range f.Servers {
			has[[2]string{f.Name, s.Name}] = s.Address
		}
	}
	maps.DeleteFunc(out.servers, func(_ uint16, s drainingServer) bool { return has[[2]string{s.farm, s.name}] == s.addr })
	maps.DeleteFunc(out.vips, func(v netip.AddrPort, _ drainingVIP) bool { return serves[v] })
	for i := range now.Farms {
		f := &now.Farms[i]
		until := at.Add(f.Timeouts.Drain.Std())
		for _, v := range f.Listen {
			if _, drains := out.vips[v]; !serves[v] && !drains {
				out.vips[v] = drainingVIP{f.Name, until}
			}
		}
		running := db.FarmByName(f.Name)
		if running == nil {
			continue
		}
		for _, s := range running.Servers {
			addr := s.Endpoint.AddrPort()
			if has[[2]string{f.Name, s.Name}] != addr {
				out.servers[s.ID] = drainingServer{f.Name, s.Name, addr, until}
			}
		}
	}
	return out
}

// addTo adds what drains to the parameters of the ruleset.
func (d *drains) addTo(p *nft.Params) {
	for v := range d.vips {
		if !slices.Contains(p.VIPs, v) {
			p.VIPs = append(p.VIPs, v)
		}
	}
	for _, s := range d.servers {
		if !slices.Contains(p.Servers, s.addr) {
			p.Servers = append(p.Servers, s.addr)
		}
	}
}

// keptDrain is until when a server or a VIP drains, in the file "instance".
type keptDrain struct {
	Server uint16         `json:"server,omitempty"` // farm.Server.ID
	VIP    netip.AddrPort `json:"vip,omitzero"`
	Until  int64          `json:"until"` // flowstore.HostTime
}

// noteDrains has the next remember write down until when all that drains does.
func (m *Module) noteDrains(d *drains) {
	list := d.kept(time.Now(), flowstore.HostTime())
	m.keep.Lock()
	defer m.keep.Unlock()
	m.keep.state.Drains = list
}

// kept is what a successor is told; now and host are the same instant.
func (d *drains) kept(now time.Time, host int64) (list []keptDrain) {
	for id, s := range d.servers {
		list = append(list, keptDrain{Server: id, Until: host + int64(s.until.Sub(now))})
	}
	for v, dv := range d.vips {
		list = append(list, keptDrain{VIP: v, Until: host + int64(dv.until.Sub(now))})
	}
	return list
}

// recallDrains goes on with what drained when a predecessor died, and begins
// with what is gone from the configuration since: servers and VIPs that nobody
// would know any more, but for the connections that were taken over. It adds
// them to the parameters of the ruleset, and forgets servers that have none.
func (m *Module) recallDrains(params *nft.Params) {
	m.op.Lock()
	defer m.op.Unlock()
	found := m.db.Load()
	db := found.Forget(func(s *farm.Server) bool { return s.Stats.Open.Load() == 0 })
	m.db.Store(db)
	d, now := drains{servers: map[uint16]drainingServer{}, vips: map[netip.AddrPort]drainingVIP{}}, time.Now()
	for _, s := range db.Draining {
		d.servers[s.ID] = drainingServer{s.Farm.Name, s.Name, s.Endpoint.AddrPort(), now.Add(time.Duration(s.Farm.Timeouts.Drain))}
	}
	for _, s := range m.shards {
		if s.engine == nil {
			continue
		}
		for vip, id := range s.engine.TakenVIPs() {
			v := vip.AddrPort()
			if slices.Contains(params.VIPs, v) {
				continue
			}
			dv := drainingVIP{until: now.Add(time.Duration(farm.DefaultTimeouts.Drain))}
			if f := found.FarmByID(id); f != nil {
				dv = drainingVIP{f.Name, now.Add(time.Duration(f.Timeouts.Drain))}
			}
			d.vips[v] = dv
		}
	}
	d.recall(m.keep.state.Drains, now, flowstore.HostTime())
	for v := range d.vips {
		// It may be another thing by now, such as a source address.
		with := *params
		with.VIPs = append(slices.Clip(with.VIPs), v)
		if err := with.Validate(); err != nil {
			m.log.Warn("connections through a VIP that is gone from the configuration cannot go on", "vip", v, "error", err)
			delete(d.vips, v)
		}
	}
	if !d.empty() {
		m.log.Info("what is gone from the configuration goes on draining", "servers", len(d.servers), "vips", len(d.vips))
	}
	d.addTo(params)
	m.op.drains = d
	m.tellLeaving()
	if d.empty() && db == found && len(m.keep.state.Drains) == 0 {
		return
	}
	m.noteDrains(&d)
	if err := m.remember(db); err != nil {
		m.log.Warn("what a successor needs cannot be written", "error", err)
	}
}

// recall sets until when those drain that did already when a predecessor died.
// now and host are the same instant.
func (d *drains) recall(list []keptDrain, now time.Time, host int64) {
	for _, x := range list {
		until := now.Add(time.Duration(x.Until - host))
		if s, ok := d.servers[x.Server]; ok {
			s.until = until
			d.servers[x.Server] = s
		}
		if v, ok := d.vips[x.VIP]; ok {
			v.until = until
			d.vips[x.VIP] = v
		}
	}
}

// tellLeaving tells the thread of the SYNs which VIPs drain. The caller holds
// m.op.
func (m *Module) tellLeaving() {
	set := make(map[packet.Endpoint]bool, len(m.op.drains.vips))
	for v := range m.op.drains.vips {
		set[packet.EndpointFrom(v)] = true
	}
	m.left.Store(&set)
}

// drainPace is how often what drains is looked at.
const drainPace = 100 * time.Millisecond

// drainLoop looks after what drains until ctx ends.
func (m *Module) drainLoop(ctx context.Context) {
	t := time.NewTicker(drainPace)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		m.op.Lock()
		m.drainNow(ctx)
		m.op.Unlock()
	}
}

// drainNow closes idle connections of servers that take nothing new, lets the
// clients of VIPs that are gone go, cuts what has drained for too long, and
// forgets what has ended. The caller holds m.op.
func (m *Module) drainNow(ctx context.Context) {
	db := m.db.Load()
	for _, f := range db.Farms {
		for _, s := range f.Servers {
			if s.Live.Idle.Load() > 0 && !s.Live.Usable(m.clock.now()) {
				m.closeIdle(ctx, s.ID)
			}
		}
	}
	d := &m.op.drains
	if d.empty() {
		return
	}
	gone := false
	now := time.Now()
	ended := map[uint16]bool{}
	for id, s := range d.servers {
		sv := db.Server(id)
		switch {
		case sv == nil || sv.Stats.Open.Load() == 0:
			ended[id] = true
		case now.After(s.until):
			m.event(control.Event{
				Name: control.EventDrainDeadline, Level: control.LevelWarn, Farm: s.farm, Server: s.name, Count: uint64(sv.Stats.Open.Load()),
				Text: fmt.Sprintf("server %s of farm %s: the time to drain is over, %d connections are cut", s.name, s.farm, sv.Stats.Open.Load()),
			})
			m.cutServer(ctx, id)
		case sv.Live.Idle.Load() > 0:
			m.closeIdle(ctx, id)
		}
	}
	for v, dv := range d.vips {
		cut := now.After(dv.until)
		left, err := m.leaveVIP(ctx, v, cut)
		if err != nil {
			return
		}
		if cut && left > 0 {
			m.event(control.Event{
				Name: control.EventDrainDeadline, Level: control.LevelWarn, Farm: dv.farm, Count: uint64(left),
				Text: fmt.Sprintf("VIP %s of farm %s: the time to drain is over, %d connections are cut", v, dv.farm, left),
			})
		}
		if left == 0 {
			delete(d.vips, v)
			m.tellLeaving()
			gone = true
			m.event(control.Event{Name: control.EventVIPGone, Farm: dv.farm, Text: fmt.Sprintf("VIP %s of farm %s has no connection left", v, dv.farm)})
		}
	}
	if len(ended) > 0 {
		m.policies.Lock()
		m.db.Store(m.db.Load().Forget(func(s *farm.Server) bool { return ended[s.ID] && s.Stats.Open.Load() == 0 }))
		m.policies.Unlock()
		for id := range ended {
			if s := m.db.Load().Server(id); s == nil {
				e := d.servers[id]
				delete(d.servers, id)
				gone = true
				m.event(control.Event{Name: control.EventServerGone, Farm: e.farm, Server: e.name, Text: fmt.Sprintf("server %s of farm %s has no connection left", e.name, e.farm)})
			}
		}
	}
	if gone {
		m.noteDrains(d)
		if err := m.remember(m.db.Load()); err != nil {
			m.log.Warn("what a successor needs cannot be written", "error", err)
		}
		m.shrinkRules(ctx)
	}
}

// shrinkRules takes what has drained out of the ruleset.
func (m *Module) shrinkRules(ctx context.Context) {
	params := m.paramsFor(m.config(), &m.op.drains)
	err := m.onThread(ctx, func() error { return m.firewall.Update(params) })
	if err != nil {
		if ctx.Err() == nil {
			m.log.Error("the ruleset keeps what has drained", "error", err)
		}
		return
	}
	m.op.params = params
}

// closeIdle closes the idle connections to a server in all shards.
func (m *Module) closeIdle(ctx context.Context, id uint16) {
	_ = m.slices(ctx, func(s *shard, now int64, from splice.Ref) splice.Ref {
		if s.engine.CloseIdle(now, id, &s.out) {
			return 1
		}
		return 0
	}) // It fails only at the end of the instance.
}

func (m *Module) cutServer(ctx context.Context, id uint16) {
	_ = m.slices(ctx, func(s *shard, now int64, from splice.Ref) splice.Ref {
		return s.engine.CutServer(now, id, from, &s.out)
	}) // It fails only at the end of the instance.
}

// leaveVIP lets the clients of a VIP go and returns how many are still there.
func (m *Module) leaveVIP(ctx context.Context, vip netip.AddrPort, cut bool) (left int, err error) {
	ep := packet.EndpointFrom(vip)
	err = m.slices(ctx, func(s *shard, now int64, from splice.Ref) splice.Ref {
		next, n := s.engine.LeaveVIP(now, ep, from, cut, &s.out)
		left += n
		return next
	})
	return left, err
}

// slices calls f on the thread of every engine until it returns 0, one slice
// of work between two batches.
func (m *Module) slices(ctx context.Context, f func(s *shard, now int64, from splice.Ref) splice.Ref) error {
	for _, s := range m.shards {
		if s.role != roleShard {
			continue
		}
		for from := splice.Ref(0); ; {
			if err := s.do(ctx, func(now int64) { from = f(s, now, from) }); err != nil {
				return err
			}
			if from == 0 {
				break
			}
		}
	}
	return nil
}

// setStates gives every server the state that an override asks for, or ready.
func setStates(db *farm.DB, overrides []control.Override) {
	for _, f := range db.Farms {
		for _, s := range f.Servers {
			want := snapshot.Ready
			if o := findOverride(overrides, f.Name, s.Name); o != nil {
				want = stateOf(o.State)
			}
			if now := snapshot.State(s.Live.State.Load()); now != want && now != snapshot.Down {
				s.Live.State.Store(uint32(want))
			}
		}
	}
}

// stateOf reads the word of an override.
func stateOf(word string) snapshot.State {
	for _, s := range []snapshot.State{snapshot.Drain, snapshot.Maint} {
		if s.String() == word {
			return s
		}
	}
	return snapshot.Ready
}
