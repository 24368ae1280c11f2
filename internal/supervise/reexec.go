// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
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
		c.say(answer{Text: "the engine is just starting; try again when it serves", Done: true})
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
	up.by.say(answer{Text: fmt.Sprintf("process %d serves", s.cur.proc.Pid), Done: true, OK: true})
	if err := s.reexec(); err != nil {
		// Its messages are not read any more; its successor's will be.
		s.log.Error("upgrade: the supervisor stays what it was", "error", err)
		s.cur.kill()
	}
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
	Stopping bool           `json:"stopping"`
}

// reexec replaces this process's executable by that of the engine. It returns
// only if that fails.
func (s *supervisor) reexec() error {
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
	st := state{
		Version: stateVersion, PID: c.proc.Pid, Conn: int(conn.Fd()), Lock: s.lock, Socket: int(sock.Fd()),
		Binary: s.bin.fd, Path: s.bin.path, Held: s.held, Made: s.made, Deaths: s.deaths, Stopping: s.stopping,
	}
	text, err := json.Marshal(st)
	if err != nil {
		return err
	}
	// A signal that comes in between waits for the next executable.
	var all, before unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &before); err != nil {
		return err
	}
	st.inherit(0)
	err = unix.Exec(s.bin.name(), append([]string{s.bin.path}, s.opt.Args...), append(slices.Clone(s.opt.Env), envState+"="+string(text)))
	st.inherit(unix.FD_CLOEXEC)
	return errors.Join(err, unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil))
}

// inherit sets the flags of all descriptors.
func (st *state) inherit(flags int) {
	fds := []int{st.Conn, st.Lock, st.Socket, st.Binary}
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
	// The former executable had all signals wait.
	var none unix.Sigset_t
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &none, nil); err != nil {
		return err
	}
	s.log.Info("the supervisor runs from a new executable", "engine", st.PID)
	return nil
}
