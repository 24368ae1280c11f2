// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/pool"
	"github.com/weirgate/weir/policies/snapshot"
)

// rig is an engine with hands on both sides: a test says which segment comes,
// and reads which segments leave, in the notation of the patent's FIG 6:
// TYPE:seq,ack(length).
type rig struct {
	t    *testing.T
	e    *Engine
	hs   *Handshake
	db   *farm.DB
	now  int64
	out  Output
	last []byte // the last packet that went on in place
	// isn maps a client's ISN to the ISS that it gets; others get 1000000.
	cookies fixedCookies
	iss     []packet.Seq // for server connections, in order
}

type fixedCookies map[packet.Seq]packet.Seq

func (f fixedCookies) Make(_ packet.Tuple, isn packet.Seq, _ uint8, _ int64) packet.Seq {
	if iss, ok := f[isn]; ok {
		return iss
	}
	return 1_000_000
}

// The options that every client of a rig offers: MSS 1460, no scale, SACK.
func (f fixedCookies) Check(t packet.Tuple, isn, iss packet.Seq, now int64) (uint8, bool) {
	return uint8(makeOptions(packet.SYNOptions{MSS: 1460, WindowScale: 7, SACKPermitted: true})), f.Make(t, isn, 0, now) == iss
}

var (
	vip  = netip.MustParseAddrPort("203.0.113.10:80")
	snip = netip.MustParseAddr("198.51.100.1")
	s1   = netip.MustParseAddrPort("198.51.100.11:80")
	s2   = netip.MustParseAddrPort("198.51.100.12:80")
	c1   = netip.MustParseAddrPort("198.18.0.1:40001")
	c2   = netip.MustParseAddrPort("198.18.0.2:40002")
)

const testPorts = 1000

func newRig(t *testing.T, change ...func(*farm.Spec)) *rig {
	t.Helper()
	return newRigOf(t, 1000, change...)
}

// newRigOf is newRig for so many records of each kind.
func newRigOf(t *testing.T, records int, change ...func(*farm.Spec)) *rig {
	t.Helper()
	spec := farm.Spec{
		SNIPs: []netip.Addr{snip},
		Farms: []farm.FarmSpec{{
			Name: "web", VIPs: []netip.AddrPort{vip},
			Servers:  []farm.ServerSpec{{Name: "s1", Endpoint: s1}, {Name: "s2", Endpoint: s2}},
			Pool:     farm.PoolLimits{MaxIdle: 64, MaxConnections: 512, IdleTimeout: 30 * second, MaxWaiting: 1024, WaitTimeout: 5 * second, DrainLimit: 1 << 20, DrainTimeout: 10 * second},
			Timeouts: farm.Timeouts{Connect: 5 * second, Head: 15 * second, Idle: 60 * second, Response: 60 * second},
		}},
	}
	for _, f := range change {
		f(&spec)
	}
	db, err := farm.Build(nil, spec)
	if err != nil {
		t.Fatal(err)
	}
	g := &rig{t: t, db: db, now: 1000 * second, cookies: fixedCookies{}}
	g.hs = NewHandshake(g.cookies, 1400, 1380, func(ep packet.Endpoint) bool { return db.ByVIP(ep) != nil })
	g.e = New(g.options(records), db)
	return g
}

// oneServer leaves only s1 in the farm, so that the choice is certain.
// options are those of a rig's engine with so many records of each kind.
func (g *rig) options(records int) Options {
	return Options{
		Clients: records, Servers: records, Seed: 1, Handshake: g.hs,
		SNIPs: []*pool.Ports{pool.NewPorts(packet.AddrFrom(snip), 10240, 10240+testPorts-1, second, nil)},
		ISS: func(*packet.Tuple, int64) packet.Seq {
			if len(g.iss) == 0 {
				return 5_000_000
			}
			iss := g.iss[0]
			g.iss = g.iss[1:]
			return iss
		},
	}
}

func oneServer(s *farm.Spec) { s.Farms[0].Servers = s.Farms[0].Servers[:1] }

