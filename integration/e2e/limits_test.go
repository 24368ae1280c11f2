// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
	"github.com/weirgate/weir/internal/require"
)

// peak replays captured segments of one server and returns the largest number
// of connections that were open at once, and how many there were in all. One
// is open from the first SYN until both ends have sent their FIN, or one a
// reset.
func peak(segs []ladder.Segment, server netip.AddrPort) (most, all int) {
	type state struct{ fins [2]bool }
	open := map[netip.AddrPort]*state{}
	for _, s := range segs {
		peer, d := s.Src, 0
		switch server {
		case s.Dst:
		case s.Src:
			peer, d = s.Dst, 1
		default:
			continue
		}
		c := open[peer]
		switch {
		case c == nil && s.Flags&(ladder.SYN|ladder.ACK) == ladder.SYN && d == 0:
			c = &state{}
			open[peer] = c
			all++
			most = max(most, len(open))
		case c == nil:
			continue
		}
		if s.Flags&ladder.FIN != 0 {
			c.fins[d] = true
		}
		if s.Flags&ladder.RST != 0 || c.fins[0] && c.fins[1] {
			delete(open, peer)
		}
	}
	return most, all
}

// TestPeak is the negative control of the count.
func TestPeak(t *testing.T) {
	server := netip.MustParseAddrPort("198.51.100.11:80")
	a, b := netip.MustParseAddrPort("198.51.100.1:10240"), netip.MustParseAddrPort("198.51.100.1:10241")
	to := func(p netip.AddrPort, f uint8) ladder.Segment { return ladder.Segment{Src: p, Dst: server, Flags: f} }
	from := func(p netip.AddrPort, f uint8) ladder.Segment { return ladder.Segment{Src: server, Dst: p, Flags: f} }
	const syn, fin, rst, ack = ladder.SYN, ladder.FIN, ladder.RST, ladder.ACK
	for _, c := range []struct {
		segs      []ladder.Segment
		most, all int
	}{
		{nil, 0, 0},
		{[]ladder.Segment{to(a, syn), from(a, syn|ack), to(a, syn), to(b, syn)}, 2, 2},
		{[]ladder.Segment{to(a, syn), to(a, fin|ack), from(a, fin|ack), to(b, syn)}, 1, 2},
		{[]ladder.Segment{to(a, syn), to(a, fin|ack), to(b, syn), from(a, fin|ack)}, 2, 2},
		{[]ladder.Segment{to(a, syn), from(a, rst), to(b, syn), to(a, syn)}, 2, 3},
	} {
		if most, all := peak(c.segs, server); most != c.most || all != c.all {
			t.Errorf("%v: %d at once of %d, want %d of %d", c.segs, most, all, c.most, c.all)
		}
	}
}

// TestMaxConnections: two hundred clients and a server that takes four
// connections. It never sees a fifth one, whichever shard a client belongs to;
// who cannot be served in time is told so.
func TestMaxConnections(t *testing.T) {
	require.NFQueue(t)
	const limit, clients = 4, 200
	for _, c := range []struct {
		name     string
		shards   int
		pool     string
		rounds   int           // requests of each client
		work     time.Duration // the server's for each request
		refused  bool          // some get 503
		atLeast  int           // served
		deadline time.Duration // for an answer of either kind, generously
	}{
		{"served", 1, "max_connections: 4, wait_timeout: 30s", 5, time.Millisecond, false, 5 * clients, 30 * time.Second},
		{"served, two shards", 2, "max_connections: 4, wait_timeout: 30s", 5, time.Millisecond, false, 5 * clients, 30 * time.Second},
		{"late", 2, "max_connections: 4, wait_timeout: 500ms", 1, 100 * time.Millisecond, true, limit, 10 * time.Second},
		{"line full", 2, "max_connections: 4, max_waiting: 10, wait_timeout: 30s", 1, 100 * time.Millisecond, true, limit, 30 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, lab.FarmOptions{Servers: 1, NoIPv6: true})
			var served atomic.Int64
			server, err := lab.HTTPServer(r.Servers[0], r.Server(0).String(), http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
				// Some connections end, so that others must be opened.
				if served.Add(1)%17 == 0 {
					w.Header().Set("Connection", "close")
				}
				time.Sleep(c.work)
				fmt.Fprint(w, "this is ", q.URL.Path)
			}))
			if err != nil {
				t.Fatal(err)
			}
			wire, err := r.Servers[0].Capture("dmz", lab.CaptureOptions{SnapLen: 128})
			if err != nil {
				t.Fatal(err)
			}
			w := r.start(lab.ConfigOptions{Pool: "{" + c.pool + "}", Extra: fmt.Sprintf("queue: {shards: %d}\n", c.shards)})

			var good, busy atomic.Int64
			ctx := within(t, c.deadline)
			var wg sync.WaitGroup
			errs := make(chan error, clients)
			for i := range clients {
				wg.Go(func() { errs <- insist(ctx, r, i, c.rounds, &good, &busy) })
			}
			wg.Wait()
			close(errs)
			for err := range errs {
				if err != nil {
					t.Error(err)
				}
			}
			recs, err := wire.Stop()
			if err != nil {
				t.Fatal(err)
			}
			most, all := peak(lab.Segments(recs, map[string]ladder.Side{"dmz": ladder.ServerSide}), r.Server(0))
			t.Logf("%d served, %d refused, %d server connections, %d at once", good.Load(), busy.Load(), all, most)
			if most > limit || most == 0 {
				t.Errorf("%d connections at the server at once, the limit is %d", most, limit)
			}
			if int(good.Load()) < c.atLeast || (busy.Load() > 0) != c.refused {
				t.Errorf("%d served, at least %d expected; %d refused, expected some: %v", good.Load(), c.atLeast, busy.Load(), c.refused)
			}
			if n := server.Requests(); n != int(good.Load()) {
				t.Errorf("%d requests reached the server, %d clients were served", n, good.Load())
			}
			r.stop(w)
		})
	}
}

