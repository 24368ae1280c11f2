// SPDX-License-Identifier: Apache-2.0

// Package module is the feature module: it wires the engine to the kernel, to
// the policy plugins and to its operators, and is what another Go router
// embeds:
//
//	m, err := module.New(cfg, module.Options{})
//	err = m.Run(ctx) // until ctx ends, then an orderly stop
//
// It decides nothing about packets. The life of an instance, in order: look at
// the host and refuse with one sentence what cannot work; take what is needed
// (lock, queues, sockets, plugins); install the rules; serve; stop; give back
// everything that was taken. What a killed predecessor left is taken over at
// the start.
package module

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirgate/weir/module/accesslog"
	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/divert"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/pool"
	"github.com/weirgate/weir/nft"
	"github.com/weirgate/weir/plugins/host"
	"github.com/weirgate/weir/policies/snapshot"
)

// Options are the surroundings of a Module. All fields may be left zero.
type Options struct {
	Log        *slog.Logger // default: slog.Default
	Version    string       // shown by status, told to plugins
	PluginDirs []string     // where plugin commands are looked up; default: host.DefaultDirs
	Ready      func()       // called once when packets are served

	// Prepared is called once when everything is done that can be done beside a
	// living predecessor, and returns when there is none any more. nil: there
	// is none.
	Prepared func() error
	// Sockets holds the queues for a successor. nil: they go with the process.
	Sockets Sockets

	// Layers names the configuration's files, so that the module can read them
	// again: when they change, and when an operator asks. nil: never.
	Layers func() config.LoadOptions
	// Aside says what does not count that should, because this instance goes on
	// in place of one that died: the files, which are wrong, or the configuration
	// that was in force. Empty: nothing.
	Aside string
	// Applied is called after every change of the configuration in force, by
	// one goroutine at a time.
	Applied func(*config.Config)

	// Clients and Servers size the flow tables of each shard, records.
	// Defaults: queue.clients and queue.servers.
	Clients, Servers int
}

// Module is one instance. Run may be called once.
type Module struct {
	conf    atomic.Pointer[config.Config] // in force, changes made at run time included
	opt     Options
	log     *slog.Logger
	started time.Time
	clock   clock

	db    atomic.Pointer[farm.DB]
	ready atomic.Pointer[map[uint16]bool] // farms that take connections, by ID
	state atomic.Pointer[control.Condition]
	left  atomic.Pointer[map[packet.Endpoint]bool] // VIPs that drain, for the thread of the SYNs

	policies struct {
		sync.Mutex
		last map[[2]string]*snapshot.Snapshot // by farm and plugin
		open map[uint16]bool                  // farms whose start timeout is over
		// held: a reload is under way, so that new snapshots wait for its
		// database.
		held bool
	}
	op     operation
	bans   bans
	banned chan nft.Ban // for banLoop
	keep   keeping
	ledger ledger
	seen   *observer // made when the counters stand where a predecessor's stood
	secret [16]byte  // of the cookies

	network   *host.Network // of the thread of Run, for plugins that probe
	host      *host.Host
	firewall  *nft.Firewall
	watcher   *nft.Watcher
	foreign   atomic.Int32 // findings about tables of others
	local     *nft.Local   // addresses of this host; nil before Run
	handshake *engine.Handshake
	syns      kernelSYNs
	shards    []*shard
	journal   *nft.Journal
	needs     []nft.Sysctl // that the journal's changes meet
	access    *accesslog.Log

	calls   chan func()     // for the thread of Run, see onThread
	serving chan struct{}   // closed when packets are served
	ended   chan struct{}   // closed when Run takes no calls any more
	life    context.Context // of what runs beside Run; set before serving is closed
	events  control.Events
}

// PrivilegeError says that the process lacks a right.
type PrivilegeError struct{ Err error }

func (e *PrivilegeError) Error() string {
	return fmt.Sprintf("weir needs the capabilities CAP_NET_ADMIN and CAP_NET_RAW (run it as root): %v", e.Err)
}

// Unwrap returns the cause.
func (e *PrivilegeError) Unwrap() error { return e.Err }

