// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/policies/snapshot"
)

// What a farm's configuration adds to framing: forwarding fields, the safety of
// routes, limits.

// trust has the proxies of a prefix in front.
func trust(prefixes ...string) func(*farm.Spec) {
	return func(s *farm.Spec) {
		for _, p := range prefixes {
			s.Farms[0].ForwardedTrust = append(s.Farms[0].ForwardedTrust, netip.MustParsePrefix(p))
		}
	}
}

// TestForwardedTrust: a forwarding field of the client's own is overwritten by
// a name of the same length, unless the client is a trusted proxy: then it
// stands before the engine's.
func TestForwardedTrust(t *testing.T) {
	xff := fwd{farm.ForwardedXFF, "X-Forwarded-For: 198.18.0.1\r\n"}
	rfc := fwd{farm.ForwardedRFC7239, "Forwarded: for=198.18.0.1\r\n"}
	const claims = "X-Forwarded-For: 10.0.0.1\r\nFORWARDED: for=10.0.0.2\r\nx_forwarded_for: 10.0.0.3\r\nX-Forwarded-Fort: y\r\n"
	const neutral = "Weir-Forwarded1: 10.0.0.1\r\nWeir-Fwdd: for=10.0.0.2\r\nWeir-Forwarded1: 10.0.0.3\r\nX-Forwarded-Fort: y\r\n"
	for _, c := range []struct {
		mode     fwd
		prefixes []string
		want     string
	}{
		{fwd{}, nil, claims},
		{xff, nil, neutral + xff.line},
		{rfc, nil, neutral + rfc.line},
		{xff, []string{"198.18.0.0/24"}, claims + xff.line},
		{rfc, []string{"2001:db8::/32", "198.18.0.1/32"}, claims + rfc.line},
		{xff, []string{"198.18.1.0/24", "0.0.0.0/32"}, neutral + xff.line},
	} {
		for _, body := range []string{"", "0123456789"} {
			for _, size := range []int{1, 7, 1400} {
				g := newRig(t, oneServer, keepIdle, c.mode.set, trust(c.prefixes...))
				k := newChat(g, c1, 100)
				head := "POST / HTTP/1.1\r\nHost: a\r\n" + claims + fmt.Sprintf("Content-Length: %d\r\n", len(body))
				want := strings.Replace(head, claims, strings.TrimSuffix(c.want, c.mode.line), 1) + c.mode.line
				k.cut(head+"\r\n"+body, size)
				v := k.server(0)
				k.want(fmt.Sprint(c.prefixes), string(v.got), want+"\r\n"+body)
				k.reply(v, okEmpty)
				if k.pooled() != 1 {
					t.Error("not pooled")
				}
				// The same over the idle connection, in one packet.
				v.got = nil
				k.send(head + "\r\n" + body)
				k.want(fmt.Sprint(c.prefixes), string(v.got), want+"\r\n"+body)
			}
		}
	}
	// More fields than can be neutralised are refused, but for a proxy.
	many := "GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("Forwarded: for=x\r\n", 5) + "\r\n"
	for _, trusted := range []bool{false, true} {
		g := newRig(t, oneServer, keepIdle, xff.set)
		if trusted {
			g.db.Farms[0].ForwardedTrust = []netip.Prefix{netip.MustParsePrefix("198.18.0.0/15")}
		}
		k := newChat(g, c1, 100)
		k.send(many)
		if got := strings.HasPrefix(string(k.got), "HTTP/1.1 400 "); got == trusted || k.fin {
			t.Errorf("trusted %v: refused %v, closed %v", trusted, got, k.fin)
		}
	}
}

