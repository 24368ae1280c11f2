// SPDX-License-Identifier: Apache-2.0

package framing

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
)

// A backend is a real HTTP server with its own log as witness. It answers
// everything with a short text, and keeps connections for an hour.
type backend struct {
	name string
	port uint16
	log  func() (string, error) // lines of PORT TAB METHOD TARGET VERSION
}

// ledger reads the backend's log.
func (b *backend) ledger(t *testing.T) ledger {
	t.Helper()
	text, err := b.log()
	if err != nil {
		t.Fatal(err)
	}
	out := ledger{}
	for line := range strings.Lines(text) {
		if !strings.HasSuffix(line, "\n") {
			continue // being written
		}
		p, request, ok := strings.Cut(strings.TrimRight(line, "\r\n"), "\t")
		port, err := strconv.ParseUint(p, 10, 16)
		if !ok || err != nil {
			t.Fatalf("%s: log line %q", b.name, line)
		}
		k := [2]uint16{b.port, uint16(port)}
		out[k] = append(out[k], parseRequestLine(request))
	}
	return out
}

// parseRequestLine splits a request line as logged. A server that could not
// read one writes nothing, or a word of its own: that has no method here.
func parseRequestLine(line string) seen {
	f := strings.Split(line, " ")
	if len(f) != 3 || f[0] == "<BADREQ>" {
		return seen{target: line}
	}
	return seen{method: f[0], target: f[1], complete: true}
}

func fileLog(path string) func() (string, error) {
	return func() (string, error) {
		b, err := os.ReadFile(path)
		return string(b), err
	}
}

// launch writes a configuration and starts a program with it; the place of the
// file stands for % in args. It waits until the port answers.
func (r *rig) launch(name string, h *lab.Host, port uint16, conf string, args ...string) (dir string, out *lab.Buffer) {
	r.t.Helper()
	dir, err := r.Lab.Subdir(name)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		r.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "root"), []byte("ok\n"), 0o644); err != nil {
		r.t.Fatal(err)
	}
	file := filepath.Join(dir, "conf")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(conf, "DIR", dir)), 0o644); err != nil {
		r.t.Fatal(err)
	}
	for i := range args {
		args[i] = strings.NewReplacer("%", file, "DIR", dir).Replace(args[i])
	}
	out = &lab.Buffer{}
	cmd := h.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir = dir
	p, err := h.Start(cmd)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx := within(r.t, 20*time.Second)
	for {
		addr, _ := netip.ParseAddrPort(r.at(0, port))
		c, err := h.Dial(ctx, "tcp", addr.String())
		if err == nil {
			_ = c.Close()
			return dir, out
		}
		select {
		case <-p.Done():
			r.t.Fatalf("%s ended: %v: %s", name, p.Wait(), out)
		case <-ctx.Done():
			r.t.Fatalf("%s does not listen on port %d: %s", name, port, out)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (r *rig) nginx(port uint16) *backend {
	r.t.Helper()
	dir, _ := r.launch("nginx", r.Servers[0], port, fmt.Sprintf(`daemon off;
master_process off;
pid DIR/pid;
error_log DIR/error.log warn;
events { worker_connections 4096; }
http {
  log_format w "$remote_port\t$request";
  access_log DIR/access.log w;
  client_body_temp_path DIR/body;
  proxy_temp_path DIR/proxy;
  fastcgi_temp_path DIR/fastcgi;
  uwsgi_temp_path DIR/uwsgi;
  scgi_temp_path DIR/scgi;
  client_max_body_size 0;
  keepalive_timeout 3600s;
  keepalive_requests 1000000;
  server {
    listen %s backlog=4096;
    location / { return 200 "nginx $request_uri\n"; }
  }
}
`, r.at(0, port)), require.Tool(r.t, "nginx"), "-p", "DIR", "-e", "DIR/error.log", "-c", "%")
	return &backend{"nginx", port, fileLog(filepath.Join(dir, "access.log"))}
}

func (r *rig) apache(port uint16) *backend {
	r.t.Helper()
	modules := ""
	for _, d := range []string{"/usr/lib/apache2/modules", "/usr/lib64/httpd/modules", "/usr/lib/httpd/modules"} {
		if _, err := os.Stat(filepath.Join(d, "mod_mpm_event.so")); err == nil {
			modules = d
		}
	}
	dir, _ := r.launch("apache", r.Servers[0], port, fmt.Sprintf(`ServerRoot DIR
LoadModule mpm_event_module %[1]s/mod_mpm_event.so
LoadModule authz_core_module %[1]s/mod_authz_core.so
LoadModule alias_module %[1]s/mod_alias.so
PidFile DIR/pid
Mutex posixsem
ErrorLog DIR/error.log
LogFormat "%%{remote}p\t%%r" w
CustomLog DIR/access.log w
User #65534
Group #65534
ServerName lab
Listen %[2]s
ListenBacklog 4096
StartServers 1
ServerLimit 1
ThreadLimit 64
ThreadsPerChild 64
MaxRequestWorkers 64
AsyncRequestWorkerFactor 64
MinSpareThreads 1
MaxSpareThreads 64
KeepAlive On
MaxKeepAliveRequests 0
KeepAliveTimeout 3600
TimeOut 60
DocumentRoot DIR
AliasMatch "^/" DIR/root
<Directory DIR>
  Require all granted
</Directory>
`, modules, r.at(0, port)), require.Tool(r.t, "apache2"), "-DFOREGROUND", "-d", "DIR", "-f", "%")
	return &backend{"apache", port, fileLog(filepath.Join(dir, "access.log"))}
}

func (r *rig) lighttpd(port uint16) *backend {
	r.t.Helper()
	a, _ := netip.ParseAddrPort(r.at(0, port))
	dir, _ := r.launch("lighttpd", r.Servers[0], port, fmt.Sprintf(`server.modules = ( "mod_access", "mod_rewrite", "mod_accesslog" )
server.document-root = "DIR"
server.errorlog = "DIR/error.log"
server.bind = "%s"
server.port = %d
server.listen-backlog = 4096
server.max-keep-alive-requests = 1000000
server.max-keep-alive-idle = 3600
server.max-connections = 2048
server.max-fds = 4096
url.rewrite-once = ( "^" => "/root" )
accesslog.filename = "DIR/access.log"
accesslog.format = "%%{remote}p	%%r"
`, a.Addr(), port), require.Tool(r.t, "lighttpd"), "-D", "-f", "%")
	return &backend{"lighttpd", port, fileLog(filepath.Join(dir, "access.log"))}
}

func (r *rig) haproxy(port uint16) *backend {
	r.t.Helper()
	_, out := r.launch("haproxy", r.Servers[0], port, fmt.Sprintf(`global
  log stdout format raw local0 info
  maxconn 2000
defaults
  mode http
  log global
  option http-keep-alive
  timeout client 3600s
  timeout http-request 60s
  timeout http-keep-alive 3600s
  timeout connect 5s
  timeout server 60s
frontend f
  bind %s
  log-format "%%cp\t%%HM\ %%HU\ %%HV"
  http-request return status 200 content-type text/plain string "haproxy"
`, r.at(0, port)), require.Tool(r.t, "haproxy"), "-db", "-f", "%")
	return &backend{"haproxy", port, func() (string, error) {
		// Its own words about itself have no port before them.
		var b strings.Builder
		for line := range strings.Lines(out.String()) {
			if p, _, ok := strings.Cut(line, "\t"); ok && strings.Trim(p, "0123456789") == "" {
				b.WriteString(line)
			}
		}
		return b.String(), nil
	}}
}

// golang starts Go's own server in this process. Paths choose what it does
// with a body: /early/ answers without looking at it.
func (r *rig) golang(port uint16) *backend {
	r.t.Helper()
	ln, err := r.Servers[0].Listen("tcp", r.at(0, port))
	if err != nil {
		r.t.Fatal(err)
	}
	out := &lab.Buffer{}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		_, p, _ := net.SplitHostPort(q.RemoteAddr)
		fmt.Fprintf(out, "%s\t%s %s %s\n", p, q.Method, q.RequestURI, q.Proto)
		if !strings.HasPrefix(q.RequestURI, "/early/") {
			_, _ = io.Copy(io.Discard, q.Body)
		}
		fmt.Fprintf(w, "go %s\n", q.RequestURI)
	}), ErrorLog: nil}
	go func() { _ = s.Serve(ln) }()
	r.t.Cleanup(func() { _ = s.Close() })
	return &backend{"go", port, func() (string, error) { return out.String(), nil }}
}

