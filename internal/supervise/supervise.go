// SPDX-License-Identifier: Apache-2.0

// Package supervise keeps an engine running: a small parent process that holds
// the sockets of the packet queues, starts the engine as its child, and starts
// it again after a crash, in place of one that hangs, or from a new executable.
//
// The parent knows nothing about packets, rules and plugins, and must never
// touch them: what it holds are descriptors with names, given to it by a child
// and handed to the next one. So nothing in it can fail for the reasons for
// which an engine fails.
//
// There is one hand-over and no other: the old engine is killed by SIGKILL and
// the next one recovers from what is durable. A crash, a hang and an upgrade
// differ only in who kills, and in how much the next one has prepared before.
//
// Parent and child speak over a pair of sockets that the child inherits, in the
// words of sd_notify(3), one message per datagram:
//
//	child:  READY=1, WATCHDOG=1, STOPPING=1, STATUS=text
//	        FDSTORE=1 and FDNAME=name, with a descriptor; FDSTOREREMOVE=1
//	        PREPARED=1: everything that needs no lock is done
//	parent: GO=1: the predecessor is dead
//
// The life of a child: start, [prepared, go,] ready, beats until it dies.
package supervise

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Environment of a child. The names do not begin with WEIR_, which are keys of
// the configuration. A child takes all of it out at once: its own children
// have no business with it.
const (
	EnvPrefix  = "_WEIR_SUPERVISE_"
	envFD      = EnvPrefix + "FD"      // descriptor of the pair's other end
	envHeld    = EnvPrefix + "HELD"    // name:descriptor, separated by commas
	envHang    = EnvPrefix + "HANG"    // milliseconds of silence after which it is killed
	envPrepare = EnvPrefix + "PREPARE" // 1: a predecessor lives; prepare and wait
	envLast    = EnvPrefix + "LAST"    // path of what its predecessor was configured with
	envState   = EnvPrefix + "STATE"   // of a parent that replaced its executable
)

const (
	maxMessage = 4 << 10
	// maxHeld bounds what one child may store: 64 shards, and the two others.
	maxHeld = 128
)

// ErrGone: the parent process is not there any more.
var ErrGone = errors.New("the supervising process is gone")

// Link is a child's end. A nil Link belongs to a process without a parent of
// this kind; it tells nobody and holds nothing.
type Link struct {
	fd      int
	held    map[string]int
	hang    time.Duration
	prepare bool
}

// Supervised tells whether this process is a child, without taking anything
// out of the environment.
func Supervised() bool { return os.Getenv(envFD) != "" }

// Last is the path of the configuration that a predecessor left which died, for
// a child that goes on in its place; else empty. It counts before Find.
func Last() string {
	if !Supervised() {
		return ""
	}
	return os.Getenv(envLast)
}

// Find reads what the parent put into the environment and takes it out. It is
// called once, before anything is started. The result is nil if this process is
// no child.
func Find() (*Link, error) {
	if !Supervised() {
		return nil, nil
	}
	l := &Link{held: map[string]int{}, prepare: os.Getenv(envPrepare) == "1"}
	ms, err := strconv.Atoi(os.Getenv(envHang))
	if err == nil {
		l.hang = time.Duration(ms) * time.Millisecond
		l.fd, err = strconv.Atoi(os.Getenv(envFD))
	}
	var fds []int
	for part := range strings.SplitSeq(os.Getenv(envHeld), ",") {
		name, number, ok := strings.Cut(part, ":")
		if !ok || err != nil {
			continue
		}
		var fd int
		if fd, err = strconv.Atoi(number); err == nil {
			l.held[name] = fd
			fds = append(fds, fd)
		}
	}
	for _, name := range []string{envFD, envHeld, envHang, envPrepare, envLast, envState} {
		_ = os.Unsetenv(name) // It fails only for a name that cannot be one.
	}
	if err != nil {
		return nil, fmt.Errorf("supervise: environment of the parent: %w", err)
	}
	for _, fd := range append(fds, l.fd) {
		unix.CloseOnExec(fd)
	}
	return l, nil
}

// Hang is how long the parent waits for a sign of life.
func (l *Link) Hang() time.Duration { return l.hang }

// Tell sends a state to the parent.
func (l *Link) Tell(state string) error { return l.send(state, nil) }

func (l *Link) send(state string, rights []byte) error {
	for {
		err := unix.Sendmsg(l.fd, []byte(state), rights, nil, unix.MSG_NOSIGNAL)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET):
			return fmt.Errorf("supervise: %w", ErrGone)
		default:
			return fmt.Errorf("supervise: tell the parent: %w", err)
		}
	}
}

// Inherited returns the descriptor that a predecessor stored under a name, once:
// it belongs to the caller from then on.
func (l *Link) Inherited(name string) (fd int, ok bool) {
	if l == nil {
		return 0, false
	}
	fd, ok = l.held[name]
	delete(l.held, name)
	return fd, ok
}

// Hold gives the parent a copy of a descriptor, in place of one it has under
// that name, for this process's successors.
func (l *Link) Hold(name string, fd int) error {
	return l.send("FDSTORE=1\nFDNAME="+name, unix.UnixRights(fd))
}

// Release has the parent close what it has under a name, and closes this
// process's copy if nobody took it by Inherited.
func (l *Link) Release(name string) error {
	if fd, ok := l.Inherited(name); ok {
		_ = unix.Close(fd)
	}
	return l.send("FDSTOREREMOVE=1\nFDNAME="+name, nil)
}

// Rest lists the names of what was inherited and not taken.
func (l *Link) Rest() (names []string) {
	for name := range l.held {
		names = append(names, name)
	}
	return names
}

// Succeeds tells whether a predecessor lives, and Prepared has to be called.
func (l *Link) Succeeds() bool { return l.prepare }

// Prepared tells the parent that everything is done that can be done beside a
// living predecessor, and waits until that is dead. Without a predecessor it
// returns at once.
func (l *Link) Prepared() error {
	if !l.prepare {
		return nil
	}
	if err := l.Tell("PREPARED=1"); err != nil {
		return err
	}
	b := make([]byte, maxMessage)
	for {
		n, _, err := unix.Recvfrom(l.fd, b, 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("supervise: wait for the parent: %w", err)
		case n == 0:
			return fmt.Errorf("supervise: wait for the parent: %w", ErrGone)
		case string(b[:n]) == "GO=1":
			return nil
		}
	}
}
