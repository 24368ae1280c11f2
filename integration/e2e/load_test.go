// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module/control"
)

// web returns the farm "web" as the daemon's status tells it.
func (r *rig) web(w *lab.Weir) control.Farm {
	r.t.Helper()
	raw, err := w.Status(within(r.t, 10*time.Second))
	if err != nil {
		r.t.Fatal(err)
	}
	var st control.Status
	if err := json.Unmarshal(raw, &st); err != nil {
		r.t.Fatal(err)
	}
	for _, f := range st.Farms {
		if f.Name == "web" {
			return f
		}
	}
	r.t.Fatalf("no farm web in %s", raw)
	return control.Farm{}
}

// A load is what a load generator says that it has done.
type load struct {
	requests int
	trouble  []string // every line that tells of an error
	output   string
}

// number finds the number in a line of a program's output.
func number(out []byte, pattern string) (int, bool) {
	m := regexp.MustCompile(`(?m)` + pattern).FindSubmatch(out)
	if m == nil {
		return 0, false
	}
	n, err := strconv.Atoi(string(m[1]))
	return n, err == nil
}

// lines returns the lines of out that match.
func matching(out []byte, pattern string) []string {
	var ls []string
	for _, m := range regexp.MustCompile(`(?m)^.*(?:`+pattern+`).*$`).FindAll(out, -1) {
		ls = append(ls, strings.TrimSpace(string(m)))
	}
	return ls
}

// ab runs ApacheBench: HTTP/1.0, without keep-alive unless args ask for it. It
// counts a response of another length than the first one's as failed.
func ab(ctx context.Context, h *lab.Host, bin, url string, n, concurrency int, args ...string) (load, error) {
	args = append(args, "-q", "-n", strconv.Itoa(n), "-c", strconv.Itoa(concurrency), "-s", "30", url)
	out, err := h.Run(ctx, bin, args...)
	if err != nil {
		return load{}, fmt.Errorf("%w\n%s", err, out)
	}
	l := load{output: string(out)}
	done, ok := number(out, `^Complete requests:\s+(\d+)`)
	failed, okFailed := number(out, `^Failed requests:\s+(\d+)`)
	if !ok || !okFailed {
		return l, fmt.Errorf("ab writes:\n%s", out)
	}
	l.requests = done
	if failed != 0 {
		l.trouble = matching(out, `^Failed requests:|\(Connect:`)
	}
	l.trouble = append(l.trouble, matching(out, `^Non-2xx|^Write errors`)...)
	return l, nil
}

// wrk runs wrk: HTTP/1.1, kept alive.
func wrk(ctx context.Context, h *lab.Host, bin, url string, connections int, d time.Duration) (load, error) {
	threads := min(connections, 2)
	out, err := h.Run(ctx, bin, "-t", strconv.Itoa(threads), "-c", strconv.Itoa(connections), "-d", strconv.Itoa(int(d.Seconds())), "--timeout", "10", url)
	if err != nil {
		return load{}, fmt.Errorf("%w\n%s", err, out)
	}
	l := load{output: string(out)}
	var ok bool
	if l.requests, ok = number(out, `^\s+(\d+) requests in`); !ok {
		return l, fmt.Errorf("wrk writes:\n%s", out)
	}
	// It mentions errors only where there are some.
	l.trouble = matching(out, `Socket errors|Non-2xx`)
	return l, nil
}

// clean fails the test if a load generator saw an error.
func (l load) clean(t *testing.T) {
	t.Helper()
	if len(l.trouble) > 0 {
		t.Errorf("%d requests, and: %s", l.requests, strings.Join(l.trouble, "; "))
	}
}

// reused checks that the servers saw few connections for so many requests, by
// their own count and by the daemon's.
func (r *rig) reused(w *lab.Weir, requests int, servers []*lab.NginxServer) {
	r.t.Helper()
	accepted := 0
	for _, n := range servers {
		a, err := n.Accepted()
		if err != nil {
			r.t.Fatal(err)
		}
		accepted += a
	}
	f := r.web(w)
	ratio := 1 - float64(accepted)/float64(requests)
	r.t.Logf("%d requests on %d client connections, %d server connections: reuse ratio %.4f, by status %.4f",
		requests, f.ClientConnections, accepted, ratio, f.ReuseRatio)
	for _, s := range f.Servers {
		r.t.Logf("server %s: %d opened, %d idle, closed %v, failed %v", s.Name, s.Opened, s.Idle, s.Closed, s.Failed)
	}
	if ratio < 0.99 || f.ReuseRatio < 0.99 {
		r.t.Errorf("reuse ratio %.4f, by status %.4f, want at least 0.99", ratio, f.ReuseRatio)
	}
	if f.OwnAnswers > 0 {
		r.t.Errorf("the engine itself answered %d requests", f.OwnAnswers)
	}
}

// TestOneRequestClients: twenty thousand HTTP/1.0 clients without keep-alive,
// which bring one connection each, meet few server connections.
func TestOneRequestClients(t *testing.T) {
	bin := require.Tool(t, "ab")
	require.Tool(t, "nginx")
	r := newRig(t, lab.FarmOptions{})
	root, err := r.Lab.Subdir("site")
	if err != nil {
		t.Fatal(err)
	}
	files := newSite(t, root, 1000)
	servers := r.nginxAll(root)
	w := r.start(lab.ConfigOptions{})
	l, err := ab(within(t, 60*time.Second), r.Clients[0], bin, "http://"+r.VIP().String()+files.paths[0], 20_000, 64)
	if err != nil {
		t.Fatal(err)
	}
	l.clean(t)
	if l.requests != 20_000 {
		t.Errorf("%d requests of 20000 completed", l.requests)
	}
	r.reused(w, l.requests, servers)
	r.stop(w)
}

