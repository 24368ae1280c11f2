// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
)

// A way is what the clients of one family use beside uplinks: two VIPs and an
// address in the net behind both.
type way struct {
	first, second netip.AddrPort
	remote        netip.Addr
	link          string // the uplinks' networks, with the uplink's and the host's number
	all           string // the default route
}

// ways has one of each family.
func (r *rig) ways() []way {
	return []way{
		{r.VIP(), netip.MustParseAddrPort("203.0.113.20:80"), netip.MustParseAddr("198.19.9.9"), "198.19.%d.%d/24", "0.0.0.0/0"},
		{r.VIP6(), netip.MustParseAddrPort("[2001:db8:203::20]:80"), netip.MustParseAddr("2001:db8:19:9::9"), "2001:db8:19:%d::%d/64", "::/0"},
	}
}

func (w way) six() bool { return w.remote.Is6() }

// single is the network of one address.
func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// addr is an address on an uplink: 1 is the router's, 2 the net's.
func (w way) addr(uplink, number int) netip.Prefix {
	return netip.MustParsePrefix(fmt.Sprintf(w.link, uplink, number))
}

// uplinks gives the router two uplinks, up1 and up2, to a net in which the
// remote addresses are; the router's way to these is up1. The net sends what
// goes to the first VIPs by up1 and what goes to the second by up2.
func (r *rig) uplinks(ways []way) *lab.Host {
	r.t.Helper()
	h, err := r.Lab.NewHost("net")
	if err != nil {
		r.t.Fatal(err)
	}
	for i := 1; i <= 2; i++ {
		var ours, theirs []netip.Prefix
		for _, w := range ways {
			ours, theirs = append(ours, w.addr(i, 1)), append(theirs, w.addr(i, 2))
		}
		if _, err := r.Lab.Link(r.Router, h, ours, theirs, lab.LinkOptions{AName: fmt.Sprintf("up%d", i), BName: fmt.Sprintf("up%d", i)}); err != nil {
			r.t.Fatal(err)
		}
	}
	for _, w := range ways {
		if err := errors.Join(
			h.AddRoute(single(w.first.Addr()), w.addr(1, 1).Addr()), h.AddRoute(single(w.second.Addr()), w.addr(2, 1).Addr()),
			h.AddAddr("lo", single(w.remote)), r.Router.AddRoute(single(w.remote), w.addr(1, 2).Addr()),
			r.Router.AddAddr("lo", single(w.second.Addr())),
		); err != nil {
			r.t.Fatal(err)
		}
	}
	for _, on := range []*lab.Host{r.Router, h} {
		if err := on.Settle(within(r.t, 20*time.Second)); err != nil {
			r.t.Fatal(err)
		}
	}
	return h
}

// client makes requests from one of a host's addresses.
func client(h *lab.Host, from netip.Addr, timeout time.Duration) *http.Client {
	return &http.Client{Timeout: timeout, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return h.DialWith(ctx, &net.Dialer{LocalAddr: &net.TCPAddr{IP: from.AsSlice()}}, network, addr)
		},
	}}
}

