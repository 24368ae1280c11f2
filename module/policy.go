// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"maps"
	"math"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/plugins/host"
	"github.com/weirgate/weir/policies/snapshot"
)

// onSnapshot takes over what a plugin says about a farm: a new selector, which
// the shards see with their next request. A snapshot that does not fit changes
// nothing; the last good one stays. While a reload is under way, what plugins
// say is about the farms and servers to come, and waits for them.
func (m *Module) onSnapshot(farmName, plugin string, s *snapshot.Snapshot) {
	m.policies.Lock()
	defer m.policies.Unlock()
	key := [2]string{farmName, plugin}
	before := m.policies.last[key]
	m.policies.last[key] = s
	if m.policies.held {
		return
	}
	f := m.db.Load().FarmByName(farmName)
	c := m.config().Farm(farmName)
	if f == nil || c == nil {
		delete(m.policies.last, key)
		return
	}
	if err := m.compile(f, c); err != nil {
		m.policies.last[key] = before
		m.log.Warn("a policy's snapshot is refused; its last one stays", "farm", farmName, "plugin", plugin, "error", err)
		return
	}
	m.keepSnapshot(farmName, plugin, s)
	m.takeConnections()
}

// compile makes the selector of a farm from the last snapshots. The caller
// holds the lock.
func (m *Module) compile(f *farm.Farm, c *config.Farm) error {
	list, err := farmPolicies(c, func(farm, plugin string) (*snapshot.Snapshot, host.About) {
		s := m.policies.last[[2]string{farm, plugin}]
		if s != nil {
			s = s.Keep(hasServer(c))
		}
		return s, m.host.About(plugin)
	})
	if err != nil {
		return err
	}
	sel, err := f.Selector.Load().With(list)
	if err != nil {
		return err
	}
	if err := f.SetSelector(sel); err != nil {
		return err
	}
	m.avoid(f)
	return nil
}

// avoid says to those who keep connections open which servers no policy lets
// requests go to, and until when that is known. The choice itself looks at the
// policies. It is no state of the server: that is the operator's. The caller
// holds the lock.
func (m *Module) avoid(f *farm.Farm) {
	until := make(map[string]int64, len(f.Servers))
	c := m.config().Farm(f.Name)
	if c == nil {
		return
	}
	for _, p := range c.Policies {
		s := m.policies.last[[2]string{f.Name, p.Use}]
		if s == nil || s.Eligibility == nil || p.Shadow {
			continue
		}
		expires := s.Expires
		if expires == 0 {
			expires = math.MaxInt64
		}
		for _, e := range s.Eligibility.Servers {
			if !e.Eligible {
				until[e.Server] = max(until[e.Server], expires)
			}
		}
	}
	for _, s := range f.Servers {
		s.Live.AvoidUntil.Store(until[s.Name])
	}
}

// takeConnections opens the farms of which every policy has spoken, or whose
// start timeout is over. The caller holds the lock.
func (m *Module) takeConnections() {
	farms := m.db.Load().Farms
	uses := make(map[string][]config.PolicyUse, len(farms)) // looked up once for each farm
	for i := range m.config().Farms {
		c := &m.config().Farms[i]
		uses[c.Name] = c.Policies
	}
	ready := make(map[uint16]bool, len(farms))
	for _, f := range farms {
		open := true
		for _, p := range uses[f.Name] {
			open = open && (p.Shadow || m.policies.last[[2]string{f.Name, p.Use}] != nil)
		}
		ready[f.ID] = open || m.policies.open[f.ID]
	}
	if !maps.Equal(ready, *m.ready.Load()) {
		m.ready.Store(&ready)
	}
	m.tellSYNs()
}

// openFarms lets every farm take connections at the latest when the longest
// start timeout of its policies is over.
func (m *Module) openFarms(ctx context.Context) {
	m.policies.Lock()
	defer m.policies.Unlock()
	// What the plugins are is known only now: before, any of them might have
	// sent routes.
	for _, f := range m.db.Load().Farms {
		if c := m.config().Farm(f.Name); c != nil && len(c.Policies) > 0 {
			if err := m.compile(f, c); err != nil {
				m.log.Warn("the snapshots of a farm's policies do not fit", "farm", f.Name, "error", err)
			}
		}
	}
	m.takeConnections()
	m.startFarms(ctx)
}

// startFarms is openFarms for a caller who holds the lock.
func (m *Module) startFarms(ctx context.Context) {
	for _, f := range m.db.Load().Farms {
		var longest time.Duration
		for _, p := range m.config().Farm(f.Name).Policies {
			if pl := m.config().Plugin(p.Use); pl != nil {
				longest = max(longest, pl.StartTimeout.Std())
			}
		}
		if longest == 0 || (*m.ready.Load())[f.ID] {
			continue
		}
		id, name := f.ID, f.Name
		timer := time.AfterFunc(longest, func() {
			m.policies.Lock()
			defer m.policies.Unlock()
			if now := m.db.Load().FarmByID(id); now == nil || now.Name != name || now.Removed {
				return // another one has the number by now
			}
			m.policies.open[id] = true
			if !(*m.ready.Load())[id] {
				m.log.Warn("a policy has not spoken in time; the farm takes connections without it", "farm", name, "start_timeout", longest)
				m.takeConnections()
			}
		})
		context.AfterFunc(ctx, func() { timer.Stop() })
	}
}
