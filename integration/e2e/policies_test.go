// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/built"
	"github.com/weirgate/weir/module/control"
)

// oddPlugin builds the plugin of testdata/oddplugin and returns its path.
func oddPlugin(t *testing.T) string { t.Helper(); return built.Program(t, "./testdata/oddplugin") }

// farmhands are the servers of a rig, that answer with their names.
type farmhands struct {
	servers []*lab.Server
	size    int             // bytes of a response's body
	delay   [8]atomic.Int64 // by server, ns
	got     [8]atomic.Int64 // requests by server
}

func (r *rig) farmhands(size int) *farmhands {
	r.t.Helper()
	f := &farmhands{size: size}
	body := strings.Repeat("x", size)
	for i, h := range r.Servers {
		s, err := lab.HTTPServer(h, r.Server(i).String(), http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if q.URL.Path == "/healthz" {
				return
			}
			f.got[i].Add(1)
			time.Sleep(time.Duration(f.delay[i].Load()))
			w.Header().Set("X-Server", h.Name())
			w.Header().Set("Content-Length", fmt.Sprint(len(body)))
			_, _ = io.WriteString(w, body)
		}))
		if err != nil {
			r.t.Fatal(err)
		}
		f.servers = append(f.servers, s)
	}
	return f
}

// askers are clients that ask one after the other until they are stopped.
type askers struct {
	stop   context.CancelFunc
	wait   sync.WaitGroup
	n      atomic.Int64
	bytes  [8]atomic.Int64
	mu     sync.Mutex
	errors []string
}

// keepAsking starts n clients on connections that are kept, asking for path.
func (r *rig) keepAsking(n int, vip, path string) *askers {
	r.t.Helper()
	tr := &askers{}
	ctx, cancel := context.WithCancel(r.t.Context())
	tr.stop = cancel
	client := r.Clients[0].HTTPClient(lab.HTTPClientOptions{Timeout: 20 * time.Second})
	for range n {
		tr.wait.Go(func() {
			for ctx.Err() == nil {
				if err := tr.once(ctx, client, "http://"+vip+path); err != nil && ctx.Err() == nil {
					tr.mu.Lock()
					tr.errors = append(tr.errors, err.Error())
					tr.mu.Unlock()
				}
			}
		})
	}
	r.t.Cleanup(func() { tr.end(r.t) })
	return tr
}

func (tr *askers) once(ctx context.Context, client *http.Client, url string) error {
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
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d", resp.StatusCode)
	}
	tr.n.Add(1)
	if name := resp.Header.Get("X-Server"); len(name) > 1 {
		tr.bytes[name[1]-'1'].Add(n)
	}
	return nil
}

// end stops the clients and fails the test for every request that failed.
func (tr *askers) end(t *testing.T) {
	t.Helper()
	tr.stop()
	tr.wait.Wait()
	for i, e := range tr.errors {
		if i == 5 {
			t.Errorf("… and %d more of %d requests", len(tr.errors)-i, tr.n.Load())
			break
		}
		t.Errorf("a request failed: %s", e)
	}
	tr.errors = nil
}

// pluginsOf asks the instance about its plugins.
func (r *rig) pluginsOf(w *lab.Weir) map[string]control.PluginDetail {
	r.t.Helper()
	ctx := within(r.t, 10*time.Second)
	out, err := exec.CommandContext(ctx, r.bin, "plugins", "-o", "json", "--socket", filepath.Join(r.run, "admin.sock")).Output()
	if err != nil {
		r.t.Fatalf("weir plugins: %v", err)
	}
	var list []control.PluginDetail
	if err := json.Unmarshal(out, &list); err != nil {
		r.t.Fatal(err)
	}
	m := map[string]control.PluginDetail{}
	for _, p := range list {
		m[p.Name] = p
	}
	return m
}

