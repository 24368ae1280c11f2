// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/weirgate/weir/integration/bench/bare"
	"github.com/weirgate/weir/integration/lab"
)

// contender is something that stands between clients and servers.
type contender struct {
	name    string
	program string // that must be installed; "" for none
	// start starts it on the router; nil where there is nothing to start. The
	// process is what uses the router's processor.
	start func(context.Context, *rig) (*lab.Process, error)
	// target is where clients connect to; uploads have a server of their own.
	target func(r *rig, upload bool) netip.AddrPort
	full   bool // only part of the full run
	// only are the workloads that it differs in from its kind; nil: all.
	only []string
}

// takes says whether a workload is measured with it.
func (c contender) takes(l workload) bool { return c.only == nil || slices.Contains(c.only, l.name) }

func (c contender) title() string { return c.name }

// missing says why it cannot take part.
func (c contender) missing() error {
	if c.program == "" {
		return nil
	}
	_, err := lab.FindTool(c.program)
	return err
}

// contenders in the order of the report. The first two are what the others are
// compared with.
var contenders = []contender{
	{name: "direct", target: func(r *rig, upload bool) netip.AddrPort {
		if upload {
			return r.taker
		}
		return r.server
	}},
	{name: "haproxy", program: "haproxy", start: startHAProxy("option splice-auto"), target: atVIP},
	{name: "haproxy-splice", program: "haproxy", start: startHAProxy("option splice-request\n  option splice-response"), target: atVIP, full: true, only: bulky},
	{name: "nginx", program: "nginx", start: startNginx(""), target: atVIP},
	{name: "nginx-large", program: "nginx", start: startNginx("proxy_buffers 16 64k; proxy_buffer_size 64k;"), target: atVIP, full: true, only: bulky},
	{name: "weir", start: startWeir("batched", true, 1), target: atVIP},
	{name: "weir-mortal", start: startWeir("batched", false, 1), target: atVIP, full: true, only: []string{"kept-1k", "one-shot", "bulk", "kept-1k-256", "latency"}},
	{name: "weir-2", start: startWeir("batched", true, 2), target: atVIP, full: true, only: []string{"kept-1k", "one-shot", "bulk-4", "kept-1k-256", "latency"}},
	{name: "weir-plain", start: startWeir("plain", true, 1), target: atVIP},
	{name: "bare-queue", start: startBare("queue"), target: atVIP, full: true, only: kept},
	{name: "bare-tc", start: startBare("tc"), target: atVIP, full: true, only: kept},
}

// kept are the workloads in which connections last, so that what translates
// them is all that is measured.
var kept = []string{"kept-1k", "kept-1k-256", "latency", "bulk", "bulk-4"}

// bulky are the workloads that the proxies have other settings for.
var bulky = []string{"bulk", "bulk-4", "up", "up-4"}

func atVIP(r *rig, upload bool) netip.AddrPort {
	if upload {
		return r.upVIP
	}
	return r.vip
}

// haproxyConfig follows the tuning chapters of HAProxy's manual: connections
// to servers shared between clients, no log, splicing where HAProxy finds that
// it helps (haproxy-splice: for all responses). One thread, because on two
// processors the client and the server need the other: two were no faster.
const haproxyConfig = `global
  maxconn 15000
  nbthread 1
  no strict-limits
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  %[3]s
  maxconn 15000
  http-reuse always
frontend web
  bind %[1]s backlog 4096
  default_backend servers
frontend uploads
  bind %[4]s backlog 4096
  default_backend takers
backend servers
  server s1 %[2]s pool-max-conn -1
backend takers
  server s1 %[5]s pool-max-conn -1
`

func startHAProxy(splice string) func(context.Context, *rig) (*lab.Process, error) {
	return func(ctx context.Context, r *rig) (*lab.Process, error) {
		return r.proxy(ctx, "haproxy", fmt.Sprintf(haproxyConfig, r.vip, r.server, splice, r.upVIP, r.taker), "-db", "-f")
	}
}

// nginxConfig keeps connections to the server as nginx's manual says, with one
// worker, as HAProxy has one thread, and never writes a response to disk.
// nginx-large has larger buffers than the default, which help bulk transfers.
const nginxConfig = `daemon off;
master_process off;
worker_processes 1;
pid %[3]s/nginx.pid;
error_log %[3]s/error.log;
events { worker_connections 15000; multi_accept on; }
http {
  access_log off;
  proxy_temp_path %[3]s/tmp;
  client_body_temp_path %[3]s/tmp;
  fastcgi_temp_path %[3]s/tmp;
  uwsgi_temp_path %[3]s/tmp;
  scgi_temp_path %[3]s/tmp;
  keepalive_requests 100000000;
  tcp_nodelay on;
  upstream servers {
    server %[2]s;
    keepalive 512;
    keepalive_requests 100000000;
  }
  server {
    listen %[1]s backlog=4096;
    location / {
      proxy_pass http://servers;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_max_temp_file_size 0;
      %[4]s
    }
  }
  upstream takers {
    server %[6]s;
    keepalive 512;
    keepalive_requests 100000000;
  }
  server {
    listen %[5]s backlog=4096;
    client_max_body_size 0;
    location / {
      proxy_pass http://takers;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_request_buffering off;
      %[4]s
    }
  }
}
`

