// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
)

// workload is one kind of load.
type workload struct {
	name        string
	what        string // a sentence for the report
	size        int    // bytes of a response's body
	connections int
	close       bool   // a connection for each request
	http10      bool   // of HTTP/1.0
	upload      int    // bytes of a request's body
	mixed       bool   // bodies of many sizes
	rate        int    // requests a second, 0: as many as are answered
	bulk        bool   // bytes are what counts, not requests
	fresh       bool   // with a contender that has served nothing yet: its memory counts
	quick       bool   // part of the quick run
	flood       string // of floods: what is sent beside it
}

func (l workload) title() string { return l.name }

// sizes are the bodies of the mixed workload, in this order again and again:
// about what the resources of a web page are, 22 KB on average.
var sizes = []int{200, 1 << 10, 4 << 10, 200, 10 << 10, 40 << 10, 1 << 10, 200 << 10, 4 << 10, 1 << 10, 200, 10 << 10, 1 << 10}

// paths are what the workload asks for.
func (l workload) paths() []string {
	all := []int{l.size}
	switch {
	case l.upload > 0:
		return []string{"/upload"}
	case l.mixed:
		all = sizes
	}
	var ps []string
	for _, n := range all {
		ps = append(ps, fmt.Sprintf("/%d.bin", n))
	}
	return ps
}

// body is how many bytes of body an exchange carries.
func (l workload) body() int { return max(l.size, l.upload) }

const (
	kilo   = 1 << 10
	hundMB = 100 << 20
)

var workloads = []workload{
	{name: "kept-1k", what: "1 KB over 32 kept-alive connections", size: kilo, connections: 32, quick: true},
	{name: "one-shot", what: "1 KB, one connection for each request (HTTP/1.1, close), 32 at once", size: kilo, connections: 32, close: true, quick: true},
	{name: "bulk", what: "100 MB down over one connection", size: hundMB, connections: 1, bulk: true, quick: true},
	{name: "latency", what: "1 KB over one kept-alive connection", size: kilo, connections: 1, quick: true},
	{name: "one-shot-1.0", what: "1 KB, one connection for each request (HTTP/1.0), 32 at once", size: kilo, connections: 32, close: true, http10: true},
	{name: "kept-1k-256", what: "1 KB over 256 kept-alive connections", size: kilo, connections: 256},
	{name: "kept-1k-2000", what: "1 KB over 2,000 kept-alive connections", size: kilo, connections: 2000},
	{name: "kept-10k-1", what: "10 KB over one kept-alive connection", size: 10 * kilo, connections: 1},
	{name: "kept-10k", what: "10 KB over 32 kept-alive connections", size: 10 * kilo, connections: 32},
	{name: "kept-10k-256", what: "10 KB over 256 kept-alive connections", size: 10 * kilo, connections: 256},
	{name: "kept-10k-2000", what: "10 KB over 2,000 kept-alive connections", size: 10 * kilo, connections: 2000},
	{name: "mixed", what: "bodies from 200 bytes to 200 KB over 32 kept-alive connections", mixed: true, connections: 32},
	{name: "rate-1k", what: "1 KB, 1,000 requests a second over 16 kept-alive connections", size: kilo, connections: 16, rate: 1000},
	{name: "rate-5k", what: "1 KB, 5,000 requests a second over 32 kept-alive connections", size: kilo, connections: 32, rate: 5000},
	{name: "bulk-4", what: "100 MB down over four connections", size: hundMB, connections: 4, bulk: true},
	{name: "up", what: "100 MB up over one connection", upload: hundMB, connections: 1, bulk: true},
	{name: "up-4", what: "100 MB up over four connections", upload: hundMB, connections: 4, bulk: true},
	{name: quietTwin, what: "1 KB, one connection for each request, 4 at once", size: kilo, connections: 4, close: true},
	{name: "syn-flood", what: "the same in a flood of SYNs", size: kilo, connections: 4, close: true, flood: "SYN"},
	{name: "data-flood", what: "the same in a flood of ACKs and data that belong to nothing", size: kilo, connections: 4, close: true, flood: "data"},
	{name: "idle", what: "1 KB, 1,000 requests a second in turn over 10,000 kept-alive connections", size: kilo, connections: 10_000, rate: 1000, fresh: true},
}

