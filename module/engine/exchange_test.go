// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
)

func keepIdle(s *farm.Spec) { s.Farms[0].Pool.IdleTimeout = 0 }

// exchange runs one GET of a fresh client over the only server connection and
// closes the client.
func (g *rig) exchange(isn packet.Seq, port uint16, srvSeq, srvAck packet.Seq) {
	g.t.Helper()
	seq, a := g.open(c1, isn, isn+1000)
	out := g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
	if len(out) != 1 || !strings.HasPrefix(out[0], "S1 GET:") {
		g.t.Fatalf("the request did not go to an idle connection: %q", out)
	}
	g.server(s1, port, seg{fl: ack | psh, seq: srvSeq, ack: srvAck + 50, data: resp(100)})
	g.client(c1, seg{fl: ack, seq: seq + 50, ack: a + 100})
	g.client(c1, seg{fl: fin | ack, seq: seq + 50, ack: a + 100})
	g.client(c1, seg{fl: ack, seq: seq + 51, ack: a + 101})
}

// TestReuseIdle: a free connection is used (FIG 3 step 306), by client after
// client, and no other is opened.
func TestReuseIdle(t *testing.T) {
	g := figure6A(t)
	sseq, sack := packet.Seq(7000), packet.Seq(2000)
	for i := range packet.Seq(20) {
		g.exchange(100_000*(i+1), 10240, sseq, sack)
		sseq, sack = sseq+100, sack+50
		g.now += tombSeconds
	}
	f := g.db.Farms[0]
	if f.Stats.Opened.Load() != 1 || f.Stats.Reused.Load() != 20 {
		t.Errorf("opened %d, reused %d", f.Stats.Opened.Load(), f.Stats.Reused.Load())
	}
	g.idle(1)
}

const tombSeconds = 30 * second

// TestReleaseKeepsServerConnection: closing the client's connection sends
// nothing to the server (claims 1 and 20).
func TestReleaseKeepsServerConnection(t *testing.T) {
	g := figure6A(t)
	if u := g.e.Usage(); u.Servers != 1 || u.Idle != 1 || u.Clients != 0 {
		t.Errorf("after the close of the client: %+v", u)
	}
}

// TestRebindPerRequest: two requests on one client connection, two servers,
// the second request carrying the acknowledgment of the first response. The
// server of the first gets that acknowledgment all the same.
func TestRebindPerRequest(t *testing.T) {
	g := newRig(t, figure8, keepIdle)
	g.iss = []packet.Seq{1999, 2999}
	seq, a := g.open(c1, 100, 9000)
	g.expect("first", g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/sales/a", 50)}), "S1 SYN:1999,0(0)")
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: resp(200)})
	g.expect("second", g.client(c1, seg{fl: ack | psh, seq: seq + 50, ack: a + 200, data: get("/products/b", 60)}),
		"S2 SYN:2999,0(0)", "S1 ACK:2050,700(0)")
	g.expect("opened", g.server(s2, 10241, seg{fl: syn | ack, seq: 799, ack: 3000, opts: sackPermitted}),
		"S2 ACK:3000,800(0)", "S2 GET:3000,800(60)")
	g.expect("response", g.server(s2, 10241, seg{fl: ack | psh, seq: 800, ack: 3060, data: resp(300)}),
		"C1 RESP:9201,211(300)")
}

// TestPiggybackSameServer: where the next request goes to the same server, its
// packet is the acknowledgment, and nothing else is sent.
func TestPiggybackSameServer(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/a", 50)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: resp(200)})
	g.expect("second", g.client(c1, seg{fl: ack | psh, seq: seq + 50, ack: a + 200, data: get("/b", 60)}),
		"S1 GET:2050,700(60)")
}

const http10 = "GET /x HTTP/1.0\r\n\r\n"

