// SPDX-License-Identifier: Apache-2.0

package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/policypb"
	"github.com/weirgate/weir/policies/snapshot"
)

// supervisor keeps one plugin's process running. Its goroutine, run, is the
// only one that calls the plugin and the only one that changes farms:
//
//	launch ──► configure all ──► serve: tick, tick, … ──► dead, hung, told to stop
//	   ▲                                                        │
//	   └────────────── backoff, 100 ms doubling to 5 s ◄────────┘
//
// Others hand it work through calls, which it does between two ticks, with the
// process as argument, or nil where there is none at the moment.
type supervisor struct {
	h      *Host
	spec   resolved // name, path, args, cred and checksum never change; the rest is guarded by mu for others
	dir    string   // for the sockets
	thread *thread  // that starts the processes
	log    *slog.Logger
	ctx    context.Context
	cancel context.CancelFunc
	calls  chan call
	first  chan struct{} // closed when the first start has succeeded or failed
	heard  chan struct{} // gets something after each round of ticks
	done   chan struct{} // closed when run has returned

	mu        sync.Mutex // guards what follows
	farms     []*farm
	state     State
	since     time.Time
	pid       int
	described *policypb.DescribeResponse
	askKey    *policies.AskKey // nil: it is not to be asked
	proc      *process         // that questions go to; nil: none
	restarts  uint64
	resting   bool
	lastErr   error

	retired bool // a successor speaks for it, and its snapshots count no more

	asks asker
}

type call struct {
	do    func(*process) error
	reply chan error
}

// farm is one farm that uses the plugin. The supervisor's goroutine writes it
// under the supervisor's mutex, and reads it without.
type farm struct {
	farmConfig
	servers []snapshot.ServerConfig

	refused  bool               // the process does not take the configuration
	have     uint64             // generation that we have of this process
	wire     *policypb.Snapshot // the last one, without generation
	snap     *snapshot.Snapshot // the same, compiled once to be sure that it fits
	gen      uint64             // our own count of what was new, over restarts
	received time.Time
	ticked   time.Time
	lastErr  string // of the last tick; "" was good
}

func newSupervisor(h *Host, spec resolved, dir string, th *thread) *supervisor {
	ctx, cancel := context.WithCancel(context.Background())
	return &supervisor{
		h: h, spec: spec, dir: dir, thread: th, log: h.log.With("plugin", spec.name), ctx: ctx, cancel: cancel,
		calls: make(chan call), first: make(chan struct{}), heard: make(chan struct{}, 1), done: make(chan struct{}),
		state: StateStarting, since: time.Now(),
	}
}

func newFarm(c farmConfig) *farm {
	f := &farm{farmConfig: c}
	for _, s := range c.farm.Servers {
		f.servers = append(f.servers, snapshot.ServerConfig{Name: s.Name, Weight: s.Weight, Backup: s.Backup})
	}
	return f
}

// run is the supervisor's life.
func (s *supervisor) run() {
	defer close(s.done)
	started := sync.OnceFunc(func() { close(s.first) })
	defer started()
	var pace pacing
	for {
		s.set(StateStarting, 0, nil)
		pace.started(time.Now())
		p, err := s.launch()
		var key *policies.AskKey
		if err == nil {
			key, err = askKey(p.about)
		}
		if err == nil {
			s.mu.Lock()
			s.described, s.askKey = p.about, key
			s.mu.Unlock()
			err = s.configure(p, s.farms)
		}
		up := time.Now()
		if err == nil {
			p.child.mu.Lock()
			pid := p.child.pid
			p.child.mu.Unlock()
			s.set(StateUp, pid, nil)
			s.log.Info("plugin is up", "version", p.about.GetVersion(), "pid", pid)
			s.setProcess(p)
			started()
			err = s.serve(p)
			s.setProcess(nil)
		}
		if p != nil {
			p.stop()
		}
		if s.ctx.Err() != nil {
			return
		}
		pace.min, pace.max, pace.limit = s.spec.backoffMin, s.spec.backoffMax, s.spec.restarts
		pause := pace.ended(up, time.Now())
		s.set(StateDown, 0, err)
		s.mu.Lock()
		s.resting = pace.resting
		s.mu.Unlock()
		s.log.Error("plugin is down, its last snapshots stay in force", "error", err, "restart_in", pause)
		started()
		if !s.rest(pause) {
			return
		}
		s.mu.Lock()
		s.restarts++
		s.mu.Unlock()
	}
}

// rest waits before the next start. It reports false when there is to be none.
func (s *supervisor) rest(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return false
		case <-t.C:
			return true
		case c := <-s.calls:
			c.reply <- c.do(nil)
		}
	}
}

