// SPDX-License-Identifier: Apache-2.0

package continuity

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// endless is a stream of bytes in which no piece looks like another.
type endless struct{ at uint64 }

func (e *endless) fill(b []byte) {
	for i := range b {
		x := (e.at + 1) * 0x9e3779b97f4a7c15
		b[i] = byte(x>>56 ^ x>>33)
		e.at++
	}
}

// check compares what comes with the stream.
func (e *endless) check(b []byte) error {
	at, want := e.at, make([]byte, len(b))
	e.fill(want)
	for i := range b {
		if b[i] != want[i] {
			return fmt.Errorf("byte %d is not the one that was sent", at+uint64(i))
		}
	}
	return nil
}

// read reads a stream to its end and compares it.
func (e *endless) read(r io.Reader, progress *atomic.Int64) error {
	b := make([]byte, 32<<10)
	for {
		n, err := r.Read(b)
		if err := e.check(b[:n]); err != nil {
			return err
		}
		progress.Add(int64(n))
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", e.at, err)
		}
	}
}

// write writes the stream piece by piece until enough is closed.
func (e *endless) write(w io.Writer, enough <-chan struct{}, flush func()) error {
	tick := time.NewTicker(5 * time.Millisecond) // the pace
	defer tick.Stop()
	for b := make([]byte, 2<<10); ; {
		e.fill(b)
		if _, err := w.Write(b); err != nil {
			return err
		}
		flush()
		select {
		case <-enough:
			return nil
		case <-tick.C:
		}
	}
}

// A leaver is an exchange that runs while what it goes through is taken out of
// the configuration.
type leaver struct {
	name   string
	upload bool
	came   atomic.Int64 // bytes that have passed
	enough chan struct{}
	end    chan error
}

// leavers are the servers and the clients of such exchanges.
type leavers struct {
	r   *rig
	mu  sync.Mutex
	all []*leaver // added to by the test
}

func (l *leavers) find(q *http.Request) *leaver {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.IndexFunc(l.all, func(x *leaver) bool { return "/"+x.name == q.URL.Path })
	if i < 0 {
		return nil
	}
	return l.all[i]
}

// ServeHTTP is every server's end of them.
func (l *leavers) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	x := l.find(q)
	switch {
	case x == nil:
		http.NotFound(w, q)
	case x.upload:
		var e endless
		if err := e.read(q.Body, &x.came); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprint(w, e.at)
	default:
		w.Header().Set("Trailer", "X-Sent")
		var e endless
		if e.write(w, x.enough, w.(http.Flusher).Flush) == nil {
			w.Header().Set("X-Sent", fmt.Sprint(e.at))
		}
	}
}

// begin starts an exchange through a VIP.
func (l *leavers) begin(name string, vip netip.AddrPort, upload bool) *leaver {
	l.r.t.Helper()
	x := &leaver{name: name, upload: upload, enough: make(chan struct{}), end: make(chan error, 1)}
	l.mu.Lock()
	l.all = append(l.all, x)
	l.mu.Unlock()
	conn, err := l.r.Clients[0].Dial(within(l.r.t, 20*time.Second), "tcp", vip.String())
	l.r.must(err)
	l.r.t.Cleanup(func() { conn.Close() })
	l.r.must(conn.SetDeadline(time.Now().Add(10 * time.Minute)))
	go func() {
		err := x.run(conn)
		conn.Close()
		x.end <- err
	}()
	return x
}

