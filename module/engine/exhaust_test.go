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

// What TestEveryLimit does for tables, ports and pools, for everything else of
// an engine that has an end.

// established opens a connection whose response runs; the function that it
// returns lets the response go on and fails the test if a byte is missing.
// With a plugin that is asked, answered gives its answer.
func established(g *rig, answered ...func() []sent) (goOn func()) {
	g.t.Helper()
	g.iss = append([]packet.Seq{4_100_000_000}, g.iss...)
	a := g.dial(c2, 4_200_000_000)
	a.ask(get("/established", 80), 4_000_000_000)
	for _, f := range answered {
		a.note(f(), 4_000_000_000)
	}
	want := marked(90_000, "E")
	n := 0
	goOn = func() {
		g.t.Helper()
		more := min(len(want)-n, 1000)
		a.note(g.play(g.raw(a.srv, ep2(a.port), seg{fl: ack | psh, seq: a.sseq, ack: a.sack, data: want[n : n+more]})), 0)
		a.sseq += packet.Seq(more)
		n += more
		a.note(g.play(g.raw(a.cli, vip, seg{fl: ack, seq: a.cseq, ack: a.cack})), 0)
		if string(a.fromServer) != want[:n] {
			g.t.Fatalf("who was established has %d of %d bytes", len(a.fromServer), n)
		}
	}
	goOn()
	return goOn
}

// newcomer fails the test if a client that comes within a second is not served.
func newcomer(g *rig) {
	g.t.Helper()
	g.wait(second - millisecond)
	g.hs.Cookies = g.cookies
	g.iss = []packet.Seq{4_150_000_000}
	p := g.dial(netip.AddrPortFrom(c1.Addr(), 61_000), 4_250_000_000)
	p.ask(get("/newcomer", 60), 4_260_000_000)
	if string(p.fromClient) != get("/newcomer", 60) {
		g.t.Fatalf("a newcomer's server gets %q: %s", p.fromClient, g.counts())
	}
	want := marked(2000, "N")
	if p.answer(want); string(p.fromServer) != want {
		g.t.Errorf("a newcomer gets %d of %d bytes", len(p.fromServer), len(want))
	}
}

// TestQuestionLimit: as many requests wait for a plugin as may, and as many
// again. These get the farm's fallback at once; when the answers come, the next
// ones are asked about again.
func TestQuestionLimit(t *testing.T) {
	g := newRig(t, oneServer, policy(snapshot.Policy{Name: "auth", Ask: &snapshot.AskKey{Path: true}, Fallback: snapshot.FallbackReject}),
		small(func(p *farm.PoolLimits) { p.MaxConnections = 0 }))
	g.shrink(3*maxQuestions, 3*maxQuestions, 3*maxQuestions)
	to := &snapshot.Answer{Servers: []snapshot.Score{{Server: "s1"}}}
	goOn := established(g, func() []sent {
		g.out.Reset()
		g.e.Answer(g.now, 1, to, 0, &g.out)
		return g.gather(nil)
	})
	var questions []uint64
	refused := 0
	for i := range 2 * maxQuestions {
		p := g.dial(user(i), packet.Seq(5000*(i+1)))
		for _, s := range g.play(g.raw(p.cli, vip, seg{fl: ack | psh, seq: p.cseq, ack: p.cack, data: get(fmt.Sprintf("/%d", i), 60)})) {
			if strings.HasPrefix(string(s.data), "HTTP/1.1 503 ") {
				refused++
			}
		}
		for _, q := range g.out.Questions {
			questions = append(questions, q.ID)
		}
		if i == maxQuestions-1 && (refused != 0 || len(questions) != maxQuestions) {
			t.Fatalf("at the limit: %d questions, %d refused", len(questions), refused)
		}
	}
	if len(questions) != maxQuestions || refused != maxQuestions || g.e.Count.Get(ReasonAskFull) != maxQuestions {
		t.Errorf("%d questions, %d refused by 503, %d counted, want %d of each", len(questions), refused, g.e.Count.Get(ReasonAskFull), maxQuestions)
	}
	goOn()
	for _, id := range questions {
		g.answered(id, to, second)
	}
	if q, _ := g.asks(c1, 77, "/again"); len(q) != 1 {
		t.Errorf("after the answers a newcomer is not asked about: %s", g.counts())
	}
	goOn()
}

