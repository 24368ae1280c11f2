// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// This file knows those matches and targets of xtables that stand in front of
// what decides on our packets. They come in two wrappings: inside an nftables
// rule (iptables-nft), and in the tables of iptables-legacy. What is not known
// is undecided.

// The state bits of xt_conntrack, the kernel's own numbering.
const (
	xtStateInvalid   = 1 << 0
	xtStateUntracked = 1 << 8 // in xt_state it is 1 << 6, as in nft

	xtConntrackState = 1 << 0 // XT_CONNTRACK_STATE in match_flags
)

// xtMatch decides one match by its name, revision and the kernel's struct.
func (v *visit) xtMatch(name string, rev uint32, info []byte) match {
	ne := binary.NativeEndian
	t := v.t
	switch {
	case name == "comment":
		return yes
	case name == "mark" && rev == 1 && len(info) >= 9: // struct xt_mark_mtinfo1
		return truth((t.mark&ne.Uint32(info[4:]) == ne.Uint32(info)) != (info[8] != 0))
	case name == "conntrack" && rev >= 1 && len(info) >= 4:
		return v.xtConntrack(rev, info)
	case name == "state" && len(info) >= 4: // struct xt_state_info: the same bits
		state, _ := v.ctState()
		return truth(ne.Uint32(info)&state != 0)
	case name == "tcp" && len(info) >= 12: // struct xt_tcp
		return v.xtTCP(info)
	case name == "udp" || name == "icmp" || name == "icmp6":
		return no
	case name == "multiport" && rev == 1 && len(info) >= 48:
		return v.xtMultiport(info)
	case name == "addrtype" && rev == 1 && len(info) >= 8: // struct xt_addrtype_info_v1
		return v.xtAddrtype(info)
	case name == "rpfilter" && len(info) >= 1:
		return v.xtRPFilter(info[0])
	case name == "physdev":
		return no // neither end is a bridge port here
	case slices.Contains([]string{"rt", "ah", "esp", "frag", "hbh", "dst", "mh", "ipv6header", "ipcomp"}, name):
		return no // our packets have no extension headers
	case name == "limit", name == "hashlimit":
		return maybe
	}
	return maybe
}

// xtConntrack: struct xt_conntrack_mtinfo1 to 3 begin with 8 addresses and
// masks of 16 bytes; the flags and state mask follow at fixed places.
func (v *visit) xtConntrack(rev uint32, info []byte) match {
	ne := binary.NativeEndian
	// expires_min and max (4+4), l4proto (2), four ports (8).
	const flagsAt = 8*16 + 4 + 4 + 2 + 8
	if len(info) < flagsAt+6 {
		return maybe
	}
	flags, inverted := ne.Uint16(info[flagsAt:]), ne.Uint16(info[flagsAt+2:])
	var mask uint16
	if rev == 1 {
		mask = uint16(info[flagsAt+4])
	} else {
		mask = ne.Uint16(info[flagsAt+4:])
	}
	state, _ := v.ctState()
	bits := uint16(state)
	switch state {
	case ctInvalidBit:
		bits = xtStateInvalid
	case ctUntrackedBit:
		bits = xtStateUntracked
	}
	result := yes
	if flags&xtConntrackState != 0 {
		result = truth((bits&mask != 0) != (inverted&xtConntrackState != 0))
	}
	if rest := flags &^ xtConntrackState; rest != 0 && result == yes {
		if state != ctNew {
			return no // without an entry everything else fails
		}
		return maybe
	}
	return result
}

// xtTCP: struct xt_tcp: source and destination port ranges, option, mask,
// compare, inversion bits.
func (v *visit) xtTCP(info []byte) match {
	ne := binary.NativeEndian
	in := func(port uint16, at int, inv bool) bool {
		return (port >= ne.Uint16(info[at:]) && port <= ne.Uint16(info[at+2:])) != inv
	}
	option, flagMask, flagCmp, inv := info[8], info[9], info[10], info[11]
	switch {
	case !in(v.t.src.Port(), 0, inv&1 != 0), !in(v.t.dst.Port(), 4, inv&2 != 0):
		return no
	case (v.t.flags&flagMask == flagCmp) == (inv&4 != 0):
		return no
	case option != 0:
		return maybe
	}
	return yes
}

