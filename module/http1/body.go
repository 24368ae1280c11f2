// SPDX-License-Identifier: Apache-2.0

package http1

import "math"

// States of Body.
const (
	bdDone         uint8 = iota // after the last byte, or there is none
	bdData                      // in data of known length
	bdDataCR                    // after the data of a chunk
	bdDataLF                    // after the CR that ends it
	bdSizeStart                 // at the first digit of a chunk size
	bdSize                      // in a chunk size
	bdExt                       // after ';' of an extension
	bdExtName                   // in its name
	bdExtValue                  // after its '='
	bdExtToken                  // in a token value
	bdExtQuoted                 // in a quoted value
	bdExtEscape                 // after a backslash in one
	bdExtEnd                    // after a quoted value
	bdSizeLF                    // after the CR of a chunk line
	bdTrailer                   // at the first byte of a trailer line
	bdTrailerName               // in the name of one
	bdTrailerValue              // in the value of one
	bdTrailerLF                 // after its CR
	bdEndLF                     // after the CR of the empty line
	bdUntilClose
	bdBad
)

// maxChunk bounds a chunk's size: below 2^62.
const maxChunk = 1 << 62

// Body is the cursor through one message body, of a request or a response. It is
// flat, may be copied at any moment and resumed elsewhere. The zero value is an
// empty body.
type Body struct {
	// Kind is what Start was given.
	Kind BodyKind

	state  uint8
	reason Reason
	digits uint8  // of the chunk size
	ext    uint16 // bytes of extensions in this chunk line
	trail  uint32 // bytes of trailers
	left   uint64 // bytes of data that are still to come
	seen   uint64 // bytes passed
}

// Start places the cursor before the first byte of a body. length counts for
// BodyLength only.
func (b *Body) Start(kind BodyKind, length uint64) {
	*b = Body{Kind: kind}
	switch kind {
	case BodyLength:
		if length != 0 {
			b.state, b.left = bdData, length
		}
	case BodyChunked:
		b.state = bdSizeStart
	case BodyUntilClose:
		b.state = bdUntilClose
	}
}

// Reason says why Feed returned Bad.
func (b *Body) Reason() Reason { return b.reason }

// Complete reports whether the message's last byte was passed. A BodyUntilClose
// body is never complete: its end is that of the connection.
func (b *Body) Complete() bool { return b.state == bdDone }

// Passed returns the number of bytes that the cursor has passed, framing
// included.
func (b *Body) Passed() uint64 { return b.seen }

// Known returns how many of the bytes that follow the cursor are certainly data
// of this message, whatever they are: the rest of a counted body or of the
// current chunk's data, math.MaxUint64 for BodyUntilClose, else zero. Framing
// bytes are never known.
func (b *Body) Known() uint64 {
	switch b.state {
	case bdData:
		return b.left
	case bdUntilClose:
		return math.MaxUint64
	}
	return 0
}

// Skip moves the cursor over n bytes without seeing them. More than Known turns
// the body bad: its framing is lost.
func (b *Body) Skip(n uint64) {
	switch {
	case n == 0:
	case n > b.Known():
		b.fail(ReasonOverrun)
	case b.state == bdUntilClose:
		b.seen += n
	default:
		b.data(n)
	}
}

// data passes n bytes of data, at most left.
func (b *Body) data(n uint64) {
	b.seen += n
	b.left -= n
	if b.left == 0 {
		b.state = bdDone
		if b.Kind == BodyChunked {
			b.state = bdDataCR
		}
	}
}

// Feed takes the next in-order bytes. n is how many of them belong to this
// message: len(p) for More, fewer for Done if another message follows, and for
// Bad those before the byte that could not be trusted.
func (b *Body) Feed(p []byte, lim *Limits) (n int, st Status) {
	for {
		k, _, st := b.Next(p[n:], lim)
		n += k
		if st != More || n == len(p) {
			return n, st
		}
	}
}

// Next is Feed for the first run of bytes of one sort: data, or framing (chunk
// lines, the line ends after chunks, trailers). n may be zero only when p is
// empty or the status is not More.
func (b *Body) Next(p []byte, lim *Limits) (n int, framing bool, st Status) {
	switch b.state {
	case bdDone:
		return 0, false, Done
	case bdBad:
		return 0, false, Bad
	case bdUntilClose:
		b.seen += uint64(len(p))
		return len(p), false, More
	case bdData:
		k := min(uint64(len(p)), b.left)
		b.data(k)
		st = More
		if b.state == bdDone {
			st = Done
		}
		return int(k), false, st
	}
	n, reason := b.frame(p, lim)
	b.seen += uint64(n)
	if reason != ReasonNone {
		b.fail(reason)
		return n, true, Bad
	}
	if b.state == bdDone {
		return n, true, Done
	}
	return n, true, More
}

func (b *Body) fail(reason Reason) {
	if b.state != bdBad {
		b.state = bdBad
		b.reason = reason
		b.left = 0
	}
}

