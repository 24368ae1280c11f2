// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/nft"
)

// patience bounds everything that is waited for: an emulated processor is slow.
const patience = 2 * time.Minute

func inGuest(t *testing.T) {
	t.Helper()
	if os.Getenv("WEIR_GUEST") == "" {
		t.Skip("skipped: runs in the virtual machine of integration/vm (make test-vm)")
	}
}

// rig is a farm with weir on its router.
type rig struct {
	*lab.Farm
	servers []*lab.Server
	weir    *lab.Weir
}

func newRig(t *testing.T, o lab.FarmOptions, path bool) *rig {
	t.Helper()
	inGuest(t)
	l, err := lab.New("guest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close the lab: %v", err)
		}
	})
	f, err := l.Farm(o)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{Farm: f}
	for i, h := range f.Servers {
		for _, a := range []netip.AddrPort{f.Server(i), f.Server6(i)} {
			s, err := lab.HTTPServer(h, a.String(), http.HandlerFunc(answer))
			if err != nil {
				t.Fatal(err)
			}
			r.servers = append(r.servers, s)
		}
	}
	run, err := l.Subdir("weir/run")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := l.Subdir("weir")
	if err != nil {
		t.Fatal(err)
	}
	c := lab.ConfigOptions{Dir: run, IPv6: true}
	if path {
		c.Plugins = "[{name: path}]"
		c.Policies = "[{use: path, config: {routes: [{prefix: /, servers: [s1, s2]}]}}]"
	}
	// Everything takes its time on an emulated processor that others share.
	config := strings.ReplaceAll(f.Config(c), "    protocol: http\n",
		"    protocol: http\n    timeouts: {connect: 60s, head: 100s, response: 100s}\n")
	r.weir, err = lab.StartWeir(within(t), f.Router, lab.WeirOptions{Binary: os.Getenv("WEIR_BIN") + "/weir", Config: config, Dir: dir, Socket: c.Socket()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("weir wrote:\n%s", r.weir.Log())
		}
	})
	return r
}

func (r *rig) stop(t *testing.T) {
	t.Helper()
	if code, err := r.weir.Stop(within(t)); err != nil || code != 0 {
		t.Errorf("stop: exit code %d, %v", code, err)
	}
}

// started waits for the line that says how weir serves, and returns the log with
// it. That line ends a start and comes by a pipe: the control socket may answer
// before.
func (r *rig) started(t *testing.T) string {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		log := r.weir.Log()
		if _, line, ok := strings.Cut(log, "msg=serving"); ok && strings.Contains(line, "\n") {
			return log
		}
		if time.Now().After(deadline) {
			t.Fatalf("weir does not say that it serves:\n%s", log)
		}
	}
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

const large = 200_000

var body = sync.OnceValue(func() []byte {
	b := make([]byte, large)
	x := uint32(1)
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
})