// TestQuestionBusy: a plugin that has as many questions open as it may gives no
// answer. The request gets the farm's fallback at once, and it is counted; the
// next one is asked about as before. The control: an answer that is only missing
// is counted as late, not as busy.
func TestQuestionBusy(t *testing.T) {
	g := newRig(t, oneServer, policy(snapshot.Policy{Name: "auth", Ask: &snapshot.AskKey{Path: true}, Fallback: snapshot.FallbackReject}))
	refused := func(isn packet.Seq, path string, end func(id uint64)) bool {
		who := user(int(isn))
		q, _ := g.asks(who, isn, path)
		if len(q) != 1 {
			t.Fatalf("%s: %d questions", path, len(q))
		}
		g.out.Reset()
		end(q[0].ID)
		for _, s := range g.gather(nil) {
			if s.dst == who && strings.HasPrefix(string(s.data), "HTTP/1.1 503 ") {
				return true
			}
		}
		return false
	}
	busy := func(id uint64) { g.e.Busy(g.now, id, &g.out) }
	if !refused(500, "/busy", busy) || g.e.Count.Get(ReasonAskBusy) != 1 {
		t.Errorf("busy: no fallback, or not counted: %s", g.counts())
	}
	if !refused(600, "/late", func(id uint64) { g.e.Answer(g.now, id, nil, 0, &g.out) }) || g.e.Count.Get(ReasonAskBusy) != 1 {
		t.Errorf("without an answer: %s", g.counts())
	}
	// Of a question that is not open any more nothing is counted.
	g.out.Reset()
	if busy(1); g.out.Len() != 0 || g.e.Count.Get(ReasonAskBusy) != 1 {
		t.Errorf("of an old question: %s", g.counts())
	}
}

// TestEmbryoLimit: twice as many clients as are remembered complete their
// handshake and say nothing. While their cookies live all of them can ask; later
// those that were evicted are reset, and the youngest can still ask.
func TestEmbryoLimit(t *testing.T) {
	const room = 1024 // of the ring, for the rig's table
	for _, wait := range []int64{second, cookieAtMost + 4*second} {
		g := newRig(t, oneServer, keepIdle, small(func(p *farm.PoolLimits) { p.MaxConnections, p.MaxConnecting = 0, 0 }))
		g.shrink(3*room, 3*room, 3*room)
		goOn := established(g)
		g.hs.Cookies = &MACCookies{k0: 1, k1: 2}
		var all []*pair
		for i := range 2 * room {
			isn := packet.Seq(5000 * (i + 1))
			g.out.Reset()
			opts := packet.AppendSYNOptions(nil, packet.SYNOptions{MSS: 1460, WindowScale: 7, SACKPermitted: true})
			g.hs.SYN(g.now, g.raw(user(i), vip, seg{fl: syn, seq: isn, opts: opts}), packet.ChecksumUnknown, &g.out)
			got := g.gather(nil)
			if len(got) != 1 {
				t.Fatalf("a SYN gives %+v", got)
			}
			p := &pair{g: g, cli: user(i), isn: isn, cseq: isn + 1, cack: got[0].seq + 1}
			g.play(g.raw(p.cli, vip, seg{fl: ack, seq: p.cseq, ack: p.cack}))
			all = append(all, p)
			if n := g.e.Count.Get(ReasonEmbryosFull); (n > 0) != (i >= room) {
				t.Fatalf("after %d handshakes %d are evicted", i+1, n)
			}
		}
		if u := g.e.Usage(); u.Embryos != room || u.Clients != 1 {
			t.Errorf("%+v", u)
		}
		g.wait(wait)
		goOn()
		served, reset := 0, 0
		for i, p := range all {
			g.iss = []packet.Seq{packet.Seq(1_000_000 * (i + 1))}
			for _, s := range g.play(g.raw(p.cli, vip, seg{fl: ack | psh, seq: p.cseq, ack: p.cack, data: get("/", 60)})) {
				switch {
				case s.fl.Has(rst) && s.dst == p.cli:
					reset++
				case s.fl.Has(syn) && s.seq == packet.Seq(1_000_000*(i+1)):
					served++
				}
			}
			// Resets are limited to so many a second.
			g.now += 2 * millisecond
		}
		want := 2 * room
		if wait > cookieAtMost {
			want = room
		}
		if served != want || reset != 2*room-want {
			t.Errorf("after %d s: %d served, %d reset, want %d served: %s", wait/second, served, reset, want, g.counts())
		}
		goOn()
		newcomer(g)
	}
}