// xtMultiport: struct xt_multiport_v1: flags, count, 15 ports, 15 "begins a
// range" bytes, inversion.
func (v *visit) xtMultiport(info []byte) match {
	ne := binary.NativeEndian
	const source, destination, either = 0, 1, 2
	n := min(int(info[1]), 15)
	found := false
	for i := 0; i < n; i++ {
		lo := ne.Uint16(info[2+2*i:])
		hi := lo
		if info[32+i] != 0 && i+1 < n {
			i++
			hi = ne.Uint16(info[2+2*i:])
		}
		in := func(p uint16) bool { return p >= lo && p <= hi }
		switch info[0] {
		case source:
			found = found || in(v.t.src.Port())
		case destination:
			found = found || in(v.t.dst.Port())
		case either:
			found = found || in(v.t.src.Port()) || in(v.t.dst.Port())
		}
	}
	return truth(found != (info[47] != 0))
}

func (v *visit) xtAddrtype(info []byte) match {
	ne := binary.NativeEndian
	const invSource, invDestination, limitIn, limitOut = 1, 2, 4, 8
	source, dest, flags := ne.Uint16(info), ne.Uint16(info[2:]), ne.Uint32(info[4:])
	if flags&(limitIn|limitOut) != 0 {
		return maybe
	}
	if source != 0 {
		k, ok := v.routes.kind(v.t.src.Addr(), "", false)
		if !ok {
			return maybe
		}
		if (source&(1<<k) != 0) == (flags&invSource != 0) {
			return no
		}
	}
	if dest != 0 {
		k, ok := v.routes.kind(v.t.dst.Addr(), "", false)
		if !ok {
			return maybe
		}
		if (dest&(1<<k) != 0) == (flags&invDestination != 0) {
			return no
		}
	}
	return yes
}

// xtRPFilter: flags loose, valid mark, accept local, invert. The test passes
// when the reply would go out by the interface the packet came in by; a local
// source passes only with accept local.
func (v *visit) xtRPFilter(flags byte) match {
	const loose, _, acceptLocal, invert = 1, 2, 4, 8
	ok := v.t.in == "lo"
	via := v.routes.via(v.t.src.Addr())
	if k, known := v.routes.kind(v.t.src.Addr(), "", false); known && k == unix.RTN_LOCAL {
		ok = ok || flags&acceptLocal != 0
	} else {
		ok = ok || via.through(v.t.in) || flags&loose != 0 && len(via) > 0
	}
	return truth(ok != (flags&invert != 0))
}

// harmless targets let the packet go on to the next rule.
var harmless = []string{
	"LOG", "NFLOG", "ULOG", "TRACE", "AUDIT", "CT", "NOTRACK", "TCPMSS", "TCPOPTSTRIP", "CHECKSUM", "CLASSIFY", "SET",
	"CONNSECMARK", "SECMARK", "DSCP", "TOS", "TTL", "HL", "ECN", "IDLETIMER", "LED", "RATEEST", "TEE", "HMARK",
	"MASQUERADE", "SNAT",
}

// xtTarget decides what a target does; nil for one that lets the packet go on.
func (v *visit) xtTarget(name string, rev uint32, info []byte, sofar match) (match, *theirVerdict) {
	ne := binary.NativeEndian
	switch {
	case name == "REJECT":
		return yes, &theirVerdict{code: verdictDrop}
	case name == "TPROXY" || name == "SYNPROXY":
		return yes, &theirVerdict{code: verdictTaken}
	case name == "DNAT" || name == "REDIRECT":
		if v.t.marked {
			return yes, nil
		}
		return yes, &theirVerdict{code: verdictTaken}
	case name == "NFQUEUE":
		return yes, &theirVerdict{code: verdictQueue}
	case name == "MARK" && rev == 2 && len(info) >= 8: // struct xt_mark_tginfo2
		if sofar == yes {
			v.t.mark = v.t.mark&^ne.Uint32(info[4:]) ^ ne.Uint32(info)
		}
		return yes, nil
	case name == "CONNMARK":
		return yes, nil // it copies marks only where there is an entry
	case slices.Contains(harmless, name):
		if (name == "NOTRACK" || name == "CT" && len(info) > 0 && info[0]&1 != 0) && sofar == yes && !v.t.marked {
			v.t.ct = ctUntrackedBit
		}
		return yes, nil
	}
	return maybe, nil
}

