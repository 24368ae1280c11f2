// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bytes"
	"encoding/binary"

	"github.com/weirgate/weir/integration/sim/tcp"
	"github.com/weirgate/weir/module/packet"
)

// observer watches the four directions and knows what the applications write.
// It has its own idea of every connection, in positions of 64 bits, and of which
// exchange runs over which two connections; it learns both from the packets and
// from the applications, never from the engine.
type observer struct {
	w       *World
	clients map[packet.Endpoint][]*clientFlow // by the client's end, newest last
	servers map[packet.Tuple][]*serverFlow    // by (server, SNIP port), newest last
	scratch []byte
}

// What an interface unit may advertise on its own account, bytes (SPLICING.md,
// hand-over; DESIGN.md section 3).
const (
	holdWindow  = 16 << 10
	handOver    = 2 * 1400
	drainWindow = 64 << 10
)

func (o *observer) init(w *World) {
	*o = observer{w: w, clients: map[packet.Endpoint][]*clientFlow{}, servers: map[packet.Tuple][]*serverFlow{}}
}

// wide brings a sequence number to the position nearest to near, in a stream
// that began with iss.
func wide(seq packet.Seq, iss uint32, near uint64) int64 {
	return int64(near) + int64(int32(uint32(seq)-iss-uint32(near)))
}

// answer is a run of the client's stream: one server's response, or one of the
// engine's own.
type answer struct {
	start  uint64 // position
	size   uint64 // of a server's response
	own    bool
	bytes  []byte // of the engine's own
	whole  bool   // the end of the engine's own is known
	closes bool   // it announces the end of the connection
	status int
	stood  int64 // for how long nothing new had reached the engine when it began
}

func (a *answer) end() uint64 {
	if a.own {
		return a.start + uint64(len(a.bytes))
	}
	return a.start + a.size
}

// clientFlow is one client connection as the observer sees it.
type clientFlow struct {
	c       *client
	iss     uint32
	in      tcp.Ranges // positions of the client's stream that the engine has seen
	edge    uint64     // right edge that the client advertised
	top     uint64     // highest position that the engine sent to it, plus one
	acked   uint64     // highest acknowledgment that the engine sent to it
	answers []answer
	heard   int64 // when something of the client's reached the engine
	news    int64 // when something new did, of its own or of its server
	silent  bool  // for longer than silence nothing did
	reset   bool  // the engine's RST was sent
	closed  bool  // the engine's FIN was sent
	fin     uint64
}

func (f *clientFlow) answer(i int) *answer {
	if i < len(f.answers) {
		return &f.answers[i]
	}
	return nil
}

func (o *observer) dialled(c *client) *clientFlow {
	f := &clientFlow{c: c, top: 1, acked: 1}
	o.clients[c.local] = append(o.clients[c.local], f)
	return f
}

// binding is one request on a server connection.
type binding struct {
	x         *Exchange
	start     uint64 // position of its first byte
	respStart uint64 // position of the response's first byte
	client    *clientFlow
	cliResp   uint64 // position of that byte in the client's stream
}

func (b *binding) end() uint64 { return b.start + b.x.served.size() }

// serverFlow is one server connection as the observer sees it.
type serverFlow struct {
	key      packet.Tuple // from the server to the SNIP port
	server   *serverConn
	conn     *tcp.Conn
	iss      uint32 // the server's
	ess      uint32 // the engine's
	in       tcp.Ranges
	edge     uint64 // right edge that the server advertised
	top      uint64 // highest position that the engine sent, plus one
	acked    uint64
	heard    int64 // highest acknowledgment of the server's that reached the engine
	bindings []binding
	head     []byte // bytes of a request whose nonce is not complete
	reset    bool   // the engine sent a RST
}

func (f *serverFlow) current() *binding {
	if n := len(f.bindings); n > 0 {
		return &f.bindings[n-1]
	}
	return nil
}

// accepted notes a connection that a server accepts.
func (o *observer) accepted(c *serverConn, key packet.Tuple, iss uint32) *serverFlow {
	f := &serverFlow{server: c, key: key, iss: iss, top: 1, acked: 1}
	o.servers[key] = append(o.servers[key], f)
	return f
}

// opened learns the engine's number when the handshake is over.
func (f *serverFlow) opened(conn *tcp.Conn) {
	f.conn = conn
	f.ess = conn.IRS()
}

