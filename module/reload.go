// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/nft"
	"github.com/weirgate/weir/plugins/host"
	"github.com/weirgate/weir/policies/snapshot"
)

// A change of the configuration goes in this order: compare, try to build,
// look at the host, ask the plugins, change the sets of the ruleset, swap the
// database of farms. Whoever refuses leaves everything as it was: what was done
// before is taken back. Established exchanges are not touched by any of it.

// operation is what operators change while the instance runs.
type operation struct {
	sync.Mutex // one change at a time

	file      *config.Config // of the files, as far as it is in force
	overrides []control.Override
	params    nft.Params // of the installed ruleset
	drains    drains
	tracing   atomic.Bool // one trace at a time

	seen struct { // for Status
		sync.Mutex
		refused string   // why the files' present contents are not in force
		waiting []string // keys that wait for a restart
		applied time.Time
	}
}

// errNotServing says that a change came before the instance served packets.
var errNotServing = control.Conflict("the instance is starting; try again when it is ready")

// Reload puts another configuration into force. The plan says what is
// different; those of its changes that need a restart are left out, and Status
// tells of them until they are undone or the restart comes. After an error
// nothing has changed; it is a config.Errors where a place in the configuration
// is to blame. It may be called by any goroutine while Run serves.
func (m *Module) Reload(ctx context.Context, cfg *config.Config) (config.Plan, error) {
	res, err := m.reload(ctx, cfg)
	return res.plan, err
}

// reloaded is the outcome of a reload.
type reloaded struct {
	plan  config.Plan
	notes []string
}

func (m *Module) reload(ctx context.Context, cfg *config.Config) (res reloaded, err error) {
	select {
	case <-m.serving:
	default:
		return res, errNotServing
	}
	m.op.Lock()
	defer m.op.Unlock()
	res.plan = config.Compare(m.op.file, cfg)
	file := config.WithRestartKeys(m.op.file, cfg)
	overrides, notes := keptOverrides(m.op.overrides, file)
	res.notes = notes
	if next := withOverrides(file, overrides); len(notes) > 0 || len(config.Compare(m.config(), next)) > 0 {
		if err := m.apply(ctx, next, overrides); err != nil {
			return res, err
		}
	}
	m.op.file = file
	m.keepConfig()
	for _, n := range notes {
		m.event(control.Event{Name: control.EventOverrideDropped, Text: n})
	}
	m.noteWaiting(res.plan)
	return res, nil
}

// noteWaiting remembers which keys wait for a restart.
func (m *Module) noteWaiting(plan config.Plan) {
	var keys []string
	for _, c := range plan.Of(config.Restart) {
		keys = append(keys, c.Path)
	}
	m.op.seen.Lock()
	before := m.op.seen.waiting
	m.op.seen.waiting = keys
	m.op.seen.Unlock()
	if len(keys) > 0 && !slices.Equal(before, keys) {
		m.event(control.Event{
			Name: control.EventNeedsRestart, Level: control.LevelWarn,
			Text: "changes that take effect at the next restart: " + strings.Join(keys, ", "),
		})
	}
}