// TestManyForwardingFields: each of several forwarding fields of a client's own
// is neutralised, in whatever spelling, order and distance, up to the number
// for which there is room; one more, and the request is refused and nothing of
// it reaches a server. The control is a trusted proxy, whose fields all pass.
func TestManyForwardingFields(t *testing.T) {
	rnd := seeded(t)
	xff := fwd{farm.ForwardedXFF, "X-Forwarded-For: 198.18.0.1\r\n"}
	names := []string{"X-Forwarded-For", "x-forwarded-for", "X_FORWARDED_FOR", "x_Forwarded-for", "Forwarded", "FORWARDED"}
	for n := range 8 {
		for range 20 {
			var claims, neutral strings.Builder
			for range n {
				name, value := names[rnd.IntN(len(names))], fmt.Sprintf("10.0.0.%d", rnd.IntN(250))
				to := "Weir-Fwdd"
				if len(name) > len(to) {
					to = "Weir-Forwarded1"
				}
				filler := strings.Repeat(fmt.Sprintf("X-%d: y\r\n", rnd.IntN(9)), rnd.IntN(3))
				fmt.Fprintf(&claims, "%s:%s\r\n%s", name, value, filler)
				fmt.Fprintf(&neutral, "%s:%s\r\n%s", to, value, filler)
			}
			head := "GET / HTTP/1.1\r\nHost: a\r\n"
			for _, trusted := range []bool{false, true} {
				prefixes := []string{"192.0.2.0/24"}
				if trusted {
					prefixes = []string{"198.18.0.0/15"}
				}
				g := newRigOf(t, 16, oneServer, keepIdle, xff.set, trust(prefixes...))
				k := newChat(g, c1, 100)
				k.cut(head+claims.String()+"\r\n", 1+rnd.IntN(200))
				if n > len(http1.RequestHead{}.ForwardedNames) && !trusted {
					if !strings.HasPrefix(string(k.got), "HTTP/1.1 400 ") || len(k.order) != 0 || k.count(ReasonForwardedFields) != 1 {
						t.Fatalf("%d fields: %q, %d server connections", n, k.got, len(k.order))
					}
					continue
				}
				want := head + neutral.String() + xff.line + "\r\n"
				if trusted {
					want = head + claims.String() + xff.line + "\r\n"
				}
				k.want(fmt.Sprintf("%d fields, trusted %v", n, trusted), string(k.server(0).got), want)
				k.reply(k.server(0), okEmpty)
				if k.pooled() != 1 {
					t.Fatalf("%d fields, trusted %v: not pooled", n, trusted)
				}
			}
		}
	}
}

// TestOverlayUnderTCP: what is inserted and overwritten stays the same, and at
// the same numbers, under lost, repeated and differently cut segments and
// under selective acknowledgments, for every place of the cut.
func TestOverlayUnderTCP(t *testing.T) {
	mode := fwd{farm.ForwardedXFF, "X-Forwarded-For: 198.18.0.1\r\n"}
	head := "POST /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\nForwarded: for=me\r\nContent-Length: 60\r\n"
	body := strings.Repeat("0123456789", 6)
	sent := strings.Replace(strings.Replace(head, "Connection", neutral, 1), "Forwarded:", neutralForwarded+":", 1) + mode.line + "\r\n" + body
	all := head + "\r\n" + body
	added := packet.Seq(len(mode.line))
	for cut := 1; cut < len(all); cut += 3 {
		for _, lost := range []bool{false, true} {
			g := newRig(t, oneServer, keepIdle, mode.set)
			k := newChat(g, c1, 100)
			k.deaf = true
			base := k.seq
			if lost {
				k.at(cut, all[cut:], ack|psh) // out of order first
			}
			k.at(0, all[:cut], ack|psh)
			if !lost {
				k.at(cut, all[cut:], ack|psh)
			}
			v := k.server(0)
			k.want("first", string(v.got), sent)
			// The server lost everything, and the client repeats it in other
			// pieces: the server gets the same bytes at the same places.
			v.got, v.ack = nil, v.ack.Sub(packet.Size(len(sent)))
			start := v.ack
			for i := 0; i < len(all); i += 11 {
				k.at(i, all[i:min(i+11, len(all))], ack|psh)
			}
			k.want("again", string(v.got), sent)
			// Every acknowledgment and every SACK edge of the server's, as the
			// client sees it.
			for off := range len(sent) + 1 {
				k.inject(s1, ep2(v.port), seg{fl: ack, seq: v.seq, ack: start.Add(packet.Size(off)), win: 60000,
					opts: packet.AppendSACKOption(nil, packet.SACKBlock{Left: start.Add(packet.Size(off)), Right: start.Add(packet.Size(len(sent)))})})
				ins := len(head)
				want := base.Add(packet.Size(off))
				if off > ins {
					want = base.Add(packet.Size(max(off-int(added), ins)))
				}
				if k.acked != want {
					t.Fatalf("cut %d: acknowledgment of %d bytes is %d bytes to the client, want %d", cut, off, k.acked-base, want-base)
				}
				p, _ := packet.ParseTCP(k.last)
				if at, n := p.SACK(); n == 1 {
					if b := p.SACKBlock(at, 0); b.Left != want || b.Right != base.Add(packet.Size(len(all))) {
						t.Fatalf("cut %d: SACK block %d..%d at %d", cut, b.Left-base, b.Right-base, off)
					}
				} else if off < len(sent) {
					t.Fatalf("cut %d: no SACK block at %d", cut, off)
				}
				if off == len(sent)/2 {
					// What is repeated now begins in the middle.
					k.at(cut, all[cut:], ack|psh)
				}
			}
			k.deaf = false
			v.ack = start.Add(packet.Size(len(sent)))
			k.seq = base.Add(packet.Size(len(all)))
			k.reply(v, okEmpty)
			if !k.fin || k.pooled() != 1 || string(k.got) != okEmpty {
				t.Fatalf("cut %d: closed %v, pooled %d, got %q", cut, k.fin, k.pooled(), k.got)
			}
		}
	}
}

