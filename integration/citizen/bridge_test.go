// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
	"github.com/weirgate/weir/internal/require"
)

// TestBridge: the router's interface is a bridge, on which clients and servers
// are neighbours. With VIPs on the router all goes through it, whether
// br_netfilter is on or not. Where the VIPs are the servers' own addresses,
// frames between client and server are merely passed on by the bridge: with
// br_netfilter weir serves these too, without it does not see them.
func TestBridge(t *testing.T) {
	if _, err := os.Stat("/proc/sys/net/bridge/bridge-nf-call-iptables"); err != nil {
		require.Missing(t, "br_netfilter", err.Error())
	}
	for _, call := range []string{"0", "1"} {
		for _, transparent := range []bool{false, true} {
			t.Run(fmt.Sprintf("bridge-nf-call-iptables=%s%s", call, map[bool]string{true: ", servers' addresses"}[transparent]), func(t *testing.T) {
				r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 1})
				for _, key := range []string{"iptables", "ip6tables"} {
					if err := r.Router.SetSysctl("net/bridge/bridge-nf-call-"+key, call); err != nil {
						t.Fatal(err)
					}
				}
				attrs := netlink.NewLinkAttrs()
				attrs.Name = "br0"
				off := false
				if err := r.Router.Netlink().LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &off}); err != nil {
					t.Fatal(err)
				}
				prefix := netip.MustParsePrefix
				for _, a := range []string{"198.19.20.1/24", "2001:db8:1920::1/64"} {
					if err := r.Router.AddAddr("br0", prefix(a)); err != nil {
						t.Fatal(err)
					}
				}
				if err := r.Router.SetUp("br0"); err != nil {
					t.Fatal(err)
				}
				var hosts []*lab.Host
				for i, name := range []string{"b-client", "b-server", "b-second"} {
					h, err := r.Lab.NewHost(name)
					if err != nil {
						t.Fatal(err)
					}
					n := 10 + i
					if _, err := r.Lab.Plug(h, r.Router, []netip.Prefix{prefix(fmt.Sprintf("198.19.20.%d/24", n)), prefix(fmt.Sprintf("2001:db8:1920::%d/64", n))}, lab.LinkOptions{}); err != nil {
						t.Fatal(err)
					}
					for _, route := range [][2]string{{"203.0.113.0/24", "198.19.20.1"}, {"2001:db8:203::/64", "2001:db8:1920::1"}} {
						if err := h.AddRoute(prefix(route[0]), netip.MustParseAddr(route[1])); err != nil {
							t.Fatal(err)
						}
					}
					hosts = append(hosts, h)
				}
				for _, h := range append(hosts, r.Router) {
					if err := h.Settle(within(t, 20*time.Second)); err != nil {
						t.Fatal(err)
					}
				}
				var servers []netip.AddrPort
				for i, a := range []string{"198.19.20.11:80", "[2001:db8:1920::11]:80", "198.19.20.12:80", "[2001:db8:1920::12]:80"} {
					if _, err := lab.HTTPServer(hosts[1+i/2], a, handler(hosts[1+i/2].Name())); err != nil {
						t.Fatal(err)
					}
					servers = append(servers, netip.MustParseAddrPort(a))
				}
				vips := []netip.AddrPort{r.VIP(), r.VIP6()}
				if transparent {
					vips = servers
				}
				w := r.startWith(r.custom(texts(vips), texts(servers), "source: {addresses: [198.19.20.1, \"2001:db8:1920::1\"]}\n"))
				is := func(list []netip.AddrPort) func(netip.AddrPort) bool {
					return func(a netip.AddrPort) bool {
						for _, x := range list {
							if a == x {
								return true
							}
						}
						return false
					}
				}
				isClient := func(a netip.AddrPort) bool {
					return a.Addr() == netip.MustParseAddr("198.19.20.10") || a.Addr() == netip.MustParseAddr("2001:db8:1920::10")
				}
				isSNIP := func(a netip.AddrPort) bool {
					return (a.Addr() == netip.MustParseAddr("198.19.20.1") || a.Addr() == netip.MustParseAddr("2001:db8:1920::1")) && a.Port() >= 10240 && a.Port() <= 32767
				}
				watch := r.watchOn(
					leg{"b-client", is(vips), func(s ladder.Segment) bool {
						return isSNIP(s.Src) || isSNIP(s.Dst) || !transparent && is(servers)(s.Src)
					}},
					leg{"b-server", isSNIP, func(s ladder.Segment) bool { return isClient(s.Src) || isClient(s.Dst) }},
					leg{"b-second", isSNIP, func(s ladder.Segment) bool { return isClient(s.Src) || isClient(s.Dst) }},
				)
				for i, err := range load(hosts[0], 1000, vips...) {
					if i < 5 {
						t.Error(err)
					}
				}
				if n := r.counted("client"); (n == 0) != (transparent && call == "0") {
					t.Errorf("%d packets of clients came to weir", n)
				}
				if transparent && call == "0" {
					watch.end() // client and servers talk to each other, and that is all right
				} else {
					watch.judge()
				}
				r.stop(w)
			})
		}
	}
}
