// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// The vocabulary of our rules. Each function gives one term in both
// languages; the expressions are those that nft itself makes of the text, and
// a test compares them on the running kernel.
//
// Registers: 1 to 4 hold 16 bytes each, 8 + n is the n-th 4-byte part of the
// same memory. A concatenation starts in register 1 (matches) or 2 (hashes,
// whose result goes to register 1).
const (
	reg1     = unix.NFT_REG_1
	reg2     = unix.NFT_REG_2
	reg3     = unix.NFT_REG_3
	reg1plus = unix.NFT_REG32_00 + 1 // 4 bytes behind the start of register 1
	reg2plus = unix.NFT_REG32_00 + 5 // 4 bytes behind the start of register 2

	exthdrPresent = 1 // NFT_EXTHDR_F_PRESENT

	offTCPFlags = 13
	tcpFlagSYN  = 0x02
	tcpFlagMask = 0x17 // FIN, SYN, RST, ACK
)

// ipFamily holds what differs between the two families.
type ipFamily struct {
	nf         byte
	word       string // "ip" or "ip6"
	suffix     string // of set names
	src, dst   uint32 // offsets of the addresses
	addrLen    uint32
	icmpProto  byte
	icmpWord   string
	icmpTypes  []byte
	icmpNames  string
	innerProto uint32 // offset of the embedded packet's protocol from the ICMP header
}

var (
	// The embedded packet starts behind the 8 bytes of the ICMP header; its
	// protocol stands at 9 (IPv4, RFC 791 section 3.1) or 6 (IPv6, RFC 8200
	// section 3). Our own packets have no extension headers, so neither has
	// the head of one that comes back.
	family4 = ipFamily{
		nf: unix.NFPROTO_IPV4, word: "ip", suffix: "4", src: 12, dst: 16, addrLen: 4,
		icmpProto: unix.IPPROTO_ICMP, icmpWord: "icmp", icmpTypes: []byte{3, 11, 12},
		icmpNames: "destination-unreachable, time-exceeded, parameter-problem", innerProto: 8 + 9,
	}
	family6 = ipFamily{
		nf: unix.NFPROTO_IPV6, word: "ip6", suffix: "6", src: 8, dst: 24, addrLen: 16,
		icmpProto: unix.IPPROTO_ICMPV6, icmpWord: "icmpv6", icmpTypes: []byte{1, 2, 3, 4},
		icmpNames: "destination-unreachable, packet-too-big, time-exceeded, parameter-problem", innerProto: 8 + 6,
	}
	families = [2]*ipFamily{&family4, &family6}
)

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
func big16(v uint16) []byte    { return binary.BigEndian.AppendUint16(nil, v) }

func network(reg, off, n uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: off, Len: n}
}

func transport(reg, off, n uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: off, Len: n}
}

func compare(op expr.CmpOp, data []byte) expr.Any {
	return &expr.Cmp{Op: op, Register: reg1, Data: data}
}

func mask(mask []byte) expr.Any {
	return &expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: uint32(len(mask)), Mask: mask, Xor: make([]byte, len(mask))}
}

// nfproto and l4proto are the dependencies, and the explicit matches.
func nfprotoExprs(nf byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg1}, compare(expr.CmpOpEq, []byte{nf})}
}

func l4protoExprs(l4 byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1}, compare(expr.CmpOpEq, []byte{l4})}
}

func nfproto(f *ipFamily) term {
	name := "ipv4"
	if f == &family6 {
		name = "ipv6"
	}
	return term{text: "meta nfproto " + name, nf: f.nf, isNF: true}
}

func l4tcp() term {
	return term{text: "meta l4proto tcp", l4: unix.IPPROTO_TCP, isL4: true}
}

func markIsOurs(mark, markMask uint32) term {
	return term{
		text: fmt.Sprintf("meta mark & %#x == %#x", markMask, mark),
		exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1},
			mask(native32(markMask)),
			compare(expr.CmpOpEq, native32(mark)),
		},
	}
}

