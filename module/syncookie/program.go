// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only

package syncookie

import (
	"encoding/binary"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/packet"
)

// Offsets in struct __sk_buff.
const (
	skbMark           = 8
	skbProtocol       = 16
	skbIngressIfindex = 36
)

const (
	verdictNext = -1 // TCX_NEXT: whoever comes behind us decides
	verdictShot = 2  // TCX_DROP

	fromNetworkHeader = 1      // BPF_HDR_START_NET
	pseudoHeader      = 1 << 4 // BPF_F_PSEUDO_HDR
	fibSkipNeigh      = 1 << 2 // BPF_FIB_LOOKUP_SKIP_NEIGH, 6.3
	fibMark           = 1 << 5 // BPF_FIB_LOOKUP_MARK, 6.10

	ethLen = 14
	ip4Len = 20
	ip6Len = 40
	tcpLen = 20
	tcpSum = 16
)

// Places on the program's stack, below the frame pointer.
const (
	inIP   = -108       // IP header as it came, 20 or 40 bytes
	inTCP  = -68        // TCP header as it came,
	inOpts = inTCP + 20 // and its options, 40 bytes, zeros behind their end
	msg    = -168       // what the MAC is over, 56 bytes
	vipKey = -192       // address and port of the VIP, 20 bytes
	outIP  = -264       // the answer's IP header, 40 bytes of room
	outTCP = outIP + 40 // its TCP header with options, at most 32 bytes
	fib    = -328       // struct bpf_fib_lookup, 64 bytes
	neigh  = -352       // struct bpf_redir_neigh, 20 bytes
	saved  = -360       // the length of the options
	half1  = -368       // half of a hash
	now    = -376       // nanoseconds by the engine's clock
	slot   = -384       // which slot that is
	hashed = -392       // hash of tuple and ISN
	ipLen  = -400       // the length of the IP header
	pseudo = -408       // the sum of the pseudo header
)

// half and word are how bytes in network order look in a register that has
// loaded them.
func half(v uint16) int32 {
	return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)))
}

func word(b ...byte) int64 { return int64(int32(binary.NativeEndian.Uint32(b))) }

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

// is is short for a few instructions.
func is(in ...asm.Instruction) asm.Instructions { return in }

// at has a register point to a place of the stack.
func at(to asm.Register, place int32) asm.Instructions {
	return is(asm.Mov.Reg(to, asm.RFP), asm.Add.Imm(to, place))
}

// copyStack copies n bytes, a multiple of four, within the stack by register 1.
func copyStack(to, from, n int16) (out asm.Instructions) {
	for i := int16(0); i < n; i += 4 {
		out = append(out, asm.LoadMem(asm.R1, asm.RFP, from+i, asm.Word), asm.StoreMem(asm.RFP, to+i, asm.R1, asm.Word))
	}
	return out
}

// zeros clears n bytes, a multiple of eight, of the stack by register 0, which
// is zero.
func zeros(place, n int16) (out asm.Instructions) {
	for i := int16(0); i < n; i += 8 {
		out = append(out, asm.StoreMem(asm.RFP, place+i, asm.R0, asm.DWord))
	}
	return out
}

// load copies n bytes of the packet to the stack, or goes to "next".
func load(offset, to, n int32) asm.Instructions {
	return join(is(asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, offset)), at(asm.R3, to), is(
		asm.Mov.Imm(asm.R4, n), asm.Mov.Imm(asm.R5, fromNetworkHeader), asm.FnSkbLoadBytesRelative.Call(),
		asm.JNE.Imm(asm.R0, 0, "next"),
	))
}

func rotate(r asm.Register, n int32) asm.Instructions {
	return is(asm.Mov.Reg(asm.R0, r), asm.LSh.Imm(r, n), asm.RSh.Imm(asm.R0, 64-n), asm.Or.Reg(r, asm.R0))
}

// sipRounds are rounds of SipHash over registers 1 to 4, by register 0.
func sipRounds(n int) (out asm.Instructions) {
	const v0, v1, v2, v3 = asm.R1, asm.R2, asm.R3, asm.R4
	for range n {
		out = join(out,
			is(asm.Add.Reg(v0, v1)), rotate(v1, 13), is(asm.Xor.Reg(v1, v0)), rotate(v0, 32),
			is(asm.Add.Reg(v2, v3)), rotate(v3, 16), is(asm.Xor.Reg(v3, v2)),
			is(asm.Add.Reg(v0, v3)), rotate(v3, 21), is(asm.Xor.Reg(v3, v0)),
			is(asm.Add.Reg(v2, v1)), rotate(v1, 17), is(asm.Xor.Reg(v1, v2)), rotate(v2, 32),
		)
	}
	return out
}