// sent notes what an endpoint sends: the windows that it advertises.
func (o *observer) sent(d Direction, b []byte) {
	t, problem := packet.ParseTCP(b)
	if problem != packet.OK {
		o.w.fail("simulator", "an endpoint sends a packet that is %v", problem)
		return
	}
	if t.Flags().Has(packet.RST) || !t.Flags().Has(packet.ACK) {
		return
	}
	if d == FromClient {
		f := last(o.clients[t.Src()])
		if c := f.c.conn; c != nil && c.Synchronised() {
			at := wide(t.Ack(), c.IRS(), f.top)
			f.edge = max(f.edge, uint64(at)+uint64(t.Window())<<f.shift())
		}
		return
	}
	f := last(o.servers[t.Tuple()])
	if f == nil {
		return
	}
	if t.Flags().Has(packet.SYN) {
		f.ess = uint32(t.Ack()) - 1
		f.edge = max(f.edge, 1+uint64(t.Window()))
		return
	}
	if c := f.conn; c != nil {
		at := wide(t.Ack(), f.ess, f.top)
		f.edge = max(f.edge, uint64(at)+uint64(t.Window())<<c.Scale())
	}
}

// shift is the window scale of the client, if the handshake agreed on one.
func (f *clientFlow) shift() uint8 { return f.c.conn.Scale() }

func last[T any](v []*T) *T {
	if len(v) == 0 {
		return nil
	}
	return v[len(v)-1]
}

// seen notes a good packet that reaches the engine.
func (o *observer) seen(d Direction, t *packet.TCP) {
	n := uint64(t.PayloadLen())
	fl := t.Flags()
	if fl.Has(packet.RST) {
		return
	}
	if d == FromClient {
		for _, f := range o.clients[t.Src()] {
			f.silent = f.silent || f.heard != 0 && o.w.now-f.heard > silence
			f.heard = o.w.now
			if at := wide(t.Seq(), f.iss, max(f.in.End(), 1)); plausible(at, f.in.End()) {
				before := f.in.End()
				mark(&f.in, uint64(at), n, fl)
				if f.in.End() > before {
					f.news = o.w.now
				}
			}
		}
		return
	}
	for _, f := range o.servers[t.Tuple()] {
		if at := wide(t.Seq(), f.iss, max(f.in.End(), 1)); plausible(at, f.in.End()) {
			before := f.in.End()
			mark(&f.in, uint64(at), n, fl)
			at := wide(t.Ack(), f.ess, f.top)
			if b := f.current(); b != nil && (f.in.End() > before || at > f.heard && at <= int64(f.top)) {
				b.client.news = o.w.now
			}
			if at <= int64(f.top) {
				f.heard = max(f.heard, at)
			}
		}
	}
}

// patience is how long the engine waits for anything new in an exchange, the
// scenario's timeout of a response.
const patience = 60 * second

// silence is after how long the engine may take a client for gone, to which its
// server talks: twice the time for which it waits for a server.
const silence = 2*60*second - second

// plausible says whether a position can belong to a stream that has reached
// end: incarnations of one 4-tuple differ by more.
func plausible(at int64, end uint64) bool { return at >= 0 && at < int64(end)+1<<26 }

func mark(in *tcp.Ranges, at, n uint64, fl packet.Flags) {
	if fl.Has(packet.SYN) {
		n++
	}
	if fl.Has(packet.FIN) {
		n++
	}
	in.Add(at, at+n)
}

