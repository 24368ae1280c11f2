// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// echo is the application of the canary rig: it writes down the nonce that it
// runs and echoes it in a field, all over the body and in a trailer.
func echo(l *ledger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		nonce := q.Header.Get("Nonce")
		body, err := io.ReadAll(q.Body)
		if err != nil {
			return // half a request is none
		}
		if q.Method == http.MethodPost && string(body) != strings.Repeat(nonce, len(body)/len(nonce)) {
			l.ran("a mixture: " + nonce)
		}
		l.ran(nonce)
		w.Header().Set("Nonce", nonce)
		lines := len(q.URL.Path) * 7 % 90
		switch q.URL.Query().Get("as") {
		case "length":
			w.Header().Set("Content-Length", fmt.Sprint(lines*33))
		case "chunked":
			w.Header().Set("Trailer", "Nonce-End")
			defer w.Header().Set("Nonce-End", nonce)
			w.(http.Flusher).Flush()
		}
		for range lines {
			_, _ = io.WriteString(w, nonce+"\n")
		}
	})
}

// A visitor makes client connections and writes down what happens on them.
type visitor struct {
	ledger  *ledger
	rnd     *rand.Rand
	dial    func(context.Context) (net.Conn, error)
	done    *atomic.Int64 // requests begun
	total   int64
	whole   *atomic.Int64 // answers that came whole
	slowest *atomic.Int64 // of these, ns
}

// visit makes one connection with a few requests. It leaves at a drawn byte of
// what it sends or of what it receives, by FIN or RST, or after its last
// answer. An error is something that no honest network does.
func (v *visitor) visit(ctx context.Context) error {
	conn, err := v.dial(ctx)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	tcp := conn.(*net.TCPConn)
	defer tcp.Close()
	if d, ok := ctx.Deadline(); ok {
		_ = tcp.SetDeadline(d)
	}
	var s stream
	defer func() { v.ledger.add(s) }()
	received := &recorder{r: tcp, left: -1}
	defer func() { s.received = received.all }()
	leave := func() {
		if v.rnd.IntN(2) == 0 {
			_ = tcp.SetLinger(0) // a reset
		}
	}
	br := bufio.NewReaderSize(received, 512)
	n := 1 + v.rnd.IntN(6)
	for i := range n {
		if v.done.Add(1) > v.total {
			return nil
		}
		var raw [16]byte
		for j := range raw {
			raw[j] = byte(v.rnd.Uint32())
		}
		nonce := hex.EncodeToString(raw[:])
		post := v.rnd.IntN(2) == 0
		path := "/" + strings.Repeat("p", v.rnd.IntN(90)) + []string{"?as=length", "?as=chunked"}[v.rnd.IntN(2)]
		req := fmt.Sprintf("GET %s HTTP/1.1\r\nHost: canary\r\nNonce: %s\r\n\r\n", path, nonce)
		if post {
			body := strings.Repeat(nonce, v.rnd.IntN(60))
			req = fmt.Sprintf("POST %s HTTP/1.1\r\nHost: canary\r\nNonce: %s\r\nContent-Length: %d\r\n\r\n%s", path, nonce, len(body), body)
		}
		s.asked, s.post, s.complete = append(s.asked, nonce), append(s.post, post), append(s.complete, false)
		fate := v.rnd.IntN(12)
		if fate == 0 {
			_, _ = io.WriteString(tcp, req[:v.rnd.IntN(len(req))])
			leave()
			return nil
		}
		if fate == 1 {
			received.left = v.rnd.IntN(1500)
		}
		asked := time.Now()
		if _, err := io.WriteString(tcp, req); err != nil {
			return fmt.Errorf("request %d: %w", i, err)
		}
		resp, err := http.ReadResponse(br, nil)
		var body []byte
		if err == nil {
			body, err = io.ReadAll(resp.Body)
		}
		switch {
		case err != nil && received.left == 0:
			// It has read as far as it was to read.
			leave()
			return nil
		case err != nil:
			return fmt.Errorf("request %d of %d: %w (%d bytes so far)", i, n, err, len(received.all))
		case resp.StatusCode != http.StatusOK:
			return fmt.Errorf("request %d of %d: %s after %v, %s", i, n, resp.Status, time.Since(asked), req[:4])
		}
		path, _, _ = strings.Cut(path, "?")
		want := strings.Repeat(nonce+"\n", len(path)*7%90)
		if resp.Header.Get("Nonce") != nonce || string(body) != want || len(resp.TransferEncoding) > 0 && resp.Trailer.Get("Nonce-End") != nonce {
			return fmt.Errorf("request %d of %d: an answer that is not its own: %v, %d bytes of %d", i, n, resp.Header, len(body), len(want))
		}
		s.complete[i] = true
		v.whole.Add(1)
		for took := int64(time.Since(asked)); ; {
			if old := v.slowest.Load(); took <= old || v.slowest.CompareAndSwap(old, took) {
				break
			}
		}
	}
	return nil
}

