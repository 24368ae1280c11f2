// SPDX-License-Identifier: Apache-2.0

package http1

// This file scans the field section of a head: the lines between the start line
// and the empty line. Requests and responses share it. Every reason that it
// returns stops a request with an error and a response's framing with doubt.

// kind says which machine, if any, reads the value of a field.
type kind uint8

const (
	kindPlain kind = iota
	kindHost
	kindContentLength
	kindTransferEncoding
	kindConnection
	kindUpgrade
	kindExpect
	kindKeepAlive
	kindChallenge   // WWW-Authenticate, Proxy-Authenticate
	kindCredentials // Authorization, Proxy-Authorization
	kindForwarded   // Forwarded, X-Forwarded-For
)

// What a field section has shown so far.
const (
	sawHost uint32 = 1 << iota
	sawLength
	sawRepeatedLength
	sawPaddedLength
	sawTransferEncoding
	sawClose
	sawKeepAlive
	sawUpgrade
	sawConnectionOther
	sawExpect
	sawExpectOther
	sawConnAuth
	sawCloseHere // in the Connection field being read
)

// States of the section machine.
const (
	fsLine  uint8 = iota // at the first byte of a line
	fsName               // in a field name
	fsSpace              // in the white space before a value
	fsValue              // in a value
	fsLF                 // after the CR of a field line
	fsEnd                // after the CR of the empty line
)

// keptName is how many bytes of a field name are kept when a cut falls inside
// it. No name that matters is longer.
const keptName = 40

// section is the state of a field section. offsets are message offsets.
type section struct {
	length    uint64 // Content-Length that was read
	val       uint64 // number being read
	nameOff   uint32
	valueOff  uint32
	valueEnd  uint32
	flags     uint32
	kaTimeout uint16
	kaMax     uint16
	fields    uint16
	hostLen   uint16
	state     uint8
	kind      kind
	want      uint8 // index of the wanted name, plus one
	nameLen   uint8 // bytes kept in name; keptName+1 for a longer one
	suspect   uint8 // state of suspectStep
	vstate    uint8 // state of the value machine
	vindex    uint8 // bytes matched by it
	vmask     uint8 // names that still match
	hostState uint8
	reason    Reason
	name      [keptName]byte
}

// scan takes bytes of the section from b[i:]; off is the message offset of b[0].
// It returns the index after the last byte taken, and Done after the empty line
// or Bad with s.reason set; for Bad the index is that of the offending byte, or
// the one after the line that was wrong as a whole. r is nil for responses.
func (s *section) scan(b []byte, i int, off uint32, lim *Limits, r *RequestHead, w *Wanted) (int, Status) {
	var j int
	var c byte
	var name []byte
	for i < len(b) {
		switch s.state {
		case fsLine:
			c = b[i]
			if class[c]&clToken == 0 {
				if c == '\r' {
					s.state = fsEnd
					i++
					continue
				}
				s.reason = s.lineReason(c)
				return i, Bad
			}
			if r != nil && s.fields >= lim.Fields {
				s.reason = ReasonTooManyFields
				return i, Bad
			}
			s.fields++
			s.nameOff = off + uint32(i)
			s.nameLen = 0
			s.suspect = 0
			s.state = fsName
			fallthrough

		case fsName:
			j = tokenEnd(b, i)
			if j == len(b) {
				s.keepName(b[i:j])
				return j, More
			}
			if b[j] != ':' {
				s.reason = nameReason(b[j])
				return j, Bad
			}
			name = b[i:j]
			if s.nameLen != 0 {
				s.keepName(name)
				name = s.name[:min(int(s.nameLen), keptName)]
				if s.nameLen > keptName {
					name = nil
				}
			} else if suspectFirst(name) {
				s.suspect = suspectStep(0, name)
			}
			if s.reason = s.startValue(name, off+uint32(j), r, w); s.reason != ReasonNone {
				return j, Bad
			}
			i = j + 1
			s.state = fsSpace
			if i == len(b) {
				return i, More
			}
			fallthrough

		case fsSpace:
			for i < len(b) && isOWS(b[i]) {
				i++
			}
			if i == len(b) {
				return i, More
			}
			s.valueOff = off + uint32(i)
			s.valueEnd = s.valueOff
			s.state = fsValue
			fallthrough

		case fsValue:
			j = valueEnd(b, i)
			if s.kind == kindConnection && j < len(b) && s.connectionWhole(b[i:j]) {
				// The usual value, read at once.
			} else if s.kind != kindPlain {
				if n, reason := s.value(b[i:j], r); reason != ReasonNone {
					s.reason = reason
					return i + n, Bad
				}
			}
			if s.kind == kindHost || s.want != 0 {
				for k := j; k > i; k-- {
					if !isOWS(b[k-1]) {
						s.valueEnd = off + uint32(k)
						break
					}
				}
			}
			if j == len(b) {
				return j, More
			}
			if b[j] != '\r' {
				s.reason = ctlReason(b[j])
				return j, Bad
			}
			s.state = fsLF
			i = j + 1
			if i == len(b) {
				return i, More
			}
			fallthrough

		case fsLF:
			if b[i] != '\n' {
				s.reason = ReasonBareCR
				return i, Bad
			}
			i++
			s.state = fsLine
			if s.kind != kindPlain || s.want != 0 {
				if s.reason = s.endValue(r); s.reason != ReasonNone {
					return i, Bad
				}
			}

		case fsEnd:
			if b[i] != '\n' {
				s.reason = ReasonBareCR
				return i, Bad
			}
			return i + 1, Done
		}
	}
	return i, More
}

