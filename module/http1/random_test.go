// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// Pieces out of which structure-aware mutations are made: what attacks on
// framing are made of.
var (
	oddBytes = []string{"\r", "\n", "\r\n", "\x00", " ", "\t", ":", "\x0b", "\x0c", "\x7f", "\x80", "\x85", "\xa0", "\xff",
		",", ";", "=", "\"", "\\", "0", "9", "+", "-", "_", "#", "?", "*", "/", "%", "@", "[", "]", "a", "Z", "\x1f"}
	oddFields = []string{
		"Host: x", "Host: y", "host:x:80", "Host: [::1]:80", "Host:", "Host: a,b", "HOST: %61",
		"Content-Length: 5", "Content-Length: 6", "Content-Length: 0", "Content-Length:05", "content-length: 5, 5", "Content-Length: +5",
		"Content-Length: 9223372036854775807", "Content-Length: 9223372036854775808", "Content-Length : 5", "Content_Length: 5",
		"Content-Length:\t5 ", "Content-Length: 0x5",
		"Transfer-Encoding: chunked", "TRANSFER-ENCODING:chunked", "Transfer-Encoding: xchunked", "Transfer-Encoding: chunked, identity",
		"Transfer-Encoding:\tCHUNKED\t", "Transfer-Encoding: \x0bchunked", "Transfer-Encoding:", "Transfer_Encoding: chunked",
		"Transfer-Encoding: gzip, chunked", "Transfer--Encoding: x",
		"Connection: close", "Connection: keep-alive, Close", "Connection: x", "Connection: upgrade", "connection: te,,", "Connection:",
		"Upgrade: websocket", "Expect: 100-continue", "Expect: 100-Continue ", "Expect: y", "Expect: 100-continuex",
		"X-Forwarded-For: 192.0.2.1", "x_forwarded-for: z", "Forwarded: for=x", "Authorization: Negotiate x", "Authorization: Basic ntlm",
		"WWW-Authenticate: NTLM", "Proxy-Authenticate: Basic, Negotiate", "Keep-Alive: timeout=5, max=7", "Keep-Alive: max=,timeout=x",
		"Cookie: a=b", "Cookie:", "X-Long-Name-That-Fills-The-Whole-Of-The-Buffer-For-Names: v", "A: b", ": b", "A", " A: b", "A:b\r\n c",
	}
	oddLines = []string{"GET / HTTP/1.1", "POST /a?b#c HTTP/1.1", "HEAD * HTTP/1.1", "OPTIONS * HTTP/1.1", "GET http://x/a HTTP/1.1",
		"GET http://x:80?a HTTP/1.0", "CONNECT x:80 HTTP/1.1", "DELETE /#? HTTP/1.0", "PUT /?#? HTTP/1.1", "get / HTTP/1.1", "GET / HTTP/1.2", "GET /", "",
		"HTTP/1.1 200 OK", "HTTP/1.1 100 Continue", "HTTP/1.0 200 OK", "HTTP/1.1 204", "HTTP/1.1 304 x", "HTTP/1.1 101 x", "HTTP/1.1 600 ", "HTTP/1.7 200 OK", "HTTP/1.1 20 OK"}
)

func pick(rng *rand.Rand, of []string) string { return of[rng.IntN(len(of))] }

// drawHead makes a head out of odd lines, mostly with correct line ends.
func drawHead(rng *rand.Rand) []byte {
	var b bytes.Buffer
	end := func() {
		if rng.IntN(60) == 0 {
			b.WriteString(pick(rng, oddBytes))
		} else {
			b.WriteString("\r\n")
		}
	}
	for rng.IntN(8) == 0 {
		b.WriteString("\r\n")
	}
	b.WriteString(pick(rng, oddLines))
	end()
	if rng.IntN(6) != 0 {
		b.WriteString("Host: x")
		end()
	}
	for range rng.IntN(6) {
		b.WriteString(pick(rng, oddFields))
		end()
	}
	end()
	return b.Bytes()
}