// TestPoliciesServerKilled: with all four plugins, a server that dies under
// load costs no idempotent request, and within three intervals of its probe
// nothing goes there any more; when it is back it gets its share again.
func TestPoliciesServerKilled(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 3, NoIPv6: true})
	f := r.farmhands(500)
	const interval = time.Second
	w := r.start(lab.ConfigOptions{Policies: `[{use: state, config: {probe: {http: /healthz, interval: 1s}}}, {use: path, config: {routes: [{prefix: /, servers: [s1, s2, s3]}]}}, bandwidth, {use: load, config: {slow_start: 1s}}]`,
		Plugins: `[{name: bandwidth, config: {farm: {rate: 10Gbit}}}]`})
	tr := r.keepAsking(8, r.VIP().String(), "/")
	until(t, 10*time.Second, "requests at every server", func() bool {
		return f.got[0].Load() > 20 && f.got[1].Load() > 20 && f.got[2].Load() > 20
	})
	killed := time.Now()
	if err := f.servers[1].Close(); err != nil {
		t.Fatal(err)
	}
	opened := func() uint64 {
		t.Helper()
		raw, err := w.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var st control.Status
		if err := json.Unmarshal(raw, &st); err != nil {
			t.Fatal(err)
		}
		return st.Farms[0].Servers[1].Opened
	}
	time.Sleep(3*interval - time.Since(killed)) // the time that the promise allows
	before, asked := opened(), tr.n.Load()
	until(t, 10*time.Second, "two hundred more requests", func() bool { return tr.n.Load() > asked+200 })
	if n := opened() - before; n > 0 {
		t.Errorf("%d connections are tried to a server that is dead for three intervals", n)
	}
	if n := w.Log(); !strings.Contains(n, "server is taken out") {
		t.Error("the log does not tell that a server was taken out")
	}
	tr.end(t)

	// Back again.
	s, err := lab.HTTPServer(r.Servers[1], r.Server(1).String(), http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.URL.Path != "/healthz" {
			f.got[3].Add(1)
		}
		w.Header().Set("X-Server", "s2")
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	tr = r.keepAsking(8, r.VIP().String(), "/")
	until(t, 15*time.Second, "requests at the server that is back", func() bool { return f.got[3].Load() > 50 })
	tr.end(t)
	r.stop(w)
}

// TestPoliciesBandwidth: a server with a budget gets no more than it, the
// others take the rest.
func TestPoliciesBandwidth(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 3, NoIPv6: true})
	r.farmhands(64 << 10)
	w := r.start(lab.ConfigOptions{Policies: `[state, {use: path, config: {default: [s1, s2, s3]}}, {use: bandwidth, config: {servers: {s1: {rate: 20Mbit, burst: 256KiB}}}}, load]`})
	const rate, length = 20e6 / 8, 10 * time.Second
	began := time.Now()
	tr := r.keepAsking(8, r.VIP().String(), "/")
	time.Sleep(length - time.Since(began)) // what is measured is what passes in this time
	capped := float64(tr.bytes[0].Load())
	took := time.Since(began).Seconds()
	rest := float64(tr.bytes[1].Load() + tr.bytes[2].Load())
	tr.end(t)
	if limit := 1.1 * rate * took; capped > limit {
		t.Errorf("the capped server sent %.0f bytes in %.1f s, its budget allows %.0f", capped, took, limit)
	}
	// Both depend on what the machine can do at all.
	plenty := capped+rest > 4*rate*took
	if plenty && capped < 0.2*rate*took {
		t.Errorf("the capped server sent only %.0f bytes in %.1f s", capped, took)
	}
	if plenty && rest < 2*capped {
		t.Errorf("the others sent %.0f bytes, the capped one %.0f", rest, capped)
	}
	t.Logf("capped: %.2f of its budget; the others: %.1f times as much", capped/(rate*took), rest/capped)
	r.stop(w)
}

