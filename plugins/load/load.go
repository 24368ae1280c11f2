// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"log/slog"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/policypb"
)

// load is the policy of one farm. Tick computes the scores; a goroutine per
// server asks its agent where there is one.
type load struct {
	now func() time.Time

	mu      sync.Mutex // guards what follows
	config  *config
	farm    policies.Farm
	servers map[string]*server
	started bool // agents are asked
	closed  bool
	last    *policies.Snapshot
}

// server is what is known about one server.
type server struct {
	address string
	mean    float64   // of the time to the first byte, seconds; 0: unknown
	middle  float64   // the same, of what is usual: few outliers do not count
	peak    float64   // decaying maximum, seconds
	fresh   time.Time // the last time there was something to measure
	before  *policies.ServerTelemetry
	away    bool      // was not available at the last tick
	back    time.Time // since when it is available again; zero: always was
	report  report
	trouble string // the last error of its agent
	stop    context.CancelFunc
}

func newLoad(now func() time.Time) *load {
	return &load{now: now, servers: map[string]*server{}}
}

// Configure takes a configuration. Servers that stay keep what is known about
// them.
func (l *load) Configure(farm policies.Farm, raw []byte) error {
	c, err := read(raw)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopAgents()
	before := l.servers
	l.config, l.farm, l.servers = c, farm, map[string]*server{}
	for _, f := range farm.Servers {
		sv := before[f.Name]
		if sv == nil || sv.address != f.Address {
			sv = &server{address: f.Address}
		}
		if c.Agent == nil {
			sv.report = report{}
		}
		l.servers[f.Name] = sv
	}
	return nil
}

func (l *load) stopAgents() {
	for _, sv := range l.servers {
		if sv.stop != nil {
			sv.stop()
			sv.stop = nil
		}
	}
	l.started = false
}

// Close ends the asking.
func (l *load) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopAgents()
	l.closed = true
}

// slowest is the share with which a server that comes back begins.
const slowest = 0.1

// Tick scores every server.
func (l *load) Tick(_ policies.Farm, t *policies.Telemetry) (*policies.Snapshot, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if !l.started && !l.closed {
		l.startAgents()
		l.started = true
	}
	c := l.config
	means, middles := map[string]float64{}, map[string]float64{}
	for _, f := range l.farm.Servers {
		sv := l.servers[f.Name]
		st := policies.TelemetryOf(t, f.Name)
		sv.measure(c, st, now)
		if sv.mean > 0 {
			means[f.Name], middles[f.Name] = sv.cost(c, sv.mean, st), sv.cost(c, sv.middle, st)
		}
	}
	mean, middle := median(means), median(middles)
	snap := &policies.Snapshot{Scores: &policies.Scores{}}
	if c.Agent != nil {
		snap.Eligibility = &policies.Eligibility{}
	}
	for _, f := range l.farm.Servers {
		sv := l.servers[f.Name]
		score := 1.0
		if len(means) > 1 && means[f.Name] > 0 {
			// A mean is moved by a few requests that took long for reasons of
			// their own, the middle by the histogram's steps. Only what both
			// say is the server.
			floor := c.Floor.Seconds()
			a, b := (mean+floor)/(means[f.Name]+floor), (middle+floor)/(middles[f.Name]+floor)
			if math.Abs(math.Log(b)) < math.Abs(math.Log(a)) {
				a = b
			}
			score = relative(c, a)
		}
		if !sv.back.IsZero() && c.SlowStart > 0 {
			if done := float64(now.Sub(sv.back)) / float64(c.SlowStart); done < 1 {
				score *= max(math.Round(done*20)/20, slowest)
			}
		}
		if a := c.Agent; a != nil && !sv.report.at.IsZero() && now.Sub(sv.report.at) < a.Expiry {
			score *= sv.report.factor
			if sv.report.away != "" {
				snap.Eligibility.Servers = append(snap.Eligibility.Servers, policies.Eligible{Server: f.Name, Reason: sv.report.away})
			}
		}
		if score = min(max(math.Round(score*1000)/1000, 0.01), 100); score != 1 {
			snap.Scores.Servers = append(snap.Scores.Servers, policies.Score{Server: f.Name, Score: score})
		}
	}
	if l.last != nil && same(l.last, snap) {
		return l.last, nil
	}
	l.last = snap
	return snap, nil
}

