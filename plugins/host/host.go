// SPDX-License-Identifier: Apache-2.0

// Package host runs the policy plugins: it starts their executables without
// privileges, configures them for the farms, asks them for snapshots, starts
// them again when they die, and takes none of it to the packet path. What it
// hands out are snapshots; the last one of a dead plugin stays.
//
// One process serves all farms that use a plugin. Each process has one
// goroutine, its supervisor, which makes all calls to it; see supervisor.go.
// Processes are started from one thread that the Host owns; see process.go.
//
// This package must not know what a snapshot means to the engine, nor import
// anything of module/.
package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/policypb"
	"github.com/weirgate/weir/policies/snapshot"
)

// Defaults of Options and PluginSpec.
const (
	DefaultTick         = time.Second
	DefaultTickTimeout  = time.Second
	DefaultStartTimeout = 5 * time.Second
	DefaultExpiry       = 30 * time.Second
	DefaultBackoffMin   = 100 * time.Millisecond
	DefaultBackoffMax   = 5 * time.Second
	DefaultUser         = "nobody"

	// A plugin that was started so often within the window is given a rest
	// between further tries.
	DefaultRestarts      = 10
	DefaultRestartWindow = time.Minute
	DefaultRestartRest   = 30 * time.Second

	// What a plugin may ask for as the time between ticks.
	leastTick = 100 * time.Millisecond
	mostTick  = time.Second

	// backoffReset is how long a process has to live for the next restart to
	// be quick again.
	backoffReset = 30 * time.Second
	// maxMisses is how many ticks in a row a process may miss.
	maxMisses = 3
	// stopGrace is how long a process may take to end when told to.
	stopGrace = 500 * time.Millisecond
)

// Options are the surroundings of a Host. All fields may be left zero.
type Options struct {
	Log *slog.Logger // default: slog.Default

	// Dirs is where a command without a slash is looked up. Default:
	// DefaultDirs.
	Dirs []string

	// RuntimeDir is where the directory "plugins" with the sockets is made; it
	// is removed by Close. Default: a temporary directory.
	RuntimeDir string

	Version string // of Weir, told to the plugins

	// OnSnapshot is called with each new snapshot, and with the old one again
	// when its expiry has moved on. It runs on the plugin's supervisor, also
	// while Apply runs, and must neither block nor call the Host's Apply or
	// Close. While the farm's servers change, s may name servers that the
	// receiver does not have yet or any more: see snapshot.Keep.
	OnSnapshot func(farm, plugin string, s *snapshot.Snapshot)

	// Telemetry is asked before each tick; nil sends none.
	Telemetry func(farm string) *policypb.Telemetry

	Tick        time.Duration // between two ticks of a farm
	TickTimeout time.Duration // after which a tick counts as missed
	BackoffMin  time.Duration // before the first restart
	BackoffMax  time.Duration // before every later one, at most
	Restarts    int           // as in PluginSpec, for those that say nothing

	// OnThread is called once on the thread from which all plugins are
	// started, before the first of them; what it sets for its thread, such as
	// a network namespace, holds for the plugins.
	OnThread func() error
}

// PluginSpec is one entry of the configuration's list of plugins.
type PluginSpec struct {
	Name         string
	Command      []string       // default: [Name]
	Config       map[string]any // the base that a farm's entry overlays
	User         string         // name or uid[:gid]; default: nobody if we are root, else ourselves
	Checksum     string         // SHA-256 of the executable in hexadecimal, with or without "sha256:"; "": unchecked
	StartTimeout time.Duration
	Expiry       time.Duration // of eligibility, budgets and scores after the last tick; negative: never

	AskDeadline    time.Duration // for an answer to a question
	AskConcurrency int           // questions at once

	BackoffMin time.Duration // before the first restart; default: that of Options
	BackoffMax time.Duration // before every later one, at most
	Restarts   int           // within RestartWindow; after more, RestartRest lies between two; negative: no limit
}

// FarmSpec is a farm as far as plugins are concerned.
type FarmSpec struct {
	Name     string
	Servers  []ServerInfo
	Policies []PolicyUse
}

// ServerInfo is one server of a farm.
type ServerInfo struct {
	Name    string
	Address string // address:port
	Weight  uint32
	Backup  bool
}

// PolicyUse is one entry of a farm's list of policies.
type PolicyUse struct {
	Plugin  string
	Config  map[string]any   // overlays that of the plugin: maps are merged, all else is replaced
	OnEmpty snapshot.OnEmpty // not used here; for the selector
}

// ConfigError is a configuration that a plugin refuses.
type ConfigError struct {
	Plugin, Farm string
	Path         string // the key, as in "config.routes[1].prefix"
	Message      string
}

