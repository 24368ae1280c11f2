// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bytes"
	"testing"

	"github.com/weirgate/weir/module/packet"
)

// extra is one run of a server that sends more than its answer, whose extra
// bytes are lost on their way to the engine, so that its TCP sends them again
// later; B comes so long after A.
type extra struct {
	after  int64
	method string
	once   bool // pool.max_requests: 1
	bare   bool // the server acknowledges B's request before it sends them again
}

// run reports whether the engine could have known: no segment of these bytes
// that reached it on B's connection acknowledged anything of B's request.
func (x *extra) run(seed uint64) (v *Violation, knowable bool) {
	s := Base(seed)
	s.Servers = s.Servers[:1]
	if x.once {
		s.Pool.MaxRequests = 1
	}
	a, b := plainConn(get(400)), plainConn(get(300))
	a.Requests[0].Reply.Fault, a.Requests[0].Reply.Lag = FaultExtra, 50*microsecond
	b.Host, b.Start, b.Opt.ISS = 1, x.after, 654321
	if b.Requests[0].Method = x.method; x.method == "POST" {
		b.Requests[0].Body = 50
	}
	if x.bare {
		b.Requests[0].Reply.Think = 300 * millisecond
	}
	s.Conns = []ConnPlan{a, b}
	mark := []byte("408 Request Timeout")
	lost, requests := false, 0
	var server packet.Endpoint // the engine's end of the connection that B's request went to
	var base packet.Seq        // B's first byte there
	undecided := false
	r := Run(s, Hooks{
		Lose: func(d Direction, p []byte) bool {
			if d != FromServer || lost || !bytes.Contains(p, mark) {
				return false
			}
			lost = true
			return true
		},
		Emitted: func(_ *World, d Direction, p []byte) []byte {
			if t, _ := packet.ParseTCP(p); d == ToServer && bytes.Contains(t.Payload(), nonceMark) {
				if requests++; requests == 2 { // A's was the first
					server, base = t.Src(), t.Seq()
				}
			}
			return p
		},
		Arriving: func(_ *World, d Direction, p []byte) []byte {
			if t, _ := packet.ParseTCP(p); d == FromServer && bytes.Contains(p, mark) && t.Dst() == server && base.Less(t.Ack()) {
				undecided = true
			}
			return p
		},
	})
	return r.Violation, !undecided
}

// TestLostExtraBytes: the bytes behind the end of A's answer are lost, and sent
// again when the connection may be B's. Where the repetition comes before B's
// request has reached the server, its acknowledgment number tells, and B gets
// its own answer and nothing else. Where it comes later it acknowledges B's
// request, as B's answer would, and looks like it in every bit: that is what no
// intermediary can know, and it is shown here so that nobody believes
// otherwise. With pool.max_requests: 1 it cannot happen.
func TestLostExtraBytes(t *testing.T) {
	seed := seedOf(t)
	trials, undecided, reached := 0, 0, 0
	for after := int64(0); after < 300*millisecond; after += millisecond {
		for _, method := range []string{"GET", "POST"} {
			for _, bare := range []bool{false, true} {
				for _, once := range []bool{false, true} {
					x := extra{after: after, method: method, once: once, bare: bare}
					v, knowable := x.run(seed)
					trials++
					switch {
					case once && !knowable:
						t.Fatalf("%+v: with max_requests: 1 B shares A's connection", x)
					case v != nil && knowable:
						t.Fatalf("%+v: %v", x, v)
					case v != nil:
						reached++
					}
					if !knowable {
						undecided++
					}
				}
			}
		}
	}
	t.Logf("%d trials, %d beyond anybody's knowledge, in %d of them the client got the bytes", trials, undecided, reached)
	if undecided == 0 || undecided > trials/2 {
		t.Errorf("%d of %d trials were beyond anybody's knowledge: the rig does not do what it says", undecided, trials)
	}
}
