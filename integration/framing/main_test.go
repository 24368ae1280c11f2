// SPDX-License-Identifier: Apache-2.0

package framing

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/built"
	"github.com/weirgate/weir/integration/lab/trial"
	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module/control"
)

// What the tests wait by, and draw by.
var (
	within = trial.Within
	until  = trial.Until
	size   = trial.Size
)

// seeded returns a random source and writes its seed down. WEIR_SEED replays.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	return rand.New(rand.NewPCG(trial.Seed(t), 1))
}

// soak says whether the tests run in their full sizes.
var soak = trial.Soak

func TestMain(m *testing.M) { built.Main(m) }

// A farmText is one farm of a configuration.
type farmText struct {
	name    string
	port    uint16   // of the VIP
	servers []string // addresses
	extra   string   // more keys, each line with four spaces before it
}

// A rig is the standard topology with weir on its router.
type rig struct {
	*lab.Farm
	t    *testing.T
	weir *lab.Weir
	wire *lab.Capture // between weir and the servers
}

// newRig builds the topology and skips the test where that is impossible.
func newRig(t *testing.T, servers int) *rig {
	t.Helper()
	require.NFQueue(t)
	l := trial.Lab(t, "weirframe")
	var err error
	r := &rig{t: t}
	if r.Farm, err = l.Farm(lab.FarmOptions{Servers: servers, NoIPv6: true}); err != nil {
		t.Fatal(err)
	}
	return r
}

// start runs weir over these farms and waits until it is ready.
func (r *rig) start(farms ...farmText) {
	r.t.Helper()
	bin := built.Weir(r.t)
	dir, err := r.Lab.Subdir("weir")
	if err != nil {
		r.t.Fatal(err)
	}
	run, err := r.Lab.Subdir("weir/run")
	if err != nil {
		r.t.Fatal(err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "runtime_dir: %q\nstop_timeout: 1s\nsource: {addresses: [%s]}\nfarms:\n", run, r.SNIP())
	for _, f := range farms {
		fmt.Fprintf(&b, "  - name: %s\n    listen: \"%s\"\n    servers:\n", f.name, r.vip(f.port))
		for i, s := range f.servers {
			fmt.Fprintf(&b, "      - {name: s%d, address: \"%s\"}\n", i+1, s)
		}
		b.WriteString(f.extra)
	}
	socket := filepath.Join(run, "admin.sock")
	fmt.Fprintf(&b, "admin: {socket: %q, metrics: \"\"}\n", socket)
	if r.wire, err = r.Router.CaptureOn(lab.CaptureOptions{Buffer: 128 << 20}, r.ServerLeg); err != nil {
		r.t.Fatal(err)
	}
	r.weir, err = lab.StartWeir(within(r.t, 30*time.Second), r.Router, lab.WeirOptions{Binary: bin, Config: b.String(), Dir: dir, Socket: socket})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if r.t.Failed() {
			r.t.Logf("weir (process %d) wrote:\n%s", r.weir.Proc.Pid(), r.weir.Log())
		}
	})
}

func (r *rig) vip(port uint16) string { return netip.AddrPortFrom(r.VIP().Addr(), port).String() }

// at returns an address of the n-th server host, counted from 0.
func (r *rig) at(n int, port uint16) string {
	return netip.AddrPortFrom(r.ServerAddr(n), port).String()
}

// status asks weir for its counters.
func (r *rig) status() control.Status {
	r.t.Helper()
	text, err := r.weir.Status(within(r.t, 10*time.Second))
	if err != nil {
		r.t.Fatal(err)
	}
	var st control.Status
	if err := json.Unmarshal(text, &st); err != nil {
		r.t.Fatal(err)
	}
	return st
}

// farm returns a farm's counters.
func (r *rig) farm(name string) control.Farm {
	r.t.Helper()
	for _, f := range r.status().Farms {
		if f.Name == name {
			return f
		}
	}
	r.t.Fatalf("weir has no farm %q", name)
	return control.Farm{}
}

// dial connects a client to a port of the VIP. Each write becomes a segment of
// its own if the wire is free.
func (r *rig) dial(port uint16) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(r.t.Context(), 10*time.Second)
	defer cancel()
	c, err := r.Clients[0].Dial(ctx, "tcp", r.vip(port))
	if err != nil {
		return nil, err
	}
	tc := c.(*net.TCPConn)
	_ = tc.SetNoDelay(true)
	_ = tc.SetDeadline(time.Now().Add(60 * time.Second))
	return tc, nil
}

// parallel calls f for 0 to n-1, a few at a time, and reports what they return.
func parallel(t *testing.T, n, width int, f func(i int) error) {
	t.Helper()
	var wg sync.WaitGroup
	next := make(chan int)
	for range width {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range next {
				if err := f(i); err != nil {
					t.Errorf("trial %d: %v", i, err)
				}
			}
		}()
	}
	for i := range n {
		if t.Failed() {
			break
		}
		next <- i
	}
	close(next)
	wg.Wait()
}

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n/2] + " … " + s[len(s)-n/2:]
	}
	return s
}