// TestKeptAliveLoad: 256 kept-alive connections for ten seconds, over two
// shards.
func TestKeptAliveLoad(t *testing.T) {
	bin := require.Tool(t, "wrk")
	require.Tool(t, "nginx")
	const connections = 256
	r := newRig(t, lab.FarmOptions{})
	root, err := r.Lab.Subdir("site")
	if err != nil {
		t.Fatal(err)
	}
	files := newSite(t, root, 1000)
	servers := r.nginxAll(root)
	// A machine that stands still for a second leaves all server connections
	// idle: here these are not too many.
	w := r.start(lab.ConfigOptions{Pool: fmt.Sprintf("{max_idle: %d}", connections), Extra: "queue: {shards: 2}\n"})
	ctx, total := within(t, 100*time.Second), 0
	// Each client connection needs a server connection at first: the ratio
	// means something when each has made many requests.
	for runs := 0; total < 400*connections && runs < 6; runs++ {
		l, err := wrk(ctx, r.Clients[0], bin, "http://"+r.VIP().String()+files.paths[0], connections, 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		l.clean(t)
		total += l.requests
	}
	r.reused(w, total, servers)
	r.stop(w)
}

// TestServersAndClients: Apache and nginx behind one VIP each time, curl, ab
// and wrk before it, over both address families and two shards; every byte
// that curl gets is right.
func TestServersAndClients(t *testing.T) {
	curlBin, abBin, wrkBin := require.Tool(t, "curl"), require.Tool(t, "ab"), require.Tool(t, "wrk")
	for _, server := range []string{"nginx", "apache2"} {
		t.Run(server, func(t *testing.T) {
			require.Tool(t, server)
			r := newRig(t, lab.FarmOptions{Servers: 2})
			root, err := r.Lab.Subdir("site")
			if err != nil {
				t.Fatal(err)
			}
			files := newSite(t, root, 1000, 0, 1, 10_000, 300_000)
			var accesses []func() ([]lab.Access, error)
			for i, h := range r.Servers {
				if server == "nginx" {
					n, err := lab.Nginx(h, lab.NginxOptions{Addrs: addrs(r.Farm, i), Root: root})
					if err != nil {
						t.Fatal(err)
					}
					accesses = append(accesses, n.Accesses)
					continue
				}
				a, err := lab.Apache(h, lab.ApacheOptions{Addrs: addrs(r.Farm, i), Root: root})
				if err != nil {
					t.Fatal(err)
				}
				accesses = append(accesses, a.Accesses)
			}
			w := r.start(lab.ConfigOptions{IPv6: true, Extra: "queue: {shards: 2}\n"})
			scratch, err := r.Lab.Subdir("curl")
			if err != nil {
				t.Fatal(err)
			}
			ctx := within(t, 60*time.Second)
			h, total := r.Clients[0], 0
			for _, vip := range []netip.AddrPort{r.VIP(), r.VIP6()} {
				c := &crowd{ctx: ctx, site: files, host: h, vip: vip.String()}
				for _, args := range [][]string{
					{"--http1.1"}, {"--http1.0"}, {"--http1.1", "--header", "Connection: close"}, {"--http1.0", "--header", "Connection: Keep-Alive"},
				} {
					if err := c.curl(curlBin, scratch, 10, args...); err != nil {
						t.Errorf("curl %s: %v", strings.Join(args, " "), err)
					}
				}
				total += int(c.requests.Load())
				url := "http://" + vip.String() + files.paths[0]
				for _, args := range [][]string{nil, {"-k"}} {
					l, err := ab(ctx, h, abBin, url, 1000, 20, args...)
					if err != nil {
						t.Fatal(err)
					}
					l.clean(t)
					total += l.requests
				}
				l, err := wrk(ctx, h, wrkBin, url, 32, time.Second)
				if err != nil {
					t.Fatal(err)
				}
				if l.requests == 0 {
					t.Errorf("no requests by wrk:\n%s", l.output)
				}
				l.clean(t)
				total += l.requests
			}
			r.answered(accesses, total)
			r.stop(w)
		})
	}
}

// answered checks the servers' logs: at least so many requests reached them,
// each answered well, and all came from the interface unit. (A load generator
// that stops after a time leaves some without counting them.)
func (r *rig) answered(accesses []func() ([]lab.Access, error), total int) {
	r.t.Helper()
	var all []lab.Access
	until(r.t, 15*time.Second, "the servers' access logs", func() bool {
		all = all[:0]
		for _, f := range accesses {
			as, err := f()
			if err != nil {
				r.t.Fatal(err)
			}
			all = append(all, as...)
		}
		return len(all) >= total
	})
	connections := map[netip.AddrPort]bool{}
	for _, a := range all {
		if from := a.Remote.Addr(); from != r.SNIP() && from != r.SNIP6() {
			r.t.Fatalf("a request came from %s, not from the interface unit", a.Remote)
		}
		if a.Status != 200 {
			r.t.Errorf("a server answered %s %s with %d", a.Method, a.Path, a.Status)
		}
		connections[a.Remote] = true
	}
	r.t.Logf("%d requests by the clients' count, %d by the servers', over %d connections", total, len(all), len(connections))
}
