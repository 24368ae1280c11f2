// SPDX-License-Identifier: Apache-2.0

package continuity

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// gaps remembers when nothing came for a while where something should.
type gaps struct {
	mu  sync.Mutex
	all [][2]time.Time
}

// notable is the shortest silence that is remembered: the servers write, and
// clients send, every 30 ms.
const notable = 100 * time.Millisecond

// watched is a reader whose silences are remembered.
type watched struct {
	io.Reader
	to   *gaps
	last time.Time
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.Reader.Read(p)
	now := time.Now()
	if now.Sub(w.last) > notable {
		w.to.mu.Lock()
		w.to.all = append(w.to.all, [2]time.Time{w.last, now})
		w.to.mu.Unlock()
	}
	w.last = now
	return n, err
}

// over is how long each silence went on beyond the instant t that it contains.
func (g *gaps) over(t time.Time) (all []time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, x := range g.all {
		if x[0].Before(t) && x[1].After(t) {
			all = append(all, x[1].Sub(t))
		}
	}
	return all
}

// transfer makes downloads or uploads on one connection until ctx ends, each
// held against what it must be.
func (r *rig) transfer(ctx context.Context, g *gaps, upload bool, name string, done *atomic.Int64) error {
	dialing, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	conn, err := r.Clients[0].Dial(dialing, "tcp", r.VIP().String())
	if err != nil {
		return err
	}
	defer conn.Close()
	in := &watched{Reader: conn, to: g, last: time.Now()}
	br := bufio.NewReader(in)
	want := sha256.Sum256(content())
	for n := 0; ctx.Err() == nil; n++ {
		if err := conn.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
			return err
		}
		in.last = time.Now()
		head := "GET /big HTTP/1.1\r\nHost: farm\r\n\r\n"
		if upload {
			head = fmt.Sprintf("POST /up?%s.%d HTTP/1.1\r\nHost: farm\r\nContent-Length: %d\r\n\r\n", name, n, len(content()))
		}
		if _, err := io.WriteString(conn, head); err != nil {
			return err
		}
		for b := content(); upload && len(b) > 0; time.Sleep(30 * time.Millisecond) { // the pace
			k, err := conn.Write(b[:min(32<<10, len(b))])
			if err != nil {
				return fmt.Errorf("upload %d, %d bytes left: %w", n, len(b), err)
			}
			b = b[k:]
			in.last = time.Now()
		}
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			return fmt.Errorf("transfer %d: %w", n, err)
		}
		h := sha256.New()
		b, err := io.ReadAll(io.TeeReader(resp.Body, h))
		resp.Body.Close()
		switch {
		case err != nil:
			return fmt.Errorf("transfer %d after %d bytes: %w", n, len(b), err)
		case !upload && !bytes.Equal(h.Sum(nil), want[:]):
			return fmt.Errorf("download %d: %s, %d bytes, and not those that were sent", n, resp.Status, len(b))
		case upload && string(b) != fmt.Sprintf("%x has /up", want):
			return fmt.Errorf("upload %d: %s, %.100q", n, resp.Status, b)
		}
		done.Add(1)
	}
	return nil
}

// TestTransfersKilled: the engine dies again and again, a thousand times with
// WEIR_SOAK, under 20 transfers that are always under way, 4 of them uploads.
// None breaks. With WEIR_SOAK, 99 of 100 go on within a second after the
// successor serves.
func TestTransfersKilled(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.start(loaded)
	soak := os.Getenv("WEIR_SOAK") != ""
	kills, transfers := 3, 20
	if soak {
		kills = 1000
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var group sync.WaitGroup
	var done, broken atomic.Int64
	defer group.Wait()
	for i := range transfers {
		upload := i%5 == 4
		g := &r.posts.gaps
		if upload {
			g = new(gaps) // the server sees the silence; the client only fills a buffer
		}
		group.Go(func() {
			if err := r.transfer(ctx, g, upload, fmt.Sprint("t", i), &done); err != nil {
				broken.Add(1)
				t.Errorf("transfer %d: %v", i, err)
			}
		})
	}
	r.until("the transfers run", func() bool { return done.Load() >= int64(transfers) })
	pid, opened := r.serving(), r.opened()
	var served []time.Time
	var dead []time.Duration
	for range kills {
		at := time.Now()
		r.signal(pid, syscall.SIGKILL)
		pid = r.successor(pid)
		served = append(served, time.Now())
		dead = append(dead, time.Since(at))
		if t.Failed() {
			break
		}
		time.Sleep(time.Duration(200+rand.IntN(400)) * time.Millisecond) // the pace of deaths
	}
	cancel()
	group.Wait()
	r.noDrops()
	var stalls []time.Duration
	for _, at := range served {
		over := r.posts.gaps.over(at)
		stalls = append(stalls, over...)
		stalls = append(stalls, make([]time.Duration, max(transfers-len(over), 0))...) // those did not stall
	}
	slices.Sort(stalls)
	slices.Sort(dead)
	p99 := stalls[len(stalls)*99/100]
	t.Logf("%d deaths under %d transfers at a time, %d complete, %d broken, %d new server connections; dead for %v (median), %v (p99); stalls beyond that: p50 %v, p90 %v, p99 %v, longest %v",
		len(served), transfers, done.Load(), broken.Load(), r.opened()-opened, dead[len(dead)/2].Round(time.Millisecond), dead[len(dead)*99/100].Round(time.Millisecond),
		stalls[len(stalls)/2].Round(time.Millisecond), stalls[len(stalls)*9/10].Round(time.Millisecond), p99.Round(time.Millisecond), stalls[len(stalls)-1].Round(time.Millisecond))
	if soak && p99 > time.Second {
		t.Errorf("stalls: p99 is %v beyond the dead time, want a second at most", p99)
	}
	if n := r.opened() - opened; n > transfers {
		t.Errorf("the servers got %d new connections: the pool was lost", n)
	}
	r.stop()
}
