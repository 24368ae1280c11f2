// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// The scene of the policies: the budget of S4, the size of a response, and how
// long each act is.
const (
	budgetBits  = 8_000_000
	policyBody  = 16 << 10
	usualDelay  = 4 * time.Millisecond
	slowDelay   = 5 * usualDelay
	policyUsers = 12
)

// troupe are the servers of the scene, and who got what.
type troupe struct {
	delay  [4]atomic.Int64
	got    [4]atomic.Int64
	failed atomic.Int64
	mu     sync.Mutex
	first  error        // why the first request failed
	dying  atomic.Bool  // S2 answers nobody any more
	inside atomic.Int64 // requests that S2 is about to answer
}

// policing shows what the policies do about a server that is slow, one that has
// a budget and one that dies.
func policing(ctx context.Context, s *stage) error {
	tr := &troupe{}
	body := strings.Repeat("x", policyBody)
	var servers []*lab.Server
	for i := range 4 {
		tr.delay[i].Store(int64(usualDelay))
		srv, err := lab.HTTPServer(s.Servers[i], s.server(i).String(), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/healthz" {
				return
			}
			if i == 1 {
				tr.inside.Add(1)
				defer tr.inside.Add(-1)
				if tr.dying.Load() {
					panic(http.ErrAbortHandler) // not a byte of a response
				}
			}
			tr.got[i].Add(1)
			time.Sleep(time.Duration(tr.delay[i].Load()))
			w.Header().Set("Content-Length", fmt.Sprint(len(body)))
			_, _ = io.WriteString(w, body)
		}))
		if err != nil {
			return err
		}
		s.exit = append(s.exit, srv.Close)
		servers = append(servers, srv)
	}
	err := s.start(ctx, lab.ConfigOptions{Policies: "[{use: state, config: {probe: {http: /healthz, interval: 500ms}}}, " +
		"{use: bandwidth, config: {servers: {s4: {rate: 8Mbit, burst: 64KiB}}}}, {use: load, config: {half_life: 1s}}]"})
	if err != nil {
		return err
	}
	users, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	client := s.Clients[0].HTTPClient(lab.HTTPClientOptions{Timeout: 10 * time.Second})
	began := time.Now()
	for range policyUsers {
		wg.Go(func() { tr.ask(users, client, "http://"+s.vip().String()+"/") })
	}
	leave := sync.OnceFunc(func() { stop(); wg.Wait() })
	defer leave()

	act := func(d time.Duration) (n [4]int64) {
		var before [4]int64
		for i := range before {
			before[i] = tr.got[i].Load()
		}
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
		for i := range n {
			n[i] = tr.got[i].Load() - before[i]
		}
		return n
	}
	says := func() []string { return s.said(ctx) }
	equal := act(2 * time.Second)
	tr.delay[2].Store(int64(slowDelay))
	act(4 * time.Second) // until the running mean has noticed
	slow := act(2 * time.Second)
	load := says()
	// A response that has begun cannot be repeated elsewhere by anybody, so S2
	// dies between two of them: what it has then is repeated.
	tr.dying.Store(true)
	for tr.inside.Load() > 0 && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(100 * time.Millisecond) // its last bytes arrive
	if err := servers[1].Close(); err != nil {
		return err
	}
	act(1500 * time.Millisecond) // three intervals of the probe
	dead := act(2 * time.Second)
	state := says()
	took := time.Since(began)
	leave()

	fmt.Fprintf(s.w, "  %-28s %10s %10s %10s %10s\n", "requests in two seconds", "S1", "S2", "S3", "S4")
	for _, r := range []struct {
		name string
		n    [4]int64
	}{{"S4 has 8 Mbit/s", equal}, {"and S3 is five times as slow", slow}, {"and S2 is dead", dead}} {
		fmt.Fprintf(s.w, "  %-28s %10d %10d %10d %10d\n", r.name, r.n[0], r.n[1], r.n[2], r.n[3])
	}
	fmt.Fprintf(s.w, "\n  What the policies say (weir policy explain GET /):\n")
	for _, line := range append(pick(load, "load"), pick(state, "state")...) {
		fmt.Fprintf(s.w, "    %s\n", line)
	}
	sent := float64(tr.got[3].Load()) * policyBody * 8
	allowed := budgetBits * took.Seconds()
	fmt.Fprintf(s.w, "    bandwidth: S4 sent %.1f Mbit in %.1f s, its budget is %.1f\n\n", sent/1e6, took.Seconds(), allowed/1e6)

	var problems []string
	claim := func(ok bool, format string, args ...any) {
		if !ok {
			problems = append(problems, fmt.Sprintf(format, args...))
		}
	}
	claim(tr.failed.Load() == 0, "%d requests failed, the first: %v", tr.failed.Load(), tr.first)
	claim(dead[1] == 0, "the dead server got %d requests", dead[1])
	claim(slow[2] > 0 && slow[2] < slow[0]/2, "the slow server got %d requests, S1 %d", slow[2], slow[0])
	claim(sent < 1.15*allowed, "the budget was exceeded: %.1f Mbit of %.1f", sent/1e6, allowed/1e6)
	total := int64(0)
	for i := range tr.got {
		total += tr.got[i].Load()
	}
	return s.verdict(fmt.Sprintf("requests: %s   failed: %d", thousands(int(total)), tr.failed.Load()), problems)
}

// ask asks until the users leave.
func (t *troupe) ask(ctx context.Context, client *http.Client, url string) {
	for ctx.Err() == nil {
		err := func() error {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
			if err != nil {
				return err
			}
			resp, err := client.Do(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			n, err := io.Copy(io.Discard, resp.Body)
			if err == nil && (resp.StatusCode != http.StatusOK || n != policyBody) {
				err = fmt.Errorf("status %d, %d bytes", resp.StatusCode, n)
			}
			return err
		}()
		if err != nil && ctx.Err() == nil {
			t.mu.Lock()
			if t.failed.Add(1) == 1 {
				t.first = err
			}
			t.mu.Unlock()
		}
	}
}

// said asks the daemon how it would choose now; nothing if it does not tell.
func (s *stage) said(ctx context.Context) (lines []string) {
	out, err := exec.CommandContext(ctx, s.opts.Weir, "policy", "explain", "-o", "json", "--socket", filepath.Join(s.dir, "run", "admin.sock"), "GET", "/").Output()
	if err != nil {
		return nil
	}
	var x struct {
		Steps []struct{ Policy, Text string }
	}
	if json.Unmarshal(out, &x) != nil {
		return nil
	}
	for _, step := range x.Steps {
		lines = append(lines, step.Policy+": "+step.Text)
	}
	return lines
}

// pick returns the lines of one policy, cut to the width of the demo.
func pick(lines []string, policy string) (out []string) {
	for _, l := range lines {
		if strings.HasPrefix(l, policy+": ") {
			if len(l) > 90 {
				l = l[:87] + "..."
			}
			out = append(out, l)
		}
	}
	return out
}
