// SPDX-License-Identifier: Apache-2.0

// Package policytest is a conformance kit for policy plugins, whatever they are
// written in. It runs a plugin's executable as Weir does, through its whole
// life: start, description, configuration, snapshots, a new configuration,
// questions, the end of Weir, a kill. A plugin that passes works with Weir as
// far as the contract goes:
//
//	func TestConformance(t *testing.T) {
//		policytest.Run(t, policytest.Options{
//			Command: []string{build(t)},
//			Config:  `{"server": "s1"}`,
//			Bad:     []string{`{"server": "s9"}`},
//		})
//	}
//
// The kit must not depend on anything of Weir but the contract.
package policytest

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/policypb"
	"github.com/weirgate/weir/policies/snapshot"
)

// Options say which plugin is tried, and what it can be told.
type Options struct {
	Command []string // the executable and its arguments
	Env     []string // beside what Weir gives, NAME=VALUE

	Config string   // a configuration that it accepts, JSON; default: {}
	Bad    []string // configurations that it refuses

	// Servers are the names of the farm's servers. Default: s1, s2, s3. Config
	// has to fit them, and to fit a farm that has one more.
	Servers []string

	StartTimeout time.Duration // default: 5 s
	// Patience is how long the first snapshot may take. Default: 5 s.
	Patience time.Duration
}

// kit is one run.
type kit struct {
	*Options
	p     *process
	about *policypb.DescribeResponse
	asks  *policies.AskKey // nil: it does not want to be asked
}

const (
	farmName  = "kit"
	otherFarm = "kit-other"
	// tickLimit is how long a Tick may take before Weir counts it as missed.
	tickLimit = time.Second
)

// Run tries the plugin. Every promise of the contract that it breaks is an
// error of a subtest that says which.
func Run(t *testing.T, o Options) {
	t.Helper()
	if len(o.Command) == 0 {
		t.Fatal("policytest: Options.Command is empty")
	}
	if o.Config == "" {
		o.Config = "{}"
	}
	if len(o.Servers) == 0 {
		o.Servers = []string{"s1", "s2", "s3"}
	}
	if o.StartTimeout == 0 {
		o.StartTimeout = 5 * time.Second
	}
	if o.Patience == 0 {
		o.Patience = 5 * time.Second
	}
	k := &kit{Options: &o}
	k.p = start(t, &o)
	for _, step := range []struct {
		name string
		f    func(*testing.T)
	}{
		{"describe", k.describe},
		{"check", k.check},
		{"configure", k.configure},
		{"snapshots", k.snapshots},
		{"telemetry", k.telemetry},
		{"reconfigure", k.reconfigure},
		{"farms", k.farms},
		{"decide", k.decide},
		{"forget", k.forget},
		{"stop", k.stop},
		{"kill", k.kill},
	} {
		if !t.Run(step.name, step.f) && (step.name == "describe" || step.name == "configure") {
			t.FailNow() // the rest would only repeat it
		}
	}
}

func (k *kit) farm(name string, more ...string) *policypb.Farm {
	f := policies.Farm{Name: name}
	for i, s := range append(slices.Clone(k.Servers), more...) {
		f.Servers = append(f.Servers, policies.Server{Name: s, Address: "198.51.100." + string(rune('1'+i%9)) + ":80", Weight: uint32(1 + i%3), Backup: false})
	}
	return policies.FarmToProto(f)
}

// within bounds a call.
func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func (k *kit) describe(t *testing.T) {
	d, err := k.p.base.Describe(within(t, k.StartTimeout), &policypb.DescribeRequest{WeirVersion: "kit"})
	if err != nil {
		t.Fatal(err)
	}
	k.about = d
	if d.GetName() == "" || d.GetVersion() == "" {
		t.Errorf("name %q, version %q: people need both", d.GetName(), d.GetVersion())
	}
	push := false
	for _, c := range d.GetCapabilities() {
		if c.GetVersion() < 1 {
			t.Errorf("capability %q has version %d, which counts from 1", c.GetName(), c.GetVersion())
		}
		switch c.GetName() {
		case policies.CapabilityPush:
			push = true
		case policies.CapabilityAsk:
			if k.asks, err = policies.AskKeyFromProto(d.GetAsk()); err != nil {
				t.Errorf("it %v", err)
			}
		}
	}
	if !push {
		t.Errorf("capabilities %v: %q is not among them", d.GetCapabilities(), policies.CapabilityPush)
	}
	if s := d.GetConfigSchema(); len(s) > 0 && !json.Valid(s) {
		t.Errorf("config_schema is not JSON: %.100s", s)
	}
	again, err := k.p.base.Describe(within(t, k.StartTimeout), &policypb.DescribeRequest{})
	if err != nil || !proto.Equal(d, again) {
		t.Errorf("a second Describe says something else: %v, %v", again, err)
	}
}