// sipHash leaves SipHash-2-4 of n bytes of the stack, whose last word is padded
// with zeros and the length, in register 1.
func sipHash(k0, k1 uint64, place int16, n int) asm.Instructions {
	imm := func(r asm.Register, v uint64) asm.Instruction { return asm.LoadImm(r, int64(v), asm.DWord) }
	out := is(
		imm(asm.R1, k0^0x736f6d6570736575), imm(asm.R2, k1^0x646f72616e646f6d),
		imm(asm.R3, k0^0x6c7967656e657261), imm(asm.R4, k1^0x7465646279746573),
	)
	for i := 0; i < n; i += 8 {
		out = join(out, is(
			asm.LoadMem(asm.R5, asm.RFP, place+int16(i), asm.DWord), asm.HostTo(asm.LE, asm.R5, asm.DWord),
			asm.Xor.Reg(asm.R4, asm.R5),
		), sipRounds(2), is(asm.Xor.Reg(asm.R1, asm.R5)))
	}
	return join(out, is(asm.Xor.Imm(asm.R3, 0xff)), sipRounds(4),
		is(asm.Xor.Reg(asm.R1, asm.R2), asm.Xor.Reg(asm.R3, asm.R4), asm.Xor.Reg(asm.R1, asm.R3)))
}

// mostOptions is how many bytes of options a TCP header has room for.
const mostOptions = 40

// options leaves the cookie's low byte in register 7, which holds the length of
// the options before, and goes to "next" where they are malformed.
//
// Register 9 holds a zero of which the verifier does not know that it is one. A
// number whose value it knows it takes for one to follow along every path; of
// the others it sees that the paths are alike.
func options(classes []uint16) asm.Instructions {
	const next, mss, scale, sack, size, kind, n, zero = asm.R1, asm.R2, asm.R3, asm.R4, asm.R7, asm.R0, asm.R5, asm.R9
	set := func(r asm.Register, v int32) asm.Instructions {
		return is(asm.Mov.Reg(r, zero), asm.Xor.Imm(r, v)) // an addition would be seen through
	}
	name := func(what string, i int) string { return fmt.Sprintf("%s_%d", what, i) }
	out := join(is(asm.Add.Reg(size, zero)), set(next, 0), set(mss, 536), set(scale, 15), set(sack, 0))
	for i := range mostOptions {
		p := inOpts + int16(i)
		done := name("option", i+1)
		one := is(asm.JGT.Imm(next, int32(i), done))
		if i%4 == 0 { // the length is a multiple of four
			one = append(one, asm.JLE.Imm(size, int32(i), "chosen"))
		}
		one = join(one, is(
			asm.LoadMem(kind, asm.RFP, p, asm.Byte),
			asm.JEq.Imm(kind, packet.OptEnd, "chosen"),
		), set(next, int32(i)+1), is(asm.JEq.Imm(kind, packet.OptNOP, done)))
		if i == mostOptions-1 {
			one = append(one, asm.Ja.Label("next"))
			out = join(out, label(name("option", i), one))
			break
		}
		one = join(one, is(
			asm.LoadMem(n, asm.RFP, p+1, asm.Byte), // zero behind the end
			asm.JLT.Imm(n, 2, "next"),
			asm.JEq.Imm(kind, packet.OptSACK, "next"), // which a SYN has no use for
		), set(next, int32(i)), is(
			asm.Add.Reg(next, n),
			asm.JGT.Reg(next, size, "next"),
		))
		if i+4 <= mostOptions {
			one = join(one, is(
				asm.JNE.Imm(kind, packet.OptMSS, name("no_mss", i)), asm.JNE.Imm(n, 4, done),
				asm.LoadMem(mss, asm.RFP, p+2, asm.Byte), asm.LSh.Imm(mss, 8),
				asm.LoadMem(n, asm.RFP, p+3, asm.Byte), asm.Or.Reg(mss, n),
				asm.JNE.Imm(mss, 0, done),
			), set(mss, 536), is(asm.Ja.Label(done)), label(name("no_mss", i), is(asm.Mov.Reg(n, n))))
		}
		if i+3 <= mostOptions {
			one = join(one, is(
				asm.JNE.Imm(kind, packet.OptWindowScale, name("no_scale", i)), asm.JNE.Imm(n, 3, done),
				asm.LoadMem(scale, asm.RFP, p+2, asm.Byte),
				asm.JLE.Imm(scale, 14, done),
			), set(scale, 14), is(asm.Ja.Label(done)), label(name("no_scale", i), is(asm.Mov.Reg(n, n))))
		}
		one = join(one, is(asm.JNE.Imm(kind, packet.OptSACKPermitted, done), asm.JNE.Imm(n, 2, done)), set(sack, 1))
		out = join(out, label(name("option", i), one))
	}
	out = join(out, label(name("option", mostOptions), is(asm.Ja.Label("chosen"))))
	out = join(out, label("chosen", is(asm.Mov.Reg(size, scale), asm.LSh.Imm(size, 4), asm.Or.Reg(size, sack))))
	for _, c := range classes[1:] { // the class of the MSS
		out = append(out, asm.JLT.Imm(mss, int32(c), "classed"), asm.Add.Imm(size, 2))
	}
	// The verifier looks only now and then whether it has been in a state before:
	// after eight instructions and two jumps, at the target of a jump. Were there
	// no such place here, it would follow the rest once for every end above.
	out = join(out, label("classed", is(asm.And.Imm(size, 0xff))))
	for range 8 {
		out = append(out, asm.Mov.Reg(size, size))
	}
	return join(out, is(asm.Ja.Label("jump")), label("jump", is(asm.Ja.Label("met"))), label("met", is(asm.Mov.Reg(size, size))))
}

