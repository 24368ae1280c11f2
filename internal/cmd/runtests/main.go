// SPDX-License-Identifier: Apache-2.0

// Command runtests runs the tests of all packages and says what came of it.
//
// It differs from go test in who does what: test binaries are compiled by the
// user who builds (see internal/build), and only the tests that need privileges
// run as root, each in its package's directory. It prints one line per package,
// the whole output of those that failed, what was skipped and why, and at the
// end "N passed, N failed, N skipped".
//
// Packages whose tests use internal/require touch the kernel: they run one
// after the other, so that they do not disturb each other's timing. The others
// run side by side, without privileges, and a second time under the race
// detector where there is a C compiler; tests with "Alloc" in their name are
// left out there, because instrumented code allocates.
//
// It must not decide which tests count: a package is left out only when it was
// not asked for.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

type options struct {
	goCommand string        // the go command, which changes to the building user by itself
	dir       string        // where test binaries go
	timeout   time.Duration // per package
	total     time.Duration // for everything; 0: none
	race      string        // auto, on, off
	run       string
	only      string
	results   string
	verbose   bool
}

func main() {
	var o options
	flag.StringVar(&o.goCommand, "go", "go", "the go `command`")
	flag.StringVar(&o.dir, "dir", "build/tests", "`directory` for test binaries")
	flag.DurationVar(&o.timeout, "timeout", 12*time.Minute, "limit per package")
	flag.DurationVar(&o.total, "total", 50*time.Minute, "limit for all packages, 0 for none")
	flag.StringVar(&o.race, "race", "auto", "run packages without kernel tests under the race detector too: auto, on or off")
	flag.StringVar(&o.run, "run", "", "only tests that match the `regexp`")
	flag.StringVar(&o.only, "only", "", "only packages whose path contains one of these, `comma`-separated")
	flag.StringVar(&o.results, "results", "build/results.txt", "`file` for one line per test: result, package, test")
	flag.BoolVar(&o.verbose, "v", false, "print the output of every test, as go test -v does")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if o.total > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, o.total, fmt.Errorf("the limit of %v for all packages is over", o.total))
		defer cancel()
	}
	ok, err := runAll(ctx, &o, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "runtests:", err)
		os.Exit(1)
	}
	if !ok {
		os.Exit(1)
	}
}

// job is one run of one package's tests.
type job struct {
	pkg    testPackage
	race   bool
	bin    string
	report report
}

func (j *job) label() string {
	if j.race {
		return j.pkg.ImportPath + " (race)"
	}
	return j.pkg.ImportPath
}

// runAll compiles and runs everything and reports whether all of it passed.
func runAll(ctx context.Context, o *options, out io.Writer) (bool, error) {
	// A relative command would be looked for in each package's directory.
	if strings.Contains(o.goCommand, "/") {
		abs, err := filepath.Abs(o.goCommand)
		if err != nil {
			return false, err
		}
		o.goCommand = abs
	}
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return false, err
	}
	// Tests that call go find the one that compiled them; sudo's PATH has none.
	root, err := goOutput(ctx, o, "env", "GOROOT")
	if err != nil {
		return false, err
	}
	os.Setenv("PATH", os.Getenv("PATH")+":"+filepath.Join(strings.TrimSpace(string(root)), "bin"))
	pkgs, err := list(ctx, o)
	if err != nil {
		return false, err
	}
	race, note := raceWanted(o.race)
	if note != "" {
		fmt.Fprintln(out, note)
	}
	privileged := os.Geteuid() == 0
	var plain, kernel []*job
	for _, p := range pkgs {
		base := filepath.Join(dir, strings.NewReplacer("/", "_", ".", "_").Replace(p.ImportPath))
		j := &job{pkg: p, bin: base + ".test"}
		if p.kernel {
			kernel = append(kernel, j)
			continue
		}
		plain = append(plain, j)
		if race && !sequential(p.ImportPath) {
			plain = append(plain, &job{pkg: p, race: true, bin: base + ".race.test"})
		}
	}
	if err := asBuilder(ctx, o, "mkdir", "-p", dir).Run(); err != nil {
		return false, fmt.Errorf("making %s: %w", dir, err)
	}

	var mu sync.Mutex
	done := func(j *job) {
		mu.Lock()
		defer mu.Unlock()
		j.report.print(out, j.label(), o.verbose)
	}
	workers := max(2, runtime.NumCPU())
	parallel(workers, plain, func(j *job) {
		if compile(ctx, o, j) {
			execute(ctx, o, j, false)
		}
		done(j)
	})
	// Compiling loads the machine, so it comes before the first kernel test.
	parallel(workers, kernel, func(j *job) { compile(ctx, o, j) })
	for _, j := range kernel {
		if !j.report.failed {
			execute(ctx, o, j, privileged)
		}
		done(j)
	}
	return summarize(ctx, o, out, append(plain, kernel...), privileged)
}

func parallel(n int, jobs []*job, f func(*job)) {
	var wg sync.WaitGroup
	ch := make(chan *job)
	for range n {
		wg.Go(func() {
			for j := range ch {
				f(j)
			}
		})
	}
	for _, j := range jobs {
		ch <- j
	}
	close(ch)
	wg.Wait()
}

