// SPDX-License-Identifier: Apache-2.0

package http1

// States of ResponseHead.
const (
	rsVersion uint8 = iota // in "HTTP/1."
	rsMinor                // at the minor version
	rsSpace                // at the space after it
	rsStatus               // in the status code
	rsPhrase               // at the byte after the status code
	rsReason               // in the reason phrase
	rsLF                   // after the CR of the status line
	rsFields               // in the field section
	rsDone
	rsBad
)

// ResponseHead scans one response head, interim or final. Its bytes are
// forwarded as they pass; nobody keeps them. Call Reset before the first byte of
// each response, and Again after each interim head. It is flat, may be copied at any moment and resumed elsewhere.
//
// A response is never refused for its fields, since the client is its judge too.
// Where its framing is in doubt, the scan ends at once with Done, Isolate and
// BodyUntilClose: Len is then the offset of the doubt, and everything from there
// on is delivered as it is.
type ResponseHead struct {
	// Length is the length of a BodyLength body in bytes, below 2^63.
	Length uint64
	// Len is the number of bytes that were consumed so far; after Done the head's
	// length, or the offset of the doubt.
	Len uint32
	// KeepAliveTimeout (seconds) and KeepAliveMax (requests) are the server's
	// Keep-Alive hints, at most 65535; zero means none.
	KeepAliveTimeout uint32
	KeepAliveMax     uint32
	// Status is the status code.
	Status uint16
	// Minor is x of HTTP/1.x.
	Minor uint8
	// Body says how the body is framed, given the request's method. BodyNone
	// for a Content-Length of zero.
	Body BodyKind
	// Outcome is Reject only when the bytes are not HTTP/1.x NNN.
	Outcome Outcome
	Reason  Reason
	// Close and KeepAlive: the option stood in a Connection field.
	Close, KeepAlive bool
	// Upgrade: an Upgrade field or the connection option upgrade was there.
	Upgrade bool
	// ConnAuth: a challenge of a scheme that authenticates the connection
	// (NTLM, Negotiate): it is private to this client for ever.
	ConnAuth bool

	method Method
	state  uint8
	index  uint8
	fields section
}

// Reset makes ready for the head of a response to a request with that method.
func (h *ResponseHead) Reset(req Method) { *h = ResponseHead{method: req} }

// Again makes ready for the next head of the same response, after an interim
// one. What that one said against reuse stays said: Isolate with its reason, and
// ConnAuth.
func (h *ResponseHead) Again() {
	next := ResponseHead{method: h.method, ConnAuth: h.ConnAuth}
	if h.Outcome == Isolate {
		next.Outcome, next.Reason = h.Outcome, h.Reason
	}
	*h = next
}

// Interim reports whether the head is that of a 1xx response other than 101, so
// that another head follows (RFC 9110 section 15.2).
func (h *ResponseHead) Interim() bool {
	return h.state == rsDone && h.Status >= 100 && h.Status < 200 && h.Status != 101 && h.Body == BodyNone
}

// Persistent reports whether the server keeps the connection open after this
// response, as far as its head says (RFC 9112 section 9.3).
func (h *ResponseHead) Persistent() bool {
	return !h.Close && (h.Minor == 1 || h.KeepAlive) && h.Body != BodyUntilClose
}

// Scan takes the next bytes of the response. n is how many of them belong to the
// head: len(b) for More; for Bad, or Done in doubt, the bytes before the one
// that could not be understood. After Done and Bad it takes nothing more and
// repeats the status.
func (h *ResponseHead) Scan(b []byte, lim *Limits) (n int, st Status) {
	if h.state >= rsDone {
		if h.state == rsDone {
			return 0, Done
		}
		return 0, Bad
	}
	if room := lim.Head - min(h.Len, lim.Head); uint64(len(b)) > uint64(room) {
		b = b[:room]
	}
	i, reason := 0, ReasonNone
	if h.state != rsFields {
		i, reason = h.scanLine(b)
	}
	if h.state == rsFields && reason == ReasonNone {
		i, st = h.fields.scan(b, i, h.Len, lim, nil, nil)
		reason = h.fields.reason
	}
	h.Len += uint32(i)
	if reason == ReasonNone && st == More && h.Len >= lim.Head {
		reason = ReasonHeadTooLarge
	}
	switch {
	case h.state < rsPhrase && reason != ReasonNone:
		// The first bytes of a response must be HTTP/1.x NNN.
		h.state = rsBad
		h.Outcome, h.Reason = Reject, ReasonBadStatusLine
		return i, Bad
	case reason != ReasonNone:
		h.doubt(reason)
	case st == Done:
		h.finish()
	default:
		return i, More
	}
	h.state = rsDone
	return i, Done
}

