// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/pool"
)

// hands is an engine with one server and hands on both sides: a test crafts
// every segment.
type hands struct {
	eng    *engine.Engine
	hs     *engine.Handshake
	out    engine.Output
	now    int64
	server packet.Endpoint
	vip    packet.Endpoint
	snip   packet.Endpoint // the engine's end of the server connection
	// the server's numbers: next to send, and the first one of the present
	// request
	sseq, sreq packet.Seq
	opened     bool
	buf        []byte
	spoil      func(p *packet.TCP) // a negative control tampers with what leaves
}

func newHands() *hands {
	h := &hands{now: startTime, server: packet.EndpointFrom(serverAddr(false, 0)), vip: packet.EndpointFrom(vip4)}
	db, err := farm.Build(nil, farm.Spec{SNIPs: []netip.Addr{snip4}, Farms: []farm.FarmSpec{{
		Name: "web", VIPs: []netip.AddrPort{vip4}, Servers: []farm.ServerSpec{{Name: "s1", Endpoint: serverAddr(false, 0)}},
		Pool:     farm.PoolLimits{MaxIdle: 64, MaxConnections: 64, DrainLimit: 1 << 20, DrainTimeout: 10 * second, MaxWaiting: 10, WaitTimeout: second},
		Timeouts: farm.Timeouts{Connect: 5 * second, Head: 60 * second, Idle: 60 * second, Response: 60 * second},
	}}})
	if err != nil {
		panic(err)
	}
	h.hs = engine.NewHandshake(engine.NewMACCookies([16]byte{1}), 1400, 1380, func(packet.Endpoint) bool { return true })
	h.eng = engine.New(engine.Options{
		Clients: 64, Servers: 64, Seed: 1, Handshake: h.hs,
		SNIPs: []*pool.Ports{pool.NewPorts(packet.AddrFrom(snip4), firstPort, firstPort+63, second, nil)},
	}, db)
	return h
}

// segment is one that the engine let out.
type segment struct {
	toServer bool
	seq, ack packet.Seq
	flags    packet.Flags
	data     []byte
	sack     []packet.SACKBlock
}

// send lets the engine handle a segment and returns what leaves.
func (h *hands) send(src, dst packet.Endpoint, fl packet.Flags, seq, ack packet.Seq, data []byte, opts []byte) []segment {
	s := packet.Segment{Src: src, Dst: dst, Seq: seq, Ack: ack, Flags: fl, Window: 4000, Options: opts}
	h.buf = packet.AppendSegment(h.buf[:0], &s, data)
	h.out.Reset()
	var got []segment
	take := func(b []byte) {
		p, problem := packet.ParseTCP(b)
		if problem != packet.OK || !p.VerifyChecksum() {
			panic(fmt.Sprintf("the engine let out a packet that is %v or has a wrong checksum", problem))
		}
		if h.spoil != nil {
			h.spoil(&p)
		}
		g := segment{toServer: p.Dst() == h.server, seq: p.Seq(), ack: p.Ack(), flags: p.Flags(), data: append([]byte(nil), p.Payload()...)}
		if off, n := p.SACK(); n > 0 {
			for i := range n {
				g.sack = append(g.sack, p.SACKBlock(off, i))
			}
		}
		if g.toServer {
			h.snip = p.Src()
		}
		got = append(got, g)
	}
	if fl == packet.SYN {
		h.hs.SYN(h.now, h.buf, packet.ChecksumUnknown, &h.out)
	} else {
		ev := engine.Event{Kind: engine.Packet, Data: h.buf}
		h.eng.Step(h.now, &ev, &h.out)
		if ev.Verdict == engine.Rewrite {
			for i := range h.out.Len() {
				take(h.out.Packet(i))
			}
			take(ev.Data)
			return got
		}
	}
	for i := range h.out.Len() {
		take(h.out.Packet(i))
	}
	return got
}

// The request of the sweep: a head of 300 bytes with an insertion before its
// empty line and a field whose name is overwritten, and a body of 20 bytes.
const (
	headLen = 300
	bodyLen = 20
	added   = "Connection: Keep-Alive\r\n"
	place   = headLen - 2
	whole   = headLen + bodyLen
	wholeS  = whole + len(added) // as the server sees it
)

