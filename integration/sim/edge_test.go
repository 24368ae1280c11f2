// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"testing"

	"github.com/weirgate/weir/module/packet"
)

// truncated is a run in which a server breaks off in the middle of a response,
// by a FIN or a reset; the client only waits. The first so many resets to it
// are lost.
func truncated(fault Fault, lost int) (*Scenario, Hooks) {
	s := Base(uint64(lost))
	s.Bound = 30 * second
	q := get(20_000)
	q.Reply.Fault, q.Reply.At, q.Reply.Pieces, q.Reply.Gap = fault, 0.6, 6, 5*millisecond
	s.Conns = []ConnPlan{plainConn(q)}
	n := 0
	return s, Hooks{Lose: func(d Direction, b []byte) bool {
		p, _ := packet.ParseTCP(b)
		if d != ToClient || !p.Flags().Has(packet.RST) {
			return false
		}
		n++
		return n <= lost
	}}
}

// TestLostResets: a client that waits for the rest of a truncated response
// learns that none comes, though resets are lost: nobody acknowledges them, so
// the engine repeats them unasked. The control: with all of them lost it waits
// for ever.
func TestLostResets(t *testing.T) {
	for _, fault := range []Fault{FaultReset, FaultTrunc} {
		for lost := range 4 {
			s, h := truncated(fault, lost)
			if r := Run(s, h); r.Violation != nil {
				s, h = truncated(fault, lost)
				t.Errorf("fault %d, %d resets lost: %v", fault, lost, Explain(s, h, 40))
			}
		}
		s, h := truncated(fault, 1000)
		if r := Run(s, h); r.Violation == nil || r.Violation.Invariant != "liveness" {
			t.Errorf("fault %d, all resets lost: %v", fault, r.Violation)
		}
	}
}

// untrimmed is a run in which clients that never trim a segment to the window
// send bodies to servers that take less than a segment at a time.
func untrimmed(i int) *Scenario {
	s := Base(uint64(i))
	s.Bound = 120 * second
	s.Servers = s.Servers[:1]
	o := &s.Servers[0].Opt
	o.Buffer, o.Scale = 300+i*37, int8(i%3)-1
	c := plainConn(post(6000, 100), post(3000, 50))
	c.Opt.NoTrim, c.Opt.ISS = true, uint32(i)*977_777
	c.Opt.Nagle = i%2 == 0
	s.Conns = []ConnPlan{c}
	if i%4 == 3 {
		hard(s, 0.02)
	}
	return s
}

// TestUntrimmedSegments: whatever reaches beyond a server's window is cut, not
// dropped, so a client whose segments are larger than that window gets through.
// The control: with segments to the server lost that are smaller than what the
// client sent, it does not.
func TestUntrimmedSegments(t *testing.T) {
	sum := runAll(t, upTo(60), func(i int) (*Scenario, Hooks) { return untrimmed(i), Hooks{} })
	if sum.Exchanges != 120 && !t.Failed() {
		t.Errorf("%d of 120 exchanges were answered", sum.Exchanges)
	}
	h := Hooks{Lose: func(d Direction, b []byte) bool {
		p, _ := packet.ParseTCP(b)
		return d == ToServer && p.PayloadLen() > 1 && p.PayloadLen() < 1000 && p.Payload()[0] != 'P'
	}}
	if r := Run(untrimmed(0), h); r.Violation == nil {
		t.Error("with cut segments lost nothing is found")
	}
}
