// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
)

// A wire judges the TCP packets on one leg of the router. Everything on a
// connection with the engine must carry numbers from that connection's own
// spaces, which begin where its SYN and SYN-ACK on this very leg said. An
// untranslated packet carries the other connection's, which began at random
// places.
type wire struct {
	// front says whether an address is the engine's on this leg: a VIP, or a
	// SNIP with a port of the range.
	front func(netip.AddrPort) bool
	// never reports packets that have no business here, such as a client's
	// address on the servers' side.
	never  func(ladder.Segment) bool
	conns  map[pair]*spaces
	strays map[pair]uint32 // last acknowledgments of peers that have no connection here
	bad    []string
	seen   int
}

func newWire(front func(netip.AddrPort) bool, never func(ladder.Segment) bool) *wire {
	return &wire{front: front, never: never, conns: map[pair]*spaces{}, strays: map[pair]uint32{}}
}

type pair struct{ engine, peer netip.AddrPort }

// spaces are the highest sequence numbers of the two ends so far.
type spaces struct {
	engine, peer           uint32
	knowsEngine, knowsPeer bool
	asked                  uint32 // the peer's last acknowledgment
}

// reach is how far from its highest so far a number may be: more than any
// window, and so little that one foreign number in 256 would pass for one of
// the connection.
const reach = 1 << 23

func far(a, b uint32) bool {
	d := int32(a - b)
	return d > reach || d < -reach
}

func (w *wire) judge(s ladder.Segment) {
	if w.never != nil && w.never(s) {
		w.say(s, "has no business on this side")
		return
	}
	fromEngine := w.front(s.Src)
	if !fromEngine && !w.front(s.Dst) {
		return
	}
	w.seen++
	k := pair{s.Dst, s.Src}
	if fromEngine {
		k = pair{s.Src, s.Dst}
	}
	c := w.conns[k]
	if s.Flags&(ladder.SYN|ladder.ACK) == ladder.SYN {
		// A SYN begins a connection; a repeated one is the same.
		c = &spaces{}
		w.conns[k] = c
	}
	if c == nil {
		// What a takeover or a restart has left of a connection that began
		// elsewhere is reset, by the number that its peer asks for
		// (RFC 9293, section 3.5.2).
		switch ack, asked := w.strays[k]; {
		case !fromEngine && s.Flags&ladder.ACK != 0:
			w.strays[k] = s.Ack
		case fromEngine && (!asked || s.Flags&ladder.RST == 0 || s.Seq != ack):
			w.say(s, "belongs to no connection of this side")
		}
		return
	}
	mine, known := &c.peer, &c.knowsPeer
	if !fromEngine && s.Flags&ladder.ACK != 0 {
		c.asked = s.Ack
	}
	if fromEngine {
		mine, known = &c.engine, &c.knowsEngine
		other, otherKnown := c.peer, c.knowsPeer
		switch {
		case s.Flags&ladder.RST != 0 && s.Seq == c.asked:
			// Right by all means: so ends what a peer has left of an earlier
			// connection of these ports (RFC 9293, section 3.5.1).
			return
		case *known && far(s.Seq, *mine):
			w.say(s, fmt.Sprintf("has a sequence number that is not of this connection, which is at %d", *mine))
			return
		case !*known && s.Flags&(ladder.RST|ladder.SYN) == 0:
			w.say(s, "comes before the connection's SYN")
		case s.Flags&ladder.ACK != 0 && otherKnown && far(s.Ack, other):
			w.say(s, fmt.Sprintf("acknowledges what is not of this connection, which is at %d", other))
		}
	}
	if !*known && s.Flags&ladder.SYN == 0 {
		return // of an earlier connection
	}
	if end := s.Seq + uint32(s.Len); !*known || int32(end-*mine) > 0 && !far(end, *mine) {
		*mine, *known = end, true
	}
}

func (w *wire) say(s ladder.Segment, what string) {
	w.bad = append(w.bad, fmt.Sprintf("%s %v -> %v flags %#02x seq %d ack %d len %d %s",
		s.Time.Format("05.000000"), s.Src, s.Dst, s.Flags, s.Seq, s.Ack, s.Len, what))
}

// watch is a capture of the router's legs with their judges.
type watch struct {
	r    *rig
	on   *lab.Capture
	legs map[string]*wire
}

// leg is one interface and what may be seen there, see wire.
type leg struct {
	iface string
	front func(netip.AddrPort) bool
	never func(ladder.Segment) bool
}

// isVIP is the front toward clients, isSNIP the one toward servers.
func (r *rig) isVIP(a netip.AddrPort) bool { return a == r.VIP() || a == r.VIP6() }
func (r *rig) isSNIP(a netip.AddrPort) bool {
	return (a.Addr() == r.SNIP() || a.Addr() == r.SNIP6()) && a.Port() >= 5000 && a.Port() <= 32767
}

func (r *rig) isServer(a netip.AddrPort) bool {
	for i := range r.Servers {
		if a == r.Server(i) || a == r.Server6(i) {
			return true
		}
	}
	return false
}

func (r *rig) isClient(a netip.AddrPort) bool {
	for i := range r.Clients {
		if a.Addr() == r.ClientAddr(i) || a.Addr() == r.ClientAddr6(i) {
			return true
		}
	}
	return false
}

