// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The guard stands outside nftables, at the last place before a packet leaves
// through an interface. Where a table cannot be owned, somebody else's "flush
// ruleset" opens a gap until the table is back, in which packets of diverted
// connections go on untranslated: to the router's own TCP, which answers what
// it does not know with a reset, or past a VIP that is merely routed. The
// guard drops both, and TCP repairs the loss.
//
// Dropped is TCP without our mark that
//
//	comes from a VIP, address and port;
//	goes to a VIP, on every interface but lo, where clients on the router
//	itself are at home;
//	is a reset from an SNIP with a port of the engine's range.

// ErrNoGuard: the kernel cannot run the guard.
var ErrNoGuard = errors.New("the kernel cannot run the guard: it needs CONFIG_BPF_SYSCALL, and tcx (6.6) or CONFIG_NET_CLS_BPF with CONFIG_NET_SCH_INGRESS")

// guardName is the name of our filter where it is one of clsact.
const guardName = "weir_guard"

// Guard is the program with its tables and where it is attached. It is safe
// for concurrent use; Attach and Close act in the network namespace of the
// calling thread.
type Guard struct {
	mu     sync.Mutex
	prog   *ebpf.Program
	vips   *ebpf.Map // guardPort -> 1
	snips  *ebpf.Map // address -> 1
	except *ebpf.Map // port -> 1
	drops  *ebpf.Map // one counter
	links  map[int]attached
}

// attached is one interface's attachment: a tcx link, or a filter of clsact.
type attached struct {
	tcx    link.Link
	qdisc  bool // we made the qdisc
	filter *netlink.BpfFilter
}

// mostGuarded bounds the addresses that the guard knows.
const mostGuarded = 4096

// NewGuard loads the program for these parameters. It guards nothing before
// Attach. ErrNoGuard means that the kernel cannot run it, ErrPermission that
// this process may not.
func NewGuard(p Params) (*Guard, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	// Kernels before 5.11 count BPF memory against this limit; a failure
	// shows when the maps are made.
	_ = rlimit.RemoveMemlock()
	g := &Guard{links: map[int]attached{}}
	if err := g.load(p); err != nil {
		return nil, errors.Join(guardError(err), g.Close())
	}
	if err := g.Update(p); err != nil {
		return nil, errors.Join(err, g.Close())
	}
	return g, nil
}

func guardError(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("nft: guard: %w", ErrPermission)
	case errors.Is(err, unix.ENOSYS), errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("nft: %w (%w)", ErrNoGuard, err)
	}
	return fmt.Errorf("nft: guard: %w", err)
}

func (g *Guard) load(p Params) error {
	for _, m := range []struct {
		to    **ebpf.Map
		spec  ebpf.MapSpec
		which string
	}{
		{&g.vips, ebpf.MapSpec{Type: ebpf.Hash, KeySize: 20, ValueSize: 1, MaxEntries: mostGuarded}, "VIPs"},
		{&g.snips, ebpf.MapSpec{Type: ebpf.Hash, KeySize: 16, ValueSize: 1, MaxEntries: mostGuarded}, "SNIPs"},
		{&g.except, ebpf.MapSpec{Type: ebpf.Hash, KeySize: 2, ValueSize: 1, MaxEntries: 1 << 16}, "ports"},
		{&g.drops, ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1}, "counter"},
	} {
		made, err := ebpf.NewMap(&m.spec)
		if err != nil {
			return fmt.Errorf("table of %s: %w", m.which, err)
		}
		*m.to = made
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: guardName, Type: ebpf.SchedCLS, License: "Apache-2.0", Instructions: g.program(p),
	})
	if err != nil {
		return fmt.Errorf("program: %w", err)
	}
	g.prog = prog
	return nil
}

// Offsets in struct __sk_buff.
const (
	skbMark     = 8
	skbProtocol = 16
	skbIfindex  = 40

	verdictNext = -1 // TCX_NEXT, TC_ACT_UNSPEC: whoever comes behind us decides
	verdictShot = 2  // TCX_DROP, TC_ACT_SHOT

	fromNetworkHeader = 1 // BPF_HDR_START_NET
)

// Places on the program's stack, below the frame pointer.
const (
	stackIP   = -40 // IP header, 20 or 40 bytes
	stackTCP  = -56 // TCP header up to the flags, 14 bytes
	stackKey  = -80 // guardPort
	stackZero = -84 // the counter's index
)

