// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/weirgate/weir/internal/require"
)

// citizenData are the rulesets of others that the end-to-end tests run beside.
const citizenData = "../integration/citizen/testdata/"

// newRouter moves the test into a namespace that has the addresses and names
// of the standard topology's router, without anybody around it.
func newRouter(t *testing.T) {
	t.Helper()
	newNetns(t)
	noDAD(t)
	for _, l := range [][]string{{"lan", "198.18.0.1/16", "2001:db8:18::1/64"}, {"dmz", "198.51.100.1/24", "2001:db8:51::1/64"}} {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: l[0]}, PeerName: l[0] + "-peer"}); err != nil {
			t.Fatal(err)
		}
		address(t, l[0], l[1:]...)
		up(t, l[0]+"-peer")
	}
	address(t, "lo", "203.0.113.10/32", "2001:db8:203::10/128")
	for _, name := range []string{"lan", "dmz"} {
		eventually(t, "the IPv6 addresses of "+name+" are in force", func() bool { return ready(t, name) })
	}
}

func citizenParams() Params {
	return Params{
		Table: "weir", Mark: 0x57000000, MarkMask: 0xff000000,
		VIPs:      []netip.AddrPort{netip.MustParseAddrPort("203.0.113.10:80"), netip.MustParseAddrPort("[2001:db8:203::10]:80")},
		Servers:   []netip.AddrPort{netip.MustParseAddrPort("198.51.100.11:80"), netip.MustParseAddrPort("198.51.100.12:80"), netip.MustParseAddrPort("[2001:db8:51::b]:80")},
		SNIPs:     []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:51::1")},
		PortFirst: 10240, PortLast: 32767, QueueFirst: 22272, Shards: 1,
	}
}

// restore feeds a file to iptables-restore or its like.
func restore(t *testing.T, program, file string) {
	t.Helper()
	tool := require.Tool(t, program)
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command(tool)
	cmd.Stdin = f
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", program, file, err, out)
	}
}

func nftFile(t *testing.T, name string) {
	t.Helper()
	b, err := os.ReadFile(citizenData + name)
	if err != nil {
		t.Fatal(err)
	}
	nftLoad(t, string(b))
}

// carryOut runs a fix as the administrator would.
func carryOut(t *testing.T, fix string) {
	t.Helper()
	require.Tool(t, strings.Fields(fix)[0])
	cmd := exec.Command("/bin/sh", "-c", "PATH=$PATH:/usr/sbin:/sbin; "+fix)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", fix, err, out)
	}
}

// brief is what a test expects of a finding.
func brief(f *Finding) string {
	sure := ""
	if !f.Certain {
		sure = "?"
	}
	return fmt.Sprintf("%v%s: %s: %s: %s", f.Trouble, sure, f.Path, f.Place(), f.Rule)
}

// A foreignCase is a ruleset of others and what is found in it.
type foreignCase struct {
	name string
	load func(t *testing.T)
	want []string
	// applied stands for the fixes where these need a tool that runs
	// nowhere but on a real system; nil to run the fixes.
	applied func(t *testing.T)
}

