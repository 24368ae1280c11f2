// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/florianl/go-nfqueue/v2"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
)

// hello has every server of the rig answer with its name.
func (r *rig) hello() []*lab.Server {
	r.t.Helper()
	var ss []*lab.Server
	for i, h := range r.Servers {
		s, err := lab.HTTPServer(h, r.Server(i).String(), http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			fmt.Fprintf(w, "%s has %s", h.Name(), q.URL.Path)
		}))
		if err != nil {
			r.t.Fatal(err)
		}
		ss = append(ss, s)
	}
	return ss
}

// ask makes one request through the VIP on a new connection.
func (r *rig) ask(path string) error {
	client := r.Clients[0].HTTPClient(lab.HTTPClientOptions{Close: true, Timeout: 15 * time.Second})
	resp, err := client.Get("http://" + r.VIP().String() + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || !strings.HasSuffix(string(b), " has "+path) {
		return fmt.Errorf("GET %s: %s, %q", path, resp.Status, b)
	}
	return nil
}

func (r *rig) mustAsk(path string) {
	r.t.Helper()
	if err := r.ask(path); err != nil {
		r.t.Fatal(err)
	}
}

// withPath is a configuration that needs a plugin process.
var withPath = lab.ConfigOptions{
	Policies: "[{use: path, config: {routes: [{prefix: /, servers: [s1, s2]}]}}]",
	Plugins:  "[{name: path}]",
}

// TestStopLeavesNothing: after SIGTERM the router is as it was before the
// start: ruleset, sysctls, addresses, routes, sockets, queues, files and
// processes.
func TestStopLeavesNothing(t *testing.T) {
	require.NFQueue(t)
	t.Run("idle", func(t *testing.T) {
		r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
		r.hello()
		before := r.state()
		w := r.start(withPath)
		for range 5 {
			r.mustAsk("/x")
		}
		during := r.state()
		if len(before.network.Diff(during.network)) == 0 || len(during.processes) < 2 || len(during.files) == 0 {
			t.Errorf("the comparison sees nothing of a running weir: %d processes, files %q", len(during.processes), during.files)
		}
		r.stop(w)
		r.sameAs(before, "after SIGTERM")
	})
	// A response that is still running when SIGTERM comes gets its time, then
	// a reset on both sides; the rest is as above.
	t.Run("in flight", func(t *testing.T) {
		r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
		begun := make(chan struct{}, 1)
		for i, h := range r.Servers {
			_, err := lab.HTTPServer(h, r.Server(i).String(), http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
				w.Header().Set("Content-Length", "1000")
				_, _ = w.Write(make([]byte, 10))
				w.(http.Flusher).Flush()
				begun <- struct{}{}
				<-q.Context().Done() // the reset that must come
			}))
			if err != nil {
				t.Fatal(err)
			}
		}
		before := r.state()
		w := r.start(withPath)
		conn, err := r.Clients[0].Dial(within(t, 10*time.Second), "tcp", r.VIP().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
		fmt.Fprintf(conn, "GET /slow HTTP/1.1\r\nHost: %s\r\n\r\n", r.VIP())
		<-begun
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		r.stop(w)
		if n, err := io.Copy(io.Discard, resp.Body); err == nil {
			t.Errorf("the client takes %d bytes of 1000 for a whole response", n)
		}
		r.sameAs(before, "after SIGTERM")
	})
}