func (e *ConfigError) Error() string {
	where := fmt.Sprintf("farm %q: plugin %q: ", e.Farm, e.Plugin)
	if e.Path != "" {
		where += e.Path + ": "
	}
	return where + e.Message
}

// SpecError is a plugin entry that cannot work: no such command, no such user,
// another checksum.
type SpecError struct {
	Plugin  string
	Message string
}

func (e *SpecError) Error() string { return fmt.Sprintf("plugin %q: %s", e.Plugin, e.Message) }

// RunError is a plugin process that does not run or does not answer. It may
// after a restart.
type RunError struct {
	Plugin string
	Err    error
}

func (e *RunError) Error() string { return fmt.Sprintf("plugin %q: %v", e.Plugin, e.Err) }

// Unwrap returns the cause.
func (e *RunError) Unwrap() error { return e.Err }

// DefaultDirs returns where commands without a slash are looked up: "plugins"
// beside this executable, then the directory of the package.
func DefaultDirs() []string {
	dirs := []string{"/usr/lib/weir/plugins"}
	if exe, err := os.Executable(); err == nil {
		dirs = append([]string{filepath.Join(filepath.Dir(exe), "plugins")}, dirs...)
	}
	return dirs
}

// Host runs plugins. All methods may be called from several goroutines.
type Host struct {
	opts Options
	log  *slog.Logger

	applying sync.Mutex // held by Apply and Close

	mu      sync.Mutex // guards what follows
	plugins map[string]*supervisor
	dir     string // of the sockets; "" before the first process
	tempDir string // to remove; "" if RuntimeDir was given
	thread  *thread
	closed  bool
}

// New returns a Host without plugins. It starts nothing.
func New(o Options) *Host {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Dirs == nil {
		o.Dirs = DefaultDirs()
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&o.Tick, DefaultTick)
	def(&o.TickTimeout, DefaultTickTimeout)
	def(&o.BackoffMin, DefaultBackoffMin)
	def(&o.BackoffMax, DefaultBackoffMax)
	if o.Restarts == 0 {
		o.Restarts = DefaultRestarts
	}
	return &Host{opts: o, log: o.Log, plugins: map[string]*supervisor{}}
}

// Start is the first Apply.
func (h *Host) Start(ctx context.Context, plugins []PluginSpec, farms []FarmSpec) error {
	return h.Apply(ctx, plugins, farms)
}

// Apply makes the Host run what the two lists say, and nothing else. It starts
// what is new, has every plugin check its configuration for every farm, and
// only then changes anything: after an error the running set is as before. The
// error joins all *SpecError and *ConfigError. A plugin that does not run at
// the moment is no error: it is logged, started again and again, and gets its
// configuration then. A plugin whose command, user or checksum changed goes on
// until its successor is up and configured; there a successor that does not run
// is a *RunError. Only plugins that a farm uses are
// started; one that a farm uses and no PluginSpec names has the default spec.
func (h *Host) Apply(ctx context.Context, plugins []PluginSpec, farms []FarmSpec) error {
	return h.apply(ctx, plugins, farms, false)
}

// CheckConfig starts the plugins that the farms use, has them check their
// configuration and stops them again. Beside *SpecError and *ConfigError it
// reports a plugin that does not run, as *RunError. It needs no privileges and
// leaves the Host's own plugins alone.
func (h *Host) CheckConfig(ctx context.Context, plugins []PluginSpec, farms []FarmSpec) error {
	o := h.opts
	o.RuntimeDir, o.OnSnapshot, o.Telemetry = "", nil, nil
	c := New(o)
	return errors.Join(c.apply(ctx, plugins, farms, true), c.Close())
}