// serve ticks until the process is dead, hung, or no longer wanted.
func (s *supervisor) serve(p *process) error {
	t := time.NewTimer(0)
	defer t.Stop()
	misses := 0
	for {
		select {
		case <-s.ctx.Done():
			return s.ctx.Err()
		case <-p.child.exited:
			return exitError(p)
		case c := <-s.calls:
			c.reply <- c.do(p)
			t.Reset(0) // what was said may have changed
		case <-t.C:
			start := time.Now()
			missed, err := s.tick(p)
			select {
			case s.heard <- struct{}{}:
			default:
			}
			if err != nil {
				select {
				case <-p.child.exited:
					return exitError(p)
				default:
					return err
				}
			}
			if !missed {
				misses = 0
			} else if misses++; misses >= maxMisses {
				return fmt.Errorf("%d ticks in a row took longer than %s", misses, s.h.opts.TickTimeout)
			}
			t.Reset(max(s.every(p)-time.Since(start), 0))
		}
	}
}

// every is the time between two ticks: what the plugin asks for, within the
// bounds, but not more than ours.
func (s *supervisor) every(p *process) time.Duration {
	d := s.h.opts.Tick
	if ms := p.about.GetTickMs(); ms > 0 {
		d = min(d, max(time.Duration(ms)*time.Millisecond, leastTick), mostTick)
	}
	return d
}

// setProcess says whom questions go to.
func (s *supervisor) setProcess(p *process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proc = p; p != nil {
		s.resting = false
	}
}

// askKey returns what a plugin wants to know of requests, nil if it does not
// want to be asked.
func askKey(about *policypb.DescribeResponse) (*policies.AskKey, error) {
	for _, c := range about.GetCapabilities() {
		if c.GetName() == policies.CapabilityAsk && c.GetVersion() >= 1 {
			k, err := policies.AskKeyFromProto(about.GetAsk())
			if err != nil {
				return nil, fmt.Errorf("describe: the plugin %w", err)
			}
			return k, nil
		}
	}
	return nil, nil
}

func exitError(p *process) error {
	err := p.child.Wait(context.Background())
	if err == nil {
		err = errors.New("exit status 0")
	}
	if line := p.child.lastWords(); line != "" {
		return fmt.Errorf("the process ended: %w; its last words: %s", err, line)
	}
	return fmt.Errorf("the process ended: %w", err)
}

// tick asks for the snapshots of all farms. missed says that the plugin did not
// answer in time; an error that it is of no use any more.
func (s *supervisor) tick(p *process) (missed bool, err error) {
	for _, f := range s.farms {
		if f.refused {
			continue
		}
		req := &policypb.TickRequest{Farm: f.farm.Name, HaveGeneration: f.have}
		if s.h.opts.Telemetry != nil {
			req.Telemetry = s.h.opts.Telemetry(f.farm.Name)
		}
		ctx, cancel := context.WithTimeout(s.ctx, s.h.opts.TickTimeout)
		resp, err := p.calls.Push.Tick(ctx, req)
		cancel()
		switch status.Code(err) {
		case codes.OK:
			s.answered(f, resp.GetSnapshot())
		case codes.Canceled, codes.Unavailable:
			return false, err
		case codes.DeadlineExceeded:
			// The others would wait as long; they get their turn next time.
			s.note(f, "no answer within "+s.h.opts.TickTimeout.String())
			return true, nil
		default:
			s.note(f, status.Convert(err).Message())
		}
	}
	return false, nil
}

// note records and logs what went wrong with a farm, once while it stays.
func (s *supervisor) note(f *farm, msg string) {
	if msg != f.lastErr && msg != "" {
		s.log.Warn("plugin does not say anything usable, its last snapshot stays in force", "farm", f.farm.Name, "error", msg)
	}
	s.mu.Lock()
	f.lastErr = msg
	s.mu.Unlock()
}

