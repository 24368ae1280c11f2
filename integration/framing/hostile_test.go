// SPDX-License-Identifier: Apache-2.0

package framing

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// A reply is what a server of our own says to one request.
type reply struct {
	name   string
	method string // of the request, "" is GET
	text   string
	clean  bool // its end is beyond doubt, so its connection is pooled
	none   bool // it is no response at all: 502
	open   bool // the client knows the end: the server leaves the connection open
}

// replies are the hostile responses. What the server does behind them is up to
// the test.
func replies() []reply {
	var out []reply
	doubt := func(name, text string) { out = append(out, reply{name: name, text: http11(text)}) }
	clean := func(name, method, text string) {
		out = append(out, reply{name: name, method: method, text: http11(text), clean: true, open: true})
	}
	clean("length", "", "HTTP/1.1 200 OK\nContent-Length: 5\n\nhello")
	clean("chunked", "", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n")
	clean("chunked, extensions and trailers", "", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5;a=b;c=\"d\"\nhello\n0;x\nX: y\n\n")
	clean("chunked, spelling", "", "HTTP/1.1 200 OK\ntransfer-encoding:\t CHUNKED \n\n005\nhello\n000\n\n")
	clean("chunked, big hex", "", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\nA\n0123456789\na\n0123456789\n0\n\n")
	clean("no phrase", "", "HTTP/1.1 200\nContent-Length: 0\n\n")
	clean("204", "", "HTTP/1.1 204 No Content\n\n")
	clean("304 with a length", "", "HTTP/1.1 304 Not Modified\nContent-Length: 5\n\n")
	clean("HEAD with a length", "HEAD", "HTTP/1.1 200 OK\nContent-Length: 5\n\n")
	clean("HEAD chunked", "HEAD", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n")
	clean("100 x 1xx", "", strings.Repeat("HTTP/1.1 100 Continue\n\nHTTP/1.1 103 Early Hints\nLink: x\n\n", 50)+"HTTP/1.1 200 OK\nContent-Length: 2\n\nok")
	clean("large", "", "HTTP/1.1 200 OK\nContent-Length: 300000\n\n"+strings.Repeat("x", 300_000))
	clean("large chunks", "", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n"+strings.Repeat("1000\n"+strings.Repeat("y", 4096)+"\n", 60)+"0\n\n")

	for i, f := range []string{
		"Content-Length: 5\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\nContent-Length: 5", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: chunked, gzip", "Transfer-Encoding: xchunked",
		"Transfer-Encoding : chunked", "Transfer-Encoding: chunked\nTransfer-Encoding: chunked", "Transfer_Encoding: chunked", "X: y\n Transfer-Encoding: chunked", "Transfer-Encoding:\n chunked", "Transfer-Encoding: chunked;q=1", "Transfer-Encoding: identity",
	} {
		doubt(fmt.Sprintf("TE %d", i), "HTTP/1.1 200 OK\n"+f+"\n\n5\nhello\n0\n\n")
	}
	for i, f := range []string{
		"Content-Length: 5\nContent-Length: 5", "Content-Length: 5\nContent-Length: 6", "Content-Length: 5, 5", "Content-Length: +5", "Content-Length: -5", "Content-Length: 0x5", "Content-Length: 5.0", "Content-Length: 05", "Content-Length: 5 5", "Content-Length : 5",
		" Content-Length: 5", "X: y\n Content-Length: 5", "Content-Length: 18446744073709551621", "Content-Length:", "Content_Length: 5", "Content-Length: five", "Content-Length: 5;", "X: a\rb\nContent-Length: 5", "X: a\x00b\nContent-Length: 5", "X: \x01\nContent-Length: 5",
		": x\nContent-Length: 5", "X\nContent-Length: 5", "X y: z\nContent-Length: 5", "Connection: close\nContent-Length: 5", "Connection: x\nContent-Length: 5", "Connection: Content-Length\nContent-Length: 5",
	} {
		doubt(fmt.Sprintf("length %d", i), "HTTP/1.1 200 OK\n"+f+"\n\nhello")
	}
	for i, c := range []string{
		"5 \nhello\n0\n\n", " 5\nhello\n0\n\n", "0x5\nhello\n0\n\n", "+5\nhello\n0\n\n", "5;\nhello\n0\n\n", "5\nhelloXX0\n\n", "5\nhello0\n\n", "g\n", "\n5\nhello\n0\n\n", "fffffffffffffffff\nhello", "5\nhello\n0\n: x\n\n", "5\nhello\n0\nX\n\n", "5\nhello\n0\nX: y\n z\n\n",
	} {
		doubt(fmt.Sprintf("chunk %d", i), "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n"+c)
	}
	out = append(out,
		reply{name: "bare LF all over", text: "HTTP/1.1 200 OK\nContent-Length: 5\n\nhello"},
		reply{name: "bare LF in a chunk line", text: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n"},
		reply{name: "bare CR in a chunk line", text: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\rhello\r\n0\r\n\r\n"},
		reply{name: "head beyond every limit", text: "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 80_000) + "\r\nContent-Length: 5\r\n\r\nhello"},
	)
	doubt("no length", "HTTP/1.1 200 OK\n\nhello")
	doubt("1.0", "HTTP/1.0 200 OK\nContent-Length: 5\n\nhello")
	doubt("1.0 chunked", "HTTP/1.0 200 OK\nTransfer-Encoding: chunked\nConnection: keep-alive\n\n5\nhello\n0\n\n")
	doubt("1.9", "HTTP/1.9 200 OK\nContent-Length: 5\n\nhello")
	doubt("status 999", "HTTP/1.1 999 What\nContent-Length: 5\n\nhello")
	doubt("204 with a length", "HTTP/1.1 204 No Content\nContent-Length: 5\n\nhello")
	doubt("204 chunked", "HTTP/1.1 204 No Content\nTransfer-Encoding: chunked\n\n0\n\n")
	doubt("103 with a length", "HTTP/1.1 103 Hints\nContent-Length: 5\n\nhello")
	doubt("204 with a body", "HTTP/1.1 204 No Content\n\nhello")
	doubt("304 with a body", "HTTP/1.1 304 Not Modified\nContent-Length: 5\n\nhello")
	out = append(out,
		reply{name: "HEAD with a body", method: "HEAD", text: http11("HTTP/1.1 200 OK\nContent-Length: 5\n\nhello")},
		reply{name: "HEAD with chunks", method: "HEAD", text: http11("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n")},
	)
	for i, l := range []string{"HTTP/2 200 OK", "HTTP/1.1 20 OK", "HTTP/1.1  200 OK", "HTTP/1.1\t200 OK", "http/1.1 200 OK", "ICY 200 OK", "HTTP/1.1 2000 OK", "HTTP/1.1 abc OK", "200 OK", " HTTP/1.1 200 OK", "\nHTTP/1.1 200 OK", "HTTP/1.1 099 OK", "hello"} {
		out = append(out, reply{name: fmt.Sprintf("status line %d", i), text: http11(l + "\nContent-Length: 5\n\nhello"), none: true})
	}
	return out
}

// replyServer answers each request with the reply that its path names, and
// remembers which connection served which.
type replyServer struct {
	list []reply
	mu   sync.Mutex
	by   map[string][]string // targets by connection
	slow bool                // in pieces
}

func (s *replyServer) serve(c net.Conn) {
	br := bufio.NewReader(c)
	me := c.RemoteAddr().String()
	for {
		target, err := readHead(br)
		if err != nil {
			return
		}
		s.mu.Lock()
		s.by[me] = append(s.by[me], target)
		s.mu.Unlock()
		f := strings.Split(target, "/")
		if f[1] == "probe" {
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(target), target)
			continue
		}
		n, _ := strconv.Atoi(f[2])
		r := s.list[n]
		for text := r.text; text != ""; {
			k := len(text)
			if s.slow {
				k = min(k, 1+len(r.text)/7)
			}
			if _, err := io.WriteString(c, text[:k]); err != nil {
				return
			}
			text = text[k:]
			if s.slow && text != "" {
				time.Sleep(2 * time.Millisecond) // segments of their own
			}
		}
		if !r.open {
			return // the end of the connection is the end of the response
		}
	}
}

// readHead reads one request head without a body and returns its target.
func readHead(br *bufio.Reader) (string, error) {
	line, err := br.ReadString('\n')
	if err != nil {
		return "", err
	}
	for {
		l, err := br.ReadString('\n')
		if err != nil {
			return "", err
		}
		if strings.TrimSpace(l) == "" {
			break
		}
	}
	f := strings.Fields(line)
	if len(f) != 3 {
		return "", fmt.Errorf("request line %q", line)
	}
	return f[1], nil
}

// TestHostileResponses: what a server says is delivered byte for byte, up to
// its close where the end is in doubt; only a connection whose response had an
// end beyond doubt serves another request; and nobody's request is answered
// with the bytes of another one.
func TestHostileResponses(t *testing.T) {
	r := newRig(t, 1)
	whole := &replyServer{list: replies(), by: map[string][]string{}}
	pieces := &replyServer{list: whole.list, by: map[string][]string{}, slow: true}
	r.serve(0, 9001, whole.serve)
	r.serve(0, 9002, pieces.serve)
	r.start(farmText{name: "whole", port: 9001, servers: []string{r.at(0, 9001)}}, farmText{name: "pieces", port: 9002, servers: []string{r.at(0, 9002)}})
	rounds := size(3, 100)
	parallel(t, len(whole.list)*rounds*2, 8, func(i int) error {
		n, s, port := i/2%len(whole.list), whole, uint16(9001)
		if i%2 == 1 {
			s, port = pieces, 9002
		}
		w := s.list[n]
		c, err := r.dial(port)
		if err != nil {
			return err
		}
		defer c.Close()
		method := w.method
		if method == "" {
			method = "GET"
		}
		fmt.Fprintf(c, "%s /reply/%d/%d HTTP/1.1\r\nHost: a\r\n\r\n", method, n, i)
		var got []byte
		if w.open {
			// The client knows where the response ends.
			got = make([]byte, len(w.text))
			k, err := io.ReadFull(c, got)
			if err != nil {
				return fmt.Errorf("%s: %w after %d of %d bytes", w.name, err, k, len(w.text))
			}
		} else {
			apart := bodyApart(w) && s.slow
			if apart {
				// By its head the response is complete, and the connection may
				// stay open.
				_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
			}
			got, err = io.ReadAll(c)
			if err != nil && !w.none && !apart {
				return fmt.Errorf("%s: %w after %q", w.name, err, clip(string(got), 200))
			}
		}
		want := w.text
		if head := strings.Index(want, "\r\n\r\n") + 4; bodyApart(w) && s.slow && len(got) >= head {
			want = want[:min(len(got), len(want))] // the rest came when the connection was over
		}
		// What cannot be told from a response by its first bytes ends with a
		// reset.
		none := strings.HasPrefix(string(got), "HTTP/1.1 502 ") || s.slow && len(got) < len("HTTP/1.1 200") && err != nil && strings.HasPrefix(want, string(got))
		if w.none && !none || !w.none && string(got) != want {
			return fmt.Errorf("%s: delivered %q, the server said %q", w.name, clip(string(got), 300), clip(w.text, 300))
		}
		return r.probe(port, fmt.Sprintf("/probe/%d", i), "TARGET")
	})
	for _, s := range []*replyServer{whole, pieces} {
		reused := 0
		s.mu.Lock()
		for c, list := range s.by {
			for i, target := range list {
				f := strings.Split(target, "/")
				if f[1] != "reply" {
					continue
				}
				n, _ := strconv.Atoi(f[2])
				if i+1 == len(list) {
					continue
				}
				if !s.list[n].clean {
					t.Errorf("connection %s: %q was followed by %s", c, s.list[n].name, list[i+1])
				}
				reused++
			}
		}
		s.mu.Unlock()
		if reused == 0 { // the control
			t.Error("no connection was used again, not even after a clean response")
		}
	}
}

// bodyApart says that a response must not have the body that it has: weir can
// deliver it only if it comes before the exchange is over.
func bodyApart(w reply) bool {
	return !w.clean && !w.none && (w.method == "HEAD" || strings.HasSuffix(w.name, "with a body"))
}
