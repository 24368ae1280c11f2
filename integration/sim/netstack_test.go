// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	gheader "gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	gtcp "gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/packet"
)

// machine is a netstack host.
type machine struct {
	stack *stack.Stack
	link  *channel.Endpoint
}

func newMachine(t *testing.T, a netip.Addr) *machine {
	t.Helper()
	m := &machine{
		stack: stack.New(stack.Options{
			NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
			TransportProtocols: []stack.TransportProtocolFactory{gtcp.NewProtocol},
		}),
		link: channel.New(4096, 1500, ""),
	}
	// With RACK netstack can be left without any timer: a tail loss probe that
	// comes after a timeout arms none where it counts nothing as outstanding.
	recovery := tcpip.TCPRecovery(0)
	if err := m.stack.SetTransportProtocolOption(gtcp.ProtocolNumber, &recovery); err != nil {
		t.Fatal(err)
	}
	if err := m.stack.CreateNIC(1, m.link); err != nil {
		t.Fatal(err)
	}
	addr := tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(a.As4()), PrefixLen: 24},
	}
	if err := m.stack.AddProtocolAddress(1, addr, stack.AddressProperties{}); err != nil {
		t.Fatal(err)
	}
	m.stack.SetRouteTable([]tcpip.Route{{Destination: gheader.IPv4EmptySubnet, NIC: 1}})
	return m
}

func (m *machine) inject(b []byte) {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(append([]byte(nil), b...))})
	m.link.InjectInbound(ipv4.ProtocolNumber, pkt)
	pkt.DecRef()
}

// WriteNotify implements channel.Notification for the router.
type notice struct{ c chan struct{} }

func (n *notice) WriteNotify() {
	select {
	case n.c <- struct{}{}:
	default:
	}
}

// router is the engine between netstack hosts, in real time.
type router struct {
	h       *hands
	hosts   map[packet.Addr]*machine
	loss    float64
	rnd     *rand.Rand
	wake    *notice
	start   time.Time
	packets int
	spoil   func(p *packet.TCP) // a negative control tampers with what leaves
}

func (r *router) run(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	for {
		now := startTime + int64(time.Since(r.start))
		for _, m := range r.hosts {
			for p := m.link.Read(); p != nil; p = m.link.Read() {
				r.step(now, append([]byte(nil), p.ToView().AsSlice()...))
				p.DecRef()
			}
		}
		if due := r.h.eng.NextDue(); due != 0 {
			if due <= now {
				r.h.out.Reset()
				r.h.eng.Step(now, &engine.Event{Kind: engine.Tick}, &r.h.out)
				r.deliver(nil)
			}
			timer.Reset(time.Duration(max(due-now, 1)))
		}
		select {
		case <-ctx.Done():
			return
		case <-r.wake.c:
		case <-timer.C:
		}
	}
}

func (r *router) step(now int64, b []byte) {
	r.packets++
	if r.rnd.Float64() < r.loss {
		return
	}
	p, problem := packet.ParseTCP(b)
	if problem != packet.OK {
		return
	}
	r.h.out.Reset()
	if p.Flags()&(packet.SYN|packet.ACK) == packet.SYN {
		r.h.hs.SYN(now, b, packet.ChecksumUnknown, &r.h.out)
		r.deliver(nil)
		return
	}
	ev := engine.Event{Kind: engine.Packet, Data: b}
	r.h.eng.Step(now, &ev, &r.h.out)
	r.deliver(&ev)
}

func (r *router) deliver(ev *engine.Event) {
	send := func(b []byte) {
		p, _ := packet.ParseTCP(b)
		if r.spoil != nil {
			r.spoil(&p)
		}
		if m := r.hosts[p.Dst().Addr]; m != nil && r.rnd.Float64() >= r.loss {
			m.inject(b)
		}
	}
	for i := range r.h.out.Len() {
		send(r.h.out.Packet(i))
	}
	if ev != nil && ev.Verdict == engine.Rewrite {
		send(ev.Data)
	}
}

