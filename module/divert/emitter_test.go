// SPDX-License-Identifier: Apache-2.0

package divert_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module/divert"
)

// datagram crafts a complete UDP packet.
func datagram(src, dst netip.AddrPort, payload string) []byte {
	var b []byte
	n := 8 + len(payload)
	if src.Addr().Is6() {
		b = append(b, 0x60, 0, 0, 0, 0, 0, unix.IPPROTO_UDP, 64)
	} else {
		b = append(b, 0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, unix.IPPROTO_UDP, 0, 0)
	}
	b = append(b, src.Addr().AsSlice()...)
	b = append(b, dst.Addr().AsSlice()...)
	b = binary.BigEndian.AppendUint16(b, src.Port())
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	b = binary.BigEndian.AppendUint16(b, uint16(n))
	b = append(b, 0, 0)
	b = append(b, payload...)
	h, _ := parse(b)
	h.fixIP(b)
	h.fill(b)
	return b
}

func (l *lab) emitter() *divert.Emitter {
	l.t.Helper()
	var e *divert.Emitter
	l.in(l.router, func() {
		var err error
		e, err = divert.OpenEmitter(testMark)
		l.must(err)
	})
	l.t.Cleanup(e.Close)
	return e
}

// TestEmit sends packets of both families from addresses that nobody has, in
// more than one batch, mixed.
func TestEmit(t *testing.T) {
	require.NFQueue(t)
	l := newLab(t)
	l.queueRule()
	e := l.emitter()
	s4 := l.udp(l.server, at(server4, 5000))
	s6 := l.udp(l.server, at(server6, 5000))
	var pkts [][]byte
	var want4, want6 []string
	for i := range 300 {
		text := fmt.Sprint("number ", i)
		if i%7 == 3 || i > 200 {
			pkts = append(pkts, datagram(at(vip6, uint16(i)), at(server6, 5000), text))
			want6 = append(want6, text)
		} else {
			pkts = append(pkts, datagram(at(vip4, uint16(i)), at(server4, 5000), text))
			want4 = append(want4, text)
		}
	}
	sent, err := e.Send(pkts)
	if sent != len(pkts) || err != nil {
		t.Fatalf("sent %d of %d: %v, %+v", sent, len(pkts), err, e.Stats())
	}
	for _, side := range []struct {
		conn *net.UDPConn
		vip  netip.Addr
		want []string
	}{{s4, vip4, want4}, {s6, vip6, want6}} {
		for _, want := range side.want {
			text, from := l.readUDP(side.conn)
			var i int
			_, _ = fmt.Sscanf(want, "number %d", &i)
			if text != want || from != at(side.vip, uint16(i)) {
				t.Fatalf("the server got %q from %v, want %q from %v", text, from, want, side.vip)
			}
		}
	}
	if n := l.counter("output"); n != 300 {
		t.Errorf("%d emitted packets had the mark, want 300", n)
	}
	st := e.Stats()
	if st.Sent != 300 || st.Failed() != 0 || st.Bytes == 0 {
		t.Errorf("counters: %+v", st)
	}
}

// TestEmitSourceRouting: a rule by source address decides over emitted packets.
func TestEmitSourceRouting(t *testing.T) {
	require.NFQueue(t)
	l := newLab(t)
	e := l.emitter()
	h := l.handle(l.router)
	defer h.Close()
	for _, vip := range []netip.Addr{vip4, vip6} {
		family, bits, dst := unix.AF_INET, 32, "198.51.100.0/24"
		if vip.Is6() {
			family, bits, dst = unix.AF_INET6, 128, "2001:db8:2::/64"
		}
		_, to, err := net.ParseCIDR(dst)
		l.must(err)
		l.must(h.RouteAdd(&netlink.Route{Table: 100, Dst: to, Type: unix.RTN_UNREACHABLE}))
		r := netlink.NewRule()
		r.Family, r.Table, r.Priority = family, 100, 100
		r.Src = &net.IPNet{IP: vip.AsSlice(), Mask: net.CIDRMask(bits, bits)}
		l.must(h.RuleAdd(r))
	}
	sent, err := e.Send([][]byte{
		datagram(at(vip4, 1), at(server4, 5000), "no way"),
		datagram(at(snip4, 1), at(server4, 5000), "a way"),
		datagram(at(vip6, 1), at(server6, 5000), "no way"),
		datagram(at(snip6, 1), at(server6, 5000), "a way"),
	})
	if st := e.Stats(); sent != 2 || err != nil || st.Unreachable != 2 {
		t.Errorf("sent %d: %v, %+v", sent, err, st)
	}
}

