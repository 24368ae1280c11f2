// SPDX-License-Identifier: Apache-2.0

package framing

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
)

// namedServers starts Go's own server on three hosts. Each answers with its
// name, the method, the target and the length and last bytes of the body that
// it read, in one of several framings.
func (r *rig) namedServers(port uint16) {
	r.t.Helper()
	for i := range 3 {
		ln, err := r.Servers[i].Listen("tcp", r.at(i, port))
		if err != nil {
			r.t.Fatal(err)
		}
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			b, err := io.ReadAll(q.Body)
			if err != nil {
				panic(http.ErrAbortHandler)
			}
			text := describe(i, q.Method, q.RequestURI, string(b), q.Trailer.Get("X-T"))
			switch n := len(q.RequestURI); {
			case strings.HasSuffix(q.RequestURI, "/204"):
				w.Header().Set("X-Is", text)
				w.WriteHeader(http.StatusNoContent)
				return
			case n%3 == 0:
				w.WriteHeader(http.StatusEarlyHints)
				w.(http.Flusher).Flush() // chunked
			case n%3 == 1:
				w.Header().Set("Content-Length", fmt.Sprint(len(text)))
			}
			_, _ = io.WriteString(w, text)
		})}
		go func() { _ = s.Serve(ln) }()
		r.t.Cleanup(func() { _ = s.Close() })
	}
}

func describe(server int, method, target, body, trailer string) string {
	return fmt.Sprintf("s%d %s %s %d %.20q %q\n", server+1, method, target, len(body), body, trailer)
}

const threePaths = `    policies: [{use: path, config: {routes: [{prefix: /one/, servers: [s1]}, {prefix: /two/, servers: [s2]}, {prefix: /three/, servers: [s3]}]}}]
`

// TestPipelines: pipelines of 1 to 100 requests with mixed methods and bodies
// over three paths, each of which another server has. The answers come in
// order, each from the server that its own path names.
func TestPipelines(t *testing.T) {
	rnd := seeded(t)
	r := newRig(t, 3)
	r.namedServers(80)
	r.start(farmText{name: "web", port: 80, servers: []string{r.at(0, 80), r.at(1, 80), r.at(2, 80)}, extra: threePaths})
	var depths []int
	for range size(1, 15) {
		for d := range 100 {
			depths = append(depths, d+1)
		}
	}
	rnd.Shuffle(len(depths), func(i, j int) { depths[i], depths[j] = depths[j], depths[i] })
	seeds := make([]uint64, len(depths))
	for i := range seeds {
		seeds[i] = rnd.Uint64()
	}
	requests := 0
	for _, d := range depths {
		requests += d
	}
	parallel(t, len(depths), 6, func(i int) error {
		return r.pipeline(depths[i], rand.New(rand.NewPCG(seeds[i], 3)))
	})
	f := r.farm("web")
	if int(f.Requests) != requests {
		t.Errorf("weir counts %d requests, %d were sent", f.Requests, requests)
	}
	for _, s := range f.Servers {
		if s.Requests == 0 || s.Reused == 0 {
			t.Errorf("server %s: %d requests, %d over a pooled connection", s.Name, s.Requests, s.Reused)
		}
	}
	t.Logf("%d pipelines, %d requests", len(depths), requests)
}

