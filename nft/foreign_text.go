// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/bits"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// This file puts other people's rules into words. They are for a person who
// looks for the rule, beside its handle, not for nft to read: what has no
// words here stands as its expression's name in angle brackets.

func itoa(n int) string { return strconv.Itoa(n) }

// A phrase is what a register was loaded with: the words for it, and how a
// value that it is compared with is written.
type phrase struct {
	words string
	value func([]byte) string
}

func (t *theirTables) ruleText(c *theirChain, r *theirRule) string {
	if r.legacy != nil {
		return r.text
	}
	w := ruleWriter{tables: t, c: c}
	for i := range r.exprs {
		w.expr(&r.exprs[i])
	}
	return strings.Join(w.out, " ")
}

type ruleWriter struct {
	tables *theirTables
	c      *theirChain
	last   phrase   // of register 1 and its like
	parts  []string // of a concatenation
	mask   string
	out    []string
}

func (w *ruleWriter) say(format string, a ...any) {
	w.out = append(w.out, fmt.Sprintf(format, a...))
}

// load notes what stands in a register; several in a row are a concatenation.
func (w *ruleWriter) load(words string, value func([]byte) string) {
	w.last = phrase{words, value}
	w.parts = append(w.parts, words)
	w.mask = ""
}

func (w *ruleWriter) used() { w.parts, w.mask = nil, "" }

func (w *ruleWriter) expr(e *theirExpr) {
	switch e.name {
	case "meta":
		w.meta(e)
	case "ct":
		w.ct(e)
	case "payload":
		w.payload(e)
	case "fib":
		w.fib(e)
	case "cmp":
		w.compare(e)
	case "range":
		lo := e.nest(unix.NFTA_RANGE_FROM_DATA)[unix.NFTA_DATA_VALUE]
		hi := e.nest(unix.NFTA_RANGE_TO_DATA)[unix.NFTA_DATA_VALUE]
		op := " "
		if e.uint(unix.NFTA_RANGE_OP) != 0 {
			op = " != "
		}
		w.say("%s%s%s-%s", w.last.words, op, w.value(lo), w.value(hi))
		w.used()
	case "bitwise":
		if m := e.nest(unix.NFTA_BITWISE_MASK)[unix.NFTA_DATA_VALUE]; len(m) > 0 {
			w.mask = w.maskText(m)
		}
	case "lookup":
		w.lookup(e)
	case "immediate":
		if v := parseVerdict(e.nest(unix.NFTA_IMMEDIATE_DATA).nest(unix.NFTA_DATA_VERDICT)); v != nil {
			w.say("%s", verdictWords(v))
		}
	case "reject", "masq", "redir", "notrack", "synproxy", "tproxy", "log", "queue", "quota", "limit":
		words := map[string]string{"masq": "masquerade", "redir": "redirect"}
		if s := words[e.name]; s != "" {
			w.say("%s", s)
		} else {
			w.say("%s", e.name)
		}
		if e.name == "limit" {
			w.limit(e)
		}
	case "nat":
		if e.uint(unix.NFTA_NAT_TYPE) == natDNAT {
			w.say("dnat")
		} else {
			w.say("snat")
		}
	case "match":
		w.say("-m %s", e.text(unix.NFTA_MATCH_NAME))
	case "target":
		w.say("-j %s", e.text(unix.NFTA_TARGET_NAME))
	case "byteorder", "objref", "last", "counter":
	default:
		w.say("<%s>", e.name)
		w.used()
	}
}

func verdictWords(v *theirVerdict) string {
	switch v.code {
	case verdictDrop:
		return "drop"
	case verdictAccept:
		return "accept"
	case verdictQueue:
		return "queue"
	case unix.NFT_RETURN:
		return "return"
	case unix.NFT_JUMP:
		return "jump " + v.chain
	case unix.NFT_GOTO:
		return "goto " + v.chain
	case unix.NFT_CONTINUE:
		return "continue"
	}
	return fmt.Sprintf("verdict %d", v.code)
}

func (w *ruleWriter) limit(e *theirExpr) {
	unit := map[uint64]string{1: "second", 60: "minute", 3600: "hour", 86400: "day"}[e.uint(unix.NFTA_LIMIT_UNIT)]
	over := ""
	if e.uint(unix.NFTA_LIMIT_FLAGS)&1 != 0 {
		over = "over "
	}
	w.say("rate %s%d/%s", over, e.uint(unix.NFTA_LIMIT_RATE), unit)
}

