// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// Tap shows what becomes of the packets of some clients. Whoever drives the
// engine calls Tap.Step in place of Engine.Step while somebody watches, so that
// an engine that nobody watches pays nothing but its driver's look for a tap.
// It belongs to the engine's thread. It copies packets and so allocates.
type Tap struct {
	// Client says whether a client's packets are watched.
	Client func(packet.Addr) bool
	// Record gets every step that concerned a watched client. It must not
	// block; the Passage is its own.
	Record func(Passage)

	before [reasonCount]uint64
}

// Passage is one step of the engine, as far as watched clients go.
type Passage struct {
	Now     int64
	In      []byte   // the packet that came, nil for a step without one
	Out     [][]byte // what went out for it, in order; the rewritten packet last
	Reasons []Reason // what was counted in the step
	// Decided is the server that the client of In is bound to after the step,
	// farm.Server.ID, 0 for none.
	Decided uint16
}

// Step is e.Step with a look at it.
func (t *Tap) Step(e *Engine, now int64, ev *Event, out *Output) {
	was := t.known(e, ev)
	first := out.Len()
	var in []byte
	if was != (packet.Addr{}) {
		in = append(in, ev.Data...) // the step writes over it
	}
	for i := range t.before {
		t.before[i] = e.Count[i].Load()
	}
	e.Step(now, ev, out)
	p := Passage{Now: now, In: in}
	for i := first; i < out.Len(); i++ {
		t.collect(e, &p, out.Packet(i), was)
	}
	if ev.Verdict == Rewrite {
		t.collect(e, &p, ev.Data, was)
	}
	if in == nil && p.Out == nil {
		return
	}
	for i := range t.before {
		if e.Count[i].Load() != t.before[i] {
			p.Reasons = append(p.Reasons, Reason(i))
		}
	}
	p.Decided = e.decided(in)
	t.Record(p)
}

// SYN is h.SYN with a look at it.
func (t *Tap) SYN(h *Handshake, now int64, b []byte, st packet.ChecksumState, out *Output) {
	first := out.Len()
	h.SYN(now, b, st, out)
	v, problem := packet.ParseTCP(b)
	if problem != packet.OK || !t.Client(v.Src().Addr) {
		return
	}
	p := Passage{Now: now, In: append([]byte(nil), b...)}
	for i := first; i < out.Len(); i++ {
		p.Out = append(p.Out, append([]byte(nil), out.Packet(i)...))
	}
	t.Record(p)
}

// known returns the watched client that an incoming packet belongs to, or the
// zero address.
func (t *Tap) known(e *Engine, ev *Event) (none packet.Addr) {
	if ev.Kind != Packet {
		return none
	}
	p, problem := packet.ParseTCP(ev.Data)
	if problem != packet.OK {
		return none
	}
	a := p.Src().Addr
	if e.isSNIP(p.Dst()) {
		key := p.Tuple()
		if a = e.clientOf(&key); a == none {
			return none
		}
	}
	if !t.Client(a) {
		return none
	}
	return a
}

// collect keeps an outgoing packet if it is for a watched client, or for the
// server connection of one. One that nobody is bound to any more is taken for
// that of the client whose packet came in.
func (t *Tap) collect(e *Engine, p *Passage, b []byte, was packet.Addr) {
	v, problem := packet.ParseTCP(b)
	if problem != packet.OK {
		return
	}
	a := v.Dst().Addr
	if e.isSNIP(v.Src()) {
		key := v.Tuple().Reverse()
		if a = e.clientOf(&key); a == (packet.Addr{}) {
			a = was
		}
	}
	if a != (packet.Addr{}) && t.Client(a) {
		p.Out = append(p.Out, append([]byte(nil), b...))
	}
}

// clientOf returns the address of the client that is bound to a server
// connection, the zero address if none is.
func (e *Engine) clientOf(key *packet.Tuple) (none packet.Addr) {
	s := e.servers.Lookup(key)
	if s == 0 || e.servers.At(s).Cli == 0 {
		return none
	}
	return e.clients.Key(e.servers.At(s).Cli).Src.Addr
}

func (e *Engine) isSNIP(ep packet.Endpoint) bool {
	for _, ports := range e.opt.SNIPs {
		if ports.Addr == ep.Addr && ports.Has(ep.Port) {
			return true
		}
	}
	return false
}

// decided is the server that the client of a packet is bound to.
func (e *Engine) decided(in []byte) uint16 {
	p, problem := packet.ParseTCP(in)
	if in == nil || problem != packet.OK {
		return 0
	}
	key := p.Tuple()
	var r splice.Ref
	if e.isSNIP(key.Dst) {
		if s := e.servers.Lookup(&key); s != 0 {
			return e.servers.At(s).ID
		}
		return 0
	}
	if r = e.clients.Lookup(&key); r == 0 || e.clients.At(r).Srv == 0 {
		return 0
	}
	return e.servers.At(e.clients.At(r).Srv).ID
}
