// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
	"github.com/weirgate/weir/policies/snapshot"
)

// Upgrades, and authentication that belongs to a connection: what makes a
// server connection one client's own.

const (
	upgrade  = "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
	switched = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
)

// TestUpgrade: nothing of the new protocol passes before the 101; behind it
// both directions pass as they are, and so do both FINs. The connection is
// never pooled, and nothing is left of it.
func TestUpgrade(t *testing.T) {
	for _, mode := range []fwd{{}, {farm.ForwardedRFC7239, "Forwarded: for=198.18.0.1\r\n"}} {
		for _, early := range []string{"", "early", strings.Repeat("e", 3000), "GET /other HTTP/1.1\r\nHost: a\r\n\r\n"} {
			for _, first := range []string{"client", "server"} {
				g := newRig(t, oneServer, keepIdle, mode.set)
				k := newChat(g, c1, 100)
				sent := strings.TrimSuffix(upgrade, "\r\n") + mode.line + "\r\n"
				k.send(upgrade + early)
				v := k.server(0)
				k.want("before the 101", string(v.got), sent)
				k.wait(3 * second)
				k.want("three seconds later", string(v.got), sent)
				k.fromServer(v, seg{fl: ack | psh, data: switched + "hello"})
				k.want("with the 101", string(v.got), sent+early)
				want, got := sent+early, switched+"hello"
				for i := range 50 {
					up, down := fmt.Sprintf("up %d HTTP/1.1 200 OK\r\n\r\n", i), fmt.Sprintf("0\r\n\r\ndown %d", i)
					k.send(up)
					k.reply(v, down)
					want, got = want+up, got+down
				}
				k.want("up", string(v.got), want)
				k.want("down", string(k.got), got)
				if first == "client" {
					k.close()
					k.reply(v, "last") // half-closed: the other way is open
					k.hangUp(v)
					k.want("down", string(k.got), got+"last")
				} else {
					k.hangUp(v)
					k.send("last")
					k.close()
					k.want("up", string(v.got), want+"last")
				}
				if !v.fin || !k.fin || v.rst || k.rst {
					t.Errorf("%s closes first: server closed %v, reset %v; client closed %v, reset %v", first, v.fin, v.rst, k.fin, k.rst)
				}
				if u := g.e.Usage(); u.Clients != 0 || u.Servers != 0 || u.Held != 0 || u.Idle != 0 {
					t.Errorf("%s closes first: left are %+v", first, u)
				}
			}
		}
	}
}

// TestTunnelReorder: in a tunnel segments pass in any order, and a lost FIN is
// repaired by its sender.
func TestTunnelReorder(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	k := newChat(g, c1, 100)
	k.send(upgrade)
	v := k.server(0)
	k.reply(v, switched)
	n := len(v.got)
	k.at(5, "world", ack|psh)
	k.at(0, "hello", ack|psh)
	k.at(5, "world", ack|psh)
	k.want("up", string(v.got[n:]), "helloworld")
	k.seq += 10
	k.at(0, "", ack|fin)
	k.at(0, "", ack|fin)
	k.seq++
	k.hangUp(v)
	if !v.fin || !k.fin || k.rst || v.rst {
		t.Error("not closed in good order")
	}
	// Nothing follows a FIN.
	g = newRig(t, oneServer, keepIdle)
	k = newChat(g, c1, 100)
	k.send(upgrade)
	v = k.server(0)
	k.reply(v, switched)
	k.close()
	n = len(v.got)
	k.send("behind the FIN")
	k.want("up", string(v.got[n:]), "")
}

// TestTunnelAndFIN: a server that agrees and closes in one segment.
func TestTunnelAndFIN(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	k := newChat(g, c1, 100)
	k.send(upgrade)
	v := k.server(0)
	k.fromServer(v, seg{fl: ack | psh | fin, data: switched + "bye"})
	k.want("down", string(k.got), switched+"bye")
	k.send("too late")
	k.close()
	if !k.fin || !v.fin || !strings.HasSuffix(string(v.got), "too late") || k.rst || v.rst {
		t.Errorf("client closed %v, server closed %v and got %q", k.fin, v.fin, v.got)
	}
	if u := g.e.Usage(); u.Clients != 0 || u.Servers != 0 {
		t.Errorf("left are %+v", u)
	}
}