// fold leaves the halves of the product of registers 1 and 2, one xor the
// other, in register 1, by registers 0 and 3 to 5.
func fold() asm.Instructions {
	return is(
		asm.Mov.Reg(asm.R5, asm.R1), asm.Mul.Reg(asm.R5, asm.R2), // the lower half
		asm.Mov.Reg(asm.R3, asm.R1), asm.RSh.Imm(asm.R3, 32), asm.Mov.Reg32(asm.R1, asm.R1),
		asm.Mov.Reg(asm.R4, asm.R2), asm.RSh.Imm(asm.R4, 32), asm.Mov.Reg32(asm.R2, asm.R2),
		asm.Mov.Reg(asm.R0, asm.R1), asm.Mul.Reg(asm.R0, asm.R2), asm.RSh.Imm(asm.R0, 32),
		asm.Mul.Reg(asm.R2, asm.R3), asm.Mul.Reg(asm.R1, asm.R4), asm.Mul.Reg(asm.R3, asm.R4),
		asm.Mov.Reg32(asm.R4, asm.R2), asm.Add.Reg(asm.R0, asm.R4), asm.RSh.Imm(asm.R2, 32), asm.Add.Reg(asm.R3, asm.R2),
		asm.Mov.Reg32(asm.R4, asm.R1), asm.Add.Reg(asm.R0, asm.R4), asm.RSh.Imm(asm.R1, 32), asm.Add.Reg(asm.R3, asm.R1),
		asm.RSh.Imm(asm.R0, 32), asm.Add.Reg(asm.R3, asm.R0),
		asm.Mov.Reg(asm.R1, asm.R3), asm.Xor.Reg(asm.R1, asm.R5),
	)
}

// foldSum folds the sum of csum_diff in register 0 to 16 bits by register 1.
func foldSum() (out asm.Instructions) {
	out = is(asm.Mov.Reg32(asm.R0, asm.R0))
	for range 2 {
		out = append(out, asm.Mov.Reg(asm.R1, asm.R0), asm.RSh.Imm(asm.R1, 16), asm.And.Imm(asm.R0, 0xffff), asm.Add.Reg(asm.R0, asm.R1))
	}
	return out
}