func (k *kit) call(t *testing.T, farm *policypb.Farm, config string, check bool) []*policypb.ConfigError {
	t.Helper()
	r, err := k.p.base.Configure(within(t, k.StartTimeout), &policypb.ConfigureRequest{Farm: farm, Config: []byte(config), CheckOnly: check})
	if err != nil {
		t.Fatalf("Configure: %v; what is wrong with a configuration belongs into errors of the response", err)
	}
	return r.GetErrors()
}

// check: a check changes nothing, and a refusal says what and where.
func (k *kit) check(t *testing.T) {
	if errs := k.call(t, k.farm(farmName), k.Config, true); len(errs) > 0 {
		t.Errorf("a good configuration is refused: %v", errs)
	}
	for _, bad := range k.Bad {
		for _, check := range []bool{true, false} {
			errs := k.call(t, k.farm(farmName), bad, check)
			if len(errs) == 0 {
				t.Errorf("%s is accepted", bad)
			}
			for _, e := range errs {
				if e.GetMessage() == "" {
					t.Errorf("%s: an error without a message", bad)
				}
				if p := e.GetPath(); p != "" && p != "config" && !strings.HasPrefix(p, "config.") && !strings.HasPrefix(p, "config[") {
					t.Errorf("%s: the path %q does not begin with config", bad, p)
				}
			}
		}
	}
	if _, _, err := k.tick(t, farmName, nil, 0); status.Code(err) != codes.NotFound {
		t.Errorf("after checks alone, a Tick for the farm is answered with %v, expected NOT_FOUND", err)
	}
}

func (k *kit) configure(t *testing.T) {
	if errs := k.call(t, k.farm(farmName), k.Config, false); len(errs) > 0 {
		t.Fatalf("%s is refused: %v", k.Config, errs)
	}
}

func (k *kit) tick(t *testing.T, farm string, tel *policypb.Telemetry, have uint64) (*policypb.Snapshot, time.Duration, error) {
	t.Helper()
	began := time.Now()
	r, err := k.p.push.Tick(within(t, 10*tickLimit), &policypb.TickRequest{Farm: farm, Telemetry: tel, HaveGeneration: have})
	took := time.Since(began)
	if err == nil && took > tickLimit {
		t.Errorf("a Tick takes %s; Weir counts it as missed after %s", took, tickLimit)
	}
	return r.GetSnapshot(), took, err
}

// calm is how a farm is where nothing happens.
func (k *kit) calm() *policypb.Telemetry {
	t := &policypb.Telemetry{TimeUnixNano: time.Now().UnixNano()}
	for _, s := range k.Servers {
		t.Servers = append(t.Servers, &policypb.ServerTelemetry{Name: s, State: policypb.ServerState_SERVER_STATE_READY, Available: true})
	}
	return t
}

// fits says whether a snapshot is one that Weir takes for these servers.
func (k *kit) fits(t *testing.T, p *policypb.Snapshot, farm *policypb.Farm) {
	t.Helper()
	s, err := policies.SnapshotFromProto("plugin", p, time.Now(), time.Minute)
	if err != nil {
		t.Errorf("the snapshot is refused: %v", err)
		return
	}
	var servers []snapshot.ServerConfig
	for _, sv := range farm.GetServers() {
		servers = append(servers, snapshot.ServerConfig{Name: sv.GetName(), Weight: sv.GetWeight(), Backup: sv.GetBackup()})
	}
	if _, err := snapshot.NewSelector(servers, []snapshot.Policy{{Name: "plugin", Snapshot: s}}); err != nil {
		t.Errorf("the snapshot does not fit the farm: %v", err)
	}
	kinds := k.about.GetKinds()
	for kind, has := range map[policies.Kind]bool{
		policies.SendsRoutes: p.GetRoutes() != nil, policies.SendsAffinity: p.GetAffinity() != nil, policies.SendsEligibility: p.GetEligibility() != nil,
		policies.SendsBudgets: p.GetBudgets() != nil, policies.SendsScores: p.GetScores() != nil,
	} {
		if has && !slices.Contains(kinds, kind) {
			t.Errorf("the snapshot holds %s, and Describe does not say so", kind)
		}
	}
}

