// SPDX-License-Identifier: Apache-2.0

// Package model is an explicit-state model of dispatch and release: two
// clients with one request each that must not run twice, an engine that may
// crash, and servers behind pooled connections, joined by a network that
// delivers in any order, loses and duplicates. Check enumerates every schedule
// within small budgets and looks at two invariants in every state:
//
//   - a request is applied at most once (INV-4);
//   - a byte of one exchange reaches only the client that it belongs to (INV-2).
//
// The model is deliberately smaller than the engine: one segment per request
// and per response, numbers that count exchanges. What it shows is that the
// order of the steps (hold, record, dispatch, acknowledge, release, bind) is
// right; that the engine takes these steps is the simulator's business. Every
// rule can be switched off, and then the model must find a violation.
//
// The package shares no code with the engine.
package model

import (
	"fmt"
	"slices"
	"strings"
)

// Rules are what keeps the invariants. The zero value has none of them.
type Rules struct {
	RecordFirst  bool // the record is durable before the first byte goes to a server
	Tombstones   bool // a closed connection is remembered while its first segment may come again
	DurableTombs bool // and by a successor, too
	EpochFilter  bool // what a server sends below the epoch's base reaches no client
	ProofOnly    bool // a request is dispatched again only if the server's ack proves that it never had it
}

// All are the rules as the engine keeps them.
func All() Rules { return Rules{true, true, true, true, true} }

// Budget bounds a check.
type Budget struct {
	Losses, Duplicates, Retransmissions, Crashes, Closes int8
}

const (
	clients  = 2
	conns    = 3
	exchange = 3 // positions on one connection
	inFlight = 5
)

type kind uint8

const (
	none  kind = iota
	reqC       // client → engine: the first segment
	fwdS       // engine → server: the request at a position
	respS      // server → engine: the response at a position
	respC      // engine → client
	ackC       // client → engine: all of the response
	ackS       // engine → server
	finS       // server → engine: closed, with what it has acknowledged
)

var kindNames = [...]string{"-", "REQ", "FWD", "RESP", "RESPC", "ACK", "ACKS", "FIN"}

type msg struct {
	k     kind
	peer  uint8 // client, or connection
	pos   uint8 // position, or acknowledgment
	owner uint8 // whose bytes they are, client + 1
}

type phase uint8

const (
	unknown phase = iota
	held          // volatile: the client has the bytes, too
	bound
	sent // bound, and the request went out
	done // a tombstone
	gone // answered with an error; also a tombstone
)

type client struct {
	phase uint8 // 0 silent, 1 asked, 2 answered
	got   uint8 // bits of owners
}

type record struct {
	phase   phase
	conn    uint8
	durable bool
}

type conn struct {
	open  bool  // the engine knows it
	used  bool  // it exists at the server
	owner uint8 // bound client + 1
	base  uint8 // position of the present or next exchange
}

type server struct {
	closed bool
	next   uint8 // position of the next request
	acked  uint8
	owner  [exchange]uint8 // whose request was at a position
}

// state is a node of the graph: comparable, so that a map finds it again.
type state struct {
	c       [clients]client
	r       [clients]record
	p       [conns]conn
	s       [conns]server
	net     [inFlight]msg // sorted
	applied [clients]uint8
	b       Budget
}

func (st *state) send(m msg) bool {
	for i := range st.net {
		if st.net[i] == m {
			return true // a network that duplicates holds one of each
		}
	}
	for i := range st.net {
		if st.net[i].k == none {
			st.net[i] = m
			slices.SortFunc(st.net[:], func(a, b msg) int {
				return int(a.k)<<24 + int(a.peer)<<16 + int(a.pos)<<8 + int(a.owner) - (int(b.k)<<24 + int(b.peer)<<16 + int(b.pos)<<8 + int(b.owner))
			})
			return true
		}
	}
	return false // full: as if it were lost
}

// Violation is a broken invariant with the schedule that leads to it.
type Violation struct {
	What  string
	Steps []string
}

