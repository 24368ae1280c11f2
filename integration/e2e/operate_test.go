// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/module/control"
)

// This file has what the tests of operation share: configurations that change,
// commands that ask the running daemon, and clients that notice every failure.

// A setup says what a configuration has.
type setup struct {
	vips    []netip.AddrPort // nil: the rig's VIP
	servers []string         // name=index, of the rig's servers
	farm    string           // more lines of the farm, indented by four
	extra   string           // more lines at top level
}

// text writes the configuration. The farm's servers begin in line 8.
func (r *rig) text(s setup) string {
	var b strings.Builder
	fmt.Fprintf(&b, "runtime_dir: %q\nstop_timeout: 2s\nsource: {addresses: [%s]}\nadmin: {socket: %q, metrics: \"\"}\nfarms:\n  - name: web\n", r.run, r.SNIP(), r.socket())
	var vips []string
	if s.vips == nil {
		s.vips = []netip.AddrPort{r.VIP()}
	}
	for _, v := range s.vips {
		vips = append(vips, strconv.Quote(v.String()))
	}
	fmt.Fprintf(&b, "    listen: [%s]\n    servers:\n", strings.Join(vips, ", "))
	for _, sv := range s.servers {
		name, index, _ := strings.Cut(sv, "=")
		i, err := strconv.Atoi(index)
		if err != nil {
			r.t.Fatal(err)
		}
		fmt.Fprintf(&b, "      - {name: %s, address: \"%s\"}\n", name, r.Server(i))
	}
	return b.String() + s.farm + s.extra
}

func (r *rig) socket() string { return filepath.Join(r.run, "admin.sock") }

func (r *rig) file() string { return filepath.Join(r.dir, "weir.yaml") }

// rewrite puts another text into the configuration's file, in one step.
func (r *rig) rewrite(text string) {
	r.t.Helper()
	if err := os.WriteFile(r.file()+".new", []byte(text), 0o644); err != nil {
		r.t.Fatal(err)
	}
	if err := os.Rename(r.file()+".new", r.file()); err != nil {
		r.t.Fatal(err)
	}
}

// startWith runs weir with this text.
func (r *rig) startWith(text string, env ...string) *lab.Weir {
	r.t.Helper()
	w, err := lab.StartWeir(within(r.t, 20*time.Second), r.Router, lab.WeirOptions{Binary: r.bin, Config: text, Dir: r.dir, Socket: r.socket(), Env: env})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if r.t.Failed() {
			r.t.Logf("weir (process %d) wrote:\n%s", w.Proc.Pid(), clip(w.Log(), 20000))
		}
	})
	return w
}

