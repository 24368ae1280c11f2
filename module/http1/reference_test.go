// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"regexp"
	"strconv"
	"strings"
)

// This file is the slow and obvious scanner: it sees whole messages, works with
// strings and regular expressions in the order of the grammar, and shares no
// code with the fast one.

// refRequest is what the reference finds in a request head.
type refRequest struct {
	Len, LineEnd                              int
	Method, Target, Path, Query, Host         string
	Minor                                     int
	Body                                      BodyKind
	Length                                    uint64
	Isolate                                   bool
	Close, KeepAlive, Upgrade, Expect, Secret bool
	Fragment                                  bool
	ConnFields, Forwarded                     []string // the names
	Wanted                                    map[string][]string
}

var (
	refRequestLine = regexp.MustCompile(`^([A-Z0-9_-]{1,32}) ([!-~]+) HTTP/1\.([01])$`)
	refFieldLine   = regexp.MustCompile("^([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(|[\x21-\x7e\\x80-\\xff](?:[\t\x20-\x7e\\x80-\\xff]*[\x21-\x7e\\x80-\\xff])?)[ \t]*$")
	refAbsolute    = regexp.MustCompile(`^(?i:http://)([^/?#]{1,128})((?:/[^?#]*)?)(?:\?([^#]*))?(#.*)?$`)
	refOrigin      = regexp.MustCompile(`^(/[^?#]*)(?:\?([^#]*))?(#.*)?$`)
	refHost        = regexp.MustCompile(`^([A-Za-z0-9._~!$&'()*+,;=-]{1,255}|\[[0-9A-Fa-f.]*(?::[0-9A-Fa-f.]*){2,8}\])(?::([0-9]*))?$`)
	refLiteral     = regexp.MustCompile(`^\[.{2,46}\]`)
	refSeparators  = regexp.MustCompile(`[^A-Za-z0-9]`)
	refDigits      = regexp.MustCompile(`^[0-9]+$`)
	refScheme      = regexp.MustCompile(`(?i)(?:^|[ \t,])(?:ntlm|negotiate|kerberos)(?:$|[ \t,])`)
	refStatusLine  = regexp.MustCompile("^HTTP/1\\.([0-9]) ([1-9][0-9][0-9])(?: [\t\x20-\x7e\\x80-\\xff]*)?$")
	refStatusStart = regexp.MustCompile(`^HTTP/1\.[0-9] [1-9][0-9][0-9][ \r\n]`)
)

// latin1 makes one rune of each byte, so that regular expressions see bytes.
func latin1(b []byte) string {
	r := make([]rune, len(b))
	for i, c := range b {
		r[i] = rune(c)
	}
	return string(r)
}

func refValidHost(s string) bool {
	m := refHost.FindStringSubmatch(s)
	if m == nil || len(s) > 261 {
		return false
	}
	if s[0] == '[' && !refLiteral.MatchString(s) {
		return false
	}
	port := strings.TrimLeft(m[2], "0")
	n, _ := strconv.Atoi("0" + port)
	return len(port) <= 5 && n <= 65535
}

type refField struct{ name, key, value string }

// refFields parses the lines of a field section, or says that it cannot.
func refFields(lines []string) ([]refField, bool) {
	var fs []refField
	for _, l := range lines {
		m := refFieldLine.FindStringSubmatch(l)
		if m == nil {
			return nil, false
		}
		key := strings.ToLower(m[1])
		switch letters := refSeparators.ReplaceAllString(key, ""); {
		case letters == "contentlength" && key != "content-length":
			return nil, false
		case letters == "transferencoding" && key != "transfer-encoding":
			return nil, false
		}
		fs = append(fs, refField{m[1], key, m[2]})
	}
	return fs, true
}

func refValues(fs []refField, key string) (vs []string) {
	for _, f := range fs {
		if f.key == key {
			vs = append(vs, f.value)
		}
	}
	return vs
}

// refLength reads the Content-Length fields of a message.
func refLength(vs []string) (n uint64, doubtful, ok bool) {
	padded := false
	for i, v := range vs {
		if !refDigits.MatchString(v) {
			return 0, false, false
		}
		k, err := strconv.ParseUint(v, 10, 63)
		padded = padded || len(v) > 1 && v[0] == '0'
		if err != nil || i > 0 && (k != n || padded) {
			return 0, false, false
		}
		n = k
		doubtful = i > 0 || padded
	}
	return n, doubtful, true
}

func refConnection(vs []string) (opts map[string]bool, other bool) {
	opts = map[string]bool{}
	for _, v := range vs {
		for o := range strings.SplitSeq(v, ",") {
			switch o = strings.ToLower(strings.Trim(o, " \t")); o {
			case "":
			case "close", "keep-alive", "upgrade", "te":
				opts[o] = true
			default:
				other = true
			}
		}
	}
	return opts, other
}

