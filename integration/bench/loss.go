// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/wire"
)

// runLoss compares bulk downloads through a link that loses packets: directly
// from the server, and through Weir, by the same client over the same link, in
// turns. By default the server's congestion control reacts to loss alone. BBR
// also keeps the shortest round trip of ten seconds, and on a spliced connection
// that is the handshake's, which the engine answered from near by.
func runLoss(ctx context.Context, args []string, w io.Writer) (err error) {
	fs := flag.NewFlagSet("bench loss", flag.ContinueOnError)
	fs.SetOutput(w)
	weir := fs.String("weir", "bin/weir", "the weir executable")
	rounds := fs.Int("rounds", 4, "how often both are measured")
	measure := fs.Duration("measure", 4*time.Second, "time of one measurement")
	delay := fs.Duration("delay", 5*time.Millisecond, "delay of the link, each way")
	connections := fs.Int("connections", 8, "downloads at once")
	congestion := fs.String("congestion", "reno", "the server's congestion control; empty: this machine's own")
	seed := fs.Uint64("seed", 1, "what is lost follows from it, packet by packet")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("it makes network namespaces, and needs root for that: sudo make bench BENCH=loss")
	}
	bin, err := filepath.Abs(*weir)
	if err != nil {
		return err
	}
	l, err := lab.New("weirloss")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	f, err := l.Farm(lab.FarmOptions{Servers: 1, NoIPv6: true, Link: lab.LinkOptions{NoOffload: true}})
	if err != nil {
		return err
	}
	link, err := wire.Into(l.Host("lan"), "router", wire.Options{Seed: *seed})
	if err != nil {
		return err
	}
	root, err := l.Subdir("root")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(root, "bulk"), make([]byte, 64<<20), 0o644); err != nil {
		return err
	}
	if *congestion != "" {
		if err := f.Servers[0].SetSysctl("net/ipv4/tcp_congestion_control", *congestion); err != nil {
			return err
		}
	}
	if _, err := lab.Nginx(f.Servers[0], lab.NginxOptions{Addrs: []netip.AddrPort{f.Server(0)}, Root: root, NoAccessLog: true}); err != nil {
		return err
	}
	dir, err := l.Subdir("weir")
	if err != nil {
		return err
	}
	run, err := l.Subdir("weir/run")
	if err != nil {
		return err
	}
	c := lab.ConfigOptions{Dir: run}
	start, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if _, err := lab.StartWeir(start, f.Router, lab.WeirOptions{Binary: bin, Config: f.Config(c), Dir: dir, Socket: c.Socket()}); err != nil {
		return err
	}
	fmt.Fprintf(w, "bulk goodput of %d downloads over a link with %s of delay each way, %d rounds of %s each, congestion control %s\n\n",
		*connections, *delay, *rounds, *measure, *congestion)
	fmt.Fprintln(w, "| loss, both ways | direct, MB/s | spliced, MB/s | ratio |")
	fmt.Fprintln(w, "| --- | --- | --- | --- |")
	for _, loss := range []float64{0.01, 0.03} {
		for _, d := range []wire.Direction{wire.AB, wire.BA} {
			link.Set(d, wire.Impairment{Loss: loss, Delay: *delay})
		}
		var bytes [2]int64
		for round := range *rounds {
			for i := range 2 {
				which := (i + round) % 2 // each round begins with the other one
				target := []netip.AddrPort{f.Server(0), f.VIP()}[which]
				n, err := download(ctx, f.Clients[0], "http://"+target.String()+"/bulk", *connections, *measure)
				if err != nil {
					return err
				}
				bytes[which] += n
			}
		}
		perSecond := float64(*rounds) * measure.Seconds() * 1e6
		fmt.Fprintf(w, "| %g %% | %.2f | %.2f | %.3f |\n", loss*100, float64(bytes[0])/perSecond, float64(bytes[1])/perSecond, float64(bytes[1])/float64(bytes[0]))
	}
	return nil
}

// download reads a file again and again over some connections and returns the
// bytes that came within d.
func download(ctx context.Context, h *lab.Host, url string, connections int, d time.Duration) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	var total atomic.Int64
	var wg sync.WaitGroup
	failed := make(chan error, connections)
	for range connections {
		wg.Go(func() {
			client := h.HTTPClient(lab.HTTPClientOptions{Timeout: 2 * d})
			defer client.CloseIdleConnections()
			buf := make([]byte, 64<<10)
			for ctx.Err() == nil {
				q, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
				if err != nil {
					failed <- err
					return
				}
				resp, err := client.Do(q)
				if err != nil {
					if ctx.Err() == nil {
						failed <- err
					}
					return
				}
				for {
					n, err := resp.Body.Read(buf)
					total.Add(int64(n))
					if err != nil {
						if err != io.EOF && ctx.Err() == nil {
							failed <- err
						}
						break
					}
				}
				_ = resp.Body.Close()
			}
		})
	}
	wg.Wait()
	select {
	case err := <-failed:
		return 0, err
	default:
		return total.Load(), nil
	}
}