func (h *Host) apply(ctx context.Context, plugins []PluginSpec, farms []FarmSpec, check bool) error {
	h.applying.Lock()
	defer h.applying.Unlock()
	want, err := h.resolve(plugins, farms)
	if err != nil {
		return err
	}
	if err := h.prepare(len(want) > 0); err != nil {
		return err
	}
	h.mu.Lock()
	have, dir, th := maps.Clone(h.plugins), h.dir, h.thread
	h.mu.Unlock()

	// Start what is new or has another command; side by side.
	fresh := map[string]*supervisor{}
	for name, w := range want {
		if s := have[name]; s == nil || !s.spec.sameProcess(&w.spec) {
			s = newSupervisor(h, w.spec, dir, th)
			fresh[name] = s
			have[name] = s
			go s.run()
		}
	}
	abandon := func() {
		for _, s := range fresh {
			s.cancel()
		}
		for _, s := range fresh {
			<-s.done
		}
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(want)) {
		err := have[name].check(ctx, want[name].farms)
		var down *RunError
		var refused *ConfigError
		replaces := fresh[name] != nil && h.current(name) != nil
		if errors.As(err, &down) && !errors.As(err, &refused) && !check && !replaces && ctx.Err() == nil {
			h.log.Warn("plugin is not up; its configuration is not checked yet", "plugin", name, "error", down.Err)
			continue
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 || check {
		abandon()
		return errors.Join(errs...)
	}
	if err := ctx.Err(); err != nil {
		abandon()
		return err
	}

	// From here on nothing is taken back. What is asked of the Host from now
	// on, in OnSnapshot for example, is answered by the new set.
	for name, s := range fresh {
		if old := h.current(name); old != nil {
			s.inherit(old)
		}
	}
	h.mu.Lock()
	var gone []*supervisor
	for name, s := range h.plugins {
		if _, ok := want[name]; !ok || fresh[name] != nil {
			gone = append(gone, s)
			delete(h.plugins, name)
		}
	}
	maps.Copy(h.plugins, fresh)
	h.mu.Unlock()
	for name, w := range want {
		if err := have[name].commit(ctx, w.spec, w.farms); err != nil {
			h.log.Warn("plugin does not take its configuration yet", "plugin", name, "error", err)
		}
	}
	// The old process goes when its successor has said all that it knows.
	for _, old := range gone {
		if s := fresh[old.spec.name]; s != nil {
			if err := s.spoken(ctx); err != nil {
				h.log.Warn("plugin is replaced, and its successor has not spoken yet; the last snapshots stay in force", "plugin", old.spec.name, "error", err)
			}
		}
	}
	for _, s := range gone {
		s.cancel()
	}
	for _, s := range gone {
		<-s.done
	}
	return nil
}

func (h *Host) current(name string) *supervisor {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.plugins[name]
}

// wanted is one plugin and the farms that use it.
type wanted struct {
	spec  resolved
	farms []farmConfig
}

// farmConfig is what one plugin is told about one farm.
type farmConfig struct {
	farm   policies.Farm
	config []byte // JSON, merged
}

// resolve turns the specs into what is to run. It touches no process.
func (h *Host) resolve(plugins []PluginSpec, farms []FarmSpec) (map[string]*wanted, error) {
	specs := map[string]PluginSpec{}
	var errs []error
	for _, p := range plugins {
		if _, twice := specs[p.Name]; twice {
			errs = append(errs, &SpecError{p.Name, "is there twice"})
		}
		specs[p.Name] = p
	}
	want := map[string]*wanted{}
	broken := map[string]bool{}
	for _, f := range farms {
		farm := policies.Farm{Name: f.Name}
		for _, s := range f.Servers {
			farm.Servers = append(farm.Servers, policies.Server{Name: s.Name, Address: s.Address, Weight: max(s.Weight, 1), Backup: s.Backup})
		}
		used := map[string]bool{}
		for _, u := range f.Policies {
			if used[u.Plugin] {
				errs = append(errs, &ConfigError{Plugin: u.Plugin, Farm: f.Name, Message: "is there twice in the farm's policies"})
				continue
			}
			used[u.Plugin] = true
			spec, ok := specs[u.Plugin]
			if !ok {
				spec = PluginSpec{Name: u.Plugin}
			}
			w := want[u.Plugin]
			if w == nil && !broken[u.Plugin] {
				r, err := h.resolveSpec(spec)
				if err != nil {
					errs = append(errs, err)
					broken[u.Plugin] = true
				} else {
					w = &wanted{spec: *r}
					want[u.Plugin] = w
				}
			}
			config, err := json.Marshal(overlay(spec.Config, u.Config))
			if err != nil {
				errs = append(errs, &ConfigError{Plugin: u.Plugin, Farm: f.Name, Path: "config", Message: "cannot be sent: " + err.Error()})
				continue
			}
			if w != nil {
				w.farms = append(w.farms, farmConfig{farm, config})
			}
		}
	}
	return want, errors.Join(errs...)
}

// overlay merges two configurations: maps key by key, all else is replaced.
func overlay(base, over map[string]any) map[string]any {
	out := make(map[string]any, len(base)+len(over))
	maps.Copy(out, base)
	for k, v := range over {
		b, ok1 := out[k].(map[string]any)
		o, ok2 := v.(map[string]any)
		if ok1 && ok2 {
			v = overlay(b, o)
		}
		out[k] = v
	}
	return out
}

// prepare makes the directory of the sockets and the thread that starts
// processes, when there are to be any.
func (h *Host) prepare(needed bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return errors.New("plugins: the host is closed")
	}
	if !needed {
		return nil
	}
	if h.dir == "" {
		base := h.opts.RuntimeDir
		if base == "" {
			d, err := os.MkdirTemp("", "weir-plugins-")
			if err != nil {
				return fmt.Errorf("plugins: make a directory for the sockets: %w", err)
			}
			base, h.tempDir = d, d
		}
		dir := filepath.Join(base, "plugins")
		// What a killed predecessor left there belongs to nobody.
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("plugins: clear the directory of the sockets: %w", err)
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("plugins: make a directory for the sockets: %w", err)
		}
		h.dir = dir
	}
	if h.thread == nil {
		t, err := newThread(h.opts.OnThread)
		if err != nil {
			return fmt.Errorf("plugins: %w", err)
		}
		h.thread = t
	}
	return nil
}

