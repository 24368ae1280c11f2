// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module"
	"github.com/weirgate/weir/module/config"
)

// embed runs the module inside of this process, on the rig's router, as
// another Go program would, and waits until it serves. It ends with the test.
func (r *rig) embed(c lab.ConfigOptions) {
	r.t.Helper()
	file := filepath.Join(r.dir, "weir.yaml")
	if err := os.WriteFile(file, []byte(r.options(c).Config), 0o644); err != nil {
		r.t.Fatal(err)
	}
	cfg, err := config.Load(config.LoadOptions{Files: []string{file}})
	if err != nil {
		r.t.Fatal(err)
	}
	ready := make(chan struct{})
	m, err := module.New(cfg, module.Options{Log: slog.New(slog.DiscardHandler), Ready: func() { close(ready) }})
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- r.Router.Do(func() error { return m.Run(ctx) }) }()
	select {
	case <-ready:
	case err := <-ended:
		cancel()
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			r.t.Error(err)
		}
	})
}

// seen reads how many packets the queues have got from the file that the
// kernel keeps, without a single allocation: what it is used for counts them.
func seen(f *os.File, buf []byte) (packets int) {
	n, _ := f.ReadAt(buf, 0)
	field, number := 0, 0
	for i, b := range buf[:n] {
		switch {
		case b >= '0' && b <= '9':
			number = number*10 + int(b-'0')
		case i > 0 && buf[i-1] >= '0' && buf[i-1] <= '9':
			// The eighth number of a line is the last packet's.
			if field++; field == 8 {
				packets += number
			}
			number = 0
		}
		if b == '\n' {
			field, number = 0, 0
		}
	}
	return packets
}

// TestNoAllocationPerPacket: a million packets of kept-alive clients, of
// one-request clients and of a large download pass the kernel's queue, the
// engine and the emitter without an allocation for any of them: handshakes,
// selection, splices, releases and closes alike.
func TestNoAllocationPerPacket(t *testing.T) {
	wrkBin, abBin, curlBin := require.Tool(t, "wrk"), require.Tool(t, "ab"), require.Tool(t, "curl")
	require.Tool(t, "nginx")
	const want = 1_000_000
	// Packets of one MTU at most: more of them for the same bytes.
	r := newRig(t, lab.FarmOptions{NoIPv6: true, Link: lab.LinkOptions{NoOffload: true}})
	root, err := r.Lab.Subdir("site")
	if err != nil {
		t.Fatal(err)
	}
	files := newSite(t, root, 1000, 200<<20)
	for i, s := range r.Servers {
		if _, err := lab.Nginx(s, lab.NginxOptions{Addrs: addrs(r.Farm, i)[:1], Root: root, NoAccessLog: true}); err != nil {
			t.Fatal(err)
		}
	}
	r.embed(lab.ConfigOptions{})
	var table *os.File
	if err := r.Router.Do(func() (err error) {
		table, err = os.Open("/proc/thread-self/net/netfilter/nfnetlink_queue")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer table.Close()

	// What the work of every second takes (timers, watched files) is measured
	// without packets, and is not the packets'.
	const quiet = 3 * time.Second
	var idle [2]runtime.MemStats
	time.Sleep(time.Second) // the start is over
	runtime.ReadMemStats(&idle[0])
	time.Sleep(quiet)
	runtime.ReadMemStats(&idle[1])
	perSecond := float64(idle[1].Mallocs-idle[0].Mallocs) / quiet.Seconds()

	// The load comes from other processes, whose output nobody reads: what
	// this process allocates meanwhile is the module's.
	small, large := "http://"+r.VIP().String()+files.paths[0], "http://"+r.VIP().String()+files.paths[1]
	for _, args := range [][]string{
		{wrkBin, "-t", "1", "-c", "48", "-d", "200", small},
		{abBin, "-q", "-r", "-c", "8", "-t", "200", "-n", "50000000", small},
		{curlBin, "--silent", "--output", "/dev/null", large + "?[1-1000]"},
	} {
		p, err := r.Clients[0].Start(r.Clients[0].Command(args[0], args[1:]...))
		if err != nil {
			t.Fatal(err)
		}
		defer p.Kill()
	}
	buf := make([]byte, 4096)
	deadline := time.Now().Add(150 * time.Second)
	reach := func(n int) int {
		for {
			got := seen(table, buf)
			if got >= n {
				return got
			}
			if time.Now().After(deadline) {
				t.Fatalf("only %d of %d packets came", got, n)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	// What grows once, grows now.
	begin := reach(want / 10)
	var before, after runtime.MemStats
	start := time.Now()
	runtime.ReadMemStats(&before)
	end := reach(begin + want)
	runtime.ReadMemStats(&after)
	packets, allocs := end-begin, after.Mallocs-before.Mallocs
	housekeeping := uint64(perSecond * time.Since(start).Seconds())
	t.Logf("%d packets, %d allocations of %d bytes; in as long without packets %d", packets, allocs, after.TotalAlloc-before.TotalAlloc, housekeeping)
	// One in a thousand packets is what the runtime needs for itself; the
	// packet path would show as one for each packet of a kind.
	if allocs > uint64(packets)/1000+housekeeping {
		t.Errorf("%d allocations for %d packets", allocs, packets)
		profile(t)
	}
}

// profile shows where this process has allocated.
func profile(t *testing.T) {
	t.Helper()
	var b bytes.Buffer
	if err := pprof.Lookup("allocs").WriteTo(&b, 1); err != nil {
		t.Error(err)
		return
	}
	n := 0
	for line := range strings.Lines(b.String()) {
		if n++; n > 80 {
			break
		}
		t.Log(strings.TrimRight(line, "\n"))
	}
}

// TestSeen holds the reading of the kernel's table.
func TestSeen(t *testing.T) {
	file := filepath.Join(t.TempDir(), "table")
	text := "22274   1024     0 2 65531     3     4   111571  1\n22273 123456     0 2 65531     0     0        7  1\n"
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 4096)
	if n := seen(f, buf); n != 111578 {
		t.Errorf("%d packets seen, want 111578", n)
	}
	if n := testing.AllocsPerRun(100, func() { seen(f, buf) }); n != 0 {
		t.Errorf("the count itself allocates: %v", n)
	}
}
