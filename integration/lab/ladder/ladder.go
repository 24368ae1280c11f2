// SPDX-License-Identifier: Apache-2.0

package ladder

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
)

// cell is the width of one half of the ladder, in columns: one lifeline, two
// halves and three bars stay below 100 with the name of a server behind them.
const cell = 45

// A Peer is a named end of the ladder.
type Peer struct {
	Name string
	Addr netip.AddrPort // port 0 stands for every port of that address
}

func (p Peer) is(a netip.AddrPort) bool {
	return p.Addr.Addr() == a.Addr() && (p.Addr.Port() == 0 || p.Addr.Port() == a.Port())
}

// A Figure says what of a capture is drawn, and how.
type Figure struct {
	Title   string
	Client  Peer           // the left end
	VIP     netip.AddrPort // the interface unit, as clients know it
	Servers []Peer         // the right ends; their lines carry their names when there are several
	// MaxLines bounds the drawing, heading included; what is too much is left
	// out of the middle and counted. 0 means 16.
	MaxLines int
	// Relative counts sequence numbers of each connection from its first
	// segments, instead of showing those of the wire.
	Relative bool
}

// A Pair is one segment before and after its translation.
type Pair struct {
	In, Out  Segment
	Type     string // as drawn
	ToServer bool
}

// step is a drawn line: one segment, or two of which the second is the
// translation of the first.
type step struct {
	left, right string // labels; empty if this half has no segment
	toServer    bool
	server      string
	pair        *Pair
	open        *Segment // the only segment of the step, if its translation may follow
	typ         string
}

// near bounds how many steps lie between a segment and its translation: while
// one is under way, others come in.
const near = 3

// Write draws the figure.
func (f Figure) Write(w io.Writer, segs []Segment) error {
	for _, l := range f.Lines(segs) {
		if _, err := fmt.Fprintln(w, l); err != nil {
			return err
		}
	}
	return nil
}

// Lines returns the figure line by line, the heading first. No line is wider
// than 100 columns and there are at most MaxLines of them.
func (f Figure) Lines(segs []Segment) []string {
	lines := []string{f.heading()}
	for _, s := range f.steps(segs) {
		name := ""
		if len(f.Servers) > 1 {
			name = " " + s.server
		}
		lines = append(lines, strings.TrimRight(" |"+arrow(s.left, s.toServer)+"|"+arrow(s.right, s.toServer)+"|"+name, " "))
	}
	limit := f.MaxLines
	if limit == 0 {
		limit = 16
	}
	if over := len(lines) - limit; over > 0 {
		// The beginning and the end tell the story; the note takes a line too.
		head := 1 + (limit-2)*2/3
		tail := lines[head+over+1:]
		note := fmt.Sprintf(" :  %d more lines", over+1)
		lines = append(append(lines[:head:head], note), tail...)
	}
	return lines
}

// Pairs returns the segments that were seen on both sides, before and after
// their translation.
func (f Figure) Pairs(segs []Segment) []Pair {
	var ps []Pair
	for _, s := range f.steps(segs) {
		if s.pair != nil {
			ps = append(ps, *s.pair)
		}
	}
	return ps
}

func (f Figure) heading() string {
	left := f.Title
	if left != "" {
		left += "  "
	}
	left += f.Client.String()
	mid := "interface unit " + f.VIP.String()
	right := "servers"
	if len(f.Servers) == 1 {
		right = f.Servers[0].String()
	}
	// The middle stands over the middle bar, the right end over the right one.
	midAt := max(cell+2-len(mid)/2, len(left)+2)
	s := left + strings.Repeat(" ", midAt-len(left)) + mid
	rightAt := max(2*cell+4-len(right), len(s)+2)
	return s + strings.Repeat(" ", rightAt-len(s)) + right
}

// String returns the peer's name and address; an address without a port if
// the peer stands for all of them.
func (p Peer) String() string {
	if p.Addr.Port() == 0 {
		return p.Name + " " + p.Addr.Addr().String()
	}
	return p.Name + " " + p.Addr.String()
}

