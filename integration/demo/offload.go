// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// How much the farm scene does: clients with one request each, so many at a
// time.
const (
	crowdSize = 2000
	atATime   = 24
)

// maxOpened is how many server connections the crowd may need: the scene's
// claim. Each server has at most as many as there are requests at a time.
const maxOpened = 60

// answer is what the farm's servers have for everybody.
var answer = bytes.Repeat([]byte("x"), 1000)

// Serve is one server of the farm scene. It runs in a process of its own, so
// that the processor time it takes can be seen, until the context ends.
func Serve(ctx context.Context, addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	srv := &http.Server{
		ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			_, _ = w.Write(answer)
		}),
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("demo: %w", err)
	}
	return nil
}

// tally is what a farm has seen.
type tally struct {
	connections, failed int
	first               error // why the first one failed
	opened              int   // server connections
	packets             uint64
	cpu                 time.Duration
}

// offload shows what the farm has to do for many clients with one request
// each, once without Weir and once with it.
func offload(ctx context.Context, s *stage) error {
	var procs []*lab.Process
	for i, h := range s.Servers {
		p, err := h.Start(h.Command(s.opts.Weir, "demo", "server", s.server(i).String()))
		if err != nil {
			return err
		}
		s.exit = append(s.exit, p.Kill)
		procs = append(procs, p)
		if err := s.answers(ctx, p, s.server(i)); err != nil {
			return err
		}
	}
	// Without Weir: what a simple distributor would do, one server after the
	// other.
	without, err := s.count(procs, func() tally {
		return s.crowd(ctx, func(i int) netip.AddrPort { return s.server(i % len(s.Servers)) })
	})
	if err != nil {
		return err
	}
	if err := s.start(ctx, lab.ConfigOptions{}); err != nil {
		return err
	}
	with, err := s.count(procs, func() tally {
		return s.crowd(ctx, func(int) netip.AddrPort { return s.vip() })
	})
	if err != nil {
		return err
	}
	s.table(without, with)
	var problems []string
	for name, t := range map[string]tally{"without Weir": without, "with Weir": with} {
		if t.failed > 0 {
			problems = append(problems, fmt.Sprintf("%s %d requests failed, the first: %v", name, t.failed, t.first))
		}
	}
	if with.opened > maxOpened {
		problems = append(problems, fmt.Sprintf("with Weir %d server connections were opened, more than %d", with.opened, maxOpened))
	}
	if with.packets >= without.packets {
		problems = append(problems, "the servers saw no fewer packets with Weir")
	}
	return s.verdict(fmt.Sprintf("client connections: %s   server connections opened: %d instead of %s", thousands(with.connections), with.opened, thousands(without.opened)), problems)
}

// answers waits until a server accepts connections.
func (s *stage) answers(ctx context.Context, p *lab.Process, addr netip.AddrPort) error {
	for {
		c, err := s.Router.Dial(ctx, "tcp", addr.String())
		if err == nil {
			return c.Close()
		}
		select {
		case <-p.Done():
			return fmt.Errorf("the server at %s ended: %w", addr, p.Wait())
		case <-ctx.Done():
			return fmt.Errorf("the server at %s does not answer: %w", addr, err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// count reads the servers' counters around what f does.
func (s *stage) count(procs []*lab.Process, f func() tally) (tally, error) {
	read := func() (opened int, packets uint64, cpu time.Duration, err error) {
		for i, h := range s.Servers {
			n, err := h.Accepted()
			if err != nil {
				return 0, 0, 0, err
			}
			t, err := h.Traffic("dmz")
			if err != nil {
				return 0, 0, 0, err
			}
			d, err := procs[i].CPU()
			if err != nil {
				return 0, 0, 0, err
			}
			opened, packets, cpu = opened+n, packets+t.Packets(), cpu+d
		}
		return opened, packets, cpu, nil
	}
	opened, packets, cpu, err := read()
	if err != nil {
		return tally{}, err
	}
	t := f()
	t.opened, t.packets, t.cpu, err = read()
	t.opened, t.packets, t.cpu = t.opened-opened, t.packets-packets, t.cpu-cpu
	return t, err
}

// crowd lets every client make its connection and its request.
func (s *stage) crowd(ctx context.Context, target func(int) netip.AddrPort) tally {
	var t tally
	var mu sync.Mutex
	var next atomic.Int64
	var wg sync.WaitGroup
	for range atATime {
		wg.Go(func() {
			buf := make([]byte, 4096)
			for {
				i := int(next.Add(1)) - 1
				if i >= crowdSize {
					return
				}
				err := one(ctx, s.Clients[i%len(s.Clients)], target(i), buf)
				mu.Lock()
				if t.connections++; err != nil {
					if t.failed++; t.failed == 1 {
						t.first = err
					}
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return t
}

// one is one client: a connection, a request, a response, the end.
func one(ctx context.Context, h *lab.Host, target netip.AddrPort, buf []byte) error {
	conn, err := h.Dial(ctx, "tcp", target.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	if d, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(d)
	}
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n"); err != nil {
		return err
	}
	n := 0
	for {
		k, err := conn.Read(buf[n:])
		n += k
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if !bytes.HasPrefix(buf[:n], []byte("HTTP/1.1 200 ")) || !bytes.HasSuffix(buf[:n], answer) {
		return fmt.Errorf("the response is %.60q", buf[:n])
	}
	return nil
}

// table shows both tallies beside each other.
func (s *stage) table(without, with tally) {
	row := func(name, a, b string) { fmt.Fprintf(s.w, "  %-34s %14s %14s\n", name, a, b) }
	each := func(t tally, v float64) float64 { return v / float64(max(t.connections, 1)) }
	row("", "without Weir", "with Weir")
	row("client connections", thousands(without.connections), thousands(with.connections))
	row("server connections opened", thousands(without.opened), thousands(with.opened))
	packets := func(t tally) string { return fmt.Sprintf("%.1f", each(t, float64(t.packets))) }
	row("packets at a server, per request", packets(without), packets(with))
	cpu := func(t tally) string { return fmt.Sprintf("%.0f µs", each(t, float64(t.cpu.Microseconds()))) }
	row("server CPU, per request", cpu(without), cpu(with))
	row("requests that failed", thousands(without.failed), thousands(with.failed))
	fmt.Fprintln(s.w)
}

// thousands writes a number with commas.
func thousands(n int) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%s,%03d", thousands(n/1000), n%1000)
}
