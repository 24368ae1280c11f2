// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Foreign reads tables and reckons what becomes of a packet. Trace asks the
// kernel: it sends packets like those of Weir and of clients, has nftables
// trace them, and listens. For that it makes a table for a moment, which marks
// what the engine would have marked, and ends each packet where it would leave
// the router or come to the engine. No such packet reaches anybody.

// Traced is one probe packet and what became of it.
type Traced struct {
	// Kind is what the packet stands for: "new connection", "request",
	// "response", "handshake with a client", "handshake with a server".
	Kind string

	// Packet describes it, as in Finding.
	Packet string

	// Passed: it came as far as it should.
	Passed bool

	// Ended is where a chain of others ended it; nil if none did.
	Ended *Finding

	// Lost says what is known of a packet that neither passed nor was ended by
	// a chain of nftables, or why it was not sent.
	Lost string
}

// traceTable is the table that stands while packets are traced.
const traceTable = "weir_trace"

const (
	priorityTrace = priorityRaw - 4    // before all that can meet a packet of ours
	priorityEnd   = prioritySYN - 1    // before our SYN chains
	priorityLast  = math.MaxInt32 - 10 // before conntrack confirms

	nftraceGroup = 9 // NFNLGRP_NFTRACE
	traceWait    = 500 * time.Millisecond
	mostProbes   = 64
)

// Attributes and types of NFT_MSG_TRACE, from linux/netfilter/nf_tables.h.
const (
	traceAttrTable     = 1
	traceAttrChain     = 2
	traceAttrHandle    = 3
	traceAttrType      = 4
	traceAttrVerdict   = 5
	traceAttrID        = 6
	traceAttrTransport = 9
	traceAttrNFProto   = 15
	traceAttrPolicy    = 16

	traceIsPolicy = 1
	traceIsRule   = 3
)

// probe is a packet to be sent.
type probe struct {
	kind string
	t    *trial
	in   string // the interface that it comes in by; empty: the router emits it
}

// tracer sends probes, one at a time, and hears what becomes of them.
type tracer struct {
	finder
	nl     *netlink.Conn
	plain  uint32 // sequence number of probes that are as a client sent them
	ours   uint32 // of those that the engine has translated or made
	inject *injector
}

// Trace sends probe packets through the tables of others in the network
// namespace of the calling thread and reports where they end. It needs
// CAP_NET_ADMIN, CAP_NET_RAW and the right to load BPF programs, by which
// packets are made to come in through an interface. What nftables cannot
// trace, iptables-legacy, shows as lost.
func Trace(p Params) (list []Traced, err error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	p = p.clone()
	x := &tracer{}
	x.p, x.seen = &p, map[findingKey]int{}
	if x.tables, err = readTables(p.Table); err != nil {
		return nil, err
	}
	if x.routes, err = readRoutes(&p); err != nil {
		return nil, err
	}
	var magic [8]byte
	if _, err := rand.Read(magic[:]); err != nil {
		return nil, err
	}
	x.plain, x.ours = binary.BigEndian.Uint32(magic[:]), binary.BigEndian.Uint32(magic[4:])
	if x.nl, err = netlink.Dial(unix.NETLINK_NETFILTER, nil); err != nil {
		return nil, fmt.Errorf("nft: tracing: %w", err)
	}
	defer x.nl.Close()
	_ = x.nl.SetReadBuffer(eventBuffer)
	if err := x.nl.JoinGroup(nftraceGroup); err != nil {
		return nil, fmt.Errorf("nft: tracing: %w", err)
	}
	if x.inject, err = newInjector(p.Mark); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, x.inject.Close()) }()
	if err := x.install(); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, removeTraceTable()) }()
	for _, pr := range x.probes() {
		r := Traced{Kind: pr.kind, Packet: pr.t.String()}
		if err := x.send(&pr, &r); err != nil {
			return list, err
		}
		list = append(list, r)
	}
	return list, nil
}

