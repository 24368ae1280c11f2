// SPDX-License-Identifier: Apache-2.0

package framing

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"

	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
)

// Times of a client that plays a payload. They decide how long a test takes,
// never what comes out of it.
const (
	quiet   = 120 * time.Millisecond // nothing more seems to come
	silence = 400 * time.Millisecond // nothing comes at all
)

// play sends a payload over a connection of its own, cut into segments as the
// source says, or into single bytes, and returns everything that came back. The client half-closes
// when nothing more comes, and waits for the end.
func (r *rig) play(port uint16, p payload, id string, rnd *rand.Rand, bytewise bool) (string, error) {
	c, err := r.dial(port)
	if err != nil {
		return "", err
	}
	defer c.Close()
	var mu sync.Mutex
	var got bytes.Buffer
	last := time.Now()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, 16<<10)
		for {
			n, err := c.Read(buf)
			mu.Lock()
			got.Write(buf[:n])
			last = time.Now()
			mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	for i, part := range p.parts {
		if i > 0 {
			select {
			case <-ended:
			case <-time.After(p.pause):
			}
		}
		b := []byte(strings.ReplaceAll(part, mark, id))
		for len(b) > 0 {
			n := len(b)
			switch {
			case bytewise && n < 400:
				n = 1
			case bytewise:
				n = 300
			case rnd != nil:
				n = 1 + rnd.IntN(n)
			}
			if _, err := c.Write(b[:n]); err != nil {
				break // refused already
			}
			b = b[n:]
		}
	}
	for waiting := true; waiting; {
		select {
		case <-ended:
			waiting = false
		case <-time.After(20 * time.Millisecond):
			mu.Lock()
			idle := time.Since(last)
			waiting = idle < quiet || got.Len() == 0 && idle < silence
			mu.Unlock()
		}
	}
	_ = c.CloseWrite()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		return got.String(), fmt.Errorf("weir does not end the connection")
	}
	mu.Lock()
	defer mu.Unlock()
	return got.String(), nil
}

// name makes a text as long as mark out of what is unique.
func name(server string, n, way int) string {
	s := fmt.Sprintf("%s-%d-%d-", server, n, way)
	return s + strings.Repeat("x", len(mark)-len(s))
}

// probe asks for a target over a connection of its own and checks that the
// answer is this server's to this request.
func (r *rig) probe(port uint16, target, want string) error {
	c, err := r.dial(port)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", target); err != nil {
		return err
	}
	b, err := io.ReadAll(c)
	if err != nil {
		return fmt.Errorf("probe %s: %w after %q", target, err, clip(string(b), 200))
	}
	if !strings.HasPrefix(string(b), "HTTP/1.1 200 ") || !strings.Contains(string(b), strings.ReplaceAll(want, "TARGET", target)) || strings.Count(string(b), "HTTP/1.1 ") != 1 {
		return fmt.Errorf("probe %s: %q", target, clip(string(b), 300))
	}
	return nil
}

// smuggleRig has all kinds of servers behind one weir, each in a farm of its
// own.
func smuggleRig(t *testing.T) (*rig, []*backend) {
	t.Helper()
	for _, tool := range []string{"nginx", "apache2", "lighttpd", "haproxy"} {
		require.Tool(t, tool)
	}
	r := newRig(t, 1)
	servers := []*backend{r.nginx(8001), r.apache(8002), r.lighttpd(8003), r.haproxy(8004), r.golang(8005), r.careless(8006)}
	var farms []farmText
	for _, s := range servers {
		farms = append(farms, farmText{name: s.name, port: s.port, servers: []string{r.at(0, s.port)},
			extra: "    timeouts: {head: 3s, idle: 3s, response: 5s}\n"})
	}
	r.start(farms...)
	return r, servers
}

