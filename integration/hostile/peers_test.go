// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
)

// A liar is a server program that misbehaves as the request's path asks:
//
//	/plain/N        answers N
//	/late/N/MS      answers N, and MS milliseconds later once more, unasked
//	/twice/N        answers N twice in one write
//	/extra/N        answers N with bytes behind its end
//	/cut/N/AT       answers N and resets the connection after AT bytes
//	/early/N        answers N as soon as the head of a request with a body is there
//	/whoami/N       says who authenticated on this TCP connection
//
// A request with "Authorization: NTLM name" makes the connection that name's.
type liar struct {
	mu sync.Mutex
	// undecided are the nonces of late answers that were written when the next
	// request was at the server's TCP already: no intermediary can tell these
	// from an answer to it.
	undecided map[string]bool
	late      int
	ran       map[string]int
	shared    []string // connections that were used in two names
}

func (l *liar) serve(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go l.conn(c.(*net.TCPConn))
	}
}

// unread is how many bytes wait in a connection's receive queue.
func unread(c *net.TCPConn) (n int) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCINQ) })
	return n
}

func (l *liar) conn(c *net.TCPConn) {
	defer c.Close()
	br := bufio.NewReader(c)
	name := ""
	// behind says that a late answer was taken for the answer to the request
	// that came next: the true one is the late one from then on.
	behind := false
	for {
		q, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		part := strings.Split(q.URL.Path, "/")
		if len(part) < 3 {
			return
		}
		what, nonce := part[1], part[2]
		l.mu.Lock()
		l.ran[nonce]++
		l.mu.Unlock()
		arg := 0
		if len(part) > 3 {
			arg, _ = strconv.Atoi(part[3])
		}
		answer := func(extra, body string) string {
			return fmt.Sprintf("HTTP/1.1 200 OK\r\nNonce: %s\r\n%sContent-Length: %d\r\n\r\n%s", nonce, extra, len(body), body)
		}
		plain := answer("", strings.Repeat(nonce+"\n", 20))
		if who, ok := strings.CutPrefix(q.Header.Get("Authorization"), "NTLM "); ok {
			if name != "" && name != who {
				l.mu.Lock()
				l.shared = append(l.shared, name+" and "+who)
				l.mu.Unlock()
			}
			if name == "" {
				// The first step of the handshake: a challenge.
				name = who
				plain = fmt.Sprintf("HTTP/1.1 401 Unauthorized\r\nNonce: %s\r\nWWW-Authenticate: NTLM challenge\r\nContent-Length: 0\r\n\r\n", nonce)
			}
		}
		if what != "early" {
			if _, err := io.Copy(io.Discard, q.Body); err != nil {
				return
			}
		}
		switch what {
		case "twice":
			_, _ = io.WriteString(c, plain+plain)
		case "extra":
			_, _ = io.WriteString(c, plain+"bytes of "+nonce)
		case "cut":
			_, _ = io.WriteString(c, plain[:min(arg, len(plain))])
			_ = c.SetLinger(0)
			return
		case "whoami":
			_, _ = io.WriteString(c, answer("Name: "+name+"\r\n", ""))
		case "late":
			_, _ = io.WriteString(c, plain)
			l.follow(nonce, behind && (br.Buffered() > 0 || unread(c) > 0))
			time.Sleep(time.Duration(arg) * time.Millisecond)
			if br.Buffered() > 0 || unread(c) > 0 {
				continue // the next request is here: it would be no late answer
			}
			_, _ = io.WriteString(c, answer("", "late"))
			l.mu.Lock()
			l.late++
			if br.Buffered() > 0 || unread(c) > 0 {
				l.undecided[nonce], behind = true, true
			}
			l.mu.Unlock()
		default:
			_, _ = io.WriteString(c, plain)
			l.follow(nonce, behind && (br.Buffered() > 0 || unread(c) > 0))
		}
	}
}

// follow notes an answer that came late because the one before it was taken
// for it.
func (l *liar) follow(nonce string, late bool) {
	if late {
		l.mu.Lock()
		l.undecided[nonce] = true
		l.mu.Unlock()
	}
}

// newLiar runs the program on the rig's first server.
func newLiar(r *rig) *liar {
	r.t.Helper()
	l := &liar{undecided: map[string]bool{}, ran: map[string]int{}}
	addrs := []string{r.Server(0).String()}
	for i := range r.farms {
		addrs = append(addrs, r.server(i))
	}
	for _, a := range addrs {
		ln, err := r.Servers[0].Listen("tcp", a)
		if err != nil {
			r.t.Fatal(err)
		}
		r.Lab.Cleanup(func() error { _ = ln.Close(); return nil })
		go l.serve(ln)
	}
	return l
}

func newNonce(rnd *rand.Rand) string {
	var raw [16]byte
	for i := range raw {
		raw[i] = byte(rnd.Uint32())
	}
	return hex.EncodeToString(raw[:])
}

// A caller is a client connection by hand that keeps all it receives.
type caller struct {
	c   *net.TCPConn
	br  *bufio.Reader
	rec *recorder
}

func call(ctx context.Context, r *rig) (*caller, error) { return callAt(ctx, r, r.VIP().String()) }

