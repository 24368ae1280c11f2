// SPDX-License-Identifier: Apache-2.0

package host

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/snapshot"
)

// asked is a plugin whose answers the path decides.
type asked struct{}

func (asked) Configure(policies.Farm, []byte) error { return nil }

func (asked) Tick(policies.Farm, *policies.Telemetry) (*policies.Snapshot, error) { return nil, nil }

func (asked) Decide(_ policies.Farm, q *policies.Question) (*policies.Answer, error) {
	switch q.Path {
	case "/s1":
		return &policies.Answer{Servers: []string{"s1"}, TTL: time.Minute}, nil
	case "/error":
		return nil, errors.New("out of cheese")
	case "/foreign":
		return &policies.Answer{Servers: []string{"s9"}}, nil
	case "/slow":
		time.Sleep(300 * time.Millisecond)
	case "/never":
		select {}
	}
	return nil, nil
}

func question(path string) *policies.Question {
	return &policies.Question{Key: snapshot.Key{Path: path}, Attempt: 1}
}

func TestHostAsk(t *testing.T) {
	h, rec, _ := start(t, nil)
	spec := as(t, "asked")
	spec.StartTimeout, spec.AskDeadline, spec.AskConcurrency = 5*time.Second, 100*time.Millisecond, 4
	if _, _, err := h.Ask(ctx, "web", "p", question("/s1")); !errors.Is(err, ErrNotAsked) {
		t.Errorf("before it is there: %v", err)
	}
	mustApply(t, h, []PluginSpec{spec}, farmSpec("s1 s2", PolicyUse{Plugin: "p"}))
	eventually(t, "the word that it is there", func() bool { return rec.count() > 0 })
	if a := h.About("p"); a.Routes || !a.Known || !a.Ask.Equal(&policies.AskKey{Path: true}) {
		t.Errorf("%+v", a)
	}
	ask := func(path string) (*snapshot.Answer, time.Duration, error) {
		return h.Ask(ctx, "web", "p", question(path))
	}
	// The first question makes the connection's streams; it may take longer.
	eventually(t, "an answer", func() bool { _, _, err := ask("/s1"); return err == nil })
	a, ttl, err := ask("/s1")
	if err != nil || ttl != time.Minute || len(a.Servers) != 1 || a.Servers[0].Server != "s1" {
		t.Errorf("%+v %v %v", a, ttl, err)
	}
	if a, _, err := ask("/else"); err != nil || len(a.Servers) != 0 {
		t.Errorf("no opinion: %+v %v", a, err)
	}
	if _, _, err := ask("/error"); err == nil || err.Error() != "out of cheese" {
		t.Errorf("%v", err)
	}
	if _, _, err := ask("/foreign"); err == nil || !strings.Contains(err.Error(), "s9") {
		t.Errorf("%v", err)
	}
	if _, _, err := ask("/slow"); !errors.Is(err, ErrLate) {
		t.Errorf("%v", err)
	}
	// Four hang, the fifth finds no place.
	var wg sync.WaitGroup
	begun := make(chan struct{}, 4)
	for range 4 {
		wg.Go(func() {
			begun <- struct{}{}
			if _, _, err := ask("/never"); !errors.Is(err, ErrLate) {
				t.Errorf("%v", err)
			}
		})
	}
	for range 4 {
		<-begun
	}
	eventually(t, "all places taken", func() bool {
		_, _, err := ask("/s1")
		return errors.Is(err, ErrBusy)
	})
	wg.Wait()
	// After many in a row it is given a rest, and then tried again.
	eventually(t, "a rest", func() bool {
		_, _, err := ask("/error")
		return errors.Is(err, ErrBroken)
	})
	if _, _, err := ask("/s1"); !errors.Is(err, ErrBroken) {
		t.Errorf("asked while it rests: %v", err)
	}
	eventually(t, "the end of the rest", func() bool { _, _, err := ask("/s1"); return err == nil })
	d := h.Status()[0].Decisions
	if d.Answered < 3 || d.Late < 5 || d.Failed < 2 || d.Busy < 1 || d.Refused < 2 || d.Asked != d.Answered+d.Late+d.Failed+d.Busy+d.Refused {
		t.Errorf("%+v", d)
	}
	// A process that is gone is not asked, and its successor is.
	if err := syscall.Kill(h.Status()[0].PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the successor's answer", func() bool {
		_, _, err := ask("/s1")
		return err == nil && h.Status()[0].Restarts > 0
	})
}

// TestHostRest: a plugin that dies again and again is given a rest.
func TestHostRest(t *testing.T) {
	h, _, logs := start(t, nil)
	spec := as(t, "exits")
	spec.StartTimeout, spec.Restarts = 5*time.Second, 3
	mustApply(t, h, []PluginSpec{spec}, farmSpec("s1", PolicyUse{Plugin: "p"}))
	eventually(t, "a rest", func() bool { return h.Status()[0].Resting })
	if n := h.Status()[0].Restarts; n != 2 {
		t.Errorf("%d restarts before the rest, want 2", n)
	}
	if !strings.Contains(logs.String(), "restart_in="+DefaultRestartRest.String()) {
		t.Error("the log does not say how long")
	}
}

// TestNetwork: a thread of another namespace finds back.
func TestNetwork(t *testing.T) {
	require.Netns(t)
	home, err := CurrentNetwork()
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread goes with us
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if err := home.Enter(); err != nil {
				return err
			}
			now, err := os.Readlink("/proc/thread-self/ns/net")
			if err != nil {
				return err
			}
			if was, err := os.Readlink(filepath.Join("/proc", "self", "ns", "net")); err != nil || was != now {
				t.Errorf("in %s, want %s, %v", now, was, err)
			}
			return home.Enter() // once more, without effect
		}()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
