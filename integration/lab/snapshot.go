// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	mdnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A Snapshot is what can be seen of a namespace's configuration, as text by
// key: what a program has to leave as it found it. Two snapshots compare with
// Diff.
type Snapshot map[string]string

// volatileSysctls change by themselves, with traffic or time.
var volatileSysctls = map[string]bool{
	"net/netfilter/nf_conntrack_count": true,
}

// Snapshot records the nftables ruleset (as netlink bytes, handles included),
// all of /proc/sys/net, links, addresses, routes and policy rules, the queues
// of nfnetlink_queue and the listening sockets. IPv4 and IPv6.
func (h *Host) Snapshot() (Snapshot, error) {
	s := Snapshot{}
	err := errors.Join(h.snapRuleset(s), h.snapNetwork(s), h.Do(func() error {
		return errors.Join(snapSysctls(s), snapProc(s))
	}))
	if err != nil {
		return nil, fmt.Errorf("lab: host %s: snapshot: %w", h.name, err)
	}
	return s, nil
}

// Ruleset records the nftables ruleset alone: one entry for each object, its
// value the bytes in which the kernel describes it. Entries of one table start
// with "nft FAMILY TABLE ".
func (h *Host) Ruleset() (Snapshot, error) {
	s := Snapshot{}
	if err := h.snapRuleset(s); err != nil {
		return nil, fmt.Errorf("lab: host %s: ruleset: %w", h.name, err)
	}
	return s, nil
}

// Select returns the entries whose key has the prefix.
func (s Snapshot) Select(prefix string) Snapshot {
	r := Snapshot{}
	for k, v := range s {
		if strings.HasPrefix(k, prefix) {
			r[k] = v
		}
	}
	return r
}

// Diff returns one line for each entry that was added, removed or changed on
// the way from s to t; none if they are equal.
func (s Snapshot) Diff(t Snapshot) []string {
	var d []string
	for _, k := range slices.Sorted(maps.Keys(s)) {
		v, ok := t[k]
		switch {
		case !ok:
			d = append(d, fmt.Sprintf("- %s: %s", k, s[k]))
		case v != s[k]:
			d = append(d, fmt.Sprintf("~ %s: %s -> %s", k, s[k], v))
		}
	}
	for _, k := range slices.Sorted(maps.Keys(t)) {
		if _, ok := s[k]; !ok {
			d = append(d, fmt.Sprintf("+ %s: %s", k, t[k]))
		}
	}
	return d
}

// snapRuleset dumps the ruleset by plain netlink. It does not go through the
// library that the module itself uses: an object which that does not know
// would be missed.
func (h *Host) snapRuleset(s Snapshot) error {
	c, err := mdnetlink.Dial(unix.NETLINK_NETFILTER, &mdnetlink.Config{NetNS: h.fd})
	if err != nil {
		return err
	}
	defer c.Close()
	// Attribute 1 of every object but the table itself names its table.
	for _, kind := range []struct {
		what string
		get  uint16
	}{
		{"table", unix.NFT_MSG_GETTABLE}, {"chain", unix.NFT_MSG_GETCHAIN}, {"rule", unix.NFT_MSG_GETRULE},
		{"set", unix.NFT_MSG_GETSET}, {"object", unix.NFT_MSG_GETOBJ}, {"flowtable", unix.NFT_MSG_GETFLOWTABLE},
	} {
		msgs, err := nftDump(c, kind.get, unix.NFPROTO_UNSPEC, nil)
		if err != nil {
			return fmt.Errorf("nftables: list %ss: %w", kind.what, err)
		}
		count := map[string]int{}
		for _, m := range msgs {
			family, attrs := m.Data[0], m.Data[4:]
			name := attrString(attrs, 1)
			prefix := fmt.Sprintf("nft %d %s %s", family, name, kind.what)
			if sub := attrString(attrs, 2); kind.what == "set" || kind.what == "object" || kind.what == "rule" {
				prefix += " " + sub
			}
			key := fmt.Sprintf("%s #%d", prefix, count[prefix])
			count[prefix]++
			s[key] = hex.EncodeToString(attrs)
			if kind.what != "set" {
				continue
			}
			elems, err := nftDump(c, unix.NFT_MSG_GETSETELEM, family, func(ae *mdnetlink.AttributeEncoder) {
				ae.String(unix.NFTA_SET_ELEM_LIST_TABLE, name)
				ae.String(unix.NFTA_SET_ELEM_LIST_SET, attrString(attrs, 2))
			})
			if err != nil {
				return fmt.Errorf("nftables: list elements of %s: %w", prefix, err)
			}
			for i, e := range elems {
				s[fmt.Sprintf("%s elements %d", key, i)] = hex.EncodeToString(e.Data[4:])
			}
		}
	}
	return nil
}

