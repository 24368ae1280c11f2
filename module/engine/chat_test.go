// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/packet"
)

// A chat is what the HTTP tests are written in: it stands for the TCP of a
// client and of all servers, so that a test says bytes in place of segments.
// Nothing is lost on the way. Servers acknowledge at once and accept every
// connection; the client acknowledges what it has got unless it is told not to.
type chat struct {
	g      *rig
	t      *testing.T
	addr   netip.AddrPort
	seq    packet.Seq // next byte of the client
	ack    packet.Seq // next byte that it expects
	acked  packet.Seq // the engine's highest acknowledgment
	got    []byte     // its stream
	fin    bool       // the engine's FIN came
	rst    bool
	lazy   bool // the client does not acknowledge
	others map[netip.AddrPort]*chat
	conns  map[uint16]*chatServer
	order  []*chatServer // in the order of their SYNs
	deaf   bool          // servers do not acknowledge
	window uint16        // of servers, 0 = 60000
	last   []byte        // the last packet to a client
}

// A chatServer is one server connection.
type chatServer struct {
	addr     netip.AddrPort
	port     uint16
	seq, ack packet.Seq
	got      []byte // its stream
	fin, rst bool
}

// newChat has a client connect.
func newChat(g *rig, addr netip.AddrPort, isn packet.Seq) *chat {
	g.t.Helper()
	k := &chat{g: g, t: g.t, addr: addr, conns: map[uint16]*chatServer{}, others: map[netip.AddrPort]*chat{}}
	k.others[addr] = k
	k.dial(isn)
	return k
}

// join has another client connect; the servers are the same.
func (k *chat) join(addr netip.AddrPort, isn packet.Seq) *chat {
	k.t.Helper()
	o := &chat{g: k.g, t: k.t, addr: addr, conns: k.conns, others: k.others}
	k.others[addr] = o
	o.dial(isn)
	return o
}

func (k *chat) dial(isn packet.Seq) {
	k.t.Helper()
	iss := isn*2654435761 + 77
	k.g.cookies[isn] = iss
	k.g.SYN(k.addr, isn)
	k.seq, k.ack, k.acked = isn+1, iss+1, isn+1
	k.raw(seg{fl: ack})
}

// raw sends a segment of the client's with its present numbers.
func (k *chat) raw(s seg) {
	k.t.Helper()
	s.seq, s.ack = k.seq, k.ack
	k.inject(k.addr, vip, s)
}

// at sends client bytes at an offset from the present number; nothing moves.
func (k *chat) at(off int, data string, fl packet.Flags) {
	k.t.Helper()
	k.inject(k.addr, vip, seg{fl: fl, seq: k.seq.Add(packet.Size(uint32(off))), ack: k.ack, data: data})
}

// send sends client bytes in order, in segments of at most 1,000 bytes.
func (k *chat) send(data string) {
	k.t.Helper()
	k.cut(data, 1000)
}

// cut is send with another size of segments.
func (k *chat) cut(data string, size int) {
	k.t.Helper()
	for len(data) > 0 {
		n := min(len(data), size)
		s := seg{fl: ack | psh, seq: k.seq, ack: k.ack, data: data[:n]}
		k.seq = k.seq.Add(packet.Size(n))
		data = data[n:]
		k.inject(k.addr, vip, s)
	}
}

// close sends the client's FIN.
func (k *chat) close() {
	k.t.Helper()
	s := seg{fl: ack | fin, seq: k.seq, ack: k.ack}
	k.seq++
	k.inject(k.addr, vip, s)
}

// server returns the n-th server connection that was opened.
func (k *chat) server(n int) *chatServer {
	k.t.Helper()
	o := k.first()
	if n >= len(o.order) {
		k.t.Fatalf("only %d server connections were opened", len(o.order))
	}
	return o.order[n]
}

func (k *chat) first() *chat {
	for _, o := range k.others {
		if len(o.order) > 0 {
			return o
		}
	}
	return k
}

// reply sends bytes of a server, in segments of at most 1,000 bytes.
func (k *chat) reply(v *chatServer, data string) {
	k.t.Helper()
	for len(data) > 0 {
		n := min(len(data), 1000)
		k.fromServer(v, seg{fl: ack | psh, data: data[:n]})
		data = data[n:]
	}
}

// hangUp sends a server's FIN.
func (k *chat) hangUp(v *chatServer) {
	k.t.Helper()
	k.fromServer(v, seg{fl: ack | fin})
}

func (k *chat) fromServer(v *chatServer, s seg) {
	k.t.Helper()
	s.seq, s.ack, s.win = v.seq, v.ack, k.serverWindow()
	v.seq = v.seq.Add(packet.Size(len(s.data)))
	if s.fl.Has(fin) {
		v.seq++
	}
	k.inject(v.addr, ep2(v.port), s)
}

func (k *chat) serverWindow() uint16 {
	if k.window != 0 {
		return k.window
	}
	return 60000
}

