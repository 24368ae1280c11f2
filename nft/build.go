// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// The standard priorities of netfilter that ours are measured from.
const (
	priorityRaw    = -300
	priorityFilter = 0

	// Before any instance translates: what another one has translated has a
	// VIP as its source, which is local.
	prioritySpoof   = priorityRaw - 2
	priorityDivert  = priorityRaw - 1
	priorityUntrack = priorityRaw + 1

	// The SYN chains stand behind every rule that may refuse a new
	// connection: firewalld's chains are at +10, the iptables security table
	// at +50, and of two equal priorities the later one runs first.
	prioritySYN = priorityFilter + 200

	// The companions' chains take what the SYN chains have marked. Beside them
	// stands the guard: nothing is for both, because no VIP lies in the SNIP
	// port range.
	prioritySYNCopy = prioritySYN + 1

	// The guard is the last thing before the router's own sockets, behind
	// source NAT for input (+100), so that it sees what they would see.
	priorityGuard = priorityFilter + 201
)

// Names of the counters, as Counters gives them.
const (
	CounterClient      = "client"       // client packets to a shard queue
	CounterServer      = "server"       // server packets to a shard queue
	CounterSYN         = "syn"          // plain SYNs to the SYN queue
	CounterICMP        = "icmp_error"   // ICMP errors to the control queue ("icmp" is a word of nft's grammar)
	CounterFragment    = "fragment"     // fragments that nobody reassembled, dropped
	CounterSpoof       = "spoof"        // local source from outside, dropped
	CounterReversePath = "reverse_path" // dropped in place of a strict rp_filter
	CounterMisplaced   = "misplaced"    // a server's address on a wrong interface, dropped
	CounterGuard       = "guard"        // addressed to a SNIP port, dropped before the router's own TCP
	CounterUntracked   = "untracked"    // marked packets that conntrack was kept from
	CounterBanned      = "banned"       // from banned clients to a VIP, dropped
)

// Names of the sets that follow the configuration; each exists for family 4
// and 6 where the name ends in a digit.
const (
	setVIPs     = "vips"      // address . port
	setVIPAddrs = "vip_addrs" // their addresses alone, for ICMP and fragments
	setServers  = "servers"   // address . port
	setSNIPs    = "snips"     // addresses
	setBans     = "bans"      // clients that are kept away, each for its time
	setExcept   = "except_ports"
	setStrict   = "strict_rp"
)

// Errors of Build; match with errors.Is.
var (
	// ErrNoQueue: the kernel can neither queue natively nor through the
	// NFQUEUE target.
	ErrNoQueue = errors.New("the kernel has no way to queue packets to a program")

	// ErrNoDup: the kernel cannot hand SYNs to a program at lo's output.
	ErrNoDup = errors.New("the kernel cannot duplicate packets to lo in tables that are owned: it takes Linux 6.9 and the modules nft_dup_ipv4 and nft_dup_ipv6")
)

// Build makes the ruleset of these parameters for this kernel. It touches
// nothing. The result shares no memory with p.
func Build(p Params, k Kernel) (*Ruleset, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	if !k.NativeQueue && !k.CompatQueue {
		return nil, fmt.Errorf("nft: %w: load the module nft_queue, or nft_compat and xt_NFQUEUE", ErrNoQueue)
	}
	if p.SYNToLo && !k.SYNToLo() {
		return nil, fmt.Errorf("nft: %w", ErrNoDup)
	}
	p = p.clone()
	b := builder{p: &p, k: k, r: &Ruleset{Table: p.Table, compat: !k.NativeQueue}}
	b.sets()
	b.shards()
	b.antispoof()
	b.divert()
	b.untrack()
	b.syn()
	b.guard()
	b.defrag()
	b.companions()
	return b.r, nil
}

type builder struct {
	p *Params
	k Kernel
	r *Ruleset
}

// rule collects terms and notes the counter when it is used first.
func (b *builder) rule(terms ...term) Rule { return Rule{terms: terms} }

func (b *builder) count(name string) term {
	if !slices.Contains(b.r.Counters, name) {
		b.r.Counters = append(b.r.Counters, name)
	}
	return counted(name)
}

func (b *builder) queue(num uint16) term { return queue(num, b.r.compat) }

func (b *builder) chain(c Chain) { b.r.Chains = append(b.r.Chains, c) }

func (b *builder) ours() term { return markIsOurs(b.p.Mark, b.p.MarkMask) }

