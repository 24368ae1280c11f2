// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
)

// sample is one measurement.
type sample struct {
	loadResult
	round               int
	contender, workload string
	bulk                bool
	flooded             float64       // packets a second of a flood beside it
	serverCPU           time.Duration // for each request
	routerCPU           time.Duration // of the contender's process, for each request
	packets             float64       // at the server, for each request
	opened              int           // server connections
	memory              float64       // of the contender's process, for each client, bytes
}

// speed is what is compared: requests or, in bulk, bytes for each second.
func (s sample) speed() float64 {
	if s.Elapsed <= 0 {
		return 0
	}
	n := s.Requests
	if s.bulk {
		n = s.Bytes
	}
	return float64(n) / s.Elapsed.Seconds()
}

// pooled are the requests and the server connections of several measurements,
// warm-ups included.
func pooled(ss []sample) (requests uint64, opened int) {
	for _, s := range ss {
		requests += s.AllRequests
		opened += s.opened
	}
	return requests, opened
}

// reused is the share of requests that needed no new server connection.
func reused(requests uint64, opened int) float64 {
	if requests == 0 {
		return 0
	}
	return max(1-float64(opened)/float64(requests), 0)
}

func (s sample) String() string {
	t := fmt.Sprintf("%10s  p50 %8s  p99 %8s  p99.9 %8s  server %8s  router %8s  packets %6.1f  opened %d",
		unit(s.speed(), s.bulk), short(s.P50), short(s.P99), short(s.P999), short(s.serverCPU), short(s.routerCPU), s.packets, s.opened)
	if s.memory != 0 {
		t += fmt.Sprintf("  %.0f bytes a client", s.memory)
	}
	if s.Errors > 0 {
		t += fmt.Sprintf("  %d ERRORS: %s", s.Errors, s.Error)
	}
	return t
}

func unit(v float64, bulk bool) string {
	switch {
	case bulk:
		return fmt.Sprintf("%.2f GB/s", v/1e9)
	case v >= 1000:
		return fmt.Sprintf("%.1f k/s", v/1000)
	}
	return fmt.Sprintf("%.0f /s", v)
}

// short writes a duration with three digits.
func short(d time.Duration) string {
	switch {
	case d == 0:
		return "–"
	case d >= time.Second:
		return fmt.Sprintf("%.2f s", d.Seconds())
	case d >= time.Millisecond:
		return fmt.Sprintf("%.3g ms", float64(d)/1e6)
	}
	return fmt.Sprintf("%.3g µs", float64(d)/1e3)
}

// report collects the samples of a run.
type report struct {
	machine    []string
	options    options
	contenders []contender
	workloads  []workload
	samples    []sample
	begun      time.Time
	took       time.Duration
}

// of returns the samples of one contender and workload, by round.
func (r *report) of(c, l string) []sample {
	var out []sample
	for _, s := range r.samples {
		if s.contender == c && s.workload == l {
			out = append(out, s)
		}
	}
	return out
}

// spread is a median with the least and the greatest value.
type spread struct{ least, median, most float64 }

func spreadOf(vs []float64) spread {
	if len(vs) == 0 {
		return spread{}
	}
	vs = slices.Sorted(slices.Values(vs))
	m := vs[len(vs)/2]
	if len(vs)%2 == 0 {
		m = (m + vs[len(vs)/2-1]) / 2
	}
	return spread{vs[0], m, vs[len(vs)-1]}
}

func each(ss []sample, f func(sample) float64) spread {
	var vs []float64
	for _, s := range ss {
		vs = append(vs, f(s))
	}
	return spreadOf(vs)
}

// ratio compares round by round: what slowed the machine down for a while
// meets both.
func ratio(a, b []sample, f func(sample) float64) spread {
	var vs []float64
	for _, x := range a {
		for _, y := range b {
			if x.round == y.round && f(y) > 0 {
				vs = append(vs, f(x)/f(y))
			}
		}
	}
	return spreadOf(vs)
}

func (s spread) ratio() string {
	if s.median == 0 {
		return "–"
	}
	return fmt.Sprintf("%.2f (%.2f–%.2f)", s.median, s.least, s.most)
}

