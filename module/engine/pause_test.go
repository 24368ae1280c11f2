// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
)

// TestPauseIsNobodysSilence: nobody calls the engine for half a minute, longer
// than any time limit. What was lost just before is sent again, and nobody is
// taken for silent who could not have been heard. The control: where the engine
// ran all the time and nothing came, each limit holds.
func TestPauseIsNobodysSilence(t *testing.T) {
	const pause = 30 * second
	limits := func(s *farm.Spec) {
		s.Farms[0].Timeouts = farm.Timeouts{Connect: 5 * second, Head: 15 * second, Body: 10 * second, Idle: 60 * second, Response: 20 * second}
		s.Farms[0].Pool.MaxConnections, s.Farms[0].Pool.WaitTimeout = 1, 5*second
	}
	post := "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
	want := marked(50, "P")
	for _, c := range []struct {
		what   string
		before func(g *rig, p *pair)
		refuse string
	}{
		{"a request that the server has not acknowledged", func(g *rig, p *pair) { p.ask(post, 499) }, " 504 "},
		{"a SYN to a server", func(g *rig, p *pair) {
			g.play(g.raw(p.cli, vip, seg{fl: ack | psh, seq: p.cseq, ack: p.cack, data: post}))
			p.cseq += packet.Seq(len(post))
		}, " 504 "},
		{"a response that is due", func(g *rig, p *pair) {
			p.ask(post, 499)
			g.play(g.raw(p.srv, ep2(p.port), seg{fl: ack, seq: p.sseq, ack: p.sack}))
		}, " 504 "},
		{"half a head", func(g *rig, p *pair) {
			g.play(g.raw(p.cli, vip, seg{fl: ack | psh, seq: p.cseq, ack: p.cack, data: post[:20]}))
		}, " 408 "},
		{"a request in the line", func(g *rig, p *pair) {
			o := g.dial(c2, 9000)
			o.ask(get("/first", 60), 5000)
			p.ask(post, 499)
		}, " 503 "},
	} {
		for _, ran := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, the engine ran: %v", c.what, ran), func(t *testing.T) {
				g := newRig(t, oneServer, keepIdle, limits)
				p := g.dial(c1, 100)
				c.before(g, p)
				refused := ""
				tick := func(now int64, hold bool) {
					g.now = now
					g.e.HoldTimers(now, hold)
					g.out.Reset()
					g.e.Step(now, &Event{Kind: Tick}, &g.out)
					for _, s := range g.gather(nil) {
						if s.dst == p.cli && strings.HasPrefix(string(s.data), "HTTP/1.1 ") {
							refused = string(s.data[8:13])
						}
					}
				}
				began := g.now
				if ran {
					for g.now < began+pause {
						tick(g.now+100*millisecond, false)
					}
					if refused != c.refuse {
						t.Errorf("the client gets %q, want%s", refused, c.refuse)
					}
					return
				}
				tick(began+pause, true)
				for g.now < began+pause+900*millisecond {
					tick(g.now+100*millisecond, false)
				}
				if refused != "" {
					t.Errorf("after the pause the client gets%s: %s", refused, g.counts())
				}
				if g.e.Usage().Clients < 1 {
					t.Errorf("the client's record is gone: %+v", g.e.Usage())
				}
			})
		}
	}
	// And the exchange goes on to its end.
	g := newRig(t, oneServer, keepIdle, limits)
	p := g.dial(c1, 100)
	p.ask(post, 499)
	g.now += pause
	g.e.HoldTimers(g.now, true)
	p.fromClient = nil
	p.sack -= packet.Seq(len(post)) // the request was lost
	g.e.HoldTimers(g.now, false)
	g.now += second
	g.out.Reset()
	g.e.Step(g.now, &Event{Kind: Tick}, &g.out)
	p.note(g.gather(nil), 0)
	if string(p.fromClient) != post {
		t.Fatalf("the server gets %q: %s", p.fromClient, g.counts())
	}
	if p.answer(want); string(p.fromServer) != want {
		t.Errorf("the client gets %q", p.fromServer)
	}
}
