// SPDX-License-Identifier: Apache-2.0

package http1

// This file holds the machines that read the values of the fields on which
// framing, routing and pooling depend, byte after byte. White space before a
// value never reaches them.

// maxLength is the largest Content-Length: below 2^63.
const maxLength = 1<<63 - 1

// States of lengthStep.
const (
	lenStart uint8 = iota
	lenDigits
	lenSpace
)

// lengthStep reads Content-Length = 1*DIGIT (RFC 9110 section 8.6). A list of
// equal numbers in one field, which that section permits to repair, is refused.
func (s *section) lengthStep(c byte) Reason {
	if c-'0' <= 9 {
		if s.vstate == lenSpace {
			return ReasonBadContentLength
		}
		if s.vstate == lenDigits && s.vindex == 1 && s.val == 0 {
			s.flags |= sawPaddedLength
		}
		d := uint64(c - '0')
		if s.val > (maxLength-d)/10 {
			return ReasonContentLengthTooLarge
		}
		s.val = s.val*10 + d
		s.vstate = lenDigits
		s.vindex = 1
		return ReasonNone
	}
	if isOWS(c) && s.vstate != lenStart {
		s.vstate = lenSpace
		return ReasonNone
	}
	return ReasonBadContentLength
}

func (s *section) lengthDone() Reason {
	if s.vstate == lenStart {
		return ReasonBadContentLength
	}
	if s.flags&sawLength != 0 {
		if s.length != s.val || s.flags&sawPaddedLength != 0 {
			// The same number in another spelling is another one to whoever
			// compares texts or reads zeros as octal.
			return ReasonTwoContentLengths
		}
		s.flags |= sawRepeatedLength
	}
	s.flags |= sawLength
	s.length = s.val
	return ReasonNone
}

// wordStep matches a value that must be one word, white space after it allowed.
// vindex counts the bytes matched; vstate is 1 in the white space.
func (s *section) wordStep(c byte, word string) bool {
	if isOWS(c) {
		s.vstate = 1
		return true
	}
	if s.vstate == 1 || int(s.vindex) >= len(word) || lower(c) != word[s.vindex] {
		s.vindex = 0xff
		s.vstate = 1
		return false
	}
	s.vindex++
	return true
}

// Connection options that framing permits (RFC 9110 section 7.6.1).
var connectionWords = [...]string{"close", "keep-alive", "upgrade", "te"}

// listStep follows a comma-separated list of words: vmask holds those that still
// match the element, vindex its bytes so far, vstate 1 after white space that
// followed it. It reports whether the element ended.
func (s *section) listStep(c byte, words []string) bool {
	switch {
	case c == ',':
		return true
	case isOWS(c):
		if s.vindex != 0 {
			s.vstate = 1
		}
	case s.vstate == 1:
		s.vmask = 0 // two words in one element
	default:
		c = lower(c)
		for k, w := range words {
			if int(s.vindex) >= len(w) || w[s.vindex] != c {
				s.vmask &^= 1 << k
			}
		}
		if s.vindex < 0xff {
			s.vindex++
		}
	}
	return false
}

// listWord returns the index of the word that the element is, or -1, and whether
// the element is empty; it makes ready for the next element.
func (s *section) listWord(words []string) (word int, empty bool) {
	word, empty = -1, s.vindex == 0
	for k, w := range words {
		if s.vmask&(1<<k) != 0 && int(s.vindex) == len(w) {
			word = k
		}
	}
	s.vstate, s.vindex, s.vmask = 0, 0, 0xff
	return word, empty
}

// connectionWhole takes a value, or what is left of one from the start of an
// element, that is one frequent word. It changes nothing for any other.
func (s *section) connectionWhole(p []byte) bool {
	if s.vindex != 0 {
		return false
	}
	switch {
	case len(p) == 10 && equalFold(p, "keep-alive"):
		s.flags |= sawKeepAlive
	case len(p) == 5 && equalFold(p, "close"):
		s.flags |= sawClose | sawCloseHere
	default:
		return false
	}
	return true
}

func (s *section) connectionStep(c byte) {
	if s.listStep(c, connectionWords[:]) {
		s.connectionToken()
	}
}

func (s *section) connectionToken() {
	word, empty := s.listWord(connectionWords[:])
	switch {
	case word == 0:
		s.flags |= sawClose | sawCloseHere
	case word == 1:
		s.flags |= sawKeepAlive
	case word == 2:
		s.flags |= sawUpgrade
	case word < 0 && !empty:
		s.flags |= sawConnectionOther
	}
}

// Authentication schemes that belong to the connection and not to the request.
var schemeWords = [...]string{"ntlm", "negotiate", "kerberos"}

// schemeRun feeds a piece of a value to schemeStep, without what is left of a
// word that is none of the schemes.
func (s *section) schemeRun(p []byte) {
	const schemes = 1<<len(schemeWords) - 1
	for i := 0; i < len(p); i++ {
		if s.vmask&schemes == 0 {
			for i < len(p) && !isOWS(p[i]) && p[i] != ',' {
				i++
			}
			if i == len(p) {
				return
			}
		}
		s.schemeStep(p[i])
	}
}