// refHeadEnd returns the length of the head that msg begins with, the empty
// lines that lead it counted separately, or ok=false when it is not complete.
func refHeadEnd(msg string) (lead, end int, ok bool) {
	for strings.HasPrefix(msg[lead:], "\r\n") {
		lead += 2
	}
	k := strings.Index(msg[lead:], "\r\n\r\n")
	if k < 0 {
		return 0, 0, false
	}
	return lead, lead + k + 4, true
}

// referenceRequest parses the head at the start of msg. complete is false when
// there is no whole head; valid is false when it must be rejected.
func referenceRequest(b []byte, lim Limits, wanted []string) (r refRequest, complete, valid bool) {
	lead, end, ok := refHeadEnd(string(b))
	if !ok {
		return r, false, false
	}
	r.Len = end
	if lead/2 > int(lim.LeadingCRLF) || end > int(lim.Head) {
		return r, true, false
	}
	lines := strings.Split(latin1(b[lead:end-4]), "\r\n")
	r.LineEnd = lead + len(lines[0]) + 2
	m := refRequestLine.FindStringSubmatch(lines[0])
	if m == nil {
		return r, true, false
	}
	r.Method, r.Target = m[1], m[2]
	r.Minor = int(m[3][0] - '0')
	if len(r.Target) > int(lim.Target) || r.Method == "CONNECT" || len(lines)-1 > int(lim.Fields) {
		return r, true, false
	}
	authority := ""
	if t := refOrigin.FindStringSubmatch(r.Target); t != nil {
		r.Path, r.Query = t[1], t[2]
		r.Fragment = t[3] != ""
	} else if t := refAbsolute.FindStringSubmatch(r.Target); t != nil {
		authority, r.Path, r.Query = t[1], t[2], t[3]
		r.Fragment = t[4] != ""
		if !refValidHost(authority) {
			return r, true, false
		}
	} else if r.Target == "*" && r.Method == "OPTIONS" {
		r.Path = "*"
	} else {
		return r, true, false
	}
	fs, ok := refFields(lines[1:])
	if !ok {
		return r, true, false
	}

	hosts := refValues(fs, "host")
	switch {
	case len(hosts) > 1, len(hosts) == 0 && r.Minor == 1:
		return r, true, false
	case len(hosts) == 1:
		r.Host = hosts[0]
		if !refValidHost(r.Host) || authority != "" && !strings.EqualFold(authority, r.Host) {
			return r, true, false
		}
	}
	if authority != "" {
		r.Host = authority
	}

	lengths := refValues(fs, "content-length")
	n, doubtful, ok := refLength(lengths)
	if !ok {
		return r, true, false
	}
	r.Isolate = r.Isolate || doubtful
	if codings := refValues(fs, "transfer-encoding"); len(codings) > 0 {
		if len(codings) > 1 || !strings.EqualFold(codings[0], "chunked") || len(lengths) > 0 || r.Minor == 0 {
			return r, true, false
		}
		r.Body = BodyChunked
	} else if n > 0 {
		r.Body, r.Length = BodyLength, n
	}
	if r.Body != BodyNone && strings.Contains(" GET HEAD DELETE TRACE ", " "+r.Method+" ") {
		r.Isolate = true
	}

	opts, other := refConnection(refValues(fs, "connection"))
	r.Close, r.KeepAlive = opts["close"], opts["keep-alive"]
	r.Upgrade = opts["upgrade"] || len(refValues(fs, "upgrade")) > 0
	r.Isolate = r.Isolate || other || r.Upgrade
	for _, f := range fs {
		if f.key == "connection" {
			if o, _ := refConnection([]string{f.value}); o["close"] {
				r.ConnFields = append(r.ConnFields, f.name)
			}
		}
		if k := strings.ReplaceAll(f.key, "_", "-"); k == "x-forwarded-for" || f.key == "forwarded" {
			r.Forwarded = append(r.Forwarded, f.name)
		}
		if f.key == "authorization" || f.key == "proxy-authorization" {
			r.Secret = r.Secret || refScheme.MatchString(f.value)
		}
	}
	if len(r.ConnFields) > 4 {
		r.ConnFields = r.ConnFields[:4]
		r.Isolate = true
	}
	if ex := refValues(fs, "expect"); len(ex) > 0 {
		r.Expect = len(ex) == 1 && strings.EqualFold(ex[0], "100-continue") && r.Minor == 1 && r.Body != BodyNone
		r.Isolate = r.Isolate || !r.Expect
	}
	r.Wanted = map[string][]string{}
	for _, w := range wanted {
		r.Wanted[w] = refValues(fs, strings.ToLower(w))
	}
	return r, true, true
}