// TestKeepAliveInsertion: the patent's third case. An HTTP/1.0 request without
// keep-alive reaches the server with it, and the engine closes the client's
// connection itself after the response.
func TestKeepAliveInsertion(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: http10})
	n := len(http10) + len(keepAlive)
	g.expect("request", g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted}),
		"S1 ACK:2000,500(0)", "S1 GET:2000,500(43)")
	if want := "GET /x HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"; g.payload(1) != want || len(want) != n {
		t.Errorf("the server gets %q", g.payload(1))
	}
	g.expect("response", g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2043, data: resp(100, "Connection: keep-alive\r\n")}),
		"C1 RESP FIN:9001,120(100)")
	g.expect("client closes", g.client(c1, seg{fl: fin | ack, seq: seq + 19, ack: a + 101}),
		"C1 ACK:9102,121(0)", "S1 ACK:2043,600(0)")
	g.idle(1)
}

// TestBytesAdded: the numbers around an insertion, in both directions, for
// every acknowledgment that a server can give.
func TestBytesAdded(t *testing.T) {
	const post = "POST /x HTTP/1.0\r\nContent-Length: 10\r\n\r\n"
	added := packet.Seq(len(keepAlive))
	head := packet.Seq(len(post))
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: post})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	// What follows the insertion moves by the bytes added.
	g.expect("body", g.client(c1, seg{fl: ack | psh, seq: seq + head, ack: a, data: "0123456789"}),
		"S1 DATA:"+num(2000+head+added)+",500(10)")
	// An acknowledgment before, in, at the end of and behind the insertion.
	ins := head - 2
	for _, c := range []struct{ server, client packet.Seq }{
		{2000 + 5, seq + 5},
		{2000 + ins, seq + ins},
		{2000 + ins + 1, seq + ins},
		{2000 + ins + added, seq + ins},
		{2000 + ins + added + 1, seq + ins + 1},
		{2000 + head + added, seq + head},
		{2000 + head + added + 4, seq + head + 4},
	} {
		g.expect("acknowledgment", g.server(s1, 10240, seg{fl: ack, seq: 500, ack: c.server}),
			"C1 ACK:"+num(a)+","+num(c.client)+"(0)")
	}
	// The client's retransmission of the rest goes through the same mapping.
	g.expect("retransmission", g.client(c1, seg{fl: ack | psh, seq: seq + head + 4, ack: a, data: "456789"}),
		"S1 DATA:"+num(2000+head+added+4)+",500(6)")
}

func num(s packet.Seq) string {
	b := []byte{}
	for v := uint32(s); ; v /= 10 {
		b = append([]byte{byte('0' + v%10)}, b...)
		if v < 10 {
			return string(b)
		}
	}
}

// TestConnectionCloseNeutralised: a client's wish to close stays with us.
func TestConnectionCloseNeutralised(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	req := get("/", 70, "Connection: close\r\n")
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: req})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	if got, want := g.payload(1), strings.Replace(req, "Connection", neutral, 1); got != want || len(neutral) != len("Connection") {
		t.Errorf("the server gets %q", got)
	}
	g.expect("response", g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2070, data: resp(100)}), "C1 RESP FIN:9001,171(100)")
	g.client(c1, seg{fl: fin | ack, seq: seq + 70, ack: a + 101})
	g.idle(1)
}

// TestClientResetDrains: the client is gone in the middle of a response; the
// engine acknowledges the rest for it and keeps the server connection.
func TestClientResetDrains(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	whole := resp(3000)
	g.expect("first part", g.server(s1, 10240, seg{fl: ack, seq: 500, ack: 2050, data: whole[:1000]}), "C1 RESP:9001,151(1000)")
	// The patent: "calculates the unacknowledged bytes, and sends an ACK".
	g.expect("reset", g.client(c1, seg{fl: rst, seq: seq + 50}), "S1 ACK:2050,1500(0)")
	g.expect("second part", g.server(s1, 10240, seg{fl: ack, seq: 1500, ack: 2050, data: whole[1000:2000]}), "S1 ACK:2050,2500(0)")
	g.expect("a gap", g.server(s1, 10240, seg{fl: ack, seq: 3000, ack: 2050, data: whole[2500:]}), "S1 ACK:2050,2500(0)")
	g.expect("the rest", g.server(s1, 10240, seg{fl: ack | psh, seq: 2500, ack: 2050, data: whole[2000:]}), "S1 ACK:2050,3500(0)")
	if g.e.Usage().Idle != 1 {
		t.Fatal("the drained connection is not back in the pool")
	}
	g.now += tombSeconds
	g.exchange(500_000, 10240, 3500, 2050)
	g.idle(1)
}

