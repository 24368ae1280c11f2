// SPDX-License-Identifier: Apache-2.0

package http1

import "bytes"

// maxMethod is the longest method in bytes.
const maxMethod = 32

// maxAuthority is the longest authority of an absolute-form target in bytes. It
// has to be kept, because the Host field that must equal it comes later.
const maxAuthority = 128

// States of RequestHead.
const (
	rqStart     uint8 = iota // before the first byte of the request line
	rqStartLF                // after the CR of an empty line before it
	rqMethod                 // in the method
	rqTarget                 // at the first byte of the target
	rqScheme                 // in "http://"
	rqAuthority              // in the authority of an absolute-form target
	rqPath                   // in the path or query
	rqAsterisk               // after the asterisk of an asterisk-form target
	rqVersion                // in "HTTP/1.1"
	rqVersionCR              // after it
	rqVersionLF              // after the CR of the request line
	rqFields                 // in the field section
	rqDone
	rqBad
)

// RequestHead scans one request head. The zero value is ready for a message.
// Offsets count from the first byte of the message, leading empty lines
// included. It is flat, may be copied at any moment and resumed elsewhere.
type RequestHead struct {
	// Len is the number of bytes of the message that were consumed so far: after
	// Done the length of the head, from leading empty lines to the final empty
	// line, after Bad the offset at which trust ended.
	Len uint32
	// LineEnd is the offset after the request line's CRLF; zero before that.
	LineEnd uint32

	// MethodSpan, Target, Path and Query are valid as soon as the request line
	// is complete (LineEnd != 0). Path is the raw path of the target, without
	// query and fragment: empty for an absolute-form target that has none, "*"
	// for the asterisk form. Query is what follows the question mark.
	MethodSpan, Target, Path, Query Span
	// Host is the raw host and port: of the absolute-form authority if there is
	// one, else of the Host field without white space around it. Its length is
	// zero in an HTTP/1.0 request without Host.
	Host Span

	// Length is the length of a BodyLength body in bytes, below 2^63.
	Length uint64

	// Method is valid when the method is complete.
	Method Method
	// Minor is x of HTTP/1.x: 0 or 1.
	Minor uint8
	// Body says how the body is framed: BodyNone, BodyLength or BodyChunked. A
	// Content-Length of zero is BodyNone.
	Body BodyKind
	// Outcome and Reason are the judgement: Reject exactly when Scan returned
	// Bad. Of several reasons for Isolate the first one in the order of the
	// checks at the head's end is named.
	Outcome Outcome
	Reason  Reason

	// Close and KeepAlive: the option stood in a Connection field.
	Close, KeepAlive bool
	// Upgrade: an Upgrade field or the connection option upgrade was there.
	Upgrade bool
	// Expect: an HTTP/1.1 request with a body asks for 100-continue.
	Expect bool
	// ConnAuth: Authorization or Proxy-Authorization of a scheme that
	// authenticates the connection instead of the request (NTLM, Negotiate).
	ConnAuth bool
	// Fragment: the target has a number sign. RFC 9112 section 3.2 has no
	// fragments; no length depends on it, but servers disagree on whether the
	// path ends there, which routing has to know.
	Fragment bool
	// ForwardedMore: there were more fields than ForwardedNames holds.
	ForwardedMore bool

	// NConn spans of ConnFields are the names of Connection fields that hold
	// close, for overwriting at the same length. More than four isolate.
	NConn uint8
	// NForwarded spans of ForwardedNames are the names of X-Forwarded-For (with
	// '-' or '_') and Forwarded fields.
	NForwarded     uint8
	ConnFields     [4]Span
	ForwardedNames [4]Span

	// Spans are the values of the wanted fields, white space around them cut
	// off: of the first line that has the name. Counts says how many lines have
	// it, at most 255; zero means that the field is absent.
	Spans  [MaxWanted]Span
	Counts [MaxWanted]uint8

	state   uint8
	index   uint8 // bytes of the current fixed word, or of the method
	empty   uint8 // leading empty lines
	major   uint8
	authLen uint8
	part    uint8 // of the target: partPath, partQuery or partFragment
	fields  section
	auth    [maxAuthority]byte // lower case
}

// Reset makes ready for the next message.
func (h *RequestHead) Reset() { *h = RequestHead{} }

// Reading reports whether the first byte of the message was seen, and its head
// is not complete.
func (h *RequestHead) Reading() bool { return h.Len != 0 && h.state < rqDone }

