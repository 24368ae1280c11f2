// SPDX-License-Identifier: Apache-2.0

package capture

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weirgate/weir/module/packet"
)

// Segment writes a TCP segment down as the figures of WO 00/28433 do:
// TYPE:sequence,acknowledgment(length). The type is the flags' or, of a segment
// that begins a message, its method or RESP. Other packets are named.
func Segment(b []byte) string {
	b = whole(b)
	p, problem := packet.ParseTCP(b)
	if problem != packet.OK {
		return fmt.Sprintf("%v", problem)
	}
	s := fmt.Sprintf("%s:%d", segmentType(&p), p.Seq())
	if p.Flags().Has(packet.ACK) {
		s += fmt.Sprintf(",%d", p.Ack())
	}
	return s + fmt.Sprintf("(%d)", p.PayloadLen())
}

// kindOf is the type of a segment, without what the interface unit may add or
// take away.
func kindOf(b []byte) string {
	kind, _, _ := strings.Cut(Segment(b), ":")
	return strings.TrimSuffix(kind, " FIN")
}

// whole gives a packet that was cut off in a capture its length back, with
// zeros, so that its headers can be read.
func whole(b []byte) []byte {
	n := 0
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		n = int(binary.BigEndian.Uint16(b[2:]))
	case len(b) >= 40 && b[0]>>4 == 6:
		n = 40 + int(binary.BigEndian.Uint16(b[4:]))
	}
	if n <= len(b) {
		return b
	}
	return append(slices.Clone(b), make([]byte, n-len(b))...)
}

func segmentType(p *packet.TCP) string {
	fl, data := p.Flags(), p.Payload()
	var t string
	switch {
	case fl.Has(packet.SYN | packet.ACK):
		return "SYN ACK"
	case fl.Has(packet.SYN):
		return "SYN"
	case fl.Has(packet.RST):
		return "RST"
	case bytes.HasPrefix(data, []byte("HTTP/1.")):
		t = "RESP"
	case len(data) > 0:
		if t = method(data); t == "" {
			t = "DATA"
		}
	case fl.Has(packet.FIN):
		return "FIN"
	default:
		return "ACK"
	}
	if fl.Has(packet.FIN) {
		t += " FIN"
	}
	return t
}

// method returns the method of a request that begins here, "" if none does.
func method(b []byte) string {
	i := bytes.IndexByte(b[:min(len(b), 16)], ' ')
	if i < 1 {
		return ""
	}
	for _, c := range b[:i] {
		if c < 'A' || c > 'Z' {
			return ""
		}
	}
	if line, _, _ := bytes.Cut(b, []byte("\r\n")); !bytes.Contains(line, []byte(" HTTP/1.")) && len(line) < len(b) {
		return ""
	}
	return string(b[:i])
}

// Sides tells the two legs of the interface unit apart: what goes from or to a
// SNIP's port is the server's leg.
type Sides struct {
	SNIPs     []netip.Addr
	PortFirst uint16
	PortLast  uint16
}

// ServerLeg reports on which leg a packet was seen. Outgoing ones have our end
// as their source.
func (s *Sides) ServerLeg(b []byte, outgoing bool) bool {
	p, problem := packet.ParseTCP(whole(b))
	if problem != packet.OK {
		return false
	}
	our := p.Dst()
	if outgoing {
		our = p.Src()
	}
	return our.Port >= s.PortFirst && our.Port <= s.PortLast && slices.Contains(s.SNIPs, our.Addr.Netip())
}

// Step is one line of a trace: a segment on the client's leg, one on the
// server's, or both where one is the translation of the other.
type Step struct {
	Client   string // notation on the client's leg, "" if there is none
	Server   string // on the server's leg
	ToServer bool   // the direction of both
	// The peers, where the line has a segment of their leg.
	ClientEnd, SNIP, ServerEnd netip.AddrPort
}

// Steps pairs what came in with what went out.
func (s *Sides) Steps(in []byte, out [][]byte) []Step {
	var steps []Step
	rest := out
	if in != nil {
		st := Step{}
		fromServer := s.ServerLeg(in, false)
		st.ToServer = !fromServer
		s.put(&st, in, fromServer, false)
		// The first packet of the same kind that goes on in the same direction is
		// its translation.
		for i, o := range out {
			if s.ServerLeg(o, true) != fromServer && kindOf(o) == kindOf(in) {
				s.put(&st, o, !fromServer, true)
				rest = append(slices.Clone(out[:i]), out[i+1:]...)
				break
			}
		}
		steps = append(steps, st)
	}
	for _, o := range rest {
		leg := s.ServerLeg(o, true)
		st := Step{ToServer: leg}
		s.put(&st, o, leg, true)
		steps = append(steps, st)
	}
	return steps
}

func (s *Sides) put(st *Step, b []byte, serverLeg, outgoing bool) {
	text := Segment(b)
	var our, peer netip.AddrPort
	if p, problem := packet.ParseTCP(whole(b)); problem == packet.OK {
		our, peer = p.Dst().AddrPort(), p.Src().AddrPort()
		if outgoing {
			our, peer = peer, our
		}
	}
	if serverLeg {
		st.Server, st.SNIP, st.ServerEnd = text, our, peer
	} else {
		st.Client, st.ClientEnd = text, peer
	}
}

// String draws the step: client's leg on the left, server's on the right.
func (st *Step) String() string {
	arrow := " <- "
	if st.ToServer {
		arrow = " -> "
	}
	return strings.TrimRight(fmt.Sprintf("%-34s%s%-34s", st.Client, arrow, st.Server), " ")
}