// legacyRule is a rule of iptables-legacy: struct ipt_entry or ip6t_entry.
type legacyRule struct {
	family     byte
	src, dst   []byte // address, mask
	srcMask    []byte
	dstMask    []byte
	in, out    string
	inMask     []byte
	outMask    []byte
	proto      uint16
	invert     byte
	matches    []legacyPart
	target     legacyPart
	verdict    *theirVerdict // of the standard target
	isFragment bool
}

type legacyPart struct {
	name string
	rev  uint32
	info []byte
}

// Inversion bits, the same in both families.
const (
	invIn    = 0x01
	invOut   = 0x02
	invSrc   = 0x08
	invDst   = 0x10
	invFrag  = 0x20
	invProto = 0x40
)

func (v *visit) legacyRule(r *legacyRule) (match, *theirVerdict) {
	t := v.t
	masked := func(a, mask, want []byte) bool {
		for i := range mask {
			if a[i]&mask[i] != want[i]&mask[i] {
				return false
			}
		}
		return true
	}
	device := func(name, want string, mask []byte) bool {
		a := append([]byte(name), make([]byte, 16-len(name))...)
		w := append([]byte(want), make([]byte, 16-len(want))...)
		return masked(a, mask, w)
	}
	switch {
	case masked(t.src.Addr().AsSlice(), r.srcMask, r.src) == (r.invert&invSrc != 0),
		masked(t.dst.Addr().AsSlice(), r.dstMask, r.dst) == (r.invert&invDst != 0),
		device(t.in, r.in, r.inMask) == (r.invert&invIn != 0),
		device(t.out, r.out, r.outMask) == (r.invert&invOut != 0),
		r.proto != 0 && (r.proto == unix.IPPROTO_TCP) == (r.invert&invProto != 0),
		r.isFragment && r.invert&invFrag == 0:
		return no, nil
	}
	result := yes
	for _, m := range r.matches {
		if result = min(result, v.xtMatch(m.name, m.rev, m.info)); result == no {
			return no, nil
		}
	}
	if r.verdict != nil {
		return result, r.verdict
	}
	m, verdict := v.xtTarget(r.target.name, r.target.rev, r.target.info, result)
	return min(result, m), verdict
}

// words puts a legacy rule into the words of iptables, as far as it helps to
// find the rule.
func (r *legacyRule) words(chain string) string {
	out := []string{"-A", chain}
	not := func(bit byte) {
		if r.invert&bit != 0 {
			out = append(out, "!")
		}
	}
	addr := func(opt string, bit byte, a, mask []byte) {
		if bytes.Count(mask, []byte{0}) == len(mask) {
			return
		}
		not(bit)
		out = append(out, opt, prefixText(a, mask))
	}
	addr("-s", invSrc, r.src, r.srcMask)
	addr("-d", invDst, r.dst, r.dstMask)
	if r.in != "" {
		not(invIn)
		out = append(out, "-i", r.in)
	}
	if r.out != "" {
		not(invOut)
		out = append(out, "-o", r.out)
	}
	switch r.proto {
	case 0:
	case unix.IPPROTO_TCP:
		not(invProto)
		out = append(out, "-p", "tcp")
	case unix.IPPROTO_UDP:
		not(invProto)
		out = append(out, "-p", "udp")
	default:
		not(invProto)
		out = append(out, "-p", itoa(int(r.proto)))
	}
	for _, m := range r.matches {
		out = append(out, "-m", m.name)
	}
	switch {
	case r.verdict == nil:
		out = append(out, "-j", r.target.name)
	case r.verdict.code == verdictDrop:
		out = append(out, "-j", "DROP")
	case r.verdict.code == verdictAccept:
		out = append(out, "-j", "ACCEPT")
	case r.verdict.code == unix.NFT_RETURN:
		out = append(out, "-j", "RETURN")
	case r.verdict.chain != "":
		out = append(out, "-j", r.verdict.chain)
	}
	return strings.Join(out, " ")
}
