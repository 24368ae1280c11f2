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

	"github.com/weirgate/weir/integration/lab"
)

// workload is one kind of load.
type workload struct {
	name        string
	what        string // a sentence for the report
	size        int    // bytes of a response's body
	connections int
	close       bool   // a connection for each request
	bulk        bool   // bytes are what counts, not requests
	quick       bool   // part of the quick run
	flood       string // of floods: what is sent beside it
}

func (l workload) title() string { return l.name }

func (l workload) path() string { return fmt.Sprintf("/%d.bin", l.size) }

var workloads = []workload{
	{name: "kept-1k", what: "1 KB over 32 kept-alive connections", size: 1 << 10, connections: 32, quick: true},
	{name: "one-shot", what: "1 KB, one connection for each request, 32 at once", size: 1 << 10, connections: 32, close: true, quick: true},
	{name: "bulk", what: "100 MB over one connection", size: 100 << 20, connections: 1, bulk: true, quick: true},
	{name: "latency", what: "1 KB over one kept-alive connection", size: 1 << 10, connections: 1, quick: true},
	{name: "kept-10k", what: "10 KB over 32 kept-alive connections", size: 10 << 10, connections: 32},
	{name: "kept-256", what: "1 KB over 256 kept-alive connections", size: 1 << 10, connections: 256},
	{name: quietTwin, what: "1 KB, one connection for each request, 4 at once", size: 1 << 10, connections: 4, close: true},
	{name: "syn-flood", what: "the same in a flood of SYNs", size: 1 << 10, connections: 4, close: true, flood: "SYN"},
	{name: "data-flood", what: "the same in a flood of ACKs and data that belong to nothing", size: 1 << 10, connections: 4, close: true, flood: "data"},
	{name: "bulk-4", what: "100 MB over four connections", size: 100 << 20, connections: 4, bulk: true},
}

// rig is the network that everything is measured on: client, router and
// server, joined by two virtual links without a switch.
type rig struct {
	lab                    *lab.Lab
	client, router, origin *lab.Host
	sources                []netip.Addr
	server, vip            netip.AddrPort
	snip                   netip.Addr
	weir, self, dir        string
	nginx                  *lab.Process // the server
	status                 string       // its status socket
}

func newRig(weir string) (_ *rig, err error) {
	r := &rig{
		weir: weir, server: netip.MustParseAddrPort("198.51.100.11:80"), vip: netip.MustParseAddrPort("203.0.113.10:80"),
		snip: netip.MustParseAddr("198.51.100.1"),
	}
	if r.self, err = os.Executable(); err != nil {
		return nil, err
	}
	if r.lab, err = lab.New("weirbench"); err != nil {
		return nil, err
	}
	if err := r.build(); err != nil {
		return nil, errors.Join(err, r.lab.Close())
	}
	return r, nil
}

func (r *rig) Close() error { return r.lab.Close() }

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
		for key, value := range map[string]string{"net/core/somaxconn": "4096", "net/ipv4/tcp_max_syn_backlog": "8192"} {
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
		if err := os.WriteFile(filepath.Join(root, l.path()), make([]byte, l.size), 0o644); err != nil {
			return err
		}
	}
	return r.startServer(root)
}

// serverConfig is the server of all contenders: one process, so that its
// processor time is seen, and no log.
const serverConfig = `daemon off;
master_process off;
worker_processes 1;
worker_rlimit_nofile 65536;
pid %[1]s/server.pid;
error_log %[1]s/server-error.log;
events { worker_connections 20000; multi_accept on; }
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
}

func (r *rig) count(p *lab.Process) (c counters, err error) {
	if c.server, err = r.nginx.CPU(); err != nil {
		return c, err
	}
	if p != nil {
		if c.router, err = p.CPU(); err != nil {
			return c, err
		}
	}
	if c.traffic, err = r.origin.Traffic("router"); err != nil {
		return c, err
	}
	c.accepted, err = r.accepted()
	return c, err
}

// visit starts a contender, measures all workloads with it, and ends it.
func (r *rig) visit(ctx context.Context, w io.Writer, rep *report, round int, c contender, what []workload, measure time.Duration) error {
	var p *lab.Process
	if c.start != nil {
		var err error
		if p, err = c.start(ctx, r); err != nil {
			return err
		}
	}
	// What a program does when it starts, and with its first connections, is
	// not what is compared.
	if len(what) > 0 {
		if _, err := r.measure(ctx, p, c, what[0], startUp); err != nil {
			return fmt.Errorf("%s: %w", what[0].name, err)
		}
	}
	for _, l := range what {
		s, err := r.measure(ctx, p, c, l, measure)
		if err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
		s.round, s.contender, s.workload = round, c.name, l.name
		rep.samples = append(rep.samples, s)
		fmt.Fprintf(w, "round %d  %-10s %-10s %s\n", round+1, c.name, l.name, s)
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
		Target: c.target(r), Sources: r.sources, Path: l.path(), Connections: l.connections, Close: l.close, Warm: warmUp, Measure: d,
	}
	ctx, cancel := context.WithTimeout(ctx, warmUp+d+10*time.Second)
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
		n = float64(res.AllBytes) / float64(l.size)
	}
	if n > 0 {
		s.serverCPU = time.Duration(float64(after.server-before.server) / n)
		s.routerCPU = time.Duration(float64(after.router-before.router) / n)
		s.packets = float64(after.traffic.Since(before.traffic).Packets()) / n
	}
	s.opened = after.accepted - before.accepted - 1 // the status request itself
	return s, nil
}