// lineReason names what is wrong with the first byte of a field line.
func (s *section) lineReason(c byte) Reason {
	switch {
	case isOWS(c) && s.fields == 0:
		return ReasonSpaceBeforeField // RFC 9112 section 2.2
	case isOWS(c):
		return ReasonObsFold // RFC 9112 section 5.2
	case c == ':':
		return ReasonEmptyFieldName
	}
	return nameReason(c)
}

// nameReason names what is wrong with a byte inside or after a field name.
func nameReason(c byte) Reason {
	switch {
	case isOWS(c):
		return ReasonSpaceBeforeColon // RFC 9112 section 5.1
	case c == '\r':
		return ReasonNoColon
	case c < ' ' || c == 0x7f:
		return ctlReason(c)
	}
	return ReasonBadFieldName
}

// keepName keeps a piece of a name that a cut divides.
func (s *section) keepName(p []byte) {
	s.suspect = suspectStep(s.suspect, p)
	if int(s.nameLen)+len(p) > keptName {
		s.nameLen = keptName + 1
		return
	}
	s.nameLen += uint8(copy(s.name[s.nameLen:], p))
}

// startValue is called at the colon. name is nil when it is longer than any name
// that matters; end is the message offset of the colon.
func (s *section) startValue(name []byte, end uint32, r *RequestHead, w *Wanted) Reason {
	s.kind = kindOf(name)
	s.want = 0
	if s.suspect == suspectLength && s.kind != kindContentLength ||
		s.suspect == suspectEncoding && s.kind != kindTransferEncoding {
		// Servers that fold separators would read a length here.
		return ReasonSuspiciousName
	}
	if r == nil {
		if s.kind == kindHost || s.kind == kindExpect || s.kind == kindForwarded || s.kind == kindCredentials {
			s.kind = kindPlain
		}
	} else {
		if s.kind == kindKeepAlive || s.kind == kindChallenge {
			s.kind = kindPlain
		}
		if w != nil && name != nil {
			s.want = w.index(name)
		}
	}
	s.vstate, s.vindex, s.vmask, s.val = 0, 0, 0, 0
	switch s.kind {
	case kindHost:
		if s.flags&sawHost != 0 {
			return ReasonTwoHosts
		}
		s.flags |= sawHost
		s.hostState, s.hostLen = hostStart, 0
	case kindTransferEncoding:
		if s.flags&sawTransferEncoding != 0 {
			return ReasonTwoTransferEncodings
		}
		s.flags |= sawTransferEncoding
	case kindConnection:
		s.flags &^= sawCloseHere
		s.vmask = 0xff
	case kindKeepAlive, kindChallenge, kindCredentials:
		s.vmask = 0xff
	case kindUpgrade:
		s.flags |= sawUpgrade
	case kindForwarded:
		r.addForwarded(Span{s.nameOff, end - s.nameOff})
	}
	return ReasonNone
}

// value feeds a piece of a value to the field's machine. It returns the index of
// the offending byte with the reason.
func (s *section) value(p []byte, r *RequestHead) (int, Reason) {
	switch s.kind {
	case kindHost:
		n := s.hostRun(p, r)
		for i, c := range p[n:] {
			if reason := s.hostStep(c, r); reason != ReasonNone {
				return n + i, reason
			}
		}
	case kindContentLength:
		for i, c := range p {
			if reason := s.lengthStep(c); reason != ReasonNone {
				return i, reason
			}
		}
	case kindTransferEncoding:
		for i, c := range p {
			if !s.wordStep(c, "chunked") {
				return i, ReasonUnknownTransferEncoding
			}
		}
	case kindConnection:
		for _, c := range p {
			s.connectionStep(c)
		}
	case kindExpect:
		for _, c := range p {
			if !s.wordStep(c, "100-continue") {
				s.flags |= sawExpectOther
				break
			}
		}
	case kindKeepAlive:
		for _, c := range p {
			s.keepAliveStep(c)
		}
	case kindChallenge, kindCredentials:
		s.schemeRun(p)
	}
	return 0, ReasonNone
}