func nftDump(c *mdnetlink.Conn, get uint16, family uint8, attrs func(*mdnetlink.AttributeEncoder)) ([]mdnetlink.Message, error) {
	ae := mdnetlink.NewAttributeEncoder()
	if attrs != nil {
		attrs(ae)
	}
	b, err := ae.Encode()
	if err != nil {
		return nil, err
	}
	return c.Execute(mdnetlink.Message{
		Header: mdnetlink.Header{
			Type:  mdnetlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | get),
			Flags: mdnetlink.Request | mdnetlink.Dump,
		},
		Data: append([]byte{family, unix.NFNETLINK_V0, 0, 0}, b...),
	})
}

// attrString returns the text of the first attribute of that type.
func attrString(b []byte, typ uint16) string {
	for len(b) >= 4 {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return ""
		}
		if binary.NativeEndian.Uint16(b[2:])&^uint16(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER) == typ {
			return strings.TrimRight(string(b[4:n]), "\x00")
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return ""
}

func (h *Host) snapNetwork(s Snapshot) error {
	links, err := h.nl.LinkList()
	if err != nil {
		return err
	}
	for _, k := range links {
		a := k.Attrs()
		s["link "+a.Name] = fmt.Sprintf("%s flags %v mtu %d", k.Type(), a.Flags, a.MTU)
		qdiscs, err := h.nl.QdiscList(k)
		if err != nil {
			return err
		}
		for _, q := range qdiscs {
			s[fmt.Sprintf("qdisc %s %s", a.Name, netlink.HandleStr(q.Attrs().Handle))] = q.Type()
		}
	}
	addrs, err := h.nl.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		s[fmt.Sprintf("address %s on %d", a.IPNet, a.LinkIndex)] = fmt.Sprintf("scope %d flags %#x", a.Scope, a.Flags)
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := h.nl.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if r.Flags&unix.RTM_F_CLONED != 0 {
				continue
			}
			s[fmt.Sprintf("route table %d dst %v via %v dev %d metric %d", r.Table, r.Dst, r.Gw, r.LinkIndex, r.Priority)] =
				fmt.Sprintf("type %d scope %d", r.Type, r.Scope)
		}
		rules, err := h.nl.RuleList(family)
		if err != nil {
			return err
		}
		for i, r := range rules {
			s[fmt.Sprintf("rule family %d #%d", family, i)] = r.String()
		}
	}
	return nil
}

// snapSysctls runs inside the namespace.
func snapSysctls(s Snapshot) error {
	const root = "/proc/sys"
	return filepath.WalkDir(root+"/net", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		key := strings.TrimPrefix(path, root+"/")
		if volatileSysctls[key] {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			// Some cannot be read: write-only ones, and secrets that are not set.
			s["sysctl "+key] = "unreadable"
			return nil
		}
		s["sysctl "+key] = strings.TrimSpace(string(b))
		return nil
	})
}

// snapProc runs inside the namespace.
func snapProc(s Snapshot) error {
	const root = "/proc/thread-self/net/"
	queues, err := os.ReadFile(root + "netfilter/nfnetlink_queue")
	if err == nil {
		for line := range strings.Lines(string(queues)) {
			if f := strings.Fields(line); len(f) > 0 {
				s["queue "+f[0]] = "bound"
			}
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	const listening = "0A" // TCP_LISTEN
	for _, name := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile(root + name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 3 && f[3] == listening {
				s["listener "+name+" "+f[1]] = "listening"
			}
		}
	}
	return nil
}

// Files lists the files below a directory, sorted, relative to it, directories
// with a slash at the end. A directory that does not exist has none.
func Files(dir string) ([]string, error) {
	var files []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || path == dir {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if d.IsDir() {
			rel += "/"
		}
		files = append(files, rel)
		return err
	})
	slices.Sort(files)
	return files, err
}