func (v *Violation) Error() string {
	return v.What + "\n  " + strings.Join(v.Steps, "\n  ")
}

// Check enumerates all schedules. It returns the number of states and the
// first violation, which has as few steps as any, or nil.
func Check(rules Rules, b Budget) (states int, v *Violation) {
	type back struct {
		from state
		step string
	}
	start := state{b: b}
	seen := map[state]back{start: {}}
	queue := []state{start}
	m := machine{rules: rules}
	for len(queue) > 0 {
		st := queue[0]
		queue = queue[1:]
		if what := st.broken(); what != "" {
			var steps []string
			for at := st; at != start; at = seen[at].from {
				steps = append(steps, seen[at].step)
			}
			slices.Reverse(steps)
			return len(seen), &Violation{what, steps}
		}
		m.each(st, func(to state, step string) {
			if _, ok := seen[to]; !ok {
				seen[to] = back{st, step}
				queue = append(queue, to)
			}
		})
	}
	return len(seen), nil
}

func (st *state) broken() string {
	for i := range clients {
		if st.applied[i] > 1 {
			return fmt.Sprintf("the request of client %d was applied %d times", i, st.applied[i])
		}
		if st.c[i].got&^(1<<i) != 0 {
			return fmt.Sprintf("client %d got bytes of another exchange", i)
		}
	}
	return ""
}

type machine struct{ rules Rules }

// each calls next for every step that is possible in st.
func (m *machine) each(st state, next func(state, string)) {
	for i := range uint8(clients) {
		switch st.c[i].phase {
		case 0:
			to := st
			to.c[i].phase = 1
			to.send(msg{k: reqC, peer: i, owner: i + 1})
			next(to, fmt.Sprintf("client %d asks", i))
		case 1:
			if st.b.Retransmissions > 0 {
				to := st
				to.b.Retransmissions--
				to.send(msg{k: reqC, peer: i, owner: i + 1})
				next(to, fmt.Sprintf("client %d repeats", i))
			}
		}
		m.engine(st, i, next)
	}
	for j := range uint8(conns) {
		m.server(st, j, next)
	}
	for i, g := range st.net {
		if g.k == none {
			continue
		}
		to := st
		to.net[i] = msg{}
		name := fmt.Sprintf("%s(%d,%d)", kindNames[g.k], g.peer, g.pos)
		if st.b.Losses > 0 {
			lost := to
			lost.b.Losses--
			lost.tidy()
			next(lost, name+" is lost")
		}
		if st.b.Duplicates > 0 {
			twice := st
			twice.b.Duplicates--
			m.deliver(&twice, g)
			twice.tidy()
			next(twice, name+" arrives, a copy stays behind")
		}
		m.deliver(&to, g)
		to.tidy()
		next(to, name+" arrives")
	}
	if st.b.Crashes > 0 {
		to := st
		to.b.Crashes--
		m.crash(&to)
		next(to, "the engine dies and comes back")
	}
}

func (st *state) tidy() {
	n := st.net
	st.net = [inFlight]msg{}
	for _, g := range n {
		if g.k != none {
			st.send(g)
		}
	}
}

// engine takes the engine's own steps for a client: bind and record, and
// dispatch, in the order that the rules say.
func (m *machine) engine(st state, i uint8, next func(state, string)) {
	r := st.r[i]
	switch {
	case r.phase == held:
		for j := range uint8(conns) {
			p := st.p[j]
			fresh := !p.used && (j == 0 || st.p[j-1].used)
			if (!p.open || p.owner != 0 || p.base >= exchange) && !fresh {
				continue
			}
			to := st
			to.p[j].open, to.p[j].used, to.p[j].owner = true, true, i+1
			to.r[i] = record{bound, j, m.rules.RecordFirst}
			next(to, fmt.Sprintf("client %d is bound to connection %d", i, j))
		}
	case r.phase == bound:
		to := st
		to.r[i].phase = sent
		to.send(msg{k: fwdS, peer: r.conn, pos: st.p[r.conn].base, owner: i + 1})
		next(to, fmt.Sprintf("the request of client %d goes to connection %d", i, r.conn))
	case r.phase == sent && !r.durable:
		to := st
		to.r[i].durable = true
		next(to, fmt.Sprintf("client %d is recorded late", i))
	}
}

