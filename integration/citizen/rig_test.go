// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/built"
	"github.com/weirgate/weir/integration/lab/trial"
	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/nft"
)

// What the tests wait by, and draw by.
var (
	within = trial.Within
	until  = trial.Until
)

func TestMain(m *testing.M) { built.Main(m) }

// A rig is the standard topology with a weir on its router and judges on its
// wires.
type rig struct {
	*lab.Farm
	t        *testing.T
	bin      string
	dir, run string
	config   lab.ConfigOptions
}

// newRig builds the topology and skips the test where that is impossible.
func newRig(t *testing.T, o lab.FarmOptions) *rig {
	t.Helper()
	require.NFQueue(t)
	r := &rig{t: t, bin: built.Weir(t)}
	l := trial.Lab(t, "weircit")
	var err error
	if r.Farm, err = l.Farm(o); err != nil {
		t.Fatal(err)
	}
	if r.dir, err = l.Subdir("weir"); err != nil {
		t.Fatal(err)
	}
	if r.run, err = l.Subdir("weir/run"); err != nil {
		t.Fatal(err)
	}
	r.config = lab.ConfigOptions{Dir: r.run, IPv6: !o.NoIPv6}
	return r
}

// start runs weir and waits until it is ready.
func (r *rig) start() *lab.Weir {
	r.t.Helper()
	return r.startWith(r.Config(r.config))
}

// startWith is start with a configuration of one's own.
func (r *rig) startWith(config string) *lab.Weir {
	r.t.Helper()
	w, err := lab.StartWeir(within(r.t, 20*time.Second), r.Router, lab.WeirOptions{
		Binary: r.bin, Config: config, Dir: r.dir, Socket: r.config.Socket(),
	})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if r.t.Failed() {
			r.t.Logf("weir (process %d) wrote:\n%s", w.Proc.Pid(), w.Log())
		}
	})
	return w
}

// stop ends weir by SIGTERM, which must succeed.
func (r *rig) stop(w *lab.Weir) {
	r.t.Helper()
	code, err := w.Stop(within(r.t, 20*time.Second))
	if err != nil {
		r.t.Fatal(err)
	}
	if code != 0 {
		r.t.Errorf("exit code %d after SIGTERM, want 0", code)
	}
}

// serve has every server answer with its name, the path and, for a path
// /bytes/N, N bytes.
func (r *rig) serve(addrs func(i int) []netip.AddrPort) {
	r.t.Helper()
	for i, h := range r.Servers {
		for _, a := range addrs(i) {
			if _, err := lab.HTTPServer(h, a.String(), handler(h.Name())); err != nil {
				r.t.Fatal(err)
			}
		}
	}
}

func handler(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		var n int
		if q.Method == http.MethodPost {
			b, err := io.ReadAll(q.Body)
			if err == nil && bytes.Equal(b, pattern(len(b))) {
				fmt.Fprintf(w, "took %d right bytes", len(b))
			}
			return
		}
		if _, err := fmt.Sscanf(q.URL.Path, "/bytes/%d", &n); err == nil {
			w.Header().Set("Content-Length", fmt.Sprint(n))
			_, _ = w.Write(pattern(n))
			return
		}
		fmt.Fprintf(w, "%s has %s for %s", name, q.URL.Path, q.RemoteAddr)
	})
}

var patternOnce = sync.OnceValue(func() []byte {
	b := make([]byte, 16<<20)
	x := uint32(1)
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
})

// pattern is n bytes that are the same every time, at most 16 MiB.
func pattern(n int) []byte { return patternOnce()[:n] }

// both gives every server its IPv4 and its IPv6 address.
func (r *rig) both(i int) []netip.AddrPort { return []netip.AddrPort{r.Server(i), r.Server6(i)} }

// ask makes one request to an address on a new connection from a client.
func ask(h *lab.Host, addr netip.AddrPort, path string, timeout time.Duration) error {
	c := h.HTTPClient(lab.HTTPClientOptions{Close: true, Timeout: timeout})
	return get(c, addr, path)
}