// program is the guard itself. Register 6 holds the packet, 7 the length of
// the network header, 8 the offset of the source address on the stack, 9 is
// scratch across calls.
func (g *Guard) program(p Params) asm.Instructions {
	swap16 := func(v uint16) int32 {
		return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)))
	}
	load := func(offset asm.Instruction, to, n int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R6),
			offset,
			asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, to),
			asm.Mov.Imm(asm.R4, n),
			asm.Mov.Imm(asm.R5, fromNetworkHeader),
			asm.FnSkbLoadBytesRelative.Call(),
			asm.JNE.Imm(asm.R0, 0, "pass"),
		}
	}
	// address copies 16 bytes of IPv6, or an IPv4 address in its mapped form,
	// from the stack into the key.
	copy6 := func(from int16) asm.Instructions {
		var out asm.Instructions
		for i := range int16(4) {
			out = append(out, asm.LoadMem(asm.R1, asm.RFP, from+4*i, asm.Word), asm.StoreMem(asm.RFP, stackKey+4*i, asm.R1, asm.Word))
		}
		return out
	}
	copy4 := func(from int16) asm.Instructions {
		return asm.Instructions{
			asm.StoreImm(asm.RFP, stackKey, 0, asm.Word),
			asm.StoreImm(asm.RFP, stackKey+4, 0, asm.Word),
			asm.StoreImm(asm.RFP, stackKey+8, 0, asm.Half),
			asm.StoreImm(asm.RFP, stackKey+10, -1, asm.Half),
			asm.LoadMem(asm.R1, asm.RFP, from, asm.Word),
			asm.StoreMem(asm.RFP, stackKey+12, asm.R1, asm.Word),
		}
	}
	port := func(from int16) asm.Instructions {
		return asm.Instructions{
			asm.LoadMem(asm.R1, asm.RFP, from, asm.Half),
			asm.StoreMem(asm.RFP, stackKey+16, asm.R1, asm.Half),
			asm.StoreImm(asm.RFP, stackKey+18, 0, asm.Half),
		}
	}
	lookup := func(m *ebpf.Map, key int32) asm.Instructions {
		return asm.Instructions{
			asm.LoadMapPtr(asm.R1, m.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, key),
			asm.FnMapLookupElem.Call(),
		}
	}
	label := func(name string, in asm.Instructions) asm.Instructions {
		in[0] = in[0].WithSymbol(name)
		return in
	}
	var out asm.Instructions
	add := func(parts ...asm.Instructions) {
		for _, part := range parts {
			out = append(out, part...)
		}
	}
	add(asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		// Ours may pass.
		asm.LoadMem(asm.R1, asm.R6, skbMark, asm.Word),
		asm.And.Imm32(asm.R1, int32(p.MarkMask)),
		asm.JEq.Imm32(asm.R1, int32(p.Mark), "pass"),
		asm.LoadMem(asm.R1, asm.R6, skbProtocol, asm.Word),
		asm.JEq.Imm(asm.R1, swap16(unix.ETH_P_IP), "ip"),
		asm.JEq.Imm(asm.R1, swap16(unix.ETH_P_IPV6), "ip6"),
		asm.Ja.Label("pass"),
	})
	// IPv4: TCP, not a later fragment.
	add(label("ip", load(asm.Mov.Imm(asm.R2, 0), stackIP, 20)), asm.Instructions{
		asm.LoadMem(asm.R1, asm.RFP, stackIP+9, asm.Byte),
		asm.JNE.Imm(asm.R1, unix.IPPROTO_TCP, "pass"),
		asm.LoadMem(asm.R1, asm.RFP, stackIP+6, asm.Half),
		asm.And.Imm(asm.R1, swap16(0x1fff)),
		asm.JNE.Imm(asm.R1, 0, "pass"),
		asm.LoadMem(asm.R7, asm.RFP, stackIP, asm.Byte),
		asm.And.Imm(asm.R7, 0x0f),
		asm.LSh.Imm(asm.R7, 2),
	}, load(asm.Mov.Reg(asm.R2, asm.R7), stackTCP, 14),
		copy4(stackIP+12), port(stackTCP), lookup(g.vips, stackKey), asm.Instructions{asm.JNE.Imm(asm.R0, 0, "drop")},
		lookup(g.snips, stackKey), asm.Instructions{asm.Mov.Reg(asm.R9, asm.R0)},
		copy4(stackIP+16), asm.Instructions{asm.Ja.Label("both")})
	// IPv6: TCP without extension headers, as ours always is.
	add(label("ip6", load(asm.Mov.Imm(asm.R2, 0), stackIP, 40)), asm.Instructions{
		asm.LoadMem(asm.R1, asm.RFP, stackIP+6, asm.Byte),
		asm.JNE.Imm(asm.R1, unix.IPPROTO_TCP, "pass"),
	}, load(asm.Mov.Imm(asm.R2, 40), stackTCP, 14),
		copy6(stackIP+8), port(stackTCP), lookup(g.vips, stackKey), asm.Instructions{asm.JNE.Imm(asm.R0, 0, "drop")},
		lookup(g.snips, stackKey), asm.Instructions{asm.Mov.Reg(asm.R9, asm.R0)},
		copy6(stackIP+24))
	// To a VIP, unless on lo. Register 9 tells whether the source is an SNIP.
	add(label("both", port(stackTCP+2)), asm.Instructions{
		asm.LoadMem(asm.R1, asm.R6, skbIfindex, asm.Word),
		asm.JEq.Imm(asm.R1, 1, "snip"),
	}, lookup(g.vips, stackKey), asm.Instructions{asm.JNE.Imm(asm.R0, 0, "drop")})
	// A reset from an SNIP with a port of the range.
	add(asm.Instructions{
		asm.JEq.Imm(asm.R9, 0, "pass").WithSymbol("snip"),
		asm.LoadMem(asm.R1, asm.RFP, stackTCP+13, asm.Byte),
		asm.JSet.Imm(asm.R1, flagRST, "reset"),
		asm.Ja.Label("pass"),
		asm.LoadMem(asm.R1, asm.RFP, stackTCP, asm.Half).WithSymbol("reset"),
		asm.HostTo(asm.BE, asm.R1, asm.Half),
		asm.JLT.Imm(asm.R1, int32(p.PortFirst), "pass"),
		asm.JGT.Imm(asm.R1, int32(p.PortLast), "pass"),
	}, lookup(g.except, stackTCP), asm.Instructions{
		asm.JNE.Imm(asm.R0, 0, "pass"),
	})
	add(asm.Instructions{
		asm.StoreImm(asm.RFP, stackZero, 0, asm.Word).WithSymbol("drop"),
	}, lookup(g.drops, stackZero), asm.Instructions{
		asm.JEq.Imm(asm.R0, 0, "shot"),
		asm.Mov.Imm(asm.R1, 1),
		asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, 0),
		asm.Mov.Imm(asm.R0, verdictShot).WithSymbol("shot"),
		asm.Return(),
		asm.Mov.Imm(asm.R0, verdictNext).WithSymbol("pass"),
		asm.Return(),
	})
	return out
}

