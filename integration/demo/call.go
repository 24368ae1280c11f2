// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
)

// callTime bounds one client's call.
const callTime = 8 * time.Second

// A watch is a capture on both sides of the interface unit.
type watch struct {
	*lab.Capture
	sides map[string]ladder.Side
}

// watch starts to record.
func (s *stage) watch() (*watch, error) {
	c, err := s.capture()
	return &watch{c, s.Sides()}, err
}

// wait waits until cond is true of what has passed so far.
func (w *watch) wait(ctx context.Context, cond func([]ladder.Segment) bool) error {
	return w.Wait(ctx, func(recs []lab.Record) bool { return cond(lab.Segments(recs, w.sides)) })
}

// call plays one client: it connects, makes its requests one after the other,
// and closes, or lets the other side do that. It returns when the closing
// handshake has passed, with the client's end of the connection.
func (s *stage) call(ctx context.Context, client int, w *watch, requests []string) (end netip.AddrPort, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	conn, err := s.Clients[client].Dial(ctx, "tcp", s.vip().String())
	if err != nil {
		return end, err
	}
	defer conn.Close()
	if end, err = netip.ParseAddrPort(conn.LocalAddr().String()); err != nil {
		return end, err
	}
	if d, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(d)
	}
	counted := &countingReader{r: conn}
	br := bufio.NewReader(counted)
	for i, request := range requests {
		counted.n = 0
		if _, err := io.WriteString(conn, request); err != nil {
			return end, err
		}
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			return end, err
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			return end, err
		}
		if want := pageSize(request); resp.StatusCode != http.StatusOK || counted.n != want {
			return end, fmt.Errorf("the response is %s with %d bytes, expected %d", resp.Status, counted.n, want)
		}
		if i == len(requests)-1 && strings.Contains(request, " HTTP/1.0\r\n") {
			// The response has reached its end when the connection has.
			if n, err := br.Discard(1); n > 0 || !errors.Is(err, io.EOF) {
				return end, fmt.Errorf("after the response: %d bytes, %w", n, err)
			}
			break
		}
		// As in the figures, the client goes on when its acknowledgment has
		// reached the server, not into the middle of that.
		if err := w.wait(ctx, func(segs []ladder.Segment) bool { return acknowledged(segs) }); err != nil {
			return end, err
		}
	}
	if err := conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return end, err
	}
	return end, w.wait(ctx, func(segs []ladder.Segment) bool { return closed(segs, end) && acknowledged(segs) })
}

// pages are the lengths of the responses in FIG 6A, 6B and 9, heads included,
// by the request's Host; a request of HTTP/1.0 has none.
var pages = map[string]int{"shop": 999, "store": 500, "webshop": 400, "": 600}

// pageSize is the length of the response to a request.
func pageSize(request string) int {
	_, host, _ := strings.Cut(request, "\r\nHost: ")
	host, _, _ = strings.Cut(host, "\r\n")
	return pages[host]
}

// page answers with as many bytes as the figure shows.
func page(w http.ResponseWriter, r *http.Request) {
	want := pages[r.Host]
	if want == 0 {
		want = pages["shop"] // somebody's own request
	}
	// The head that net/http makes of these fields has a fixed length; the
	// body fills up the rest.
	h := w.Header()
	h.Set("Date", "Mon, 09 Nov 1998 00:00:00 GMT")
	h.Set("Content-Type", "text/html")
	if !r.ProtoAtLeast(1, 1) && !r.Close {
		h.Set("Connection", "keep-alive") // which net/http says by itself too
	}
	const digits = 3
	head := len("HTTP/1.1 200 OK\r\n") + len("\r\n")
	for k := range h {
		head += len(k) + len(": \r\n") + len(h.Get(k))
	}
	head += len("Content-Length: \r\n") + digits
	h.Set("Content-Length", fmt.Sprint(want-head))
	_, _ = io.WriteString(w, strings.Repeat("x", want-head))
}

type countingReader struct {
	r io.Reader
	n int
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += n
	return n, err
}

// closed reports whether both ends of a client connection have sent their FIN
// and had it acknowledged, or one has reset it.
func closed(segs []ladder.Segment, client netip.AddrPort) bool {
	var fin [2]uint32
	var sent, acked [2]bool
	for _, s := range segs {
		d := 0
		switch {
		case s.Side != ladder.ClientSide || (s.Src != client && s.Dst != client):
			continue
		case s.Dst == client:
			d = 1
		}
		if s.Flags&ladder.RST != 0 {
			return true
		}
		if s.Flags&ladder.FIN != 0 {
			fin[d], sent[d] = s.Seq+uint32(s.Len)+1, true
		}
		if s.Flags&ladder.ACK != 0 && sent[1-d] && s.Ack == fin[1-d] {
			acked[1-d] = true
		}
	}
	return acked[0] && acked[1]
}

// acknowledged reports whether the servers have sent something, and all of it
// has been acknowledged to them.
func acknowledged(segs []ladder.Segment) bool {
	type ends struct{ server, unit netip.AddrPort }
	sent, acked := map[ends]uint32{}, map[ends]uint32{}
	for _, s := range segs {
		if s.Side != ladder.ServerSide {
			continue
		}
		if s.Len > 0 && s.Src.Port() == 80 {
			sent[ends{s.Src, s.Dst}] = s.Seq + uint32(s.Len)
		}
		if s.Flags&ladder.ACK != 0 && s.Dst.Port() == 80 {
			acked[ends{s.Dst, s.Src}] = s.Ack
		}
	}
	for e, end := range sent {
		// A server that closes has its FIN acknowledged too.
		if int32(acked[e]-end) < 0 {
			return false
		}
	}
	return len(sent) > 0
}

// between returns the segments after begin and up to end.
func between(segs []ladder.Segment, begin, end time.Time) []ladder.Segment {
	var part []ladder.Segment
	for _, s := range segs {
		if s.Time.After(begin) && !s.Time.After(end) {
			part = append(part, s)
		}
	}
	return part
}
