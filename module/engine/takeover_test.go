// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"testing"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/packet"
)

// outlive has a rig's engine live in mem, which may hold what another one left.
func (g *rig) outlive(mem *flowstore.Memory) Takeover {
	g.t.Helper()
	e, err := Open(g.options(64), mem, g.db)
	if err != nil {
		g.t.Fatal(err)
	}
	g.e = e
	return e.Recover(g.now)
}

// die lets the next packet of a client kill the engine in the middle of its
// step, and returns what is left.
func (g *rig) die(mem *flowstore.Memory, failed bool, b []byte) (image *flowstore.Memory) {
	g.t.Helper()
	n := 0
	g.e.OnJournal(func() {
		if n++; n == 2 {
			if failed {
				mem.MarkFailed()
			}
			image = mem.Image()
		}
	})
	g.play(b)
	g.e.OnJournal(nil)
	if image == nil {
		g.t.Fatal("the step changes nothing")
	}
	return image
}

// TestQuarantine: a connection of which the engine dies twice is reset by the
// next one, and the others go on. The controls: a death from outside is no
// reason, nor are two failures that lie far apart.
func TestQuarantine(t *testing.T) {
	for _, c := range []struct {
		name   string
		failed bool
		pause  int64
		gone   bool
	}{
		{"failures", true, 0, true},
		{"killed from outside", false, 0, false},
		{"failures far apart", true, 2 * suspectMemory, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newRig(t, oneServer, keepIdle, func(s *farm.Spec) {
				s.Farms[0].Timeouts.Idle, s.Farms[0].Timeouts.Response = 3600*second, 3600*second
			})
			mem := flowstore.NewHeap()
			if took := g.outlive(mem); took.Any() {
				t.Fatalf("a new memory holds %+v", took)
			}
			a, b := g.dial(c1, 100), g.dial(c2, 200)
			a.ask(get("/a", 100), 5000)
			b.ask(get("/b", 100), 6000)
			bad := g.raw(a.srv, ep2(a.port), seg{fl: ack | psh, seq: a.sseq, ack: a.sack, data: "HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n"})
			for range 2 {
				mem = g.die(mem, c.failed, bad)
				g.now += c.pause
				if took := g.outlive(mem); took.Clients != 2 || took.Refused != 0 {
					t.Fatalf("%+v", took)
				}
			}
			reset := false
			for _, s := range g.play(g.raw(b.srv, ep2(b.port), seg{fl: ack | psh, seq: b.sseq, ack: b.sack, data: okEmpty})) {
				reset = reset || s.dst == c1 && s.fl.Has(packet.RST)
				if s.dst == c2 && len(s.data) > 0 {
					b.cack, b.fromServer = receive(b.cack, b.fromServer, &s)
				}
			}
			if reset != c.gone {
				t.Errorf("reset: %v, want %v", reset, c.gone)
			}
			if string(b.fromServer) != okEmpty {
				t.Errorf("the other client gets %q", b.fromServer)
			}
		})
	}
}

// TestStoredAllocs: packets cost no memory where their records outlive the
// process either.
func TestStoredAllocs(t *testing.T) {
	g, data, acks := spliced(t, true)
	buf := make([]byte, 2048)
	var out Output
	var ev Event
	for _, b := range [][]byte{data, acks} {
		if n := testing.AllocsPerRun(2000, func() {
			out.Reset()
			ev = Event{Kind: Packet, Checksum: packet.ChecksumVerified, Data: buf[:copy(buf, b)]}
			g.e.Step(g.now, &ev, &out)
		}); n != 0 {
			t.Errorf("%v allocations a packet", n)
		}
	}
}