// TestUnsafePaths: paths that a server may read as another one than the routes.
func TestUnsafePaths(t *testing.T) {
	for _, p := range []string{
		"/./", "/../", "/a/./b", "/a/../b", "/..", "/.", "/a/..", "/a/.", "//", "/a//b", "//a", "/a//", "/%2e", "/%2E%2e/", "/a%2fb", "/a%2Fb",
		"/a%5cb", "/a%5Cb", "/a\\b", "\\", "/a%00", "/%00/", "/..;/a", "/.;x=y/a", "/a/..;", "/%2e%2e%2f",
	} {
		if !unsafePath([]byte(p)) {
			t.Errorf("%s is taken for safe", p)
		}
	}
	for _, p := range []string{
		"", "*", "/", "/a", "/a/", "/.well-known/x", "/..a/", "/...", "/.../x", "/a.b/c..d", "/a;b/", "/%20", "/%2", "/%", "/%5", "/%0", "/%25", "/a%2d", "/%5b%5d", "/%01",
		"/a/...;/", "/;../x",
	} {
		if unsafePath([]byte(p)) {
			t.Errorf("%s is taken for unsafe", p)
		}
	}
}

// TestRouteSafety: such a path is refused where the farm has routes, or as the
// farm says; without the defence it reaches a server that the routes keep it
// from (the negative control).
func TestRouteSafety(t *testing.T) {
	routes := func(s *farm.Spec) {
		s.Farms[0].Policies = []snapshot.Policy{{Name: "path", Snapshot: &snapshot.Snapshot{
			Plugin: "path", Generation: 1,
			Routes: &snapshot.Routes{Routes: []snapshot.Route{
				{Prefix: "/admin/", Target: snapshot.Target{Reject: 403}},
				{Prefix: "/", Target: snapshot.Target{Servers: []string{"s1"}}},
			}},
		}}}
	}
	for _, c := range []struct {
		routed bool
		safety farm.RouteSafety
		reject bool
	}{
		{true, farm.RouteSafetyAuto, true},
		{true, farm.RouteSafetyReject, true},
		{true, farm.RouteSafetyPass, false},
		{false, farm.RouteSafetyAuto, false},
		{false, farm.RouteSafetyReject, true},
	} {
		for _, path := range []string{"/x/../admin/users", "//admin/users", "/%2e/admin/", "/admin%2fusers", "/x\\..\\admin", "/x#/admin/", "http://a/./admin/"} {
			change := []func(*farm.Spec){oneServer, keepIdle, func(s *farm.Spec) { s.Farms[0].RouteSafety = c.safety }}
			if c.routed {
				change = append(change, routes)
			}
			g := newRig(t, change...)
			k := newChat(g, c1, 100)
			k.send("GET " + path + " HTTP/1.1\r\nHost: a\r\n\r\n")
			refused := strings.HasPrefix(string(k.got), "HTTP/1.1 400 ")
			if refused != c.reject || (len(k.order) == 0) != c.reject || (k.count(ReasonRouteUnsafe) == 1) != c.reject {
				t.Errorf("routes %v, safety %d, %s: refused %v, %d connections", c.routed, c.safety, path, refused, len(k.order))
			}
			if c.reject && k.fin {
				t.Errorf("%s: the connection was closed though its framing is certain", path)
			}
		}
	}
}

