// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/forge"
	"github.com/weirgate/weir/module/packet"
)

const (
	floodRate = 22_000 // packets a second offered, so that 20,000 are reached
	floodSize = 10 * floodRate
)

// TestFlood: 220,000 SYNs, or segments that belong to nothing, in ten seconds. No record is made of any of them, transfers that
// run complete, and every honest request is served.
func TestFlood(t *testing.T) {
	request := []byte("GET / HTTP/1.1\r\nHost: flood\r\n\r\n")
	for _, c := range []struct {
		name  string
		flags []packet.Flags
	}{
		{"SYN", []packet.Flags{packet.SYN}},
		{"ACK, data, FIN, RST", []packet.Flags{packet.ACK, packet.ACK | packet.PSH, packet.FIN | packet.ACK, packet.RST, packet.RST | packet.ACK}},
	} {
		t.Run(c.name, func(t *testing.T) { flooded(t, c.flags, request) })
	}
}

func flooded(t *testing.T, flags []packet.Flags, data []byte) {
	// c1 attacks, c2 is honest.
	r := newRig(t, lab.FarmOptions{Clients: 2, Servers: 1})
	// The forged addresses lie behind c1, which drops the answers.
	if err := r.Router.AddRoute(netip.MustParsePrefix("198.19.0.0/16"), r.ClientAddr(0)); err != nil {
		t.Fatal(err)
	}
	bulk := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	pieces := make(chan struct{})
	server, err := lab.HTTPServer(r.Servers[0], r.Server(0).String(), http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.URL.Path != "/bulk" {
			fmt.Fprint(w, "this is ", q.URL.Path)
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(bulk)))
		for part := bulk; len(part) > 0; part = part[len(bulk)/16:] {
			_, _ = w.Write(part[:len(bulk)/16])
			w.(http.Flusher).Flush()
			if len(part) > len(bulk)/16 {
				// A handler that lingers after its last byte would keep the
				// next request of its connection waiting.
				<-pieces
			}
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	r.start("", "")
	ctx := within(t, 90*time.Second)
	// Transfers that were established before: one piece of each has arrived.
	const transfers = 4
	sums := make(chan error, transfers)
	for range transfers {
		resp, err := r.Clients[1].HTTPClient(lab.HTTPClientOptions{Close: true, Timeout: time.Minute}).Get("http://" + r.VIP().String() + "/bulk")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			defer resp.Body.Close()
			h := sha256.New()
			_, err := io.Copy(h, resp.Body)
			if err == nil && [sha256.Size]byte(h.Sum(nil)) != sha256.Sum256(bulk) {
				err = fmt.Errorf("the transfer is not what was sent")
			}
			sums <- err
		}()
	}
	before := r.counts()

	f, err := forge.New(r.Clients[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rnd := rand.New(rand.NewPCG(seed(t), 1))
	attack, stop := context.WithCancel(ctx)
	defer stop()
	type result struct {
		n    int
		took time.Duration
		err  error
	}
	over := make(chan result, 1)
	go func() {
		n, took, err := f.Flood(attack, floodRate, floodSize, forge.Strangers(rnd, r.VIP(), flags, data))
		over <- result{n, took, err}
	}()
	// Honest clients, one connection for each request, all the time.
	served, slowest := 0, time.Duration(0)
	var res result
	fed := 0
	for res.took == 0 {
		select {
		case res = <-over:
		default:
			began := time.Now()
			if err := honest(ctx, r, served); err != nil {
				t.Fatalf("an honest request, number %d, during the flood: %v", served, err)
			}
			slowest = max(slowest, time.Since(began))
			served++
			if fed < transfers*14 && served%4 == 0 {
				select {
				case pieces <- struct{}{}:
					fed++
				case <-ctx.Done():
				}
			}
		}
	}
	if res.err != nil {
		t.Fatal(res.err)
	}
	close(pieces)
	for range transfers {
		select {
		case err := <-sums:
			if err != nil {
				t.Errorf("a transfer that was established: %v", err)
			}
		case <-ctx.Done():
			t.Fatal("a transfer that was established does not end")
		}
	}
	after := r.counts()
	rate := float64(res.n) / res.took.Seconds()
	t.Logf("%d forged packets in %v (%.0f a second); %d honest requests served, slowest %v; server requests %d; client records before %d, after %d",
		res.n, res.took.Round(time.Millisecond), rate, served, slowest.Round(time.Millisecond), server.Requests(), before.ClientConnections, after.ClientConnections)
	// How fast they can be sent depends on what else the machine does: it
	// counts in soak.
	if res.n < floodSize || rate < 20_000 && os.Getenv("WEIR_SOAK") != "" {
		t.Errorf("only %d packets, %.0f a second: this is no flood", res.n, rate)
	}
	if n := after.ClientConnections - before.ClientConnections; n != uint64(served) {
		t.Errorf("%d records for %d honest connections: the flood made some", n, served)
	}
	if server.Requests() != served+transfers {
		t.Errorf("%d requests reached the server, %d were honest", server.Requests(), served+transfers)
	}
	r.stop()
}

// honest makes one connection with one request.
func honest(ctx context.Context, r *rig, n int) error {
	path := fmt.Sprintf("/honest/%d", n)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.VIP().String()+path, nil)
	if err != nil {
		return err
	}
	resp, err := r.Clients[1].HTTPClient(lab.HTTPClientOptions{Close: true, Timeout: 20 * time.Second}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || string(body) != "this is "+path {
		return fmt.Errorf("%s %q %w", resp.Status, body, err)
	}
	return nil
}
