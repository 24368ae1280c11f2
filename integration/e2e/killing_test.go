// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/module/control"
)

// asker makes requests one after the other, GET and POST in turn, on
// connections that it keeps for a while. Unlike http.Client it never repeats a
// request, so that each failure is seen.
type asker struct {
	host   *lab.Host
	vip    string
	id     int
	every  time.Duration
	conn   net.Conn
	r      *bufio.Reader
	used   int // requests on conn
	asked  *atomic.Int64
	posted *sync.Map // nonces that were answered
}

// perConnection is after how many requests an asker takes another connection.
const perConnection = 40

// run asks until ctx ends. A request under way then is completed.
func (a *asker) run(ctx context.Context) error {
	tick := time.NewTicker(a.every)
	defer tick.Stop()
	defer func() {
		if a.conn != nil {
			a.conn.Close()
		}
	}()
	for n := 0; ctx.Err() == nil; n++ {
		if err := a.one(n); err != nil {
			return fmt.Errorf("client %d, request %d, number %d on its connection: %w", a.id, n, a.used, err)
		}
		a.asked.Add(1)
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	return nil
}

func (a *asker) one(n int) error {
	// A SYN that meets nobody is repeated after 1, 2, 4 s and so on.
	const patience = 60 * time.Second
	if a.used >= perConnection {
		a.conn.Close()
		a.conn = nil
	}
	if a.conn == nil {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		c, err := a.host.Dial(ctx, "tcp", a.vip)
		if err != nil {
			return err
		}
		a.conn, a.r, a.used = c, bufio.NewReader(c), 0
	}
	if err := a.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	a.used++
	if n%2 == 0 {
		b, err := a.exchange("GET /small HTTP/1.1\r\nHost: weir\r\n\r\n", nil)
		if err == nil && string(b) != "small\n" {
			err = fmt.Errorf("GET: %q", b)
		}
		return err
	}
	nonce := fmt.Sprintf("%d-%d", a.id, n)
	body := content(byte(n), n%8*4321)
	b, err := a.exchange(fmt.Sprintf("POST /up HTTP/1.1\r\nHost: weir\r\nX-Nonce: %s\r\nContent-Length: %d\r\n\r\n", nonce, len(body)), body)
	if err == nil && string(b) != fmt.Sprintf("%d %x\n", len(body), sha256.Sum256(body)) {
		err = fmt.Errorf("POST of %d bytes: %q", len(body), b)
	}
	a.posted.Store(nonce, true)
	return err
}

func (a *asker) exchange(head string, body []byte) ([]byte, error) {
	if _, err := a.conn.Write(append([]byte(head), body...)); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(a.r, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %q", resp.Status, b)
	}
	return b, err
}

// enginePID is the process that serves: the daemon, or its child.
func (r *rig) enginePID(w *lab.Weir) (int, error) {
	raw, err := w.Status(within(r.t, 5*time.Second))
	if err != nil {
		return 0, err
	}
	var st control.Status
	if err := json.Unmarshal(raw, &st); err != nil {
		return 0, err
	}
	return st.PID, nil
}

// TestKilledAgainAndAgain: whoever restarts it, an engine that dies every two
// seconds fails no request, has no server execute a POST twice, and keeps its
// server connections.
func TestKilledAgainAndAgain(t *testing.T) {
	for _, supervised := range []bool{false, true} {
		name := "restarted"
		if supervised {
			name = "supervised"
		}
		t.Run(name, func(t *testing.T) { killAgainAndAgain(t, supervised) })
	}
}

func killAgainAndAgain(t *testing.T, supervised bool) {
	const askers, rate = 50, 500
	lasts := 10 * time.Second
	if supervised {
		lasts = 30 * time.Second
	}
	if os.Getenv("WEIR_SOAK") != "" {
		lasts = 10 * time.Minute
	}
	r := newRig(t, lab.FarmOptions{Servers: 2})
	s := &slowly{}
	var servers []*lab.Server
	for i, h := range r.Servers {
		sv, err := lab.HTTPServer(h, netip.AddrPortFrom(r.ServerAddr(i), 80).String(), s)
		if err != nil {
			t.Fatal(err)
		}
		servers = append(servers, sv)
	}
	accepted := func() int { return servers[0].Accepted() + servers[1].Accepted() }
	// Connections may rest as long as the test lasts.
	c := lab.ConfigOptions{Pool: "{max_idle: 256, idle_timeout: 30m}"}
	o := r.options(c)
	if supervised {
		// A machine that has no time for it is not to be taken for its end.
		o.Args = append(o.Args, "--supervise", "--hang-timeout", "20s")
	}
	start := func() *lab.Weir {
		w, err := lab.StartWeir(within(t, 30*time.Second), r.Router, o)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	w := start()
	logs := []*lab.Weir{w}
	defer func() {
		for _, w := range logs {
			if t.Failed() {
				t.Logf("weir (process %d) wrote:\n%s", w.Proc.Pid(), w.Log())
			}
		}
	}()

	var asked atomic.Int64
	var posted sync.Map
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	errs := make(chan error, askers)
	var group sync.WaitGroup
	for i := range askers {
		a := &asker{
			host: r.Clients[i%len(r.Clients)], vip: r.VIP().String(), id: i,
			every: askers * time.Second / rate, asked: &asked, posted: &posted,
		}
		group.Go(func() {
			if err := a.run(ctx); err != nil {
				errs <- err
				leave() // there is nothing more to learn
			}
		})
	}
	until(t, 60*time.Second, "the warm-up", func() bool { return asked.Load() >= 20*askers || ctx.Err() != nil })
	warm, began := accepted(), time.Now()
	kills, dead := 0, time.Duration(0)
	for ctx.Err() == nil && time.Since(began) < lasts {
		select {
		case <-ctx.Done():
		case <-time.After(2 * time.Second):
		}
		died := time.Now()
		if supervised {
			pid := 0
			until(t, 30*time.Second, "the engine's answer", func() (ok bool) {
				var err error
				pid, err = r.enginePID(w)
				return err == nil
			})
			if pid == w.Proc.Pid() {
				t.Fatalf("process %d both serves and supervises", pid)
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			until(t, 30*time.Second, "another engine", func() bool {
				now, err := r.enginePID(w)
				return err == nil && now != pid
			})
		} else {
			if err := w.Crash(); err != nil {
				t.Fatal(err)
			}
			w = start()
			logs = append(logs[max(len(logs)-2, 0):], w)
		}
		kills++
		dead += time.Since(died)
	}
	at := asked.Load()
	until(t, 60*time.Second, "requests after the last kill", func() bool { return asked.Load() > at+askers || ctx.Err() != nil })
	leave()
	group.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	twice, posts := 0, 0
	s.posted.Range(func(nonce, n any) bool {
		if n.(*atomic.Int64).Load() > 1 {
			twice++
			t.Errorf("POST %s was executed %d times", nonce, n.(*atomic.Int64).Load())
		}
		posts++
		return true
	})
	posted.Range(func(nonce, _ any) bool {
		if _, ok := s.posted.Load(nonce); !ok {
			t.Errorf("POST %s was answered and not executed", nonce)
		}
		return true
	})
	// A pause gathers requests, at most one per client, and they go to any of
	// the servers: never are there more connections than clients on each.
	opened := accepted() - warm
	t.Logf("%d kills, dead for %v each (until its answer on the socket), %d requests of which %d POSTs, %d server connections after the warm-up and %d more",
		kills, (dead / time.Duration(max(kills, 1))).Round(time.Millisecond), asked.Load(), posts, warm, opened)
	if warm+opened > askers*len(servers) {
		t.Errorf("%d server connections for %d clients and %d kills", warm+opened, askers, kills)
	}
	before := r.run + "/flows"
	if _, err := os.Stat(before); err != nil {
		t.Errorf("a running instance has no flow store: %v", err)
	}
	r.stop(w)
	if _, err := os.Stat(before); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the flow store is there after an orderly stop: %v", err)
	}
	if strings.Contains(w.Log(), "panic") || strings.Contains(w.Log(), "no sign of life and is killed") {
		t.Errorf("it wrote:\n%s", w.Log())
	}
}
