// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/policies/snapshot"
)

// policy puts policies into a rig's farm.
func policy(ps ...snapshot.Policy) func(*farm.Spec) {
	return func(s *farm.Spec) { s.Farms[0].Policies = ps }
}

func choosing(name string, s snapshot.Snapshot) snapshot.Policy {
	return snapshot.Policy{Name: name, Snapshot: &s}
}

// swap gives the farm other policies while it runs.
func (g *rig) swap(ps ...snapshot.Policy) {
	g.t.Helper()
	f := g.db.Farms[0]
	sel, err := f.Selector.Load().With(ps)
	if err != nil {
		g.t.Fatal(err)
	}
	if err := f.SetSelector(sel); err != nil {
		g.t.Fatal(err)
	}
}

// TestFieldPolicies: header fields and cookies reach the policies, whatever set
// was in use when the head began.
func TestFieldPolicies(t *testing.T) {
	sticky := func(cookie string) snapshot.Policy {
		return choosing("sticky", snapshot.Snapshot{Affinity: &snapshot.Affinity{
			Key: snapshot.AffinityKey{Field: snapshot.Field{Name: cookie, Cookie: true}}, Table: []snapshot.Pin{{Value: "one", Server: "s1"}, {Value: "two", Server: "s2"}},
		}})
	}
	byTenant := choosing("path", snapshot.Snapshot{Routes: &snapshot.Routes{Routes: []snapshot.Route{
		{Fields: []snapshot.FieldMatch{{Field: snapshot.Field{Name: "X-Tenant"}, Value: "blue"}}, Target: snapshot.Target{Servers: []string{"s2"}}},
		{Target: snapshot.Target{Servers: []string{"s1"}}},
	}}})
	g := newRig(t, policy(byTenant))
	isn := packet.Seq(100)
	to := func(parts ...string) string {
		t.Helper()
		isn += 1000
		client := netip.AddrPortFrom(c1.Addr(), uint16(40000+isn/1000))
		seq, a := g.open(client, isn, isn+500)
		var got []string
		for i, p := range parts {
			if i > 0 {
				g.swap(sticky("sid"))
			}
			got = g.client(client, seg{fl: ack | psh, seq: seq, ack: a, data: p})
			seq = seq.Add(packet.Size(len(p)))
		}
		for _, line := range got {
			if strings.Contains(line, "SYN:") {
				return line[:2]
			}
		}
		return fmt.Sprint(got)
	}
	if got := to("GET / HTTP/1.1\r\nHost: a\r\nx-tenant: blue\r\n\r\n"); got != "S2" {
		t.Errorf("tenant blue goes to %s", got)
	}
	if got := to("GET / HTTP/1.1\r\nHost: a\r\nX-Tenant: red\r\n\r\n"); got != "S1" {
		t.Errorf("tenant red goes to %s", got)
	}
	// The set of fields changes between the two halves of a head.
	for cookie, want := range map[string]string{"one": "S1", "two": "S2"} {
		g.swap(byTenant)
		if got := to("GET / HTTP/1.1\r\nHost: a\r\nX-Tenant: blue\r\nCook", "ie: a=b; sid="+cookie+"\r\n\r\n"); got != want {
			t.Errorf("cookie %s goes to %s", cookie, got)
		}
	}
	if n := g.db.Farms[0].PolicyStats[0].Decided.Load(); n != 2 {
		t.Errorf("%d decisions are counted, want the two by cookie", n)
	}
}

func askPolicy(fallback snapshot.Fallback) snapshot.Policy {
	return snapshot.Policy{Name: "auth", Ask: &snapshot.AskKey{Path: true, Client: true}, Fallback: fallback}
}

// asks lets a client ask and returns the question that comes of it, if any.
func (g *rig) asks(client netip.AddrPort, isn packet.Seq, path string) (q []Question, got []string) {
	g.t.Helper()
	seq, a := g.open(client, isn, isn+500)
	got = g.client(client, seg{fl: ack | psh, seq: seq, ack: a, data: get(path, 60)})
	return append(q, g.out.Questions...), got
}

// answered gives an answer and returns the packets that follow.
func (g *rig) answered(id uint64, a *snapshot.Answer, ttl int64) []string {
	g.t.Helper()
	g.out.Reset()
	g.e.Answer(g.now, id, a, ttl, &g.out)
	return g.collect(nil)
}

