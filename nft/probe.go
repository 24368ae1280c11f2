// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Kernel is what the running kernel can do for us. The zero value can do
// nothing; Probe fills one in.
type Kernel struct {
	NativeQueue bool // the queue expression (nft_queue); preferred
	CompatQueue bool // the NFQUEUE target through nft_compat
	Owner       bool // tables with the flags owner|persist, from 6.9
	Destroy     bool // "destroy table", from 6.3
	TProxy4     bool // tproxy per family, to switch defragmentation on
	TProxy6     bool
	Ct          bool // conntrack expressions, the fallback for that
	IPv6        bool // the kernel has IPv6
	Dup4        bool // the dup statement per family, for Params.SYNToLo
	Dup6        bool
	NAT         bool // address translation, for firewall.on_stop: direct
}

// Defragments reports whether the ruleset can switch on the kernel's
// reassembly of the families that it has. Where it cannot, fragments to VIPs
// and SNIPs are dropped and counted.
func (k Kernel) Defragments() bool {
	return k.Ct || k.TProxy4 && (k.TProxy6 || !k.IPv6)
}

// SYNToLo reports whether a ruleset with Params.SYNToLo can be built: SYNs can
// be duplicated to lo in every family that the kernel has, by tables that
// nobody else can remove. Without a companion, a marked SYN would come to the
// router's own TCP.
func (k Kernel) SYNToLo() bool {
	return k.Owner && k.Destroy && k.Dup4 && (k.Dup6 || !k.IPv6)
}

// ErrMissingFeature: the kernel lacks an nftables expression that the rules
// cannot do without. errors.As to *MissingError tells which.
var ErrMissingFeature = errors.New("the kernel lacks a feature of nftables")

// MissingError lists the missing features, with the kernel options that make
// them.
type MissingError struct{ Features []string }

func (e *MissingError) Error() string {
	return fmt.Sprintf("nft: %v: %s: load the module or use a kernel with the option", ErrMissingFeature, strings.Join(e.Features, ", "))
}

// Is makes errors.Is(err, ErrMissingFeature) true.
func (e *MissingError) Is(target error) bool { return target == ErrMissingFeature }

// Probe asks the kernel of the calling thread's network namespace what it can
// do, in one transaction that the kernel checks and then gives up: nothing is
// ever installed, no event is seen by anybody, and where our rules stand nothing
// that waits in a queue is dropped. The kernel may load modules for
// it. The error tells missing privileges (ErrPermission), a kernel without
// nftables (ErrNoNftables), without a queue (ErrNoQueue) or without another
// necessary feature (ErrMissingFeature) apart; the Kernel is valid with the
// last two, for a report.
func Probe() (Kernel, error) {
	c, err := dial()
	if err != nil {
		return Kernel{}, err
	}
	defer c.close()
	b, ask, err := probeBatch()
	if err != nil {
		return Kernel{}, err
	}
	res, err := c.try(b)
	if err != nil {
		return Kernel{}, err
	}
	can := func(name string) bool {
		for _, i := range ask[name] {
			if res[i] != nil {
				return false
			}
		}
		return len(ask[name]) > 0
	}
	// The kernel knows the expression if all it minds is what it says.
	knows := func(name string) bool {
		for _, i := range ask[name] {
			if res[i] == nil || res[i].Err != unix.EINVAL {
				return false
			}
		}
		return len(ask[name]) > 0
	}
	_, ip6err := os.Stat("/proc/sys/net/ipv6")
	k := Kernel{
		NativeQueue: can("queue"), CompatQueue: can("NFQUEUE"),
		Owner: can("owner"), Destroy: can("destroy"),
		TProxy4: can("tproxy ip"), TProxy6: can("tproxy ip6"), Ct: knows("ct"),
		Dup4: can("dup ip"), Dup6: can("dup ip6"),
		IPv6: ip6err == nil, NAT: can("nat chain") && knows("nat"),
	}
	if !can("table") {
		return k, fmt.Errorf("nft: %w: tables of family inet: load the module nf_tables_inet", ErrNoNftables)
	}
	if !k.NativeQueue && !k.CompatQueue {
		return k, fmt.Errorf("nft: %w: load the module nft_queue, or nft_compat and xt_NFQUEUE", ErrNoQueue)
	}
	var missing []string
	for _, f := range necessary {
		if !can(f.name) {
			missing = append(missing, fmt.Sprintf("%s (%s)", f.name, f.option))
		}
	}
	if len(missing) > 0 {
		return k, &MissingError{Features: missing}
	}
	return k, nil
}

