// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
)

// TestReloadsUnderLoad: 200 reloads in a row (2,000 with WEIR_SOAK), every
// fourth of a broken file, and no request fails. The broken ones are reported
// with file, line and key, and change nothing. What the daemon holds in memory
// and in files does not grow.
func TestReloadsUnderLoad(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 3})
	r.hello()
	good := []string{
		r.text(setup{servers: []string{"s1=0", "s2=1"}}),
		r.text(setup{servers: []string{"s1=0", "s2=1", "s3=2"}, farm: "    pool: {max_idle: 8}\n"}),
		r.text(setup{servers: []string{"s3=2", "s1=0"}, farm: "    timeouts: {idle: 50s}\n", extra: "log: {level: warn}\n"}),
		r.text(setup{servers: []string{"s2=1"}, vips: []netip.AddrPort{r.VIP(), netip.AddrPortFrom(r.VIP().Addr(), 8080)}}),
	}
	broken := []struct{ text, want string }{
		{strings.Replace(good[0], "servers:", "serverz:", 1), "weir.yaml:8: farms[0].serverz: unknown key"},
		{strings.Replace(good[0], r.Server(1).String(), "s2.example:80", 1), "weir.yaml:10: farms[0].servers[1].address"},
		{strings.Replace(good[0], "stop_timeout: 2s", "stop_timeout: soon", 1), "weir.yaml:2: stop_timeout"},
		{"farms: [\n", "not valid YAML"},
		{"", "the file is empty"},
	}
	// What the collector finds in use is told after every collection, and these
	// come often.
	w := r.startWith(good[0], "GODEBUG=gctrace=1", "GOGC=5")
	live := 0
	l := r.drive(r.VIP(), 4)
	c := r.client()
	defer c.Close()
	refused, reloads, early, files := 0, 200, 0, 0
	if os.Getenv("WEIR_SOAK") != "" {
		reloads = 2000
	}
	for i := range reloads {
		if i == reloads/2 {
			early, files = memory(t, w.Proc.Pid()), descriptors(t, w.Proc.Pid())
			live = inUse(t, w.Log())
		}
		text, want := good[i%len(good)], ""
		if i%4 == 3 {
			text, want = broken[refused%len(broken)].text, broken[refused%len(broken)].want
			refused++
		}
		r.rewrite(text)
		before := r.server("s1")
		res, err := c.Reload(within(t, 20*time.Second))
		switch {
		case err != nil:
			t.Fatalf("reload %d: %v", i, err)
		case want == "" && res.Outcome == control.Refused:
			t.Fatalf("reload %d: %+v", i, res)
		case want != "":
			if res.Outcome != control.Refused || len(res.Problems) == 0 || !strings.Contains(res.Problems[0].Text, want) {
				t.Fatalf("reload %d: %+v, want it refused with %q", i, res, want)
			}
			if after := r.server("s1"); (before == nil) != (after == nil) || before != nil && before.State != after.State {
				t.Fatalf("reload %d: a refused file changed something: %+v, %+v", i, before, after)
			}
		}
	}
	r.rewrite(good[3])
	r.mustWeir("reload")
	l.progress(200)
	l.end()
	if refused != reloads/4 {
		t.Errorf("%d broken files, want %d", refused, reloads/4)
	}
	// Flat: what a reload leaves behind would be there a thousand times. Tables
	// that are touched for the first time are not it, so that fewer reloads
	// would show nothing.
	late := memory(t, w.Proc.Pid())
	if n := descriptors(t, w.Proc.Pid()); n > files+8 { // those of the callers of the control socket come and go
		t.Errorf("the daemon had %d open files after %d reloads and has %d after %d", files, reloads/2, n, reloads)
	}
	liveThen := inUse(t, w.Log())
	t.Logf("in use: %d MiB after %d reloads, %d MiB after %d", live, reloads/2, liveThen, reloads)
	if liveThen > live+2 {
		t.Errorf("%d MiB are in use after %d reloads, and %d MiB after %d", live, reloads/2, liveThen, reloads)
	}
	t.Logf("resident memory: %d KiB after %d reloads, %d KiB after %d", early, reloads/2, late, reloads)
	if reloads >= 2000 && late > early+early/10 {
		t.Errorf("the daemon grew from %d KiB to %d KiB in %d reloads", early, late, reloads/2)
	}
	for _, s := range []string{"s1", "s2", "s3"} {
		if l.by(s) == 0 {
			t.Errorf("server %s has answered nothing", s)
		}
	}
	t.Logf("%d requests during %d reloads", l.requests.Load(), reloads)
	// What was removed is forgotten in the end.
	until(t, 20*time.Second, "the end of what drains", func() bool {
		st := r.status()
		return len(st.Farms) == 1 && len(st.Farms[0].Servers) == 1 && st.Condition == control.Ready
	})
	r.stop(w)
}

