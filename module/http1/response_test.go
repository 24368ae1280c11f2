// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"strings"
	"testing"
)

const ok200 = "HTTP/1.1 200 OK\r\n"

// responseCases holds every row of the rules about response heads. A doubt that
// ends the scan inside the head has BodyUntilClose like one at its end.
var responseCases = []struct {
	name string
	req  Method
	msg  string
	want Outcome
	why  Reason
	body BodyKind
}{
	// Status line.
	{"length", GET, ok200 + "Content-Length: 5\r\n\r\n", Accept, 0, BodyLength},
	{"no phrase", GET, "HTTP/1.1 200\r\nContent-Length: 5\r\n\r\n", Accept, 0, BodyLength},
	{"empty phrase", GET, "HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\n", Accept, 0, BodyLength},
	{"8-bit phrase", GET, "HTTP/1.1 200 \xeb\t x\r\nContent-Length: 5\r\n\r\n", Accept, 0, BodyLength},
	{"CTL in phrase", GET, "HTTP/1.1 200 a\x01\r\n\r\n", Isolate, ReasonCTL, BodyUntilClose},
	{"CR in phrase", GET, "HTTP/1.1 200 a\rb\r\n", Isolate, ReasonBareCR, BodyUntilClose},
	{"LF ends it", GET, "HTTP/1.1 200 OK\nContent-Length: 0\n\n", Isolate, ReasonBareLF, BodyUntilClose},
	{"LF after the code", GET, "HTTP/1.1 200\nContent-Length: 0\n\n", Isolate, ReasonBareLF, BodyUntilClose},
	{"two digits", GET, "HTTP/1.1 20 OK\r\n", Reject, ReasonBadStatusLine, BodyNone},
	{"four digits", GET, "HTTP/1.1 2000 OK\r\n", Reject, ReasonBadStatusLine, BodyNone},
	{"code and letter", GET, "HTTP/1.1 200OK\r\n", Reject, ReasonBadStatusLine, BodyNone},
	{"code and tab", GET, "HTTP/1.1 200\tOK\r\n", Reject, ReasonBadStatusLine, BodyNone},
	{"code below 100", GET, "HTTP/1.1 099 OK\r\n", Reject, ReasonBadStatusLine, BodyNone},
	{"code of 600", GET, "HTTP/1.1 600 OK\r\nContent-Length: 5\r\n\r\n", Isolate, ReasonStatusRange, BodyLength},
	{"two spaces", GET, "HTTP/1.1  200 OK\r\n", Reject, ReasonBadStatusLine, BodyNone},
	{"tab", GET, "HTTP/1.1\t200 OK\r\n", Reject, ReasonBadStatusLine, BodyNone},
	{"1.2", GET, "HTTP/1.2 200 OK\r\nContent-Length: 5\r\n\r\n", Isolate, ReasonUnsupportedVersion, BodyLength},
	{"2.0", GET, "HTTP/2.0 200 OK\r\n", Reject, ReasonBadStatusLine, BodyNone},
	{"0.9", GET, "HTTP/0.9 200 OK\r\n", Reject, ReasonBadStatusLine, BodyNone},
	{"lower case", GET, "http/1.1 200 OK\r\n", Reject, ReasonBadStatusLine, BodyNone},
	{"leading CRLF", GET, "\r\n" + ok200 + "\r\n", Reject, ReasonBadStatusLine, BodyNone},
	{"a request", GET, "GET / HTTP/1.1\r\n\r\n", Reject, ReasonBadStatusLine, BodyNone},
	{"HTML", GET, "<html>", Reject, ReasonBadStatusLine, BodyNone},

	// Fields.
	{"obs-fold", GET, ok200 + "A: b\r\n c\r\nContent-Length: 0\r\n\r\n", Isolate, ReasonObsFold, BodyUntilClose},
	{"bare LF", GET, ok200 + "A: b\nContent-Length: 0\r\n\r\n", Isolate, ReasonBareLF, BodyUntilClose},
	{"bare CR", GET, ok200 + "A: b\rContent-Length: 0\r\n\r\n", Isolate, ReasonBareCR, BodyUntilClose},
	{"NUL", GET, ok200 + "A: \x00\r\nContent-Length: 0\r\n\r\n", Isolate, ReasonNUL, BodyUntilClose},
	{"space before colon", GET, ok200 + "Content-Length : 0\r\n\r\n", Isolate, ReasonSpaceBeforeColon, BodyUntilClose},
	{"no colon", GET, ok200 + "Content-Length\r\n\r\n", Isolate, ReasonNoColon, BodyUntilClose},
	{"name is no token", GET, ok200 + "a@b: c\r\n\r\n", Isolate, ReasonBadFieldName, BodyUntilClose},
	{"suspicious name", GET, ok200 + "content_length: 0\r\n\r\n", Isolate, ReasonSuspiciousName, BodyUntilClose},
	{"many fields", GET, ok200 + strings.Repeat("A: b\r\n", 300) + "Content-Length: 0\r\n\r\n", Accept, 0, BodyNone},
	{"large head", GET, ok200 + "A: " + strings.Repeat("b", 65536) + "\r\n\r\n", Isolate, ReasonHeadTooLarge, BodyUntilClose},
	{"Host, Expect and Forwarded mean nothing", GET, ok200 + "Host: \r\nHost: @\r\nExpect: x\r\nForwarded: x\r\nContent-Length: 0\r\n\r\n", Accept, 0, BodyNone},

	// Framing.
	{"zero", GET, ok200 + "Content-Length: 0\r\n\r\n", Accept, 0, BodyNone},
	{"chunked", GET, ok200 + "Transfer-Encoding: chunked\r\n\r\n", Accept, 0, BodyChunked},
	{"nothing", GET, ok200 + "\r\n", Isolate, ReasonNoLength, BodyUntilClose},
	{"TE and CL", GET, ok200 + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", Isolate, ReasonTransferEncodingAndLength, BodyUntilClose},
	{"gzip, chunked", GET, ok200 + "Transfer-Encoding: gzip, chunked\r\n\r\n", Isolate, ReasonUnknownTransferEncoding, BodyUntilClose},
	{"identity", GET, ok200 + "Transfer-Encoding: identity\r\n\r\n", Isolate, ReasonUnknownTransferEncoding, BodyUntilClose},
	{"two TE", GET, ok200 + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", Isolate, ReasonTwoTransferEncodings, BodyUntilClose},
	{"TE in 1.0", GET, "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n", Isolate, ReasonTransferEncodingInOld, BodyUntilClose},
	{"invalid length", GET, ok200 + "Content-Length: 5a\r\n\r\n", Isolate, ReasonBadContentLength, BodyUntilClose},
	{"equal lengths", GET, ok200 + "Content-Length: 5\r\nContent-Length: 5\r\n\r\n", Isolate, ReasonRepeatedContentLength, BodyLength},
	{"equal list", GET, ok200 + "Content-Length: 5, 5\r\n\r\n", Isolate, ReasonBadContentLength, BodyUntilClose},
	{"different lengths", GET, ok200 + "Content-Length: 5\r\nContent-Length: 6\r\n\r\n", Isolate, ReasonTwoContentLengths, BodyUntilClose},
	{"padded length", GET, ok200 + "Content-Length: 05\r\n\r\n", Isolate, ReasonPaddedContentLength, BodyLength},

	// No body, whatever the fields say.
	{"HEAD", HEAD, ok200 + "Content-Length: 5\r\n\r\n", Accept, 0, BodyNone},
	{"HEAD, chunked", HEAD, ok200 + "Transfer-Encoding: chunked\r\n\r\n", Accept, 0, BodyNone},
	{"HEAD, nothing", HEAD, ok200 + "\r\n", Accept, 0, BodyNone},
	{"HEAD, both", HEAD, ok200 + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", Isolate, ReasonTransferEncodingAndLength, BodyNone},
	{"HEAD, TE in 1.0", HEAD, "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n", Isolate, ReasonTransferEncodingInOld, BodyNone},
	{"304", GET, "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", Accept, 0, BodyNone},
	{"304, chunked", GET, "HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n", Accept, 0, BodyNone},
	{"204", GET, "HTTP/1.1 204 No Content\r\n\r\n", Accept, 0, BodyNone},
	{"204, zero", GET, "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", Accept, 0, BodyNone},
	{"204, length", GET, "HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", Isolate, ReasonUnexpectedBody, BodyUntilClose},
	{"204, chunked", GET, "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n", Isolate, ReasonTransferEncodingInOld, BodyUntilClose},
	{"205 has a body", GET, "HTTP/1.1 205 Reset\r\nContent-Length: 5\r\n\r\n", Accept, 0, BodyLength},

	// Interim responses and upgrades.
	{"100", POST, "HTTP/1.1 100 Continue\r\n\r\n", Accept, 0, BodyNone},
	{"103", GET, "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", Accept, 0, BodyNone},
	{"100 in 1.0", POST, "HTTP/1.0 100 Continue\r\n\r\n", Accept, 0, BodyNone},
	{"100, length", POST, "HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\n", Isolate, ReasonUnexpectedBody, BodyUntilClose},
	{"100, chunked", POST, "HTTP/1.1 100 Continue\r\nTransfer-Encoding: chunked\r\n\r\n", Isolate, ReasonTransferEncodingInOld, BodyUntilClose},
	{"100, close", POST, "HTTP/1.1 100 Continue\r\nConnection: close\r\n\r\n", Isolate, ReasonServerCloses, BodyNone},
	{"101", GET, "HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", Isolate, ReasonSwitchingProtocols, BodyUntilClose},
	{"upgrade offered", GET, ok200 + "Upgrade: h2,h2c\r\nConnection: Upgrade, Keep-Alive\r\nContent-Length: 5\r\n\r\n", Accept, 0, BodyLength},

	// The server's connection.
	{"close", GET, ok200 + "Connection: close\r\nContent-Length: 5\r\n\r\n", Isolate, ReasonServerCloses, BodyLength},
	{"close among others", GET, ok200 + "Connection: keep-alive, Close\r\nContent-Length: 5\r\n\r\n", Isolate, ReasonServerCloses, BodyLength},
	{"1.0", GET, "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", Isolate, ReasonServerCloses, BodyLength},
	{"1.0 keep-alive", GET, "HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: Keep-Alive\r\n\r\n", Accept, 0, BodyLength},
	{"other option", GET, ok200 + "Connection: content-length\r\nContent-Length: 5\r\n\r\n", Isolate, ReasonConnectionOption, BodyLength},
}

func TestResponseRules(t *testing.T) {
	rng := seed(t)
	for _, c := range responseCases {
		t.Run(c.name, func(t *testing.T) {
			msg := []byte(c.msg)
			h, st := scanResponseCuts(t, rng, msg, DefaultLimits(), c.req, 50)
			if st == More {
				t.Fatalf("%.300q: not decided", c.msg)
			}
			if h.Outcome != c.want || h.Reason != c.why || h.Body != c.body {
				t.Errorf("%.300q: %v %v %v, want %v %v %v", c.msg, h.Outcome, h.Reason, h.Body, c.want, c.why, c.body)
			}
			checkResponse(t, msg, h, st, c.req)
		})
	}
}

func TestResponseResults(t *testing.T) {
	rng := seed(t)
	h, st := scanResponseCuts(t, rng, []byte("HTTP/1.0 401 No\r\nContent-Length: 123\r\nConnection: Keep-Alive\r\n"+
		"keep-alive: timeout=5, foo=7; max=\"100\"\r\nWWW-Authenticate: Basic realm=\"a, b\", NTLM\r\n\r\n"), DefaultLimits(), GET, 100)
	if st != Done || h.Status != 401 || h.Minor != 0 || h.Length != 123 || !h.KeepAlive || h.Close || !h.ConnAuth ||
		h.KeepAliveTimeout != 5 || h.KeepAliveMax != 100 || !h.Persistent() || h.Interim() || h.Outcome != Accept {
		t.Errorf("%v %+v", st, h.bare())
	}
	for value, want := range map[string][2]uint32{
		"timeout=15":                   {15, 0},
		"max = 3 , TIMEOUT = 4":        {4, 3},
		"timeout=99999999999999999":    {65535, 0},
		"timeout":                      {0, 0},
		"timeout=":                     {0, 0},
		"timeout=a5":                   {0, 0},
		"xtimeout=5, maxx=6":           {0, 0},
		"timeout=5 max=6":              {0, 0},
		"timeout=1, timeout=2, ,, ":    {2, 0},
		"timeout=18446744073709551621": {65535, 0},
	} {
		h, _ := scanResponseCuts(t, rng, []byte(ok200+"Keep-Alive: "+value+"\r\nContent-Length: 0\r\n\r\n"), DefaultLimits(), GET, 10)
		if h.KeepAliveTimeout != want[0] || h.KeepAliveMax != want[1] || h.Outcome != Accept {
			t.Errorf("%.300q: timeout %d, max %d, want %v", value, h.KeepAliveTimeout, h.KeepAliveMax, want)
		}
	}
	for value, want := range map[string]bool{
		"Basic realm=x": false, "Negotiate": true, "negotiate abcd==": true, "Digest a=b, NEGOTIATE": true,
		"NTLMv2": false, "XNTLM": false, "Bearer,NTLM": true, "": false,
	} {
		for _, name := range []string{"WWW-Authenticate", "proxy-authenticate"} {
			h, _ := scanResponseCuts(t, rng, []byte(ok200+name+": "+value+"\r\nContent-Length: 0\r\n\r\n"), DefaultLimits(), GET, 10)
			if h.ConnAuth != want || h.Outcome != Accept {
				t.Errorf("%s: %q: private %v, want %v", name, value, h.ConnAuth, want)
			}
		}
	}
}

func TestResponseInterim(t *testing.T) {
	lim := DefaultLimits()
	msg := []byte(strings.Repeat("HTTP/1.1 102 Processing\r\n\r\n", 100) + ok200 + "Content-Length: 0\r\n\r\n")
	heads := 0
	var h ResponseHead
	h.Reset(POST)
	for {
		n, st := h.Scan(msg, &lim)
		if st != Done || h.Outcome != Accept {
			t.Fatalf("head %d: %v %v", heads, st, h.Reason)
		}
		msg = msg[n:]
		heads++
		if !h.Interim() {
			break
		}
		h.Again()
	}
	if heads != 101 || len(msg) != 0 || h.Status != 200 {
		t.Errorf("%d heads, %d bytes left, status %d", heads, len(msg), h.Status)
	}
}

// An interim head that speaks against reuse does so for the whole response.
func TestResponseAgain(t *testing.T) {
	lim := DefaultLimits()
	for _, c := range []struct {
		interim string
		want    Outcome
		auth    bool
	}{
		{"", Accept, false},
		{"Connection: close\r\n", Isolate, false},
		{"Content-Length: 00\r\n", Isolate, false},
		{"WWW-Authenticate: NTLM\r\n", Accept, true},
	} {
		var h ResponseHead
		h.Reset(HEAD)
		if _, st := h.Scan([]byte("HTTP/1.1 103 x\r\n"+c.interim+"\r\n"), &lim); st != Done || !h.Interim() || h.Outcome != c.want {
			t.Fatalf("%q: %v %v %v", c.interim, st, h.Outcome, h.Reason)
		}
		why := h.Reason
		h.Again()
		_, st := h.Scan([]byte(ok200+"Content-Length: 5\r\n\r\n"), &lim)
		if st != Done || h.Interim() || h.Outcome != c.want || h.Reason != why || h.ConnAuth != c.auth || h.Body != BodyNone || h.Status != 200 {
			t.Errorf("%q: %v %+v", c.interim, st, h.bare())
		}
	}
	// A final head's own doubt comes before.
	var h ResponseHead
	h.Reset(GET)
	h.Scan([]byte("HTTP/1.1 100 x\r\nConnection: close\r\n\r\n"), &lim)
	h.Again()
	if h.Scan([]byte(ok200+"\r\n"), &lim); h.Body != BodyUntilClose || h.Reason != ReasonNoLength {
		t.Errorf("%+v", h.bare())
	}
}

// checkResponse compares a scan with the reference.
func checkResponse(t testing.TB, msg []byte, h ResponseHead, st Status, req Method) {
	t.Helper()
	ref := referenceResponse(msg, DefaultLimits(), req)
	if !ref.Decided {
		if st == Done && !(h.Outcome == Isolate && h.Body == BodyUntilClose) {
			t.Fatalf("%.300q: done, though there is no whole head", msg)
		}
		return
	}
	if ref.Outcome == Reject {
		if st != Bad {
			t.Fatalf("%.300q: %v %v, the reference rejects it", msg, st, h.Reason)
		}
		return
	}
	if st != Done || h.Outcome != ref.Outcome || h.Body != ref.Body {
		t.Fatalf("%.300q: %v %v %v %v, the reference has %+v", msg, st, h.Outcome, h.Reason, h.Body, ref)
	}
	if ref.Doubt || ref.Status == 0 {
		return
	}
	got := refResponse{Decided: true, Len: int(h.Len), Status: int(h.Status), Minor: int(h.Minor), Body: h.Body, Length: h.Length,
		Outcome: h.Outcome, Close: h.Close, KeepAlive: h.KeepAlive, Upgrade: h.Upgrade, ConnAuth: h.ConnAuth, Interim: h.Interim()}
	if got != ref {
		t.Fatalf("%.300q:\nscanner   %+v\nreference %+v", msg, got, ref)
	}
}
