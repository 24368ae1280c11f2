// SPDX-License-Identifier: Apache-2.0

package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/policies/snapshot"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type provider func() (*Status, error)

func (p provider) Status(context.Context) (*Status, error) { return p() }

// start serves p on a socket of its own and returns the path. The test's end
// stops it.
func start(t *testing.T, p Provider) (path string, stop func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "run", "admin.sock")
	s, err := Listen(path, p)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}
	t.Cleanup(stop)
	return path, stop
}

func example(t *testing.T) *farm.DB {
	t.Helper()
	spec := farm.Spec{
		SNIPs: []netip.Addr{netip.MustParseAddr("198.51.100.1")},
		Farms: []farm.FarmSpec{{
			Name: "web", VIPs: []netip.AddrPort{netip.MustParseAddrPort("203.0.113.10:80")},
			Servers: []farm.ServerSpec{
				{Name: "s1", Endpoint: netip.MustParseAddrPort("198.51.100.11:80")},
				{Name: "s2", Endpoint: netip.MustParseAddrPort("198.51.100.12:80"), Weight: 2, Backup: true},
			},
		}},
	}
	db, err := farm.Build(nil, spec)
	if err != nil {
		t.Fatal(err)
	}
	f := db.Farms[0]
	f.Stats.Requests.Add(2000)
	f.Stats.Opened.Add(20)
	f.Stats.Reused.Add(1980)
	s := f.Servers[0]
	s.Live.Idle.Add(3)
	s.Live.Active.Add(2)
	s.Live.State.Store(uint32(snapshot.Drain))
	s.Stats.Open.Add(5)
	s.Stats.Opened.Add(20)
	s.Stats.Closed[farm.CloseServer].Add(7)
	s.Stats.Failed[farm.FailRefused].Add(1)
	spec.Farms[0].Servers = spec.Farms[0].Servers[:1]
	if db, err = farm.Build(db, spec); err != nil {
		t.Fatal(err)
	}
	return db
}

// TestFarms: every number is where it belongs, removed servers are shown.
func TestFarms(t *testing.T) {
	got := Farms(example(t))
	want := []Farm{{
		Name: "web", Listen: []string{"203.0.113.10:80"}, Requests: 2000, Opened: 20, Reused: 1980, ReuseRatio: 0.99,
		Servers: []Server{
			{Name: "s1", Address: "198.51.100.11:80", State: "drain", Weight: 1, Idle: 3, Active: 2, Open: 5, Opened: 20,
				Closed: map[string]uint64{"server": 7}, Failed: map[string]uint64{"refused": 1}},
			{Name: "s2", Address: "198.51.100.12:80", State: "removed", Weight: 2, Backup: true,
				Closed: map[string]uint64{}, Failed: map[string]uint64{}},
		},
	}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	db, err := farm.Build(example(t), farm.Spec{})
	if err != nil {
		t.Fatal(err)
	}
	if got := Farms(db); len(got) != 1 || !got[0].Removed || len(got[0].Servers) != 2 {
		t.Errorf("a removed farm: %+v", got)
	}
	if b, err := json.Marshal(Farms(new(farm.DB))); err != nil || string(b) != "[]" {
		t.Errorf("no farms: %s", b)
	}
}

func TestStatus(t *testing.T) {
	want := &Status{Version: "1", PID: 7, Started: time.Unix(1e9, 0).UTC(), Generation: 3, Condition: Degraded, Reasons: []string{"x"}, Shards: 2,
		Farms: Farms(example(t)), Plugins: []Plugin{{Name: "path", State: "running"}}}
	path, stop := start(t, provider(func() (*Status, error) { return want, nil }))
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != socketMode || st.Mode().Type() != fs.ModeSocket {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
	c, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	stop()
	if _, err := os.Stat(filepath.Dir(path)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket's directory is left: %v", err)
	}
}

func TestAnswers(t *testing.T) {
	path, _ := start(t, provider(func() (*Status, error) { return nil, errors.New("no numbers") }))
	c, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var ae *AnswerError
	if _, err := c.Status(t.Context()); !errors.As(err, &ae) || ae.Code != 500 || ae.Msg != "no numbers" {
		t.Errorf("an error of the provider: %v", err)
	}
	if err := c.get(t.Context(), "/v1/nothing", nil); !errors.As(err, &ae) || ae.Code != 404 {
		t.Errorf("an unknown path: %v", err)
	}
	resp, err := c.http.Post("http://weir/v1/status", "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := b.ReadFrom(resp.Body); err != nil {
		t.Fatal(err)
	}
	if err := resp.Body.Close(); err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusMethodNotAllowed || !json.Valid(b.Bytes()) || resp.Header.Get("Allow") == "" {
		t.Errorf("POST: %s %s", resp.Status, b.String())
	}
}

// TestSocketInUse: a living instance keeps its socket, a dead one's is
// replaced, a file that is no socket is left alone.
func TestSocketInUse(t *testing.T) {
	p := provider(func() (*Status, error) { return &Status{}, nil })
	path, _ := start(t, p)
	var used *InUseError
	if _, err := Listen(path, p); !errors.As(err, &used) || used.Socket != path {
		t.Errorf("a second instance: %v", err)
	}
	if _, err := Dial(path); err != nil {
		t.Errorf("the first instance lost its socket: %v", err)
	}

	dead := filepath.Join(t.TempDir(), "admin.sock")
	l, err := net.Listen("unix", dead)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	var de *DialError
	if _, err := Dial(dead); !errors.As(err, &de) || !strings.Contains(err.Error(), "nobody answers") {
		t.Errorf("a dead socket: %v", err)
	}
	s, err := Listen(dead, p)
	if err != nil {
		t.Fatalf("a dead instance's socket: %v", err)
	}
	s.Close()
	s.Close()
	if _, err := Dial(dead); !errors.As(err, &de) || !strings.Contains(err.Error(), "there is no socket") {
		t.Errorf("no socket: %v", err)
	}

	file := filepath.Join(t.TempDir(), "admin.sock")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file, p); err == nil {
		t.Error("a plain file was taken")
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
		t.Errorf("beside the socket: %v, %v", left, err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "mine" {
		t.Errorf("the plain file is %q: %v", b, err)
	}
	// The longest path that the configuration admits.
	long := t.TempDir() + "/"
	long += strings.Repeat("x", max(1, 92-len(long)))
	s, err = Listen(filepath.Join(long, strings.Repeat("y", 14)), p)
	if err != nil {
		t.Fatalf("a long path: %v", err)
	}
	s.Close()
	if _, err := os.Stat(long); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("its directory is left: %v", err)
	}
	if _, err := Listen(filepath.Join(t.TempDir(), "a", "b", "admin.sock"), p); err == nil {
		t.Error("two missing directories were made")
	}
}

// TestSuccessor: an instance that stops after another one took its path leaves
// the other's socket alone.
func TestSuccessor(t *testing.T) {
	p := provider(func() (*Status, error) { return &Status{}, nil })
	path, stop := start(t, p)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	next, err := Listen(path, p)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	stop()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the successor's socket is gone: %v", err)
	}
}
