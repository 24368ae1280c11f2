// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/module"
	"github.com/weirgate/weir/module/config"
)

// This file measures what the garbage collector does to requests: the same
// load at the same rate through the same program, in turns with a collector
// that is left alone, with one that is forced to run ten times a second, and
// with one that never runs. And it counts what a packet allocates.

// embedded is what runEmbed says about itself when it is asked by a signal.
type embedded struct {
	At      time.Duration // since its start
	Mallocs uint64        // objects allocated so far
	Cycles  uint64        // of the collector
	Paused  time.Duration // in all, the world stopped
	Longest time.Duration // of the last 256 pauses
	Packets uint64        // that the kernel has queued
}

// runEmbed runs the module in this process, as another Go program would, until
// it is told to end. On SIGUSR1 it writes an embedded as a line of JSON.
func runEmbed(ctx context.Context, args []string, w io.Writer) error {
	fs := flag.NewFlagSet("bench embed", flag.ContinueOnError)
	file := fs.String("config", "", "configuration file")
	every := fs.Duration("gc", 0, "force the collector to run this often; 0: never; below 0: switch it off")
	if err := fs.Parse(args); err != nil {
		return err
	}
	cfg, err := config.Load(config.LoadOptions{Files: []string{*file}})
	if err != nil {
		return err
	}
	began := time.Now()
	if *every < 0 {
		debug.SetGCPercent(-1)
	}
	tell := make(chan os.Signal, 1)
	signal.Notify(tell, unix.SIGUSR1)
	m, err := module.New(cfg, module.Options{Log: slog.New(slog.DiscardHandler), Ready: func() { fmt.Fprintln(w, "ready") }})
	if err != nil {
		return err
	}
	go func() {
		for range tell {
			var ms runtime.MemStats
			runtime.ReadMemStats(&ms)
			e := embedded{At: time.Since(began), Mallocs: ms.Mallocs, Cycles: uint64(ms.NumGC), Paused: time.Duration(ms.PauseTotalNs), Packets: queued()}
			for _, p := range ms.PauseNs {
				e.Longest = max(e.Longest, time.Duration(p))
			}
			_ = json.NewEncoder(w).Encode(e)
		}
	}()
	if *every > 0 {
		go func() {
			for range time.Tick(*every) {
				runtime.GC()
			}
		}()
	}
	return m.Run(ctx)
}

// queued is how many packets the kernel has queued in this namespace.
func queued() (n uint64) {
	b, err := os.ReadFile("/proc/self/net/netfilter/nfnetlink_queue")
	if err != nil {
		return 0
	}
	return sumQueued(b)
}

// sumQueued reads the kernel's list of queues: the eighth column counts packets.
func sumQueued(b []byte) (n uint64) {
	for line := range strings.Lines(string(b)) {
		var v [8]uint64
		if _, err := fmt.Sscan(line, &v[0], &v[1], &v[2], &v[3], &v[4], &v[5], &v[6], &v[7]); err == nil {
			n += v[7]
		}
	}
	return n
}

// told is a writer that hands out what is written to it by lines.
type told struct{ lines chan []byte }

func (t told) Write(b []byte) (int, error) {
	s := bufio.NewScanner(bytes.NewReader(b))
	for s.Scan() {
		t.lines <- bytes.Clone(s.Bytes())
	}
	return len(b), nil
}

// embed starts runEmbed on the router.
func (r *rig) embed(every time.Duration) (p *lab.Process, ask func() (embedded, error), err error) {
	run := r.run
	file := filepath.Join(r.dir, "embedded.yaml")
	text := fmt.Sprintf(weirConfig, run, r.snip, r.vip, r.server, "batched", filepath.Join(run, "admin.sock"), r.upVIP, r.taker, 1)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		return nil, nil, err
	}
	t := told{make(chan []byte, 64)}
	cmd := r.router.Command(r.self, "embed", "-config", file, "-gc", every.String())
	cmd.Stdout, cmd.Stderr = t, os.Stderr
	if p, err = r.router.Start(cmd); err != nil {
		return nil, nil, err
	}
	next := func() ([]byte, error) {
		select {
		case b := <-t.lines:
			return b, nil
		case <-p.Done():
			return nil, fmt.Errorf("the module ended: %w", p.Wait())
		case <-time.After(20 * time.Second):
			return nil, errors.New("the module says nothing")
		}
	}
	if _, err := next(); err != nil {
		return nil, nil, err
	}
	return p, func() (e embedded, err error) {
		if err := p.Signal(unix.SIGUSR1); err != nil {
			return e, err
		}
		b, err := next()
		if err != nil {
			return e, err
		}
		return e, json.Unmarshal(b, &e)
	}, nil
}

// collected is what one way of collecting gave, of all rounds.
type collected struct {
	name  string
	every time.Duration
	res   []loadResult
	// Objects for each packet beyond what the program allocates in the same
	// time without packets.
	objects []float64
	packets uint64
	cycles  uint64
	longest time.Duration
	seconds float64
}

