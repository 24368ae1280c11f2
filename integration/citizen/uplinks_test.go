// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
)

// remote is a client behind two uplinks of the router.
var remote = netip.MustParseAddr("198.19.9.9")

// uplinks gives the router two uplinks, up1 and up2, to a net in which the address remote is;
// the router's way to remote is up1. The net sends what goes to the first address
// by up1 and what goes to the second by up2.
func (r *rig) uplinks(first, second netip.AddrPort) *lab.Host {
	r.t.Helper()
	h, err := r.Lab.NewHost("net")
	if err != nil {
		r.t.Fatal(err)
	}
	for i := 1; i <= 2; i++ {
		ours := netip.MustParsePrefix(fmt.Sprintf("198.19.%d.1/24", i))
		theirs := netip.MustParsePrefix(fmt.Sprintf("198.19.%d.2/24", i))
		if _, err := r.Lab.Link(r.Router, h, []netip.Prefix{ours}, []netip.Prefix{theirs}, lab.LinkOptions{AName: fmt.Sprintf("up%d", i), BName: fmt.Sprintf("up%d", i)}); err != nil {
			r.t.Fatal(err)
		}
		to := first
		if i == 2 {
			to = second
		}
		if err := h.AddRoute(netip.PrefixFrom(to.Addr(), 32), ours.Addr()); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := h.AddAddr("lo", netip.PrefixFrom(remote, 32)); err != nil {
		r.t.Fatal(err)
	}
	if err := r.Router.AddRoute(netip.PrefixFrom(remote, 32), netip.MustParseAddr("198.19.1.2")); err != nil {
		r.t.Fatal(err)
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
// have done without weir.
func TestUplinks(t *testing.T) {
	second := netip.MustParseAddrPort("203.0.113.20:80")
	for _, c := range []struct {
		name         string
		strict, rule bool
		by           string // the interface by which answers to up2's VIP leave
	}{
		{"asymmetric, loose", false, false, "up1"},
		{"asymmetric, strict", true, false, ""},
		{"a rule by source", false, true, "up2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, NoIPv6: true})
			r.serve(func(i int) []netip.AddrPort { return []netip.AddrPort{r.Server(i)} })
			if err := r.Router.AddAddr("lo", netip.PrefixFrom(second.Addr(), 32)); err != nil {
				t.Fatal(err)
			}
			h := r.uplinks(r.VIP(), second)
			if c.strict {
				for _, dev := range []string{"up1", "up2"} {
					if err := r.Router.SetSysctl("net/ipv4/conf/"+dev+"/rp_filter", "1"); err != nil {
						t.Fatal(err)
					}
				}
			}
			if c.rule {
				// ip rule add from 203.0.113.20 lookup 102; ip route add default via 198.19.2.2 table 102
				rule := netlink.NewRule()
				rule.Src = &net.IPNet{IP: second.Addr().AsSlice(), Mask: net.CIDRMask(32, 32)}
				rule.Table, rule.Family = 102, unix.AF_INET
				if err := r.Router.Netlink().RuleAdd(rule); err != nil {
					t.Fatal(err)
				}
				if err := r.Router.Netlink().RouteAdd(&netlink.Route{Table: 102, Gw: net.IPv4(198, 19, 2, 2), Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}}); err != nil {
					t.Fatal(err)
				}
			}
			w := r.startWith(r.custom([]string{r.VIP().String(), second.String()}, []string{r.Server(0).String(), r.Server(1).String()}, ""))
			isVIP := func(a netip.AddrPort) bool { return a == r.VIP() || a == second }
			snoop, err := r.Router.CaptureOn(lab.CaptureOptions{SnapLen: 120, Buffer: 64 << 20}, "up1", "up2")
			if err != nil {
				t.Fatal(err)
			}
			watch := r.watchOn(leg{r.ServerLeg, r.isSNIP, func(s ladder.Segment) bool { return isVIP(s.Src) || s.Src.Addr() == remote }})
			patient := client(h, remote, 20*time.Second)
			for i := range 50 {
				if err := get(patient, r.VIP(), fmt.Sprintf("/first-%d", i)); err != nil {
					t.Fatalf("by the uplink that is the way back: %v", err)
				}
				if c.strict {
					continue
				}
				if err := get(patient, second, "/bytes/30000"); err != nil {
					t.Fatalf("by the other uplink: %v", err)
				}
			}
			if c.strict {
				if err := get(client(h, remote, time.Second), second, "/refused"); err == nil {
					t.Error("what a strict reverse path filter refuses is served")
				}
				if n := r.metric(`weir_firewall_packets_total{counter="reverse_path"}`); n == 0 {
					t.Error("no rule has counted the refusal")
				}
			}
			watch.judge()
			recs, err := snoop.Stop()
			if err != nil {
				t.Fatal(err)
			}
			byWay := map[string]int{}
			for _, rec := range recs {
				if s, err := ladder.Decode(rec.Data); err == nil && s.Src == second {
					byWay[rec.Iface]++
				}
			}
			for dev, n := range byWay {
				if dev != c.by {
					t.Errorf("%d packets of %v left by %s, want %q", n, second, dev, c.by)
				}
			}
			if c.by != "" && byWay[c.by] == 0 {
				t.Errorf("no packet of %v left by %s", second, c.by)
			}
			r.stop(w)
		})
	}
}

// TestServerComesOtherWay: a server's answer that comes in by an interface that
// does not lead to that server is refused and counted: it could be anybody's.
func TestServerComesOtherWay(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, NoIPv6: true})
	r.serve(func(i int) []netip.AddrPort { return []netip.AddrPort{r.Server(i)} })
	// The second server sends to the SNIP by a link of its own.
	if _, err := r.Lab.Link(r.Router, r.Servers[1], []netip.Prefix{netip.MustParsePrefix("198.19.5.1/24")}, []netip.Prefix{netip.MustParsePrefix("198.19.5.2/24")}, lab.LinkOptions{AName: "side", BName: "side"}); err != nil {
		t.Fatal(err)
	}
	if err := r.Servers[1].AddRoute(netip.PrefixFrom(r.SNIP(), 32), netip.MustParseAddr("198.19.5.1")); err != nil {
		t.Fatal(err)
	}
	w := r.startWith(strings.Replace(r.custom([]string{r.VIP().String()}, []string{r.Server(0).String(), r.Server(1).String()}, ""),
		"    servers:\n", "    timeouts: {connect: 500ms}\n    servers:\n", 1))
	watch := r.watchOn(
		leg{r.ClientLeg, r.isVIP, nil}, leg{r.ServerLeg, r.isSNIP, func(s ladder.Segment) bool { return r.isVIP(s.Src) || r.isClient(s.Src) }})
	// Requests that were to go to the second server go to the first.
	r.mustLoad(100, r.VIP())
	if n := r.metric(`weir_firewall_packets_total{counter="misplaced"}`); n == 0 {
		t.Error("no rule has counted the refusal")
	}
	watch.judge()
	r.stop(w)
}
