// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/dchest/siphash"

	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// A cookie is the ISS with which a SYN is answered, so that nothing need be
// remembered of it (RFC 4987 section 3.6):
//
//	 31                        8 7      4 3    1  0
//	+---------------------------+--------+------+---+
//	| MAC(tuple, ISN, slot, opt)| scale  | MSS  | S |
//	+---------------------------+--------+------+---+
//
// scale is the client's window shift (15 = none), MSS its class, S says
// SACK-permitted. The MAC is SipHash-2-4, which a BPF program can compute too.
// A cookie lives for the slot in which it was made and the next three, 24 to
// 32 seconds: so late may the first segment come of a client whose
// acknowledgment of the handshake was lost, or waited in a queue while nobody
// read it.
const (
	slotNanos   = 8 * second
	cookieSlots = 4
	embryoLife  = 60 // seconds that a preconnected client may take to ask
	// tombLife exceeds the life of every cookie that could have opened the
	// connection (SPLICING.md, incarnations).
	tombLife = uint32(cookieSlots*slotNanos/second) + 4
)

// mssClasses are the values that the three MSS bits stand for: the largest one
// not above what the client offered.
var mssClasses = [8]uint16{64, 256, 536, 1200, pool1400, 1440, 1460, 8960}

const pool1400 = 1400

// options are the negotiated facts that fit into a cookie's low byte.
type options uint8

func makeOptions(o packet.SYNOptions) options {
	scale := uint8(15)
	if o.WindowScale >= 0 {
		scale = uint8(o.WindowScale)
	}
	// RFC 9293 section 3.7.1: without the option, 536 (IPv4); the IPv6 value
	// of 1220 is not below its class, so 536 is right for both.
	mss := o.MSS
	if mss == 0 {
		mss = 536
	}
	class := 0
	for class < 7 && mssClasses[class+1] <= mss {
		class++
	}
	v := options(scale<<4) | options(class<<1)
	if o.SACKPermitted {
		v |= 1
	}
	return v
}

func (o options) scale() uint8 {
	if o>>4 == 15 {
		return splice.NoScale
	}
	return uint8(o >> 4)
}

func (o options) mss() uint16 { return mssClasses[o>>1&7] }
func (o options) sack() bool  { return o&1 != 0 }

// Cookies makes and checks cookies. An implementation must be usable from
// several goroutines.
type Cookies interface {
	// Tuples are passed by value, so that they stay on the caller's stack.
	//
	// Make returns the ISS for a SYN with the client's ISN.
	Make(t packet.Tuple, isn packet.Seq, opt uint8, now int64) packet.Seq
	// Check says whether iss is one that Make gave, not too long ago, and
	// with which options.
	Check(t packet.Tuple, isn, iss packet.Seq, now int64) (opt uint8, ok bool)
}

// MACCookies are the real cookies.
type MACCookies struct{ k0, k1 uint64 }

// NewMACCookies makes cookies under a secret of 16 bytes.
func NewMACCookies(secret [16]byte) *MACCookies {
	return &MACCookies{binary.LittleEndian.Uint64(secret[:]), binary.LittleEndian.Uint64(secret[8:])}
}

func (m *MACCookies) mac(t *packet.Tuple, isn packet.Seq, opt uint8, slot int64) uint32 {
	var b [52]byte
	copy(b[0:], t.Src.Addr[:])
	copy(b[16:], t.Dst.Addr[:])
	binary.BigEndian.PutUint16(b[32:], t.Src.Port)
	binary.BigEndian.PutUint16(b[34:], t.Dst.Port)
	binary.BigEndian.PutUint32(b[36:], uint32(isn))
	binary.BigEndian.PutUint64(b[40:], uint64(slot))
	b[48] = opt
	return uint32(siphash.Hash(m.k0, m.k1, b[:])) &^ 0xff
}

// Make implements Cookies.
func (m *MACCookies) Make(t packet.Tuple, isn packet.Seq, opt uint8, now int64) packet.Seq {
	return packet.Seq(m.mac(&t, isn, opt, now/slotNanos) | uint32(opt))
}

// Check implements Cookies.
func (m *MACCookies) Check(t packet.Tuple, isn, iss packet.Seq, now int64) (uint8, bool) {
	opt := uint8(iss)
	slot := now / slotNanos
	for i := range int64(cookieSlots) {
		if m.mac(&t, isn, opt, slot-i) == uint32(iss)&^0xff {
			return opt, true
		}
	}
	return 0, false
}

