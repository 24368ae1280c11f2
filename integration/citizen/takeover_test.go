// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
	"github.com/weirgate/weir/internal/require"
)

// keepalived runs it on a host with a configuration of docs/topologies.md.
func (r *rig) keepalived(h *lab.Host, which string) *lab.Process {
	r.t.Helper()
	tool := require.Tool(r.t, "keepalived")
	dir, err := r.Lab.Subdir("keepalived-" + which)
	if err != nil {
		r.t.Fatal(err)
	}
	conf := filepath.Join(dir, "keepalived.conf")
	if err := os.WriteFile(conf, []byte(documented(r.t, "topologies.md", "keepalived "+which)), 0o644); err != nil {
		r.t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		log.Close()
		if b, err := os.ReadFile(log.Name()); err == nil && r.t.Failed() {
			r.t.Logf("keepalived %s wrote:\n%s", which, b)
		}
	})
	cmd := h.Command(tool, "--vrrp", "--dont-fork", "--log-console", "--use-file", conf, "--pid", dir+"/pid", "--vrrp_pid", dir+"/vrrp")
	cmd.Stdout, cmd.Stderr = log, log
	p, err := h.Start(cmd)
	if err != nil {
		r.t.Fatal(err)
	}
	return p
}

// holds says whether an interface of a host has an address.
func holds(t *testing.T, h *lab.Host, iface string, a netip.Addr) bool {
	t.Helper()
	l, err := h.Netlink().LinkByName(iface)
	if err != nil {
		t.Fatal(err)
	}
	list, err := h.Netlink().AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(list, func(x netlink.Addr) bool { return x.IP.Equal(a.AsSlice()) })
}