// answer sends what it got by POST, and the large body for /large.
func answer(w http.ResponseWriter, q *http.Request) {
	switch {
	case q.Method == http.MethodPost:
		b, err := io.ReadAll(q.Body)
		if err != nil {
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		_, _ = w.Write(b)
	case q.URL.Path == "/large":
		w.Header().Set("Content-Length", fmt.Sprint(large))
		_, _ = w.Write(body())
	default:
		fmt.Fprintf(w, "this is %s", q.URL.Path)
	}
}

// exchange makes one request: a small or large response, or an upload.
func exchange(c *http.Client, vip netip.AddrPort, n int) error {
	var resp *http.Response
	var err error
	want := []byte(fmt.Sprintf("this is /page-%d", n))
	switch url := "http://" + vip.String(); n % 5 {
	case 3:
		want = body()
		resp, err = c.Get(url + "/large")
	case 4:
		want = body()[:50_000]
		resp, err = c.Post(url+"/", "application/octet-stream", bytes.NewReader(want))
	default:
		resp, err = c.Get(fmt.Sprintf("%s/page-%d", url, n))
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if !bytes.Equal(b, want) {
		return fmt.Errorf("%s: %d other bytes", resp.Status, len(b))
	}
	return nil
}

// load makes n exchanges in four threads and reports errors.
func (r *rig) load(t *testing.T, n int) {
	t.Helper()
	var wg sync.WaitGroup
	var failed atomic.Int64
	for w := range 4 {
		wg.Go(func() {
			c := r.Clients[0].HTTPClient(lab.HTTPClientOptions{Timeout: patience, MaxConns: 1, Close: w == 3})
			vip := r.VIP()
			if w%2 == 1 {
				vip = r.VIP6()
			}
			for i := w; i < n; i += 4 {
				if err := exchange(c, vip, i/4); err != nil {
					t.Errorf("exchange %d: %v", i, err)
					if failed.Add(1) > 5 {
						return
					}
				}
			}
			c.CloseIdleConnections()
		})
	}
	wg.Wait()
}

// TestKernel: this is the kernel that the rig is for, and each missing feature
// is told.
func TestKernel(t *testing.T) {
	inGuest(t)
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	k, err := nft.Probe()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("Linux %s: %+v", unix.ByteSliceToString(u.Release[:]), k)
	if !k.NativeQueue || !k.Defragments() || !k.NAT {
		t.Errorf("no native queue, defragmentation or NAT: %+v", k)
	}
	if err := nft.ProbeGuard(); err != nil {
		t.Errorf("no guard: %v", err)
	}
}

// TestRequests: requests of both families through the native queue, over far
// fewer server connections than requests.
func TestRequests(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2}, true)
	if log := r.started(t); !strings.Contains(log, "native_queue=true") {
		t.Errorf("the native queue is not used:\n%s", log)
	}
	const n = 120
	r.load(t, n)
	accepted, requests := 0, 0
	for _, s := range r.servers {
		accepted += s.Accepted()
		requests += s.Requests()
	}
	t.Logf("%d requests over %d server connections", requests, accepted)
	if requests != n || accepted > n/4 {
		t.Errorf("%d requests over %d server connections: not pooled", requests, accepted)
	}
	// The doctor's probes work on this kernel, too.
	err := r.Router.Do(func() error {
		list, err := nft.Trace(r.params())
		for _, p := range list {
			if !p.Passed {
				t.Errorf("a probe packet: %s %s: %+v %s", p.Kind, p.Packet, p.Ended, p.Lost)
			}
		}
		if len(list) < 10 {
			t.Errorf("only %d probe packets", len(list))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	r.stop(t)
}

// params is what weir makes of the configuration for its ruleset.
func (r *rig) params() nft.Params {
	p := nft.Params{
		Table: "weir", Mark: 0x57000000, MarkMask: 0xff000000, PortFirst: 10240, PortLast: 32767, QueueFirst: 22272, Shards: 1,
		VIPs: []netip.AddrPort{r.VIP(), r.VIP6()}, SNIPs: []netip.Addr{r.SNIP(), r.SNIP6()},
	}
	for i := range r.Servers {
		p.Servers = append(p.Servers, r.Server(i), r.Server6(i))
	}
	return p
}

// TestNetem: loss, reordering, duplicates and delay on both sides, made by the
// kernel's own netem. All bytes arrive, in order, once.
func TestNetem(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, Link: lab.LinkOptions{NoOffload: true}}, false)
	impair := func(h *lab.Host, iface string) {
		t.Helper()
		l, err := h.Netlink().LinkByName(iface)
		if err != nil {
			t.Fatal(err)
		}
		q := netlink.NewNetem(
			netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
			netlink.NetemQdiscAttrs{Latency: 2000, Jitter: 1000, Loss: 2, Duplicate: 1, ReorderProb: 5, ReorderCorr: 25, Limit: 1000})
		if err := h.Netlink().QdiscAdd(q); err != nil {
			t.Fatalf("netem on %s of %s: %v", iface, h.Name(), err)
		}
	}
	impair(r.Router, r.ClientLeg)
	impair(r.Router, r.ServerLeg)
	impair(r.Clients[0], "lan")
	for _, s := range r.Servers {
		impair(s, "dmz")
	}
	r.load(t, 40)
	r.stop(t)
}

// TestFlush: tables cannot be owned here, so that a foreign flush opens a gap,
// in which a guard of clsact stands. Nothing breaks.
func TestFlush(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2}, false)
	if log := r.started(t); !strings.Contains(log, "owned_table=false") {
		t.Errorf("the table is owned:\n%s", log)
	}
	done := make(chan struct{})
	ended := make(chan struct{})
	var flushes atomic.Int64
	go func() {
		n := 0
		defer close(ended)
		for {
			select {
			case <-done:
				return
			case <-time.After(time.Second):
			}
			n++
			if err := flush(r.Router); err != nil {
				t.Errorf("flush: %v", err)
				return
			}
			for deadline := time.Now().Add(patience); strings.Count(r.weir.Log(), "event=rules-restored") < n; {
				if time.Now().After(deadline) {
					t.Errorf("the table is not back after flush %d", n)
					return
				}
				time.Sleep(50 * time.Millisecond)
			}
			flushes.Add(1)
		}
	}()
	exchanges := 0
	for flushes.Load() < 4 && !t.Failed() {
		r.load(t, 40)
		exchanges += 40
	}
	close(done)
	<-ended
	t.Logf("%d exchanges, %d flushes", exchanges, flushes.Load())
	r.stop(t)
	// The event would come from another thread, at any time: only the whole log
	// shows that there was none.
	if strings.Contains(r.weir.Log(), "rules-unguarded") {
		t.Errorf("there was no guard:\n%s", r.weir.Log())
	}
}

// flush does what "nft flush ruleset" does.
func flush(h *lab.Host) error {
	c, err := nftables.New(nftables.WithNetNSFd(h.NetNS()))
	if err != nil {
		return err
	}
	c.FlushRuleset()
	return c.Flush()
}

func TestMain(m *testing.M) {
	runtime.GOMAXPROCS(2)
	os.Exit(m.Run())
}
