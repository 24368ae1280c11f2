// SPDX-License-Identifier: Apache-2.0

package packet

import "encoding/binary"

// Kinds of TCP options.
const (
	OptEnd           = 0
	OptNOP           = 1
	OptMSS           = 2
	OptWindowScale   = 3
	OptSACKPermitted = 4
	OptSACK          = 5
	OptTimestamps    = 8
)

// The two layouts that nearly every segment has, as big-endian words.
const (
	wordNopNopTS   = OptNOP<<24 | OptNOP<<16 | OptTimestamps<<8 | 10
	wordNopNopSACK = OptNOP<<24 | OptNOP<<16 | OptSACK<<8 // | length
)

// MaxSACKBlocks is the largest number of blocks that 40 bytes of options hold.
const MaxSACKBlocks = 4

// SACKBlock is one block of a SACK option: Left is its first place, Right the
// place after its last one (RFC 2018 section 3).
type SACKBlock struct{ Left, Right Seq }

// SYNOptions are the options of a SYN that matter to a splice. The zero value
// offers a window scale of 0; one that offers none has WindowScale -1.
type SYNOptions struct {
	MSS           uint16 // 0: absent
	WindowScale   int8   // -1: absent; at most 14 (RFC 7323 section 2.3)
	SACKPermitted bool
	Timestamps    bool // seen; never written
}

// nextOption looks at the option at o[i]. It returns its kind and length; a
// length of 0 says that the list ends here, one below 0 that it is malformed.
func nextOption(o []byte, i int) (kind uint8, n int) {
	if i >= len(o) || o[i] == OptEnd {
		return OptEnd, 0
	}
	if o[i] == OptNOP {
		return OptNOP, 1
	}
	if i+1 >= len(o) || o[i+1] < 2 || i+int(o[i+1]) > len(o) {
		return o[i], -1
	}
	return o[i], int(o[i+1])
}

func sackLenOK(n int) bool { return n >= 10 && (n-2)&7 == 0 }

// optionsOK walks the list once: see BadOptions.
func optionsOK(o []byte) bool {
	if len(o) == 0 || len(o) == 12 && binary.BigEndian.Uint32(o) == wordNopNopTS {
		return true
	}
	sacks := 0
	for i := 0; ; {
		kind, n := nextOption(o, i)
		switch {
		case n < 0:
			return false
		case n == 0:
			return true
		case kind == OptSACK:
			if sacks++; sacks > 1 || !sackLenOK(n) {
				return false
			}
		}
		i += n
	}
}

// SYNOptions reads the options of a SYN or SYN-ACK. Unknown options, and known
// ones with a wrong length, count as absent; of several the last one counts.
func (p *TCP) SYNOptions() SYNOptions {
	s := SYNOptions{WindowScale: -1}
	o := p.Options()
	for i := 0; ; {
		kind, n := nextOption(o, i)
		if n <= 0 {
			return s
		}
		switch {
		case kind == OptMSS && n == 4:
			s.MSS = binary.BigEndian.Uint16(o[i+2:])
		case kind == OptWindowScale && n == 3:
			s.WindowScale = int8(min(o[i+2], 14))
		case kind == OptSACKPermitted && n == 2:
			s.SACKPermitted = true
		case kind == OptTimestamps && n == 10:
			s.Timestamps = true
		}
		i += n
	}
}

// SACK finds the SACK option: off is the offset of its first block in Raw, n
// the number of blocks, 0 when there is none. The layouts that TCPs really
// send, NOP NOP SACK and NOP NOP TS NOP NOP SACK, are found without a walk.
func (p *TCP) SACK() (off, n int) {
	base := int(p.l4) + tcpMinLen
	o := p.Raw[base:p.data]
	if len(o) < 10 {
		return 0, 0
	}
	w := binary.BigEndian.Uint32(o)
	if w == wordNopNopTS {
		if len(o) == 12 {
			return 0, 0
		}
		if len(o) >= 24 {
			if n := nopNopSACK(o[12:]); n > 0 {
				return base + 16, n
			}
		}
	} else if n := nopNopSACK(o); n > 0 {
		return base + 4, n
	}
	for i := 0; ; {
		kind, l := nextOption(o, i)
		if l <= 0 {
			return 0, 0
		}
		if kind == OptSACK && sackLenOK(l) {
			return base + i + 2, (l - 2) / 8
		}
		i += l
	}
}