// frame takes framing bytes until data begins or the message ends: RFC 9112
// section 7.1, line ends CRLF only, no white space around extensions.
func (b *Body) frame(p []byte, lim *Limits) (i int, reason Reason) {
	for i < len(p) {
		c := p[i]
		switch b.state {
		case bdDataCR:
			if c != '\r' {
				return i, ReasonBadChunkDataEnd
			}
			b.state = bdDataLF
		case bdDataLF:
			if c != '\n' {
				return i, ReasonBadChunkDataEnd
			}
			b.state = bdSizeStart

		case bdSizeStart, bdSize:
			if v := hexValue(c); v < 16 {
				if b.digits == 16 || b.left >= maxChunk>>4 {
					return i, ReasonChunkTooLarge
				}
				b.digits++
				b.left = b.left<<4 | uint64(v)
				b.state = bdSize
				break
			}
			if b.state == bdSizeStart {
				return i, ReasonBadChunkSize
			}
			switch c {
			case '\r':
				b.state = bdSizeLF
			case ';':
				b.state = bdExt
				b.ext = 1
			case '\n':
				return i, ReasonBadChunkLineEnd
			default:
				return i, ReasonBadChunkSize
			}

		case bdExt, bdExtName, bdExtValue, bdExtToken, bdExtQuoted, bdExtEscape, bdExtEnd:
			if reason := b.extension(c); reason != ReasonNone {
				return i, reason
			}
			if b.state != bdSizeLF {
				if b.ext >= lim.ChunkExt {
					return i, ReasonChunkExtensionTooLong
				}
				b.ext++
			}

		case bdSizeLF:
			if c != '\n' {
				return i, ReasonBadChunkLineEnd
			}
			i++
			b.digits, b.ext = 0, 0
			if b.left != 0 {
				b.state = bdData
				return i, ReasonNone
			}
			b.state = bdTrailer
			continue

		case bdTrailer:
			switch {
			case c == '\r':
				b.state = bdEndLF
			case is(c, clToken):
				b.state = bdTrailerName
				continue
			case c == '\n':
				return i, ReasonBareLF
			default:
				return i, ReasonBadTrailer
			}

		case bdTrailerName, bdTrailerValue:
			room := int64(lim.Trailers) - int64(b.trail)
			q := p[:min(int64(len(p)), int64(i)+room)]
			var j int
			if b.state == bdTrailerName {
				j = tokenEnd(q, i)
			} else {
				j = valueEnd(q, i)
			}
			b.trail += uint32(j - i)
			i = j
			if i == len(p) {
				return i, ReasonNone
			}
			if b.trail >= lim.Trailers {
				return i, ReasonTrailersTooLarge
			}
			switch c = p[i]; {
			case b.state == bdTrailerName && c == ':':
				b.state = bdTrailerValue
			case b.state == bdTrailerValue && c == '\r':
				b.state = bdTrailerLF
			case c == '\n':
				return i, ReasonBareLF
			default:
				return i, ReasonBadTrailer
			}
			b.trail++

		case bdTrailerLF:
			if c != '\n' {
				return i, ReasonBareCR
			}
			if b.trail >= lim.Trailers {
				return i, ReasonTrailersTooLarge
			}
			b.trail++
			b.state = bdTrailer

		case bdEndLF:
			if c != '\n' {
				return i, ReasonBareCR
			}
			b.state = bdDone
			return i + 1, ReasonNone
		}
		i++
	}
	return i, ReasonNone
}

// extension takes one byte of chunk-ext = *( ";" name [ "=" ( token /
// quoted-string ) ] ), RFC 9112 section 7.1.1. What it says is ignored.
func (b *Body) extension(c byte) Reason {
	next := bdBad
	switch b.state {
	case bdExt:
		if is(c, clToken) {
			next = bdExtName
		}
	case bdExtName, bdExtToken:
		switch {
		case is(c, clToken):
			next = b.state
		case c == '=' && b.state == bdExtName:
			next = bdExtValue
		case c == ';':
			next = bdExt
		case c == '\r':
			next = bdSizeLF
		}
	case bdExtValue:
		switch {
		case is(c, clToken):
			next = bdExtToken
		case c == '"':
			next = bdExtQuoted
		}
	case bdExtQuoted:
		switch {
		case c == '"':
			next = bdExtEnd
		case c == '\\':
			next = bdExtEscape
		case is(c, clValue):
			next = bdExtQuoted
		}
	case bdExtEscape:
		if is(c, clValue) {
			next = bdExtQuoted
		}
	case bdExtEnd:
		switch c {
		case ';':
			next = bdExt
		case '\r':
			next = bdSizeLF
		}
	}
	if next == bdBad {
		if c == '\n' {
			return ReasonBadChunkLineEnd
		}
		return ReasonBadChunkExtension
	}
	b.state = next
	return ReasonNone
}

// hexValue returns the value of a hexadecimal digit, or 16 or more.
func hexValue(c byte) byte {
	switch {
	case c-'0' <= 9:
		return c - '0'
	case c|0x20 >= 'a' && c|0x20 <= 'f':
		return c | 0x20 - 'a' + 10
	}
	return 16
}