func startNginx(buffers string) func(context.Context, *rig) (*lab.Process, error) {
	return func(ctx context.Context, r *rig) (*lab.Process, error) {
		config := fmt.Sprintf(nginxConfig, r.vip, r.server, r.dir, buffers, r.upVIP, r.taker)
		return r.proxy(ctx, "nginx", config, "-p", r.dir, "-e", filepath.Join(r.dir, "error.log"), "-c")
	}
}

// proxy starts a program on the router and waits until it accepts connections.
func (r *rig) proxy(ctx context.Context, name, config string, args ...string) (*lab.Process, error) {
	bin, err := lab.FindTool(name)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(r.dir, name+".conf")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		return nil, err
	}
	var out strings.Builder
	cmd := r.router.Command(bin, append(args, file)...)
	cmd.Stdout, cmd.Stderr = &out, &out
	p, err := r.router.Start(cmd)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		c, err := r.client.Dial(ctx, "tcp", r.vip.String())
		if err == nil {
			return p, c.Close()
		}
		select {
		case <-p.Done():
			return nil, fmt.Errorf("%s ended: %v: %s", name, p.Wait(), out.String())
		case <-ctx.Done():
			_ = p.Kill()
			return nil, fmt.Errorf("%s does not accept connections: %w", name, err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// weirConfig is the default but for the place of its files, one shard, as the
// others have one thread, and the pool's limits, which are as theirs: none for
// connections, and 512 that are kept.
const weirConfig = `runtime_dir: %[1]q
source: {addresses: [%[2]s]}
farms:
  - name: web
    listen: %[3]s
    servers: [{name: s1, address: "%[4]s"}]
    pool: {max_connections: 0, max_idle: 512}
  - name: uploads
    listen: %[7]s
    servers: [{name: s1, address: "%[8]s"}]
queue: {backend: %[5]s, shards: %[9]d}
admin: {socket: %[6]q, metrics: "127.0.0.1:9464"}
stop_timeout: 0s
`

// startWeir starts weir with a backend. With keeps false there is no place for
// its flow store: what a connection's record costs when it need not outlive the
// process.
func startWeir(backend string, keeps bool, shards int) func(context.Context, *rig) (*lab.Process, error) {
	return func(ctx context.Context, r *rig) (*lab.Process, error) {
		run := r.run
		taken := filepath.Join(run, "flows", "shard0")
		if keeps {
			if err := os.RemoveAll(taken); err != nil {
				return nil, err
			}
		} else if err := os.MkdirAll(filepath.Join(taken, "taken"), 0o755); err != nil {
			return nil, err
		}
		socket := filepath.Join(run, "admin.sock")
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		w, err := lab.StartWeir(ctx, r.router, lab.WeirOptions{
			Binary: r.weir, Dir: r.dir, Socket: socket,
			Config: fmt.Sprintf(weirConfig, run, r.snip, r.vip, r.server, backend, socket, r.upVIP, r.taker, shards),
		})
		if err != nil {
			return nil, err
		}
		return w.Proc, nil
	}
}

// startBare starts a translator that does nothing else, see package bare.
func startBare(by string) func(context.Context, *rig) (*lab.Process, error) {
	return func(ctx context.Context, r *rig) (*lab.Process, error) {
		// What is rewritten arrives with an address of the router as its source.
		// Weir sets this by itself, and takes it back.
		if err := r.router.SetSysctl("net/ipv4/conf/all/accept_local", "1"); err != nil {
			return nil, err
		}
		cmd := r.router.Command(r.self, "bare", "-by", by, "-vip", r.vip.String(), "-server", r.server.String(), "-snip", r.snip.String())
		var out lab.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		p, err := r.router.Start(cmd)
		if err != nil {
			return nil, err
		}
		for end := time.Now().Add(10 * time.Second); !strings.Contains(out.String(), bareReady); time.Sleep(5 * time.Millisecond) {
			select {
			case <-p.Done():
				return nil, fmt.Errorf("it ended: %v: %s", p.Wait(), out.String())
			default:
			}
			if time.Now().After(end) {
				return nil, errors.Join(errors.New("it does not begin: "+out.String()), p.Kill())
			}
		}
		return p, nil
	}
}

// bareReady is what a translator says when it translates.
const bareReady = "ready"

// runBare is a translator's main function.
func runBare(ctx context.Context, args []string, w io.Writer) error {
	var cfg bare.Config
	fs := flag.NewFlagSet("bare", flag.ContinueOnError)
	by := fs.String("by", "", "queue or tc")
	fs.TextVar(&cfg.VIP, "vip", netip.AddrPort{}, "address and port that clients use")
	fs.TextVar(&cfg.Server, "server", netip.AddrPort{}, "address and port of the server")
	fs.TextVar(&cfg.SNIP, "snip", netip.Addr{}, "source address toward the server")
	if err := fs.Parse(args); err != nil {
		return err
	}
	way := map[string]func(context.Context, bare.Config, func()) error{"queue": bare.Queue, "tc": bare.TC}[*by]
	if way == nil {
		return fmt.Errorf("-by %q: there are queue and tc", *by)
	}
	return way(ctx, cfg, func() { fmt.Fprintln(w, bareReady) })
}