// insist makes one client connection with that many requests, each answered by
// the server or refused with 503 and Retry-After.
func insist(ctx context.Context, r *rig, client, rounds int, good, busy *atomic.Int64) error {
	conn, err := r.Clients[0].Dial(ctx, "tcp", r.VIP().String())
	if err != nil {
		return fmt.Errorf("client %d: %w", client, err)
	}
	defer conn.Close()
	if d, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(d)
	}
	br := bufio.NewReader(conn)
	for i := range rounds {
		path := fmt.Sprintf("/%d/%d", client, i)
		if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path); err != nil {
			return fmt.Errorf("client %d, request %d: %w", client, i, err)
		}
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			return fmt.Errorf("client %d, request %d: %w", client, i, err)
		}
		body, err := io.ReadAll(resp.Body)
		switch {
		case err != nil:
			return fmt.Errorf("client %d, request %d: %w", client, i, err)
		case resp.StatusCode == http.StatusServiceUnavailable && resp.Header.Get("Retry-After") != "":
			busy.Add(1)
			return nil
		case resp.StatusCode != http.StatusOK || string(body) != "this is "+path:
			return fmt.Errorf("client %d, request %d: %s, %q", client, i, resp.Status, body)
		}
		good.Add(1)
		if resp.Close && i+1 < rounds {
			// The server has ended its connection, and this one with it.
			conn.Close()
			if conn, err = r.Clients[0].Dial(ctx, "tcp", r.VIP().String()); err != nil {
				return fmt.Errorf("client %d, again: %w", client, err)
			}
			defer conn.Close()
			br.Reset(conn)
		}
	}
	return nil
}

// TestQueueOverflow: the process that reads the queues is stopped for three
// seconds, and the queue is short. Packets are lost, and counted; TCP repairs
// it; no packet leaves as it came.
func TestQueueOverflow(t *testing.T) {
	require.Tool(t, "nginx")
	for _, backend := range []string{"batched", "plain"} {
		t.Run(backend, func(t *testing.T) {
			t.Parallel() // mostly it waits
			overflow(t, backend)
		})
	}
}

