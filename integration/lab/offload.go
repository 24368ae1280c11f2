// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The classic ethtool commands, from linux/ethtool.h. The unix package has no
// names for them.
const (
	ethtoolSRXCSUM = 0x15
	ethtoolSTXCSUM = 0x17
	ethtoolSSG     = 0x19
	ethtoolSTSO    = 0x1f
	ethtoolSGSO    = 0x24
	ethtoolGTSO    = 0x1e
	ethtoolSGRO    = 0x2c
)

// ethtoolValue is struct ethtool_value.
type ethtoolValue struct{ cmd, data uint32 }

// ifreqData is struct ifreq with its pointer member. The union is 16 bytes
// long on 32-bit and 24 on 64-bit machines; the tail covers both.
type ifreqData struct {
	name [unix.IFNAMSIZ]byte
	data unsafe.Pointer
	_    [24 - unsafe.Sizeof(uintptr(0))]byte
}

// SetOffload switches segmentation offload, receive coalescing and transmit
// checksum offload of an interface on or off.
func (h *Host) SetOffload(iface string, on bool) error {
	// Off: checksums go last, because they take the others with them. On: they
	// come first, because the others need them.
	cmds := []uint32{ethtoolSGRO, ethtoolSGSO, ethtoolSTSO, ethtoolSSG, ethtoolSTXCSUM}
	v := uint32(0)
	if on {
		v = 1
		for i, j := 0, len(cmds)-1; i < j; i, j = i+1, j-1 {
			cmds[i], cmds[j] = cmds[j], cmds[i]
		}
	}
	for _, c := range cmds {
		if _, err := h.ethtool(iface, c, v); err != nil {
			return fmt.Errorf("lab: host %s: interface %s: ethtool command %#x: %w", h.name, iface, c, err)
		}
	}
	return nil
}

// Offload reports whether an interface takes segments above its MTU from TCP
// (TSO).
func (h *Host) Offload(iface string) (bool, error) {
	v, err := h.ethtool(iface, ethtoolGTSO, 0)
	if err != nil {
		return false, fmt.Errorf("lab: host %s: interface %s: ethtool: %w", h.name, iface, err)
	}
	return v != 0, nil
}

func (h *Host) ethtool(iface string, cmd, value uint32) (uint32, error) {
	var v ethtoolValue
	err := h.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if len(iface) >= unix.IFNAMSIZ {
			return errors.New("interface name too long")
		}
		v = ethtoolValue{cmd: cmd, data: value}
		req := ifreqData{data: unsafe.Pointer(&v)}
		copy(req.name[:], iface)
		var pin runtime.Pinner
		pin.Pin(&v)
		defer pin.Unpin()
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
			return errno
		}
		return nil
	})
	return v.data, err
}