func (r *rig) pipeline(depth int, rnd *rand.Rand) error {
	c, err := r.dial(80)
	if err != nil {
		return err
	}
	defer c.Close()
	var text strings.Builder
	type want struct{ method, text string }
	var list []want
	for i := range depth {
		server := rnd.IntN(3)
		target := fmt.Sprintf("/%s/%d%s", []string{"one", "two", "three"}[server], i, strings.Repeat("x", rnd.IntN(3)))
		method, body, trailer := []string{"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"}[rnd.IntN(6)], "", ""
		if rnd.IntN(8) == 0 {
			target += "/204"
		}
		fmt.Fprintf(&text, "%s %s HTTP/1.1\r\nHost: web\r\n", method, target)
		switch {
		case method == "POST" || method == "PUT" && rnd.IntN(2) == 0:
			body = strings.Repeat("GET /two/ HTTP/1.1\r\n\r\n", rnd.IntN(100))
			fmt.Fprintf(&text, "Content-Length: %d\r\n\r\n%s", len(body), body)
		case method == "PUT":
			text.WriteString("Transfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n")
			for range rnd.IntN(5) {
				b := strings.Repeat("0\r\n\r\nGET /two/ HTTP/1.1\r\n", 1+rnd.IntN(30))
				body += b
				fmt.Fprintf(&text, "%x\r\n%s\r\n", len(b), b)
			}
			trailer = fmt.Sprint(i)
			fmt.Fprintf(&text, "0\r\nX-T: %d\r\n\r\n", i)
		default:
			text.WriteString("\r\n")
		}
		list = append(list, want{method, describe(server, method, target, body, trailer)})
	}
	sent := make(chan error, 1)
	go func() {
		for b := []byte(text.String()); len(b) > 0; {
			n := min(len(b), 1+rnd.IntN(5000))
			if _, err := c.Write(b[:n]); err != nil {
				sent <- err
				return
			}
			b = b[n:]
		}
		sent <- nil
	}()
	br := bufio.NewReader(c)
	for i, w := range list {
		resp, err := http.ReadResponse(br, &http.Request{Method: w.method})
		for err == nil && resp.StatusCode/100 == 1 {
			resp, err = http.ReadResponse(br, &http.Request{Method: w.method})
		}
		if err != nil {
			return fmt.Errorf("answer %d of %d: %w", i, depth, err)
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			return fmt.Errorf("answer %d of %d: %w", i, depth, err)
		}
		got := string(b)
		if resp.StatusCode == http.StatusNoContent {
			got = resp.Header.Get("X-Is") + "\n"
			w.text = strings.ReplaceAll(w.text, "\n", " ")
			got = strings.TrimRight(got, "\n") + " "
		} else if w.method == "HEAD" {
			continue
		}
		if strings.TrimSpace(got) != strings.TrimSpace(w.text) {
			return fmt.Errorf("answer %d of %d is %q, want %q", i, depth, got, w.text)
		}
	}
	return <-sent
}

// TestRouteSafety: a path that a server would read as another one is refused
// where the farm has routes. The control is a farm that passes it on: there it
// reaches the server that the route keeps it from.
func TestRouteSafety(t *testing.T) {
	r := newRig(t, 3)
	r.namedServers(80)
	const admin = `    policies: [{use: path, config: {routes: [{prefix: /admin/, servers: [s3]}, {prefix: /, servers: [s1]}]}}]
`
	servers := []string{r.at(0, 80), r.at(1, 80), r.at(2, 80)}
	r.start(farmText{name: "safe", port: 81, servers: servers, extra: admin}, farmText{name: "open", port: 82, servers: servers, extra: admin + "    route_safety: pass\n"})
	for _, path := range []string{"/x/../admin/", "//admin/", "/%2e/admin/", "/admin%2f", "/x/..%2fadmin/", "/\\admin/", "/admin/%00", "/./admin/", "/..;/admin/", "/a%5cb"} {
		for _, port := range []uint16{81, 82} {
			c, err := r.dial(port)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", path)
			b, err := io.ReadAll(c)
			c.Close()
			if refused := strings.HasPrefix(string(b), "HTTP/1.1 400 "); err != nil || refused != (port == 81) {
				t.Errorf("port %d, %s: %q, %v", port, path, clip(string(b), 200), err)
			}
		}
	}
	if f := r.farm("safe"); f.Servers[0].Requests+f.Servers[2].Requests != 0 {
		t.Error("an unsafe path reached a server")
	}
	if f := r.farm("open"); f.Servers[0].Requests == 0 {
		t.Error("the control refuses, too")
	}
}