var metaWords = map[uint64]string{
	unix.NFT_META_LEN: "meta length", unix.NFT_META_PROTOCOL: "meta protocol", unix.NFT_META_PRIORITY: "meta priority",
	unix.NFT_META_MARK: "meta mark", unix.NFT_META_IIF: "iif", unix.NFT_META_OIF: "oif",
	unix.NFT_META_IIFNAME: "iifname", unix.NFT_META_OIFNAME: "oifname", unix.NFT_META_IIFTYPE: "iiftype",
	unix.NFT_META_OIFTYPE: "oiftype", unix.NFT_META_SKUID: "meta skuid", unix.NFT_META_SKGID: "meta skgid",
	unix.NFT_META_NFPROTO: "meta nfproto", unix.NFT_META_L4PROTO: "meta l4proto", unix.NFT_META_PKTTYPE: "meta pkttype",
	unix.NFT_META_CPU: "meta cpu", unix.NFT_META_IIFGROUP: "iifgroup", unix.NFT_META_OIFGROUP: "oifgroup",
	unix.NFT_META_CGROUP: "meta cgroup", unix.NFT_META_NFTRACE: "meta nftrace", unix.NFT_META_RTCLASSID: "meta rtclassid",
	metaIIFKind: "meta iifkind", metaOIFKind: "meta oifkind",
}

func (w *ruleWriter) meta(e *theirExpr) {
	key := e.uint(metaKey)
	words := metaWords[key]
	if words == "" {
		words = fmt.Sprintf("meta %d", key)
	}
	if e.attrs[metaSREG] != nil {
		w.say("%s set", words)
		w.used()
		return
	}
	value := hexText
	switch key {
	case unix.NFT_META_MARK, unix.NFT_META_IIF, unix.NFT_META_OIF, unix.NFT_META_LEN, unix.NFT_META_SKUID, unix.NFT_META_SKGID:
		value = hostNumber
		if key == unix.NFT_META_MARK {
			value = hostHex
		}
	case unix.NFT_META_IIFNAME, unix.NFT_META_OIFNAME:
		value = nameText
	case unix.NFT_META_NFPROTO:
		value = func(b []byte) string {
			if len(b) == 1 && b[0] == unix.NFPROTO_IPV6 {
				return "ipv6"
			}
			return "ipv4"
		}
	case unix.NFT_META_L4PROTO:
		value = protocolText
	}
	w.load(words, value)
}

func (w *ruleWriter) ct(e *theirExpr) {
	words := map[uint64]string{
		unix.NFT_CT_STATE: "ct state", unix.NFT_CT_STATUS: "ct status", unix.NFT_CT_MARK: "ct mark",
		unix.NFT_CT_DIRECTION: "ct direction", unix.NFT_CT_HELPER: "ct helper", unix.NFT_CT_ZONE: "ct zone",
	}[e.uint(ctKey)]
	if words == "" {
		words = fmt.Sprintf("ct %d", e.uint(ctKey))
	}
	if e.attrs[4] != nil {
		w.say("%s set", words)
		w.used()
		return
	}
	value := hostHex
	if e.uint(ctKey) == unix.NFT_CT_STATE {
		value = ctStates
	}
	w.load(words, value)
}

// field is a header field that people name.
type field struct {
	words string
	value func([]byte) string
}

func (w *ruleWriter) payload(e *theirExpr) {
	base, at, n := e.uint(unix.NFTA_PAYLOAD_BASE), e.uint(unix.NFTA_PAYLOAD_OFFSET), e.uint(unix.NFTA_PAYLOAD_LEN)
	if e.attrs[unix.NFTA_PAYLOAD_SREG] != nil {
		w.say("@%s,%d,%d set", [...]string{"ll", "nh", "th", "ih", "tun"}[min(base, 4)], at*8, n*8)
		w.used()
		return
	}
	type place struct{ base, at, n uint64 }
	f, ok := map[place]field{
		{1, 12, 4}: {"ip saddr", addrText}, {1, 16, 4}: {"ip daddr", addrText},
		{1, 12, 3}: {"ip saddr", addrText}, {1, 16, 3}: {"ip daddr", addrText},
		{1, 12, 2}: {"ip saddr", addrText}, {1, 16, 2}: {"ip daddr", addrText},
		{1, 12, 1}: {"ip saddr", addrText}, {1, 16, 1}: {"ip daddr", addrText},
		{1, 8, 16}: {"ip6 saddr", addrText}, {1, 24, 16}: {"ip6 daddr", addrText},
		{1, 8, 8}: {"ip6 saddr", addrText}, {1, 24, 8}: {"ip6 daddr", addrText},
		{1, 9, 1}: {"ip protocol", protocolText}, {1, 6, 1}: {"ip6 nexthdr", protocolText},
		{1, 8, 1}: {"ip ttl", netNumber}, {1, 6, 2}: {"ip frag-off", netNumber},
		{2, 0, 2}: {"tcp sport", netNumber}, {2, 2, 2}: {"tcp dport", netNumber},
		{2, 13, 1}: {"tcp flags", tcpFlags}, {2, 0, 1}: {"icmp type", netNumber},
	}[place{base, at, n}]
	if !ok {
		f = field{fmt.Sprintf("@%s,%d,%d", [...]string{"ll", "nh", "th", "ih", "tun"}[min(base, 4)], at*8, n*8), hexText}
	}
	w.implied(f.words)
	w.load(f.words, f.value)
}

