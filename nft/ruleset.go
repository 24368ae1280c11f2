// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/google/nftables/expr"
)

// Ruleset is our table as data: what Build decides, Text prints and Install
// sends. It is read-only after Build and safe for concurrent reading.
type Ruleset struct {
	Table    string
	Counters []string // named counters, in order of first use
	Sets     []Set
	Chains   []Chain // in order of creation: a chain stands after those that it goes to

	// Companions are tables of the same name in the families ip and ip6, for
	// the statements that family inet does not have.
	Companions []Companion

	compat bool // queue statements are xt targets
}

// Companion is a table beside ours; Family is ip or ip6.
type Companion struct {
	Family string
	Chains []Chain
}

func (c *Companion) family() *ipFamily {
	if c.Family == family6.word {
		return &family6
	}
	return &family4
}

// SetType is the key type of a named set, in nft's words.
type SetType string

// The key types that our sets have.
const (
	SetAddrPort4 SetType = "ipv4_addr . inet_service"
	SetAddrPort6 SetType = "ipv6_addr . inet_service"
	SetAddr4     SetType = "ipv4_addr"
	SetAddr6     SetType = "ipv6_addr"
	SetPort      SetType = "inet_service"
	SetIfname    SetType = "ifname"
)

// Set is one named set with its elements, sorted.
type Set struct {
	Name     string
	Type     SetType
	Timeout  bool // elements go by themselves, and are not the configuration's
	Elements []Element
}

// Element is one set element: as nft prints it, and the key's bytes.
type Element struct {
	Text    string
	key     []byte
	timeout time.Duration // 0: it stays
}

// Chain is one chain. Hook is empty for a chain that is only gone to, or, in
// the case of defrag, never entered at all.
type Chain struct {
	Name     string
	NAT      bool   // of type nat instead of filter
	Hook     string // prerouting, input, forward, output, postrouting or empty
	Priority int32  // meaningful with a hook only
	Rules    []Rule
	Comment  string // printed above the chain
}

// Rule is one rule: its terms from left to right.
type Rule struct {
	terms []term
}

// Text is the rule in nft syntax.
func (r Rule) Text() string {
	s := make([]string, len(r.terms))
	for i, t := range r.terms {
		s[i] = t.text
	}
	return strings.Join(s, " ")
}

// A term is one match or statement, in both languages. nf and l4 are the
// dependencies that nft adds silently before the term: the network family and
// the transport protocol, each once per rule; zero for none.
type term struct {
	text  string
	nf    byte // unix.NFPROTO_IPV4, unix.NFPROTO_IPV6 or 0
	l4    byte // unix.IPPROTO_* or 0
	isNF  bool // the term is the explicit form of its dependency
	isL4  bool
	exprs []expr.Any
	vmap  *verdictMap // looked up in register 1 after exprs
	set   *anonSet    // looked up in register 1 after exprs
}

// verdictMap is an anonymous map from a key to a chain.
type verdictMap struct {
	interval bool
	goTo     []mapEntry
}

type mapEntry struct {
	lo, hi uint32 // equal unless the map is an interval map
	chain  string
}

// anonSet is an anonymous constant set of one-byte keys.
type anonSet struct {
	icmp6 bool
	keys  []byte
}

// companions are the families that have one.
func (r *Ruleset) companions() []*ipFamily {
	var out []*ipFamily
	for i := range r.Companions {
		out = append(out, r.Companions[i].family())
	}
	return out
}

// Set gives the named set, or nil.
func (r *Ruleset) Set(name string) *Set {
	for i := range r.Sets {
		if r.Sets[i].Name == name {
			return &r.Sets[i]
		}
	}
	return nil
}

// Chain gives the named chain, or nil.
func (r *Ruleset) Chain(name string) *Chain {
	for i := range r.Chains {
		if r.Chains[i].Name == name {
			return &r.Chains[i]
		}
	}
	return nil
}

// Text is the whole table, with its companions, in the syntax of nft(8). `nft -f` accepts it on a
// kernel that has the native queue expression; where the ruleset uses the
// NFQUEUE target instead, which that syntax cannot say, a comment says so.
func (r *Ruleset) Text() string {
	var b strings.Builder
	if r.compat {
		b.WriteString("# Each \"queue num N\" is the xt target NFQUEUE with that number on this kernel.\n")
	}
	fmt.Fprintf(&b, "table inet %s {\n", r.Table)
	for _, c := range r.Counters {
		fmt.Fprintf(&b, "\tcounter %s { }\n", c)
	}
	for i := range r.Sets {
		s := &r.Sets[i]
		fmt.Fprintf(&b, "\n\tset %s {\n\t\ttype %s\n", s.Name, s.Type)
		if s.Timeout {
			b.WriteString("\t\tflags timeout\n")
		}
		if len(s.Elements) > 0 {
			text := make([]string, len(s.Elements))
			for j, e := range s.Elements {
				text[j] = e.Text
			}
			fmt.Fprintf(&b, "\t\telements = { %s }\n", strings.Join(text, ",\n\t\t\t     "))
		}
		b.WriteString("\t}\n")
	}
	for i := range r.Chains {
		b.WriteString("\n")
		r.Chains[i].write(&b)
	}
	b.WriteString("}\n")
	for i := range r.Companions {
		c := &r.Companions[i]
		fmt.Fprintf(&b, "\ntable %s %s {\n", c.Family, r.Table)
		for j := range c.Chains {
			if j > 0 {
				b.WriteString("\n")
			}
			c.Chains[j].write(&b)
		}
		b.WriteString("}\n")
	}
	return b.String()
}

func (c *Chain) write(b *strings.Builder) {
	for line := range strings.SplitSeq(c.Comment, "\n") {
		if line != "" {
			fmt.Fprintf(b, "\t# %s\n", line)
		}
	}
	fmt.Fprintf(b, "\tchain %s {\n", c.Name)
	if c.Hook != "" {
		kind, priority := "filter", priorityText(c.Priority)
		if c.NAT {
			kind, priority = "nat", fmt.Sprint(c.Priority)
		}
		fmt.Fprintf(b, "\t\ttype %s hook %s priority %s; policy accept;\n", kind, c.Hook, priority)
	}
	for _, rule := range c.Rules {
		fmt.Fprintf(b, "\t\t%s\n", rule.Text())
	}
	b.WriteString("\t}\n")
}

// priorityText writes a priority relative to the standard one that it is
// thought of.
func priorityText(p int32) string {
	base, name := int32(priorityFilter), "filter"
	if p < priorityRaw+100 {
		base, name = priorityRaw, "raw"
	}
	switch d := p - base; {
	case d < 0:
		return fmt.Sprintf("%s - %d", name, -d)
	case d > 0:
		return fmt.Sprintf("%s + %d", name, d)
	}
	return name
}

func addrPortElement(a netip.AddrPort) Element {
	// Each part of a concatenation fills whole 32-bit registers.
	key := a.Addr().AsSlice()
	key = append(key, byte(a.Port()>>8), byte(a.Port()), 0, 0)
	return Element{Text: fmt.Sprintf("%v . %d", a.Addr(), a.Port()), key: key}
}

func addrElement(a netip.Addr) Element {
	return Element{Text: a.String(), key: a.AsSlice()}
}

func portElement(p uint16) Element {
	return Element{Text: fmt.Sprint(p), key: []byte{byte(p >> 8), byte(p)}}
}

func ifnameElement(name string) Element {
	return Element{Text: `"` + name + `"`, key: append([]byte(name), make([]byte, 16-len(name))...)}
}
