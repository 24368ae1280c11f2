// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"context"
	"strconv"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/divert"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/plugins/host"
	"github.com/weirgate/weir/policies/snapshot"
)

// collector reads a source at each scrape.
type collector struct{ s Source }

// Describe implements prometheus.Collector.
func (c collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range families {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) {
	x := scrape{out}
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTime)
	defer cancel()
	var wait sync.WaitGroup
	// These two wait for other threads.
	wait.Go(func() { x.firewall(ctx, &c.s) })
	wait.Go(func() { x.usage(ctx, &c.s) })
	x.instance(&c.s)
	x.engines(&c.s)
	for i := range c.s.Queues {
		x.queue(&c.s.Queues[i])
	}
	if c.s.Farms != nil {
		x.farms(c.s.Farms())
	}
	if c.s.Plugins != nil {
		for _, p := range c.s.Plugins() {
			x.plugin(&p)
		}
	}
	if c.s.Rules != nil {
		r := c.s.Rules()
		x.count(rulesRestored, r.Restored)
		x.count(guardDropped, r.GuardDropped)
		x.set(foreignRules, float64(r.Foreign))
	}
	if c.s.Access != nil {
		a := c.s.Access()
		x.count(accessWritten, a.Written)
		x.count(accessDropped, a.Dropped)
	}
	wait.Wait()
	if c.s.Collected != nil {
		c.s.Collected()
	}
}

// scrape sends the metrics of one scrape.
type scrape struct{ out chan<- prometheus.Metric }

func (x scrape) set(f family, v float64, labels ...string) {
	x.out <- prometheus.MustNewConstMetric(f.desc, f.kind, v, labels...)
}

func (x scrape) count(f family, n uint64, labels ...string) { x.set(f, float64(n), labels...) }

// times shows every second bucket of a histogram: a factor of four between two
// bounds is enough to see a change, and costs half.
func (x scrape) times(f family, h *farm.Histogram, labels ...string) {
	buckets := make(map[float64]uint64, farm.HistogramBuckets/2)
	var n uint64
	for i := range h.Counts {
		n += h.Counts[i].Load()
		if bound := farm.HistogramBound(i); i%2 == 1 && bound != 0 {
			buckets[float64(bound)/1e9] = n
		}
	}
	x.out <- prometheus.MustNewConstHistogram(f.desc, n, float64(h.Sum.Load())/1e9, buckets, labels...)
}

func (x scrape) is(f family, yes bool, labels ...string) {
	v := 0.0
	if yes {
		v = 1
	}
	x.set(f, v, labels...)
}

func (x scrape) instance(s *Source) {
	x.set(buildInfo, 1, s.Version)
	if !s.Started.IsZero() {
		x.set(startTime, float64(s.Started.UnixNano())/1e9)
	}
	if s.State == nil {
		return
	}
	st := s.State()
	for _, c := range []control.Condition{control.Starting, control.Ready, control.Degraded, control.Stopping} {
		x.is(condition, st.Condition == string(c), string(c))
	}
	x.count(generation, st.Generation)
	x.is(reloadOK, !st.Refused)
	x.set(restartPending, float64(st.Waiting))
}

// engines sums the reasons over the shards: which shard a client came to says
// nothing.
func (x scrape) engines(s *Source) {
	if s.Handshake != nil {
		x.count(synAnswered, s.Handshake.Answered.Load()+s.Handshake.Elsewhere().Load())
		x.count(synIgnored, s.Handshake.Ignored.Load())
		x.count(synRefused, s.Handshake.Refused.Load())
	}
	var sum [engine.Reasons]uint64
	any := false
	for i := range s.Queues {
		if e := s.Queues[i].Engine; e != nil {
			any = true
			for r := range sum {
				sum[r] += e.Get(engine.Reason(r))
			}
		}
	}
	if !any {
		return
	}
	for r := range sum {
		if name := engine.Reason(r).String(); engine.Reason(r) != engine.ReasonNone && name != "unknown" {
			x.count(engineEvents, sum[r], name)
		}
	}
}

