// SPDX-License-Identifier: Apache-2.0

package bare

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/module/packet"
)

// Places on the program's stack, below the frame pointer. The headers are
// loaded as they stand in the packet, so that addresses, ports and both numbers
// are 20 bytes in a row.
const (
	headers    = -64           // IPv4 header, then 14 bytes of the TCP header
	oldTuple   = headers + 12  // source, destination, ports: the key of a strand
	oldNumbers = headers + 24  // sequence and acknowledgment number
	tcpFlags   = headers + 33  //
	newTuple   = -88           // as they shall be, in the same order
	newNumbers = newTuple + 12 //
	made       = -112          // a strand that is stored: tuple, shift of either number
	back       = -128          // key of the way back
	zero       = -4            // the counter's index

	processors = 4 // bits of the port that tell which processor gave it out

	tupleLen  = 12
	strandLen = tupleLen + 8
	fieldsLen = tupleLen + 8

	ethLen   = 14
	ipSum    = ethLen + 10
	ipFields = ethLen + 12
	tcpSum   = ethLen + 20 + 16

	skbProtocol       = 16 // in struct __sk_buff
	fromNetworkHeader = 1  // BPF_HDR_START_NET
	pseudoHeader      = 1 << 4
	goOn              = -1 // TCX_NEXT
)

// TC translates in the network namespace of the calling thread by a program at
// the input of every interface but lo, until the context ends. It calls ready
// when it does. What is translated goes on through the router's own rules and
// routes.
func TC(ctx context.Context, cfg Config, ready func()) (err error) {
	_ = rlimit.RemoveMemlock() // Kernels before 5.11 count BPF memory against this limit.
	strands, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: tupleLen, ValueSize: strandLen, MaxEntries: 4 * ports})
	if err != nil {
		return fmt.Errorf("table: %w", err)
	}
	defer func() { err = errors.Join(err, strands.Close()) }()
	opened, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		return fmt.Errorf("counter: %w", err)
	}
	defer func() { err = errors.Join(err, opened.Close()) }()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "bare", Type: ebpf.SchedCLS, License: "Apache-2.0", Instructions: program(cfg, strands, opened),
	})
	if err != nil {
		return fmt.Errorf("program: %w", err)
	}
	defer func() { err = errors.Join(err, prog.Close()) }()
	ifcs, err := net.Interfaces()
	if err != nil {
		return err
	}
	for _, i := range ifcs {
		if i.Flags&net.FlagLoopback != 0 {
			continue
		}
		l, err := link.AttachTCX(link.TCXOptions{Interface: i.Index, Program: prog, Attach: ebpf.AttachTCXIngress})
		if err != nil {
			return fmt.Errorf("attaching to %s (tcx came with Linux 6.6): %w", i.Name, err)
		}
		defer l.Close()
	}
	ready()
	<-ctx.Done()
	return nil
}

// word and half are how the bytes of an address and of a port look in a
// register that has loaded them.
func word(a netip.Addr) int32 {
	b := a.As4()
	return int32(binary.NativeEndian.Uint32(b[:]))
}

func half(port uint16) int32 {
	return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, port)))
}

