// SPDX-License-Identifier: Apache-2.0

package framing

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A plain WebSocket (RFC 6455), as much as an echo needs.

const (
	wsText   = 0x1
	wsBinary = 0x2
	wsClose  = 0x8
	wsPing   = 0x9
	wsPong   = 0xa
)

func wsWrite(w io.Writer, op byte, b []byte, masked bool) error {
	f := []byte{0x80 | op}
	m := byte(0)
	if masked {
		m = 0x80
	}
	switch {
	case len(b) < 126:
		f = append(f, m|byte(len(b)))
	case len(b) < 1<<16:
		f = binary.BigEndian.AppendUint16(append(f, m|126), uint16(len(b)))
	default:
		f = binary.BigEndian.AppendUint64(append(f, m|127), uint64(len(b)))
	}
	if !masked {
		_, err := w.Write(append(f, b...))
		return err
	}
	key := [4]byte{0x12, 0x34, 0x56, byte(len(b))}
	f = append(f, key[:]...)
	for i, c := range b {
		f = append(f, c^key[i&3])
	}
	_, err := w.Write(f)
	return err
}

func wsRead(r *bufio.Reader) (op byte, b []byte, err error) {
	var h [2]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, nil, err
	}
	n := uint64(h[1] & 0x7f)
	var ext [8]byte
	switch n {
	case 126:
		if _, err := io.ReadFull(r, ext[:2]); err != nil {
			return 0, nil, err
		}
		n = uint64(binary.BigEndian.Uint16(ext[:2]))
	case 127:
		if _, err := io.ReadFull(r, ext[:]); err != nil {
			return 0, nil, err
		}
		n = binary.BigEndian.Uint64(ext[:])
	}
	var key [4]byte
	if h[1]&0x80 != 0 {
		if _, err := io.ReadFull(r, key[:]); err != nil {
			return 0, nil, err
		}
	}
	if n > 1<<24 {
		return 0, nil, fmt.Errorf("a frame of %d bytes", n)
	}
	b = make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return 0, nil, err
	}
	for i := range b {
		b[i] ^= key[i&3]
	}
	return h[0] & 0xf, b, nil
}

// echoServer switches to WebSocket where it is asked to, and echoes.
type echoServer struct {
	upgraded, plain, closed atomic.Int64
	mu                      sync.Mutex
	after                   map[string]int // requests on a connection that was upgraded
}