// sets makes all sets, of both families and also when empty, so that a reload
// changes elements only.
func (b *builder) sets() {
	add := func(name string, t SetType, e []Element) {
		b.r.Sets = append(b.r.Sets, Set{Name: name, Type: t, Elements: e})
	}
	for _, f := range families {
		is4 := f == &family4
		pairs, addr := SetAddrPort6, SetAddr6
		if is4 {
			pairs, addr = SetAddrPort4, SetAddr4
		}
		var vips, addrs, servers, snips []Element
		var last netip.Addr
		for _, v := range b.p.VIPs {
			if v.Addr().Is4() != is4 {
				continue
			}
			vips = append(vips, addrPortElement(v))
			if v.Addr() != last { // they are sorted
				addrs = append(addrs, addrElement(v.Addr()))
				last = v.Addr()
			}
		}
		for _, s := range b.p.Servers {
			if s.Addr().Is4() == is4 {
				servers = append(servers, addrPortElement(s))
			}
		}
		for _, a := range b.p.SNIPs {
			if a.Is4() == is4 {
				snips = append(snips, addrElement(a))
			}
		}
		add(setVIPs+f.suffix, pairs, vips)
		add(setVIPAddrs+f.suffix, addr, addrs)
		add(setServers+f.suffix, pairs, servers)
		add(setSNIPs+f.suffix, addr, snips)
		b.r.Sets = append(b.r.Sets, Set{Name: setBans + f.suffix, Type: addr, Timeout: true})
	}
	var except, strict []Element
	for _, port := range b.p.ExceptPorts {
		except = append(except, portElement(port))
	}
	for _, name := range b.p.StrictRPFilter {
		strict = append(strict, ifnameElement(name))
	}
	add(setExcept, SetPort, except)
	add(setStrict, SetIfname, strict)
}

// shards makes one chain per shard that holds its queue statement; verdict
// maps go there. With one shard the rules queue by themselves.
func (b *builder) shards() {
	if b.p.Shards == 1 {
		return
	}
	for i := range b.p.Shards {
		b.chain(Chain{Name: shardChain(i), Rules: []Rule{b.rule(b.queue(b.p.ShardQueue(i)))}})
	}
}

// antispoof takes over what accept_local=1 and a loosened rp_filter open up.
func (b *builder) antispoof() {
	b.chain(Chain{
		Name: "antispoof", Hook: "prerouting", Priority: prioritySpoof,
		Comment: "What accept_local and a loosened rp_filter let in is stopped here.\n" +
			"Looped-back multicast and broadcast have a local source by right.",
		Rules: []Rule{
			b.rule(b.ours(), returns()),
			b.rule(sourceIsLocal(), notLoopback(),
				destinationTypeNot("multicast", unix.RTN_MULTICAST), destinationTypeNot("broadcast", unix.RTN_BROADCAST),
				b.count(CounterSpoof), drop()),
			// rp_filter is a matter of IPv4 only.
			b.rule(nfproto(&family4), iifnameIn(setStrict), noReversePath(), b.count(CounterReversePath), drop()),
		},
	})
}

// fromServer matches a packet from a server to one of the engine's ports.
func (b *builder) fromServer(f *ipFamily) []term {
	return append([]term{f.concatIn(false, setServers+f.suffix)}, b.toSNIPPort(f)...)
}

func (b *builder) toSNIPPort(f *ipFamily) []term {
	return []term{
		f.destinationIn(setSNIPs + f.suffix),
		dportRange(b.p.PortFirst, b.p.PortLast), dportNotIn(setExcept),
	}
}