func TestAskPlugin(t *testing.T) {
	g := newRig(t, policy(askPolicy(snapshot.FallbackIgnore)))
	st := g.db.Farms[0].PolicyStats[0]
	q, got := g.asks(c1, 100, "/a")
	if len(q) != 1 || len(got) != 0 || q[0].Policy != "auth" || q[0].Attempt != 1 || q[0].Farm.Name != "web" {
		t.Fatalf("%+v, %v", q, got)
	}
	key := snapshot.AskKey{Path: true, Client: true}
	if k, err := key.ParseKey(q[0].Key); err != nil || k.Path != "/a" || k.Client.Addr() != c1.Addr() {
		t.Errorf("%+v, %v", k, err)
	}
	// The same from another connection of the same client joins the question,
	// another path does not.
	again := netip.AddrPortFrom(c1.Addr(), 45000)
	if q, _ := g.asks(again, 3100, "/a"); len(q) != 0 {
		t.Errorf("asked twice: %+v", q)
	}
	other, _ := g.asks(c2, 200, "/b")
	if len(other) != 1 {
		t.Fatalf("%+v", other)
	}
	to2 := &snapshot.Answer{Servers: []snapshot.Score{{Server: "s2"}}}
	if got := strings.Join(g.answered(q[0].ID, to2, second), " "); strings.Count(got, "S2 SYN") != 2 || strings.Contains(got, "S1") {
		t.Errorf("answered: %s", got)
	}
	if got := g.answered(q[0].ID, to2, second); len(got) != 0 {
		t.Errorf("a second answer: %v", got)
	}
	if got := g.answered(77, to2, second); len(got) != 0 {
		t.Errorf("an answer to nothing: %v", got)
	}
	// A refusal keeps the connection of the client.
	if got := strings.Join(g.answered(other[0].ID, &snapshot.Answer{Reject: 403, Ban: 60}, second), " "); !strings.Contains(got, "C2 RESP") || len(g.out.Bans) != 1 || g.out.Bans[0].Seconds != 60 {
		t.Errorf("rejected: %s, bans %v", got, g.out.Bans)
	}
	// The answers are kept as long as they hold.
	third := netip.AddrPortFrom(c1.Addr(), 46000)
	if q, got := g.asks(third, 5100, "/a"); len(q) != 0 || !strings.Contains(strings.Join(got, " "), "S2 SYN") {
		t.Errorf("not kept: %+v %v", q, got)
	}
	g.wait(2 * second)
	fourth := netip.AddrPortFrom(c1.Addr(), 47000)
	if q, _ := g.asks(fourth, 7100, "/a"); len(q) != 1 {
		t.Errorf("kept too long: %+v", q)
	}
	if st.Asked.Load() != 4 || st.Cached.Load() != 1 || st.Late.Load() != 0 {
		t.Errorf("asked %d, cached %d, late %d", st.Asked.Load(), st.Cached.Load(), st.Late.Load())
	}
}

// TestAskFallback: without an answer the farm's fallback holds, at the latest
// when the engine itself gives up.
func TestAskFallback(t *testing.T) {
	for fallback, want := range map[snapshot.Fallback]string{snapshot.FallbackIgnore: "SYN:", snapshot.FallbackReject: "C1 RESP"} {
		g := newRig(t, policy(askPolicy(fallback)))
		q, _ := g.asks(c1, 100, "/a")
		if len(q) != 1 {
			t.Fatalf("%+v", q)
		}
		if got := strings.Join(g.answered(q[0].ID, nil, 0), " "); !strings.Contains(got, want) {
			t.Errorf("fallback %d: %s", fallback, got)
		}
		g.asks(c2, 200, "/a")
		if got := strings.Join(g.wait(3*second), " "); !strings.Contains(got, strings.Replace(want, "C1", "C2", 1)) {
			t.Errorf("fallback %d, never answered: %s", fallback, got)
		}
		if n := g.db.Farms[0].PolicyStats[0].Late.Load(); n != 2 {
			t.Errorf("%d late", n)
		}
	}
}