// TestClientResetDrainLimit: a drain does not go on for ever.
func TestClientResetDrainLimit(t *testing.T) {
	g := newRig(t, oneServer, keepIdle, func(s *farm.Spec) { s.Farms[0].Pool.DrainLimit = 1500 })
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	whole := resp(5000)
	g.server(s1, 10240, seg{fl: ack, seq: 500, ack: 2050, data: whole[:1000]})
	g.client(c1, seg{fl: rst, seq: seq + 50})
	g.expect("below the limit", g.server(s1, 10240, seg{fl: ack, seq: 1500, ack: 2050, data: whole[1000:2000]}), "S1 ACK:2050,2500(0)")
	g.expect("above it", g.server(s1, 10240, seg{fl: ack, seq: 2500, ack: 2050, data: whole[2000:3000]}), "S1 RST:2050,3500(0)")
	g.idle(0)
}

// TestServerFinish: a server's FIN after a complete response that has not
// announced the end is the server connection's affair, as on an idle one: the
// client, whose next request may be under way, asks on. Behind one that has
// announced it, it ends both sides. In the middle of a response the client sees
// a reset.
func TestServerFinish(t *testing.T) {
	start := func(t *testing.T) (*rig, packet.Seq, packet.Seq) {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{1999, 7999}
		seq, a := g.open(c1, 100, 9000)
		g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
		g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
		return g, seq, a
	}
	t.Run("complete", func(t *testing.T) {
		g, seq, a := start(t)
		g.expect("response", g.server(s1, 10240, seg{fl: ack | psh | fin, seq: 500, ack: 2050, data: resp(100)}), "C1 RESP:9001,151(100)")
		out := g.client(c1, seg{fl: ack | psh, seq: seq + 50, ack: a + 100, data: get("/", 50)})
		if strings.Join(out, "; ") != "S1 FIN:2050,601(0); S1 SYN:7999,0(0)" {
			t.Errorf("the next request leads to %q", out)
		}
		g.server(s1, 10240, seg{fl: ack, seq: 601, ack: 2051})
	})
	t.Run("announced", func(t *testing.T) {
		g, seq, a := start(t)
		g.expect("response", g.server(s1, 10240, seg{fl: ack | psh | fin, seq: 500, ack: 2050, data: resp(100, "Connection: close\r\n")}), "C1 RESP FIN:9001,151(100)")
		g.expect("client closes", g.client(c1, seg{fl: ack | fin, seq: seq + 50, ack: a + 101}),
			"C1 ACK:9102,152(0)", "S1 FIN:2050,601(0)")
		g.server(s1, 10240, seg{fl: ack, seq: 601, ack: 2051})
		g.idle(0)
	})
	t.Run("idle", func(t *testing.T) {
		g, seq, a := start(t)
		g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: resp(100)})
		g.client(c1, seg{fl: ack, seq: seq + 50, ack: a + 100})
		g.expect("FIN", g.server(s1, 10240, seg{fl: ack | fin, seq: 600, ack: 2050}), "S1 FIN:2050,601(0)")
		g.server(s1, 10240, seg{fl: ack, seq: 601, ack: 2051})
		// The client is not disturbed and asks again, over a new connection.
		g.expect("again", g.client(c1, seg{fl: ack | psh, seq: seq + 50, ack: a + 100, data: get("/", 50)}), "S1 SYN:7999,0(0)")
	})
	t.Run("truncated", func(t *testing.T) {
		g, _, _ := start(t)
		g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: resp(1000)[:700]})
		out := g.server(s1, 10240, seg{fl: ack | fin, seq: 1200, ack: 2050})
		if len(out) < 2 || !strings.HasPrefix(out[0], "S1 RST") || !strings.HasPrefix(out[1], "C1 RST") {
			t.Errorf("a truncated response ends with %q", out)
		}
		g.idle(0)
	})
	t.Run("close-delimited", func(t *testing.T) {
		g, seq, a := start(t)
		r := "HTTP/1.1 200 OK\r\n\r\nhello"
		g.expect("response", g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: r}), "C1 RESP:9001,151(24)")
		g.expect("end", g.server(s1, 10240, seg{fl: ack | fin, seq: 524, ack: 2050}), "C1 FIN:9025,151(0)")
		g.expect("client closes", g.client(c1, seg{fl: ack | fin, seq: seq + 50, ack: a + 25}),
			"C1 ACK:9026,152(0)", "S1 FIN:2050,525(0)")
		g.server(s1, 10240, seg{fl: ack, seq: 525, ack: 2051})
		g.idle(0)
	})
}