// TestUplinks: requests come in by an uplink that is not the router's way back
// to the client. With a loose reverse path filter they are served, and answers
// leave by the way that routing gives, by the address of the VIP where there
// is a rule for that. With a strict one they are refused, as the kernel would
// have done without weir; IPv6 has no such filter, but people have rules for it.
func TestUplinks(t *testing.T) {
	for _, c := range []struct {
		name             string
		strict           bool   // rp_filter
		fib              bool   // a rule of others
		rule             bool   // routing by source
		by               string // the interface by which answers to the second VIPs leave
		refused4, refuse bool   // the second VIPs
	}{
		{name: "asymmetric, loose", by: "up1"},
		{name: "asymmetric, strict", strict: true, by: "up1", refused4: true},
		{name: "asymmetric, strict by a rule", fib: true, refused4: true, refuse: true},
		{name: "a rule by source", rule: true, by: "up2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
			r.serve(r.both)
			ways := r.ways()
			h := r.uplinks(ways)
			if c.strict {
				for _, dev := range []string{"up1", "up2"} {
					if err := r.Router.SetSysctl("net/ipv4/conf/"+dev+"/rp_filter", "1"); err != nil {
						t.Fatal(err)
					}
				}
			}
			if c.fib {
				r.nft("table inet filter {\nchain reverse_path {\ntype filter hook prerouting priority mangle + 10;\n" +
					acceptMark + "\nfib saddr . iif oif missing counter drop\n}\n}\n")
			}
			if c.rule {
				for _, w := range ways {
					r.bySource(w)
				}
			}
			var vips []netip.AddrPort
			for _, w := range ways {
				vips = append(vips, w.first, w.second)
			}
			isVIP := func(a netip.AddrPort) bool { return slices.Contains(vips, a) }
			w := r.startWith(r.custom(texts(vips), texts(append(r.both(0), r.both(1)...)), ""))
			snoop, err := r.Router.CaptureOn(lab.CaptureOptions{SnapLen: 120, Buffer: 64 << 20}, "up1", "up2")
			if err != nil {
				t.Fatal(err)
			}
			watch := r.watchOn(leg{r.ServerLeg, r.isSNIP, func(s ladder.Segment) bool {
				return isVIP(s.Src) || slices.ContainsFunc(ways, func(w way) bool { return w.remote == s.Src.Addr() })
			}})
			refused := func(w way) bool { return c.refuse || c.refused4 && !w.six() }
			for _, w := range ways {
				patient := client(h, w.remote, 20*time.Second)
				for i := range 50 {
					if err := get(patient, w.first, fmt.Sprintf("/first-%d", i)); err != nil {
						t.Fatalf("by the uplink that is the way back: %v", err)
					}
					if refused(w) {
						continue
					}
					if err := get(patient, w.second, "/bytes/30000"); err != nil {
						t.Fatalf("by the other uplink: %v", err)
					}
				}
				if refused(w) {
					if err := get(client(h, w.remote, time.Second), w.second, "/refused"); err == nil {
						t.Errorf("%v: what a strict reverse path filter refuses is served", w.second)
					}
				}
			}
			if c.strict {
				if n := r.metric(`weir_firewall_packets_total{counter="reverse_path"}`); n == 0 {
					t.Error("no rule has counted the refusal")
				}
			}
			watch.judge()
			recs, err := snoop.Stop()
			if err != nil {
				t.Fatal(err)
			}
			for _, w := range ways {
				byWay := map[string]int{}
				for _, rec := range recs {
					if s, err := ladder.Decode(rec.Data); err == nil && s.Src == w.second {
						byWay[rec.Iface]++
					}
				}
				for dev, n := range byWay {
					if dev != c.by || refused(w) {
						t.Errorf("%d packets of %v left by %s", n, w.second, dev)
					}
				}
				if !refused(w) && byWay[c.by] == 0 {
					t.Errorf("no packet of %v left by %s", w.second, c.by)
				}
			}
			r.stop(w)
		})
	}
}

// bySource has the router send what comes from the second VIP by up2:
// ip rule add from VIP lookup 102; ip route add default via NET table 102.
func (r *rig) bySource(w way) {
	r.t.Helper()
	ipNet := func(p netip.Prefix) *net.IPNet {
		return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
	}
	rule := netlink.NewRule()
	rule.Src = ipNet(single(w.second.Addr()))
	rule.Table, rule.Family = 102, unix.AF_INET
	if w.six() {
		rule.Family = unix.AF_INET6
	}
	if err := r.Router.Netlink().RuleAdd(rule); err != nil {
		r.t.Fatal(err)
	}
	route := &netlink.Route{Table: 102, Gw: w.addr(2, 2).Addr().AsSlice(), Dst: ipNet(netip.MustParsePrefix(w.all))}
	if err := r.Router.Netlink().RouteAdd(route); err != nil {
		r.t.Fatal(err)
	}
}

// TestServerComesOtherWay: a server's answer that comes in by an interface that
// does not lead to that server is refused and counted: it could be anybody's.
func TestServerComesOtherWay(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.serve(r.both)
	// The second server sends to the SNIPs by a link of its own.
	ours := []netip.Prefix{netip.MustParsePrefix("198.19.5.1/24"), netip.MustParsePrefix("2001:db8:19:5::1/64")}
	theirs := []netip.Prefix{netip.MustParsePrefix("198.19.5.2/24"), netip.MustParsePrefix("2001:db8:19:5::2/64")}
	if _, err := r.Lab.Link(r.Router, r.Servers[1], ours, theirs, lab.LinkOptions{AName: "side", BName: "side"}); err != nil {
		t.Fatal(err)
	}
	for i, snip := range []netip.Addr{r.SNIP(), r.SNIP6()} {
		if err := r.Servers[1].AddRoute(single(snip), ours[i].Addr()); err != nil {
			t.Fatal(err)
		}
	}
	vips := []netip.AddrPort{r.VIP(), r.VIP6()}
	w := r.startWith(strings.Replace(r.custom(texts(vips), texts(append(r.both(0), r.both(1)...)), ""),
		"    servers:\n", "    timeouts: {connect: 500ms}\n    servers:\n", -1))
	watch := r.watchOn(
		leg{r.ClientLeg, r.isVIP, nil}, leg{r.ServerLeg, r.isSNIP, func(s ladder.Segment) bool { return r.isVIP(s.Src) || r.isClient(s.Src) }})
	// Requests that were to go to the second server go to the first.
	counted := 0.0
	for _, vip := range vips {
		r.mustLoad(100, vip)
		n := r.metric(`weir_firewall_packets_total{counter="misplaced"}`)
		if n <= counted {
			t.Errorf("no rule has counted the refusal for %v", vip)
		}
		counted = n
	}
	watch.judge()
	r.stop(w)
}