// Persistent reports whether the client's connection stays open after this
// exchange (RFC 9112 section 9.3). It is valid when Scan returned Done.
func (h *RequestHead) Persistent() bool {
	return !h.Close && (h.Minor == 1 || h.KeepAlive)
}

// Scan takes the next bytes of the message. n is how many of them belong to the
// head: len(b) for More; for Bad the bytes before the one that could not be
// trusted. After Done and Bad it takes nothing more and repeats the status.
//
// want may be nil; it must be the same set for all bytes of one message. The
// scanner keeps neither b nor want.
func (h *RequestHead) Scan(b []byte, lim *Limits, want *Wanted) (n int, st Status) {
	if h.state >= rqDone {
		if h.state == rqDone {
			return 0, Done
		}
		return 0, Bad
	}
	if room := lim.Head - min(h.Len, lim.Head); uint64(len(b)) > uint64(room) {
		b = b[:room]
	}
	i, reason := 0, ReasonNone
	if h.state != rqFields {
		i, reason = h.scanLine(b, lim)
	}
	if h.state == rqFields && reason == ReasonNone {
		i, st = h.fields.scan(b, i, h.Len, lim, h, want)
		reason = h.fields.reason
	}
	h.Len += uint32(i)
	if reason == ReasonNone && st == Done {
		reason = h.finish()
	}
	if reason == ReasonNone && st == More && h.Len >= lim.Head {
		reason = ReasonHeadTooLarge
	}
	switch {
	case reason != ReasonNone:
		h.state = rqBad
		h.Outcome, h.Reason = Reject, reason
		return i, Bad
	case st == Done:
		h.state = rqDone
		return i, Done
	}
	return i, More
}

// scanLine takes bytes of the request line, and returns the index after it or
// that of the offending byte.
func (h *RequestHead) scanLine(b []byte, lim *Limits) (i int, reason Reason) {
	var c byte
	for i < len(b) {
		c = b[i]
		switch h.state {
		case rqStart:
			if c == '\r' {
				// RFC 9112 section 2.2: an empty line before a request line is
				// ignored. It is part of the message that follows.
				if h.empty >= lim.LeadingCRLF {
					return i, ReasonLeadingCRLF
				}
				h.empty++
				h.state = rqStartLF
				i++
				continue
			}
			h.MethodSpan.Off = h.Len + uint32(i)
			h.state = rqMethod
			fallthrough

		case rqMethod:
			if h.index == 0 {
				// The usual method, read at once.
				if n := h.methodWhole(b[i:]); n != 0 {
					i += n
					continue
				}
			}
			for i < len(b) && is(b[i], clMethod) {
				if h.index == maxMethod {
					return i, ReasonBadMethod
				}
				h.fields.name[h.index] = b[i]
				h.index++
				i++
			}
			if i == len(b) {
				return i, ReasonNone
			}
			if c = b[i]; c != ' ' || h.index == 0 {
				if c == '\n' {
					return i, ReasonBareLF
				}
				return i, ReasonBadMethod
			}
			h.Method = methodOf(h.fields.name[:h.index])
			h.MethodSpan.Len = uint32(h.index)
			if h.Method == CONNECT {
				return i, ReasonConnect
			}
			i++
			h.index = 0
			h.startTarget(h.Len + uint32(i))

		case rqTarget:
			switch {
			case c == '/':
				h.state = rqPath // origin-form
			case c == '*' && h.Method == OPTIONS:
				i++
				h.state = rqAsterisk // RFC 9112 section 3.2.4
			case c|0x20 == 'h':
				h.state = rqScheme // absolute-form
			default:
				return i, targetReason(c)
			}

		case rqScheme:
			if lower(c) != "http://"[h.index] {
				return i, targetReason(c)
			}
			i++
			h.index++
			if h.index == uint8(len("http://")) {
				h.index = 0
				h.Host.Off = h.Len + uint32(i)
				h.state = rqAuthority
			}

		case rqAuthority:
			if c == '/' || c == '?' || c == '#' || c == ' ' {
				if !h.fields.hostDone() {
					return i, ReasonBadAuthority
				}
				h.Host.Len = h.Len + uint32(i) - h.Host.Off
				h.Path.Off = h.Host.End()
				h.state = rqPath
				continue
			}
			if h.authLen == maxAuthority || isOWS(c) || !h.fields.authorityStep(c) {
				return i, ReasonBadAuthority
			}
			h.auth[h.authLen] = lower(c)
			h.authLen++
			i++

		case rqPath:
			// More than the limit is never looked at.
			room := int(lim.Target) - int(h.Len+uint32(i)-h.Target.Off)
			j := targetEnd(b[:min(len(b), i+max(room, 0)+1)], i)
			if j-i > room {
				return i + max(room, 0), ReasonTargetTooLong
			}
			h.splitTarget(b[i:j], h.Len+uint32(i))
			i = j
			if i == len(b) {
				return i, ReasonNone
			}
			if b[i] != ' ' {
				return i, targetReason(b[i])
			}
			h.endTarget(h.Len + uint32(i))
			i++
			h.state = rqVersion

		case rqAsterisk:
			if c != ' ' {
				return i, targetReason(c)
			}
			h.endTarget(h.Len + uint32(i))
			i++
			h.state = rqVersion

		case rqVersion:
			// RFC 9112 section 2.3: "HTTP/" DIGIT "." DIGIT.
			if h.index == 0 && len(b)-i >= len("HTTP/1.1\r\n") && string(b[i:i+len("HTTP/1.1\r\n")]) == "HTTP/1.1\r\n" {
				// The usual version, read at once.
				h.major, h.Minor = 1, 1
				h.index = uint8(len("HTTP/1.1"))
				return h.endLine(i + len("HTTP/1.1\r\n")), ReasonNone
			}
			switch h.index {
			case 5:
				if c-'0' > 9 {
					return i, versionReason(c)
				}
				h.major = c - '0'
			case 7:
				if c-'0' > 9 {
					return i, versionReason(c)
				}
				h.Minor = c - '0'
				h.state = rqVersionCR
			default:
				if c != "HTTP/1.1"[h.index] {
					return i, versionReason(c)
				}
			}
			h.index++
			i++

		case rqVersionCR:
			if c != '\r' {
				return i, versionReason(c)
			}
			if h.major != 1 || h.Minor > 1 {
				return i, ReasonUnsupportedVersion
			}
			i++
			h.state = rqVersionLF

		case rqVersionLF:
			if c != '\n' {
				return i, ReasonBareCR
			}
			return h.endLine(i + 1), ReasonNone

		case rqStartLF:
			if c != '\n' {
				return i, ReasonBareCR
			}
			i++
			h.state = rqStart
		}
	}
	return i, ReasonNone
}