// figure8 routes by path as FIG 8 does.
func figure8(s *farm.Spec) {
	s.Farms[0].Policies = []snapshot.Policy{{Name: "path", Snapshot: &snapshot.Snapshot{
		Plugin: "path", Generation: 1,
		Routes: &snapshot.Routes{Routes: []snapshot.Route{
			{Prefix: "/sales/", Target: snapshot.Target{Servers: []string{"s1"}}},
			{Prefix: "/products/", Target: snapshot.Target{Servers: []string{"s2"}}},
		}},
	}}}
}

// seg is one segment that a test sends.
type seg struct {
	fl   packet.Flags
	seq  packet.Seq
	ack  packet.Seq
	data string
	win  uint16
	opts []byte
	bad  bool // wrong checksum
}

func ep(a netip.AddrPort) packet.Endpoint { return packet.EndpointFrom(a) }

func (g *rig) raw(src, dst netip.AddrPort, s seg) []byte {
	if s.win == 0 {
		s.win = 1000
	}
	b := packet.AppendSegment(nil, &packet.Segment{
		Src: ep(src), Dst: ep(dst), Seq: s.seq, Ack: s.ack, Flags: s.fl, Window: s.win, Options: s.opts, TTL: 64,
	}, []byte(s.data))
	if s.bad {
		b[len(b)-1] ^= 0x55
	}
	return b
}

// SYN lets a client open; it returns what the client gets.
func (g *rig) SYN(client netip.AddrPort, isn packet.Seq) []string {
	g.t.Helper()
	g.out.Reset()
	o := packet.AppendSYNOptions(nil, packet.SYNOptions{MSS: 1460, WindowScale: 7, SACKPermitted: true})
	g.hs.SYN(g.now, g.raw(client, vip, seg{fl: packet.SYN, seq: isn, opts: o}), packet.ChecksumUnknown, &g.out)
	return g.collect(nil)
}

// client lets a client send a segment.
func (g *rig) client(client netip.AddrPort, s seg) []string {
	g.t.Helper()
	return g.step(Packet, g.raw(client, vip, s))
}

// server lets a server send a segment on the connection to a SNIP port.
func (g *rig) server(server netip.AddrPort, port uint16, s seg) []string {
	g.t.Helper()
	return g.step(Packet, g.raw(server, netip.AddrPortFrom(snip, port), s))
}

func (g *rig) step(k Kind, b []byte) []string {
	g.t.Helper()
	g.out.Reset()
	ev := Event{Kind: k, Data: append(make([]byte, 0, len(b)+256), b...)}
	g.e.Step(g.now, &ev, &g.out)
	return g.collect(&ev)
}

// wait lets time pass, tick by tick where something is due.
func (g *rig) wait(d int64) []string {
	g.t.Helper()
	g.out.Reset()
	end := g.now + d
	for {
		next := g.e.NextDue()
		if next == 0 || next > end {
			break
		}
		g.now = max(next, g.now)
		g.e.Step(g.now, &Event{Kind: Tick}, &g.out)
	}
	g.now = end
	g.e.Step(g.now, &Event{Kind: Tick}, &g.out)
	return g.collect(nil)
}

// packets returns what the last step let out, emitted ones first.
func (g *rig) collect(ev *Event) []string {
	g.t.Helper()
	var got []string
	for i := range g.out.Len() {
		got = append(got, g.describe(g.out.Packet(i)))
	}
	if ev != nil && ev.Verdict == Rewrite {
		g.last = ev.Data
		got = append(got, g.describe(ev.Data))
	}
	return got
}

// describe checks a packet as its receiver would and writes it down.
func (g *rig) describe(b []byte) string {
	g.t.Helper()
	p, problem := packet.ParseTCP(b)
	if problem != packet.OK {
		g.t.Fatalf("the engine let a packet out that is %v", problem)
	}
	if !p.IPHeaderOK() || !p.VerifyChecksum() {
		g.t.Fatalf("the engine let a packet out with a wrong checksum (INV-6): %v", p.Tuple())
	}
	return fmt.Sprintf("%s %s:%d,%d(%d)", g.name(p.Dst()), kind(&p), p.Seq(), p.Ack(), p.PayloadLen())
}

