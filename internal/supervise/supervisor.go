// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// startLimit is how long a child may take until it serves, or until it has
	// prepared itself. Plugins have their own, shorter, limits.
	startLimit = 60 * time.Second

	// A death within quickDeath of readiness is a quick one. After freeDeaths
	// of them in a row the next start waits, longer each time up to longestRest.
	quickDeath  = 500 * time.Millisecond
	freeDeaths  = 3
	shortRest   = 100 * time.Millisecond
	longestRest = 5 * time.Second

	cleanupLimit = 20 * time.Second
)

// Options say what is supervised.
type Options struct {
	Log *slog.Logger
	// Dir is the runtime directory: the lock and the socket of the supervisor
	// are there. It is made, and removed at the end if nothing else is in it.
	Dir string
	// Args are the arguments of a child, Cleanup those that have the
	// executable remove what a killed child left.
	Args, Cleanup []string
	// Last is where an engine leaves the configuration that is in force. One
	// that is started in place of another that died is told, so that a death
	// changes nothing; but not after one that died before it served.
	Last string
	// Env is the environment of this process, for when it replaces its own
	// executable; ChildEnv that of children.
	Env, ChildEnv []string
	// Hang is how long a child may give no sign of life before it is killed.
	Hang time.Duration
	// StartLimit is how long it may take to be ready. Default one minute.
	StartLimit time.Duration
	// Notify tells the service manager, in the words of sd_notify(3).
	Notify func(state string)
	// Watchdog is how often the service manager wants a sign of life at least,
	// 0 for not at all.
	Watchdog time.Duration
}

// supervisor is the parent. All of it belongs to the goroutine of Run, which
// stays on one thread: the kernel knows the children by it.
type supervisor struct {
	opt  Options
	log  *slog.Logger
	made bool // the directory is ours
	lock int
	sock *net.UnixListener

	bin  *binary // of the next start
	held map[string]int
	cur  *child // who serves, or starts to; nil while none does
	next *child // who prepares to take cur's place
	up   *upgrade

	waiting []*caller // for an engine that serves

	said  chan message
	calls chan *caller
	retry <-chan time.Time // not nil: no start before

	served   bool // a child has been ready
	last     bool // the next start is told of opt.Last
	stopping bool
	told     bool            // the former executable was told to stop
	ctx      context.Context // of Run
	signals  chan os.Signal
	quick    int // quick deaths in a row
	deaths   int
}

// Run supervises until ctx ends, or until the engine ends by itself: orderly,
// or at its very first start. It returns the exit code for this process, and an
// error if the supervisor itself cannot work.
func Run(ctx context.Context, opt Options) (code int, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// It does next to nothing, and should need next to nothing.
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(20)
	if opt.StartLimit == 0 {
		opt.StartLimit = startLimit
	}
	s := &supervisor{
		opt: opt, log: opt.Log, ctx: ctx, lock: -1, last: true, held: map[string]int{},
		said: make(chan message), calls: make(chan *caller),
	}
	s.signals = make(chan os.Signal, 8)
	s.notify()
	defer signal.Stop(s.signals)
	s.opt.Env = slices.DeleteFunc(slices.Clone(opt.Env), func(v string) bool { return strings.HasPrefix(v, EnvPrefix) })
	state := os.Getenv(envState)
	_ = os.Unsetenv(envState)
	if state != "" {
		err = s.resume(state)
	} else {
		err = s.begin()
	}
	defer s.end()
	if err != nil {
		return 1, fmt.Errorf("supervisor: %w", err)
	}
	go s.accept(s.sock)
	debug.FreeOSMemory()
	return s.loop(), nil
}

// notify has signals come to the loop.
func (s *supervisor) notify() { signal.Notify(s.signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP) }

