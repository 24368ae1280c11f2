// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// upgrade is one that is under way.
type upgrade struct {
	by        *caller
	new, old  *binary
	switching bool // the old engine is dead
}

func (u *upgrade) fail(text string) { u.by.say(answer{Text: text, Done: true}) }

// begun begins an upgrade: the new engine starts beside the old one.
func (s *supervisor) begun(c *caller) {
	switch {
	case s.stopping:
		c.say(answer{Text: "the instance is being stopped", Done: true})
		return
	case s.up != nil:
		c.say(answer{Text: "another upgrade is under way", Done: true})
		return
	case s.cur == nil || !s.cur.ready:
		s.waiting = append(s.waiting, c) // until it serves
		return
	}
	if c.path == "" {
		c.path = s.bin.path
	}
	bin, err := openBinary(c.path)
	if err == nil {
		if s.next, err = s.spawn(bin, true); err != nil {
			bin.close()
		}
	}
	if err != nil {
		c.say(answer{Text: fmt.Sprintf("the new engine cannot be started: %v; the old one (process %d) serves on", err, s.cur.proc.Pid), Done: true})
		return
	}
	s.up = &upgrade{by: c, new: bin, old: s.bin}
	s.log.Info("upgrade: the new engine prepares", "pid", s.next.proc.Pid, "executable", c.path)
	c.say(answer{Text: fmt.Sprintf("process %d of %s prepares", s.next.proc.Pid, c.path)})
}

// refused ends an upgrade while the old engine serves.
func (s *supervisor) refused(why string) {
	if s.up == nil {
		return
	}
	s.up.new.close()
	s.log.Error("upgrade: the new engine cannot take over", "why", why)
	s.up.fail(fmt.Sprintf("the new engine cannot take over: %s; see the log. The old one serves on", why))
	s.up = nil
}

// swap kills the old engine, now that the new one is prepared.
func (s *supervisor) swap() {
	if s.cur == nil { // it is dead already
		s.retry = nil
		s.promote()
		return
	}
	s.up.by.say(answer{Text: fmt.Sprintf("it is prepared; the old engine (process %d) goes", s.cur.proc.Pid)})
	s.cur.kill()
}

// promote has the new engine take over.
func (s *supervisor) promote() {
	s.cur, s.next = s.next, nil
	s.cur.silent = 0
	s.up.switching = true
	s.bin = s.up.new
	s.deaths++
	_ = s.cur.conn.SetWriteDeadline(time.Now().Add(patience))
	if _, err := s.cur.conn.Write([]byte("GO=1")); err != nil {
		s.log.Error("upgrade: the new engine cannot be told", "error", err)
		s.cur.kill()
	}
}

// revert goes back to the old executable: the new engine died before it served.
func (s *supervisor) revert(how string) {
	s.up.new.close()
	s.bin = s.up.old
	s.log.Error("upgrade: the new engine died before it served; the old executable is started again", "end", how)
	s.up.fail(fmt.Sprintf("the new engine took over and died before it served: %s; see the log. The old executable is started again", how))
	s.up = nil
}

// succeeded ends an upgrade, and goes over to the new executable itself.
func (s *supervisor) succeeded() {
	up := s.up
	s.up = nil
	up.old.close()
	s.quick = 0
	s.log.Info("upgrade: the new engine serves", "pid", s.cur.proc.Pid, "executable", s.bin.path)
	if err := s.reexec(up.by); err != nil {
		// Its messages are not read any more; its successor's will be.
		s.log.Error("upgrade: the supervisor stays what it was", "error", err)
		s.cur.kill()
		s.upgraded(up.by)
		if s.told {
			s.signals <- unix.SIGTERM
		}
	}
}

// upgraded tells who asked that all is done.
func (s *supervisor) upgraded(by *caller) {
	by.say(answer{Text: fmt.Sprintf("process %d serves", s.cur.proc.Pid), Done: true, OK: true})
}

// stateVersion is of the state that one executable of the supervisor leaves to
// the next. A change that an older one could not read needs a new number.
const stateVersion = 1

// state is what a supervisor knows, for its next executable. Numbers of
// descriptors are kept over exec.
type state struct {
	Version  int            `json:"version"`
	PID      int            `json:"pid"` // the engine, which serves
	Conn     int            `json:"conn"`
	Lock     int            `json:"lock"`
	Socket   int            `json:"socket"`
	Binary   int            `json:"binary"`
	Path     string         `json:"path"`
	Held     map[string]int `json:"held"`
	Made     bool           `json:"made"`
	Deaths   int            `json:"deaths"`
	Caller   int            `json:"caller"`   // who asked for the upgrade
	Stopping bool           `json:"stopping"` // a request to stop has come
}

