// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"strings"
	"testing"
)

// line is a request line; host the least that HTTP/1.1 wants after it.
const (
	line = "POST /a HTTP/1.1\r\n"
	host = "Host: x\r\n"
)

// requestCases holds every row of the rules about requests, with neighbours on
// both sides of each border.
var requestCases = []struct {
	name string
	msg  string
	want Outcome
	why  Reason
}{
	// Version.
	{"1.1", line + host + "\r\n", Accept, 0},
	{"1.0", "GET / HTTP/1.0\r\n\r\n", Accept, 0},
	{"1.2", "GET / HTTP/1.2\r\n" + host + "\r\n", Reject, ReasonUnsupportedVersion},
	{"2.0", "GET / HTTP/2.0\r\n" + host + "\r\n", Reject, ReasonUnsupportedVersion},
	{"0.9 with version", "GET / HTTP/0.9\r\n" + host + "\r\n", Reject, ReasonUnsupportedVersion},
	{"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Reject, ReasonBadTarget},
	{"simple request", "GET /\r\n", Reject, ReasonBadTarget},
	{"other protocol", "GET / ICY/1.0\r\n", Reject, ReasonBadVersion},
	{"lower-case protocol", "GET / http/1.1\r\n", Reject, ReasonBadVersion},
	{"two digits", "GET / HTTP/1.10\r\n", Reject, ReasonBadVersion},
	{"two digits before", "GET / HTTP/11.1\r\n", Reject, ReasonBadVersion},
	{"no minor", "GET / HTTP/1\r\n", Reject, ReasonBadVersion},
	{"space after version", "GET / HTTP/1.1 \r\n", Reject, ReasonBadVersion},
	{"two versions", "GET / HTTP/1.1 HTTP/1.1\r\n", Reject, ReasonBadVersion},
	{"full-width digit", "GET / HTTP/1.\xb9\r\n", Reject, ReasonBadVersion},

	// Line ends and forbidden octets.
	{"LF ends request line", "GET / HTTP/1.1\n" + host + "\r\n", Reject, ReasonBareLF},
	{"CR ends request line", "GET / HTTP/1.1\r" + host, Reject, ReasonBareCR},
	{"CR CR LF", "GET / HTTP/1.1\r\r\n", Reject, ReasonBareCR},
	{"LF ends field", line + "Host: x\n\r\n", Reject, ReasonBareLF},
	{"CR ends field", line + "Host: x\rA: b\r\n", Reject, ReasonBareCR},
	{"LF ends head", line + host + "\n", Reject, ReasonBareLF},
	{"CR ends head", line + host + "\rX", Reject, ReasonBareCR},
	{"NUL in value", line + host + "A: b\x00c\r\n", Reject, ReasonNUL},
	{"NUL in name", line + host + "A\x00: b\r\n", Reject, ReasonNUL},
	{"NUL in target", "GET /\x00 HTTP/1.1\r\n", Reject, ReasonNUL},
	{"CTL in value", line + host + "A: b\x01c\r\n", Reject, ReasonCTL},
	{"VT in value", line + host + "A: b\x0bc\r\n", Reject, ReasonCTL},
	{"FF in value", line + host + "A: \x0cc\r\n", Reject, ReasonCTL},
	{"DEL in value", line + host + "A: b\x7fc\r\n", Reject, ReasonCTL},
	{"CTL in name", line + host + "A\x1fb: c\r\n", Reject, ReasonCTL},
	{"HTAB in value", line + host + "A: b\tc\r\n\r\n", Accept, 0},
	{"obs-text in value", line + host + "A: \x80\x85\xa0\xff\r\n\r\n", Accept, 0},
	{"empty value", line + host + "A:\r\nB: \t \r\n\r\n", Accept, 0},
	{"obs-fold", line + host + "A: b\r\n c\r\n\r\n", Reject, ReasonObsFold},
	{"obs-fold with tab", line + host + "A: b\r\n\tc\r\n\r\n", Reject, ReasonObsFold},
	{"space before first field", line + " " + host + "\r\n", Reject, ReasonSpaceBeforeField},
	{"tab before first field", line + "\t" + host + "\r\n", Reject, ReasonSpaceBeforeField},
	{"space before colon", line + "Host : x\r\n", Reject, ReasonSpaceBeforeColon},
	{"tab before colon", line + "Host\t: x\r\n", Reject, ReasonSpaceBeforeColon},
	{"space in name", line + "Ho st: x\r\n", Reject, ReasonSpaceBeforeColon},
	{"empty name", line + host + ": x\r\n", Reject, ReasonEmptyFieldName},
	{"no colon", line + "Host\r\n", Reject, ReasonNoColon},
	{"name is no token", line + host + "A@b: c\r\n", Reject, ReasonBadFieldName},
	{"8-bit name", line + host + "\xc3\xa4: c\r\n", Reject, ReasonBadFieldName},
	{"quoted name", line + host + "\"a\": c\r\n", Reject, ReasonBadFieldName},
	{"every token character", line + host + "!#$%&'*+-.^_`|~09azAZ: c\r\n\r\n", Accept, 0},

	// Leading empty lines.
	{"one empty line", "\r\n" + line + host + "\r\n", Accept, 0},
	{"two empty lines", "\r\n\r\n" + line + host + "\r\n", Accept, 0},
	{"three empty lines", "\r\n\r\n\r\n" + line + host + "\r\n", Reject, ReasonLeadingCRLF},
	{"leading LF", "\n" + line + host + "\r\n", Reject, ReasonBareLF},
	{"leading CR", "\r" + line + host + "\r\n", Reject, ReasonBareCR},
	{"leading space", " " + line + host + "\r\n", Reject, ReasonBadMethod},

	// Method.
	{"extension method", "M-SEARCH /a HTTP/1.1\r\n" + host + "\r\n", Accept, 0},
	{"underscore", "VERSION_CONTROL /a HTTP/1.1\r\n" + host + "\r\n", Accept, 0},
	{"lower case", "get / HTTP/1.1\r\n" + host + "\r\n", Reject, ReasonBadMethod},
	{"mixed case", "Get / HTTP/1.1\r\n" + host + "\r\n", Reject, ReasonBadMethod},
	{"32 letters", strings.Repeat("M", 32) + " / HTTP/1.1\r\n" + host + "\r\n", Accept, 0},
	{"33 letters", strings.Repeat("M", 33) + " / HTTP/1.1\r\n" + host + "\r\n", Reject, ReasonBadMethod},
	{"colon", "GET: / HTTP/1.1\r\n", Reject, ReasonBadMethod},
	{"tab after method", "GET\t/ HTTP/1.1\r\n", Reject, ReasonBadMethod},
	{"CONNECT", "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", Reject, ReasonConnect},
	{"TLS hello", "\x16\x03\x01\x02\x00", Reject, ReasonBadMethod},

	// Target.
	{"asterisk", "OPTIONS * HTTP/1.1\r\n" + host + "\r\n", Accept, 0},
	{"asterisk of GET", "GET * HTTP/1.1\r\n" + host + "\r\n", Reject, ReasonBadTarget},
	{"asterisk and more", "OPTIONS *a HTTP/1.1\r\n" + host + "\r\n", Reject, ReasonBadTarget},
	{"two spaces", "GET  / HTTP/1.1\r\n", Reject, ReasonBadTarget},
	{"two spaces after", "GET /  HTTP/1.1\r\n", Reject, ReasonBadVersion},
	{"space in target", "GET /a b HTTP/1.1\r\n", Reject, ReasonBadVersion},
	{"tab in target", "GET /a\tb HTTP/1.1\r\n", Reject, ReasonBadTarget},
	{"CR in target", "GET /a\r HTTP/1.1\r\n", Reject, ReasonBadTarget},
	{"LF in target", "GET /a\n HTTP/1.1\r\n", Reject, ReasonBareLF},
	{"DEL in target", "GET /a\x7f HTTP/1.1\r\n", Reject, ReasonBadTarget},
	{"8-bit target", "GET /\xd1\x85 HTTP/1.1\r\n" + host + "\r\n", Reject, ReasonBadTarget},
	{"every other octet", "GET /!\"$%&'()*+,-./09:;<=>?@AZ[\\]^_`az{|}~ HTTP/1.1\r\n" + host + "\r\n", Accept, 0},
	{"fragment", "GET /a#b HTTP/1.1\r\n" + host + "\r\n", Accept, 0},
	{"authority form", "GET a:80 HTTP/1.1\r\n" + host + "\r\n", Reject, ReasonBadTarget},
	{"no slash", "GET a HTTP/1.1\r\n" + host + "\r\n", Reject, ReasonBadTarget},
	{"absolute form", "GET http://x/a HTTP/1.1\r\n" + host + "\r\n", Accept, 0},
	{"absolute form, case", "GET HTTP://X/a HTTP/1.1\r\n" + host + "\r\n", Accept, 0},
	{"absolute form, no path", "GET http://x HTTP/1.1\r\n" + host + "\r\n", Accept, 0},
	{"absolute form, query", "GET http://x?a HTTP/1.1\r\n" + host + "\r\n", Accept, 0},
	{"absolute form, 1.0, no Host", "GET http://x/ HTTP/1.0\r\n\r\n", Accept, 0},
	{"absolute form, no Host", "GET http://x/ HTTP/1.1\r\n\r\n", Reject, ReasonNoHost},
	{"absolute form, other host", "GET http://y/ HTTP/1.1\r\n" + host + "\r\n", Reject, ReasonHostMismatch},
	{"absolute form, longer host", "GET http://xy/ HTTP/1.1\r\n" + host + "\r\n", Reject, ReasonHostMismatch},
	{"absolute form, shorter host", "GET http://x/ HTTP/1.1\r\nHost: xy\r\n\r\n", Reject, ReasonHostMismatch},
	{"absolute form, other port", "GET http://x/ HTTP/1.1\r\nHost: x:80\r\n\r\n", Reject, ReasonHostMismatch},
	{"absolute form, no authority", "GET http:///a HTTP/1.1\r\n" + host + "\r\n", Reject, ReasonBadAuthority},
	{"absolute form, user", "GET http://u@x/a HTTP/1.1\r\n" + host + "\r\n", Reject, ReasonBadAuthority},
	{"absolute form, 128", "GET http://" + strings.Repeat("a", 128) + "/ HTTP/1.1\r\nHost: " + strings.Repeat("a", 128) + "\r\n\r\n", Accept, 0},
	{"absolute form, 129", "GET http://" + strings.Repeat("a", 129) + "/ HTTP/1.1\r\nHost: " + strings.Repeat("a", 129) + "\r\n\r\n", Reject, ReasonBadAuthority},
	{"https", "GET https://x/a HTTP/1.1\r\n" + host + "\r\n", Reject, ReasonBadTarget},
	{"other scheme", "GET ftp://x/a HTTP/1.1\r\n" + host + "\r\n", Reject, ReasonBadTarget},
	{"target of 8000", "GET /" + strings.Repeat("a", 7999) + " HTTP/1.1\r\n" + host + "\r\n", Accept, 0},
	{"target of 8001", "GET /" + strings.Repeat("a", 8000) + " HTTP/1.1\r\n" + host + "\r\n", Reject, ReasonTargetTooLong},

	// Host.
	{"no Host", line + "\r\n", Reject, ReasonNoHost},
	{"two Hosts", line + "Host: x\r\nHost: y\r\n\r\n", Reject, ReasonTwoHosts},
	{"two equal Hosts", line + "Host: x\r\nhost: x\r\n\r\n", Reject, ReasonTwoHosts},
	{"two Hosts in 1.0", "GET / HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n", Reject, ReasonTwoHosts},
	{"empty Host", line + "Host:\r\n\r\n", Reject, ReasonInvalidHost},
	{"blank Host", line + "Host: \t\r\n\r\n", Reject, ReasonInvalidHost},
	{"port only", line + "Host: :80\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host list", line + "Host: a, b\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host path", line + "Host: a/b\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host user", line + "Host: u@a\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host percent", line + "Host: a%2eb\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host 8-bit", line + "Host: \xc3\xa4\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host backslash", line + "Host: a\\b\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host port", line + "Host:a.example:8080 \t\r\n\r\n", Accept, 0},
	{"Host empty port", line + "Host: a:\r\n\r\n", Accept, 0},
	{"Host large port", line + "Host: a:65536\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host largest port", line + "Host: a:65535\r\n\r\n", Accept, 0},
	{"Host signed port", line + "Host: a:+80\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host two ports", line + "Host: a:80:80\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host IPv6", line + "Host: [2001:db8::1]\r\n\r\n", Accept, 0},
	{"Host IPv6 port", line + "Host: [::ffff:198.51.100.1]:80\r\n\r\n", Accept, 0},
	{"Host IPv6 open", line + "Host: [::1\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host IPv6 junk", line + "Host: [::1]a\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host IPv6 zone", line + "Host: [fe80::1%25a]\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host empty literal", line + "Host: []\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host bare IPv6", line + "Host: ::1\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host padded port", line + "Host: a:" + strings.Repeat("0", 259) + "\r\n\r\n", Accept, 0},
	{"Host long port", line + "Host: a:" + strings.Repeat("0", 260) + "\r\n\r\n", Reject, ReasonInvalidHost},
	{"Host 255", line + "Host: " + strings.Repeat("a", 255) + "\r\n\r\n", Accept, 0},
	{"Host 256", line + "Host: " + strings.Repeat("a", 256) + "\r\n\r\n", Reject, ReasonInvalidHost},

	// Transfer-Encoding.
	{"chunked", line + host + "Transfer-Encoding: chunked\r\n\r\n", Accept, 0},
	{"chunked, case", line + host + "tRANSFER-eNCODING: cHUNKED\r\n\r\n", Accept, 0},
	{"chunked, white space", line + host + "Transfer-Encoding:\t chunked \t\r\n\r\n", Accept, 0},
	{"TE then CL", line + host + "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", Reject, ReasonTransferEncodingAndLength},
	{"CL then TE", line + host + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", Reject, ReasonTransferEncodingAndLength},
	{"CL zero and TE", line + host + "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n", Reject, ReasonTransferEncodingAndLength},
	{"identity", line + host + "Transfer-Encoding: identity\r\n\r\n", Reject, ReasonUnknownTransferEncoding},
	{"gzip, chunked", line + host + "Transfer-Encoding: gzip, chunked\r\n\r\n", Reject, ReasonUnknownTransferEncoding},
	{"chunked, chunked", line + host + "Transfer-Encoding: chunked, chunked\r\n\r\n", Reject, ReasonUnknownTransferEncoding},
	{"chunked and comma", line + host + "Transfer-Encoding: chunked,\r\n\r\n", Reject, ReasonUnknownTransferEncoding},
	{"comma and chunked", line + host + "Transfer-Encoding: ,chunked\r\n\r\n", Reject, ReasonUnknownTransferEncoding},
	{"chunked with parameter", line + host + "Transfer-Encoding: chunked;a=b\r\n\r\n", Reject, ReasonUnknownTransferEncoding},
	{"quoted chunked", line + host + "Transfer-Encoding: \"chunked\"\r\n\r\n", Reject, ReasonUnknownTransferEncoding},
	{"xchunked", line + host + "Transfer-Encoding: xchunked\r\n\r\n", Reject, ReasonUnknownTransferEncoding},
	{"chunkedx", line + host + "Transfer-Encoding: chunkedx\r\n\r\n", Reject, ReasonUnknownTransferEncoding},
	{"chunke", line + host + "Transfer-Encoding: chunke\r\n\r\n", Reject, ReasonUnknownTransferEncoding},
	{"chunk ed", line + host + "Transfer-Encoding: chunk ed\r\n\r\n", Reject, ReasonUnknownTransferEncoding},
	{"chunked and no-break space", line + host + "Transfer-Encoding: chunked\xa0\r\n\r\n", Reject, ReasonUnknownTransferEncoding},
	{"VT and chunked", line + host + "Transfer-Encoding: \x0bchunked\r\n\r\n", Reject, ReasonCTL},
	{"no coding", line + host + "Transfer-Encoding: \r\n\r\n", Reject, ReasonEmptyTransferEncoding},
	{"two fields", line + host + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", Reject, ReasonTwoTransferEncodings},
	{"two fields, other first", line + host + "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n", Reject, ReasonUnknownTransferEncoding},
	{"chunked in 1.0", "POST / HTTP/1.0\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n", Reject, ReasonTransferEncodingInOld},

	// Content-Length.
	{"length", line + host + "Content-Length: 5\r\n\r\n", Accept, 0},
	{"length, white space", line + host + "Content-Length:\t5 \t\r\n\r\n", Accept, 0},
	{"zero", line + host + "Content-Length: 0\r\n\r\n", Accept, 0},
	{"largest", line + host + "Content-Length: 9223372036854775807\r\n\r\n", Accept, 0},
	{"too large", line + host + "Content-Length: 9223372036854775808\r\n\r\n", Reject, ReasonContentLengthTooLarge},
	{"wraps", line + host + "Content-Length: 18446744073709551617\r\n\r\n", Reject, ReasonContentLengthTooLarge},
	{"equal fields", line + host + "Content-Length: 5\r\nContent-Length: 5\r\n\r\n", Isolate, ReasonRepeatedContentLength},
	{"equal fields, the second padded", line + host + "Content-Length: 5\r\nContent-Length:05\r\n\r\n", Reject, ReasonTwoContentLengths},
	{"equal fields, the first padded", line + host + "Content-Length: 05\r\nContent-Length: 5\r\n\r\n", Reject, ReasonTwoContentLengths},
	{"equal fields, padded", line + host + "Content-Length: 05\r\nContent-Length: 05\r\n\r\n", Reject, ReasonTwoContentLengths},
	{"different fields", line + host + "Content-Length: 5\r\nContent-Length: 6\r\n\r\n", Reject, ReasonTwoContentLengths},
	{"zero and five", line + host + "Content-Length: 0\r\nContent-Length: 5\r\n\r\n", Reject, ReasonTwoContentLengths},
	{"equal list", line + host + "Content-Length: 5, 5\r\n\r\n", Reject, ReasonBadContentLength},
	{"different list", line + host + "Content-Length: 5, 6\r\n\r\n", Reject, ReasonBadContentLength},
	{"plus", line + host + "Content-Length: +5\r\n\r\n", Reject, ReasonBadContentLength},
	{"minus", line + host + "Content-Length: -5\r\n\r\n", Reject, ReasonBadContentLength},
	{"space inside", line + host + "Content-Length: 5 5\r\n\r\n", Reject, ReasonBadContentLength},
	{"empty", line + host + "Content-Length:\r\n\r\n", Reject, ReasonBadContentLength},
	{"hexadecimal", line + host + "Content-Length: 0x5\r\n\r\n", Reject, ReasonBadContentLength},
	{"fraction", line + host + "Content-Length: 5.0\r\n\r\n", Reject, ReasonBadContentLength},
	{"underscore", line + host + "Content-Length: 1_0\r\n\r\n", Reject, ReasonBadContentLength},
	{"quoted", line + host + "Content-Length: \"5\"\r\n\r\n", Reject, ReasonBadContentLength},
	{"no-break space", line + host + "Content-Length: 5\xa0\r\n\r\n", Reject, ReasonBadContentLength},
	{"padded", line + host + "Content-Length: 010\r\n\r\n", Isolate, ReasonPaddedContentLength},
	{"padded zero", line + host + "Content-Length: 00\r\n\r\n", Isolate, ReasonPaddedContentLength},
	{"in 1.0", "POST / HTTP/1.0\r\nContent-Length: 5\r\n\r\n", Accept, 0},
	{"of GET", "GET / HTTP/1.1\r\n" + host + "Content-Length: 5\r\n\r\n", Isolate, ReasonUnexpectedBody},
	{"zero of GET", "GET / HTTP/1.1\r\n" + host + "Content-Length: 0\r\n\r\n", Accept, 0},
	{"of HEAD", "HEAD / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n", Isolate, ReasonUnexpectedBody},
	{"of DELETE", "DELETE / HTTP/1.1\r\n" + host + "Content-Length: 5\r\n\r\n", Isolate, ReasonUnexpectedBody},
	{"of TRACE", "TRACE / HTTP/1.1\r\n" + host + "Content-Length: 5\r\n\r\n", Isolate, ReasonUnexpectedBody},
	{"of OPTIONS", "OPTIONS / HTTP/1.1\r\n" + host + "Content-Length: 5\r\n\r\n", Accept, 0},

	// Names that a gateway may take for a length.
	{"Content_Length", line + host + "Content_Length: 5\r\n\r\n", Reject, ReasonSuspiciousName},
	{"Transfer_Encoding", line + host + "Transfer_Encoding: chunked\r\n\r\n", Reject, ReasonSuspiciousName},
	{"many dashes", line + host + "Transfer" + strings.Repeat("-", 50) + "Encoding: chunked\r\n\r\n", Reject, ReasonSuspiciousName},
	{"leading dot", line + host + ".content-length: 5\r\n\r\n", Reject, ReasonSuspiciousName},
	{"trailing dot", line + host + "content-length.: 5\r\n\r\n", Reject, ReasonSuspiciousName},
	{"no separator", line + host + "ContentLength: 5\r\n\r\n", Reject, ReasonSuspiciousName},
	{"more letters", line + host + "Content-Length-X: 5\r\n\r\n", Accept, 0},
	{"letters before", line + host + "X-Content-Length: 5\r\n\r\n", Accept, 0},
	{"fewer letters", line + host + "Content-Lengt: 5\r\n\r\n", Accept, 0},

	// Connection, Upgrade, Expect.
	{"close", line + host + "Connection: close\r\n\r\n", Accept, 0},
	{"options", line + host + "Connection: Keep-Alive ,, TE,close,\r\n\r\n", Accept, 0},
	{"other option", line + host + "Connection: close, x-forwarded-for\r\n\r\n", Isolate, ReasonConnectionOption},
	{"two words", line + host + "Connection: close close\r\n\r\n", Isolate, ReasonConnectionOption},
	{"no token", line + host + "Connection: \"close\"\r\n\r\n", Isolate, ReasonConnectionOption},
	{"long option", line + host + "Connection: " + strings.Repeat("close", 60) + "\r\n\r\n", Isolate, ReasonConnectionOption},
	{"four fields", line + host + strings.Repeat("Connection: close\r\n", 4) + "\r\n", Accept, 0},
	{"five fields", line + host + strings.Repeat("Connection: close\r\n", 5) + "\r\n", Isolate, ReasonTooManyConnectionFields},
	{"upgrade", line + host + "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", Isolate, ReasonUpgrade},
	{"upgrade field only", line + host + "Upgrade: h2c\r\n\r\n", Isolate, ReasonUpgrade},
	{"expect", line + host + "Content-Length: 5\r\nExpect: 100-Continue\r\n\r\n", Accept, 0},
	{"expect without body", line + host + "Expect: 100-continue\r\n\r\n", Isolate, ReasonExpectation},
	{"expect in 1.0", "POST / HTTP/1.0\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n", Isolate, ReasonExpectation},
	{"expect something", line + host + "Content-Length: 5\r\nExpect: y 100-continue\r\n\r\n", Isolate, ReasonExpectation},
	{"expect half", line + host + "Content-Length: 5\r\nExpect: 100\r\n\r\n", Isolate, ReasonExpectation},
	{"expect twice", line + host + "Content-Length: 5\r\nExpect: 100-continue\r\nExpect: 100-continue\r\n\r\n", Isolate, ReasonExpectation},

	// Bounds.
	{"100 fields", line + host + strings.Repeat("A: b\r\n", 99) + "\r\n", Accept, 0},
	{"101 fields", line + host + strings.Repeat("A: b\r\n", 100) + "\r\n", Reject, ReasonTooManyFields},
	{"head of 65536", line + host + "A: " + strings.Repeat("b", 65536-len(line+host)-7) + "\r\n\r\n", Accept, 0},
	{"head of 65537", line + host + "A: " + strings.Repeat("b", 65537-len(line+host)-7) + "\r\n\r\n", Reject, ReasonHeadTooLarge},
}

func TestRequestRules(t *testing.T) {
	rng := seed(t)
	for _, c := range requestCases {
		t.Run(c.name, func(t *testing.T) {
			msg := []byte(c.msg)
			h, st := scanRequestCuts(t, rng, msg, DefaultLimits(), nil, 50)
			if st == More {
				t.Fatalf("%.300q: not decided", c.msg)
			}
			if h.Outcome != c.want || h.Reason != c.why {
				t.Errorf("%.300q: %v %v, want %v %v", c.msg, h.Outcome, h.Reason, c.want, c.why)
			}
			if (h.Outcome == Reject) != (h.Reason.HTTPStatus() != 0) {
				t.Errorf("%v: status %d of %v", h.Outcome, h.Reason.HTTPStatus(), h.Reason)
			}
			// Bytes after the head belong to nobody yet.
			if st == Done {
				more, st := scanRequest(t, append(msg, "GET / HTTP/1.1\r\n"...), DefaultLimits(), nil, whole)
				if st != Done || more.Len != uint32(len(msg)) {
					t.Errorf("%.300q: a second request moves the end to %d", c.msg, more.Len)
				}
			}
			checkRequest(t, msg, h, st, nil)
		})
	}
}

func TestRequestResults(t *testing.T) {
	rng := seed(t)
	msg := "\r\nPUT http://Example.COM:80/p/q?a=?b#c HTTP/1.1\r\n" +
		"X-Forwarded-For: 192.0.2.1\r\n" +
		"Host: example.com:80 \r\n" +
		"connection: Close, keep-alive\r\n" +
		"X-Tenant:  a b \t\r\n" +
		"x_forwarded-for: z\r\n" +
		"X-TENANT: second\r\n" +
		"Authorization: Negotiate YII=\r\n" +
		"Forwarded:\r\n" +
		"Cookie: \r\n" +
		"Content-Length: 12\r\n\r\n"
	w, err := NewWanted("X-Tenant", "Cookie", "X-Absent", "Host")
	if err != nil {
		t.Fatal(err)
	}
	b := []byte(msg)
	h, st := scanRequestCuts(t, rng, b, DefaultLimits(), w, 200)
	if st != Done || int(h.Len) != len(msg) {
		t.Fatalf("%v %v at %d", st, h.Reason, h.Len)
	}
	for _, c := range []struct {
		what string
		span Span
		want string
	}{
		{"method", h.MethodSpan, "PUT"},
		{"target", h.Target, "http://Example.COM:80/p/q?a=?b#c"},
		{"path", h.Path, "/p/q"},
		{"query", h.Query, "a=?b"},
		{"host", h.Host, "Example.COM:80"},
		{"x-tenant", h.Spans[0], "a b"},
		{"cookie", h.Spans[1], ""},
		{"absent", h.Spans[2], ""},
		{"wanted host", h.Spans[3], "example.com:80"},
		{"connection", h.ConnFields[0], "connection"},
		{"x-forwarded-for", h.ForwardedNames[0], "X-Forwarded-For"},
		{"x_forwarded-for", h.ForwardedNames[1], "x_forwarded-for"},
		{"forwarded", h.ForwardedNames[2], "Forwarded"},
	} {
		if got := string(c.span.Of(b)); got != c.want {
			t.Errorf("%s is %q, want %q", c.what, got, c.want)
		}
	}
	if h.Method != PUT || h.Minor != 1 || h.Body != BodyLength || h.Length != 12 || !h.Close || !h.KeepAlive ||
		h.Upgrade || h.Expect || !h.ConnAuth || h.NConn != 1 || h.NForwarded != 3 || h.ForwardedMore ||
		h.Outcome != Accept || !h.Fragment || h.Persistent() {
		t.Errorf("got %+v", h.bare())
	}
	if h.Counts != [MaxWanted]uint8{2, 1, 0, 1} {
		t.Errorf("counts are %v", h.Counts)
	}
	if int(h.LineEnd) != strings.Index(msg, "X-Forw") {
		t.Errorf("the request line ends at %d", h.LineEnd)
	}
}

// The results of the request line can be used before the head is complete.
func TestRequestEarlyResults(t *testing.T) {
	lim := DefaultLimits()
	var h RequestHead
	h.Scan([]byte("HEAD /x?y HT"), &lim, nil)
	if h.Method != HEAD || h.Path != (Span{5, 2}) || h.Query != (Span{8, 1}) || h.LineEnd != 0 || !h.Reading() {
		t.Fatalf("got %+v", h.bare())
	}
	h.Scan([]byte("TP/1.0\r\n"), &lim, nil)
	if h.LineEnd != 20 || h.Len != 20 {
		t.Fatalf("got %+v", h.bare())
	}
	h.Reset()
	if h != (RequestHead{}) {
		t.Fatal("Reset leaves something")
	}
}

func TestRequestSmallLimits(t *testing.T) {
	rng := seed(t)
	msg := []byte("\r\n" + line + host + "A: b\r\n\r\n")
	lim := DefaultLimits()
	for _, c := range []struct {
		set  func(*Limits, int)
		fits int
		why  Reason
	}{
		{func(l *Limits, n int) { l.Head = uint32(n) }, len(msg), ReasonHeadTooLarge},
		{func(l *Limits, n int) { l.Fields = uint16(n) }, 2, ReasonTooManyFields},
		{func(l *Limits, n int) { l.Target = uint16(n) }, 2, ReasonTargetTooLong},
		{func(l *Limits, n int) { l.LeadingCRLF = uint8(n) }, 1, ReasonLeadingCRLF},
	} {
		for n := range c.fits + 3 {
			l := lim
			c.set(&l, n)
			h, st := scanRequestCuts(t, rng, msg, l, nil, 20)
			if n >= c.fits && st != Done || n < c.fits && (st != Bad || h.Reason != c.why) {
				t.Errorf("%v with limit %d: %v %v", c.why, n, st, h.Reason)
			}
		}
	}
}

func TestWanted(t *testing.T) {
	for _, bad := range [][]string{
		{""}, {"a b"}, {"a:"}, {strings.Repeat("a", 41)}, {"Accept", "accept"}, make([]string, 17),
	} {
		if _, err := NewWanted(bad...); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	w, err := NewWanted("B", strings.Repeat("A", 40))
	if err != nil || w.Len() != 2 || w.Name(0) != "b" || w.Name(1) != strings.Repeat("a", 40) {
		t.Errorf("%v %v", w, err)
	}
}

func TestMethods(t *testing.T) {
	for m := Other; m <= CONNECT; m++ {
		got := methodOf([]byte(m.String()))
		if m == Other {
			continue
		}
		if got != m {
			t.Errorf("%v is read as %v", m, got)
		}
		idem := m != POST && m != PATCH && m != CONNECT
		safe := idem && m != PUT && m != DELETE
		if m.Idempotent() != idem || m.Safe() != safe {
			t.Errorf("%v: idempotent %v, safe %v", m, m.Idempotent(), m.Safe())
		}
	}
	if Other.Idempotent() || Other.Safe() {
		t.Error("an unknown method is held to be idempotent")
	}
}

func TestReasons(t *testing.T) {
	seen := map[string]bool{}
	for r := range Reason(Reasons()) {
		n := r.String()
		if n == "" || seen[n] || strings.ToLower(n) != n || strings.ContainsAny(n, " _") {
			t.Errorf("reason %d is named %q", r, n)
		}
		seen[n] = true
		switch r.HTTPStatus() {
		case 0, 400, 414, 431, 501, 505:
		default:
			t.Errorf("%v has status %d", r, r.HTTPStatus())
		}
	}
}

// checkRequest compares a scan with the reference.
func checkRequest(t testing.TB, msg []byte, h RequestHead, st Status, wanted []string) {
	t.Helper()
	ref, complete, valid := referenceRequest(msg, DefaultLimits(), wanted)
	if !complete {
		if st == Done {
			t.Fatalf("%.300q: done, though there is no whole head", msg)
		}
		return
	}
	if !valid {
		if st != Bad || int(h.Len) > ref.Len {
			t.Fatalf("%.300q: %v, the reference rejects it", msg, st)
		}
		return
	}
	if st != Done {
		t.Fatalf("%.300q: %v %v at %d, the reference accepts it", msg, st, h.Reason, h.Len)
	}
	str := func(s Span) string { return latin1(s.Of(msg)) }
	got := refRequest{
		Len: int(h.Len), LineEnd: int(h.LineEnd),
		Method: str(h.MethodSpan), Target: str(h.Target), Path: str(h.Path), Query: str(h.Query), Host: str(h.Host),
		Minor: int(h.Minor), Body: h.Body, Length: h.Length, Isolate: h.Outcome == Isolate,
		Close: h.Close, KeepAlive: h.KeepAlive, Upgrade: h.Upgrade, Expect: h.Expect, Secret: h.ConnAuth, Fragment: h.Fragment,
	}
	fail := false
	if got.Len != ref.Len || got.LineEnd != ref.LineEnd || got.Method != ref.Method || got.Target != ref.Target ||
		got.Path != ref.Path || got.Query != ref.Query || got.Host != ref.Host || got.Minor != ref.Minor ||
		got.Body != ref.Body || got.Length != ref.Length || got.Isolate != ref.Isolate || got.Close != ref.Close ||
		got.KeepAlive != ref.KeepAlive || got.Upgrade != ref.Upgrade || got.Expect != ref.Expect || got.Secret != ref.Secret || got.Fragment != ref.Fragment {
		fail = true
	}
	names := func(spans []Span) (s []string) {
		for _, sp := range spans {
			s = append(s, str(sp))
		}
		return s
	}
	got.ConnFields = names(h.ConnFields[:h.NConn])
	got.Forwarded = names(h.ForwardedNames[:h.NForwarded])
	if strings.Join(got.ConnFields, "|") != strings.Join(ref.ConnFields, "|") {
		fail = true
	}
	if h.ForwardedMore != (len(ref.Forwarded) > 4) || strings.Join(got.Forwarded, "|") != strings.Join(ref.Forwarded[:min(4, len(ref.Forwarded))], "|") {
		fail = true
	}
	for i, w := range wanted {
		vs := ref.Wanted[w]
		if int(h.Counts[i]) != len(vs) || len(vs) > 0 && str(h.Spans[i]) != vs[0] {
			t.Fatalf("%.300q: %s is %q %d times, the reference has %q", msg, w, str(h.Spans[i]), h.Counts[i], vs)
		}
	}
	if m := h.Method; m != Other && m.String() != ref.Method {
		fail = true
	}
	if fail {
		t.Fatalf("%.300q:\nscanner   %+v\nreference %+v", msg, got, ref)
	}
}