// measure takes in what came since the last tick.
func (sv *server) measure(c *config, st *policies.ServerTelemetry, now time.Time) {
	before := sv.before
	sv.before = st
	away := st.GetState() != policypb.ServerState_SERVER_STATE_UNSPECIFIED && !st.GetAvailable()
	if before != nil && sv.away && !away {
		sv.back = now
	}
	if sv.away = away; before == nil {
		return // what was before us is over
	}
	mean, n := policies.Mean(st.GetFirstByte(), before.GetFirstByte())
	if n == 0 {
		// Nobody can say how a server is that gets nothing: after a while it is
		// taken for one like the others, which gives it requests again.
		if !sv.fresh.IsZero() && now.Sub(sv.fresh) > 10*c.HalfLife {
			sv.mean, sv.middle, sv.peak = 0, 0, 0
		}
		return
	}
	x, y := max(mean.Seconds(), 1e-9), policies.Middle(st.GetFirstByte(), before.GetFirstByte()).Seconds()
	if sv.mean == 0 {
		sv.mean, sv.middle = x, y
	} else {
		a := 1 - math.Exp2(-float64(now.Sub(sv.fresh))/float64(c.HalfLife))
		a = min(max(a, 0), 1)
		sv.mean += a * (x - sv.mean)
		sv.middle += a * (y - sv.middle)
		sv.peak *= 1 - a
	}
	sv.peak = max(sv.peak, policies.Peak(st.GetFirstByte(), before.GetFirstByte()).Seconds()/2)
	sv.fresh = now
}

// cost is how long a request at the server is expected to take, in seconds:
// the mean, a part of the peak, and more where requests queue. How many are
// active does not enter: Weir's choice looks at that itself, at the moment of
// the choice.
func (sv *server) cost(c *config, usual float64, st *policies.ServerTelemetry) float64 {
	cost := usual + c.Peak*max(sv.peak-usual, 0)
	return cost * (1 + float64(st.GetWaiting())/float64(st.GetActive()+1))
}

// relative turns a cost relative to the others' into a score.
func relative(c *config, r float64) float64 {
	if r > 1-c.Tolerance && r < 1/(1-c.Tolerance) {
		return 1
	}
	// In steps of a tenth, so that small changes do not make a new snapshot
	// every time.
	r = math.Pow(1.1, math.Round(math.Log(r)/math.Log(1.1)))
	return min(max(r, c.Min), c.Max)
}

func median(costs map[string]float64) float64 {
	if len(costs) == 0 {
		return 0
	}
	var all []float64
	for _, v := range costs {
		all = append(all, v)
	}
	slices.Sort(all)
	n := len(all)
	if n%2 == 1 {
		return all[n/2]
	}
	// Of two, the better one: in a pair a slow server must not look typical.
	return all[n/2-1]
}

func same(a, b *policies.Snapshot) bool {
	if (a.Eligibility == nil) != (b.Eligibility == nil) || a.Eligibility != nil && !slices.Equal(a.Eligibility.Servers, b.Eligibility.Servers) {
		return false
	}
	return slices.Equal(a.Scores.Servers, b.Scores.Servers)
}

// startAgents begins to ask. The caller holds the lock.
func (l *load) startAgents() {
	if l.config.Agent == nil {
		return
	}
	for _, f := range l.farm.Servers {
		sv := l.servers[f.Name]
		ctx, cancel := context.WithCancel(context.Background())
		sv.stop = cancel
		go l.watch(ctx, l.config.Agent, l.farm.Name, f.Name, sv)
	}
}

// watch asks the agent of one server until ctx ends.
func (l *load) watch(ctx context.Context, a *agentConfig, farm, name string, sv *server) {
	for {
		r, err := a.ask(ctx, sv.address)
		if ctx.Err() != nil {
			return
		}
		trouble := ""
		l.mu.Lock()
		if err == nil {
			r.at = l.now()
			sv.report = r
		} else {
			trouble = err.Error()
		}
		changed := trouble != sv.trouble
		sv.trouble = trouble
		l.mu.Unlock()
		if changed && trouble != "" {
			slog.Warn("the agent of a server does not report", "farm", farm, "server", name, "error", trouble)
		}
		t := time.NewTimer(time.Duration(float64(a.Interval) * (0.9 + 0.2*rand.Float64())))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}