// TestEmitErrors: what cannot be sent is skipped and counted by reason.
func TestEmitErrors(t *testing.T) {
	require.NFQueue(t)
	l := newLab(t)
	l.queueRule()
	e := l.emitter()
	var limits []string
	e.OnTooBig(func(dst netip.Addr, mtu int) { limits = append(limits, fmt.Sprint(dst, " ", mtu)) })
	long := string(make([]byte, 1473))
	good := []byte(datagram(at(vip4, 1), at(server4, 5000), "good"))
	options := append([]byte(nil), good...)
	options[0] = 0x4f // a header longer than the packet
	sent, err := e.Send([][]byte{
		datagram(at(vip4, 1), at(server4, 5000), long),                       // TooBig
		datagram(at(vip4, 1), at(server4, 9), "dropped by the output chain"), // NotPermitted
		good, // goes out
		datagram(at(vip4, 1), at(netip.MustParseAddr("192.0.2.1"), 1), "no way"), // Unreachable
		nil,           // Malformed
		good[:12],     // Malformed
		{0x50, 19: 0}, // Malformed
		options,       // Malformed: EINVAL
		datagram(at(vip6, 1), at(server6, 5000), long),                                  // TooBig
		datagram(at(vip6, 1), at(server6, 9), "x"),                                      // NotPermitted
		datagram(at(vip6, 1), at(netip.MustParseAddr("2001:db8:ffff::1"), 1), "no way"), // Unreachable
		datagram(at(vip6, 1), at(server6, 5000), "good"),
	})
	st := e.Stats()
	if sent != 2 || err != nil || st.Sent != 2 || st.TooBig != 2 || st.NotPermitted != 2 || st.Unreachable != 2 ||
		st.Malformed != 4 || st.Failed() != 10 || st.LastMTU != 1500 || st.LastErrno == 0 {
		t.Errorf("sent %d: %v, %+v", sent, err, st)
	}
	if want := fmt.Sprint([]string{server4.String() + " 1500", server6.String() + " 1500"}); fmt.Sprint(limits) != want {
		t.Errorf("limits told: %v, want %v", limits, want)
	}
	// A path MTU below the device's: no report, but counted just the same.
	h := l.handle(l.router)
	defer h.Close()
	_, to, err := net.ParseCIDR(server4.String() + "/32")
	l.must(err)
	rs, err := h.LinkByName("rs")
	l.must(err)
	l.must(h.RouteAdd(&netlink.Route{LinkIndex: rs.Attrs().Index, Dst: to, MTU: 1400}))
	sent, err = e.Send([][]byte{
		datagram(at(vip4, 1), at(server4, 5000), long[:1400]),
		datagram(at(vip4, 1), at(server4, 5000), long[:1372]),
	})
	if st := e.Stats(); sent != 1 || err != nil || st.TooBig != 3 || len(limits) != 2 {
		t.Errorf("with a path MTU sent %d: %v, %+v, %v", sent, err, st, limits)
	}
	e.Close()
	e.Close()
	if _, err := e.Send(nil); !errors.Is(err, divert.ErrClosed) {
		t.Errorf("Send after Close: %v", err)
	}
}