func (x *leaver) run(conn net.Conn) error {
	var e endless
	head := "GET /" + x.name + " HTTP/1.1\r\nHost: farm\r\n\r\n"
	if x.upload {
		head = "POST /" + x.name + " HTTP/1.1\r\nHost: farm\r\nTransfer-Encoding: chunked\r\n\r\n"
	}
	if _, err := io.WriteString(conn, head); err != nil {
		return err
	}
	if x.upload {
		if err := e.write(chunked{conn}, x.enough, func() {}); err != nil {
			return err
		}
		if _, err := io.WriteString(conn, "0\r\n\r\n"); err != nil {
			return err
		}
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if x.upload {
		if b, err := io.ReadAll(resp.Body); err != nil || string(b) != fmt.Sprint(e.at) {
			return fmt.Errorf("%d bytes were sent: %s, %q, %w", e.at, resp.Status, b, err)
		}
		return nil
	}
	if err := e.read(resp.Body, &x.came); err != nil {
		return err
	}
	if sent := resp.Trailer.Get("X-Sent"); sent != fmt.Sprint(e.at) {
		return fmt.Errorf("%d bytes came, %q were sent", e.at, sent)
	}
	return nil
}

// chunked writes each piece as a chunk.
type chunked struct{ io.Writer }

func (c chunked) Write(b []byte) (int, error) {
	if _, err := fmt.Fprintf(c.Writer, "%x\r\n%s\r\n", len(b), b); err != nil {
		return 0, err
	}
	return len(b), nil
}

// flow waits until every exchange gets on.
func (l *leavers) flow(when string) {
	l.r.t.Helper()
	for _, x := range l.all {
		before := x.came.Load()
		l.r.until(x.name+" goes on "+when, func() bool {
			select {
			case err := <-x.end:
				l.r.t.Fatalf("%s, %s: it ended: %v", x.name, when, err)
			default:
			}
			return x.came.Load() > before+20<<10
		})
	}
}

// finish lets every exchange come to its end.
func (l *leavers) finish() {
	l.r.t.Helper()
	for _, x := range l.all {
		close(x.enough)
		if err := <-x.end; err != nil {
			l.r.t.Errorf("%s: %v", x.name, err)
		}
		l.r.t.Logf("%s: %d bytes", x.name, x.came.Load())
	}
}

// TestKilledWhileDraining: an engine dies while exchanges run through what is
// gone from the configuration or is set to maint: a server, a VIP, a whole farm.
// They go on in the successor, which lets go of each when its last exchange has
// ended. It is the same where the configuration changes while nobody is there.
func TestKilledWhileDraining(t *testing.T) {
	restart := func(r *rig, _ int) int {
		r.must(r.w.Crash())
		b, err := os.ReadFile(filepath.Join(r.dir, "weir.yaml"))
		r.must(err)
		r.launchText(string(b))
		return r.running()
	}
	for _, d := range []departure{
		{name: "restarted", next: restart},
		{name: "edited", next: restart, edited: true},
		{name: "supervised", args: []string{"--supervise"}, next: func(r *rig, pid int) int {
			r.signal(pid, syscall.SIGKILL)
			return r.successor(pid)
		}},
		{name: "upgraded", args: []string{"--supervise"}, next: func(r *rig, pid int) int {
			if code, out := r.weir("upgrade"); code != 0 {
				r.t.Fatalf("upgrade: exit code %d: %s", code, out)
			}
			return r.successor(pid)
		}},
	} {
		t.Run(d.name, func(t *testing.T) {
			d.run(newRig(t, lab.FarmOptions{Clients: 1, Servers: 3, NoIPv6: true}))
		})
	}
}

// A departure is a way to lose what drains.
type departure struct {
	name   string
	args   []string
	next   func(r *rig, pid int) int // kills an engine and returns the successor
	edited bool                      // by the first death, not by a reload
}

func (d departure) run(r *rig) {
	t, next := r.t, d.next
	l := &leavers{r: r}
	server := func(i int) netip.AddrPort { return netip.AddrPortFrom(r.ServerAddr(i), 8000) }
	vip := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(r.VIP().Addr(), port) }
	for i, h := range r.Servers {
		_, err := lab.HTTPServer(h, server(i).String(), l)
		r.must(err)
	}
	o := lab.ConfigOptions{Dir: r.run}
	head := fmt.Sprintf("runtime_dir: %q\nstop_timeout: 2s\nsource: {addresses: [%s]}\nadmin: {socket: %q}\nfarms:\n", r.run, r.SNIP(), o.Socket())
	farm := func(name string, listen []netip.AddrPort, servers ...string) string {
		text := "  - name: " + name + "\n    listen: ["
		for _, v := range listen {
			text += fmt.Sprintf("%q, ", v)
		}
		text += "]\n    protocol: http\n    timeouts: {drain: 10m}\n    servers:\n"
		for _, s := range servers {
			text += "      - " + s + "\n"
		}
		return text
	}
	is := func(name string, i int) string { return fmt.Sprintf("{name: %s, address: %q}", name, server(i)) }
	before := head +
		farm("web", []netip.AddrPort{vip(80), vip(8080)}, is("old", 0)) +
		farm("gone", []netip.AddrPort{vip(8081)}, is("last", 2)) +
		farm("kept", []netip.AddrPort{vip(8082)}, is("resting", 1))
	after := head +
		farm("web", []netip.AddrPort{vip(80)}, is("new", 1)) +
		farm("kept", []netip.AddrPort{vip(8082)}, is("resting", 1))
	r.launchText(before, d.args...)
	pid := r.running()
	l.begin("server", vip(80), false)
	l.begin("vip", vip(8080), false)
	l.begin("farm", vip(8081), false)
	l.begin("farm-upload", vip(8081), true)
	l.begin("maint", vip(8082), false)
	l.flow("at first")

	mustWeir := func(args ...string) {
		t.Helper()
		if code, out := r.weir(args...); code != 0 {
			t.Fatalf("weir %v: exit code %d: %s", args, code, out)
		}
	}
	mustWeir("servers", "maint", "resting")
	if d.edited {
		r.must(r.w.Crash())
		r.launchText(after)
		pid = r.running()
	} else {
		file := filepath.Join(r.dir, "weir.yaml")
		r.must(os.WriteFile(file+".new", []byte(after), 0o644))
		r.must(os.Rename(file+".new", file))
		mustWeir("reload")
	}
	l.flow("after the change")
	rules := func() string {
		code, out := r.weir("rules", "show")
		if code != 0 {
			t.Fatalf("weir rules show: exit code %d: %s", code, out)
		}
		return out
	}
	// The second successor takes over from one that never saw the old
	// configuration.
	for i := range 2 {
		pid = next(r, pid)
		l.flow(fmt.Sprintf("after death %d", i+1))
		ruleset := rules()
		for _, want := range []string{
			server(0).Addr().String() + " . 8000", server(2).Addr().String() + " . 8000",
			vip(8080).Addr().String() + " . 8080", vip(8081).Addr().String() + " . 8081",
		} {
			if !strings.Contains(ruleset, want) {
				t.Errorf("death %d: the ruleset has no %s:\n%s", i+1, want, ruleset)
			}
		}
		// What drains takes no new client, which the engine says by a reset.
		for _, port := range []uint16{8080, 8081} {
			if _, err := r.Clients[0].Dial(within(t, 20*time.Second), "tcp", vip(port).String()); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("death %d: port %d of the VIP drains: %v, want that it refuses", i+1, port, err)
			}
		}
	}
	l.finish()
	type event struct {
		Name, Farm, Server string
	}
	// Gone with the last exchange: the rules, the database, and it is told.
	r.until("what drains is gone", func() bool {
		ruleset := rules()
		for _, x := range []string{server(0).Addr().String(), server(2).Addr().String(), " . 8080", " . 8081"} {
			if strings.Contains(ruleset, x) {
				return false
			}
		}
		return true
	})
	code, out := r.weir("events", "-o", "json")
	if code != 0 {
		t.Fatalf("weir events: exit code %d: %s", code, out)
	}
	told := map[event]int{}
	for d := json.NewDecoder(strings.NewReader(out)); ; {
		var e event
		if err := d.Decode(&e); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("%v:\n%s", err, out)
		}
		told[e]++
	}
	for _, want := range []event{
		{"server-gone", "web", "old"}, {"server-gone", "gone", "last"}, {"vip-gone", "web", ""}, {"vip-gone", "gone", ""},
	} {
		if told[want] != 1 {
			t.Errorf("the event %v was told %d times:\n%s", want, told[want], out)
		}
	}
	// The next successor knows nothing of it any more.
	kept := filepath.Join(r.run, "flows", "instance")
	r.until("nothing is kept about it", func() bool {
		b, err := os.ReadFile(kept)
		r.must(err)
		return !strings.Contains(string(b), `"old"`) && !strings.Contains(string(b), `"gone"`)
	})
	next(r, pid)
	_, out = r.weir("events", "-o", "json")
	if strings.Contains(out, "-gone") {
		t.Errorf("a successor tells again of what is gone:\n%s", out)
	}
	if _, out := r.weir("servers", "-o", "json"); !strings.Contains(out, "maint") {
		t.Errorf("the server is in maint no more:\n%s", out)
	}
	r.stop()
}
