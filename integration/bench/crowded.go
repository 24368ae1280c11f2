// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/module/control"
)

// This file measures the real executable through the real kernel with a
// thousand connections in its table, and with a million: two networks side by
// side, the same configuration on both routers, and load on one and the other
// in turns.

// crowdedConfig has room for a million clients, who may be idle for as long as
// this takes. All else is as for the comparison.
const crowdedConfig = `runtime_dir: %[1]q
source: {addresses: [%[2]s]}
farms:
  - name: web
    listen: %[3]s
    servers: [{name: s1, address: "%[4]s"}]
    pool: {max_connections: 0, max_idle: 512, idle_timeout: 1h}
    timeouts: {idle: 1h}
queue: {shards: 1, clients: 1048576}
admin: {socket: %[5]q, metrics: "127.0.0.1:9464"}
stop_timeout: 0s
`

// speaker is a kind of load: who of those in the table speaks.
type speaker struct{ name, what string }

func (s speaker) title() string { return s.name }

var speakers = []speaker{
	{"kept", "32 more, with sockets"},
	{"few", "a thousand of them, at random"},
	{"all", "all of them, at random"},
}

// fewSpeak is how many of those in the table speak in the load "few".
const fewSpeak = 1000

// crowdedRig is a rig with connections in weir's table.
type crowdedRig struct {
	*rig
	weir   *lab.Weir
	swarm  *swarm
	took   time.Duration // to open them
	memory int64         // of the process then, bytes, resident
	atEnd  int64         // behind all loads
	few    []int         // the thousand who speak
	rnd    *rand.Rand
}

// crowdedSample is what one load gave on one router.
type crowdedSample struct {
	speed   float64 // requests a second
	packet  float64 // processor time of weir for each queued packet, nanoseconds
	packets float64 // queued, for each request
	busy    float64 // share of one processor that weir had
}

// crowded measures and writes its part of the report.
func crowded(ctx context.Context, bin string, sizes [2]int, who []speaker, rounds int, measure time.Duration, w io.Writer, text *strings.Builder) (err error) {
	began := time.Now()
	var rs [2]*crowdedRig
	defer func() {
		for _, r := range rs {
			if r != nil {
				err = errors.Join(err, r.Close())
			}
		}
	}()
	for k, n := range sizes {
		if rs[k], err = newCrowdedRig(ctx, bin, n); err != nil {
			return fmt.Errorf("%d connections: %w", n, err)
		}
		fmt.Fprintf(w, "%d connections opened in %s, %d MiB\n", n, short(rs[k].took), rs[k].memory>>20)
	}
	samples := map[string][2][]crowdedSample{}
	for round := range rounds {
		for _, sp := range who {
			both := samples[sp.name]
			for k := range rs {
				k = (k + round) % 2 // each round begins with the other one
				s, err := rs[k].load(ctx, sp.name, measure)
				if err != nil {
					return fmt.Errorf("%d connections, %s: %w", sizes[k], sp.name, err)
				}
				both[k] = append(both[k], s)
				fmt.Fprintf(w, "round %d  %8d connections  %-5s %8.0f requests/s  %6.2f µs a packet  %.2f packets a request  busy %3.0f %%\n",
					round+1, sizes[k], sp.name, s.speed, s.packet/1000, s.packets, 100*s.busy)
			}
			samples[sp.name] = both
		}
	}
	for k, r := range rs {
		if err := r.check(ctx); err != nil {
			return fmt.Errorf("%d connections: %w", sizes[k], err)
		}
	}
	fmt.Fprintf(text, `
## Through the kernel

The executable itself in a router's network namespace, between clients and a server (nginx) in theirs; all connections are made by packets through the kernel, each with its handshake and a first exchange. Two such networks with the same configuration, a thousand connections in one weir's table and a million in the other's, and load on one and the other in turns: %d rounds, %s for each measurement, %.0f s in all. A request is of 1 KB, and *32 more, with sockets* are kept-alive connections of an ordinary client beside those in the table; the others are those in the table themselves, by packets without sockets, 64 requests at once. *Router* is the processor time of weir's process, kernel included, for each packet of its queues, and *busy* how much of one processor it had: where that is not near 100 %%, the speed is also that of client and server. Medians, least and greatest in brackets; ratios round by round.

| connections in the table | opened in | memory of the process | for each | after all loads | repeated requests |
| --- | --- | --- | --- | --- | --- |
`, rounds, measure, time.Since(began).Seconds())
	for k, r := range rs {
		fmt.Fprintf(text, "| %d | %s | %.0f MiB | %.0f bytes | %.0f MiB | %d of %d |\n", sizes[k], short(r.took), float64(r.memory)/(1<<20),
			float64(r.memory)/float64(sizes[k]), float64(r.atEnd)/(1<<20), r.swarm.repeats, r.swarm.done)
	}
	fmt.Fprintf(text, "\n| who speaks | requests/s, %[1]d in the table | %[2]d | ratio | router, %[1]d | %[2]d | ratio | packets a request | busy |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
		sizes[0], sizes[1])
	worst := [2]float64{2, 0}
	for _, sp := range who {
		both := samples[sp.name]
		of := func(k int, f func(crowdedSample) float64) spread { return spreadOf(collect(both[k], f)) }
		speed := func(s crowdedSample) float64 { return s.speed }
		packet := func(s crowdedSample) float64 { return s.packet / 1000 }
		rate, cost := roundByRound(both, speed), roundByRound(both, packet)
		worst[0], worst[1] = min(worst[0], rate.median), max(worst[1], cost.median)
		fmt.Fprintf(text, "| %s | %.0f | %.0f | %s | %.2f µs | %.2f µs | %s | %.2f | %.0f %%, %.0f %% |\n", sp.what,
			of(0, speed).median, of(1, speed).median, rate.ratio(), of(0, packet).median, of(1, packet).median, cost.ratio(),
			of(1, func(s crowdedSample) float64 { return s.packets }).median,
			100*of(0, func(s crowdedSample) float64 { return s.busy }).median, 100*of(1, func(s crowdedSample) float64 { return s.busy }).median)
	}
	fmt.Fprintf(text, "\nMeant to be: a million in at most 512 MiB (%s), speed at least 0.90 of that with a thousand (%s), router at most 1.10 (%s).\n",
		reached(rs[1].atEnd <= 512<<20), reached(worst[0] >= 0.9), reached(worst[1] <= 1.1))
	return nil
}