func arrow(label string, toServer bool) string {
	switch {
	case label == "":
		return strings.Repeat(" ", cell)
	case toServer:
		return "--" + pad(" "+label+" ", cell-3) + ">"
	default:
		return "<--" + pad(" "+label+" ", cell-3)
	}
}

func pad(s string, n int) string {
	if len(s) < n {
		return s + strings.Repeat("-", n-len(s))
	}
	return s
}

// conn is what labelling needs to know about one connection.
type conn struct {
	fin      [2]bool // by direction: a FIN was seen
	finEnd   [2]uint32
	data     bool // a byte of payload was seen, either way
	resp     bool // a byte of a response was seen
	based    [2]bool
	base     [2]uint32 // first sequence number seen, by direction
	lastResp uint32
}

type connKey struct {
	side       Side
	near, far  netip.AddrPort // requesting and answering end
	incarnated int
}

// steps orders, selects, labels and pairs the segments.
func (f Figure) steps(segs []Segment) []step {
	segs = slices.Clone(segs)
	slices.SortStableFunc(segs, func(a, b Segment) int { return a.Time.Compare(b.Time) })
	conns := map[connKey]*conn{}
	generation := map[connKey]int{}
	var steps []step
	for _, s := range segs {
		toServer, server, ok := f.place(s)
		if !ok {
			continue
		}
		key := connKey{side: s.Side, near: s.Src, far: s.Dst}
		if !toServer {
			key.near, key.far = s.Dst, s.Src
		}
		if s.Flags&(SYN|ACK) == SYN {
			// The same ports may serve another connection later.
			if c := conns[withGeneration(key, generation)]; c != nil && c.based[0] && c.base[0] != s.Seq {
				generation[key]++
			}
		}
		key = withGeneration(key, generation)
		c := conns[key]
		if c == nil {
			c = &conn{}
			conns[key] = c
		}
		typ := c.label(s, toServer)
		c.data = c.data || s.Len > 0
		handshake := s.Flags&SYN != 0 || !c.data
		text := f.format(typ, s, c, toServer)

		// A segment that leaves on the far side shortly after one of the same
		// kind came in on the near side is that one, translated. The interface
		// unit's own FIN may ride on it. What one end
		// exchanges with the interface unit alone has no such counterpart: the
		// handshakes.
		entry, exit := ClientSide, ServerSide
		if !toServer {
			entry, exit = exit, entry
		}
		paired := false
		for i := max(0, len(steps)-near); i < len(steps) && s.Side == exit && !handshake; i++ {
			if st := &steps[i]; st.open != nil && st.toServer == toServer && (st.typ == typ || st.typ+" FIN" == typ) {
				st.pair = &Pair{In: *st.open, Out: s, Type: typ, ToServer: toServer}
				st.open = nil
				if st.server == "" {
					st.server = server
				}
				st.set(s.Side, text)
				paired = true
				break
			}
		}
		if paired {
			continue
		}
		st := step{toServer: toServer, server: server, typ: typ}
		if s.Side == entry && !handshake {
			st.open = &s
		}
		st.set(s.Side, text)
		steps = append(steps, st)
	}
	return steps
}

func withGeneration(k connKey, g map[connKey]int) connKey {
	n := g[k]
	k.incarnated = n
	return k
}

func (s *step) set(side Side, text string) {
	if side == ClientSide {
		s.left = text
	} else {
		s.right = text
	}
}

// place says whether the segment belongs to the figure and which way it goes.
func (f Figure) place(s Segment) (toServer bool, server string, ok bool) {
	if s.Side == ClientSide {
		switch {
		case s.Dst == f.VIP && f.Client.is(s.Src):
			return true, "", true
		case s.Src == f.VIP && f.Client.is(s.Dst):
			return false, "", true
		}
		return false, "", false
	}
	for _, p := range f.Servers {
		switch {
		case p.is(s.Dst):
			return true, p.Name, true
		case p.is(s.Src):
			return false, p.Name, true
		}
	}
	return false, "", false
}

