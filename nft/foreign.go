// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Trouble says in which way somebody else's rules and ours do not get along.
type Trouble uint8

const (
	// DropsMarked: packets that the engine translated or emitted are dropped.
	// Connections do not work until a rule accepts the mark there.
	DropsMarked Trouble = iota + 1

	// DropsSYN: new connections to a VIP are refused before they reach us,
	// whichever interface they come in by. That may be meant so.
	DropsSYN

	// TakesSYN: new connections to a VIP are sent elsewhere by address
	// translation or transparent proxying before they reach us.
	TakesSYN

	// DropsClient: with firewall.inspect: all, packets of running connections
	// to a VIP are refused, whichever interface they come in by.
	DropsClient

	// TooLate: a chain that can refuse new connections stands at or behind
	// the priority at which we take them; what it refuses, we have answered.
	TooLate
)

// String gives the trouble in one word, for a log attribute or JSON.
func (t Trouble) String() string {
	switch t {
	case DropsMarked:
		return "drops_marked"
	case DropsSYN:
		return "drops_syn"
	case TakesSYN:
		return "takes_syn"
	case DropsClient:
		return "drops_client"
	case TooLate:
		return "too_late"
	}
	return fmt.Sprintf("trouble(%d)", uint8(t))
}

// Finding is one base chain of somebody else's that does not get along with
// our rules, with the rule that decides and what to do about it.
type Finding struct {
	Trouble Trouble

	// Path is where packets meet the chain: "forward", "output", "input",
	// "reverse path" (prerouting), "postrouting".
	Path string

	// Family is nft's word ("inet", "ip", "ip6", "arp", "bridge", "netdev"),
	// or "iptables-legacy" and "ip6tables-legacy" for tables that nft does not
	// list.
	Family string
	Table  string

	// Chain is the base chain, with its hook and priority. Jumped is the chain
	// that it jumped to and that holds the rule, empty when it is Chain.
	Chain    string
	Jumped   string
	Hook     string
	Priority int32

	// Rule is what decides: the rule as nft would print it, as far as we can,
	// or "policy drop". Handle is the rule's number in "nft -a list ruleset",
	// 0 for a policy.
	Rule   string
	Handle uint64

	// Packet describes one packet that meets this end, for a sentence:
	// "203.0.113.10:80 -> 198.18.0.11:40000, in dmz, out lan".
	Packet string

	// Certain is false when a match of a rule on the way could not be decided
	// here, so that the packet may or may not be dropped.
	Certain bool

	// Fix is the command to run, or the sentence that says what to do. It is
	// one line.
	Fix string
}

// Place names table and chain: "inet filter forward", "ip filter FORWARD
// (through ufw-before-forward)".
func (f *Finding) Place() string {
	s := strings.Join([]string{f.Family, f.Table, f.Chain}, " ")
	if f.Jumped != "" {
		s += " (through " + f.Jumped + ")"
	}
	return s
}

// String is one line that says what, where and why, without the fix.
func (f *Finding) String() string {
	var what string
	switch f.Trouble {
	case DropsMarked:
		what = "drops packets that Weir has translated"
	case DropsSYN:
		what = "refuses new connections to a VIP"
	case TakesSYN:
		what = "sends new connections to a VIP elsewhere"
	case DropsClient:
		what = "refuses packets of running connections to a VIP, which are untracked"
	case TooLate:
		what = "stands where new connections have been answered already"
	}
	if !f.Certain {
		what = "possibly " + what
	}
	s := fmt.Sprintf("%s: %s: %s", f.Place(), what, f.Rule)
	if f.Packet != "" {
		s += " (" + f.Packet + ")"
	}
	return s
}

// Foreign reads the tables of others in the network namespace of the calling
// thread, follows in them the packets that Weir makes of requests, responses
// and its own handshakes, and the SYNs of clients, and reports what would end
// them. It changes nothing, sends no packet and needs CAP_NET_ADMIN. Our own
// table is skipped. Findings come in the order in which packets meet them, one
// for each chain and trouble.
//
// Clients may be anywhere; those followed are one in each network that the
// router has an interface in, and one behind its default route.
func Foreign(p Params) ([]Finding, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	p = p.clone()
	tables, err := readTables(p.Table)
	if err != nil {
		return nil, err
	}
	if err := tables.addLegacy(); err != nil {
		return nil, err
	}
	if len(tables.base) == 0 {
		return nil, nil
	}
	routes, err := readRoutes(&p)
	if err != nil {
		return nil, err
	}
	f := finder{p: &p, walker: walker{tables: tables, routes: routes}, seen: map[findingKey]int{}}
	f.marked()
	f.clients(flagSYN, ctNew, DropsSYN)
	if p.InspectAll {
		f.clients(flagACK, ctUntrackedBit, DropsClient)
	}
	f.late()
	return f.sorted(), nil
}

