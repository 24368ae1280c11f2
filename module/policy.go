// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"maps"
	"time"

	"github.com/weirgate/weir/policies/snapshot"
)

// onSnapshot takes over what a plugin says about a farm: a new selector, which
// the shards see with their next request. A snapshot that does not fit changes
// nothing; the last good one stays.
func (m *Module) onSnapshot(farmName, plugin string, s *snapshot.Snapshot) {
	m.policies.Lock()
	defer m.policies.Unlock()
	f := m.db.Load().FarmByName(farmName)
	c := m.cfg.Farm(farmName)
	if f == nil || c == nil {
		return
	}
	key := [2]string{farmName, plugin}
	before := m.policies.last[key]
	m.policies.last[key] = s
	list, err := farmPolicies(c, func(farm, plugin string) (*snapshot.Snapshot, bool) {
		return m.policies.last[[2]string{farm, plugin}], m.host.RoutePolicy(plugin)
	})
	if err == nil {
		var servers []snapshot.ServerConfig
		for _, sv := range f.Servers {
			servers = append(servers, snapshot.ServerConfig{Name: sv.Name, Weight: sv.Weight, Backup: sv.Backup})
		}
		var sel *snapshot.Selector
		if sel, err = snapshot.NewSelector(servers, list); err == nil {
			f.Selector.Store(sel)
			m.takeConnections()
			return
		}
	}
	m.policies.last[key] = before
	m.log.Warn("a policy's snapshot is refused; its last one stays", "farm", farmName, "plugin", plugin, "error", err)
}

// takeConnections opens the farms of which every policy has spoken, or whose
// start timeout is over. The caller holds the lock.
func (m *Module) takeConnections() {
	ready := map[uint16]bool{}
	for _, f := range m.db.Load().Farms {
		open := true
		for _, p := range m.cfg.Farm(f.Name).Policies {
			open = open && m.policies.last[[2]string{f.Name, p.Use}] != nil
		}
		ready[f.ID] = open || m.policies.open[f.ID]
	}
	if !maps.Equal(ready, *m.ready.Load()) {
		m.ready.Store(&ready)
	}
}

// openFarms lets every farm take connections at the latest when the longest
// start timeout of its policies is over.
func (m *Module) openFarms(ctx context.Context) {
	m.policies.Lock()
	defer m.policies.Unlock()
	m.takeConnections()
	for _, f := range m.db.Load().Farms {
		var longest time.Duration
		for _, p := range m.cfg.Farm(f.Name).Policies {
			if pl := m.cfg.Plugin(p.Use); pl != nil {
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
			if !(*m.ready.Load())[id] {
				m.log.Warn("a policy has not spoken in time; the farm takes connections without it", "farm", name, "start_timeout", longest)
			}
			m.policies.open[id] = true
			m.takeConnections()
		})
		context.AfterFunc(ctx, func() { timer.Stop() })
	}
}
