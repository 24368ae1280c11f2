// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"fmt"
	"net/netip"
	"sync/atomic"

	"github.com/vishvananda/netlink"

	"github.com/weirgate/weir/module/packet"
)

// Local knows the addresses of this host, as they come and go. Packets to them
// are delivered here, where the kernel verifies checksums that it would
// otherwise make anew when it cuts a super-packet.
type Local struct {
	set  atomic.Pointer[map[packet.Addr]struct{}]
	done chan struct{}
}

// WatchLocal starts to follow the addresses of the calling thread's network
// namespace. Close ends it.
func WatchLocal() (*Local, error) {
	l := &Local{done: make(chan struct{})}
	updates := make(chan netlink.AddrUpdate, 64)
	// Changes first, then what is there: an address is missed by neither.
	if err := netlink.AddrSubscribe(updates, l.done); err != nil {
		return nil, fmt.Errorf("nft: following the addresses: %w", err)
	}
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		close(l.done)
		return nil, fmt.Errorf("nft: listing the addresses: %w", err)
	}
	set := map[packet.Addr]struct{}{}
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			set[packet.AddrFrom(ip.Unmap())] = struct{}{}
		}
	}
	l.set.Store(&set)
	go l.follow(updates)
	return l, nil
}

func (l *Local) follow(updates <-chan netlink.AddrUpdate) {
	for u := range updates {
		ip, ok := netip.AddrFromSlice(u.LinkAddress.IP)
		if !ok {
			continue
		}
		next := map[packet.Addr]struct{}{}
		for a := range *l.set.Load() {
			next[a] = struct{}{}
		}
		if u.NewAddr {
			next[packet.AddrFrom(ip.Unmap())] = struct{}{}
		} else {
			delete(next, packet.AddrFrom(ip.Unmap()))
		}
		l.set.Store(&next)
	}
}

// Has reports whether packets to the address are delivered on this host. It
// neither locks nor allocates. The zero Local has none.
func (l *Local) Has(a packet.Addr) bool {
	if a.Is4() && a[12] == 127 {
		return true
	}
	set := l.set.Load()
	if set == nil {
		return false
	}
	_, ok := (*set)[a]
	return ok
}

// Close ends the following.
func (l *Local) Close() error {
	close(l.done)
	return nil
}
