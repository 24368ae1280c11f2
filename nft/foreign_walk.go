// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// This file follows one packet through other people's chains. What cannot be
// known here (a rate, a socket's owner, an expression that we do not
// understand) makes the answer uncertain, never wrong.

// Bits of ct state, as nft_ct gives them: enum ip_conntrack_info shifted.
const (
	ctInvalidBit   = 1 << 0
	ctNew          = 1 << 3
	ctUntrackedBit = 1 << 6
)

// A trial is one packet to be followed.
type trial struct {
	family   byte // unix.NFPROTO_IPV4 or IPV6
	src, dst netip.AddrPort
	flags    byte   // of TCP
	in, out  string // interfaces; empty where the packet has none yet or no more
	inIndex  int
	outIndex int
	mark     uint32
	marked   bool // is one of ours: never tracked
	ct       uint32
	bytes    []byte // network and transport header
	tcpAt    int
}

const (
	flagSYN = 0x02
	flagACK = 0x10
)

// assemble makes the headers that rules may look at.
func (t *trial) assemble() {
	tcp := make([]byte, 20)
	be := binary.BigEndian
	be.PutUint16(tcp[0:], t.src.Port())
	be.PutUint16(tcp[2:], t.dst.Port())
	be.PutUint32(tcp[4:], 1)
	if t.flags&flagACK != 0 {
		be.PutUint32(tcp[8:], 1)
	}
	tcp[12], tcp[13] = 5<<4, t.flags
	be.PutUint16(tcp[14:], 64240)
	var ip []byte
	if t.family == unix.NFPROTO_IPV4 {
		ip = make([]byte, 20)
		ip[0], ip[8], ip[9] = 0x45, 63, unix.IPPROTO_TCP
		ip[6] = 0x40 // don't fragment
		be.PutUint16(ip[2:], uint16(len(ip)+len(tcp)))
		copy(ip[12:], t.src.Addr().AsSlice())
		copy(ip[16:], t.dst.Addr().AsSlice())
	} else {
		ip = make([]byte, 40)
		ip[0], ip[6], ip[7] = 0x60, unix.IPPROTO_TCP, 63
		be.PutUint16(ip[4:], uint16(len(tcp)))
		copy(ip[8:], t.src.Addr().AsSlice())
		copy(ip[24:], t.dst.Addr().AsSlice())
	}
	t.tcpAt = len(ip)
	t.bytes = append(ip, tcp...)
}

// fate is what becomes of a packet in a chain.
type fate uint8

const (
	passes  fate = iota // goes on behind the chain
	accepts             // is accepted in this chain
	drops
	taken // sent elsewhere
)

// outcome of a base chain, with the deciding rule; rule is nil for a policy.
type outcome struct {
	fate  fate
	sure  bool
	chain *theirChain // that holds the rule
	rule  *theirRule
}

// walker follows packets through tables. routes answers questions about
// addresses, cached.
type walker struct {
	tables *theirTables
	routes *routeTable
}

// base follows the packet through one base chain. A drop that was merely
// possible is the outcome when nothing certain ends the packet.
func (w *walker) base(c *theirChain, t *trial) outcome {
	v := &visit{walker: w, t: t, base: c, sure: true}
	o := v.chain(c, 0)
	if o.fate == passes && c.drops {
		o = outcome{fate: drops, sure: v.sure, chain: c}
	}
	if o.fate != drops && o.fate != taken && v.possible != nil {
		return *v.possible
	}
	return o
}

// visit is one packet in one base chain.
type visit struct {
	*walker
	t        *trial
	base     *theirChain
	sure     bool     // false after a rule that may have accepted
	possible *outcome // the first end that a rule may have made
}

// deepest is netfilter's own limit of jumps within jumps.
const deepest = 16

func (v *visit) chain(c *theirChain, depth int) outcome {
	if depth > deepest {
		return outcome{fate: passes, sure: true}
	}
	for i := range c.rules {
		r := &c.rules[i]
		match, verdict := v.rule(c, r)
		if match == no || verdict == nil {
			continue
		}
		o := outcome{fate: passes, sure: v.sure, chain: c, rule: r}
		ends := false // the chain, by goto or return
		switch verdict.code {
		case unix.NFT_RETURN:
			if match == yes {
				return outcome{fate: passes, sure: v.sure}
			}
			v.sure = false
			continue
		case unix.NFT_JUMP, unix.NFT_GOTO:
			sub := v.tables.chains[objectKey{c.family, c.table, verdict.chain}]
			if sub == nil {
				continue
			}
			o = v.chain(sub, depth+1)
			ends = verdict.code == unix.NFT_GOTO
		case verdictAccept:
			o.fate = accepts
		case verdictDrop:
			o.fate = drops
		case verdictTaken:
			o.fate = taken
		default: // another program's queue: it may do as it likes
			o.fate, match = accepts, maybe
		}
		switch {
		case match == yes && (o.fate != passes || ends):
			return o
		case match == maybe && (o.fate == drops || o.fate == taken):
			o.sure = false
			if v.possible == nil {
				v.possible = &o
			}
		case match == maybe && (o.fate == accepts || ends):
			v.sure = false
		}
	}
	return outcome{fate: passes, sure: v.sure}
}