// methodWhole takes GET or POST and the space after it, where the first bytes
// of a method are these, and returns how many bytes that is. It changes nothing
// for any other.
func (h *RequestHead) methodWhole(b []byte) int {
	switch {
	case len(b) >= 4 && string(b[:4]) == "GET ":
		h.Method, h.MethodSpan.Len = GET, 3
	case len(b) >= 5 && string(b[:5]) == "POST ":
		h.Method, h.MethodSpan.Len = POST, 4
	default:
		return 0
	}
	n := h.MethodSpan.Len + 1
	h.startTarget(h.MethodSpan.Off + n)
	return int(n)
}

// startTarget is called where the target begins, at message offset off.
func (h *RequestHead) startTarget(off uint32) {
	h.Target.Off, h.Path.Off = off, off
	h.state = rqTarget
}

// endLine is called after the request line, which ends before b[i].
func (h *RequestHead) endLine(i int) int {
	h.LineEnd = h.Len + uint32(i)
	h.state = rqFields
	h.fields = section{}
	return i
}

// targetReason names what is wrong with a byte of a target. Octets from 0x80 are
// refused too: RFC 3986 has none, and servers that split the line at Unicode
// white space (0x85, 0xa0) would see another target.
func targetReason(c byte) Reason {
	switch c {
	case '\n':
		return ReasonBareLF
	case 0:
		return ReasonNUL
	}
	return ReasonBadTarget
}

func versionReason(c byte) Reason {
	if c == '\n' {
		return ReasonBareLF
	}
	return ReasonBadVersion
}

// Parts of a target.
const (
	partPath uint8 = iota
	partQuery
	partFragment
)