// TestKeepAliveRace: the server closes an idle connection while a request is
// on its way there. Its acknowledgment proves that it never had the request,
// so any method goes to another connection; without proof only what may be
// repeated does.
func TestKeepAliveRace(t *testing.T) {
	for _, c := range []struct {
		name, method string
		fl           packet.Flags
		ack          packet.Seq
		status       string
	}{
		{"FIN with proof, POST", "POST", ack | fin, 2000, ""},
		{"RST with proof, POST", "POST", ack | rst, 2000, ""},
		{"bare RST, GET", "GET", rst, 0, ""},
		{"bare RST, POST", "POST", rst, 0, "502"},
		{"FIN behind the request, GET", "GET", ack | fin, 2000 + 57, ""},
		{"FIN behind the request, POST", "POST", ack | fin, 2000 + 58, "502"},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newRig(t, oneServerTwice, keepIdle)
			g.iss = []packet.Seq{1999, 7999}
			seq, a := g.open(c1, 100, 9000)
			req := c.method + " / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
			first := g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: req})
			srv := s1
			if strings.HasPrefix(first[0], "S2") {
				srv = s2
			}
			g.server(srv, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
			s := seg{fl: c.fl, seq: 500, ack: c.ack}
			if c.ack > 2000 {
				s.ack = 2000 + packet.Seq(len(req))
			}
			out := g.server(srv, 10240, s)
			if c.status == "" {
				if len(out) == 0 || !strings.Contains(out[len(out)-1], "SYN:7999") {
					t.Fatalf("not redispatched: %q", out)
				}
				return
			}
			if len(out) == 0 || !strings.Contains(g.payload(len(out)-1), "HTTP/1.1 "+c.status) {
				t.Fatalf("no %s: %q", c.status, out)
			}
		})
	}
}

func oneServerTwice(*farm.Spec) {}

// TestFramingRefused: what framing does not understand is refused with a clear
// answer and a close.
func TestFramingRefused(t *testing.T) {
	for _, c := range []struct{ request, status string }{
		{"GET / HTTP/2.0\r\nHost: a\r\n\r\n", "505"},
		{"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", "501"},
		{"GET / HTTP/1.1\r\n\r\n", "400"},
		{"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", "400"},
		{"GET / HTTP/1.1\nHost: a\n\n", "400"},
	} {
		g := newRig(t, oneServer)
		seq, a := g.open(c1, 100, 9000)
		out := g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: c.request})
		if len(out) != 1 || !strings.HasPrefix(out[0], "C1 RESP FIN:9001,") || !strings.HasPrefix(g.payload(0), "HTTP/1.1 "+c.status+" ") {
			t.Errorf("%q: %q %q", c.request, out, g.payload(0))
		}
		end := a + packet.Seq(len(g.payload(0))) + 1
		g.client(c1, seg{fl: ack | fin, seq: seq + packet.Seq(len(c.request)), ack: end})
		g.idle(0)
	}
}