type findingKey struct {
	trouble Trouble
	chain   objectKey
}

// A finder collects findings.
type finder struct {
	walker
	p    *Params
	out  []Finding
	seen map[findingKey]int // index in out
}

// stage is one hook on a packet's way.
type stage struct {
	hook    string
	in, out string
}

// marked follows everything that the engine translates or emits.
func (f *finder) marked() {
	for _, fam := range families {
		clients, servers := f.routes.clients[fam], f.routes.servers[fam]
		vips := slices.DeleteFunc(slices.Clone(f.p.VIPs), func(v netip.AddrPort) bool { return v.Addr().Is4() != (fam == &family4) })
		snips := slices.DeleteFunc(slices.Clone(f.p.SNIPs), func(a netip.Addr) bool { return a.Is4() != (fam == &family4) })
		for _, c := range clients {
			for _, v := range vips {
				if kind, ok := f.routes.kind(v.Addr(), "", false); f.p.SYNToLo && ok && kind == unix.RTN_LOCAL {
					// A SYN's copy.
					f.follow(fam, c.addr, v, flagSYN, true,
						stage{"output", "", "lo"}, stage{"postrouting", "", "lo"}, stage{"prerouting", "lo", ""}, stage{"input", "lo", ""})
				}
				for _, dev := range serverDevices(servers) {
					// A response, rewritten where it came in.
					if dev != "lo" {
						f.follow(fam, v, c.addr, flagACK, true, stage{"prerouting", dev, ""}, stage{"forward", dev, c.dev}, stage{"postrouting", "", c.dev})
					}
				}
				// A SYN-ACK and all else that the engine sends by itself.
				f.follow(fam, v, c.addr, flagSYN|flagACK, true, stage{"output", "", c.dev}, stage{"postrouting", "", c.dev})
			}
			for _, s := range servers {
				for _, a := range snips {
					snip := netip.AddrPortFrom(a, f.p.PortFirst)
					if s.dev == "lo" {
						f.follow(fam, snip, s.addr, flagACK, true, stage{"prerouting", c.dev, ""}, stage{"input", c.dev, ""})
						continue
					}
					f.follow(fam, snip, s.addr, flagACK, true, stage{"prerouting", c.dev, ""}, stage{"forward", c.dev, s.dev}, stage{"postrouting", "", s.dev})
				}
			}
		}
		for _, s := range servers {
			for _, a := range snips {
				snip := netip.AddrPortFrom(a, f.p.PortFirst)
				f.follow(fam, snip, s.addr, flagSYN, true, stage{"output", "", s.dev}, stage{"postrouting", "", s.dev})
				if s.dev == "lo" {
					f.follow(fam, snip, s.addr, flagSYN, true, stage{"prerouting", "lo", ""}, stage{"input", "lo", ""})
					// The server's own answer is not marked yet, and conntrack
					// has never seen what it answers.
					t := f.trial(fam, s.addr, snip, flagSYN|flagACK)
					t.ct = ctInvalidBit
					f.walk(t, stage{"output", "", "lo"}, stage{"postrouting", "", "lo"})
				}
			}
		}
	}
}

// serverDevices lists the interfaces toward the servers, each once.
func serverDevices(servers []endpoint) []string {
	var out []string
	for _, s := range servers {
		if !slices.Contains(out, s.dev) {
			out = append(out, s.dev)
		}
	}
	return out
}

func (f *finder) trial(fam *ipFamily, src, dst netip.AddrPort, flags byte) *trial {
	t := &trial{family: fam.nf, src: src, dst: dst, flags: flags}
	t.assemble()
	return t
}

