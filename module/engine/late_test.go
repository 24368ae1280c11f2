// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/pool"
)

// over has the rig's engine begin anew in mem, as a successor does.
func (g *rig) over(mem *flowstore.Memory, spec farm.Spec) Takeover {
	g.t.Helper()
	opt := g.e.opt
	opt.SNIPs = []*pool.Ports{pool.NewPorts(packet.AddrFrom(snip), 10240, 10240+testPorts-1, second, nil)}
	db := g.db
	if mem.Found() {
		var err error
		if db, err = farm.Build(farm.Recall(g.db.Numbers()), spec); err != nil {
			g.t.Fatal(err)
		}
	}
	e, err := Open(opt, mem, db)
	if err != nil {
		g.t.Fatal(err)
	}
	g.e, g.db = e, db
	return e.Recover(g.now)
}

// TestDeadTimeCountsForNobody: while nobody was there nobody could answer. A
// successor that comes late has waited for nothing yet, neither for a server's
// SYN ACK nor for its acknowledgment of a request nor for a free connection.
func TestDeadTimeCountsForNobody(t *testing.T) {
	for _, dead := range []int64{second, 20 * second, 90 * second} {
		t.Run(time.Duration(dead).String(), func(t *testing.T) {
			var spec farm.Spec
			g := newRig(t, oneServer, func(s *farm.Spec) {
				s.Farms[0].Pool.MaxConnections = 2
				spec = *s
			})
			mem := flowstore.NewHeap()
			g.over(mem, spec)
			// The first one's request is on its way, the second one's connection
			// opens, the third one waits in line.
			g.iss = []packet.Seq{4_000_000_000, 4_100_000_000}
			a, b, c := g.dial(c1, 1000), g.dial(c2, 2000), g.dial(user(7), 3000)
			a.ask(get("/a", 80), 77)
			for _, p := range []*pair{b, c} {
				g.play(g.raw(p.cli, vip, seg{fl: ack | psh, seq: p.cseq, ack: p.cack, data: get("/b", 80)}))
			}
			if u := g.e.Usage(); u.Clients != 3 || u.Servers != 2 || u.Waiting != 1 {
				t.Fatalf("before the death: %+v", u)
			}
			image := mem.Image()
			g.now += dead
			took := g.over(image, spec)
			if took.Clients != 3 || took.Servers != 2 || took.Lost+took.Refused > 0 {
				t.Fatalf("taken over: %+v", took)
			}
			for _, line := range g.wait(second / 2) {
				if strings.Contains(line, "RST") || strings.Contains(line, "FIN") || strings.Contains(line, "PSH") {
					t.Errorf("half a second later: %s", line)
				}
			}
			if u := g.e.Usage(); u.Clients != 3 || u.Servers != 2 || u.Waiting != 1 {
				t.Errorf("half a second later: %+v\n%s", u, g.counts())
			}
		})
	}
}

// TestServerRecordRefused: a damaged record of a server connection costs its
// client, whose request is held, the connection, and nobody else anything.
func TestServerRecordRefused(t *testing.T) {
	var spec farm.Spec
	g := newRig(t, oneServer, func(s *farm.Spec) { spec = *s })
	mem := flowstore.NewHeap()
	g.over(mem, spec)
	g.iss = []packet.Seq{4_000_000_000, 4_100_000_000}
	a, b := g.dial(c1, 1000), g.dial(c2, 2000)
	for _, p := range []*pair{a, b} {
		g.play(g.raw(p.cli, vip, seg{fl: ack | psh, seq: p.cseq, ack: p.cack, data: get("/b", 80)}))
	}
	g.e.servers.Peek(1).Requests ^= 1 // as if others had written there
	took := g.over(mem.Image(), spec)
	if took.Clients != 2 || took.Servers != 1 || took.Refused != 1 {
		t.Errorf("taken over: %+v", took)
	}
	g.wait(second / 2)
	if u := g.e.Usage(); u.Clients != 2 || u.Servers != 2 {
		t.Errorf("half a second later: %+v\n%s", u, g.counts())
	}
}