// markdown writes the report for people.
func (r *report) markdown(w io.Writer) error {
	b := bufio.NewWriter(w)
	fmt.Fprintf(b, "# Comparison of %s\n\n", r.begun.UTC().Format("2006-01-02"))
	fmt.Fprintf(b, "Made by `make bench` in %.0f s: %d rounds, %v for each measurement. A figure is the median of the rounds, with the least and the greatest in brackets; a ratio is taken round by round. Only ratios say something about another machine.\n\n",
		r.took.Seconds(), r.options.rounds, r.options.measure)
	if r.options.realtime {
		fmt.Fprintf(b, "Everything that is measured ran with real-time priority, because others used the machine at the same time.\n\n")
	}
	for _, m := range r.machine {
		fmt.Fprintf(b, "- %s\n", m)
	}
	fmt.Fprintf(b, `
Client, router and server are network namespaces joined by virtual links; one nginx process is the server (uploads have one that takes them away uncopied), one thread the load generator, and all share the machine's processors. *Direct* is plain routing. *Server* and *router* are the processor time, user and system, of the server's process and of the contender's for each request (in bulk: for each 100 MB); the kernel's work in interrupts is in neither. HAProxy and nginx have settings that help bulk transfers more (*haproxy-splice* and *nginx-large* of the full run), *weir-mortal* has no flow store, *weir-2* two shards, *weir-plain* reads and answers one packet at a time. *bare-queue* and *bare-tc* translate addresses, ports and numbers and do nothing else, through the same queue and by a program at the interfaces (their connections end at the server, one for each of a client's): what either way leaves to a program that does more. *Packets* is what the server sees for each request, both ways, and *opened* its connections, those of the warm-up included. *Reuse* is the share of the requests of all rounds that needed no new server connection. Where requests have a rate, their time counts from when they were due.
`)
	if err := r.targets(b); err != nil {
		return err
	}
	fmt.Fprintf(b, "\n![speed](%[1]s-speed.svg)\n\n![latency](%[1]s-latency.svg)\n\n![processor time](%[1]s-cpu.svg)\n", r.name())
	for _, l := range r.workloads {
		r.workload(b, l)
	}
	return b.Flush()
}

// workload writes the table of one workload.
func (r *report) workload(b *bufio.Writer, l workload) {
	fmt.Fprintf(b, "\n## %s: %s\n\n", l.name, l.what)
	fmt.Fprint(b, "| | speed | of direct | of haproxy | of nginx | p50 | p99 | p99.9 | server | router | packets | opened | reuse | errors |")
	line := "\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
	if l.fresh {
		fmt.Fprint(b, " bytes a client |")
		line += " --- |"
	}
	fmt.Fprintln(b, line)
	direct, haproxy, nginx := r.of("direct", l.name), r.of("haproxy", l.name), r.of("nginx", l.name)
	for _, c := range r.contenders {
		ss := r.of(c.name, l.name)
		if len(ss) == 0 {
			continue
		}
		speed := each(ss, sample.speed)
		duration := func(f func(sample) time.Duration) string {
			return short(time.Duration(each(ss, func(s sample) float64 { return float64(f(s)) }).median))
		}
		reuse := "–"
		if !l.bulk {
			requests, opened := pooled(ss)
			reuse = fmt.Sprintf("%.2f %%", 100*reused(requests, opened))
		}
		fmt.Fprintf(b, "| %s | %s (%s–%s) | %s | %s | %s | %s | %s | %s | %s | %s | %.1f | %.0f | %s | %.0f |", c.name,
			unit(speed.median, l.bulk), unitless(speed.least, l.bulk), unitless(speed.most, l.bulk),
			ratio(ss, direct, sample.speed).ratio(), ratio(ss, haproxy, sample.speed).ratio(), ratio(ss, nginx, sample.speed).ratio(),
			duration(func(s sample) time.Duration { return s.P50 }), duration(func(s sample) time.Duration { return s.P99 }),
			duration(func(s sample) time.Duration { return s.P999 }),
			duration(func(s sample) time.Duration { return s.serverCPU }), duration(func(s sample) time.Duration { return s.routerCPU }),
			each(ss, func(s sample) float64 { return s.packets }).median,
			each(ss, func(s sample) float64 { return float64(s.opened) }).median, reuse,
			each(ss, func(s sample) float64 { return float64(s.Errors) }).most)
		if l.fresh {
			fmt.Fprintf(b, " %.0f |", each(ss, func(s sample) float64 { return s.memory }).median)
		}
		fmt.Fprintln(b)
	}
	if l.flood != "" {
		r.floodTable(b, l)
	}
}

func unitless(v float64, bulk bool) string {
	f := strings.Fields(unit(v, bulk))
	return f[0]
}