// program is the translation. Register 6 holds the packet, 7 the strand, 8 a
// difference of checksums; while a strand is made 7 holds its port and 8 how
// far its numbers are shifted.
func program(cfg Config, strands, opened *ebpf.Map) asm.Instructions {
	fp := func(to asm.Register, at int32) asm.Instructions {
		return asm.Instructions{asm.Mov.Reg(to, asm.RFP), asm.Add.Imm(to, at)}
	}
	lookup := func(m *ebpf.Map, key int32) asm.Instructions {
		return join(asm.Instructions{asm.LoadMapPtr(asm.R1, m.FD())}, fp(asm.R2, key), asm.Instructions{asm.FnMapLookupElem.Call()})
	}
	store := func(key int32) asm.Instructions {
		return join(asm.Instructions{asm.LoadMapPtr(asm.R1, strands.FD())}, fp(asm.R2, key), fp(asm.R3, made),
			asm.Instructions{asm.Mov.Imm(asm.R4, 0), asm.FnMapUpdateElem.Call()})
	}
	put := func(at int16, value int32) asm.Instruction { return asm.StoreImm(asm.RFP, at, int64(value), asm.Word) }
	putHalf := func(at int16, value int32) asm.Instruction {
		return asm.StoreImm(asm.RFP, at, int64(value), asm.Half)
	}
	move := func(from, to int16, size asm.Size) asm.Instructions {
		return asm.Instructions{asm.LoadMem(asm.R1, asm.RFP, from, size), asm.StoreMem(asm.RFP, to, asm.R1, size)}
	}
	// difference leaves in register 8 what n bytes change in a checksum.
	difference := func(from, to, n int32) asm.Instructions {
		return join(fp(asm.R1, from), asm.Instructions{asm.Mov.Imm(asm.R2, n)}, fp(asm.R3, to), asm.Instructions{
			asm.Mov.Imm(asm.R4, n), asm.Mov.Imm(asm.R5, 0), asm.FnCsumDiff.Call(), asm.Mov.Reg(asm.R8, asm.R0),
		})
	}
	// apply enters that difference in the field at an offset.
	apply := func(f asm.BuiltinFunc, offset, flags int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, offset), asm.Mov.Imm(asm.R3, 0), asm.Mov.Reg(asm.R4, asm.R8),
			asm.Mov.Imm(asm.R5, flags), f.Call(),
		}
	}
	// shift adds a number of the strand to one of the packet.
	shift := func(number, by int16) asm.Instructions {
		return asm.Instructions{
			asm.LoadMem(asm.R1, asm.RFP, oldNumbers+number, asm.Word),
			asm.HostTo(asm.BE, asm.R1, asm.Word),
			asm.LoadMem(asm.R2, asm.R7, by, asm.Word),
			asm.Add.Reg32(asm.R1, asm.R2),
			asm.HostTo(asm.BE, asm.R1, asm.Word),
			asm.StoreMem(asm.RFP, newNumbers+number, asm.R1, asm.Word),
		}
	}
	vip, server, snip := cfg.VIP, cfg.Server, cfg.SNIP
	return join(
		// IPv4 without options, TCP.
		asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R1, asm.R6, skbProtocol, asm.Word),
			asm.JNE.Imm(asm.R1, half(unix.ETH_P_IP), "on"),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, 0),
		}, fp(asm.R3, headers), asm.Instructions{
			asm.Mov.Imm(asm.R4, 34),
			asm.Mov.Imm(asm.R5, fromNetworkHeader),
			asm.FnSkbLoadBytesRelative.Call(),
			asm.JNE.Imm(asm.R0, 0, "on"),
			asm.LoadMem(asm.R1, asm.RFP, headers, asm.Byte),
			asm.JNE.Imm(asm.R1, 0x45, "on"),
			asm.LoadMem(asm.R1, asm.RFP, headers+9, asm.Byte),
			asm.JNE.Imm(asm.R1, unix.IPPROTO_TCP, "on"),
		},
		lookup(strands, oldTuple), asm.Instructions{
			asm.JNE.Imm(asm.R0, 0, "found"),
			// A SYN to the VIP makes the strands of both directions.
			asm.LoadMem(asm.R1, asm.RFP, oldTuple+4, asm.Word),
			asm.JNE.Imm32(asm.R1, word(vip.Addr()), "on"),
			asm.LoadMem(asm.R1, asm.RFP, oldTuple+10, asm.Half),
			asm.JNE.Imm(asm.R1, half(vip.Port()), "on"),
			asm.LoadMem(asm.R1, asm.RFP, tcpFlags, asm.Byte),
			asm.And.Imm(asm.R1, int32(packet.SYN|packet.ACK)),
			asm.JNE.Imm(asm.R1, int32(packet.SYN), "on"),
			put(zero, 0),
		},
		lookup(opened, zero), asm.Instructions{
			asm.JEq.Imm(asm.R0, 0, "on"),
			asm.LoadMem(asm.R7, asm.R0, 0, asm.Word),
			asm.Add.Imm(asm.R7, 1),
			asm.StoreMem(asm.R0, 0, asm.R7, asm.Word),
			asm.LSh.Imm(asm.R7, processors),
			asm.FnGetSmpProcessorId.Call(),
			asm.And.Imm(asm.R0, 1<<processors-1),
			asm.Or.Reg(asm.R7, asm.R0),
			asm.Mov.Reg32(asm.R8, asm.R7),
			asm.And.Imm(asm.R7, ports-1),
			asm.Add.Imm(asm.R7, firstPort),
			asm.HostTo(asm.BE, asm.R7, asm.Half),
			asm.Mul.Imm32(asm.R8, dataOffset+1),
			// to the server
			put(made, word(snip)), put(made+4, word(server.Addr())),
			asm.StoreMem(asm.RFP, made+8, asm.R7, asm.Half), putHalf(made+10, half(server.Port())),
			asm.StoreMem(asm.RFP, made+tupleLen, asm.R8, asm.Word), asm.StoreMem(asm.RFP, made+tupleLen+4, asm.R8, asm.Word),
		}, store(oldTuple),
		// and back
		asm.Instructions{
			put(back, word(server.Addr())), put(back+4, word(snip)),
			putHalf(back+8, half(server.Port())), asm.StoreMem(asm.RFP, back+10, asm.R7, asm.Half),
			put(made, word(vip.Addr())), putHalf(made+8, half(vip.Port())),
		},
		move(oldTuple, made+4, asm.Word), move(oldTuple+8, made+10, asm.Half), asm.Instructions{
			asm.Neg.Imm32(asm.R8, 0),
			asm.StoreMem(asm.RFP, made+tupleLen, asm.R8, asm.Word), asm.StoreMem(asm.RFP, made+tupleLen+4, asm.R8, asm.Word),
		}, store(back),
		lookup(strands, oldTuple), asm.Instructions{
			asm.JEq.Imm(asm.R0, 0, "on"),
			asm.Mov.Reg(asm.R7, asm.R0).WithSymbol("found"),
		},
		// What the packet shall have.
		asm.Instructions{
			asm.LoadMem(asm.R1, asm.R7, 0, asm.Word), asm.StoreMem(asm.RFP, newTuple, asm.R1, asm.Word),
			asm.LoadMem(asm.R1, asm.R7, 4, asm.Word), asm.StoreMem(asm.RFP, newTuple+4, asm.R1, asm.Word),
			asm.LoadMem(asm.R1, asm.R7, 8, asm.Word), asm.StoreMem(asm.RFP, newTuple+8, asm.R1, asm.Word),
		},
		shift(0, tupleLen), move(oldNumbers+4, newNumbers+4, asm.Word), asm.Instructions{
			asm.LoadMem(asm.R1, asm.RFP, tcpFlags, asm.Byte),
			asm.And.Imm(asm.R1, int32(packet.ACK)),
			asm.JEq.Imm(asm.R1, 0, "write"),
		}, shift(4, tupleLen+4),
		label("write", difference(oldTuple, newTuple, 8)),
		apply(asm.FnL3CsumReplace, ipSum, 0),
		apply(asm.FnL4CsumReplace, tcpSum, pseudoHeader),
		difference(oldTuple+8, newTuple+8, fieldsLen-8),
		apply(asm.FnL4CsumReplace, tcpSum, 0), asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, ipFields),
		}, fp(asm.R3, newTuple), asm.Instructions{
			asm.Mov.Imm(asm.R4, fieldsLen), asm.Mov.Imm(asm.R5, 0), asm.FnSkbStoreBytes.Call(),
			asm.Mov.Imm(asm.R0, goOn).WithSymbol("on"),
			asm.Return(),
		},
	)
}

func join(parts ...asm.Instructions) (all asm.Instructions) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func label(name string, in asm.Instructions) asm.Instructions {
	in[0] = in[0].WithSymbol(name)
	return in
}
