// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/packet"
)

func record(method, target string) *engine.AccessRecord {
	start := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC).UnixNano()
	a := &engine.AccessRecord{
		Client:  packet.EndpointFrom(netip.MustParseAddrPort("198.18.0.1:40001")),
		VIP:     packet.EndpointFrom(netip.MustParseAddrPort("203.0.113.10:80")),
		Started: start, Head: start + 2e6, Bound: start + 3e6, First: start + 10e6, Ended: start + 20e6,
		In: 50, Out: 1234, Farm: 1, Server: 2, Status: 200, End: engine.AccessServed, Minor: 1, Attempts: 1, Reused: true,
	}
	a.SetRequest([]byte(method), []byte(target))
	return a
}

func names(farm, server uint16) (string, string) {
	return fmt.Sprintf("farm%d", farm), fmt.Sprintf("s%d", server)
}

func TestCommon(t *testing.T) {
	local := time.Local
	time.Local = time.UTC
	defer func() { time.Local = local }()
	for _, c := range []struct {
		a    *engine.AccessRecord
		want string
	}{
		{record("GET", "/a?b=c"), `198.18.0.1 - - [02/Jan/2026:03:04:05 +0000] "GET /a?b=c HTTP/1.1" 200 1234`},
		{record("GET", "/\r\n\x1b[2J\"\\\xff"), `198.18.0.1 - - [02/Jan/2026:03:04:05 +0000] "GET /\x0d\x0a\x1b[2J\x22\x5c\xff HTTP/1.1" 200 1234`},
		{record("GET", "/"+strings.Repeat("x", 500)), `198.18.0.1 - - [02/Jan/2026:03:04:05 +0000] "GET /` + strings.Repeat("x", 383) + `... HTTP/1.1" 200 1234`},
		{func() *engine.AccessRecord { a := record("", ""); a.Status, a.Out = 0, 0; return a }(), `198.18.0.1 - - [02/Jan/2026:03:04:05 +0000] "-" 000 0`},
	} {
		if got := string(appendCommon(nil, c.a)); got != c.want+"\n" {
			t.Errorf("got  %q\nwant %q", got, c.want+"\n")
		}
	}
}

func TestJSON(t *testing.T) {
	line := appendJSON(nil, record("GET", "/a\"\\\n\x00é"), names)
	if bytes.Count(line, []byte("\n")) != 1 {
		t.Errorf("not one line: %q", line)
	}
	var got map[string]any
	if err := json.Unmarshal(line, &got); err != nil {
		t.Fatalf("%v: %s", err, line)
	}
	want := map[string]any{
		"time": "2026-01-02T03:04:05.000006Z", "client": "198.18.0.1:40001", "vip": "203.0.113.10:80", "farm": "farm1", "server": "s2",
		"method": "GET", "target": "/a\"\\\n\x00\u00c3\u00a9", "version": "HTTP/1.1", "status": 200.0, "end": "served",
		"bytes_in": 50.0, "bytes_out": 1234.0, "head_us": 2000.0, "bind_us": 1000.0, "first_byte_us": 8000.0, "total_us": 20000.0,
		"attempts": 1.0, "reused": true,
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

// rig is a running log with two engines' worth of rings.
type rig struct {
	t     *testing.T
	l     *Log
	set   atomic.Pointer[config.Access]
	mu    sync.Mutex
	rings []*engine.AccessRing
	ended chan struct{}
	stop  func()
}

func start(t *testing.T, a config.Access) *rig {
	t.Helper()
	r := &rig{t: t, l: New(slog.New(slog.DiscardHandler), names), ended: make(chan struct{})}
	r.set.Store(&a)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.l.Run(ctx, func() config.Access { return *r.set.Load() }, Engines{
			Shards: 2,
			Set: func(_ context.Context, q []*engine.AccessRing) error {
				r.mu.Lock()
				defer r.mu.Unlock()
				r.rings = q
				return nil
			},
			Ended: func() { <-r.ended },
		})
	}()
	r.stop = sync.OnceFunc(func() { cancel(); close(r.ended); <-done })
	t.Cleanup(r.stop)
	return r
}

// push puts records into the first ring once the log has made it.
func (r *rig) push(targets ...string) {
	r.t.Helper()
	r.until("rings", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return len(r.rings) == 2 })
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range targets {
		r.rings[0].Push(record("GET", s))
	}
}

func (r *rig) until(what string, ok func() bool) {
	r.t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("waited in vain for %s", what)
		}
	}
}

func lines(t *testing.T, path string) int {
	b, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return bytes.Count(b, []byte("\n"))
}

// TestFile: lines come to the file, to the new one after a rotation, to another
// one after a change of the configuration, and the last ones at the end.
func TestFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "access.log")
	r := start(t, config.Access{Path: path, Format: "common", Sample: 1})
	r.push("/1", "/2")
	r.until("two lines", func() bool { return lines(t, path) == 2 })
	if st, err := os.Stat(path); err != nil || st.Mode().Perm()&0o007 != 0 {
		t.Errorf("others may read clients' addresses: %v %v", st.Mode(), err)
	}
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	r.push("/3")
	r.until("a line in the old file", func() bool { return lines(t, path+".1") == 3 })
	r.l.Reopen()
	r.push("/4")
	r.until("a line in the new file", func() bool { return lines(t, path) == 1 })
	other := filepath.Join(dir, "other.json")
	r.set.Store(&config.Access{Path: other, Format: "json", Sample: 1})
	r.push("/5")
	r.until("a line in the other file", func() bool { return lines(t, other)+lines(t, path) == 2 })
	r.until("the other file", func() bool { r.push("/6"); return lines(t, other) > 0 })
	r.push("/last")
	r.stop()
	if b, _ := os.ReadFile(other); !bytes.Contains(b, []byte("/last")) {
		t.Error("the last line is missing")
	}
	if _, dropped := r.l.Counts(); dropped != 0 {
		t.Errorf("%d dropped", dropped)
	}
}

// TestOff: without a path the engines have no rings.
func TestOff(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	r := start(t, config.Access{Path: path, Format: "common", Sample: 1})
	r.push("/1")
	r.until("a line", func() bool { return lines(t, path) == 1 })
	r.set.Store(&config.Access{Format: "common", Sample: 1})
	r.until("no rings", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.rings == nil })
}

// TestSocket: one line per datagram.
func TestSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := start(t, config.Access{Path: path, Format: "json", Sample: 1})
	r.push("/1", "/2")
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"/1", "/2"} {
		b := make([]byte, 4096)
		n, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		var got struct{ Target string }
		if err := json.Unmarshal(b[:n], &got); err != nil || got.Target != want {
			t.Errorf("datagram %q: %v", b[:n], err)
		}
	}
}

// TestStream: a listener for streams gets lines.
func TestStream(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r := start(t, config.Access{Path: path, Format: "common", Sample: 1})
	r.push("/1", "/2")
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var got []byte
	b := make([]byte, 4096)
	for bytes.Count(got, []byte("\n")) < 2 {
		n, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, b[:n]...)
	}
}

// TestCannotWrite: a full disk and a path that cannot be opened cost lines,
// which are counted, and nothing waits.
func TestCannotWrite(t *testing.T) {
	for _, path := range []string{"/dev/full", filepath.Join(t.TempDir(), "no", "such", "dir"), t.TempDir()} {
		r := start(t, config.Access{Path: path, Format: "common", Sample: 1})
		r.push("/1", "/2", "/3")
		r.until("three lost lines", func() bool { _, d := r.l.Counts(); return d == 3 })
		r.stop()
	}
}
