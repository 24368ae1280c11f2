// SPDX-License-Identifier: Apache-2.0

package framing

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// What is to become of a payload.
const (
	pass    = iota // served, its connection may be used again
	isolate        // served, but never on a connection that serves anybody else
	refuse         // no byte reaches a server
	spoil          // refused, but a part may have reached a server, which is then cut off
	abort          // a part reaches a server, which is then cut off
)

const mark = "IDIDIDIDIDIDIDIDIDID"

// A payload is what one client sends. mark stands for a text of the same
// length that is unique to this use of it, so that logs can be searched; every
// target with "smuggled" in it is one that no server may ever see.
type payload struct {
	name  string
	want  int
	parts []string // sent one after the other
	pause time.Duration
}

const smuggled = "GET /smuggled/" + mark + " HTTP/1.1\r\nHost: a\r\nX: "

// http11 writes a message with CRLF for each newline.
func http11(s string) string { return strings.ReplaceAll(s, "\n", "\r\n") }

// corpus is every payload of our own.
func corpus() []payload {
	var out []payload
	add := func(want int, name string, parts ...string) {
		out = append(out, payload{name: name, want: want, parts: parts})
	}
	late := func(want int, name string, pause time.Duration, parts ...string) {
		out = append(out, payload{name: name, want: want, pause: pause, parts: parts})
	}
	post := func(fields, body string) string {
		return "POST /p/" + mark + " HTTP/1.1\r\nHost: a\r\n" + fields + "\r\n" + body
	}
	cl := func(n int) string { return fmt.Sprintf("Content-Length: %d\r\n", n) }
	const te = "Transfer-Encoding: chunked\r\n"
	chunk := func(b string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(b), b) }

	// Plain ones, as a control of everything else.
	add(pass, "get", "GET /p/"+mark+" HTTP/1.1\r\nHost: a\r\n\r\n")
	add(pass, "two gets", "GET /p/"+mark+" HTTP/1.1\r\nHost: a\r\n\r\nGET /p/"+mark+"/2 HTTP/1.1\r\nHost: a\r\n\r\n")
	add(pass, "length", post(cl(len(smuggled)), smuggled))
	add(pass, "chunked", post(te, chunk(smuggled)+"0\r\n\r\n"))
	add(pass, "chunked with trailers", post(te, chunk(smuggled)+"0\r\nX-T: GET /smuggled/"+mark+" HTTP/1.1\r\n\r\n"))
	add(pass, "length then get", post(cl(5), "hello")+"GET /p/"+mark+"/2 HTTP/1.1\r\nHost: a\r\n\r\n")

	// CL.TE and TE.CL: both fields, in either order, with either body.
	for i, f := range []string{cl(6) + te, te + cl(6), cl(4) + te, te + cl(0), cl(len(smuggled)+5) + te} {
		add(refuse, fmt.Sprintf("CL.TE %d", i), post(f, "0\r\n\r\n"+smuggled))
		add(refuse, fmt.Sprintf("TE.CL %d", i), post(f, chunk(smuggled)+"0\r\n\r\n"))
	}
	// TE.TE: spellings that one server takes for chunked and another does not.
	for i, f := range []string{
		"Transfer-Encoding: xchunked", "Transfer-Encoding : chunked", "Transfer-Encoding: x\r\nTransfer-Encoding: chunked",
		"Transfer-Encoding: chunked\r\nTransfer-Encoding: x", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
		" Transfer-Encoding: chunked", "X: y\r\n Transfer-Encoding: chunked", "X: y\nTransfer-Encoding: chunked", "X: y\rTransfer-Encoding: chunked",
		"Transfer-Encoding\r\n: chunked", "Transfer-Encoding: \"chunked\"", "Transfer-Encoding: 'chunked'", "Transfer-Encoding: chunked, identity",
		"Transfer-Encoding: identity, chunked", "Transfer-Encoding: identity", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: chunked;x=y",
		"Transfer-Encoding: chunked\x0b", "Transfer-Encoding:\x0bchunked", "Transfer-Encoding: chunked\x00", "Transfer-Encoding: \x00chunked",
		"Transfer_Encoding: chunked", "Transfer-Encoding:", "Transfer-Encoding: ,chunked", "Transfer-Encoding: chunked,", "Transfer-Encoding:\r\n chunked",
		"Transfer-Encoding: chunk", "Transfer-Encoding: chunkedchunked", "Transfer\x00-Encoding: chunked", "Transfer-Encoding: ch\xc3\xbcnked",
		"Transfer-Encoding: chunked\r\nTransfer_Encoding: x", "\tTransfer-Encoding: chunked", "Transfer-Encoding;: chunked", "TransferEncoding: chunked",
		"Transfer-Encoding: cow\r\nTransfer-Encoding: chunked",
	} {
		add(refuse, fmt.Sprintf("TE.TE %d", i), post(f+"\r\n", "0\r\n\r\n"+smuggled))
		add(refuse, fmt.Sprintf("TE.TE %d with length", i), post(f+"\r\n"+cl(4), chunk(smuggled)+"0\r\n\r\n"))
	}
	for i, f := range []string{"transfer-encoding: CHUNKED", "TRANSFER-ENCODING:chunked", "Transfer-Encoding:\tchunked ", "Transfer-Encoding: \t chunked\t"} {
		add(pass, fmt.Sprintf("chunked spelling %d", i), post(f+"\r\n", chunk(smuggled)+"0\r\n\r\n"))
		add(refuse, fmt.Sprintf("chunked spelling %d with length", i), post(f+"\r\n"+cl(4), chunk(smuggled)+"0\r\n\r\n"))
	}
	add(refuse, "chunked in 1.0", "POST /p/"+mark+" HTTP/1.0\r\nHost: a\r\n"+te+"\r\n0\r\n\r\n"+smuggled)
	add(refuse, "chunked in 1.0, kept alive", "POST /p/"+mark+" HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n"+te+"\r\n"+chunk(smuggled)+"0\r\n\r\n")

	// CL.0 and TE.0: bodies where servers do not expect any.
	for _, m := range []string{"GET", "HEAD", "DELETE", "TRACE"} {
		add(isolate, "CL.0 "+m, m+" /p/"+mark+" HTTP/1.1\r\nHost: a\r\n"+cl(len(smuggled))+"\r\n"+smuggled)
		add(isolate, "TE.0 "+m, m+" /p/"+mark+" HTTP/1.1\r\nHost: a\r\n"+te+"\r\n"+chunk(smuggled)+"0\r\n\r\n")
	}
	for _, m := range []string{"OPTIONS", "PUT", "PATCH", "PROPFIND", "FOO"} {
		add(pass, "CL.0 "+m, m+" /p/"+mark+" HTTP/1.1\r\nHost: a\r\n"+cl(len(smuggled))+"\r\n"+smuggled)
		add(pass, "TE.0 "+m, m+" /p/"+mark+" HTTP/1.1\r\nHost: a\r\n"+te+"\r\n"+chunk(smuggled)+"0\r\n\r\n")
	}
	add(pass, "early response, the body at once", "POST /early/"+mark+" HTTP/1.1\r\nHost: a\r\n"+cl(len(smuggled))+"\r\n"+smuggled)

	// 0.CL: spellings of a length that one server reads and another does not.
	n := len(smuggled)
	for i, f := range []string{
		"Content-Length : %d", "Content-Length: +%d", "Content-Length: -%d", " Content-Length: %d", "Content-Length: %d %d", "Content-Length: %d\r\nContent-Length: 0",
		"Content-Length: 0\r\nContent-Length: %d", "Content-Length: %d, %d", "Content-Length: %d,", "Content-Length: 0x%x", "Content-Length: %d.0", "Content-Length: %d;",
		"Content_Length: %d", "Content-Length:\x0b%d", "Content-Length: %d\x00", "Content-Length:", "Content-Length: ", "Content-Length: 18446744073709551665", "Content-Length: 99999999999999999999",
		"X: y\r\n Content-Length: %d", "X: y\nContent-Length: %d", "X: y\rContent-Length: %d", "Content-Length\r\n: %d", "Content-Length:\r\n %d", "Content-Length: \"%d\"",
		"Content-Length: %de0", "ContentLength: %d", "Content-Length%%: %d", "Content-Length: %d\r\nContent_Length: 0", "\tContent-Length: %d",
	} {
		f = strings.ReplaceAll(strings.ReplaceAll(strings.ReplaceAll(f, "%d", fmt.Sprint(n)), "%x", fmt.Sprintf("%x", n)), "%%", "%")
		add(refuse, fmt.Sprintf("0.CL %d", i), post(f+"\r\n", smuggled))
	}
	add(isolate, "0.CL zeros", post(fmt.Sprintf("Content-Length: 000%d\r\n", n), smuggled))
	add(isolate, "0.CL twice", post(cl(n)+cl(n), smuggled))
	add(pass, "0.CL tab", post(fmt.Sprintf("Content-Length:\t%d \r\n", n), smuggled))
	add(pass, "0.CL case", post(fmt.Sprintf("content-LENGTH:%d\r\n", n), smuggled))

	// Expect games.
	add(pass, "Expect, at once", post("Expect: 100-continue\r\n"+cl(n), smuggled))
	add(pass, "Expect, chunked at once", post("Expect: 100-continue\r\n"+te, chunk(smuggled)+"0\r\n\r\n"))
	add(pass, "Expect, early", "POST /early/"+mark+" HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n"+cl(n)+"\r\n"+smuggled)
	for i, f := range []string{
		"Expect: y 100-continue", "Expect: 100-continue, x", "Expect: 100-continued", "Expect: x", "Expect: 100-continue\r\nExpect: 100-continue", "Expect:",
	} {
		add(isolate, fmt.Sprintf("Expect %d", i), post(f+"\r\n"+cl(n), smuggled))
	}
	add(isolate, "Expect, get", "GET /p/"+mark+" HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n")
	add(isolate, "Expect, get with length", "GET /p/"+mark+" HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n"+cl(n)+"\r\n"+smuggled)
	add(isolate, "Expect, zero length", post("Expect: 100-continue\r\n"+cl(0), ""))
	add(refuse, "Expect, folded", post("Expect:\r\n 100-continue\r\n"+cl(n), smuggled))
	late(abort, "Expect, the body never", 300*time.Millisecond,
		post("Expect: 100-continue\r\n"+cl(2*n), ""), smuggled)

	// An answer before the body: what follows is no request.
	late(abort, "early response, the body later", 300*time.Millisecond,
		"POST /early/"+mark+" HTTP/1.1\r\nHost: a\r\n"+cl(9*n)+"\r\n", smuggled)
	late(abort, "early response, chunks later", 300*time.Millisecond,
		"POST /early/"+mark+" HTTP/1.1\r\nHost: a\r\n"+te+"\r\n", chunk("hello"), smuggled)

	// Chunk lines.
	for _, family := range []struct {
		name  string
		lines []string
	}{
		{"chunk terminator", []string{"5\n", "5\r", "5\r\r\n", "5\n\r\n", "\r\n5\r\n", "5;\n", "5;a\n", "5;a\r", "5\x00\r\n", "5\x0b\r\n", "5\x85\r\n", "5 \n"}},
		{"chunk extension", []string{"5;a\nb\r\n", "5;a\rb\r\n", "5;\x00\r\n", "5;a=\"\n\"\r\n", "5 ;a\r\n", "5; a\r\n", "5;" + strings.Repeat("x", 5000) + "\r\n", "5;a=\"b\r\n", "5;a=b=c\r\n", "5;a=\r\n", "5;=b\r\n", "5;;a\r\n", "5,a\r\n", "5\\;a\r\n"}},
		{"chunk size", []string{"5 \r\n", " 5\r\n", "5\t\r\n", "0x5\r\n", "+5\r\n", "-5\r\n", "5.\r\n", "5,\r\n", "05g\r\n", "g\r\n", "\r\n", "fffffffffffffffff5\r\n", "10000000000000005\r\n", "4000000000000000\r\n", "5_\r\n"}},
	} {
		for i, line := range family.lines {
			add(spoil, fmt.Sprintf("%s %d", family.name, i), post(te, line+"hello\r\n0\r\n\r\n"+smuggled))
		}
	}
	for i, line := range []string{"5\r\n", "005\r\n", "0000000000000005\r\n", "5;a\r\n", "5;a=b;c=\"d;\\\"e\"\r\n"} {
		add(pass, fmt.Sprintf("good chunk line %d", i), post(te, line+"hello\r\n0\r\n\r\n"))
	}
	for i, end := range []string{"hello0\r\n\r\n", "hello\n0\r\n\r\n", "hello\r0\r\n\r\n", "helloXX0\r\n\r\n", "hello\r\n\r\n0\r\n\r\n", "hell\r\n0\r\n\r\n"} {
		add(spoil, fmt.Sprintf("chunk end %d", i), post(te, "5\r\n"+end+smuggled))
	}
	for i, end := range []string{"0\n\r\n", "0\r\n\n", "0\r\n\r", "0\r\nX: y\n\r\n", "0\r\n X: y\r\n\r\n", "0\r\nX : y\r\n\r\n", "0\r\nX\r\n\r\n", "0\r\n: y\r\n\r\n", "0\r\nX: \x00\r\n\r\n",
		"0\r\nX: " + strings.Repeat("x", 9000) + "\r\n\r\n", "0;\n\r\n", "00x\r\n\r\n"} {
		add(spoil, fmt.Sprintf("last chunk %d", i), post(te, "5\r\nhello\r\n"+end+smuggled))
	}
	add(pass, "forbidden trailers", post(te, "5\r\nhello\r\n0\r\nContent-Length: 50\r\nTransfer-Encoding: x\r\nHost: b\r\n\r\n"))
	// The doubtful line after good chunks were passed on.
	for i, line := range []string{"5\nhello", "x\r\n", "5;\nhello"} {
		late(abort, fmt.Sprintf("late chunk line %d", i), 100*time.Millisecond,
			post(te, chunk("hello")), line+smuggled)
	}

	// Hosts and targets.
	for i, h := range []string{
		"GET /p/" + mark + " HTTP/1.1\n\n", "GET /p/" + mark + " HTTP/1.1\nHost: a b\n\n",
		"GET /p/" + mark + " HTTP/1.1\nHost: a@b\n\n", "GET /p/" + mark + " HTTP/1.1\nHost: a/b\n\n", "GET /p/" + mark + " HTTP/1.1\nHost: a:x\n\n", "GET /p/" + mark + " HTTP/1.1\nHost:\n\n",
		"GET /p/" + mark + " HTTP/1.1\nHost : a\n\n", "GET /p/" + mark + " HTTP/1.1\n Host: a\n\n", "GET /p/" + mark + " HTTP/1.1\nX: y\n Host: b\nHost: a\n\n", "GET p/" + mark + " HTTP/1.1\nHost: a\n\n",
		"GET @b/p/" + mark + " HTTP/1.1\nHost: a\n\n", "CONNECT a:80 HTTP/1.1\nHost: a:80\n\n", "GET * HTTP/1.1\nHost: a\n\n", "GET /p/" + mark + "\x00 HTTP/1.1\nHost: a\n\n", "GET /p/" + mark + "\x0b HTTP/1.1\nHost: a\n\n", "GET /p/\xc2\xa0" + mark + " HTTP/1.1\nHost: a\n\n",
	} {
		add(refuse, fmt.Sprintf("host %d", i), http11(h)+smuggled)
	}
	for i, fields := range []string{
		"Host: a\nHost: b\n", "Host: a\nHost: a\n", "Host: a\nhost: b\n", "Host: a\nX: y\nHOST:b\n", "Host: a\n Host: b\n", "Host: a\nHost : b\n", "Host: a\nHost:\n", "Host: a, b\n", "Host: a b\n", "Host: a\x00b\n",
	} {
		add(refuse, fmt.Sprintf("dual Host %d", i), http11("GET /p/"+mark+" HTTP/1.1\n"+fields+"\n")+smuggled)
	}
	for i, form := range []string{
		"http://b/p/" + mark, "http://a:81/p/" + mark, "http://ab/p/" + mark, "http://a.b/p/" + mark, "https://a/p/" + mark, "ftp://a/p/" + mark, "http:///p/" + mark, "http://u@a/p/" + mark, "http://a@b/p/" + mark, "http:a/p/" + mark, "http:/a/p/" + mark, "//b/p/" + mark + " x", "http://a\\b/p/" + mark, "http://%61/p/" + mark,
	} {
		add(refuse, fmt.Sprintf("absolute form %d", i), "GET "+form+" HTTP/1.1\r\nHost: a\r\n\r\n"+smuggled)
	}
	add(refuse, "absolute form, dual Host", "GET http://a/p/"+mark+" HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"+smuggled)
	add(refuse, "absolute form, no Host", "GET http://a/p/"+mark+" HTTP/1.1\r\n\r\n"+smuggled)
	add(pass, "host with a comma", "GET /p/"+mark+" HTTP/1.1\r\nHost: a,b\r\n\r\n") // RFC 3986 section 3.2.2 has it
	add(pass, "absolute form", "GET http://a/p/"+mark+" HTTP/1.1\r\nHost: a\r\n\r\n")
	add(pass, "absolute form, case", "GET HTTP://A/p/"+mark+" HTTP/1.1\r\nHost: a\r\n\r\n")
	add(pass, "host with port", "GET /p/"+mark+" HTTP/1.1\r\nHost: a:80\r\n\r\n")

	// Request lines and versions.
	for i, l := range []string{
		"GET  /p/" + mark + " HTTP/1.1", "GET /p/" + mark + "  HTTP/1.1", "GET\t/p/" + mark + " HTTP/1.1", "GET /p/" + mark + "\tHTTP/1.1", "GET /p/" + mark + " HTTP/1.1 ", " GET /p/" + mark + " HTTP/1.1", "GET /p/" + mark + " http/1.1", "GET /p/" + mark + " HTTP/1.10", "GET /p/" + mark + " HTTP/01.1",
		"GET /p/" + mark + " HTTP/1.2", "GET /p/" + mark + " HTTP/2.0", "GET /p/" + mark + " HTTP/0.9", "GET /p/" + mark, "GET /p/" + mark + " HTTP", "GET /p/" + mark + " HTTP/1", "GET /p/" + mark + " HTTP/1.1x", "GE(T /p/" + mark + " HTTP/1.1", "/p/" + mark + " HTTP/1.1", "GET /p /" + mark + " HTTP/1.1",
		"PRI * HTTP/2.0", "\r\n\r\n\r\nGET /p/" + mark + " HTTP/1.1", "\nGET /p/" + mark + " HTTP/1.1", "GET /p/" + mark + " HTTP/1.1\r", strings.Repeat("G", 40) + " /p/" + mark + " HTTP/1.1",
	} {
		add(refuse, fmt.Sprintf("request line %d", i), l+"\r\nHost: a\r\n\r\n"+smuggled)
	}
	add(refuse, "bare LF", "GET /p/"+mark+" HTTP/1.1\nHost: a\n\n"+smuggled)
	add(refuse, "bare LF at the end", "GET /p/"+mark+" HTTP/1.1\r\nHost: a\r\n\n"+smuggled)
	add(refuse, "bare CR at the end", "GET /p/"+mark+" HTTP/1.1\r\nHost: a\r\n\r"+smuggled)
	add(pass, "empty lines before", "\r\n\r\nGET /p/"+mark+" HTTP/1.1\r\nHost: a\r\n\r\n")
	add(pass, "empty lines between", post(cl(5), "hello")+"\r\nGET /p/"+mark+"/2 HTTP/1.1\r\nHost: a\r\n\r\n")

	// Field lines.
	for i, f := range []string{
		"X", ": y", "X y: z", "X\x00: y", "X: \x00", "X: a\rb", "X: a\nb", "X: y\r\n z", "X\t: y", "(X): y", "X: \x7f", "X: \x01", "\xff: y", strings.Repeat("X: y\r\n", 100) + "X: y", "X: " + strings.Repeat("y", 70000),
	} {
		add(refuse, fmt.Sprintf("field %d", i), "GET /p/"+mark+" HTTP/1.1\r\nHost: a\r\n"+f+"\r\n\r\n"+smuggled)
	}

	// Connection options that make a server forget a field.
	for i, f := range []string{"Content-Length", "Transfer-Encoding", "Host", "close, Host", "X", "keep-alive, x", "upgrade, Content-Length", "\"close\""} {
		add(isolate, fmt.Sprintf("connection option %d", i), post("Connection: "+f+"\r\n"+cl(n), smuggled))
	}
	add(pass, "close", post("Connection: close\r\n"+cl(n), smuggled)+"GET /smuggled/"+mark+" HTTP/1.1\r\nHost: a\r\n\r\n")
	add(pass, "1.0", "GET /p/"+mark+" HTTP/1.0\r\n\r\nGET /smuggled/"+mark+" HTTP/1.0\r\n\r\n")
	add(pass, "1.0 kept alive", "GET /p/"+mark+" HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /p/"+mark+"/2 HTTP/1.0\r\n\r\n")

	// Upgrade before a 101: the bytes of the new protocol stay.
	for i, f := range []string{
		"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
		"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
		"Connection: upgrade\r\nUpgrade: TLS/1.0\r\n", "Upgrade: anything\r\n", "Connection: Upgrade\r\n",
	} {
		add(isolate, fmt.Sprintf("Upgrade before 101, %d", i), "GET /p/"+mark+" HTTP/1.1\r\nHost: a\r\n"+f+"\r\n"+smuggled+"\r\n\r\n")
	}

	// Pauses: servers that give up waiting must not take the rest for a request.
	for i, at := range []int{0, 1, 10, n / 2} {
		late(pass, fmt.Sprintf("pause-based %d", i), 200*time.Millisecond,
			post(cl(n), smuggled[:at]), smuggled[at:])
	}
	late(pass, "pause-based, chunk line", 200*time.Millisecond,
		post(te, fmt.Sprintf("%x", n)), "\r\n"+smuggled+"\r", "\n0\r\n\r", "\n")
	late(pass, "pause-based, head", 200*time.Millisecond,
		"POST /p/"+mark+" HT", "TP/1.1\r\nHost: a\r", "\nContent-Le", fmt.Sprintf("ngth: %d\r\n\r", n), "\n"+smuggled)
	add(abort, "never finished", post(cl(9*n), smuggled))
	add(abort, "never finished chunk", post(te, "fff\r\n"+smuggled))
	return out
}