// TestTakeover: of two routers with keepalived, as documented, one loses its
// links. New connections are served by the other as soon as it has the
// address, connections from before are reset, no packet leaves untranslated,
// and the first router's return changes nothing. An orderly end of keepalived
// gives the address back at once.
func TestTakeover(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	require.Tool(t, "keepalived")
	r.serve(r.both)
	gateways := []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("2001:db8:18::1")}
	vips := []netip.AddrPort{r.VIP(), r.VIP6()}
	hasAddress := func(h *lab.Host) bool { return holds(t, h, "lan", gateways[0]) && holds(t, h, "lan", gateways[1]) }
	a := r.Router
	b, err := r.Lab.NewHost("router-b")
	if err != nil {
		t.Fatal(err)
	}
	prefix := netip.MustParsePrefix
	for _, side := range []struct{ sw, ofB, ofB6 string }{{"lan", "198.18.0.4/16", "2001:db8:18::4/64"}, {"dmz", "198.51.100.4/24", "2001:db8:51::4/64"}} {
		if _, err := r.Lab.Plug(b, r.Lab.Host(side.sw), []netip.Prefix{prefix(side.ofB), prefix(side.ofB6)}, lab.LinkOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(
		b.Forwarding(true), b.AddAddr("lo", single(r.VIP().Addr())), b.AddAddr("lo", single(r.VIP6().Addr())),
		a.DelAddr("lan", prefix("198.18.0.1/16")), a.AddAddr("lan", prefix("198.18.0.3/16")), a.AddAddr("dmz", prefix("198.51.100.3/24")),
		a.AddAddr("lan", prefix("2001:db8:18::3/64")), a.DelAddr("lan", prefix("2001:db8:18::1/64")), a.AddAddr("dmz", prefix("2001:db8:51::3/64")),
		a.Settle(within(t, 20*time.Second)), b.Settle(within(t, 20*time.Second)),
	); err != nil {
		t.Fatal(err)
	}
	servers := texts(append(r.both(0), r.both(1)...))
	onA := r.startWith(r.custom(texts(vips), servers, "source: {addresses: [198.51.100.3, \"2001:db8:51::3\"]}\n"))
	snips := []netip.Addr{
		netip.MustParseAddr("198.51.100.3"), netip.MustParseAddr("198.51.100.4"),
		netip.MustParseAddr("2001:db8:51::3"), netip.MustParseAddr("2001:db8:51::4"),
	}
	isSNIP := func(x netip.AddrPort) bool {
		return slices.Contains(snips, x.Addr()) && x.Port() >= 10240 && x.Port() <= 32767
	}
	legs := []leg{
		{"lan", r.isVIP, func(s ladder.Segment) bool { return r.isServer(s.Src) || r.isServer(s.Dst) }},
		{"dmz", isSNIP, func(s ladder.Segment) bool { return r.isVIP(s.Src) || r.isClient(s.Src) || r.isClient(s.Dst) }},
	}
	watchA := r.watchOn(legs...)
	// The rest of the rig is router B's.
	second := *r
	second.Farm = &lab.Farm{}
	*second.Farm = *r.Farm
	second.Router = b
	for _, d := range []struct {
		name string
		to   *string
	}{{"weir-b", &second.dir}, {"weir-b/run", &second.run}} {
		if *d.to, err = r.Lab.Subdir(d.name); err != nil {
			t.Fatal(err)
		}
	}
	second.config.Dir = second.run
	onB := second.startWith(second.custom(texts(vips), servers, "source: {addresses: [198.51.100.4, \"2001:db8:51::4\"]}\n"))
	watchB := second.watchOn(legs...)

	r.keepalived(a, "A")
	until(t, 20*time.Second, "router A to take the addresses", func() bool { return hasAddress(a) })
	byB := r.keepalived(b, "B")
	r.mustLoad(300, vips...)

	// Connections that have served and wait, some whose upload is under way.
	open := func(vip netip.AddrPort, request string) net.Conn {
		t.Helper()
		c, err := r.Clients[0].Dial(within(t, 60*time.Second), "tcp", vip.String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(60 * time.Second))
		if _, err := fmt.Fprint(c, request); err != nil {
			t.Fatal(err)
		}
		return c
	}
	before := map[string]net.Conn{}
	for _, vip := range vips {
		waits := open(vip, "GET /one HTTP/1.1\r\nHost: x\r\n\r\n")
		if _, err := waits.Read(make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		before["the waiting connection to "+vip.String()] = waits
		before["the upload to "+vip.String()] = open(vip, "POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
	}

	// The cables are pulled at the switches.
	cut := time.Now()
	if err := errors.Join(r.Lab.Host("lan").SetDown("router"), r.Lab.Host("dmz").SetDown("router")); err != nil {
		t.Fatal(err)
	}
	served := func(path string) {
		t.Helper()
		for _, vip := range vips {
			until(t, 30*time.Second, "a request to be served by "+vip.String(), func() bool { return ask(r.Clients[0], vip, path, time.Second) == nil })
		}
	}
	until(t, 30*time.Second, "router B to take the addresses", func() bool { return hasAddress(b) })
	taken := time.Since(cut)
	served("/again")
	t.Logf("after the cut: router B had the addresses after %v, served after %v", taken.Round(time.Millisecond), time.Since(cut).Round(time.Millisecond))
	r.mustLoad(500, vips...)
	for name, c := range before {
		var err error
		for err == nil { // an upload ends when a segment is answered
			if _, err = c.Write(pattern(1000)); err == nil {
				time.Sleep(time.Millisecond)
			}
		}
		if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("%s from before ends with %v, want a reset", name, err)
		}
	}

	// The first router comes back, and nothing moves.
	if err := errors.Join(r.Lab.Host("lan").SetUp("router"), r.Lab.Host("dmz").SetUp("router")); err != nil {
		t.Fatal(err)
	}
	r.mustLoad(300, vips...)
	for _, gateway := range gateways {
		if holds(t, a, "lan", gateway) || !holds(t, b, "lan", gateway) {
			t.Errorf("%v moved back by itself", gateway)
		}
	}

	// An orderly end: B says so, A takes over.
	if err := byB.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	until(t, 30*time.Second, "router A to take the addresses back", func() bool { return hasAddress(a) })
	served("/back")
	r.mustLoad(300, vips...)
	watchA.judge()
	watchB.judge()
	r.stop(onA)
	second.stop(onB)
}
