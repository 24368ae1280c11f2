// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/forge"
	"github.com/weirgate/weir/module/packet"
)

// TestBlindInjection: somebody on the clients' network knows the addresses and
// ports of eight connections and of the server connections behind them, and
// sends 60,000 resets, SYNs, data, FINs and acknowledgments with drawn numbers
// in the name of either end, while requests and answers run. No connection
// breaks, no byte is added. The control: with the right number, a reset counts.
func TestBlindInjection(t *testing.T) {
	t.Parallel()
	const conns, rate, size = 8, 15_000, 60_000
	r := newRig(t, lab.FarmOptions{Clients: 2, Servers: 1})
	// Forged packets come in at the clients' side, whoever they claim to be.
	for _, key := range []string{"net/ipv4/conf/all/rp_filter", "net/ipv4/conf/" + r.ClientLeg + "/rp_filter"} {
		if err := r.Router.SetSysctl(key, "0"); err != nil {
			t.Fatal(err)
		}
	}
	var mu sync.Mutex
	snips := map[netip.AddrPort]bool{}
	const letters = "0123456789abcdefghijklmnopqrstuvwxyz"
	if _, err := lab.HTTPServer(r.Servers[0], r.Server(0).String(), http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if a, err := netip.ParseAddrPort(q.RemoteAddr); err == nil {
			mu.Lock()
			snips[a] = true
			mu.Unlock()
		}
		body, err := io.ReadAll(q.Body)
		if err != nil {
			return
		}
		w.Header().Set("Nonce", q.Header.Get("Nonce"))
		fmt.Fprint(w, len(body), strings.Repeat(letters, 300))
	})); err != nil {
		t.Fatal(err)
	}
	r.start("", "queue: {shards: 2}\n")
	ctx := within(t, 60*time.Second)
	s := seed(t)
	var all []*caller
	var ends []netip.AddrPort
	for range conns {
		c, err := r.Clients[1].Dial(ctx, "tcp", r.VIP().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		k := newCaller(ctx, c)
		all = append(all, k)
		ends = append(ends, c.LocalAddr().(*net.TCPAddr).AddrPort())
	}
	done := make(chan struct{})
	errs := make([]error, conns)
	asked := make([]int, conns)
	var wg sync.WaitGroup
	for i, k := range all {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(s, uint64(100+i)))
			for {
				select {
				case <-done:
					return
				default:
				}
				n := newNonce(rnd)
				body := strings.Repeat("b", rnd.IntN(5000))
				_, err := fmt.Fprintf(k.c, "POST / HTTP/1.1\r\nHost: blind\r\nNonce: %s\r\nContent-Length: %d\r\n\r\n%s", n, len(body), body)
				var resp *http.Response
				if err == nil {
					resp, err = k.read()
				}
				if err == nil {
					got, _ := io.ReadAll(resp.Body)
					if resp.StatusCode != 200 || resp.Header.Get("Nonce") != n || string(got) != fmt.Sprint(len(body))+strings.Repeat(letters, 300) {
						err = fmt.Errorf("%s, nonce %s for %s, %d bytes", resp.Status, resp.Header.Get("Nonce"), n, len(got))
					}
				}
				if err != nil {
					errs[i] = fmt.Errorf("connection %d, request %d: %w", i, asked[i], err)
					return
				}
				asked[i]++
			}
		})
	}
	until(t, 20*time.Second, "the first requests", func() bool { mu.Lock(); defer mu.Unlock(); return len(snips) > 0 })
	f, err := forge.New(r.Clients[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rnd := rand.New(rand.NewPCG(s, 1))
	flags := []packet.Flags{packet.RST, packet.RST | packet.ACK, packet.SYN, packet.SYN | packet.ACK, packet.ACK | packet.PSH, packet.ACK, packet.FIN | packet.ACK}
	pick := func() (src, dst netip.AddrPort) {
		if rnd.IntN(2) == 0 {
			return ends[rnd.IntN(len(ends))], r.VIP()
		}
		mu.Lock()
		defer mu.Unlock()
		for a := range snips { // any of them
			return r.Server(0), a
		}
		panic("no server connection")
	}
	junk := []byte("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\ninjected")
	n, took, err := f.Flood(ctx, rate, size, forge.Blind(rnd, pick, flags, junk))
	if err != nil {
		t.Fatal(err)
	}
	close(done)
	wg.Wait()
	sum := 0
	for i := range all {
		sum += asked[i]
		if errs[i] != nil {
			t.Error(errs[i])
		}
		if asked[i] == 0 {
			t.Errorf("connection %d made no request: the rig tests nothing", i)
		}
		if strings.Contains(string(all[i].rec.all), "injected") {
			t.Errorf("connection %d: injected bytes arrived", i)
		}
	}
	seen := r.reason("blind-reset") + r.reason("ack-beyond") + r.reason("out-of-window") + r.reason("unknown-server")
	t.Logf("%d forged segments in %v; %d requests over %d connections; %d segments were found out", n, took.Round(time.Millisecond), sum, conns, seen)
	if seen < uint64(n)/4 {
		t.Errorf("only %d of %d forged segments reached the engine: the rig tests nothing", seen, n)
	}
	control(ctx, t, r, f)
	r.stop()
}

// control sends a reset with the right number in the name of a client of which
// the forger sees everything.
func control(ctx context.Context, t *testing.T, r *rig, f *forge.Forger) {
	t.Helper()
	c, err := r.Clients[1].Dial(ctx, "tcp", r.VIP().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	k := newCaller(ctx, c)
	if _, err := k.get("/", "Nonce: x\r\n"); err != nil {
		t.Fatal(err)
	}
	before := r.reason("client-reset")
	src := c.LocalAddr().(*net.TCPAddr).AddrPort()
	seq, err := nextSeq(k.c)
	if err != nil {
		t.Fatal(err)
	}
	s := packet.Segment{Src: packet.EndpointFrom(src), Dst: packet.EndpointFrom(r.VIP()), Seq: seq, Flags: packet.RST, TTL: 64}
	if err := f.Send(&s, nil); err != nil {
		t.Fatal(err)
	}
	until(t, 10*time.Second, "the reset with the right number to count", func() bool { return r.reason("client-reset") > before })
}

// nextSeq is the sequence number that a socket of ours sends next, as the
// kernel tells those who would move it to another host (TCP_REPAIR).
func nextSeq(c *net.TCPConn) (seq packet.Seq, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	const sendQueue, off = 2, -1
	var n int
	var inner error
	err = raw.Control(func(fd uintptr) {
		set := func(opt, v int) {
			if inner == nil {
				inner = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, opt, v)
			}
		}
		set(unix.TCP_REPAIR, 1)
		set(unix.TCP_REPAIR_QUEUE, sendQueue)
		if inner == nil {
			n, inner = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ)
		}
		set(unix.TCP_REPAIR, off)
	})
	return packet.Seq(uint32(n)), errors.Join(err, inner)
}
