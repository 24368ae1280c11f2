// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"encoding/binary"
	"math/bits"
)

// ChecksumState says what is known about the TCP checksum of a packet that
// came from the kernel.
type ChecksumState uint8

const (
	// ChecksumUnknown: nobody has looked at it; VerifyChecksum must.
	ChecksumUnknown ChecksumState = iota
	// ChecksumVerified: vouched for by the kernel or verified by
	// VerifyChecksum; the field is right.
	ChecksumVerified
	// ChecksumPartial: the kernel's "checksum not ready". The field holds the
	// folded, uncomplemented sum of the pseudo header; whoever sends the
	// packet adds the segment and complements the result.
	ChecksumPartial
)

// String returns a name for logs and tests.
func (s ChecksumState) String() string {
	switch s {
	case ChecksumUnknown:
		return "unknown"
	case ChecksumVerified:
		return "verified"
	case ChecksumPartial:
		return "partial"
	}
	return "invalid"
}

// The Internet checksum (RFC 1071) is the complement of the one's complement
// sum of a text taken as 16-bit words. One's complement addition of such
// words is addition modulo 65535 with two forms of zero, 0x0000 and 0xffff.
// Hence:
//
//   - Words of 32 or 64 bits may be added and folded afterwards, because
//     2^16, 2^32 and 2^64 are all 1 modulo 65535.
//   - The order of bytes may be swapped in all words at once; the sum comes
//     out swapped, because swapping is a multiplication by 2^8.
//   - For the same reason a value that begins at an odd offset counts with its
//     folded sum swapped.
//
// A sum of words that are not all zero never folds to 0x0000, so a checksum
// that somebody computed over the whole text is never 0xffff: TCP's pseudo
// header, an IP header and an ICMP error all hold something that is not zero.

// Sum adds the bytes of b, as big-endian 16-bit words, to initial and returns
// the sum, neither folded to 16 bits nor complemented. A last odd byte counts
// as the upper half of a word. A sum may be carried on as the initial value of
// the next call only after an even number of bytes.
func Sum(b []byte, initial uint32) uint32 {
	var s, c uint64
	for len(b) >= 64 {
		q := b[:64:64]
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(q[0:]), c)
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(q[8:]), c)
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(q[16:]), c)
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(q[24:]), c)
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(q[32:]), c)
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(q[40:]), c)
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(q[48:]), c)
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(q[56:]), c)
		b = b[64:]
	}
	for len(b) >= 8 {
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(b), c)
		b = b[8:]
	}
	// The words were read in little-endian order, so the rest is put together
	// in that order as well and the folded sum is swapped once, at the end.
	var rest uint64
	if len(b) >= 4 {
		rest = uint64(binary.LittleEndian.Uint32(b))
		b = b[4:]
	}
	if len(b) >= 2 {
		rest += uint64(binary.LittleEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		rest += uint64(b[0])
	}
	s, c = bits.Add64(s, rest, c)
	s, c = bits.Add64(s, 0, c)
	s += c
	folded := bits.ReverseBytes16(fold64(s))
	sum, carry := bits.Add32(initial, uint32(folded), 0)
	return sum + carry
}

// Fold folds a sum to 16 bits. The checksum is the complement of the result.
func Fold(sum uint32) uint16 {
	sum = sum>>16 + sum&0xffff
	sum += sum >> 16
	return uint16(sum)
}

// fold64 folds a sum of 32-bit or 16-bit words to 16 bits.
func fold64(s uint64) uint16 {
	s = s>>32 + s&0xffffffff
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	return uint16(s)
}

// swapSum turns the folded sum of a value at an even offset into that of the
// same value at an odd one, and back.
func swapSum(s uint16) uint16 { return bits.ReverseBytes16(s) }

// Update16 returns the checksum of a text in which a 16-bit word at an even
// offset changed from old to new. With HC the old checksum, HC' the new one,
// m the old word and m' the new one, RFC 1624 equation 3 is
//
//	HC' = ~(~HC + ~m + m')
//
// It follows from HC = ~(C + m), where C is the sum of all other words:
// ~HC = C + m, and adding ~m, which is -m in one's complement, leaves C. The
// older equation of RFC 1141, HC' = HC + m + ~m', may give 0xffff where a
// computation over the whole text gives 0x0000. Equation 3 cannot, as long as
// HC was not 0xffff, since ~HC is then not zero and a sum with a word that is
// not zero never folds to 0x0000. A sender that wrote 0xffff is corrected:
// both stand for the same value, and 0x0000 is what a whole computation gives.
func Update16(check, old, new uint16) uint16 {
	return adjust(check, uint64(^old)+uint64(new))
}

// Update32 is Update16 for a 32-bit value at an even offset.
func Update32(check uint16, old, new uint32) uint16 {
	return adjust(check, uint64(^old)+uint64(new))
}

// Update32Odd is Update32 for a value at an odd offset: its bytes fall into
// the other halves of the words, so the difference is folded and swapped
// before it is added.
func Update32Odd(check uint16, old, new uint32) uint16 {
	return adjust(check, uint64(swapSum(fold64(uint64(^old)+uint64(new)))))
}

// adjust applies RFC 1624 equation 3 to check. diff is the sum of all ~m + m',
// not folded; it may be a sum of 16-bit and 32-bit words alike.
func adjust(check uint16, diff uint64) uint16 {
	c := ^fold64(uint64(^check) + diff)
	if c == 0xffff {
		c = 0
	}
	return c
}

// pseudo4 returns the sum of the IPv4 pseudo header of RFC 9293 section 3.1:
// src and dst are addresses of four bytes, n is the length of what follows the
// IP header.
func pseudo4(src, dst []byte, proto uint8, n int) uint32 {
	s := uint64(binary.BigEndian.Uint32(src)) + uint64(binary.BigEndian.Uint32(dst)) +
		uint64(proto) + uint64(n)
	return uint32(fold64(s))
}

// pseudo6 returns the sum of the IPv6 pseudo header of RFC 8200 section 8.1:
// addrs holds source and destination, 32 bytes, as in the header.
func pseudo6(addrs []byte, proto uint8, n int) uint32 {
	return uint32(Fold(Sum(addrs[:32], 0))) + uint32(proto) + uint32(n>>16) + uint32(n&0xffff)
}
