// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"context"
	"log/slog"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/weirgate/weir/internal/supervise"
)

// supervisor is who started this process, if it wants to be told how the
// process is: a supervising parent of our own, or the service manager
// (sd_notify(3)). Its zero value tells nobody.
type supervisor struct {
	link     *supervise.Link // the parent; nil for none
	socket   string
	watchdog time.Duration // 0: no sign of life is expected
}

// findSupervisor reads what the service manager put into the environment, and
// takes it out: the plugins are not to speak for us.
func findSupervisor() supervisor {
	s := supervisor{socket: os.Getenv("NOTIFY_SOCKET")}
	usec, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	pid := os.Getenv("WATCHDOG_PID")
	if err == nil && usec > 0 && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		s.watchdog = time.Duration(usec) * time.Microsecond
	}
	for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
		_ = os.Unsetenv(name) // It fails only for a name that cannot be one.
	}
	return s
}

// tell sends a state. That the manager does not hear it stops nobody.
func (s supervisor) tell(log *slog.Logger, state string) {
	if s.link != nil {
		if err := s.link.Tell(state); err != nil {
			log.Warn("the supervisor cannot be told", "state", state, "error", err)
		}
		return
	}
	if s.socket == "" {
		return
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: s.socket, Net: "unixgram"})
	if err == nil {
		_, err = c.Write([]byte(state))
		_ = c.Close()
	}
	if err != nil {
		log.Warn("the service manager cannot be told", "state", state, "error", err)
	}
}

func (s supervisor) ready(log *slog.Logger, text string) {
	s.tell(log, "READY=1\nSTATUS="+text)
}

func (s supervisor) stopping(log *slog.Logger) {
	s.tell(log, "STOPPING=1\nSTATUS=stopping; running responses end")
}

// watch sends signs of life until ctx ends, as long as alive has no error: a
// process whose packet threads hang must be replaced.
func (s supervisor) watch(ctx context.Context, log *slog.Logger, alive func(context.Context) error) {
	if s.link == nil && s.socket == "" || s.watchdog == 0 {
		return
	}
	t := time.NewTicker(s.watchdog / 3)
	defer t.Stop()
	for {
		look, cancel := context.WithTimeout(ctx, s.watchdog/3)
		err := alive(look)
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			log.Error("no sign of life for the service manager", "error", err)
		default:
			s.tell(log, "WATCHDOG=1")
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}