// TestKillAndTakeOver: after kill -9 the rules stay, so that nothing leaves
// untranslated; a new start takes over, and its orderly end leaves what the
// killed one had found.
func TestKillAndTakeOver(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.hello()
	before := r.state()
	for round := range 2 {
		w := r.start(withPath)
		r.mustAsk("/before")
		plugins, err := r.Router.Processes()
		if err != nil {
			t.Fatal(err)
		}
		running := r.state()
		if err := w.Crash(); err != nil {
			t.Fatal(err)
		}
		until(t, 15*time.Second, fmt.Sprintf("the end of the plugins among processes %v", plugins), func() bool {
			pids, err := r.Router.Processes()
			return err == nil && len(pids) == len(before.processes)
		})
		crashed, err := r.Router.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		for _, kind := range []string{"nft ", "sysctl "} {
			for _, d := range running.network.Select(kind).Diff(crashed.Select(kind)) {
				// Counters go on counting what is dropped now.
				if kind == "sysctl " {
					t.Errorf("round %d: kill -9 changes %s", round, clip(d, 300))
				}
			}
			if len(before.network.Select(kind).Diff(crashed.Select(kind))) == 0 {
				t.Errorf("round %d: after kill -9 nothing is left of %s entries", round, kind)
			}
		}
		// Without an engine, nobody answers in its place.
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		if c, err := r.Clients[0].Dial(ctx, "tcp", r.VIP().String()); err == nil {
			c.Close()
			t.Errorf("round %d: somebody accepts connections to the VIP while weir is dead", round)
		}
		cancel()
	}
	w := r.start(withPath)
	r.mustAsk("/after")
	r.stop(w)
	r.sameAs(before, "after take-over and SIGTERM")
}

// foreign is somebody else's ruleset. It counts nothing, so that it can be
// compared byte by byte.
const foreign = `
table inet foreign {
	set banned {
		type ipv4_addr
		flags interval
		elements = { 198.18.66.0/24 }
	}
	map ports {
		type inet_service : verdict
		elements = { 22 : drop }
	}
	chain early {
		type filter hook prerouting priority raw; policy accept;
		ip saddr @banned drop
	}
	chain input {
		type filter hook input priority filter; policy accept;
		ct state established,related accept
		tcp dport vmap @ports
	}
}
table ip foreign_nat {
	chain post {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 198.18.66.0/24 masquerade
	}
}
`

