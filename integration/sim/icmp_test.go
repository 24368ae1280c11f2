// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"encoding/binary"
	"testing"

	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/packet"
)

// narrowing is a run in which the path becomes narrow in the middle of bodies
// in both directions: toward the client, toward the server, from either, or
// everywhere.
func narrowing(i int) *Scenario {
	s := Base(uint64(i))
	s.V6 = i%2 == 1
	c := plainConn(get(80_000), post(80_000, 300), get(30_000))
	c.Opt.GSO = []int{0, 60_000}[i/2%2]
	s.Servers = s.Servers[:1]
	s.Servers[0].Opt.GSO = []int{0, 60_000}[i/4%2]
	s.Conns = []ConnPlan{c}
	mtu := 1280
	if !s.V6 {
		mtu = []int{1280, 1000, 576}[i%3]
	}
	for d := range s.Wires {
		s.Wires[d].Delay = 2 * millisecond
		if which := i / 8 % 5; which == d || which == 4 {
			s.Wires[d].MTU, s.Wires[d].Narrows = mtu, int64(i%40)*millisecond
		}
	}
	return s
}

// TestNarrowPaths: a path that becomes narrow is found out by ICMP, mapped
// where an endpoint has to know: every exchange is over within three seconds,
// and no packet larger than the path is sent again and again. The control: with
// the errors lost, nothing goes on.
func TestNarrowPaths(t *testing.T) {
	sum := runAll(t, upTo(400), func(i int) (*Scenario, Hooks) {
		return narrowing(i), within(3 * second)
	})
	translated := sum.Counters[engine.ReasonICMPTranslated]
	t.Logf("%d exchanges, %d errors believed by the engine, %d not", sum.Exchanges, translated, sum.Counters[engine.ReasonICMPIgnored])
	if sum.Exchanges != 1200 && !t.Failed() || translated == 0 {
		t.Errorf("%d of 1200 exchanges were answered, %d errors believed", sum.Exchanges, translated)
	}
	runAll(t, upTo(100), func(i int) (*Scenario, Hooks) {
		s := narrowing(i)
		hard(s, 0.02)
		return s, Hooks{}
	})
	for _, i := range []int{0, 8, 16, 24} { // the wire of each direction
		if r := Run(narrowing(i), Hooks{NoICMP: true}); r.Violation == nil {
			t.Errorf("case %d: without ICMP nothing is found", i)
		}
	}
}

// TestForgedErrors: ten thousand ICMP errors about the connections that exist,
// with numbers that are not under way, change not one bit of what the engine
// lets out, nor when. The control: with the numbers of segments that are under
// way they do.
func TestForgedErrors(t *testing.T) {
	base := seedOf(t)
	const runs, each = 12, 1000
	ignored := uint64(0)
	for i := range uint64(runs) {
		seed := base + i
		plain := Run(busy(seed), Hooks{})
		r := stream(seed, partWorld, 99)
		forge := func(live bool) *Result {
			sent := 0
			inside := false // InjectICMP lets the engine emit, which must not forge again
			h := Hooks{Emitted: func(w *World, d Direction, b []byte) []byte {
				t, _ := packet.ParseTCP(b)
				if inside || t.PayloadLen() == 0 || sent >= each {
					return b
				}
				// As many as fit into what the run sends.
				for range 25 {
					forged := append([]byte(nil), b...)
					at := 20 + 4
					if b[0]>>4 == 6 {
						at = 40 + 4
					}
					if !live {
						// Anything but near: half of all numbers lie there.
						binary.BigEndian.PutUint32(forged[at:], uint32(t.Seq())+1<<30+r.Uint32()>>1)
					}
					sent++
					e := appendTooBig(nil, forged, 600+r.IntN(700))
					w.after(0, func() { inside = true; w.InjectICMP(e); inside = false })
				}
				return b
			}}
			return Run(busy(seed), h)
		}
		quiet := forge(false)
		if plain.Violation != nil || quiet.Violation != nil {
			t.Fatalf("seed %d: %v, %v", seed, plain.Violation, quiet.Violation)
		}
		if quiet.Hash != plain.Hash {
			t.Errorf("seed %d: forged errors changed what the engine lets out", seed)
		}
		if n := quiet.Counters[engine.ReasonICMPTranslated]; n != 0 {
			t.Errorf("seed %d: %d forged errors were believed", seed, n)
		}
		ignored += quiet.Counters[engine.ReasonICMPIgnored]
		if real := forge(true); real.Hash == plain.Hash {
			t.Errorf("seed %d: errors about segments under way change nothing", seed)
		}
	}
	t.Logf("%d forged errors ignored", ignored)
	if ignored < 10_000 {
		t.Errorf("only %d errors were judged", ignored)
	}
}