// TestStaleFirstSegment: a duplicate of a first segment never runs a request
// again after its connection is closed.
func TestStaleFirstSegment(t *testing.T) {
	for _, tombs := range []bool{true, false} {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{1999}
		seq, a := g.open(c1, 100, 9000)
		first := seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)}
		g.client(c1, first)
		g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
		g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: resp(100)})
		g.client(c1, seg{fl: ack, seq: seq + 50, ack: a + 100})
		g.client(c1, seg{fl: fin | ack, seq: seq + 50, ack: a + 100})
		g.client(c1, seg{fl: ack, seq: seq + 51, ack: a + 101})
		if !tombs { // the negative control
			key := packet.Tuple{Src: ep(c1), Dst: ep(vip)}
			g.e.tombs.Remove(&key)
		}
		out := g.client(c1, first)
		ran := len(out) > 0 && strings.Contains(out[0], "GET")
		if ran == tombs {
			t.Errorf("tombstones %v: the duplicate leads to %q", tombs, out)
		}
	}
}

// TestStaleIncarnations: a port that is used again and again within the life of
// its cookies leaves a tombstone for each time. A late segment of any of the
// connections before neither runs its request again nor ends the present one.
func TestStaleIncarnations(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	var firsts []seg
	g.iss = []packet.Seq{1999}
	una, at := packet.Seq(2000), packet.Seq(500)
	for i := range packet.Seq(4) {
		seq, a := g.open(c1, 100+1_000_000*i, 9000+2_000_000*i)
		first := seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)}
		g.client(c1, first)
		if i == 0 {
			g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
		}
		una += 50
		for k, old := range firsts {
			for _, late := range []seg{old, {fl: ack, seq: old.seq, ack: old.ack}} {
				for _, line := range g.client(c1, late) {
					if !strings.Contains(line, "ACK") && !strings.Contains(line, "RST") || strings.HasPrefix(line, "S1") {
						t.Errorf("connection %d, a late segment of connection %d leads to %q", i, k, line)
					}
				}
			}
		}
		g.server(s1, 10240, seg{fl: ack | psh, seq: at, ack: una, data: resp(100)})
		at += 100
		if n := g.e.Count.Get(ReasonServed); n != uint64(i) {
			t.Fatalf("%d requests served before connection %d ended", n, i)
		}
		g.client(c1, seg{fl: ack, seq: seq + 50, ack: a + 100})
		g.client(c1, seg{fl: fin | ack, seq: seq + 50, ack: a + 100})
		g.client(c1, seg{fl: ack, seq: seq + 51, ack: a + 101})
		if n := g.e.Count.Get(ReasonServed); n != uint64(i)+1 {
			t.Fatalf("connection %d was not served", i)
		}
		firsts = append(firsts, first)
		for k, old := range firsts {
			for _, line := range g.client(c1, old) {
				if strings.Contains(line, "GET") {
					t.Errorf("after connection %d, the first segment of connection %d leads to %q", i, k, line)
				}
			}
		}
	}
	g.idle(1)
}

// TestLateFirstSegment: a connection that ended before its first segment
// arrived has left no tombstone. When that segment comes after all, while
// another connection uses the port, it does not take its place.
func TestLateFirstSegment(t *testing.T) {
	g := newRig(t, oneServer)
	g.iss = []packet.Seq{1999, 7999}
	old, oldAck := g.open(c1, 100, 9000)
	g.now += millisecond
	g.client(c1, seg{fl: rst | ack, seq: old + 50, ack: oldAck}) // behind what was lost
	g.now += millisecond
	seq, a := g.open(c1, 5_000_000, 70_000)
	g.now += millisecond
	g.expect("request", g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)}), "S1 SYN:1999,0(0)")
	g.now += millisecond
	for _, line := range g.client(c1, seg{fl: ack | psh, seq: old, ack: oldAck, data: get("/", 50)}) {
		if strings.HasPrefix(line, "S1") || strings.Contains(line, "RST") {
			t.Errorf("the late segment leads to %q", line)
		}
	}
	g.expect("dispatch", g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted}), "S1 ACK:2000,500(0)", "S1 GET:2000,500(50)")
	g.client(c1, seg{fl: rst, seq: seq + 50})
}