// divert sends the packets of diverted flows to the shards. What is ours is
// recognised first and then goes through the rules of its own kind only: each
// expression costs every packet some ten nanoseconds.
func (b *builder) divert() {
	for _, f := range families {
		b.clients(f)
		b.servers(f)
	}
	c := Chain{
		Name: "divert", Hook: "prerouting", Priority: priorityDivert,
		Comment: "Packets of diverted flows go to the engine; what it rewrote comes by with the\n" +
			"mark. A fragment that nobody reassembled cannot be told apart: never pass it.\n" +
			"ICMP errors about TCP of a VIP or SNIP address, lo included, are the engine's.",
		Rules: []Rule{b.rule(b.ours(), returns())},
	}
	for _, f := range families {
		c.Rules = append(c.Rules,
			b.rule(f.concatIn(true, setVIPs+f.suffix), goTo(clientChain(f))),
			b.rule(append(b.fromServer(f), goTo(serverChain(f)))...))
	}
	for _, f := range families {
		for _, set := range []string{setVIPAddrs, setSNIPs} {
			terms := []term{f.fragmented(), l4tcp(), f.destinationIn(set + f.suffix)}
			if f == &family6 {
				terms = []term{l4tcp(), f.destinationIn(set + f.suffix), f.fragmented()}
			}
			c.Rules = append(c.Rules, b.rule(append(terms, b.count(CounterFragment), drop())...))
		}
	}
	// On lo too: the router's own "fragmentation needed" about a rewritten
	// packet is addressed to its own VIP.
	for _, f := range families {
		for _, set := range []string{setVIPAddrs, setSNIPs} {
			c.Rules = append(c.Rules, b.rule(f.destinationIn(set+f.suffix), f.icmpError(), f.embedsTCP(),
				b.count(CounterICMP), b.queue(b.p.ControlQueue())))
		}
	}
	b.chain(c)
}

// clients is where packets to a VIP go. A plain SYN first has to pass the
// administrator's own rules, and comes to syn_local or syn_routed; with
// inspect: all so does the rest.
func (b *builder) clients(f *ipFamily) {
	c := Chain{Name: clientChain(f), Rules: []Rule{
		b.rule(f.sourceIn(setBans+f.suffix), b.count(CounterBanned), drop()),
		b.rule(f.fragmented(), b.count(CounterFragment), drop()),
	}}
	if f == &family4 {
		c.Comment = "From clients to a VIP, which a policy may ban."
	}
	if !b.p.InspectAll {
		c.Rules = append(c.Rules, b.rule(plainSYN(false), b.count(CounterClient), b.clientShard(f)))
	}
	b.chain(c)
}

// servers is where packets from a server to one of the engine's ports go.
func (b *builder) servers(f *ipFamily) {
	c := Chain{Name: serverChain(f), Rules: []Rule{
		b.rule(noReversePath(), b.count(CounterMisplaced), drop()),
		b.rule(f.fragmented(), b.count(CounterFragment), drop()),
		b.rule(b.count(CounterServer), b.serverShard()),
	}}
	if f == &family4 {
		c.Comment = "From servers to a SNIP port, by the interface that leads to them."
	}
	b.chain(c)
}

func clientChain(f *ipFamily) string { return "from_client" + f.suffix }
func serverChain(f *ipFamily) string { return "from_server" + f.suffix }

// clientShard queues a client's packet to its shard.
func (b *builder) clientShard(f *ipFamily) term {
	if b.p.Shards == 1 {
		return b.queue(b.p.ShardQueue(0))
	}
	return f.clientShard(b.p.Shards)
}

// serverShard queues a server's packet to the shard that has the SNIP port.
func (b *builder) serverShard() term {
	if b.p.Shards == 1 {
		return b.queue(b.p.ShardQueue(0))
	}
	return serverShard(b.p.PortFirst, b.p.PortLast, b.p.Shards)
}

// untrack keeps conntrack from half a translation: it would otherwise see a
// server's packets with no handshake, and call them invalid.
func (b *builder) untrack() {
	for _, c := range []Chain{
		{Name: "untrack", Hook: "prerouting", Comment: "Conntrack never sees what the engine translated or emitted."},
		{Name: "untrack_output", Hook: "output"},
	} {
		c.Priority = priorityUntrack
		c.Rules = []Rule{b.rule(b.ours(), b.count(CounterUntracked), notrack())}
		if b.p.InspectAll {
			// The existing rules see a running connection's packets, of which
			// conntrack knows one direction only: it would call them new, or
			// invalid. From the router itself they come by output.
			for _, f := range families {
				c.Rules = append(c.Rules, b.rule(f.concatIn(true, setVIPs+f.suffix), plainSYN(false), notrack()))
			}
		}
		b.chain(c)
	}
}

