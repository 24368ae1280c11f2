// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/module/packet"
)

// ErrNoInjection: this kernel, or this process, cannot make packets come in by
// an interface.
var ErrNoInjection = errors.New("packets cannot be made to come in by an interface: it takes a kernel with BPF (CONFIG_BPF_SYSCALL) and the right to use it")

// injector makes packets appear where Weir's and its clients' packets do: at
// the output of the router, by raw sockets with the mark, and at the input of
// an interface. For the latter a BPF program is run on the packet, which hands
// a copy of it to that interface as received (bpf_clone_redirect).
type injector struct {
	raw4, raw6 int // sockets, -1 where the family is missing
	programs   map[string]*ebpf.Program
}

func newInjector(mark uint32) (*injector, error) {
	j := &injector{raw4: -1, raw6: -1, programs: map[string]*ebpf.Program{}}
	for _, s := range []struct {
		to     *int
		family int
	}{{&j.raw4, unix.AF_INET}, {&j.raw6, unix.AF_INET6}} {
		fd, err := unix.Socket(s.family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		switch {
		case errors.Is(err, unix.EPERM):
			return nil, errors.Join(fmt.Errorf("nft: tracing: %w", ErrPermission), j.Close())
		case errors.Is(err, unix.EAFNOSUPPORT):
			continue
		case err != nil:
			return nil, errors.Join(fmt.Errorf("nft: tracing: raw socket: %w", err), j.Close())
		}
		*s.to = fd
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
			return nil, errors.Join(fmt.Errorf("nft: tracing: mark of a raw socket: %w", err), j.Close())
		}
	}
	_ = rlimit.RemoveMemlock() // Kernels before 5.11 count BPF memory against this limit.
	return j, nil
}

// emit sends an IP packet from the router. That a chain ends it is no error.
func (j *injector) emit(data []byte) error {
	p, problem := packet.ParseTCP(data)
	if problem != packet.OK {
		return fmt.Errorf("nft: tracing: a probe that is no packet: %v", problem)
	}
	dst := p.Dst().AddrPort().Addr()
	var err error
	if dst.Is4() {
		err = unix.Sendto(j.raw4, data, 0, &unix.SockaddrInet4{Addr: dst.As4()})
	} else {
		err = unix.Sendto(j.raw6, data, 0, &unix.SockaddrInet6{Addr: dst.As16()})
	}
	if err == nil || errors.Is(err, unix.EPERM) {
		return nil
	}
	return fmt.Errorf("nft: tracing: sending to %v: %w", dst, err)
}

// receive has an IP packet come in by an interface.
func (j *injector) receive(iface string, data []byte) error {
	dev, err := net.InterfaceByName(iface)
	if err != nil {
		return fmt.Errorf("nft: tracing: interface %s: %w", iface, err)
	}
	prog := j.programs[iface]
	if prog == nil {
		prog, err = ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: "weir_inject", Type: ebpf.SchedCLS, License: "Apache-2.0",
			Instructions: asm.Instructions{
				asm.Mov.Imm(asm.R2, int32(dev.Index)),
				asm.Mov.Imm(asm.R3, 1), // BPF_F_INGRESS
				asm.FnCloneRedirect.Call(),
				asm.Return(),
			},
		})
		if err != nil {
			return fmt.Errorf("nft: tracing: %w (%w)", ErrNoInjection, err)
		}
		j.programs[iface] = prog
	}
	frame := make([]byte, 12, 14+len(data))
	copy(frame, dev.HardwareAddr)   // ours, or the packet would be somebody else's
	copy(frame[6:], "\x02weir\x01") // a locally administered address
	kind := uint16(unix.ETH_P_IP)
	if data[0]>>4 == 6 {
		kind = unix.ETH_P_IPV6
	}
	frame = append(binary.BigEndian.AppendUint16(frame, kind), data...)
	switch code, err := prog.Run(&ebpf.RunOptions{Data: frame}); {
	case err != nil:
		return fmt.Errorf("nft: tracing: %w (%w)", ErrNoInjection, err)
	case code != 0:
		return fmt.Errorf("nft: tracing: interface %s refuses a packet: %w", iface, unix.Errno(-int32(code)))
	}
	return nil
}

// Close closes sockets and programs.
func (j *injector) Close() error {
	var errs []error
	for _, fd := range []int{j.raw4, j.raw6} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	j.raw4, j.raw6 = -1, -1
	for _, p := range j.programs {
		errs = append(errs, p.Close())
	}
	j.programs = nil
	return errors.Join(errs...)
}

// finished is the packet of a trial with this sequence number and its
// checksums.
func finished(t *trial, seq uint32) ([]byte, error) {
	b := append([]byte(nil), t.bytes...)
	binary.BigEndian.PutUint32(b[t.tcpAt+4:], seq)
	if t.family == unix.NFPROTO_IPV4 {
		var sum uint32
		for i := 0; i < t.tcpAt; i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		binary.BigEndian.PutUint16(b[10:], ^uint16(sum))
	}
	p, problem := packet.ParseTCP(b)
	if problem != packet.OK {
		return nil, fmt.Errorf("nft: tracing: a probe that is no packet: %v", problem)
	}
	p.FillChecksum()
	return b, nil
}
