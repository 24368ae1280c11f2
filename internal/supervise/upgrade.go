// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// SocketName is the supervisor's socket in the runtime directory, for its own user
// and root.
const SocketName = "supervisor.sock"

// ErrNotSupervised: no supervisor runs for this runtime directory.
var ErrNotSupervised = errors.New("no supervisor answers")

// ErrRefused: the upgrade did not happen; the text says what serves now.
var ErrRefused = errors.New("upgrade refused")

// request and answer are lines of JSON.
type request struct {
	Upgrade string `json:"upgrade"` // path of the executable
}

type answer struct {
	Text string `json:"text"`
	Done bool   `json:"done,omitempty"`
	OK   bool   `json:"ok,omitempty"` // with Done
}

// caller is somebody who asked for an upgrade.
type caller struct {
	path string
	conn *net.UnixConn
}

// patience bounds a write to a caller, who may have gone to sleep.
const patience = time.Second

func (c *caller) say(a answer) {
	b, err := json.Marshal(a)
	if err != nil {
		return
	}
	_ = c.conn.SetWriteDeadline(time.Now().Add(patience))
	_, _ = c.conn.Write(append(b, '\n')) // An upgrade does not depend on its audience.
	if a.Done {
		_ = c.conn.Close()
	}
}

// accept takes callers until the listener is closed.
func (s *supervisor) accept(l *net.UnixListener) {
	for {
		conn, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.log.Error("the supervisor's socket", "error", err)
			time.Sleep(patience)
			continue
		}
		go func() {
			c := &caller{conn: conn}
			if err := c.read(conn); err != nil {
				c.say(answer{Text: err.Error(), Done: true})
				return
			}
			s.calls <- c
		}()
	}
}

// read reads the request of somebody who may ask.
func (c *caller) read(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var who *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { who, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(cerr, err); err != nil {
		return err
	}
	if who.Uid != 0 && int(who.Uid) != os.Geteuid() {
		return errors.New("only root and the user of the supervisor may ask for an upgrade")
	}
	if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	var r request
	if err := json.NewDecoder(io.LimitReader(conn, 64<<10)).Decode(&r); err != nil {
		return fmt.Errorf("the request cannot be read: %w", err)
	}
	if r.Upgrade != "" && !filepath.IsAbs(r.Upgrade) {
		return fmt.Errorf("%q is not an absolute path", r.Upgrade)
	}
	c.path = r.Upgrade
	return nil
}

// Upgrade asks the supervisor of a runtime directory to go over to another
// executable, "" for the one at the path that it was started from, and writes
// what it hears to out. The error wraps ErrRefused if the upgrade did not
// happen, and ErrNotSupervised if nobody is there to ask.
func Upgrade(ctx context.Context, dir, path string, out io.Writer) error {
	for {
		heard, err := ask(ctx, dir, path, out)
		// A supervisor that is going over to another executable itself may take
		// a connection with it; nothing has been done for it then.
		if heard || !errors.Is(err, ErrGone) || ctx.Err() != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func ask(ctx context.Context, dir, path string, out io.Writer) (heard bool, err error) {
	socket := filepath.Join(dir, SocketName)
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return false, fmt.Errorf("%w at %s: is the instance run with --supervise?", ErrNotSupervised, socket)
	}
	if err != nil {
		return false, fmt.Errorf("supervisor: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	b, err := json.Marshal(request{Upgrade: path})
	if err == nil {
		_, err = conn.Write(append(b, '\n'))
	}
	lines := bufio.NewScanner(conn)
	for err == nil && lines.Scan() {
		heard = true
		var a answer
		if err = json.Unmarshal(lines.Bytes(), &a); err != nil {
			break
		}
		if a.Done && !a.OK {
			return true, fmt.Errorf("%w: %s", ErrRefused, a.Text)
		}
		if _, err := fmt.Fprintln(out, a.Text); err != nil || a.Done {
			return true, err
		}
	}
	return heard, fmt.Errorf("supervisor: %w before it had finished: %w", ErrGone, errors.Join(err, lines.Err(), ctx.Err()))
}