// table writes all samples for programs.
func (r *report) table(w io.Writer) error {
	c := csv.NewWriter(w)
	_ = c.Write([]string{
		"round", "workload", "contender", "requests", "bytes", "errors", "seconds", "requests_per_second", "bytes_per_second",
		"p50_us", "p99_us", "p999_us", "max_us", "server_cpu_us_per_request", "router_cpu_us_per_request", "server_packets_per_request", "server_connections_opened", "all_requests", "flood_packets_per_second", "bytes_per_client",
	})
	us := func(d time.Duration) string { return strconv.FormatFloat(float64(d)/1e3, 'f', 3, 64) }
	f := func(v float64) string { return strconv.FormatFloat(v, 'f', 3, 64) }
	for _, s := range r.samples {
		sec := s.Elapsed.Seconds()
		_ = c.Write([]string{
			strconv.Itoa(s.round + 1), s.workload, s.contender, strconv.FormatUint(s.Requests, 10), strconv.FormatUint(s.Bytes, 10),
			strconv.FormatUint(s.Errors, 10), f(sec), f(float64(s.Requests) / sec), f(float64(s.Bytes) / sec), us(s.P50), us(s.P99), us(s.P999), us(s.Max),
			us(s.serverCPU), us(s.routerCPU), f(s.packets), strconv.Itoa(s.opened), strconv.FormatUint(s.AllRequests, 10), f(s.flooded), f(s.memory),
		})
	}
	c.Flush()
	return c.Error()
}

// name is what the files of this kind of run are called.
func (r *report) name() string {
	switch {
	case r.options.contenders != "" || r.options.workloads != "":
		return "part"
	case r.options.full:
		return "full"
	}
	return "quick"
}

// write puts all forms into a directory.
func (r *report) write(dir string) error {
	if dir == "" {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	name := r.name()
	forms := map[string]func(io.Writer) error{
		".md": r.markdown, ".csv": r.table, "-speed.svg": r.plotSpeed, "-latency.svg": r.plotLatency, "-cpu.svg": r.plotCPU,
	}
	for suffix, f := range forms {
		var b bytes.Buffer
		if err := f(&b); err != nil {
			return err
		}
		path := filepath.Join(dir, name+suffix)
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			return err
		}
		if err := sameOwner(path, filepath.Dir(dir)); err != nil {
			return err
		}
	}
	return nil
}

// sameOwner gives a file, and the directory that it is in, to whom a directory
// belongs: this runs as root, and the tree is somebody's.
func sameOwner(path, dir string) error {
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return nil
	}
	return errors.Join(os.Chown(path, int(sys.Uid), int(sys.Gid)), os.Chown(filepath.Dir(path), int(sys.Uid), int(sys.Gid)))
}

// describe says what machine and which programs these figures belong to;
// congestion is the congestion control that was chosen, "" for the machine's.
func describe(congestion string) []string {
	if b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control"); congestion == "" && err == nil {
		congestion = strings.TrimSpace(string(b))
	}
	cpu := "unknown processor"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				cpu = strings.TrimSpace(v)
				break
			}
		}
	}
	var info unix.Sysinfo_t
	memory := ""
	if unix.Sysinfo(&info) == nil {
		memory = fmt.Sprintf(", %.0f GiB of memory", float64(info.Totalram)*float64(info.Unit)/(1<<30))
	}
	var uts unix.Utsname
	kernel := ""
	if unix.Uname(&uts) == nil {
		kernel = unix.ByteSliceToString(uts.Sysname[:]) + " " + unix.ByteSliceToString(uts.Release[:])
	}
	load := ""
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		if f := strings.Fields(string(b)); len(f) > 0 {
			load = "load average before: " + f[0]
		}
	}
	versions := []string{runtime.Version()}
	for _, p := range [][]string{{"haproxy", "-v"}, {"nginx", "-v"}} {
		bin, err := lab.FindTool(p[0])
		if err != nil {
			continue
		}
		out, err := exec.Command(bin, p[1:]...).CombinedOutput()
		if err != nil {
			continue
		}
		first, _, _ := strings.Cut(string(out), "\n")
		first, _, _ = strings.Cut(first, " - ")
		versions = append(versions, strings.TrimSpace(first))
	}
	return []string{
		fmt.Sprintf("%s, %d processors%s", cpu, runtime.NumCPU(), memory),
		kernel + "; " + strings.Join(versions, "; ") + "; " + load,
		"TCP congestion control: " + congestion,
	}
}