func callAt(ctx context.Context, r *rig, vip string) (*caller, error) {
	c, err := r.Clients[0].Dial(ctx, "tcp", vip)
	if err != nil {
		return nil, err
	}
	return newCaller(ctx, c), nil
}

func newCaller(ctx context.Context, c net.Conn) *caller {
	if d, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(d)
	}
	rec := &recorder{r: c, left: -1}
	return &caller{c.(*net.TCPConn), bufio.NewReader(rec), rec}
}

func (k *caller) get(path, fields string) (*http.Response, error) {
	if _, err := fmt.Fprintf(k.c, "GET %s HTTP/1.1\r\nHost: liar\r\n%s\r\n", path, fields); err != nil {
		return nil, err
	}
	return k.read()
}

func (k *caller) read() (*http.Response, error) {
	resp, err := http.ReadResponse(k.br, nil)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(resp.Body)
	resp.Body = io.NopCloser(strings.NewReader(string(b)))
	return resp, err
}

// own asks for a nonce and checks that exactly its answer comes.
func (k *caller) own(path, nonce string) error {
	resp, err := k.get(path, "")
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Nonce") != nonce {
		return fmt.Errorf("%s: %s, nonce %s", path, resp.Status, resp.Header.Get("Nonce"))
	}
	return nil
}

// foreign lists the nonces in what a connection received that are not its own.
func (k *caller) foreign(own ...string) (alien []string) {
	for _, m := range nonceText(k.rec.all) {
		mine := false
		for _, o := range own {
			mine = mine || o == m
		}
		if !mine {
			alien = append(alien, m)
		}
	}
	return alien
}

// TestLateServer: two thousand answers that are followed by another one, up to
// half a second late. The next client, at about that moment, gets its own
// answer and nothing of the late one.
func TestLateServer(t *testing.T) {
	t.Parallel()
	const workers = 50
	trials, limit := int64(2000), 100*time.Second
	if os.Getenv("WEIR_SOAK") != "" {
		trials, limit = 20_000, 30*time.Minute
	}
	r := newRig(t, lab.FarmOptions{Servers: 1})
	r.farms = workers // each has pooled connections of its own
	l := newLiar(r)
	r.start("", "queue: {shards: 1}\n")
	ctx := within(t, limit)
	s := seed(t)
	type leak struct{ path, nonce string }
	var mu sync.Mutex
	var leaks []leak
	var errs []error
	var next atomic.Int64
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(s, uint64(w)))
			for next.Add(1) <= trials && ctx.Err() == nil {
				ms := rnd.IntN(501)
				a, b := newNonce(rnd), newNonce(rnd)
				path := fmt.Sprintf("/late/%s/%d", a, ms)
				// B comes when the late bytes are under way, or soon after.
				wait := time.Duration(ms) * time.Millisecond
				if rnd.IntN(2) == 0 {
					wait += time.Duration(rnd.IntN(20)-5) * 100 * time.Microsecond
				} else {
					wait += time.Duration(1+rnd.IntN(20)) * time.Millisecond
				}
				alien, err := lateTrial(path, a, b, wait, func() (*caller, error) { return callAt(ctx, r, r.vip(w)) })
				mu.Lock()
				for _, n := range alien {
					leaks = append(leaks, leak{path, n})
				}
				mu.Unlock()
				if err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	undecided := 0
	for _, k := range leaks {
		if l.undecided[k.nonce] {
			undecided++
			continue
		}
		t.Errorf("%s: the late bytes of %s reached another client", k.path, k.nonce)
	}
	report(t, errs)
	c := r.counts()
	t.Logf("%d late answers, %d of them written behind the next request (%d of these seen by its client), %d connections opened, %d reuses, %d redispatched",
		l.late, len(l.undecided), undecided, c.Opened, c.Reused, c.Redispatched)
	if l.late < int(trials)/2 || c.Opened < uint64(trials)/4 {
		t.Errorf("%d late answers, %d connections opened: the servers were not late", l.late, c.Opened)
	}
	r.stop()
}

// lateTrial lets A ask for an answer that another one follows, and B for its own
// when A is about to leave, or gone. It returns the nonces that either got and
// had not asked for. An error is an answer that did not come, for another reason
// than that.
func lateTrial(path, a, b string, wait time.Duration, dial func() (*caller, error)) (alien []string, err error) {
	ka, err := dial()
	if err != nil {
		return nil, err
	}
	defer ka.c.Close()
	if err := ka.own(path, a); err != nil {
		if alien = ka.foreign(a); len(alien) > 0 {
			return alien, nil // it is judged by whose bytes these are
		}
		return nil, fmt.Errorf("A: %w", err)
	}
	time.Sleep(wait)
	kb, err := dial()
	if err != nil {
		return nil, err
	}
	defer kb.c.Close()
	err = kb.own("/plain/"+b, b)
	if alien = kb.foreign(b); err != nil && len(alien) == 0 {
		return nil, fmt.Errorf("B: %w", err)
	}
	return append(alien, ka.foreign(a)...), nil
}