// New makes an instance for a configuration. It touches nothing yet.
func New(cfg *config.Config, opt Options) (*Module, error) {
	if opt.Log == nil {
		opt.Log = slog.Default()
	}
	if opt.Clients == 0 {
		opt.Clients = cfg.Queue.Clients
	}
	if opt.Servers == 0 {
		opt.Servers = cfg.Queue.Servers
	}
	m := &Module{
		opt: opt, log: opt.Log, clock: newClock(),
		calls: make(chan func()), banned: make(chan nft.Ban, 1024), serving: make(chan struct{}), ended: make(chan struct{}),
	}
	if _, err := rand.Read(m.secret[:]); err != nil {
		return nil, err
	}
	m.conf.Store(cfg)
	m.op.file = cfg
	m.policies.last = map[[2]string]*snapshot.Snapshot{}
	m.policies.open = map[uint16]bool{}
	m.access = m.newAccessLog()
	m.setState(control.Starting)
	m.ready.Store(&map[uint16]bool{})
	m.left.Store(&map[packet.Endpoint]bool{})
	m.host = host.New(host.Options{
		Log: opt.Log, Dirs: opt.PluginDirs, RuntimeDir: cfg.RuntimeDir, Version: opt.Version,
		OnSnapshot: m.onSnapshot, Telemetry: m.telemetry,
		OnThread: func() error {
			if m.network == nil {
				return nil
			}
			return m.network.Enter()
		},
	})
	if err := m.buildDB(); err != nil {
		return nil, err
	}
	return m, nil
}

// config is the configuration in force.
func (m *Module) config() *config.Config { return m.conf.Load() }

func (m *Module) setState(c control.Condition) { m.state.Store(&c) }

// buildDB makes the first generation of the database of farms.
func (m *Module) buildDB() error {
	spec, err := m.spec()
	if err != nil {
		return err
	}
	db, err := farm.Build(m.db.Load(), spec)
	if err != nil {
		return err
	}
	if err := m.remember(db); err != nil {
		return err
	}
	m.db.Store(db)
	return nil
}

// spec describes the configuration's farms before any plugin has spoken.
func (m *Module) spec() (farm.Spec, error) {
	return farmSpec(m.config(), func(f, p string) (*snapshot.Snapshot, host.About) { return nil, m.host.About(p) })
}

// clock counts nanoseconds since 1970 by the monotonic clock, so that it never
// goes back and can be compared with a snapshot's expiry.
type clock struct {
	start time.Time
	base  int64
}

func newClock() clock {
	now := time.Now()
	return clock{now, now.UnixNano()}
}

func (c clock) now() int64 { return c.base + int64(time.Since(c.start)) }

// undo is what has to be given back, in the opposite order of taking.
type undo []func() error

func (u *undo) add(f func() error) { *u = append(*u, f) }

func (u *undo) run() error {
	var errs []error
	for i := len(*u) - 1; i >= 0; i-- {
		errs = append(errs, (*u)[i]())
	}
	*u = nil
	return errors.Join(errs...)
}

