// SPDX-License-Identifier: Apache-2.0

// Package forge sends packets with whatever addresses and numbers it likes, from
// a host of a lab: what somebody does who is outside of a connection. It must
// not send anything in the network namespace that it is called in, and never
// sees what comes back.
package forge

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/module/packet"
)

// A Forger is a raw socket inside a host's namespace. It is not safe for
// concurrent use.
type Forger struct {
	fd  int
	buf []byte
}

// New opens a forger. Close it.
func New(h *lab.Host) (*Forger, error) {
	f := &Forger{fd: -1}
	err := h.Do(func() (err error) {
		f.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("raw socket in host %s: %w", h.Name(), err)
	}
	return f, nil
}

// Close closes the socket.
func (f *Forger) Close() { _ = unix.Close(f.fd) }

// Send sends one segment over IPv4, with right checksums. A full device queue
// loses it, as a network would.
func (f *Forger) Send(s *packet.Segment, data []byte) error {
	f.buf = packet.AppendSegment(f.buf[:0], s, data)
	to := unix.SockaddrInet4{Addr: s.Dst.AddrPort().Addr().As4()}
	err := unix.Sendto(f.fd, f.buf, 0, &to)
	if err == unix.ENOBUFS || err == unix.EPERM || err == unix.EAGAIN {
		err = nil
	}
	return err
}

// A Craft fills in a segment, which is empty but for its TTL, and returns its
// payload.
type Craft func(s *packet.Segment) (payload []byte)

// Flood sends so many segments, at most rate a second, or until the context
// ends. A machine that is busy with something else makes it slower, not
// shorter. It returns how many it sent and how long that took.
func (f *Forger) Flood(ctx context.Context, rate, count int, craft Craft) (n int, took time.Duration, err error) {
	began := time.Now()
	for n < count && ctx.Err() == nil {
		due := int(time.Since(began).Seconds() * float64(rate))
		if n >= due {
			time.Sleep(500 * time.Microsecond)
			continue
		}
		// Late, it catches up by a little at a time: a burst is no flood.
		for range min(due-n, count-n, 256) {
			s := packet.Segment{TTL: 64}
			if err = f.Send(&s, craft(&s)); err != nil {
				return n, time.Since(began), err
			}
			n++
		}
	}
	return n, time.Since(began), nil
}

// Strangers crafts segments to a VIP from 198.19.0.0/16, which is nobody's: a
// SYN has the options of one, a segment with PSH has the data.
func Strangers(rnd *rand.Rand, vip netip.AddrPort, flags []packet.Flags, data []byte) Craft {
	options := packet.AppendSYNOptions(nil, packet.SYNOptions{MSS: 1460, WindowScale: 7, SACKPermitted: true})
	dst := packet.EndpointFrom(vip)
	return func(s *packet.Segment) []byte {
		src := netip.AddrFrom4([4]byte{198, 19, byte(rnd.Uint32()), byte(rnd.Uint32())})
		s.Src, s.Dst = packet.EndpointFrom(netip.AddrPortFrom(src, uint16(1024+rnd.IntN(60000)))), dst
		s.Seq, s.Ack, s.Window = packet.Seq(rnd.Uint32()), packet.Seq(rnd.Uint32()), 1000
		s.Flags = flags[rnd.IntN(len(flags))]
		switch {
		case s.Flags == packet.SYN:
			s.Ack, s.Options = 0, options
		case s.Flags.Has(packet.PSH):
			return data
		}
		return nil
	}
}

// Blind crafts segments of connections that exist, with the right addresses
// and ports and drawn numbers. pick names the ends of one, the sender's first.
func Blind(rnd *rand.Rand, pick func() (src, dst netip.AddrPort), flags []packet.Flags, data []byte) Craft {
	return func(s *packet.Segment) []byte {
		src, dst := pick()
		s.Src, s.Dst = packet.EndpointFrom(src), packet.EndpointFrom(dst)
		s.Seq, s.Ack, s.Window = packet.Seq(rnd.Uint32()), packet.Seq(rnd.Uint32()), uint16(rnd.Uint32())
		s.Flags = flags[rnd.IntN(len(flags))]
		if s.Flags.Has(packet.PSH) {
			return data
		}
		return nil
	}
}
