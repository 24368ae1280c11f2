// SPDX-License-Identifier: Apache-2.0

// Package accesslog writes one line per request to a file or a unix socket. It
// takes the records out of the engines' rings, so that a slow disk or a dead
// collector costs lines and never a packet's time.
//
// The package must not be called from a packet thread, and it writes nothing of
// a request but its method and target: no field has a place in a log by
// default.
package accesslog

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/engine"
)

const (
	// ringSize is how many records of one shard may wait. At 20 looks a second
	// that is room for 160,000 requests per second.
	ringSize = 8192
	pace     = 50 * time.Millisecond
	// retryPace is how often a path that cannot be opened is tried again.
	retryPace = time.Second
	// patience bounds a write to a socket that nobody reads.
	patience = time.Second
)

// Log is the access log of one instance.
type Log struct {
	log   *slog.Logger
	names Names

	written, dropped atomic.Uint64
	reopen           atomic.Bool

	rings []*engine.AccessRing // those that are in the engines, or were
	gone  uint64               // what rings that are not used any more dropped
	lost  atomic.Uint64        // what rings have dropped

	set   config.Access
	out   output
	tried time.Time // last attempt to open
	told  string    // the error that was logged last
	buf   []byte
	lines int
}

// New makes a log that says what is wrong with it to another one.
func New(log *slog.Logger, names Names) *Log { return &Log{log: log, names: names} }

// Counts returns how many lines were written, and how many requests are missing
// because there was no room or no output. Any goroutine may call it.
func (l *Log) Counts() (written, dropped uint64) {
	return l.written.Load(), l.dropped.Load() + l.lost.Load()
}

// Reopen opens the file anew at the next look, after a rotation. Any goroutine
// may call it.
func (l *Log) Reopen() { l.reopen.Store(true) }

// Engines is how a Log reaches the engines.
type Engines struct {
	Shards int
	// Set gives each engine its ring, in their order; nil takes them away.
	Set func(context.Context, []*engine.AccessRing) error
	// Ended blocks until no engine runs any more.
	Ended func()
}

// Run writes until ctx ends and the engines have ended. want is asked at every
// look what the configuration says.
func (l *Log) Run(ctx context.Context, want func() config.Access, e Engines) {
	defer l.close()
	t := time.NewTicker(pace)
	defer t.Stop()
	for {
		if now := want(); now != l.set {
			l.change(ctx, now, e)
		}
		l.look()
		select {
		case <-t.C:
		case <-ctx.Done():
			if l.set.Path != "" {
				e.Ended()
				l.look()
			}
			return
		}
	}
}

// change follows the configuration.
func (l *Log) change(ctx context.Context, now config.Access, e Engines) {
	if l.set.Path != "" {
		l.look() // to where it belongs
	}
	if (now.Path == "") != (l.set.Path == "") || now.Sample != l.set.Sample {
		var rings []*engine.AccessRing
		if now.Path != "" {
			for range e.Shards {
				rings = append(rings, engine.NewAccessRing(ringSize, now.Sample))
			}
		}
		if err := e.Set(ctx, rings); err != nil {
			return // At the end of the instance.
		}
		if l.set.Path != "" {
			l.look() // what came until then
		}
		for _, r := range l.rings {
			l.gone += r.Dropped()
		}
		l.rings = rings
	}
	if now.Path != l.set.Path {
		l.close()
		l.tried, l.told = time.Time{}, ""
	}
	l.set = now
}

// look writes what is there.
func (l *Log) look() {
	lost := l.gone
	for _, r := range l.rings {
		lost += r.Dropped()
		r.Drain(func(a *engine.AccessRecord) {
			if l.set.Format == "json" {
				l.buf = appendJSON(l.buf, a, l.names)
			} else {
				l.buf = appendCommon(l.buf, a)
			}
			if l.lines++; len(l.buf) >= 64<<10 {
				l.flush()
			}
		})
	}
	l.lost.Store(lost)
	l.flush()
}

func (l *Log) flush() {
	if l.reopen.Swap(false) {
		l.close()
		l.tried = time.Time{}
	}
	if l.lines == 0 {
		return
	}
	n, err := 0, l.open()
	if err == nil {
		n, err = l.out.write(l.buf)
		if err != nil {
			l.close()
			l.tried = time.Now()
		}
	}
	if err != nil && !errors.Is(err, errWait) && err.Error() != l.told {
		l.told = err.Error()
		l.log.Warn("the access log cannot be written; its lines are lost until it can", "error", err)
	}
	if err == nil {
		l.told = ""
		n = l.lines
	}
	l.written.Add(uint64(n))
	l.dropped.Add(uint64(l.lines - n))
	l.buf, l.lines = l.buf[:0], 0
}

func (l *Log) close() {
	if l.out.c != nil {
		_ = l.out.c.Close() // Nothing is buffered.
		l.out = output{}
	}
}

// errWait says that it is too early for another attempt.
var errWait = errors.New("not tried again yet")

func (l *Log) open() error {
	if l.out.c != nil {
		return nil
	}
	now := time.Now()
	if now.Sub(l.tried) < retryPace {
		return errWait
	}
	l.tried = now
	var err error
	l.out, err = openOutput(l.set.Path)
	if err != nil {
		return fmt.Errorf("log.access.path: %w", err)
	}
	return nil
}

// output is a file or a socket.
type output struct {
	c     interface{ Close() error }
	file  *os.File
	conn  net.Conn
	grams bool // one line per datagram
}

// fileMode lets a group read the log: it has clients' addresses in it.
const fileMode = 0o640

func openOutput(path string) (output, error) {
	st, err := os.Stat(path)
	switch {
	case err == nil && st.Mode()&fs.ModeSocket != 0:
		// A collector listens for datagrams (syslog, vector) or streams.
		if c, err := net.DialTimeout("unixgram", path, patience); err == nil {
			return output{c: c, conn: c, grams: true}, nil
		}
		c, err := net.DialTimeout("unix", path, patience)
		if err != nil {
			return output{}, err
		}
		return output{c: c, conn: c}, nil
	case err == nil && !st.Mode().IsRegular() && st.Mode()&fs.ModeCharDevice == 0:
		return output{}, &fs.PathError{Op: "open", Path: path, Err: errors.New("neither a file nor a socket")}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, fileMode)
	if err != nil {
		return output{}, err
	}
	return output{c: f, file: f}, nil
}

// write writes whole lines and returns how many of them got through.
func (o *output) write(b []byte) (lines int, err error) {
	if o.file != nil {
		n, err := o.file.Write(b)
		return count(b[:n]), err
	}
	if err := o.conn.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return 0, err
	}
	if !o.grams {
		n, err := o.conn.Write(b)
		return count(b[:n]), err
	}
	for len(b) > 0 {
		n := next(b)
		if _, err := o.conn.Write(b[:n-1]); err != nil {
			return lines, err
		}
		b = b[n:]
		lines++
	}
	return lines, nil
}

// next is the length of the first line, its end included.
func next(b []byte) int {
	for i, c := range b {
		if c == '\n' {
			return i + 1
		}
	}
	return len(b)
}

func count(b []byte) (lines int) {
	for _, c := range b {
		if c == '\n' {
			lines++
		}
	}
	return lines
}