func overflow(t *testing.T, backend string) {
	const clients, length = 48, 64
	r := newRig(t, lab.FarmOptions{Servers: 2, Link: lab.LinkOptions{NoOffload: true}})
	root, err := r.Lab.Subdir("site")
	if err != nil {
		t.Fatal(err)
	}
	files := newSite(t, root, 1000, 10_000)
	download := content(77, 2<<20)
	if err := os.WriteFile(filepath.Join(root, "bulk.bin"), download, 0o644); err != nil {
		t.Fatal(err)
	}
	r.nginxAll(root)
	captures := map[*lab.Capture]netip.Addr{} // each with the only address that its host speaks with
	for _, at := range []struct {
		host  *lab.Host
		iface string
		with  netip.Addr
	}{{r.Clients[0], "lan", r.VIP().Addr()}, {r.Servers[0], "dmz", r.SNIP()}, {r.Servers[1], "dmz", r.SNIP()}} {
		c, err := at.host.Capture(at.iface, lab.CaptureOptions{Buffer: 128 << 20})
		if err != nil {
			t.Fatal(err)
		}
		captures[c] = at.with
	}
	w := r.start(lab.ConfigOptions{Extra: fmt.Sprintf("queue: {backend: %s, length: %d}\n", backend, length)})

	ctx := within(t, 60*time.Second)
	var done atomic.Int64
	var over atomic.Bool
	c := &crowd{ctx: ctx, site: files, host: r.Clients[0], vip: r.VIP().String()}
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for !over.Load() && ctx.Err() == nil {
				// New connections and old ones alike.
				for _, keep := range []string{"", "close"} {
					if err := c.plain("1.1", keep, 3-2*len(keep)/5, keep != ""); err != nil {
						c.fail("small", err)
						return
					}
					done.Add(1)
				}
			}
		})
	}
	wg.Go(func() {
		for !over.Load() && ctx.Err() == nil {
			resp, err := c.host.HTTPClient(lab.HTTPClientOptions{Close: true, Timeout: time.Minute}).Get("http://" + c.vip + "/bulk.bin")
			if err == nil {
				_, err = compare(resp.Body, download)
				resp.Body.Close()
			}
			if err != nil {
				c.fail("bulk", err)
				return
			}
		}
	})
	until(t, 30*time.Second, "the load to run", func() bool { return done.Load() > 2*clients || ctx.Err() != nil })
	if err := w.Proc.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	pause := time.After(3 * time.Second)
	lost := func() (full, missed uint64) {
		qs, err := r.Router.PacketQueues()
		if err != nil {
			t.Fatal(err)
		}
		for _, q := range qs {
			full, missed = full+q.Full, missed+q.Missed
		}
		return full, missed
	}
	until(t, 20*time.Second, "the queue to overflow", func() bool { full, _ := lost(); return full > 0 })
	<-pause
	full, missed := lost()
	before := done.Load()
	if err := w.Proc.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	// A newcomer is served at once. How long "at once" is on a machine that does
	// other things, too, counts in soak.
	resumed := time.Now()
	if resp, err := c.host.HTTPClient(lab.HTTPClientOptions{Close: true, Timeout: time.Minute}).Head("http://" + c.vip + "/bulk.bin"); err != nil {
		t.Errorf("a newcomer after the pause: %v", err)
	} else {
		resp.Body.Close()
	}
	if took := time.Since(resumed); took > time.Second && os.Getenv("WEIR_SOAK") != "" {
		t.Errorf("a newcomer after the pause is served after %v", took)
	} else {
		t.Logf("a newcomer after the pause is served after %v", took.Round(time.Millisecond))
	}
	until(t, 30*time.Second, "requests after the pause", func() bool { return done.Load() > before+2*clients || ctx.Err() != nil })
	over.Store(true)
	wg.Wait()
	t.Logf("%d exchanges, %d packets lost at a full queue, %d at a full socket", done.Load(), full, missed)
	if full == 0 {
		t.Error("the kernel counts no loss")
	}
	until(t, 10*time.Second, "the event of the full queue", func() bool { return strings.Contains(r.mustWeir("events"), "queue-overflow") })
	for i, err := range c.errors {
		if i == 10 {
			t.Errorf("… and %d more", len(c.errors)-i)
			break
		}
		t.Error(err)
	}
	for capture, with := range captures {
		recs, err := capture.Stop()
		if err != nil {
			t.Fatal(err)
		}
		if err := only(recs, with); err != nil {
			t.Error(err)
		}
		if only(recs, r.ServerAddr(9)) == nil {
			t.Error("the check of the addresses finds nothing")
		}
	}
	r.stop(w)
}

// only checks that a host spoke TCP with that address alone, in packets whose
// checksums are right.
func only(recs []lab.Record, with netip.Addr) error {
	n := 0
	for _, rec := range recs {
		s, err := ladder.Decode(rec.Data)
		if errors.Is(err, ladder.ErrNotTCP) {
			continue
		}
		if err != nil {
			return err
		}
		n++
		peer := s.Src.Addr()
		if rec.Outgoing {
			peer = s.Dst.Addr()
		}
		if peer != with {
			return fmt.Errorf("a packet that is not translated: %s to %s", s.Src, s.Dst)
		}
		if !ladder.ChecksumsOK(rec.Data) {
			return fmt.Errorf("a packet with a wrong checksum: %s to %s, %d,%d(%d)", s.Src, s.Dst, s.Seq, s.Ack, s.Len)
		}
	}
	if n == 0 {
		return errors.New("no packet was captured")
	}
	return nil
}