// hash leaves packet.Tuple.Hash of the tuple in msg under the seed in register 9
// in register 1.
func hash() asm.Instructions {
	const k0, k1, k2, k3, k4 = 0xa0761d6478bd642f, 0xe7037ed1a0b428db, 0x8ebc6af09c88c6e3, 0x589965cc75374cc3, 0x1d8e4e27c47d124f
	xor := func(r asm.Register, k uint64) asm.Instructions {
		return is(asm.LoadImm(asm.R0, int64(k), asm.DWord), asm.Xor.Reg(r, asm.R0))
	}
	operand := func(r asm.Register, at int16, k uint64, turn int32) asm.Instructions {
		out := is(asm.Mov.Reg(r, asm.R9))
		if turn > 0 {
			out = join(out, rotate(r, turn))
		}
		return join(out, is(
			asm.LoadMem(asm.R0, asm.RFP, msg+at, asm.DWord), asm.HostTo(asm.LE, asm.R0, asm.DWord), asm.Xor.Reg(r, asm.R0),
		), xor(r, k))
	}
	return join(
		xor(asm.R9, k4),
		operand(asm.R1, 0, k0, 0), operand(asm.R2, 8, k1, 17), fold(), is(asm.StoreMem(asm.RFP, half1, asm.R1, asm.DWord)),
		operand(asm.R1, 16, k2, 31), operand(asm.R2, 24, k3, 47), fold(), rotate(asm.R1, 29), is(
			asm.LoadMem(asm.R3, asm.RFP, msg+32, asm.Word), asm.HostTo(asm.BE, asm.R3, asm.Word), // both ports
			asm.Mov.Reg(asm.R2, asm.R3), asm.LSh.Imm(asm.R2, 32), asm.Xor.Reg(asm.R2, asm.R1), asm.Xor.Reg(asm.R2, asm.R9),
			asm.LoadMem(asm.R1, asm.RFP, half1, asm.DWord), asm.Xor.Reg(asm.R1, asm.R3),
		), xor(asm.R1, k1), fold(),
	)
}

// bit marks the tuple whose hash is in register 1 in the generation whose
// address is in register 8.
func bit(f engine.Format) asm.Instructions {
	shifted := func(by int32) asm.Instructions {
		return is(asm.Mov.Reg(asm.R0, asm.R1), asm.RSh.Imm(asm.R0, by), asm.Xor.Reg(asm.R1, asm.R0))
	}
	times := func(k uint64) asm.Instructions {
		return is(asm.LoadImm(asm.R0, int64(k), asm.DWord), asm.Mul.Reg(asm.R1, asm.R0))
	}
	golden := uint64(0x9e3779b97f4a7c15)
	// The library forgets which operation it was on the way to the kernel
	// (cilium/ebpf 0.22), unless it is the constant as well.
	or := asm.OrAtomic.Mem(asm.R1, asm.R3, asm.DWord, 8)
	or.Constant = int64(asm.OrAtomic >> 8)
	return join(
		is(asm.LoadImm(asm.R0, int64(golden*engine.BitsSeed), asm.DWord), asm.Add.Reg(asm.R1, asm.R0)),
		shifted(30), times(0xbf58476d1ce4e5b9), shifted(27), times(0x94d049bb133111eb), shifted(31), rotate(asm.R1, engine.BitsSeed),
		is(
			asm.Or.Imm(asm.R1, 1),
			asm.Mov.Reg(asm.R2, asm.R1), asm.And.Imm(asm.R2, 63), asm.Mov.Imm(asm.R3, 1), asm.LSh.Reg(asm.R3, asm.R2),
			asm.RSh.Imm(asm.R1, 6), asm.And.Imm(asm.R1, int32(f.Words-1)), asm.LSh.Imm(asm.R1, 3),
			asm.Add.Reg(asm.R1, asm.R8),
			or,
		),
	)
}

// parameters of the program.
type parameters struct {
	Config
	engine.Format
	vips, memory *ebpf.Map
}

