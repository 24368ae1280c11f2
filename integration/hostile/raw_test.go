// SPDX-License-Identifier: Apache-2.0

package hostile

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

// A forger sends packets with whatever addresses and numbers it likes.
type forger struct{ fd int }

// newForger opens a raw socket inside a host's namespace.
func newForger(h *lab.Host) (*forger, error) {
	f := &forger{fd: -1}
	err := h.Do(func() (err error) {
		f.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("raw socket in host %s: %w", h.Name(), err)
	}
	return f, nil
}

func (f *forger) close() { _ = unix.Close(f.fd) }

// send sends one segment. A full device queue loses it, as a network would.
func (f *forger) send(b []byte, s *packet.Segment, data []byte) ([]byte, error) {
	b = packet.AppendSegment(b[:0], s, data)
	to := unix.SockaddrInet4{Addr: s.Dst.AddrPort().Addr().As4()}
	err := unix.Sendto(f.fd, b, 0, &to)
	if err == unix.ENOBUFS || err == unix.EPERM || err == unix.EAGAIN {
		err = nil
	}
	return b, err
}

// flood sends about rate segments a second that craft fills in, for at most d
// and at most rate times d of them, or until the context ends. It returns how
// many it sent and how long that took.
func (f *forger) flood(ctx context.Context, rate int, d time.Duration, craft func(s *packet.Segment) []byte) (n int, took time.Duration, err error) {
	began := time.Now()
	limit := int(d.Seconds() * float64(rate))
	var b []byte
	for n < limit && ctx.Err() == nil {
		due := int(time.Since(began).Seconds() * float64(rate))
		if time.Since(began) > d {
			break
		}
		if n >= due {
			time.Sleep(500 * time.Microsecond)
			continue
		}
		for n < min(due, limit) {
			s := packet.Segment{TTL: 64}
			data := craft(&s)
			if b, err = f.send(b, &s, data); err != nil {
				return n, time.Since(began), err
			}
			n++
		}
	}
	return n, time.Since(began), nil
}

// A crafting is a source of forged segments to a VIP from a network that lies
// behind the attacker: nobody answers there.
func crafting(rnd *rand.Rand, vip netip.AddrPort, flags []packet.Flags, data []byte) func(*packet.Segment) []byte {
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