// implied takes away what nft adds to a rule silently in front of a field.
func (w *ruleWriter) implied(words string) {
	proto, _, _ := strings.Cut(words, " ")
	silent := map[string]string{"tcp": "meta l4proto tcp", "ip": "meta nfproto ipv4", "ip6": "meta nfproto ipv6"}[proto]
	if n := len(w.out); silent != "" && n > 0 && w.out[n-1] == silent {
		w.out = w.out[:n-1]
	}
}

func (w *ruleWriter) fib(e *theirExpr) {
	flags := e.uint(unix.NFTA_FIB_FLAGS)
	var key []string
	for _, f := range []struct {
		bit  uint64
		word string
	}{{unix.NFTA_FIB_F_SADDR, "saddr"}, {unix.NFTA_FIB_F_DADDR, "daddr"}, {unix.NFTA_FIB_F_MARK, "mark"}, {unix.NFTA_FIB_F_IIF, "iif"}, {unix.NFTA_FIB_F_OIF, "oif"}} {
		if flags&f.bit != 0 {
			key = append(key, f.word)
		}
	}
	what, value := "oif", hostNumber
	switch e.uint(unix.NFTA_FIB_RESULT) {
	case unix.NFT_FIB_RESULT_OIFNAME:
		what, value = "oifname", nameText
	case unix.NFT_FIB_RESULT_ADDRTYPE:
		what, value = "type", routeTypeText
	}
	if flags&unix.NFTA_FIB_F_PRESENT != 0 || what == "oif" {
		value = func(b []byte) string {
			if n := binary.NativeEndian.Uint32(append(b[:len(b):len(b)], 0, 0, 0, 0)); n == 0 {
				return "missing"
			}
			return "exists"
		}
	}
	w.load("fib "+strings.Join(key, " . ")+" "+what, value)
}

func (w *ruleWriter) value(b []byte) string {
	if w.last.value == nil {
		return hexText(b)
	}
	return w.last.value(b)
}

func (w *ruleWriter) maskText(m []byte) string {
	if ones, all := prefixLen(m); all {
		return "/" + itoa(ones)
	}
	return w.value(m)
}

func (w *ruleWriter) compare(e *theirExpr) {
	data := e.nest(unix.NFTA_CMP_DATA)[unix.NFTA_DATA_VALUE]
	op := [...]string{" ", " != ", " < ", " <= ", " > ", " >= "}[min(e.uint(unix.NFTA_CMP_OP), 5)]
	words, value := w.last.words, w.value(data)
	switch {
	case strings.HasPrefix(w.mask, "/") && (strings.HasSuffix(words, "addr")):
		value += w.mask
	case w.mask != "" && strings.HasPrefix(words, "ct st") && allZero(data):
		value, op = w.mask, " "
		if e.uint(unix.NFTA_CMP_OP) == unix.NFT_CMP_EQ {
			op = " != "
		}
	case w.mask != "":
		if op == " " {
			op = " == "
		}
		mask := w.mask
		if strings.HasPrefix(mask, "/") {
			mask = "…" + mask
		}
		words += " & " + mask
	}
	w.say("%s%s%s", words, op, value)
	w.used()
}

// mostShown bounds the elements of an anonymous set that are written out.
const mostShown = 6

