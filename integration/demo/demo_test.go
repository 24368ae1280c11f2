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

// TestVisitLengths holds the lengths of FIG 6A and 6B: requests of 49 and 50
// bytes, responses of 999 and 500.
func TestVisitLengths(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(page), ReadHeaderTimeout: time.Minute}
	go func() { _ = srv.Serve(ln) }()
	defer srv.Close()
	for i, want := range [][2]int{{49, 999}, {50, 500}} {
		v := visits[i]
		if len(v.request) != want[0] || v.response != want[1] {
			t.Errorf("%s: request and response of %d and %d bytes, the patent has %v", v.figure, len(v.request), v.response, want)
		}
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, v.request); err != nil {
			t.Fatal(err)
		}
		br := bufio.NewReader(conn)
		counted := &countingReader{r: br}
		resp, err := http.ReadResponse(bufio.NewReader(counted), nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil || counted.n != v.response {
			t.Errorf("%s: the server answers with %d bytes, %v; want %d", v.figure, counted.n, err, v.response)
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

// TestSceneCanFail is the negative control of the scene's verdict: an
// interface unit that does not pool does not pass.
func TestSceneCanFail(t *testing.T) {
	require.NFQueue(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var out strings.Builder
	err = Run(ctx, &out, "fig5", Options{Weir: exe})
	if !errors.Is(err, ErrFailed) || !strings.Contains(out.String(), "FAIL") || !strings.Contains(err.Error(), "2 connections instead of 1") {
		t.Errorf("%v\n%s", err, out.String())
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
