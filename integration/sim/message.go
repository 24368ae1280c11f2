// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"strings"

	"github.com/weirgate/weir/integration/sim/tcp"
)

// Nonce names a request: 128 bits as hexadecimal digits.
type Nonce [32]byte

func newNonce(r *rand.Rand) (n Nonce) {
	var b [16]byte
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	hex.Encode(n[:], b[:])
	return n
}

// line is the length of a line of a body: nonce, blank, number of the line,
// filler, line feed. A byte out of its place does not go unnoticed.
const line = 64

// body is the body that belongs to a nonce; requests and responses differ in
// the filler.
type body struct {
	nonce  Nonce
	filler byte
}

const digits = "0123456789abcdef"

// Fill implements tcp.Source.
func (s *body) Fill(off uint64, b []byte) {
	for len(b) > 0 {
		var l [line]byte
		copy(l[:], s.nonce[:])
		l[32] = ' '
		k := off / line
		for i := range 16 {
			l[48-i] = digits[k>>(4*i)&15]
		}
		for i := 49; i < line-1; i++ {
			l[i] = s.filler
		}
		l[line-1] = '\n'
		n := copy(b, l[off%line:])
		b, off = b[n:], off+uint64(n)
	}
}

// span is a run of bytes that need not be what they are in the message: the
// name of a field that is overwritten.
type span struct{ from, to uint64 }

// message is a request or a response as bytes: what is written out, then what
// is generated, then what follows it. It is a tcp.Source.
type message struct {
	head []byte
	gen  tcp.Source
	n    uint64 // bytes of gen
	tail []byte
	free []span // bytes of head that may be any token characters
}

func (m *message) size() uint64 { return uint64(len(m.head)) + m.n + uint64(len(m.tail)) }

// Fill implements tcp.Source.
func (m *message) Fill(off uint64, b []byte) {
	if h := uint64(len(m.head)); off < h {
		k := copy(b, m.head[off:])
		b, off = b[k:], off+uint64(k)
	}
	off -= uint64(len(m.head))
	if len(b) > 0 && off < m.n {
		k := min(uint64(len(b)), m.n-off)
		m.gen.Fill(off, b[:k])
		b, off = b[k:], off+k
	}
	if len(b) > 0 {
		copy(b, m.tail[off-m.n:])
	}
}

// match compares bytes at a place of the message with what they should be and
// returns the index of the first wrong one, -1 if all are right.
func (m *message) match(off uint64, b []byte, scratch *[]byte) int {
	done := 0
	if h := uint64(len(m.head)); off < h {
		want := m.head[off:]
		k := min(len(want), len(b))
		if !bytes.Equal(want[:k], b[:k]) {
			for i := range k {
				if b[i] != want[i] && !m.loose(off+uint64(i), b[i]) {
					return i
				}
			}
		}
		done = k
	}
	if done == len(b) {
		return -1
	}
	if cap(*scratch) < len(b) {
		*scratch = make([]byte, len(b)*2)
	}
	want := (*scratch)[:len(b)-done]
	m.Fill(off+uint64(done), want)
	if bytes.Equal(want, b[done:]) {
		return -1
	}
	for i := range want {
		if want[i] != b[done+i] {
			return done + i
		}
	}
	return -1
}

// loose says whether a byte stands where a field name may have been
// overwritten, and is one of a name.
func (m *message) loose(off uint64, c byte) bool {
	for _, s := range m.free {
		if s.from <= off && off < s.to {
			return c == '-' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		}
	}
	return false
}

// smallBody is the size up to which bodies are written out.
const smallBody = 1 << 20

// Exchange is one request and what the server answers to it.
type Exchange struct {
	ReqPlan
	Nonce Nonce
	conn  *client
	index int

	request message // as the client writes it
	served  message // as the server must see it: with the overlay
	insAt   uint64  // place of the insertion in served
	insLen  uint64
	reply   message // as the server writes it, interim responses included
	interim uint64  // bytes of interim responses in reply
	headLen uint64  // of the request as the client writes it

	// what happened
	reached  int // server applications that saw the head
	executed int // and the end
	answered bool
	own      int    // status of an answer of the engine's own
	excuse   string // why it need not be answered
	started  int64
	finished int64
	flows    []*serverFlow
}

func (x *Exchange) idempotent() bool { return x.Method == "GET" || x.Method == "HEAD" }

// repeatable says whether the engine may send the request twice without proof:
// its rule is "bodyless and idempotent".
func (x *Exchange) repeatable() bool { return x.idempotent() && x.Body == 0 && !x.Chunked }

