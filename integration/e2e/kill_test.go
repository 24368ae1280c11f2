// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// This file kills weir while connections run. The endpoints keep all data, and
// a successor finds all records, so nobody may notice more than a pause.

// slowly is a server of bodies that take their time: what is asked for is on
// its way for a second or two.
type slowly struct {
	body   []byte
	served atomic.Int64
	posted sync.Map // nonce of a POST → how often it came
}

func (s *slowly) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if id := r.Header.Get("X-Nonce"); r.Method == http.MethodPost && id != "" {
		n, _ := s.posted.LoadOrStore(id, new(atomic.Int64))
		n.(*atomic.Int64).Add(1)
	}
	if r.Method == http.MethodPost {
		h := sha256.New()
		n, err := io.Copy(h, r.Body)
		if err != nil {
			return
		}
		fmt.Fprintf(w, "%d %x\n", n, h.Sum(nil))
		s.served.Add(1)
		return
	}
	if r.URL.Path == "/small" {
		_, _ = io.WriteString(w, "small\n")
		s.served.Add(1)
		return
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(s.body)))
	for i := 0; i < len(s.body); i += 32 << 10 {
		if _, err := w.Write(s.body[i:min(i+32<<10, len(s.body))]); err != nil {
			return
		}
		w.(http.Flusher).Flush()
		time.Sleep(50 * time.Millisecond)
	}
	s.served.Add(1)
}

// crash kills weir by SIGKILL and starts a successor.
func (r *rig) crash(w *lab.Weir, c lab.ConfigOptions) *lab.Weir {
	r.t.Helper()
	if err := w.Crash(); err != nil {
		r.t.Fatal(err)
	}
	return r.start(c)
}

// trickle reads from memory at a certain pace.
type trickle struct {
	b    []byte
	step int
}

func (s *trickle) Read(p []byte) (int, error) {
	if len(s.b) == 0 {
		return 0, io.EOF
	}
	time.Sleep(50 * time.Millisecond)
	n := copy(p, s.b[:min(s.step, len(s.b))])
	s.b = s.b[n:]
	return n, nil
}

func TestKillTransfers(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Servers: 2})
	s := &slowly{body: content(7, 1<<20)}
	var servers []*lab.Server
	for i, h := range r.Servers {
		sv, err := lab.HTTPServer(h, netip.AddrPortFrom(r.ServerAddr(i), 80).String(), s)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { sv.Close() })
		servers = append(servers, sv)
	}
	rounds, downloads, uploads := 3, 200, 20
	if testing.Short() {
		rounds = 1
	}
	accepted := func() int { return servers[0].Accepted() + servers[1].Accepted() }
	c := lab.ConfigOptions{Pool: "{max_idle: 256}"}
	w := r.start(c)
	want := sha256.Sum256(s.body)
	sent := content(9, 1<<20)
	sentSum := fmt.Sprintf("%d %x\n", len(sent), sha256.Sum256(sent))
	client := r.Clients[0].HTTPClient(lab.HTTPClientOptions{})
	for round := range rounds {
		var group sync.WaitGroup
		errs := make(chan error, downloads+uploads)
		var begun atomic.Int64
		for i := range downloads {
			group.Go(func() {
				resp, err := client.Get(fmt.Sprintf("http://%s/big?%d", r.VIP(), i))
				if err != nil {
					errs <- fmt.Errorf("download %d: %w", i, err)
					return
				}
				defer resp.Body.Close()
				begun.Add(1)
				h := sha256.New()
				if n, err := io.Copy(h, resp.Body); err != nil {
					errs <- fmt.Errorf("download %d breaks after %d bytes: %w", i, n, err)
				} else if !bytes.Equal(h.Sum(nil), want[:]) {
					errs <- fmt.Errorf("download %d: %d bytes, and not those that were sent", i, n)
				}
			})
		}
		for i := range uploads {
			group.Go(func() {
				req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, fmt.Sprintf("http://%s/up?%d", r.VIP(), i), &trickle{sent, 32 << 10})
				if err != nil {
					errs <- err
					return
				}
				req.ContentLength = int64(len(sent))
				begun.Add(1)
				resp, err := client.Do(req)
				if err != nil {
					errs <- fmt.Errorf("upload %d: %w", i, err)
					return
				}
				defer resp.Body.Close()
				b, err := io.ReadAll(resp.Body)
				if err != nil || string(b) != sentSum {
					errs <- fmt.Errorf("upload %d: %q, %w", i, b, err)
				}
			})
		}
		until(t, 60*time.Second, "transfers to run", func() bool { return begun.Load() == int64(downloads+uploads) })
		before, opened := s.served.Load(), accepted()
		died := time.Now()
		w = r.crash(w, c)
		t.Logf("round %d: dead for %v, %d transfers were complete before", round, time.Since(died).Round(time.Millisecond), before)
		stuck := time.AfterFunc(20*time.Second, func() {
			for _, a := range [][]string{{"flows", "-o", "json"}} {
				_, out, _ := r.weir(a...)
				t.Log(out)
			}
		})
		group.Wait()
		stuck.Stop()
		close(errs)
		for err := range errs {
			t.Error(err)
		}
		if n := accepted() - opened; n > 0 {
			t.Errorf("%d server connections were opened after the kill", n)
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	client.CloseIdleConnections()
	r.stop(w)
	if _, err := os.Stat(r.run + "/flows"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the flow store is there after an orderly stop: %v", err)
	}
}
