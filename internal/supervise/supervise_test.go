// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test's executable plays the supervisor and its children as well. A child
// does what the file "play" in the directory of play says when it starts, and
// appends a line to "log" for each step.
const playEnv = "SUPERVISE_TEST_DIR"

func TestMain(m *testing.M) {
	dir := os.Getenv(playEnv)
	switch {
	case dir == "":
		os.Exit(m.Run())
	case len(os.Args) > 1 && os.Args[1] == "cleanup":
		note(dir, "cleanup")
	case Supervised():
		os.Exit(play(dir))
	default:
		os.Exit(playSupervisor(dir))
	}
}

func note(dir, format string, a ...any) {
	f, err := os.OpenFile(filepath.Join(dir, "log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	defer f.Close()
	fmt.Fprintf(f, format+"\n", a...)
}

func playSupervisor(dir string) int {
	ctx, cancel := context.WithCancel(context.Background())
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	go func() { <-term; cancel() }()
	env := []string{"GORACE=atexit_sleep_ms=0"} // its end is not the engine's
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, EnvPrefix) {
			env = append(env, v)
		}
	}
	code, err := Run(ctx, Options{
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), Dir: filepath.Join(dir, "run"),
		Args: os.Args[1:], Cleanup: []string{"cleanup"}, Env: os.Environ(), ChildEnv: env,
		Hang: 500 * time.Millisecond, StartLimit: time.Second, Watchdog: 150 * time.Millisecond,
		Notify: func(s string) {
			if s != "WATCHDOG=1" {
				note(dir, "manager %s", strings.Split(s, "\n")[0])
			}
		},
	})
	if err != nil {
		note(dir, "error %v", err)
	}
	return code
}

func play(dir string) int {
	b, err := os.ReadFile(filepath.Join(dir, "play"))
	if err != nil {
		panic(err)
	}
	part := strings.TrimSpace(string(b))
	l, err := Find()
	if err != nil {
		panic(err)
	}
	for _, v := range os.Environ() {
		if strings.HasPrefix(v, EnvPrefix) {
			panic(v)
		}
	}
	switch part {
	case "fail":
		return 2
	case "mute":
		for {
			time.Sleep(time.Hour) // nothing at all would be a deadlock to the runtime
		}
	}
	if err := l.Prepared(); err != nil {
		panic(err)
	}
	if part == "fail late" {
		return 9
	}
	if fd, ok := l.Inherited("thing"); ok {
		text := make([]byte, 64)
		n, err := unix.Pread(fd, text, 0)
		note(dir, "child %d inherits %q %v", os.Getpid(), text[:n], err)
		if part == "release" {
			_ = unix.Close(fd)
			if err := l.Release("thing"); err != nil {
				panic(err)
			}
		}
	} else {
		f, err := os.Create(filepath.Join(dir, "thing"))
		if err != nil {
			panic(err)
		}
		fmt.Fprintf(f, "made by %d", os.Getpid())
		if err := l.Hold("thing", int(f.Fd())); err != nil {
			panic(err)
		}
		note(dir, "child %d makes", os.Getpid())
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGHUP)
	if err := l.Tell("READY=1"); err != nil {
		panic(err)
	}
	note(dir, "child %d ready", os.Getpid())
	if part == "die" {
		return 7
	}
	beat := time.NewTicker(l.Hang() / 4)
	for {
		select {
		case <-beat.C:
			if part != "hang" {
				_ = l.Tell("WATCHDOG=1")
			}
		case s := <-stop:
			if s == syscall.SIGHUP {
				note(dir, "child %d hup", os.Getpid())
				continue
			}
			note(dir, "child %d stops", os.Getpid())
			if part == "stubborn" {
				_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			}
			return 0
		}
	}
}

// stage is a directory with a running supervisor.
type stage struct {
	t      *testing.T
	dir    string
	cmd    *exec.Cmd
	stderr *locked
	done   chan struct{}
	code   int
}

type locked struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *locked) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newStage(t *testing.T, part string) *stage {
	t.Helper()
	s := &stage{t: t, dir: t.TempDir(), stderr: &locked{}, done: make(chan struct{})}
	s.play(part)
	s.cmd = exec.Command(os.Args[0])
	s.cmd.Env = append(os.Environ(), playEnv+"="+s.dir)
	s.cmd.Stderr = s.stderr
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = s.cmd.Wait()
		s.code = s.cmd.ProcessState.ExitCode()
		close(s.done)
	}()
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		<-s.done
		if t.Failed() {
			t.Logf("log:\n%s\nsupervisor:\n%s", s.log(), s.stderr)
		}
	})
	return s
}

// play sets what children do that start from now on.
func (s *stage) play(part string) {
	s.t.Helper()
	tmp := filepath.Join(s.dir, "play.new")
	if err := os.WriteFile(tmp, []byte(part), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(s.dir, "play")); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stage) log() string {
	b, _ := os.ReadFile(filepath.Join(s.dir, "log"))
	return string(b)
}

