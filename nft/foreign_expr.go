// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"slices"

	"golang.org/x/sys/unix"
)

// Keys and attributes that package unix has no names for.
const (
	metaIIFKind = 26 // NFT_META_IIFKIND
	metaOIFKind = 27 // NFT_META_OIFKIND

	lookupInvert = 0x1 // NFT_LOOKUP_F_INV

	bitwiseBool = 0 // NFT_BITWISE_BOOL
	bitwiseOp   = 6 // NFTA_BITWISE_OP

	natDNAT = 1 // NFT_NAT_DNAT

	metaSREG = 3 // NFTA_META_SREG
	metaDREG = 1 // NFTA_META_DREG
	metaKey  = 2 // NFTA_META_KEY

	ctDREG = 1 // NFTA_CT_DREG
	ctKey  = 2 // NFTA_CT_KEY
)

// expr evaluates one expression on the trial. sofar is what the rule's
// expressions before it came to.
func (v *visit) expr(c *theirChain, e *theirExpr, regs *registers, sofar match) (match, *theirVerdict) {
	switch e.name {
	case "counter", "log", "notrack", "objref", "last", "dup", "flow_offload", "masq":
		if e.name == "notrack" && sofar == yes && !v.t.marked && v.base.priority < -200 {
			v.t.ct = ctUntrackedBit
		}
		return yes, nil
	case "meta":
		return v.meta(e, regs, sofar), nil
	case "ct":
		return v.conntrack(e, regs), nil
	case "payload":
		return v.payload(e, regs), nil
	case "fib":
		v.fib(e, regs)
		return yes, nil
	case "immediate":
		d := e.nest(unix.NFTA_IMMEDIATE_DATA)
		if verdict := parseVerdict(d.nest(unix.NFTA_DATA_VERDICT)); verdict != nil {
			return yes, verdict.plain()
		}
		regs.set(e.uint(unix.NFTA_IMMEDIATE_DREG), d[unix.NFTA_DATA_VALUE])
		return yes, nil
	case "cmp":
		data := e.nest(unix.NFTA_CMP_DATA)[unix.NFTA_DATA_VALUE]
		return compareOp(e.uint(unix.NFTA_CMP_OP), regs.get(e.uint(unix.NFTA_CMP_SREG), len(data)), data), nil
	case "range":
		lo := e.nest(unix.NFTA_RANGE_FROM_DATA)[unix.NFTA_DATA_VALUE]
		hi := e.nest(unix.NFTA_RANGE_TO_DATA)[unix.NFTA_DATA_VALUE]
		got := regs.get(e.uint(unix.NFTA_RANGE_SREG), len(lo))
		if got == nil {
			return maybe, nil
		}
		in := slices.Compare(got, lo) >= 0 && slices.Compare(got, hi) <= 0
		return truth(in == (e.uint(unix.NFTA_RANGE_OP) == 0)), nil
	case "bitwise":
		v.bitwise(e, regs)
		return yes, nil
	case "byteorder":
		v.byteorder(e, regs)
		return yes, nil
	case "lookup":
		return v.lookup(c, e, regs)
	case "reject":
		return yes, &theirVerdict{code: verdictDrop}
	case "nat":
		// NAT acts on tracked packets only, and ours are not.
		if !v.t.marked && e.uint(unix.NFTA_NAT_TYPE) == natDNAT {
			return yes, &theirVerdict{code: verdictTaken}
		}
		return yes, nil
	case "redir":
		if v.t.marked {
			return yes, nil
		}
		return yes, &theirVerdict{code: verdictTaken}
	case "tproxy", "fwd":
		return yes, &theirVerdict{code: verdictTaken}
	case "synproxy":
		// It answers a SYN, and drops an acknowledgment that is not the last
		// step of a handshake of its own.
		return yes, &theirVerdict{code: verdictTaken}
	case "queue":
		return yes, &theirVerdict{code: verdictQueue}
	case "exthdr":
		return v.exthdr(e, regs), nil
	case "dynset":
		return v.dynset(e), nil
	case "limit", "quota", "connlimit", "xfrm":
		return maybe, nil
	case "match":
		return v.xtMatch(e.text(unix.NFTA_MATCH_NAME), uint32(e.uint(unix.NFTA_MATCH_REV)), e.attrs[unix.NFTA_MATCH_INFO]), nil
	case "target":
		return v.xtTarget(e.text(unix.NFTA_TARGET_NAME), uint32(e.uint(unix.NFTA_TARGET_REV)), e.attrs[unix.NFTA_TARGET_INFO], sofar)
	}
	// Whatever it puts into a register is unknown from here on.
	for reg := uint64(unix.NFT_REG_1); reg <= unix.NFT_REG_4; reg++ {
		regs.set(reg, nil)
	}
	return maybe, nil
}