// TestFamilies: every family of attack is in the corpus, by its name, in more
// than one spelling, and each has its neighbour that passes.
func TestFamilies(t *testing.T) {
	count := map[string]int{}
	for _, f := range []struct {
		name  string
		least int
	}{
		{"CL.TE", 5}, {"TE.CL", 5}, {"TE.TE", 60}, {"CL.0", 9}, {"TE.0", 9}, {"0.CL", 30}, {"Expect", 10}, {"early response", 3}, {"chunk terminator", 10}, {"chunk extension", 10},
		{"chunk size", 10}, {"chunk end", 5}, {"last chunk", 10}, {"late chunk line", 3}, {"dual Host", 10}, {"absolute form", 15}, {"host", 10}, {"request line", 20}, {"field", 10}, {"connection option", 5},
		{"Upgrade before 101", 5}, {"pause-based", 5}, {"never finished", 2},
	} {
		names := map[string]bool{}
		for _, p := range corpus() {
			if strings.HasPrefix(p.name, f.name) {
				names[p.name] = true
			}
		}
		if count[f.name] = len(names); len(names) < f.least {
			t.Errorf("%s: %d payloads, at least %d are meant", f.name, len(names), f.least)
		}
	}
	outcomes := map[int]int{}
	for _, p := range corpus() {
		outcomes[p.want]++
	}
	for _, want := range []int{pass, isolate, refuse, spoil, abort} {
		if outcomes[want] == 0 {
			t.Errorf("no payload has outcome %d", want)
		}
	}
	t.Logf("%d payloads: %v", len(corpus()), count)
}
