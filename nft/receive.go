// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// LargeReceive names those of the interfaces, in the network namespace of the
// calling thread, that merge packets as they receive them so that they cannot
// be cut again (LRO, not GRO). The kernel switches that off where it forwards,
// and refuses to forward what was merged so. Interfaces that cannot be asked
// do not do it.
func LargeReceive(ifaces ...string) ([]string, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("nft: asking interfaces: %w", err)
	}
	defer unix.Close(fd)
	var out []string
	for _, name := range ifaces {
		flags, err := ethtoolFlags(fd, name)
		switch {
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENODEV):
		case err != nil:
			return nil, fmt.Errorf("nft: offload of interface %s: %w", name, err)
		case flags&ethFlagLRO != 0:
			out = append(out, name)
		}
	}
	return out, nil
}

// From linux/ethtool.h.
const (
	ethtoolGFlags = 0x25
	ethFlagLRO    = 1 << 15
)

// ethtoolFlags asks for an interface's offload flags (struct ethtool_value
// behind the pointer of a struct ifreq, whose union is 24 bytes long at most).
func ethtoolFlags(fd int, iface string) (uint32, error) {
	v := struct{ cmd, data uint32 }{cmd: ethtoolGFlags}
	var req struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [24 - unsafe.Sizeof(uintptr(0))]byte
	}
	if len(iface) >= len(req.name) {
		return 0, unix.ENODEV
	}
	copy(req.name[:], iface)
	req.data = unsafe.Pointer(&v)
	var pin runtime.Pinner
	pin.Pin(&v)
	defer pin.Unpin()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return 0, errno
	}
	return v.data, nil
}
