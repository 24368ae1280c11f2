// SPDX-License-Identifier: Apache-2.0

package r1

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// A caller is a client connection by hand.
type caller struct {
	c  *net.TCPConn
	br *bufio.Reader
	// patience bounds each exchange.
	patience time.Duration
}

// errWrong is that of an answer whose bytes are not those that are due.
var errWrong = errors.New("wrong bytes")

// patience usually bounds one exchange: beyond all that retransmission timers of a
// kernel add up to on a link that loses a few packets in a hundred.
const patience = 90 * time.Second

func dial(ctx context.Context, h *lab.Host, d *net.Dialer, addr string) (*caller, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c, err := h.DialWith(ctx, d, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return &caller{c.(*net.TCPConn), bufio.NewReaderSize(c, 16<<10), patience}, nil
}

// A request is one request and the body of the answer that is due.
type request struct {
	post  []byte // body; nil: a GET
	path  string
	want  []byte
	close bool
	nonce uint64
}

// randomSize is between 1 byte and 64 KB, every order of magnitude alike.
func randomSize(rnd *rand.Rand) int {
	return min(1+rnd.IntN(1<<(1+rnd.IntN(16))), 64<<10)
}

// newRequest draws a request for an origin.
func newRequest(rnd *rand.Rand, share float64) request {
	q := request{nonce: rnd.Uint64() >> 1}
	n := randomSize(rnd)
	if rnd.Float64() < share {
		q.post = body(q.nonce+1, n)
		n = 1 + rnd.IntN(500)
	}
	q.path, q.want = fmt.Sprintf("/n/%d/%d", q.nonce, n), body(q.nonce, n)
	return q
}

func (q *request) text() []byte {
	var b bytes.Buffer
	method := "GET"
	if q.post != nil {
		method = "POST"
	}
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: r1.example\r\n", method, q.path)
	if q.close {
		b.WriteString("Connection: close\r\n")
	}
	if q.post != nil {
		fmt.Fprintf(&b, "Content-Length: %d\r\n", len(q.post))
	}
	b.WriteString("\r\n")
	b.Write(q.post)
	return b.Bytes()
}

// do makes one exchange and compares every byte. The status is that of the
// response, 0 where none came.
func (k *caller) do(q *request) (status int, err error) {
	_ = k.c.SetDeadline(time.Now().Add(k.patience))
	if _, err := k.c.Write(q.text()); err != nil {
		return 0, fmt.Errorf("%s, %d bytes of body: write: %w", q.path, len(q.post), err)
	}
	return k.read(q)
}

func (k *caller) read(q *request) (status int, err error) {
	method := http.MethodGet
	if q.post != nil {
		method = http.MethodPost
	}
	resp, err := http.ReadResponse(k.br, &http.Request{Method: method})
	if err != nil {
		return 0, fmt.Errorf("%s %s, %d bytes of body: %w", method, q.path, len(q.post), err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		return resp.StatusCode, fmt.Errorf("%s %s: %d of %d bytes: %w", method, q.path, len(got), len(q.want), err)
	}
	if resp.StatusCode != http.StatusOK {
		return resp.StatusCode, fmt.Errorf("%s %s: %s", method, q.path, resp.Status)
	}
	if !bytes.Equal(got, q.want) {
		return resp.StatusCode, fmt.Errorf("%s %s: %w, %d of %d", method, q.path, errWrong, len(got), len(q.want))
	}
	if q.close {
		if rest, err := io.ReadAll(k.br); err != nil || len(rest) > 0 {
			return resp.StatusCode, fmt.Errorf("%s %s: after the end %d bytes, %w", method, q.path, len(rest), err)
		}
	}
	return resp.StatusCode, nil
}