// TestAskAgain: after a failure the plugin hears which servers were tried, and
// what it answers then is not kept.
func TestAskAgain(t *testing.T) {
	g := newRig(t, policy(askPolicy(snapshot.FallbackIgnore)))
	g.iss = []packet.Seq{1999, 2999}
	q, _ := g.asks(c1, 100, "/a")
	g.answered(q[0].ID, &snapshot.Answer{Servers: []snapshot.Score{{Server: "s1"}}}, second)
	g.server(s1, 10240, seg{fl: rst | ack, seq: 0, ack: 2000})
	if len(g.out.Questions) != 1 || g.out.Questions[0].Attempt != 2 || fmt.Sprint(g.out.Questions[0].Tried) != "[s1]" {
		t.Fatalf("%+v", g.out.Questions)
	}
	if got := strings.Join(g.answered(g.out.Questions[0].ID, &snapshot.Answer{}, second), " "); !strings.Contains(got, "S2 SYN") {
		t.Errorf("%s", got)
	}
}

// TestAskGone: clients that leave, and farms whose servers change, while a
// question is open.
func TestAskGone(t *testing.T) {
	g := newRig(t, policy(askPolicy(snapshot.FallbackReject)))
	q, _ := g.asks(c1, 100, "/a")
	g.client(c1, seg{fl: rst, seq: 101})
	if got := g.answered(q[0].ID, &snapshot.Answer{}, second); len(got) != 0 {
		t.Errorf("an answer for nobody: %v", got)
	}
	q, _ = g.asks(c2, 200, "/b")
	if got := strings.Join(g.answered(q[0].ID, &snapshot.Answer{Servers: []snapshot.Score{{Server: "s9"}}}, second), " "); !strings.Contains(got, "C2 RESP") {
		t.Errorf("an answer that does not fit: %s", got)
	}
	g.client(c2, seg{fl: rst, seq: 261})
	g.idle(0)
}

// TestWaitForBudget: requests that wait for a budget move when time has earned
// it back, and the connection's response is counted when its head is there.
func TestWaitForBudget(t *testing.T) {
	budget := choosing("bandwidth", snapshot.Snapshot{Budgets: &snapshot.Budgets{Servers: []snapshot.Budget{{Server: "s1", Rate: 1000, Burst: 100, AtCap: snapshot.AtCapWait}}}})
	g := newRig(t, oneServer, keepIdle, policy(budget))
	g.iss = []packet.Seq{1999, 2999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/a", 50)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	live := g.db.Farms[0].Servers[0].Live
	head := "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
	g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: head + strings.Repeat("x", 100)})
	if n := live.Spent.Load(); n != 50+1000 {
		t.Errorf("%d bytes are counted when the head is there, want the request and the whole body", n)
	}
	g.server(s1, 10240, seg{fl: ack | psh, seq: 500 + packet.Seq(len(head)) + 100, ack: 2050, data: strings.Repeat("x", 900)})
	if n := live.Spent.Load(); n != 50+1000 {
		t.Errorf("%d bytes are counted at the end", n)
	}
	s2, a2 := g.open(c2, 200, 8000)
	if got := g.client(c2, seg{fl: ack | psh, seq: s2, ack: a2, data: get("/b", 50)}); len(got) != 0 {
		t.Errorf("a request in spite of the debt: %v", got)
	}
	if got := g.wait(900 * millisecond); strings.Contains(strings.Join(got, " "), "SYN") {
		t.Errorf("950 bytes of debt are paid back too early: %v", got)
	}
	if got := strings.Join(g.wait(100*millisecond), " "); !strings.Contains(got, "S1 SYN:2999") {
		t.Errorf("nothing moves: %s", got)
	}
	// The server dies in the middle of a response: what will not come does not
	// count.
	g.server(s1, 10241, seg{fl: syn | ack, seq: 799, ack: 3000, opts: sackPermitted})
	before := live.Spent.Load()
	g.server(s1, 10241, seg{fl: ack | psh, seq: 800, ack: 3050, data: head + strings.Repeat("x", 300)})
	g.server(s1, 10241, seg{fl: rst | ack, seq: 800 + packet.Seq(len(head)) + 300, ack: 3050})
	if n := live.Spent.Load() - before; n != 300 {
		t.Errorf("%d bytes are counted of 300", n)
	}
	if u := g.e.Usage(); u.Waiting != 0 {
		t.Errorf("%+v", u)
	}
}