// begin takes what a supervisor needs.
func (s *supervisor) begin() error {
	if _, err := os.Stat(s.opt.Dir); os.IsNotExist(err) {
		if err := os.MkdirAll(s.opt.Dir, 0o755); err != nil {
			return fmt.Errorf("runtime_dir: %w", err)
		}
		s.made = true
	}
	path := filepath.Join(s.opt.Dir, LockName)
	var err error
	if s.lock, err = unix.Open(path, unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o600); err != nil {
		return fmt.Errorf("runtime_dir: %s: %w", path, err)
	}
	if err := unix.Flock(s.lock, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = unix.Close(s.lock)
		s.lock = -1
		return fmt.Errorf("runtime_dir: another supervisor holds %s; stop it, or give this one a runtime_dir of its own: %w", path, err)
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	if s.bin, err = openBinary(exe); err != nil {
		return err
	}
	return s.bindSocket()
}

// LockName is the supervisor's lock in the runtime directory.
const LockName = "supervisor.lock"

func (s *supervisor) bindSocket() error {
	path := filepath.Join(s.opt.Dir, SocketName)
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) { // a killed one left it
		return err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false)
	s.sock = l
	return os.Chmod(path, 0o600)
}

// end gives back what begin took.
func (s *supervisor) end() {
	if s.lock < 0 {
		return
	}
	if s.sock != nil {
		_ = s.sock.Close()
		_ = os.Remove(filepath.Join(s.opt.Dir, SocketName))
	}
	for _, fd := range s.held {
		_ = unix.Close(fd)
	}
	_ = os.Remove(filepath.Join(s.opt.Dir, LockName))
	_ = unix.Close(s.lock)
	if s.made {
		_ = os.Remove(s.opt.Dir) // Others may have put files there.
	}
}

// loop serves until there is an exit code.
func (s *supervisor) loop() int {
	step := max(min(s.opt.Hang/10, 500*time.Millisecond), 10*time.Millisecond)
	tick := time.NewTicker(step)
	defer tick.Stop()
	var alive <-chan time.Time
	if s.opt.Watchdog > 0 {
		t := time.NewTicker(s.opt.Watchdog / 3)
		defer t.Stop()
		alive = t.C
	}
	done := s.ctx.Done()
	if s.told {
		now := make(chan struct{})
		close(now)
		done = now
	}
	for {
		if s.cur == nil && s.retry == nil {
			if code, over := s.start(); over {
				return code
			}
		}
		select {
		case <-done:
			done = nil
			if code, over := s.stop(); over {
				return code
			}
		case sig := <-s.signals:
			if sig == unix.SIGHUP {
				if s.cur != nil {
					_ = s.cur.proc.Signal(unix.SIGHUP)
				}
			} else if code, over := s.stop(); over {
				return code
			}
		case m := <-s.said:
			if code, over := s.hear(m); over {
				return code
			}
		case c := <-s.calls:
			s.begun(c)
		case <-tick.C:
			s.look(step)
		case <-alive:
			s.opt.Notify("WATCHDOG=1")
		case <-s.retry:
			s.retry = nil
		}
	}
}

// start starts a child.
func (s *supervisor) start() (code int, over bool) {
	c, err := s.spawn(s.bin, false)
	if err == nil {
		s.cur = c
		return 0, false
	}
	s.log.Error("the engine cannot be started", "error", err)
	if !s.served {
		return 1, true
	}
	s.rest()
	return 0, false
}

// rest waits before the next start if there were too many quick deaths.
func (s *supervisor) rest() {
	s.quick++
	if n := s.quick - freeDeaths; n > 0 {
		d := min(shortRest<<min(n-1, 10), longestRest)
		s.retry = time.After(d)
		s.log.Warn("the engine dies again and again", "next_start_in", d)
	}
}

// stop passes the request to stop on.
func (s *supervisor) stop() (code int, over bool) {
	if s.stopping {
		return 0, false
	}
	s.stopping = true
	s.opt.Notify("STOPPING=1\nSTATUS=stopping")
	if s.up != nil {
		s.up.fail("the instance is being stopped")
		s.up = nil
	}
	for _, c := range s.waiting {
		c.say(answer{Text: "the instance is being stopped", Done: true})
	}
	s.waiting = nil
	if s.next != nil {
		s.next.kill()
		s.next = nil
	}
	if s.cur == nil {
		s.cleanup()
		return 0, true
	}
	_ = s.cur.proc.Signal(unix.SIGTERM)
	return 0, false
}

