// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"fmt"
	"time"

	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/plugins/host"
)

// observePace is how often counters are looked at for what an operator should
// hear of. Packets make no events themselves.
const observePace = time.Second

// telling are the engine's reasons that become events when they are counted.
var telling = append([]engine.Reason{
	engine.ReasonTableFull, engine.ReasonConnectionLimit, engine.ReasonClientLimit, engine.ReasonEmbryosFull, engine.ReasonTombsFull,
	engine.ReasonKeptFull, engine.ReasonHeldFull, engine.ReasonResetLimit, engine.ReasonAskFull, engine.ReasonAskBusy, engine.ReasonNoPort, engine.ReasonWaitingFull, engine.ReasonWaitTimeout,
	engine.ReasonBadResponse, engine.ReasonExtraBytes, engine.ReasonIdleBytes, engine.ReasonAckCausality, engine.ReasonTruncatedResponse,
}, engine.Refusals()...)

// observer remembers what was counted at the last look.
type observer struct {
	m       *Module
	failed  map[uint16][farm.FailKinds]uint64 // by farm.Server.ID
	refused map[uint16]uint64                 // by farm.Farm.ID
	reasons [engine.Reasons]uint64
	plugins map[string]*host.Status
	dropped []uint64 // by shard, packets that the kernel could not queue
}

// newObserver is one that has seen what is counted so far.
func newObserver(m *Module) *observer {
	o := &observer{m: m, failed: map[uint16][farm.FailKinds]uint64{}, refused: map[uint16]uint64{}, plugins: map[string]*host.Status{}}
	for _, f := range m.db.Load().Farms {
		o.refused[f.ID] = f.Stats.WaitRefused.Load() + f.Stats.WaitTimedOut.Load()
		for _, s := range f.Servers {
			var n [farm.FailKinds]uint64
			for k := range n {
				n[k] = s.Stats.Failed[k].Load()
			}
			o.failed[s.ID] = n
		}
	}
	for _, r := range telling {
		o.reasons[r] = o.counted(r)
	}
	return o
}

// counted is how often something happened, over all shards.
func (o *observer) counted(r engine.Reason) (n uint64) {
	for _, s := range o.m.shards {
		if s.role == roleShard {
			n += s.engine.Count.Get(r)
		}
	}
	return n
}

// observe makes events of counters that moved, until ctx ends.
func (m *Module) observe(ctx context.Context) {
	o := m.seen
	for _, p := range m.host.Status() {
		o.plugins[p.Plugin] = &p
	}
	t := time.NewTicker(observePace)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			o.look()
			m.keepCounters()
		}
	}
}

func (o *observer) look() {
	db := o.m.db.Load()
	for _, f := range db.Farms {
		n := f.Stats.WaitRefused.Load() + f.Stats.WaitTimedOut.Load()
		if more := n - o.refused[f.ID]; more > 0 && n > o.refused[f.ID] {
			o.m.event(control.Event{
				Name: control.EventFarmWaits, Level: control.LevelWarn, Farm: f.Name, Count: more,
				Text: fmt.Sprintf("farm %s: %d requests were refused because they found no server connection in time", f.Name, more),
			})
		}
		o.refused[f.ID] = n
		for _, s := range f.Servers {
			o.server(f, s)
		}
	}
	for _, r := range telling {
		n := o.counted(r)
		if more := n - o.reasons[r]; more > 0 {
			o.m.event(control.Event{Name: r.String(), Level: control.LevelWarn, Count: more, Text: fmt.Sprintf("%s: %d times", r, more)})
		}
		o.reasons[r] = n
	}
	o.queues()
	for _, p := range o.m.host.Status() {
		o.plugin(&p, o.plugins[p.Plugin])
		o.plugins[p.Plugin] = &p
	}
}

// queues tells of packets that found a kernel queue full. To TCP they are lost
// packets.
func (o *observer) queues() {
	for i, s := range o.m.shards {
		if len(o.dropped) == i {
			o.dropped = append(o.dropped, 0)
		}
		st := s.queue.Stats()
		n := st.Kernel.DroppedQueueFull + st.Kernel.DroppedUser
		if st.KernelErr != nil || n <= o.dropped[i] {
			continue
		}
		more := n - o.dropped[i]
		o.dropped[i] = n
		o.m.event(control.Event{
			Name: control.EventQueueOverflow, Level: control.LevelWarn, Count: more,
			Text: fmt.Sprintf("the queue of %s was full: the kernel dropped %d packets", s.name(i-2), more),
		})
	}
}

// name says what a thread does; n is the number of a shard.
func (s *shard) name(n int) string {
	switch s.role {
	case roleSYN:
		return "SYNs"
	case roleControl:
		return "ICMP errors"
	}
	return fmt.Sprintf("shard %d", n)
}

func (o *observer) server(f *farm.Farm, s *farm.Server) {
	was := o.failed[s.ID]
	var now [farm.FailKinds]uint64
	for k := range now {
		now[k] = s.Stats.Failed[k].Load()
		if more := now[k] - was[k]; more > 0 {
			o.m.event(control.Event{
				Name: control.EventServerFailed, Level: control.LevelWarn, Farm: f.Name, Server: s.Name, Count: more,
				Text: fmt.Sprintf("server %s of farm %s failed %d times: %s", s.Name, f.Name, more, farm.FailKind(k)),
			})
		}
	}
	o.failed[s.ID] = now
}

// plugin makes an event of what became of a plugin since the last look; was is
// nil at the first one.
func (o *observer) plugin(p, was *host.Status) {
	ev := control.Event{Name: control.EventPlugin, Plugin: p.Plugin}
	fails := func(format string, args ...any) {
		ev.Level, ev.Text = control.LevelWarn, fmt.Sprintf(format, args...)
		if p.LastError != "" {
			ev.Text += ": " + p.LastError
		}
	}
	switch {
	case was != nil && p.Resting && !was.Resting:
		fails("plugin %s ends again and again, and is started once in %s from now on", p.Plugin, host.DefaultRestartRest)
	case was != nil && p.Restarts > was.Restarts && p.State == host.StateUp:
		// It may have been down for less than the time between two looks.
		ev.Count = p.Restarts - was.Restarts
		fails("plugin %s was started again, %d times", p.Plugin, ev.Count)
	case was != nil && p.Restarts == was.Restarts && p.State == was.State && p.PID != was.PID && p.State == host.StateUp:
		ev.Text = fmt.Sprintf("plugin %s is another process: %d instead of %d, version %s", p.Plugin, p.PID, was.PID, p.Version)
	case was != nil && p.State == was.State:
		return
	case p.State == host.StateUp:
		ev.Text = fmt.Sprintf("plugin %s is up, version %s", p.Plugin, p.Version)
	case was == nil && p.State == host.StateStarting:
		return
	default:
		fails("plugin %s is %s", p.Plugin, p.State)
	}
	o.m.event(ev)
}
