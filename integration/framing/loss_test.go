// SPDX-License-Identifier: Apache-2.0

package framing

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
)

// lose drops some percent of the packets that a host sends and gets.
func (r *rig) lose(h *lab.Host, percent int) {
	r.t.Helper()
	_, err := h.Run(within(r.t, 10*time.Second), require.Tool(r.t, "nft"), fmt.Sprintf(`table inet loss {
  chain out { type filter hook output priority 0; numgen random mod 100 < %[1]d drop; }
  chain in { type filter hook input priority 0; numgen random mod 100 < %[1]d drop; }
}`, percent))
	if err != nil {
		r.t.Fatal(err)
	}
}

// TestExpectUploads: uploads that wait for 100 (Continue), or do not wait for
// long, onto Go's own server, which asks for the body or refuses it; whole, and
// with losses on both sides. A body that was refused never arrives.
func TestExpectUploads(t *testing.T) {
	for _, percent := range []int{0, 2} {
		t.Run(fmt.Sprintf("loss %d percent", percent), func(t *testing.T) {
			rnd := seeded(t)
			r := newRig(t, 1)
			ln, err := r.Servers[0].Listen("tcp", r.at(0, 80))
			if err != nil {
				t.Fatal(err)
			}
			s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
				if strings.HasPrefix(q.URL.Path, "/refuse/") {
					w.WriteHeader(http.StatusExpectationFailed)
					return
				}
				h := sha256.New()
				if _, err := io.Copy(h, q.Body); err != nil {
					panic(http.ErrAbortHandler)
				}
				fmt.Fprintf(w, "%x %s", h.Sum(nil), q.Trailer.Get("X-Sum"))
			})}
			go func() { _ = s.Serve(ln) }()
			t.Cleanup(func() { _ = s.Close() })
			r.start(farmText{name: "web", port: 80, servers: []string{r.at(0, 80)}})
			if percent > 0 {
				r.lose(r.Clients[0], percent)
				r.lose(r.Servers[0], percent)
			}
			n := size(120, 5000)
			seeds := make([]uint64, n)
			for i := range seeds {
				seeds[i] = rnd.Uint64()
			}
			parallel(t, n, 8, func(i int) error {
				rnd := rand.New(rand.NewPCG(seeds[i], 7))
				tr := &http.Transport{
					ExpectContinueTimeout: []time.Duration{time.Minute, time.Millisecond, 50 * time.Millisecond}[rnd.IntN(3)],
					DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
						return r.Clients[0].Dial(ctx, network, addr)
					},
				}
				defer tr.CloseIdleConnections()
				client := &http.Client{Transport: tr, Timeout: time.Minute}
				for range 3 {
					body := make([]byte, 1+rnd.IntN(1<<(4+rnd.IntN(14))))
					for k := range body {
						body[k] = byte(rnd.Uint32())
					}
					sum := fmt.Sprintf("%x", sha256.Sum256(body))
					path, want := "/take/", sum+" "
					refuse := rnd.IntN(4) == 0
					if refuse {
						path = "/refuse/"
					}
					var rd io.Reader = bytes.NewReader(body)
					chunks := rnd.IntN(2) == 0
					if chunks {
						rd = struct{ io.Reader }{rd} // of unknown length
					}
					q, err := http.NewRequest(http.MethodPost, "http://"+r.vip(80)+path, rd)
					if err != nil {
						return err
					}
					q.Header.Set("Expect", "100-continue")
					if chunks {
						q.Trailer = http.Header{"X-Sum": {sum}}
						want += sum
					}
					resp, err := client.Do(q)
					if err != nil {
						return err
					}
					got, err := io.ReadAll(resp.Body)
					_ = resp.Body.Close()
					if refuse && resp.StatusCode != 417 || !refuse && (resp.StatusCode != 200 || string(got) != want) || err != nil {
						return fmt.Errorf("%s, %d bytes, chunked %v: %s %q, %w", path, len(body), chunks, resp.Status, got, err)
					}
				}
				return nil
			})
		})
	}
}

// TestFramingUnderLoss: pipelines over three servers, chunked bodies with
// trailers, and a WebSocket, with losses on both sides: late and repeated
// segments change nothing.
func TestFramingUnderLoss(t *testing.T) {
	rnd := seeded(t)
	r := newRig(t, 3)
	r.namedServers(80)
	s := &echoServer{after: map[string]int{}}
	ln, err := r.Servers[0].Listen("tcp", r.at(0, 81))
	if err != nil {
		t.Fatal(err)
	}
	hs := &http.Server{Handler: s}
	go func() { _ = hs.Serve(ln) }()
	t.Cleanup(func() { _ = hs.Close() })
	r.start(farmText{name: "web", port: 80, servers: []string{r.at(0, 80), r.at(1, 80), r.at(2, 80)}, extra: threePaths},
		farmText{name: "ws", port: 81, servers: []string{r.at(0, 81)}, extra: "    forwarded: forwarded\n"})
	for _, h := range append(r.Servers, r.Clients[0]) {
		r.lose(h, 2)
	}
	n := size(40, 2000)
	seeds := make([]uint64, n)
	for i := range seeds {
		seeds[i] = rnd.Uint64()
	}
	parallel(t, n, 10, func(i int) error {
		rnd := rand.New(rand.NewPCG(seeds[i], 8))
		if i%4 != 0 {
			return r.pipeline(1+rnd.IntN(20), rnd)
		}
		c, br, err := wsDial(r, 81, "/ws")
		if err != nil {
			return err
		}
		defer c.Close()
		for k := range 100 {
			b := bytes.Repeat([]byte{byte(k)}, rnd.IntN(1<<rnd.IntN(14)))
			sent := make(chan error, 1)
			go func() { sent <- wsWrite(c, wsBinary, b, true) }()
			op, got, err := wsRead(br)
			if err != nil || op != wsBinary || !bytes.Equal(got, b) {
				return fmt.Errorf("message %d: %d of %d bytes, %w", k, len(got), len(b), err)
			}
			if err := <-sent; err != nil {
				return err
			}
		}
		if err := c.CloseWrite(); err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, bufio.NewReader(br))
		return err
	})
	until(t, 20*time.Second, "weir forgets the tunnels", func() bool { return r.farm("ws").Servers[0].Open == 0 })
}
