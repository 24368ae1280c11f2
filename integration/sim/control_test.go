// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bytes"
	"slices"
	"testing"

	"github.com/weirgate/weir/module/packet"
)

// busy is a scenario in which much happens and nothing is lost: what the
// controls spoil.
func busy(seed uint64) *Scenario {
	s := Base(seed)
	r := stream(seed, partShape, 11)
	for i := range 4 {
		c := plainConn(get(3000), post(2000, 300), get(10_000), get(0))
		c.Host, c.Start, c.Opt.ISS = i, int64(i)*3*millisecond, r.Uint32()
		c.Requests[2].Reply.Kind = KindChunked
		c.Requests[1].Pause = 5 * millisecond
		s.Conns = append(s.Conns, c)
	}
	return s
}

// nth calls change for the n-th packet of a direction that has a property.
func nth(n int, d Direction, which func(*packet.TCP) bool, change func(w *World, p *packet.TCP) []byte) Hooks {
	seen := 0
	return Hooks{Emitted: func(w *World, dir Direction, b []byte) []byte {
		p, _ := packet.ParseTCP(b)
		if dir != d || !which(&p) {
			return b
		}
		if seen++; seen != n {
			return b
		}
		return change(w, &p)
	}}
}

func anyPacket(p *packet.TCP) bool { return p.Flags()&(packet.SYN|packet.RST) == 0 }
func withData(p *packet.TCP) bool  { return p.PayloadLen() > 0 }

