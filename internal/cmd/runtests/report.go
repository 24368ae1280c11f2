// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"
)

// report is what came of one run.
type report struct {
	tests  []test
	failed bool
	why    string // beside the tests themselves: build failed, killed, exit code
	took   time.Duration
	output bytes.Buffer
}

// test is one top-level test, example or fuzz target with its seeds.
type test struct {
	name   string
	result string // PASS, FAIL, SKIP
	reason string // why it was skipped
}

var resultLine = regexp.MustCompile(`^--- (PASS|FAIL|SKIP): (\S+) \(`)

// frame is the byte that -test.v=test2json puts before every line of the
// testing package, so that what a test prints cannot be taken for one, even
// when it does not end its line.
const frame = 0x16

// read takes in the output of a test binary.
func (r *report) read(in *bufio.Reader) {
	last := "" // the latest line that a test logged
	for {
		line, err := in.ReadString('\n')
		if line != "" {
			before, framed, found := strings.Cut(line, string(rune(frame)))
			if !found {
				before = line
			}
			r.output.WriteString(before)
			if s := strings.TrimSpace(before); s != "" {
				last = s
			}
			if found {
				framed = strings.ReplaceAll(framed, string(rune(frame)), "")
				if before != "" {
					r.output.WriteByte('\n')
				}
				// Which test the next line belongs to is for programs.
				if !strings.HasPrefix(framed, "=== NAME") {
					r.output.WriteString(framed)
				}
				r.result(framed, last)
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				fmt.Fprintf(&r.output, "reading the output: %v\n", err)
				r.failed = true
			}
			return
		}
	}
}

func (r *report) result(line, last string) {
	m := resultLine.FindStringSubmatch(line)
	if m == nil || strings.Contains(m[2], "/") {
		return // a subtest counts with its test
	}
	t := test{name: m[2], result: m[1]}
	if t.result == "SKIP" {
		t.reason = reason(last)
	}
	if t.result == "FAIL" {
		r.failed = true
	}
	r.tests = append(r.tests, t)
}

var logPrefix = regexp.MustCompile(`^\S+\.go:\d+: (skipped: )?`)

// reason takes file and line off what a skipped test logged, so that equal
// reasons are counted together.
func reason(last string) string {
	s := logPrefix.ReplaceAllString(last, "")
	if s == "" {
		return "no reason given"
	}
	return s
}

func (r *report) count(result string) int {
	n := 0
	for _, t := range r.tests {
		if t.result == result {
			n++
		}
	}
	return n
}

// print writes what go test would write: a line per package, and the output of
// one that failed.
func (r *report) print(out io.Writer, label string, verbose bool) {
	if r.failed || verbose {
		out.Write(r.output.Bytes())
		if b := r.output.Bytes(); len(b) > 0 && b[len(b)-1] != '\n' {
			fmt.Fprintln(out)
		}
	}
	counts := fmt.Sprintf("%d passed, %d failed, %d skipped", r.count("PASS"), r.count("FAIL"), r.count("SKIP"))
	if r.failed {
		if r.why != "" {
			counts += "; " + r.why
		}
		fmt.Fprintf(out, "FAIL\t%s\t%.2fs\t%s\n", label, r.took.Seconds(), counts)
		return
	}
	fmt.Fprintf(out, "ok  \t%s\t%.2fs\t%s\n", label, r.took.Seconds(), counts)
}