// label names the segment as the patent does and remembers what later labels
// depend on.
func (c *conn) label(s Segment, toServer bool) string {
	d, other := 0, 1
	if !toServer {
		d, other = 1, 0
	}
	if !c.based[d] {
		c.based[d], c.base[d] = true, s.Seq
	}
	if !c.based[other] && s.Flags&ACK != 0 {
		c.based[other], c.base[other] = true, s.Ack
	}
	if s.Flags&FIN != 0 {
		c.fin[d], c.finEnd[d] = true, s.Seq+uint32(s.Len)+1
	}
	switch {
	case s.Flags&RST != 0:
		return "RST"
	case s.Flags&(SYN|ACK) == SYN|ACK:
		return "SYN ACK"
	case s.Flags&SYN != 0:
		return "SYN"
	case s.Len > 0:
		typ := "RESP"
		if toServer {
			typ = method(s.Payload)
		} else {
			c.resp, c.lastResp = true, s.Seq
		}
		if s.Flags&FIN != 0 {
			typ += " FIN"
		}
		return typ
	case s.Flags&FIN != 0:
		return "FIN"
	case c.fin[other] && s.Ack == c.finEnd[other]:
		return "FIN ACK"
	case toServer && c.resp && int32(s.Ack-c.lastResp) > 0:
		return "RESP ACK"
	default:
		return "ACK"
	}
}

func (f Figure) format(typ string, s Segment, c *conn, toServer bool) string {
	seq, ack := s.Seq, s.Ack
	if f.Relative {
		d, other := 0, 1
		if !toServer {
			d, other = 1, 0
		}
		seq -= c.base[d]
		if s.Flags&ACK != 0 {
			ack -= c.base[other]
		}
	}
	return fmt.Sprintf("%s:%d,%d(%d)", typ, seq, ack, s.Len)
}

// method returns the request method at the start of a payload, DATA if the
// payload does not start a request.
func method(b []byte) string {
	for i := 0; i < len(b) && i < 10; i++ {
		if b[i] == ' ' && i > 0 {
			return string(b[:i])
		}
		if b[i] < 'A' || b[i] > 'Z' {
			break
		}
	}
	return "DATA"
}

// Check verifies the patent's equations on translated segments of one splice:
// the distances between sequence and acknowledgment numbers before and after
// are the same for all segments of one direction, and those of the two
// directions are each other's opposites; lengths do not change. bytesAdded is
// what the interface unit inserted into the request's first segment, which is
// longer by as much and still has the undisturbed sequence number. It returns
// an error that names the first segment that does not fit.
func Check(pairs []Pair, bytesAdded uint32) error {
	var seqDelta, ackDelta uint32
	known := false
	added := false // the insertion lies before the client's next byte
	for i, p := range pairs {
		var ds, da uint32
		longer := 0
		if p.ToServer {
			ds, da = p.Out.Seq-p.In.Seq, p.Out.Ack-p.In.Ack
			if added {
				ds -= bytesAdded
			}
			if !added && p.In.Len > 0 {
				added, longer = true, int(bytesAdded)
			}
		} else {
			ds, da = p.In.Ack-p.Out.Ack, p.In.Seq-p.Out.Seq
			if added {
				ds -= bytesAdded
			}
		}
		if p.Out.Len != p.In.Len+longer {
			return fmt.Errorf("ladder: segment %d of %d, %s:%d,%d: %d bytes became %d, expected %d",
				i+1, len(pairs), p.Type, p.In.Seq, p.In.Ack, p.In.Len, p.Out.Len, p.In.Len+longer)
		}
		if !known {
			seqDelta, ackDelta, known = ds, da, true
			continue
		}
		if ds != seqDelta || da != ackDelta {
			return fmt.Errorf("ladder: segment %d of %d, %s:%d,%d(%d) -> %d,%d(%d): distances %d and %d, expected %d and %d",
				i+1, len(pairs), p.Type, p.In.Seq, p.In.Ack, p.In.Len, p.Out.Seq, p.Out.Ack, p.Out.Len,
				int32(ds), int32(da), int32(seqDelta), int32(ackDelta))
		}
	}
	return nil
}
