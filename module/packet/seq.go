// SPDX-License-Identifier: Apache-2.0

package packet

// Seq is a place in a TCP sequence space. Every comparison is made modulo
// 2^32 (RFC 9293 section 3.4): s is before t when the way from s up to t is
// shorter than 2^31.
type Seq uint32

// Size is a number of places in a sequence space: bytes of payload, SYN and
// FIN included, or a window.
type Size uint32

// Delta is the constant difference between two sequence spaces, that of a
// client connection and that of the server connection to which it is spliced.
// It wraps: every value of it is legal.
type Delta uint32

// Add returns the place n after s.
func (s Seq) Add(n Size) Seq { return s + Seq(n) }

// Sub returns the place n before s.
func (s Seq) Sub(n Size) Seq { return s - Seq(n) }

// Less reports whether s is before t.
func (s Seq) Less(t Seq) bool { return int32(s-t) < 0 }

// LessEq reports whether s is before t or equal to it.
func (s Seq) LessEq(t Seq) bool { return int32(s-t) <= 0 }

// In reports whether lo <= s < hi. Unlike two comparisons it holds for ranges
// of up to 2^32-1 places; with lo == hi it is always false.
func (s Seq) In(lo, hi Seq) bool { return s-lo < hi-lo }

// To returns the number of places from s up to t. The caller knows that s is
// not after t; otherwise the result is the way round.
func (s Seq) To(t Seq) Size { return Size(t - s) }

// Shift carries s into the space that lies d above.
func (s Seq) Shift(d Delta) Seq { return s + Seq(d) }

// Unshift is the inverse of Shift.
func (s Seq) Unshift(d Delta) Seq { return s - Seq(d) }

// DeltaTo returns the d for which s.Shift(d) == t.
func (s Seq) DeltaTo(t Seq) Delta { return Delta(t - s) }

// MaxSeq returns the later one of a and b.
func MaxSeq(a, b Seq) Seq {
	if a.Less(b) {
		return b
	}
	return a
}

// MinSeq returns the earlier one of a and b.
func MinSeq(a, b Seq) Seq {
	if b.Less(a) {
		return b
	}
	return a
}
