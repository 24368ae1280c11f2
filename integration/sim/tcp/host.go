// SPDX-License-Identifier: Apache-2.0

package tcp

import "github.com/weirgate/weir/module/packet"

// Listener says what a host does with a SYN: the habits and the user of the new
// connection, or ok = false to refuse it.
type Listener func(remote packet.Endpoint) (opt Options, app App, ok bool)

// Host is a machine with one or more addresses.
type Host struct {
	env       *Env
	conns     map[packet.Tuple]*Conn // Src is the remote end, as in arriving packets
	listeners map[packet.Endpoint]Listener
	again     func(old *Conn, syn *packet.TCP)
	buf       []byte

	// Silent hosts do not answer what belongs to no connection.
	Silent bool

	BadChecksum int // packets refused for a wrong checksum
	Unknown     int // segments of no connection
	Resets      int // sent for them
}

// NewHost makes a host in a world.
func NewHost(env *Env) *Host {
	h := &Host{env: env, conns: map[packet.Tuple]*Conn{}, listeners: map[packet.Endpoint]Listener{}}
	h.again = func(old *Conn, syn *packet.TCP) {
		old.remove(nil)
		h.packet(syn)
	}
	return h
}

// Listen makes the host accept connections to an endpoint; nil ends that.
func (h *Host) Listen(local packet.Endpoint, l Listener) { h.listeners[local] = l }

// Dial opens a connection. A connection that still exists between the two
// ends is an error of the caller.
func (h *Host) Dial(local, remote packet.Endpoint, opt Options, app App) *Conn {
	key := packet.Tuple{Src: remote, Dst: local}
	if old := h.conns[key]; old != nil {
		if old.st != TimeWait {
			panic("tcp: the ends of a new connection are taken: " + key.String())
		}
		old.remove(nil)
	}
	c := newConn(h, local, remote, opt, app)
	c.st = SynSent
	h.conns[key] = c
	c.sendSYN(packet.SYN)
	c.rtxAt = h.env.Now() + c.rto
	c.rearm()
	return c
}

// Len is the number of connections, those in TIME-WAIT included.
func (h *Host) Len() int { return len(h.conns) }

// Conn returns the connection between two ends of the host's view, or nil.
func (h *Host) Conn(local, remote packet.Endpoint) *Conn {
	return h.conns[packet.Tuple{Src: remote, Dst: local}]
}

func (h *Host) forget(c *Conn) {
	key := packet.Tuple{Src: c.Remote, Dst: c.Local}
	if h.conns[key] == c {
		delete(h.conns, key)
	}
}

// Packet takes an arriving IP packet. The host keeps nothing of its memory.
func (h *Host) Packet(b []byte) {
	p, problem := packet.ParseTCP(b)
	if problem != packet.OK || !p.IPHeaderOK() || !p.VerifyChecksum() {
		h.BadChecksum++
		return
	}
	h.packet(&p)
}

func (h *Host) packet(p *packet.TCP) {
	key := p.Tuple()
	if c := h.conns[key]; c != nil {
		c.segment(p)
		return
	}
	fl := p.Flags()
	if fl&(packet.SYN|packet.ACK|packet.RST|packet.FIN) == packet.SYN {
		if l := h.listeners[key.Dst]; l != nil {
			if opt, app, ok := l(key.Src); ok {
				h.accept(&key, p, opt, app)
				return
			}
		}
	}
	h.Unknown++
	h.refuse(p)
}

func (h *Host) accept(key *packet.Tuple, p *packet.TCP, opt Options, app App) {
	c := newConn(h, key.Dst, key.Src, opt, app)
	c.st = SynRcvd
	c.take(p)
	c.wnd = uint64(p.Window())
	c.maxWnd = c.wnd
	h.conns[*key] = c
	c.sendSYN(packet.SYN | packet.ACK)
	c.rtxAt = h.env.Now() + c.rto
	c.rearm()
}

// refuse sends the reset that a segment deserves which belongs to nothing (RFC
// 9293 section 3.10.7.1).
func (h *Host) refuse(p *packet.TCP) {
	fl := p.Flags()
	if fl.Has(packet.RST) || h.Silent {
		return
	}
	h.Resets++
	s := packet.Segment{Src: p.Dst(), Dst: p.Src(), TTL: 64}
	if fl.Has(packet.ACK) {
		s.Seq, s.Flags = p.Ack(), packet.RST
	} else {
		s.Ack, s.Flags = p.End(), packet.RST|packet.ACK
	}
	h.env.Emit(packet.AppendSegment(make([]byte, 0, 60), &s, nil), 0)
}

// scratch returns memory for the payload of one segment.
func (h *Host) scratch(n int) []byte {
	if cap(h.buf) < n {
		h.buf = make([]byte, max(n, 2048))
	}
	return h.buf[:n]
}

// TooBig takes an ICMP error that says that a segment of a connection's, which
// began with the sequence number seq, did not fit into an MTU. It counts only
// if that segment can be under way (RFC 5927 section 4.1).
func (h *Host) TooBig(local, remote packet.Endpoint, seq uint32, mtu int, v6 bool) {
	c := h.Conn(local, remote)
	if c == nil || c.st == SynSent || c.st == SynRcvd || c.st == TimeWait {
		return
	}
	mss := mtu - 40
	if v6 {
		mss = mtu - 60
	}
	if pos := at(seq, c.iss, c.una); pos < int64(c.una) || pos >= int64(c.top) || mss >= c.mss || mss < 64 {
		return
	}
	// Everything under way is sent again in smaller pieces (RFC 1191 section
	// 6.4; Linux: tcp_simple_retransmit).
	c.mss, c.narrow = mss, true
	c.recovery, c.dups, c.again = false, 0, 0
	c.recover = c.top
	c.nxt = c.una
	c.timed = 0
	c.flush()
}
