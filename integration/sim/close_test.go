// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"testing"

	"github.com/weirgate/weir/module/packet"
)

// closing is one way in which the end of an exchange can go: what both ends do,
// how long the four ways take, and which packet of the closing phase is lost.
type closing struct {
	client int // index into clientEnds
	server int // index into serverEnds
	delays [directions]int64
	lost   int // 0: none; k: the k-th packet since the response began, in direction dir
	dir    Direction
	pieces int // 0: in one segment, 1: in a few with time between, 2: in many at once
}

// clientEnds are the ways in which a client leaves.
var clientEnds = []func(*ConnPlan){
	func(c *ConnPlan) { c.End = EndClose },
	func(c *ConnPlan) { c.End = EndHalf },
	func(c *ConnPlan) { c.End = EndStay },
	func(c *ConnPlan) { c.End = EndReset },
	func(c *ConnPlan) { c.End, c.Abort, c.AbortRead = EndClose, AbortClose, 150 },
	func(c *ConnPlan) { c.End, c.Abort, c.AbortRead = EndClose, AbortReset, 150 },
	func(c *ConnPlan) { c.End, c.Requests[0].Close = EndClose, true },
	func(c *ConnPlan) { c.End, c.Requests[0].Minor = EndHalf, 0 },
}

// serverEnds are the ways in which a server goes on after the response.
var serverEnds = []func(*ServerPlan, *ReplyPlan){
	func(*ServerPlan, *ReplyPlan) {},
	func(_ *ServerPlan, p *ReplyPlan) { p.Close = true },
	func(s *ServerPlan, _ *ReplyPlan) { s.MaxReq = 1 },
	func(s *ServerPlan, _ *ReplyPlan) { s.IdleClose = 4 * millisecond },
	func(s *ServerPlan, _ *ReplyPlan) { s.IdleClose, s.CloseReset = 4*millisecond, true },
	func(_ *ServerPlan, p *ReplyPlan) { p.Kind, p.Close = KindUntilClose, true },
	func(_ *ServerPlan, p *ReplyPlan) { p.Fault, p.At = FaultTrunc, 0.8 },
	func(_ *ServerPlan, p *ReplyPlan) { p.Fault, p.At = FaultReset, 0.8 },
}

// closings lists the ways: every pair of ends under every order of arrivals
// that the delays make, and every single loss under two of them.
func closings() (all []closing) {
	var orders [][directions]int64
	for _, a := range []int64{1, 3, 9} { // from the client
		for _, b := range []int64{2, 8} { // to the client
			for _, c := range []int64{1, 4, 10} { // from the server
				for _, d := range []int64{2, 7} { // to the server
					orders = append(orders, [directions]int64{a * millisecond, b * millisecond, c * millisecond, d * millisecond})
				}
			}
		}
	}
	for c := range clientEnds {
		for s := range serverEnds {
			for _, o := range orders {
				all = append(all, closing{client: c, server: s, delays: o})
			}
			for dir := range directions {
				for lost := 1; lost <= 8; lost++ {
					for _, o := range [][directions]int64{orders[0], orders[23]} {
						all = append(all, closing{client: c, server: s, delays: o, lost: lost, dir: dir})
					}
				}
			}
		}
	}
	return all
}

func (k *closing) scenario(seed uint64) (*Scenario, Hooks) {
	s := Base(seed)
	s.Bound = 200 * second
	s.Servers = s.Servers[:1]
	reply := get(400)
	c := plainConn(reply)
	c.Opt.ISS = uint32(seed) * 7919
	switch k.pieces {
	case 1:
		c.Requests[0].Reply.Pieces, c.Requests[0].Reply.Gap = 4, millisecond
	case 2:
		c.Requests[0].Reply.Pieces, c.Pieces = 12, 4
		c.Opt.PathMSS = 60
	}
	clientEnds[k.client](&c)
	serverEnds[k.server](&s.Servers[0], &c.Requests[0].Reply)
	if c.Requests[0].Minor == 0 && c.Requests[0].Reply.Kind == KindLength {
		c.Requests[0].Reply.Minor = 0
	}
	s.Conns = []ConnPlan{c}
	for d := range s.Wires {
		s.Wires[d].Delay = k.delays[d]
	}
	h := Hooks{}
	if k.lost > 0 {
		answering, n := false, 0
		h.Lose = func(d Direction, b []byte) bool {
			p, _ := packet.ParseTCP(b)
			answering = answering || d == FromServer && p.PayloadLen() > 0
			if !answering || d != k.dir {
				return false
			}
			n++
			return n == k.lost
		}
	}
	return s, h
}

// TestClosingInterleavings: the end of an exchange in every order of FINs,
// resets, last data and last acknowledgments: the client gets its response or,
// where the server fails, a reset; nobody gets a reset for nothing, and nothing
// is left in the engine.
func TestClosingInterleavings(t *testing.T) {
	all := closings()
	if len(all) < 5000 {
		t.Errorf("there are only %d interleavings", len(all))
	}
	for pieces := range 3 {
		sum := runAll(t, upTo(len(all)), func(i int) (*Scenario, Hooks) {
			k := all[i]
			k.pieces = pieces
			return k.scenario(uint64(i))
		})
		t.Logf("segmentation %d: %d interleavings, %d answered", pieces, sum.runs, sum.Exchanges)
		if t.Failed() {
			return
		}
	}
}

// TestClosingControl: an engine that forgets its connections at an unlucky
// moment is found out.
func TestClosingControl(t *testing.T) {
	found := 0
	for at := range int64(12) {
		k := closing{delays: [directions]int64{millisecond, millisecond, millisecond, millisecond}}
		s, h := k.scenario(1)
		renewed := false
		h.Renew = func(w *World) bool {
			if renewed || w.now < startTime+(2+at)*millisecond {
				return false
			}
			renewed = true
			return true
		}
		if Run(s, h).Violation != nil {
			found++
		}
	}
	if found == 0 {
		t.Error("the observer never finds anything")
	}
}