// install makes the table of the trace. One that a killed process left goes.
func (x *tracer) install() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nft: tracing: %w", err)
	}
	table := &nftables.Table{Name: traceTable, Family: nftables.TableFamilyINet}
	c.AddTable(table)
	c.DelTable(table)
	c.AddTable(table)
	chain := func(name string, hook *nftables.ChainHook, priority int32) *nftables.Chain {
		policy := nftables.ChainPolicyAccept
		return c.AddChain(&nftables.Chain{Name: name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityRef(nftables.ChainPriority(priority)), Policy: &policy})
	}
	rule := func(ch *nftables.Chain, seq uint32, x ...expr.Any) {
		match := append(slices.Clone(l4tcpExprs()),
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 4, Len: 4},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint32(nil, seq)})
		c.AddRule(&nftables.Rule{Table: table, Chain: ch, Exprs: append(match, x...)})
	}
	trace := []expr.Any{
		&expr.Immediate{Register: 1, Data: []byte{1}},
		&expr.Meta{Key: expr.MetaKeyNFTRACE, SourceRegister: true, Register: 1},
	}
	native := func(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
	mark := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(^x.p.MarkMask), Xor: native(x.p.Mark)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
	}
	untracked := &expr.Notrack{}
	end := &expr.Verdict{Kind: expr.VerdictDrop}
	pre := chain("pre", nftables.ChainHookPrerouting, priorityTrace)
	rule(pre, x.plain, trace...)
	rule(pre, x.ours, append(append(slices.Clone(trace), mark...), untracked)...)
	out := chain("out", nftables.ChainHookOutput, priorityTrace)
	rule(out, x.ours, append(slices.Clone(trace), untracked)...)
	for _, e := range []struct {
		name     string
		hook     *nftables.ChainHook
		priority int32
		seqs     []uint32
	}{
		{"end_input", nftables.ChainHookInput, priorityEnd, []uint32{x.plain, x.ours}},
		{"end_forward", nftables.ChainHookForward, priorityEnd, []uint32{x.plain}},
		{"end_postrouting", nftables.ChainHookPostrouting, priorityLast, []uint32{x.plain, x.ours}},
	} {
		ch := chain(e.name, e.hook, e.priority)
		for _, seq := range e.seqs {
			rule(ch, seq, end)
		}
	}
	if err := c.Flush(); err != nil {
		if errors.Is(err, unix.EPERM) {
			return fmt.Errorf("nft: tracing: %w", ErrPermission)
		}
		return fmt.Errorf("nft: tracing: the table %s: %w", traceTable, err)
	}
	return nil
}

func removeTraceTable() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nft: tracing: %w", err)
	}
	c.DelTable(&nftables.Table{Name: traceTable, Family: nftables.TableFamilyINet})
	if err := c.Flush(); err != nil {
		return fmt.Errorf("nft: tracing: removing the table %s: %w", traceTable, err)
	}
	return nil
}

func l4tcpExprs() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
	}
}

// probes lists the packets, as marked and clients follow them, of both
// families by turns until there are enough.
func (x *tracer) probes() []probe {
	var lists [2][]probe
	for i, fam := range families {
		add := func(kind, in string, src, dst netip.AddrPort, flags byte, marked bool) {
			t := x.trial(fam, src, dst, flags)
			t.marked, t.in = marked, in
			lists[i] = append(lists[i], probe{kind, t, in})
		}
		clients, servers := x.routes.clients[fam], x.routes.servers[fam]
		is4 := fam == &family4
		for _, v := range x.p.VIPs {
			if v.Addr().Is4() != is4 {
				continue
			}
			for _, c := range clients {
				add("new connection", c.dev, c.addr, v, flagSYN, false)
				add("handshake with a client", "", v, c.addr, flagSYN|flagACK, true)
				for _, dev := range serverDevices(servers) {
					if dev != "lo" {
						add("response", dev, v, c.addr, flagACK, true)
					}
				}
			}
		}
		for _, a := range x.p.SNIPs {
			if a.Is4() != is4 {
				continue
			}
			snip := netip.AddrPortFrom(a, x.p.PortFirst)
			for _, s := range servers {
				if s.dev == "lo" {
					continue // Nothing of others stands between two programs of this host but what output shows.
				}
				add("handshake with a server", "", snip, s.addr, flagSYN, true)
				for _, c := range clients {
					add("request", c.dev, snip, s.addr, flagACK, true)
				}
			}
		}
	}
	var out []probe
	for i := 0; len(out) < mostProbes && (i < len(lists[0]) || i < len(lists[1])); i++ {
		for _, l := range lists {
			if i < len(l) {
				out = append(out, l[i])
			}
		}
	}
	return out
}

