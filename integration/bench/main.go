// SPDX-License-Identifier: Apache-2.0

// Command bench compares Weir with what people use in its place, on this
// machine and in one run: the same servers and the same load generator with
// nothing in between (plain routing), with HAProxy, with nginx, and with Weir
// through each of its queue backends.
//
// Other programs in it, by the first argument: loss (downloads over a bad
// link), scale (a million connections in the table), start (a thousand farms),
// gc (what the collector does to requests).
//
// It builds its network out of namespaces, as the tests do, and leaves
// nothing but its report. It judges nothing: what counts are ratios between
// contenders of one run, because the figures themselves are the machine's. It
// must not be run as a test: what it measures depends on what else runs here.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	args := os.Args[1:]
	program := run
	if len(args) > 0 {
		if p, ok := programs[args[0]]; ok {
			program, args = p, args[1:]
		}
	}
	err := program(ctx, args, os.Stdout)
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// programs are what the first argument may name, the comparison left aside.
var programs = map[string]func(ctx context.Context, args []string, w io.Writer) error{
	"load":  func(_ context.Context, args []string, w io.Writer) error { return runLoad(args, w) },
	"sink":  func(_ context.Context, args []string, w io.Writer) error { return runSink(args, w) },
	"bare":  runBare,
	"loss":  runLoss,
	"scale": runScale,
	"flame": runFlame,
	"start": runStart,
	"embed": runEmbed,
	"gc":    runGC,
}

// options are the command line.
type options struct {
	full       bool
	realtime   bool
	rounds     int
	measure    time.Duration
	weir       string
	out        string
	contenders string
	workloads  string
	congestion string
}

func run(ctx context.Context, args []string, w io.Writer) error {
	var o options
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(w)
	fs.BoolVar(&o.full, "full", false, "all workloads, a quarter of an hour; the default is a quick run of less than three minutes")
	fs.BoolVar(&o.realtime, "realtime", false, "run everything that is measured before all else on this machine, for one that others use too")
	fs.IntVar(&o.rounds, "rounds", 0, "how often everything is measured; 0: 5, in a full run 3")
	fs.DurationVar(&o.measure, "measure", 0, "time of one measurement; 0: 900ms, in a full run 1s")
	fs.StringVar(&o.weir, "weir", "bin/weir", "the weir executable")
	fs.StringVar(&o.out, "out", "docs/bench", "directory of the report; empty: standard output alone")
	fs.StringVar(&o.contenders, "contenders", "", "comma-separated names, of: "+strings.Join(names(contenders), ", "))
	fs.StringVar(&o.workloads, "workloads", "", "comma-separated names, of: "+strings.Join(names(workloads), ", "))
	fs.StringVar(&o.congestion, "congestion", "", "TCP congestion control of all hosts, one of net.ipv4.tcp_allowed_congestion_control; empty: the machine's own")
	if err := fs.Parse(args); err != nil {
		return err
	}
	rounds, measure := 5, 900*time.Millisecond
	if o.full {
		rounds, measure = 3, time.Second
	}
	o.rounds, o.measure = cmp.Or(o.rounds, rounds), cmp.Or(o.measure, measure)
	if fs.NArg() > 0 || o.rounds < 1 {
		fs.Usage()
		return flag.ErrHelp
	}
	if err := asRoot(""); err != nil {
		return err
	}
	var err error
	if o.weir, err = filepath.Abs(o.weir); err != nil {
		return err
	}
	if _, err := os.Stat(o.weir); err != nil {
		return fmt.Errorf("the weir executable: %w (make build makes it)", err)
	}
	who, err := choose(contenders, o.contenders, func(c contender) bool { return o.full || !c.full })
	if err != nil {
		return err
	}
	what, err := choose(workloads, o.workloads, func(l workload) bool { return o.full || l.quick })
	if err != nil {
		return err
	}
	// Ten thousand clients have as many sockets, and a proxy twice as many.
	if err := openFiles(); err != nil {
		return err
	}
	if o.realtime {
		if err := first(); err != nil {
			return fmt.Errorf("real-time priority: %w", err)
		}
	}
	b, err := newRig(o.weir, o.congestion)
	if err != nil {
		return err
	}
	defer b.Close()
	who = slices.DeleteFunc(who, func(c contender) bool {
		why := c.missing()
		if why != nil {
			fmt.Fprintf(w, "%s is left out: %v\n", c.name, why)
		}
		return why != nil
	})
	rep := &report{machine: describe(o.congestion), options: o, contenders: who, workloads: what, begun: time.Now()}
	for round := range o.rounds {
		// Each round begins with another contender, so that what changes on
		// the machine meanwhile meets all of them.
		for i := range who {
			c := who[(i+round)%len(who)]
			if err := b.visit(ctx, w, rep, round, c, what, o.measure); err != nil {
				return fmt.Errorf("round %d, %s: %w", round+1, c.name, err)
			}
		}
	}
	rep.took = time.Since(rep.begun)
	if err := b.Close(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	if err := rep.markdown(w); err != nil {
		return err
	}
	return rep.write(o.out)
}

// files is how many files each of the programs must be able to open.
const files = 16_000

func openFiles() error {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return err
	}
	l.Cur, l.Max = max(l.Cur, files), max(l.Max, files)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("room for %d open files: %w (ulimit -Hn says how many there may be)", files, err)
	}
	return nil
}

// asRoot refuses everybody else; args is what stands behind make bench.
func asRoot(args string) error {
	if os.Geteuid() == 0 {
		return nil
	}
	return errors.New("it makes network namespaces, and needs root for that: sudo make bench" + args)
}

// firstIf is first where it is wanted.
func firstIf(wanted bool) error {
	if !wanted {
		return nil
	}
	return first()
}

// first gives this program, and so all that it starts, real-time priority: it
// begins anew, because a thread can only speak for itself.
func first() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	now, err := unix.SchedGetAttr(0, 0)
	if err != nil || now.Policy == unix.SCHED_RR {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Policy: unix.SCHED_RR, Priority: 1}, 0); err != nil {
		return err
	}
	return unix.Exec(self, os.Args, os.Environ())
}

// named is what the command line chooses by name.
type named interface{ title() string }

func names[T named](all []T) []string {
	var ns []string
	for _, x := range all {
		ns = append(ns, x.title())
	}
	return ns
}

// choose returns those of a list that the command line names, or those that
// are there by default.
func choose[T named](all []T, list string, byDefault func(T) bool) ([]T, error) {
	if list == "" {
		return slices.DeleteFunc(slices.Clone(all), func(x T) bool { return byDefault != nil && !byDefault(x) }), nil
	}
	var chosen []T
	for name := range strings.SplitSeq(list, ",") {
		i := slices.IndexFunc(all, func(x T) bool { return x.title() == name })
		if i < 0 {
			return nil, fmt.Errorf("%q: there are %s", name, strings.Join(names(all), ", "))
		}
		chosen = append(chosen, all[i])
	}
	return chosen, nil
}
