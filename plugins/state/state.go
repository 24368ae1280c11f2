// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/policypb"
)

// state is the policy of one farm. A goroutine per server probes; Tick judges.
type state struct {
	now func() time.Time

	mu      sync.Mutex // guards what follows
	config  *config
	farm    policies.Farm
	servers map[string]*server
	began   time.Time // the first tick under this configuration
	last    *policies.Snapshot
	closed  bool
}

// server is one server of the farm.
type server struct {
	address string
	health  health
	before  *policies.ServerTelemetry // of the last tick
	hurry   chan struct{}             // asks for a probe at once
	stop    context.CancelFunc        // of the probing goroutine; nil: none
	said    string                    // the last reason, for the log
}

func newState(now func() time.Time) *state {
	return &state{now: now, servers: map[string]*server{}}
}

// Configure takes a configuration. Servers that stay keep what is known about
// them.
func (s *state) Configure(farm policies.Farm, raw []byte) error {
	c, err := read(farm, raw)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopProbes()
	before := s.servers
	s.config, s.farm, s.servers, s.began, s.last = c, farm, map[string]*server{}, time.Time{}, nil
	for _, f := range farm.Servers {
		sv := before[f.Name]
		if sv == nil || sv.address != f.Address {
			sv = &server{address: f.Address}
		}
		if c.Probe == nil {
			sv.health.down, sv.health.bad, sv.health.good = false, 0, 0
		}
		sv.hurry = make(chan struct{}, 1)
		s.servers[f.Name] = sv
	}
	return nil
}

// stopProbes ends the goroutines. The caller holds the lock.
func (s *state) stopProbes() {
	for _, sv := range s.servers {
		if sv.stop != nil {
			sv.stop()
			sv.stop = nil
		}
	}
}

// Close ends the probing.
func (s *state) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopProbes()
	s.closed = true
}

// Tick judges every server.
func (s *state) Tick(_ policies.Farm, t *policies.Telemetry) (*policies.Snapshot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if s.began.IsZero() {
		s.began = now
		s.startProbes()
	}
	s.passive(t, now)
	c := s.config
	e := &policies.Eligibility{}
	for _, f := range s.farm.Servers {
		sv := s.servers[f.Name]
		ok, why := sv.health.verdict(c, now)
		switch word := c.Servers[f.Name]; word {
		case "ready":
			ok, why = true, ""
		case "":
		default:
			ok, why = false, word+": by the configuration"
		}
		if why != sv.said {
			if why == "" {
				slog.Info("server may be used again", "farm", s.farm.Name, "server", f.Name)
			} else if sv.said == "" {
				slog.Warn("server is taken out", "farm", s.farm.Name, "server", f.Name, "reason", why)
			}
			sv.said = why
		}
		if !ok {
			e.Servers = append(e.Servers, policies.Eligible{Server: f.Name, Reason: why})
		}
	}
	// The first word is worth to wait for: a farm takes no connections before.
	if c.Probe != nil && s.last == nil && now.Sub(s.began) < c.Probe.Timeout {
		for _, sv := range s.servers {
			if !sv.health.probed {
				return nil, nil
			}
		}
	}
	s.last = &policies.Snapshot{Eligibility: e}
	return s.last, nil
}

// passive takes the evidence out of the telemetry. The caller holds the lock.
func (s *state) passive(t *policies.Telemetry, now time.Time) {
	c := &s.config.Passive
	if c.Off {
		return
	}
	out := 0
	for _, sv := range s.servers {
		if now.Before(sv.health.ejected) {
			out++
		}
	}
	most := int(math.Floor(c.Most * float64(len(s.servers))))
	for _, f := range s.farm.Servers {
		sv := s.servers[f.Name]
		st := policies.TelemetryOf(t, f.Name)
		before := sv.before
		sv.before = st
		if before == nil {
			continue // what was before us is over
		}
		m := c.mark(st, before, now)
		if sv.health.evidence(c, m) {
			select {
			case sv.hurry <- struct{}{}: // the probe may know more
			default:
			}
		}
		if now.Before(sv.health.ejected) || sv.health.down {
			continue
		}
		if why, guilty := sv.health.guilty(c); guilty && out < most {
			sv.health.eject(c, now, why)
			out++
		}
	}
}

// kindNames are the failures that count, as reasons name them.
var kindNames = map[policypb.FailureKind]string{
	policypb.FailureKind_FAILURE_KIND_REFUSED:     "connection refused",
	policypb.FailureKind_FAILURE_KIND_UNREACHABLE: "connection not answered",
	policypb.FailureKind_FAILURE_KIND_RESET:       "reset",
	policypb.FailureKind_FAILURE_KIND_CLOSED:      "closed instead of an answer",
	policypb.FailureKind_FAILURE_KIND_SILENT:      "silent",
	policypb.FailureKind_FAILURE_KIND_RESPONSE:    "broken response",
}

// mark counts what came of requests between two readings.
func (c *passiveConfig) mark(now, before *policies.ServerTelemetry, at time.Time) mark {
	m := mark{at: at}
	most := uint64(0)
	add := func(n uint64, kind string) {
		m.bad += n
		if n > most {
			most, m.kind = n, kind
		}
	}
	was := map[policypb.FailureKind]uint64{}
	for _, f := range before.GetFailuresByKind() {
		was[f.GetKind()] = f.GetCount()
	}
	for _, f := range now.GetFailuresByKind() {
		if name := kindNames[f.GetKind()]; name != "" {
			add(policies.Since(f.GetCount(), was[f.GetKind()]), name)
		}
	}
	answered := policies.Since(now.GetResponses(), before.GetResponses())
	wrong := uint64(0)
	if c.ServerErrors {
		n := policies.Since(now.GetServerErrors(), before.GetServerErrors())
		add(n, "status 5xx")
		wrong += n
	}
	if c.Late > 0 {
		n := later(now.GetFirstByte(), c.Late) - min(later(before.GetFirstByte(), c.Late), later(now.GetFirstByte(), c.Late))
		add(n, "later than "+c.Late.String())
		wrong += n
	}
	m.good = answered - min(answered, wrong)
	return m
}

// later counts the durations of a histogram that are certainly above d.
func later(h *policies.Histogram, d time.Duration) (n uint64) {
	for i, c := range h.GetCounts() {
		if i > 0 && policies.BoundOf(i-1) >= d {
			n += c
		}
	}
	return n
}

// startProbes begins to probe. The caller holds the lock.
func (s *state) startProbes() {
	if s.config.Probe == nil || s.closed {
		return
	}
	for _, sv := range s.servers {
		ctx, cancel := context.WithCancel(context.Background())
		sv.stop = cancel
		go s.watch(ctx, s.config.Probe, sv, sv.address, sv.hurry)
	}
}

// watch probes one server until ctx ends.
func (s *state) watch(ctx context.Context, c *probeConfig, sv *server, address string, hurry <-chan struct{}) {
	for {
		began := time.Now()
		err := c.probe(ctx, address)
		if ctx.Err() != nil {
			return
		}
		s.mu.Lock()
		if ctx.Err() == nil {
			sv.health.probe(c, err)
		}
		fast := sv.health.undecided()
		s.mu.Unlock()
		t := time.NewTimer(max(c.pause(fast)-time.Since(began), c.FastInterval/2))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-hurry:
			t.Stop()
			// However bad it looks, a server is not probed without a pause.
			select {
			case <-ctx.Done():
				return
			case <-time.After(max(c.FastInterval-time.Since(began), 0)):
			}
		case <-t.C:
		}
	}
}