// TestSilentServer: a server that acknowledges nothing is given up after the
// connect timeout: an idempotent request goes to another one, any other gets
// 504.
func TestSilentServer(t *testing.T) {
	for _, method := range []string{"GET", "POST"} {
		g := newRig(t, keepIdle, figure8)
		g.iss = []packet.Seq{1999, 2999}
		f := g.db.Farms[0]
		f.Servers[1].Live.State.Store(uint32(snapshot.Drain))
		g.swap()
		seq, a := g.open(c1, 100, 9000)
		req := method + " /sales/ HTTP/1.1\r\nHost: a\r\n\r\n"
		g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: req})
		g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
		f.Servers[1].Live.State.Store(uint32(snapshot.Ready))
		if got := strings.Join(g.wait(4900*millisecond), " "); strings.Contains(got, "RST") || strings.Contains(got, "S2") {
			t.Errorf("%s: too early: %s", method, got)
		}
		got := strings.Join(g.wait(200*millisecond), " ")
		want := map[string]string{"GET": "S2 SYN:2999", "POST": "C1 RESP"}[method]
		if !strings.Contains(got, "S1 RST") || !strings.Contains(got, want) {
			t.Errorf("%s: %s", method, got)
		}
		if n := f.Servers[0].Stats.Failed[farm.FailSilent].Load(); n != 1 {
			t.Errorf("%s: %d failures are counted", method, n)
		}
		// The control: one that acknowledges has the response's time.
		g = newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{1999}
		seq, a = g.open(c1, 100, 9000)
		g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: req})
		g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
		g.server(s1, 10240, seg{fl: ack, seq: 500, ack: 2000 + packet.Seq(len(req))})
		if got := strings.Join(g.wait(30*second), " "); strings.Contains(got, "RST") {
			t.Errorf("%s: given up although it acknowledged: %s", method, got)
		}
	}
}

// TestTelemetryCounters: what passing packets tell is counted.
func TestTelemetryCounters(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	// A slow head is not the server's doing.
	req := get("/a", 50)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: req[:20]})
	g.now += 7 * millisecond
	g.client(c1, seg{fl: ack | psh, seq: seq + 20, ack: a, data: req[20:]})
	g.now += 3 * millisecond
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	g.now += 20 * millisecond
	bad := "HTTP/1.1 503 No\r\nContent-Length: 10\r\n\r\n0123456789"
	g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: bad})
	g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: bad})
	f := g.db.Farms[0]
	st := &f.Servers[0].Stats
	if n := (*st).ConnectTime.Sum.Load(); n != uint64(3*millisecond) {
		t.Errorf("connect time %d", n)
	}
	if n := (*st).FirstByte.Sum.Load(); n != uint64(20*millisecond) {
		t.Errorf("time to the first byte %d", n)
	}
	if n := (*st).Latency.Sum.Load(); n != uint64(23*millisecond) {
		t.Errorf("latency %d, want it from the end of the request's head on", n)
	}
	if n := f.Stats.Dispatch.Sum.Load(); n != uint64(3*millisecond) {
		t.Errorf("dispatched after %d", n)
	}
	if (*st).ServerErrors.Load() != 1 || (*st).Retransmitted.Load() != 1 {
		t.Errorf("%d errors, %d retransmissions", (*st).ServerErrors.Load(), (*st).Retransmitted.Load())
	}
	if in, out := (*st).BytesIn.Load(), (*st).BytesOut.Load(); in != 50 || out != uint64(len(bad)) {
		t.Errorf("%d bytes in, %d out", in, out)
	}
	if f.Stats.ClientRoundTrip.Sum.Load() > uint64(second) {
		t.Errorf("client round trip %d", f.Stats.ClientRoundTrip.Sum.Load())
	}
}

// TestAvoidedServer: connections to a server that no policy lets requests go to
// are not kept.
func TestAvoidedServer(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/a", 50)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: resp(100)})
	g.db.Farms[0].Servers[0].Live.AvoidUntil.Store(g.now + second)
	if got := strings.Join(g.client(c1, seg{fl: ack, seq: seq + 50, ack: a + 100}), " "); !strings.Contains(got, "S1 FIN") {
		t.Errorf("the connection is kept: %s", got)
	}
}