// syn queues the SYNs that the existing rules let through.
func (b *builder) syn() {
	for _, c := range []Chain{
		{Name: "syn_local", Hook: "input", Comment: "SYNs to a VIP that all other rules let through: to an address of the router,"},
		{Name: "syn_routed", Hook: "forward", Comment: "or routed through it."},
	} {
		c.Priority = prioritySYN
		// Where a server is its own VIP, what goes to it is the engine's.
		if b.p.SYNToLo && c.Hook == "input" {
			b.toLo(&c)
		} else {
			c.Rules = []Rule{b.rule(b.ours(), returns())}
		}
		for _, f := range families {
			c.Rules = append(c.Rules, b.rule(f.concatIn(true, setVIPs+f.suffix), plainSYN(true), b.count(CounterSYN), b.queue(b.p.SYNQueue())))
		}
		for _, f := range families {
			if b.p.InspectAll {
				c.Rules = append(c.Rules, b.rule(f.concatIn(true, setVIPs+f.suffix), plainSYN(false), b.count(CounterClient), b.clientShard(f)))
			}
		}
		b.chain(c)
	}
}

// toLo has the SYNs marked for the companions. The engine's own packets to a
// server are told by their source then: a copy that comes in by lo has the mark
// too. It was counted before it was marked.
func (b *builder) toLo(c *Chain) {
	// What was translated for a server on this router comes by here too.
	c.Rules = append(c.Rules, b.rule(b.ours(), plainSYN(false), returns()))
	for _, f := range families {
		c.Rules = append(c.Rules, b.rule(b.ours(), f.sourceIn(setSNIPs+f.suffix), returns()))
	}
	for _, f := range b.copied() {
		c.Rules = append(c.Rules, b.rule(f.concatIn(true, setVIPs+f.suffix), plainSYN(true), notLoopback(),
			b.count(CounterSYN), setOurs(b.p.Mark, b.p.MarkMask), passOn()))
	}
	for _, f := range b.copied() {
		c.Rules = append(c.Rules, b.rule(f.concatIn(true, setVIPs+f.suffix), plainSYN(true), b.ours(), b.queue(b.p.SYNQueue())))
	}
}

// copied are the families whose SYNs are duplicated to lo.
func (b *builder) copied() []*ipFamily {
	if !b.k.IPv6 {
		return families[:1]
	}
	return families[:]
}

// companions duplicate to lo what the SYN chains have marked.
func (b *builder) companions() {
	if !b.p.SYNToLo {
		return
	}
	for _, f := range b.copied() {
		c := Companion{Family: f.word, Chains: companionChains()}
		c.Chains[0].Comment = "SYNs that the SYN chains have marked go to a program at lo's output."
		// Where a server is its own VIP and on this router, the engine's SYN to it
		// comes by lo.
		c.Chains[0].Rules = []Rule{b.rule(plainSYN(true), b.ours(), notLoopback(), f.dupToLoopback(), drop())}
		b.r.Companions = append(b.r.Companions, c)
	}
}

// companionChains are the chains of a companion, without rules. Forward has none:
// every translated packet would come by, and pay for it. SYNs to a VIP that is
// routed through go to the SYN queue.
func companionChains() []Chain {
	return []Chain{
		{Name: "syn_local", Hook: "input", Priority: prioritySYNCopy},
	}
}

// guard: the router's own TCP would answer a packet to a SNIP port with a RST
// and so end the server connection behind the engine's back.
func (b *builder) guard() {
	c := Chain{
		Name: "local_guard", Hook: "input", Priority: priorityGuard,
		Comment: "Nothing addressed to a SNIP port reaches the router's own TCP.",
	}
	for _, f := range families {
		c.Rules = append(c.Rules, b.rule(append(b.toSNIPPort(f), b.count(CounterGuard), drop())...))
	}
	b.chain(c)
}

// defrag holds rules that no packet ever meets. Only the existence of a tproxy
// or ct expression switches the kernel's defragmentation on in a namespace;
// tproxy is preferred because ct would also start connection tracking.
func (b *builder) defrag() {
	c := Chain{
		Name:    "defrag",
		Comment: "Never entered: that these rules exist switches defragmentation on.",
	}
	for _, f := range families {
		if f == &family4 && b.k.TProxy4 || f == &family6 && b.k.TProxy6 {
			c.Rules = append(c.Rules, b.rule(nfproto(f), l4tcp(), f.tproxyTo(1)))
		}
	}
	if !b.k.TProxy4 || !b.k.TProxy6 && b.k.IPv6 {
		if !b.k.Ct {
			// Without either the fragment rules of divert drop what comes in
			// fragments. That is safe; Kernel.Defragments tells of it.
			return
		}
		c.Rules = []Rule{b.rule(ctInvalid())}
	}
	b.chain(c)
}