// TestTunnelEnds: a reset passes, silence ends a tunnel only after its own,
// long time.
func TestTunnelEnds(t *testing.T) {
	start := func() (*chat, *chatServer) {
		g := newRig(t, oneServer, keepIdle, func(s *farm.Spec) { s.Farms[0].Timeouts.Tunnel = 600 * second })
		k := newChat(g, c1, 100)
		k.send(upgrade)
		k.reply(k.server(0), switched)
		return k, k.server(0)
	}
	k, v := start()
	k.raw(seg{fl: rst | ack})
	if !v.rst {
		t.Error("the client's reset did not pass")
	}
	k, v = start()
	k.fromServer(v, seg{fl: rst | ack})
	if !k.rst {
		t.Error("the server's reset did not pass")
	}
	k, v = start()
	k.wait(500 * second)
	k.send("ping")
	k.wait(590 * second)
	if k.rst || v.rst {
		t.Error("silence ended the tunnel before its time")
	}
	k.wait(20 * second)
	if !k.rst || !v.rst || k.count(ReasonTunnelSilent) == 0 {
		t.Errorf("silence did not end the tunnel: client reset %v, server reset %v, counted %d", k.rst, v.rst, k.count(ReasonTunnelSilent))
	}
	if k.g.e.Usage().Servers != 0 {
		t.Error("the server connection is still there")
	}
}

// TestUpgradeDeclined: an answer other than 101 is an answer like any other:
// nothing of the new protocol passes, and both sides end.
func TestUpgradeDeclined(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	k := newChat(g, c1, 100)
	k.send(upgrade + "secret words of a new protocol")
	v := k.server(0)
	k.reply(v, okEmpty)
	k.want("the server", string(v.got), upgrade)
	if !k.fin || k.pooled() != 0 || string(k.got) != okEmpty {
		t.Errorf("closed %v, pooled %d, got %q", k.fin, k.pooled(), k.got)
	}
}

// TestUnaskedSwitch: a 101 that nobody asked for opens nothing: the next
// request does not follow the present one to its server. The control has asked.
func TestUnaskedSwitch(t *testing.T) {
	for _, asked := range []bool{false, true} {
		g := newRig(t, figure8, keepIdle)
		k := newChat(g, c1, 100)
		first := "GET /sales/ HTTP/1.1\r\nHost: a\r\n\r\n"
		if asked {
			first = strings.Replace(upgrade, "/ws", "/sales/", 1)
		}
		k.send(first + "GET /products/ HTTP/1.1\r\nHost: a\r\n\r\n")
		v := k.server(0)
		k.reply(v, switched)
		if passed := strings.Contains(string(v.got), "/products/"); passed != asked {
			t.Errorf("asked %v: the next request followed %v", asked, passed)
		}
		if !asked && (!v.rst || !strings.HasPrefix(string(k.got), "HTTP/1.1 502 ")) {
			t.Errorf("the server connection lives, the client got %q", k.got)
		}
	}
	// Nor does one before the whole request was at the server.
	g := newRig(t, oneServer, keepIdle)
	k := newChat(g, c1, 100)
	k.send(http("POST /ws HTTP/1.1\nHost: a\nConnection: Upgrade\nUpgrade: x\nContent-Length: 10\n\n01234"))
	v := k.server(0)
	k.reply(v, switched)
	if !v.rst || k.count(ReasonUnaskedSwitch) != 1 {
		t.Error("a 101 inside the request opened a tunnel")
	}
}

// login answers a request of the NTLM handshake as a server does: what it says
// depends on what came over this connection before.
type login struct {
	state map[*chatServer]int
	seen  map[*chatServer]int
}

func (l *login) serve(k *chat, v *chatServer, user string) string {
	k.t.Helper()
	text := string(v.got[l.seen[v]:])
	l.seen[v] = len(v.got)
	switch {
	case text == "":
		k.t.Fatal("the server got nothing")
	case strings.Contains(text, "Authorization: NTLM type1"):
		l.state[v] = 1
		return http("HTTP/1.1 401 Unauthorized\nWWW-Authenticate: NTLM challenge\nContent-Length: 0\n\n")
	case strings.Contains(text, "Authorization: NTLM type3") && l.state[v] == 1:
		l.state[v] = 2
	case l.state[v] != 2:
		return http("HTTP/1.1 401 Unauthorized\nWWW-Authenticate: Negotiate\nWWW-Authenticate: NTLM\nContent-Length: 0\n\n")
	}
	return http(fmt.Sprintf("HTTP/1.1 200 OK\nContent-Length: %d\n\nfor %s", len("for "+user), user))
}