// TestRoutesUnderLoad: routes and servers change together, and no request
// fails or reaches a server that the routes in force do not name. A route that
// the plugin refuses refuses the reload, with its place.
func TestRoutesUnderLoad(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 3})
	r.hello()
	routed := func(servers []string, to string) string {
		return r.text(setup{servers: servers, farm: "    policies: [{use: path, config: {routes: [{prefix: /, servers: [" + to + "]}]}}]\n"})
	}
	one := routed([]string{"s1=0", "s2=1"}, "s1")
	w := r.startWith(one)
	l := r.drive(r.VIP(), 2)
	l.progress(20)
	for round := range 8 {
		for _, s := range []struct {
			text, to string
		}{
			{routed([]string{"s2=1", "s3=2"}, "s3"), "s3"}, // the route's only server goes, another comes
			{routed([]string{"s1=0", "s2=1", "s3=2"}, "s2"), "s2"},
			{one, "s1"},
		} {
			r.rewrite(s.text)
			r.mustWeir("reload")
			l.progress(10) // what was under way
			before := map[string]int{}
			for _, name := range []string{"s1", "s2", "s3"} {
				before[name] = l.by(name)
			}
			l.progress(20)
			for name, n := range before {
				if got := l.by(name) - n; (got > 0) != (name == s.to) {
					t.Errorf("round %d: %d answers of %s, the route names %s", round, got, name, s.to)
				}
			}
		}
	}
	r.rewrite(strings.Replace(one, "servers: [s1]}]}}", "servers: [s9]}]}}", 1))
	c := r.client()
	defer c.Close()
	res, err := c.Reload(within(t, 20*time.Second))
	if err != nil || res.Outcome != control.Refused || len(res.Problems) != 1 ||
		!strings.HasSuffix(res.Problems[0].File, "weir.yaml") || res.Problems[0].Line != 11 || !strings.HasPrefix(res.Problems[0].Key, "farms[0].policies[0]") {
		t.Errorf("a route to a server that is not there: %+v, %v", res, err)
	}
	l.progress(20)
	l.end()
	r.stop(w)
}

// memory is the resident size of a process in KiB.
func memory(t *testing.T, pid int) (n int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			if _, err := fmt.Sscan(v, &n); err != nil {
				t.Fatal(err)
			}
		}
	}
	return n
}