// TestControls: the observer must find an engine out whose packets are
// tampered with. Each tampering names the invariants that may be reported.
func TestControls(t *testing.T) {
	if r := Run(busy(1), Hooks{}); r.Violation != nil {
		t.Fatalf("the run that is to be spoilt fails by itself: %v", r.Violation)
	}
	for _, c := range []struct {
		name string
		hook func() Hooks
		want []string
	}{
		{"a wrong delta of sequence numbers to the server", func() Hooks {
			return nth(3, ToServer, withData, func(_ *World, p *packet.TCP) []byte {
				p.SetSeq(p.Seq().Add(1), packet.ChecksumVerified)
				return p.Raw
			})
		}, []string{"INV-1", "INV-2"}},
		{"a wrong delta of sequence numbers to the client", func() Hooks {
			return nth(5, ToClient, withData, func(_ *World, p *packet.TCP) []byte {
				p.SetSeq(p.Seq().Sub(1), packet.ChecksumVerified)
				return p.Raw
			})
		}, []string{"INV-1", "INV-2"}},
		{"an acknowledgment of too much to the client", func() Hooks {
			return nth(4, ToClient, anyPacket, func(_ *World, p *packet.TCP) []byte {
				p.SetAck(p.Ack().Add(500), packet.ChecksumVerified)
				return p.Raw
			})
		}, []string{"INV-6"}},
		{"an acknowledgment of too much to the server", func() Hooks {
			return nth(6, ToServer, anyPacket, func(_ *World, p *packet.TCP) []byte {
				p.SetAck(p.Ack().Add(50_000), packet.ChecksumVerified)
				return p.Raw
			})
		}, []string{"INV-6", "INV-2"}},
		{"a wrong checksum", func() Hooks {
			return nth(7, ToClient, anyPacket, func(_ *World, p *packet.TCP) []byte {
				p.Raw[len(p.Raw)-1] ^= 4
				return p.Raw
			})
		}, []string{"INV-6"}},
		{"a checksum that was computed anew over changed bytes", func() Hooks {
			return nth(6, ToClient, withData, func(_ *World, p *packet.TCP) []byte {
				p.Payload()[p.PayloadLen()/2] ^= 1
				p.FillChecksum()
				return p.Raw
			})
		}, []string{"INV-1", "INV-2"}},
		{"a changed byte of a request", func() Hooks {
			return nth(4, ToServer, withData, func(_ *World, p *packet.TCP) []byte {
				p.Payload()[p.PayloadLen()-1] ^= 1
				p.FillChecksum()
				return p.Raw
			})
		}, []string{"INV-1"}},
		{"two clients swapped", func() Hooks {
			return nth(8, ToClient, withData, func(w *World, p *packet.TCP) []byte {
				for _, c := range w.clients {
					if c.local != p.Dst() && c.conn != nil && c.conn.Synchronised() {
						r := packet.Rewrite{
							Src: p.Src(), Dst: c.local, Seq: packet.Seq(c.conn.IRS() + uint32(c.flow.top)),
							Ack: packet.Seq(c.conn.ISS() + uint32(c.flow.acked)), Window: p.Window(), Flags: p.Flags(),
						}
						p.Rewrite(&r, packet.ChecksumVerified)
						break
					}
				}
				return p.Raw
			})
		}, []string{"INV-2"}},
		{"one client's bytes in another's packet", func() Hooks {
			var stolen []byte
			var robbed packet.Endpoint
			return Hooks{Emitted: func(_ *World, d Direction, b []byte) []byte {
				p, _ := packet.ParseTCP(b)
				if d != ToClient || p.PayloadLen() < 1000 {
					return b
				}
				if stolen == nil {
					stolen, robbed = bytes.Clone(p.Payload()[:900]), p.Dst()
				} else if p.Dst() != robbed {
					copy(p.Payload(), stolen)
					p.FillChecksum()
				}
				return b
			}}
		}, []string{"INV-2"}},
		{"a window that nobody has, to the client", func() Hooks {
			return nth(6, ToClient, anyPacket, func(_ *World, p *packet.TCP) []byte {
				p.SetWindow(0xffff, packet.ChecksumVerified)
				return p.Raw
			})
		}, []string{"INV-6"}},
		{"a window that nobody has, to the server", func() Hooks {
			return nth(6, ToServer, anyPacket, func(_ *World, p *packet.TCP) []byte {
				p.SetWindow(0xffff, packet.ChecksumVerified)
				return p.Raw
			})
		}, []string{"INV-6"}},
		{"an address that was not translated", func() Hooks {
			return nth(5, ToClient, withData, func(w *World, p *packet.TCP) []byte {
				r := packet.Rewrite{Src: w.servers[0].end, Dst: p.Dst(), Seq: p.Seq(), Ack: p.Ack(), Window: p.Window(), Flags: p.Flags()}
				p.Rewrite(&r, packet.ChecksumVerified)
				return p.Raw
			})
		}, []string{"INV-3"}},
		{"a truncated packet", func() Hooks {
			return nth(5, ToClient, withData, func(_ *World, p *packet.TCP) []byte { return p.Raw[:len(p.Raw)-3] })
		}, []string{"INV-3"}},
		{"a FIN inside a response", func() Hooks {
			return nth(5, ToClient, func(p *packet.TCP) bool { return p.PayloadLen() > 1000 }, func(_ *World, p *packet.TCP) []byte {
				p.SetFlags(p.Flags()|packet.FIN, packet.ChecksumVerified)
				return p.Raw
			})
		}, []string{"INV-1"}},
		{"a reset for nothing", func() Hooks {
			return nth(5, ToClient, withData, func(_ *World, p *packet.TCP) []byte {
				s := packet.Segment{Src: p.Src(), Dst: p.Dst(), Seq: p.Seq(), Flags: packet.RST}
				return packet.AppendSegment(nil, &s, nil)
			})
		}, []string{"INV-4"}},
		{"silence", func() Hooks {
			return Hooks{Lose: func(d Direction, b []byte) bool { return d == ToServer && len(b) > 1000 }}
		}, []string{"liveness", "INV-4"}},
		{"a SACK block for what was never sent", func() Hooks {
			return nth(9, ToServer, anyPacket, func(_ *World, p *packet.TCP) []byte {
				s := packet.Segment{
					Src: p.Src(), Dst: p.Dst(), Seq: p.Seq(), Ack: p.Ack(), Flags: p.Flags(), Window: p.Window(),
					Options: packet.AppendSACKOption(nil, packet.SACKBlock{Left: p.Ack().Add(5000), Right: p.Ack().Add(6000)}),
				}
				return packet.AppendSegment(nil, &s, p.Payload())
			})
		}, []string{"INV-6"}},
		{"a response to somebody who has not asked", func() Hooks {
			return nth(2, ToClient, func(p *packet.TCP) bool { return p.PayloadLen() == 0 && anyPacket(p) }, func(_ *World, p *packet.TCP) []byte {
				s := packet.Segment{Src: p.Src(), Dst: p.Dst(), Seq: p.Seq(), Ack: p.Ack(), Flags: p.Flags(), Window: p.Window()}
				return packet.AppendSegment(nil, &s, []byte("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
			})
		}, []string{"INV-1", "INV-2"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := Run(busy(1), c.hook())
			switch {
			case r.Violation == nil:
				t.Errorf("the observer finds nothing: %d exchanges", r.Exchanges)
			case !slices.Contains(c.want, r.Violation.Invariant):
				t.Errorf("the observer finds %v, want one of %v", r.Violation, c.want)
			}
		})
	}
}

// TestBaselineControl: the end of a run finds what an engine keeps, and a clean
// run that is not given the time to age is not at its baseline.
func TestBaselineControl(t *testing.T) {
	s := busy(2)
	s.Idle = 2 * second // idle connections live 30 s, tombstones 20 s
	if r := Run(s, Hooks{}); r.Violation == nil || r.Violation.Invariant != "INV-9" {
		t.Errorf("after 2 s of silence: %v", r.Violation)
	}
}