// Close ends all plugins, waits until they are gone, and removes their files.
// A plugin that does not end within half a second is killed. Nothing calls back
// after it has returned.
func (h *Host) Close() error {
	h.applying.Lock()
	defer h.applying.Unlock()
	h.mu.Lock()
	all := slices.Collect(maps.Values(h.plugins))
	h.plugins = map[string]*supervisor{}
	dir, temp, th := h.dir, h.tempDir, h.thread
	h.dir, h.tempDir, h.thread, h.closed = "", "", nil, true
	h.mu.Unlock()
	for _, s := range all {
		s.cancel()
	}
	for _, s := range all {
		<-s.done
	}
	if th != nil {
		th.close()
	}
	var errs []error
	for _, d := range []string{dir, temp} {
		if d != "" {
			errs = append(errs, os.RemoveAll(d))
		}
	}
	return errors.Join(errs...)
}

// Snapshot returns the last snapshot of a plugin for a farm, without servers
// that the farm no longer has; nil if there is none.
func (h *Host) Snapshot(farm, plugin string) *snapshot.Snapshot {
	if s := h.current(plugin); s != nil {
		return s.snapshot(farm)
	}
	return nil
}

// About is what is known about a plugin from its description, for
// snapshot.Policy.
type About struct {
	// Known: it has been up. Before, only Routes means anything.
	Known bool
	// Routes: it sends routes. Of a plugin that has never been up it is not
	// known; then it is true, because a request that is refused does less harm
	// than one that reaches a wrong server.
	Routes bool
	// Ask is what it wants to know of requests; nil: it is not asked.
	Ask *policies.AskKey
	// Sends is what its snapshots may hold. It must not be changed.
	Sends []policies.Kind
}

// About returns what is known about a plugin.
func (h *Host) About(plugin string) About {
	s := h.current(plugin)
	if s == nil {
		return About{Routes: true}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.described == nil {
		return About{Routes: true}
	}
	kinds := s.described.GetKinds()
	return About{Known: true, Routes: slices.Contains(kinds, policies.SendsRoutes), Ask: s.askKey, Sends: kinds}
}

// State is what a plugin's process does.
type State string

// The states of a plugin's process.
const (
	StateStarting State = "starting"
	StateUp       State = "up"
	StateDown     State = "down" // waiting for the next start
)

// Status is how one plugin is.
type Status struct {
	Plugin    string       `json:"plugin"`
	Command   []string     `json:"command"`
	State     State        `json:"state"`
	Since     time.Time    `json:"since"` // of the state
	PID       int          `json:"pid,omitempty"`
	Version   string       `json:"version,omitempty"` // of the plugin, "" until it was up once
	Restarts  uint64       `json:"restarts"`
	Resting   bool         `json:"resting,omitempty"` // it was started too often lately
	Decisions Decisions    `json:"decisions"`
	LastError string       `json:"last_error,omitempty"`
	Farms     []FarmStatus `json:"farms"`
}

// FarmStatus is what a plugin last said about a farm.
type FarmStatus struct {
	Farm       string    `json:"farm"`
	Generation uint64    `json:"generation"` // 0: nothing yet
	Received   time.Time `json:"received,omitzero"`
	LastTick   time.Time `json:"last_tick,omitzero"` // answered
	Expires    time.Time `json:"expires,omitzero"`
	LastError  string    `json:"last_error,omitempty"`
}

// Status returns how every plugin is, by name.
func (h *Host) Status() []Status {
	h.mu.Lock()
	all := slices.Collect(maps.Values(h.plugins))
	h.mu.Unlock()
	out := make([]Status, 0, len(all))
	for _, s := range all {
		out = append(out, s.status())
	}
	slices.SortFunc(out, func(a, b Status) int { return strings.Compare(a.Plugin, b.Plugin) })
	return out
}