// program answers SYNs. Register 6 holds the packet, 7 the options' length and
// then the cookie's low byte, 8 the length of the IP header, 9 is scratch across
// calls.
func program(p parameters) asm.Instructions {
	st := func(place int16, v int64, size asm.Size) asm.Instruction {
		return asm.StoreImm(asm.RFP, place, v, size)
	}
	ld := func(r asm.Register, place int16, size asm.Size) asm.Instruction {
		return asm.LoadMem(r, asm.RFP, place, size)
	}
	sv := func(place int16, r asm.Register, size asm.Size) asm.Instruction {
		return asm.StoreMem(asm.RFP, place, r, size)
	}

	zero := join(is(asm.Mov.Imm(asm.R0, 0)), zeros(inOpts, 40), zeros(fib, 64), zeros(outIP, 72),
		zeros(neigh, 16), is(st(neigh+16, 0, asm.Word)))

	head4 := join(label("ip4", load(0, inIP, ip4Len)), is(
		ld(asm.R1, inIP, asm.Byte), asm.JNE.Imm(asm.R1, 0x45, "next"),
		ld(asm.R1, inIP+9, asm.Byte), asm.JNE.Imm(asm.R1, unix.IPPROTO_TCP, "next"),
		ld(asm.R1, inIP+6, asm.Half), asm.And.Imm(asm.R1, half(0x3fff)), asm.JNE.Imm(asm.R1, 0, "next"),
	), load(ip4Len, inTCP, tcpLen), is(
		// the length that TCP has
		ld(asm.R9, inIP+2, asm.Half), asm.HostTo(asm.BE, asm.R9, asm.Half), asm.Sub.Imm(asm.R9, ip4Len),
		asm.Mov.Imm(asm.R8, ip4Len),
		st(msg, 0, asm.Word), st(msg+4, 0, asm.Word), st(msg+8, word(0, 0, 0xff, 0xff), asm.Word),
		st(msg+16, 0, asm.Word), st(msg+16+4, 0, asm.Word), st(msg+24, word(0, 0, 0xff, 0xff), asm.Word),
	), copyStack(msg+12, inIP+12, 4), copyStack(msg+28, inIP+16, 4),
		is(st(fib, unix.AF_INET, asm.Byte)), copyStack(fib+16, inIP+16, 4), copyStack(fib+32, inIP+12, 4),
		is(asm.Ja.Label("both")))
	head6 := join(label("ip6", load(0, inIP, ip6Len)), is(
		ld(asm.R1, inIP+6, asm.Byte), asm.JNE.Imm(asm.R1, unix.IPPROTO_TCP, "next"),
	), load(ip6Len, inTCP, tcpLen), is(
		ld(asm.R9, inIP+4, asm.Half), asm.HostTo(asm.BE, asm.R9, asm.Half),
		asm.Mov.Imm(asm.R8, ip6Len),
	), copyStack(msg, inIP+8, 32),
		is(st(fib, unix.AF_INET6, asm.Byte)), copyStack(fib+16, inIP+24, 16), copyStack(fib+32, inIP+8, 16))

	both := join(
		label("both", is(
			ld(asm.R1, inTCP+13, asm.Byte),
			asm.And.Imm(asm.R1, int32(packet.SYN|packet.ACK|packet.RST|packet.FIN)),
			asm.JNE.Imm(asm.R1, int32(packet.SYN), "next"),
			ld(asm.R7, inTCP+12, asm.Byte), asm.RSh.Imm(asm.R7, 4), asm.LSh.Imm(asm.R7, 2),
			asm.JNE.Reg(asm.R7, asm.R9, "next"), // with data
			asm.JLT.Imm(asm.R7, tcpLen, "next"),
			asm.JGT.Imm(asm.R7, tcpLen+mostOptions, "next"),
			asm.Sub.Imm(asm.R7, tcpLen),
		)),
		// the VIP
		copyStack(vipKey, msg+16, 16), is(
			ld(asm.R1, inTCP+2, asm.Half), sv(vipKey+16, asm.R1, asm.Half), st(vipKey+18, 0, asm.Half),
			asm.LoadMapPtr(asm.R1, p.vips.FD())), at(asm.R2, vipKey), is(
			asm.FnMapLookupElem.Call(), asm.JEq.Imm(asm.R0, 0, "next"),
			asm.LoadMem(asm.R9, asm.R0, 0, asm.DWord),
			// The answer's way, as that of a packet of this host's own. Without one,
			// or where lo must not forward, others may know better.
			st(fib+1, unix.IPPROTO_TCP, asm.Byte), st(fib+8, lo, asm.Word),
			ld(asm.R1, inTCP+2, asm.Half), sv(fib+2, asm.R1, asm.Half),
			ld(asm.R1, inTCP, asm.Half), sv(fib+4, asm.R1, asm.Half),
			asm.LoadMem(asm.R1, asm.R6, skbMark, asm.Word), sv(fib+52, asm.R1, asm.Word),
			asm.Mov.Reg(asm.R1, asm.R6)), at(asm.R2, fib), is(
			asm.Mov.Imm(asm.R3, 64), asm.Mov.Imm(asm.R4, fibSkipNeigh|fibMark), asm.FnFibLookup.Call(),
			asm.JNE.Imm(asm.R0, 0, "next"),
			// its options
			asm.JEq.Imm(asm.R7, 0, "bare"),
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.R8), asm.Add.Imm(asm.R2, tcpLen)), at(asm.R3, inOpts), is(
			asm.Mov.Reg(asm.R4, asm.R7), asm.Mov.Imm(asm.R5, fromNetworkHeader), asm.FnSkbLoadBytesRelative.Call(),
			asm.JNE.Imm(asm.R0, 0, "next"),
		),
		// A right checksum, or the sum of the pseudo header, which a packet has that
		// never was on a wire. The pseudo header is here with IPv4 addresses mapped,
		// whose ones add nothing.
		label("bare", is(
			asm.Mov.Reg(asm.R5, asm.R7), asm.Add.Imm(asm.R5, tcpLen), asm.HostTo(asm.BE, asm.R5, asm.Half),
			asm.Add.Imm(asm.R5, half(unix.IPPROTO_TCP)), asm.Mov.Imm(asm.R1, 0), asm.Mov.Imm(asm.R2, 0))), at(asm.R3, msg), is(
			asm.Mov.Imm(asm.R4, 32), asm.FnCsumDiff.Call(), sv(pseudo, asm.R0, asm.DWord),
		), foldSum(), is(
			ld(asm.R1, inTCP+tcpSum, asm.Half), asm.JEq.Reg(asm.R0, asm.R1, "whole"),
			asm.Mov.Imm(asm.R1, 0), asm.Mov.Imm(asm.R2, 0)), at(asm.R3, inTCP), is(
			asm.Mov.Reg(asm.R4, asm.R7), asm.Add.Imm(asm.R4, tcpLen), ld(asm.R5, pseudo, asm.DWord), asm.FnCsumDiff.Call(),
		), foldSum(), is(asm.JNE.Imm(asm.R0, 0xffff, "next")),
		label("whole", is(asm.FnKtimeGetNs.Call(),
			asm.LoadImm(asm.R1, p.Offset, asm.DWord), asm.Add.Reg(asm.R0, asm.R1), sv(now, asm.R0, asm.DWord),
			asm.LoadImm(asm.R1, p.Slot, asm.DWord), asm.Div.Reg(asm.R0, asm.R1), sv(slot, asm.R0, asm.DWord),
			asm.HostTo(asm.BE, asm.R0, asm.DWord), sv(msg+40, asm.R0, asm.DWord),
			sv(saved, asm.R7, asm.DWord),
		)),
		copyStack(msg+32, inTCP, 8), // ports, ISN
		options(p.Classes[:]), is(
			st(msg+48, 0, asm.Word), st(msg+48+4, 0, asm.Word), st(msg+55, 52, asm.Byte), sv(msg+48, asm.R7, asm.Byte)),
		sipHash(binary.LittleEndian.Uint64(p.Secret[:]), binary.LittleEndian.Uint64(p.Secret[8:]), msg, 56), is(
			asm.And.Imm32(asm.R1, ^0xff), asm.Mov.Reg32(asm.R2, asm.R7), asm.Or.Reg32(asm.R1, asm.R2),
			asm.HostTo(asm.BE, asm.R1, asm.Word), sv(outTCP+4, asm.R1, asm.Word),
			// It is noted that it was answered, for Handshake.Validate, Recent and RTT.
			sv(ipLen, asm.R8, asm.DWord),
			ld(asm.R1, slot, asm.DWord), asm.Mov.Reg(asm.R2, asm.R1), asm.And.Imm(asm.R2, int32(p.Generations-1)), asm.Mul.Imm(asm.R2, int32(p.Generation)),
			asm.LoadMapValue(asm.R8, p.memory.FD(), uint32(p.Seen)), asm.Add.Reg(asm.R8, asm.R2),
			// The first of a slot goes to the handshake, which clears the bits.
			asm.LoadMem(asm.R2, asm.R8, 0, asm.DWord), asm.JNE.Reg(asm.R1, asm.R2, "next"),
			ld(asm.R9, msg+36, asm.Word), asm.HostTo(asm.BE, asm.R9, asm.Word)),
		hash(), is(sv(hashed, asm.R1, asm.DWord)), bit(p.Format), is(asm.Mov.Imm(asm.R9, 0)), hash(), bit(p.Format), is(
			ld(asm.R1, hashed, asm.DWord), asm.Mov.Reg(asm.R2, asm.R1), asm.And.Imm(asm.R2, int32(p.Buckets-1)), asm.LSh.Imm(asm.R2, 3),
			asm.LoadMapValue(asm.R3, p.memory.FD(), uint32(p.Sent)), asm.Add.Reg(asm.R3, asm.R2),
			asm.RSh.Imm(asm.R1, 32), asm.LSh.Imm(asm.R1, 32),
			ld(asm.R2, now, asm.DWord), asm.RSh.Imm(asm.R2, 14), asm.Mov.Reg32(asm.R2, asm.R2), asm.Or.Reg(asm.R1, asm.R2),
			asm.StoreMem(asm.R3, 0, asm.R1, asm.DWord),
			asm.LoadMapValue(asm.R3, p.memory.FD(), uint32(p.Answered)), asm.Mov.Imm(asm.R1, 1), asm.AddAtomic.Mem(asm.R3, asm.R1, asm.DWord, 0),
			ld(asm.R8, ipLen, asm.DWord),
			// the rest of the header
			ld(asm.R1, inTCP+2, asm.Half), sv(outTCP, asm.R1, asm.Half),
			ld(asm.R1, inTCP, asm.Half), sv(outTCP+2, asm.R1, asm.Half),
			ld(asm.R1, inTCP+4, asm.Word), asm.HostTo(asm.BE, asm.R1, asm.Word), asm.Add.Imm32(asm.R1, 1),
			asm.HostTo(asm.BE, asm.R1, asm.Word), sv(outTCP+8, asm.R1, asm.Word),
			st(outTCP+13, int64(packet.SYN|packet.ACK), asm.Byte),
			st(outTCP+14, int64(half(p.Window)), asm.Half),
			ld(asm.R1, inTCP+tcpSum, asm.Half), sv(outTCP+tcpSum, asm.R1, asm.Half),
			// options: register 9 counts the bytes
			st(outTCP+20, word(packet.OptMSS, 4, byte(p.MSS4>>8), byte(p.MSS4)), asm.Word),
			asm.JEq.Imm(asm.R8, ip4Len, "mss"),
			st(outTCP+20, word(packet.OptMSS, 4, byte(p.MSS6>>8), byte(p.MSS6)), asm.Word),
			asm.Mov.Imm(asm.R9, 24).WithSymbol("mss"),
			asm.Mov.Reg(asm.R1, asm.R7), asm.RSh.Imm(asm.R1, 4), asm.JEq.Imm(asm.R1, 15, "scaled"),
			st(outTCP+24, word(packet.OptNOP, packet.OptWindowScale, 3, p.Scale), asm.Word), asm.Mov.Imm(asm.R9, 28),
			asm.JSet.Imm(asm.R7, 1, "third"), asm.Ja.Label("done"),
			st(outTCP+28, word(packet.OptNOP, packet.OptNOP, packet.OptSACKPermitted, 2), asm.Word).WithSymbol("third"),
			asm.Mov.Imm(asm.R9, 32), asm.Ja.Label("done"),
			asm.JSet.Imm(asm.R7, 1, "second").WithSymbol("scaled"), asm.Ja.Label("done"),
			st(outTCP+24, word(packet.OptNOP, packet.OptNOP, packet.OptSACKPermitted, 2), asm.Word).WithSymbol("second"),
			asm.Mov.Imm(asm.R9, 28),
			asm.Mov.Reg(asm.R1, asm.R9).WithSymbol("done"), asm.LSh.Imm(asm.R1, 2), sv(outTCP+12, asm.R1, asm.Byte),
			// length
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.R8), asm.Add.Reg(asm.R2, asm.R9), asm.Add.Imm(asm.R2, ethLen),
			asm.Mov.Imm(asm.R3, 0), asm.FnSkbChangeTail.Call(), asm.JNE.Imm(asm.R0, 0, "shot"),
			asm.JEq.Imm(asm.R8, ip6Len, "out6"),
		),
		// IPv4 header
		is(st(outIP, word(0x45, 0, 0, 0), asm.Word),
			asm.Mov.Reg(asm.R1, asm.R9), asm.Add.Imm(asm.R1, ip4Len), asm.HostTo(asm.BE, asm.R1, asm.Half), sv(outIP+2, asm.R1, asm.Half),
			st(outIP+4, word(0, 0, 0x40, 0), asm.Word), st(outIP+8, word(64, unix.IPPROTO_TCP, 0, 0), asm.Word)),
		copyStack(outIP+12, inIP+16, 4), copyStack(outIP+16, inIP+12, 4),
		is(asm.Mov.Imm(asm.R1, 0), asm.Mov.Imm(asm.R2, 0)), at(asm.R3, outIP), is(asm.Mov.Imm(asm.R4, ip4Len), asm.Mov.Imm(asm.R5, 0),
			asm.FnCsumDiff.Call(),
		), foldSum(), is(
			asm.Xor.Imm(asm.R0, 0xffff), sv(outIP+10, asm.R0, asm.Half),
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, ethLen)), at(asm.R3, outIP), is(
			asm.Mov.Imm(asm.R4, ip4Len), asm.Mov.Imm(asm.R5, 0), asm.FnSkbStoreBytes.Call(),
			asm.JNE.Imm(asm.R0, 0, "shot"),
			asm.Ja.Label("tcp"),
		),
		// IPv6 header
		label("out6", is(st(outIP, word(0x60, 0, 0, 0), asm.Word),
			asm.Mov.Reg(asm.R1, asm.R9), asm.HostTo(asm.BE, asm.R1, asm.Half), sv(outIP+4, asm.R1, asm.Half),
			st(outIP+6, unix.IPPROTO_TCP, asm.Byte), st(outIP+7, 64, asm.Byte))),
		copyStack(outIP+8, inIP+24, 16), copyStack(outIP+24, inIP+8, 16),
		is(asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, ethLen)), at(asm.R3, outIP), is(
			asm.Mov.Imm(asm.R4, ip6Len), asm.Mov.Imm(asm.R5, 1), asm.FnSkbStoreBytes.Call(),
			asm.JNE.Imm(asm.R0, 0, "shot"),
		),
		// TCP header and its checksum
		label("tcp", is(
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.R8), asm.Add.Imm(asm.R2, ethLen))), at(asm.R3, outTCP), is(
			asm.Mov.Reg(asm.R4, asm.R9), asm.Mov.Imm(asm.R5, 0), asm.FnSkbStoreBytes.Call(),
			asm.JNE.Imm(asm.R0, 0, "shot"),
			ld(asm.R2, saved, asm.DWord), asm.And.Imm(asm.R2, 0x3c), asm.Add.Imm(asm.R2, tcpLen), asm.JGT.Imm(asm.R2, 60, "shot"),
		), at(asm.R1, inTCP), at(asm.R3, outTCP), is(
			asm.Mov.Reg(asm.R4, asm.R9), asm.Mov.Imm(asm.R5, 0), asm.FnCsumDiff.Call(),
			asm.Mov.Reg(asm.R4, asm.R0),
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.R8), asm.Add.Imm(asm.R2, ethLen+tcpSum),
			asm.Mov.Imm(asm.R3, 0), asm.Mov.Imm(asm.R5, 0), asm.FnL4CsumReplace.Call(),
			ld(asm.R3, saved, asm.DWord), asm.Add.Imm(asm.R3, tcpLen), asm.HostTo(asm.BE, asm.R3, asm.Half),
			asm.Mov.Reg(asm.R4, asm.R9), asm.HostTo(asm.BE, asm.R4, asm.Half),
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.R8), asm.Add.Imm(asm.R2, ethLen+tcpSum),
			asm.Mov.Imm(asm.R5, pseudoHeader|2), asm.FnL4CsumReplace.Call(),
			ld(asm.R1, fib, asm.Byte), sv(neigh, asm.R1, asm.Word),
		),
		copyStack(neigh+4, fib+32, 16),
		is(ld(asm.R1, fib+8, asm.Word)), at(asm.R2, neigh), is(
			asm.Mov.Imm(asm.R3, 20), asm.Mov.Imm(asm.R4, 0), asm.FnRedirectNeigh.Call(),
			asm.Return(),
		),
	)
	start := is(
		asm.Mov.Reg(asm.R6, asm.R1),
		// Ours, and no packet of this host's own: such a one came by no interface.
		asm.LoadMem(asm.R1, asm.R6, skbMark, asm.Word), asm.And.Imm32(asm.R1, int32(p.MarkMask)),
		asm.JNE.Imm32(asm.R1, int32(p.Mark), "next"),
		asm.LoadMem(asm.R1, asm.R6, skbIngressIfindex, asm.Word),
		asm.JLE.Imm(asm.R1, 1, "next"),
	)
	return join(start, zero, is(
		asm.LoadMem(asm.R1, asm.R6, skbProtocol, asm.Word),
		asm.JEq.Imm(asm.R1, half(unix.ETH_P_IP), "ip4"),
		asm.JEq.Imm(asm.R1, half(unix.ETH_P_IPV6), "ip6"),
		asm.Ja.Label("next"),
	), head4, head6, both, is(
		asm.Mov.Imm(asm.R0, verdictShot).WithSymbol("shot"), asm.Return(),
		asm.Mov.Imm(asm.R0, verdictNext).WithSymbol("next"), asm.Return(),
	))
}