// watch begins to look at both sides of the router, between which there is
// nothing but what goes through the engine.
func (r *rig) watch() *watch {
	r.t.Helper()
	return r.watchOn(
		leg{r.ClientLeg, r.isVIP, func(s ladder.Segment) bool {
			return r.isServer(s.Src) || r.isServer(s.Dst) || s.Src.Addr() == r.SNIP() || s.Src.Addr() == r.SNIP6()
		}},
		leg{r.ServerLeg, r.isSNIP, func(s ladder.Segment) bool {
			return r.isVIP(s.Src) || r.isClient(s.Src) && r.isServer(s.Dst) || r.isServer(s.Src) && r.isClient(s.Dst)
		}},
	)
}

// watchOn begins to look at some of the router's interfaces.
func (r *rig) watchOn(legs ...leg) *watch {
	r.t.Helper()
	w := &watch{r: r, legs: map[string]*wire{}}
	var names []string
	for _, l := range legs {
		names = append(names, l.iface)
		w.legs[l.iface] = newWire(l.front, l.never)
	}
	var err error
	if w.on, err = r.Router.CaptureOn(lab.CaptureOptions{SnapLen: 120, Buffer: 256 << 20}, names...); err != nil {
		r.t.Fatal(err)
	}
	return w
}

// judge ends the watch and reports what it has seen amiss.
func (w *watch) judge() {
	w.r.t.Helper()
	w.end()
	for leg, l := range w.legs {
		for i, b := range l.bad {
			if i == 5 {
				w.r.t.Errorf("%s: and %d more", leg, len(l.bad)-i)
				break
			}
			w.r.t.Errorf("%s: %s", leg, b)
		}
		if l.seen == 0 {
			w.r.t.Errorf("%s: the judge has seen no packet", leg)
		}
	}
}

// end ends the watch and has every leg judged.
func (w *watch) end() {
	w.r.t.Helper()
	recs, err := w.on.Stop()
	if err != nil {
		w.r.t.Errorf("capture: %v", err)
	}
	for _, rec := range recs {
		s, err := ladder.Decode(rec.Data)
		if err != nil {
			continue
		}
		s.Time = rec.Time
		l := w.legs[rec.Iface]
		// What comes in in the router's own name are the doctor's probes. What
		// may leave is judged when it leaves.
		if !rec.Outgoing && (l.front(s.Src) || l.never != nil && l.never(s)) {
			continue
		}
		l.judge(s)
	}
}

// TestWireControl: the judge finds what it is there to find.
func TestWireControl(t *testing.T) {
	vip, client := netip.MustParseAddrPort("203.0.113.10:80"), netip.MustParseAddrPort("198.18.0.11:40000")
	server := netip.MustParseAddrPort("198.51.100.11:80")
	seg := func(src, dst netip.AddrPort, flags uint8, seq, ack uint32) ladder.Segment {
		return ladder.Segment{Time: time.Unix(0, 0), Src: src, Dst: dst, Flags: flags, Seq: seq, Ack: ack}
	}
	left := netip.MustParseAddrPort("198.18.0.11:42000")
	open := []ladder.Segment{
		seg(left, vip, ladder.ACK, 200, 300),
		seg(client, vip, ladder.SYN, 1000, 0),
		seg(vip, client, ladder.SYN|ladder.ACK, 4_000_000_000, 1001),
		seg(client, vip, ladder.ACK, 1001, 4_000_000_001),
		seg(vip, client, ladder.ACK, 4_000_000_001, 1101),
	}
	for _, c := range []struct {
		name string
		more ladder.Segment
		want int
	}{
		{"translated", seg(vip, client, ladder.ACK|ladder.PSH, 4_000_001_001, 1101), 0},
		{"far on", seg(vip, client, ladder.ACK|ladder.RST, 4_005_000_000, 1101), 0},
		{"untranslated sequence number", seg(vip, client, ladder.ACK, 77, 1101), 1},
		{"untranslated acknowledgment", seg(vip, client, ladder.ACK, 4_000_000_001, 2_000_000_000), 1},
		{"reset of the router's own", seg(vip, client, ladder.RST, 1001, 0), 1},
		{"no connection", seg(vip, netip.MustParseAddrPort("198.18.0.11:41000"), ladder.ACK, 4_000_000_001, 1101), 1},
		{"reset of what began elsewhere", seg(vip, left, ladder.RST, 300, 0), 0},
		{"reset by another number", seg(vip, left, ladder.RST, 301, 0), 1},
		{"more than a reset of it", seg(vip, left, ladder.ACK, 300, 0), 1},
		{"reset by the number that was asked for", seg(vip, client, ladder.RST, 4_000_000_001, 0), 0},
		{"a server's address", seg(server, client, ladder.ACK, 1, 1), 1},
	} {
		w := newWire(func(a netip.AddrPort) bool { return a == vip }, func(s ladder.Segment) bool { return s.Src == server })
		for _, s := range append(slices.Clone(open), c.more) {
			w.judge(s)
		}
		if len(w.bad) != c.want {
			t.Errorf("%s: %d findings, want %d: %q", c.name, len(w.bad), c.want, w.bad)
		}
	}
}
