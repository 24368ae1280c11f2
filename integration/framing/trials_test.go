// SPDX-License-Identifier: Apache-2.0

package framing

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A script says what the scripted server does with one request; its number is
// in the target.
type script struct {
	read  int    // bytes of the body to read before the answer; -1: all of it
	say   string // the answer, without its end where it is truncated
	pause int    // after how many bytes of the answer to wait a moment; 0: never
	close bool   // close behind it
	reset bool   // close with a reset
}

// scripted is a server that does what each request's script says, and keeps
// account of what it got: every request once, as the client sent it.
type scripted struct {
	mu      sync.Mutex
	scripts map[int]script
	runs    map[int]int    // how often a request arrived
	wrong   []string       // what should not have come
	conns   map[string]int // requests by connection
	doubt   map[string]int // connections that must serve nothing more, by the request after which
	reused  atomic.Int64
}

func newScripted() *scripted {
	return &scripted{scripts: map[int]script{}, runs: map[int]int{}, conns: map[string]int{}, doubt: map[string]int{}}
}

func (s *scripted) add(n int, x script) {
	s.mu.Lock()
	s.scripts[n] = x
	s.mu.Unlock()
}

func (s *scripted) serve(c net.Conn) {
	br := bufio.NewReader(c)
	me := c.RemoteAddr().String()
	for {
		q, err := http.ReadRequest(br)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.ErrUnexpectedEOF) {
				s.complain("%s: not a request: %v", me, err)
			}
			return
		}
		n, err := strconv.Atoi(strings.TrimPrefix(q.RequestURI, "/n/"))
		s.mu.Lock()
		x, ok := s.scripts[n]
		s.runs[n]++
		s.conns[me]++
		if s.conns[me] > 1 {
			s.reused.Add(1)
		}
		if after, bad := s.doubt[me]; bad {
			s.wrong = append(s.wrong, fmt.Sprintf("request %d came over the connection of request %d", n, after))
		}
		if x.read >= 0 || x.close || x.reset {
			s.doubt[me] = n
		}
		s.mu.Unlock()
		if err != nil || !ok {
			s.complain("%s: an unknown request: %s %s", me, q.Method, q.RequestURI)
			return
		}
		if x.read < 0 {
			if _, err := io.Copy(io.Discard, q.Body); err != nil {
				return
			}
		} else if _, err := io.CopyN(io.Discard, q.Body, int64(x.read)); err != nil && x.read > 0 {
			return
		}
		first, rest := x.say, ""
		if x.pause > 0 && x.pause < len(x.say) {
			first, rest = x.say[:x.pause], x.say[x.pause:]
		}
		if _, err := io.WriteString(c, first); err != nil {
			return
		}
		if rest != "" {
			time.Sleep(time.Millisecond)
			if _, err := io.WriteString(c, rest); err != nil {
				return
			}
		}
		switch {
		case x.reset:
			_ = c.(*net.TCPConn).SetLinger(0)
			return
		case x.close:
			return
		case x.read >= 0:
			// It has answered early: what follows is a body that it does not
			// want, or, to a server that is not careful, the next request.
			_, _ = io.Copy(io.Discard, br)
			return
		}
	}
}

func (s *scripted) complain(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wrong = append(s.wrong, fmt.Sprintf(format, args...))
}

// check reports what went wrong at the server.
func (s *scripted) check(t *testing.T, trials int) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.wrong[:min(len(s.wrong), 10)] {
		t.Error(w)
	}
	for n, k := range s.runs {
		if k > 1 {
			t.Errorf("request %d arrived %d times", n, k)
		}
	}
	if s.reused.Load() == 0 {
		t.Error("no connection was used again: the trials tell nothing")
	}
	t.Logf("%d trials, %d requests, %d server connections, %d requests over pooled ones", trials, len(s.runs), len(s.conns), s.reused.Load())
}

// nonce is a text that no other trial has.
func nonce(n int) string { return fmt.Sprintf("nonce-%d-", n) }

// trialRig is weir before two hosts with one scripted server.
func trialRig(t *testing.T) (*rig, *scripted) {
	t.Helper()
	r := newRig(t, 1)
	s := newScripted()
	r.serve(0, 80, s.serve)
	r.start(farmText{name: "web", port: 80, servers: []string{r.at(0, 80)}, extra: "    pool: {max_idle: 8}\n"})
	return r, s
}

// plainProbe asks for one plain answer, which must be its own.
func (r *rig) plainProbe(s *scripted, n int) error {
	want := nonce(n) + "probe"
	s.add(n, script{read: -1, say: fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(want), want)})
	c, err := r.dial(80)
	if err != nil {
		return err
	}
	defer c.Close()
	fmt.Fprintf(c, "GET /n/%d HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", n)
	b, err := io.ReadAll(c)
	if err != nil || !strings.HasSuffix(string(b), "\r\n\r\n"+want) || strings.Count(string(b), "nonce") != 1 {
		return fmt.Errorf("probe: %q, %w", clip(string(b), 300), err)
	}
	return nil
}