// TestLateServerFindsLeaks is the negative control of TestLateServer: with a
// pool in the middle that does not look at what comes behind an answer, B gets
// the late one.
func TestLateServerFindsLeaks(t *testing.T) {
	t.Parallel()
	l := &liar{undecided: map[string]bool{}, ran: map[string]int{}}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go l.serve(ln)
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer front.Close()
	go leakyPool(front, ln.Addr().String())
	ctx := within(t, 30*time.Second)
	rnd := rand.New(rand.NewPCG(seed(t), 1))
	found := 0
	for range 20 {
		a, b := newNonce(rnd), newNonce(rnd)
		var first net.Conn
		alien, _ := lateTrial("/late/"+a+"/20", a, b, 0, func() (*caller, error) {
			if first != nil {
				// A leaves before the late answer comes, and B asks after that.
				first.Close()
				until(t, 10*time.Second, "the late answer", func() bool { l.mu.Lock(); defer l.mu.Unlock(); return l.late > 0 })
				l.mu.Lock()
				l.late = 0
				l.mu.Unlock()
			}
			c, err := (&net.Dialer{}).DialContext(ctx, "tcp", front.Addr().String())
			if err != nil {
				return nil, err
			}
			_ = c.SetDeadline(time.Now().Add(time.Second))
			first = c
			return newCaller(ctx, c), nil
		})
		found += len(alien)
	}
	if found == 0 {
		t.Error("a pool that mixes clients up passes the check")
	}
	t.Logf("%d late answers reached another client", found)
}

// TestSpoiledConnections: after an answer that came twice, with bytes behind
// its end, or cut by a reset anywhere, nobody else gets what is left, and every
// plain request in between is answered. The negative control: plain requests
// alone share connections.
func TestSpoiledConnections(t *testing.T) {
	t.Parallel()
	r := newRig(t, lab.FarmOptions{Servers: 1})
	newLiar(r)
	r.start("", "queue: {shards: 1}\n")
	ctx := within(t, 60*time.Second)
	rnd := rand.New(rand.NewPCG(seed(t), 1))
	plain := func() {
		n := newNonce(rnd)
		k, err := call(ctx, r)
		if err != nil {
			t.Fatal(err)
		}
		defer k.c.Close()
		if err := k.own("/plain/"+n, n); err != nil {
			t.Fatal(err)
		}
		if a := k.foreign(n); a != nil {
			t.Fatalf("a plain client got %q", a)
		}
	}
	for range 50 {
		plain()
	}
	if c := r.counts(); c.Opened != 1 {
		t.Errorf("plain requests, one after the other, took %d connections", c.Opened)
	}
	for i := range 300 {
		n := newNonce(rnd)
		kind := []string{"twice", "extra", "cut"}[i%3]
		k, err := call(ctx, r)
		if err != nil {
			t.Fatal(err)
		}
		err = k.own(fmt.Sprintf("/%s/%s/%d", kind, n, rnd.IntN(600)), n)
		if kind != "cut" && err != nil {
			t.Errorf("%s: its own client: %v", kind, err)
		}
		if a := k.foreign(n); a != nil {
			t.Errorf("%s: %q", kind, a)
		}
		if strings.Count(string(k.rec.all), "Nonce: ") > 1 || strings.Contains(string(k.rec.all), "bytes of") {
			t.Errorf("%s: the client got more than its answer", kind)
		}
		k.c.Close()
		plain()
	}
	if c := r.counts(); c.Opened < 250 {
		t.Errorf("only %d connections opened: spoiled ones were used again", c.Opened)
	}
	r.stop()
}

// TestConnectionBoundAuthentication: what one client authenticates by the
// connection (NTLM) is never another's, whoever comes next.
func TestConnectionBoundAuthentication(t *testing.T) {
	t.Parallel()
	r := newRig(t, lab.FarmOptions{Servers: 1})
	l := newLiar(r)
	r.start("", "queue: {shards: 1}\n")
	ctx := within(t, 60*time.Second)
	s := seed(t)
	var wg sync.WaitGroup
	errs := make(chan error, 100)
	for w := range 20 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(s, uint64(w)))
			for i := range 20 {
				name := fmt.Sprintf("user-%d-%d", w, i)
				err := func() error {
					k, err := call(ctx, r)
					if err != nil {
						return err
					}
					defer k.c.Close()
					if i%2 == 0 {
						if _, err = k.get("/plain/"+newNonce(rnd), "Authorization: NTLM "+name+"\r\n"); err != nil {
							return err
						}
					}
					resp, err := k.get("/whoami/"+newNonce(rnd), "")
					if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, io.ErrUnexpectedEOF) {
						return nil // the connection was not kept
					}
					if err != nil {
						return err
					}
					if got := resp.Header.Get("Name"); got != "" && got != name {
						return fmt.Errorf("%s is taken for %s", name, got)
					}
					return nil
				}()
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.shared) > 0 {
		t.Errorf("connections in two names: %q", clip(l.shared))
	}
	// The negative control: who did not authenticate did share connections.
	if c := r.counts(); c.Reused < 50 {
		t.Errorf("only %d requests found a pooled connection: the rig tests nothing", c.Reused)
	}
	r.stop()
}