// drawChunked makes a chunked body, mostly a correct one.
func drawChunked(rng *rand.Rand) []byte {
	var b bytes.Buffer
	ext := func() {
		for rng.IntN(4) == 0 {
			b.WriteString(pick(rng, []string{";a", ";a=b", ";a=\"b\"", ";a=\"\\\"\r", ";", "; a", ";a=\"b;\xff\""}))
		}
	}
	for range rng.IntN(4) {
		n := rng.IntN(20)
		b.WriteString(pick(rng, []string{"", "0", "00", "0000000000000"}))
		b.WriteString([]string{"1", "a", "B", "10", "7f"}[n%5])
		ext()
		b.WriteString("\r\n")
		b.Write(bytes.Repeat([]byte{"\r\n0a"[n&3]}, []int{1, 10, 11, 16, 127}[n%5]))
		b.WriteString("\r\n")
	}
	b.WriteString("0")
	ext()
	b.WriteString("\r\n")
	for rng.IntN(3) == 0 {
		b.WriteString(pick(rng, oddFields) + "\r\n")
	}
	b.WriteString("\r\n")
	return b.Bytes()
}

// mutate changes a message a little: bytes, lines, order.
func mutate(rng *rand.Rand, msg []byte) []byte {
	msg = bytes.Clone(msg)
	for rng.IntN(3) != 0 && len(msg) > 0 {
		i := rng.IntN(len(msg))
		j := min(len(msg), i+rng.IntN(8))
		switch rng.IntN(7) {
		case 0:
			msg[i] = byte(rng.IntN(256))
		case 1:
			msg = append(msg[:i:i], msg[j:]...)
		case 2:
			msg = append(append(msg[:i:i], pick(rng, oddBytes)...), msg[i:]...)
		case 3:
			msg = append(append(msg[:i:i], pick(rng, oddBytes)...), msg[j:]...)
		case 4:
			msg = append(append(msg[:j:j], msg[i:j]...), msg[j:]...)
		case 5:
			if k := bytes.Index(msg[i:], []byte("\r\n")); k >= 0 {
				k += i + 2
				msg = append(append(msg[:k:k], pick(rng, oddFields)+"\r\n"...), msg[k:]...)
			}
		case 6:
			if c := msg[i]; c|0x20 >= 'a' && c|0x20 <= 'z' {
				msg[i] ^= 0x20
			}
		}
	}
	return msg
}

// rounds is how many messages the random tests draw.
func rounds(t testing.TB) int {
	if testing.Short() {
		return 2000
	}
	return 20000
}

var oddWanted = []string{"Cookie", "X-Absent", "Host", "a", "x-long-name-that-fills-the-whole-of-the-bu"[:40]}

func TestRandomRequests(t *testing.T) {
	rng := seed(t)
	w, err := NewWanted(oddWanted...)
	if err != nil {
		t.Fatal(err)
	}
	var seen [3]int
	for range rounds(t) {
		var msg []byte
		switch rng.IntN(3) {
		case 0:
			msg = []byte(requestCases[rng.IntN(len(requestCases))].msg)
			if len(msg) > 2000 {
				continue
			}
		case 1:
			msg = browserHead
		default:
			msg = drawHead(rng)
		}
		msg = mutate(rng, msg)
		if len(msg) == 0 {
			continue
		}
		h, st := scanRequestCuts(t, rng, msg, DefaultLimits(), w, 3)
		checkRequest(t, msg, h, st, oddWanted)
		if st != More {
			seen[h.Outcome]++
		}
		checkEager(t, msg, h, st)
	}
	t.Logf("%d accepted, %d isolated, %d rejected", seen[Accept], seen[Isolate], seen[Reject])
	if seen[Accept] == 0 || seen[Isolate] == 0 || seen[Reject] == 0 {
		t.Error("the draw is one-sided")
	}
}