// TestBadChecksum: INV-6. Nothing happens on a segment that nobody verified.
func TestBadChecksum(t *testing.T) {
	g := newRig(t, oneServer)
	seq, a := g.open(c1, 100, 9000)
	g.expect("bad", g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50), bad: true}))
	if g.e.Usage().Clients != 0 || g.e.Count.Get(ReasonBadChecksum) != 1 {
		t.Error("a corrupted segment changed something")
	}
}

// TestHeldInPieces: a head may come in any pieces; the server gets it once.
func TestHeldInPieces(t *testing.T) {
	req := get("/sales/forecast.html", 80)
	for size := 1; size < len(req); size++ {
		g := newRig(t, oneServer)
		g.iss = []packet.Seq{1999}
		seq, a := g.open(c1, 100, 9000)
		for i := 0; i < len(req); i += size {
			part := req[i:min(i+size, len(req))]
			g.client(c1, seg{fl: ack | psh, seq: seq + packet.Seq(i), ack: a, data: part})
		}
		g.expect("request", g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted}),
			"S1 ACK:2000,500(0)", "S1 GET:2000,500(80)")
		if g.payload(1) != req {
			t.Fatalf("pieces of %d: the server gets %q", size, g.payload(1))
		}
	}
}

// TestNagleClient: a short segment that does not complete the head is
// acknowledged soon.
func TestNagleClient(t *testing.T) {
	g := newRig(t, oneServer)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: "GET / HTTP/1.1\r\n"})
	g.expect("soon", g.wait(30*millisecond))
	g.expect("now", g.wait(20*millisecond), "C1 ACK:9001,117(0)")
	// From here on the bytes are ours: lost on the way to the server, they
	// are sent again.
	g.client(c1, seg{fl: ack | psh, seq: seq + 16, ack: a, data: "Host: a\r\n\r\n"})
	g.expect("request", g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted}),
		"S1 ACK:2000,500(0)", "S1 GET:2000,500(27)")
	g.expect("lost", g.wait(400*millisecond), "S1 GET:2000,500(27)")
	g.expect("acknowledged", g.server(s1, 10240, seg{fl: ack, seq: 500, ack: 2027}), "C1 ACK:9001,128(0)")
}

// TestRefusedConnectTriesOther: a server that refuses is left for another.
func TestRefusedConnectTriesOther(t *testing.T) {
	g := newRig(t, keepIdle)
	g.iss = []packet.Seq{1999, 7999}
	seq, a := g.open(c1, 100, 9000)
	out := g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
	first, other := s1, "S2"
	if strings.HasPrefix(out[0], "S2") {
		first, other = s2, "S1"
	}
	g.expect("refused", g.server(first, 10240, seg{fl: rst | ack, seq: 0, ack: 2000}), other+" SYN:7999,0(0)")
}

// TestWaitingLine: a full pool makes requests wait in line, and a full line
// refuses them.
func TestWaitingLine(t *testing.T) {
	g := newRig(t, oneServer, keepIdle, func(s *farm.Spec) {
		s.Farms[0].Pool.MaxConnections = 1
		s.Farms[0].Pool.MaxWaiting = 1
	})
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	seq2, a2 := g.open(c2, 200, 8000)
	g.expect("waits", g.client(c2, seg{fl: ack | psh, seq: seq2, ack: a2, data: get("/", 60)}))
	c3 := ep(c2)
	c3.Port++
	seq3, a3 := g.open(c3.AddrPort(), 300, 7000)
	g.client(c3.AddrPort(), seg{fl: ack | psh, seq: seq3, ack: a3, data: get("/", 60)})
	if !strings.Contains(g.payload(0), "503") || !strings.Contains(g.payload(0), "Retry-After: 1") {
		t.Errorf("the third client gets %q", g.payload(0))
	}
	g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: resp(100)})
	g.expect("its turn", g.client(c1, seg{fl: ack, seq: seq + 50, ack: a + 100}),
		"S1 GET:2050,600(60)", "S1 ACK:2050,600(0)")
}