func (s *stage) until(what string, cond func() bool) {
	s.t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("did not happen: %s", what)
		}
	}
}

// ready waits for the n-th child that is ready, from 1, and returns its process.
func (s *stage) ready(n int) (pid int) {
	s.t.Helper()
	s.until(fmt.Sprintf("%d children get ready", n), func() bool {
		seen := 0
		for line := range strings.Lines(s.log()) {
			f := strings.Fields(line)
			if len(f) == 3 && f[0] == "child" && f[2] == "ready" {
				if seen++; seen == n {
					pid, _ = strconv.Atoi(f[1])
				}
			}
		}
		return seen >= n
	})
	return pid
}

func (s *stage) ended(want int) {
	s.t.Helper()
	s.until("the supervisor ends", func() bool {
		select {
		case <-s.done:
			return true
		default:
			return false
		}
	})
	if s.code != want {
		s.t.Errorf("exit code %d, want %d", s.code, want)
	}
	if entries, err := os.ReadDir(filepath.Join(s.dir, "run")); !errors.Is(err, os.ErrNotExist) {
		s.t.Errorf("the runtime directory is left: %v %v", entries, err)
	}
}

func (s *stage) stop(want int) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatal(err)
	}
	s.ended(want)
}

func (s *stage) kill(pid int) {
	s.t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stage) upgrade() (string, error) {
	var out bytes.Buffer
	ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
	defer cancel()
	err := Upgrade(ctx, filepath.Join(s.dir, "run"), "", &out)
	return out.String(), err
}

func (s *stage) has(text string) {
	s.t.Helper()
	if !strings.Contains(s.log(), text) {
		s.t.Errorf("the log lacks %q", text)
	}
}

// TestRestart: successors get what a predecessor stored, SIGHUP and SIGTERM
// reach the child, and the end is the child's.
func TestRestart(t *testing.T) {
	s := newStage(t, "serve")
	first := s.ready(1)
	for n := 2; n <= 4; n++ {
		s.kill(s.ready(n - 1))
		pid := s.ready(n)
		s.has(fmt.Sprintf("child %d inherits \"made by %d\" <nil>", pid, first))
	}
	pid := s.ready(4)
	if err := s.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	s.until("SIGHUP arrives", func() bool { return strings.Contains(s.log(), fmt.Sprintf("child %d hup", pid)) })
	s.stop(0)
	s.has(fmt.Sprintf("child %d stops", pid))
	if strings.Contains(s.log(), "cleanup") || strings.Count(s.log(), "manager READY=1") != 1 || strings.Count(s.log(), "manager STOPPING=1") != 1 {
		t.Error("the service manager heard something else, or there was a clean-up")
	}
}

// TestRelease: what a child gives up, the next one does not get.
func TestRelease(t *testing.T) {
	s := newStage(t, "serve")
	s.kill(s.ready(1))
	s.ready(2)
	s.play("release")
	s.kill(s.ready(2))
	pid := s.ready(3)
	s.play("serve")
	s.kill(pid)
	pid = s.ready(4)
	s.has(fmt.Sprintf("child %d makes", pid))
	s.stop(0)
}

// TestHang: a child that is ready and says nothing more is replaced.
func TestHang(t *testing.T) {
	s := newStage(t, "hang")
	s.ready(1)
	s.play("serve")
	s.ready(2)
	s.stop(0)
}

// TestStopped: so is one that is stopped, which never wakes up again.
func TestStopped(t *testing.T) {
	s := newStage(t, "serve")
	pid := s.ready(1)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	s.ready(2)
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("process %d is there: %v", pid, err)
	}
	s.stop(0)
}

// TestFirstStart: an exit code of the very first start is the supervisor's.
func TestFirstStart(t *testing.T) {
	newStage(t, "fail").ended(2)
}

// TestMuteStart: one that never gets ready is killed and started again.
func TestMuteStart(t *testing.T) {
	s := newStage(t, "mute")
	s.until("it is killed", func() bool { return strings.Contains(s.stderr.String(), "no sign of life") })
	s.play("serve")
	s.ready(1)
	s.stop(0)
}

// TestQuickDeaths: a child that dies again and again is started again with a
// pause, and at once when the deaths are over.
func TestQuickDeaths(t *testing.T) {
	s := newStage(t, "die")
	s.until("a pause", func() bool { return strings.Contains(s.stderr.String(), "again and again") })
	n := strings.Count(s.log(), " ready")
	if n <= freeDeaths {
		t.Errorf("%d starts before the first pause", n)
	}
	s.play("serve")
	s.until("a child that stays", func() bool { return strings.Count(s.log(), " ready") > n })
	s.stop(0)
}

// TestStopWithoutEngine: if the engine cannot clean up, the supervisor has it
// done: after a crash in the stop, and while there is none.
func TestStopWithoutEngine(t *testing.T) {
	s := newStage(t, "stubborn")
	s.ready(1)
	s.stop(1)
	s.has("cleanup")
	s = newStage(t, "serve")
	s.ready(1)
	s.play("die")
	s.kill(s.ready(1))
	s.until("a pause", func() bool { return strings.Contains(s.stderr.String(), "next_start_in=1.6s") })
	s.stop(0)
	s.has("cleanup")
}