// setOurs makes the mark ours and leaves the bits outside the mask as they are.
func setOurs(mark, markMask uint32) term {
	return term{
		text: fmt.Sprintf("meta mark set meta mark & 0x%08x | 0x%08x", ^markMask, mark),
		exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1},
			&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: native32(^markMask), Xor: native32(mark)},
			&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg1},
		},
	}
}

// notLoopback: lo has index 1 in every network namespace.
func notLoopback() term {
	return term{
		text:  `iif != "lo"`,
		exprs: []expr.Any{&expr.Meta{Key: expr.MetaKeyIIF, Register: reg1}, compare(expr.CmpOpNeq, native32(1))},
	}
}

func iifnameIn(set string) term {
	return term{
		text:  "iifname @" + set,
		exprs: []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg1}, lookup(set, false)},
	}
}

func lookup(set string, invert bool) expr.Any {
	return &expr.Lookup{SourceRegister: reg1, SetName: set, Invert: invert}
}

// sourceIsLocal: the source is an address of the router itself.
func sourceIsLocal() term {
	return term{
		text: "fib saddr type local",
		exprs: []expr.Any{
			&expr.Fib{Register: reg1, FlagSADDR: true, ResultADDRTYPE: true},
			compare(expr.CmpOpEq, native32(unix.RTN_LOCAL)),
		},
	}
}

// destinationTypeNot: the destination is not of this route type.
func destinationTypeNot(name string, routeType uint32) term {
	return term{
		text: "fib daddr type != " + name,
		exprs: []expr.Any{
			&expr.Fib{Register: reg1, FlagDADDR: true, ResultADDRTYPE: true},
			compare(expr.CmpOpNeq, native32(routeType)),
		},
	}
}

// noReversePath: the interface is not one through which the source is routed.
func noReversePath() term {
	return term{
		text: "fib saddr . iif oif missing",
		exprs: []expr.Any{
			&expr.Fib{Register: reg1, FlagSADDR: true, FlagIIF: true, FlagPRESENT: true, ResultOIF: true},
			compare(expr.CmpOpEq, native32(0)),
		},
	}
}

// concatIn matches address and port, source or destination, against a set.
func (f *ipFamily) concatIn(destination bool, set string) term {
	addr, port, words := f.src, uint32(0), "saddr . tcp sport"
	if destination {
		addr, port, words = f.dst, 2, "daddr . tcp dport"
	}
	second := uint32(reg1plus)
	if f.addrLen == 16 {
		second = reg2
	}
	return term{
		text: fmt.Sprintf("%s %s @%s", f.word, words, set), nf: f.nf, l4: unix.IPPROTO_TCP,
		exprs: []expr.Any{network(reg1, addr, f.addrLen), transport(second, port, 2), lookup(set, false)},
	}
}

func (f *ipFamily) destinationIn(set string) term {
	return term{
		text: fmt.Sprintf("%s daddr @%s", f.word, set), nf: f.nf,
		exprs: []expr.Any{network(reg1, f.dst, f.addrLen), lookup(set, false)},
	}
}

func (f *ipFamily) sourceIn(set string) term {
	return term{
		text: fmt.Sprintf("%s saddr @%s", f.word, set), nf: f.nf,
		exprs: []expr.Any{network(reg1, f.src, f.addrLen), lookup(set, false)},
	}
}

// fragmented matches any fragment: more fragments to come, or an offset (RFC
// 791 section 3.1), or a fragment header (RFC 8200 section 4.5).
func (f *ipFamily) fragmented() term {
	if f == &family4 {
		return term{
			text: "ip frag-off & 0x3fff != 0", nf: f.nf,
			exprs: []expr.Any{network(reg1, 6, 2), mask([]byte{0x3f, 0xff}), compare(expr.CmpOpNeq, []byte{0, 0})},
		}
	}
	return term{
		text: "exthdr frag exists", nf: f.nf,
		exprs: []expr.Any{
			&expr.Exthdr{DestRegister: reg1, Type: unix.IPPROTO_FRAGMENT, Len: 1, Flags: exthdrPresent, Op: expr.ExthdrOpIpv6},
			compare(expr.CmpOpEq, []byte{1}),
		},
	}
}