const probes = 1_000_000 // probes are numbered from here

// trials runs n trials, each with a random source of its own and a probe by
// somebody else behind it.
func (r *rig) trials(t *testing.T, s *scripted, n int, f func(i int, rnd *rand.Rand) error) {
	t.Helper()
	rnd := seeded(t)
	seeds := make([]uint64, n)
	for i := range seeds {
		seeds[i] = rnd.Uint64()
	}
	parallel(t, n, 12, func(i int) error {
		if err := f(i, rand.New(rand.NewPCG(seeds[i], 5))); err != nil {
			return fmt.Errorf("seed %d: %w", seeds[i], err)
		}
		return r.plainProbe(s, probes+i)
	})
	s.check(t, n)
}

// chunked writes text as a chunked body with trailers.
func chunked(rnd *rand.Rand, text string, trailers int) string {
	var b strings.Builder
	for text != "" {
		n := 1 + rnd.IntN(len(text))
		fmt.Fprintf(&b, "%s%x%s\r\n%s\r\n", strings.Repeat("0", rnd.IntN(3)), n, []string{"", ";a", ";a=\"b\""}[rnd.IntN(3)], text[:n])
		text = text[n:]
	}
	b.WriteString("0\r\n")
	for i := range trailers {
		fmt.Fprintf(&b, "X-%d: %s\r\n", i, strings.Repeat("t", rnd.IntN(200)))
	}
	b.WriteString("\r\n")
	return b.String()
}

// TestTrailers: chunked bodies with trailers in both directions, cut anywhere,
// several on a connection: each ends exactly where it does.
func TestTrailers(t *testing.T) {
	r, s := trialRig(t)
	r.trials(t, s, size(1000, 50_000), func(i int, rnd *rand.Rand) error {
		c, err := r.dial(80)
		if err != nil {
			return err
		}
		defer c.Close()
		all, want := "", ""
		for k := range 1 + rnd.IntN(3) {
			n := 4*i + k
			text := strings.Repeat(nonce(n), 1+rnd.IntN(100))
			say := "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-0\r\n\r\n" + chunked(rnd, text, rnd.IntN(4))
			s.add(n, script{read: -1, say: say, pause: rnd.IntN(len(say))})
			all += fmt.Sprintf("POST /n/%d HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", n) + chunked(rnd, text, rnd.IntN(4))
			want += say
		}
		if err := send(c, all, rnd); err != nil {
			return err
		}
		return expect(c, want)
	})
}

// send writes text in random pieces.
func send(c net.Conn, text string, rnd *rand.Rand) error {
	for text != "" {
		n := 1 + rnd.IntN(min(len(text), 3000))
		if _, err := io.WriteString(c, text[:n]); err != nil {
			return err
		}
		text = text[n:]
	}
	return nil
}

// expect reads exactly that text.
func expect(c net.Conn, want string) error {
	got := make([]byte, len(want))
	n, err := io.ReadFull(c, got)
	if err != nil || string(got) != want {
		return fmt.Errorf("got %q, want %q: %w", clip(string(got[:n]), 300), clip(want, 300), err)
	}
	return nil
}

// TestInterimFloods: any number of interim responses of any size before the
// final one, cut anywhere; the next request over the same connection gets its
// own.
func TestInterimFloods(t *testing.T) {
	r, s := trialRig(t)
	r.trials(t, s, size(1000, 50_000), func(i int, rnd *rand.Rand) error {
		c, err := r.dial(80)
		if err != nil {
			return err
		}
		defer c.Close()
		for k := range 1 + rnd.IntN(3) {
			n := 4*i + k
			say := ""
			for range rnd.IntN(1 << rnd.IntN(8)) {
				say += fmt.Sprintf("HTTP/1.1 %d x\r\nLink: <%s>\r\n%s\r\n", []int{100, 102, 103, 110, 199}[rnd.IntN(5)], nonce(n), strings.Repeat("X: y\r\n", rnd.IntN(4)))
			}
			text := strings.Repeat(nonce(n), 1+rnd.IntN(50))
			say += fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
			s.add(n, script{read: -1, say: say, pause: rnd.IntN(len(say))})
			if err := send(c, fmt.Sprintf("GET /n/%d HTTP/1.1\r\nHost: a\r\n\r\n", n), rnd); err != nil {
				return err
			}
			if err := expect(c, say); err != nil {
				return err
			}
		}
		return nil
	})
}

