// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"fmt"
	"net"
	"strconv"

	"github.com/weirgate/weir/module/accesslog"
	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/metrics"
	"github.com/weirgate/weir/nft"
)

// This file is what an instance tells to machines: metrics, the access log, and
// whether it is alive.

// metricsServer opens the listener of the metrics, in the network namespace of
// the calling thread, and returns what serves it. That it cannot be opened is
// said, but stops nobody: clients matter more.
func (m *Module) metricsServer() func(context.Context) {
	addr := m.config().Admin.Metrics
	if !addr.IsValid() {
		return func(context.Context) {}
	}
	l, err := net.Listen("tcp", addr.String())
	if err != nil {
		m.log.Error("admin.metrics: there are no metrics", "address", addr, "error", err)
		return func(context.Context) {}
	}
	source := m.metricsSource()
	return func(ctx context.Context) {
		if err := metrics.Serve(ctx, l, source); err != nil {
			m.log.Error("the server of the metrics ended", "error", err)
		}
	}
}

func (m *Module) metricsSource() metrics.Source {
	s := metrics.Source{
		Version: m.opt.Version, Started: m.started, Farms: m.db.Load, Handshake: m.handshake,
		MaxClients: m.opt.Clients, MaxServers: m.opt.Servers, Plugins: m.host.Status,
		State: func() metrics.State {
			st, _ := m.Status(context.Background()) // It never fails.
			m.op.seen.Lock()
			defer m.op.seen.Unlock()
			return metrics.State{
				Condition: string(st.Condition), Generation: st.Generation,
				Refused: m.op.seen.refused != "", Waiting: len(m.op.seen.waiting),
			}
		},
		Usage: func(ctx context.Context) (all []engine.Usage, err error) {
			err = m.engines(ctx, func(_ int, s *shard, _ int64) { all = append(all, s.engine.Usage()) })
			return all, err
		},
		// The counters are read over a socket, which has to be of the
		// instance's namespace.
		Firewall: func(ctx context.Context) (all map[string]nft.Counter, err error) {
			err = m.onThread(ctx, func() (err error) {
				all, err = m.firewall.Counters()
				return err
			})
			return all, err
		},
		Rules: func() metrics.Rules {
			return metrics.Rules{Restored: m.firewall.Restored(), GuardDropped: m.watcher.Drops(), Foreign: int(m.foreign.Load())}
		},
		Collected: m.keepCounters,
		Access: func() metrics.AccessLog {
			written, dropped := m.access.Counts()
			return metrics.AccessLog{Written: written, Dropped: dropped}
		},
	}
	shards := 0
	for _, sh := range m.shards {
		q := metrics.Queue{Stats: sh.stats, Emit: sh.emitted, Spent: &sh.spent}
		switch sh.role {
		case roleSYN:
			q.Name = "syn"
		case roleControl:
			q.Name = "control"
		default:
			q.Name, q.Engine = strconv.Itoa(shards), &sh.engine.Count
			shards++
		}
		s.Queues = append(s.Queues, q)
	}
	return s
}

// newAccessLog makes the access log. It writes nothing before writeAccessLog.
func (m *Module) newAccessLog() *accesslog.Log {
	return accesslog.New(m.log, func(farm, server uint16) (f, s string) {
		db := m.db.Load()
		if v := db.FarmByID(farm); v != nil {
			f = v.Name
		}
		if v := db.Server(server); v != nil {
			s = v.Name
		}
		return f, s
	})
}

// writeAccessLog writes it until ctx ends and the engines have ended.
func (m *Module) writeAccessLog(ctx context.Context) {
	var engines []*shard
	for _, s := range m.shards {
		if s.role == roleShard {
			engines = append(engines, s)
		}
	}
	m.access.Run(ctx, func() config.Access { return m.config().Log.Access }, accesslog.Engines{
		Shards: len(engines),
		Set: func(ctx context.Context, rings []*engine.AccessRing) error {
			for i, s := range engines {
				var q *engine.AccessRing
				if rings != nil {
					q = rings[i]
				}
				if err := s.do(ctx, func(int64) { s.engine.SetAccess(q) }); err != nil {
					return err
				}
			}
			return nil
		},
		Ended: func() {
			for _, s := range engines {
				<-s.ended
			}
		},
	})
}

// ReopenLogs opens the access log's file anew, for a rotation.
func (m *Module) ReopenLogs() { m.access.Reopen() }

// Alive returns nil if every packet thread answers within the time of ctx, or
// if the instance does not serve yet. It is what a watchdog should ask.
func (m *Module) Alive(ctx context.Context) error {
	select {
	case <-m.serving:
	default:
		return nil // It starts, which has a time limit of its own.
	}
	for i, s := range m.shards {
		done := make(chan error, 1)
		go func() { done <- s.do(ctx, func(int64) {}) }()
		select {
		case err := <-done:
			if err != nil && ctx.Err() != nil {
				return fmt.Errorf("the thread of queue %d does not answer: %w", i, err)
			}
		case <-ctx.Done():
			return fmt.Errorf("the thread of queue %d does not answer: %w", i, ctx.Err())
		}
	}
	return nil
}