func sweepRequest() (client, server []byte) {
	start := "POST /n/overlay HTTP/1.0\r\nHost: a\r\nConnection: close\r\nContent-Length: 20\r\nX-Pad: "
	head := start + strings.Repeat("p", headLen-len(start)-4) + "\r\n\r\n"
	body := "0123456789abcdefghij"
	return []byte(head + body), []byte(head[:place] + added + head[place:] + body)
}

// down maps a number of the server's side to the client's: what is inserted has
// the place before which it stands.
func down(s int) int {
	switch {
	case s <= place:
		return s
	case s <= place+len(added):
		return place
	}
	return s - len(added)
}

// overlayCase plays one case: the request comes in three segments cut at i and
// j; the server gets all but the places from a to b, and says so; the client
// sends the hole again, cut in its own way.
func (h *hands) overlayCase(n, i, j, a, b, variant int) error {
	request, served := sweepRequest()
	cli := packet.Endpoint{Addr: packet.AddrFrom(netip.AddrFrom4([4]byte{198, 18, byte(n >> 14), byte(n >> 6)})), Port: uint16(1024 + n&63)}
	h.now += 50 * microsecond
	isn := packet.Seq(uint32(n) * 2654435761)
	synOpt := packet.AppendSYNOptions(nil, packet.SYNOptions{MSS: 1460, WindowScale: 7, SACKPermitted: true})
	sa := h.send(cli, h.vip, packet.SYN, isn, 0, nil, synOpt)
	if len(sa) != 1 {
		return fmt.Errorf("the SYN is answered with %d segments", len(sa))
	}
	cseq, cack := isn+1, sa[0].seq+1
	h.send(cli, h.vip, packet.ACK, cseq, cack, nil, nil)

	got := make([]bool, wholeS) // of what the server has
	var firstErr error
	take := func(segs []segment, lose bool) (toClient []segment) {
		for _, g := range segs {
			if !g.toServer {
				toClient = append(toClient, g)
				continue
			}
			if g.flags.Has(packet.SYN) || len(g.data) == 0 {
				continue
			}
			at := int(int32(g.seq - h.sreq))
			for k, c := range g.data {
				p := at + k
				if p < 0 || p >= wholeS {
					firstErr = fmt.Errorf("byte %d of a request of %d goes to the server", p, wholeS)
					return
				}
				if c != served[p] && !(c == '-' || c >= 'A' && c <= 'z') {
					firstErr = fmt.Errorf("byte %d is %q, want %q", p, c, served[p])
					return
				}
				if c != served[p] && !bytes.HasPrefix(served[max(p-9, 0):], []byte("Conn")) && !inName(served, p) {
					firstErr = fmt.Errorf("byte %d is %q, want %q", p, c, served[p])
					return
				}
				if !lose || p < a || p >= b {
					got[p] = true
				}
			}
		}
		return toClient
	}
	first := func(segs []segment) []segment {
		for _, g := range segs {
			if g.toServer && g.flags == packet.SYN {
				// The connection to the server: 8 K window, so that all fits.
				h.sseq, h.sreq, h.opened = packet.Seq(uint32(n)*40503), g.seq+1, true
				r := h.send(h.server, h.snip, packet.SYN|packet.ACK, h.sseq, g.seq+1, nil, synOpt)
				h.sseq++
				segs = append(segs, r...)
			}
		}
		return segs
	}
	parts := [][2]int{{0, i}, {i, j}, {j, whole}}
	switch variant {
	case 1: // the last one first
		parts = [][2]int{{j, whole}, {0, i}, {i, j}}
	case 2: // overlapping
		parts = [][2]int{{0, i}, {max(i-7, 0), min(j+5, whole)}, {max(j-3, 0), whole}}
	}
	for _, p := range parts {
		if p[0] < p[1] {
			take(first(h.send(cli, h.vip, packet.ACK|packet.PSH, cseq+packet.Seq(p[0]), cack, request[p[0]:p[1]], nil)), true)
		}
	}
	for p := range got {
		if !got[p] && (p < a || p >= b) {
			return fmt.Errorf("byte %d never went to the server; %v", p, firstErr)
		}
	}
	if firstErr != nil {
		return firstErr
	}
	// The server acknowledges up to a and reports what is behind b.
	opts := packet.AppendSACKOption(nil, packet.SACKBlock{Left: h.sreq + packet.Seq(b), Right: h.sreq + packet.Seq(wholeS)})
	if b >= wholeS {
		opts = nil
	}
	back := take(h.send(h.server, h.snip, packet.ACK, h.sseq, h.sreq+packet.Seq(a), nil, opts), false)
	if len(back) != 1 {
		return fmt.Errorf("the server's acknowledgment leads to %d segments", len(back))
	}
	if want := cseq + packet.Seq(down(a)); back[0].ack != want {
		return fmt.Errorf("acknowledgment %d of the server becomes %d, want %d", a, back[0].ack-cseq, want-cseq)
	}
	if opts != nil {
		want := packet.SACKBlock{Left: cseq + packet.Seq(down(b)), Right: cseq + whole}
		if len(back[0].sack) != 1 || back[0].sack[0] != want {
			return fmt.Errorf("the block from %d becomes %v, want %v (relative to %d)", b, back[0].sack, want, cseq)
		}
	}
	// The client repeats its hole, to the end if it sees none.
	from, to := down(a), down(b)
	if to <= from || variant == 0 {
		to = whole
	}
	cut := []int{from, to}
	if variant == 2 && to-from > 2 {
		cut = []int{from, from + (to-from)/3, from + 2*(to-from)/3, to}
	}
	for k := 1; k < len(cut); k++ {
		take(h.send(cli, h.vip, packet.ACK|packet.PSH, cseq+packet.Seq(cut[k-1]), cack, request[cut[k-1]:cut[k]], nil), false)
	}
	if firstErr != nil {
		return firstErr
	}
	for p := range got {
		if !got[p] {
			return fmt.Errorf("byte %d of the hole from %d to %d is not repaired by the client's bytes %d to %d", p, a, b, from, to)
		}
	}
	// The end: response, acknowledgment, FINs.
	resp := []byte("HTTP/1.0 204 None\r\nConnection: keep-alive\r\n\r\n")
	last := h.send(h.server, h.snip, packet.ACK|packet.PSH, h.sseq, h.sreq+packet.Seq(wholeS), resp, nil)
	if len(last) == 0 || !bytes.Equal(last[len(last)-1].data, resp) || !last[len(last)-1].flags.Has(packet.FIN) {
		return fmt.Errorf("the response leads to %d segments, %v", len(last), last)
	}
	h.sseq += packet.Seq(len(resp))
	h.sreq += packet.Seq(wholeS)
	h.send(cli, h.vip, packet.ACK|packet.FIN, cseq+whole, cack+packet.Seq(len(resp))+1, nil, nil)
	return nil
}

