// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
)

// TestLengths holds the lengths of FIG 6A, 6B and 9, requests and responses.
func TestLengths(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(page), ReadHeaderTimeout: time.Minute}
	go func() { _ = srv.Serve(ln) }()
	defer srv.Close()
	for _, c := range []struct {
		figure, request   string
		length, responded int
	}{
		{"FIG 6A", visits[0].request, 49, 999},
		{"FIG 6B", visits[1].request, 50, 500},
		{"FIG 9, S1", tour[0], 50, 500},
		{"FIG 9, S2", tour[1], 50, 400},
		{"HTTP/1.0 with keep-alive", strings.TrimSuffix(closing, "\r\n") + added + "\r\n", len(closing) + 24, 600},
	} {
		if len(c.request) != c.length || pageSize(c.request) != c.responded {
			t.Errorf("%s: request and response of %d and %d bytes, want %d and %d", c.figure, len(c.request), pageSize(c.request), c.length, c.responded)
		}
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, c.request); err != nil {
			t.Fatal(err)
		}
		counted := &countingReader{r: conn}
		resp, err := http.ReadResponse(bufio.NewReader(counted), nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil || counted.n != c.responded {
			t.Errorf("%s: the server answers with %d bytes, %v; want %d", c.figure, counted.n, err, c.responded)
		}
		conn.Close()
	}
}

func TestUnknownScene(t *testing.T) {
	err := Run(t.Context(), io.Discard, "fig99", Options{})
	if !errors.Is(err, ErrUnknownScene) || !strings.Contains(err.Error(), "fig5") {
		t.Errorf("%v; want an error that names the scenes", err)
	}
	if len(Scenes()) == 0 || Scenes()[0][0] != "fig5" {
		t.Errorf("scenes: %v", Scenes())
	}
}

// TestMain lets the test binary stand in for the daemon: as a proxy that opens
// a server connection for each request.
func TestMain(m *testing.M) {
	switch {
	case len(os.Args) == 4 && os.Args[1] == "demo" && os.Args[2] == "server":
		fmt.Println(Serve(context.Background(), os.Args[3]))
		os.Exit(1)
	case len(os.Args) == 4 && os.Args[1] == "run":
		os.Exit(wasteful(filepath.Join(filepath.Dir(os.Args[3]), "run", "admin.sock")))
	case len(os.Args) > 1 && os.Args[1] == "status":
		fmt.Println("{}")
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func wasteful(socket string) int {
	ln, err := net.Listen("tcp", "203.0.113.10:80")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	admin, err := net.Listen("unix", socket)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer admin.Close()
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", "198.51.100.11:80" },
		Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true},
	}}
	fmt.Println(srv.Serve(ln))
	return 1
}

// TestScenesCanFail is the negative control of the scenes' verdicts: an
// interface unit that does not pool, chooses no server and inserts nothing
// does not pass.
func TestScenesCanFail(t *testing.T) {
	require.NFQueue(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for scene, why := range map[string]string{
		"fig5":   "2 connections instead of 1",
		"http10": "instead of",
		"farm":   "server connections were opened",
		"kill":   "downloads broke",
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
		var out strings.Builder
		err = Run(ctx, &out, scene, Options{Weir: exe})
		cancel()
		if !errors.Is(err, ErrFailed) || !strings.Contains(out.String(), "FAIL") || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v\n%s", scene, err, out.String())
		}
	}
}

// TestUnableWithoutDaemon: a demo whose daemon does not come up ends with an
// error that tells so, and leaves nothing.
func TestUnableWithoutDaemon(t *testing.T) {
	require.NFQueue(t)
	for _, program := range []string{"/nonexistent/weir", "/bin/false"} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		var out strings.Builder
		if err := Run(ctx, &out, "fig5", Options{Weir: program}); err == nil {
			t.Errorf("%s passes for weir:\n%s", program, out.String())
		}
		if !strings.Contains(out.String(), "VIP  203.0.113.10:80") {
			t.Errorf("no topology before the error:\n%s", out.String())
		}
		cancel()
	}
}

func TestTopology(t *testing.T) {
	require.Netns(t)
	for _, c := range []struct {
		clients, servers int
		want             string
	}{
		{2, 1, `
  C1 198.18.0.11   --+   +------ interface unit ------+   +-- S1 198.51.100.11:80
  C2 198.18.0.12   --+---| VIP  203.0.113.10:80       |---+
                         | SNIP 198.51.100.1          |
                         +----------------------------+`},
		{1, 8, `
  C1 198.18.0.11   --+   +------ interface unit ------+   +-- S1 198.51.100.11:80
                     +---| VIP  203.0.113.10:80       |---+-- S2 198.51.100.12:80
                         | SNIP 198.51.100.1          |   +-- S3 198.51.100.13:80
                         +----------------------------+   +-- S4 198.51.100.14:80
                                                          +-- S5 198.51.100.15:80
                                                          +-- ... 3 more`},
	} {
		l, err := lab.New("weirdemo")
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.Farm(lab.FarmOptions{Clients: c.clients, Servers: c.servers, NoIPv6: true})
		if err != nil {
			t.Fatal(err)
		}
		s := &stage{Farm: f}
		if got := "\n" + strings.Join(s.topology(), "\n"); got != c.want {
			t.Errorf("drawn:%s\nwant:%s", got, c.want)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}
