// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
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
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
)

// addrs is where server i listens.
func addrs(f *lab.Farm, i int) []netip.AddrPort {
	return []netip.AddrPort{f.Server(i), f.Server6(i)}
}

// A site is a set of files with their checksums.
type site struct {
	root  string
	paths []string
	size  map[string]int
	sum   map[string][sha256.Size]byte
}

// newSite writes one file of each size below root.
func newSite(t *testing.T, root string, sizes ...int) *site {
	t.Helper()
	s := &site{root: root, size: map[string]int{}, sum: map[string][sha256.Size]byte{}}
	for i, n := range sizes {
		b := content(byte(i), n)
		path := fmt.Sprintf("/file-%d-%d.bin", i, n)
		if err := os.WriteFile(filepath.Join(root, path), b, 0o644); err != nil {
			t.Fatal(err)
		}
		s.paths = append(s.paths, path)
		s.size[path], s.sum[path] = n, sha256.Sum256(b)
	}
	return s
}

func (s *site) check(path string, status int, body []byte) error {
	if status != http.StatusOK {
		return fmt.Errorf("GET %s: status %d", path, status)
	}
	if len(body) != s.size[path] || sha256.Sum256(body) != s.sum[path] {
		return fmt.Errorf("GET %s: %d bytes that are not the file's %d", path, len(body), s.size[path])
	}
	return nil
}

// A crowd is many clients on one site, and what they have done.
type crowd struct {
	ctx         context.Context
	site        *site
	host        *lab.Host
	vip         string
	next        atomic.Int64 // walks through the site's files
	connections atomic.Int64
	requests    atomic.Int64

	mu     sync.Mutex
	errors []error
}

func (c *crowd) path() string {
	return c.site.paths[int(c.next.Add(1))%len(c.site.paths)]
}

func (c *crowd) fail(kind string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.errors = append(c.errors, fmt.Errorf("%s: %w", kind, err))
}

// plain makes one client connection by hand with n requests in one version of
// the protocol and a Connection field, empty for none. If the server side is
// expected to close after the last response, nothing may come before the end.
func (c *crowd) plain(version, connection string, n int, closes bool) error {
	conn, err := c.host.Dial(c.ctx, "tcp", c.vip)
	if err != nil {
		return err
	}
	defer conn.Close()
	c.connections.Add(1)
	if d, ok := c.ctx.Deadline(); ok {
		_ = conn.SetDeadline(d)
	}
	br := bufio.NewReader(conn)
	for i := range n {
		path := c.path()
		req := "GET " + path + " HTTP/" + version + "\r\nHost: " + c.vip + "\r\n"
		if connection != "" {
			req += "Connection: " + connection + "\r\n"
		}
		if _, err := io.WriteString(conn, req+"\r\n"); err != nil {
			return fmt.Errorf("request %d: %w", i, err)
		}
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			return fmt.Errorf("request %d: %w", i, err)
		}
		// The length is there also where the client's version knows no other
		// end than the connection's: truncation would go unseen otherwise.
		if resp.ContentLength != int64(c.site.size[path]) {
			return fmt.Errorf("request %d: Content-Length %d, the file has %d", i, resp.ContentLength, c.site.size[path])
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return fmt.Errorf("request %d: %w", i, err)
		}
		if err := c.site.check(path, resp.StatusCode, body); err != nil {
			return err
		}
		c.requests.Add(1)
	}
	if !closes {
		return nil
	}
	if rest, err := io.ReadAll(br); err != nil || len(rest) > 0 {
		return fmt.Errorf("after the last response: %d bytes, %w", len(rest), errors.Join(err, errors.New("expected the end of the connection")))
	}
	return nil
}

// library makes one client connection with Go's HTTP client and n requests.
func (c *crowd) library(closes bool, n int) error {
	dialled := int64(0)
	tr := &http.Transport{
		DisableCompression: true, DisableKeepAlives: closes,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			atomic.AddInt64(&dialled, 1)
			return c.host.Dial(ctx, network, addr)
		},
	}
	defer tr.CloseIdleConnections()
	client := &http.Client{Transport: tr}
	for range n {
		path := c.path()
		req, err := http.NewRequestWithContext(c.ctx, http.MethodGet, "http://"+c.vip+path, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			return err
		}
		if err := c.site.check(path, resp.StatusCode, body); err != nil {
			return err
		}
		c.requests.Add(1)
	}
	want := int64(1)
	if closes {
		want = int64(n)
	}
	got := atomic.LoadInt64(&dialled)
	c.connections.Add(got)
	if got != want {
		return fmt.Errorf("%d connections for %d requests, want %d", got, n, want)
	}
	return nil
}