func (m *machine) server(st state, j uint8, next func(state, string)) {
	s := st.s[j]
	if !st.p[j].used || s.closed {
		return
	}
	if s.acked < s.next && st.b.Retransmissions > 0 {
		to := st
		to.b.Retransmissions--
		to.send(msg{k: respS, peer: j, pos: s.acked, owner: s.owner[s.acked]})
		next(to, fmt.Sprintf("server %d repeats its response", j))
	}
	if st.b.Closes > 0 {
		to := st
		to.b.Closes--
		to.s[j].closed = true
		to.send(msg{k: finS, peer: j, pos: s.next})
		next(to, fmt.Sprintf("server %d closes", j))
	}
}

// deliver hands a message to its receiver.
func (m *machine) deliver(st *state, g msg) {
	switch g.k {
	case reqC:
		i := g.peer
		switch r := &st.r[i]; r.phase {
		case unknown:
			*r = record{phase: held}
		case done:
			if !m.rules.Tombstones {
				*r = record{phase: held}
			}
		case sent:
			st.send(msg{k: fwdS, peer: r.conn, pos: st.p[r.conn].base, owner: i + 1})
		}
	case fwdS:
		s := &st.s[g.peer]
		switch {
		case s.closed || g.pos >= exchange:
		case g.pos == s.next:
			st.applied[g.owner-1]++
			s.owner[g.pos] = g.owner
			s.next++
			st.send(msg{k: respS, peer: g.peer, pos: g.pos, owner: g.owner})
		case g.pos < s.next && g.pos >= s.acked:
			st.send(msg{k: respS, peer: g.peer, pos: g.pos, owner: s.owner[g.pos]})
		}
	case respS:
		p := &st.p[g.peer]
		switch {
		case !p.open:
		case p.owner != 0 && (g.pos == p.base || !m.rules.EpochFilter):
			st.send(msg{k: respC, peer: p.owner - 1, owner: g.owner})
		case g.pos < p.base:
			st.send(msg{k: ackS, peer: g.peer, pos: g.pos + 1})
		}
	case respC:
		c := &st.c[g.peer]
		if c.phase == 1 {
			c.phase = 2
			c.got |= 1 << (g.owner - 1)
		}
		st.send(msg{k: ackC, peer: g.peer})
	case ackC:
		if st.r[g.peer].phase == sent {
			m.release(st, g.peer)
		}
	case ackS:
		s := &st.s[g.peer]
		s.acked = max(s.acked, min(g.pos, s.next))
	case finS:
		p := &st.p[g.peer]
		if !p.open {
			return
		}
		p.open = false
		if p.owner == 0 {
			return
		}
		r := &st.r[p.owner-1]
		p.owner = 0
		if g.pos <= p.base || !m.rules.ProofOnly {
			*r = record{phase: held}
		} else {
			*r = record{phase: gone}
		}
	}
}

// release ends a client's exchange and gives its connection back.
func (m *machine) release(st *state, i uint8) {
	j := st.r[i].conn
	p := &st.p[j]
	p.base++
	p.owner = 0
	st.send(msg{k: ackS, peer: j, pos: p.base})
	st.r[i] = record{phase: done}
}

// crash forgets what is not durable.
func (m *machine) crash(st *state) {
	for i := range st.r {
		r := &st.r[i]
		switch {
		case r.phase == held, r.phase >= bound && r.phase <= sent && !r.durable:
			if r.phase != held {
				st.p[r.conn].open, st.p[r.conn].owner = false, 0
			}
			*r = record{}
		case r.phase == bound || r.phase == sent:
			// The successor cannot know whether the request went out: it goes
			// on as if it had, and the client's retransmission sends it again.
			r.phase = sent
		case (r.phase == done || r.phase == gone) && !m.rules.DurableTombs:
			*r = record{}
		}
	}
}
