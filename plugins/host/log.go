// SPDX-License-Identifier: Apache-2.0

package host

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"log/slog"
	"os"
	"strings"
	"sync"

	"github.com/hashicorp/go-hclog"
)

// hclogger is what go-plugin logs to. Its own remarks are for debugging: what
// matters of them the supervisor says in its own words. The lines that the
// plugin writes to standard error come by way of Named and keep their level.
type hclogger struct {
	log    *slog.Logger
	plugin bool // these are the plugin's words
}

var _ hclog.Logger = (*hclogger)(nil)

func (l *hclogger) Log(level hclog.Level, msg string, args ...any) {
	to := slog.LevelDebug
	if l.plugin {
		switch level {
		case hclog.Info:
			to = slog.LevelInfo
		case hclog.Warn:
			to = slog.LevelWarn
		case hclog.Error:
			to = slog.LevelError
		}
	}
	ctx := context.Background()
	if !l.log.Enabled(ctx, to) {
		return
	}
	for i := 0; i+1 < len(args); i += 2 {
		if args[i] == "timestamp" { // ours is good enough
			args = append(args[:i:i], args[i+2:]...)
			break
		}
	}
	l.log.Log(ctx, to, msg, args...)
}

func (l *hclogger) Trace(msg string, args ...any) { l.Log(hclog.Trace, msg, args...) }
func (l *hclogger) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }
func (l *hclogger) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l *hclogger) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l *hclogger) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

func (l *hclogger) IsTrace() bool         { return false }
func (l *hclogger) IsDebug() bool         { return true }
func (l *hclogger) IsInfo() bool          { return true }
func (l *hclogger) IsWarn() bool          { return true }
func (l *hclogger) IsError() bool         { return true }
func (l *hclogger) ImpliedArgs() []any    { return nil }
func (l *hclogger) Name() string          { return "" }
func (l *hclogger) SetLevel(hclog.Level)  {}
func (l *hclogger) GetLevel() hclog.Level { return hclog.Debug }
func (l *hclogger) With(args ...any) hclog.Logger {
	return &hclogger{l.log.With(args...), l.plugin}
}
func (l *hclogger) Named(name string) hclog.Logger {
	return &hclogger{l.log, name != "stdio"}
}
func (l *hclogger) ResetNamed(name string) hclog.Logger { return l.Named(name) }
func (l *hclogger) StandardLogger(*hclog.StandardLoggerOptions) *log.Logger {
	return slog.NewLogLogger(l.log.Handler(), slog.LevelDebug)
}
func (l *hclogger) StandardWriter(*hclog.StandardLoggerOptions) io.Writer {
	return newLineLogger(l.log, slog.LevelDebug)
}

// lineLogger logs every line written to it: what a plugin prints.
type lineLogger struct {
	log   *slog.Logger
	level slog.Level
	part  []byte
}

// maxLine is where a line that does not end is cut, in bytes.
const maxLine = 4096

func newLineLogger(log *slog.Logger, level slog.Level) *lineLogger {
	return &lineLogger{log: log, level: level}
}

func (w *lineLogger) Write(b []byte) (int, error) {
	w.part = append(w.part, b...)
	for {
		i := bytes.IndexByte(w.part, '\n')
		if i < 0 && len(w.part) < maxLine {
			return len(b), nil
		}
		if i < 0 || i > maxLine {
			i = maxLine - 1
		}
		if line := strings.ToValidUTF8(strings.TrimSpace(string(w.part[:i])), "?"); line != "" {
			w.log.Log(context.Background(), w.level, line)
		}
		w.part = append(w.part[:0], w.part[i+1:]...)
	}
}

// tail passes a process's standard error on and keeps the end of it.
type tail struct {
	r     *os.File
	ended chan struct{} // closed when the end was read
	once  sync.Once

	mu   sync.Mutex // guards kept
	kept []byte
}

func newTail(r *os.File) *tail { return &tail{r: r, ended: make(chan struct{})} }

func (t *tail) Read(b []byte) (int, error) {
	n, err := t.r.Read(b)
	const most = 1024
	t.mu.Lock()
	t.kept = append(t.kept, b[:n]...)
	if over := len(t.kept) - most; over > 0 {
		t.kept = append(t.kept[:0], t.kept[over:]...)
	}
	t.mu.Unlock()
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, os.ErrClosed) {
		err = io.EOF
	}
	if err != nil {
		t.once.Do(func() { close(t.ended) })
	}
	return n, err
}

func (t *tail) Close() error { return t.r.Close() }

// last returns the last line that is not empty.
func (t *tail) last() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := strings.Split(strings.TrimSpace(strings.ToValidUTF8(string(t.kept), "?")), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}
