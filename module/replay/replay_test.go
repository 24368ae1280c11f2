// SPDX-License-Identifier: Apache-2.0

package replay

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/module/control/capture"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/policies/snapshot"
)

var (
	vip    = netip.MustParseAddrPort("203.0.113.10:80")
	snip   = netip.MustParseAddr("198.51.100.1")
	one    = netip.MustParseAddrPort("198.18.0.11:40001")
	two    = netip.MustParseAddrPort("198.18.0.12:40002")
	others = netip.MustParseAddrPort("198.18.0.99:5")
)

// A tape is a capture in the making, as a sniffer on the clients' side sees it.
type tape struct {
	file bytes.Buffer
	w    *capture.Writer
	at   time.Time
}

func newTape(t *testing.T) *tape {
	t.Helper()
	p := &tape{at: time.Unix(1_700_000_000, 0)}
	var err error
	if p.w, err = capture.NewWriter(&p.file, "test", "lan"); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *tape) put(t *testing.T, src, dst netip.AddrPort, seq, ack packet.Seq, fl packet.Flags, data string) {
	t.Helper()
	var options []byte
	if fl.Has(packet.SYN) {
		options = packet.AppendSYNOptions(nil, packet.SYNOptions{MSS: 1460, WindowScale: 7, SACKPermitted: true})
	}
	b := packet.AppendSegment(nil, &packet.Segment{
		Src: packet.EndpointFrom(src), Dst: packet.EndpointFrom(dst), Seq: seq, Ack: ack, Flags: fl, Window: 2000, Options: options,
	}, []byte(data))
	p.at = p.at.Add(time.Millisecond)
	if err := p.w.Write(&capture.Packet{Time: p.at, Data: b}); err != nil {
		t.Fatal(err)
	}
}

// visit records a client that asks for these paths on one connection.
func (p *tape) visit(t *testing.T, client netip.AddrPort, isn, iss packet.Seq, paths ...string) {
	t.Helper()
	p.put(t, client, vip, isn, 0, packet.SYN, "")
	p.put(t, vip, client, iss, isn+1, packet.SYN|packet.ACK, "")
	seq, ack := isn+1, iss+1
	p.put(t, client, vip, seq, ack, packet.ACK, "")
	for _, path := range paths {
		req := "GET " + path + " HTTP/1.1\r\nHost: shop.example\r\n\r\n"
		p.put(t, client, vip, seq, ack, packet.ACK|packet.PSH, req)
		seq = seq.Add(packet.Size(len(req)))
		body := "this is " + path
		resp := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		// In two segments, as a capture has them.
		half := len(resp) / 2
		p.put(t, vip, client, ack, seq, packet.ACK, resp[:half])
		p.put(t, vip, client, ack.Add(packet.Size(half)), seq, packet.ACK|packet.PSH, resp[half:])
		ack = ack.Add(packet.Size(len(resp)))
		p.put(t, client, vip, seq, ack, packet.ACK, "")
	}
	p.put(t, client, vip, seq, ack, packet.ACK|packet.FIN, "")
	p.put(t, vip, client, ack, seq+1, packet.ACK|packet.FIN, "")
	p.put(t, client, vip, seq+1, ack+1, packet.ACK, "")
}