// ReloadFiles reads the configuration's files again and puts them into force.
// That they are refused is a result, and an event. why says who asks.
func (m *Module) ReloadFiles(ctx context.Context, why string) (*control.ReloadResult, error) {
	if m.opt.Layers == nil {
		return nil, control.Conflict("this instance does not know the files of its configuration")
	}
	select {
	case <-m.serving:
	case <-m.ended:
		return nil, errEnded
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	cfg, err := config.Reload(m.opt.Layers())
	if err != nil {
		return m.refuse(why, nil, err), nil
	}
	res, err := m.reload(ctx, cfg)
	if errors.Is(err, errEnded) || ctx.Err() != nil {
		return nil, err
	}
	if err != nil {
		return m.refuse(why, res.plan, Locate(cfg, err)), nil
	}
	m.op.seen.Lock()
	was := m.op.seen.refused
	m.op.seen.refused = ""
	m.op.seen.Unlock()
	out := &control.ReloadResult{Outcome: control.Applied, Generation: m.db.Load().Generation, Changes: res.plan, Notes: res.notes}
	if waits := res.plan.Of(config.Restart); len(waits) == len(res.plan) && len(res.notes) == 0 {
		out.Outcome = control.Unchanged
		if was != "" {
			m.event(control.Event{Name: control.EventReloaded, Text: "the files are as in force again (" + why + ")"})
		}
		return out, nil
	}
	n := len(res.plan) - len(res.plan.Of(config.Restart))
	m.event(control.Event{Name: control.EventReloaded, Count: uint64(n), Text: fmt.Sprintf("%s in force (%s)", countOf(n, "change"), why)})
	return out, nil
}

// countOf writes "1 change is" or "2 changes are".
func countOf(n int, word string) string {
	if n == 1 {
		return "1 " + word + " is"
	}
	return fmt.Sprintf("%d %ss are", n, word)
}

// refuse reports a configuration that is not taken.
func (m *Module) refuse(why string, plan config.Plan, err error) *control.ReloadResult {
	res := &control.ReloadResult{Outcome: control.Refused, Generation: m.db.Load().Generation, Changes: plan, Problems: problems(err)}
	text := res.Problems[0].Text
	if n := len(res.Problems); n > 1 {
		text += fmt.Sprintf(" (and %d more)", n-1)
	}
	m.op.seen.Lock()
	repeated := m.op.seen.refused == text
	m.op.seen.refused = text
	m.op.seen.Unlock()
	if !repeated || why != whyFiles {
		m.event(control.Event{
			Name: control.EventReloadRefused, Level: control.LevelError, Count: uint64(len(res.Problems)),
			Text: "the configuration is refused, the old one stays (" + why + "): " + text,
		})
	}
	return res
}

func problems(err error) []control.Problem {
	var list config.Errors
	if !errors.As(err, &list) {
		return []control.Problem{{Text: err.Error()}}
	}
	var out []control.Problem
	for _, e := range list {
		out = append(out, control.Problem{File: e.File, Line: e.Line, Key: e.Key, Text: e.Error()})
	}
	return out
}

// Who asks for a reload.
const (
	whyFiles  = "the files changed"
	whyCaller = "asked by an operator"
)

// watch reloads when the files change, until ctx ends.
func (m *Module) watch(ctx context.Context) {
	if m.opt.Layers == nil {
		return
	}
	m.op.Lock()
	loaded := m.op.file
	m.op.Unlock()
	config.Watch(ctx, config.WatchOptions{Layers: m.opt.Layers, Loaded: loaded, Changed: func(err error) {
		if err != nil {
			m.refuse(whyFiles, nil, err)
			return
		}
		if _, err := m.ReloadFiles(ctx, whyFiles); err != nil && ctx.Err() == nil {
			m.log.Error("reload", "error", err)
		}
	}})
}

// apply puts a configuration into force, or changes nothing. It has the values
// of the present one where only a restart could change them, and the overrides
// in it, which become those in force with it. The caller holds m.op.
func (m *Module) apply(ctx context.Context, next *config.Config, overrides []control.Override) error {
	now := m.config()
	if err := next.Check(); err != nil {
		return err
	}
	// Build without the plugins' say, to know that it can be built.
	spec, err := farmSpec(next, func(_, p string) (*snapshot.Snapshot, host.About) { return nil, m.host.About(p) })
	if err != nil {
		return err
	}
	if _, err := farm.Build(m.db.Load(), spec); err != nil {
		return err
	}
	drains := m.op.drains.with(now, next, m.db.Load(), time.Now())
	params := m.paramsFor(next, &drains)
	if err := params.Validate(); err != nil {
		return err
	}
	fresh := func(v netip.AddrPort) bool { return !slices.Contains(m.op.params.VIPs, v) }
	if err := m.onThread(ctx, func() error { return m.lookAgain(params, fresh) }); err != nil {
		return err
	}

	// New snapshots speak of the new farms and servers: they are kept until
	// the database has these.
	m.holdSnapshots()
	release := sync.OnceFunc(m.releaseSnapshots)
	defer release()
	plugins, farms := PluginSpecs(next)
	if err := m.host.Apply(ctx, plugins, farms); err != nil {
		return err
	}
	m.awaitSnapshots(ctx, now, next)
	if err := m.onThread(ctx, func() error { return m.changeRules(&params) }); err != nil {
		m.restorePlugins(now)
		return err
	}
	m.noteDrains(&drains)
	if err := m.swap(next, overrides); err != nil {
		m.noteDrains(&m.op.drains)
		m.restorePlugins(now)
		old := m.op.params
		return errors.Join(err, m.onThread(ctx, func() error { return m.changeRules(&old) }))
	}
	release()
	m.op.params, m.op.drains = params, drains
	m.tellLeaving()
	m.putOverrides(overrides)
	m.tellDifference(now, next)
	m.drainNow(ctx)
	if m.opt.Applied != nil {
		m.opt.Applied(next)
	}
	return nil
}

// restorePlugins gives the plugins their old configuration back.
func (m *Module) restorePlugins(old *config.Config) {
	plugins, farms := PluginSpecs(old)
	if err := m.host.Apply(m.life, plugins, farms); err != nil {
		m.log.Error("plugins do not take their old configuration back", "error", err)
	}
}

// lookAgain refuses what cannot work on this host, before anything is changed.
func (m *Module) lookAgain(params nft.Params, fresh func(netip.AddrPort) bool) error {
	var vips []netip.AddrPort
	for _, v := range params.VIPs {
		if fresh(v) {
			vips = append(vips, v)
		}
	}
	if err := nft.CheckVIPListeners(vips); err != nil {
		return err
	}
	return nft.CheckForwarding(params)
}

// changeRules changes the sets of the ruleset, and the sysctls of interfaces
// that were not needed before. It runs on the thread of Run.
func (m *Module) changeRules(params *nft.Params) error {
	dir := m.config().RuntimeDir
	ifaces, err := nft.Interfaces(*params)
	if err != nil {
		return err
	}
	if params.StrictRPFilter, err = nft.StrictInterfaces(dir, ifaces...); err != nil {
		return err
	}
	before := m.op.params
	if err := m.firewall.Update(*params); err != nil {
		return err
	}
	needs := nft.Needs(*params, ifaces...)
	journal, err := nft.ApplySysctls(dir, needs)
	if err != nil {
		return errors.Join(err, m.firewall.Update(before))
	}
	m.journal, m.needs = journal, needs
	return nil
}

// paramsFor are the parameters of the ruleset: what the configuration has, and
// what drains.
func (m *Module) paramsFor(c *config.Config, d *drains) nft.Params {
	p := firewallParams(c, m.op.params.Shards)
	p.ExceptPorts, p.StrictRPFilter, p.SYNToLo = m.op.params.ExceptPorts, m.op.params.StrictRPFilter, m.op.params.SYNToLo
	d.addTo(&p)
	return p
}

// holdSnapshots has new snapshots wait.
func (m *Module) holdSnapshots() {
	m.policies.Lock()
	defer m.policies.Unlock()
	m.policies.held = true
}

// releaseSnapshots compiles the snapshots that came meanwhile.
func (m *Module) releaseSnapshots() {
	m.policies.Lock()
	defer m.policies.Unlock()
	m.policies.held = false
	for _, f := range m.db.Load().Farms {
		if c := m.config().Farm(f.Name); c != nil && len(c.Policies) > 0 {
			if err := m.compile(f, c); err != nil {
				m.log.Warn("the snapshots of a farm's policies do not fit; the last choice stays", "farm", f.Name, "error", err)
			}
		}
	}
	m.takeConnections()
}

// snapshotPatience bounds the wait for the plugins' first word about what
// changed.
const snapshotPatience = 5 * time.Second

// awaitSnapshots waits until every plugin has answered for every farm that
// changed for it, so that no request meets new servers with old routes, or a
// new policy that has said nothing yet. Who is down is not waited for.
func (m *Module) awaitSnapshots(ctx context.Context, now, next *config.Config) {
	type pair struct{ farm, plugin string }
	want := map[pair]bool{}
	for i := range next.Farms {
		f := &next.Farms[i]
		old := now.Farm(f.Name)
		for _, p := range f.Policies {
			if old == nil || !reflect.DeepEqual(old.Servers, f.Servers) || !usesPolicy(old, p.Use) ||
				!reflect.DeepEqual(now.PolicyConfig(old, p.Use), next.PolicyConfig(f, p.Use)) {
				want[pair{f.Name, p.Use}] = true
			}
		}
	}
	if len(want) == 0 {
		return
	}
	asked := time.Now()
	ctx, cancel := context.WithTimeout(ctx, snapshotPatience)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		down, heard := map[string]bool{}, map[pair]bool{}
		for _, st := range m.host.Status() {
			down[st.Plugin] = st.State != host.StateUp
			for _, f := range st.Farms {
				heard[pair{f.Farm, st.Plugin}] = f.LastTick.After(asked)
			}
		}
		missing := 0
		for w := range want {
			if !down[w.plugin] && !heard[w] {
				missing++
			}
		}
		if missing == 0 {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func usesPolicy(f *config.Farm, name string) bool {
	return slices.ContainsFunc(f.Policies, func(p config.PolicyUse) bool { return p.Use == name })
}

// swap makes the next generation of the database of farms and puts it into
// force together with its configuration.
func (m *Module) swap(next *config.Config, overrides []control.Override) error {
	m.policies.Lock()
	defer m.policies.Unlock()
	spec, err := farmSpec(next, func(f, p string) (*snapshot.Snapshot, host.About) {
		s := m.policies.last[[2]string{f, p}]
		if s != nil {
			s = s.Keep(hasServer(next.Farm(f)))
		}
		return s, m.host.About(p)
	})
	if err != nil {
		return err
	}
	db, err := farm.Build(m.db.Load(), spec)
	if err != nil {
		return err
	}
	// A farm that takes connections goes on doing so, whatever policy it got.
	for id, open := range *m.ready.Load() {
		m.policies.open[id] = m.policies.open[id] || open
	}
	for key := range m.policies.last {
		if f := next.Farm(key[0]); f == nil || !usesPolicy(f, key[1]) {
			delete(m.policies.last, key)
		}
	}
	for id := range m.policies.open {
		if f := db.FarmByID(id); f == nil || f.Removed {
			delete(m.policies.open, id)
		}
	}
	if err := m.remember(db); err != nil {
		return err
	}
	m.conf.Store(next)
	m.db.Store(db)
	setStates(db, overrides)
	m.takeConnections()
	m.startFarms(m.life)
	return nil
}

func hasServer(f *config.Farm) func(string) bool {
	return func(name string) bool {
		return f != nil && slices.ContainsFunc(f.Servers, func(s config.Server) bool { return s.Name == name })
	}
}

// tellDifference makes the events of servers and VIPs that came or went.
func (m *Module) tellDifference(now, next *config.Config) {
	for _, c := range config.Compare(now, next) {
		ev := control.Event{Text: c.String()}
		switch schemaPath(c.Path) {
		case "farms[].servers[]":
			ev.Name = map[config.Action]string{config.Added: control.EventServerAdded, config.Removed: control.EventServerRemoved}[c.Action]
		case "farms[].servers[].address":
			ev.Name = control.EventServerRemoved
		case "farms[].listen[]":
			ev.Name = map[config.Action]string{config.Added: control.EventVIPAdded, config.Removed: control.EventVIPRemoved}[c.Action]
		case "farms[].servers[].weight":
			ev.Name = control.EventServerWeight
		}
		if ev.Name != "" {
			ev.Farm, ev.Server = namesIn(c.Path)
			m.event(ev)
		}
	}
}

// namesIn returns the farm and the server that a path speaks of.
func namesIn(path string) (farm, server string) {
	name := func(key string) string {
		_, rest, ok := strings.Cut(path, key+"[")
		if !ok {
			return ""
		}
		rest, _, _ = strings.Cut(rest, "]")
		return rest
	}
	return name("farms"), name(".servers")
}

// schemaPath takes the names out of a path.
func schemaPath(path string) string {
	var b strings.Builder
	inside := 0 // brackets that are open; an IPv6 address has its own
	for _, r := range path {
		switch {
		case r == '[':
			if inside == 0 {
				b.WriteString("[]")
			}
			inside++
		case r == ']':
			inside--
		case inside == 0:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// event remembers and logs a happening.
func (m *Module) event(ev control.Event) {
	m.events.Add(ev)
	args := []any{"event", ev.Name}
	for _, a := range [...][2]string{{"farm", ev.Farm}, {"server", ev.Server}, {"plugin", ev.Plugin}} {
		if a[1] != "" {
			args = append(args, a[0], a[1])
		}
	}
	switch ev.Level {
	case control.LevelError:
		m.log.Error(ev.Text, args...)
	case control.LevelWarn:
		m.log.Warn(ev.Text, args...)
	default:
		m.log.Info(ev.Text, args...)
	}
}