// raceWanted looks whether the race detector can be used, and says so if not.
func raceWanted(mode string) (bool, string) {
	switch mode {
	case "off":
		return false, ""
	case "on":
		return true, ""
	}
	switch runtime.GOARCH {
	case "amd64", "arm64", "ppc64le", "s390x", "riscv64", "loong64":
	default:
		return false, "note: no race detector on " + runtime.GOARCH
	}
	for _, cc := range []string{os.Getenv("CC"), "gcc", "cc", "clang"} {
		if cc == "" {
			continue
		}
		if _, err := exec.LookPath(cc); err == nil {
			return true, ""
		}
	}
	return false, "note: no C compiler, so nothing runs under the race detector"
}

// asBuilder runs a program as the user who builds: through the go command's
// wrapper where that is one.
func asBuilder(ctx context.Context, o *options, name string, args ...string) *exec.Cmd {
	if strings.HasSuffix(o.goCommand, ".sh") {
		return command(ctx, o.goCommand, append([]string{"--as-builder", name}, args...)...)
	}
	return command(ctx, name, args...)
}

// command makes a program the leader of a group of its own, and has the whole
// group killed when ctx ends, so that servers which a test started die with it.
func command(ctx context.Context, name string, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, name, args...)
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
	c.WaitDelay = 5 * time.Second
	return c
}

func compile(ctx context.Context, o *options, j *job) bool {
	args := []string{"test", "-c", "-o", j.bin}
	if j.race {
		args = append(args, "-race")
	}
	c := command(ctx, o.goCommand, append(args, j.pkg.ImportPath)...)
	if j.race {
		c.Env = append(os.Environ(), "CGO_ENABLED=1")
	}
	out, err := c.CombinedOutput()
	if err != nil {
		j.report.failed = true
		j.report.why = "[build failed]"
		j.report.output.Write(out)
		if ctx.Err() != nil {
			j.report.why = context.Cause(ctx).Error()
		}
		return false
	}
	return true
}

// sequential names the packages whose tests run one goroutine for a long time:
// the race detector would only make them slow.
func sequential(path string) bool {
	return strings.HasSuffix(path, "/integration/model") || strings.Contains(path, "/integration/sim")
}

func execute(ctx context.Context, o *options, j *job, privileged bool) {
	args := []string{"-test.v=test2json", "-test.paniconexit0", "-test.timeout=" + o.timeout.String()}
	if o.run != "" {
		args = append(args, "-test.run="+o.run)
	}
	if j.race {
		args = append(args, "-test.skip=Alloc", "-test.short")
	}
	// The test binary ends itself with the stacks of all goroutines; a minute
	// later nobody waits for it any more.
	ctx, cancel := context.WithTimeoutCause(ctx, o.timeout+time.Minute,
		fmt.Errorf("killed after %v", o.timeout+time.Minute))
	defer cancel()
	var c *exec.Cmd
	if privileged {
		c = command(ctx, j.bin, args...)
	} else {
		c = asBuilder(ctx, o, j.bin, args...)
	}
	c.Dir = j.pkg.Dir
	if j.race {
		// What this pass may skip was demanded in the other one.
		c.Env = append(os.Environ(), "WEIR_REQUIRE=")
	}
	r, w := io.Pipe()
	c.Stdout, c.Stderr = w, w
	parsed := make(chan struct{})
	go func() {
		defer close(parsed)
		j.report.read(bufio.NewReader(r))
	}()
	start := time.Now()
	err := c.Run()
	if c.Process != nil {
		syscall.Kill(-c.Process.Pid, syscall.SIGKILL) // whatever is left of the group
	}
	w.Close()
	<-parsed
	j.report.took = time.Since(start)
	switch {
	case ctx.Err() != nil:
		j.report.failed = true
		j.report.why = context.Cause(ctx).Error()
	case errors.Is(err, exec.ErrWaitDelay):
		// The test is over but something that it started still holds its
		// output: a leak of processes is a failure.
		j.report.failed = true
		j.report.why = "the tests ended, but a process that they started did not"
	case err != nil:
		j.report.failed = true
		j.report.why = err.Error()
	}
}

func summarize(ctx context.Context, o *options, out io.Writer, jobs []*job, privileged bool) (bool, error) {
	var passed, failed, skipped int
	reasons := map[string]int{}
	var order []string
	var lines strings.Builder
	for _, j := range jobs {
		before := failed
		for _, t := range j.report.tests {
			switch t.result {
			case "PASS":
				passed++
			case "FAIL":
				failed++
			case "SKIP":
				// The second pass skips for the same reasons.
				if j.race {
					continue
				}
				skipped++
				if reasons[t.reason] == 0 {
					order = append(order, t.reason)
				}
				reasons[t.reason]++
			}
			fmt.Fprintf(&lines, "%s %s %s\n", t.result, j.label(), t.name)
		}
		// A package that does not build or dies counts, even when no test of
		// its own is to blame.
		if j.report.failed && failed == before {
			failed++
		}
	}
	c := asBuilder(ctx, o, "tee", o.results)
	c.Stdin = strings.NewReader(lines.String())
	if err := c.Run(); err != nil && ctx.Err() == nil {
		return false, fmt.Errorf("writing %s: %w", o.results, err)
	}
	for _, r := range order {
		fmt.Fprintf(out, "skipped %d: %s\n", reasons[r], r)
	}
	if !privileged && skipped > 0 {
		fmt.Fprintln(out, "Without root the tests that need network namespaces are skipped; for all of them: sudo make test")
	}
	if ctx.Err() != nil {
		fmt.Fprintf(out, "stopped: %v\n", context.Cause(ctx))
		failed = max(failed, 1)
	}
	if passed+failed+skipped == 0 {
		return false, errors.New("no test was found")
	}
	fmt.Fprintf(out, "%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	return failed == 0, nil
}
