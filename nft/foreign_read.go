// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// This file reads everybody's tables. It keeps expressions as the kernel
// describes them, by name and attributes: a library that skips what it does
// not know would make a bare "drop" of "something unknown drop".

// attrs are netlink attributes by type; of a type that comes twice, the last.
type attrs map[uint16][]byte

func parseAttrs(b []byte) (attrs, error) {
	out := attrs{}
	err := eachAttr(b, func(typ uint16, v []byte) error { out[typ] = v; return nil })
	return out, err
}

func eachAttr(b []byte, f func(typ uint16, v []byte) error) error {
	for len(b) >= 4 {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return errors.New("an attribute is longer than its message")
		}
		if err := f(binary.NativeEndian.Uint16(b[2:])&0x3fff, b[4:n]); err != nil {
			return err
		}
		b = b[min(len(b), (n+3)&^3):]
	}
	return nil
}

func (a attrs) text(typ uint16) string { return strings.TrimRight(string(a[typ]), "\x00") }

func (a attrs) uint(typ uint16) uint64 {
	switch v := a[typ]; len(v) {
	case 1:
		return uint64(v[0])
	case 4:
		return uint64(binary.BigEndian.Uint32(v))
	case 8:
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

// nest gives the attributes inside one; none if it is absent or broken.
func (a attrs) nest(typ uint16) attrs {
	n, err := parseAttrs(a[typ])
	if err != nil {
		return nil
	}
	return n
}

type objectKey struct {
	family      byte
	table, name string
}

// A theirChain is a chain of any table.
type theirChain struct {
	objectKey
	kind     string // "filter", "nat", "route"; empty for a chain without a hook
	hook     string
	priority int32
	drops    bool // policy drop
	devices  []string
	handle   uint64
	rules    []theirRule
	legacy   string // "iptables" or "ip6tables": not from nftables at all
}

type theirRule struct {
	handle uint64
	exprs  []theirExpr
	text   string // of a legacy rule; nftables rules are put into words by ruleText
	legacy *legacyRule
}

type theirExpr struct {
	name string
	attrs
}

// A theirSet holds its elements as far as deciding needs them.
type theirSet struct {
	objectKey
	isMap    bool
	interval bool
	anon     bool
	known    bool // elements could be read
	elements []theirElement
	catchall *theirElement
}

// theirElement is one element: key to to, both included, field by field in a
// concatenation of ranges; lo only for an exact key.
type theirElement struct {
	key, end []byte
	data     []byte // of a map
	verdict  *theirVerdict
	isEnd    bool // of the old form of intervals: here one ends
}

type theirVerdict struct {
	code  int32
	chain string
}

// theirTables is a ruleset at one moment.
type theirTables struct {
	chains map[objectKey]*theirChain
	base   []*theirChain // sorted by priority, equal ones in the order in which they run
	sets   map[objectKey]*theirSet
	owned  map[objectKey]bool // tables with a living owner
}

var familyWords = map[byte]string{
	unix.NFPROTO_INET: "inet", unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6",
	unix.NFPROTO_ARP: "arp", unix.NFPROTO_BRIDGE: "bridge", unix.NFPROTO_NETDEV: "netdev",
}

var (
	inetHooks   = []string{"prerouting", "input", "forward", "output", "postrouting", "ingress"}
	netdevHooks = []string{"ingress", "egress"}
)

// errChanged: the ruleset changed while it was read.
var errChanged = errors.New("the ruleset keeps changing while it is read")

// readTables reads all tables except the skipped one and its companions. A ruleset
// that changes meanwhile is read again.
func readTables(skip string) (*theirTables, error) {
	c, err := dialReader()
	if err != nil {
		return nil, err
	}
	defer c.close()
	for range 20 {
		before, err := c.generation()
		if err != nil {
			return nil, err
		}
		t, err := c.readTables(skip)
		after, err2 := c.generation()
		if err2 != nil {
			return nil, err2
		}
		if before != after {
			continue
		}
		return t, err
	}
	return nil, fmt.Errorf("nft: %w", errChanged)
}

// generation is the number that every committed transaction increases.
func (c *conn) generation() (uint32, error) {
	msgs, err := c.ask(unix.NFT_MSG_GETGEN, unix.AF_UNSPEC, nil, 0)
	if err != nil {
		return 0, err
	}
	for _, m := range msgs {
		if len(m.Data) < 4 {
			continue
		}
		a, err := parseAttrs(m.Data[4:])
		if err != nil {
			return 0, fmt.Errorf("nft: reading the generation: %w", err)
		}
		return uint32(a.uint(unix.NFTA_GEN_ID)), nil
	}
	return 0, errors.New("nft: reading the generation: no answer")
}

// ask makes one request with the body that the attributes make.
func (c *conn) ask(msg int, family byte, body []netlink.Attribute, flags netlink.HeaderFlags) ([]netlink.Message, error) {
	b, err := netlink.MarshalAttributes(body)
	if err != nil {
		return nil, fmt.Errorf("nft: %w", err)
	}
	if err := c.nl.SetReadDeadline(time.Now().Add(ackTimeout)); err != nil {
		return nil, fmt.Errorf("nft: %w", err)
	}
	msgs, err := c.nl.Execute(netlink.Message{
		Header: netlink.Header{Type: nftType(msg), Flags: netlink.Request | flags},
		Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, b...),
	})
	switch {
	case errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("nft: %w", ErrPermission)
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP):
		return nil, fmt.Errorf("nft: %w (%w)", ErrNoNftables, err)
	case err != nil:
		return nil, fmt.Errorf("nft: reading the ruleset: %w", err)
	}
	return msgs, nil
}