// follow makes a packet and reports where it ends, if it does.
func (f *finder) follow(fam *ipFamily, src, dst netip.AddrPort, flags byte, marked bool, stages ...stage) {
	t := f.trial(fam, src, dst, flags)
	if marked {
		t.marked, t.mark = true, f.p.Mark
	}
	f.walk(t, stages...)
}

// walk reports every chain on the way that ends the packet: one is not told
// chain by chain, with a change between.
func (f *finder) walk(t *trial, stages ...stage) {
	f.each(t, stages, func(c *theirChain, o outcome) bool {
		f.report(DropsMarked, c, o, t)
		return true
	})
}

// each follows a packet through the chains of these hooks and calls end for
// those that end it, until that returns false.
func (f *finder) each(t *trial, stages []stage, end func(*theirChain, outcome) bool) {
	for _, s := range stages {
		t.in, t.out = s.in, s.out
		t.inIndex, t.outIndex = f.routes.index[s.in], f.routes.index[s.out]
		for _, c := range f.tables.base {
			if !f.meets(c, t, s.hook) {
				continue
			}
			if o := f.base(c, t); (o.fate == drops || o.fate == taken) && !end(c, o) {
				return
			}
		}
	}
}

// meets says whether a packet passes through a base chain at that hook.
func (f *finder) meets(c *theirChain, t *trial, hook string) bool {
	if c.hook != hook || c.family != unix.NFPROTO_INET && c.family != t.family {
		return false
	}
	if t.marked {
		// Before our own chains the packet was another one.
		return c.kind != "nat" && (hook != "prerouting" || t.in == "lo" || c.priority >= priorityDivert)
	}
	// Chains of address translation are for tracked packets.
	return c.kind != "nat" || t.ct != ctUntrackedBit
}

func (f *finder) report(trouble Trouble, c *theirChain, o outcome, t *trial) {
	k := findingKey{trouble, c.objectKey}
	if at, ok := f.seen[k]; ok && (f.out[at].Certain || !o.sure) {
		return
	}
	n := Finding{
		Trouble: trouble, Family: familyWords[c.family], Table: c.table, Chain: c.name, Hook: c.hook, Priority: c.priority,
		Path: c.hook, Certain: o.sure, Rule: "policy drop",
	}
	if c.legacy != "" {
		n.Family, n.Table = c.legacy, strings.TrimPrefix(c.table, "legacy ")
	}
	if c.hook == "prerouting" {
		n.Path = "reverse path"
	}
	if o.rule != nil {
		n.Rule, n.Handle = f.tables.ruleText(o.chain, o.rule), o.rule.handle
		if o.chain != c {
			n.Jumped = o.chain.name
		}
		if c.hook == "prerouting" && !strings.Contains(n.Rule, "fib ") && !strings.Contains(n.Rule, "rpfilter") {
			n.Path = "prerouting"
		}
	} else if c.hook == "prerouting" {
		n.Path = "prerouting"
	}
	if t != nil {
		n.Packet = t.String()
	}
	n.Fix = f.fix(trouble, c, t)
	if at, ok := f.seen[k]; ok {
		f.out[at] = n
		return
	}
	f.seen[k] = len(f.out)
	f.out = append(f.out, n)
}

// String describes the packet.
func (t *trial) String() string {
	s := fmt.Sprintf("%v -> %v", t.src, t.dst)
	if t.in != "" {
		s += ", in " + t.in
	}
	if t.out != "" {
		s += ", out " + t.out
	}
	return s
}

// clients follows a client's packets to where our chains take them.
func (f *finder) clients(flags byte, ct uint32, trouble Trouble) {
	for _, v := range f.p.VIPs {
		fam := &family4
		if !v.Addr().Is4() {
			fam = &family6
		}
		clients := f.routes.clients[fam]
		var refused []func()
		through := false
		for _, c := range clients {
			t := f.trial(fam, c.addr, v, flags)
			t.ct = ct
			stages := []stage{{"prerouting", c.dev, ""}}
			if kind, ok := f.routes.kind(v.Addr(), "", false); !ok {
				continue
			} else if kind == unix.RTN_LOCAL {
				stages = append(stages, stage{"input", c.dev, ""})
			} else if via := f.routes.via(v.Addr()); len(via) > 0 {
				stages = append(stages, stage{"forward", c.dev, via[0]})
			}
			var chain *theirChain
			var o outcome
			f.each(t, stages, func(c *theirChain, why outcome) bool {
				if why.sure {
					chain, o = c, why
				}
				return chain == nil
			})
			switch {
			case chain == nil:
				through = true
			case chain.hook != "prerouting" && chain.priority >= prioritySYN:
				through = true // too late, which late reports
			case o.fate == taken && trouble == DropsSYN:
				f.report(TakesSYN, chain, o, t)
				through = true
			default:
				refused = append(refused, func() { f.report(trouble, chain, o, t) })
			}
		}
		if !through {
			for _, r := range refused {
				r()
			}
		}
	}
}