// TestPoliciesLoad: equal servers get equal shares, a slow one less, but not
// nothing.
func TestPoliciesLoad(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 3, NoIPv6: true})
	f := r.farmhands(200)
	w := r.start(lab.ConfigOptions{Policies: `[state, {use: path, config: {default: [s1, s2, s3]}}, bandwidth, load]`,
		Plugins: `[{name: bandwidth, config: {each: {rate: 1Gbit}}}]`})
	tr := r.keepAsking(12, r.VIP().String(), "/")
	until(t, 40*time.Second, "10,000 requests", func() bool { return tr.n.Load() >= 10_000 })
	tr.end(t)
	total := float64(f.got[0].Load() + f.got[1].Load() + f.got[2].Load())
	for i := range 3 {
		if share := float64(f.got[i].Load()) / total; share < 0.5/3 {
			t.Errorf("server %d got %.3f of the requests, a third is its share", i+1, share)
		}
	}
	for i := range 3 {
		f.delay[i].Store(int64(4 * time.Millisecond))
		f.got[i].Store(0)
	}
	f.delay[0].Store(int64(20 * time.Millisecond))
	tr = r.keepAsking(12, r.VIP().String(), "/")
	until(t, 30*time.Second, "a score of the slow server", func() bool { return r.score(w, "s1") < 0.7 })
	for i := range 3 {
		f.got[i].Store(0)
	}
	until(t, 20*time.Second, "2,000 more requests", func() bool { return f.got[0].Load()+f.got[1].Load()+f.got[2].Load() >= 2000 })
	tr.end(t)
	slow, fast := f.got[0].Load(), min(f.got[1].Load(), f.got[2].Load())
	if slow == 0 || slow*2 > fast {
		t.Errorf("the slow server got %d requests, the others at least %d", slow, fast)
	}
	t.Logf("equal: %.0f; slow %d, others %d and %d", total, slow, f.got[1].Load(), f.got[2].Load())
	r.stop(w)
}

// score returns what the load plugin thinks of a server, 1 if nothing.
func (r *rig) score(w *lab.Weir, server string) float64 {
	r.t.Helper()
	out, err := exec.CommandContext(within(r.t, 10*time.Second), r.bin, "policy", "explain", "-o", "json", "--socket", filepath.Join(r.run, "admin.sock"), "GET", "/").Output()
	if err != nil {
		r.t.Fatal(err)
	}
	var x control.PolicyExplanation
	if err := json.Unmarshal(out, &x); err != nil {
		r.t.Fatal(err)
	}
	for _, s := range x.Steps {
		if _, after, ok := strings.Cut(s.Text, server+" "); s.Policy == "load" && ok && strings.HasPrefix(s.Text, "scores") {
			v := 1.0
			fmt.Sscanf(after, "%g", &v)
			return v
		}
	}
	return 1
}