// send sends one probe and hears where it ends.
func (x *tracer) send(pr *probe, r *Traced) error {
	seq := x.plain
	if pr.t.marked {
		seq = x.ours
	}
	if pr.in != "" && pr.t.marked && pr.t.family == unix.NFPROTO_IPV4 {
		unmet := Unmet([]Sysctl{{Kind: AcceptLocal, Interface: pr.in}, {Kind: LooseRPFilter, Interface: pr.in}})
		if kind, ok := x.routes.kind(pr.t.src.Addr(), "", false); ok && kind == unix.RTN_LOCAL && len(unmet) > 0 {
			r.Lost = fmt.Sprintf("not sent: the kernel lets such packets in only while an instance runs (%s)", unmet[0])
			return nil
		}
	}
	data, err := finished(pr.t, seq)
	if err != nil {
		return err
	}
	if pr.in == "" {
		err = x.inject.emit(data)
	} else {
		err = x.inject.receive(pr.in, data)
	}
	if err != nil {
		return err
	}
	return x.hear(pr, seq, r)
}

// hear reads the trace of one probe to its end.
func (x *tracer) hear(pr *probe, seq uint32, r *Traced) error {
	deadline := time.Now().Add(traceWait)
	if err := x.nl.SetReadDeadline(deadline); err != nil {
		return fmt.Errorf("nft: tracing: %w", err)
	}
	ids := map[uint64]bool{}
	var base *theirChain // that the packet is in
	last := ""
	for {
		msgs, err := x.nl.Receive()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if r.Lost = "ended in no chain of nftables: by iptables-legacy, or by the kernel's routing"; last != "" {
				r.Lost += "; seen last in " + last
			}
			return nil
		case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("nft: tracing: %w", err)
		}
		for i := range msgs {
			m := &msgs[i]
			if m.Header.Type != nftType(unix.NFT_MSG_TRACE) || len(m.Data) < 4 {
				continue
			}
			a, err := parseAttrs(m.Data[4:])
			if err != nil {
				continue
			}
			// Others may trace too. The first message of each chain has the
			// headers, by which a probe is known.
			id := a.uint(traceAttrID)
			if h := a[traceAttrTransport]; len(h) >= 8 && binary.BigEndian.Uint32(h[4:]) == seq {
				ids[id] = true
			}
			if !ids[id] {
				continue
			}
			if x.step(a, pr, &base, &last, r) {
				return nil
			}
		}
	}
}

// step takes one message of a probe's trace and reports whether it is the
// last.
func (x *tracer) step(a attrs, pr *probe, base **theirChain, last *string, r *Traced) bool {
	table, name := a.text(traceAttrTable), a.text(traceAttrChain)
	verdict := int32(a.nest(traceAttrVerdict).uint(unix.NFTA_VERDICT_CODE))
	kind := a.uint(traceAttrType)
	if table == traceTable {
		r.Passed = kind == traceIsRule && verdict == verdictDrop
		return r.Passed
	}
	var chain *theirChain
	for _, family := range []byte{byte(a.uint(traceAttrNFProto)), unix.NFPROTO_INET, pr.t.family} {
		if chain == nil {
			chain = x.tables.chains[objectKey{family, table, name}]
		}
	}
	if chain == nil {
		if table == x.p.Table && kind == traceIsRule && verdict == verdictDrop {
			r.Lost = "ended by Weir's own chain " + name
			return true
		}
		return false // of ours, or made meanwhile
	}
	*last = fmt.Sprintf("%s %s %s", familyWords[chain.family], chain.table, chain.name)
	if chain.hook != "" {
		*base = chain
	}
	o := outcome{fate: drops, sure: true, chain: chain}
	trouble := DropsMarked
	if !pr.t.marked {
		trouble = DropsSYN
	}
	const stolen = 2
	switch {
	case kind == traceIsPolicy && a.uint(traceAttrPolicy) == verdictDrop:
	case kind == traceIsRule && (verdict == verdictDrop || verdict == stolen || verdict == verdictQueue):
		handle := a.uint(traceAttrHandle)
		if i := slices.IndexFunc(chain.rules, func(r theirRule) bool { return r.handle == handle }); i >= 0 {
			o.rule = &chain.rules[i]
		} else {
			o.rule = &theirRule{handle: handle, text: fmt.Sprintf("rule with handle %d", handle), legacy: &legacyRule{}}
		}
		// SYNPROXY drops an IPv6 packet whose checksum nobody has vouched for:
		// the kernel computes it as that of IPv4. A client's it takes.
		if verdict != verdictDrop || slices.ContainsFunc(o.rule.exprs, func(e theirExpr) bool { return e.name == "synproxy" }) {
			o.fate = taken
			if !pr.t.marked {
				trouble = TakesSYN
			}
		}
	default:
		return false
	}
	at := *base
	if at == nil {
		at = chain
	}
	x.out, x.seen = nil, map[findingKey]int{}
	x.report(trouble, at, o, pr.t)
	f := x.out[0]
	r.Ended = &f
	return true
}