// TestSmuggling: the whole corpus onto every server, whole and cut at random.
// What each server's log has seen is what weir has sent, request by request;
// no target that was hidden in a body reached anybody; nothing doubtful was
// ever pooled; and other clients get their own answers all the while.
func TestSmuggling(t *testing.T) {
	rnd := seeded(t)
	r, servers := smuggleRig(t)
	real := servers[:5]
	payloads := corpus()
	styles := size(3, 40)
	type job struct {
		server *backend
		p      payload
		id     string
		seed   uint64 // 0: whole, 1: single bytes, else of the cuts
	}
	var jobs []job
	for i, p := range payloads {
		for m, s := range real {
			for k := range styles {
				if k == 1 && i%len(real) != m && !soak {
					continue // this way is slow, each payload takes it once
				}
				j := job{server: s, p: p, id: name(s.name, i, k)}
				if k == 1 {
					j.seed = 1 // one byte after the other
				} else if k > 1 {
					j.seed = rnd.Uint64() | 2
				}
				jobs = append(jobs, j)
			}
		}
	}
	rnd.Shuffle(len(jobs), func(i, j int) { jobs[i], jobs[j] = jobs[j], jobs[i] })
	answers := make([]string, len(jobs))
	parallel(t, len(jobs), 24, func(i int) error {
		j := jobs[i]
		var cut *rand.Rand
		if j.seed > 1 {
			cut = rand.New(rand.NewPCG(j.seed, 2))
		}
		var err error
		if answers[i], err = r.play(j.server.port, j.p, j.id, cut, j.seed == 1); err != nil {
			return fmt.Errorf("%s onto %s: %w; got %q", j.p.name, j.server.name, err, clip(answers[i], 200))
		}
		want := map[string]string{"go": "go TARGET", "nginx": "nginx TARGET", "haproxy": "haproxy"}[j.server.name]
		return r.probe(j.server.port, "/probe/"+j.id, want)
	})
	if t.Failed() {
		return
	}
	recs := r.settled()
	weir := believed(t, recs, r.SNIP())
	agreed := 0
	said := map[string]string{} // what came back, by unique text
	for i, j := range jobs {
		said[j.id] = answers[i]
	}
	refused := func(target string) bool {
		for _, dir := range []string{"/p/", "/early/"} {
			if _, id, ok := strings.Cut(target, dir); ok && len(id) >= len(mark) {
				a := said[id[:len(mark)]]
				return len(a) > 12 && strings.HasPrefix(a, "HTTP/1.") && (a[9] == '4' || a[9] == '5')
			}
		}
		return false
	}
	for _, s := range real {
		// Servers write their logs when they are done with a request, which may
		// be a moment after the client is.
		log := s.ledger(t)
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end) && !same(s.port, log, weir, refused); log = s.ledger(t) {
			time.Sleep(50 * time.Millisecond)
		}
		agreed += compare(t, s.name, s.port, log, weir, refused)
		for k, list := range log {
			for _, x := range list {
				if strings.Contains(x.target, "smuggled") {
					t.Errorf("%s, connection from port %d: a smuggled request arrived: %v", s.name, k[1], x)
				}
			}
		}
		f := r.farm(s.name)
		if n := f.Servers[0].Requests; int(n) != weir.count(s.port) {
			t.Errorf("%s: weir counts %d requests and sent %d", s.name, n, weir.count(s.port))
		}
	}
	var tally [5]int
	for i, j := range jobs {
		tally[j.p.want]++
		if err := judge(j.p, j.id, answers[i], weir); err != nil {
			t.Errorf("%s (%s, segments by %d): %v; the client got %q", j.p.name, j.id, j.seed, err, clip(answers[i], 200))
		}
	}
	t.Logf("%d payloads, %d servers, %d ways: %d passed, %d isolated, %d refused, %d spoilt, %d aborted; %d requests agree", len(payloads), len(real), styles,
		tally[pass], tally[isolate], tally[refuse], tally[spoil], tally[abort], agreed)
}

// settled waits until no packet comes any more and returns what was captured.
func (r *rig) settled() []lab.Record {
	r.t.Helper()
	n := -1
	until(r.t, 20*time.Second, "a quiet wire", func() bool {
		was := n
		n = len(r.wire.Records())
		time.Sleep(100 * time.Millisecond)
		return was == n
	})
	recs, err := r.wire.Stop()
	if err != nil {
		r.t.Fatal(err)
	}
	return recs
}

// judge says whether a payload had the outcome that it must have.
func judge(p payload, id, answer string, weir ledger) error {
	sent, followed := false, false
	for _, dir := range []string{"/p/", "/early/", "http://a/p/", "HTTP://A/p/"} {
		s, f := weir.last(dir + id)
		sent, followed = sent || s, followed || f
	}
	own := strings.HasPrefix(answer, "HTTP/1.1 4") || strings.HasPrefix(answer, "HTTP/1.1 5")
	switch p.want {
	case pass:
		if !sent {
			return fmt.Errorf("it did not reach the server")
		}
	case isolate:
		if !sent {
			return fmt.Errorf("it did not reach the server")
		}
		if followed && !strings.HasPrefix(answer, "HTTP/1.1 101 ") {
			return fmt.Errorf("its connection served another request")
		}
	case refuse:
		if sent {
			return fmt.Errorf("it reached the server")
		}
		if !own || !strings.Contains(answer, "Connection: close") || strings.Count(answer, "HTTP/1.1 ") != 1 {
			return fmt.Errorf("it was not refused")
		}
	case spoil, abort:
		if followed {
			return fmt.Errorf("its connection served another request")
		}
	}
	return nil
}

// count is how many requests a server had, complete how many of them whole.
func (l ledger) count(port uint16) (n int) {
	for k, list := range l {
		for _, s := range list {
			if k[0] == port && s.method != "?" {
				n++
			}
		}
	}
	return n
}

func (l ledger) complete(port uint16) (n int) {
	for k, list := range l {
		for _, s := range list {
			if k[0] == port && s.complete {
				n++
			}
		}
	}
	return n
}

// TestCarelessServer is the negative control of the witness, and what weir can
// still do for others where a server itself is desynchronised: a server that
// never reads bodies does see smuggled requests, the comparison finds each of
// them, and no answer to one ever reaches a client: not the one who smuggled,
// nor anybody else.
func TestCarelessServer(t *testing.T) {
	r, servers := smuggleRig(t)
	s := servers[5]
	const body = smuggled + "\r\n\r\n"
	n := size(60, 1000)
	parallel(t, n, 4, func(i int) error {
		id := name("careless", i, 0)
		p := payload{parts: []string{fmt.Sprintf("POST /p/"+mark+" HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", len(body)) + body}}
		got, err := r.play(s.port, p, id, nil, false)
		if err != nil {
			return err
		}
		if !strings.Contains(got, "/p/"+id) || strings.Contains(got, "/smuggled/") {
			return fmt.Errorf("the client got %q", got)
		}
		return r.probe(s.port, "/probe/"+id, "TARGET")
	})
	if t.Failed() {
		return
	}
	weir := believed(t, r.settled(), r.SNIP())
	log := s.ledger(t)
	found := 0
	for k, list := range log {
		if _, err := differ(list, weir[k], nobody); err != nil {
			found++
		}
	}
	if found < n {
		t.Errorf("%d requests were smuggled onto a careless server, and the comparison found %d connections", n, found)
	}
}
