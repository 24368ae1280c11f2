// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestLargeReceive: virtual links do not merge, which is told, and so is an
// interface that is not there. That flags are read at all is seen by others of
// them: veth has those of VLANs.
func TestLargeReceive(t *testing.T) {
	newRouter(t)
	if got, err := LargeReceive("lan", "dmz", "lo", "absent"); err != nil || len(got) != 0 {
		t.Errorf("%q, %v", got, err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	const vlan = 1<<7 | 1<<8 // ETH_FLAG_TXVLAN, ETH_FLAG_RXVLAN
	if flags, err := ethtoolFlags(fd, "lan"); err != nil || flags&vlan == 0 {
		t.Errorf("flags %#x, %v", flags, err)
	}
}