// late reports chains that may refuse a SYN that we have answered.
func (f *finder) late() {
	hooks := map[string]bool{}
	for _, v := range f.p.VIPs {
		if kind, ok := f.routes.kind(v.Addr(), "", false); ok && kind == unix.RTN_LOCAL {
			hooks["input"] = true
		} else {
			hooks["forward"] = true
		}
	}
	for _, c := range f.tables.base {
		if !hooks[c.hook] || c.priority < prioritySYN || c.kind == "nat" || c.family != unix.NFPROTO_INET && c.family != unix.NFPROTO_IPV4 && c.family != unix.NFPROTO_IPV6 {
			continue
		}
		if f.sibling(c) {
			continue
		}
		if o, ok := f.anyDrop(c, map[*theirChain]bool{}); ok {
			f.report(TooLate, c, o, nil)
		}
	}
}

// sibling says whether a chain is the local_guard of another instance on this
// host, or one of its companions. It stands behind our SYN chains by right: it
// drops what goes to that instance's own ports, or has gone to lo.
func (f *finder) sibling(c *theirChain) bool {
	family := c.family
	switch {
	case c.name == "local_guard":
	case f.tables.companion(c.family, c.table):
		family = unix.NFPROTO_INET
	default:
		return false
	}
	for _, name := range []string{"antispoof", "divert", "untrack", "syn_local", "syn_routed"} {
		if f.tables.chains[objectKey{family, c.table, name}] == nil {
			return false
		}
	}
	return true
}

// anyDrop finds a verdict that refuses, wherever it stands.
func (f *finder) anyDrop(c *theirChain, been map[*theirChain]bool) (outcome, bool) {
	been[c] = true
	for i := range c.rules {
		r := &c.rules[i]
		var targets []string
		found := false
		note := func(v *theirVerdict) {
			if v == nil {
				return
			}
			found = found || v.code == verdictDrop
			if v.chain != "" {
				targets = append(targets, v.chain)
			}
		}
		if r.legacy != nil {
			note(r.legacy.verdict)
			found = found || r.legacy.target.name == "REJECT"
		}
		for j := range r.exprs {
			switch e := &r.exprs[j]; e.name {
			case "reject":
				found = true
			case "target":
				found = found || e.text(unix.NFTA_TARGET_NAME) == "REJECT"
			case "immediate":
				note(parseVerdict(e.nest(unix.NFTA_IMMEDIATE_DATA).nest(unix.NFTA_DATA_VERDICT)))
			case "lookup":
				if s := f.tables.sets[objectKey{c.family, c.table, e.text(unix.NFTA_LOOKUP_SET)}]; s != nil {
					for k := range s.elements {
						note(s.elements[k].verdict)
					}
				}
			}
		}
		if found {
			return outcome{fate: drops, sure: true, chain: c, rule: r}, true
		}
		for _, name := range targets {
			if sub := f.tables.chains[objectKey{c.family, c.table, name}]; sub != nil && !been[sub] {
				if o, ok := f.anyDrop(sub, been); ok {
					return o, true
				}
			}
		}
	}
	if c.drops {
		return outcome{fate: drops, sure: true, chain: c}, true
	}
	return outcome{}, false
}

// sorted puts the findings into the order of the hooks and their chains.
func (f *finder) sorted() []Finding {
	order := []string{"prerouting", "input", "forward", "output", "postrouting"}
	slices.SortStableFunc(f.out, func(a, b Finding) int {
		return cmp.Or(
			cmp.Compare(a.Trouble, b.Trouble),
			cmp.Compare(slices.Index(order, a.Hook), slices.Index(order, b.Hook)),
			cmp.Compare(a.Priority, b.Priority),
			strings.Compare(a.Place(), b.Place()),
		)
	})
	return f.out
}
