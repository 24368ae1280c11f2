// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// NginxOptions says what an nginx of the lab serves.
type NginxOptions struct {
	Addrs []netip.AddrPort // where it listens; at least one
	// Root is the directory of the files that it serves. Empty: a fresh one.
	Root string
	// KeepAlive is how long it keeps idle connections; 0 means an hour.
	KeepAlive time.Duration
	// KeepAliveRequests is how many requests a connection may carry; 0 means a
	// million.
	KeepAliveRequests int
	// NoAccessLog leaves the access log out, for the speed. Accesses and what
	// is made of it then know of nothing.
	NoAccessLog bool
	// Extra is added to the server block as it is.
	Extra string
}

// A NginxServer is a real nginx that runs in a host. It serves the files under Root;
// a POST to /upload stores the body and answers with the path of its file;
// under /dav/ it takes PUT and DELETE.
type NginxServer struct {
	Host *Host
	Root string // the directory of its files
	Dir  string // its configuration, logs and temporary files
	Proc *Process

	// What Accepted leaves out: the connections that the lab itself has made.
	own atomic.Int64
}

// Nginx starts nginx in the foreground inside the namespace and waits until it
// accepts connections. It runs as a single process, which does not survive
// this one.
func Nginx(h *Host, o NginxOptions) (*NginxServer, error) {
	if len(o.Addrs) == 0 {
		return nil, errors.New("lab: nginx needs an address")
	}
	bin, err := FindTool("nginx")
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	dir, err := h.lab.Subdir(h.name + "-nginx-" + strconv.Itoa(int(o.Addrs[0].Port())))
	if err != nil {
		return nil, err
	}
	n := &NginxServer{Host: h, Root: o.Root, Dir: dir}
	if n.Root == "" {
		n.Root = filepath.Join(dir, "root")
	}
	for _, d := range []string{n.Root, filepath.Join(dir, "tmp"), filepath.Join(dir, "upload")} {
		if err := os.MkdirAll(d, 0o777); err != nil {
			return nil, fmt.Errorf("lab: nginx: %w", err)
		}
	}
	conf := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(conf, []byte(n.config(o)), 0o644); err != nil {
		return nil, fmt.Errorf("lab: nginx: %w", err)
	}
	errorLog := filepath.Join(dir, "error.log")
	if n.Proc, err = h.Start(h.Command(bin, "-p", dir, "-e", errorLog, "-c", conf)); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for {
		c, err := h.Dial(ctx, "tcp", o.Addrs[0].String())
		if err == nil {
			n.own.Add(1)
			return n, c.Close()
		}
		select {
		case <-n.Proc.Done():
			log, _ := os.ReadFile(errorLog)
			return nil, fmt.Errorf("lab: host %s: nginx ended: %v: %s", h.name, n.Proc.Wait(), strings.TrimSpace(string(log)))
		case <-ctx.Done():
			return nil, fmt.Errorf("lab: host %s: nginx does not accept connections at %s: %w", h.name, o.Addrs[0], err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (n *NginxServer) config(o NginxOptions) string {
	if o.KeepAlive == 0 {
		o.KeepAlive = time.Hour
	}
	if o.KeepAliveRequests == 0 {
		o.KeepAliveRequests = 1_000_000
	}
	var listen strings.Builder
	for _, a := range o.Addrs {
		fmt.Fprintf(&listen, "    listen %s backlog=4096;\n", a)
	}
	accessLog := n.Dir + "/access.log lab"
	if o.NoAccessLog {
		accessLog = "off"
	}
	// A body can only be stored by a handler that reads it, and the plainest
	// one in every build of nginx is proxy_pass: it passes the file's name to a
	// second server on a unix socket, which answers with it.
	return fmt.Sprintf(`daemon off;
master_process off;
worker_processes 1;
worker_rlimit_nofile 65536;
pid %[1]s/nginx.pid;
error_log %[1]s/error.log warn;
events { worker_connections 16384; }
http {
  types { text/html html; text/plain txt; }
  default_type application/octet-stream;
  log_format lab "$connection\t$connection_requests\t$remote_addr\t$remote_port\t$request_method\t$uri\t$status\t$body_bytes_sent\t$server_protocol";
  access_log %[7]s;
  client_body_temp_path %[1]s/tmp/body;
  proxy_temp_path %[1]s/tmp/proxy;
  fastcgi_temp_path %[1]s/tmp/fastcgi;
  uwsgi_temp_path %[1]s/tmp/uwsgi;
  scgi_temp_path %[1]s/tmp/scgi;
  sendfile on;
  client_max_body_size 0;
  keepalive_timeout %[3]ds;
  keepalive_requests %[4]d;
  server {
%[2]s    root %[5]s;
    location = /upload {
      client_body_in_file_only on;
      client_body_temp_path %[1]s/upload;
      proxy_pass_request_body off;
      proxy_set_header Content-Length "";
      proxy_set_header X-Body-File $request_body_file;
      proxy_pass http://unix:%[1]s/name.sock;
    }
    location /dav/ {
      dav_methods PUT DELETE;
      create_full_put_path on;
    }
%[6]s
  }
  server {
    listen unix:%[1]s/name.sock;
    access_log off;
    location / { return 200 "$http_x_body_file\n"; }
    location = /accepts { stub_status; }
  }
}
`, n.Dir, listen.String(), int(o.KeepAlive.Seconds()), o.KeepAliveRequests, n.Root, o.Extra, accessLog)
}

// Stop ends nginx.
func (n *NginxServer) Stop() error { return n.Proc.Kill() }

// An Access is one line of nginx's access log.
type Access struct {
	Connection int // nginx's serial number of the connection
	Request    int // the how manyth request on that connection, from 1
	Remote     netip.AddrPort
	Method     string
	Path       string
	Status     int
	BodyBytes  int64 // bytes of the response's body
	Protocol   string
}

// Accesses reads the access log. nginx writes a line after the last byte of
// the response, so a client may know of the end a moment earlier.
func (n *NginxServer) Accesses() ([]Access, error) {
	f, err := os.Open(filepath.Join(n.Dir, "access.log"))
	if err != nil {
		return nil, fmt.Errorf("lab: nginx of %s: %w", n.Host.name, err)
	}
	defer f.Close()
	var as []Access
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		a, err := parseAccess(sc.Text())
		if err != nil {
			return nil, fmt.Errorf("lab: nginx of %s: access log, line %d: %w", n.Host.name, len(as)+1, err)
		}
		as = append(as, a)
	}
	return as, sc.Err()
}

func parseAccess(line string) (Access, error) {
	var a Access
	f := strings.Split(line, "\t")
	if len(f) != 9 {
		return a, fmt.Errorf("%d fields instead of 9: %q", len(f), line)
	}
	var err error
	num := func(s string) int {
		v, e := strconv.Atoi(s)
		err = errors.Join(err, e)
		return v
	}
	a.Connection, a.Request = num(f[0]), num(f[1])
	addr, e := netip.ParseAddr(f[2])
	err = errors.Join(err, e)
	a.Remote = netip.AddrPortFrom(addr, uint16(num(f[3])))
	a.Method, a.Path, a.Status = f[4], f[5], num(f[6])
	a.BodyBytes, e = strconv.ParseInt(f[7], 10, 64)
	a.Protocol = f[8]
	return a, errors.Join(err, e)
}

// Connections returns the number of connections that carried a request.
func (n *NginxServer) Connections() (int, error) {
	as, err := n.Accesses()
	if err != nil {
		return 0, err
	}
	seen := map[int]bool{}
	for _, a := range as {
		seen[a.Connection] = true
	}
	return len(seen), nil
}

// Accepted returns the number of connections that nginx has accepted on its
// addresses, those without a request included, the lab's own excluded.
func (n *NginxServer) Accepted() (int, error) {
	var d net.Dialer
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			n.own.Add(1)
			return d.DialContext(ctx, "unix", filepath.Join(n.Dir, "name.sock"))
		},
	}}
	resp, err := client.Get("http://nginx/accepts")
	if err != nil {
		return 0, fmt.Errorf("lab: nginx of %s: %w", n.Host.name, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, fmt.Errorf("lab: nginx of %s: %w", n.Host.name, err)
	}
	// Active connections, a heading, then accepts, handled, requests.
	lines := strings.Split(string(b), "\n")
	var accepts int
	if len(lines) < 3 {
		return 0, fmt.Errorf("lab: nginx of %s: status %q", n.Host.name, b)
	}
	if _, err := fmt.Sscan(lines[2], &accepts); err != nil {
		return 0, fmt.Errorf("lab: nginx of %s: status %q: %w", n.Host.name, b, err)
	}
	// Each upload makes nginx connect to its own second server.
	as, err := n.Accesses()
	for _, a := range as {
		if a.Path == "/upload" {
			accepts--
		}
	}
	return accepts - int(n.own.Load()), err
}

// FindTool finds a program, also in the system directories that the PATH of an
// ordinary user lacks.
func FindTool(name string) (string, error) {
	p, err := exec.LookPath(name)
	if err == nil {
		return p, nil
	}
	for _, d := range []string{"/usr/sbin/", "/sbin/", "/usr/local/sbin/"} {
		if p, e := exec.LookPath(d + name); e == nil {
			return p, nil
		}
	}
	return "", err
}
