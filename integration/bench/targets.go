// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
)

// target is a ratio of one run that Weir is meant to reach.
type target struct {
	what     string
	bound    string
	workload string
	// figure is the median of the rounds, and whether it is within the bound;
	// ok is false where the run did not measure it.
	figure func(r *report, weir []sample) (text string, within, ok bool)
}

// against compares Weir's figure with another contender's, round by round.
func against(who string, f func(sample) float64, within func(ratio float64) bool) func(*report, []sample) (string, bool, bool) {
	return func(r *report, weir []sample) (string, bool, bool) {
		s := ratio(weir, r.of(who, weir[0].workload), f)
		return s.ratio(), within(s.median), s.median > 0
	}
}

func atLeast(v float64) func(float64) bool { return func(r float64) bool { return r >= v } }
func atMost(v float64) func(float64) bool  { return func(r float64) bool { return r <= v } }

func p50(s sample) float64    { return float64(s.P50) }
func server(s sample) float64 { return float64(s.serverCPU) }
func router(s sample) float64 { return float64(s.routerCPU) }

var targets = []target{
	{"kept-alive, speed", "≥ 0.85 × haproxy, goal 1.0", "kept-1k", against("haproxy", sample.speed, atLeast(0.85))},
	{"one connection for each request, speed", "≥ 0.6 × haproxy, goal 1.0", "one-shot", against("haproxy", sample.speed, atLeast(0.6))},
	{"bulk, speed", "≥ 3.5 × haproxy, goal 4", "bulk", against("haproxy", sample.speed, atLeast(3.5))},
	{"bulk, speed", "≥ 2 × nginx", "bulk", against("nginx", sample.speed, atLeast(2))},
	{"median latency, one connection", "≤ 1.15 × haproxy", "latency", against("haproxy", p50, atMost(1.15))},
	{"latency added to direct, one connection", "≤ 1.15 × haproxy", "latency", added},
	{"server's processor time, one connection for each request", "≤ 0.5 × direct", "one-shot", against("direct", server, atMost(0.5))},
	{"packets at the server, one connection for each request", "≤ 4", "one-shot", func(_ *report, weir []sample) (string, bool, bool) {
		s := each(weir, func(s sample) float64 { return s.packets })
		return fmt.Sprintf("%.2f (%.2f–%.2f)", s.median, s.least, s.most), s.median <= 4, true
	}},
	{"requests over a server connection that was there, of all workloads with up to 32 clients at once", "≥ 99.9 % of 100,000", "one-shot", reuse},
	{"kept-alive, speed with a flow store", "≥ 0.97 × without", "kept-1k", against("weir-mortal", sample.speed, atLeast(0.97))},
	{"one connection for each request, speed with a flow store", "≥ 0.97 × without", "one-shot", against("weir-mortal", sample.speed, atLeast(0.97))},
	{"bulk, speed with a flow store", "≥ 0.97 × without", "bulk", against("weir-mortal", sample.speed, atLeast(0.97))},
	{"kept-alive, router's processor time with a flow store", "≤ 1.03 × without", "kept-1k", against("weir-mortal", router, atMost(1.03))},
	{"one connection for each request, router's processor time with a flow store", "≤ 1.03 × without", "one-shot", against("weir-mortal", router, atMost(1.03))},
}

// reuse pools what needs no more server connections than clients at once.
func reuse(r *report, _ []sample) (string, bool, bool) {
	var requests uint64
	opened := 0
	for _, l := range r.workloads {
		if !l.bulk && l.connections <= 32 {
			n, c := pooled(r.of("weir", l.name))
			requests, opened = requests+n, opened+c
		}
	}
	share := reused(requests, opened)
	return fmt.Sprintf("%.3f %% of %d (%d opened)", 100*share, requests, opened), share >= 0.999 && requests >= 100_000, true
}

// added compares what Weir adds to the median latency of a direct connection
// with what HAProxy adds.
func added(r *report, weir []sample) (string, bool, bool) {
	over := func(ss []sample) []sample {
		var out []sample
		for _, s := range ss {
			for _, d := range r.of("direct", s.workload) {
				if d.round == s.round {
					s.P50 -= d.P50
					out = append(out, s)
				}
			}
		}
		return out
	}
	s := ratio(over(weir), over(r.of("haproxy", weir[0].workload)), p50)
	return s.ratio(), s.median <= 1.15, s.median != 0
}

// targets writes which of the targets this run has reached.
func (r *report) targets(w io.Writer) error {
	fmt.Fprint(w, "\n## What it is meant to reach\n\n| | workload | wanted | measured | |\n| --- | --- | --- | --- | --- |\n")
	for _, t := range targets {
		weir := r.of("weir", t.workload)
		if len(weir) == 0 {
			continue
		}
		text, within, ok := t.figure(r, weir)
		if !ok {
			continue
		}
		verdict := "reached"
		if !within {
			verdict = "**missed**"
		}
		if _, err := fmt.Fprintf(w, "| %s | %s | %s | %s | %s |\n", t.what, t.workload, t.bound, text, verdict); err != nil {
			return err
		}
	}
	return nil
}