const flagRST = 0x04

// Update makes the guard's tables those of p. Mark and port range stay as
// they were at NewGuard.
func (g *Guard) Update(p Params) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	p = p.clone()
	vips, snips, except := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, v := range p.VIPs {
		k := guardKey(v)
		vips[string(k[:])] = true
	}
	for _, a := range p.SNIPs {
		b := a.As16()
		snips[string(b[:])] = true
	}
	for _, port := range p.ExceptPorts {
		except[string(big16(port))] = true
	}
	return errors.Join(fill(g.vips, vips, 20), fill(g.snips, snips, 16), fill(g.except, except, 2))
}

func guardKey(v netip.AddrPort) (k [20]byte) {
	a := v.Addr().As16()
	copy(k[:], a[:])
	binary.BigEndian.PutUint16(k[16:], v.Port())
	return k
}

// fill makes the keys of a map these: first those that come, then those that go.
func fill(m *ebpf.Map, want map[string]bool, size int) error {
	for k := range want {
		if err := m.Put([]byte(k), byte(1)); err != nil {
			return fmt.Errorf("nft: guard: %w", err)
		}
	}
	var gone [][]byte
	key, value := make([]byte, size), byte(0)
	for it := m.Iterate(); it.Next(&key, &value); {
		if !want[string(key)] {
			gone = append(gone, slices.Clone(key))
		}
	}
	for _, k := range gone {
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("nft: guard: %w", err)
		}
	}
	return nil
}

