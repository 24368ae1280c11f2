// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"fmt"
	"html"
	"io"
	"slices"
	"time"
)

// This file draws the report: one panel of bars for each workload, a bar with
// its least and greatest value for each contender.

// bar is one bar; the parts of a stacked one add up.
type bar struct {
	name  string
	parts []float64
	least float64 // with most: the spread, where there is one
	most  float64
	text  string
}

// panel is one workload.
type panel struct {
	title string
	bars  []bar
}

const (
	panelWidth = 470
	rowHeight  = 17
	nameWidth  = 105
	textWidth  = 105
	columns    = 2
)

// colours tell the contenders apart, and the parts of a stacked bar.
var colours = map[string]string{
	"direct": "#9a9a9a", "haproxy": "#c46a5a", "haproxy-splice": "#dba79d", "nginx": "#6f9e62", "nginx-large": "#aecba6",
	"weir": "#2f6fb0", "weir-mortal": "#7fa8d1", "weir-plain": "#b6cde4", "weir-2": "#1d4a7a",
}

// draw writes panels as an SVG picture.
func draw(w io.Writer, title, note string, panels []panel) error {
	b := bufio.NewWriter(w)
	// Panels of a row have the same height.
	var tops []int
	y := 50
	for i := 0; i < len(panels); i += columns {
		rows := 0
		for _, p := range panels[i:min(i+columns, len(panels))] {
			rows = max(rows, len(p.bars))
		}
		tops = append(tops, y)
		y += rows*rowHeight + 45
	}
	fmt.Fprintf(b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="11">`+"\n", columns*panelWidth+20, y)
	fmt.Fprintf(b, `<rect width="100%%" height="100%%" fill="#ffffff"/><text x="10" y="20" font-size="15" font-weight="bold">%s</text><text x="10" y="36" fill="#555555">%s</text>`+"\n",
		html.EscapeString(title), html.EscapeString(note))
	for i, p := range panels {
		x, top := 10+i%columns*panelWidth, tops[i/columns]
		fmt.Fprintf(b, `<text x="%d" y="%d" font-weight="bold">%s</text>`+"\n", x, top+10, html.EscapeString(p.title))
		most := 0.0
		for _, v := range p.bars {
			most = max(most, v.most, sum(v.parts))
		}
		if most == 0 {
			continue
		}
		scale := float64(panelWidth-nameWidth-textWidth-20) / most
		for k, v := range p.bars {
			at := top + 18 + k*rowHeight
			fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="end">%s</text>`, x+nameWidth-6, at+11, html.EscapeString(v.name))
			left := float64(x + nameWidth)
			for n, part := range v.parts {
				fmt.Fprintf(b, `<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s" fill-opacity="%.2f"/>`,
					left, at, max(part*scale, 0), rowHeight-4, colours[v.name], []float64{1, 0.5}[n%2])
				left += max(part*scale, 0)
			}
			end := left
			if v.most > v.least {
				mid := float64(at) + float64(rowHeight-4)/2
				l, m := float64(x+nameWidth)+v.least*scale, float64(x+nameWidth)+v.most*scale
				fmt.Fprintf(b, `<path d="M%.1f %.1fH%.1fM%.1f %.1fv6M%.1f %.1fv6" stroke="#222222" fill="none"/>`, l, mid, m, l, mid-3, m, mid-3)
				end = max(end, m)
			}
			fmt.Fprintf(b, `<text x="%.1f" y="%d">%s</text>`+"\n", end+5, at+11, html.EscapeString(v.text))
		}
	}
	fmt.Fprintln(b, "</svg>")
	return b.Flush()
}

func sum(vs []float64) (s float64) {
	for _, v := range vs {
		s += v
	}
	return s
}

// panels makes a panel of every workload that keep wants.
func (r *report) panels(keep func(workload) bool, make func(l workload, ss []sample) bar) []panel {
	var ps []panel
	for _, l := range r.workloads {
		if !keep(l) {
			continue
		}
		p := panel{title: l.name + ": " + l.what}
		for _, c := range r.contenders {
			if ss := r.of(c.name, l.name); len(ss) > 0 {
				b := make(l, ss)
				b.name = c.name
				p.bars = append(p.bars, b)
			}
		}
		if slices.ContainsFunc(p.bars, func(b bar) bool { return sum(b.parts) > 0 }) {
			ps = append(ps, p)
		}
	}
	return ps
}

func (r *report) note() string {
	return fmt.Sprintf("%s, %d rounds; median, least and greatest", r.begun.UTC().Format("2006-01-02"), r.options.rounds)
}

func (r *report) plotSpeed(w io.Writer) error {
	return draw(w, "Speed (more is better)", r.note(), r.panels(func(l workload) bool { return l.rate == 0 }, func(l workload, ss []sample) bar {
		s := each(ss, sample.speed)
		return bar{parts: []float64{s.median}, least: s.least, most: s.most, text: unit(s.median, l.bulk)}
	}))
}

func (r *report) plotLatency(w io.Writer) error {
	return draw(w, "Latency (less is better): p50, and in light colour what p99 adds", r.note(),
		r.panels(func(l workload) bool { return !l.bulk }, func(_ workload, ss []sample) bar {
			half, most := each(ss, p50).median, each(ss, func(s sample) float64 { return float64(s.P99) }).median
			return bar{parts: []float64{half, most - half}, text: short(time.Duration(half)) + " / " + short(time.Duration(most))}
		}))
}

func (r *report) plotCPU(w io.Writer) error {
	return draw(w, "Processor time for each request, in bulk for each 100 MB (less is better): server, and in light colour router", r.note(),
		r.panels(func(workload) bool { return true }, func(_ workload, ss []sample) bar {
			a, b := each(ss, server).median, each(ss, func(s sample) float64 { return float64(s.routerCPU) }).median
			return bar{parts: []float64{a, b}, text: short(time.Duration(a)) + " + " + short(time.Duration(b))}
		}))
}
