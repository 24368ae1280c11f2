// SPDX-License-Identifier: Apache-2.0

package framing

import (
	"fmt"
	"net/netip"
	"sort"
	"strings"
	"testing"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
	"github.com/weirgate/weir/module/http1"
)

// seen is one request of a server connection: what a server's log says of it,
// or what weir believes.
type seen struct {
	method, target string
	complete       bool // weir's side: its last byte went to the server
}

func (s seen) String() string { return s.method + " " + s.target }

// nobody refused anything.
func nobody(string) bool { return false }

// ledger lists requests by the server's port and the SNIP's port, in order. A
// SNIP port that was used again goes on in the same list.
type ledger map[[2]uint16][]seen

// believed reads from the wire what weir has sent to its servers, with weir's
// own scanner: one list per connection. What is not framed any more, because
// the connection was cut off, ends a list.
func believed(t *testing.T, recs []lab.Record, snip netip.Addr) ledger {
	t.Helper()
	flows := map[[2]uint16][]*stream{}
	for _, rec := range recs {
		s, err := ladder.Decode(rec.Data)
		if err != nil || s.Src.Addr() != snip || !rec.Outgoing {
			continue
		}
		key := [2]uint16{s.Dst.Port(), s.Src.Port()}
		list := flows[key]
		if s.Flags&ladder.SYN != 0 {
			if n := len(list); n > 0 && list[n-1].next == s.Seq+1 && len(list[n-1].data) == 0 {
				continue // repeated
			}
			flows[key] = append(list, &stream{next: s.Seq + 1, later: map[uint32][]byte{}})
			continue
		}
		if len(list) == 0 {
			continue // the lab's own
		}
		list[len(list)-1].take(s.Seq, s.Payload)
	}
	out := ledger{}
	for key, list := range flows {
		for _, st := range list {
			out[key] = append(out[key], requests(t, st.data)...)
		}
	}
	return out
}

// stream puts the bytes of one direction in order.
type stream struct {
	next  uint32
	data  []byte
	later map[uint32][]byte
}

func (s *stream) take(seq uint32, b []byte) {
	if len(b) == 0 {
		return
	}
	if old := s.later[seq]; len(old) < len(b) {
		s.later[seq] = append([]byte(nil), b...)
	}
	for moved := true; moved; {
		moved = false
		for at, b := range s.later {
			if skip := int32(s.next - at); skip >= 0 {
				if int(skip) < len(b) {
					s.data = append(s.data, b[skip:]...)
					s.next += uint32(len(b)) - uint32(skip)
					moved = true
				}
				delete(s.later, at)
			}
		}
	}
}

// requests splits a client-to-server stream as weir does.
func requests(t *testing.T, b []byte) []seen {
	t.Helper()
	lim := http1.DefaultLimits()
	var out []seen
	for len(b) > 0 {
		var h http1.RequestHead
		n, st := h.Scan(b, &lim, nil)
		if st == http1.Bad {
			t.Errorf("weir sent bytes to a server that it would refuse itself (%v): %q", h.Reason, clip(string(b), 200))
			return out
		}
		if st == http1.More {
			return out // cut off in the head: no server has a request there
		}
		r := seen{method: string(h.MethodSpan.Of(b)), target: string(h.Target.Of(b))}
		b = b[n:]
		var body http1.Body
		body.Start(h.Body, h.Length)
		n, st = body.Feed(b, &lim)
		r.complete = h.Body == http1.BodyNone || st == http1.Done
		out = append(out, r)
		if !r.complete {
			return out
		}
		if h.Body != http1.BodyNone {
			b = b[n:]
		}
		if h.Upgrade && len(b) > 0 {
			// Behind a 101 this is another protocol; without one it would be a
			// fault, which only the answer tells.
			return append(out, seen{method: "?", target: "another protocol"})
		}
	}
	return out
}

// compare reports where a server's log and weir's belief differ. refused says
// whether the server itself refused the request for a target. It returns how
// many requests agreed.
func compare(t *testing.T, server string, port uint16, log, weir ledger, refused func(target string) bool) (agreed int) {
	t.Helper()
	keys := map[[2]uint16]bool{}
	for k := range log {
		keys[k] = keys[k] || k[0] == port && k[1] < firstEphemeral
	}
	for k := range weir {
		keys[k] = keys[k] || k[0] == port
	}
	for k, mine := range keys {
		if !mine {
			continue
		}
		n, err := differ(log[k], weir[k], refused)
		agreed += n
		if err != nil {
			t.Errorf("%s, connection from port %d: %v", server, k[1], err)
		}
	}
	return agreed
}

// same is compare without a word.
func same(port uint16, log, weir ledger, refused func(string) bool) bool {
	for k, list := range weir {
		if k[0] == port {
			if _, err := differ(log[k], list, refused); err != nil {
				return false
			}
		}
	}
	return true
}