func (g *rig) name(e packet.Endpoint) string {
	switch e.AddrPort() {
	case c1:
		return "C1"
	case c2:
		return "C2"
	case s1:
		return "S1"
	case s2:
		return "S2"
	}
	return e.String()
}

// kind names a segment as the patent does.
func kind(p *packet.TCP) string {
	f := p.Flags()
	var k string
	switch data := string(p.Payload()); {
	case f.Has(packet.RST):
		return "RST"
	case f.Has(packet.SYN | packet.ACK):
		return "SYN ACK"
	case f.Has(packet.SYN):
		return "SYN"
	case strings.HasPrefix(data, "HTTP/"):
		k = "RESP"
	case strings.Contains(strings.SplitN(data, "\r\n", 2)[0], " HTTP/1."):
		k = strings.SplitN(data, " ", 2)[0]
	case data != "":
		k = "DATA"
	case f.Has(packet.FIN):
		return "FIN"
	default:
		return "ACK"
	}
	if f.Has(packet.FIN) {
		k += " FIN"
	}
	return k
}

func (g *rig) expect(what string, got []string, want ...string) {
	g.t.Helper()
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		g.t.Fatalf("%s:\n got %q\nwant %q", what, got, want)
	}
}

// payload returns the data of the last step's packet number i, emitted ones
// first.
func (g *rig) payload(i int) string {
	p, _ := packet.ParseTCP(g.out.Packet(i))
	return string(p.Payload())
}

// pad makes a request or response of exactly n bytes.
func get(path string, n int, extra ...string) string {
	head := "GET " + path + " HTTP/1.1\r\nHost: "
	tail := "\r\n" + strings.Join(extra, "") + "\r\n"
	return head + strings.Repeat("h", n-len(head)-len(tail)) + tail
}

func resp(n int, extra ...string) string {
	for body := n; body >= 0; body-- {
		r := fmt.Sprintf("HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n", strings.Join(extra, ""), body)
		if len(r)+body == n {
			return r + strings.Repeat("x", body)
		}
	}
	panic("no response of that size")
}

// open brings a client to its first request: it returns the numbers with which
// it goes on.
func (g *rig) open(client netip.AddrPort, isn, iss packet.Seq) (seq, ack packet.Seq) {
	g.t.Helper()
	g.cookies[isn] = iss
	g.expect("SYN", g.SYN(client, isn), fmt.Sprintf("%s SYN ACK:%d,%d(0)", g.name(ep(client)), iss, isn+1))
	g.expect("handshake ACK", g.client(client, seg{fl: packet.ACK, seq: isn + 1, ack: iss + 1}))
	return isn + 1, iss + 1
}

// idle fails the test unless nothing is left but what the patent keeps: idle
// server connections.
func (g *rig) idle(servers int) {
	g.t.Helper()
	g.wait(max(lingerTime, (int64(tombLife)+1)*second) + 30*second)
	u := g.e.Usage()
	if u.Clients != 0 || u.Held != 0 || u.Waiting != 0 || u.Servers != servers || u.Idle != servers || u.Tombs != 0 {
		g.t.Errorf("not at the baseline (INV-9), want %d idle server connections: %+v", servers, u)
	}
	for _, f := range g.db.Farms {
		for _, s := range f.Servers {
			if s.Live.Active.Load() != 0 || s.Live.Waiting.Load() != 0 {
				g.t.Errorf("server %s: %d active, %d waiting", s.Name, s.Live.Active.Load(), s.Live.Waiting.Load())
			}
		}
	}
}

// ep2 is a port of the SNIP.
func ep2(port uint16) netip.AddrPort { return netip.AddrPortFrom(snip, port) }