var foreignCases = []foreignCase{
	{name: "nothing", load: func(*testing.T) {}},
	{name: "bans", load: func(t *testing.T) { nftFile(t, "bans.nft") }},
	{
		name: "router", load: func(t *testing.T) { nftFile(t, "router.nft") },
		want: []string{
			"drops_marked: reverse path: inet filter reverse_path: fib saddr . iif oif missing drop",
			"drops_marked: forward: inet filter forward: policy drop",
			"drops_marked: output: inet filter output: policy drop",
		},
	},
	{
		name: "iptables-nft", load: func(t *testing.T) {
			restore(t, "iptables-nft-restore", citizenData+"iptables.v4")
			restore(t, "ip6tables-nft-restore", citizenData+"iptables.v6")
		},
		want: []string{
			"drops_marked: reverse path: ip raw PREROUTING: -m rpfilter drop",
			"drops_marked: reverse path: ip6 raw PREROUTING: -m rpfilter drop",
			"drops_marked: forward: ip filter FORWARD: policy drop",
			"drops_marked: forward: ip6 filter FORWARD: policy drop",
			"drops_marked: output: ip filter OUTPUT: policy drop",
			"drops_marked: output: ip6 filter OUTPUT: policy drop",
		},
	},
	{
		name: "iptables-legacy", load: func(t *testing.T) {
			restore(t, "iptables-legacy-restore", citizenData+"iptables.v4")
			restore(t, "ip6tables-legacy-restore", citizenData+"iptables.v6")
		},
		want: []string{
			"drops_marked: reverse path: ip6tables-legacy raw PREROUTING: -A PREROUTING -m rpfilter -j DROP",
			"drops_marked: reverse path: iptables-legacy raw PREROUTING: -A PREROUTING -m rpfilter -j DROP",
			"drops_marked: forward: ip6tables-legacy filter FORWARD: policy drop",
			"drops_marked: forward: iptables-legacy filter FORWARD: policy drop",
			"drops_marked: output: ip6tables-legacy filter OUTPUT: policy drop",
			"drops_marked: output: iptables-legacy filter OUTPUT: policy drop",
		},
	},
	{
		name: "ufw", load: func(t *testing.T) {
			restore(t, "iptables-nft-restore", citizenData+"ufw.v4")
			restore(t, "ip6tables-nft-restore", citizenData+"ufw.v6")
		},
		want: []string{
			"drops_marked: forward: ip filter FORWARD: policy drop",
			"drops_marked: forward: ip6 filter FORWARD: policy drop",
		},
		applied: func(t *testing.T) {
			carryOut(t, "iptables-nft -I ufw-before-forward -m mark --mark 0x57000000/0xff000000 -j ACCEPT")
			carryOut(t, "ip6tables-nft -I ufw6-before-forward -m mark --mark 0x57000000/0xff000000 -j ACCEPT")
		},
	},
	{
		name: "docker", load: func(t *testing.T) { restore(t, "iptables-nft-restore", citizenData+"docker.v4") },
		want: []string{"drops_marked: forward: ip filter FORWARD: policy drop"},
	},
	{
		name: "firewalld", load: func(t *testing.T) { nftFile(t, "firewalld.nft") },
		want: []string{
			"drops_marked: reverse path: inet firewalld filter_PREROUTING: meta nfproto ipv6 fib saddr . mark . iif oif missing drop",
			"drops_marked: forward: inet firewalld filter_FORWARD (through filter_FWD_internal): reject",
		},
		applied: func(t *testing.T) { nftLoad(t, "flush ruleset"); nftFile(t, "firewalld-changed.nft") },
	},
	{
		name: "fw4", load: func(t *testing.T) { nftFile(t, "fw4.nft") },
		want: []string{"drops_marked: forward: inet fw4 forward (through handle_reject): meta l4proto tcp reject"},
		applied: func(t *testing.T) {
			nftLoad(t, "insert rule inet fw4 forward meta mark & 0xff000000 == 0x57000000 accept")
		},
	},
	{
		name: "synproxy", load: func(t *testing.T) { nftFile(t, "synproxy.nft") },
		want: []string{
			"drops_marked: forward: ip x f: tcp dport { 80, 8080 } ct state invalid,untracked synproxy",
			"drops_marked: forward: ip6 x f: tcp dport { 80, 8080 } ct state invalid,untracked synproxy",
			"takes_syn: input: ip x z: tcp dport { 80, 8080 } ct state invalid,untracked synproxy",
			"takes_syn: input: ip6 x z: tcp dport { 80, 8080 } ct state invalid,untracked synproxy",
		},
		applied: func(t *testing.T) {
			nftLoad(t, "insert rule ip x f meta mark & 0xff000000 == 0x57000000 accept\ninsert rule ip x y ip daddr 203.0.113.10 tcp dport 80 accept\n"+
				"insert rule ip6 x f meta mark & 0xff000000 == 0x57000000 accept\ninsert rule ip6 x y ip6 daddr 2001:db8:203::10 tcp dport 80 accept\n")
		},
	},
}

// TestForeignFindings: of each ruleset exactly the chains are found that drop
// what we send, and what the finding says to do takes it away.
func TestForeignFindings(t *testing.T) {
	for _, c := range foreignCases {
		t.Run(c.name, func(t *testing.T) {
			newRouter(t)
			c.load(t)
			settled := func() string {
				out, err := nftRun(t, "", "-s", "list", "ruleset") // the router's own packets are counted meanwhile
				if err != nil {
					t.Fatal(err)
				}
				return regexp.MustCompile(` expires \w+`).ReplaceAllString(out, "")
			}
			before := settled()
			found, err := Foreign(citizenParams())
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for i := range found {
				got = append(got, brief(&found[i]))
				t.Logf("%s\n\tfix: %s", &found[i], found[i].Fix)
			}
			same := slices.EqualFunc(got, c.want, func(g, w string) bool { return strings.HasPrefix(g, w) })
			if !same {
				t.Errorf("found\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
			if after := settled(); after != before {
				t.Errorf("looking has changed the ruleset to\n%s", after)
			}
			if c.applied != nil {
				c.applied(t)
			} else {
				for _, f := range found {
					carryOut(t, f.Fix)
				}
			}
			if found, err = Foreign(citizenParams()); err != nil {
				t.Fatal(err)
			}
			for i := range found {
				t.Errorf("after the change there is still %s", brief(&found[i]))
			}
		})
	}
}

// TestCompanionsNotForeign: neither our companions nor those of another
// instance stand in the way, for one who reads as for one who traces. What
// others do to the copies on lo is found.
func TestCompanionsNotForeign(t *testing.T) {
	newRouter(t)
	admit(t)
	k := probed(t)
	requireSYNToLo(t, k)
	p := citizenParams()
	p.SYNToLo = true
	other := p
	other.Table, other.Mark, other.QueueFirst = "weir2", 0x58000000, p.QueueFirst+100
	other.VIPs = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.99:80")}
	install(t, p, k, nil)
	list, err := Trace(p)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range list {
		if !x.Passed {
			t.Errorf("%s %s: %+v %s", x.Kind, x.Packet, x.Ended, x.Lost)
		}
	}
	install(t, other, k, nil)
	for _, lo := range []bool{true, false} {
		p.SYNToLo = lo
		if found, err := Foreign(p); err != nil || len(found) > 0 {
			t.Errorf("SYNToLo=%v: %v, found %v", lo, err, found)
		}
	}
	p.SYNToLo = true
	nftLoad(t, `table inet admin { chain input { type filter hook input priority filter; policy accept; iif lo tcp flags syn drop; }; }`)
	found, err := Foreign(p)
	if err != nil || len(found) != 1 || found[0].Trouble != DropsMarked || found[0].Chain != "input" {
		t.Errorf("a rule that ends the copies: %v, found %v", err, found)
	}
}
