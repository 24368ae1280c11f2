// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"fmt"
	"strings"

	"github.com/weirgate/weir/module/packet"
)

// What can be noted of a packet.
type noteKind uint8

const (
	noteSent noteKind = iota
	noteLost
	noteSpoilt
	noteArrived
)

// record is one line of a ladder before it is drawn.
type record struct {
	at   int64
	kind noteKind
	dir  Direction
	key  packet.Tuple
	text string
	note string
}

// trace keeps what happened, for the ladder of a run that failed.
type trace struct {
	records []record
	marked  bool
}

// noteParcel remembers a packet if anybody wants to see it.
func (w *World) noteParcel(k noteKind, d Direction, p *parcel) {
	if w.trace == nil {
		return
	}
	r := record{at: w.now, kind: k, dir: d}
	if w.viol != nil && w.viol.At == w.now && !w.trace.marked {
		w.trace.marked = true
		r.note = "  <== " + w.viol.Invariant
	}
	t, problem := packet.ParseTCP(p.b)
	if problem != packet.OK {
		r.text = "(" + problem.String() + ")"
	} else {
		r.key = t.Tuple()
		r.text = describe(&t)
		if p.mss > 0 {
			r.text += fmt.Sprintf("/%d", p.mss)
		}
	}
	w.trace.records = append(w.trace.records, r)
}

// describe writes a segment down as the patent does: TYPE:seq,ack(length).
func describe(t *packet.TCP) string {
	fl := t.Flags()
	data := t.Payload()
	var kind string
	switch {
	case fl.Has(packet.RST):
		kind = "RST"
		if fl.Has(packet.ACK) {
			kind = "RST ACK"
		}
	case fl.Has(packet.SYN | packet.ACK):
		kind = "SYN ACK"
	case fl.Has(packet.SYN):
		kind = "SYN"
	case len(data) > 4 && string(data[:5]) == "HTTP/":
		kind = "RESP"
	case len(data) > 0:
		kind = "DATA"
		for _, m := range []string{"GET", "HEAD", "POST"} {
			if strings.HasPrefix(string(data), m+" /n/") {
				kind = m
			}
		}
	case fl.Has(packet.FIN):
		kind = "FIN"
	default:
		kind = "ACK"
	}
	if fl.Has(packet.FIN) && kind != "FIN" {
		kind += " FIN"
	}
	s := fmt.Sprintf("%s:%d,%d(%d)w%d", kind, t.Seq(), t.Ack(), len(data), t.Window())
	if off, n := t.SACK(); n > 0 {
		s += " SACK"
		for i := range n {
			b := t.SACKBlock(off, i)
			s += fmt.Sprintf(" %d-%d", b.Left, b.Right)
		}
	}
	return s
}

const half = 54

// Ladder draws what happened on one client connection and on the server
// connections that it used, in the order in which the engine saw and sent it;
// what the wires lost is marked. The newest lines count most: of more than
// limit the oldest are left out.
func (w *World) Ladder(limit int) string {
	if w.trace == nil || w.viol == nil {
		return ""
	}
	v := w.viol
	servers := map[packet.Tuple]bool{}
	if v.server != (packet.Tuple{}) {
		servers[v.server] = true
	}
	for _, c := range w.clients {
		if c.local != v.client {
			continue
		}
		for _, x := range c.exchanges {
			for _, f := range x.flows {
				servers[f.key] = true
			}
		}
	}
	var lines []string
	for i := range w.trace.records {
		r := &w.trace.records[i]
		client, mine := packet.Endpoint{}, false
		switch r.dir {
		case FromClient:
			client = r.key.Src
		case ToClient:
			client = r.key.Dst
		case FromServer:
			mine = servers[r.key]
		case ToServer:
			mine = servers[r.key.Reverse()]
		}
		if client != (packet.Endpoint{}) {
			mine = client == v.client || v.client == (packet.Endpoint{}) && len(servers) == 0
		}
		if !mine && !(r.key == (packet.Tuple{}) && r.note != "") {
			continue
		}
		// The engine's view: arrivals from endpoints, departures to them, and
		// losses on either side.
		inbound := r.dir == FromClient || r.dir == FromServer
		if r.kind != noteLost && r.kind != noteSpoilt && (r.kind == noteArrived) != inbound {
			continue
		}
		lines = append(lines, r.draw())
	}
	head := fmt.Sprintf("%12s  %s%s servers", "", pad("client "+v.client.String(), half), pad("interface unit "+w.vip.String(), half))
	if over := len(lines) - limit; over > 0 {
		lines = append([]string{fmt.Sprintf("%14s%d earlier lines", "", over)}, lines[over:]...)
	}
	return head + "\n" + strings.Join(lines, "\n") + "\n"
}

func pad(s string, n int) string {
	if len(s) < n {
		return s + strings.Repeat(" ", n-len(s))
	}
	return s
}

func (r *record) draw() string {
	label := " " + r.text + " "
	end := ">"
	if r.kind == noteLost || r.kind == noteSpoilt {
		end = "x"
	}
	var arrow string
	width := max(half-4-len(label), 1)
	if r.dir == FromClient || r.dir == ToServer {
		arrow = "--" + label + strings.Repeat("-", width) + end
	} else {
		if end == ">" {
			end = "<"
		}
		arrow = end + "--" + label + strings.Repeat("-", width)
	}
	lost := ""
	switch r.kind {
	case noteLost:
		lost = "  lost"
	case noteSpoilt:
		lost = "  spoilt"
	}
	s := fmt.Sprintf("%12.6f |", float64(r.at-startTime)/1e9)
	if r.dir == FromClient || r.dir == ToClient {
		return s + arrow + "|" + strings.Repeat(" ", half) + "|" + lost + r.note
	}
	port := r.key.Dst.Port
	if r.dir == ToServer {
		port = r.key.Src.Port
	}
	return s + strings.Repeat(" ", half) + "|" + arrow + "| " + fmt.Sprint(port) + lost + r.note
}