// plain maps what a verdict in a rule may say to what the walk knows.
func (v *theirVerdict) plain() *theirVerdict {
	switch v.code {
	case unix.NFT_CONTINUE, unix.NFT_BREAK:
		return nil
	}
	return v
}

// dynset adds to a set, and matches unless an expression of its own, a rate
// for instance, says no.
func (v *visit) dynset(e *theirExpr) match {
	const dynsetExpr, dynsetExprs = 7, 10 // NFTA_DYNSET_EXPR, NFTA_DYNSET_EXPRESSIONS
	if e.attrs[dynsetExpr] == nil && e.attrs[dynsetExprs] == nil {
		return yes
	}
	return maybe
}

// exthdr: our packets have no IPv6 extension headers; their TCP options are
// not known here.
func (v *visit) exthdr(e *theirExpr, regs *registers) match {
	const ipv6 = 0 // NFT_EXTHDR_OP_IPV6
	dreg := e.uint(unix.NFTA_EXTHDR_DREG)
	switch {
	case e.attrs[unix.NFTA_EXTHDR_SREG] != nil:
		return yes // it changes an option
	case e.uint(unix.NFTA_EXTHDR_OP) != ipv6:
		regs.set(dreg, nil)
		return yes
	case e.uint(unix.NFTA_EXTHDR_FLAGS)&exthdrPresent != 0:
		regs.set(dreg, []byte{0})
		return yes
	}
	return no
}

func (v *visit) meta(e *theirExpr, regs *registers, sofar match) match {
	t := v.t
	key := e.uint(metaKey)
	if sreg, ok := e.attrs[metaSREG]; ok && sreg != nil {
		if key == unix.NFT_META_MARK {
			got := regs.get(e.uint(metaSREG), 4)
			if sofar == yes && got != nil {
				t.mark = binary.NativeEndian.Uint32(got)
			}
		}
		return yes
	}
	dreg := e.uint(metaDREG)
	ifname := func(name string) { regs.set(dreg, append([]byte(name), make([]byte, 16-len(name))...)) }
	switch key {
	case unix.NFT_META_LEN:
		regs.set(dreg, native32(uint32(len(t.bytes))))
	case unix.NFT_META_PROTOCOL:
		if t.family == unix.NFPROTO_IPV4 {
			regs.set(dreg, big16(unix.ETH_P_IP))
		} else {
			regs.set(dreg, big16(unix.ETH_P_IPV6))
		}
	case unix.NFT_META_MARK:
		regs.set(dreg, native32(t.mark))
	case unix.NFT_META_IIF:
		regs.set(dreg, native32(uint32(t.inIndex)))
	case unix.NFT_META_OIF:
		regs.set(dreg, native32(uint32(t.outIndex)))
	case unix.NFT_META_IIFNAME:
		ifname(t.in)
	case unix.NFT_META_OIFNAME:
		ifname(t.out)
	case unix.NFT_META_NFPROTO:
		regs.set(dreg, []byte{t.family})
	case unix.NFT_META_L4PROTO:
		regs.set(dreg, []byte{unix.IPPROTO_TCP})
	case unix.NFT_META_PKTTYPE:
		regs.set(dreg, []byte{unix.PACKET_HOST})
	case unix.NFT_META_BRI_IIFNAME, unix.NFT_META_BRI_OIFNAME:
		return no // neither end is a bridge port here
	default:
		regs.set(dreg, nil)
	}
	return yes
}