// match is a three-valued truth.
type match uint8

const (
	no match = iota
	maybe
	yes
)

func truth(b bool) match {
	if b {
		return yes
	}
	return no
}

// Verdicts beside the negative ones of nftables.
const (
	verdictDrop   = 0
	verdictAccept = 1
	verdictQueue  = 3
	verdictTaken  = 1000
)

// registers are the 16 words of nft_regs behind the verdict, with what is
// known of them.
type registers struct {
	b     [64]byte
	known [16]bool
}

// at gives the offset of a register by either of its names.
func regAt(reg uint64) (int, bool) {
	switch {
	case reg >= unix.NFT_REG_1 && reg <= unix.NFT_REG_4:
		return int(reg-unix.NFT_REG_1) * 16, true
	case reg >= unix.NFT_REG32_00 && reg < unix.NFT_REG32_00+16:
		return int(reg-unix.NFT_REG32_00) * 4, true
	}
	return 0, false
}

// set stores a value, zero-padded to whole words; nil is an unknown word.
func (r *registers) set(reg uint64, v []byte) {
	at, ok := regAt(reg)
	if !ok {
		return
	}
	if v == nil {
		for i := at / 4; i < min(at/4+4, 16); i++ {
			r.known[i] = false
		}
		return
	}
	n := min((len(v)+3)&^3, 64-at)
	clear(r.b[at : at+n])
	copy(r.b[at:at+n], v)
	for i := at / 4; i < (at+n)/4; i++ {
		r.known[i] = true
	}
}

// get gives n bytes, or nil when a part of them is unknown.
func (r *registers) get(reg uint64, n int) []byte {
	at, ok := regAt(reg)
	if !ok || at+n > 64 {
		return nil
	}
	for i := at / 4; i < (at+n+3)/4; i++ {
		if !r.known[i] {
			return nil
		}
	}
	return r.b[at : at+n]
}

// rule evaluates one rule. The verdict is nil for a rule that has none.
func (v *visit) rule(c *theirChain, r *theirRule) (match, *theirVerdict) {
	if r.legacy != nil {
		return v.legacyRule(r.legacy)
	}
	var regs registers
	result := yes
	for i := range r.exprs {
		m, verdict := v.expr(c, &r.exprs[i], &regs, result)
		result = min(result, m)
		if result == no {
			return no, nil
		}
		if verdict != nil {
			return result, verdict
		}
	}
	return result, nil
}

// tracked says whether conntrack has seen the packet when it meets the chain:
// its hooks stand at -200 in prerouting and output.
func (v *visit) ctState() (uint32, bool) {
	const conntrack = -200
	early := (v.base.hook == "prerouting" || v.base.hook == "output") && v.base.priority < conntrack
	if v.t.marked {
		if early && v.base.priority < priorityUntrack {
			return ctInvalidBit, true
		}
		return ctUntrackedBit, true
	}
	if early && v.t.ct != ctUntrackedBit {
		return ctInvalidBit, true
	}
	return v.t.ct, true
}

// find looks a key up in a set. The element is nil for a set without data, or
// when nothing is found.
func (s *theirSet) find(key []byte) (match, *theirElement) {
	if s == nil || !s.known || key == nil {
		return maybe, nil
	}
	for i := range s.elements {
		e := &s.elements[i]
		if e.end == nil && slices.Equal(e.key, key) || e.end != nil && inRange(key, e.key, e.end, s.fields(e)) {
			return yes, e
		}
	}
	if s.catchall != nil {
		return yes, s.catchall
	}
	return no, nil
}

// fields: a range of a concatenation holds in each field by itself. The
// kernel's fields are 32-bit aligned; without their lengths, words are the
// closest, and right for addresses and ports. An interval of a single key is
// one field.
func (s *theirSet) fields(e *theirElement) int {
	if len(e.key) > 4 && len(e.key) != 16 && len(e.key)%4 == 0 {
		return 4
	}
	return max(len(e.key), 1)
}

func inRange(key, lo, hi []byte, field int) bool {
	if len(key) < len(lo) || len(hi) != len(lo) {
		return false
	}
	for at := 0; at < len(lo); at += field {
		end := min(at+field, len(lo))
		if slices.Compare(key[at:end], lo[at:end]) < 0 || slices.Compare(key[at:end], hi[at:end]) > 0 {
			return false
		}
	}
	return true
}