// splitTarget looks for the ends of path and query in a piece of the target that
// starts at message offset off.
func (h *RequestHead) splitTarget(p []byte, off uint32) {
	if h.part == partPath {
		k := bytes.IndexByte(p, '?')
		if f := bytes.IndexByte(p, '#'); f >= 0 && (k < 0 || f < k) {
			h.Path.Len = off + uint32(f) - h.Path.Off
			h.part = partFragment
			return
		}
		if k < 0 {
			return
		}
		h.Path.Len = off + uint32(k) - h.Path.Off
		h.part = partQuery
		off += uint32(k) + 1
		h.Query.Off = off
		p = p[k+1:]
	}
	if h.part == partQuery {
		if f := bytes.IndexByte(p, '#'); f >= 0 {
			h.Query.Len = off + uint32(f) - h.Query.Off
			h.part = partFragment
		}
	}
}

// endTarget closes the spans of a target that ends before message offset off.
func (h *RequestHead) endTarget(off uint32) {
	h.Target.Len = off - h.Target.Off
	h.Fragment = h.part == partFragment
	switch h.part {
	case partPath:
		h.Path.Len = off - h.Path.Off
	case partQuery:
		h.Query.Len = off - h.Query.Off
	}
}

// sameAuthority reports whether byte i (counted from 0) of the Host field may
// follow, given the authority of the target.
func (h *RequestHead) sameAuthority(i uint16, c byte) bool {
	return h.authLen == 0 || i < uint16(h.authLen) && h.auth[i] == lower(c)
}

// setHost takes the value of the Host field, n bytes long without white space.
func (h *RequestHead) setHost(s Span, n uint16) Reason {
	if h.authLen == 0 {
		h.Host = s
	} else if n != uint16(h.authLen) {
		return ReasonHostMismatch
	}
	return ReasonNone
}

func (h *RequestHead) addForwarded(s Span) {
	if int(h.NForwarded) == len(h.ForwardedNames) {
		h.ForwardedMore = true
		return
	}
	h.ForwardedNames[h.NForwarded] = s
	h.NForwarded++
}

func (h *RequestHead) addConnection(s Span) {
	if int(h.NConn) < len(h.ConnFields) {
		h.ConnFields[h.NConn] = s
		h.NConn++
		return
	}
	h.isolate(ReasonTooManyConnectionFields)
}

func (h *RequestHead) addWanted(i uint8, s Span) {
	if h.Counts[i] == 0 {
		h.Spans[i] = s
	}
	if h.Counts[i] < 0xff {
		h.Counts[i]++
	}
}

func (h *RequestHead) isolate(reason Reason) {
	if h.Outcome == Accept {
		h.Outcome, h.Reason = Isolate, reason
	}
}

// finish judges a complete head.
func (h *RequestHead) finish() Reason {
	f := h.fields.flags
	h.Close = f&sawClose != 0
	h.KeepAlive = f&sawKeepAlive != 0
	h.Upgrade = f&sawUpgrade != 0
	h.ConnAuth = f&sawConnAuth != 0

	if f&sawHost == 0 && h.Minor == 1 {
		return ReasonNoHost // RFC 9112 section 3.2
	}
	if f&sawTransferEncoding != 0 {
		// RFC 9112 section 6.1 lets a server choose; each choice is somebody's
		// smuggling.
		if f&sawLength != 0 {
			return ReasonTransferEncodingAndLength
		}
		if h.Minor == 0 {
			return ReasonTransferEncodingInOld
		}
		h.Body = BodyChunked
	} else if h.fields.length > 0 {
		h.Body = BodyLength
		h.Length = h.fields.length
	}

	if h.Body != BodyNone {
		switch h.Method {
		case GET, HEAD, DELETE, TRACE:
			// RFC 9110 sections 9.3.1, 9.3.2, 9.3.5, 9.3.8: no defined
			// semantics; servers that do not read it take it for a request.
			h.isolate(ReasonUnexpectedBody)
		}
	}
	if f&sawRepeatedLength != 0 {
		h.isolate(ReasonRepeatedContentLength)
	}
	if f&sawPaddedLength != 0 {
		h.isolate(ReasonPaddedContentLength)
	}
	if f&sawConnectionOther != 0 {
		h.isolate(ReasonConnectionOption)
	}
	if f&(sawExpect|sawExpectOther) != 0 {
		// RFC 9110 section 10.1.1: 100-continue is the only expectation, it is
		// ignored in HTTP/1.0, and a client does not send it without a body.
		h.Expect = f&sawExpectOther == 0 && h.Minor == 1 && h.Body != BodyNone
		if !h.Expect {
			h.isolate(ReasonExpectation)
		}
	}
	if h.Upgrade {
		h.isolate(ReasonUpgrade)
	}
	return ReasonNone
}
