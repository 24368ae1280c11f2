// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"strings"
	"testing"
)

// browserHead is what a browser sends: about 800 bytes, half of them a cookie
// and a user agent.
var browserHead = []byte("GET /en-US/docs/Web/HTTP/Overview?utm_source=newsletter&page=2 HTTP/1.1\r\n" +
	"Host: developer.example.com\r\n" +
	"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\n" +
	"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8\r\n" +
	"Accept-Language: en-US,en;q=0.5\r\n" +
	"Accept-Encoding: gzip, deflate, br, zstd\r\n" +
	"Referer: https://developer.example.com/testpage.html\r\n" +
	"Connection: keep-alive\r\n" +
	"Cookie: session=0123456789abcdef0123456789abcdef; theme=dark; _ga=GA1.2.1234567890.1700000000; consent=yes\r\n" +
	"Upgrade-Insecure-Requests: 1\r\n" +
	"Sec-Fetch-Dest: document\r\n" +
	"Sec-Fetch-Mode: navigate\r\n" +
	"Sec-Fetch-Site: cross-site\r\n" +
	"If-Modified-Since: Mon, 18 Jul 2016 02:36:04 GMT\r\n" +
	"If-None-Match: \"c561c68d0ba92bbeb8b0fff2a9199f722e3a621a\"\r\n" +
	"Cache-Control: max-age=0\r\n\r\n")

// picoHead is the request with which picohttpparser and llhttp are measured.
var picoHead = []byte("GET /wp-content/uploads/2010/03/hello-kitty-darth-vader-pink.jpg HTTP/1.1\r\n" +
	"Host: www.kittyhell.com\r\n" +
	"User-Agent: Mozilla/5.0 (Macintosh; U; Intel Mac OS X 10.6; ja-JP-mac; rv:1.9.2.3) Gecko/20100401 Firefox/3.6.3 Pathtraq/0.9\r\n" +
	"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n" +
	"Accept-Language: ja,en-us;q=0.7,en;q=0.3\r\n" +
	"Accept-Encoding: gzip,deflate\r\n" +
	"Accept-Charset: Shift_JIS,utf-8;q=0.7,*;q=0.7\r\n" +
	"Keep-Alive: 115\r\n" +
	"Connection: keep-alive\r\n" +
	"Cookie: wp_ozh_wsa_visits=2; wp_ozh_wsa_visit_lasttime=xxxxxxxxxx; " +
	"__utma=xxxxxxxxx.xxxxxxxxxx.xxxxxxxxxx.xxxxxxxxxx.xxxxxxxxxx.x; " +
	"__utmz=xxxxxxxxx.xxxxxxxxxx.x.x.utmccn=(referral)|utmcsr=reader.livedoor.com|utmcct=/reader/|utmcmd=referral\r\n\r\n")

var curlHead = []byte("GET /a HTTP/1.1\r\nHost: www.example.com\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n")

var serverHead = []byte("HTTP/1.1 200 OK\r\n" +
	"Server: nginx/1.24.0\r\n" +
	"Date: Tue, 18 Nov 2025 09:41:00 GMT\r\n" +
	"Content-Type: text/html; charset=utf-8\r\n" +
	"Content-Length: 51234\r\n" +
	"Last-Modified: Mon, 17 Nov 2025 10:00:00 GMT\r\n" +
	"Connection: keep-alive\r\n" +
	"Keep-Alive: timeout=65\r\n" +
	"Vary: Accept-Encoding\r\n" +
	"ETag: \"65f2c1a0-c822\"\r\n" +
	"Strict-Transport-Security: max-age=31536000; includeSubDomains\r\n" +
	"Cache-Control: public, max-age=600\r\n" +
	"Accept-Ranges: bytes\r\n\r\n")

func benchRequest(b *testing.B, msg []byte, w *Wanted, piece int) {
	lim := DefaultLimits()
	var h RequestHead
	b.SetBytes(int64(len(msg)))
	b.ReportAllocs()
	for b.Loop() {
		h.Reset()
		for i := 0; i < len(msg); i += piece {
			h.Scan(msg[i:min(i+piece, len(msg))], &lim, w)
		}
		if h.Outcome != Accept || int(h.Len) != len(msg) {
			b.Fatal(h.Reason)
		}
	}
}