// Run serves until ctx ends, then stops in order and gives back everything.
// Sockets are made in the network namespace of the calling thread. The error
// says in one sentence what cannot work; *PrivilegeError, and the errors of
// packages nft, divert and control, can be told apart.
func (m *Module) Run(ctx context.Context) (err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	m.started = time.Now()

	var give undo
	defer func() {
		if !errors.Is(err, ErrRevoked) {
			err = errors.Join(err, give.run())
		}
	}()

	params, kernel, err := m.look()
	if err != nil {
		return err
	}
	if m.opt.Prepared != nil {
		if err := m.readable(); err != nil {
			return err
		}
		if err := m.opt.Prepared(); err != nil {
			return err
		}
	}
	if err := m.takeDir(&give); err != nil {
		return err
	}
	if err := m.recall(&give); err != nil {
		return err
	}
	if err := m.recallOverrides(); err != nil {
		return err
	}
	params, err = m.takePorts(params)
	if err != nil {
		return err
	}
	if err := m.openQueues(&params, kernel, &give); err != nil {
		return err
	}
	processors(len(m.shards))
	m.recallDrains(&params)
	m.recallCounters()
	m.seen = newObserver(m)
	if m.local, err = nft.WatchLocal(); err != nil {
		return err
	}
	give.add(m.local.Close)
	m.openFarms(ctx)
	var threads sync.WaitGroup
	failed := make(chan error, len(m.shards)+2)
	began := false
	begin := func() {
		for _, s := range m.shards {
			threads.Go(func() { failed <- s.run() })
		}
		give.add(func() error {
			for _, s := range m.shards {
				s.quit()
			}
			threads.Wait()
			return nil
		})
		began = true
	}
	if m.keep.took.Any() {
		// The predecessor's rules are there, and packets wait.
		begin()
	}
	listener, err := control.Listen(m.config().Admin.Socket, operator{m})
	if err != nil {
		return err
	}
	give.add(func() error { listener.Close(); return nil })

	if m.network, err = host.CurrentNetwork(); err != nil {
		return err
	}
	give.add(m.network.Close)
	give.add(m.host.Close)
	plugins, farms := PluginSpecs(m.config())
	if err := m.host.Start(ctx, plugins, farms); err != nil {
		return err
	}
	m.openFarms(ctx)

	ifaces, err := nft.Interfaces(params)
	if err != nil {
		return err
	}
	if params.StrictRPFilter, err = nft.StrictInterfaces(m.config().RuntimeDir, ifaces...); err != nil {
		return err
	}
	if m.firewall, err = nft.Install(params, m.ownership(kernel)); err != nil {
		return err
	}
	give.add(m.leaveRules)
	if err := m.watchRules(&give); err != nil {
		return err
	}
	m.needs = nft.Needs(params, ifaces...)
	if m.journal, err = nft.ApplySysctls(m.config().RuntimeDir, m.needs); err != nil {
		return err
	}
	give.add(func() error { return m.journal.Restore() })
	m.op.params = params

	if err := m.attachSYNs(); err != nil {
		m.log.Warn("SYNs are answered from the queue", "reason", err)
	}
	m.keep.discard = true // the rules are ours: they go with this instance
	// From here on packets flow.
	if !began {
		begin()
	}
	serveCtx, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	for _, f := range []func(context.Context){m.metricsServer(), m.writeAccessLog} {
		threads.Go(func() { f(serveCtx) })
	}
	threads.Go(func() {
		if err := listener.Serve(serveCtx); err != nil {
			m.log.Error("the control socket ended", "error", err)
		}
	})
	var operating context.CancelFunc
	m.life, operating = context.WithCancel(ctx)
	for _, f := range []func(context.Context){m.watch, m.drainLoop, m.observe, m.keepSysctls, m.banLoop} {
		threads.Go(func() { f(m.life) })
	}
	give.add(func() error {
		operating()
		stopServing()
		for _, s := range m.shards {
			s.quit()
		}
		threads.Wait()
		return nil
	})
	m.op.Lock()
	m.keepConfig()
	m.op.Unlock()
	m.setState(control.Ready)
	close(m.serving)
	m.events.Add(control.Event{Name: control.EventReady, Text: "the instance serves"})
	if m.opt.Aside != "" {
		m.event(control.Event{Name: control.EventReloadRefused, Level: control.LevelError, Text: "a predecessor died, and this instance goes on: " + m.opt.Aside})
	}
	m.log.Info("serving", "version", m.opt.Version, "farms", len(m.config().Farms), "shards", len(m.shards)-2, "native_queue", kernel.NativeQueue, "owned_table", m.ownership(kernel).Owner, "kernel_syns", params.SYNToLo)
	if m.opt.Ready != nil {
		m.opt.Ready()
	}
	err = m.attend(ctx, failed)
	close(m.ended)
	operating()
	if err == nil {
		m.stop()
	}
	return err
}

// attend does what has to be done on the thread of Run, until ctx ends or a
// queue fails.
func (m *Module) attend(ctx context.Context, failed <-chan error) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			if err != nil {
				return fmt.Errorf("packet queue: %w", err)
			}
			return nil
		case f := <-m.calls:
			f()
		}
	}
}

