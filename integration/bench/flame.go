// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"html"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// This file draws where Weir's process spends its time under a load, kernel
// included: perf(1) takes samples of its stacks.

// frame is a function with those that it calls.
type frame struct {
	name  string
	n     int // samples in it and in what it calls
	calls map[string]*frame
}

func (f *frame) call(name string) *frame {
	if f.calls == nil {
		f.calls = map[string]*frame{}
	}
	c := f.calls[name]
	if c == nil {
		c = &frame{name: name}
		f.calls[name] = c
	}
	return c
}

// stacks reads what perf script writes: a line for each sample, then its
// frames, the innermost first, then an empty line. The runtime's frames below a
// goroutine's function are left out.
func stacks(r io.Reader) (*frame, error) {
	root := &frame{name: "all"}
	var stack []string
	end := func() {
		if len(stack) == 0 {
			return
		}
		root.n++
		f := root
		for _, name := range slices.Backward(stack) {
			f = f.call(name)
			f.n++
		}
		stack = stack[:0]
	}
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		line := s.Text()
		switch {
		case strings.TrimSpace(line) == "":
			end()
		case line[0] == '\t' || line[0] == ' ':
			_, name, ok := strings.Cut(strings.TrimSpace(line), " ")
			if !ok {
				continue
			}
			name, _, _ = strings.Cut(name, " (")
			name, _, _ = strings.Cut(name, "+0x")
			if i := strings.LastIndex(name, "/"); i >= 0 {
				name = name[i+1:]
			}
			if name != "runtime.goexit.abi0" && name != "runtime.goexit" {
				stack = append(stack, name)
			}
		}
	}
	end()
	return root, s.Err()
}

const (
	flameWidth = 1180
	flameRow   = 16
	leastShare = 0.004 // narrower frames are not drawn
)

// flame draws a tree from the top down: the wider, the more time.
func (f *frame) flame(w io.Writer, title string) error {
	b := bufio.NewWriter(w)
	fmt.Fprintf(b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="10">`+"\n", flameWidth+20, f.depth(f.n)*flameRow+50)
	fmt.Fprintf(b, `<rect width="100%%" height="100%%" fill="#ffffff"/><text x="10" y="20" font-size="14" font-weight="bold">%s</text>`+"\n", html.EscapeString(title))
	f.box(b, f.n, 10, 30)
	fmt.Fprintln(b, "</svg>")
	return b.Flush()
}

func (f *frame) drawn(all int) bool { return float64(f.n) >= leastShare*float64(all) }

func (f *frame) depth(all int) int {
	d := 0
	for _, c := range f.calls {
		if c.drawn(all) {
			d = max(d, c.depth(all))
		}
	}
	return d + 1
}

func (f *frame) box(b *bufio.Writer, all int, x float64, y int) {
	width := float64(f.n) / float64(all) * flameWidth
	colour := "#e6b566" // kernel
	switch {
	case strings.HasPrefix(f.name, "engine.") || strings.HasPrefix(f.name, "http1.") || strings.HasPrefix(f.name, "packet.") || strings.HasPrefix(f.name, "flowstore."):
		colour = "#6ea3d8"
	case strings.Contains(f.name, ".") && !strings.HasSuffix(f.name, ".isra.0") && !strings.HasSuffix(f.name, ".constprop.0") && !strings.HasSuffix(f.name, ".part.0"):
		colour = "#a5c4a0"
	case f.name == "all":
		colour = "#dddddd"
	}
	share := fmt.Sprintf("%.1f %%", 100*float64(f.n)/float64(all))
	fmt.Fprintf(b, `<g><title>%s %s</title><rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s" stroke="#ffffff" stroke-width="0.5"/>`,
		html.EscapeString(f.name), share, x, y, width, flameRow-1, colour)
	if room := int(width / 5.6); room > 3 {
		text := f.name + " " + share
		if len(text) > room {
			text = f.name[:min(len(f.name), room)]
		}
		fmt.Fprintf(b, `<text x="%.1f" y="%d">%s</text>`, x+2, y+11, html.EscapeString(text))
	}
	fmt.Fprintln(b, "</g>")
	for _, c := range slices.SortedFunc(maps.Values(f.calls), func(a, b *frame) int { return cmp.Or(cmp.Compare(b.n, a.n), cmp.Compare(a.name, b.name)) }) {
		if c.drawn(all) {
			c.box(b, all, x, y+flameRow)
			x += float64(c.n) / float64(all) * flameWidth
		}
	}
}