// TestConnectionAuth: the handshake of NTLM meets one server connection from
// its first to its last message, the client goes on over it, on two servers
// that balance, among other clients; nobody else is ever served over it.
func TestConnectionAuth(t *testing.T) {
	g := newRig(t, keepIdle)
	for i := range 200 {
		g.iss = append(g.iss, packet.Seq(1_000_000*(i+1)))
	}
	alice := newChat(g, c1, 100)
	bob := alice.join(c2, 200)
	l := &login{map[*chatServer]int{}, map[*chatServer]int{}}
	ask := func(k *chat, fields string) (v *chatServer, answer string) {
		t.Helper()
		before := map[*chatServer]int{}
		for _, v := range k.first().order {
			before[v] = len(v.got)
		}
		k.send("GET / HTTP/1.1\r\nHost: a\r\n" + fields + "\r\n")
		for _, o := range k.first().order {
			if len(o.got) > before[o] {
				v = o
			}
		}
		if v == nil {
			t.Fatal("no server got the request")
		}
		k.got = nil
		k.reply(v, l.serve(k, v, k.addr.String()))
		return v, string(k.got)
	}
	own, _ := ask(alice, "")
	for _, step := range []string{"Authorization: NTLM type1\r\n", "Authorization: NTLM type3\r\n", "", "", ""} {
		for range 5 {
			if v, answer := ask(bob, ""); v == own || !strings.HasPrefix(answer, "HTTP/1.1 401 ") {
				t.Fatalf("bob is served over the connection of alice: %v, %q", v == own, answer)
			}
		}
		v, answer := ask(alice, step)
		if v != own {
			t.Fatalf("after %q alice is served over another connection", step)
		}
		if strings.Contains(step, "type3") || step == "" {
			alice.want("logged in", answer[strings.Index(answer, "\r\n\r\n")+4:], "for "+c1.String())
		}
	}
	if alice.count(ReasonPrivate) != 2 || alice.count(ReasonPrivateReused) < 5 {
		t.Errorf("%d private, reused %d times", alice.count(ReasonPrivate), alice.count(ReasonPrivateReused))
	}
	// It outlives the idle time of the pool and goes with its client.
	g.db.Farms[0].Pool.IdleTimeout = second
	alice.wait(10 * second)
	if v, _ := ask(alice, ""); v != own {
		t.Error("a private connection was closed while its client is there")
	}
	alice.close()
	if !own.fin || g.e.Usage().Idle != 0 {
		t.Errorf("after alice: closed %v, pooled %d", own.fin, g.e.Usage().Idle)
	}
	bob.close()
	for _, v := range alice.first().order {
		alice.hangUp(v)
	}
	g.idle(0)
}

// TestConnectionAuthControl: with the mark taken away, the connection on which
// one client has logged in goes to the pool and serves the next one as him.
func TestConnectionAuthControl(t *testing.T) {
	for _, defence := range []bool{true, false} {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{1000, 2000, 3000}
		alice := newChat(g, c1, 100)
		l := &login{map[*chatServer]int{}, map[*chatServer]int{}}
		for _, step := range []string{"type1", "type3"} {
			alice.send("GET / HTTP/1.1\r\nHost: a\r\nAuthorization: NTLM " + step + "\r\n\r\n")
			v := alice.server(0)
			text := l.serve(alice, v, "alice")
			if !defence {
				text = strings.Replace(text, "NTLM", "XXXX", 1)
				alice.g.e.servers.At(1).Flags &^= splice.ServerPrivate
			}
			alice.reply(v, text)
		}
		alice.close()
		bob := alice.join(c2, 200)
		bob.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		stolen := len(alice.first().order) == 1
		if stolen == defence {
			t.Errorf("defence %v: bob is served over the connection of alice: %v", defence, stolen)
		}
	}
}