// TestPluginFaults: whatever happens to plugins at work, no request notices.
func TestPluginFaults(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, NoIPv6: true})
	r.farmhands(300)
	odd := oddPlugin(t)
	dir := t.TempDir()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil { // the plugin's user reads in it
			t.Fatal(err)
		}
	}
	// Each of these is well at first, and misbehaves from the start on that
	// follows its change.
	modes := []string{"late", "garbage", "version", "crash", "exit"}
	var list, names []string
	turn := func(name, mode string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(mode), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range modes {
		pause := "200ms"
		if m == "exit" {
			pause = "10ms"
		}
		turn("is-"+m, "well")
		names = append(names, "is-"+m)
		list = append(list, fmt.Sprintf("{name: is-%s, command: [%q, %q], start_timeout: 5s, restart: {min: %s, max: %s, limit: 0}}", m, odd, filepath.Join(dir, "is-"+m), pause, pause))
	}
	w := r.start(lab.ConfigOptions{
		Policies: `[{use: path, config: {default: [s1, s2]}}, {use: state, config: {probe: {http: /healthz}}}, load, {use: asked, fallback: ignore}, ` + strings.Join(names, ", ") + "]",
		Plugins: "[" + strings.Join(list, ", ") + ", {name: path, restart: {min: 10ms, max: 10ms, limit: 0}}, {name: load, restart: {min: 10ms, max: 10ms, limit: 0}}, " +
			fmt.Sprintf("{name: asked, command: [%q, ask], restart: {min: 10ms, max: 10ms, limit: 0}}]", odd),
	})
	tr := r.keepAsking(4, r.VIP().String(), "/")
	until(t, 20*time.Second, "the first requests", func() bool { return tr.n.Load() > 50 })
	// The flow tables are there from the start, and the kernel counts a page of
	// them when it is used first: requests make that grow, up to what all of
	// them hold. plugins/host tests that a crash itself leaves nothing.
	const tables = 128 << 10
	memory := func() int {
		t.Helper()
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.Proc.Pid()))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
				kb := 0
				fmt.Sscan(v, &kb)
				return kb
			}
		}
		t.Fatal("no VmRSS")
		return 0
	}
	files := func() int {
		t.Helper()
		list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", w.Proc.Pid()))
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	kill := func(sig syscall.Signal, names ...string) map[string]control.PluginDetail {
		t.Helper()
		before := r.pluginsOf(w)
		for _, n := range names {
			if before[n].PID == 0 {
				t.Fatalf("plugin %s does not run: %+v", n, before[n])
			}
			if err := syscall.Kill(before[n].PID, sig); err != nil {
				t.Fatal(err)
			}
		}
		return before
	}
	again := func(what string, before map[string]control.PluginDetail, names ...string) {
		t.Helper()
		until(t, 30*time.Second, what, func() bool {
			now := r.pluginsOf(w)
			return !slices.ContainsFunc(names, func(n string) bool { return now[n].Restarts <= before[n].Restarts || now[n].State != "up" })
		})
	}
	for range 3 {
		again("the restarts after kill -9", kill(syscall.SIGKILL, "path", "load", "asked"), "path", "load", "asked")
	}
	again("the end of plugins that hang", kill(syscall.SIGSTOP, "path", "asked"), "path", "asked")
	if d := r.pluginsOf(w)["asked"].Decisions; d.Answered == 0 {
		t.Errorf("the plugin that is asked has not answered: %+v", d)
	}
	for _, m := range modes {
		turn("is-"+m, m)
	}
	kill(syscall.SIGKILL, names...)
	restarts := func(name string) uint64 { return r.pluginsOf(w)[name].Restarts }
	until(t, 60*time.Second, "50 crashes in a row", func() bool { return restarts("is-exit") >= 50 })
	warm, open := memory(), files()
	until(t, 60*time.Second, "200 crashes in a row", func() bool { return restarts("is-exit") >= 200 })
	after := memory()
	if os.Getenv("WEIR_SOAK") != "" {
		until(t, 10*time.Minute, "2,000 crashes in a row", func() bool { return restarts("is-exit") >= 2000 })
		if n := memory(); n > max(warm, tables)+48<<10 {
			t.Errorf("%d KiB of memory after 2,000 crashes, %d after 200", n, after)
		} else {
			t.Logf("memory %d KiB after 2,000 crashes, %d requests", n, tr.n.Load())
		}
	}
	now := r.pluginsOf(w)
	if out, err := exec.CommandContext(within(t, 10*time.Second), r.bin, "events", "--socket", filepath.Join(r.run, "admin.sock")).CombinedOutput(); err != nil || !strings.Contains(string(out), "plugin-state") {
		t.Errorf("no event tells of a plugin (%v):\n%s", err, out)
	}
	for _, n := range names {
		if now[n].Restarts == 0 {
			t.Errorf("the restarts of %s are not visible: %+v", n, now[n])
		}
	}
	if after > max(warm, tables)+32<<10 {
		t.Errorf("%d KiB of memory after 200 crashes, %d after 50", after, warm)
	}
	if now := files(); now > open+40 {
		t.Errorf("%d files are open after 200 crashes, %d after 50", now, open)
	}
	t.Logf("%d requests; memory %d KiB after 50 crashes, %d after 200", tr.n.Load(), warm, after)
	for _, m := range modes {
		turn("is-"+m, "well")
	}
	until(t, 30*time.Second, "all plugins to be well again", func() bool {
		for _, p := range r.pluginsOf(w) {
			if p.State != "up" {
				return false
			}
		}
		return true
	})
	tr.end(t)
	r.stop(w)
}

