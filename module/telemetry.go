// SPDX-License-Identifier: Apache-2.0

package module

import (
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/policies/policypb"
	"github.com/weirgate/weir/policies/snapshot"
)

// telemetry reads the counters of a farm for a plugin; nil if there is no such
// farm. The shards go on counting meanwhile: numbers that are read one after
// the other need not be of one moment.
func (m *Module) telemetry(name string) *policypb.Telemetry {
	f := m.db.Load().FarmByName(name)
	if f == nil {
		return nil
	}
	now := m.clock.now()
	t := &policypb.Telemetry{
		TimeUnixNano: now, Requests: f.Stats.Requests.Load(), Waiting: gauge(f.Stats.Waiting.Load()),
		ClientConnections: f.Stats.ClientConnections.Load(), Responses: f.Stats.Responses.Load(),
		OwnAnswers: f.Stats.OwnAnswers.Load(), Redispatched: f.Stats.Redispatched.Load(), Waited: f.Stats.Waited.Load(),
		BytesIn: f.Stats.BytesIn.Load(), BytesOut: f.Stats.BytesOut.Load(),
		ClientRoundTrip: histogram(&f.Stats.ClientRoundTrip), ClientRetransmissions: f.Stats.Retransmitted.Load(),
		Servers: make([]*policypb.ServerTelemetry, 0, len(f.Servers)),
	}
	for _, s := range f.Servers {
		t.Servers = append(t.Servers, serverTelemetry(s, now))
	}
	return t
}

// serverStates are the states of servers as plugins know them.
var serverStates = map[snapshot.State]policypb.ServerState{
	snapshot.Ready: policypb.ServerState_SERVER_STATE_READY, snapshot.Drain: policypb.ServerState_SERVER_STATE_DRAIN,
	snapshot.Maint: policypb.ServerState_SERVER_STATE_MAINT, snapshot.Down: policypb.ServerState_SERVER_STATE_DOWN,
}

// failureKinds are the kinds of failures as plugins know them.
var failureKinds = [farm.FailKinds]policypb.FailureKind{
	farm.FailRefused: policypb.FailureKind_FAILURE_KIND_REFUSED, farm.FailUnreachable: policypb.FailureKind_FAILURE_KIND_UNREACHABLE,
	farm.FailReset: policypb.FailureKind_FAILURE_KIND_RESET, farm.FailClosed: policypb.FailureKind_FAILURE_KIND_CLOSED,
	farm.FailSilent: policypb.FailureKind_FAILURE_KIND_SILENT, farm.FailResponse: policypb.FailureKind_FAILURE_KIND_RESPONSE,
}

func serverTelemetry(s *farm.Server, now int64) *policypb.ServerTelemetry {
	st := s.Stats
	t := &policypb.ServerTelemetry{
		Name: s.Name, State: serverStates[snapshot.State(s.Live.State.Load())], Available: s.Live.Usable(now),
		Active: gauge(s.Live.Active.Load()), Waiting: gauge(s.Live.Waiting.Load()), Idle: gauge(s.Live.Idle.Load()),
		Open: gauge(st.Open.Load()), Connecting: gauge(st.Connecting.Load()),
		Opened: st.Opened.Load(), Reused: st.Reused.Load(), Requests: st.Requests.Load(), Responses: st.Responses.Load(),
		ServerErrors: st.ServerErrors.Load(), BytesIn: st.BytesIn.Load(), BytesOut: st.BytesOut.Load(),
		ConnectTime: histogram(&st.ConnectTime), FirstByte: histogram(&st.FirstByte),
		Retransmissions: st.Retransmitted.Load(), RequestRetransmissions: st.RequestRetransmitted.Load(),
	}
	for k := range st.Failed {
		if n := st.Failed[k].Load(); n > 0 {
			t.Failures += n
			t.FailuresByKind = append(t.FailuresByKind, &policypb.FailureCount{Kind: failureKinds[k], Count: n})
		}
	}
	return t
}

// gauge is a live counter as others see it: it may be below zero for a moment.
func gauge(n int32) uint32 { return uint32(max(n, 0)) }

// histogram copies the counts up to the last that is not zero.
func histogram(h *farm.Histogram) *policypb.Histogram {
	var counts [farm.HistogramBuckets]uint64
	last := 0
	for i := range counts {
		if counts[i] = h.Counts[i].Load(); counts[i] > 0 {
			last = i + 1
		}
	}
	if last == 0 {
		return nil
	}
	return &policypb.Histogram{SumNanos: h.Sum.Load(), Counts: append([]uint64(nil), counts[:last]...)}
}
