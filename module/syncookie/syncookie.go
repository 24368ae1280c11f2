// SPDX-License-Identifier: Apache-2.0

// Package syncookie answers SYNs in the kernel, as engine.Handshake does: the
// same cookie, the same segment, and the same memory of what was answered. It is
// a BPF program at the output of lo, where the ruleset sends a copy of every
// plain SYN to a VIP that the existing rules have let through (nft.Params.SYNToLo).
// What the program does not answer goes on by lo, to the SYN queue: SYNs to what
// is no VIP of its table, with data, with IP options or extension headers, with
// unusual TCP options, and the first of every slot of the cookies. So does every
// SYN when nobody has attached it.
//
// It costs a fifth of the way through a queue and two threads, which floods of
// SYNs and requests of one connection each are the most glad of (RFC 4987).
package syncookie

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/module/engine"
)

// ErrUnsupported: the kernel cannot answer SYNs.
var ErrUnsupported = errors.New("the kernel cannot answer SYNs: it needs Linux 6.10 with CONFIG_BPF_SYSCALL and tcx (CONFIG_NET_XGRESS)")

// Config is what the program has to know besides the format of the cookies.
type Config struct {
	Secret         [16]byte // of the cookies
	Mark, MarkMask uint32   // of the SYNs that are meant, and of the answers
	MSS4, MSS6     uint16   // announced to clients
	// Offset is by how many nanoseconds the engine's clock is ahead of the
	// monotonic clock. The program's time must not be later than the engine's.
	Offset int64
	// Memory is a descriptor of what a predecessor left by Memory, which is
	// then the Answerer's; 0 for none.
	Memory int
}

// Answerer is the program with its tables. It is safe for concurrent use.
type Answerer struct {
	config Config
	mu     sync.Mutex
	prog   *ebpf.Program
	vips   *ebpf.Map // address and port -> 0
	memory *ebpf.Map
	mapped []byte
	link   link.Link
	listed map[[keyLen]byte]bool
}

const (
	keyLen   = 20
	mostVIPs = 1 << 16 // others are answered by the queue
	lo       = 1       // its number in every network namespace
)

// New makes the tables. Nothing is answered before Attach, and then SYNs to the
// VIPs of Update only. Errors match ErrUnsupported, or say what the kernel refused.
func New(c Config) (*Answerer, error) {
	if *(*byte)(unsafe.Pointer(&[]uint16{1}[0])) != 1 {
		return nil, fmt.Errorf("syncookie: %w (and a processor with the lower byte first)", ErrUnsupported)
	}
	_ = rlimit.RemoveMemlock() // a failure shows when the maps are made
	a := &Answerer{config: c, listed: map[[keyLen]byte]bool{}}
	if err := a.load(c); err != nil {
		if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("%w (%w)", ErrUnsupported, err)
		}
		return nil, errors.Join(fmt.Errorf("syncookie: %w", err), a.Close())
	}
	return a, nil
}

func (a *Answerer) load(c Config) error {
	if err := probe(); err != nil {
		return err
	}
	f := engine.CookieFormat()
	spec := ebpf.MapSpec{
		Name: "weir_handshakes", Type: ebpf.Array, KeySize: 4, ValueSize: uint32((f.Size + 7) &^ 7), MaxEntries: 1,
		Flags: unix.BPF_F_MMAPABLE,
	}
	var err error
	if c.Memory > 0 {
		if a.memory, err = ebpf.NewMapFromFD(c.Memory); err != nil {
			return fmt.Errorf("the predecessor's memory: %w", err)
		}
		if a.memory.Type() != spec.Type || a.memory.ValueSize() != spec.ValueSize || a.memory.Flags() != spec.Flags {
			return errors.New("the predecessor's memory has another format")
		}
	} else if a.memory, err = ebpf.NewMap(&spec); err != nil {
		return fmt.Errorf("memory: %w", err)
	}
	if a.mapped, err = unix.Mmap(a.memory.FD(), 0, f.Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("memory: %w", err)
	}
	if a.vips, err = ebpf.NewMap(&ebpf.MapSpec{
		Name: "weir_vips", Type: ebpf.Hash, KeySize: keyLen, ValueSize: 8, MaxEntries: mostVIPs, Flags: unix.BPF_F_NO_PREALLOC,
	}); err != nil {
		return fmt.Errorf("table of VIPs: %w", err)
	}
	return nil
}