// nopNopSACK returns the number of blocks when o begins with NOP NOP SACK.
func nopNopSACK(o []byte) int {
	w := binary.BigEndian.Uint32(o)
	n := int(w & 0xff)
	if w&^0xff != wordNopNopSACK || !sackLenOK(n) || n+2 > len(o) {
		return 0
	}
	return (n - 2) / 8
}

// SACKBlock returns block i, 0 <= i < n, of the option that SACK found at off.
func (p *TCP) SACKBlock(off, i int) SACKBlock {
	b := p.Raw[off+8*i:]
	return SACKBlock{Left: Seq(binary.BigEndian.Uint32(b)), Right: Seq(binary.BigEndian.Uint32(b[4:]))}
}

// SetSACKBlock writes block i, 0 <= i < n, of the option that SACK found at
// off, and updates the TCP checksum incrementally. A block may begin at an odd
// offset: then its bytes fall into the other halves of the words.
func (p *TCP) SetSACKBlock(off, i int, b SACKBlock, st ChecksumState) {
	f := p.Raw[off+8*i:]
	diff := uint64(^binary.BigEndian.Uint32(f)) + uint64(b.Left) +
		uint64(^binary.BigEndian.Uint32(f[4:])) + uint64(b.Right)
	binary.BigEndian.PutUint32(f, uint32(b.Left))
	binary.BigEndian.PutUint32(f[4:], uint32(b.Right))
	if (off-int(p.l4))&1 != 0 {
		diff = uint64(swapSum(fold64(diff)))
	}
	p.change(diff, st)
}

// CutSACK keeps the first k blocks of the n of the option that SACK found at
// off, overwrites the others with NOPs, and updates the TCP checksum
// incrementally. Without blocks there is no option.
func (p *TCP) CutSACK(off, n, k int, st ChecksumState) {
	o := p.Options()
	before := Sum(o, 0)
	from := off + 8*k
	if k == 0 {
		from = off - 2
	} else {
		p.Raw[off-1] = byte(2 + 8*k)
	}
	for i := from; i < off+8*n; i++ {
		p.Raw[i] = OptNOP
	}
	p.change(uint64(^Fold(before))+uint64(Fold(Sum(o, 0))), st)
}

// StripSACK overwrites the SACK option, if there is one, with NOPs.
func (p *TCP) StripSACK(st ChecksumState) { p.BlankOption(OptSACK, st) }

// BlankOption overwrites every option of that kind with NOPs, updates the TCP
// checksum incrementally and reports whether there was one. The options begin
// at an even offset and are few, so they are summed before and after.
func (p *TCP) BlankOption(kind uint8, st ChecksumState) bool {
	o := p.Options()
	found := false
	var before uint32
	for i := 0; ; {
		k, n := nextOption(o, i)
		if n <= 0 {
			break
		}
		if k == kind && n > 1 {
			if !found {
				found = true
				before = Sum(o, 0)
			}
			for j := i; j < i+n; j++ {
				o[j] = OptNOP
			}
		}
		i += n
	}
	if found {
		p.change(uint64(^Fold(before))+uint64(Fold(Sum(o, 0))), st)
	}
	return found
}

// AppendSYNOptions appends the options of a SYN: MSS; NOP and window scale;
// NOP, NOP and SACK-permitted; each if present, together a multiple of four
// bytes. Timestamps are never offered.
func AppendSYNOptions(dst []byte, o SYNOptions) []byte {
	if o.MSS != 0 {
		dst = append(dst, OptMSS, 4, uint8(o.MSS>>8), uint8(o.MSS))
	}
	if o.WindowScale >= 0 {
		dst = append(dst, OptNOP, OptWindowScale, 3, uint8(min(o.WindowScale, 14)))
	}
	if o.SACKPermitted {
		dst = append(dst, OptNOP, OptNOP, OptSACKPermitted, 2)
	}
	return dst
}

// AppendSACKOption appends NOP, NOP and a SACK option with the blocks, of
// which at most MaxSACKBlocks are taken; with none it appends nothing.
func AppendSACKOption(dst []byte, blocks ...SACKBlock) []byte {
	if len(blocks) == 0 {
		return dst
	}
	blocks = blocks[:min(len(blocks), MaxSACKBlocks)]
	dst = append(dst, OptNOP, OptNOP, OptSACK, uint8(2+8*len(blocks)))
	for _, b := range blocks {
		dst = binary.BigEndian.AppendUint32(dst, uint32(b.Left))
		dst = binary.BigEndian.AppendUint32(dst, uint32(b.Right))
	}
	return dst
}