// TestPrivateEnds: what a private connection does while it waits: its server
// closes or resets it, says something, or is drained; the client goes on over
// another one. It never waits for anybody else.
func TestPrivateEnds(t *testing.T) {
	const challenge = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Negotiate\r\nContent-Length: 0\r\n\r\n"
	for _, how := range []string{"FIN", "RST", "bytes", "drain", "drain later", "close"} {
		g := newRig(t, oneServer, keepIdle)
		g.iss = []packet.Seq{1000, 2000, 3000}
		k := newChat(g, c1, 100)
		k.send("GET /1 HTTP/1.1\r\nHost: a\r\n\r\n")
		v := k.server(0)
		switch how {
		case "drain":
			g.db.Farms[0].Servers[0].Live.State.Store(uint32(snapshot.Drain))
			k.reply(v, challenge)
			g.db.Farms[0].Servers[0].Live.State.Store(uint32(snapshot.Ready))
		case "close":
			k.reply(v, strings.Replace(challenge, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1))
			if !k.fin || k.pooled() != 0 || !v.fin {
				t.Errorf("a challenge that closes: client closed %v, server closed %v", k.fin, v.fin)
			}
			continue
		case "drain later":
			k.reply(v, challenge)
			k.wait(10 * second)
			if v.fin {
				t.Error("closed for no reason")
			}
			g.db.Farms[0].Servers[0].Live.State.Store(uint32(snapshot.Drain))
			k.wait(2 * second)
			if !v.fin {
				t.Error("an idle private connection to a server that is drained stays")
			}
			g.db.Farms[0].Servers[0].Live.State.Store(uint32(snapshot.Ready))
		default:
			k.reply(v, challenge)
			s := seg{fl: ack | fin}
			if how == "RST" {
				s = seg{fl: ack | rst}
			} else if how == "bytes" {
				s = seg{fl: ack | psh, data: "x"}
			}
			k.fromServer(v, s)
		}
		if k.fin || k.rst || k.pooled() != 0 {
			t.Fatalf("%s: client closed %v, reset %v; pooled %d", how, k.fin, k.rst, k.pooled())
		}
		k.send("GET /2 HTTP/1.1\r\nHost: a\r\n\r\n")
		if strings.Contains(string(v.got), "/2") || !strings.Contains(string(k.server(1).got), "/2") {
			t.Errorf("%s: the next request went wrong: %q", how, v.got)
		}
		k.reply(k.server(1), okEmpty)
		if !strings.HasSuffix(string(k.got), okEmpty) {
			t.Errorf("%s: got %q", how, k.got)
		}
		k.close()
	}
	// The client is gone in the middle of the handshake: the response is
	// drained, and the connection closed.
	g := newRig(t, oneServer, keepIdle)
	k := newChat(g, c1, 100)
	k.send("GET /1 HTTP/1.1\r\nHost: a\r\nAuthorization: Negotiate x\r\n\r\n")
	v := k.server(0)
	k.raw(seg{fl: rst | ack})
	k.reply(v, okEmpty)
	if !v.fin || k.pooled() != 0 {
		t.Errorf("after a drain: closed %v, pooled %d", v.fin, k.pooled())
	}
}

// TestPrivatePerServer: a client may log in on several servers; each request
// goes where the routes say, over the connection that the client has there.
func TestPrivatePerServer(t *testing.T) {
	const challenge = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: NTLM\r\nContent-Length: 0\r\n\r\n"
	g := newRig(t, figure8, keepIdle)
	g.iss = []packet.Seq{1000, 2000, 3000}
	k := newChat(g, c1, 100)
	for i := range 10 {
		path, n := "/sales/", 0
		if i%2 == 1 {
			path, n = "/products/", 1
		}
		req := fmt.Sprintf("GET %s%d HTTP/1.1\r\nHost: a\r\n\r\n", path, i)
		k.send(req)
		v := k.server(n)
		if !strings.HasSuffix(string(v.got), req) {
			t.Fatalf("request %d is not at server %v", i, v.addr)
		}
		k.reply(v, challenge)
	}
	if n := len(k.order); n != 2 {
		t.Errorf("%d server connections", n)
	}
	k.close()
	if !k.server(0).fin || !k.server(1).fin {
		t.Error("not both are closed with the client")
	}
}
