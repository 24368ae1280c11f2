// SPDX-License-Identifier: Apache-2.0

package continuity

import (
	"bufio"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/module/divert"
)

// content is what /big is: bytes that do not repeat.
var content = sync.OnceValue(func() []byte {
	b := make([]byte, 1<<20)
	r := rand.NewPCG(1, 2)
	for i := range b {
		b[i] = byte(r.Uint64())
	}
	return b
})

// posts counts how often each POST came to a server.
type posts struct {
	seen sync.Map
	gaps gaps // in the bodies of uploads, and in downloads
}

// serve answers the paths of the load: /big takes a second or two, POST counts.
func (p *posts) serve(w http.ResponseWriter, q *http.Request) bool {
	switch {
	case q.Method == http.MethodPost:
		n, _ := p.seen.LoadOrStore(q.URL.RawQuery, new(atomic.Int64))
		n.(*atomic.Int64).Add(1)
		h := sha256.New()
		var body io.Reader = q.Body
		if q.URL.Path == "/up" {
			body = &watched{Reader: body, to: &p.gaps, last: time.Now()}
		}
		if _, err := io.Copy(h, body); err == nil {
			fmt.Fprintf(w, "%x has %s", h.Sum(nil), q.URL.Path)
		}
	case q.URL.Path == "/big":
		b := content()
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
		const piece = 32 << 10
		for i := 0; i < len(b) && q.Context().Err() == nil; i += piece {
			if _, err := w.Write(b[i:min(i+piece, len(b))]); err != nil {
				return true
			}
			w.(http.Flusher).Flush()
			time.Sleep(30 * time.Millisecond)
		}
	default:
		return false
	}
	return true
}

// load is clients that make requests on connections that they keep, and hold
// every answer against what it must be. Nothing is tried again.
type load struct {
	r                *rig
	stop             context.CancelFunc
	group            sync.WaitGroup
	requests, big    atomic.Int64
	failed, sent     atomic.Int64
	longest, working atomic.Int64 // nanoseconds of the longest small request; clients that have begun
}

// load starts clients: some make small requests, half of them POSTs, each
// every 30 ms, the others download.
func (r *rig) load(small, downloads int) *load {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.t.Context())
	l := &load{r: r, stop: cancel}
	r.t.Cleanup(l.end)
	want := sha256.Sum256(content())
	for i := range small {
		l.client(ctx, 30*time.Millisecond, func(n int64) (string, string, string) {
			if n%2 == 0 {
				return "GET", fmt.Sprintf("/s%d", n), ""
			}
			return "POST", fmt.Sprintf("/p?%d.%d", i, n), fmt.Sprintf("body %d of %d", n, i)
		}, &l.requests)
	}
	for range downloads {
		l.client(ctx, 0, func(int64) (string, string, string) { return "GET", "/big", string(want[:]) }, &l.big)
	}
	r.until("the load runs", func() bool { return l.working.Load() == int64(small+downloads) })
	return l
}

// client makes requests of its own connection until ctx ends.
func (l *load) client(ctx context.Context, pause time.Duration, next func(n int64) (method, path, body string), done *atomic.Int64) {
	l.group.Go(func() {
		fail := func(err error) {
			l.failed.Add(1)
			l.r.t.Error(err)
		}
		dialing, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		conn, err := l.r.Clients[0].Dial(dialing, "tcp", l.r.VIP().String())
		cancel()
		l.working.Add(1)
		if err != nil {
			fail(err)
			return
		}
		defer conn.Close()
		br := bufio.NewReader(conn)
		for n := int64(0); ctx.Err() == nil; n++ {
			method, path, body := next(n)
			begun := time.Now()
			if err := exchange(conn, br, method, path, body); err != nil {
				fail(fmt.Errorf("%s %s after %d requests from %v: %w", method, path, n, conn.LocalAddr(), err))
				return
			}
			if method == "POST" {
				l.sent.Add(1)
			}
			if took := int64(time.Since(begun)); path != "/big" && took > l.longest.Load() {
				l.longest.Store(took)
			}
			done.Add(1)
			time.Sleep(pause)
		}
	})
}

// exchange makes one request and checks the answer.
func exchange(conn net.Conn, br *bufio.Reader, method, path, body string) error {
	if err := conn.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		return err
	}
	head := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: farm\r\n", method, path)
	if method == "POST" {
		head += fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body), body)
	} else {
		head += "\r\n"
	}
	if _, err := io.WriteString(conn, head); err != nil {
		return err
	}
	resp, err := http.ReadResponse(br, &http.Request{Method: method})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	h := sha256.New()
	b, err := io.ReadAll(io.TeeReader(resp.Body, h))
	switch {
	case err != nil:
		return fmt.Errorf("after %d bytes: %w", len(b), err)
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("%s: %.100q", resp.Status, b)
	case path == "/big" && string(h.Sum(nil)) != body:
		return fmt.Errorf("%d bytes that were not sent", len(b))
	case method == "POST" && string(b) != fmt.Sprintf("%x has /p", sha256.Sum256([]byte(body))):
		return fmt.Errorf("an answer to something else: %.100q", b)
	}
	return nil
}