// TestTombstoneLimit: twice as many connections end as are remembered. The
// established one goes on, newcomers are served, and it is counted.
func TestTombstoneLimit(t *testing.T) {
	const room = 2000 // for the rig's table
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	goOn := established(g)
	for i := range 2*room + 10 {
		p := g.dial(user(i), packet.Seq(5000*(i+1)))
		all := g.play(g.raw(p.cli, vip, seg{fl: ack | psh, seq: p.cseq, ack: p.cack, data: "nonsense\r\n\r\n"}))
		if len(all) == 0 || !strings.HasPrefix(string(all[0].data), "HTTP/1.1 400 ") {
			t.Fatalf("newcomer %d gets %+v", i, all)
		}
		g.play(g.raw(p.cli, vip, seg{fl: rst | ack, seq: p.cseq + 12, ack: p.cack}))
		if n := g.e.Count.Get(ReasonTombsFull); (n > 0) != (i >= room) {
			t.Fatalf("after %d connections %d tombstones were evicted: %+v", i+1, n, g.e.Usage())
		}
	}
	goOn()
	if u := g.e.Usage(); u.Tombs != room || u.Clients != 1 {
		t.Errorf("%+v", u)
	}
	newcomer(g)
}

// TestKeptLimit: clients whose first segment is lost send what comes behind it,
// twice as much of it as is kept. What is not kept is as if lost; the
// established one goes on, and when the first segments come, every request is
// answered, after a repetition at the latest.
func TestKeptLimit(t *testing.T) {
	const size, pieces = 1400, 40
	clients := 2 * maxKeptTotal / (size * pieces)
	g := newRig(t, oneServer, keepIdle, small(func(p *farm.PoolLimits) { p.MaxConnections, p.MaxConnecting = 0, 0 }))
	g.shrink(2*clients, 2*clients, 2*clients)
	goOn := established(g)
	head := "GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("P: "+strings.Repeat("p", 1000)+"\r\n", 50) + "Q: "
	head += strings.Repeat("q", size*pieces-len(head)-4) + "\r\n\r\n"
	var all []*pair
	full := -1
	for i := range clients {
		p := g.dial(user(i), packet.Seq(70_000*(i+1)))
		g.play(g.raw(p.cli, vip, seg{fl: ack, seq: p.cseq, ack: p.cack, data: head[:1]}))
		for k := 1; k < pieces; k++ {
			g.play(g.raw(p.cli, vip, seg{fl: ack, seq: p.cseq + packet.Seq(k*size), ack: p.cack, data: head[k*size : (k+1)*size]}))
		}
		if full < 0 && g.e.Count.Get(ReasonKeptFull) > 0 {
			full = i
		}
		all = append(all, p)
	}
	if full < clients/3 || g.e.kepts.bytes > maxKeptTotal {
		t.Errorf("full after %d of %d clients, %d bytes kept", full, clients, g.e.kepts.bytes)
	}
	goOn()
	for i, p := range all {
		g.iss = []packet.Seq{packet.Seq(1_000_000 * (i + 1))}
		for k := range pieces {
			p.note(g.play(g.raw(p.cli, vip, seg{fl: ack, seq: p.cseq + packet.Seq(k*size), ack: p.cack, data: head[k*size : (k+1)*size]})), packet.Seq(9000*(i+1)))
			if len(p.fromClient) == len(head) {
				break
			}
		}
		if string(p.fromClient) != head {
			t.Fatalf("client %d: its server got %d of %d bytes", i, len(p.fromClient), len(head))
		}
	}
	goOn()
	if u := g.e.Usage(); u.Kept != 0 {
		t.Errorf("%+v", u)
	}
	// Now there is room again: what comes behind a gap is kept, and need not be
	// sent twice.
	g.iss = []packet.Seq{4_050_000_000}
	p := g.dial(user(clients+1), 4_100_000_000)
	p.note(g.play(g.raw(p.cli, vip, seg{fl: ack, seq: p.cseq, ack: p.cack, data: head[:1]})), 3_000_000_000)
	for k := pieces - 1; k >= 0; k-- {
		p.note(g.play(g.raw(p.cli, vip, seg{fl: ack, seq: p.cseq + packet.Seq(k*size), ack: p.cack, data: head[k*size : (k+1)*size]})), 3_000_000_000)
	}
	if string(p.fromClient) != head {
		t.Errorf("afterwards: the server got %d of %d bytes, %s", len(p.fromClient), len(head), g.counts())
	}
}