// inject gives the engine a segment and plays on with what comes of it.
func (k *chat) inject(src, dst netip.AddrPort, s seg) {
	k.t.Helper()
	g := k.g
	g.out.Reset()
	b := g.raw(src, dst, s)
	ev := Event{Kind: Packet, Data: append(make([]byte, 0, len(b)+256), b...)}
	g.e.Step(g.now, &ev, &g.out)
	k.take(&ev)
}

// wait lets time pass.
func (k *chat) wait(d int64) {
	k.t.Helper()
	end := k.g.now + d
	for {
		next := k.g.e.NextDue()
		if next == 0 || next > end {
			break
		}
		k.g.now = max(next, k.g.now)
		k.g.out.Reset()
		k.g.e.Step(k.g.now, &Event{Kind: Tick}, &k.g.out)
		k.take(nil)
	}
	k.g.now = end
}

// take hands what the engine let out to the endpoints.
func (k *chat) take(ev *Event) {
	k.t.Helper()
	var all [][]byte
	for i := range k.g.out.Len() {
		all = append(all, append([]byte(nil), k.g.out.Packet(i)...))
	}
	if ev != nil && ev.Verdict == Rewrite {
		all = append(all, append([]byte(nil), ev.Data...))
	}
	var answers []func()
	for _, b := range all {
		p, problem := packet.ParseTCP(b)
		if problem != packet.OK || !p.IPHeaderOK() || !p.VerifyChecksum() {
			k.t.Fatalf("the engine let out a packet that its receiver would drop: %v", problem)
		}
		src, dst := p.Src(), p.Dst()
		var a func()
		if src.AddrPort() == vip {
			o := k.others[dst.AddrPort()]
			if o == nil {
				k.t.Fatalf("a packet for %v, who is nobody", dst)
			}
			a = o.clientGets(&p)
			o.last = b
		} else {
			a = k.first().serverGets(&p)
		}
		if a != nil {
			answers = append(answers, a)
		}
	}
	for _, a := range answers {
		a()
	}
}

func (k *chat) clientGets(p *packet.TCP) func() {
	if p.Flags().Has(rst) {
		k.rst = true
		return nil
	}
	k.acked = packet.MaxSeq(k.acked, p.Ack())
	data, end := p.Payload(), p.Seq().Add(packet.Size(p.PayloadLen()))
	if len(data) == 0 && !p.Flags().Has(fin) {
		return nil
	}
	if p.Seq().LessEq(k.ack) && k.ack.Less(end) {
		k.got = append(k.got, data[p.Seq().To(k.ack):]...)
		k.ack = end
	}
	if p.Flags().Has(fin) && end == k.ack && !k.fin {
		k.fin = true
		k.ack++
	}
	if k.lazy {
		return nil
	}
	return func() { k.raw(seg{fl: ack}) }
}

func (k *chat) serverGets(p *packet.TCP) func() {
	port := p.Src().Port
	if p.Flags().Has(packet.SYN) {
		v := &chatServer{addr: p.Dst().AddrPort(), port: port, seq: 500_000 * packet.Seq(len(k.order)+1), ack: p.Seq() + 1}
		k.conns[port] = v
		k.order = append(k.order, v)
		return func() {
			k.inject(v.addr, ep2(port), seg{fl: syn | ack, seq: v.seq - 1, ack: v.ack, win: k.serverWindow(), opts: sackPermitted})
		}
	}
	v := k.conns[port]
	if v == nil {
		k.t.Fatalf("a packet for port %d, which has no connection", port)
	}
	if p.Flags().Has(rst) {
		v.rst = true
		return nil
	}
	data, end := p.Payload(), p.Seq().Add(packet.Size(p.PayloadLen()))
	if len(data) == 0 && !p.Flags().Has(fin) {
		return nil
	}
	if p.Seq().LessEq(v.ack) && v.ack.Less(end) {
		v.got = append(v.got, data[p.Seq().To(v.ack):]...)
		v.ack = end
	}
	if p.Flags().Has(fin) && end == v.ack && !v.fin {
		v.fin = true
		v.ack++
	}
	if k.deaf {
		return nil
	}
	return func() { k.fromServer(v, seg{fl: ack}) }
}

// want checks a stream.
func (k *chat) want(what, got, want string) {
	k.t.Helper()
	if got != want {
		k.t.Fatalf("%s:\n got %q\nwant %q", what, abbreviate(got), abbreviate(want))
	}
}

func abbreviate(s string) string {
	if len(s) > 600 {
		return s[:300] + " … " + s[len(s)-300:]
	}
	return s
}

// count returns a counter.
func (k *chat) count(r Reason) uint64 { return k.g.e.Count.Get(r) }

// pooled is how many server connections are idle in the pool.
func (k *chat) pooled() int { return k.g.e.Usage().Idle }

// http writes a message with CRLF for each newline.
func http(s string) string { return strings.ReplaceAll(s, "\n", "\r\n") }