// TestEarlyAnswers: the server answers before it has the body, at any place of
// it, and the client sends the rest, or a new request instead. The answer is
// delivered, and nothing else ever happens over that server connection.
func TestEarlyAnswers(t *testing.T) {
	r, s := trialRig(t)
	r.trials(t, s, size(1000, 50_000), func(i int, rnd *rand.Rand) error {
		n := 4 * i
		text := strings.Repeat(nonce(n), 1+rnd.IntN(50))
		say := fmt.Sprintf("HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%s", []int{200, 401, 413, 417}[rnd.IntN(4)], len(text), text)
		length := 100 + rnd.IntN(20_000)
		read := rnd.IntN(length - 50)
		body := strings.Repeat(fmt.Sprintf("GET /n/%d HTTP/1.1\r\nHost: a\r\n\r\n", n+1), length)[:length] // never to be seen
		framing := fmt.Sprintf("Content-Length: %d\r\n\r\n", length)
		if rnd.IntN(3) == 0 {
			body = fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", length, body)
			framing = "Transfer-Encoding: chunked\r\n\r\n"
		}
		expects := rnd.IntN(3) == 0
		if expects {
			framing = "Expect: 100-continue\r\n" + framing
			read = 0
		}
		s.add(n, script{read: read, say: say, pause: rnd.IntN(len(say))})
		c, err := r.dial(80)
		if err != nil {
			return err
		}
		defer c.Close()
		head := fmt.Sprintf("POST /n/%d HTTP/1.1\r\nHost: a\r\n", n) + framing
		// Never all of it: a request that is complete before its answer begins
		// is nothing special.
		sent := 0
		if !expects {
			sent = min(read+20+rnd.IntN(100), len(body)-1) // enough for the server to answer
		} else if rnd.IntN(2) == 0 {
			sent = rnd.IntN(len(body)) // without waiting
		}
		if err := send(c, head+body[:sent], rnd); err != nil {
			return err
		}
		complete := rnd.IntN(2) == 0
		if complete {
			// The rest while the answer is on its way.
			k := 1 + rnd.IntN(len(say))
			if err := expect(c, say[:k]); err != nil {
				return err
			}
			say = say[k:]
			_, _ = io.WriteString(c, body[sent:]) // weir may have ended the connection already
		}
		if err := expect(c, say); err != nil {
			return err
		}
		// Another request: not answered where the body was not complete, else
		// by its own answer, over another server connection.
		next := nonce(n+2) + "next"
		next = fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(next), next)
		s.add(n+2, script{read: -1, say: next})
		_, _ = io.WriteString(c, fmt.Sprintf("GET /n/%d HTTP/1.1\r\nHost: a\r\n\r\n", n+2))
		_ = c.CloseWrite()
		if rest, _ := io.ReadAll(c); len(rest) > 0 && (string(rest) != next || !complete) {
			return fmt.Errorf("behind the early answer came %q", clip(string(rest), 300))
		}
		return nil
	})
}

// TestTruncatedBodies: a response that breaks off, at any place, by a FIN or a
// reset, is a reset to the client: never a clean end, never somebody else's
// bytes. The control ends where it should.
func TestTruncatedBodies(t *testing.T) {
	r, s := trialRig(t)
	var whole, cut atomic.Int64
	r.trials(t, s, size(1000, 50_000), func(i int, rnd *rand.Rand) error {
		n := 4 * i
		text := strings.Repeat(nonce(n), 1+rnd.IntN(300))
		say := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
		if rnd.IntN(2) == 0 {
			say = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(rnd, text, rnd.IntN(3))
		}
		at := 1 + rnd.IntN(len(say)-1)
		x := script{read: -1, say: say[:at], pause: rnd.IntN(at), close: true, reset: rnd.IntN(2) == 0}
		if rnd.IntN(8) == 0 {
			// It says so: a server that closes a pooled connection behind a
			// complete response may meet the next request there.
			say = strings.Replace(say, "\r\n", "\r\nConnection: close\r\n", 1)
			x = script{read: -1, say: say, close: true}
		}
		s.add(n, x)
		c, err := r.dial(80)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := send(c, fmt.Sprintf("POST /n/%d HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", n), rnd); err != nil {
			return err
		}
		if x.say == say {
			whole.Add(1)
			return expect(c, say)
		}
		got, err := io.ReadAll(c)
		cut.Add(1)
		// A server that resets may take back everything: then the answer is
		// weir's own.
		if strings.HasPrefix(string(got), "HTTP/1.1 502 ") && x.reset {
			return nil
		}
		if !errors.Is(err, syscall.ECONNRESET) {
			return fmt.Errorf("cut off at %d of %d bytes (reset %v), the client sees %d bytes and %v", at, len(say), x.reset, len(got), err)
		}
		if !strings.HasPrefix(say, string(got)) {
			return fmt.Errorf("the client got %q, which is no part of %q", clip(string(got), 200), clip(say, 200))
		}
		return nil
	})
	t.Logf("%d cut off, %d whole", cut.Load(), whole.Load())
}
