// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"net/netip"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/nft"
)

// TestInspectAll: with firewall.inspect: all the existing rules judge every
// packet of a client, so that a ban ends a running connection too; without,
// the running connection goes on (TestBanOfOneServed is that control).
func TestInspectAll(t *testing.T) {
	for _, routed := range []bool{false, true} {
		t.Run(map[bool]string{false: "VIP local", true: "VIP routed"}[routed], func(t *testing.T) {
			r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, Routed: routed})
			r.serve(r.both)
			r.config.Extra = "firewall: {inspect: all}\n"
			hook := "input"
			if routed {
				hook = "forward"
			}
			// Bans in front, then what is established, and one port; as many
			// hosts have it, with the one rule that inspect: all needs.
			r.nft("table inet host {\nset banned { type ipv4_addr; }\nset banned6 { type ipv6_addr; }\nchain i {\ntype filter hook " + hook + " priority 0; policy drop;\n" +
				acceptMark + "\nip saddr @banned drop\nip6 saddr @banned6 drop\nct state established,related accept\nct state invalid drop\n" +
				"tcp flags & (fin|syn|rst|ack) != syn ct state new drop\ntcp dport 80 ct state new accept\nmeta l4proto { icmp, ipv6-icmp } accept\n}\n}\n")
			w := r.start()
			watch := r.watch()
			inspect := func() []nft.Finding {
				var found []nft.Finding
				p := r.params()
				p.InspectAll = true
				if err := r.Router.Do(func() (err error) { found, err = nft.Foreign(p); return err }); err != nil {
					t.Fatal(err)
				}
				return found
			}
			found := inspect()
			if len(found) != 1 || found[0].Trouble != nft.DropsClient {
				t.Fatalf("found %v, want one chain that drops untracked packets", found)
			}
			vips := []netip.AddrPort{r.VIP(), r.VIP6()}
			atOnce(vips, func(vip netip.AddrPort) {
				if err := ask(r.Clients[0], vip, "/before", time.Second); err == nil {
					t.Errorf("%v: a request is served by rules that refuse untracked packets", vip)
				}
			})
			r.nft(documented(t, "firewalls.md", "nft inspect"))
			if found := inspect(); len(found) != 0 {
				t.Fatalf("found %v", found)
			}
			r.mustLoad(1000, vips...)
			running := map[netip.AddrPort]*connection{}
			for _, vip := range vips {
				running[vip] = keep(t, r.Clients[0], vip)
			}
			r.nft("add element inet host banned { 198.18.0.11 }\nadd element inet host banned6 { 2001:db8:18::b }")
			atOnce(vips, func(vip netip.AddrPort) {
				if err := running[vip].get("/two", time.Second); err == nil {
					t.Errorf("%v: the running connection of a banned client is served", vip)
				}
				if err := ask(r.Clients[0], vip, "/three", time.Second); err == nil {
					t.Errorf("%v: a new connection of a banned client is served", vip)
				}
			})
			r.nft("delete element inet host banned { 198.18.0.11 }\ndelete element inet host banned6 { 2001:db8:18::b }")
			for _, vip := range vips {
				if err := ask(r.Clients[0], vip, "/four", 20*time.Second); err != nil {
					t.Errorf("%v: %v", vip, err)
				}
			}
			watch.judge()
			r.stop(w)
		})
	}
}
