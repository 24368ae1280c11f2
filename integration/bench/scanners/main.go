// SPDX-License-Identifier: Apache-2.0

// Command scanners compares the speed of Weir's head scanner with that of other
// HTTP/1 parsers, in one process and one run, on the same heads. It is a module
// of its own, so that what it compares with is no requirement of Weir's.
//
// Every scanner is measured in many short rounds that take turns, and its best
// round counts: what else the machine does slows rounds down and never speeds
// one up. Parsers in other languages take part as programs (-with name=path):
// such a program reads "request LENGTH\n" or "response LENGTH\n" and the head,
// and then answers each line "COUNT\n" with the nanoseconds that parsing the
// head COUNT times took.
//
// It must not be run as a test: its figures are the machine's.
package main

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/valyala/fasthttp"
	"github.com/weirgate/weir/module/http1"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "scanners:", err)
		os.Exit(1)
	}
}

// A scanner parses a head n times.
type scanner struct {
	name string
	scan func(n int) (time.Duration, error)
	best float64 // nanoseconds per head
}

func run(args []string, w io.Writer) error {
	fs := flag.NewFlagSet("scanners", flag.ContinueOnError)
	fs.SetOutput(w)
	rounds := fs.Int("rounds", 400, "rounds of each scanner and head")
	round := fs.Duration("round", 500*time.Microsecond, "how long a round is to take")
	programs := map[string]string{}
	fs.Func("with", "another parser, as `name=program`; may be repeated", func(s string) error {
		name, path, ok := strings.Cut(s, "=")
		if !ok || name == "" || path == "" {
			return fmt.Errorf("%q is not name=program", s)
		}
		programs[name] = path
		return nil
	})
	if err := fs.Parse(args); err != nil {
		return err
	}
	runtime.LockOSThread()
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(tw, "head\tbytes\tscanner\tns\tMB/s\tallocations\tWeir is faster by\t\n")
	for _, h := range heads {
		list := contenders(h)
		for name, path := range programs {
			p, err := start(name, path, h)
			if err != nil {
				return err
			}
			defer p.stop()
			list = append(list, &scanner{name: name, scan: p.scan})
		}
		if err := measure(list, *rounds, *round); err != nil {
			return fmt.Errorf("%s: %w", h.name, err)
		}
		for _, s := range list {
			mallocs := "-"
			if programs[s.name] == "" {
				mallocs = fmt.Sprintf("%.0f", allocations(s))
			}
			fmt.Fprintf(tw, "%s\t%d\t%s\t%.0f\t%.0f\t%s\t%.2f\t\n", h.name, len(h.text), s.name, s.best, float64(len(h.text))/s.best*1e3, mallocs, s.best/list[0].best)
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	return growth(w, *rounds, *round)
}

// growth shows that time is linear in bytes: nanoseconds per byte of heads of
// growing length, whole and one byte at a time.
func growth(w io.Writer, rounds int, round time.Duration) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(tw, "bytes\tns/byte, whole\tns/byte, one at a time\t\n")
	for _, size := range []int{1 << 10, 4 << 10, 16 << 10, 64 << 10} {
		text := lines("GET / HTTP/1.1", "Host: x", "Cookie: ")
		text = lines("GET / HTTP/1.1", "Host: x", "Cookie: "+strings.Repeat("a", size-len(text)))
		var list []*scanner
		for _, piece := range []int{len(text), 1} {
			lim := http1.DefaultLimits()
			var r http1.RequestHead
			list = append(list, timed("weir", func() bool {
				r.Reset()
				for i := 0; i < len(text); i += piece {
					r.Scan(text[i:min(i+piece, len(text))], &lim, nil)
				}
				return int(r.Len) == len(text) && r.Outcome == http1.Accept && r.LineEnd != 0
			}))
		}
		if err := measure(list, max(1, rounds/4), round); err != nil {
			return fmt.Errorf("a head of %d bytes: %w", size, err)
		}
		fmt.Fprintf(tw, "%d\t%.3f\t%.2f\t\n", len(text), list[0].best/float64(len(text)), list[1].best/float64(len(text)))
	}
	return tw.Flush()
}

// measure lets the scanners take turns and keeps the best round of each.
func measure(list []*scanner, rounds int, round time.Duration) error {
	n := make([]int, len(list))
	for i, s := range list {
		s.best = math.Inf(1)
		took, err := s.scan(10)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		n[i] = max(1, int(float64(round)/float64(took)*10))
	}
	for range rounds {
		for i, s := range list {
			took, err := s.scan(n[i])
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			s.best = min(s.best, float64(took)/float64(n[i]))
		}
	}
	return nil
}

// allocations counts those of one scan.
func allocations(s *scanner) float64 {
	const n = 1000
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, _ = s.scan(n)
	runtime.ReadMemStats(&after)
	return math.Round(float64(after.Mallocs-before.Mallocs) / n)
}

// timed makes a scanner out of a function that parses the head once.
func timed(name string, scan func() bool) *scanner {
	return &scanner{name: name, scan: func(n int) (time.Duration, error) {
		ok := true
		start := time.Now()
		for range n {
			ok = scan() && ok
		}
		took := time.Since(start)
		if !ok {
			return 0, fmt.Errorf("does not accept the head")
		}
		return took, nil
	}}
}

// contenders are the scanners of this process, Weir's first.
func contenders(h head) []*scanner {
	text := h.text
	lim := http1.DefaultLimits()
	want, err := http1.NewWanted("Cookie", "X-Tenant", "Accept-Language")
	if err != nil {
		panic(err) // the names are constant
	}
	src := bytes.NewReader(text)
	br := bufio.NewReaderSize(src, 1<<17)
	again := func() *bufio.Reader {
		src.Reset(text)
		br.Reset(src)
		return br
	}
	if h.response {
		var r http1.ResponseHead
		var f fasthttp.ResponseHeader
		return []*scanner{
			timed("weir", func() bool {
				r.Reset(http1.GET)
				n, st := r.Scan(text, &lim)
				return st == http1.Done && n == len(text) && r.Outcome == http1.Accept
			}),
			timed("fasthttp", func() bool { return f.Read(again()) == nil }),
			timed("net/http", func() bool { _, err := http.ReadResponse(again(), nil); return err == nil }),
		}
	}
	var r http1.RequestHead
	var f fasthttp.RequestHeader
	scan := func(want *http1.Wanted) bool {
		r.Reset()
		n, st := r.Scan(text, &lim, want)
		return st == http1.Done && n == len(text) && r.Outcome == http1.Accept
	}
	return []*scanner{
		timed("weir", func() bool { return scan(nil) }),
		timed("weir, 3 fields wanted", func() bool { return scan(want) }),
		timed("fasthttp", func() bool { return f.Read(again()) == nil }),
		timed("net/http", func() bool { _, err := http.ReadRequest(again()); return err == nil }),
	}
}

// A program is a parser that runs as a process.
type program struct {
	name string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
}

func start(name, path string, h head) (*program, error) {
	p := &program{name: name, cmd: exec.Command(path)}
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewReader(out)
	p.cmd.Stderr = os.Stderr
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	kind := "request"
	if h.response {
		kind = "response"
	}
	if _, err := fmt.Fprintf(p.in, "%s %d\n%s", kind, len(h.text), h.text); err != nil {
		p.stop()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return p, nil
}

func (p *program) scan(n int) (time.Duration, error) {
	if _, err := fmt.Fprintf(p.in, "%d\n", n); err != nil {
		return 0, err
	}
	var ns int64
	if _, err := fmt.Fscanln(p.out, &ns); err != nil {
		return 0, fmt.Errorf("its answer: %w", err)
	}
	return time.Duration(ns), nil
}

func (p *program) stop() {
	_ = p.in.Close()
	_ = p.cmd.Wait()
}