func reached(ok bool) string {
	if ok {
		return "reached"
	}
	return "**missed**"
}

func collect(ss []crowdedSample, f func(crowdedSample) float64) (vs []float64) {
	for _, s := range ss {
		vs = append(vs, f(s))
	}
	return vs
}

// roundByRound is the ratio of the larger table to the smaller one.
func roundByRound(both [2][]crowdedSample, f func(crowdedSample) float64) spread {
	var vs []float64
	for i := range min(len(both[0]), len(both[1])) {
		vs = append(vs, f(both[1][i])/f(both[0][i]))
	}
	return spreadOf(vs)
}

// newCrowdedRig makes a network and opens n connections through it.
func newCrowdedRig(ctx context.Context, bin string, n int) (r *crowdedRig, err error) {
	r = &crowdedRig{rnd: rand.New(rand.NewPCG(1, uint64(n)))}
	if r.rig, err = newRig(bin, ""); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	socket := filepath.Join(r.run, "admin.sock")
	start, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if r.weir, err = lab.StartWeir(start, r.router, lab.WeirOptions{
		Binary: bin, Dir: r.dir, Socket: socket, Config: fmt.Sprintf(crowdedConfig, r.run, r.snip, r.vip, r.server, socket),
	}); err != nil {
		return nil, err
	}
	if r.swarm, err = newSwarm(r.rig, n); err != nil {
		return nil, err
	}
	began := time.Now()
	if err := r.swarm.open(ctx); err != nil {
		return nil, err
	}
	r.took = time.Since(began)
	for range min(fewSpeak, n) {
		r.few = append(r.few, r.rnd.IntN(n))
	}
	if err := r.check(ctx); err != nil {
		return nil, err
	}
	r.memory = r.atEnd
	return r, nil
}