// careless starts a server of our own that never reads a body, so it takes what
// follows a head for the next request (CL.0, TE.0). It says at once what it has
// to say.
func (r *rig) careless(port uint16) *backend {
	r.t.Helper()
	out := &lab.Buffer{}
	r.serve(0, port, func(c net.Conn) {
		_, p, _ := net.SplitHostPort(c.RemoteAddr().String())
		var have []byte
		buf := make([]byte, 64<<10)
		for {
			var say []byte
			for {
				head, rest, ok := bytes.Cut(have, []byte("\r\n\r\n"))
				if !ok {
					break
				}
				have = rest
				line, _, _ := strings.Cut(string(head), "\r\n")
				fmt.Fprintf(out, "%s\t%s\n", p, line)
				say = fmt.Appendf(say, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(line), line)
			}
			if _, err := c.Write(say); err != nil {
				return
			}
			n, err := c.Read(buf)
			if err != nil {
				return
			}
			have = append(have, buf[:n]...)
		}
	})
	return &backend{"careless", port, func() (string, error) { return out.String(), nil }}
}

// serve accepts connections on a server host and gives each to f, which owns
// it until it returns.
func (r *rig) serve(host int, port uint16, f func(net.Conn)) {
	r.t.Helper()
	ln, err := r.Servers[host].Listen("tcp", r.at(host, port))
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Add(1)
			go func() {
				defer wg.Done()
				defer c.Close()
				stop := context.AfterFunc(ctx, func() { _ = c.Close() })
				defer stop()
				f(c)
			}()
		}
	}()
	r.t.Cleanup(func() {
		_ = ln.Close()
		cancel()
		wg.Wait()
	})
}