// TestSteadyTranslationAllocatesNothing: one packet of each direction in a
// running splice.
func TestSteadyTranslationAllocatesNothing(t *testing.T) {
	g := newRig(t, oneServer)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: "HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"})
	data := g.raw(s1, ep2(10240), seg{fl: ack, seq: 500 + 48, ack: 2050, data: strings.Repeat("x", 1000)})
	acks := g.raw(c1, vip, seg{fl: ack, seq: seq + 50, ack: a + 48 + 1000})
	buf := make([]byte, 2048)
	var out Output
	var ev Event
	step := func(b []byte) {
		out.Reset()
		ev = Event{Kind: Packet, Data: buf[:copy(buf, b)]}
		g.e.Step(g.now, &ev, &out)
		if ev.Verdict != Rewrite {
			t.Fatal("not translated")
		}
	}
	for _, c := range []struct {
		name string
		b    []byte
	}{{"data to the client", data}, {"acknowledgment to the server", acks}} {
		if n := testing.AllocsPerRun(2000, func() { step(c.b) }); n != 0 {
			t.Errorf("%s: %v allocations", c.name, n)
		}
	}
}

// TestSurge: a burst opens no more than max_connecting connections at once;
// those that wait find released ones.
func TestSurge(t *testing.T) {
	g := newRig(t, oneServer, keepIdle, func(s *farm.Spec) { s.Farms[0].Pool.MaxConnecting = 2 })
	syns := 0
	var clients []netip.AddrPort
	for i := range 10 {
		c := netip.AddrPortFrom(c1.Addr(), uint16(50000+i))
		clients = append(clients, c)
		seq, a := g.open(c, packet.Seq(100*i+1), packet.Seq(9000+i))
		syns += len(g.client(c, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)}))
	}
	if syns != 2 {
		t.Errorf("%d connections opened at once, want 2", syns)
	}
	if u := g.e.Usage(); u.Waiting != 8 {
		t.Errorf("%d wait, want 8", u.Waiting)
	}
	_ = clients
}

// TestMinIdle: connections are opened ahead and kept (FIG 7 step 702).
func TestMinIdle(t *testing.T) {
	g := newRig(t, oneServer, keepIdle, func(s *farm.Spec) { s.Farms[0].Pool.MinIdle = 3 })
	g.iss = []packet.Seq{1000, 2000, 3000, 4000}
	g.now = 1_790_000_000 * second // a real time: the wheel must not count up to it
	g.wait(0)                      // the first step
	g.expect("at the start", g.wait(10*millisecond), "S1 SYN:1000,0(0)", "S1 SYN:2000,0(0)", "S1 SYN:3000,0(0)")
	for i := range packet.Seq(3) {
		g.server(s1, uint16(10240+i), seg{fl: syn | ack, seq: 499, ack: 1000*(i+1) + 1, opts: sackPermitted})
	}
	if u := g.e.Usage(); u.Idle != 3 {
		t.Fatalf("%d idle, want 3", u.Idle)
	}
	g.expect("quiet", g.wait(second))
	g.server(s1, 10240, seg{fl: rst | ack, seq: 500, ack: 1001})
	g.expect("replaced", g.wait(200*millisecond), "S1 SYN:4000,0(0)")
}

// TestRelieve: two shards share a server that takes one connection. The shard
// that has it idle gives it back when the other wants one.
func TestRelieve(t *testing.T) {
	one := func(s *farm.Spec) { s.Farms[0].Pool.MaxConnections = 1 }
	a := newRig(t, oneServer, keepIdle, one)
	a.e.opt.Shards = 2
	a.iss = []packet.Seq{1999}
	seq, ak := a.open(c1, 100, 9000)
	a.client(c1, seg{fl: ack | psh, seq: seq, ack: ak, data: get("/", 50)})
	a.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	a.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: resp(100)})
	a.client(c1, seg{fl: ack, seq: seq + 50, ack: ak + 100})

	b := newRig(t)
	b.e.opt.Shards, b.e.db, b.db, b.iss = 2, a.db, a.db, []packet.Seq{7999}
	seq2, ak2 := b.open(c2, 200, 8000)
	b.expect("waits", b.client(c2, seg{fl: ack | psh, seq: seq2, ack: ak2, data: get("/", 60)}))
	if !b.out.Relieve {
		t.Fatal("the shard does not say that it wants a connection")
	}
	relieve := func(g *rig) []string {
		g.out.Reset()
		g.e.Step(g.now, &Event{Kind: Relieve}, &g.out)
		return g.collect(nil)
	}
	a.expect("given back", relieve(a), "S1 FIN:2050,600(0)")
	a.server(s1, 10240, seg{fl: fin | ack, seq: 600, ack: 2051})
	if !a.out.Relieve {
		t.Fatal("the shard does not say that there is room")
	}
	b.expect("taken", relieve(b), "S1 SYN:7999,0(0)")
}