// Load has the kernel verify the program, which takes a quarter of a second
// without CAP_PERFMON. Attach does it if nobody has.
func (a *Answerer) Load() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.prog != nil || a.memory == nil {
		return nil
	}
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "weir_syn", Type: ebpf.SchedCLS, License: license,
		Instructions: program(parameters{Config: a.config, Format: engine.CookieFormat(), vips: a.vips, memory: a.memory}),
	})
	if err != nil {
		return fmt.Errorf("syncookie: program: %w", err)
	}
	a.prog = p
	return nil
}

// license of the program, one under which the kernel lends it the lookup of
// routes.
const license = "Dual MIT/GPL"

// probe asks for a lookup of routes by mark (Linux 6.10).
func probe() error {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "weir_probe", Type: ebpf.SchedCLS, License: license,
		Instructions: join(is(asm.Mov.Reg(asm.R6, asm.R1), asm.Mov.Imm(asm.R0, 0)), zeros(fib, 64), is(
			asm.StoreImm(asm.RFP, fib, unix.AF_INET, asm.Byte), asm.StoreImm(asm.RFP, fib+8, lo, asm.Word),
			asm.Mov.Reg(asm.R1, asm.R6)), at(asm.R2, fib), is(
			asm.Mov.Imm(asm.R3, 64), asm.Mov.Imm(asm.R4, fibSkipNeigh|fibMark), asm.FnFibLookup.Call(), asm.Return(),
		)),
	})
	if err != nil {
		return err
	}
	defer p.Close()
	code, err := p.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
	if err == nil && int32(code) == -int32(unix.EINVAL) {
		err = ErrUnsupported
	}
	return err
}

// Memory is what the program and a Handshake share (engine.Handshake.Share), and
// the descriptor by which a successor gets it. Both belong to the Answerer.
func (a *Answerer) Memory() (mem []byte, fd int) { return a.mapped, a.memory.FD() }

// Attach begins to answer, in the network namespace of the calling thread.
func (a *Answerer) Attach() error {
	if err := a.Load(); err != nil {
		return err
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: lo, Program: a.prog, Attach: ebpf.AttachTCXEgress})
	if err != nil {
		return fmt.Errorf("syncookie: attaching to lo: %w (%w)", ErrUnsupported, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.link = l
	return nil
}

// Update makes these the VIPs whose SYNs are answered; those to others go to the
// SYN queue.
func (a *Answerer) Update(vips []netip.AddrPort) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.vips == nil {
		return nil
	}
	want := make(map[[keyLen]byte]bool, len(vips))
	for _, v := range vips[:min(len(vips), mostVIPs)] {
		var k [keyLen]byte
		addr := v.Addr().As16()
		copy(k[:], addr[:])
		binary.BigEndian.PutUint16(k[16:], v.Port())
		want[k] = true
	}
	for k := range a.listed {
		if want[k] {
			continue
		}
		if err := a.vips.Delete(k[:]); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("syncookie: table of VIPs: %w", err)
		}
		delete(a.listed, k)
	}
	for k := range want {
		if a.listed[k] {
			continue
		}
		if err := a.vips.Put(k[:], uint64(0)); err != nil {
			return fmt.Errorf("syncookie: table of VIPs: %w", err)
		}
		a.listed[k] = true
	}
	return nil
}

// Close ends it: SYNs go to the SYN queue again. The shared memory stays mapped,
// because a handshake may still be looking at it. It may be called again.
func (a *Answerer) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	if a.link != nil {
		errs = append(errs, a.link.Close())
	}
	if a.prog != nil {
		errs = append(errs, a.prog.Close())
	}
	for _, m := range []*ebpf.Map{a.vips, a.memory} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	a.link, a.prog, a.vips, a.memory = nil, nil, nil, nil
	return errors.Join(errs...)
}
