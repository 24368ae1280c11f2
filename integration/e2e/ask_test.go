// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/built"
	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module/control"
)

// asking is an instance with a farm whose plugin is asked about each request,
// and with another farm on the same servers.
type asking struct {
	*rig
	w      *lab.Weir
	client *http.Client
	plugin string // its executable
	vip    string
	other  string // the VIP of the other farm
	six    bool   // the farm is there over IPv6 too
}

// newAsking starts it. The plugin takes delay for an answer, below 0 for ever.
func newAsking(t *testing.T, delay, deadline string) *asking {
	t.Helper()
	return newAskingOver(t, delay, deadline, false)
}

// newAskingOver has a farm over IPv6 too, if wanted.
func newAskingOver(t *testing.T, delay, deadline string, six bool) *asking {
	t.Helper()
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, NoIPv6: !six})
	r.farmhands(100)
	a := &asking{rig: r, plugin: oddPlugin(t), vip: r.VIP().String(), other: "203.0.113.11:80", six: six}
	if err := r.Router.AddAddr("lo", netip.MustParsePrefix("203.0.113.11/32")); err != nil {
		t.Fatal(err)
	}
	o := r.options(lab.ConfigOptions{})
	o.Config = a.config(delay, deadline, "ignore")
	w, err := lab.StartWeir(within(t, 20*time.Second), r.Router, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(w.Log())
		}
	})
	a.w, a.client = w, r.Clients[0].HTTPClient(lab.HTTPClientOptions{Timeout: time.Minute})
	return a
}

func (a *asking) config(delay, deadline, fallback string) string {
	text := a.Config(lab.ConfigOptions{
		Dir: a.run, IPv6: a.six,
		Policies: fmt.Sprintf("[{use: odd, fallback: %s, config: {delay: %s}}]", fallback, delay),
		Plugins:  fmt.Sprintf("[{name: odd, command: [%q, ask], ask: {deadline: %s}}]", a.plugin, deadline),
	})
	return strings.Replace(text, "plugins:", fmt.Sprintf(`  - name: plain
    listen: %s
    servers:
      - {name: s1, address: "%s"}
      - {name: s2, address: "%s"}
plugins:`, a.other, a.Server(0), a.Server(1)), 1)
}

func (a *asking) reload(delay, deadline, fallback string) {
	a.t.Helper()
	if err := os.WriteFile(filepath.Join(a.dir, "weir.yaml"), []byte(a.config(delay, deadline, fallback)), 0o644); err != nil {
		a.t.Fatal(err)
	}
	if out, err := exec.Command(a.bin, "reload", "--socket", filepath.Join(a.rig.run, "admin.sock")).CombinedOutput(); err != nil {
		a.t.Fatalf("reload: %v\n%s", err, out)
	}
}