// curl runs one curl with n transfers.
func (c *crowd) curl(bin, dir string, n int, args ...string) error {
	dir, err := os.MkdirTemp(dir, "curl-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var config strings.Builder
	paths := make([]string, n)
	for i := range paths {
		paths[i] = c.path()
		fmt.Fprintf(&config, "url = \"http://%s%s\"\noutput = \"%s/%d\"\n", c.vip, paths[i], dir, i)
	}
	file := filepath.Join(dir, "config")
	if err := os.WriteFile(file, []byte(config.String()), 0o644); err != nil {
		return err
	}
	out, err := c.host.Run(c.ctx, bin, append(args, "--disable", "--silent", "--show-error", "--fail", "--noproxy", "*",
		"--write-out", "%{http_code} %{num_connects}\n", "--config", file)...)
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != n {
		return fmt.Errorf("curl reports %d of %d transfers", len(lines), n)
	}
	for i, l := range lines {
		code, connects, _ := strings.Cut(l, " ")
		status, err := strconv.Atoi(code)
		if err != nil {
			return fmt.Errorf("curl reports %q", l)
		}
		k, err := strconv.Atoi(connects)
		if err != nil {
			return fmt.Errorf("curl reports %q", l)
		}
		c.connections.Add(int64(k))
		body, err := os.ReadFile(filepath.Join(dir, strconv.Itoa(i)))
		if err != nil && c.site.size[paths[i]] > 0 { // curl makes no file for an empty body
			return err
		}
		if err := c.site.check(paths[i], status, body); err != nil {
			return err
		}
		c.requests.Add(1)
	}
	return nil
}

// A job is one client connection or more.
type job struct {
	kind string
	f    func() error
}

// mixture returns clients of every kind, two thousand connections divided by
// share.
func (c *crowd) mixture(curl, scratch string, share int) []job {
	var jobs []job
	add := func(n int, kind string, f func() error) {
		for range n / share {
			jobs = append(jobs, job{kind, f})
		}
	}
	add(375, "1.0", func() error { return c.plain("1.0", "", 1, true) })
	add(300, "1.0 keep-alive", func() error { return c.plain("1.0", "Keep-Alive", 3, false) })
	add(150, "1.1", func() error { return c.plain("1.1", "", 4, false) })
	add(150, "1.1 close", func() error { return c.plain("1.1", "close", 1, true) })
	add(150, "Go client, keep-alive", func() error { return c.library(false, 4) })
	add(75, "Go client, close", func() error { return c.library(true, 5) })
	add(20, "curl 1.1 close", func() error { return c.curl(curl, scratch, 13, "--http1.1", "--header", "Connection: close") })
	// curl may keep a 1.0 connection that it has not asked to be kept, because
	// the response offers it, and finds it closed: then it connects again.
	add(13, "curl 1.0", func() error { return c.curl(curl, scratch, 20, "--http1.0") })
	add(10, "curl 1.1", func() error { return c.curl(curl, scratch, 20, "--http1.1") })
	add(10, "curl 1.0 keep-alive", func() error { return c.curl(curl, scratch, 20, "--http1.0", "--header", "Connection: Keep-Alive") })
	return jobs
}

// play does the jobs, a dozen at a time, and fails the test with what went
// wrong. The kinds take turns, so that connections pass from one to the other.
func (c *crowd) play(t *testing.T, jobs []job) {
	t.Helper()
	queue := make(chan job, len(jobs))
	const stride = 997 // a prime that does not divide the number of jobs
	for i := range jobs {
		queue <- jobs[i*stride%len(jobs)]
	}
	close(queue)
	if len(jobs)%stride == 0 {
		t.Fatalf("%d jobs: the order leaves some out", len(jobs))
	}
	const atATime = 12
	var wg sync.WaitGroup
	for range atATime {
		wg.Go(func() {
			for j := range queue {
				if c.ctx.Err() != nil {
					return
				}
				if err := j.f(); err != nil {
					c.fail(j.kind, err)
				}
			}
		})
	}
	wg.Wait()
	if err := c.ctx.Err(); err != nil {
		c.fail("time", err)
	}
	for i, err := range c.errors {
		if i == 10 {
			t.Errorf("… and %d more", len(c.errors)-i)
			break
		}
		t.Error(err)
	}
}

// TestFarmManyClients: two thousand client connections of every kind need few
// server connections, and every byte of every response is right.
func TestFarmManyClients(t *testing.T) {
	curl := require.Tool(t, "curl")
	require.Tool(t, "nginx")
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 3})
	root, err := r.Lab.Subdir("site")
	if err != nil {
		t.Fatal(err)
	}
	files := newSite(t, root, 0, 1, 200, 1000, 1460, 2920, 10_000, 65_535, 200_000)
	servers := r.nginxAll(root)
	w := r.start(lab.ConfigOptions{})
	scratch, err := r.Lab.Subdir("curl")
	if err != nil {
		t.Fatal(err)
	}

	c := &crowd{ctx: within(t, 100*time.Second), site: files, host: r.Clients[0], vip: r.VIP().String()}
	c.play(t, c.mixture(curl, scratch, 1))
	if n := c.connections.Load(); n < 2000 {
		t.Errorf("%d client connections, want 2000", n)
	}
	if t.Failed() {
		t.FailNow()
	}

	// Each request reached exactly one server, once.
	want := int(c.requests.Load())
	got, opened := 0, 0
	until(t, 10*time.Second, "the servers' access logs", func() bool {
		got = 0
		for _, n := range servers {
			as, err := n.Accesses()
			if err != nil {
				t.Fatal(err)
			}
			got += len(as)
		}
		return got >= want
	})
	if got != want {
		t.Errorf("the servers answered %d requests, the clients made %d", got, want)
	}
	for i, n := range servers {
		accepted, err := n.Accepted()
		if err != nil {
			t.Fatal(err)
		}
		if accepted == 0 {
			t.Errorf("server %s got no connection", r.Servers[i].Name())
		}
		opened += accepted
		as, err := n.Accesses()
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range as {
			if a.Remote.Addr() != r.SNIP() {
				t.Fatalf("a request reached %s from %s, not from the interface unit", r.Servers[i].Name(), a.Remote)
			}
		}
	}
	t.Logf("%d client connections, %d requests, %d server connections opened", c.connections.Load(), want, opened)
	if opened > 60 {
		t.Errorf("%d server connections opened, want at most 60", opened)
	}
	r.stop(w)
}