// list dumps all objects of a kind and calls f with each one's family and
// attributes.
func (c *conn) list(msg int, family byte, body []netlink.Attribute, f func(family byte, a attrs) error) error {
	msgs, err := c.ask(msg, family, body, netlink.Dump)
	if err != nil {
		return err
	}
	for _, m := range msgs {
		if len(m.Data) < 4 {
			return errors.New("nft: reading the ruleset: a message is too short")
		}
		a, err := parseAttrs(m.Data[4:])
		if err != nil {
			return fmt.Errorf("nft: reading the ruleset: %w", err)
		}
		if err := f(m.Data[0], a); err != nil {
			return err
		}
	}
	return nil
}

func (c *conn) readTables(skip string) (*theirTables, error) {
	t := &theirTables{chains: map[objectKey]*theirChain{}, sets: map[objectKey]*theirSet{}, owned: map[objectKey]bool{}}
	ours := func(family byte, table string) bool { return family == unix.NFPROTO_INET && table == skip }
	err := c.list(unix.NFT_MSG_GETTABLE, unix.NFPROTO_UNSPEC, nil, func(family byte, a attrs) error {
		if a.uint(unix.NFTA_TABLE_FLAGS)&tableOwner != 0 {
			t.owned[objectKey{family: family, table: a.text(unix.NFTA_TABLE_NAME)}] = true
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = c.list(unix.NFT_MSG_GETCHAIN, unix.NFPROTO_UNSPEC, nil, func(family byte, a attrs) error {
		if !ours(family, a.text(unix.NFTA_CHAIN_TABLE)) {
			t.addChain(family, a)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = c.list(unix.NFT_MSG_GETRULE, unix.NFPROTO_UNSPEC, nil, func(family byte, a attrs) error {
		ch := t.chains[objectKey{family, a.text(unix.NFTA_RULE_TABLE), a.text(unix.NFTA_RULE_CHAIN)}]
		if ch == nil {
			return nil
		}
		r := theirRule{handle: a.uint(unix.NFTA_RULE_HANDLE)}
		err := eachAttr(a[unix.NFTA_RULE_EXPRESSIONS], func(_ uint16, v []byte) error {
			e, err := parseAttrs(v)
			if err == nil {
				r.exprs = append(r.exprs, theirExpr{e.text(unix.NFTA_EXPR_NAME), e.nest(unix.NFTA_EXPR_DATA)})
			}
			return err
		})
		ch.rules = append(ch.rules, r)
		return err
	})
	if err != nil {
		return nil, err
	}
	err = c.list(unix.NFT_MSG_GETSET, unix.NFPROTO_UNSPEC, nil, func(family byte, a attrs) error {
		if !ours(family, a.text(unix.NFTA_SET_TABLE)) {
			k := objectKey{family, a.text(unix.NFTA_SET_TABLE), a.text(unix.NFTA_SET_NAME)}
			flags := a.uint(unix.NFTA_SET_FLAGS)
			t.sets[k] = &theirSet{
				objectKey: k, isMap: flags&unix.NFT_SET_MAP != 0,
				interval: flags&unix.NFT_SET_INTERVAL != 0, anon: flags&unix.NFT_SET_ANONYMOUS != 0,
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, f := range families {
		t.forgetCompanion(f.nf, skip)
	}
	slices.SortStableFunc(t.base, func(a, b *theirChain) int {
		return cmp.Or(cmp.Compare(a.priority, b.priority), cmp.Compare(b.handle, a.handle))
	})
	return t, t.readElements(c)
}

// companion says whether a table in family ip or ip6 has the chains that a
// companion has, and no others.
func (t *theirTables) companion(family byte, table string) bool {
	if family != unix.NFPROTO_IPV4 && family != unix.NFPROTO_IPV6 {
		return false
	}
	want := companionChains()
	n := 0
	for k := range t.chains {
		if k.family == family && k.table == table {
			n++
		}
	}
	return n == len(want) && !slices.ContainsFunc(want, func(w Chain) bool {
		c := t.chains[objectKey{family, table, w.Name}]
		return c == nil || c.kind != "filter" || c.hook != w.Hook || c.priority != w.Priority
	})
}

// forgetCompanion takes our own companion of a family out.
func (t *theirTables) forgetCompanion(family byte, table string) {
	if !t.companion(family, table) {
		return
	}
	mine := func(k objectKey) bool { return k.family == family && k.table == table }
	maps.DeleteFunc(t.chains, func(k objectKey, _ *theirChain) bool { return mine(k) })
	t.base = slices.DeleteFunc(t.base, func(c *theirChain) bool { return mine(c.objectKey) })
}

func (t *theirTables) addChain(family byte, a attrs) {
	ch := &theirChain{
		objectKey: objectKey{family, a.text(unix.NFTA_CHAIN_TABLE), a.text(unix.NFTA_CHAIN_NAME)},
		kind:      a.text(unix.NFTA_CHAIN_TYPE), handle: a.uint(unix.NFTA_CHAIN_HANDLE),
	}
	t.chains[ch.objectKey] = ch
	hook := a.nest(unix.NFTA_CHAIN_HOOK)
	if len(hook) == 0 {
		return
	}
	names, n := inetHooks, hook.uint(unix.NFTA_HOOK_HOOKNUM)
	if family == unix.NFPROTO_NETDEV {
		names = netdevHooks
	}
	if n >= uint64(len(names)) {
		return
	}
	ch.hook, ch.priority = names[n], int32(hook.uint(unix.NFTA_HOOK_PRIORITY))
	const hookDev, hookDevs = 3, 4 // NFTA_HOOK_DEV, NFTA_HOOK_DEVS
	if d := hook.text(hookDev); d != "" {
		ch.devices = append(ch.devices, d)
	}
	_ = eachAttr(hook[hookDevs], func(_ uint16, v []byte) error {
		ch.devices = append(ch.devices, strings.TrimRight(string(v), "\x00"))
		return nil
	})
	if p, ok := a[unix.NFTA_CHAIN_POLICY]; ok && len(p) == 4 {
		ch.drops = binary.BigEndian.Uint32(p) == 0 // NF_DROP
	}
	t.base = append(t.base, ch)
}

// mostElements bounds what is read of one set: a list of a million banned
// addresses is none of our business. A lookup in a larger one is undecided.
const mostElements = 1 << 16

// readElements reads the elements of the sets that rules look something up in.
func (t *theirTables) readElements(c *conn) error {
	used := map[objectKey]bool{}
	for _, ch := range t.chains {
		for _, r := range ch.rules {
			for _, e := range r.exprs {
				if e.name == "lookup" {
					used[objectKey{ch.family, ch.table, e.text(unix.NFTA_LOOKUP_SET)}] = true
				}
			}
		}
	}
	for k, s := range t.sets {
		if !used[k] {
			continue
		}
		body := []netlink.Attribute{
			{Type: unix.NFTA_SET_ELEM_LIST_TABLE, Data: []byte(k.table + "\x00")},
			{Type: unix.NFTA_SET_ELEM_LIST_SET, Data: []byte(k.name + "\x00")},
		}
		s.known = true
		err := c.list(unix.NFT_MSG_GETSETELEM, k.family, body, func(_ byte, a attrs) error {
			return eachAttr(a[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(_ uint16, v []byte) error {
				if len(s.elements) >= mostElements {
					s.known = false
					return nil
				}
				return s.add(v)
			})
		})
		if err != nil {
			return err
		}
		s.elements = joinIntervals(s.elements)
	}
	return nil
}

const (
	elemIntervalEnd = 0x1 // NFT_SET_ELEM_INTERVAL_END
	elemCatchall    = 0x2 // NFT_SET_ELEM_CATCHALL
	elemKeyEnd      = 10  // NFTA_SET_ELEM_KEY_END
)

func (s *theirSet) add(v []byte) error {
	a, err := parseAttrs(v)
	if err != nil {
		return err
	}
	value := func(typ uint16) []byte { return a.nest(typ)[unix.NFTA_DATA_VALUE] }
	e := theirElement{key: value(unix.NFTA_SET_ELEM_KEY)}
	if end := value(elemKeyEnd); end != nil {
		e.end = end
	}
	if d := a.nest(unix.NFTA_SET_ELEM_DATA); d != nil {
		e.data = d[unix.NFTA_DATA_VALUE]
		e.verdict = parseVerdict(d.nest(unix.NFTA_DATA_VERDICT))
	}
	flags := a.uint(unix.NFTA_SET_ELEM_FLAGS)
	if flags&elemCatchall != 0 {
		s.catchall = &e
		return nil
	}
	e.isEnd = flags&elemIntervalEnd != 0
	s.elements = append(s.elements, e)
	return nil
}

func parseVerdict(a attrs) *theirVerdict {
	if a == nil {
		return nil
	}
	code, ok := a[unix.NFTA_VERDICT_CODE]
	if !ok || len(code) != 4 {
		return nil
	}
	return &theirVerdict{code: int32(binary.BigEndian.Uint32(code)), chain: a.text(unix.NFTA_VERDICT_CHAIN)}
}

// joinIntervals makes ranges of the form in which an interval set lists starts
// and exclusive ends as elements of their own.
func joinIntervals(in []theirElement) []theirElement {
	if !slices.ContainsFunc(in, func(e theirElement) bool { return e.isEnd }) {
		return in
	}
	slices.SortFunc(in, func(a, b theirElement) int {
		if c := slices.Compare(a.key, b.key); c != 0 {
			return c
		}
		if a.isEnd != b.isEnd && a.isEnd {
			return -1
		}
		return 0
	})
	var out []theirElement
	for i, e := range in {
		if e.isEnd {
			continue
		}
		e.end = bytesOf(0xff, len(e.key)) // to the end of the space
		if i+1 < len(in) {
			e.end = minusOne(in[i+1].key)
		}
		out = append(out, e)
	}
	return out
}

func bytesOf(b byte, n int) []byte {
	out := make([]byte, n)
	for i := range out {
		out[i] = b
	}
	return out
}

func minusOne(b []byte) []byte {
	out := slices.Clone(b)
	for i := len(out) - 1; i >= 0; i-- {
		out[i]--
		if out[i] != 0xff {
			break
		}
	}
	return out
}
