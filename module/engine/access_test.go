// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/packet"
)

// entries takes the records out and writes them down.
func entries(q *AccessRing) (out []string) {
	q.Drain(func(a *AccessRecord) {
		t, cut := a.Target()
		out = append(out, fmt.Sprintf("%s %s cut=%v %d in=%d out=%d server=%d reused=%v attempts=%d %s",
			a.Method(), t, cut, a.Status, a.In, a.Out, a.Server, a.Reused, a.Attempts, a.End))
	})
	return out
}

func expectEntries(t *testing.T, q *AccessRing, want ...string) {
	t.Helper()
	if got := entries(q); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// TestAccessRecords: one record for each exchange, however it ends.
func TestAccessRecords(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	q := NewAccessRing(16, 1)
	g.e.SetAccess(q)
	g.iss = []packet.Seq{1999}

	// Two requests on one client connection, the second on a used connection.
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/one?q=1", 50)})
	expectEntries(t, q)
	g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
	g.now += 3 * millisecond
	whole := resp(200)
	g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: whole[:100]})
	g.server(s1, 10240, seg{fl: ack | psh, seq: 500, ack: 2050, data: whole[:100]}) // repeated: counts once
	g.server(s1, 10240, seg{fl: ack | psh, seq: 600, ack: 2050, data: whole[100:]})
	expectEntries(t, q)
	g.now += 2 * millisecond
	long := "/" + strings.Repeat("x", accessTarget+100)
	second := get(long, len(long)+60)
	g.client(c1, seg{fl: ack | psh, seq: seq + 50, ack: a + 200, data: second})
	q.Drain(func(r *AccessRecord) {
		if r.First-r.Bound != 3*millisecond || r.Ended-r.First != 2*millisecond || r.Client != ep(c1) || r.VIP != ep(vip) {
			t.Errorf("times or addresses: %+v", r)
		}
		if r.In != 50 || r.Out != 200 || r.Status != 200 || r.Reused || r.End != AccessServed || string(r.Method()) != "GET" {
			t.Errorf("first exchange: %+v", r)
		}
	})
	n := packet.Seq(len(second))
	g.server(s1, 10240, seg{fl: ack | psh, seq: 700, ack: 2050 + n, data: resp(100)})
	g.client(c1, seg{fl: ack, seq: seq + 50 + n, ack: a + 300})
	expectEntries(t, q, fmt.Sprintf("GET %s cut=true 200 in=%d out=100 server=1 reused=true attempts=1 served", long[:accessTarget], n))

	// A client that goes away inside a response.
	third := get("/gone", 60)
	g.client(c1, seg{fl: ack | psh, seq: seq + 50 + n, ack: a + 300, data: third})
	g.server(s1, 10240, seg{fl: ack | psh, seq: 800, ack: 2110 + n, data: resp(300)[:150]})
	g.client(c1, seg{fl: rst, seq: seq + 110 + n})
	expectEntries(t, q, "GET /gone cut=false 200 in=60 out=150 server=1 reused=true attempts=1 aborted")
	if len(g.e.access.slots) != 2 {
		t.Errorf("%d slots for one exchange at a time", len(g.e.access.slots)-1)
	}
}

// TestAccessOwnAnswers: what the engine answers itself is recorded too, with
// the request line if there was one.
func TestAccessOwnAnswers(t *testing.T) {
	g := newRig(t, figure8)
	q := NewAccessRing(16, 1)
	g.e.SetAccess(q)
	seq, a := g.open(c1, 100, 9000)
	g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/nowhere", 60)})
	got := entries(q)
	if len(got) != 1 || !strings.HasPrefix(got[0], "GET /nowhere cut=false 404 in=60 ") || !strings.HasSuffix(got[0], "server=0 reused=false attempts=0 answered") {
		t.Errorf("no route: %q", got)
	}
	seq, a = g.open(c2, 100, 9000)
	g.client(c2, seg{fl: ack | psh, seq: seq, ack: a, data: "GET /bad HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"})
	got = entries(q)
	if len(got) != 1 || !strings.HasPrefix(got[0], "GET /bad cut=false 400 ") || !strings.HasSuffix(got[0], " answered") {
		t.Errorf("refused head: %q", got)
	}
}

// TestAccessFull: what finds no room is counted, and nothing waits for it.
func TestAccessFull(t *testing.T) {
	q := NewAccessRing(4, 1)
	for i := range 6 {
		q.Push(&AccessRecord{Status: uint16(i)})
	}
	if q.Dropped() != 2 {
		t.Errorf("%d dropped", q.Dropped())
	}
	var got []uint16
	q.Drain(func(a *AccessRecord) { got = append(got, a.Status) })
	if fmt.Sprint(got) != "[0 1 2 3]" {
		t.Errorf("got %v", got)
	}
	q.Push(&AccessRecord{Status: 9})
	if n := q.Drain(func(*AccessRecord) {}); n != 1 {
		t.Errorf("%d after the ring was empty", n)
	}
}

// TestAccessSample: one request of so many has a record, and the record itself
// takes no memory once there is a slot.
func TestAccessSample(t *testing.T) {
	g := newRig(t, oneServer, keepIdle)
	q := NewAccessRing(1<<10, 3)
	g.e.SetAccess(q)
	g.iss = []packet.Seq{1999}
	seq, a := g.open(c1, 100, 9000)
	sseq, sack := packet.Seq(500), packet.Seq(2000)
	for i := range 30 {
		g.client(c1, seg{fl: ack | psh, seq: seq, ack: a, data: get("/", 50)})
		if i == 0 {
			g.server(s1, 10240, seg{fl: syn | ack, seq: 499, ack: 2000, opts: sackPermitted})
		}
		g.server(s1, 10240, seg{fl: ack | psh, seq: sseq, ack: sack + 50, data: resp(100)})
		seq, a, sseq, sack = seq+50, a+100, sseq+100, sack+50
		g.client(c1, seg{fl: ack, seq: seq, ack: a})
	}
	if n := len(entries(q)); n != 10 {
		t.Errorf("%d records of 30 requests, want every third", n)
	}
	r := g.e.clients.Lookup(&packet.Tuple{Src: ep(c1), Dst: ep(vip)})
	c := g.e.clients.At(r)
	d := g.e.sides.at(g.e.sides.get())
	if n := testing.AllocsPerRun(500, func() {
		g.e.access.begin(g.e, r, c, d)
		g.e.access.passed(g.e, r, 100)
		g.e.access.served(g.e, r, c)
		q.Drain(func(*AccessRecord) {})
	}); n != 0 {
		t.Errorf("%v allocations for one record", n)
	}
}
