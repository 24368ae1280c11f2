// SPDX-License-Identifier: Apache-2.0

// Package http1 finds the borders of HTTP/1 messages: heads, chunk lines,
// trailers and bodies, fed in pieces of any size. It says where a message ends,
// what routing and framing need of its head, and one of three outcomes: accept,
// isolate, reject, with a named reason.
//
// It is a security boundary. A splicer forwards the bytes that it was given and
// cannot repair them, so what this package believes to be one message must be
// what every server behind believes (RFC 9112 section 11.2). Where the grammar
// leaves room for two readings, it refuses.
//
// The scanners are flat structs without pointers or slices: they live in memory
// that is mapped, copied and taken over by another process in the middle of a
// message. They allocate nothing, never look at a byte twice, and give the same
// result for the same bytes however these are cut.
//
// The package must not read, write, buffer messages, rewrite them, log, know the
// time, or know anything about connections. It keeps no field value except a
// bounded copy of an absolute-form authority.
package http1

import "unsafe"

// Limits bounds what a scanner accepts. The zero value accepts nothing; start
// from DefaultLimits.
type Limits struct {
	// Head is the largest head in bytes, leading empty lines and the final empty
	// line included. A head that has not ended when it is reached is refused.
	Head uint32
	// Fields is the largest number of field lines of a request head.
	Fields uint16
	// Target is the largest request target in bytes.
	Target uint16
	// ChunkExt is the largest number of bytes between the size and the line end
	// of one chunk line.
	ChunkExt uint16
	// Trailers is the largest trailer section in bytes, the final empty line not
	// counted.
	Trailers uint32
	// LeadingCRLF is the largest number of empty lines before a request line.
	LeadingCRLF uint8
}

// DefaultLimits returns the limits that suit public servers.
func DefaultLimits() Limits {
	return Limits{Head: 65536, Fields: 100, Target: 8000, ChunkExt: 4096, Trailers: 8192, LeadingCRLF: 2}
}

// Status is what a call to a scanner ended with.
type Status uint8

const (
	// More means that all bytes were consumed and the unit has not ended.
	More Status = iota
	// Done means that the unit (head or body) ended within these bytes.
	Done
	// Bad means that the bytes cannot be trusted; the reason is in the scanner.
	Bad
)

// String returns the name of the status.
func (s Status) String() string {
	switch s {
	case More:
		return "more"
	case Done:
		return "done"
	case Bad:
		return "bad"
	}
	return "invalid"
}

// Outcome is the scanner's judgement of a whole head.
type Outcome uint8

const (
	// Accept: the message may be served over a pooled connection.
	Accept Outcome = iota
	// Isolate: serve it, then close both sides, never pool.
	Isolate
	// Reject: do not forward it.
	Reject
)

// String returns the name of the outcome.
func (o Outcome) String() string {
	switch o {
	case Accept:
		return "accept"
	case Isolate:
		return "isolate"
	case Reject:
		return "reject"
	}
	return "invalid"
}

// Method is a request method as far as framing and retrying depend on it.
type Method uint8

// The methods of RFC 9110 section 9.3 and RFC 5789; every other one is Other.
const (
	Other Method = iota
	GET
	HEAD
	POST
	PUT
	DELETE
	OPTIONS
	TRACE
	PATCH
	CONNECT
)

var methodNames = [...]string{"OTHER", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT"}

// String returns the method's name, OTHER for a method that is not in the list.
func (m Method) String() string {
	if int(m) < len(methodNames) {
		return methodNames[m]
	}
	return "INVALID"
}

// Safe reports whether the method asks for no change (RFC 9110 section 9.2.1).
func (m Method) Safe() bool {
	return m == GET || m == HEAD || m == OPTIONS || m == TRACE
}

// Idempotent reports whether sending the request twice has the effect of sending
// it once (RFC 9110 section 9.2.2). Other is not: nothing is known about it.
func (m Method) Idempotent() bool {
	return m.Safe() || m == PUT || m == DELETE
}

// methodOf classifies a complete method token, which is case-sensitive.
func methodOf(b []byte) Method {
	switch string(b) {
	case "GET":
		return GET
	case "HEAD":
		return HEAD
	case "POST":
		return POST
	case "PUT":
		return PUT
	case "DELETE":
		return DELETE
	case "OPTIONS":
		return OPTIONS
	case "TRACE":
		return TRACE
	case "PATCH":
		return PATCH
	case "CONNECT":
		return CONNECT
	}
	return Other
}

// BodyKind says how the end of a body is found.
type BodyKind uint8

const (
	// BodyNone: the message ends with its head.
	BodyNone BodyKind = iota
	// BodyLength: a number of bytes that the head named.
	BodyLength
	// BodyChunked: chunks, a last chunk, trailers (RFC 9112 section 7.1).
	BodyChunked
	// BodyUntilClose: until the connection ends; responses only.
	BodyUntilClose
)

// String returns the name of the kind.
func (k BodyKind) String() string {
	switch k {
	case BodyNone:
		return "none"
	case BodyLength:
		return "length"
	case BodyChunked:
		return "chunked"
	case BodyUntilClose:
		return "until-close"
	}
	return "invalid"
}

// Span is a range of bytes of one message. Off counts from the message's first
// byte, leading empty lines included.
type Span struct{ Off, Len uint32 }

// End returns the offset after the last byte.
func (s Span) End() uint32 { return s.Off + s.Len }

// Of returns the span's bytes out of a whole message, or nil when the slice does
// not hold them all.
func (s Span) Of(message []byte) []byte {
	if uint64(s.Off)+uint64(s.Len) > uint64(len(message)) {
		return nil
	}
	return message[s.Off : s.Off+s.Len]
}

// The structs are kept in flow records: their sizes are budgets.
const (
	_ = uint(512 - unsafe.Sizeof(RequestHead{}))
	_ = uint(192 - unsafe.Sizeof(ResponseHead{}))
	_ = uint(64 - unsafe.Sizeof(Body{}))
)