func (a *asking) get(vip, path string) (status int, server string, took time.Duration) {
	a.t.Helper()
	began := time.Now()
	resp, err := a.client.Get("http://" + vip + path)
	if err != nil {
		a.t.Fatal(err)
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, resp.Header.Get("X-Server"), time.Since(began)
}

// counts is what came of the policy at the farm that asks.
func (a *asking) counts() control.PluginFarm {
	a.t.Helper()
	return a.pluginsOf(a.w)["odd"].Farms[0]
}

// TestAskPlugins: with a deadline of 5 ms and a plugin that takes 1 ms, 10 ms
// or for ever, a request gets the plugin's answer or the farm's fallback, and
// every fallback is counted. How long that takes is for soak.
func TestAskPlugins(t *testing.T) {
	measure := os.Getenv("WEIR_SOAK") != ""
	a := newAsking(t, "1ms", "5ms")
	for i := range 5 {
		a.get(a.vip, fmt.Sprintf("/warm/%d", i))
	}
	if status, _, _ := a.get(a.vip, "/forbidden/x"); status != 403 && a.counts().Late == 0 {
		t.Errorf("the plugin's refusal: %d", status)
	}
	for _, c := range []struct {
		delay, fallback string
		most            time.Duration // half of the requests, with soak
	}{
		{"1ms", "ignore", 5 * time.Millisecond}, {"1ms", "reject", 5 * time.Millisecond},
		{"10ms", "ignore", 15 * time.Millisecond}, {"10ms", "reject", 15 * time.Millisecond},
		{"-1s", "ignore", 15 * time.Millisecond}, {"-1s", "reject", 15 * time.Millisecond},
	} {
		a.reload(c.delay, "5ms", c.fallback)
		before := a.counts()
		const requests = 40
		var times, plain []time.Duration
		byPlugin, refused := 0, 0
		for i := range requests {
			status, server, took := a.get(a.vip, fmt.Sprintf("/%s%s%d", c.delay, c.fallback, i))
			switch {
			case status == 503 && c.fallback == "reject":
				refused++
			case status != 200:
				t.Fatalf("%s, %s: status %d", c.delay, c.fallback, status)
			case server == "s2": // as the plugin says, or by chance
				byPlugin++
			}
			times = append(times, took)
			status, _, took = a.get(a.other, "/")
			if status != 200 {
				t.Fatalf("the other farm: status %d", status)
			}
			plain = append(plain, took)
		}
		slices.Sort(times)
		slices.Sort(plain)
		now := a.counts()
		late := int(now.Late - before.Late)
		if n := int(now.Asked - before.Asked); n != requests {
			t.Errorf("%s, %s: %d questions about %d requests", c.delay, c.fallback, n, requests)
		}
		// Others share the processors: 1 ms may become 10, and 10 ms may be
		// over before anybody looks at the clock.
		switch {
		case byPlugin < requests-late-refused && c.fallback == "ignore", c.fallback == "reject" && (refused != late || byPlugin != requests-late):
			t.Errorf("%s, %s: %d requests went where the plugin says, %d were refused, %d answers were late", c.delay, c.fallback, byPlugin, refused, late)
		case c.delay == "-1s" && late != requests:
			t.Errorf("%s, %s: %d of %d questions got no answer", c.delay, c.fallback, late, requests)
		case c.delay == "10ms" && late == 0:
			t.Errorf("%s, %s: no answer came too late", c.delay, c.fallback)
		}
		if half := times[requests/2]; measure && half > c.most {
			t.Errorf("%s, %s: half of the requests take longer than %s", c.delay, c.fallback, half)
		}
		if half := plain[requests/2]; measure && half > 5*time.Millisecond {
			t.Errorf("%s, %s: half of the other farm's requests take longer than %s", c.delay, c.fallback, half)
		}
		t.Logf("%s, %s: %d late; median %s, of the other farm %s", c.delay, c.fallback, late, times[requests/2].Round(10*time.Microsecond), plain[requests/2].Round(10*time.Microsecond))
	}
	d := a.pluginsOf(a.w)["odd"].Decisions
	if d.Late == 0 || d.Refused == 0 {
		t.Errorf("neither late answers nor a rest: %+v", d)
	}
	a.stop(a.w)
}

// TestAskIsolated: while requests of one farm wait for a plugin that hangs,
// those of another farm are answered.
func TestAskIsolated(t *testing.T) {
	a := newAsking(t, "-1s", "1s")
	waiting := make(chan int, 8)
	begun := a.counts().Asked
	for i := range cap(waiting) {
		go func() {
			resp, err := a.client.Get(fmt.Sprintf("http://%s/%d", a.vip, i))
			if err != nil {
				waiting <- 0
				return
			}
			resp.Body.Close()
			waiting <- resp.StatusCode
		}()
	}
	until(t, 20*time.Second, "questions that are open", func() bool { return a.counts().Asked-begun >= uint64(cap(waiting)) })
	open := len(waiting)
	for range 100 {
		if status, _, _ := a.get(a.other, "/"); status != 200 {
			t.Fatalf("the other farm: status %d", status)
		}
	}
	// On a machine that took longer for that than the deadline it shows
	// nothing, and nothing is wrong.
	if n := len(waiting); n == cap(waiting) {
		t.Logf("%d of %d answers came before the other farm's requests were over", n-open, cap(waiting))
	}
	for range cap(waiting) {
		if status := <-waiting; status != 200 {
			t.Errorf("a request whose question got no answer: status %d", status)
		}
	}
	if n := a.counts().Late; n < uint64(cap(waiting)) {
		t.Errorf("%d late answers are counted", n)
	}
	a.stop(a.w)
}

// TestAskConcurrency: as many questions are open at a plugin as may be, and as
// many again come. These get the farm's fallback, counted, and told as an event;
// a response that runs is not touched, the other farm is served, and when the
// plugin has answered, newcomers are asked about again.
func TestAskConcurrency(t *testing.T) {
	const limit, size = 4, 4 << 20
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, NoIPv6: true})
	r.farmhands(size)
	gate := filepath.Join(t.TempDir(), "gate")
	for d := filepath.Dir(gate); d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil { // the plugin's user is nobody
			t.Fatal(err)
		}
	}
	turn := func(open bool) {
		t.Helper()
		err := os.Remove(gate)
		if open {
			err = os.WriteFile(gate, nil, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	turn(true)
	w := r.start(lab.ConfigOptions{
		Policies: "[{use: odd, fallback: reject, config: {delay: -1s}}]",
		Plugins:  fmt.Sprintf("[{name: odd, command: [%q, ask, %q], ask: {deadline: 1m, concurrency: %d}}]", oddPlugin(t), gate, limit),
	})
	decisions := func() control.PluginDecisions { return r.pluginsOf(w)["odd"].Decisions }
	client := r.Clients[0].HTTPClient(lab.HTTPClientOptions{Timeout: time.Minute})
	get := func(path string) (int, int64) {
		resp, err := client.Get("http://" + r.VIP().String() + path)
		if err != nil {
			return 0, 0
		}
		defer resp.Body.Close()
		n, _ := io.Copy(io.Discard, resp.Body)
		return resp.StatusCode, n
	}
	// On a busy machine an answer may take more than the two seconds that a
	// request waits at most: it is asked again.
	var running *http.Response
	until(t, 30*time.Second, "a response that runs", func() bool {
		resp, err := client.Get("http://" + r.VIP().String() + "/established")
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != http.StatusOK {
			resp.Body.Close()
			return false
		}
		running = resp
		return true
	})
	defer running.Body.Close()

	turn(false)
	all := make(chan int, 2*limit)
	for i := range cap(all) {
		go func() {
			status, _ := get(fmt.Sprintf("/%d", i))
			all <- status
		}()
	}
	until(t, 20*time.Second, "those that find it busy", func() bool { return decisions().Busy >= limit })
	if d := decisions(); d.Busy != limit || d.Late+d.Failed+d.Refused != 0 {
		t.Errorf("at twice the limit: %+v, want %d that found it busy", d, limit)
	}
	if n, err := io.Copy(io.Discard, running.Body); n != size || err != nil {
		t.Errorf("who was established got %d of %d bytes: %v", n, size, err)
	}
	until(t, 10*time.Second, "the event of the limit", func() bool { return strings.Contains(r.mustWeir("events"), "ask-busy") })

	turn(true)
	asked, refused := 0, 0
	for range cap(all) {
		switch status := <-all; status {
		case http.StatusOK:
			asked++
		case http.StatusServiceUnavailable:
			refused++
		default:
			t.Errorf("status %d", status)
		}
	}
	// Who waits for the plugin longer than two seconds gets the fallback, too.
	if t.Logf("%d served, %d refused", asked, refused); refused < limit {
		t.Errorf("%d got the fallback, want %d", refused, limit)
	}
	before := decisions()
	until(t, 30*time.Second, "a newcomer to be served", func() bool {
		status, n := get("/again")
		return status == http.StatusOK && n == size
	})
	if d := decisions(); d.Answered <= before.Answered || d.Busy != limit {
		t.Errorf("afterwards %+v, before %+v: the plugin was not asked", d, before)
	}
	client.CloseIdleConnections()
	r.stop(w)
}

// TestVerdictsInKernel: what an answer says about packets is done by the
// kernel. A mark is on the connection's packets, so that tc puts them into a
// class; a banned client is in a set of nftables, for its time.
func TestVerdictsInKernel(t *testing.T) {
	nft, tc := require.Tool(t, "nft"), require.Tool(t, "tc")
	a := newAskingOver(t, "0s", "1s", true)
	for i, h := range a.Servers {
		if _, err := lab.HTTPServer(h, a.Server6(i).String(), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Server", h.Name())
		})); err != nil {
			t.Fatal(err)
		}
	}
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := a.Router.Run(within(t, 10*time.Second), name, args...)
		if err != nil {
			if strings.Contains(string(out)+err.Error(), "qdisc kind is unknown") {
				require.Missing(t, "htb", "a kernel with sch_htb")
			}
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	for _, s := range []string{
		"qdisc replace dev LEG root handle 1: htb default 1", "class replace dev LEG parent 1: classid 1:1 htb rate 10gbit quantum 60000",
		"class replace dev LEG parent 1: classid 1:20 htb rate 100mbit", "class replace dev LEG parent 1: classid 1:30 htb rate 100mbit",
	} {
		run(tc, strings.Fields(strings.ReplaceAll(s, "LEG", a.ClientLeg))...)
	}
	run(nft, `add table inet look; add chain inet look c { type filter hook postrouting priority 0; };
add rule inet look c oifname `+a.ClientLeg+` meta nfproto ipv4 meta mark and 0xff0000ff == 0x57000010 meta priority set 1:20
add rule inet look c oifname `+a.ClientLeg+` meta nfproto ipv6 meta mark and 0xff0000ff == 0x57000010 meta priority set 1:30`)
	sent := func(class string) int {
		t.Helper()
		m := regexp.MustCompile(`class htb ` + class + ` .*\n\s*Sent (\d+) bytes`).FindStringSubmatch(run(tc, "-s", "class", "show", "dev", a.ClientLeg))
		if m == nil {
			t.Fatal("tc does not show the class")
		}
		n, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	families := []struct{ vip, client, set, class string }{
		{a.vip, a.ClientAddr(0).String(), "bans4", "1:20"},
		{a.VIP6().String(), a.ClientAddr6(0).String(), "bans6", "1:30"},
	}
	for _, f := range families {
		if status, server, _ := a.get(f.vip, "/plain"); status != 200 || server != "s2" {
			t.Errorf("%s: status %d of %s", f.vip, status, server)
		}
		if n := sent(f.class); n != 0 {
			t.Errorf("%s: %d bytes are in the class before anything has its mark", f.vip, n)
		}
		until(t, 20*time.Second, "packets in the class of the plugin's mark, of "+f.vip, func() bool {
			a.get(f.vip, "/marked/x")
			return sent(f.class) > 0
		})
	}
	a.client.CloseIdleConnections()
	for _, f := range families {
		asked := time.Now()
		until(t, 20*time.Second, "the ban", func() bool {
			asked = time.Now()
			status, _, _ := a.get(f.vip, "/banned/x")
			return status == 403
		})
		listed := false
		until(t, 20*time.Second, "the client in the kernel's set", func() bool {
			listed = strings.Contains(run(nft, "list", "set", "inet", "weir", f.set), f.client+" timeout "+oddBan.String())
			return listed || time.Since(asked) > oddBan
		})
		dial := func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
			defer cancel()
			c, err := a.Clients[0].Dial(ctx, "tcp", f.vip)
			if err == nil {
				c.Close()
			}
			return err == nil
		}
		if dial() && time.Since(asked) < oddBan {
			t.Errorf("a banned client is let in by %s", f.vip)
		}
		until(t, 20*time.Second, "the end of the ban", dial)
		if !listed {
			t.Errorf("the client was never in the kernel's set %s", f.set)
		}
	}
	if out := run(nft, "list", "counter", "inet", "weir", "banned"); strings.Contains(out, "packets 0 ") {
		t.Errorf("the kernel dropped nothing:\n%s", out)
	}
	a.client.CloseIdleConnections()
	a.stop(a.w)
}

// oddBan is for how long testdata/oddplugin bans.
const oddBan = 3 * time.Second

// TestShaping: the example of docs/plugins.md bounds what Weir sends to clients,
// by the mark that its packets carry.
func TestShaping(t *testing.T) {
	require.Tool(t, "tc")
	require.Tool(t, "nft")
	text, err := os.ReadFile("../../docs/plugins.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(text), "<!-- shaping -->\n```sh\n")
	commands, _, _ := strings.Cut(after, "```")
	if !ok || !strings.Contains(commands, "20mbit") {
		t.Fatal("docs/plugins.md has no example of shaping")
	}
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 1, NoIPv6: true})
	r.farmhands(256 << 10)
	w := r.start(lab.ConfigOptions{})
	passed := func(d time.Duration) float64 {
		t.Helper()
		tr := r.keepAsking(4, r.VIP().String(), "/")
		time.Sleep(d) // what passes in this time is measured
		n := float64(tr.bytes[0].Load())
		tr.end(t)
		return n * 8 / d.Seconds()
	}
	if rate := passed(time.Second); rate < 40e6 {
		t.Skipf("skipped: needs a machine that passes more than %.0f Mbit/s without shaping", rate/1e6)
	}
	script := "set -e\nPATH=$PATH:/usr/sbin:/sbin\n" + strings.ReplaceAll(commands, "wan0", r.ClientLeg)
	if out, err := r.Router.Run(within(t, 10*time.Second), "sh", "-c", script); err != nil {
		if strings.Contains(err.Error(), "qdisc kind is unknown") {
			require.Missing(t, "htb", "a kernel with sch_htb")
		}
		t.Fatalf("%v\n%s", err, out)
	}
	if rate := passed(4 * time.Second); rate > 22e6 || rate < 1e6 {
		t.Errorf("%.1f Mbit/s pass, the class has 20", rate/1e6)
	}
	r.stop(w)
}