// TestForeignTableUntouched: tables of others are the same bytes before,
// during and after.
func TestForeignTableUntouched(t *testing.T) {
	nft := require.Tool(t, "nft")
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.hello()
	script := filepath.Join(r.Lab.Dir(), "foreign.nft")
	if err := os.WriteFile(script, []byte(foreign), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Router.Run(t.Context(), nft, "-f", script); err != nil {
		t.Fatal(err)
	}
	look := func() (lab.Snapshot, string) {
		t.Helper()
		s, err := r.Router.Ruleset()
		if err != nil {
			t.Fatal(err)
		}
		theirs := s.Select("nft 1 foreign ") // 1: inet
		for k, v := range s.Select("nft 2 ") {
			if !strings.HasPrefix(k, "nft 2 weir ") { // ours, for SYNs
				theirs[k] = v
			}
		}
		var text strings.Builder
		for _, table := range [][]string{{"inet", "foreign"}, {"ip", "foreign_nat"}} {
			out, err := r.Router.Run(t.Context(), nft, "-a", "list", "table", table[0], table[1])
			if err != nil {
				t.Fatal(err)
			}
			text.Write(out)
		}
		return theirs, text.String()
	}
	bytesBefore, textBefore := look()
	if len(bytesBefore) < 10 {
		t.Fatalf("the comparison sees only %d entries", len(bytesBefore))
	}
	same := func(when string) {
		t.Helper()
		b, text := look()
		for _, d := range bytesBefore.Diff(b) {
			t.Errorf("%s: %s", when, clip(d, 300))
		}
		if text != textBefore {
			t.Errorf("%s: nft lists\n%s\nbefore:\n%s", when, text, textBefore)
		}
	}
	w := r.start(lab.ConfigOptions{})
	r.mustAsk("/x")
	same("while weir runs")
	if err := w.Crash(); err != nil {
		t.Fatal(err)
	}
	same("after kill -9")
	w = r.start(lab.ConfigOptions{})
	r.mustAsk("/x")
	same("after take-over")
	r.stop(w)
	same("after SIGTERM")
}

// TestStartupErrors: what makes a start impossible is told in one sentence,
// with exit code 1, and nothing is left behind.
func TestStartupErrors(t *testing.T) {
	require.NFQueue(t)
	for _, c := range []struct {
		name string
		// prepare makes the start impossible and returns how to undo that; nil
		// if it cannot be undone.
		prepare func(*rig, *lab.WeirOptions) (undo func())
		want    []string // each part of the sentence, alternatives separated by |
	}{
		{
			name: "privileges",
			prepare: func(r *rig, o *lab.WeirOptions) func() {
				// A copy that another user can reach.
				b, err := os.ReadFile(r.bin)
				if err != nil {
					r.t.Fatal(err)
				}
				o.Binary = filepath.Join(r.Lab.Dir(), "weir-copy")
				if err := os.WriteFile(o.Binary, b, 0o755); err != nil {
					r.t.Fatal(err)
				}
				o.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
				return nil
			},
			want: []string{"CAP_NET_ADMIN|privilege|root"},
		},
		{
			name: "queue",
			prepare: func(r *rig, o *lab.WeirOptions) func() {
				q, err := nfqueue.Open(&nfqueue.Config{NetNS: r.Router.NetNS(), NfQueue: 22272, Copymode: nfqueue.NfQnlCopyMeta})
				if err != nil {
					r.t.Fatal(err)
				}
				if err := q.RegisterWithErrorFunc(r.t.Context(), func(nfqueue.Attribute) int { return 0 }, func(error) int { return 1 }); err != nil {
					r.t.Fatal(err)
				}
				return func() { _ = q.Close() }
			},
			want: []string{"queue", "22272"},
		},
		{
			name:    "VIP with a listener",
			prepare: listenOn(func(r *rig) string { return r.VIP().String() }),
			want:    []string{"203.0.113.10:80", "listen"},
		},
		{
			name:    "VIP with a listener on all addresses",
			prepare: listenOn(func(*rig) string { return "0.0.0.0:80" }),
			want:    []string{"203.0.113.10:80", "listen"},
		},
		{
			name: "no forwarding",
			prepare: func(r *rig, o *lab.WeirOptions) func() {
				if err := r.Router.Forwarding(false); err != nil {
					r.t.Fatal(err)
				}
				return func() {
					if err := r.Router.Forwarding(true); err != nil {
						r.t.Fatal(err)
					}
				}
			},
			want: []string{"ip_forward"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, lab.FarmOptions{Servers: 2})
			r.hello()
			o := r.options(lab.ConfigOptions{})
			undo := c.prepare(r, &o)
			before := r.state()
			w, err := lab.NewWeir(r.Router, o)
			if err != nil {
				t.Fatal(err)
			}
			select {
			case <-w.Proc.Done():
			case <-within(t, 15*time.Second).Done():
				t.Fatalf("weir runs, and writes:\n%s", w.Log())
			}
			if code := w.Proc.ExitCode(); code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			oneSentence(t, w.Log(), c.want)
			r.sameAs(before, "after the start that failed")
			if undo == nil {
				return
			}
			// The negative control: without the obstacle it starts.
			undo()
			w = r.start(lab.ConfigOptions{})
			r.mustAsk("/x")
			r.stop(w)
		})
	}
}

func listenOn(addr func(*rig) string) func(*rig, *lab.WeirOptions) func() {
	return func(r *rig, _ *lab.WeirOptions) func() {
		var ln net.Listener
		ln, err := r.Router.Listen("tcp4", addr(r))
		if err != nil {
			r.t.Fatal(err)
		}
		return func() { _ = ln.Close() }
	}
}

// oneSentence finds exactly one line that has all wanted parts, and nothing
// that belongs to a programmer.
func oneSentence(t *testing.T, log string, want []string) {
	t.Helper()
	var hits []string
	for line := range strings.Lines(log) {
		all := true
		for _, w := range want {
			one := false
			for alt := range strings.SplitSeq(w, "|") {
				one = one || strings.Contains(line, alt)
			}
			all = all && one
		}
		if all {
			hits = append(hits, line)
		}
	}
	if len(hits) != 1 {
		t.Errorf("%d lines have all of %q, want one:\n%s", len(hits), want, log)
	}
	for _, bad := range []string{"goroutine ", "panic:", "%!"} {
		if strings.Contains(log, bad) {
			t.Errorf("the output has %q:\n%s", bad, log)
		}
	}
}