func (s *echoServer) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	if !strings.EqualFold(q.Header.Get("Upgrade"), "websocket") {
		s.plain.Add(1)
		s.mu.Lock()
		if _, ok := s.after[q.RemoteAddr]; ok {
			s.after[q.RemoteAddr]++
		}
		s.mu.Unlock()
		fmt.Fprintf(w, "plain %s\n", q.RequestURI)
		return
	}
	s.upgraded.Add(1)
	s.mu.Lock()
	s.after[q.RemoteAddr] = 0
	s.mu.Unlock()
	sum := sha1.Sum([]byte(q.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	c, rw, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer c.Close()
	fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n", base64.StdEncoding.EncodeToString(sum[:]))
	for {
		op, b, err := wsRead(rw.Reader)
		if err != nil {
			if errors.Is(err, io.EOF) {
				s.closed.Add(1)
			}
			return
		}
		switch op {
		case wsClose:
			_ = wsWrite(c, wsClose, b, false)
			s.closed.Add(1)
			return
		case wsPing:
			op = wsPong
		}
		if err := wsWrite(c, op, b, false); err != nil {
			return
		}
	}
}

func wsDial(r *rig, port uint16, path string) (*net.TCPConn, *bufio.Reader, error) {
	c, err := r.dial(port)
	if err != nil {
		return nil, nil, err
	}
	key := base64.StdEncoding.EncodeToString([]byte("sixteen byte key"))
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n\r\n", path, key)
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	if resp.StatusCode != 101 || resp.Header.Get("Sec-WebSocket-Accept") != base64.StdEncoding.EncodeToString(sum[:]) {
		c.Close()
		return nil, nil, fmt.Errorf("upgrade: %s", resp.Status)
	}
	return c, br, nil
}

// TestWebSocket: ten thousand messages of all sizes are echoed through weir,
// on a few connections at once, among plain requests. Each connection is closed
// in good order, by either side, and none ever serves anything else.
func TestWebSocket(t *testing.T) {
	rnd := seeded(t)
	r := newRig(t, 1)
	s := &echoServer{after: map[string]int{}}
	ln, err := r.Servers[0].Listen("tcp", r.at(0, 80))
	if err != nil {
		t.Fatal(err)
	}
	hs := &http.Server{Handler: s}
	go func() { _ = hs.Serve(ln) }()
	t.Cleanup(func() { _ = hs.Close() })
	r.start(farmText{name: "web", port: 80, servers: []string{r.at(0, 80)}, extra: "    forwarded: x-forwarded-for\n"})

	const sockets = 5
	messages := size(10_000, 1_000_000)
	seeds := [sockets]uint64{}
	for i := range seeds {
		seeds[i] = rnd.Uint64()
	}
	parallel(t, sockets, sockets, func(i int) error {
		rnd := rand.New(rand.NewPCG(seeds[i], 4))
		c, br, err := wsDial(r, 80, fmt.Sprintf("/ws/%d", i))
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Minute))
		for n := range messages / sockets {
			size := rnd.IntN(1 << rnd.IntN(10))
			if n%500 == 0 {
				size = rnd.IntN(100_000)
			}
			b := make([]byte, size)
			for k := range b {
				b[k] = byte(rnd.Uint32())
			}
			op, want := byte(wsBinary), byte(wsBinary)
			if n%50 == 0 && size < 126 {
				op, want = wsPing, wsPong
			}
			// Large messages overlap with their echoes.
			sent := make(chan error, 1)
			go func() { sent <- wsWrite(c, op, b, true) }()
			gotOp, got, err := wsRead(br)
			if err != nil {
				return fmt.Errorf("socket %d, message %d of %d bytes: %w", i, n, size, err)
			}
			if err := <-sent; err != nil {
				return err
			}
			if gotOp != want || !bytes.Equal(got, b) {
				return fmt.Errorf("socket %d, message %d: %d bytes of kind %d came back for %d of %d", i, n, len(got), gotOp, size, op)
			}
			if n%200 == 0 {
				if err := r.probe(80, fmt.Sprintf("/plain/%d/%d", i, n), "plain TARGET"); err != nil {
					return err
				}
			}
		}
		if i%2 == 0 {
			// The closing handshake, then the server's FIN.
			if err := wsWrite(c, wsClose, []byte{3, 232}, true); err != nil {
				return err
			}
			if op, _, err := wsRead(br); err != nil || op != wsClose {
				return fmt.Errorf("socket %d: close answered with %d, %w", i, op, err)
			}
		} else if err := c.CloseWrite(); err != nil { // a half-close, then the server's FIN
			return err
		}
		if rest, err := io.ReadAll(br); err != nil || len(rest) > 0 {
			return fmt.Errorf("socket %d: %d bytes behind the end, %w", i, len(rest), err)
		}
		return nil
	})
	until(t, 5*time.Second, "the server sees every end", func() bool { return s.closed.Load() == sockets })
	s.mu.Lock()
	for c, n := range s.after {
		if n > 0 {
			t.Errorf("connection %s was upgraded and served %d more requests", c, n)
		}
	}
	s.mu.Unlock()
	until(t, 5*time.Second, "weir forgets the tunnels", func() bool {
		f := r.farm("web")
		return f.Servers[0].Active == 0 && f.Servers[0].Open == f.Servers[0].Idle
	})
	t.Logf("%d messages over %d sockets, %d plain requests between them", messages, sockets, s.plain.Load())
}