// plainSYN: of FIN, SYN, RST and ACK, only SYN is set. want says whether the
// packet must be one or must not.
func plainSYN(want bool) term {
	op, word := expr.CmpOpEq, "=="
	if !want {
		op, word = expr.CmpOpNeq, "!="
	}
	return term{
		text: fmt.Sprintf("tcp flags & (fin | syn | rst | ack) %s syn", word), l4: unix.IPPROTO_TCP,
		exprs: []expr.Any{transport(reg1, offTCPFlags, 1), mask([]byte{tcpFlagMask}), compare(op, []byte{tcpFlagSYN})},
	}
}

func dportRange(first, last uint16) term {
	return term{
		text: fmt.Sprintf("tcp dport %d-%d", first, last), l4: unix.IPPROTO_TCP,
		exprs: []expr.Any{transport(reg1, 2, 2), compare(expr.CmpOpGte, big16(first)), compare(expr.CmpOpLte, big16(last))},
	}
}

func dportNotIn(set string) term {
	return term{
		text: "tcp dport != @" + set, l4: unix.IPPROTO_TCP,
		exprs: []expr.Any{transport(reg1, 2, 2), lookup(set, true)},
	}
}

// icmpError matches the ICMP errors that RFC 792 and RFC 4443 define and that
// embed the packet they are about.
func (f *ipFamily) icmpError() term {
	return term{
		text: fmt.Sprintf("%s type { %s }", f.icmpWord, f.icmpNames), nf: f.nf, l4: f.icmpProto,
		exprs: []expr.Any{transport(reg1, 0, 1)},
		set:   &anonSet{icmp6: f == &family6, keys: f.icmpTypes},
	}
}

// embedsTCP: the packet inside the ICMP error is TCP. The router's errors
// about its own UDP or tunnel traffic never see our queue.
func (f *ipFamily) embedsTCP() term {
	return term{
		text:  fmt.Sprintf("@th,%d,8 6", f.innerProto*8),
		exprs: []expr.Any{transport(reg1, f.innerProto, 1), compare(expr.CmpOpEq, []byte{unix.IPPROTO_TCP})},
	}
}

func counted(name string) term {
	return term{
		text:  fmt.Sprintf("counter name %q", name),
		exprs: []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: name}},
	}
}

func verdict(text string, kind expr.VerdictKind) term {
	return term{text: text, exprs: []expr.Any{&expr.Verdict{Kind: kind}}}
}

// goTo leaves the chain for good.
func goTo(chain string) term {
	return term{text: "goto " + chain, exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}}}
}

func drop() term    { return verdict("drop", expr.VerdictDrop) }
func passOn() term  { return verdict("accept", expr.VerdictAccept) }
func returns() term { return verdict("return", expr.VerdictReturn) }

func notrack() term { return term{text: "notrack", exprs: []expr.Any{&expr.Notrack{}}} }

// queue sends the packet to one queue, without bypass: when nobody listens the
// kernel drops it (INV-3).
func queue(num uint16, compat bool) term {
	t := term{text: fmt.Sprintf("queue num %d", num)}
	if compat {
		t.exprs = []expr.Any{nfqueueTarget(num)}
	} else {
		t.exprs = []expr.Any{&expr.Queue{Num: num, Total: 1}}
	}
	return t
}