// TestPendingRoutesAreRoutes: a farm whose routes have not come yet is as
// careful as one that has them.
func TestPendingRoutesAreRoutes(t *testing.T) {
	g := newRig(t, oneServer, func(s *farm.Spec) {
		s.Farms[0].Policies = []snapshot.Policy{{Name: "path", RoutePolicy: true}}
	})
	k := newChat(g, c1, 100)
	k.send("GET /../ HTTP/1.1\r\nHost: a\r\n\r\n")
	k.send("GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
	if !strings.HasPrefix(string(k.got), "HTTP/1.1 400 ") || !strings.Contains(string(k.got), "HTTP/1.1 503 ") || !strings.Contains(string(k.got), "Retry-After: 1") {
		t.Errorf("got %q", k.got)
	}
}

// TestLimits: each limit of a farm, at its value and one beyond.
func TestLimits(t *testing.T) {
	const head = "GET / HTTP/1.1\r\nHost: a\r\n"
	chunked := func(line, trailers string) string {
		return "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + line + "\r\nhello\r\n0\r\n" + trailers + "\r\n"
	}
	for _, c := range []struct {
		limits     farm.Limits
		just, over string
		status     int
		why        http1.Reason
	}{
		{farm.Limits{Head: 200}, head + "X: " + strings.Repeat("x", 200-len(head)-7) + "\r\n\r\n",
			head + "X: " + strings.Repeat("x", 200-len(head)-6) + "\r\n\r\n", 431, http1.ReasonHeadTooLarge},
		{farm.Limits{Fields: 4}, head + "A: b\r\nA: b\r\nA: b\r\n\r\n", head + "A: b\r\nA: b\r\nA: b\r\nA: b\r\n\r\n", 431, http1.ReasonTooManyFields},
		{farm.Limits{Target: 20}, "GET /" + strings.Repeat("x", 19) + " HTTP/1.1\r\nHost: a\r\n\r\n",
			"GET /" + strings.Repeat("x", 20) + " HTTP/1.1\r\nHost: a\r\n\r\n", 414, http1.ReasonTargetTooLong},
		{farm.Limits{ChunkExt: 10}, chunked("5;"+strings.Repeat("x", 9), ""), chunked("5;"+strings.Repeat("x", 10), ""), 400, http1.ReasonChunkExtensionTooLong},
		{farm.Limits{Trailers: 30}, chunked("5", "X: "+strings.Repeat("x", 25)+"\r\n"), chunked("5", "X: "+strings.Repeat("x", 26)+"\r\n"), 400, http1.ReasonTrailersTooLarge},
	} {
		for _, limited := range []bool{true, false} {
			for _, over := range []bool{false, true} {
				for _, size := range []int{1, 1000} {
					g := newRig(t, oneServer, keepIdle, func(s *farm.Spec) {
						if limited {
							s.Farms[0].Limits = c.limits
						}
					})
					text := c.just
					if over {
						text = c.over
					}
					k := newChat(g, c1, 100)
					k.cut(text, size)
					refusedIt := strings.HasPrefix(string(k.got), fmt.Sprintf("HTTP/1.1 %d ", c.status))
					if refusedIt != (over && limited) || (k.count(refused(c.why)) == 1) != refusedIt {
						t.Errorf("%+v, limited %v, beyond it %v, segments of %d: got %q", c.limits, limited, over, size, k.got)
					}
					if !refusedIt && string(k.server(0).got) != text {
						t.Errorf("%+v: the server got %d of %d bytes", c.limits, len(k.server(0).got), len(text))
					}
				}
			}
		}
	}
}

// TestPolicyAnswers: any status and redirection that a policy names, with its
// Retry-After, without a body for HEAD, and without an end of the connection.
func TestPolicyAnswers(t *testing.T) {
	for _, c := range []struct {
		target snapshot.Target
		want   []string
	}{
		{snapshot.Target{Reject: 403}, []string{"HTTP/1.1 403 Forbidden\r\n"}},
		{snapshot.Target{Reject: 429, RetryAfter: 7}, []string{"HTTP/1.1 429 Too Many Requests\r\n", "\r\nRetry-After: 7\r\n"}},
		{snapshot.Target{Reject: 599}, []string{"HTTP/1.1 599 Refused\r\n"}},
		{snapshot.Target{Reject: 503, RetryAfter: 30}, []string{"HTTP/1.1 503 ", "\r\nRetry-After: 30\r\n"}},
		{snapshot.Target{Redirect: 302, Location: "https://other/"}, []string{"HTTP/1.1 302 Found\r\n", "\r\nLocation: https://other/\r\n"}},
		{snapshot.Target{Redirect: 308, Location: "/there"}, []string{"HTTP/1.1 308 Permanent Redirect\r\n", "\r\nLocation: /there\r\n"}},
	} {
		for _, method := range []string{"GET", "HEAD", "POST"} {
			g := newRig(t, oneServer, func(s *farm.Spec) {
				s.Farms[0].Policies = []snapshot.Policy{{Name: "path", Snapshot: &snapshot.Snapshot{
					Plugin: "path", Generation: 1, Routes: &snapshot.Routes{Routes: []snapshot.Route{{Prefix: "/", Target: c.target}}},
				}}}
			})
			k := newChat(g, c1, 100)
			for range 3 {
				k.got = nil
				k.send(method + " / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
				for _, w := range c.want {
					if !strings.Contains(string(k.got), w) {
						t.Errorf("%s: no %q in %q", method, w, k.got)
					}
				}
				if _, body, _ := strings.Cut(string(k.got), "\r\n\r\n"); (body == "") != (method == "HEAD") || k.fin {
					t.Errorf("%s: body %q, closed %v", method, body, k.fin)
				}
			}
		}
	}
}
