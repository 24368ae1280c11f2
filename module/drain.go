// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
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