// TestHeldLimit: clients send heads that do not end, as much as may be held of
// all and twice that. What is beyond waits in the client, whose window says so;
// the established one and small requests are served; when the others are gone,
// a large head is taken again.
func TestHeldLimit(t *testing.T) {
	const limit, size = 1 << 20, 30 << 10
	clients := 2 * limit / (size - freeHold)
	g := newRig(t, oneServer, keepIdle, small(func(p *farm.PoolLimits) { p.MaxConnections = 0 }),
		func(s *farm.Spec) { s.Farms[0].Limits.Held = limit })
	f := g.db.Farms[0]
	goOn := established(g)
	head := "GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("P: "+strings.Repeat("p", 1000)+"\r\n", 40)
	var all []*pair
	for i := range clients {
		p := g.dial(user(i), packet.Seq(70_000*(i+1)))
		for off := 0; off < size; off += 1000 {
			g.play(g.raw(p.cli, vip, seg{fl: ack, seq: p.cseq + packet.Seq(off), ack: p.cack, data: head[off:min(off+1000, size)]}))
		}
		all = append(all, p)
		if n := g.e.Count.Get(ReasonHeldFull); i < clients/2-1 && n > 0 {
			t.Fatalf("full after %d of %d clients: %d bytes", i+1, clients/2, f.Stats.Held.Load())
		}
		if n := f.Stats.Held.Load(); n > limit {
			t.Fatalf("%d bytes are held, the limit is %d", n, limit)
		}
	}
	if g.e.Count.Get(ReasonHeldFull) == 0 || f.Stats.Held.Load() < limit-size {
		t.Errorf("%d bytes held: %s", f.Stats.Held.Load(), g.counts())
	}
	// The last one is told to wait.
	p := all[len(all)-1]
	told := g.play(g.raw(p.cli, vip, seg{fl: ack, seq: p.cseq, ack: p.cack, data: head[:1000]}))
	if len(told) != 1 || told[0].win != 0 {
		t.Errorf("a client whose bytes are not taken gets %d packets", len(told))
	}
	goOn()
	g.iss = []packet.Seq{1999}
	a := g.dial(c1, 100)
	a.ask(get("/small", 200), 499)
	if string(a.fromClient) != get("/small", 200) {
		t.Errorf("a small request: its server gets %q", a.fromClient)
	}
	for _, p := range all {
		c := g.e.clients.At(g.e.clients.Lookup(&packet.Tuple{Src: ep(p.cli), Dst: ep(vip)}))
		g.play(g.raw(p.cli, vip, seg{fl: rst, seq: c.RcvNxt}))
	}
	if n := f.Stats.Held.Load(); n != 0 {
		t.Errorf("%d bytes count when nothing is held", n)
	}
	g.iss = []packet.Seq{3_000_000}
	b := g.dial(user(5000), 900)
	large := head + "\r\n"
	for off := 0; off < len(large); off += 1000 {
		b.note(g.play(g.raw(b.cli, vip, seg{fl: ack, seq: b.cseq + packet.Seq(off), ack: b.cack, data: large[off:min(off+1000, len(large))]})), 7000)
	}
	if string(b.fromClient) != large {
		t.Errorf("a large head: its server gets %d of %d bytes", len(b.fromClient), len(large))
	}
	goOn()
}

// TestSYNStructures: as many SYNs in one slot as the bitmaps have bits, and as
// many again. Nothing is remembered of them but bits, a guessed acknowledgment
// still fails, and a client that comes then is served.
func TestSYNStructures(t *testing.T) {
	rnd := seeded(t)
	bits := bitmapWords * 64
	if testing.Short() {
		bits /= 16
	}
	g := newRig(t, oneServer, keepIdle)
	goOn := established(g)
	before := g.e.Usage()
	g.hs.Cookies = &MACCookies{k0: rnd.Uint64(), k1: rnd.Uint64()}
	b := g.raw(user(1), vip, seg{fl: syn, opts: packet.AppendSYNOptions(nil, packet.SYNOptions{MSS: 1460, WindowScale: 7, SACKPermitted: true})})
	for range 2 * bits {
		b[20], b[21], b[24], b[25], b[26], b[27] = byte(rnd.Uint32()), byte(rnd.Uint32()), byte(rnd.Uint32()), byte(rnd.Uint32()), byte(rnd.Uint32()), byte(rnd.Uint32())
		g.out.Reset()
		g.hs.SYN(g.now, b, packet.ChecksumVerified, &g.out)
	}
	if n := g.hs.Answered.Load(); n != uint64(2*bits)+1 {
		t.Errorf("%d SYNs were answered", n)
	}
	for range 100_000 {
		g.play(g.raw(user(1), vip, seg{fl: ack | psh, seq: packet.Seq(rnd.Uint32()), ack: packet.Seq(rnd.Uint32()), data: "GET / HTTP/1.1\r\nHost: a\r\n\r\n"}))
	}
	if u := g.e.Usage(); u != before {
		t.Errorf("%+v, before %+v", u, before)
	}
	goOn()
	g.hs.Cookies = g.cookies
	g.iss = []packet.Seq{1999}
	a := g.dial(c1, 100)
	a.ask(get("/", 60), 499)
	if string(a.fromClient) != get("/", 60) {
		t.Errorf("a client that comes then: its server gets %q", a.fromClient)
	}
}