func (x scrape) usage(ctx context.Context, s *Source) {
	if s.Usage == nil {
		return
	}
	all, err := s.Usage(ctx)
	if err != nil {
		return // At the end of the instance; these gauges are left out.
	}
	for i, u := range all {
		q := strconv.Itoa(i)
		x.set(clientRecords, float64(u.Clients), q)
		x.set(clientCapacity, float64(s.MaxClients), q)
		x.set(serverRecords, float64(u.Servers), q)
		x.set(serverCapacity, float64(s.MaxServers), q)
		x.set(idleRecords, float64(u.Idle), q)
		x.set(embryos, float64(u.Embryos), q)
		x.set(tombstones, float64(u.Tombs), q)
		x.set(heldRequests, float64(u.Held), q)
		x.set(keptSegments, float64(u.Kept), q)
		x.set(timersArmed, float64(u.Timers), q)
	}
}

func (x scrape) queue(q *Queue) {
	if q.Stats != nil {
		x.queueStats(q.Name, q.Stats())
	}
	if q.Spent != nil {
		x.times(queueBatchTime, q.Spent, q.Name)
	}
	if q.Emit == nil {
		return
	}
	e := q.Emit()
	x.count(emitted, e.Sent, q.Name)
	x.count(emittedBytes, e.Bytes, q.Name)
	for _, f := range []struct {
		why string
		n   uint64
	}{
		{"too_big", e.TooBig}, {"not_permitted", e.NotPermitted}, {"no_buffers", e.NoBuffers}, {"busy", e.Busy},
		{"unreachable", e.Unreachable}, {"malformed", e.Malformed}, {"unsupported", e.Unsupported}, {"other", e.Other},
	} {
		x.count(emitFailures, f.n, q.Name, f.why)
	}
}

func (x scrape) queueStats(name string, st divert.Stats) {
	x.count(queueReceived, st.Received, name)
	x.count(queueBytes, st.ReceivedBytes, name)
	x.count(queueBatches, st.Batches, name)
	x.count(queueGSO, st.GSO, name)
	x.count(queueVerdicts, st.Dropped, name, "drop")
	x.count(queueVerdicts, st.Accepted, name, "accept")
	x.count(queueVerdicts, st.Rewritten, name, "rewrite")
	for _, f := range []struct {
		why string
		n   uint64
	}{
		{"truncated_packet", st.Truncated}, {"refused_rewrite", st.Refused}, {"unanswered", st.Unanswered}, {"malformed", st.Malformed},
		{"verdict", st.VerdictErrors}, {"send", st.SendErrors}, {"receive", st.ReceiveErrors}, {"no_buffers", st.NoBuffers},
	} {
		x.count(queueErrors, f.n, name, f.why)
	}
	if st.KernelErr == nil {
		x.count(queueDropped, st.Kernel.DroppedQueueFull, name, "queue_full")
		x.count(queueDropped, st.Kernel.DroppedUser, name, "receive_buffer")
		x.set(queueWaiting, float64(st.Kernel.Waiting), name)
	}
}

func (x scrape) firewall(ctx context.Context, s *Source) {
	if s.Firewall == nil {
		return
	}
	all, err := s.Firewall(ctx)
	x.is(rulesInstalled, err == nil)
	for name, c := range all {
		x.count(rulesPackets, c.Packets, name)
		x.count(rulesBytes, c.Bytes, name)
	}
}

// farms shows the farms and servers of the present configuration. What was
// removed is only there as a number of connections: its name may belong to
// another server already.
func (x scrape) farms(db *farm.DB) {
	draining := map[string]int64{}
	for _, s := range db.Draining {
		draining[s.Farm.Name] += int64(s.Stats.Open.Load())
	}
	for _, f := range db.Farms {
		x.farm(f)
		x.set(farmDraining, float64(draining[f.Name]), f.Name)
		delete(draining, f.Name)
		for _, s := range f.Servers {
			x.server(f.Name, s)
		}
	}
	for name, n := range draining {
		x.set(farmDraining, float64(n), name)
	}
}