func (v *visit) conntrack(e *theirExpr, regs *registers) match {
	key := e.uint(ctKey)
	if _, sets := e.attrs[4]; sets { // NFTA_CT_SREG
		return yes
	}
	dreg := e.uint(ctDREG)
	state, _ := v.ctState()
	if key == unix.NFT_CT_STATE {
		regs.set(dreg, native32(state))
		return yes
	}
	if state != ctNew {
		return no // there is no entry: the expression ends the rule
	}
	switch key {
	case unix.NFT_CT_STATUS, unix.NFT_CT_MARK:
		regs.set(dreg, native32(0))
	case unix.NFT_CT_DIRECTION:
		regs.set(dreg, []byte{0})
	default:
		regs.set(dreg, nil)
	}
	return yes
}

func (v *visit) payload(e *theirExpr, regs *registers) match {
	if e.attrs[unix.NFTA_PAYLOAD_SREG] != nil {
		return yes // it writes: a mangled TTL or DSCP
	}
	dreg := e.uint(unix.NFTA_PAYLOAD_DREG)
	at, n := int(e.uint(unix.NFTA_PAYLOAD_OFFSET)), int(e.uint(unix.NFTA_PAYLOAD_LEN))
	switch e.uint(unix.NFTA_PAYLOAD_BASE) {
	case unix.NFT_PAYLOAD_NETWORK_HEADER:
	case unix.NFT_PAYLOAD_TRANSPORT_HEADER:
		at += v.t.tcpAt
	default:
		regs.set(dreg, nil)
		return yes
	}
	if at+n > len(v.t.bytes) {
		return no // beyond the packet: the rule ends
	}
	regs.set(dreg, v.t.bytes[at:at+n])
	return yes
}

// fib answers as nft_fib_ipv4.c and nft_fib_ipv6.c do: a local address has no
// interface that leads to it.
func (v *visit) fib(e *theirExpr, regs *registers) {
	t := v.t
	flags, dreg := e.uint(unix.NFTA_FIB_FLAGS), e.uint(unix.NFTA_FIB_DREG)
	addr := t.src.Addr()
	if flags&unix.NFTA_FIB_F_DADDR != 0 {
		addr = t.dst.Addr()
	}
	if e.uint(unix.NFTA_FIB_RESULT) == unix.NFT_FIB_RESULT_ADDRTYPE {
		kind, ok := v.routes.kind(addr, t.in, flags&unix.NFTA_FIB_F_IIF != 0)
		if !ok {
			regs.set(dreg, nil)
			return
		}
		regs.set(dreg, native32(kind))
		return
	}
	name, index := "", 0
	switch via := v.routes.via(addr); {
	case t.in == "lo" && v.base.hook == "prerouting":
		name, index = "lo", 1
	case flags&unix.NFTA_FIB_F_IIF != 0 && via.through(t.in):
		name, index = t.in, t.inIndex
	case flags&unix.NFTA_FIB_F_OIF != 0 && via.through(t.out):
		name, index = t.out, t.outIndex
	case flags&(unix.NFTA_FIB_F_IIF|unix.NFTA_FIB_F_OIF) == 0 && len(via) > 0:
		name, index = via[0], v.routes.index[via[0]]
	}
	switch present := flags&unix.NFTA_FIB_F_PRESENT != 0; {
	case present && index != 0:
		regs.set(dreg, native32(1))
	case present:
		regs.set(dreg, native32(0))
	case e.uint(unix.NFTA_FIB_RESULT) == unix.NFT_FIB_RESULT_OIFNAME:
		regs.set(dreg, append([]byte(name), make([]byte, 16-len(name))...))
	default:
		regs.set(dreg, native32(uint32(index)))
	}
}