// TestNetstackExchanges: net/http on netstack at both ends, a TCP and an HTTP
// that are nobody's model, with and without loss. Netstack's goroutines make it
// real time, so it is a small number. The control: a response of which one byte
// is changed, with a right checksum, is found out.
func TestNetstackExchanges(t *testing.T) {
	seed := seedOf(t)
	for _, loss := range []float64{0, 0.01} {
		for _, trouble := range netstackExchanges(t, seed, loss, nil) {
			t.Error(trouble)
		}
	}
	n := 0
	spoilt := netstackExchanges(t, seed, 0, func(p *packet.TCP) {
		if b := p.Payload(); p.Src() == packet.EndpointFrom(vip4) && len(b) > 200 {
			if n++; n == 20 {
				b[len(b)-1] ^= 1
				p.FillChecksum()
			}
		}
	})
	if len(spoilt) == 0 {
		t.Error("a changed byte is not found")
	}
}

// netstackExchanges makes some exchanges and returns what went wrong.
func netstackExchanges(t *testing.T, seed uint64, loss float64, spoil func(*packet.TCP)) (trouble []string) {
	t.Helper()
	var lock sync.Mutex
	wrong := func(format string, args ...any) {
		lock.Lock()
		defer lock.Unlock()
		trouble = append(trouble, fmt.Sprintf(format, args...))
	}
	r := &router{
		h: newHands(), hosts: map[packet.Addr]*machine{}, loss: loss, rnd: rand.New(rand.NewPCG(seed, 1)),
		wake: &notice{make(chan struct{}, 1)}, start: time.Now(), spoil: spoil,
	}
	client, server := newMachine(t, clientAddr(false, 0)), newMachine(t, serverAddr(false, 0).Addr())
	for a, m := range map[netip.Addr]*machine{clientAddr(false, 0): client, serverAddr(false, 0).Addr(): server} {
		r.hosts[packet.AddrFrom(a)] = m
		m.link.AddNotify(r.wake)
	}
	ctx, stop := context.WithCancel(context.Background())
	var router sync.WaitGroup
	router.Go(func() { r.run(ctx) })

	l, err := gonet.ListenTCP(server.stack, tcpip.FullAddress{NIC: 1, Port: 80}, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	seen := map[string]int{}
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		nonce := q.Header.Get("X-Nonce")
		mu.Lock()
		seen[nonce]++
		mu.Unlock()
		w.Header().Set("X-Nonce", nonce)
		body, _ := io.ReadAll(q.Body)
		fmt.Fprintf(w, "%s %d ", nonce, len(body))
		w.Write(bytes.Repeat([]byte(nonce), int(nonce[0])*8))
		w.Write(body)
	})}
	go web.Serve(l)

	transport := &http.Transport{MaxIdleConnsPerHost: 4, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return gonet.DialContextTCP(ctx, client.stack, tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFrom4(vip4.Addr().As4()), Port: vip4.Port()}, ipv4.ProtocolNumber)
	}}
	browser := &http.Client{Transport: transport, Timeout: 60 * time.Second}
	var group sync.WaitGroup
	for k := range 8 {
		rnd := rand.New(rand.NewPCG(seed, uint64(k)+10))
		group.Go(func() {
			for range 15 {
				nonce := newNonce(rnd).String()
				method, body := http.MethodGet, []byte(nil)
				if rnd.IntN(2) == 0 {
					method, body = http.MethodPost, bytes.Repeat([]byte("b"), rnd.IntN(30_000))
				}
				q, _ := http.NewRequest(method, "http://weir.example/", bytes.NewReader(body))
				q.Header.Set("X-Nonce", nonce)
				q.Close = rnd.IntN(5) == 0
				resp, err := browser.Do(q)
				if err != nil {
					wrong("loss %v, %s: %v", loss, method, err)
					return
				}
				got, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				want := fmt.Sprintf("%s %d ", nonce, len(body)) + string(bytes.Repeat([]byte(nonce), int(nonce[0])*8)) + string(body)
				if err != nil || string(got) != want || resp.Header.Get("X-Nonce") != nonce {
					wrong("loss %v, %s: status %d, %d bytes, want %d, %v", loss, method, resp.StatusCode, len(got), len(want), err)
					return
				}
			}
		})
	}
	group.Wait()
	transport.CloseIdleConnections()
	web.Close()
	stop()
	router.Wait()
	for _, m := range r.hosts {
		m.stack.Close()
	}
	mu.Lock()
	for n, k := range seen {
		if k != 1 {
			wrong("request %s was executed %d times", n, k)
		}
	}
	t.Logf("loss %v: %d exchanges, %d packets", loss, len(seen), r.packets)
	mu.Unlock()
	return trouble
}