// rig is the network that everything is measured on: client, router and
// server, joined by two virtual links without a switch.
type rig struct {
	lab                    *lab.Lab
	client, router, origin *lab.Host
	sources                []netip.Addr
	server, vip            netip.AddrPort
	taker, upVIP           netip.AddrPort // of uploads
	snip                   netip.Addr
	weir, self, dir        string
	congestion             string
	run                    string       // weir's runtime_dir
	nginx, sink            *lab.Process // the servers
	status                 string       // its status socket
}

// newRig makes the network. congestion is the congestion control of all hosts,
// "" for the machine's.
func newRig(weir, congestion string) (_ *rig, err error) {
	r := &rig{
		weir: weir, congestion: congestion, server: netip.MustParseAddrPort("198.51.100.11:80"), vip: netip.MustParseAddrPort("203.0.113.10:80"),
		snip: netip.MustParseAddr("198.51.100.1"), taker: netip.MustParseAddrPort("198.51.100.11:81"), upVIP: netip.MustParseAddrPort("203.0.113.10:81"),
	}
	if r.self, err = os.Executable(); err != nil {
		return nil, err
	}
	if r.lab, err = lab.New("weirbench"); err != nil {
		return nil, err
	}
	// Where an installed Weir has it: in memory. On a disk each page of the flow
	// store is written back again and again.
	if r.run, err = os.MkdirTemp(inMemory(), "weirbench"); err != nil {
		return nil, errors.Join(err, r.lab.Close())
	}
	if err := r.build(); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (r *rig) Close() error { return errors.Join(r.lab.Close(), os.RemoveAll(r.run)) }

// inMemory is a directory whose files are in memory, /run as a rule.
func inMemory() string {
	for _, d := range []string{"/run", "/dev/shm"} {
		var st unix.Statfs_t
		if unix.Statfs(d, &st) == nil && st.Type == unix.TMPFS_MAGIC {
			return d
		}
	}
	return "/run"
}

func (r *rig) build() error {
	r.client, r.router, r.origin = r.lab.Host("client"), r.lab.Host("router"), r.lab.Host("server")
	// Several client addresses: one alone has too few ports for tens of
	// thousands of connections a second.
	var clients []netip.Prefix
	for i := range 8 {
		a := netip.AddrFrom4([4]byte{198, 18, 0, byte(11 + i)})
		r.sources = append(r.sources, a)
		clients = append(clients, netip.PrefixFrom(a, 16))
	}
	if _, err := r.lab.Link(r.client, r.router, clients, []netip.Prefix{netip.MustParsePrefix("198.18.0.1/16")}, lab.LinkOptions{}); err != nil {
		return err
	}
	if _, err := r.lab.Link(r.router, r.origin, []netip.Prefix{netip.PrefixFrom(r.snip, 24)},
		[]netip.Prefix{netip.PrefixFrom(r.server.Addr(), 24)}, lab.LinkOptions{}); err != nil {
		return err
	}
	if err := r.client.AddRoute(netip.Prefix{}, netip.MustParseAddr("198.18.0.1")); err != nil {
		return err
	}
	if err := r.origin.AddRoute(netip.Prefix{}, r.snip); err != nil {
		return err
	}
	if err := r.router.AddRoute(strangers, r.sources[0]); err != nil {
		return err
	}
	if err := r.router.AddAddr("lo", netip.PrefixFrom(r.vip.Addr(), 32)); err != nil {
		return err
	}
	if err := r.router.Forwarding(true); err != nil {
		return err
	}
	for _, h := range []*lab.Host{r.client, r.router, r.origin} {
		set := map[string]string{"net/core/somaxconn": "4096", "net/ipv4/tcp_max_syn_backlog": "8192"}
		if r.congestion != "" {
			set["net/ipv4/tcp_congestion_control"] = r.congestion
		}
		for key, value := range set {
			if err := h.SetSysctl(key, value); err != nil {
				return err
			}
		}
	}
	if err := r.client.SetSysctl("net/ipv4/ip_local_port_range", "1024 65535"); err != nil {
		return err
	}
	var err error
	if r.dir, err = r.lab.Subdir("bench"); err != nil {
		return err
	}
	root, err := r.lab.Subdir("root")
	if err != nil {
		return err
	}
	for _, l := range workloads {
		for i, p := range l.paths() {
			size := l.size
			if l.mixed {
				size = sizes[i]
			}
			if err := os.WriteFile(filepath.Join(root, p), make([]byte, size), 0o644); err != nil {
				return err
			}
		}
	}
	if r.sink, err = r.origin.Start(r.origin.Command(r.self, "sink", "-listen", r.taker.String())); err != nil {
		return err
	}
	return r.startServer(root)
}

// serverConfig is the server of all contenders: one process, so that its
// processor time is seen, and no log.
const serverConfig = `daemon off;
master_process off;
worker_processes 1;
pid %[1]s/server.pid;
error_log %[1]s/server-error.log;
events { worker_connections 15000; multi_accept on; }
http {
  access_log off;
  proxy_temp_path %[1]s/stmp;
  client_body_temp_path %[1]s/stmp;
  fastcgi_temp_path %[1]s/stmp;
  uwsgi_temp_path %[1]s/stmp;
  scgi_temp_path %[1]s/stmp;
  sendfile on;
  tcp_nopush on;
  open_file_cache max=100 inactive=1h;
  open_file_cache_valid 1h;
  keepalive_timeout 1h;
  keepalive_requests 100000000;
  server {
    listen %[2]s backlog=4096;
    root %[3]s;
  }
  server {
    listen unix:%[1]s/status.sock;
    location / { stub_status; }
  }
}
`

func (r *rig) startServer(root string) error {
	bin, err := lab.FindTool("nginx")
	if err != nil {
		return fmt.Errorf("the server: %w (make deps installs it)", err)
	}
	file := filepath.Join(r.dir, "server.conf")
	if err := os.WriteFile(file, fmt.Appendf(nil, serverConfig, r.dir, r.server, root), 0o644); err != nil {
		return err
	}
	if r.nginx, err = r.origin.Start(r.origin.Command(bin, "-p", r.dir, "-e", filepath.Join(r.dir, "server-error.log"), "-c", file)); err != nil {
		return err
	}
	r.status = filepath.Join(r.dir, "status.sock")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for {
		c, err := r.client.Dial(ctx, "tcp", r.server.String())
		if err == nil {
			return c.Close()
		}
		select {
		case <-r.nginx.Done():
			log, _ := os.ReadFile(filepath.Join(r.dir, "server-error.log"))
			return fmt.Errorf("the server ended: %v: %s", r.nginx.Wait(), log)
		case <-ctx.Done():
			return fmt.Errorf("the server does not accept connections: %w", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// accepted asks the server how many connections it has accepted, its own
// status connections not counted.
func (r *rig) accepted() (int, error) {
	var d net.Dialer
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", r.status) },
	}}
	resp, err := client.Get("http://server/")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	// Active connections, a heading, then accepts, handled, requests.
	lines := strings.Split(string(b), "\n")
	n := 0
	if len(lines) < 3 {
		return 0, fmt.Errorf("the server's status: %q", b)
	}
	if _, err := fmt.Sscan(lines[2], &n); err != nil {
		return 0, fmt.Errorf("the server's status: %q: %w", b, err)
	}
	return n, nil
}

// counters are read before the load generator starts and after its end.
type counters struct {
	server, router time.Duration // processor time
	traffic        lab.Traffic   // at the server
	accepted       int
	memory         int64 // of the contender's process, bytes
}

// resident is the memory of a process that is really there, shared memory
// included, in bytes.
func resident(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0, err
	}
	var size, rss int64
	if _, err := fmt.Sscan(string(b), &size, &rss); err != nil {
		return 0, err
	}
	return rss * int64(os.Getpagesize()), nil
}

func (r *rig) count(p *lab.Process) (c counters, err error) {
	if c.server, err = r.nginx.CPU(); err != nil {
		return c, err
	}
	sink, err := r.sink.CPU()
	if err != nil {
		return c, err
	}
	c.server += sink
	if p != nil {
		if c.router, err = p.CPU(); err != nil {
			return c, err
		}
		if c.memory, err = resident(p.Pid()); err != nil {
			return c, err
		}
	}
	if c.traffic, err = r.origin.Traffic("router"); err != nil {
		return c, err
	}
	c.accepted, err = r.accepted()
	return c, err
}

// visit starts a contender, measures all workloads with it, and ends it. What
// needs a fresh one is measured behind the others, each with one of its own.
func (r *rig) visit(ctx context.Context, w io.Writer, rep *report, round int, c contender, what []workload, measure time.Duration) error {
	var together []workload
	for _, l := range what {
		if !l.fresh && c.takes(l) {
			together = append(together, l)
		}
	}
	if len(together) > 0 {
		if err := r.stay(ctx, w, rep, round, c, together, measure); err != nil {
			return err
		}
	}
	for _, l := range what {
		if l.fresh && c.takes(l) {
			if err := r.stay(ctx, w, rep, round, c, []workload{l}, measure); err != nil {
				return err
			}
		}
	}
	return nil
}

// stay is one life of a contender.
func (r *rig) stay(ctx context.Context, w io.Writer, rep *report, round int, c contender, what []workload, measure time.Duration) error {
	var p *lab.Process
	if c.start != nil {
		var err error
		if p, err = c.start(ctx, r); err != nil {
			return err
		}
	}
	// What a program does when it starts, and with its first connections, is
	// not what is compared.
	first := what[0]
	if first.fresh {
		first = workloads[0]
	}
	if _, err := r.measure(ctx, p, c, first, startUp); err != nil {
		return fmt.Errorf("%s: %w", first.name, err)
	}
	for _, l := range what {
		s, err := r.measure(ctx, p, c, l, measure)
		if err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
		s.round, s.contender, s.workload = round, c.name, l.name
		rep.samples = append(rep.samples, s)
		fmt.Fprintf(w, "round %d  %-14s %-14s %s\n", round+1, c.name, l.name, s)
	}
	if p == nil {
		return nil
	}
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.Done():
		return nil
	case <-time.After(5 * time.Second):
		return p.Kill()
	}
}

// warmUp is how long each load runs before it is measured, startUp how long
// the first one runs after a contender's start.
const (
	warmUp  = 200 * time.Millisecond
	startUp = time.Second
)

// measure runs one workload against one contender.
func (r *rig) measure(ctx context.Context, p *lab.Process, c contender, l workload, d time.Duration) (sample, error) {
	job := loadJob{
		Target: c.target(r, l.upload > 0), Sources: r.sources, Paths: l.paths(), Connections: l.connections,
		Close: l.close, HTTP10: l.http10, Upload: l.upload, Rate: l.rate, Warm: warmUp, Measure: d,
	}
	ctx, cancel := context.WithTimeout(ctx, settle+warmUp+d+10*time.Second)
	defer cancel()
	before, err := r.count(p)
	if err != nil {
		return sample{}, err
	}
	stop := func() (float64, error) { return 0, nil }
	if l.flood != "" {
		if stop, err = r.flood(ctx, l.flood, job.Target); err != nil {
			return sample{}, err
		}
	}
	out, err := r.client.Run(ctx, r.self, job.args()...)
	flooded, floodErr := stop()
	if err = errors.Join(err, floodErr); err != nil {
		return sample{}, fmt.Errorf("load generator: %w", err)
	}
	after, err := r.count(p)
	if err != nil {
		return sample{}, err
	}
	var res loadResult
	if err := json.Unmarshal(out, &res); err != nil {
		return sample{}, fmt.Errorf("load generator: %q: %w", out, err)
	}
	s := sample{loadResult: res, bulk: l.bulk, flooded: flooded}
	// A response that is not complete when the time is over is work all the
	// same: bulk transfers are counted by their bytes.
	n := float64(res.AllRequests)
	if l.bulk {
		n = float64(res.AllBytes) / float64(l.body())
	}
	if n > 0 {
		s.serverCPU = time.Duration(float64(after.server-before.server) / n)
		s.routerCPU = time.Duration(float64(after.router-before.router) / n)
		s.packets = float64(after.traffic.Since(before.traffic).Packets()) / n
	}
	s.opened = after.accepted - before.accepted - 1 // the status request itself
	if l.fresh {
		s.memory = float64(after.memory-before.memory) / float64(l.connections)
	}
	return s, nil
}