// Handshake answers SYNs without keeping state per flow. It may be used from
// several goroutines: the SYN thread answers, the shards check.
//
// Because 24 bits of MAC can be guessed, a cookie counts only if a SYN of the
// 4-tuple and ISN was really answered in one of the slots of its life: a ring of
// bitmaps, one per slot, remembers that.
type Handshake struct {
	Cookies Cookies
	// MSS4 and MSS6 are announced to clients, by family.
	MSS4, MSS6 uint16
	// Known says whether a VIP is served; SYNs to others are dropped.
	Known func(vip packet.Endpoint) bool
	// Gone says whether a VIP that is not known was served before and is not
	// any more, while connections to it still run: SYNs to it are refused by a
	// reset, as by a host without a listener, so that clients turn elsewhere
	// at once. nil: none is.
	Gone func(vip packet.Endpoint) bool
	// Strict makes the bitmap count. A successor after a crash leaves it off
	// for the first slots, because it cannot know what its predecessor
	// answered.
	Strict atomic.Bool

	Stopped  atomic.Bool // no new connections
	Answered atomic.Uint64
	Ignored  atomic.Uint64
	Refused  atomic.Uint64

	*handshakeMemory
}

// handshakeMemory is what a successor goes on with, and what somebody who
// answers SYNs in the handshake's stead writes to.
type handshakeMemory struct {
	// answered counts what was answered by others.
	answered atomic.Uint64
	seen     [cookieSlots]generation
	// sent remembers when a SYN was answered, for the round-trip time: lossy,
	// one word per bucket, tag and time in 16 microseconds.
	sent [rttBuckets]atomic.Uint64
}

// Keep has the handshake live in mem, and goes on with what a predecessor left
// there. It comes before the first SYN. The errors are those of flowstore.
func (h *Handshake) Keep(mem *flowstore.Memory) error {
	list, _, err := flowstore.Items[handshakeMemory](mem, 1, 1, 1)
	if err != nil {
		return err
	}
	h.handshakeMemory = &list[0]
	mem.Complete()
	return nil
}

// Share is Keep for memory that others write to as well: those who answer
// SYNs by the Format. mem is of Format.Size bytes, aligned to 8, and stays the
// caller's, who keeps it mapped for as long as the handshake is used.
func (h *Handshake) Share(mem []byte) error {
	if len(mem) != int(unsafe.Sizeof(handshakeMemory{})) || uintptr(unsafe.Pointer(&mem[0]))%8 != 0 {
		return fmt.Errorf("engine: %d bytes are no memory of handshakes", len(mem))
	}
	h.handshakeMemory = (*handshakeMemory)(unsafe.Pointer(&mem[0]))
	h.Elsewhere().Store(0)
	return nil
}

// Elsewhere counts the SYNs that others answered in the shared memory.
func (h *Handshake) Elsewhere() *atomic.Uint64 {
	if h.handshakeMemory == nil {
		return new(atomic.Uint64)
	}
	return &h.answered
}

// Format is all that somebody has to know who answers SYNs in the stead of a
// Handshake: how a cookie is made, and where in the shared memory it is noted
// that it was. Offsets and sizes are in bytes.
type Format struct {
	Slot    int64     // nanoseconds for which a cookie is the same
	Classes [8]uint16 // of the MSS, ascending
	Scale   uint8     // our window shift
	Window  uint16    // of the SYN-ACK

	Size     int // of the memory
	Answered int // offset of the counter
	// Generations of bitmaps begin at Seen; each is the slot that it is of
	// and then its bits. A generation of another slot is not to be written to.
	Seen, Generations, Generation, Words int
	Sent, Buckets                        int // round-trip times
}

// CookieFormat is the format of this build.
func CookieFormat() Format {
	var m handshakeMemory
	return Format{
		Slot: slotNanos, Classes: mssClasses, Scale: splice.ScaleToClient, Window: HoldWindow,
		Size: int(unsafe.Sizeof(m)), Answered: int(unsafe.Offsetof(m.answered)),
		Seen: int(unsafe.Offsetof(m.seen)), Generations: cookieSlots, Generation: int(unsafe.Sizeof(m.seen[0])), Words: bitmapWords,
		Sent: int(unsafe.Offsetof(m.sent)), Buckets: rttBuckets,
	}
}

// CookieLife is how long after its SYN a cookie may be presented, at most.
const CookieLife = time.Duration(cookieSlots * slotNanos)

const rttBuckets = 1 << 14

const bitmapWords = 1 << 15 // 2 Mi bits per generation

type generation struct {
	slot atomic.Int64
	bits [bitmapWords]atomic.Uint64
}

// NewHandshake makes a handshake over cookies.
func NewHandshake(c Cookies, mss4, mss6 uint16, known func(packet.Endpoint) bool) *Handshake {
	h := OpenHandshake(c, mss4, mss6, known)
	h.handshakeMemory = new(handshakeMemory)
	return h
}

// OpenHandshake makes a handshake that works when Keep has given it memory.
func OpenHandshake(c Cookies, mss4, mss6 uint16, known func(packet.Endpoint) bool) *Handshake {
	h := &Handshake{Cookies: c, MSS4: mss4, MSS6: mss6, Known: known}
	h.Strict.Store(true)
	return h
}