func runGC(ctx context.Context, args []string, w io.Writer) (err error) {
	fs := flag.NewFlagSet("bench gc", flag.ContinueOnError)
	fs.SetOutput(w)
	rounds := fs.Int("rounds", 5, "how often each is measured")
	measure := fs.Duration("measure", 5*time.Second, "time of one measurement")
	rate := fs.Int("rate", 2000, "requests a second")
	realtime := fs.Bool("realtime", false, "as for the comparison")
	out := fs.String("out", "docs/bench", "directory of the report; empty: standard output alone")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if err := asRoot(" BENCH=gc"); err != nil {
		return err
	}
	if err := firstIf(*realtime); err != nil {
		return err
	}
	r, err := newRig("", "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	all := []*collected{{name: "never", every: -1}, {name: "left alone"}, {name: "forced every 100 ms", every: 100 * time.Millisecond}}
	for round := range *rounds {
		for i := range all {
			c := all[(i+round)%len(all)]
			if err := r.collect(ctx, c, *rate, *measure); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			s := c.res[len(c.res)-1]
			fmt.Fprintf(w, "round %d  %-20s p50 %8s  p99 %8s  p99.9 %8s  longest %8s  %.5f objects a packet\n", round+1, c.name,
				short(s.P50), short(s.P99), short(s.P999), short(s.Max), c.objects[len(c.objects)-1])
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "# The garbage collector\n\nMade by `make bench BENCH=gc`: %d rounds in turns, %s each, %d requests of 1 KB a second over 32 kept-alive connections, the module in a process of its own on the router. Medians, least and greatest in brackets.\n\n", *rounds, *measure, *rate)
	for _, m := range describe("") {
		fmt.Fprintf(&b, "- %s\n", m)
	}
	fmt.Fprint(&b, "\n| collector | p50 | p99 | p99.9 | longest | runs a second | longest stop of the world | packets | objects allocated for each packet |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")
	at := func(c *collected, f func(loadResult) time.Duration) spread {
		var vs []float64
		for _, s := range c.res {
			vs = append(vs, float64(f(s)))
		}
		return spreadOf(vs)
	}
	write := func(s spread) string {
		return fmt.Sprintf("%s (%s–%s)", short(time.Duration(s.median)), short(time.Duration(s.least)), short(time.Duration(s.most)))
	}
	p999 := func(s loadResult) time.Duration { return s.P999 }
	for _, c := range all {
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %.1f | %s | %d | %.6f |\n", c.name,
			write(at(c, func(s loadResult) time.Duration { return s.P50 })), write(at(c, func(s loadResult) time.Duration { return s.P99 })),
			write(at(c, p999)), write(at(c, func(s loadResult) time.Duration { return s.Max })),
			float64(c.cycles)/c.seconds, short(c.longest), c.packets, spreadOf(c.objects).median)
	}
	never, alone, forced := at(all[0], p999).median, at(all[1], p999).median, at(all[2], p999).median
	fmt.Fprintf(&b, "\nWhat the forced collector adds to p99.9: %s beside one that never runs, %s beside one that is left alone. (Meant to be: at most 1 ms.)\n",
		signed(forced-never), signed(forced-alone))
	if _, err := io.WriteString(w, "\n"+b.String()); err != nil || *out == "" {
		return err
	}
	path := filepath.Join(*out, "gc.md")
	if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
		return err
	}
	return sameOwner(path, filepath.Dir(*out))
}

func signed(ns float64) string {
	if ns < 0 {
		return "−" + short(time.Duration(-ns))
	}
	return short(time.Duration(ns))
}

// collect measures one way of collecting once.
func (r *rig) collect(ctx context.Context, c *collected, rate int, measure time.Duration) error {
	p, ask, err := r.embed(c.every)
	if err != nil {
		return err
	}
	defer func() {
		_ = p.Signal(syscall.SIGTERM)
		select {
		case <-p.Done():
		case <-time.After(5 * time.Second):
			_ = p.Kill()
		}
	}()
	job := loadJob{Target: r.vip, Sources: r.sources, Paths: []string{"/1024.bin"}, Connections: 32, Rate: rate, Warm: time.Second, Measure: measure}
	if _, err := r.client.Run(ctx, r.self, loadJob{Target: r.vip, Sources: r.sources, Paths: job.Paths, Connections: 32, Measure: time.Second}.args()...); err != nil {
		return err
	}
	// To ask takes objects too: as many as between two questions in a row.
	var at [5]embedded
	for _, i := range []int{4, 2} {
		if at[i], err = ask(); err != nil {
			return err
		}
	}
	b, err := r.client.Run(ctx, r.self, job.args()...)
	if err != nil {
		return err
	}
	if at[3], err = ask(); err != nil {
		return err
	}
	// What it allocates without packets is not theirs.
	at[0] = at[3]
	time.Sleep(measure / 2)
	if at[1], err = ask(); err != nil {
		return err
	}
	var res loadResult
	if err := json.Unmarshal(b, &res); err != nil {
		return err
	}
	if res.Errors > 0 {
		return fmt.Errorf("%d errors: %s", res.Errors, res.Error)
	}
	c.res = append(c.res, res)
	asking := float64(at[2].Mallocs - at[4].Mallocs)
	quiet := (float64(at[1].Mallocs-at[0].Mallocs) - asking) / (at[1].At - at[0].At).Seconds()
	took := (at[3].At - at[2].At).Seconds()
	n := at[3].Packets - at[2].Packets
	c.objects = append(c.objects, (float64(at[3].Mallocs-at[2].Mallocs)-asking-quiet*took)/float64(max(n, 1)))
	c.packets += n
	c.cycles += at[3].Cycles - at[2].Cycles
	c.seconds += took
	c.longest = max(c.longest, at[3].Longest)
	return nil
}