// look counts silence. What counts is the time in which this process was awake
// too: a machine that stood still kills nobody.
func (s *supervisor) look(step time.Duration) {
	for _, c := range []*child{s.cur, s.next} {
		if c == nil {
			continue
		}
		c.silent += step
		limit := s.opt.StartLimit
		if c.ready && !s.stopping && !c.stopping {
			limit = s.opt.Hang // its last steps, without its shards, may take longer
		}
		if c.silent > limit && (c == s.cur || !c.prepared) {
			s.log.Error("the engine gives no sign of life and is killed", "pid", c.proc.Pid, "for", c.silent)
			c.silent = 0
			c.kill()
		}
	}
}

// hear acts on what a child said.
func (s *supervisor) hear(m message) (code int, over bool) {
	c := m.from
	if m.end != nil || m.lost != nil {
		_ = c.conn.Close()
		return s.ended(c, m)
	}
	if c != s.cur && c != s.next {
		for _, fd := range m.fds {
			_ = unix.Close(fd)
		}
		return 0, false
	}
	s.store(m)
	switch {
	case m.words["WATCHDOG"] == "1" && c.ready: // before, the time counts
		c.silent = 0
	case m.words["PREPARED"] == "1" && c == s.next:
		c.prepared = true
		s.swap()
	case m.words["READY"] == "1" && c == s.cur && !c.ready:
		c.ready, c.readyAt, c.silent = true, time.Now(), 0
		s.nowReady(c)
	case m.words["STOPPING"] == "1":
		c.stopping = true
	}
	return 0, false
}

// store takes or gives up a descriptor.
func (s *supervisor) store(m message) {
	name := m.words["FDNAME"]
	_, keep := m.words["FDSTORE"]
	_, drop := m.words["FDSTOREREMOVE"]
	if old, ok := s.held[name]; ok && (keep || drop) {
		_ = unix.Close(old)
		delete(s.held, name)
	}
	for i, fd := range m.fds {
		if keep && i == 0 && name != "" && len(s.held) < maxHeld {
			s.held[name] = fd
			continue
		}
		_ = unix.Close(fd)
	}
}

// nowReady notes that a child serves.
func (s *supervisor) nowReady(c *child) {
	if !s.served {
		s.served = true
		s.opt.Notify("READY=1\nSTATUS=serving")
	} else {
		s.opt.Notify(fmt.Sprintf("STATUS=serving; the engine was replaced %d times", s.deaths))
	}
	s.log.Info("the engine serves", "pid", c.proc.Pid, "replaced", s.deaths)
	if s.up != nil && s.up.switching {
		s.succeeded()
	}
	again := s.waiting
	s.waiting = nil
	for _, c := range again {
		s.begun(c)
	}
}

// ended acts on a child's end.
func (s *supervisor) ended(c *child, m message) (code int, over bool) {
	how := "unknown"
	code = -1
	if m.end != nil {
		how, code = m.end.String(), m.end.ExitCode()
	}
	switch {
	case c == s.next:
		s.next = nil
		s.refused("it ended before it was ready to take over: " + how)
		return 0, false
	case c != s.cur:
		return 0, false
	}
	s.cur = nil
	switch {
	case s.stopping || c.stopping || code == 0:
		// Told to stop, by us or behind our back.
		if code != 0 {
			s.log.Error("the engine did not stop in order", "pid", c.proc.Pid, "end", how)
			s.cleanup()
			code = max(code, 1)
		}
		return code, true
	case s.up != nil && s.next != nil && s.next.prepared:
		s.promote()
		return 0, false
	case s.up != nil && s.up.switching:
		s.deaths++
		s.revert(how)
		return 0, false
	case !s.served && code > 0:
		return code, true // It has said why.
	}
	s.deaths++
	s.log.Error("the engine died and is started again", "pid", c.proc.Pid, "end", how)
	// Where that does not help, the configuration's files are tried, in turns.
	s.last = c.ready || !s.last
	if c.ready && time.Since(c.readyAt) > quickDeath {
		s.quick = 0
	} else {
		s.rest()
	}
	return 0, false
}

// cleanup removes what a killed engine left, by the executable that knows it.
func (s *supervisor) cleanup() {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.bin.name(), s.opt.Cleanup...)
	cmd.Args[0] = s.bin.path
	cmd.Env, cmd.Stdout, cmd.Stderr = s.opt.ChildEnv, os.Stderr, os.Stderr
	// The queues go with their last holder, and rules without queues drop.
	if err := cmd.Run(); err != nil {
		s.log.Error("what the engine left is not removed; run weir cleanup", "error", err)
	}
}