// checkEager makes sure that a request that was refused before its head was
// complete could not have become a valid one.
func checkEager(t testing.TB, msg []byte, h RequestHead, st Status) {
	t.Helper()
	if st != Bad || h.Reason == ReasonHeadTooLarge {
		return
	}
	for _, end := range []string{"\r\n\r\n", "\n\r\n", "/ HTTP/1.1\r\nHost: x\r\n\r\n", " HTTP/1.1\r\nHost: x\r\n\r\n", "1\r\nHost: x\r\n\r\n",
		"a: b\r\nHost: x\r\n\r\n", ": b\r\nHost: x\r\n\r\n", "b\r\nHost: x\r\n\r\n", "\r\nHost: x\r\n\r\n", "\nHost: x\r\n\r\n", "a: b\r\n\r\n", "unked\r\n\r\n"} {
		whole := append(bytes.Clone(msg[:h.Len]), end...)
		if n := int(h.Len); n < len(msg) {
			whole = append(append(bytes.Clone(msg[:n+1]), end...), msg[n:]...)
		}
		if r, complete, valid := referenceRequest(whole, DefaultLimits(), nil); complete && valid && r.Len > int(h.Len) {
			t.Fatalf("%.300q: refused at %d for %v, but %.300q is valid", msg, h.Len, h.Reason, whole)
		}
	}
}

func TestRandomResponses(t *testing.T) {
	rng := seed(t)
	var seen [3]int
	for range rounds(t) {
		msg := serverHead
		switch rng.IntN(3) {
		case 0:
			msg = []byte(responseCases[rng.IntN(len(responseCases))].msg)
			if len(msg) > 2000 {
				continue
			}
		case 1:
			msg = drawHead(rng)
		}
		msg = mutate(rng, msg)
		req := Method(rng.IntN(10))
		h, st := scanResponseCuts(t, rng, msg, DefaultLimits(), req, 3)
		checkResponse(t, msg, h, st, req)
		if st != More {
			seen[h.Outcome]++
		}
	}
	t.Logf("%d accepted, %d isolated, %d rejected", seen[Accept], seen[Isolate], seen[Reject])
	if seen[Accept] == 0 || seen[Isolate] == 0 || seen[Reject] == 0 {
		t.Error("the draw is one-sided")
	}
}

func TestRandomChunked(t *testing.T) {
	rng := seed(t)
	var seen [3]int
	for range rounds(t) {
		msg := drawChunked(rng)
		if rng.IntN(2) == 0 {
			msg = []byte(chunkedCases[rng.IntN(len(chunkedCases))].body)
			if len(msg) > 2000 {
				continue
			}
		}
		msg = mutate(rng, msg)
		_, n, st := scanBodyCuts(t, rng, msg, BodyChunked, 0, DefaultLimits(), 4)
		checkChunked(t, msg, n, st)
		seen[st]++
	}
	t.Logf("%d not ended, %d done, %d bad", seen[More], seen[Done], seen[Bad])
	if seen[More] == 0 || seen[Done] == 0 || seen[Bad] == 0 {
		t.Error("the draw is one-sided")
	}
}

// The bulk scans agree with the table, at every offset and for every octet.
func TestBulkScans(t *testing.T) {
	rng := seed(t)
	slow := func(b []byte, i int, bit uint8) int {
		for i < len(b) && class[b[i]]&bit != 0 {
			i++
		}
		return i
	}
	for range rounds(t) {
		b := make([]byte, rng.IntN(40))
		for i := range b {
			b[i] = 'a' + byte(rng.IntN(26))
			switch rng.IntN(16) {
			case 0:
				b[i] = byte(rng.IntN(256))
			case 1:
				b[i] = "\t \x7f\x80\xff\x1f\x21\x20\x00\r\n:?#"[rng.IntN(14)]
			}
		}
		i := rng.IntN(len(b) + 1)
		if got, want := valueEnd(b, i), slow(b, i, clValue); got != want {
			t.Fatalf("valueEnd(%q, %d) = %d, want %d", b, i, got, want)
		}
		if got, want := targetEnd(b, i), slow(b, i, clTarget); got != want {
			t.Fatalf("targetEnd(%q, %d) = %d, want %d", b, i, got, want)
		}
		if got, want := tokenEnd(b, i), slow(b, i, clToken); got != want {
			t.Fatalf("tokenEnd(%q, %d) = %d, want %d", b, i, got, want)
		}
	}
}
