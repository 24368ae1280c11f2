// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// fix says what the administrator does about a finding, in the way that the
// tool which made the table wants it, so that its next reload keeps it.
func (f *finder) fix(trouble Trouble, c *theirChain, t *trial) string {
	switch trouble {
	case TooLate:
		return fmt.Sprintf("give %s %s %s a priority below %d, where it sees new connections before they are answered", familyWords[c.family], c.table, c.name, prioritySYN)
	case TakesSYN:
		return fmt.Sprintf("exclude tcp to %v from that rule", t.dst)
	case DropsSYN, DropsClient:
		return f.acceptSYN(c, t)
	}
	mark, six := fmt.Sprintf("%#x/%#x", f.p.Mark, f.p.MarkMask), c.family == unix.NFPROTO_IPV6
	rule := fmt.Sprintf("meta mark & %#x == %#x accept", f.p.MarkMask, f.p.Mark)
	program := "iptables"
	if six {
		program = "ip6tables"
	}
	switch f.maker(c) {
	case "ufw":
		file, chain := "/etc/ufw/before.rules", "ufw-before-"+c.hook
		if six {
			file, chain = "/etc/ufw/before6.rules", "ufw6-before-"+c.hook
		}
		return fmt.Sprintf("in %s, after the chains of *filter are declared, write: -A %s -m mark --mark %s -j ACCEPT; then run: ufw reload", file, chain, mark)
	case "docker":
		return fmt.Sprintf("%s -I DOCKER-USER -m mark --mark %s -j ACCEPT", program, mark)
	case "legacy":
		table := strings.TrimPrefix(c.table, "legacy ")
		return fmt.Sprintf("%s -t %s -I %s -m mark --mark %s -j ACCEPT", c.legacy, table, c.name, mark)
	case "iptables":
		return fmt.Sprintf("%s -t %s -I %s -m mark --mark %s -j ACCEPT", program, c.table, c.name, mark)
	case "firewalld":
		return f.firewalld(c)
	case "fw4":
		return fmt.Sprintf("mkdir -p /usr/share/nftables.d/chain-pre/%[1]s && echo '%[2]s' > /usr/share/nftables.d/chain-pre/%[1]s/10-weir.nft && fw4 restart", c.name, rule)
	}
	return fmt.Sprintf("nft 'insert rule %s %s %s %s'", familyWords[c.family], c.table, c.name, rule)
}

// maker guesses the tool from the marks that it leaves.
func (f *finder) maker(c *theirChain) string {
	has := func(name string) bool { return f.tables.chains[objectKey{c.family, c.table, name}] != nil }
	prefixed := func(p string) bool {
		return slices.ContainsFunc(c.rules, func(r theirRule) bool {
			if r.legacy != nil {
				return r.legacy.verdict != nil && strings.HasPrefix(r.legacy.verdict.chain, p)
			}
			return slices.ContainsFunc(r.exprs, func(e theirExpr) bool {
				v := parseVerdict(e.nest(unix.NFTA_IMMEDIATE_DATA).nest(unix.NFTA_DATA_VERDICT))
				return e.name == "immediate" && v != nil && strings.HasPrefix(v.chain, p)
			})
		})
	}
	switch {
	case prefixed("ufw-") || prefixed("ufw6-"):
		return "ufw"
	case c.hook == "forward" && prefixed("DOCKER-USER") && has("DOCKER-USER"):
		return "docker"
	case c.legacy != "":
		return "legacy"
	case c.table == "firewalld":
		return "firewalld"
	case c.table == "fw4":
		return "fw4"
	case (c.family == unix.NFPROTO_IPV4 || c.family == unix.NFPROTO_IPV6) && slices.Contains([]string{"filter", "mangle", "raw", "security"}, c.table) && c.name == strings.ToUpper(c.name):
		return "iptables"
	}
	return ""
}

// firewalld has no match for a mark: the addresses stand for it. Nobody else
// can send from these, see the antispoof chain.
func (f *finder) firewalld(c *theirChain) string {
	if c.hook == "prerouting" {
		return "in /etc/firewalld/firewalld.conf set IPv6_rpfilter=no; Weir checks the reverse path of what it diverts; then run: firewall-cmd --reload"
	}
	egress, ingress := "ANY", "ANY"
	switch c.hook {
	case "input":
		egress = "HOST"
	case "output":
		ingress = "HOST"
	}
	name := "weir-" + c.hook
	cmds := []string{
		"firewall-cmd --permanent --new-policy " + name,
		fmt.Sprintf("firewall-cmd --permanent --policy %s --add-ingress-zone %s --add-egress-zone %s", name, ingress, egress),
	}
	add := func(format string, a ...any) {
		cmds = append(cmds, fmt.Sprintf("firewall-cmd --permanent --policy %s --add-rich-rule '%s'", name, fmt.Sprintf(format, a...)))
	}
	word := func(is4 bool) string {
		if is4 {
			return "ipv4"
		}
		return "ipv6"
	}
	for _, v := range f.p.VIPs {
		add(`rule family="%s" source address="%v" source-port port="%d" protocol="tcp" accept`, word(v.Addr().Is4()), v.Addr(), v.Port())
	}
	for _, a := range f.p.SNIPs {
		add(`rule family="%s" source address="%v" source-port port="%d-%d" protocol="tcp" accept`, word(a.Is4()), a, f.p.PortFirst, f.p.PortLast)
	}
	return strings.Join(append(cmds, "firewall-cmd --reload"), " && ")
}

// acceptSYN lets new connections to the VIP in.
func (f *finder) acceptSYN(c *theirChain, t *trial) string {
	word, program := "ip", "iptables"
	if t.family == unix.NFPROTO_IPV6 {
		word, program = "ip6", "ip6tables"
	}
	v := t.dst
	switch f.maker(c) {
	case "ufw":
		if c.hook == "forward" {
			return fmt.Sprintf("ufw route allow proto tcp to %v port %d", v.Addr(), v.Port())
		}
		return fmt.Sprintf("ufw allow proto tcp to %v port %d", v.Addr(), v.Port())
	case "firewalld":
		return fmt.Sprintf("firewall-cmd --permanent --zone=ZONE --add-port=%d/tcp && firewall-cmd --reload (ZONE: the clients')", v.Port())
	case "fw4":
		return fmt.Sprintf("add a traffic rule to /etc/config/firewall that accepts tcp to %v port %d, and run: fw4 restart", v.Addr(), v.Port())
	case "docker":
		return fmt.Sprintf("%s -I DOCKER-USER -d %v -p tcp --dport %d -j ACCEPT", program, v.Addr(), v.Port())
	case "legacy":
		return fmt.Sprintf("%s -t %s -I %s -d %v -p tcp --dport %d -j ACCEPT", c.legacy, strings.TrimPrefix(c.table, "legacy "), c.name, v.Addr(), v.Port())
	case "iptables":
		return fmt.Sprintf("%s -t %s -I %s -d %v -p tcp --dport %d -j ACCEPT", program, c.table, c.name, v.Addr(), v.Port())
	}
	return fmt.Sprintf("nft 'insert rule %s %s %s %s daddr %v tcp dport %d accept', where the rules for your own services stand", familyWords[c.family], c.table, c.name, word, v.Addr(), v.Port())
}