// look refuses what cannot work on this host, before anything is changed.
func (m *Module) look() (nft.Params, nft.Kernel, error) {
	params := firewallParams(m.config(), m.config().ShardCount(0))
	if err := params.Validate(); err != nil {
		return params, nft.Kernel{}, err
	}
	kernel, err := nft.Probe()
	if errors.Is(err, nft.ErrPermission) {
		return params, kernel, &PrivilegeError{err}
	}
	if err != nil {
		return params, kernel, err
	}
	if m.config().Firewall.OnStop == "direct" && !kernel.NAT {
		return params, kernel, fmt.Errorf("firewall.on_stop: direct: %w", nft.ErrNoNAT)
	}
	if err := nft.CheckTransparent(params); err != nil {
		return params, kernel, err
	}
	if err := nft.CheckVIPListeners(params.VIPs); err != nil {
		return params, kernel, err
	}
	if err := nft.CheckQueues(params.QueueFirst, params.Queues(), m.heldQueues()...); err != nil {
		return params, kernel, err
	}
	if err := nft.CheckForwarding(params); err != nil {
		return params, kernel, err
	}
	if _, err := nft.LocalPortsInRange(params.PortFirst, params.PortLast, params.SNIPs...); err != nil {
		return params, kernel, err
	}
	return params, kernel, nil
}

// takeDir makes the runtime directory and locks it against a second instance.
// The lock goes with the process.
func (m *Module) takeDir(give *undo) error {
	dir := m.config().RuntimeDir
	made := false
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("runtime_dir: %w", err)
		}
		made = true
	}
	lock, err := m.takeLock()
	if err != nil {
		return err
	}
	give.add(func() error {
		_ = lock.Remove() // A file that is left is taken over at the next start.
		if made {
			_ = os.Remove(dir) // Others may have put files there.
		}
		return nil
	})
	return nil
}

// takePorts finds the ports that stay with the router's own sockets.
func (m *Module) takePorts(params nft.Params) (nft.Params, error) {
	used, err := nft.LocalPortsInRange(params.PortFirst, params.PortLast, params.SNIPs...)
	params.ExceptPorts = used
	return params, err
}

// portRest is how long a SNIP port rests after its connection: longer than a
// segment lives in a farm's network.
const portRest = 10 * time.Second

// openQueues binds the queues and makes the shards.
func (m *Module) openQueues(params *nft.Params, kernel nft.Kernel, give *undo) error {
	if err := m.dropSockets(*params); err != nil {
		return err
	}
	m.handshake = engine.NewHandshake(engine.NewMACCookies(m.secret), clientMSS, clientMSS, m.takesSYN)
	m.handshake.Gone = m.leaving
	m.openSYNs(params, kernel, give)
	m.keepShards(params.Shards)
	add := func(number uint16, length uint32, role role) error {
		cfg := divert.Config{Queue: number, Length: length, GSO: m.config().Queue.GSO}
		if role != roleControl { // connections wait for the others
			cfg.Linger = divert.DefaultLinger
		}
		q, err := m.openQueue(cfg)
		if err != nil {
			return privilege(err)
		}
		give.add(q.Close)
		em, err := divert.OpenEmitter(params.Mark)
		if err != nil {
			return privilege(err)
		}
		give.add(func() error { em.Close(); return nil })
		m.shards = append(m.shards, newShard(m, q, em, params.Mark, params.MarkMask, role))
		return nil
	}
	if err := add(params.SYNQueue(), synQueueLength(), roleSYN); err != nil {
		return err
	}
	if err := add(params.ControlQueue(), 1024, roleControl); err != nil {
		return err
	}
	var drawn [8]byte
	if _, err := rand.Read(drawn[:]); err != nil {
		return err
	}
	census := engine.NewCensus(m.opt.Clients*params.Shards, binary.LittleEndian.Uint64(drawn[:]))
	except := map[uint16]bool{}
	for _, p := range params.ExceptPorts {
		except[p] = true
	}
	for i := range params.Shards {
		var seed [8]byte
		if _, err := rand.Read(seed[:]); err != nil {
			return err
		}
		lo, hi := nft.Slice(params.PortFirst, params.PortLast, params.Shards, i)
		var ports []*pool.Ports
		for _, a := range params.SNIPs {
			ports = append(ports, pool.NewPorts(packet.AddrFrom(a), lo, hi, int64(portRest), func(p uint16) bool { return except[p] }))
		}
		if err := add(params.ShardQueue(i), uint32(m.config().Queue.Length), roleShard); err != nil {
			return err
		}
		s := m.shards[len(m.shards)-1]
		s.engine, s.store = m.shardEngine(engine.Options{
			Clients: m.opt.Clients, Servers: m.opt.Servers, Seed: binary.LittleEndian.Uint64(seed[:]),
			Handshake: m.handshake, Census: census, SNIPs: ports, ShareSNIP: m.config().Source.Shared, Shard: i, Shards: params.Shards,
		})
	}
	return nil
}