// write builds the bytes of both messages.
func (x *Exchange) write(forwarded string, r *rand.Rand) {
	var h strings.Builder
	fmt.Fprintf(&h, "%s /n/%s HTTP/1.%d\r\nHost: weir.example\r\n", x.Method, x.Nonce, x.Minor)
	fmt.Fprintf(&h, "X-Nonce: %s\r\n", x.Nonce)
	if x.Pad > 0 {
		fmt.Fprintf(&h, "X-Pad: %s\r\n", strings.Repeat("p", x.Pad))
	}
	var free []span
	field := func(name, value string) {
		if name == "Connection" && value == "close" || name == "X-Forwarded-For" && forwarded != "" {
			free = append(free, span{uint64(h.Len()), uint64(h.Len() + len(name))})
		}
		fmt.Fprintf(&h, "%s: %s\r\n", name, value)
	}
	switch {
	case x.Close:
		field("Connection", "close")
	case x.Keep:
		field("Connection", "keep-alive")
	}
	if x.Spoof {
		field("X-Forwarded-For", "192.0.2.1")
	}
	if x.Expect {
		field("Expect", "100-continue")
	}
	var reqBody message
	switch {
	case x.Chunked:
		field("Transfer-Encoding", "chunked")
		reqBody.head = chunked(&body{x.Nonce, 'q'}, x.Body, x.Nonce, r)
	case x.Body > 0 || x.Method == "POST":
		field("Content-Length", fmt.Sprint(x.Body))
		reqBody.gen, reqBody.n = &body{x.Nonce, 'q'}, x.Body
	}
	head := h.String()
	ins := ""
	if x.Minor == 0 && !x.Keep {
		ins = "Connection: Keep-Alive\r\n"
	}
	if forwarded != "" {
		ins += "X-Forwarded-For: " + forwarded + "\r\n"
	}
	build := func(ins string) message {
		m := reqBody
		m.head = append([]byte(head+ins+"\r\n"), reqBody.head...)
		if m.n > 0 && m.n <= smallBody {
			m.head, m.gen, m.n = flat(&m), nil, 0
		}
		return m
	}
	x.request = build("")
	x.served = build(ins)
	x.served.free = free
	x.headLen = uint64(len(head) + 2)
	x.insAt, x.insLen = uint64(len(head)), uint64(len(ins))
	x.writeReply(r)
}

func (n Nonce) String() string { return string(n[:]) }

func flat(m *message) []byte {
	b := make([]byte, m.size())
	m.Fill(0, b)
	return b
}

// writeReply builds the response.
func (x *Exchange) writeReply(r *rand.Rand) {
	p := &x.Reply
	var h strings.Builder
	if x.Expect && !p.Early {
		h.WriteString("HTTP/1.1 100 Continue\r\n\r\n")
	}
	for range p.Interim {
		fmt.Fprintf(&h, "HTTP/1.1 103 Early Hints\r\nLink: </%s>\r\n\r\n", x.Nonce)
	}
	x.interim = uint64(h.Len())
	fmt.Fprintf(&h, "HTTP/1.%d %d Status\r\nX-Nonce: %s\r\n", p.Minor, p.Status, x.Nonce)
	if p.Close {
		h.WriteString("Connection: close\r\n")
	} else if p.Minor == 0 {
		h.WriteString("Connection: keep-alive\r\n")
	}
	var m message
	none := x.Method == "HEAD" || p.Status == 204 || p.Status == 304
	switch {
	case p.Status == 204:
	case p.Kind == KindChunked:
		h.WriteString("Transfer-Encoding: chunked\r\n")
		if !none {
			m.head = chunked(&body{x.Nonce, 'r'}, p.Body, x.Nonce, r)
		}
	case p.Kind == KindLength:
		fmt.Fprintf(&h, "Content-Length: %d\r\n", p.Body)
		if !none {
			m.gen, m.n = &body{x.Nonce, 'r'}, p.Body
		}
	case !none: // until the connection ends
		m.gen, m.n = &body{x.Nonce, 'r'}, p.Body
	}
	h.WriteString("\r\n")
	m.head = append([]byte(h.String()), m.head...)
	if m.n > 0 && m.n <= smallBody {
		m.head, m.gen, m.n = flat(&m), nil, 0
	}
	x.reply = m
}

// chunked frames a body in chunks of random sizes, with extensions and
// trailers now and then.
func chunked(src tcp.Source, n uint64, nonce Nonce, r *rand.Rand) []byte {
	var b []byte
	for off := uint64(0); off < n; {
		k := min(n-off, 1+r.Uint64N(1<<uint(r.IntN(15))))
		form := "%x"
		if r.IntN(4) == 0 {
			form = "%08X"
		}
		b = fmt.Appendf(b, form, k)
		if r.IntN(8) == 0 {
			b = append(b, ";ext=\"a;b\""...)
		}
		b = append(b, "\r\n"...)
		at := len(b)
		b = append(b, make([]byte, k)...)
		src.Fill(off, b[at:])
		b = append(b, "\r\n"...)
		off += k
	}
	b = append(b, "0\r\n"...)
	if r.IntN(2) == 0 {
		b = fmt.Appendf(b, "X-Trailer: %s\r\n", nonce)
	}
	return append(b, "\r\n"...)
}

// closing says whether the client's connection ends with this exchange.
func (x *Exchange) closing() bool {
	p := &x.Reply
	return x.Close || x.Minor == 0 && !x.Keep || p.Close || p.Kind == KindUntilClose && !x.bodyless() || p.Early && x.request.size() > x.headLen
}

func (x *Exchange) bodyless() bool {
	return x.Method == "HEAD" || x.Reply.Status == 204 || x.Reply.Status == 304
}
