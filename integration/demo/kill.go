// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// The scene of the kill: so many downloads, of so many bytes, which take about
// so long, and when they lose what stands between them and their servers.
const (
	killDownloads = 60
	killBody      = 1 << 20
	killPieces    = 40
	killPause     = 50 * time.Millisecond
	killAt        = 700 * time.Millisecond
)

// downloads counts what became of them.
type downloads struct {
	running, whole, broken atomic.Int64
	first                  atomic.Pointer[error]
}

// killing shows what a kill -9 in the middle of downloads costs: with Weir, and
// with a proxy, where there is one.
func killing(ctx context.Context, s *stage) error {
	body := strings.Repeat("weir ", killBody/5+1)[:killBody]
	servers, err := s.serve(2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(killBody))
		for i := range killPieces {
			from, to := killBody*i/killPieces, killBody*(i+1)/killPieces
			if _, err := io.WriteString(w, body[from:to]); err != nil {
				return
			}
			w.(http.Flusher).Flush()
			time.Sleep(killPause)
		}
	}))
	if err != nil {
		return err
	}
	accepted := func() (n int) {
		for _, srv := range servers {
			n += srv.Accepted()
		}
		return n
	}

	config := lab.ConfigOptions{Pool: "{max_idle: 256}"}
	if err := s.start(ctx, config); err != nil {
		return err
	}
	var again time.Duration // from the death to the successor's first word
	var opened int
	weir, err := s.download(ctx, s.vip(), func() error {
		opened = accepted()
		began := time.Now()
		if err := s.weir.Crash(); err != nil {
			return err
		}
		if err := s.start(ctx, config); err != nil {
			return err
		}
		again = time.Since(began)
		return nil
	})
	if err != nil {
		return err
	}
	opened = accepted() - opened

	fmt.Fprintf(s.w, "  %-34s %10s %10s\n", fmt.Sprintf("%d downloads, kill -9 in the middle", killDownloads), "complete", "broken")
	fmt.Fprintf(s.w, "  %-34s %10d %10d   its successor was there after %d ms\n", "weir", weir.whole.Load(), weir.broken.Load(), again.Milliseconds())
	if path, err := haproxy(); err == nil {
		at := netip.AddrPortFrom(s.vip().Addr(), 8080)
		proxy, err := s.startHAProxy(ctx, path, at)
		if err != nil {
			return err
		}
		d, err := s.download(ctx, at, func() error { return proxy.Signal(syscall.SIGKILL) })
		if err != nil {
			return err
		}
		fmt.Fprintf(s.w, "  %-34s %10d %10d\n", "haproxy", d.whole.Load(), d.broken.Load())
	}
	fmt.Fprintln(s.w)

	var problems []string
	if n := weir.broken.Load(); n > 0 {
		problems = append(problems, fmt.Sprintf("%d downloads broke, the first: %v", n, *weir.first.Load()))
	}
	if opened > 0 {
		problems = append(problems, fmt.Sprintf("%d server connections were opened after the kill", opened))
	}
	return s.verdict(fmt.Sprintf("downloads over a kill -9: %d   broken: %d", weir.whole.Load(), weir.broken.Load()), problems)
}

// download runs the downloads from an address and does something when all have
// begun.
func (s *stage) download(ctx context.Context, from netip.AddrPort, meanwhile func() error) (*downloads, error) {
	d := &downloads{}
	client := s.Clients[0].HTTPClient(lab.HTTPClientOptions{Timeout: 20 * time.Second})
	defer client.CloseIdleConnections()
	var group sync.WaitGroup
	for range killDownloads {
		group.Go(func() {
			if err := d.one(ctx, client, "http://"+from.String()+"/"); err != nil {
				d.broken.Add(1)
				d.first.CompareAndSwap(nil, &err)
				return
			}
			d.whole.Add(1)
		})
	}
	begun := time.Now()
	for d.running.Load()+d.broken.Load() < killDownloads && ctx.Err() == nil && time.Since(begun) < 10*time.Second {
		time.Sleep(5 * time.Millisecond)
	}
	time.Sleep(killAt)
	err := meanwhile()
	group.Wait()
	return d, err
}

func (d *downloads) one(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	d.running.Add(1)
	n, err := io.Copy(io.Discard, resp.Body)
	if err == nil && (resp.StatusCode != http.StatusOK || n != killBody) {
		err = fmt.Errorf("status %d, %d bytes", resp.StatusCode, n)
	}
	return err
}

// haproxy finds the proxy that the scene compares with.
func haproxy() (string, error) {
	if path, err := exec.LookPath("haproxy"); err == nil {
		return path, nil
	}
	const usual = "/usr/sbin/haproxy"
	_, err := os.Stat(usual)
	return usual, err
}

// startHAProxy runs HAProxy on the router, on a port of the VIP's that is not
// Weir's.
func (s *stage) startHAProxy(ctx context.Context, path string, at netip.AddrPort) (*lab.Process, error) {
	config := filepath.Join(s.dir, "haproxy.cfg")
	text := "defaults\n  mode http\n  timeout connect 5s\n  timeout client 30s\n  timeout server 30s\n  http-reuse always\n" +
		"frontend web\n  bind " + at.String() + "\n  default_backend servers\nbackend servers\n"
	for i := range 2 {
		text += fmt.Sprintf("  server s%d %s\n", i+1, s.server(i))
	}
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	p, err := s.Router.Start(s.Router.Command(path, "-db", "-f", config))
	if err != nil {
		return nil, err
	}
	s.exit = append(s.exit, func() error { _ = p.Kill(); return nil })
	for ctx.Err() == nil {
		if c, err := s.Clients[0].Dial(ctx, "tcp", at.String()); err == nil {
			return p, c.Close()
		}
		select {
		case <-p.Done():
			return nil, fmt.Errorf("haproxy ends with exit code %d", p.ExitCode())
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil, ctx.Err()
}
