// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// TestSlowPeers: two thousand clients that never finish their head, five
// hundred that never finish their body and five hundred that hardly read, for
// thirty seconds. All others are served, and the slow ones are told to go
// within a second of their time.
func TestSlowPeers(t *testing.T) {
	t.Parallel()
	const (
		heads, bodies, readers = 2000, 500, 500
		headTime, lasts        = 10 * time.Second, 30 * time.Second
	)
	r := newRig(t, lab.FarmOptions{Clients: 2, Servers: 1})
	big := make([]byte, 512<<10)
	server, err := lab.HTTPServer(r.Servers[0], r.Server(0).String(), http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		switch q.URL.Path {
		case "/big":
			_, _ = w.Write(big)
		case "/body":
			_, _ = io.Copy(io.Discard, q.Body)
		default:
			fmt.Fprint(w, "this is ", q.URL.Path)
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	r.start("{max_connections: 2000}\n    timeouts: {head: 10s, body: 10s}\n    limits: {body_rate: 4Kbit}", "queue: {shards: 1}\n")
	ctx := within(t, 90*time.Second)
	began := time.Now()
	var wg sync.WaitGroup
	var told, late, wrong atomic.Int64
	// A slow sender's connection ends with 408 in its time.
	sender := func(first string, limit time.Duration) {
		conn, err := r.Clients[0].Dial(ctx, "tcp", r.VIP().String())
		if err != nil {
			wrong.Add(1)
			return
		}
		defer conn.Close()
		start := time.Now()
		_, _ = io.WriteString(conn, first)
		stop := make(chan struct{})
		var drip sync.WaitGroup
		drip.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Second):
					if _, err := conn.Write([]byte("x")); err != nil {
						return
					}
				}
			}
		})
		_ = conn.SetReadDeadline(time.Now().Add(lasts))
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		took := time.Since(start)
		close(stop)
		drip.Wait()
		switch {
		case err != nil || resp.StatusCode != http.StatusRequestTimeout:
			wrong.Add(1)
		case took < limit-500*time.Millisecond || took > limit+time.Second:
			late.Add(1)
			told.Add(1)
		default:
			told.Add(1)
		}
	}
	for range heads {
		wg.Go(func() { sender("GET / HTTP/1.1\r\nHost: slow\r\nX: ", headTime) })
	}
	for range bodies {
		wg.Go(func() { sender("POST /body HTTP/1.1\r\nHost: slow\r\nContent-Length: 100000\r\n\r\n", headTime) })
	}
	over := make(chan struct{})
	var read atomic.Int64
	for range readers {
		wg.Go(func() {
			conn, err := r.Clients[0].Dial(ctx, "tcp", r.VIP().String())
			if err != nil {
				wrong.Add(1)
				return
			}
			defer conn.Close()
			_ = conn.(*net.TCPConn).SetReadBuffer(4096)
			_, _ = io.WriteString(conn, "GET /big HTTP/1.1\r\nHost: slow\r\n\r\n")
			buf := make([]byte, 100)
			for {
				select {
				case <-over:
					return
				case <-time.After(time.Second):
					n, err := conn.Read(buf)
					if err != nil {
						return
					}
					read.Add(int64(n))
				}
			}
		})
	}
	served, slowest := 0, time.Duration(0)
	for time.Since(began) < lasts {
		start := time.Now()
		if err := honest(ctx, r, served); err != nil {
			t.Fatalf("an honest request, number %d, beside the slow ones: %v", served, err)
		}
		slowest = max(slowest, time.Since(start))
		served++
		time.Sleep(5 * time.Millisecond)
	}
	close(over)
	wg.Wait()
	t.Logf("%d honest requests served, slowest %v; %d slow senders told, %d of them more than a second off; slow readers took %d bytes; %d requests at the server",
		served, slowest.Round(time.Millisecond), told.Load(), late.Load(), read.Load(), server.Requests())
	// How late a client is told depends on the machine, too: it counts in soak.
	if wrong.Load() > 0 || late.Load() > 0 && os.Getenv("WEIR_SOAK") != "" || told.Load() != heads+bodies {
		t.Errorf("%d of %d slow senders were told, %d not in time, %d otherwise", told.Load(), heads+bodies, late.Load(), wrong.Load())
	}
	r.stop()
}
