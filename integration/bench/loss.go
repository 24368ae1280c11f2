// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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
	rounds := fs.Int("rounds", 16, "how often both are measured, at least 2; a round alone says little")
	measure := fs.Duration("measure", 3*time.Second, "time of one measurement")
	warm := fs.Duration("warm", 0, "time before each measurement in which the downloads already run")
	delay := fs.Duration("delay", 5*time.Millisecond, "delay of the link, each way")
	connections := fs.Int("connections", 8, "downloads at once")
	congestion := fs.String("congestion", "reno", "the server's congestion control; empty: this machine's own")
	realtime := fs.Bool("realtime", true, "run everything that is measured before all else on this machine")
	seed := fs.Uint64("seed", 1, "what is lost follows from it and the round, packet by packet, the same for both")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *rounds < 2 {
		return fmt.Errorf("-rounds %d: at least 2", *rounds)
	}
	if err := asRoot(" BENCH=loss"); err != nil {
		return err
	}
	if *realtime {
		// These programs need little time, but at once: a wire or an engine that
		// waits for a processor delays packets by more than the link does, and a
		// server's TCP takes that for loss. Then the comparison is one of queues
		// for the processor, in which the path with more programs stands more often.
		if err := first(); err != nil {
			return fmt.Errorf("real-time priority (-realtime=false does without): %w", err)
		}
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
	fmt.Fprintln(w, "| loss, both ways | direct, MB/s | spliced, MB/s | ratio | 95 % | median of the rounds | at least 0.90 | ratio, by round |")
	fmt.Fprintln(w, "| --- | --- | --- | --- | --- | --- | --- | --- |")
	var details []string
	for _, loss := range []float64{0.01, 0.03} {
		for _, d := range []wire.Direction{wire.AB, wire.BA} {
			link.Set(d, wire.Impairment{Loss: loss, Delay: *delay})
		}
		var sum [2]lossSample
		var ratios []float64
		for round := range *rounds {
			var bytes [2]int64
			for i := range 2 {
				which := (i + round) % 2 // each round begins with the other one
				target := []netip.AddrPort{f.Server(0), f.VIP()}[which]
				before, err := tcpCounters(f.Servers[0])
				if err != nil {
					return err
				}
				// Both lose the same packets by their number, so that a round does
				// not compare a lucky time with an unlucky one.
				link.Begin(*seed + uint64(round))
				all, n, err := download(ctx, f.Clients[0], "http://"+target.String()+"/bulk", *connections, *warm, *measure)
				if err != nil {
					return err
				}
				after, err := tcpCounters(f.Servers[0])
				if err != nil {
					return err
				}
				bytes[which] = n
				sum[which].add(n, all, before, after)
			}
			if bytes[0] == 0 || bytes[1] == 0 {
				return fmt.Errorf("round %d at %g %% loss: %d bytes came directly, %d spliced", round+1, loss*100, bytes[0], bytes[1])
			}
			ratios = append(ratios, float64(bytes[1])/float64(bytes[0]))
		}
		perSecond := float64(*rounds) * measure.Seconds() * 1e6
		ratio := float64(sum[1].bytes) / float64(sum[0].bytes)
		low, high := likely(ratios)
		fmt.Fprintf(w, "| %g %% | %.2f | %.2f | %.3f | %.3f–%.3f | %.3f | %s | %s |\n", loss*100,
			float64(sum[0].bytes)/perSecond, float64(sum[1].bytes)/perSecond, ratio, low, high, median(ratios),
			map[bool]string{true: "yes", false: "no"}[ratio >= 0.90], roundList(ratios))
		for i := range sum {
			details = append(details, fmt.Sprintf("%g %%, %s: %s", loss*100, [...]string{"direct", "spliced"}[i], sum[i].String()))
		}
	}
	fmt.Fprintf(w, "\nthe server's TCP, for 1000 segments sent:\n%s\n", strings.Join(details, "\n"))
	return nil
}

// likely is the range in which the mean ratio lies with a probability of 95 %, as
// far as the rounds' spread can tell: two standard errors of their logarithms.
func likely(ratios []float64) (low, high float64) {
	var sum, squares float64
	for _, r := range ratios {
		sum += math.Log(r)
		squares += math.Log(r) * math.Log(r)
	}
	n := float64(len(ratios))
	mean := sum / n
	wide := 2 * math.Sqrt(max(squares/n-mean*mean, 0)/(n-1))
	return math.Exp(mean - wide), math.Exp(mean + wide)
}

func median(ratios []float64) float64 {
	s := slices.Sorted(slices.Values(ratios))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

func roundList(ratios []float64) string {
	var b strings.Builder
	for i, r := range ratios {
		if i > 0 {
			b.WriteByte(' ')
		}
		fmt.Fprintf(&b, "%.2f", r)
	}
	return b.String()
}

// lossCounters are those of the server's TCP that tell how it repaired losses.
var lossCounters = []string{
	"RetransSegs", "TCPFastRetrans", "TCPSlowStartRetrans", "TCPLostRetransmit", "TCPLossProbes", "TCPTimeouts",
	"TCPSpuriousRTOs", "TCPDSACKRecv", "TCPSACKReorder", "TCPSackRecoveryFail",
}

// lossSample is what the measurements of one kind have come to.
type lossSample struct {
	bytes     int64     // in the time that counts
	all, sent int64     // bytes and segments, those before it included
	counters  [16]int64 // in the order of lossCounters
}

func (s *lossSample) add(n, all int64, before, after map[string]int64) {
	s.bytes += n
	s.all += all
	s.sent += after["OutSegs"] - before["OutSegs"]
	for i, name := range lossCounters {
		s.counters[i] += after[name] - before[name]
	}
}

func (s *lossSample) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d segments, %.0f bytes each", s.sent, float64(s.all)/float64(max(s.sent, 1)))
	for i, name := range lossCounters {
		fmt.Fprintf(&b, ", %s %.2f", name, 1000*float64(s.counters[i])/float64(max(s.sent, 1)))
	}
	return b.String()
}

// tcpCounters reads the counters of a host's TCP by their names.
func tcpCounters(h *lab.Host) (map[string]int64, error) {
	m := map[string]int64{}
	err := h.Do(func() error {
		for _, file := range []string{"snmp", "netstat"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + file)
			if err != nil {
				return err
			}
			// Two lines for each protocol: names, then numbers.
			lines := strings.Split(string(b), "\n")
			for i := 0; i+1 < len(lines); i += 2 {
				names, numbers := strings.Fields(lines[i]), strings.Fields(lines[i+1])
				if len(names) == 0 || len(names) != len(numbers) || names[0] != "Tcp:" && names[0] != "TcpExt:" {
					continue
				}
				for k := range names[1:] {
					if m[names[k+1]], err = strconv.ParseInt(numbers[k+1], 10, 64); err != nil {
						return err
					}
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("host %s: counters of TCP: %w", h.Name(), err)
	}
	return m, nil
}

// download reads a file again and again over some connections and returns the
// bytes that came: all of them, and those within d after a time that does not
// count.
func download(ctx context.Context, h *lab.Host, url string, connections int, warm, d time.Duration) (all, counted int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, warm+d)
	defer cancel()
	var total, before atomic.Int64
	begin := time.AfterFunc(warm, func() { before.Store(total.Load()) })
	defer begin.Stop()
	var wg sync.WaitGroup
	failed := make(chan error, connections)
	for range connections {
		wg.Go(func() {
			client := h.HTTPClient(lab.HTTPClientOptions{Timeout: 2 * (warm + d)})
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
		return 0, 0, err
	default:
		return total.Load(), total.Load() - before.Load(), nil
	}
}
