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
		farms = append(farms, farmText{name: s.name, port: s.port, servers: []string{r.at(0, s.port)}})
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
	said := map[string]string{}
	for i, j := range jobs {
		said[j.id] = answers[i]
	}
	weir, logs, agreed := r.witness(real, said)
	for _, s := range real {
		for k, list := range logs[s.name] {
			for _, x := range list {
				if strings.Contains(x.target, "smuggled") {
					t.Errorf("%s, connection from port %d: a smuggled request arrived: %v", s.name, k[1], x)
				}
			}
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

// witness compares every server's log with what weir believes and counts. said
// is what came back to clients, by their unique texts.
func (r *rig) witness(servers []*backend, said map[string]string) (weir ledger, logs map[string]ledger, agreed int) {
	r.t.Helper()
	weir, logs = believed(r.t, r.settled(), r.SNIP()), map[string]ledger{}
	refused := func(target string) bool {
		for i := 0; i+len(mark) <= len(target); i++ {
			if a, ok := said[target[i:i+len(mark)]]; ok {
				return strings.Contains(a, "HTTP/1.1 4") || strings.Contains(a, "HTTP/1.1 5") || strings.Contains(a, "HTTP/1.0 4") || strings.Contains(a, "HTTP/1.0 5")
			}
		}
		return false
	}
	for _, s := range servers {
		// Servers write their logs when they are done with a request, which may
		// be a moment after the client is.
		log := s.ledger(r.t)
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end) && !same(s.port, log, weir, refused); log = s.ledger(r.t) {
			time.Sleep(50 * time.Millisecond)
		}
		agreed += compare(r.t, s.name, s.port, log, weir, refused)
		if n := r.farm(s.name).Servers[0].Requests; int(n) != weir.count(s.port) {
			r.t.Errorf("%s: weir counts %d requests and sent %d", s.name, n, weir.count(s.port))
		}
		logs[s.name] = log
	}
	return weir, logs, agreed
}

// settled waits until no packet comes any more and returns what was captured.
func (r *rig) settled() []lab.Record {
	r.t.Helper()
	until(r.t, 20*time.Second, "a quiet wire", func() bool {
		recs := r.wire.Records()
		return len(recs) > 0 && time.Since(recs[len(recs)-1].Time) > 200*time.Millisecond
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

// count is how many requests a server had.
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

// TestMutations: the corpus with random changes, onto every server. Nobody
// knows what is to become of each, but the logs and weir have to agree.
func TestMutations(t *testing.T) {
	rnd := seeded(t)
	r, servers := smuggleRig(t)
	real := servers[:5]
	payloads := corpus()
	n := size(2000, 200_000)
	ids, answers, seeds := make([]string, n), make([]string, n), make([]uint64, n)
	for i := range n {
		ids[i], seeds[i] = name("m", i, 0), rnd.Uint64()
	}
	parallel(t, n, 24, func(i int) error {
		rnd := rand.New(rand.NewPCG(seeds[i], 6))
		s := real[i%len(real)]
		p := mutate(payloads[rnd.IntN(len(payloads))], rnd)
		var cut *rand.Rand
		if rnd.IntN(2) == 0 {
			cut = rnd
		}
		var err error
		if answers[i], err = r.play(s.port, p, ids[i], cut, false); err != nil {
			return fmt.Errorf("%q onto %s: %w; got %q", p.parts, s.name, err, clip(answers[i], 200))
		}
		want := map[string]string{"go": "go TARGET", "nginx": "nginx TARGET", "haproxy": "haproxy"}[s.name]
		return r.probe(s.port, "/probe/"+ids[i], want)
	})
	if t.Failed() {
		return
	}
	said := map[string]string{}
	for i := range n {
		said[ids[i]] = answers[i]
	}
	_, _, agreed := r.witness(real, said)
	t.Logf("%d mutations, %d requests agree", n, agreed)
}

// mutate changes a payload in a few places, but not its mark, nor into
// characters that logs write in their own ways.
func mutate(p payload, rnd *rand.Rand) payload {
	const with = "\r\n\r\n\r\n \t\x00\x0b\x7f\x80\xff:;,/.-_=+%()aAxX0159fF"
	var parts []string
	for _, part := range p.parts {
		pieces := strings.Split(part, mark)
		for range 1 + rnd.IntN(3) {
			k := rnd.IntN(len(pieces))
			b := pieces[k]
			if len(b) == 0 {
				continue
			}
			at := rnd.IntN(len(b))
			to := min(len(b), at+1+rnd.IntN(1<<rnd.IntN(6)))
			switch c := with[rnd.IntN(len(with))]; rnd.IntN(6) {
			case 0:
				b = b[:at] + string([]byte{c}) + b[at:]
			case 1:
				b = b[:at] + string([]byte{c}) + b[at+1:]
			case 2:
				b = b[:at] + b[at+1:]
			case 3:
				b = b[:at] + b[at:to] + b[at:]
			case 4:
				b = b[:at] + b[to:]
			default: // a line twice, or none
				lines := strings.SplitAfter(b, "\r\n")
				l := rnd.IntN(len(lines))
				lines[l] = strings.Repeat(lines[l], 2*rnd.IntN(2))
				b = strings.Join(lines, "")
			}
			pieces[k] = b
		}
		parts = append(parts, strings.Join(pieces, mark))
	}
	p.parts, p.pause = parts, min(p.pause, 50*time.Millisecond)
	return p
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