// refResponse is what the reference finds in a response head.
type refResponse struct {
	Len            int
	Status, Minor  int
	Body           BodyKind
	Length         uint64
	Outcome        Outcome
	Close          bool
	KeepAlive      bool
	Upgrade        bool
	ConnAuth       bool
	Interim        bool
	Doubt, Decided bool
}

// referenceResponse parses the head at the start of msg. Decided is false when
// there is no whole head.
func referenceResponse(b []byte, lim Limits, req Method) (r refResponse) {
	s := string(b)
	k := strings.Index(s, "\r\n\r\n")
	if k < 0 {
		return r
	}
	r.Decided = true
	r.Len = k + 4
	if !refStatusStart.MatchString(s) {
		r.Outcome = Reject
		return r
	}
	doubt := func() refResponse {
		return refResponse{Decided: true, Doubt: true, Outcome: Isolate, Body: BodyUntilClose}
	}
	if r.Len > int(lim.Head) {
		return doubt()
	}
	lines := strings.Split(latin1(b[:k]), "\r\n")
	m := refStatusLine.FindStringSubmatch(lines[0])
	if m == nil {
		return doubt()
	}
	r.Minor = int(m[1][0] - '0')
	r.Status, _ = strconv.Atoi(m[2])
	fs, ok := refFields(lines[1:])
	if !ok {
		return doubt()
	}
	lengths := refValues(fs, "content-length")
	n, padded, ok := refLength(lengths)
	if !ok {
		return doubt()
	}
	codings := refValues(fs, "transfer-encoding")
	if len(codings) > 1 || len(codings) == 1 && !strings.EqualFold(codings[0], "chunked") {
		return doubt()
	}
	strange := len(codings) > 0 && (len(lengths) > 0 || r.Minor != 1)
	switch {
	case r.Status == 101:
		d := doubt()
		d.Len, d.Doubt = r.Len, false
		return d
	case r.Status < 200, r.Status == 204:
		if n > 0 || len(codings) > 0 {
			d := doubt()
			d.Len, d.Doubt = r.Len, false
			return d
		}
	case req == HEAD, r.Status == 304:
		if strange {
			r.Outcome = Isolate
		}
	case strange, len(codings) == 0 && len(lengths) == 0:
		d := doubt()
		d.Len, d.Doubt = r.Len, false
		return d
	case len(codings) == 1:
		r.Body = BodyChunked
	case n > 0:
		r.Body, r.Length = BodyLength, n
	}
	opts, other := refConnection(refValues(fs, "connection"))
	r.Close, r.KeepAlive = opts["close"], opts["keep-alive"]
	r.Upgrade = opts["upgrade"] || len(refValues(fs, "upgrade")) > 0
	for _, f := range fs {
		if f.key == "www-authenticate" || f.key == "proxy-authenticate" {
			r.ConnAuth = r.ConnAuth || refScheme.MatchString(f.value)
		}
	}
	ends := r.Close || r.Minor != 1 && !r.KeepAlive && r.Status >= 200
	if r.Minor > 1 || r.Status >= 600 || padded || other || ends {
		r.Outcome = Isolate
	}
	r.Interim = r.Status < 200
	return r
}

var (
	refChunkLine = regexp.MustCompile("^([0-9A-Fa-f]{1,16})((?:;[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:=(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+|\"(?:[\t !#-\\[\\]-~\\x80-\\xff]|\\\\[\t\x20-\x7e\\x80-\\xff])*\"))?)*)$")
	refTrailer   = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\\x80-\\xff]*$")
)

// referenceChunked returns the number of bytes of the chunked body at the start
// of b. st is Bad when a complete line is wrong, More when the body has not
// ended.
func referenceChunked(b []byte, lim Limits) (n int, st Status) {
	s := string(b)
	line := func() (string, bool) {
		k := strings.Index(s[n:], "\r\n")
		if k < 0 {
			return "", false
		}
		l := s[n : n+k]
		n += k + 2
		return l, true
	}
	for {
		l, ok := line()
		if !ok {
			return n, More
		}
		m := refChunkLine.FindStringSubmatch(latin1([]byte(l)))
		if m == nil {
			return n, Bad
		}
		size, err := strconv.ParseUint(m[1], 16, 62)
		if err != nil || len(l)-len(m[1]) > int(lim.ChunkExt) {
			return n, Bad
		}
		if size == 0 {
			break
		}
		if uint64(len(s)-n) < size {
			return n, More
		}
		n += int(size)
		if len(s)-n < 2 {
			return n, More
		}
		n += 2
		if s[n-2:n] != "\r\n" {
			return n, Bad
		}
	}
	trailers := 0
	for {
		l, ok := line()
		if !ok {
			return n, More
		}
		if l == "" {
			return n, Done
		}
		trailers += len(l) + 2
		if trailers > int(lim.Trailers) || !refTrailer.MatchString(latin1([]byte(l))) {
			return n, Bad
		}
	}
}
