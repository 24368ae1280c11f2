// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// highFD is above all descriptors that a child is given.
const highFD = maxHeld + 16

// A binary is an executable, held open: what a package replaces under the same
// name stays what it was for those who run it.
type binary struct {
	path string // by which it was opened
	fd   int    // highFD or above
}

// openBinary opens an executable that nobody but its owner can change, and
// whose owner is root or the user of this process.
func openBinary(path string) (*binary, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o111 == 0:
		return nil, fmt.Errorf("%s is not an executable file", path)
	case st.Mode&0o022 != 0:
		return nil, fmt.Errorf("%s can be changed by others than its owner", path)
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return nil, fmt.Errorf("%s belongs to user %d", path, st.Uid)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, highFD)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &binary{path, fd}, nil
}

// name is what exec is given: the path as long as it is the same file, because
// listings show it, else the open file.
func (b *binary) name() string {
	var now, own unix.Stat_t
	if unix.Stat(b.path, &now) == nil && unix.Fstat(b.fd, &own) == nil && now.Dev == own.Dev && now.Ino == own.Ino {
		return b.path
	}
	return "/proc/self/fd/" + strconv.Itoa(b.fd)
}

func (b *binary) close() { _ = unix.Close(b.fd) }

// child is one engine process.
type child struct {
	proc   *os.Process
	bin    *binary
	conn   *net.UnixConn
	silent time.Duration   // awake time without a sign of life
	heard  <-chan struct{} // closed when nothing more is read from it

	prepared, ready, stopping bool
	readyAt                   time.Time
}

// message is what a child said, or its end.
type message struct {
	from  *child
	words map[string]string
	fds   []int
	end   *os.ProcessState // nil: words
	lost  error            // the end of a process that could not be waited for
}

// pair makes the two ends. Both are closed on exec.
func pair() (ours *net.UnixConn, theirs int, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, -1, err
	}
	if ours, err = connOf(fds[0]); err != nil {
		_ = unix.Close(fds[1])
		return nil, -1, err
	}
	return ours, fds[1], nil
}

// connOf takes over a descriptor.
func connOf(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "pair")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		_ = c.Close()
		return nil, fmt.Errorf("descriptor %d is no unix socket", fd)
	}
	return u, nil
}

// spawn starts a child of bin. The calling thread is its parent: when that
// ends, the child is killed, so that no engine is left without a supervisor.
func (s *supervisor) spawn(bin *binary, prepare bool) (*child, error) {
	ours, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	defer unix.Close(theirs)
	files := []uintptr{0, 1, 2, uintptr(theirs)}
	var held []string
	for _, name := range slices.Sorted(maps.Keys(s.held)) {
		held = append(held, name+":"+strconv.Itoa(len(files)))
		files = append(files, uintptr(s.held[name]))
	}
	env := append(slices.Clone(s.opt.ChildEnv), envFD+"=3", envHeld+"="+strings.Join(held, ","),
		envHang+"="+strconv.FormatInt(s.opt.Hang.Milliseconds(), 10))
	switch {
	case prepare:
		env = append(env, envPrepare+"=1")
	case s.served && s.last && s.opt.Last != "":
		env = append(env, envLast+"="+s.opt.Last)
	}
	// Not os.StartProcess: an os.File would put a queue's socket into the
	// network poller, and wake this process for each packet.
	pid, err := syscall.ForkExec(bin.name(), append([]string{bin.path}, s.opt.Args...), &syscall.ProcAttr{
		Env: env, Files: files, Sys: &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL},
	})
	if err != nil {
		_ = ours.Close()
		return nil, fmt.Errorf("%s: %w", bin.path, err)
	}
	p, err := os.FindProcess(pid)
	if err != nil {
		_ = ours.Close()
		return nil, err
	}
	c := &child{proc: p, bin: bin, conn: ours}
	s.listen(c)
	return c, nil
}

// listen reads what the child says until it is dead, and then tells that.
func (s *supervisor) listen(c *child) {
	heard := make(chan struct{})
	c.heard = heard
	go func() {
		defer close(heard)
		b, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*4))
		for {
			n, nOOB, _, _, err := c.conn.ReadMsgUnix(b, oob)
			if err != nil {
				return
			}
			m := message{from: c, words: map[string]string{}, fds: received(oob[:nOOB])}
			for line := range strings.Lines(string(b[:n])) {
				k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
				m.words[k] = v
			}
			s.said <- m
		}
	}()
	go func() {
		st, err := c.proc.Wait()
		// What it said last is heard, and a process that has its end of the
		// pair from somewhere is not waited for.
		_ = c.conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		<-heard
		s.said <- message{from: c, end: st, lost: err}
	}()
}

// received returns the descriptors of ancillary data.
func received(oob []byte) (fds []int) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for i := range msgs {
		if got, err := unix.ParseUnixRights(&msgs[i]); err == nil {
			fds = append(fds, got...)
		}
	}
	for _, fd := range fds {
		unix.CloseOnExec(fd)
	}
	return fds
}

// kill ends a child at once, a stopped one too. Its end comes as a message.
func (c *child) kill() {
	_ = c.proc.Kill() // It may be dead already.
}