// TestUpgrade: the supervisor stays the same process, and serves on afterwards
// in every way.
func TestUpgrade(t *testing.T) {
	s := newStage(t, "serve")
	first := s.ready(1)
	for n := 2; n <= 6; n++ {
		old := s.ready(n - 1)
		out, err := s.upgrade()
		if err != nil || !strings.Contains(out, fmt.Sprintf("process %d serves", s.ready(n))) {
			t.Fatalf("%v: %s", err, out)
		}
		if err := syscall.Kill(old, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("process %d is there: %v", old, err)
		}
		s.has(fmt.Sprintf("child %d inherits \"made by %d\" <nil>", s.ready(n), first))
	}
	s.until("the supervisor replaces itself", func() bool {
		return strings.Count(s.stderr.String(), "from a new executable") == 5
	})
	s.kill(s.ready(6))
	if err := syscall.Kill(s.ready(7), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	s.ready(8)
	if err := s.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	s.until("SIGHUP arrives", func() bool { return strings.Contains(s.log(), "hup") })
	s.stop(0)
	if strings.Count(s.log(), "manager READY=1") != 1 {
		t.Error("the service manager was told again that it is ready")
	}
}

// TestUpgradeFails: before the swap the old child serves on, whatever the new
// one does; after it the old executable comes back.
func TestUpgradeFails(t *testing.T) {
	s := newStage(t, "serve")
	old := s.ready(1)
	for part, want := range map[string]string{"fail": "exit status 2", "mute": "signal: killed"} {
		s.play(part)
		out, err := s.upgrade()
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "serves on") {
			t.Errorf("%s: %v: %s", part, err, out)
		}
		if err := syscall.Kill(old, 0); err != nil {
			t.Fatalf("%s: the old child: %v", part, err)
		}
	}
	s.play("fail late")
	out, err := s.upgrade()
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "exit status 9") || !strings.Contains(err.Error(), "started again") {
		t.Errorf("%v: %s", err, out)
	}
	s.play("serve")
	pid := s.ready(2)
	s.has(fmt.Sprintf("child %d inherits \"made by %d\" <nil>", pid, old))
	// And the next one is not hindered.
	if out, err := s.upgrade(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	s.stop(0)
}

// TestUpgradeStopped: a stop in the middle of an upgrade is a stop.
func TestUpgradeStopped(t *testing.T) {
	s := newStage(t, "serve")
	s.ready(1)
	s.play("mute")
	failed := make(chan error, 1)
	go func() {
		_, err := s.upgrade()
		failed <- err
	}()
	s.until("it prepares", func() bool { return strings.Contains(s.stderr.String(), "prepares") })
	s.stop(0)
	if err := <-failed; !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
}

// TestUpgradeSignals: a signal to stop that comes at any moment of an upgrade is
// obeyed, in order but for the moment in which the supervisor has no code.
func TestUpgradeSignals(t *testing.T) {
	for i := range 15 {
		s := newStage(t, "serve")
		s.ready(1)
		over := make(chan struct{})
		go func() {
			defer close(over)
			_, _ = s.upgrade()
		}()
		time.Sleep(time.Duration(i) * time.Millisecond) // any moment
		if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		s.until("the supervisor ends", func() bool {
			select {
			case <-s.done:
				return true
			default:
				return false
			}
		})
		<-over
		if s.code < 0 {
			// It had an executable and no handler yet. The engine is gone with
			// it, and the service manager sees how it ended.
			if log := s.stderr.String(); !strings.Contains(log, "upgrade: the new engine serves") || strings.Contains(log, "from a new executable") {
				t.Fatalf("round %d: %v", i, s.cmd.ProcessState)
			}
			t.Logf("round %d: %v between two executables", i, s.cmd.ProcessState)
			pid := s.ready(2)
			s.until("the engine is gone", func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) })
			continue
		}
		if _, err := os.Stat(filepath.Join(s.dir, "run")); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("round %d: the runtime directory is left", i)
		}
	}
}

// TestUpgradeWithoutSupervisor: there is nobody to ask.
func TestUpgradeWithoutSupervisor(t *testing.T) {
	if err := Upgrade(t.Context(), t.TempDir(), "", io.Discard); !errors.Is(err, ErrNotSupervised) {
		t.Error(err)
	}
}

// TestSecond: a second supervisor of the directory is refused and does no harm.
func TestSecond(t *testing.T) {
	s := newStage(t, "serve")
	pid := s.ready(1)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), playEnv+"="+s.dir)
	if err := cmd.Run(); cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("the second ends with %v", err)
	}
	s.has("another supervisor holds")
	if out, err := s.upgrade(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if s.ready(2) == pid {
		t.Error("no new child")
	}
	s.stop(0)
}
