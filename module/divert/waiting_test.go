// SPDX-License-Identifier: Apache-2.0

package divert_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/nftables"

	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module/divert"
	"github.com/weirgate/weir/nft"
)

// TestStartKeepsWaiting: the kernel drops what waits in all queues of a network
// namespace, and counts nothing, whenever a hook goes there
// (nf_unregister_net_hook), even one of a transaction that was given up. What an
// engine asks of the kernel, and does to it, at its start must not be the end of
// the packets that its predecessor left.
func TestStartKeepsWaiting(t *testing.T) {
	require.NFQueue(t)
	const packets = 20
	params := nft.Params{
		Table: "weir", Mark: 0x57000000, MarkMask: 0xff000000,
		VIPs:      []netip.AddrPort{netip.MustParseAddrPort("203.0.113.10:80"), netip.MustParseAddrPort("[2001:db8:203::10]:80")},
		Servers:   []netip.AddrPort{at(server4, 80), at(server6, 80)},
		SNIPs:     []netip.Addr{netip.MustParseAddr("198.51.100.77"), netip.MustParseAddr("2001:db8:51::77")},
		PortFirst: 10240, PortLast: 32767, QueueFirst: 22272, Shards: 1,
	}
	install := func() error {
		k, err := nft.Probe()
		if err != nil {
			return err
		}
		f, err := nft.Install(params, k)
		if err != nil {
			return err
		}
		return f.Leave()
	}
	for _, c := range []struct {
		name string
		left int
		do   func(l *lab) error
	}{
		{"probe", packets, func(*lab) error { _, err := nft.Probe(); return err }},
		{"probe of the guard", packets, func(*lab) error { return nft.ProbeGuard() }},
		{"rules", packets, func(*lab) error { return install() }},
		// The control: any chain with a hook that goes.
		{"a chain goes", 0, func(l *lab) error {
			c, err := nftables.New(nftables.WithNetNSFd(int(l.router)))
			if err != nil {
				return err
			}
			chain := c.AddChain(&nftables.Chain{
				Name: "gone", Table: labTable, Hooknum: nftables.ChainHookOutput,
				Priority: nftables.ChainPriorityFilter, Type: nftables.ChainTypeFilter,
			})
			if err := c.Flush(); err != nil {
				return err
			}
			c.DelChain(chain)
			return c.Flush()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			l.in(l.router, func() { l.must(install()) }) // the predecessor's
			l.queueRule()
			l.hold(divert.Config{GSO: true})
			from := l.udp(l.client, at(client4, 4000))
			l.udp(l.server, at(server4, 5000))
			for i := range packets {
				l.sendUDP(from, at(server4, 5000), []byte(fmt.Sprint(i)))
			}
			l.queued(packets)
			l.in(l.router, func() { l.must(c.do(l)) })
			l.queued(c.left)
		})
	}
}
