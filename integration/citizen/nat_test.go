// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
)

// TestOthersNAT: source NAT and port forwards of others go on working while
// weir serves, also from the SNIP itself when it is shared.
func TestOthersNAT(t *testing.T) {
	for _, six := range []bool{false, true} {
		for _, shared := range []bool{false, true} {
			t.Run(map[bool]string{false: "IPv4", true: "IPv6"}[six]+map[bool]string{false: ", SNIP of its own", true: ", SNIP shared"}[shared], func(t *testing.T) {
				othersNAT(t, six, shared)
			})
		}
	}
}

func othersNAT(t *testing.T, six, shared bool) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.serve(r.both)
	vip, client, masquerade := r.VIP(), r.ClientAddr(0), r.SNIP()
	word, forward := "ip", netip.MustParseAddrPort("198.18.0.1:8082")
	servers := []netip.AddrPort{r.Server(0), r.Server(1)}
	if six {
		vip, client, masquerade = r.VIP6(), r.ClientAddr6(0), r.SNIP6()
		word, forward = "ip6", netip.MustParseAddrPort("[2001:db8:18::1]:8082")
		servers = []netip.AddrPort{r.Server6(0), r.Server6(1)}
	}
	other := func(i int) netip.AddrPort { return netip.AddrPortFrom(servers[i].Addr(), 8081) }
	for i, h := range r.Servers {
		if _, err := lab.HTTPServer(h, other(i).String(), handler(h.Name())); err != nil {
			t.Fatal(err)
		}
	}
	snip := masquerade
	if !shared {
		snip = netip.MustParseAddr("198.51.100.2")
		block := "sh snip4"
		if six {
			snip, block = netip.MustParseAddr("2001:db8:51::2"), "sh snip6"
		}
		r.shell(documented(t, "topologies.md", block))
	}
	r.nft(fmt.Sprintf("table %s nat {\nchain pre {\ntype nat hook prerouting priority dstnat;\n%[1]s daddr %v tcp dport %d dnat to %v\n}\n"+
		"chain post {\ntype nat hook postrouting priority srcnat;\noifname \"dmz\" masquerade\n}\n}\n", word, forward.Addr(), forward.Port(), other(1)))
	w := r.startWith(r.custom([]string{vip.String()}, texts(servers), fmt.Sprintf("source: {addresses: [%q], shared: %v}\n", snip, shared)))
	// Masqueraded connections use ports of the SNIP's range too, when it is
	// shared: they are judged like any others.
	watch := r.watchOn(
		leg{r.ClientLeg, r.isVIP, nil},
		leg{r.ServerLeg, func(a netip.AddrPort) bool { return r.isSNIP(a) || a.Addr() == snip },
			func(s ladder.Segment) bool { return r.isVIP(s.Src) || r.isClient(s.Src) || r.isClient(s.Dst) }},
	)
	stop := make(chan struct{})
	ended := make(chan []error)
	go func() {
		var errs []error
		for {
			select {
			case <-stop:
				ended <- errs
				return
			default:
				errs = append(errs, load(r.Clients[0], 100, vip)...)
			}
		}
	}()
	// Ports within the SNIP range, which masquerading keeps.
	ask := func(to netip.AddrPort, port int) error {
		d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: client.AsSlice(), Port: port}, Timeout: 10 * time.Second}
		c, err := r.Clients[0].DialWith(within(t, 10*time.Second), d, "tcp", to.String())
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		fmt.Fprintf(c, "GET /direct HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		b, err := io.ReadAll(c)
		if err != nil {
			return err
		}
		if want := " has /direct for " + netip.AddrPortFrom(masquerade, uint16(port)).String(); !strings.Contains(string(b), want) {
			return fmt.Errorf("%q, want it to have%s", b, want)
		}
		return nil
	}
	for i := range 20 {
		for k, to := range []netip.AddrPort{other(0), servers[0]} {
			if err := ask(to, 20000+2*i+k); err != nil {
				t.Errorf("masqueraded to %s: %v", to, err)
			}
		}
	}
	if err := ask(forward, 25000); err != nil {
		t.Errorf("the port forward: %v", err)
	}
	close(stop)
	for i, err := range <-ended {
		if i < 5 {
			t.Errorf("meanwhile: %v", err)
		}
	}
	watch.judge()
	r.stop(w)
}
