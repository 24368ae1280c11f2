// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The standard priorities of address translation.
const (
	priorityDNAT       = -100
	prioritySNAT       = 100
	priorityDNATOutput = -100
)

// Direct is a VIP whose new connections go to one server by plain address
// translation while no instance runs (firewall.on_stop: direct).
type Direct struct {
	VIP    netip.AddrPort
	Server netip.AddrPort

	// SNIP is the source that the server sees; it answers to where it has
	// always answered, whatever its routes say about clients. Zero for a
	// server on the router itself.
	SNIP netip.Addr
}

// ErrNoNAT: the kernel has no address translation for nftables.
var ErrNoNAT = errors.New("the kernel has no address translation for nftables: load the modules nft_chain_nat and nft_nat")

// BuildDirect makes the table that stands in for an instance. It bears the
// instance's name, so that a later start replaces it in the transaction that
// installs its own rules, and weir cleanup removes it.
func BuildDirect(table string, list []Direct) (*Ruleset, error) {
	if !validName(table) {
		return nil, fmt.Errorf("nft: %q is not a table name", table)
	}
	r := &Ruleset{Table: table}
	in := Chain{
		Name: "direct", NAT: true, Hook: "prerouting", Priority: priorityDNAT,
		Comment: "No instance runs: new connections go to one server.",
	}
	local := Chain{Name: "direct_local", NAT: true, Hook: "output", Priority: priorityDNATOutput}
	out := Chain{Name: "direct_source", NAT: true, Hook: "postrouting", Priority: prioritySNAT, Comment: "It answers to the address that it knows."}
	for _, d := range list {
		d.VIP, d.Server, d.SNIP = unmap(d.VIP), unmap(d.Server), d.SNIP.Unmap()
		f := &family4
		if !d.VIP.Addr().Is4() {
			f = &family6
		}
		switch {
		case badAddrPort(d.VIP) != "" || badAddrPort(d.Server) != "":
			return nil, fmt.Errorf("nft: direct from %v to %v: not addresses with ports", d.VIP, d.Server)
		case d.VIP.Addr().Is4() != d.Server.Addr().Is4():
			return nil, fmt.Errorf("nft: direct from %v to %v: the families differ", d.VIP, d.Server)
		}
		to := Rule{terms: []term{f.destinationIs(d.VIP.Addr()), dportIs(d.VIP.Port()), f.dnat(d.Server)}}
		in.Rules = append(in.Rules, to)
		local.Rules = append(local.Rules, to)
		if d.SNIP.IsValid() {
			if d.SNIP.Is4() != d.Server.Addr().Is4() {
				return nil, fmt.Errorf("nft: direct from %v as %v to %v: the families differ", d.VIP, d.SNIP, d.Server)
			}
			out.Rules = append(out.Rules, Rule{terms: []term{
				ctDNAT(), f.destinationIs(d.Server.Addr()), dportIs(d.Server.Port()), f.snat(d.SNIP),
			}})
		}
	}
	r.Chains = []Chain{in, local, out}
	return r, nil
}

// RemoveTo deletes our table and its companions, as Remove does, and leaves one that sends new
// connections to these servers directly, in the same transaction. It belongs
// to nobody.
func (f *Firewall) RemoveTo(list []Direct) error {
	if len(list) == 0 {
		return f.Remove()
	}
	r, err := BuildDirect(f.tableName(), list)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gone {
		return nil
	}
	if !f.k.NAT {
		return fmt.Errorf("nft: %w", ErrNoNAT)
	}
	k := f.k
	k.Owner = false
	b, err := rulesetBatch(r, k, f.r.companions()...)
	if err != nil {
		return err
	}
	c, err := f.send(b, r.Table)
	if err != nil {
		return err
	}
	f.gone, f.owner = true, nil
	return c.close()
}

func (f *ipFamily) destinationIs(a netip.Addr) term {
	return term{
		text: fmt.Sprintf("%s daddr %v", f.word, a), nf: f.nf,
		exprs: []expr.Any{network(reg1, f.dst, f.addrLen), compare(expr.CmpOpEq, a.AsSlice())},
	}
}

func dportIs(port uint16) term {
	return term{
		text: fmt.Sprintf("tcp dport %d", port), l4: unix.IPPROTO_TCP,
		exprs: []expr.Any{transport(reg1, 2, 2), compare(expr.CmpOpEq, big16(port))},
	}
}

// ctDNAT: the connection's destination was translated.
func ctDNAT() term {
	return term{
		text: "ct status dnat",
		exprs: []expr.Any{
			&expr.Ct{Key: expr.CtKeySTATUS, Register: reg1},
			mask(native32(ctStatusDNAT)),
			compare(expr.CmpOpNeq, native32(0)),
		},
	}
}

const ctStatusDNAT = 1 << 5 // IPS_DST_NAT

func (f *ipFamily) dnat(to netip.AddrPort) term {
	return term{
		text: fmt.Sprintf("dnat %s to %v", f.word, to),
		exprs: []expr.Any{
			&expr.Immediate{Register: reg1, Data: to.Addr().AsSlice()},
			&expr.Immediate{Register: reg2, Data: big16(to.Port())},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.nf), RegAddrMin: reg1, RegProtoMin: reg2, Specified: true},
		},
	}
}

func (f *ipFamily) snat(to netip.Addr) term {
	return term{
		text: fmt.Sprintf("snat %s to %v", f.word, to),
		exprs: []expr.Any{
			&expr.Immediate{Register: reg1, Data: to.AsSlice()},
			&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.nf), RegAddrMin: reg1},
		},
	}
}
