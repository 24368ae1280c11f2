// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"encoding/binary"
	"math/bits"
)

// Classes of bytes; one table, one bit each.
const (
	clToken  uint8 = 1 << iota // tchar, RFC 9110 section 5.6.2
	clValue                    // VCHAR, obs-text, SP, HTAB: RFC 9110 section 5.5
	clTarget                   // VCHAR: what a request target may hold
	clMethod                   // upper-case letters, digits, '-', '_'
	clHost                     // reg-name without pct-encoded, RFC 3986 section 3.2.2
	clHex                      // hexadecimal digit
	clAlnum                    // letter or digit
)

var class = func() (t [256]uint8) {
	in := func(c uint8, s string, bit uint8) {
		for i := range len(s) {
			if s[i] == c {
				t[c] |= bit
			}
		}
	}
	for i := range 256 {
		c := uint8(i)
		upper := c >= 'A' && c <= 'Z'
		lower := c >= 'a' && c <= 'z'
		digit := c >= '0' && c <= '9'
		vchar := c > ' ' && c < 0x7f
		if upper || lower || digit {
			t[c] |= clToken | clHost | clAlnum
		}
		if upper || digit {
			t[c] |= clMethod
		}
		if digit || (c|0x20 >= 'a' && c|0x20 <= 'f') {
			t[c] |= clHex
		}
		if vchar {
			t[c] |= clTarget
		}
		if vchar || c >= 0x80 || c == ' ' || c == '\t' {
			t[c] |= clValue
		}
		in(c, "!#$%&'*+-.^_`|~", clToken)
		in(c, "-_", clMethod)
		in(c, "-._~!$&'()*+,;=", clHost)
	}
	return t
}()

func is(c, bit uint8) bool { return class[c]&bit != 0 }

// lower folds an ASCII letter and leaves every other byte.
func lower(c uint8) uint8 {
	if c >= 'A' && c <= 'Z' {
		c |= 0x20
	}
	return c
}

func isOWS(c uint8) bool { return c == ' ' || c == '\t' }

// ctlReason names a byte that may not stand in a field line.
func ctlReason(c uint8) Reason {
	switch c {
	case '\n':
		return ReasonBareLF
	case 0:
		return ReasonNUL
	}
	return ReasonCTL
}

const (
	swarOnes  = 0x0101010101010101
	swarHighs = 0x8080808080808080
)

// valueEnd returns the index of the first byte at or after i that may not stand
// in a field value (CR included), or len(b).
//
// Eight bytes at a time: x-0x20 borrows into the high bit of a byte below 0x20,
// and DEL^0x7f is zero. A borrow can also mark bytes above the first marked one,
// never below it, so the lowest mark is exact; a HTAB is marked and passed over.
func valueEnd(b []byte, i int) int {
	for {
		for i+8 <= len(b) {
			x := binary.LittleEndian.Uint64(b[i:])
			y := x ^ (0x7f * swarOnes)
			m := ((x-0x20*swarOnes)&^x | (y-swarOnes)&^y) & swarHighs
			if m != 0 {
				i += bits.TrailingZeros64(m) >> 3
				break
			}
			i += 8
		}
		for i < len(b) && is(b[i], clValue) {
			i++
			if i&7 == 0 {
				break
			}
		}
		if i >= len(b) || !is(b[i], clValue) {
			return i
		}
	}
}

// targetEnd returns the index of the first byte at or after i that may not stand
// in a request target, or len(b).
func targetEnd(b []byte, i int) int {
	for i+8 <= len(b) {
		x := binary.LittleEndian.Uint64(b[i:])
		y := x ^ (0x7f * swarOnes)
		m := ((x-0x21*swarOnes)&^x | (y-swarOnes)&^y | x) & swarHighs
		if m != 0 {
			return i + bits.TrailingZeros64(m)>>3
		}
		i += 8
	}
	for i < len(b) && is(b[i], clTarget) {
		i++
	}
	return i
}

// tokenEnd returns the index of the first byte at or after i that is not a token
// character, or len(b).
func tokenEnd(b []byte, i int) int {
	for i < len(b) && class[b[i]]&clToken != 0 {
		i++
	}
	return i
}