// answered takes the answer to a tick; nil says that nothing changed.
func (s *supervisor) answered(f *farm, p *policypb.Snapshot) {
	now := time.Now()
	s.mu.Lock()
	f.ticked = now
	s.mu.Unlock()
	if p == nil {
		s.note(f, "")
		s.renew(f, now)
		return
	}
	have := p.GetGeneration()
	p.Generation = 0
	if f.wire != nil && proto.Equal(p, f.wire) {
		// A new process says the same as the one before.
		s.mu.Lock()
		f.have = have
		s.mu.Unlock()
		s.note(f, "")
		s.renew(f, now)
		return
	}
	snap, err := policies.SnapshotFromProto(s.spec.name, p, now, s.spec.expiry)
	if err == nil {
		if f.wire != nil && f.snap.Routes != nil && proto.Equal(p.GetRoutes(), f.wire.GetRoutes()) {
			snap.Routes = f.snap.Routes // spares the selector to compile them again
		} else {
			_, err = snapshot.NewSelector(f.servers, []snapshot.Policy{{Name: s.spec.name, Snapshot: snap}})
		}
	}
	if err == nil && snap.Routes != nil && f.snap != nil && snap.Routes == f.snap.Routes {
		rest := *snap
		rest.Routes = nil
		_, err = snapshot.NewSelector(f.servers, []snapshot.Policy{{Name: s.spec.name, Snapshot: &rest}})
	}
	if err != nil {
		s.note(f, err.Error())
		return
	}
	s.mu.Lock()
	if s.retired {
		s.mu.Unlock()
		return
	}
	f.gen++
	snap.Generation = f.gen
	f.have, f.wire, f.snap, f.received = have, p, snap, now
	s.mu.Unlock()
	s.note(f, "")
	s.deliver(f)
}

// renew moves the expiry on when half of the time is over; more often would
// only make work for the receiver.
func (s *supervisor) renew(f *farm, now time.Time) {
	if f.snap == nil || f.snap.Expires == 0 {
		return
	}
	expires := policies.Expires(f.wire, now, s.spec.expiry)
	if left := f.snap.Expires - now.UnixNano(); left > (expires-now.UnixNano())/2 {
		return
	}
	snap := *f.snap
	snap.Expires = expires
	s.mu.Lock()
	retired := s.retired
	if !retired {
		f.snap = &snap
	}
	s.mu.Unlock()
	if !retired {
		s.deliver(f)
	}
}

func (s *supervisor) deliver(f *farm) {
	if s.h.opts.OnSnapshot != nil {
		s.h.opts.OnSnapshot(f.farm.Name, s.spec.name, f.snap)
	}
}

// configure gives the process all these farms. A farm whose configuration it
// refuses is left out and said so; the error is a *RunError.
func (s *supervisor) configure(p *process, farms []*farm) error {
	for _, f := range farms {
		s.mu.Lock()
		f.have = 0
		s.mu.Unlock()
		err := s.configureOne(p, &f.farmConfig, false)
		if down := (*RunError)(nil); errors.As(err, &down) {
			return err
		}
		s.mu.Lock()
		f.refused = err != nil
		s.mu.Unlock()
		if err != nil {
			s.note(f, err.Error())
		}
	}
	return nil
}

// configureOne returns joined *ConfigError where the plugin refuses, and a
// *RunError where it does not answer.
func (s *supervisor) configureOne(p *process, f *farmConfig, check bool) error {
	ctx, cancel := context.WithTimeout(s.ctx, s.spec.start)
	defer cancel()
	resp, err := p.calls.Base.Configure(ctx, &policypb.ConfigureRequest{Farm: policies.FarmToProto(f.farm), Config: f.config, CheckOnly: check})
	if err != nil {
		return &RunError{s.spec.name, fmt.Errorf("configure farm %q: %s", f.farm.Name, status.Convert(err).Message())}
	}
	var errs []error
	for _, e := range resp.GetErrors() {
		errs = append(errs, &ConfigError{Plugin: s.spec.name, Farm: f.farm.Name, Path: e.GetPath(), Message: e.GetMessage()})
	}
	return errors.Join(errs...)
}

// do has run call the function. It waits for the first start to be over.
func (s *supervisor) do(ctx context.Context, f func(*process) error) error {
	c := call{f, make(chan error, 1)}
	select {
	case <-s.first:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case s.calls <- c:
	case <-s.done:
		return &RunError{s.spec.name, errors.New("is stopped")}
	case <-ctx.Done():
		return ctx.Err()
	}
	return <-c.reply
}

// check asks the plugin about the farms and changes nothing. It returns joined
// *ConfigError, or a *RunError where the plugin is down.
func (s *supervisor) check(ctx context.Context, farms []farmConfig) error {
	return s.do(ctx, func(p *process) error {
		if p == nil {
			s.mu.Lock()
			defer s.mu.Unlock()
			return &RunError{s.spec.name, s.lastErr}
		}
		var errs []error
		for i := range farms {
			if err := s.configureOne(p, &farms[i], true); err != nil {
				errs = append(errs, err)
			}
		}
		return errors.Join(errs...)
	})
}