// TestPluginConfigRefused: a configuration that a plugin refuses is refused by
// check and by a reload, with its own words and key path, and the running set
// stays.
func TestPluginConfigRefused(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, NoIPv6: true})
	r.hello()
	options := func(policies string) lab.ConfigOptions { return lab.ConfigOptions{Policies: policies} }
	w := r.start(options(`[{use: path, config: {default: [s1]}}, {use: state, config: {probe: {tcp: true}}}, {use: bandwidth, config: {each: {rate: 1Gbit}}}, load]`))
	r.mustAsk("/x")
	pids := func() (out []int) {
		for _, p := range r.pluginsOf(w) {
			out = append(out, p.PID)
		}
		slices.Sort(out)
		return out
	}
	before := pids()
	file := filepath.Join(r.dir, "weir.yaml")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ policies, want string }{
		{`[{use: path, config: {default: [s9]}}]`, `config.default[0]|server "s9" is not in farm "web", which has s1, s2`},
		{`[{use: state, config: {probe: {http: healthz}}}]`, `config.probe.http|expected a path such as /healthz`},
		{`[{use: bandwidth, config: {servers: {s1: {rate: fast}}}}]`, `config.servers.s1.rate|"fast" is not a rate`},
		{`[{use: load, config: {half_time: 5s}}]`, `config.half_time|unknown key, expected one of half_life`},
	} {
		o := options(c.policies)
		o.Dir = r.run
		bad := filepath.Join(t.TempDir(), "weir.yaml")
		if err := os.WriteFile(bad, []byte(r.Config(o)), 0o644); err != nil {
			t.Fatal(err)
		}
		code, out := runWeir(t, "check", "--config", bad)
		if code != 2 {
			t.Errorf("check %s: exit code %d:\n%s", c.policies, code, out)
		}
		for want := range strings.SplitSeq(c.want, "|") {
			if !strings.Contains(out, want) {
				t.Errorf("check %s: no %q in:\n%s", c.policies, want, out)
			}
		}
		if err := os.WriteFile(file, []byte(r.Config(o)), 0o644); err != nil {
			t.Fatal(err)
		}
		var both bytes.Buffer
		cmd := exec.CommandContext(within(t, 20*time.Second), r.bin, "reload", "--socket", filepath.Join(r.run, "admin.sock"))
		cmd.Stdout, cmd.Stderr = &both, &both
		if err := cmd.Run(); err == nil {
			t.Errorf("reload %s: accepted", c.policies)
		}
		for want := range strings.SplitSeq(c.want, "|") {
			if !strings.Contains(both.String(), want) {
				t.Errorf("reload %s: no %q in:\n%s", c.policies, want, both.String())
			}
		}
		r.mustAsk("/still")
		if now := pids(); !slices.Equal(now, before) {
			t.Errorf("reload %s: the running set changed: %v, before %v", c.policies, now, before)
		}
	}
	if err := os.WriteFile(file, good, 0o644); err != nil {
		t.Fatal(err)
	}
	r.stop(w)
}

// TestExplainAndShadow: what explain says of a running instance is what it
// does, and a shadow is compared without effect.
func TestExplainAndShadow(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, NoIPv6: true})
	r.farmhands(10)
	w := r.start(lab.ConfigOptions{
		Policies: `[{use: path, config: {routes: [{prefix: /sales/, servers: [s1]}, {prefix: /, cookies: {tenant: blue}, servers: [s2]}], default: [s1]}}, {use: shade, shadow: true, config: {default: [s1]}}]`,
		Plugins:  `[{name: shade, command: [path]}]`,
	})
	explain := func(args ...string) string {
		t.Helper()
		args = append([]string{"policy", "explain", "--socket", filepath.Join(r.run, "admin.sock")}, args...)
		out, err := exec.CommandContext(within(t, 10*time.Second), r.bin, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	client := r.Clients[0].HTTPClient(lab.HTTPClientOptions{})
	for _, c := range []struct{ path, cookie, server, step, shade string }{
		{"/sales/x", "tenant=blue", "s1", "route /sales/: servers s1", "shadow: agrees"},
		{"/other", "a=b; tenant=blue", "s2", "route / cookie tenant=blue: servers s2", "shadow: would have decided otherwise"},
		{"/other", "tenant=red", "s1", "route default: servers s1", "shadow: agrees"},
	} {
		out := explain("-H", "Cookie: "+c.cookie, "GET", "http://"+r.VIP().String()+c.path)
		for _, want := range []string{c.step, c.shade, "server " + c.server + " ("} {
			if !strings.Contains(out, want) {
				t.Errorf("%s %s: no %q in\n%s", c.path, c.cookie, want, out)
			}
		}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+r.VIP().String()+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Cookie", c.cookie)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if got := resp.Header.Get("X-Server"); got != c.server {
			t.Errorf("%s %s goes to %s, want %s", c.path, c.cookie, got, c.server)
		}
	}
	if f := r.pluginsOf(w)["shade"].Farms[0]; !f.Shadow || f.Compared != 3 || f.Agreed != 2 {
		t.Errorf("%+v", f)
	}
	r.stop(w)
}