// first ticks until there is a snapshot.
func (k *kit) first(t *testing.T, farm string) *policypb.Snapshot {
	t.Helper()
	for end := time.Now().Add(k.Patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		s, _, err := k.tick(t, farm, k.calm(), 0)
		if err != nil {
			t.Fatalf("Tick: %v", err)
		}
		if s != nil {
			return s
		}
	}
	t.Fatalf("no snapshot within %s; until there is one, the farm takes no connections", k.Patience)
	return nil
}

func (k *kit) snapshots(t *testing.T) {
	s := k.first(t, farmName)
	if s.GetGeneration() == 0 {
		t.Error("the first snapshot has the generation 0, which stands for none")
	}
	k.fits(t, s, k.farm(farmName))
	have := s.GetGeneration()
	for range 5 {
		n, _, err := k.tick(t, farmName, k.calm(), have)
		if err != nil {
			t.Fatalf("Tick: %v", err)
		}
		if n == nil {
			continue
		}
		if n.GetGeneration() <= have {
			t.Errorf("generation %d after %d: it counts up, and what Weir has is not sent again", n.GetGeneration(), have)
		}
		have = n.GetGeneration()
		k.fits(t, n, k.farm(farmName))
	}
	// Weir has lost it.
	n, _, err := k.tick(t, farmName, k.calm(), 0)
	if err != nil || n == nil {
		t.Errorf("to have_generation 0 the current snapshot is sent; there came %v, %v", n, err)
	}
	if _, _, err := k.tick(t, "kit-unknown", nil, 0); status.Code(err) != codes.NotFound {
		t.Errorf("a Tick for an unknown farm is answered with %v, expected NOT_FOUND", err)
	}
}

// telemetry: whatever Weir says, the plugin goes on.
func (k *kit) telemetry(t *testing.T) {
	huge := k.calm()
	huge.Requests = 1 << 63
	for _, s := range huge.Servers {
		s.Active, s.Requests, s.Failures, s.BytesOut = 1<<31, 1<<63, 1<<62, 1<<63
		s.FirstByte = &policypb.Histogram{SumNanos: 1 << 62, Counts: make([]uint64, 64)}
		for i := range s.FirstByte.Counts {
			s.FirstByte.Counts[i] = 1 << 50
		}
		s.FailuresByKind = []*policypb.FailureCount{{Kind: 99, Count: 5}, {Kind: policypb.FailureKind_FAILURE_KIND_RESET, Count: 1 << 60}}
	}
	stranger := k.calm()
	stranger.Servers = append(stranger.Servers, &policypb.ServerTelemetry{Name: "kit-stranger", Active: 1})
	for name, tel := range map[string]*policypb.Telemetry{"none": nil, "empty": {}, "huge": huge, "after a restart": k.calm(), "with an unknown server": stranger} {
		s, _, err := k.tick(t, farmName, tel, 0)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if s != nil {
			k.fits(t, s, k.farm(farmName))
		}
	}
}

// reconfigure: the farm gets a server more, and a refusal leaves what was.
func (k *kit) reconfigure(t *testing.T) {
	for _, bad := range k.Bad {
		if errs := k.call(t, k.farm(farmName), bad, false); len(errs) == 0 {
			t.Errorf("%s is accepted", bad)
		}
		if s, _, err := k.tick(t, farmName, k.calm(), 0); err != nil || s == nil {
			t.Errorf("after a refusal it goes on with what it had; a Tick brings %v, %v", s, err)
		}
	}
	more := k.farm(farmName, "kit-new")
	if errs := k.call(t, more, k.Config, false); len(errs) > 0 {
		t.Fatalf("refused for a farm with one server more: %v", errs)
	}
	k.fits(t, k.first(t, farmName), more)
	if errs := k.call(t, k.farm(farmName), k.Config, false); len(errs) > 0 {
		t.Fatalf("refused the second time: %v", errs)
	}
	// From now on nothing may name the server that is gone.
	for range 3 {
		k.fits(t, k.first(t, farmName), k.farm(farmName))
	}
}