// emitted checks a packet that the engine lets out and says where it goes.
func (o *observer) emitted(b []byte, partial bool) (Direction, bool) {
	w := o.w
	t, problem := packet.ParseTCP(b)
	if problem != packet.OK {
		w.fail("INV-3", "the engine lets out a packet that is %v", problem)
		return ToClient, false
	}
	d := ToClient
	if t.Src().Addr == w.snip {
		d = ToServer
	}
	switch {
	case !t.IPHeaderOK():
		w.failFlow(t.Dst(), packet.Tuple{}, "INV-6", "a packet %s has a wrong IP checksum", t.Tuple())
		return d, false
	case partial:
		// The pseudo header's sum, which hardware or the kernel completes.
		c := append([]byte(nil), b...)
		ct, _ := packet.ParseTCP(c)
		ct.FillPartial()
		if ct.Checksum() != t.Checksum() {
			w.failFlow(t.Dst(), packet.Tuple{}, "INV-6", "a packet %s has a wrong partial checksum", t.Tuple())
			return d, false
		}
	case !checksumOK(b, &t):
		w.failFlow(t.Dst(), packet.Tuple{}, "INV-6", "a packet %s has a wrong checksum", t.Tuple())
		return d, false
	}
	if t.Urgent() != 0 || t.Flags()&(packet.URG|packet.ECE|packet.CWR) != 0 {
		w.failFlow(t.Dst(), packet.Tuple{}, "INV-3", "a packet %s has flags %v and urgent pointer %d", t.Tuple(), t.Flags(), t.Urgent())
		return d, false
	}
	if d == ToServer {
		if p := t.Src().Port; p < firstPort || int(p) >= firstPort+w.Scenario.Ports || w.hosts[t.Dst().Addr] == nil {
			w.fail("INV-3", "a packet %s comes from no port of the SNIP or goes to no server", t.Tuple())
			return d, false
		}
		o.toServer(&t)
	} else {
		if t.Src() != w.vip || len(o.clients[t.Dst()]) == 0 {
			w.fail("INV-3", "a packet %s does not go from the VIP to a client", t.Tuple())
			return d, false
		}
		o.toClient(&t)
	}
	return d, w.viol == nil
}

// checksumOK sums as RFC 1071 says, word by word, with nobody's help.
func checksumOK(b []byte, t *packet.TCP) bool {
	at := 20
	var sum uint64
	add := func(b []byte) {
		for ; len(b) >= 2; b = b[2:] {
			sum += uint64(binary.BigEndian.Uint16(b))
		}
		if len(b) == 1 {
			sum += uint64(b[0]) << 8
		}
	}
	if b[0]>>4 == 6 {
		at = 40
		add(b[8:40])
	} else {
		add(b[12:20])
	}
	sum += 6 + uint64(len(t.Raw)-at)
	add(t.Raw[at:])
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return sum == 0xffff
}

// foreign looks for a nonce in bytes that should not be there: INV-2 rather
// than INV-1.
func (o *observer) foreign(b []byte, own *client) (string, *Exchange) {
	for i := 0; i+32 <= len(b); i++ {
		if x := o.w.byNonce[Nonce(b[i:])]; x != nil && x.conn != own {
			return "INV-2", x
		}
	}
	return "INV-1", nil
}

// limits checks what the engine says of its memory (INV-7).
func (o *observer) limits() {
	u := o.w.eng.Usage()
	s := o.w.Scenario
	if u.Clients > s.Clients || u.Servers > s.Tables || u.Held > s.Clients || u.Idle > u.Servers {
		o.w.fail("INV-7", "the engine holds %+v with tables of %d clients and %d servers", u, s.Clients, s.Tables)
	}
}

// final checks what can only be said at the end: repeated requests are counted
// (INV-4).
func (o *observer) final() {
	w := o.w
	repeated := 0
	for _, c := range w.clients {
		for _, x := range c.exchanges {
			repeated += max(x.reached-1, 0)
			if x.answered && x.reached == 0 {
				w.fail("INV-4", "request %s was answered, and no server has seen it", x.Nonce)
			}
		}
	}
	if n := w.redispatched(); uint64(repeated) > n {
		w.fail("INV-4", "requests reached a second server %d times, and only %d redispatches without proof are counted", repeated, n)
	}
}

// ownHead reads as much of an answer of the engine's own as there is.
func (a *answer) ownHead(head bool) {
	i := bytes.Index(a.bytes, []byte("\r\n\r\n"))
	if i < 0 {
		return
	}
	a.status = int(a.bytes[9]-'0')*100 + int(a.bytes[10]-'0')*10 + int(a.bytes[11]-'0')
	a.closes = bytes.Contains(a.bytes[:i], []byte("\r\nConnection: close\r\n"))
	n := 0
	if k := bytes.Index(a.bytes[:i], []byte("\r\nContent-Length: ")); k >= 0 {
		for _, c := range a.bytes[k+18 : i+2] {
			if c < '0' || c > '9' {
				break
			}
			n = n*10 + int(c-'0')
		}
	}
	if head {
		n = 0
	}
	a.whole = len(a.bytes) == i+4+n
}