func get(c *http.Client, addr netip.AddrPort, path string) error {
	resp, err := c.Get("http://" + addr.String() + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	var n int
	if _, err := fmt.Sscanf(path, "/bytes/%d", &n); err == nil {
		if !bytes.Equal(b, pattern(n)) {
			return fmt.Errorf("GET %s: %s, %d other bytes", path, resp.Status, len(b))
		}
		return nil
	}
	if resp.StatusCode != http.StatusOK || !strings.Contains(string(b), " has "+path+" ") {
		return fmt.Errorf("GET %s: %s, %q", path, resp.Status, b)
	}
	return nil
}

// atOnce runs f for all addresses at the same time: for what has to wait for
// something that does not come.
func atOnce(addrs []netip.AddrPort, f func(netip.AddrPort)) {
	var wg sync.WaitGroup
	for _, a := range addrs {
		wg.Go(func() { f(a) })
	}
	wg.Wait()
}

// load makes n requests over a few connections at a time, every fourth on a
// connection of its own, alternately to the addresses, and returns the errors.
func load(h *lab.Host, n int, addrs ...netip.AddrPort) []error {
	const workers = 8
	kept := h.HTTPClient(lab.HTTPClientOptions{Timeout: 20 * time.Second})
	single := h.HTTPClient(lab.HTTPClientOptions{Close: true, Timeout: 20 * time.Second})
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n; i += workers {
				c, path := kept, fmt.Sprintf("/request-%d", i)
				if i/workers%4 == 0 {
					c = single
				}
				if i%10 == 0 {
					path = "/bytes/30000"
				}
				if err := get(c, addrs[i/workers%len(addrs)], path); err != nil {
					mu.Lock()
					errs = append(errs, fmt.Errorf("request %d: %w", i, err))
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	kept.CloseIdleConnections()
	return errs
}

// mustLoad fails the test on the first errors of a load.
func (r *rig) mustLoad(n int, addrs ...netip.AddrPort) {
	r.t.Helper()
	errs := load(r.Clients[0], n, addrs...)
	for i, err := range errs {
		if i == 5 {
			break
		}
		r.t.Error(err)
	}
	if len(errs) > 0 {
		r.t.Errorf("%d of %d requests failed", len(errs), n)
	}
}

// params is what weir makes of the rig's configuration for its ruleset.
func (r *rig) params() nft.Params {
	p := nft.Params{
		Table: "weir", Mark: 0x57000000, MarkMask: 0xff000000,
		VIPs: []netip.AddrPort{r.VIP()}, SNIPs: []netip.Addr{r.SNIP()},
		PortFirst: 10240, PortLast: 32767, QueueFirst: 22272, Shards: 1,
	}
	for i := range r.Servers {
		p.Servers = append(p.Servers, r.Server(i))
	}
	if r.config.IPv6 {
		p.VIPs = append(p.VIPs, r.VIP6())
		p.SNIPs = append(p.SNIPs, r.SNIP6())
		for i := range r.Servers {
			p.Servers = append(p.Servers, r.Server6(i))
		}
	}
	err := r.Router.Do(func() error {
		k, err := nft.Probe()
		p.SYNToLo = k.SYNToLo()
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return p
}

// metric reads a metric by its name with labels, as it is written.
func (r *rig) metric(name string) float64 {
	r.t.Helper()
	resp, err := r.Router.HTTPClient(lab.HTTPClientOptions{Close: true, Timeout: 20 * time.Second}).Get("http://127.0.0.1:9464/metrics")
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var v float64
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			if _, err := fmt.Sscan(value, &v); err != nil {
				r.t.Fatal(err)
			}
			return v
		}
	}
	r.t.Fatalf("no metric %s", name)
	return 0
}

// foreign asks what on the router stands in weir's way.
func (r *rig) foreign() []nft.Finding {
	r.t.Helper()
	var found []nft.Finding
	err := r.Router.Do(func() (err error) {
		found, err = nft.Foreign(r.params())
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return found
}

// shell runs a command line on the router.
func (r *rig) shell(line string) string {
	r.t.Helper()
	out, err := r.Router.Run(r.t.Context(), "/bin/sh", "-ec", "PATH=$PATH:/usr/sbin:/sbin; "+line)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(out)
}

// nft loads rules on the router.
func (r *rig) nft(rules string) {
	r.t.Helper()
	require.Tool(r.t, "nft")
	file := filepath.Join(r.Lab.Dir(), "rules.nft")
	if err := os.WriteFile(file, []byte(rules), 0o644); err != nil {
		r.t.Fatal(err)
	}
	r.shell("nft -f " + file)
}