// inName says whether a place lies in the field name that is overwritten.
func inName(served []byte, p int) bool {
	at := bytes.Index(served, []byte("Connection: close"))
	return p >= at && p < at+len("Connection")
}

// TestInsertionOverlay: a request with an insertion and an overwritten name, in
// segments with every pair of cuts, its loss at every pair of places of the
// server's stream, told by acknowledgment and SACK block, and repaired by
// retransmissions cut in three ways.
func TestInsertionOverlay(t *testing.T) {
	h := newHands()
	n := 0
	for a := range wholeS {
		for b := a + 1; b <= wholeS; b++ {
			for v := range 2 {
				// The cuts of the client go through all pairs on their own.
				i := n % whole
				j := i + 1 + n/whole%(whole-i)
				variant := (v + n/2%2*2) % 3
				if err := h.overlayCase(n, i, j, a, b, variant); err != nil {
					t.Fatalf("cuts %d and %d, lost %d to %d, variant %d: %v", i, j, a, b, variant, err)
				}
				n++
			}
		}
	}
	if n < 100_000 {
		t.Errorf("only %d cases", n)
	}
	t.Logf("%d cases", n)
}

// TestInsertionOverlayControl: an acknowledgment that does not account for the
// bytes added is found out.
func TestInsertionOverlayControl(t *testing.T) {
	h := newHands()
	if err := h.overlayCase(0, 100, 200, 310, 330, 0); err != nil {
		t.Fatal(err)
	}
	h.spoil = func(p *packet.TCP) {
		if p.Dst() != h.server && p.Flags() == packet.ACK && p.PayloadLen() == 0 {
			p.SetAck(p.Ack().Add(packet.Size(len(added))), packet.ChecksumVerified)
		}
	}
	if err := h.overlayCase(1, 100, 200, 310, 330, 0); err == nil {
		t.Error("it is not")
	}
}
