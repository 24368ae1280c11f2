// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"bytes"
	"container/heap"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	gtcp "gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/weirgate/weir/module/packet"
)

// newStack makes a netstack host with the address of right.
func newStack(t *testing.T) (*stack.Stack, *channel.Endpoint) {
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{gtcp.NewProtocol},
	})
	// With RACK netstack can be left without any timer: a tail loss probe that
	// comes after a timeout arms none where it counts nothing as outstanding.
	recovery := tcpip.TCPRecovery(0)
	if err := s.SetTransportProtocolOption(gtcp.ProtocolNumber, &recovery); err != nil {
		t.Error(err)
	}
	link := channel.New(4096, 1500, "")
	if err := s.CreateNIC(1, link); err != nil {
		t.Error(err)
	}
	addr := tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(right.Addr().As4()), PrefixLen: 24},
	}
	if err := s.AddProtocolAddress(1, addr, stack.AddressProperties{}); err != nil {
		t.Error(err)
	}
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 1}})
	return s, link
}

// notice tells that netstack has written packets.
type notice struct{ c chan struct{} }

// WriteNotify implements channel.Notification.
func (n *notice) WriteNotify() {
	select {
	case n.c <- struct{}{}:
	default:
	}
}

// patience is the real time after which a run is taken for hung.
const patience = 100 * time.Second

// against runs one connection between the model and netstack and says what is
// wrong. dial says that netstack opens it.
func against(t *testing.T, seed uint64, dial bool) (wrong string) {
	r := rand.New(rand.NewPCG(seed, 3))
	w := newPair(t, seed, []float64{0, 0.02, 0.05}[r.IntN(3)])
	start := time.Now()
	s, link := newStack(t)
	defer func() {
		s.Close()
		s.Wait()
	}()
	random := func() []byte {
		b := make([]byte, r.IntN(1<<uint(4+r.IntN(14))))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return b
	}
	opt := randomOptions(r)
	opt.GSO = 0 // a channel has an MTU
	if opt.MSS > 1460 {
		opt.MSS = 1460
	}
	u := &user{w: w, send: random(), slow: r.IntN(4) == 0}
	theirs := random()

	host := w.host(left)
	ends := tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFrom4(right.Addr().As4()), Port: right.Port()}
	var got []byte
	done := make(chan error, 1)
	serve := func(c net.Conn, err error) {
		if err != nil {
			done <- err
			return
		}
		read := make(chan error, 1)
		go func() {
			var err error
			got, err = io.ReadAll(c)
			read <- err
		}()
		_, err = c.Write(theirs)
		if err == nil {
			err = c.(*gonet.TCPConn).CloseWrite()
		}
		if e := <-read; err == nil {
			err = e
		}
		c.Close()
		done <- err
	}
	if dial {
		host.Listen(packet.EndpointFrom(left), func(packet.Endpoint) (Options, App, bool) { return opt, u, true })
		go func() {
			serve(gonet.DialTCP(s, tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFrom4(left.Addr().As4()), Port: left.Port()}, ipv4.ProtocolNumber))
		}()
	} else {
		l, err := gonet.ListenTCP(s, ends, ipv4.ProtocolNumber)
		if err != nil {
			return err.Error()
		}
		defer l.Close()
		go func() { serve(l.Accept()) }()
		host.Dial(packet.EndpointFrom(left), packet.EndpointFrom(right), opt, u)
	}
	// Packets for netstack go into its link, others to the model.
	w.other = func(b []byte) {
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
		link.InjectInbound(ipv4.ProtocolNumber, pkt)
		pkt.DecRef()
	}
	var err error
	finished := false
	wake := &notice{make(chan struct{}, 1)}
	handle := link.AddNotify(wake)
	defer link.RemoveNotify(handle)
	timer := time.NewTimer(0)
	for time.Since(start) < patience && err == nil && !(finished && u.closed) {
		select {
		case <-wake.c:
		case <-timer.C:
		case err = <-done:
			finished = true
		}
		w.now = second + int64(time.Since(start))
		for p := link.Read(); p != nil; p = link.Read() {
			b := append([]byte(nil), p.ToView().AsSlice()...)
			p.DecRef()
			w.carry(b)
		}
		for len(w.q) > 0 && w.q[0].at <= w.now {
			heap.Pop(&w.q).(event).do()
		}
		next := patience - time.Since(start)
		if len(w.q) > 0 {
			next = min(next, time.Duration(w.q[0].at-w.now))
		}
		timer.Reset(max(next, 1))
	}
	switch {
	case err != nil:
		return fmt.Sprintf("netstack: %v", err)
	case !bytes.Equal(got, u.send) || !bytes.Equal(u.got, theirs):
		return fmt.Sprintf("%d of %d and %d of %d bytes arrived", len(got), len(u.send), len(u.got), len(theirs))
	case !u.closed || u.why != nil || !finished:
		return fmt.Sprintf("closed %v, %v; netstack %v", u.closed, u.why, finished)
	}
	return ""
}

// TestAgainstNetstack: the model and netstack, a TCP that is nobody's model,
// exchange random bytes over a bad wire; everything arrives and both ends close
// in order. Netstack has goroutines of its own and parks them where a
// testing/synctest bubble does not see it, so this runs in real time, many
// connections at once, and a seed repeats the bytes and the habits only.
func TestAgainstNetstack(t *testing.T) {
	base, n := seedOf(t), 40
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() {
			if wrong := against(t, base+uint64(i), i%2 == 1); wrong != "" {
				t.Errorf("WEIR_SEED=%d, netstack dials %v: %s", base+uint64(i), i%2 == 1, wrong)
			}
		})
	}
	group.Wait()
}