// clientMSS is what clients are told: what a server of the large class is
// told, so that a segment fits both ways.
const clientMSS = pool.LargeMSS

// synQueueLength is short: each queued SYN is an unconfirmed conntrack entry.
func synQueueLength() uint32 {
	n := uint32(1024)
	if b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max"); err == nil {
		var entries uint32
		if _, err := fmt.Sscan(string(b), &entries); err == nil && entries > 0 {
			n = max(min(n, entries/16), 16)
		}
	}
	return n
}

func privilege(err error) error {
	if errors.Is(err, divert.ErrPermission) {
		return &PrivilegeError{err}
	}
	return err
}

// takesSYN says whether a VIP's farm takes connections.
func (m *Module) takesSYN(vip packet.Endpoint) bool {
	f := m.db.Load().ByVIP(vip)
	return f != nil && (*m.ready.Load())[f.ID]
}

// leaving says whether a VIP is gone from the configuration and drains.
func (m *Module) leaving(vip packet.Endpoint) bool { return (*m.left.Load())[vip] }

// stopStep is how often a stop looks whether it is done.
const stopStep = 5 * time.Millisecond

// stop lets running responses finish, then resets the rest.
func (m *Module) stop() {
	m.setState(control.Stopping)
	m.events.Add(control.Event{Name: control.EventStopping, Text: "the instance stops"})
	m.log.Info("stopping", "stop_timeout", m.config().StopTimeout.Std())
	m.handshake.Stopped.Store(true)
	m.tellSYNs()
	m.tell(engine.Stop)
	deadline := time.Now().Add(m.config().StopTimeout.Std())
	lastWords := time.Now().Add(time.Second)
	for {
		time.Sleep(stopStep)
		clients, servers := 0, 0
		for _, s := range m.shards {
			c, v := s.running()
			clients, servers = clients+c, servers+v
		}
		now := time.Now()
		// A peer that is only slow to close is not waited for.
		if clients == 0 && (servers == 0 || now.After(lastWords)) || now.After(deadline) {
			break
		}
	}
	m.tell(engine.Abort)
	for range 200 {
		if !m.pending() {
			return
		}
		time.Sleep(stopStep)
	}
}

func (m *Module) tell(k engine.Kind) {
	for _, s := range m.shards {
		s.post(k)
	}
}

func (m *Module) pending() bool {
	for _, s := range m.shards {
		if s.mail.Load() != 0 {
			return true
		}
	}
	return false
}

// Status implements control.Provider.
func (m *Module) Status(context.Context) (*control.Status, error) {
	st := &control.Status{
		Version: m.opt.Version, PID: os.Getpid(), Started: m.started, Generation: m.db.Load().Generation,
		Condition: *m.state.Load(), Shards: len(m.shards) - 2, Farms: control.Farms(m.db.Load()), Plugins: []control.Plugin{},
	}
	if st.Reasons = m.waitingFor(); len(st.Reasons) > 0 && st.Condition == control.Ready {
		st.Condition = control.Degraded
	}
	for _, p := range m.host.Status() {
		st.Plugins = append(st.Plugins, control.Plugin{
			Name: p.Plugin, Version: p.Version, State: string(p.State), PID: p.PID, Restarts: p.Restarts, Error: p.LastError,
			Farms: m.pluginFarms(&p),
		})
		if p.State != host.StateUp && (st.Condition == control.Ready || st.Condition == control.Degraded) {
			st.Condition = control.Degraded
			st.Reasons = append(st.Reasons, fmt.Sprintf("plugin %s is %s: %s", p.Plugin, p.State, p.LastError))
		}
	}
	return st, nil
}
