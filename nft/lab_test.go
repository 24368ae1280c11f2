// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/weirgate/weir/internal/require"
)

// newNetns moves the test's thread into a new network namespace with lo up,
// and back when the test ends; the namespace has no name and goes with its
// last user.
func newNetns(t *testing.T) {
	t.Helper()
	require.Netns(t)
	runtime.LockOSThread()
	old, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	fresh, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Set(old); err != nil {
			t.Errorf("back to the first network namespace: %v", err)
			return // the thread stays locked, and ends with the goroutine
		}
		fresh.Close()
		old.Close()
		runtime.UnlockOSThread()
	})
	up(t, "lo")
}

// lab is a client and a server host with a router between them, each a network
// namespace. The test's thread is in the router's.
//
//	client 198.18.1.2 -- 198.18.1.1 router 198.18.2.1 -- 198.18.2.2 server
//	2001:db8:1::2 -- 2001:db8:1::1        2001:db8:2::1 -- 2001:db8:2::2
//
// The router has the VIPs 203.0.113.10 and 2001:db8:9::10 on lo.
type lab struct {
	client, router, server netns.NsHandle
}

var (
	client4, client6 = netip.MustParseAddr("198.18.1.2"), netip.MustParseAddr("2001:db8:1::2")
	server4, server6 = netip.MustParseAddr("198.18.2.2"), netip.MustParseAddr("2001:db8:2::2")
	snip4, snip6     = netip.MustParseAddr("198.18.2.1"), netip.MustParseAddr("2001:db8:2::1")
	vip4, vip6       = netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("2001:db8:9::10")
)

func newLab(t *testing.T) *lab {
	t.Helper()
	newNetns(t)
	router, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{router: router}
	noDAD(t)
	t.Cleanup(func() { l.router.Close() })
	for _, side := range []struct {
		ns       *netns.NsHandle
		link     string
		mine     []string
		theirs   []string
		gateways []string
	}{
		{&l.client, "cli", []string{"198.18.1.1/24", "2001:db8:1::1/64"}, []string{"198.18.1.2/24", "2001:db8:1::2/64"}, []string{"198.18.1.1", "2001:db8:1::1"}},
		{&l.server, "srv", []string{"198.18.2.1/24", "2001:db8:2::1/64"}, []string{"198.18.2.2/24", "2001:db8:2::2/64"}, []string{"198.18.2.1", "2001:db8:2::1"}},
	} {
		ns, err := netns.New()
		if err != nil {
			t.Fatal(err)
		}
		*side.ns = ns
		noDAD(t)
		t.Cleanup(func() { ns.Close() })
		if err := netns.Set(l.router); err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: side.link}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}); err != nil {
			t.Fatal(err)
		}
		address(t, side.link, side.mine...)
		l.in(t, ns, func() {
			up(t, "lo")
			address(t, "eth0", side.theirs...)
			for _, g := range side.gateways {
				if err := netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(g)}); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
	address(t, "lo", "203.0.113.10/32", "2001:db8:9::10/128")
	sysctl(t, "net.ipv4.ip_forward", "1")
	sysctl(t, "net.ipv6.conf.all.forwarding", "1")
	// IPv6 addresses come into force when the kernel has noticed the carrier.
	for _, side := range []struct {
		ns    netns.NsHandle
		links []string
	}{{l.router, []string{"cli", "srv"}}, {l.client, []string{"eth0"}}, {l.server, []string{"eth0"}}} {
		l.in(t, side.ns, func() {
			for _, name := range side.links {
				eventually(t, "the IPv6 addresses of "+name+" are in force", func() bool { return ready(t, name) })
			}
		})
	}
	return l
}

// noDAD makes the link-local addresses of later interfaces usable at once:
// without one, a host cannot ask for a neighbour on behalf of a foreign source.
func noDAD(t *testing.T) {
	t.Helper()
	sysctl(t, "net.ipv6.conf.default.accept_dad", "0")
}

// in runs f in another of the lab's namespaces.
func (l *lab) in(t *testing.T, ns netns.NsHandle, f func()) {
	t.Helper()
	if err := netns.Set(ns); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := netns.Set(l.router); err != nil {
			t.Fatal(err)
		}
	}()
	f()
}

// ready: the interface has a link-local address, and all its IPv6 addresses
// are known to the routing.
func ready(t *testing.T, name string) bool {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V6)
	if err != nil {
		t.Fatal(err)
	}
	linkLocal := false
	for _, a := range addrs {
		if a.Flags&0x40 != 0 { // IFA_F_TENTATIVE
			return false
		}
		if a.IP.IsLinkLocalUnicast() {
			linkLocal = true
			continue
		}
		ip, _ := netip.AddrFromSlice(a.IP)
		if ok, err := isLocal(ip); err != nil || !ok {
			return false
		}
	}
	return linkLocal
}

func up(t *testing.T, name string) netlink.Link {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	return link
}

func address(t *testing.T, name string, addrs ...string) {
	t.Helper()
	link := up(t, name)
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		addr.Flags = 0x02 // IFA_F_NODAD: usable at once
		if err := netlink.AddrAdd(link, addr); err != nil {
			t.Fatalf("%s on %s: %v", a, name, err)
		}
		// The kernel makes the route to an IPv6 address a little later.
		ip, _ := netip.AddrFromSlice(addr.IP)
		for deadline := time.Now().Add(5 * time.Second); ; runtime.Gosched() {
			if local, err := isLocal(ip.Unmap()); local {
				break
			} else if time.Now().After(deadline) {
				t.Fatalf("%s on %s does not become an address of the host: %v", a, name, err)
			}
		}
	}
}

func sysctl(t *testing.T, name, value string) {
	t.Helper()
	if err := hostSysctls.write(name, value); err != nil {
		t.Fatal(err)
	}
}

// nftList is the output of nft list in the thread's namespace; a trailing -a
// asks for handles.
func nftList(t *testing.T, args ...string) string {
	t.Helper()
	args = append([]string{"list"}, args...)
	if n := len(args) - 1; args[n] == "-a" {
		args = append([]string{"-a"}, args[:n]...)
	}
	out, err := nftRun(t, "", args...)
	if err != nil {
		t.Fatalf("nft list %v: %v\n%s", args, err, out)
	}
	return out
}

// nftLoad loads a file of rules.
func nftLoad(t *testing.T, text string) {
	t.Helper()
	if out, err := nftRun(t, text, "-f", "-"); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
}

func nftRun(t *testing.T, stdin string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(require.Tool(t, "nft"), args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// eventually waits until the condition holds; what describes it.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// params are those of the lab: one farm of both families.
func labParams() Params {
	return Params{
		Table: "weir", Mark: 0x57000000, MarkMask: 0xff000000,
		VIPs:      []netip.AddrPort{netip.AddrPortFrom(vip4, 80), netip.AddrPortFrom(vip6, 80)},
		Servers:   []netip.AddrPort{netip.AddrPortFrom(server4, 8080), netip.AddrPortFrom(server6, 8080)},
		SNIPs:     []netip.Addr{snip4, snip6},
		PortFirst: 10240, PortLast: 32767,
		QueueFirst: 22272, Shards: 1,
	}
}

// probed is the kernel's features; a kernel without a queue skips.
func probed(t *testing.T) Kernel {
	t.Helper()
	k, err := Probe()
	if err != nil {
		require.Missing(t, "nfqueue", fmt.Sprint(err))
	}
	return k
}