// farms: one process serves several, also at the same time.
func (k *kit) farms(t *testing.T) {
	if errs := k.call(t, k.farm(otherFarm), k.Config, false); len(errs) > 0 {
		t.Fatalf("refused for a second farm: %v", errs)
	}
	var wg sync.WaitGroup
	for _, farm := range []string{farmName, otherFarm} {
		wg.Go(func() {
			for range 10 {
				if _, err := k.p.push.Tick(within(t, 10*tickLimit), &policypb.TickRequest{Farm: farm, Telemetry: k.calm()}); err != nil {
					t.Errorf("farm %s: %v", farm, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// question is one with all parts that the plugin wants.
func (k *kit) question(n int) *policypb.DecideRequest {
	q := &policies.Question{Attempt: 1}
	if k.asks.Method {
		q.Method = "GET"
	}
	if k.asks.Host {
		q.Host = "shop.example"
	}
	if k.asks.Path {
		q.Path = "/kit/" + string(rune('a'+n%26))
	}
	for i, f := range k.asks.Fields {
		q.Fields = append(q.Fields, snapshot.KeyField{Field: f, Value: string(rune('a' + n%26)), Present: (n+i)%2 == 0})
		if (n+i)%2 != 0 {
			q.Fields[i].Value = ""
		}
	}
	p := policies.QuestionToProto(farmName, q)
	if k.asks.Client {
		p.Client = []string{"198.51.100.7", "2001:db8::7", "198.51.100.0/24"}[n%3]
	}
	if n%5 == 4 {
		p.Attempt, p.Tried = 2, k.Servers[:1]
	}
	return p
}

func (k *kit) decide(t *testing.T) {
	if k.asks == nil {
		t.Skip("the plugin does not want to be asked")
	}
	var wg sync.WaitGroup
	for n := range 50 {
		wg.Go(func() {
			r, err := k.p.ask.Decide(within(t, 5*time.Second), k.question(n))
			if err != nil {
				t.Errorf("question %d: %v", n, err)
				return
			}
			a, _, err := policies.AnswerFromProto(r)
			if err != nil {
				t.Errorf("question %d: it %v", n, err)
				return
			}
			for _, s := range a.Servers {
				if !slices.Contains(k.Servers, s.Server) {
					t.Errorf("question %d: server %q is not in the farm", n, s.Server)
				}
			}
		})
	}
	wg.Wait()
	q := k.question(0)
	q.Farm = "kit-unknown"
	if _, err := k.p.ask.Decide(within(t, 5*time.Second), q); status.Code(err) != codes.NotFound {
		t.Errorf("a question about an unknown farm is answered with %v, expected NOT_FOUND", err)
	}
	var took []time.Duration
	for n := range 40 {
		began := time.Now()
		if _, err := k.p.ask.Decide(within(t, 5*time.Second), k.question(n)); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	t.Logf("an answer takes %s (median of %d); the default deadline is 5ms", took[len(took)/2].Round(10*time.Microsecond), len(took))
}

func (k *kit) forget(t *testing.T) {
	if _, err := k.p.base.Forget(within(t, k.StartTimeout), &policypb.ForgetRequest{Farm: otherFarm}); err != nil {
		t.Error(err)
	}
	if _, _, err := k.tick(t, otherFarm, nil, 0); status.Code(err) != codes.NotFound {
		t.Errorf("a Tick for a farm that is forgotten is answered with %v, expected NOT_FOUND", err)
	}
	if _, _, err := k.tick(t, farmName, k.calm(), 0); err != nil {
		t.Errorf("the other farm: %v", err)
	}
	if _, err := k.p.base.Forget(within(t, k.StartTimeout), &policypb.ForgetRequest{Farm: "kit-unknown"}); err != nil {
		t.Errorf("an unknown farm: %v; to forget it is done already", err)
	}
}

// stop: the end of standard input says that Weir is gone.
func (k *kit) stop(t *testing.T) {
	if err := k.p.stdin.Close(); err != nil && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if err := k.p.waitEnd(2 * time.Second); err != nil {
		t.Errorf("two seconds after the end of standard input, which means that Weir is gone: %v", err)
	}
}

// kill: killed in the middle, it starts again and knows how to go on.
func (k *kit) kill(t *testing.T) {
	for range 2 {
		k.p = start(t, k.Options)
		k.configure(t)
		k.fits(t, k.first(t, farmName), k.farm(farmName))
		_ = k.p.cmd.Process.Kill() // It runs: it has just answered.
		if err := k.p.waitEnd(5 * time.Second); err != nil {
			t.Fatal(err)
		}
	}
}
