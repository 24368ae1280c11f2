// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bytes"
	"testing"

	"github.com/weirgate/weir/integration/sim/tcp"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/packet"
)

// get and post are plain requests.
func get(body uint64) ReqPlan {
	return ReqPlan{Method: "GET", Minor: 1, Reply: ReplyPlan{Status: 200, Minor: 1, Body: body, Pieces: 1}}
}

func post(request, body uint64) ReqPlan {
	q := get(body)
	q.Method, q.Body = "POST", request
	return q
}

func plainConn(requests ...ReqPlan) ConnPlan {
	o := plainOptions()
	o.ISS = 123456
	return ConnPlan{Opt: o, Requests: requests, Pipeline: 1, Pieces: 1}
}

// hard makes the wires of a scenario lose, repeat and reorder.
func hard(s *Scenario, p float64) {
	for d := range s.Wires {
		w := &s.Wires[d]
		w.Loss, w.Duplicate, w.Reorder, w.Late = p, p, p, 5*millisecond
	}
	s.Bound = 240 * second
}

// TestSequenceWrap: every connection's numbers begin at, just before and just
// behind the places where 32 and 31 bits wrap, in all combinations; bodies in
// both directions cross them. Half of the runs lose packets.
func TestSequenceWrap(t *testing.T) {
	edges := []uint32{1<<32 - 100, 1<<32 - 1, 0, 1<<31 - 1, 1 << 31, 1<<31 + 100}
	n := len(edges)
	total := 2 * n * n * n * n
	sum := runAll(t, upTo(total), func(i int) (*Scenario, Hooks) {
		s := Base(uint64(i))
		k := i / 2
		c := plainConn(post(300, 200), get(5000), post(4000, 300), get(100))
		c.Opt.ISS = edges[k%n]
		s.Conns = []ConnPlan{c}
		s.EngineToClient = []uint32{edges[k/n%n]}
		s.EngineToServer = []uint32{edges[k/n/n%n]}
		s.Servers = s.Servers[:1]
		s.Servers[0].Opt.ISS = edges[k/n/n/n]
		s.Forward = k%3 == 0
		if i%2 == 1 {
			hard(s, 0.03)
		}
		return s, Hooks{}
	})
	if want := total * 4; sum.Exchanges != want && !t.Failed() {
		t.Errorf("%d of %d exchanges were answered by a server", sum.Exchanges, want)
	}
}

// TestSequenceWrapControl: an engine that is off by one just behind the wrap is
// found out wherever a stream to a server crosses it.
func TestSequenceWrapControl(t *testing.T) {
	for _, iss := range []uint32{1<<32 - 100, 1<<32 - 1} {
		s := Base(1)
		s.Conns = []ConnPlan{plainConn(post(300, 200), get(5000), post(4000, 300))}
		s.EngineToServer = []uint32{iss}
		r := Run(s, Hooks{Emitted: func(_ *World, d Direction, b []byte) []byte {
			p, _ := packet.ParseTCP(b)
			if d == ToServer && p.PayloadLen() > 0 && p.Seq() < 10_000 {
				p.SetSeq(p.Seq().Add(1), packet.ChecksumVerified)
			}
			return b
		}})
		if r.Violation == nil || r.Violation.Invariant != "INV-1" {
			t.Errorf("ISS %d: the observer finds %v", iss, r.Violation)
		}
	}
}

// scalePairs is how many pairs of window scales there are: none, 0 to 14.
const scalePairs = 16 * 16

// scaleScenario is a pair of window scales, with buffers of so many bytes, or
// those that the scale takes, and bodies in both directions.
func scaleScenario(seed uint64, pair, bytes int) *Scenario {
	s := Base(seed)
	buffer := func(scale int8) int {
		if scale > 0 {
			return max(bytes, 3<<uint(scale))
		}
		return bytes
	}
	c := plainConn(get(60_000), post(60_000, 500), get(200))
	c.ReadPause = 20 * millisecond
	c.Opt.Scale = int8(pair%16) - 1
	c.Opt.Buffer = buffer(c.Opt.Scale)
	s.Conns = []ConnPlan{c, c}
	s.Conns[1].Host, s.Conns[1].Start = 1, 30*millisecond
	s.Servers = s.Servers[:1]
	o := &s.Servers[0].Opt
	o.Scale = int8(pair/16) - 1
	o.Buffer = buffer(o.Scale)
	s.Servers[0].Lazy = 10 * millisecond
	return s
}

