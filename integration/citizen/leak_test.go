// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// TestJudgeFindsLeaks is the control of every watch here: a table that takes
// clients' packets away from weir, translates their addresses and ports alone
// and sends them on within connections to servers. The judge of the captures
// finds them by their numbers; and it finds those that pass as they are.
func TestJudgeFindsLeaks(t *testing.T) {
	const conns = 4 // a foreign number passes for right with probability 1/256
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 1})
	r.serve(r.both)
	w := r.start()
	watch := r.watch()
	for _, f := range []struct {
		word, any    string
		vip, server  netip.AddrPort
		snip, client netip.Addr
	}{
		{"ip", "0.0.0.0", r.VIP(), r.Server(0), r.SNIP(), r.ClientAddr(0)},
		{"ip6", "::", r.VIP6(), r.Server6(0), r.SNIP6(), r.ClientAddr6(0)},
	} {
		var clients []*connection
		var ports []string
		for range conns {
			clients = append(clients, keep(t, r.Clients[0], f.vip))
		}
		established, err := r.Servers[0].Run(within(t, 20*time.Second), "/bin/sh", "-c", "PATH=$PATH:/usr/sbin:/sbin; ss -Htn state established")
		if err != nil {
			t.Fatal(err)
		}
		for _, field := range strings.Fields(string(established)) {
			if a, err := netip.ParseAddrPort(field); err == nil && a.Addr() == f.snip {
				ports = append(ports, fmt.Sprint(a.Port()))
			}
		}
		if len(ports) == 0 {
			t.Fatalf("no connection from %v at the server: %s", f.snip, established)
		}
		var as []string
		for i, c := range clients {
			as = append(as, fmt.Sprintf("%d : %s", netip.MustParseAddrPort(c.LocalAddr().String()).Port(), ports[i%len(ports)]))
		}
		r.nft(fmt.Sprintf(`table %[1]s leak {
	chain in {
		type filter hook prerouting priority -400;
		%[1]s saddr %[2]v tcp dport 80 %[1]s daddr %[3]v tcp flags & syn == 0 notrack %[1]s daddr set %[4]v
	}
	chain out {
		type filter hook postrouting priority 0;
		oifname "dmz" %[1]s saddr %[2]v %[1]s daddr %[4]v tcp sport set tcp sport map { %[5]s } %[1]s saddr set %[6]v
	}
}
`, f.word, f.client, f.vip.Addr(), f.server.Addr(), strings.Join(as, ", "), f.snip))
		for _, c := range clients {
			if err := c.get("/leaks", 100*time.Millisecond); err == nil {
				t.Errorf("%v: a request is answered that weir has not seen", f.vip)
			}
		}
		r.shell("nft delete table " + f.word + " leak")
		// As it is, with the client's own address.
		r.nft(fmt.Sprintf("table %[1]s leak {\nchain in {\ntype filter hook prerouting priority -400;\n"+
			"%[1]s saddr %[2]v tcp dport 80 %[1]s daddr %[3]v tcp flags & syn == 0 notrack %[1]s daddr set %[4]v\n}\n}\n", f.word, f.client, f.vip.Addr(), f.server.Addr()))
		for _, c := range clients {
			_ = c.get("/leaks", 100*time.Millisecond)
		}
		r.shell("nft delete table " + f.word + " leak")
	}
	watch.end()
	bad := watch.legs[r.ServerLeg].bad
	for _, c := range []struct {
		from netip.Addr
		what string
	}{
		{r.SNIP(), "has a sequence number that is not of this connection"},
		{r.SNIP6(), "has a sequence number that is not of this connection"},
		{r.ClientAddr(0), "has no business on this side"},
		{r.ClientAddr6(0), "has no business on this side"},
	} {
		from := " " + strings.TrimSuffix(netip.AddrPortFrom(c.from, 0).String(), "0")
		if !slices.ContainsFunc(bad, func(b string) bool { return strings.Contains(b, from) && strings.Contains(b, c.what) }) {
			t.Errorf("the judge finds no packet of %v that %s, in %d findings", c.from, c.what, len(bad))
		}
	}
	r.stop(w)
}