func database(t *testing.T, policies ...snapshot.Policy) *farm.DB {
	t.Helper()
	second := int64(time.Second)
	db, err := farm.Build(nil, farm.Spec{SNIPs: []netip.Addr{snip}, Farms: []farm.FarmSpec{{
		Name: "web", VIPs: []netip.AddrPort{vip}, Policies: policies,
		Servers: []farm.ServerSpec{
			{Name: "s1", Endpoint: netip.MustParseAddrPort("198.51.100.11:80")},
			{Name: "s2", Endpoint: netip.MustParseAddrPort("198.51.100.12:80")},
		},
		Pool:     farm.PoolLimits{MaxIdle: 64, MaxConnections: 512, IdleTimeout: 30 * second, MaxWaiting: 16, WaitTimeout: second, DrainLimit: 1 << 20, DrainTimeout: second},
		Timeouts: farm.Timeouts{Connect: 5 * second, Head: 15 * second, Idle: 60 * second, Response: 60 * second},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func routes(r ...snapshot.Route) snapshot.Policy {
	return snapshot.Policy{Name: "path", RoutePolicy: true, Snapshot: &snapshot.Snapshot{Plugin: "path", Generation: 1, Routes: &snapshot.Routes{Routes: r}}}
}

func run(t *testing.T, p *tape, db *farm.DB) ([]Decision, *Summary) {
	t.Helper()
	r, err := capture.NewReader(bytes.NewReader(p.file.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	var got []Decision
	sum, err := Run(r, Options{DB: db, SNIPs: []netip.Addr{snip}, PortFirst: 10240, PortLast: 10400}, func(d *Decision) error {
		got = append(got, *d)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got, sum
}

func shop(t *testing.T) *tape {
	t.Helper()
	p := newTape(t)
	p.visit(t, one, 1000, 5000, "/sales/a", "/products/b", "/sales/c")
	p.put(t, others, netip.MustParseAddrPort("192.0.2.1:443"), 1, 1, packet.ACK, "foreign")
	p.visit(t, two, 4_294_967_290, 4_294_967_200, "/sales/d") // numbers that wrap
	return p
}

// TestRoutes: every request goes where the routes say, and connections are used
// again.
func TestRoutes(t *testing.T) {
	to := func(prefix, server string) snapshot.Route {
		return snapshot.Route{Prefix: prefix, Target: snapshot.Target{Servers: []string{server}}}
	}
	got, sum := run(t, shop(t), database(t, routes(to("/sales/", "s1"), to("/products/", "s2"))))
	want := []string{"GET /sales/a s1 false", "GET /products/b s2 false", "GET /sales/c s1 true", "GET /sales/d s1 true"}
	for i, d := range got {
		if s := fmt.Sprintf("%s %s %t", d.Request, d.Server, d.Reused); i >= len(want) || s != want[i] {
			t.Errorf("decision %d: %s (%+v)", i, s, d)
		}
		if len(d.Why) == 0 || !strings.Contains(strings.Join(d.Why, " "), "path: ") {
			t.Errorf("decision %d does not say why: %q", i, d.Why)
		}
	}
	if len(got) != len(want) || sum.Requests != 4 || sum.Clients != 2 || sum.Others != 1 || sum.Unplayed != 0 || sum.Midway != 0 ||
		sum.Servers["web/s1"] != 3 || sum.Servers["web/s2"] != 1 || sum.Reasons["served"] != 4 {
		t.Errorf("%d decisions, %+v", len(got), sum)
	}
	// Nothing was wrong for the engine in what was played.
	for _, bad := range []string{"ack-beyond", "bad-cookie", "unknown-client", "unknown-server", "beyond-frontier", "bad-response", "ack-causality"} {
		if sum.Reasons[bad] != 0 {
			t.Errorf("%s: %d", bad, sum.Reasons[bad])
		}
	}
}

// TestDrawIsNotTold: where a server is drawn, the words for why do not speak of
// a draw of their own, which may have another outcome than the decision.
func TestDrawIsNotTold(t *testing.T) {
	got, _ := run(t, shop(t), database(t, routes(snapshot.Route{Prefix: "/", Target: snapshot.Target{Servers: []string{"s1", "s2"}}})))
	if len(got) != 4 {
		t.Fatalf("%d decisions", len(got))
	}
	for _, d := range got {
		why := strings.Join(d.Why, "; ")
		if !strings.Contains(why, "servers s1 s2") || strings.Contains(why, "drawn") || strings.Contains(why, "picked") {
			t.Errorf("%s: decision %s, why: %s", d.Request, d.Server, why)
		}
	}
}

// TestWhatIf: another configuration answers some of the requests itself.
func TestWhatIf(t *testing.T) {
	got, sum := run(t, shop(t), database(t, routes(
		snapshot.Route{Prefix: "/sales/", Target: snapshot.Target{Servers: []string{"s2"}}},
		snapshot.Route{Prefix: "/products/", Target: snapshot.Target{Reject: 403}},
	)))
	if len(got) < 2 || got[0].Server != "s2" || got[1].Answer != 403 || got[1].Server != "" {
		t.Errorf("%+v", got)
	}
	if sum.Answers["403"] != 1 || sum.Unplayed == 0 {
		t.Errorf("%+v", sum)
	}
}

// TestMidway: a capture that begins in the middle is played from the next
// request on.
func TestMidway(t *testing.T) {
	p := newTape(t)
	req := "GET /sales/x HTTP/1.1\r\nHost: h\r\n\r\n"
	resp := "HTTP/1.1 204 No Content\r\n\r\n"
	p.put(t, one, vip, 700, 900, packet.ACK|packet.PSH, req)
	p.put(t, vip, one, 900, packet.Seq(700+len(req)), packet.ACK, resp)
	p.put(t, one, vip, packet.Seq(700+len(req)), packet.Seq(900+len(resp)), packet.ACK, "")
	got, sum := run(t, p, database(t))
	if len(got) != 1 || got[0].Server == "" || sum.Midway != 1 || sum.Reasons["served"] != 1 {
		t.Errorf("%+v, %+v", got, sum)
	}
}

// TestDeterminism: two runs say the same.
func TestDeterminism(t *testing.T) {
	a, sumA := run(t, shop(t), database(t))
	b, sumB := run(t, shop(t), database(t))
	x, errX := json.Marshal([]any{a, sumA})
	y, errY := json.Marshal([]any{b, sumB})
	if errX != nil || errY != nil || !bytes.Equal(x, y) {
		t.Errorf("%s\n%s", x, y)
	}
}

// TestPrint writes both forms.
func TestPrint(t *testing.T) {
	for _, asJSON := range []bool{false, true} {
		r, err := capture.NewReader(bytes.NewReader(shop(t).file.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := Print(r, Options{DB: database(t), SNIPs: []netip.Addr{snip}, PortFirst: 10240, PortLast: 10400}, &out, asJSON); err != nil {
			t.Fatal(err)
		}
		if !asJSON {
			for _, want := range []string{"GET /products/b", "198.18.0.11:40001", "4 requests on 2 connections, 16 packets of clients\n", "1 packet left out", "(reused)"} {
				if !strings.Contains(out.String(), want) {
					t.Errorf("no %q:\n%s", want, out.String())
				}
			}
			continue
		}
		if n := strings.Count(out.String(), "\n"); n != 5 {
			t.Errorf("%d lines:\n%s", n, out.String())
		}
		for line := range strings.Lines(out.String()) {
			if !json.Valid([]byte(line)) {
				t.Errorf("not JSON: %s", line)
			}
		}
	}
}