// TestWindowScales: every pair of scales, and none, with small and large
// buffers and bodies in both directions.
func TestWindowScales(t *testing.T) {
	const total = 2 * scalePairs
	sum := runAll(t, upTo(total), func(i int) (*Scenario, Hooks) {
		return scaleScenario(uint64(i), i/2, []int{4 << 10, 300 << 10}[i%2]), Hooks{}
	})
	if want := total * 6; sum.Exchanges != want && !t.Failed() {
		t.Errorf("%d of %d exchanges were answered by a server", sum.Exchanges, want)
	}
}

// TestWindowScalesControl: an engine whose scale is off by one place, in either
// direction, is found out with every pair of scales.
func TestWindowScalesControl(t *testing.T) {
	for pair := range scalePairs {
		for _, to := range []Direction{ToClient, ToServer} {
			// More than W_hold, less than a field without a scale holds.
			r := Run(scaleScenario(1, pair, 24<<10), Hooks{Emitted: func(_ *World, d Direction, b []byte) []byte {
				p, _ := packet.ParseTCP(b)
				if d == to && !p.Flags().Has(packet.SYN) {
					p.SetWindow(uint16(min(2*uint32(p.Window()), 0xffff)), packet.ChecksumVerified)
				}
				return b
			}})
			if r.Violation == nil || r.Violation.Invariant != "INV-6" {
				t.Errorf("scales %d and %d, %v: the observer finds %v", pair%16-1, pair/16-1, to, r.Violation)
			}
		}
	}
}

// raceScenario has servers that close idle connections within 20 ms, and
// clients that ask at random times.
func raceScenario(seed uint64, lossy bool) *Scenario {
	s := Base(seed)
	r := stream(seed, partShape, 7)
	s.Servers = nil
	for range 3 {
		s.Servers = append(s.Servers, ServerPlan{Opt: plainOptions(), IdleClose: 20 * millisecond})
	}
	for i := range 10 {
		c := plainConn()
		c.Opt.ISS = r.Uint32()
		c.Host, c.Start = i%4, r.Int64N(20*millisecond)
		for range 10 {
			q := get(uint64(r.IntN(3000)))
			if r.IntN(3) == 0 {
				q = post(uint64(r.IntN(3000)), 100)
			}
			q.Pause = r.Int64N(30 * millisecond)
			c.Requests = append(c.Requests, q)
		}
		s.Conns = append(s.Conns, c)
	}
	for d := range s.Wires {
		s.Wires[d].Delay = int64(1+r.IntN(40)) * 100 * microsecond
	}
	if lossy {
		hard(s, 0.01)
	}
	return s
}

// TestKeepAliveRace: 5,000 requests against servers that close idle connections
// at random within 20 ms: no GET fails, no POST is executed twice, and every
// repetition is counted by its evidence.
func TestKeepAliveRace(t *testing.T) {
	base := seedOf(t)
	want := 5000
	if soak {
		want = 100_000
	}
	for _, lossy := range []bool{false, true} {
		sum := runAll(t, func(_ int, s *tally) bool { return s.Requests < want }, func(i int) (*Scenario, Hooks) {
			return raceScenario(base+uint64(i), lossy), Hooks{}
		})
		proof, again := sum.Counters[engine.ReasonRedispatchProof], sum.Counters[engine.ReasonRedispatchIdempotent]
		t.Logf("loss %v: %d requests, %d answered by a server, %d by the engine; redispatched with proof %d, without %d",
			lossy, sum.Requests, sum.Exchanges, sum.Owned, proof, again)
		if proof == 0 && !t.Failed() {
			t.Error("no request ever crossed a close: the test shows nothing")
		}
		if !lossy && sum.Owned+sum.Excused > 0 && !t.Failed() {
			t.Errorf("%d requests were not answered by a server, though nothing was lost", sum.Owned+sum.Excused)
		}
	}
}