// endValue is called after the line end of a field that has a machine or is
// wanted.
func (s *section) endValue(r *RequestHead) Reason {
	if s.want != 0 {
		r.addWanted(s.want-1, Span{s.valueOff, s.valueEnd - s.valueOff})
	}
	switch s.kind {
	case kindHost:
		if !s.hostDone() {
			return ReasonInvalidHost
		}
		return r.setHost(Span{s.valueOff, s.valueEnd - s.valueOff}, s.hostLen)
	case kindContentLength:
		return s.lengthDone()
	case kindTransferEncoding:
		if s.vindex == 0 {
			return ReasonEmptyTransferEncoding
		}
		if s.vindex != uint8(len("chunked")) {
			return ReasonUnknownTransferEncoding
		}
	case kindConnection:
		s.connectionToken()
		if r != nil && s.flags&sawCloseHere != 0 {
			r.addConnection(Span{s.nameOff, uint32(len("connection"))})
		}
	case kindExpect:
		if s.flags&sawExpect != 0 || s.vindex != uint8(len("100-continue")) {
			s.flags |= sawExpectOther
		}
		s.flags |= sawExpect
	case kindKeepAlive:
		s.keepAliveToken()
	case kindChallenge, kindCredentials:
		s.schemeToken()
	}
	return ReasonNone
}

// kindOf looks a complete field name up.
func kindOf(name []byte) kind {
	switch len(name) {
	case 4:
		if equalFold(name, "host") {
			return kindHost
		}
	case 6:
		if equalFold(name, "expect") {
			return kindExpect
		}
	case 7:
		if equalFold(name, "upgrade") {
			return kindUpgrade
		}
	case 9:
		if equalFold(name, "forwarded") {
			return kindForwarded
		}
	case 10:
		if equalFold(name, "connection") {
			return kindConnection
		}
		if equalFold(name, "keep-alive") {
			return kindKeepAlive
		}
	case 13:
		if equalFold(name, "authorization") {
			return kindCredentials
		}
	case 14:
		if equalFold(name, "content-length") {
			return kindContentLength
		}
	case 15:
		// Gateways that pass fields as variables (RFC 3875 section 4.1.18) make
		// one of '-' and '_', so each spelling counts as the field.
		if equalFold(name[:1], "x") && isDash(name[1]) && equalFold(name[2:11], "forwarded") &&
			isDash(name[11]) && equalFold(name[12:], "for") {
			return kindForwarded
		}
	case 16:
		if equalFold(name, "www-authenticate") {
			return kindChallenge
		}
	case 17:
		if equalFold(name, "transfer-encoding") {
			return kindTransferEncoding
		}
	case 18:
		if equalFold(name, "proxy-authenticate") {
			return kindChallenge
		}
	case 19:
		if equalFold(name, "proxy-authorization") {
			return kindCredentials
		}
	}
	return kindPlain
}

func isDash(c byte) bool { return c == '-' || c == '_' }

// equalFold compares a name with a lower-case one of the same length.
func equalFold(b []byte, want string) bool {
	if len(b) != len(want) {
		return false
	}
	for i, c := range b {
		if lower(c) != want[i] {
			return false
		}
	}
	return true
}

// Names that hold the letters of content-length or transfer-encoding and differ
// only in separators: a server that folds '_' and '-', or drops them, reads a
// length where this package would not. suspectStep is a machine over the letters
// and digits of a name: 0 at the start, suspectNever, or the number of letters
// matched, with suspectTE set for the second word.
const (
	suspectTE       = 0x80
	suspectNever    = 0xff
	suspectLength   = uint8(len(suspectWordCL))
	suspectEncoding = suspectTE | uint8(len(suspectWordTE))
	suspectWordCL   = "contentlength"
	suspectWordTE   = "transferencoding"
)

// suspectFirst reports whether a name could be suspect at all.
func suspectFirst(name []byte) bool {
	if len(name) < len(suspectWordCL) {
		return false
	}
	c := name[0] | 0x20
	return c == 'c' || c == 't' || !is(name[0], clAlnum)
}

func suspectStep(state uint8, p []byte) uint8 {
	for _, c := range p {
		if state == suspectNever {
			break
		}
		if !is(c, clAlnum) {
			continue
		}
		c = lower(c)
		n := int(state &^ suspectTE)
		switch {
		case state == 0 && c == 'c':
			state = 1
		case state == 0 && c == 't':
			state = suspectTE | 1
		case state == 0:
			state = suspectNever
		case state&suspectTE != 0 && n < len(suspectWordTE) && suspectWordTE[n] == c:
			state++
		case state&suspectTE == 0 && n < len(suspectWordCL) && suspectWordCL[n] == c:
			state++
		default:
			state = suspectNever
		}
	}
	return state
}