var errLeave = errors.New("leave here")

// recorder keeps everything that was read, and stops after left bytes if that
// is not negative.
type recorder struct {
	r    io.Reader
	all  []byte
	left int
}

func (r *recorder) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, errLeave
	}
	if r.left > 0 {
		p = p[:min(len(p), r.left)]
	}
	n, err := r.r.Read(p)
	r.all = append(r.all, p[:n]...)
	if r.left > 0 {
		r.left -= n
	}
	return n, err
}

// crowd lets that many visitors make the given number of requests, or fewer
// when the time limit of the test comes near. It returns how many were begun,
// and how many of these were answered whole.
func crowd(ctx context.Context, t *testing.T, l *ledger, s uint64, clients int, total int64, dial func(ctx context.Context, client int) (net.Conn, error)) (begun, whole int64, errs []error) {
	limit, limited := t.Deadline()
	var done, answered, slowest atomic.Int64
	defer func() { t.Logf("the slowest of them after %v", time.Duration(slowest.Load()).Round(time.Millisecond)) }()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			v := &visitor{ledger: l, rnd: rand.New(rand.NewPCG(s, uint64(i))), done: &done, total: total, whole: &answered, slowest: &slowest,
				dial: func(ctx context.Context) (net.Conn, error) { return dial(ctx, i) }}
			for done.Load() < total && ctx.Err() == nil && !(limited && time.Until(limit) < 90*time.Second) {
				if err := v.visit(ctx); err != nil {
					mu.Lock()
					errs = append(errs, fmt.Errorf("client %d: %w", i, err))
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return min(done.Load(), total), answered.Load(), errs
}

// TestCanary: two hundred clients that come and go at any byte, over four
// server connections, on links that lose one packet in a hundred each way.
// Nobody gets a byte of another's exchange, and no request runs twice. Who does
// not leave is answered by a server: nothing that the links lose takes as long
// to repair as a server may be silent, or a client may take for its body.
func TestCanary(t *testing.T) {
	t.Parallel()
	// What bounds a crowd are not the processors but the losses: a connection
	// that lost a packet waits for a timer. So in soak there are several, each
	// with a farm and connections of its own.
	total, limit, crowds := int64(5000), 4*time.Minute, 1
	if os.Getenv("WEIR_SOAK") != "" {
		total, limit, crowds = 1_000_000, 8*time.Hour, 12
	}
	const clients, connections = 200, 4
	r := newRig(t, lab.FarmOptions{Clients: 2, Servers: 1})
	// How long the line takes is the machine's speed, and no matter here.
	pool := fmt.Sprintf("{max_connections: %d, wait_timeout: 10m}", connections)
	r.farms, r.pools = crowds-1, ", pool: "+pool
	l := newLedger()
	var servers []*lab.Server
	vips := []string{r.VIP().String()}
	for i := range crowds {
		at := r.Server(0).String()
		if i > 0 {
			at, vips = r.server(i-1), append(vips, r.vip(i-1))
		}
		s, err := lab.HTTPServer(r.Servers[0], at, echo(l))
		if err != nil {
			t.Fatal(err)
		}
		servers = append(servers, s)
	}
	requests := func() (n int) {
		for _, s := range servers {
			n += s.Requests()
		}
		return n
	}
	for _, h := range append([]*lab.Host{r.Servers[0]}, r.Clients...) {
		r.lossy(h)
	}
	r.start(pool, "queue: {shards: 2}\n")
	began := time.Now()
	begun, whole, errs := crowd(within(t, limit), t, l, seed(t), crowds*clients, total, func(ctx context.Context, i int) (net.Conn, error) {
		return r.Clients[i%2].Dial(ctx, "tcp", vips[i/clients])
	})
	// What still runs for clients that are gone ends before the books close.
	until(t, 20*time.Second, "the last requests", func() bool {
		before := requests()
		time.Sleep(100 * time.Millisecond)
		return before == requests() && r.counts().Waiting == 0
	})
	c := r.counts()
	if begun < total {
		t.Errorf("%d of %d requests: the time is over", begun, total)
	}
	took, accepted := time.Since(began), 0
	for _, s := range servers {
		accepted += s.Accepted()
	}
	t.Logf("%d requests in %v (%.0f a second): %d answered whole, %d run by the servers, %d connections accepted by them, %d reuses, %d redispatched",
		begun, took.Round(time.Millisecond), float64(begun)/took.Seconds(), whole, len(l.executed), accepted, c.Reused, c.Redispatched)
	for _, name := range []string{"waited", "wait-timeout", "connect-timeout", "server-silent", "client-silent", "slow-body", "aborted-request", "answer-408", "answer-502", "answer-503", "answer-504"} {
		t.Logf("%s: %d", name, r.reason(name))
	}
	lost := r.lost(r.Servers[0]) + r.lost(r.Clients[0]) + r.lost(r.Clients[1])
	t.Logf("%d packets lost", lost)
	if lost < int(begun)/20 {
		t.Errorf("only %d packets were lost: the links are too good", lost)
	}
	report(t, errs)
	for _, p := range clip(l.check(int(c.Redispatched))) {
		t.Error(p)
	}
	if whole < begun/2 || c.Reused < uint64(begun)/2 {
		t.Errorf("only %d whole answers, %d reuses: the rig tests nothing", whole, c.Reused)
	}
	r.stop()
}

// TestCanaryFindsLeaks is the negative control of the rig: the same clients and
// server, and between them a pool with the classic mistake: it gives a server
// connection to the next client although the last one left in the middle of
// its answer.
func TestCanaryFindsLeaks(t *testing.T) {
	t.Parallel()
	l := newLedger()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: echo(l), ReadHeaderTimeout: time.Minute}
	go func() { _ = srv.Serve(ln) }()
	defer srv.Close()
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer front.Close()
	go leakyPool(front, ln.Addr().String())
	_, _, _ = crowd(within(t, 5*time.Second), t, l, seed(t), 20, 400, func(ctx context.Context, _ int) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", front.Addr().String())
		if err == nil {
			_ = c.SetDeadline(time.Now().Add(500 * time.Millisecond))
		}
		return c, err
	})
	foreign := 0
	for _, p := range l.check(0) {
		if strings.Contains(p, "INV-2") {
			foreign++
		}
	}
	if foreign == 0 {
		t.Error("a pool that mixes clients up passes the check")
	}
	t.Logf("%d foreign nonces found", foreign)
}