// end lets what runs come to its end and stops the clients.
func (l *load) end() {
	l.stop()
	l.group.Wait()
}

// whole ends the load: nothing failed, and no POST was executed twice.
func (l *load) whole() {
	l.r.t.Helper()
	l.end()
	twice := 0
	came := int64(0)
	l.r.posts.seen.Range(func(k, v any) bool {
		came++
		if n := v.(*atomic.Int64).Load(); n != 1 {
			twice++
			l.r.t.Errorf("POST %v was executed %d times", k, n)
		}
		return true
	})
	if came != l.sent.Load() && l.failed.Load() == 0 {
		l.r.t.Errorf("%d POSTs came, %d were answered", came, l.sent.Load())
	}
	l.r.t.Logf("%d small requests, %d downloads, %d failed, %d POSTs twice, the longest small request took %v",
		l.requests.Load(), l.big.Load(), l.failed.Load(), twice, time.Duration(l.longest.Load()).Round(time.Millisecond))
}

// opened is how many connections the servers have been given.
func (r *rig) opened() (n int) {
	for _, s := range r.servers {
		n += s.Accepted()
	}
	return n
}

// loaded is the configuration under load: connections are kept.
var loaded = lab.ConfigOptions{Pool: "{max_idle: 256}", Policies: withPath.Policies, Plugins: withPath.Plugins}

// seconds is how long a load goes on, in CI and in a soak.
func seconds(ci, soak int) time.Duration {
	if os.Getenv("WEIR_SOAK") != "" {
		ci = soak
	}
	return time.Duration(ci) * time.Second
}

// TestLoadKilled: kill -9 every two seconds, under requests and downloads.
func TestLoadKilled(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.start(loaded)
	l := r.load(24, 10)
	pid, opened := r.serving(), r.opened()
	var drops [2]uint64
	r.each(func(q divert.KernelStats) { drops[0] += q.DroppedQueueFull + q.DroppedUser })
	kills := 0
	for end := time.Now().Add(seconds(30, 600)); time.Now().Before(end) && !t.Failed(); kills++ {
		time.Sleep(2 * time.Second)
		r.signal(pid, syscall.SIGKILL)
		pid = r.successor(pid)
	}
	l.whole()
	r.each(func(q divert.KernelStats) { drops[1] += q.DroppedQueueFull + q.DroppedUser })
	t.Logf("%d kills, the queues dropped %d packets, the servers got %d new connections", kills, drops[1]-drops[0], r.opened()-opened)
	if n := r.opened() - opened; n > 25 {
		t.Errorf("the servers got %d new connections: the pool was lost", n)
	}
	if drops[0] != drops[1] {
		t.Errorf("the queues dropped %d packets", drops[1]-drops[0])
	}
	r.stop()
}

// TestLoadStopped: an engine that stands still for five seconds is replaced, and
// nothing breaks, neither then nor when it would wake up.
func TestLoadStopped(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.start(loaded, "--hang-timeout", "5s")
	l := r.load(8, 8)
	pid := r.serving()
	begun := time.Now()
	r.signal(pid, syscall.SIGSTOP)
	r.successor(pid)
	if d := time.Since(begun); d < 5*time.Second {
		t.Errorf("it was replaced after %v", d)
	}
	if alive(pid) {
		t.Errorf("process %d is still there", pid)
	}
	n := l.requests.Load()
	r.until("requests go on", func() bool { return l.requests.Load() > n+100 })
	l.whole()
	r.noDrops()
	r.stop()
}

// TestLoadUpgrades goes to and fro between two executables under load.
func TestLoadUpgrades(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.start(loaded)
	bins := []string{r.nextBinary("other"), r.bin} // forth and back over one version of the records
	l := r.load(10, 10)
	rounds := 20
	if os.Getenv("WEIR_SOAK") != "" {
		rounds = 100
	}
	for i := range rounds {
		if code, out := r.weir("upgrade", bins[i%2]); code != 0 {
			t.Fatalf("upgrade %d: exit code %d: %s", i, code, out)
		}
		n := l.requests.Load()
		r.until("requests go on", func() bool { return l.requests.Load() > n+10 || t.Failed() })
		if t.Failed() {
			break
		}
	}
	l.whole()
	r.noDrops()
	r.stop()
}