// weir runs a command that asks the running instance.
func (r *rig) weir(args ...string) (code int, stdout, stderr string) {
	r.t.Helper()
	cmd := exec.CommandContext(within(r.t, 60*time.Second), r.bin, append(args, "--socket", r.socket())...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// mustWeir is weir for a command that must end well; it returns its output.
func (r *rig) mustWeir(args ...string) string {
	r.t.Helper()
	code, out, errs := r.weir(args...)
	if code != 0 {
		r.t.Fatalf("weir %s: exit code %d:\n%s%s", strings.Join(args, " "), code, out, errs)
	}
	return out
}

// client speaks to the control socket directly.
func (r *rig) client() *control.Client {
	r.t.Helper()
	c, err := control.Dial(r.socket())
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

func (r *rig) status() *control.Status {
	r.t.Helper()
	c := r.client()
	defer c.Close()
	st, err := c.Status(within(r.t, 10*time.Second))
	if err != nil {
		r.t.Fatal(err)
	}
	return st
}

// server finds one in the status; nil if it is not there.
func (r *rig) server(name string) *control.Server {
	r.t.Helper()
	st := r.status()
	for i := range st.Farms {
		for j := range st.Farms[i].Servers {
			if s := &st.Farms[i].Servers[j]; s.Name == name {
				return s
			}
		}
	}
	return nil
}

// A traffic is clients that ask until it is ended. Every answer must be right,
// and nothing is tried again, so that no failure is hidden.
type traffic struct {
	r        *rig
	vip      string
	stop     chan struct{}
	wg       sync.WaitGroup
	requests atomic.Int64
	mu       sync.Mutex
	errs     []error
	served   map[string]int // by server
}

// drive starts n clients that keep their connections and n that make one for
// each request.
func (r *rig) drive(vip netip.AddrPort, n int) *traffic {
	l := &traffic{r: r, vip: vip.String(), stop: make(chan struct{}), served: map[string]int{}}
	for range n {
		l.wg.Go(func() { l.run(true) })
		l.wg.Go(func() { l.run(false) })
	}
	return l
}

func (l *traffic) over() bool {
	select {
	case <-l.stop:
		return true
	default:
		return false
	}
}

func (l *traffic) run(keep bool) {
	for !l.over() {
		if err := l.connection(keep); err != nil {
			l.mu.Lock()
			l.errs = append(l.errs, fmt.Errorf("connection kept: %t: %w", keep, err))
			l.mu.Unlock()
		}
	}
}

// requestsPerConnection bounds those on a kept connection.
const requestsPerConnection = 200

func (l *traffic) connection(keep bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := l.r.Clients[0].Dial(ctx, "tcp", l.vip)
	if err != nil {
		return err
	}
	defer conn.Close()
	br := bufio.NewReader(conn)
	for i := 0; ; i++ {
		last := !keep || i == requestsPerConnection || l.over()
		head := "GET /r HTTP/1.1\r\nHost: x\r\n"
		if last {
			head += "Connection: close\r\n"
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.WriteString(conn, head+"\r\n"); err != nil {
			return fmt.Errorf("request %d: %w", i, err)
		}
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			return fmt.Errorf("request %d: %w", i, err)
		}
		b, err := io.ReadAll(resp.Body)
		name, path, _ := strings.Cut(string(b), " has ")
		if err != nil || resp.StatusCode != http.StatusOK || path != "/r" {
			return fmt.Errorf("request %d: %s, %q, %v", i, resp.Status, b, err)
		}
		l.requests.Add(1)
		l.mu.Lock()
		l.served[name]++
		l.mu.Unlock()
		if last {
			return nil
		}
	}
}

// end stops the clients and fails the test for every request that failed.
func (l *traffic) end() {
	l.r.t.Helper()
	close(l.stop)
	l.wg.Wait()
	for i, err := range l.errs {
		if i == 10 {
			break
		}
		l.r.t.Errorf("a request failed: %v", err)
	}
	if len(l.errs) > 0 {
		l.r.t.Errorf("%d requests failed, %d did not", len(l.errs), l.requests.Load())
	}
}

// progress waits until so many more requests were answered.
func (l *traffic) progress(n int64) {
	l.r.t.Helper()
	want := l.requests.Load() + n
	until(l.r.t, 20*time.Second, fmt.Sprintf("%d more answers", n), func() bool { return l.requests.Load() >= want })
}

// by returns how many answers came from a server so far.
func (l *traffic) by(server string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.served[server]
}

// begin makes a request of which the server sends the first half of ten bytes,
// and returns when they are here.
func (r *rig) begin(t testing.TB) *half {
	t.Helper()
	conn, err := r.Clients[0].Dial(within(t, 5*time.Second), "tcp", r.VIP().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(conn, "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(resp.Body, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	return &half{local: conn.LocalAddr().String(), body: resp.Body}
}

// A half is an exchange whose response is half there.
type half struct {
	local string // the client's end
	body  io.Reader
}

// rest reads the other half.
func (h *half) rest() error {
	_, err := io.ReadFull(h.body, make([]byte, 5))
	return err
}

// halves has every server answer /slow in two halves, the second one when the
// channel says so, and everything else as hello does.
func (r *rig) halves() (release chan struct{}) {
	r.t.Helper()
	release = make(chan struct{})
	for i, h := range r.Servers {
		_, err := lab.HTTPServer(h, r.Server(i).String(), http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if q.URL.Path != "/slow" {
				fmt.Fprintf(w, "%s has %s", h.Name(), q.URL.Path)
				return
			}
			w.Header().Set("Content-Length", "10")
			_, _ = w.Write([]byte("12345"))
			_ = http.NewResponseController(w).Flush()
			select {
			case <-release:
				_, _ = w.Write([]byte("67890"))
			case <-q.Context().Done():
			}
		}))
		if err != nil {
			r.t.Fatal(err)
		}
	}
	return release
}