func (v *visit) bitwise(e *theirExpr, regs *registers) {
	n := int(e.uint(unix.NFTA_BITWISE_LEN))
	dreg := e.uint(unix.NFTA_BITWISE_DREG)
	got := regs.get(e.uint(unix.NFTA_BITWISE_SREG), n)
	m := e.nest(unix.NFTA_BITWISE_MASK)[unix.NFTA_DATA_VALUE]
	x := e.nest(unix.NFTA_BITWISE_XOR)[unix.NFTA_DATA_VALUE]
	if got == nil || len(m) != n || len(x) != n || e.uint(bitwiseOp) != bitwiseBool {
		regs.set(dreg, nil)
		return
	}
	out := make([]byte, n)
	for i := range out {
		out[i] = got[i]&m[i] ^ x[i]
	}
	regs.set(dreg, out)
}

func (v *visit) byteorder(e *theirExpr, regs *registers) {
	n, size := int(e.uint(unix.NFTA_BYTEORDER_LEN)), int(e.uint(unix.NFTA_BYTEORDER_SIZE))
	dreg := e.uint(unix.NFTA_BYTEORDER_DREG)
	got := regs.get(e.uint(unix.NFTA_BYTEORDER_SREG), n)
	if got == nil || size == 0 || n%size != 0 {
		regs.set(dreg, nil)
		return
	}
	out := slices.Clone(got)
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 { // a little-endian machine
		for at := 0; at < n; at += size {
			slices.Reverse(out[at : at+size])
		}
	}
	regs.set(dreg, out)
}

func compareOp(op uint64, got, want []byte) match {
	if got == nil {
		return maybe
	}
	c := slices.Compare(got, want)
	switch op {
	case unix.NFT_CMP_EQ:
		return truth(c == 0)
	case unix.NFT_CMP_NEQ:
		return truth(c != 0)
	case unix.NFT_CMP_LT:
		return truth(c < 0)
	case unix.NFT_CMP_LTE:
		return truth(c <= 0)
	case unix.NFT_CMP_GT:
		return truth(c > 0)
	case unix.NFT_CMP_GTE:
		return truth(c >= 0)
	}
	return maybe
}

func (v *visit) lookup(c *theirChain, e *theirExpr, regs *registers) (match, *theirVerdict) {
	s := v.tables.sets[objectKey{c.family, c.table, e.text(unix.NFTA_LOOKUP_SET)}]
	n := 0
	if s != nil && len(s.elements) > 0 {
		n = len(s.elements[0].key)
	}
	var key []byte
	if n > 0 {
		key = regs.get(e.uint(unix.NFTA_LOOKUP_SREG), n)
	} else if s != nil && s.known {
		key = []byte{} // nothing is in it
	}
	found, el := s.find(key)
	if e.uint(unix.NFTA_LOOKUP_FLAGS)&lookupInvert != 0 {
		return yes - found, nil
	}
	if found == maybe && s != nil && s.isMap {
		// One of the map's verdicts, or none: the worst of them counts.
		for i := range s.elements {
			if vd := s.elements[i].verdict; vd != nil && (el == nil || vd.code == verdictDrop) {
				el = &s.elements[i]
			}
		}
	}
	if el == nil {
		return found, nil
	}
	if dreg, ok := e.attrs[unix.NFTA_LOOKUP_DREG]; ok && el.verdict == nil && dreg != nil {
		regs.set(e.uint(unix.NFTA_LOOKUP_DREG), el.data)
	}
	if el.verdict != nil {
		return found, el.verdict.plain()
	}
	return found, nil
}