// leakyPool forwards requests over shared connections without looking at where
// answers end.
func leakyPool(front net.Listener, server string) {
	idle := make(chan net.Conn, 1000)
	for {
		client, err := front.Accept()
		if err != nil {
			return
		}
		go func() {
			defer client.Close()
			var back net.Conn
			select {
			case back = <-idle:
			default:
				if back, err = net.Dial("tcp", server); err != nil {
					return
				}
			}
			stop := make(chan struct{})
			go func() {
				defer close(stop)
				buf := make([]byte, 700)
				for {
					n, err := back.Read(buf)
					if err != nil {
						return
					}
					if _, err := client.Write(buf[:n]); err != nil {
						return
					}
				}
			}()
			_, _ = io.Copy(back, client)
			_ = back.SetReadDeadline(time.Now())
			<-stop
			_ = back.SetReadDeadline(time.Time{})
			idle <- back
		}()
	}
}

func report(t *testing.T, errs []error) {
	t.Helper()
	for i, err := range errs {
		if i == 10 {
			t.Errorf("… and %d more", len(errs)-i)
			return
		}
		t.Error(err)
	}
}

func clip(s []string) []string {
	if len(s) > 10 {
		return append(s[:10:10], fmt.Sprintf("… and %d more", len(s)-10))
	}
	return s
}