// necessary are the features without which the rules cannot be installed.
var necessary = []struct{ name, option string }{
	{"fib", "CONFIG_NFT_FIB_INET"},
	{"jhash", "CONFIG_NFT_HASH"},
	{"notrack", "CONFIG_NFT_CT"},
	{"exthdr", "CONFIG_NF_TABLES"},
	{"counter", "CONFIG_NF_TABLES"},
	{"set", "CONFIG_NF_TABLES"},
}

// probeBatch makes a table that will never be, with one object or rule per
// question. ask gives the messages that must succeed for a yes.
func probeBatch() (*batch, map[string][]int, error) {
	const table = "weir_probe"
	e, err := newEncoder(table)
	if err != nil {
		return nil, nil, err
	}
	ask := make(map[string][]int)
	step := func(name string, n int) {
		for range n {
			ask[name] = append(ask[name], len(e.what))
			e.did(1, "probe %s", name)
		}
	}
	// The first two stand in for what the library cannot say.
	e.conn.DelTable(&nftables.Table{Name: table + "_absent", Family: nftables.TableFamilyINet})
	step("destroy", 1)
	e.conn.AddTable(&nftables.Table{Name: table + "_owned", Family: nftables.TableFamilyINet})
	step("owner", 1)

	e.conn.AddTable(e.table)
	step("table", 1)
	pre := e.conn.AddChain(e.chain(&Chain{Name: "pre", Hook: "prerouting", Priority: priorityDivert}))
	step("table", 1)
	out := e.conn.AddChain(e.chain(&Chain{Name: "out", Hook: "output", Priority: priorityUntrack}))
	step("table", 1)
	never := e.conn.AddChain(e.chain(&Chain{Name: "never"}))
	step("table", 1)

	e.conn.AddObj(&nftables.NamedObj{Table: e.table, Name: "c", Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}})
	step("counter", 1)
	set := &Set{Name: "s", Type: SetAddrPort6}
	e.fail(e.conn.AddSet(e.namedSet(set), nil))
	step("set", 1)

	rule := func(name string, c *nftables.Chain, x ...expr.Any) {
		e.conn.AddRule(&nftables.Rule{Table: e.table, Chain: c, Exprs: x})
		step(name, 1)
	}
	rule("queue", pre, queue(0, false).exprs...)
	rule("NFQUEUE", pre, queue(0, true).exprs...)
	rule("fib", pre, sourceIsLocal().exprs...)
	rule("fib", pre, noReversePath().exprs...)
	rule("jhash", pre, family6.clientShard(2).exprs...)
	rule("notrack", pre, notrack().exprs...)
	rule("notrack", out, notrack().exprs...)
	rule("exthdr", pre, family6.fragmented().exprs...)
	rule("counter", pre, counted("c").exprs...)
	rule("set", pre, family6.concatIn(true, "s").exprs...)
	rule("tproxy ip", never, family4.tproxyTo(1).exprs...)
	rule("tproxy ip6", never, family6.tproxyTo(1).exprs...)
	// An expression of these that were made would start connection tracking,
	// and end it, with hooks that go. So they are made wrongly: a kernel without
	// them says ENOENT before it sees what is wrong.
	rule("ct", never, &expr.Ct{Key: expr.CtKeySTATE, Register: unix.NFT_REG_VERDICT}) // a value into the verdict
	nat := e.conn.AddChain(e.chain(&Chain{Name: "nat", NAT: true, Hook: "prerouting", Priority: priorityDNAT}))
	step("nat chain", 1)
	rule("nat", nat, &expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4}) // to nowhere

	// dup is not to be had in family inet.
	dormant := []int{ask["table"][0]}
	for _, f := range families {
		name := "dup " + f.word
		e.in(f.nf)
		dormant = append(dormant, len(e.what))
		e.conn.AddTable(e.table)
		step(name, 1)
		in := e.conn.AddChain(e.chain(&companionChains()[0]))
		step(name, 1)
		rule(name, in, f.dupToLoopback().exprs...)
	}

	b, err := e.batch()
	if err != nil {
		return nil, nil, err
	}
	b.messages[0].Header.Type = nftType(msgDestroyTable)
	b.messages[1].Header.Flags |= netlink.Create
	if err := setTableFlags(&b.messages[1], table+"_owned", tableOwner|tablePersist); err != nil {
		return nil, nil, err
	}
	// A hook that goes, even with a transaction that is given up, drops all that
	// waits in the queues of this network namespace, such as what a dead engine
	// has left (nf_unregister_net_hook). A dormant table has no hooks; its chains
	// and rules are checked all the same.
	for _, i := range dormant {
		if err := setTableFlags(&b.messages[i], table, tableDormant); err != nil {
			return nil, nil, err
		}
	}
	return b, ask, nil
}