// TestNothingBefore101: bytes of the new protocol do not reach a server before
// it has agreed, and never if it declines; the request behind them neither.
func TestNothingBefore101(t *testing.T) {
	r := newRig(t, 1)
	type heard struct {
		before, all string
	}
	got := make(chan heard, 1)
	r.serve(0, 80, func(c net.Conn) {
		br := bufio.NewReader(c)
		target, err := readHead(br)
		if err != nil {
			return
		}
		// What else comes in half a second.
		_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		before, _ := io.ReadAll(br)
		_ = c.SetReadDeadline(time.Time{})
		h := heard{before: string(before)}
		if target == "/agree" {
			_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
		} else {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
		rest, _ := io.ReadAll(c)
		h.all = h.before + string(rest)
		got <- h
	})
	r.start(farmText{name: "web", port: 80, servers: []string{r.at(0, 80)}})
	const words = "new words\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
	for _, target := range []string{"/agree", "/decline"} {
		c, err := r.dial(80)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n%s", target, words)
		br := bufio.NewReader(c)
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatalf("%s: %v", target, err)
		}
		_ = resp.Body.Close()
		_ = c.CloseWrite()
		select {
		case h := <-got:
			if h.before != "" {
				t.Errorf("%s: the server got %q before it said anything", target, h.before)
			}
			if want := map[string]string{"/agree": words, "/decline": ""}[target]; h.all != want {
				t.Errorf("%s: the server got %q, want %q", target, h.all, want)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: the server connection does not end", target)
		}
		c.Close()
	}
}

// authServer is a server whose authentication belongs to the connection, as
// NTLM's does: three messages over one connection, and from then on who sends
// a request is who has logged in there.
func (r *rig) authServer(host int, port uint16) {
	r.t.Helper()
	type connState struct {
		mu        sync.Mutex
		challenge string
		user      string
	}
	type key struct{}
	ln, err := r.Servers[host].Listen("tcp", r.at(host, port))
	if err != nil {
		r.t.Fatal(err)
	}
	var n atomic.Int64
	s := &http.Server{
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, key{}, &connState{})
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			st := q.Context().Value(key{}).(*connState)
			st.mu.Lock()
			defer st.mu.Unlock()
			_, _ = io.Copy(io.Discard, q.Body)
			switch kind, arg, _ := strings.Cut(strings.TrimPrefix(q.Header.Get("Authorization"), "NTLM "), ":"); {
			case kind == "negotiate":
				st.challenge = fmt.Sprint(n.Add(1))
				w.Header().Set("WWW-Authenticate", "NTLM "+st.challenge)
				w.WriteHeader(http.StatusUnauthorized)
				return
			case kind == "authenticate":
				user, challenge, _ := strings.Cut(arg, ":")
				if challenge != st.challenge || challenge == "" {
					w.WriteHeader(http.StatusForbidden)
					return
				}
				st.user = user
			}
			if st.user == "" {
				w.Header().Set("WWW-Authenticate", "NTLM")
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			fmt.Fprintf(w, "%s on s%d\n", st.user, host+1)
		}),
	}
	go func() { _ = s.Serve(ln) }()
	r.t.Cleanup(func() { _ = s.Close() })
}

// TestConnectionAuth: many clients log in at once, by NTLM's three messages,
// over two servers that share the load, and go on as who they are. Nobody ever
// is somebody else.
func TestConnectionAuth(t *testing.T) {
	r := newRig(t, 2)
	r.authServer(0, 80)
	r.authServer(1, 80)
	r.start(farmText{name: "web", port: 80, servers: []string{r.at(0, 80), r.at(1, 80)}})
	var anonymous atomic.Int64
	parallel(t, size(200, 10_000), 12, func(i int) error {
		c, err := r.dial(80)
		if err != nil {
			return err
		}
		defer c.Close()
		br := bufio.NewReader(c)
		ask := func(fields string) (int, string, string, error) {
			fmt.Fprintf(c, "GET /%d HTTP/1.1\r\nHost: a\r\n%s\r\n", i, fields)
			resp, err := http.ReadResponse(br, nil)
			if err != nil {
				return 0, "", "", err
			}
			b, err := io.ReadAll(resp.Body)
			return resp.StatusCode, resp.Header.Get("WWW-Authenticate"), string(b), err
		}
		status, _, text, err := ask("")
		if err != nil || status != 401 {
			return fmt.Errorf("without a name: %d %q, %w", status, text, err)
		}
		if i%3 == 0 { // never logs in
			anonymous.Add(1)
			for range 3 {
				if status, _, text, err := ask(""); err != nil || status != 401 {
					return fmt.Errorf("without a name: %d %q, %w", status, text, err)
				}
			}
			return nil
		}
		_, challenge, _, err := ask("Authorization: NTLM negotiate\r\n")
		if err != nil {
			return err
		}
		me := fmt.Sprintf("user%d", i)
		home := ""
		for n := range 8 {
			fields := ""
			if n == 0 {
				fields = fmt.Sprintf("Authorization: NTLM authenticate:%s:%s\r\n", me, strings.TrimPrefix(challenge, "NTLM "))
			}
			status, _, text, err := ask(fields)
			if err != nil || status != 200 || !strings.HasPrefix(text, me+" on ") {
				return fmt.Errorf("%s, request %d: %d %q, %w", me, n, status, text, err)
			}
			if home == "" {
				home = text
			}
			if text != home {
				return fmt.Errorf("%s moved from %q to %q", me, home, text)
			}
		}
		return nil
	})
	until(t, 10*time.Second, "the private connections go with their clients", func() bool {
		f := r.farm("web")
		return f.Servers[0].Open+f.Servers[1].Open == 0
	})
	if f := r.farm("web"); f.Reused != 0 {
		t.Errorf("%d requests went over a pooled connection", f.Reused)
	}
}