// schemeStep looks for such a scheme anywhere in a list of challenges. Quoted
// strings are not followed: a word found in one makes a connection private
// without need, which harms nobody.
func (s *section) schemeStep(c byte) {
	if isOWS(c) || s.listStep(c, schemeWords[:]) {
		s.schemeToken()
	}
}

func (s *section) schemeToken() {
	if word, _ := s.listWord(schemeWords[:]); word >= 0 {
		s.flags |= sawConnAuth
	}
}

// Parameters of a response's Keep-Alive field.
var keepAliveWords = [...]string{"timeout", "max"}

// States of keepAliveStep after the name of a parameter.
const (
	kaTimeout uint8 = 2 + iota
	kaMax
	kaSkip
)

// keepAliveStep reads "timeout=5, max=100". It is a hint and never refused: what
// cannot be read is passed over.
func (s *section) keepAliveStep(c byte) {
	switch {
	case c == ',' || c == ';':
		s.keepAliveToken()
	case s.vstate >= kaTimeout:
		if c-'0' <= 9 && s.vstate != kaSkip {
			s.val = min(s.val*10+uint64(c-'0'), 1<<16-1)
		} else if !isOWS(c) && c != '"' {
			s.vstate = kaSkip
		}
	case c == '=':
		word, _ := s.listWord(keepAliveWords[:])
		s.vstate = kaSkip
		if word >= 0 {
			s.vstate = kaTimeout + uint8(word)
		}
		s.val = 0
	default:
		s.listStep(c, keepAliveWords[:])
	}
}

func (s *section) keepAliveToken() {
	switch s.vstate {
	case kaTimeout:
		s.kaTimeout = uint16(s.val)
	case kaMax:
		s.kaMax = uint16(s.val)
	}
	s.vstate, s.vindex, s.vmask, s.val = 0, 0, 0xff, 0
}

// States of hostStep.
const (
	hostStart uint8 = iota
	hostName
	hostLiteral // inside [ ]
	hostClosed  // after ]
	hostPort
	hostSpace // white space after the value
)

// maxHost is the longest uri-host in bytes: a DNS name is at most 255.
const maxHost = 255

// hostStep reads Host = uri-host [ ":" port ] (RFC 9110 section 7.2), except
// that a percent sign is refused: the host is a routing key, and a server may
// decode what this package compares raw. Of an IP literal only the alphabet and
// the number of colons are checked; IPvFuture and zones are refused.
//
// vindex counts the colons of a literal; val is the port.
func (s *section) hostStep(c byte, r *RequestHead) Reason {
	if r != nil && !isOWS(c) {
		if !r.sameAuthority(s.hostLen, c) {
			return ReasonHostMismatch
		}
	}
	if !s.authorityStep(c) {
		return ReasonInvalidHost
	}
	return ReasonNone
}

// hostRun takes the bytes of a name, up to the port or the end, as hostStep
// would. It takes nothing where that would have to look at each.
func (s *section) hostRun(p []byte, r *RequestHead) int {
	if s.hostState > hostName || r.authLen != 0 {
		return 0
	}
	n := 0
	for n < len(p) && class[p[n]]&clHost != 0 {
		n++
	}
	if n == 0 || int(s.hostLen)+n > maxHost {
		return 0
	}
	s.hostState = hostName
	s.hostLen += uint16(n)
	return n
}

// authorityStep is the machine of hostStep without the comparison. It is used
// for the authority of an absolute-form target too.
func (s *section) authorityStep(c byte) bool {
	if isOWS(c) {
		if !s.hostDone() {
			return false
		}
		s.hostState = hostSpace
		return true
	}
	s.hostLen++
	if s.hostLen > maxHost+6 {
		return false
	}
	switch s.hostState {
	case hostStart, hostName:
		switch {
		case is(c, clHost):
			s.hostState = hostName
			return s.hostLen <= maxHost
		case c == ':' && s.hostState == hostName:
			s.hostState = hostPort
			return true
		case c == '[' && s.hostState == hostStart:
			s.hostState = hostLiteral
			s.vindex = 0
			return true
		}
	case hostLiteral:
		switch {
		case c == ':':
			if s.vindex < 0xff {
				s.vindex++
			}
			return s.hostLen <= 47
		case c == ']':
			s.hostState = hostClosed
			return s.vindex >= 2 && s.vindex <= 7+1
		case is(c, clHex) || c == '.':
			return s.hostLen <= 47
		}
	case hostClosed:
		if c == ':' {
			s.hostState = hostPort
			return true
		}
	case hostPort:
		if c-'0' <= 9 {
			s.val = s.val*10 + uint64(c-'0')
			return s.val <= 65535
		}
	}
	return false
}

// hostDone reports whether the value may end here. An empty port is legal.
func (s *section) hostDone() bool {
	return s.hostState != hostStart && s.hostState != hostLiteral
}