// BitsSeed keeps the place of a bit apart from the other uses of the hash.
const BitsSeed = 7

func bitOf(t *packet.Tuple, isn packet.Seq) (word, bit uint64) {
	v := mix(t.Hash(uint64(isn)), BitsSeed)
	return v >> 6 % bitmapWords, v & 63
}

// SYN answers one SYN; b is the IP packet. The answer is appended to out. The
// SYN itself is always dropped by the caller.
func (h *Handshake) SYN(now int64, b []byte, st packet.ChecksumState, out *Output) {
	p, problem := packet.ParseTCP(b)
	if problem != packet.OK || p.Flags()&(packet.SYN|packet.ACK|packet.RST|packet.FIN) != packet.SYN ||
		(st == packet.ChecksumUnknown && !(p.IPHeaderOK() && p.VerifyChecksum())) || h.Stopped.Load() {
		h.Ignored.Add(1)
		return
	}
	t := p.Tuple()
	isn := p.Seq()
	if !h.Known(t.Dst) {
		if h.Gone == nil || !h.Gone(t.Dst) {
			h.Ignored.Add(1)
			return
		}
		// RFC 9293 section 3.10.7.1: the state is CLOSED.
		out.segment(&packet.Segment{
			Src: t.Dst, Dst: t.Src, Ack: isn.Add(1), Flags: packet.RST | packet.ACK, TTL: 64,
		}, nil)
		h.Refused.Add(1)
		return
	}
	opt := makeOptions(p.SYNOptions())
	slot := now / slotNanos
	g := &h.seen[slot%cookieSlots]
	if g.slot.Load() != slot {
		for i := range g.bits {
			g.bits[i].Store(0)
		}
		g.slot.Store(slot)
	}
	word, bit := bitOf(&t, isn)
	if g.bits[word].Load()&(1<<bit) == 0 {
		g.bits[word].Or(1 << bit)
	}
	word, bit = bitOf(&t, 0)
	g.bits[word].Or(1 << bit)
	v := t.Hash(uint64(isn))
	h.sent[v%rttBuckets].Store(v&^0xffffffff | uint64(uint32(now>>14)))
	mss := h.MSS4
	if p.V6() {
		mss = h.MSS6
	}
	o := packet.SYNOptions{MSS: mss, WindowScale: -1, SACKPermitted: opt.sack()}
	if opt.scale() != splice.NoScale {
		o.WindowScale = splice.ScaleToClient
	}
	var ob [16]byte
	out.segment(&packet.Segment{
		Src: t.Dst, Dst: t.Src,
		Seq: h.Cookies.Make(t, isn, uint8(opt), now), Ack: isn.Add(1),
		Flags: packet.SYN | packet.ACK, Window: HoldWindow, TTL: 64,
		Options: packet.AppendSYNOptions(ob[:0], o),
	}, nil)
	h.Answered.Add(1)
}

// Recent says whether a SYN of the 4-tuple, with whatever ISN, was answered
// within the life of a cookie. Then a segment that fits nothing may only have
// overtaken the first one, and must not be reset.
func (h *Handshake) Recent(t *packet.Tuple, now int64) bool {
	return h.seenSince(t, 0, now)
}

// RTT is the time since the SYN of this tuple and ISN was answered, in
// nanoseconds with 16 microseconds' grain, or 0 when it is not known any more.
func (h *Handshake) RTT(t *packet.Tuple, isn packet.Seq, now int64) int64 {
	v := t.Hash(uint64(isn))
	w := h.sent[v%rttBuckets].Load()
	if w&^0xffffffff != v&^0xffffffff {
		return 0
	}
	return int64(uint32(now>>14)-uint32(w)) << 14
}

// Validate says whether a segment with these numbers answers a SYN-ACK of
// ours.
func (h *Handshake) Validate(t *packet.Tuple, isn, iss packet.Seq, now int64) (options, bool) {
	// The bits come first: of a segment that belongs to nothing they say so for
	// less than a MAC costs.
	if h.Strict.Load() && !h.seenSince(t, isn, now) {
		return 0, false
	}
	opt, ok := h.Cookies.Check(*t, isn, iss, now)
	return options(opt), ok
}

// seenSince says whether a SYN of the 4-tuple and ISN was answered within the
// life of a cookie; ISN 0 stands for any. Bits are shared: it may have been
// another.
func (h *Handshake) seenSince(t *packet.Tuple, isn packet.Seq, now int64) bool {
	word, bit := bitOf(t, isn)
	slot := now / slotNanos
	for s := slot; s > slot-cookieSlots && s >= 0; s-- {
		if g := &h.seen[s%cookieSlots]; g.slot.Load() == s && g.bits[word].Load()&(1<<bit) != 0 {
			return true
		}
	}
	return false
}
