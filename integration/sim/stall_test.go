// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"testing"

	"github.com/weirgate/weir/module/packet"
)

// rtt is a round trip of Base.
const rtt = 400 * microsecond

// stalled are clients in every stage of their exchanges when the engine stands
// still: in a download, in an upload, waiting for an answer, on an idle
// connection, in the handshake; and newcomers, the last of which begins when it
// is over.
func stalled(seed uint64, l Stall) *Scenario {
	s := Base(seed)
	s.Stall, s.Bound, s.Strict = l, l.For+30*second, true
	r := stream(seed, partShape, 12)
	for i := range 40 {
		var c ConnPlan
		switch i % 4 {
		case 0:
			c = plainConn(get(uint64(r.IntN(400_000))), get(100))
		case 1:
			c = plainConn(post(uint64(r.IntN(200_000)), 100), get(100))
		case 2:
			c = plainConn(get(100), get(200), post(300, 100))
			c.Requests[1].Pause = r.Int64N(2 * l.At)
		default:
			c = plainConn(get(1000))
			c.Wait = r.Int64N(3 * second)
		}
		// Most are there before, some come meanwhile, and of some the
		// acknowledgment of the handshake is the first that has to wait.
		c.Host, c.Start, c.Opt.ISS = i, r.Int64N(l.At+l.For/4), r.Uint32()
		if i >= 36 {
			c.Start, c.Wait = l.At-rtt/2-r.Int64N(rtt), 0
		}
		s.Conns = append(s.Conns, c)
	}
	last := plainConn(get(1000))
	last.Host, last.Start, last.Opt.ISS = 40, l.At+l.For+millisecond, r.Uint32()
	s.Conns = append(s.Conns, last)
	return s
}

// TestStandstill: the engine stands still for three seconds, or for ten, and
// its queues are just long enough for what comes meanwhile, half as long, or
// next to nothing. Or it stands still for twenty, and nothing is lost: a client
// whose acknowledgment of the handshake is lost, and then every repetition of
// its request, may come back when its cookie has died. Nobody is reset, in
// whatever stage of its exchange, every request is answered once, and who comes
// when it is over is served within a second. The control: who completed a
// handshake before is reset when cookies do not live so long.
func TestStandstill(t *testing.T) {
	seed := seedOf(t)
	const at, room = 300 * millisecond, 1 << 20
	for _, long := range []int64{3 * second, 10 * second, 20 * second} {
		for i := range uint64(20) {
			all := Run(stalled(seed+i, Stall{At: at, For: long, Queue: room}), Hooks{})
			lengths := []int{all.Peak, all.Peak / 2, 4}
			if long > 10*second {
				lengths = lengths[:1]
			}
			for _, queue := range lengths {
				var end int64
				s := stalled(seed+i, Stall{At: at, For: long, Queue: queue})
				r := Run(s, Hooks{Built: func(w *World) {
					w.atEnd = func() { end = w.clients[len(w.clients)-1].exchanges[0].finished }
				}})
				if r.Violation != nil {
					t.Fatalf("seed %d, %d s, a queue of %d: %v\n%s", seed+i, long/second, queue, r.Violation, Explain(s, Hooks{}, 60))
				}
				if lost := queue < all.Peak; (r.Overflow > 0) != lost {
					t.Errorf("seed %d, %d s: a queue of %d loses %d packets", seed+i, long/second, queue, r.Overflow)
				}
				if took := end - (startTime + at + long); end == 0 || took > second {
					t.Errorf("seed %d, %d s, a queue of %d: the newcomer is served %d ms after the end", seed+i, long/second, queue, took/millisecond)
				}
			}
		}
	}
	found := false
	for i := range uint64(20) {
		s := stalled(seed+i, Stall{At: at, For: 20 * second, Queue: room})
		r := Run(s, Hooks{Built: func(w *World) {
			w.after(s.Stall.At+s.Stall.For-1, func() { w.hs.Cookies = oldCookies{w.hs.Cookies} })
		}})
		found = found || r.Violation != nil
	}
	if !found {
		t.Error("cookies that have died meanwhile are not seen")
	}
}

// oldCookies are none that is known.
type oldCookies struct{ made }

type made interface {
	Make(t packet.Tuple, isn packet.Seq, opt uint8, now int64) packet.Seq
}

// Check implements engine.Cookies.
func (oldCookies) Check(packet.Tuple, packet.Seq, packet.Seq, int64) (uint8, bool) { return 0, false }