// TestKeepAliveRaceControl: it is the acknowledgment number of the server's reset
// that proves that a request never arrived. One that lies makes the engine run a
// POST twice, and the observer sees it.
func TestKeepAliveRaceControl(t *testing.T) {
	s := Base(1)
	c := plainConn(get(100), post(200, 300))
	c.Requests[1].Reply.Fault = FaultReset
	s.Conns = []ConnPlan{c}
	lie := func(w *World, d Direction, b []byte) []byte {
		p, _ := packet.ParseTCP(b)
		if d != FromServer {
			return b
		}
		x := w.clients[0].exchanges[1]
		for _, f := range x.flows {
			if f.key == p.Tuple() {
				// Nothing of the POST was acknowledged, it says.
				p.SetAck(packet.Seq(f.ess+uint32(f.current().start)), packet.ChecksumVerified)
			}
		}
		return b
	}
	if r := Run(s, Hooks{}); r.Violation != nil {
		t.Errorf("with the truth: %v", r.Violation)
	}
	if r := Run(s, Hooks{Arriving: lie}); r.Violation == nil || r.Violation.Invariant != "INV-4" {
		t.Errorf("with a lie the observer finds %v", r.Violation)
	}
}

// firstSegments injects a duplicate of every client's first data segment some
// time after it was sent.
func firstSegments(after int64) Hooks {
	seen := map[packet.Tuple]packet.Seq{}
	return Hooks{Sent: func(w *World, d Direction, b []byte) {
		t, _ := packet.ParseTCP(b)
		if d != FromClient {
			return
		}
		if t.Flags().Has(packet.SYN) {
			seen[t.Tuple()] = t.Seq().Add(1)
		} else if isn, ok := seen[t.Tuple()]; ok && t.Seq() == isn && t.PayloadLen() > 0 {
			delete(seen, t.Tuple())
			w.Inject(d, b, after)
		}
	}}
}

// staleScenario has short POSTs; the clients are through long before the
// duplicates arrive.
func staleScenario(seed uint64) *Scenario {
	s := Base(seed)
	s.Servers = s.Servers[:1]
	for i := range 4 {
		c := plainConn(post(100, 200))
		c.Host, c.Opt.ISS = i, 1000+uint32(seed)*977
		c.End = []Ending{EndClose, EndHalf, EndReset, EndVanish}[i]
		s.Conns = append(s.Conns, c)
	}
	// Stays until after the last duplicate, so that the run does.
	last := plainConn(post(10, 10), post(10, 10))
	last.Host, last.Requests[1].Pause = 5, 35*second
	s.Conns = append(s.Conns, last)
	return s
}

// TestStaleFirstSegments: a duplicate of a first segment, from immediately
// after the close until its cookie is long dead, never runs a request again.
// The control: an engine that has forgotten its tombstones does.
func TestStaleFirstSegments(t *testing.T) {
	var after []int64
	for d := 5 * millisecond; d < 34*second; d += d/7 + millisecond {
		after = append(after, d)
	}
	runAll(t, upTo(len(after)), func(i int) (*Scenario, Hooks) { return staleScenario(uint64(i)), firstSegments(after[i]) })

	h := firstSegments(3 * second)
	renewed := false
	h.Renew = func(w *World) bool {
		if renewed || w.now < startTime+2*second {
			return false
		}
		renewed = true
		return true
	}
	r := Run(staleScenario(1), h)
	if r.Violation == nil || r.Violation.Invariant != "INV-4" {
		t.Errorf("without tombstones the observer finds %v", r.Violation)
	}
}

// TestNagleClients: a client with Nagle's algorithm that writes its head line
// by line is served within 100 ms, because the engine acknowledges early.
// The control: with the engine's bare acknowledgments lost it takes longer.
func TestNagleClients(t *testing.T) {
	runAll(t, upTo(200), func(i int) (*Scenario, Hooks) { return nagleScenario(uint64(i)), within(100 * millisecond) })

	h := within(100 * millisecond)
	h.Lose = func(d Direction, b []byte) bool {
		p, _ := packet.ParseTCP(b)
		return d == ToClient && p.PayloadLen() == 0 && p.Flags() == packet.ACK
	}
	if r := Run(nagleScenario(3), h); r.Violation == nil || r.Violation.Invariant != "time" {
		t.Errorf("without early acknowledgments: %v", r.Violation)
	}
}