// firstEphemeral is the first port that is not one of weir's: connections from
// there are the lab's own.
const firstEphemeral = 32768

// differ compares the requests of one SNIP port. Beside full agreement there
// is one thing that a log may do: show a request that the server refused
// itself, or whose end it never got, as a line without method, or not at all.
func differ(log, weir []seen, refused func(target string) bool) (agreed int, err error) {
	i := 0
	for _, w := range weir {
		switch {
		case w.method == "?":
			return agreed, nil // from here on another protocol
		case i < len(log) && log[i].method == w.method && sameTarget(log[i].target, w.target):
			i++
			agreed++
		case w.complete && !refused(w.target):
			return agreed, fmt.Errorf("the log has %q where weir sent %q (log %v, weir %v)", at(log, i), w, short(log), short(weir))
		case i < len(log) && log[i].method == "":
			i++ // refused, and logged as nothing
		}
	}
	if i < len(log) {
		return agreed, fmt.Errorf("the log has %d requests that weir knows nothing of, the first is %q (weir %v)", len(log)-i, log[i], short(weir))
	}
	return agreed, nil
}

// sameTarget compares a logged target with one that was sent: a server may log
// the path of an absolute-form target alone.
func sameTarget(log, sent string) bool {
	if log == sent {
		return true
	}
	if len(sent) > 7 && strings.EqualFold(sent[:7], "http://") {
		if k := strings.IndexByte(sent[7:], '/'); k >= 0 {
			return log == sent[7+k:]
		}
	}
	return false
}

func at(l []seen, i int) string {
	if i < len(l) {
		return l[i].String()
	}
	return "nothing"
}

func short(l []seen) []seen { return l[:min(len(l), 8)] }

// last reports where in weir's belief a target stands: whether it was sent,
// and whether something followed on the same connection. Only lists of one
// incarnation can tell; a SNIP port rests before it is used again.
func (l ledger) last(target string) (sent, followed bool) {
	for _, list := range l {
		for i, s := range list {
			if s.target == target {
				sent = true
				followed = followed || i+1 < len(list)
			}
		}
	}
	return sent, followed
}

// TestWitness is the check of the checker: each of these must be found.
func TestWitness(t *testing.T) {
	a, b, c := seen{"GET", "/a", true}, seen{"POST", "/b", true}, seen{"PUT", "/c", false}
	d, abs, other, nothing := seen{"GET", "/d", true}, seen{"GET", "HTTP://h/a", true}, seen{method: "?"}, seen{}
	for _, x := range []struct {
		log, weir []seen
		ok        bool
	}{
		{[]seen{a, b}, []seen{a, b}, true},
		{[]seen{a, b}, []seen{a, b, c}, true}, // cut off
		{[]seen{a, b, c}, []seen{a, b, c}, true},
		{[]seen{a, b}, []seen{a}, false}, // smuggled
		{[]seen{a}, []seen{a, b}, false}, // swallowed
		{[]seen{b, a}, []seen{a, b}, false},
		{[]seen{{"GET", "/b", true}}, []seen{b}, false},
		{nil, []seen{c}, true},
		{[]seen{a}, []seen{a, d}, true}, // refused by the server
		{[]seen{a, nothing}, []seen{a, d}, true},
		{[]seen{a, nothing}, []seen{a, b}, false},
		{[]seen{a, nothing, b}, []seen{a, d}, false},
		{[]seen{a, b}, []seen{a, d}, false},
		{[]seen{a}, []seen{abs}, true},
		{[]seen{b}, []seen{abs}, false},
		{[]seen{a, nothing}, []seen{a, other}, true},
	} {
		if _, err := differ(x.log, x.weir, func(target string) bool { return target == "/d" }); (err == nil) != x.ok {
			t.Errorf("log %v, weir %v: %v", x.log, x.weir, err)
		}
	}
	const wire = "POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nGET /GET /a HTTP/1.1\r\nHost: a\r\n\r\nPUT /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"
	for _, step := range []int{1, 3, 50, 1000} {
		s := stream{next: 4294967290, later: map[uint32][]byte{}}
		var order []int
		for i := 0; i < len(wire); i += step {
			order = append(order, i)
		}
		sort.Slice(order, func(i, j int) bool { return order[i]*7%11 < order[j]*7%11 })
		for _, i := range order {
			at := uint32(4294967290)
			s.take(at+uint32(i), []byte(wire[i:min(i+step+2, len(wire))]))
		}
		if string(s.data) != wire {
			t.Fatalf("steps of %d: %q", step, s.data)
		}
		if got := fmt.Sprint(requests(t, s.data)); got != "[POST /b GET /a PUT /c]" {
			t.Errorf("steps of %d: %s", step, got)
		}
	}
	if !strings.Contains(fmt.Sprint(a), "GET /a") {
		t.Error("a request is not shown by its method and target")
	}
}