// within is the share of the samples in which one of these functions runs or
// waits for what it calls.
func (f *frame) within(names ...string) int {
	if slices.Contains(names, f.name) {
		return f.n
	}
	n := 0
	for _, c := range f.calls {
		n += c.within(names...)
	}
	return n
}

func runFlame(ctx context.Context, args []string, w io.Writer) (err error) {
	fs := flag.NewFlagSet("bench flame", flag.ContinueOnError)
	fs.SetOutput(w)
	measure := fs.Duration("measure", 5*time.Second, "time of one measurement")
	what := fs.String("workloads", "kept-1k,one-shot,bulk", "comma-separated names")
	realtime := fs.Bool("realtime", false, "as for the comparison")
	out := fs.String("out", "docs/bench", "directory of the pictures")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if err := asRoot(" BENCH=flame"); err != nil {
		return err
	}
	perf, err := exec.LookPath("perf")
	if err != nil {
		return fmt.Errorf("%w (Debian's package linux-perf has it)", err)
	}
	ls, err := choose(workloads, *what, nil)
	if err != nil {
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
	// In this program, which has its symbols: the weir executable has none.
	c := contender{name: "weir", target: atVIP}
	p, _, err := r.embed(0)
	if err != nil {
		return err
	}
	defer p.Kill()
	for _, l := range ls {
		if _, err := r.measure(ctx, p, c, l, time.Second); err != nil {
			return err
		}
		data := filepath.Join(r.dir, "perf.data")
		rec := exec.CommandContext(ctx, perf, "record", "-F", "1999", "-g", "-p", fmt.Sprint(p.Pid()), "-o", data)
		rec.Stderr = io.Discard
		if err := rec.Start(); err != nil {
			return err
		}
		time.Sleep(300 * time.Millisecond)
		s, err := r.measure(ctx, p, c, l, *measure)
		_ = rec.Process.Signal(syscall.SIGINT)
		_ = rec.Wait()
		if err != nil {
			return err
		}
		script, err := exec.CommandContext(ctx, perf, "script", "-i", data, "-F", "comm,ip,sym").Output()
		if err != nil {
			return fmt.Errorf("perf script: %w", err)
		}
		root, err := stacks(bytes.NewReader(script))
		if err != nil {
			return err
		}
		if root.n == 0 {
			return errors.New("perf took no samples")
		}
		fmt.Fprintf(w, "%s: %s\n", l.name, s)
		share := func(names ...string) float64 { return 100 * float64(root.within(names...)) / float64(root.n) }
		summary := fmt.Sprintf("engine %.1f %%, reading packets %.1f %%, verdicts with forwarding %.1f %%, raw packets with forwarding %.1f %%, waiting and waking %.1f %%",
			share("engine.(*Engine).Step", "engine.(*Handshake).SYN", "engine.(*Engine).Ahead"), share("divert.(*batched).read"), share("divert.(*batched).write"),
			share("divert.(*Emitter).write"), share("divert.(*batched).sleep"))
		fmt.Fprintf(w, "%s: %d samples: %s\n", l.name, root.n, summary)
		if *out == "" {
			continue
		}
		var b bytes.Buffer
		if err := root.flame(&b, fmt.Sprintf("Weir's process, %s: %s", l.what, summary)); err != nil {
			return err
		}
		path := filepath.Join(*out, "flame-"+l.name+".svg")
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			return err
		}
		if err := sameOwner(path, filepath.Dir(*out)); err != nil {
			return err
		}
	}
	return nil
}