func nagleScenario(seed uint64) *Scenario {
	s := Base(seed)
	r := stream(seed, partShape, 3)
	c := plainConn(get(300), get(100), post(50, 10))
	for k := range c.Requests {
		c.Requests[k].Pad = r.IntN(1000)
		c.Requests[k].Pause = r.Int64N(50 * millisecond)
	}
	c.Lines, c.Gap = true, r.Int64N(3)*100*microsecond
	c.Opt.Nagle, c.Opt.SACK = true, r.IntN(2) == 0
	s.Conns = []ConnPlan{c}
	return s
}

// within makes a run fail in which an exchange takes longer.
func within(limit int64) Hooks {
	return Hooks{Built: func(w *World) {
		w.atEnd = func() {
			for _, x := range w.clients[0].exchanges {
				if d := x.finished - x.started; d > limit {
					w.fail("time", "request %d took %.1f ms", x.index, float64(d)/1e6)
				}
			}
		}
	}}
}

// handOverScenario: a client with 1 MB of buffer, then one with 8 KB, on one
// server connection.
func handOverScenario(seed uint64) *Scenario {
	s := Base(seed)
	r := stream(seed, partShape, 5)
	s.Servers = s.Servers[:1]
	s.Pool.MaxConnections = 1
	for i := range 6 {
		c := plainConn(get(200_000 + uint64(r.IntN(1000))))
		c.Host, c.Opt.ISS = i, r.Uint32()
		c.Opt.Buffer = []int{1 << 20, 8 << 10}[i%2]
		c.Opt.DelayedACK = []int64{0, 40 * millisecond}[r.IntN(2)]
		c.ReadPause = []int64{0, 30 * millisecond}[i%2]
		c.Start = int64(i) * 10 * millisecond
		if i > 0 {
			c.Wait = 500 * millisecond
		}
		s.Conns = append(s.Conns, c)
	}
	s.Servers[0].Opt.Cwnd = 1000
	s.Servers[0].Opt.GSO = []int{0, 60000}[r.IntN(2)]
	return s
}

// TestWindowHandOver: nobody is sent more than its window and two segments,
// whoever used the server connection before (the observer looks at every
// packet). The control: the same with windows toward the server kept large.
func TestWindowHandOver(t *testing.T) {
	sum := runAll(t, upTo(60), func(i int) (*Scenario, Hooks) { return handOverScenario(uint64(i)), Hooks{} })
	if sum.Exchanges != 360 && !t.Failed() {
		t.Errorf("%d of 360 exchanges were answered", sum.Exchanges)
	}
	r := Run(handOverScenario(1), Hooks{Emitted: func(w *World, d Direction, b []byte) []byte {
		p, _ := packet.ParseTCP(b)
		if d == ToServer && !p.Flags().Has(packet.SYN) {
			p.SetWindow(8192, packet.ChecksumVerified)
		}
		return b
	}})
	if r.Violation == nil || r.Violation.Invariant != "INV-6" {
		t.Errorf("with inflated windows the observer finds %v", r.Violation)
	}
}

// hugeScenario sends a response, or a request, of more than 4 GiB.
func hugeScenario(i int) *Scenario {
	huge := uint64(1)<<32 + 1<<20
	s := Base(uint64(i))
	c := plainConn(get(huge), get(100))
	if i == 1 {
		c = plainConn(post(huge, 100), get(100))
	}
	fast := func(o *tcp.Options) {
		o.Buffer, o.Scale, o.GSO, o.Cwnd, o.DelayedACK = 4<<20, 10, 60_000, 4000, 0
	}
	fast(&c.Opt)
	s.Conns = []ConnPlan{c}
	s.Servers = s.Servers[:1]
	fast(&s.Servers[0].Opt)
	for d := range s.Wires {
		s.Wires[d].Join, s.Wires[d].JoinWait, s.Wires[d].Whole = 1, microsecond, true
	}
	return s
}

// TestHugeBodies: responses and requests of more than 4 GiB, whose sequence
// numbers wrap completely. The bodies are generated and compared byte by byte.
// The control: one that is off by one place from the wrap on is found out there.
func TestHugeBodies(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: 9 GB are generated and compared; not with -short")
	}
	runAll(t, upTo(2), func(i int) (*Scenario, Hooks) { return hugeScenario(i), Hooks{} })
	if !soak {
		// The control takes as long again as one of them; here the wrap comes
		// soon, and so does the tampering.
		hugeControl(t, 1<<20)
		return
	}
	hugeControl(t, 1<<32)
}