// TestFigure8Paths is FIG 8: two requests on one client connection, which the
// path plugin sends to two servers by their paths.
func TestFigure8Paths(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Servers: 2})
	type visit struct{ path, from string }
	visits := make([][]visit, 2)
	var mu sync.Mutex
	var servers []*lab.Server
	for i, h := range r.Servers {
		s, err := lab.HTTPServer(h, r.Server(i).String(), http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			mu.Lock()
			visits[i] = append(visits[i], visit{q.URL.Path, q.RemoteAddr})
			mu.Unlock()
			fmt.Fprintf(w, "%s has %s", h.Name(), q.URL.Path)
		}))
		if err != nil {
			t.Fatal(err)
		}
		servers = append(servers, s)
	}
	w := r.start(lab.ConfigOptions{
		Policies: "[{use: path, config: {routes: [{prefix: /sales/, servers: [s1]}, {prefix: /products/, servers: [s2]}]}}]",
		Plugins:  "[{name: path}]",
	})
	conn, err := r.Clients[0].Dial(within(t, 20*time.Second), "tcp", r.VIP().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	br := bufio.NewReader(conn)
	const rounds = 3
	for range rounds {
		for _, x := range [][2]string{{"s1", "/sales/forecast.html"}, {"s2", "/products/new.html"}} {
			fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", x[1], r.VIP())
			resp, err := http.ReadResponse(br, nil)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			if err != nil || string(body) != x[0]+" has "+x[1] {
				t.Fatalf("GET %s: %s, %q, %v", x[1], resp.Status, body, err)
			}
		}
	}
	// A path without a route is rejected by the interface unit itself.
	fmt.Fprintf(conn, "GET /else HTTP/1.1\r\nHost: %s\r\n\r\n", r.VIP())
	if resp, err := http.ReadResponse(br, nil); err != nil || resp.StatusCode != http.StatusNotFound {
		t.Errorf("a path without a route: %v, %v; want 404", resp, err)
	}
	for i, s := range servers {
		if s.Requests() != rounds || s.Accepted() != 1 {
			t.Errorf("server %s: %d requests over %d connections, want %d over 1", r.Servers[i].Name(), s.Requests(), s.Accepted(), rounds)
		}
	}
	r.stop(w)
}
