// SPDX-License-Identifier: Apache-2.0

package http1_test

import (
	"fmt"

	"github.com/weirgate/weir/module/http1"
)

// A stream of requests is followed head by head and body by body, in pieces as
// they come.
func Example() {
	stream := "POST /form?a=b HTTP/1.1\r\nHost: www.example.com\r\nTransfer-Encoding: chunked\r\n\r\n" +
		"5\r\nhello\r\n0\r\n\r\n" +
		"GET /next HTTP/1.1\r\nHost: www.example.com\r\nConnection: x-private\r\n\r\n" +
		"GET /smuggled HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"
	lim := http1.DefaultLimits()
	want, _ := http1.NewWanted("User-Agent", "Cookie")
	for rest := []byte(stream); len(rest) > 0; {
		var h http1.RequestHead
		if _, st := h.Scan(rest, &lim, want); st != http1.Done {
			fmt.Println(st, h.Reason, h.Reason.HTTPStatus())
			return
		}
		var body http1.Body
		body.Start(h.Body, h.Length)
		n, st := body.Feed(rest[h.Len:], &lim)
		fmt.Printf("%v %s at %s: %v, head %d, body %d %v %v\n", h.Method, h.Path.Of(rest), h.Host.Of(rest), h.Outcome, h.Len, n, h.Body, st)
		rest = rest[int(h.Len)+n:]
	}
	// Output:
	// POST /form at www.example.com: accept, head 78, body 15 chunked done
	// GET /next at www.example.com: isolate, head 68, body 0 none done
	// bad two-hosts 400
}