// scanLine takes bytes of the status line, and returns the index after it or
// that of the offending byte.
func (h *ResponseHead) scanLine(b []byte) (i int, reason Reason) {
	if h.state == rsVersion && h.index == 0 {
		i = h.statusWhole(b) // the usual start, read at once
	}
	for i < len(b) {
		c := b[i]
		switch h.state {
		case rsVersion:
			if c != "HTTP/1."[h.index] {
				return i, ReasonBadStatusLine
			}
			h.index++
			if h.index == uint8(len("HTTP/1.")) {
				h.index = 0
				h.state = rsMinor
			}
		case rsMinor:
			if c-'0' > 9 {
				return i, ReasonBadStatusLine
			}
			h.Minor = c - '0'
			h.state = rsSpace
		case rsSpace:
			if c != ' ' {
				return i, ReasonBadStatusLine
			}
			h.state = rsStatus
		case rsStatus:
			if c-'0' > 9 || h.index == 0 && c == '0' {
				return i, ReasonBadStatusLine
			}
			h.Status = h.Status*10 + uint16(c-'0')
			h.index++
			if h.index == 3 {
				h.state = rsPhrase
			}
		case rsPhrase:
			// RFC 9112 section 4 wants a space even before an empty phrase; many
			// servers omit it, and no client minds.
			switch c {
			case ' ':
				h.state = rsReason
			case '\r':
				h.state = rsLF
			case '\n':
				return i, ReasonBareLF
			default:
				h.state = rsStatus // a fourth digit or worse: not NNN
				return i, ReasonBadStatusLine
			}
		case rsReason:
			i = valueEnd(b, i)
			if i == len(b) {
				return i, ReasonNone
			}
			if b[i] != '\r' {
				return i, ctlReason(b[i])
			}
			h.state = rsLF
		case rsLF:
			if c != '\n' {
				return i, ReasonBareCR
			}
			h.state = rsFields
			return i + 1, ReasonNone
		}
		i++
	}
	return i, ReasonNone
}

// statusWhole takes "HTTP/1.1 NNN ", where that is what a response begins with,
// and returns how many bytes that is. It changes nothing for any other.
func (h *ResponseHead) statusWhole(b []byte) int {
	const start, n = "HTTP/1.1 ", len("HTTP/1.1 NNN ")
	if len(b) < n || string(b[:len(start)]) != start || b[n-1] != ' ' {
		return 0
	}
	x, y, z := b[9]-'0', b[10]-'0', b[11]-'0'
	if x-1 > 8 || y > 9 || z > 9 {
		return 0
	}
	h.Minor, h.Status = 1, uint16(x)*100+uint16(y)*10+uint16(z)
	h.index = 3
	h.state = rsReason
	return n
}

// doubt gives up framing: what follows is delivered until the server closes.
func (h *ResponseHead) doubt(reason Reason) {
	h.Outcome, h.Reason = Isolate, reason
	h.Body, h.Length = BodyUntilClose, 0
}

func (h *ResponseHead) isolate(reason Reason) {
	if h.Outcome == Accept {
		h.Outcome, h.Reason = Isolate, reason
	}
}

// finish frames the body of a complete head: RFC 9112 section 6.3, in its order.
func (h *ResponseHead) finish() {
	f := h.fields.flags
	h.Close = f&sawClose != 0
	h.KeepAlive = f&sawKeepAlive != 0
	h.Upgrade = f&sawUpgrade != 0
	h.ConnAuth = h.ConnAuth || f&sawConnAuth != 0
	h.KeepAliveTimeout = uint32(h.fields.kaTimeout)
	h.KeepAliveMax = uint32(h.fields.kaMax)
	encoded := f&sawTransferEncoding != 0

	if h.Status == 101 {
		// The connection becomes another protocol's.
		h.doubt(ReasonSwitchingProtocols)
		return
	}
	if h.Status < 200 || h.Status == 204 {
		// No body, so neither field may be there (RFC 9112 section 6.1, RFC 9110
		// section 8.6). A length of zero is common and harms nobody.
		switch {
		case encoded:
			h.doubt(ReasonTransferEncodingInOld)
			return
		case h.fields.length > 0:
			h.doubt(ReasonUnexpectedBody)
			return
		}
	} else if h.method != HEAD && h.Status != 304 {
		switch {
		case encoded && f&sawLength != 0:
			h.doubt(ReasonTransferEncodingAndLength)
			return
		case encoded && h.Minor != 1:
			h.doubt(ReasonTransferEncodingInOld)
			return
		case encoded:
			h.Body = BodyChunked
		case f&sawLength == 0:
			h.doubt(ReasonNoLength)
			return
		case h.fields.length > 0:
			h.Body, h.Length = BodyLength, h.fields.length
		}
	} else {
		// HEAD and 304: the fields describe another response.
		switch {
		case encoded && f&sawLength != 0:
			h.isolate(ReasonTransferEncodingAndLength)
		case encoded && h.Minor != 1:
			h.isolate(ReasonTransferEncodingInOld)
		}
	}

	if h.Minor > 1 {
		h.isolate(ReasonUnsupportedVersion)
	}
	if h.Status >= 600 {
		h.isolate(ReasonStatusRange)
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
	if !h.Persistent() && (h.Status >= 200 || h.Close) {
		h.isolate(ReasonServerCloses)
	}
}
