// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// Provider hands over what the socket answers.
type Provider interface {
	// Status may be called at any time by any goroutine. The caller owns the
	// result.
	Status(ctx context.Context) (*Status, error)
}

// socketMode lets the owner and the group of the instance in.
const socketMode = 0o660

// goodbye is how long answers that are being written may take at a stop.
const goodbye = time.Second

// InUseError says that another instance answers on the socket.
type InUseError struct{ Socket string }

func (e *InUseError) Error() string {
	return fmt.Sprintf("another instance answers on %s; stop it, or give this one another admin.socket", e.Socket)
}

// Listener serves the control API. It holds the socket from Listen on.
type Listener struct {
	path     string
	listener net.Listener
	inode    os.FileInfo // of the socket that this Listener made
	madeDir  bool
	http     http.Server
	ending   chan struct{} // closed at the stop, for answers without an end
}

// Listen makes the socket, replacing one that a dead instance left. The error
// is an *InUseError if another instance is there. The socket's directory is
// made if it is absent.
func Listen(path string, p Provider) (*Listener, error) {
	s := &Listener{path: path}
	dir := filepath.Dir(path)
	if err := os.Mkdir(dir, 0o755); err == nil {
		s.madeDir = true
	} else if !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := s.bind(); err != nil {
		s.removeDir()
		return nil, err
	}
	s.ending = make(chan struct{})
	s.http = http.Server{Handler: routes(p, s.ending), ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
	return s, nil
}

// bind makes the socket in a directory that only the owner can enter, gives it
// its mode there and moves it into place, so that nobody it is not meant for can
// ever connect.
func (s *Listener) bind() error {
	if err := s.vacant(); err != nil {
		return err
	}
	private, err := os.MkdirTemp(filepath.Dir(s.path), ".w")
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	defer func() { _ = os.RemoveAll(private) }() // Empty once the socket is in place.
	tmp := filepath.Join(private, "s")
	l, err := net.Listen("unix", tmp)
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	// Another instance may have put its socket here by the time this one stops:
	// the file is removed by Close, and only if it still is ours.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	s.listener = l
	if err = os.Chmod(tmp, socketMode); err == nil {
		if s.inode, err = os.Lstat(tmp); err == nil {
			err = os.Rename(tmp, s.path)
		}
	}
	if err != nil {
		_ = l.Close() // The first error says what is wrong.
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}

// vacant refuses a path that somebody uses. A socket on which nobody listens
// was left by a dead instance.
func (s *Listener) vacant() error {
	st, err := os.Lstat(s.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("control socket: %w", err)
	case st.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("control socket: %s is in the way: it is no socket; remove it, or name another admin.socket", s.path)
	}
	c, err := net.DialTimeout("unix", s.path, goodbye)
	var ne net.Error
	switch {
	case err == nil:
		_ = c.Close() // Only asked whether anybody is there.
		return &InUseError{s.path}
	case errors.As(err, &ne) && ne.Timeout():
		return &InUseError{s.path} // Too busy to answer, but there.
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("control socket: %s belongs to someone else: %w", s.path, err)
	}
	return nil
}

// Serve answers until ctx ends, then removes the socket. It returns nil after
// a stop by ctx.
func (s *Listener) Serve(ctx context.Context) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		close(s.ending)
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), goodbye)
		defer cancel()
		if s.http.Shutdown(end) != nil {
			_ = s.http.Close() // Someone does not read his answer; so be it.
		}
	})
	err := s.http.Serve(s.listener)
	if !stop() {
		<-stopped
	}
	s.Close()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("control socket: %w", err)
}

// Close gives the socket up and removes its file. It may be called more than
// once, and instead of Serve.
func (s *Listener) Close() {
	_ = s.listener.Close() // It may be closed already.
	if now, err := os.Lstat(s.path); err == nil && os.SameFile(now, s.inode) {
		_ = os.Remove(s.path) // A file that is left is replaced at the next start.
	}
	s.removeDir()
}

func (s *Listener) removeDir() {
	if s.madeDir {
		_ = os.Remove(filepath.Dir(s.path)) // Others may have put files there.
	}
}

// Serve is Listen and Listener.Serve in one.
func Serve(ctx context.Context, path string, p Provider) error {
	s, err := Listen(path, p)
	if err != nil {
		return err
	}
	return s.Serve(ctx)
}

// failure is the body of every answer that is not 200.
type failure struct {
	Error string `json:"error"`
}

func answerError(w http.ResponseWriter, code int, msg string) { answer(w, code, failure{msg}) }

func answer(w http.ResponseWriter, code int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		code, b = http.StatusInternalServerError, []byte(`{"error":"the answer cannot be written as JSON"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(append(b, '\n')) // The reader went away; nobody is left to tell.
}