// TestRelieveOnce: two shards, both with a line, share a server whose only
// connection is busy. They do not wake each other for that; only their timers
// do, and what gets free is taken by the other one sooner or later.
func TestRelieveOnce(t *testing.T) {
	one := func(s *farm.Spec) { s.Farms[0].Pool.MaxConnections = 1 }
	a := newRig(t, oneServer, keepIdle, one)
	b := newRig(t)
	b.e.db, b.db = a.db, a.db
	a.iss, b.iss = []packet.Seq{1999}, []packet.Seq{7999}
	for _, g := range []*rig{a, b} {
		g.e.opt.Shards = 2
	}
	relieve := func(g *rig) []string {
		g.out.Reset()
		g.e.Step(g.now, &Event{Kind: Relieve}, &g.out)
		return g.collect(nil)
	}
	// A's first request has the connection, the others wait.
	seq, ak := a.open(c1, 100, 9000)
	a.client(c1, seg{fl: ack | psh, seq: seq, ack: ak, data: get("/", 50)})
	a.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	told := 0
	for i, g := range []*rig{a, b} {
		seq, ak := g.open(c2, packet.Seq(200+i), packet.Seq(8000+i))
		g.expect("waits", g.client(c2, seg{fl: ack | psh, seq: seq, ack: ak, data: get("/", 60)}))
		if g.out.Relieve {
			told++
		}
	}
	if told != 1 {
		t.Errorf("%d shards say that they want a connection, want one", told)
	}
	tries := b.e.Count.Get(ReasonWaited)
	for range 100 {
		for _, g := range []*rig{a, b} {
			if relieve(g); g.out.Relieve {
				t.Fatal("a shard that is asked asks back")
			}
		}
	}
	if n := b.e.Count.Get(ReasonWaited) - tries; n > 100 {
		t.Errorf("%d tries for 100 times asked", n)
	}
	b.out.Reset()
	b.now += lineEvery + tickNanos
	if b.e.Step(b.now, &Event{Kind: Tick}, &b.out); !b.out.Relieve {
		t.Error("a shard whose line stands never asks again")
	}
	// A's connection gets free: A takes it for its own line, or gives it back.
	a.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: resp(100)})
	a.client(c1, seg{fl: ack, seq: seq + 50, ack: ak + 100})
	if u := a.e.Usage(); u.Idle != 0 {
		t.Errorf("it lies idle while both wait: %+v", u)
	}
}

// TestNextRequestInPlace: the packet that carries a kept-alive client's next
// request is itself rewritten; no packet is crafted for it.
func TestNextRequestInPlace(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/a", 50)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: resp(200)})
	g.expect("second", g.client(c1, seg{fl: ack | psh, seq: seq + 50, ack: a + 200, data: get("/b", 60)}), "S1 GET:2050,700(60)")
	if g.out.Len() != 0 {
		t.Errorf("%d packets crafted", g.out.Len())
	}
}

// TestResetIsRepeated: a client that did not get our reset gets it when it
// says something.
func TestResetIsRepeated(t *testing.T) {
	g := newRig(t, oneServer)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: resp(1000)[:700]})
	g.server(s1, 10240, seg{fl: rst | ack, seq: 1200, ack: 2050})
	g.expect("challenge ACK", g.client(c1, seg{fl: ack, seq: seq + 50, ack: a + 300}), "C1 RST:9301,0(0)")
}