func (w *ruleWriter) lookup(e *theirExpr) {
	name := e.text(unix.NFTA_LOOKUP_SET)
	s := w.tables.sets[objectKey{w.c.family, w.c.table, name}]
	op := " "
	if e.uint(unix.NFTA_LOOKUP_FLAGS)&lookupInvert != 0 {
		op = " != "
	}
	set := "@" + name
	if s != nil && s.anon {
		set = w.elements(s)
	}
	if s != nil && s.isMap {
		op = " vmap "
	}
	w.say("%s%s%s", strings.Join(w.parts, " . "), op, set)
	w.used()
}

func (w *ruleWriter) elements(s *theirSet) string {
	var out []string
	for i := range s.elements {
		if i == mostShown {
			out = append(out, "…")
			break
		}
		el := &s.elements[i]
		text := hexText(el.key)
		if len(w.parts) == 1 {
			text = w.value(el.key)
			if el.end != nil && string(el.end) != string(el.key) {
				text += "-" + w.value(el.end)
			}
		}
		if el.verdict != nil {
			text += " : " + verdictWords(el.verdict)
		}
		out = append(out, text)
	}
	return "{ " + strings.Join(out, ", ") + " }"
}

func hexText(b []byte) string { return "0x" + hex.EncodeToString(b) }

func hostNumber(b []byte) string {
	if len(b) != 4 {
		return hexText(b)
	}
	return itoa(int(binary.NativeEndian.Uint32(b)))
}

func hostHex(b []byte) string {
	if len(b) != 4 {
		return hexText(b)
	}
	return fmt.Sprintf("%#x", binary.NativeEndian.Uint32(b))
}

func netNumber(b []byte) string {
	n := 0
	for _, c := range b {
		n = n<<8 | int(c)
	}
	return itoa(n)
}

func nameText(b []byte) string {
	s := string(b)
	if t := strings.TrimRight(s, "\x00"); len(t) < len(s) {
		return strconv.Quote(t)
	}
	return strconv.Quote(s + "*") // compared by its beginning
}

func protocolText(b []byte) string {
	if len(b) == 1 {
		switch b[0] {
		case unix.IPPROTO_TCP:
			return "tcp"
		case unix.IPPROTO_UDP:
			return "udp"
		case unix.IPPROTO_ICMP:
			return "icmp"
		case unix.IPPROTO_ICMPV6:
			return "icmpv6"
		}
	}
	return netNumber(b)
}

func addrText(b []byte) string {
	short := len(b)
	full := 4
	if short > 4 {
		full = 16
	}
	a, ok := netip.AddrFromSlice(append(append([]byte(nil), b...), make([]byte, max(full-short, 0))...))
	if !ok {
		return hexText(b)
	}
	if short < full {
		return netip.PrefixFrom(a, short*8).String()
	}
	return a.String()
}

func prefixText(a, mask []byte) string {
	addr, ok := netip.AddrFromSlice(a)
	if ones, all := prefixLen(mask); ok && all {
		return netip.PrefixFrom(addr, ones).String()
	}
	return hexText(a) + "/" + hexText(mask)
}

// prefixLen counts the leading ones of a mask; all is false for one with
// ones behind a zero.
func prefixLen(m []byte) (n int, all bool) {
	for i, b := range m {
		ones := bits.LeadingZeros8(^b)
		n += ones
		if ones < 8 {
			return n, b<<ones == 0 && allZero(m[i+1:])
		}
	}
	return n, true
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

func tcpFlags(b []byte) string {
	if len(b) != 1 {
		return hexText(b)
	}
	return bitNames(uint32(b[0]), []string{"fin", "syn", "rst", "psh", "ack", "urg", "ecn", "cwr"}, " | ")
}

func ctStates(b []byte) string {
	if len(b) != 4 {
		return hexText(b)
	}
	return bitNames(binary.NativeEndian.Uint32(b), []string{"invalid", "established", "related", "new", "", "", "untracked"}, ",")
}

func bitNames(n uint32, names []string, sep string) string {
	var out []string
	for i, name := range names {
		if n&(1<<i) != 0 && name != "" {
			out = append(out, name)
		}
	}
	if len(out) == 0 {
		return fmt.Sprintf("%#x", n)
	}
	return strings.Join(out, sep)
}

func routeTypeText(b []byte) string {
	if len(b) == 4 {
		switch binary.NativeEndian.Uint32(b) {
		case unix.RTN_UNICAST:
			return "unicast"
		case unix.RTN_LOCAL:
			return "local"
		case unix.RTN_BROADCAST:
			return "broadcast"
		case unix.RTN_MULTICAST:
			return "multicast"
		}
	}
	return hostNumber(b)
}