// Attach puts the guard on every interface that it is not on yet. An
// interface that goes away takes the guard with it.
func (g *Guard) Attach() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("nft: guard: listing interfaces: %w", err)
	}
	now := map[int]bool{}
	var errs []error
	for _, l := range links {
		i := l.Attrs().Index
		now[i] = true
		if _, ok := g.links[i]; ok {
			continue
		}
		a, err := g.attach(l)
		if err != nil {
			errs = append(errs, fmt.Errorf("nft: guard on %s: %w", l.Attrs().Name, err))
			continue
		}
		g.links[i] = a
	}
	for i, a := range g.links {
		if !now[i] {
			if a.tcx != nil {
				_ = a.tcx.Close()
			}
			delete(g.links, i)
		}
	}
	return errors.Join(errs...)
}

// attach takes tcx where the kernel has it, else a filter of clsact.
func (g *Guard) attach(l netlink.Link) (attached, error) {
	i := l.Attrs().Index
	t, err := link.AttachTCX(link.TCXOptions{Interface: i, Program: g.prog, Attach: ebpf.AttachTCXEgress, Anchor: link.Head()})
	if err == nil {
		return attached{tcx: t}, nil
	}
	return g.attachClsact(i)
}

func (g *Guard) attachClsact(ifindex int) (attached, error) {
	var a attached
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	switch err := netlink.QdiscAdd(qdisc); {
	case err == nil:
		a.qdisc = true
	case errors.Is(err, unix.EEXIST): // somebody else has filters here too
	default:
		return a, fmt.Errorf("%w (clsact: %w)", ErrNoGuard, err)
	}
	// What a killed predecessor left is replaced.
	l := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
	if old, err := netlink.FilterList(l, netlink.HANDLE_MIN_EGRESS); err == nil {
		for _, f := range old {
			if b, ok := f.(*netlink.BpfFilter); ok && b.Name == guardName {
				_ = netlink.FilterDel(f)
			}
		}
	}
	a.filter = &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex, Parent: netlink.HANDLE_MIN_EGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: guardPriority,
		},
		Fd: g.prog.FD(), Name: guardName, DirectAction: true,
	}
	if err := netlink.FilterReplace(a.filter); err != nil {
		if a.qdisc {
			_ = netlink.QdiscDel(qdisc)
		}
		return a, fmt.Errorf("%w (cls_bpf: %w)", ErrNoGuard, err)
	}
	return a, nil
}

// guardPriority among the filters of clsact.
const guardPriority = 22272

// Drops is how many packets the guard has dropped.
func (g *Guard) Drops() uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.drops == nil {
		return 0
	}
	var n uint64
	if err := g.drops.Lookup(uint32(0), &n); err != nil {
		return 0
	}
	return n
}

// Interfaces is on how many interfaces the guard stands.
func (g *Guard) Interfaces() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.links)
}

// Close takes the guard away. It may be called again.
func (g *Guard) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var errs []error
	for i, a := range g.links {
		switch {
		case a.tcx != nil:
			errs = append(errs, a.tcx.Close())
		case a.filter != nil:
			errs = append(errs, gone(netlink.FilterDel(a.filter)))
			if a.qdisc && !otherFilters(i) {
				errs = append(errs, gone(netlink.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
					LinkIndex: i, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
				}})))
			}
		}
		delete(g.links, i)
	}
	for _, m := range []*ebpf.Map{g.vips, g.snips, g.except, g.drops} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	if g.prog != nil {
		errs = append(errs, g.prog.Close())
	}
	g.vips, g.snips, g.except, g.drops, g.prog = nil, nil, nil, nil, nil
	return errors.Join(errs...)
}

// gone takes the absence of something for its removal.
func gone(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}

// otherFilters: somebody else uses the qdisc that we made.
func otherFilters(ifindex int) bool {
	l := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
	for _, parent := range []uint32{netlink.HANDLE_MIN_EGRESS, netlink.HANDLE_MIN_INGRESS} {
		if fs, err := netlink.FilterList(l, parent); err != nil || len(fs) > 0 {
			return true
		}
	}
	return false
}

// ProbeGuard asks whether the kernel of the calling thread's network namespace
// can run a guard, by loading one and putting it on lo for a moment. nil means
// yes.
func ProbeGuard() error {
	p := Params{
		Table: "weir", Mark: 1 << 31, MarkMask: 1 << 31, PortFirst: 1024, PortLast: 1024, QueueFirst: 1, Shards: 1,
	}
	g, err := NewGuard(p)
	if err != nil {
		return err
	}
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return errors.Join(fmt.Errorf("nft: guard: %w", err), g.Close())
	}
	a, err := g.attach(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: lo.Index}})
	if err == nil {
		g.links[lo.Index] = a
	}
	return errors.Join(err, g.Close())
}