func BenchmarkRequest(b *testing.B) {
	w, err := NewWanted("Cookie", "X-Tenant", "Accept-Language")
	if err != nil {
		b.Fatal(err)
	}
	long := []byte("GET / HTTP/1.1\r\nHost: x\r\nCookie: " + strings.Repeat("a=b; ", 13000) + "\r\n\r\n")
	b.Run("browser", func(b *testing.B) { benchRequest(b, browserHead, nil, len(browserHead)) })
	b.Run("browser-wanted", func(b *testing.B) { benchRequest(b, browserHead, w, len(browserHead)) })
	b.Run("browser-bytewise", func(b *testing.B) { benchRequest(b, browserHead, w, 1) })
	b.Run("pico", func(b *testing.B) { benchRequest(b, picoHead, nil, len(picoHead)) })
	b.Run("curl", func(b *testing.B) { benchRequest(b, curlHead, nil, len(curlHead)) })
	b.Run("64KiB", func(b *testing.B) { benchRequest(b, long, nil, len(long)) })
	b.Run("64KiB-bytewise", func(b *testing.B) { benchRequest(b, long, nil, 1) })
}

func BenchmarkResponse(b *testing.B) {
	lim := DefaultLimits()
	var h ResponseHead
	b.SetBytes(int64(len(serverHead)))
	b.ReportAllocs()
	for b.Loop() {
		h.Reset(GET)
		h.Scan(serverHead, &lim)
		if h.Outcome != Accept || int(h.Len) != len(serverHead) {
			b.Fatal(h.Reason)
		}
	}
}

func BenchmarkChunked(b *testing.B) {
	lim := DefaultLimits()
	for name, size := range map[string]string{"4KiB": "1000", "16B": "10"} {
		n := map[string]int{"4KiB": 4096, "16B": 16}[name]
		msg := []byte(strings.Repeat(size+"\r\n"+strings.Repeat("x", n)+"\r\n", 64) + "0\r\n\r\n")
		b.Run(name, func(b *testing.B) {
			var c Body
			b.SetBytes(int64(len(msg)))
			b.ReportAllocs()
			for b.Loop() {
				c.Start(BodyChunked, 0)
				if n, st := c.Feed(msg, &lim); st != Done || n != len(msg) {
					b.Fatal(c.Reason())
				}
			}
		})
	}
}

// Scanning allocates nothing, cut or whole.
func TestAllocations(t *testing.T) {
	lim := DefaultLimits()
	w, err := NewWanted("Cookie", "Accept")
	if err != nil {
		t.Fatal(err)
	}
	chunked := []byte("5;a=\"b\"\r\nhello\r\n0\r\nA: b\r\n\r\n")
	bad := []byte("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n")
	var h RequestHead
	var r ResponseHead
	var b Body
	for _, c := range []struct {
		name string
		f    func(piece int)
	}{
		{"request", func(piece int) {
			h.Reset()
			for i := 0; i < len(browserHead); i += piece {
				h.Scan(browserHead[i:min(i+piece, len(browserHead))], &lim, w)
			}
		}},
		{"bad request", func(piece int) {
			h.Reset()
			for i := 0; i < len(bad); i += piece {
				h.Scan(bad[i:min(i+piece, len(bad))], &lim, w)
			}
		}},
		{"response", func(piece int) {
			r.Reset(GET)
			for i := 0; i < len(serverHead); i += piece {
				r.Scan(serverHead[i:min(i+piece, len(serverHead))], &lim)
			}
		}},
		{"body", func(piece int) {
			b.Start(BodyChunked, 0)
			for i := 0; i < len(chunked); i += piece {
				b.Feed(chunked[i:min(i+piece, len(chunked))], &lim)
			}
		}},
	} {
		for _, piece := range []int{1, 7, 1 << 20} {
			if n := testing.AllocsPerRun(100, func() { c.f(piece) }); n != 0 {
				t.Errorf("%s in pieces of %d: %v allocations", c.name, piece, n)
			}
		}
	}
}