// check looks whether all connections are there, and at the memory.
func (r *crowdedRig) check(ctx context.Context) error {
	st, err := r.weir.Status(ctx)
	if err != nil {
		return err
	}
	var v control.Status
	if err := json.Unmarshal(st, &v); err != nil {
		return err
	}
	n := 0
	for _, f := range v.Farms {
		n += f.Clients
	}
	if n < len(r.swarm.clients) {
		return fmt.Errorf("weir has %d connections of %d", n, len(r.swarm.clients))
	}
	r.atEnd, err = resident(r.weir.Proc.Pid())
	return err
}

// Close ends all.
func (r *crowdedRig) Close() error {
	if r.swarm != nil {
		r.swarm.close()
	}
	if r.weir != nil {
		_ = r.weir.Proc.Signal(syscall.SIGTERM)
		select {
		case <-r.weir.Proc.Done():
		case <-time.After(5 * time.Second):
			_ = r.weir.Proc.Kill()
		}
	}
	return r.rig.Close()
}

// load measures one kind of load.
func (r *crowdedRig) load(ctx context.Context, kind string, measure time.Duration) (s crowdedSample, err error) {
	drive := func(d time.Duration) (int, float64, error) { return r.speak(ctx, kind == "few", d) }
	if kind == "kept" {
		drive = func(d time.Duration) (int, float64, error) { return r.ask(ctx, d) }
	}
	if _, _, err := drive(warmUp); err != nil {
		return s, err
	}
	packets, cpu, began := uint64(0), time.Duration(0), time.Now()
	read := func() (err error) {
		was, had := packets, cpu
		if packets, err = r.passed(); err != nil {
			return err
		}
		cpu, err = r.weir.Proc.CPU()
		packets, cpu = packets-was, cpu-had
		return err
	}
	if err := read(); err != nil {
		return s, err
	}
	n, speed, err := drive(measure)
	if err != nil {
		return s, err
	}
	if err := read(); err != nil {
		return s, err
	}
	return crowdedSample{
		speed: speed, packet: float64(cpu.Nanoseconds()) / float64(max(packets, 1)), packets: float64(packets) / float64(max(n, 1)),
		busy: cpu.Seconds() / time.Since(began).Seconds(),
	}, nil
}

// ask is the load of clients with sockets. It returns how many requests were
// answered, and how many in a second once all had their connections.
func (r *crowdedRig) ask(ctx context.Context, d time.Duration) (n int, speed float64, err error) {
	job := loadJob{Target: r.vip, Sources: r.sources, Paths: []string{fmt.Sprintf("/%d.bin", kilo)}, Connections: 32, Measure: d}
	ctx, cancel := context.WithTimeout(ctx, settle+d+10*time.Second)
	defer cancel()
	b, err := r.client.Run(ctx, r.self, job.args()...)
	if err != nil {
		return 0, 0, err
	}
	var res loadResult
	if err := json.Unmarshal(b, &res); err != nil {
		return 0, 0, fmt.Errorf("load generator: %q: %w", b, err)
	}
	if res.Errors > 0 {
		return 0, 0, fmt.Errorf("load generator: %d errors: %s", res.Errors, res.Error)
	}
	return int(res.AllRequests), sample{loadResult: res}.speed(), nil
}

// speak is the load of those in the table.
func (r *crowdedRig) speak(ctx context.Context, few bool, d time.Duration) (n int, speed float64, err error) {
	const atOnce = 64
	sw := r.swarm
	before, began := sw.done, time.Now()
	turns, over := 0, false
	err = sw.run(ctx, atOnce, func() (int, bool) {
		// The clock is read seldom.
		if turns++; turns%32 == 0 {
			over = over || time.Since(began) > d
		}
		if over {
			return 0, false
		}
		for {
			i := r.rnd.IntN(len(sw.clients))
			if few {
				i = r.few[r.rnd.IntN(len(r.few))]
			}
			if sw.clients[i].slot == 0 {
				return i, true
			}
		}
	})
	n = int(sw.done - before)
	return n, float64(n) / time.Since(began).Seconds(), err
}

// passed is how many packets the kernel has given to the router's queues.
func (r *crowdedRig) passed() (n uint64, err error) {
	err = r.router.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/netfilter/nfnetlink_queue")
		n = sumQueued(b)
		return err
	})
	return n, err
}