// inUse is what the last collection that a log tells of found in use, in MiB.
func inUse(t *testing.T, log string) (n int) {
	t.Helper()
	all := regexp.MustCompile(`(?m)^gc \d+ @.* \d+->\d+->(\d+) MB`).FindAllStringSubmatch(log, -1)
	if len(all) == 0 {
		t.Fatal("no collection was told of")
	}
	n, err := strconv.Atoi(all[len(all)-1][1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// descriptors counts the open files of a process.
func descriptors(t *testing.T, pid int) int {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// TestReloadOnChange: the daemon follows its file by itself, takes SIGHUP, and
// says in its status that the present file is refused.
func TestReloadOnChange(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.hello()
	one := r.text(setup{servers: []string{"s1=0"}})
	two := r.text(setup{servers: []string{"s1=0", "s2=1"}})
	w := r.startWith(one)
	servers := func(n int) func() bool {
		return func() bool { st := r.status(); return len(st.Farms) == 1 && len(st.Farms[0].Servers) == n }
	}
	r.rewrite(two)
	until(t, 10*time.Second, "the second server, by rename", servers(2))
	if err := os.WriteFile(r.file(), []byte(one), 0o644); err != nil { // in place
		t.Fatal(err)
	}
	until(t, 10*time.Second, "one server, by writing in place", servers(1))

	// A broken file: degraded, exit code 3, and the reason names the line.
	r.rewrite(strings.Replace(one, "name: web", "nam: web", 1))
	until(t, 10*time.Second, "the refusal", func() bool { return r.status().Condition == control.Degraded })
	if code, out, _ := r.weir("status"); code != 3 || !strings.Contains(out, "weir.yaml:6") || !strings.Contains(out, "nam") {
		t.Errorf("weir status: exit code %d:\n%s", code, out)
	}
	r.mustAsk("/x")
	if code, _, errs := r.weir("reload"); code != 2 || !strings.Contains(errs, "weir.yaml:6") || !strings.Contains(errs, "old one stays") {
		t.Errorf("weir reload: exit code %d:\n%s", code, errs)
	}

	// Missing, then back.
	if err := os.Remove(r.file()); err != nil {
		t.Fatal(err)
	}
	until(t, 10*time.Second, "the missing file in the status", func() bool {
		return strings.Contains(strings.Join(r.status().Reasons, " "), "no such file")
	})
	r.rewrite(two)
	until(t, 10*time.Second, "two servers again", servers(2))
	until(t, 10*time.Second, "a ready instance", func() bool { return r.status().Condition == control.Ready })

	// SIGHUP, with something that only a restart can change.
	r.rewrite(one + "queue: {first: 300}\n")
	if err := w.Proc.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	until(t, 10*time.Second, "one server, by SIGHUP", servers(1))
	until(t, 10*time.Second, "queue.first waiting", func() bool { return strings.Contains(strings.Join(r.status().Reasons, " "), "queue.first") })
	if code, out, _ := r.weir("reload"); code != 3 || !strings.Contains(out, "at a restart") {
		t.Errorf("weir reload with a restart pending: exit code %d:\n%s", code, out)
	}
	r.mustAsk("/y")

	// The plan: against the instance, and between two files.
	other := filepath.Join(r.dir, "other.yaml")
	if err := os.WriteFile(other, []byte(r.text(setup{servers: []string{"s2=1"}, farm: "    pool: {max_idle: 3}\n"})), 0o644); err != nil {
		t.Fatal(err)
	}
	plan := r.mustWeir("check", "--no-plugins", "--config", other, "--diff")
	for _, want := range []string{"- farms[web].servers[s1]", "by draining", "+ farms[web].servers[s2]: 198.51.100.12:80", "at once", "~ farms[web].pool.max_idle: 64 -> 3", "other.yaml:9"} {
		if !strings.Contains(plan, want) {
			t.Errorf("the plan has no %q:\n%s", want, plan)
		}
	}
	code, out, errs := r.weir("check", "--no-plugins", "--config", other, "--from", r.file(), "-o", "json")
	var res control.PlanResult
	if err := json.Unmarshal([]byte(out), &res); code != 0 || err != nil || len(res.Changes) != 4 {
		t.Errorf("between two files: exit code %d, %v:\n%s%s", code, err, out, errs)
	}
	if p := config.Plan(res.Changes); len(p.Of(config.Restart)) != 1 || len(p.Of(config.Drain)) != 1 || len(p.Of(config.Hot)) != 2 {
		t.Errorf("classes: %v", p)
	}
	events := r.mustWeir("events")
	for _, want := range []string{"reloaded", "reload-refused", "needs-restart", "server-added", "SIGHUP", "1 change is in force (SIGHUP)"} {
		if !strings.Contains(events, want) {
			t.Errorf("no event %q:\n%s", want, events)
		}
	}
	r.stop(w)
}

// TestServersAndVIPsComeAndGo: servers and VIPs are added and removed by the
// file under load, and no request to what is there fails.
func TestServersAndVIPsComeAndGo(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 3})
	r.hello()
	second := netip.MustParseAddrPort("203.0.113.20:80")
	if err := r.Router.AddAddr("lo", netip.PrefixFrom(second.Addr(), 32)); err != nil {
		t.Fatal(err)
	}
	both := []netip.AddrPort{r.VIP(), second}
	w := r.startWith(r.text(setup{servers: []string{"s1=0"}}))
	l := r.drive(r.VIP(), 3)
	reload := func(s setup) {
		t.Helper()
		r.rewrite(r.text(s))
		r.mustWeir("reload")
	}
	for round := range 5 {
		reload(setup{servers: []string{"s1=0", "s2=1"}})
		before := l.by("s2")
		until(t, 10*time.Second, "answers of the server that was added", func() bool { return l.by("s2") > before })
		reload(setup{servers: []string{"s2=1", "s3=2"}, vips: both})
		running := l.by("s1") + 6 // one for each client
		l.progress(50)
		if n := l.by("s1"); n > running {
			t.Errorf("round %d: %d answers of a server that was removed", round, n-running)
		}
		// The VIP that came takes clients, and goes.
		l2 := r.drive(second, 1)
		l2.progress(20)
		conn, err := r.Clients[0].Dial(within(t, 5*time.Second), "tcp", second.String())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "GET /idle HTTP/1.1\r\nHost: x\r\n\r\n")
		br := bufio.NewReader(conn)
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		l2.end()
		reload(setup{servers: []string{"s1=0"}})
		// A client between two requests is told that its VIP is gone.
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := br.ReadByte(); err != io.EOF {
			t.Errorf("round %d: a kept connection to a VIP that was removed: %v, want EOF", round, err)
		}
		_ = conn.Close()
	}
	l.progress(50)
	l.end()
	until(t, 15*time.Second, "the end of what drains", func() bool {
		st := r.status()
		return len(st.Farms) == 1 && len(st.Farms[0].Servers) == 1
	})
	// The VIP is out of the ruleset when its last connection is gone, and its
	// address is the router's own again.
	until(t, 15*time.Second, "a ruleset without the VIP", func() bool {
		return !strings.Contains(r.mustWeir("rules", "show"), second.Addr().String())
	})
	if _, err := r.Clients[0].Dial(within(t, 5*time.Second), "tcp", second.String()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the VIP that was removed: %v, want that the router refuses", err)
	}
	r.stop(w)
}

// TestDrainDeadline: an exchange of a removed server may finish within
// timeouts.drain and is cut afterwards.
func TestDrainDeadline(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	release := r.halves()
	w := r.startWith(r.text(setup{servers: []string{"s1=0"}, farm: "    timeouts: {drain: 1500ms}\n"}))
	ends := make(chan error, 2)
	for range 2 {
		h := r.begin(t)
		go func() { ends <- h.rest() }()
	}
	r.rewrite(r.text(setup{servers: []string{"s2=1"}, farm: "    timeouts: {drain: 1500ms}\n"}))
	r.mustWeir("reload")
	release <- struct{}{} // one of them finishes in time
	if err := <-ends; err != nil {
		t.Errorf("an exchange that finished while its server drained: %v", err)
	}
	if err := <-ends; err == nil {
		t.Error("an exchange outlived the deadline of its server")
	}
	until(t, 10*time.Second, "the server forgotten", func() bool { return len(r.status().Farms[0].Servers) == 1 })
	if ev := r.mustWeir("events"); !strings.Contains(ev, "drain-deadline") || !strings.Contains(ev, "server-gone") {
		t.Errorf("events:\n%s", ev)
	}
	r.stop(w)
}

// TestDrainingVIP: a VIP that was removed refuses new connections at once while
// its last exchange still runs, and takes them again if it comes back
// meanwhile.
func TestDrainingVIP(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 1})
	release := r.halves()
	second := netip.AddrPortFrom(r.VIP().Addr(), 8080)
	both := setup{servers: []string{"s1=0"}, vips: []netip.AddrPort{r.VIP(), second}}
	w := r.startWith(r.text(both))
	running := r.begin(t)
	r.rewrite(r.text(setup{servers: both.servers, vips: []netip.AddrPort{second}}))
	r.mustWeir("reload")
	// Its time to drain is a minute: only the engine can refuse.
	if _, err := r.Clients[0].Dial(within(t, 10*time.Second), "tcp", r.VIP().String()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a VIP that drains: %v, want that it refuses", err)
	}
	r.rewrite(r.text(both))
	r.mustWeir("reload")
	r.mustAsk("/back")
	release <- struct{}{}
	if err := running.rest(); err != nil {
		t.Errorf("the exchange that ran meanwhile: %v", err)
	}
	r.stop(w)
}