// reexec replaces this process's executable by that of the engine. It returns
// only if that fails. The next one answers by, so that whoever sends a signal
// after the answer sends it to that.
func (s *supervisor) reexec(by *caller) error {
	c := s.cur
	// Nothing may be read and lost from here on. What has been read is acted
	// on; an end is seen by the next executable as well.
	if err := c.conn.SetReadDeadline(time.Unix(1, 0)); err != nil {
		return err
	}
	for quiet := false; !quiet; {
		select {
		case m := <-s.said:
			if m.from == c && (m.end != nil || m.lost != nil) {
				return errors.New("the engine died")
			}
			s.hear(m)
		case <-c.heard:
			quiet = true
		}
	}
	conn, err := c.conn.File()
	if err != nil {
		return err
	}
	defer conn.Close()
	sock, err := s.sock.File()
	if err != nil {
		return err
	}
	defer sock.Close()
	peer, err := by.conn.File()
	if err != nil {
		return err
	}
	defer peer.Close()
	st := state{
		Version: stateVersion, PID: c.proc.Pid, Conn: int(conn.Fd()), Lock: s.lock, Socket: int(sock.Fd()),
		Binary: s.bin.fd, Path: s.bin.path, Held: s.held, Made: s.made, Deaths: s.deaths, Caller: int(peer.Fd()),
	}
	st.inherit(0)
	// What was sent until now is in the channel when Stop returns. A signal to
	// stop that comes between here and init below ends this process at once, and
	// the engine with it: it must not get lost at least.
	signal.Stop(s.signals)
	signal.Reset(unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	st.Stopping = s.stopping
	for len(s.signals) > 0 {
		if sig := <-s.signals; sig == unix.SIGHUP {
			_ = c.proc.Signal(sig)
		} else {
			st.Stopping = true
		}
	}
	text, err := json.Marshal(st)
	if err == nil {
		err = unix.Exec(s.bin.name(), append([]string{s.bin.path}, s.opt.Args...), append(slices.Clone(s.opt.Env), envState+"="+string(text)))
	}
	st.inherit(unix.FD_CLOEXEC)
	s.told = st.Stopping
	s.notify()
	return err
}

// early has the signals that came before anything else of this executable
// listened: it begins in the middle of a life.
var early chan os.Signal

func init() {
	if os.Getenv(envState) != "" {
		early = make(chan os.Signal, 8)
		signal.Notify(early, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	}
}

// inherit sets the flags of all descriptors.
func (st *state) inherit(flags int) {
	fds := []int{st.Conn, st.Lock, st.Socket, st.Binary, st.Caller}
	for _, fd := range st.Held {
		fds = append(fds, fd)
	}
	for _, fd := range fds {
		_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFD, flags) // They are open.
	}
}

// resume takes up what the former executable left.
func (s *supervisor) resume(text string) error {
	var st state
	if err := json.Unmarshal([]byte(text), &st); err != nil {
		return fmt.Errorf("what the former executable left cannot be read: %w", err)
	}
	if st.Version != stateVersion {
		return fmt.Errorf("the former executable left version %d, this one reads %d", st.Version, stateVersion)
	}
	st.inherit(unix.FD_CLOEXEC)
	s.lock, s.made, s.deaths = st.Lock, st.Made, st.Deaths
	s.bin = &binary{path: st.Path, fd: st.Binary}
	if st.Held != nil {
		s.held = st.Held
	}
	f := os.NewFile(uintptr(st.Socket), "socket")
	l, err := net.FileListener(f)
	_ = f.Close()
	if err != nil {
		return err
	}
	s.sock = l.(*net.UnixListener) // it was one
	conn, err := connOf(st.Conn)
	if err != nil {
		return err
	}
	p, err := os.FindProcess(st.PID)
	if err != nil {
		return err
	}
	s.served = true
	s.cur = &child{proc: p, bin: s.bin, conn: conn, ready: true, readyAt: time.Now()}
	s.listen(s.cur)
	s.log.Info("the supervisor runs from a new executable", "engine", st.PID)
	s.told = st.Stopping
	signal.Stop(early) // Others listen by now.
	for len(early) > 0 {
		if sig := <-early; sig == unix.SIGHUP {
			_ = p.Signal(sig)
		} else {
			s.told = true
		}
	}
	if peer, err := connOf(st.Caller); err == nil {
		s.upgraded(&caller{conn: peer})
	}
	return nil
}