// commit makes these the farms. A process that does not answer now, after
// check, is an error, but nothing is taken back.
func (s *supervisor) commit(ctx context.Context, spec resolved, want []farmConfig) error {
	return s.do(ctx, func(p *process) error {
		s.mu.Lock()
		path, args, cred, checksum := s.spec.path, s.spec.args, s.spec.cred, s.spec.checksum
		s.spec = spec
		s.spec.path, s.spec.args, s.spec.cred, s.spec.checksum = path, args, cred, checksum
		s.mu.Unlock()
		var farms, changed []*farm
		for _, w := range want {
			i := slices.IndexFunc(s.farms, func(f *farm) bool { return f.farm.Name == w.farm.Name })
			n := newFarm(w)
			if i >= 0 {
				old := s.farms[i]
				n.gen = old.gen
				if slices.Equal(old.farm.Servers, w.farm.Servers) {
					if bytes.Equal(old.config, w.config) && p != nil && old.have != 0 {
						farms = append(farms, old)
						continue
					}
					n.wire, n.snap, n.received, n.ticked = old.wire, old.snap, old.received, old.ticked
				} else if old.snap != nil {
					// The servers are others: the snapshot goes on without
					// those that are gone, and whatever comes is new.
					n.snap, n.received, n.ticked = old.snap.Keep(n.farm.Has), old.received, old.ticked
				}
			}
			farms = append(farms, n)
			changed = append(changed, n)
		}
		var gone []string
		for _, f := range s.farms {
			if !slices.ContainsFunc(farms, func(n *farm) bool { return n.farm.Name == f.farm.Name }) {
				gone = append(gone, f.farm.Name)
			}
		}
		s.mu.Lock()
		s.farms = farms
		s.mu.Unlock()
		if p == nil {
			return nil // the next process gets it all
		}
		for _, name := range gone {
			ctx, cancel := context.WithTimeout(s.ctx, s.h.opts.TickTimeout)
			_, err := p.calls.Base.Forget(ctx, &policypb.ForgetRequest{Farm: name})
			cancel()
			if err != nil {
				s.log.Warn("plugin does not forget a farm", "farm", name, "error", err)
			}
		}
		return s.configure(p, changed)
	})
}

// spoken waits until the process has sent its snapshots for all farms, at most
// for its start timeout.
func (s *supervisor) spoken(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.spec.start)
	defer cancel()
	silent := func() string {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, f := range s.farms {
			if f.have == 0 && !f.refused {
				return f.farm.Name
			}
		}
		return ""
	}
	for {
		farm := silent()
		if farm == "" {
			return nil
		}
		select {
		case <-s.heard:
		case <-s.done:
			return &RunError{s.spec.name, errors.New("is stopped")}
		case <-ctx.Done():
			return &RunError{s.spec.name, fmt.Errorf("no snapshot for farm %q within %s", farm, s.spec.start)}
		}
	}
}

// inherit takes over what the plugin's old process said, before commit, and
// from now on speaks for it.
func (s *supervisor) inherit(old *supervisor) {
	old.mu.Lock()
	var farms []*farm
	for _, f := range old.farms {
		c := *f
		c.have = 0
		farms = append(farms, &c)
	}
	restarts := old.restarts
	old.retired = true
	old.mu.Unlock()
	_ = s.do(s.ctx, func(*process) error {
		s.mu.Lock()
		s.farms, s.restarts = farms, restarts
		s.mu.Unlock()
		return nil
	})
}

func (s *supervisor) set(st State, pid int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state, s.pid, s.since = st, pid, time.Now()
	if err != nil {
		s.lastErr = err
	}
}

func (s *supervisor) snapshot(name string) *snapshot.Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.farms {
		if f.farm.Name == name {
			return f.snap
		}
	}
	return nil
}

func (s *supervisor) status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{
		Plugin: s.spec.name, Command: append([]string{s.spec.path}, s.spec.args[1:]...), State: s.state, Since: s.since,
		PID: s.pid, Version: s.described.GetVersion(), Restarts: s.restarts, Resting: s.resting,
		Decisions: s.asks.count(),
	}
	if s.lastErr != nil {
		st.LastError = s.lastErr.Error()
	}
	for _, f := range s.farms {
		fs := FarmStatus{Farm: f.farm.Name, Received: f.received, LastTick: f.ticked, LastError: f.lastErr}
		if f.snap != nil {
			fs.Generation = f.snap.Generation
			if f.snap.Expires != 0 {
				fs.Expires = time.Unix(0, f.snap.Expires)
			}
		}
		st.Farms = append(st.Farms, fs)
	}
	slices.SortFunc(st.Farms, func(a, b FarmStatus) int { return strings.Compare(a.Farm, b.Farm) })
	return st
}