// TestPluginsRun: a plugin is driven by hand, without privileges and without an
// instance.
func TestPluginsRun(t *testing.T) {
	bin := built.Weir(t)
	run := func(args ...string) (int, string) {
		t.Helper()
		cmd := exec.CommandContext(within(t, 20*time.Second), bin, append([]string{"plugins", "run"}, args...)...)
		out, err := cmd.CombinedOutput()
		if err != nil && cmd.ProcessState == nil {
			t.Fatal(err)
		}
		return cmd.ProcessState.ExitCode(), string(out)
	}
	path := filepath.Join(filepath.Dir(bin), "plugins", "path")
	code, out := run(path, "--config", "{default: [s2]}", "--ticks", "1")
	if code != 0 || !strings.Contains(out, "the configuration is accepted") || !strings.Contains(out, `"s2"`) {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	if code, out := run(path, "--config", "{default: [s9]}", "--ticks", "1"); code == 0 || !strings.Contains(out, "config.default[0]") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	code, out = run(oddPlugin(t), "ask", "--config", "{}", "--ticks", "1", "--ask", "GET /forbidden/x")
	if code != 0 || !strings.Contains(out, "Reject:403") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
}

// TestFirstSnapshot: a farm takes no connections before each of its policies has
// spoken, or the start timeout of the one that does not is over.
func TestFirstSnapshot(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 1, NoIPv6: true})
	r.farmhands(10)
	// The plugin comes up when this file says so; until then it is started again
	// and again.
	mode := filepath.Join(t.TempDir(), "mode")
	for d := filepath.Dir(mode); d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	turn := func(to string) {
		t.Helper()
		if err := os.WriteFile(mode, []byte(to), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	dial := func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		c, err := r.Clients[0].Dial(ctx, "tcp", r.VIP().String())
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	options := func(timeout string) lab.ConfigOptions {
		return lab.ConfigOptions{
			Policies: "[late]",
			Plugins:  fmt.Sprintf("[{name: late, command: [%q, %q], start_timeout: %s, restart: {min: 50ms, max: 50ms, limit: 0}}]", oddPlugin(t), mode, timeout),
		}
	}
	// Without its policies it serves, but is not well: status says so.
	begin := func(timeout string) *lab.Weir {
		t.Helper()
		w, err := lab.NewWeir(r.Router, r.options(options(timeout)))
		if err != nil {
			t.Fatal(err)
		}
		until(t, 20*time.Second, "an instance that serves", func() bool { return strings.Contains(w.Log(), "msg=serving") })
		return w
	}
	turn("exit")
	w := begin("5m")
	for range 3 {
		if dial() {
			t.Fatal("a connection before the policy has spoken")
		}
	}
	turn("well")
	until(t, 20*time.Second, "a connection after the first snapshot", dial)
	r.stop(w)

	turn("exit")
	w = begin("1s")
	until(t, 20*time.Second, "a connection after the start timeout", dial)
	// What it writes comes by a pipe, maybe later than the connection.
	until(t, 20*time.Second, "the warning that a policy is missing", func() bool {
		return strings.Contains(w.Log(), "the farm takes connections without it")
	})
	r.stop(w)
}

// TestExplainOffline: the files alone are enough to say how a request would be
// decided, without privileges and without an instance.
func TestExplainOffline(t *testing.T) {
	built.Weir(t)
	file := filepath.Join(t.TempDir(), "weir.yaml")
	err := os.WriteFile(file, []byte(`source: {addresses: [198.51.100.1]}
farms:
  - name: web
    listen: 203.0.113.10:80
    servers: [{name: s1, address: "198.51.100.11:80"}, {name: s2, address: "198.51.100.12:80"}]
    policies:
      - use: path
        config:
          routes: [{prefix: /sales/, servers: [s1]}, {prefix: /, headers: {X-Tenant: blue}, servers: [s2]}, {prefix: /private/, reject: 403}]
          affinity: {client: {ipv4: 24}, table: {198.18.7.0: s2}}
`), 0o644)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args string
		want []string
	}{
		{"GET http://203.0.113.10/sales/x", []string{"route /sales/: servers s1", "server s1"}},
		{"-H X-Tenant:blue GET http://203.0.113.10/x", []string{"x-tenant=blue", "server s2"}},
		{"GET http://203.0.113.10/private/x", []string{"403"}},
		{"GET http://203.0.113.10/x", []string{"404"}},
		{"--client 198.18.7.9 -H X-Tenant:blue GET http://203.0.113.10/x", []string{"affinity", "server s2"}},
	} {
		code, out := runWeir(t, append([]string{"policy", "explain", "--config", file}, strings.Fields(c.args)...)...)
		if code != 0 {
			t.Errorf("%s: exit code %d:\n%s", c.args, code, out)
		}
		for _, w := range c.want {
			if !strings.Contains(out, w) {
				t.Errorf("%s: no %q in\n%s", c.args, w, out)
			}
		}
	}
}