// nfqueueTarget is the xtables target, revision 1: struct xt_NFQ_info_v1 is
// the queue number and the number of queues, both native-endian. The count is
// always 1: the target's own balancing hashes addresses only. xt_check_target
// wants the size rounded up to XT_ALIGN, 8 bytes.
func nfqueueTarget(num uint16) expr.Any {
	info := make(xt.Unknown, 8)
	binary.NativeEndian.PutUint16(info[0:], num)
	binary.NativeEndian.PutUint16(info[2:], 1)
	return &expr.Target{Name: "NFQUEUE", Rev: 1, Info: &info}
}

// clientShard hashes the client's address and port to the shard's chain.
func (f *ipFamily) clientShard(shards int) term {
	second, length := uint32(reg2plus), uint32(8)
	if f.addrLen == 16 {
		second, length = reg3, 20
	}
	m := &verdictMap{}
	text := make([]string, shards)
	for i := range shards {
		m.goTo = append(m.goTo, mapEntry{lo: uint32(i), hi: uint32(i), chain: shardChain(i)})
		text[i] = fmt.Sprintf("%d : goto %s", i, shardChain(i))
	}
	return term{
		text: fmt.Sprintf("jhash %s saddr . tcp sport mod %d seed %#x vmap { %s }", f.word, shards, hashSeed, strings.Join(text, ", ")),
		nf:   f.nf, l4: unix.IPPROTO_TCP,
		exprs: []expr.Any{
			network(reg2, f.src, f.addrLen), transport(second, 0, 2),
			&expr.Hash{SourceRegister: reg2, DestRegister: reg1, Length: length, Modulus: uint32(shards), Seed: hashSeed, Type: expr.HashTypeJenkins},
		},
		vmap: m,
	}
}

// serverShard maps the SNIP port's slice to the shard's chain.
func serverShard(first, last uint16, shards int) term {
	m := &verdictMap{interval: true}
	text := make([]string, shards)
	for i := range shards {
		lo, hi := Slice(first, last, shards, i)
		m.goTo = append(m.goTo, mapEntry{lo: uint32(lo), hi: uint32(hi), chain: shardChain(i)})
		text[i] = fmt.Sprintf("%d-%d : goto %s", lo, hi, shardChain(i))
	}
	return term{
		text: fmt.Sprintf("tcp dport vmap { %s }", strings.Join(text, ", ")), l4: unix.IPPROTO_TCP,
		exprs: []expr.Any{transport(reg1, 2, 2)},
		vmap:  m,
	}
}

func shardChain(i int) string { return fmt.Sprintf("shard%d", i) }

// dupToLoopback sends a copy out by lo. Its route, to the loopback address, is
// a local one, so that it comes in again whatever its own destination is. Only
// the tables of one family have the statement.
func (f *ipFamily) dupToLoopback() term {
	to := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if f == &family6 {
		to = netip.IPv6Loopback()
	}
	return term{
		text: fmt.Sprintf(`dup to %v device "lo"`, to),
		exprs: []expr.Any{
			&expr.Immediate{Register: reg1, Data: to.AsSlice()},
			&expr.Immediate{Register: reg2, Data: native32(1)}, // lo, see notLoopback
			&expr.Dup{RegAddr: reg1, RegDev: reg2, IsRegDevSet: true},
		},
	}
}

// tproxyTo is a tproxy statement; its presence in a rule, evaluated or not,
// switches the kernel's defragmentation on.
func (f *ipFamily) tproxyTo(port uint16) term {
	return term{
		text: fmt.Sprintf("tproxy %s to :%d", f.word, port), nf: f.nf, l4: unix.IPPROTO_TCP,
		exprs: []expr.Any{
			&expr.Immediate{Register: reg1, Data: big16(port)},
			&expr.TProxy{Family: f.nf, TableFamily: unix.NFPROTO_INET, RegPort: reg1},
		},
	}
}

func ctInvalid() term {
	return term{
		text: "ct state invalid",
		exprs: []expr.Any{
			&expr.Ct{Key: expr.CtKeySTATE, Register: reg1},
			mask(native32(expr.CtStateBitINVALID)),
			compare(expr.CmpOpNeq, native32(0)),
		},
	}
}