func (x scrape) farm(f *farm.Farm) {
	st := f.Stats
	for _, c := range []struct {
		f family
		n uint64
	}{
		{farmConnections, st.ClientConnections.Load()}, {farmRequests, st.Requests.Load()}, {farmResponses, st.Responses.Load()},
		{farmOwnAnswers, st.OwnAnswers.Load()}, {farmOpened, st.Opened.Load()}, {farmReused, st.Reused.Load()},
		{farmRedispatched, st.Redispatched.Load()}, {farmWaited, st.Waited.Load()},
		{farmRepeated, st.Retransmitted.Load()}, {farmIn, st.BytesIn.Load()}, {farmOut, st.BytesOut.Load()},
	} {
		x.count(c.f, c.n, f.Name)
	}
	x.times(farmDispatch, &st.Dispatch, f.Name)
	x.times(farmRoundTrip, &st.ClientRoundTrip, f.Name)
	for i, p := range f.PolicyStats {
		x.policy(f.Name, f.Policies[i].Name, p)
	}
	x.count(farmRefused, st.WaitRefused.Load(), f.Name, "max_waiting")
	x.count(farmRefused, st.WaitTimedOut.Load(), f.Name, "wait_timeout")
	x.set(farmHeld, float64(st.Held.Load()), f.Name)
	x.set(farmClients, float64(st.Clients.Load()), f.Name)
	x.set(farmMaxClients, float64(f.Limits.Connections), f.Name)
	for k := range st.ConnectionsRefused {
		x.count(farmNotAdmitted, st.ConnectionsRefused[k].Load(), f.Name, farm.RefuseKind(k).String())
	}
	x.set(farmWaiting, float64(st.Waiting.Load()), f.Name)
	x.set(farmMaxWaiting, float64(f.Pool.MaxWaiting), f.Name)
	x.set(farmMaxConns, float64(f.Pool.MaxConnections), f.Name)
}

func (x scrape) policy(fname, plugin string, p *farm.PolicyStats) {
	for _, c := range []struct {
		why string
		n   uint64
	}{
		{"decided", p.Decided.Load()}, {"emptied", p.Emptied.Load()}, {"skipped", p.Skipped.Load()}, {"compared", p.Compared.Load()},
		{"disagreed", p.Disagreed.Load()}, {"asked", p.Asked.Load()}, {"cached", p.Cached.Load()}, {"late", p.Late.Load()},
	} {
		x.count(policyEvents, c.n, fname, plugin, c.why)
	}
}

func (x scrape) server(fname string, s *farm.Server) {
	state := snapshot.State(s.Live.State.Load())
	for _, st := range []snapshot.State{snapshot.Ready, snapshot.Drain, snapshot.Maint, snapshot.Down} {
		x.is(serverState, state == st, fname, s.Name, st.String())
	}
	st := s.Stats
	for _, c := range []struct {
		f family
		v float64
	}{
		{serverWeight, float64(s.Weight)}, {serverOpen, float64(st.Open.Load())}, {serverConnecting, float64(st.Connecting.Load())},
		{serverIdle, float64(s.Live.Idle.Load())}, {serverActive, float64(s.Live.Active.Load())},
		{serverRequests, float64(st.Requests.Load())}, {serverResponses, float64(st.Responses.Load())},
		{serverOpened, float64(st.Opened.Load())}, {serverEstablished, float64(st.Established.Load())},
		{serverReused, float64(st.Reused.Load())}, {serverRedispatched, float64(st.Redispatched.Load())},
		{serverIn, float64(st.BytesIn.Load())}, {serverOut, float64(st.BytesOut.Load())},
		{serverErrors, float64(st.ServerErrors.Load())}, {serverRepeated, float64(st.Retransmitted.Load())},
		{requestRepeated, float64(st.RequestRetransmitted.Load())}, {serverHorizon, float64(st.Horizon.Load()) / 1e9},
	} {
		x.set(c.f, c.v, fname, s.Name)
	}
	x.times(serverConnect, &st.ConnectTime, fname, s.Name)
	x.times(serverFirstByte, &st.Latency, fname, s.Name)
	for k := range st.Closed {
		x.count(serverClosed, st.Closed[k].Load(), fname, s.Name, farm.CloseKind(k).String())
	}
	for k := range st.Failed {
		x.count(serverFailed, st.Failed[k].Load(), fname, s.Name, farm.FailKind(k).String())
	}
}

func (x scrape) plugin(p *host.Status) {
	x.is(pluginUp, p.State == host.StateUp, p.Plugin)
	x.count(pluginRestarts, p.Restarts, p.Plugin)
	x.is(pluginResting, p.Resting, p.Plugin)
	for why, n := range map[string]uint64{"answered": p.Decisions.Answered, "late": p.Decisions.Late, "failed": p.Decisions.Failed, "busy": p.Decisions.Busy, "refused": p.Decisions.Refused} {
		x.count(pluginAnswers, n, p.Plugin, why)
	}
	for _, f := range p.Farms {
		at := 0.0
		if !f.LastTick.IsZero() {
			at = float64(f.LastTick.UnixNano()) / 1e9
		}
		x.set(pluginTick, at, p.Plugin, f.Farm)
		x.count(pluginSnapshot, f.Generation, p.Plugin, f.Farm)
	}
}
