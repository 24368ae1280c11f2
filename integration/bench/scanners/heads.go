// SPDX-License-Identifier: Apache-2.0

package main

import "strings"

// A head is what is parsed.
type head struct {
	name     string
	response bool
	text     []byte
}

func lines(list ...string) []byte { return []byte(strings.Join(list, "\r\n") + "\r\n\r\n") }

// heads are what browsers, tools and servers send, and a long one.
var heads = []head{
	{"browser", false, lines(
		"GET /en-US/docs/Web/HTTP/Overview?utm_source=newsletter&page=2 HTTP/1.1",
		"Host: developer.example.com",
		"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
		"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
		"Accept-Language: en-US,en;q=0.5",
		"Accept-Encoding: gzip, deflate, br, zstd",
		"Referer: https://developer.example.com/testpage.html",
		"Connection: keep-alive",
		"Cookie: session=0123456789abcdef0123456789abcdef; theme=dark; _ga=GA1.2.1234567890.1700000000; consent=yes",
		"Upgrade-Insecure-Requests: 1",
		"Sec-Fetch-Dest: document",
		"Sec-Fetch-Mode: navigate",
		"Sec-Fetch-Site: cross-site",
		"If-Modified-Since: Mon, 18 Jul 2016 02:36:04 GMT",
		"If-None-Match: \"c561c68d0ba92bbeb8b0fff2a9199f722e3a621a\"",
		"Cache-Control: max-age=0")},
	{"cookies", false, lines(
		"GET /account/orders HTTP/1.1",
		"Host: shop.example.com",
		"Connection: keep-alive",
		"User-Agent: Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36",
		"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8",
		"Accept-Encoding: gzip, deflate, br, zstd",
		"Accept-Language: de-DE,de;q=0.9,en;q=0.7",
		"Cookie: "+strings.Repeat("name_of_it=dGhlIHZhbHVlIG9mIGEgY29va2ll; ", 40)+"last=1")},
	{"api", false, lines(
		"POST /v1/items/4711/comments HTTP/1.1",
		"Host: api.example.com",
		"Content-Type: application/json",
		"Content-Length: 231",
		"Authorization: Bearer eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkEgVXNlciJ9.c2lnbmF0dXJlLW9mLXRoZS10b2tlbg",
		"Accept: application/json",
		"User-Agent: service/3.4",
		"X-Request-Id: 7b0e9f7a-31d4-4d5e-8a55-5d0c0b7c2f10",
		"Accept-Encoding: gzip")},
	{"curl", false, lines("GET /a HTTP/1.1", "Host: www.example.com", "User-Agent: curl/8.5.0", "Accept: */*")},
	{"60 KiB", false, lines("GET / HTTP/1.1", "Host: www.example.com", "Cookie: "+strings.Repeat("a=b; ", 12000)+"c=d")},
	{"response", true, lines(
		"HTTP/1.1 200 OK",
		"Server: nginx/1.24.0",
		"Date: Tue, 18 Nov 2025 09:41:00 GMT",
		"Content-Type: text/html; charset=utf-8",
		"Content-Length: 51234",
		"Last-Modified: Mon, 17 Nov 2025 10:00:00 GMT",
		"Connection: keep-alive",
		"Keep-Alive: timeout=65",
		"Vary: Accept-Encoding",
		"ETag: \"65f2c1a0-c822\"",
		"Strict-Transport-Security: max-age=31536000; includeSubDomains",
		"Cache-Control: public, max-age=600",
		"Accept-Ranges: bytes")},
}