// hugeControl lets the engine be off by one place after so many bytes.
func hugeControl(t *testing.T, after uint64) {
	s := hugeScenario(0)
	s.EngineToClient = []uint32{uint32(-int64(after))}
	passed := uint64(0)
	r := Run(s, Hooks{Emitted: func(_ *World, d Direction, b []byte) []byte {
		p, _ := packet.ParseTCP(b)
		if d == ToClient {
			if passed += uint64(p.PayloadLen()); passed > after && p.PayloadLen() > 0 {
				p.SetSeq(p.Seq().Add(1), packet.ChecksumVerified)
			}
		}
		return b
	}})
	if r.Violation == nil || r.Violation.Invariant != "INV-1" && r.Violation.Invariant != "INV-6" {
		t.Errorf("off by one after %d bytes, and the observer finds %v", after, r.Violation)
	}
}

// tenPortsScenario: the engine has ten source ports toward a server that closes
// after each request and remembers the connection for a minute. A port comes
// again after a second and a half.
func tenPortsScenario(i, requests int) *Scenario {
	s := Base(uint64(i))
	s.Ports, s.Bound = 10, 120*second
	s.Servers = s.Servers[:1]
	s.Servers[0].MaxReq, s.Servers[0].Opt.TimeWait = 1, 60*second
	if i%2 == 1 {
		hard(s, 0.01)
		for d := range s.Wires {
			s.Wires[d].Late = 900 * millisecond
		}
	}
	for k := range requests {
		q := get(500)
		if k%2 == 0 {
			q = post(500, 100)
		}
		c := plainConn(q)
		c.Host, c.Opt.ISS, c.Start = k%4, uint32(k)*99_991, int64(k)*150*millisecond
		s.Conns = append(s.Conns, c)
	}
	return s
}

// oldOnPort has the request that a connection to a server carried last arrive
// once more in the next connection on the same port: after its SYN, before its
// own request. n counts them.
func oldOnPort(n *int) Hooks {
	last := map[packet.Tuple][]byte{}
	return Hooks{
		Emitted: func(_ *World, d Direction, b []byte) []byte {
			if p, _ := packet.ParseTCP(b); d == ToServer && p.PayloadLen() > 0 {
				last[p.Tuple()] = bytes.Clone(b)
			}
			return b
		},
		Sent: func(w *World, d Direction, b []byte) {
			p, _ := packet.ParseTCP(b)
			if d != FromServer || !p.Flags().Has(packet.SYN) {
				return
			}
			if old := last[packet.Tuple{Src: p.Dst(), Dst: p.Src()}]; old != nil {
				*n++
				w.Inject(ToServer, old, 0)
			}
		},
	}
}

// TestTenPorts: every port is used again and again, over wires that bring
// segments of the connections before late, in the worst moment too.
func TestTenPorts(t *testing.T) {
	const runs, requests = 30, 40
	var late [runs]int
	sum := runAll(t, upTo(runs), func(i int) (*Scenario, Hooks) {
		return tenPortsScenario(i, requests), oldOnPort(&late[i])
	})
	t.Logf("%d answered by a server, %d by the engine", sum.Exchanges, sum.Owned)
	if sum.Exchanges != runs*requests && !t.Failed() {
		t.Errorf("%d of %d requests were answered by a server", sum.Exchanges, runs*requests)
	}
	for i, n := range late {
		if n < requests-10 {
			t.Errorf("run %d: old requests came only %d times", i, n)
		}
	}
}

// TestTenPortsControl: an engine that begins every connection on a port with the
// same number, and does not reset what a server remembers of the connection
// before, gets requests not answered.
func TestTenPortsControl(t *testing.T) {
	for i := range 2 {
		n := 0
		s, h := tenPortsScenario(i, 40), oldOnPort(&n)
		s.Quiet, s.EngineToServer = 0, []uint32{123456}
		h.Lose = func(d Direction, b []byte) bool {
			p, _ := packet.ParseTCP(b)
			return d == ToServer && p.Flags().Has(packet.RST)
		}
		if r := Run(s, h); r.Violation == nil || r.Violation.Invariant != "INV-4" {
			t.Errorf("run %d: %d of 40 answered by the server, and the observer finds %v", i, r.Exchanges, r.Violation)
		}
	}
}
