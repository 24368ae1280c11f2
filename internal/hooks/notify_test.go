// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// manager is a service manager that listens.
func manager(t *testing.T) (*net.UnixConn, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c, path
}

func heard(t *testing.T, c *net.UnixConn) string {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4096)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

func TestNotify(t *testing.T) {
	c, path := manager(t)
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "3000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	s := findSupervisor()
	if s.socket != path || s.watchdog != 3*time.Millisecond {
		t.Fatalf("found %+v", s)
	}
	for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
		if _, ok := os.LookupEnv(name); ok {
			t.Errorf("plugins would inherit %s", name)
		}
	}
	log := slog.New(slog.DiscardHandler)
	s.ready(log, "serving")
	if got := heard(t, c); got != "READY=1\nSTATUS=serving" {
		t.Errorf("ready: %q", got)
	}
	s.stopping(log)
	if got := heard(t, c); !strings.HasPrefix(got, "STOPPING=1\n") {
		t.Errorf("stopping: %q", got)
	}
	// Signs of life come while it is alive, and only then.
	var sick atomic.Bool
	var asked atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.watch(ctx, log, func(context.Context) error {
			asked.Add(1)
			if sick.Load() {
				return errors.New("a thread hangs")
			}
			return nil
		})
	}()
	for range 3 {
		if got := heard(t, c); got != "WATCHDOG=1" {
			t.Errorf("a sign of life: %q", got)
		}
	}
	sick.Store(true)
	for n := asked.Load() + 2; asked.Load() < n; {
		time.Sleep(time.Millisecond)
	}
	// What was sent before is read; nothing comes any more.
	if err := c.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := c.Read(make([]byte, 100)); err != nil {
			break
		}
	}
	from := asked.Load()
	for asked.Load() < from+5 {
		time.Sleep(time.Millisecond)
	}
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 100)); err == nil {
		t.Errorf("%d bytes from a sick process", n)
	}
	cancel()
	<-done
}

// TestNobody: without a service manager nothing happens.
func TestNobody(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	t.Setenv("WATCHDOG_USEC", "3000")
	t.Setenv("WATCHDOG_PID", "1")
	s := findSupervisor()
	if s.watchdog != 0 {
		t.Error("the watchdog of another process")
	}
	s.ready(slog.New(slog.DiscardHandler), "serving")
	s.watch(t.Context(), slog.New(slog.DiscardHandler), nil)
}
