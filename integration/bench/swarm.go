// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	be "encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"strconv"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/module/divert"
	"github.com/weirgate/weir/module/packet"
)

// This file is clients without sockets: packets with the addresses of a network
// that is routed to the client's namespace, whose kernel answers nothing by
// itself. A million connections take sixteen megabytes so, and what a request
// costs the driver does not depend on how many there are.

// swarmNet is the network of the clients; the namespace itself is outside of it.
var swarmNet = netip.MustParsePrefix("198.18.128.0/17")

const (
	// perAddress is how many clients share an address: fewer than a farm lets
	// one have as a rule.
	perAddress = 4000
	firstPort  = 10_000
	// mostAtOnce bounds the exchanges under way.
	mostAtOnce = 200
	// patience is how long an answer may take before the question is repeated:
	// longer than the server's kernel takes to repeat its own.
	patience = 300 * time.Millisecond
)

// swarmClient is one connection.
type swarmClient struct {
	seq, ack packet.Seq
	left     uint16 // bytes of the response that are still to come
	state    uint8
	slot     uint8 // of the exchange under way, from 1; 0: idle
}

// States of a swarmClient.
const (
	absent uint8 = iota
	opening
	opened
)

// underway is an exchange that waits for packets.
type underway struct {
	client int
	since  time.Time
}

// swarm is all clients of one rig. It is not safe for concurrent use, and
// belongs to a locked thread while it runs.
type swarm struct {
	out     *divert.Emitter
	fd      int    // sees what comes back
	ring    []byte // where the kernel puts that
	at      int    // next frame of the ring
	vip     packet.Endpoint
	base    uint32 // first address
	clients []swarmClient
	request []byte
	size    uint16 // bytes of a response, head included; 0: not known yet

	pkts [][]byte // that are still to be sent; their memory is used again
	n    int

	slots   []underway
	next    func() (client int, ok bool) // whose turn it is
	busy    int                          // slots in use
	done    uint64                       // exchanges
	repeats uint64                       // questions that were asked again
	again   uint64                       // segments that had been received before, or that came too early
	err     error
}

const (
	ringFrame  = 2048
	ringFrames = 8192
	ringBlock  = 1 << 20
)

func newSwarm(r *rig, n int) (s *swarm, err error) {
	if err := r.router.AddRoute(swarmNet, r.sources[0]); err != nil {
		return nil, err
	}
	b := swarmNet.Addr().As4()
	s = &swarm{
		fd: -1, vip: packet.EndpointFrom(r.vip), base: be.BigEndian.Uint32(b[:]) + 1, clients: make([]swarmClient, n),
		request: fmt.Appendf(nil, "GET /%d.bin HTTP/1.1\r\nHost: %s\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n", kilo, r.vip),
		pkts:    make([][]byte, 64),
	}
	for i := range s.pkts {
		s.pkts[i] = make([]byte, 0, ringFrame)
	}
	err = r.client.Do(func() (err error) {
		if s.out, err = divert.OpenEmitter(0); err != nil {
			return err
		}
		return s.listen()
	})
	if err != nil {
		s.close()
		return nil, fmt.Errorf("clients without sockets: %w", err)
	}
	return s, nil
}

// listen opens the socket that sees what comes for swarmNet.
func (s *swarm) listen() (err error) {
	proto := uint16(unix.ETH_P_IP)
	if s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	// The destination of an IPv4 packet is at 16; the mask is that of a /17.
	mask := ^uint32(0) << (32 - swarmNet.Bits())
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 16},
		{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: mask},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: (s.base - 1) & mask, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 1 << 16},
		{Code: unix.BPF_RET | unix.BPF_K},
	}
	if err := unix.SetsockoptSockFprog(s.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(s.fd, unix.SOL_PACKET, unix.PACKET_VERSION, unix.TPACKET_V2); err != nil {
		return err
	}
	const size = ringFrame * ringFrames
	req := unix.TpacketReq{Block_size: ringBlock, Block_nr: size / ringBlock, Frame_size: ringFrame, Frame_nr: ringFrames}
	if err := unix.SetsockoptTpacketReq(s.fd, unix.SOL_PACKET, unix.PACKET_RX_RING, &req); err != nil {
		return err
	}
	if s.ring, err = unix.Mmap(s.fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return err
	}
	return unix.Bind(s.fd, &unix.SockaddrLinklayer{Protocol: proto<<8 | proto>>8})
}

func (s *swarm) close() {
	if s.out != nil {
		s.out.Close()
	}
	if s.ring != nil {
		_ = unix.Munmap(s.ring)
	}
	if s.fd >= 0 {
		_ = unix.Close(s.fd)
	}
}

// end is the address and port of a client, index the client of an end, -1 if it
// is nobody's.
func (s *swarm) end(i int) packet.Endpoint {
	var a [4]byte
	be.BigEndian.PutUint32(a[:], s.base+uint32(i/perAddress))
	return packet.Endpoint{Addr: packet.AddrFrom(netip.AddrFrom4(a)), Port: uint16(firstPort + i%perAddress)}
}

func (s *swarm) index(e packet.Endpoint) int {
	host, port := int(int32(be.BigEndian.Uint32(e.Addr[12:])-s.base)), int(e.Port)-firstPort
	i := host*perAddress + port
	if host < 0 || port < 0 || port >= perAddress || i >= len(s.clients) {
		return -1
	}
	return i
}

func (s *swarm) put(seg packet.Segment, data []byte) {
	if s.n == len(s.pkts) {
		s.flush()
	}
	seg.Dst, seg.Window = s.vip, 1000
	s.pkts[s.n] = packet.AppendSegment(s.pkts[s.n][:0], &seg, data)
	s.n++
}

// flush sends what was put. What cannot be sent is lost, and will be repeated.
func (s *swarm) flush() {
	_, err := s.out.Send(s.pkts[:s.n])
	s.err = errors.Join(s.err, err)
	s.n = 0
}

var swarmOptions = packet.AppendSYNOptions(nil, packet.SYNOptions{MSS: 1460, WindowScale: 7, SACKPermitted: true})

func (s *swarm) connect(i int) {
	s.clients[i].state = opening
	s.put(packet.Segment{Src: s.end(i), Seq: packet.Seq(i * 1000), Flags: packet.SYN, Options: swarmOptions}, nil)
}

// ask sends a request, or repeats it.
func (s *swarm) ask(i int) {
	c := &s.clients[i]
	s.put(packet.Segment{Src: s.end(i), Seq: c.seq, Ack: c.ack, Flags: packet.ACK | packet.PSH}, s.request)
}

func (s *swarm) acknowledge(i int) {
	c := &s.clients[i]
	seq := c.seq
	if c.slot != 0 {
		seq = seq.Add(packet.Size(len(s.request))) // the request under way
	}
	s.put(packet.Segment{Src: s.end(i), Seq: seq, Ack: c.ack, Flags: packet.ACK}, nil)
}

// begin gives a slot to whoever's turn it is.
func (s *swarm) begin(slot int, now time.Time) {
	i, ok := s.next()
	if !ok {
		return
	}
	c := &s.clients[i]
	c.slot, c.left = uint8(slot+1), s.size
	s.slots[slot] = underway{i, now}
	s.busy++
	if c.state == absent {
		s.connect(i)
		return
	}
	s.ask(i)
}

// handle goes on with the connection that a packet belongs to.
func (s *swarm) handle(b []byte, now time.Time) {
	p, problem := packet.ParseTCP(b)
	if problem != packet.OK || p.Src() != s.vip {
		return
	}
	i := s.index(p.Dst())
	if i < 0 {
		return
	}
	c := &s.clients[i]
	n := p.PayloadLen()
	switch f := p.Flags(); {
	case f&(packet.RST|packet.FIN) != 0:
		s.fail("client %d: %v", i, f)
	case f.Has(packet.SYN | packet.ACK):
		if c.state == opening {
			c.state, c.seq, c.ack = opened, p.Ack(), p.Seq().Add(1)
			s.ask(i)
		}
	case n == 0:
	case c.slot == 0 || c.state != opened || p.Seq() != c.ack:
		s.again++
		s.acknowledge(i)
	default:
		if s.size == 0 {
			if s.size = whole(p.Payload()); s.size == 0 {
				s.fail("client %d: no response: %.200q", i, p.Payload())
				return
			}
		}
		if c.left == 0 {
			c.left = s.size // the very first
		}
		if n > int(c.left) || !bytes.HasPrefix(p.Payload(), good) && c.left == s.size {
			s.fail("client %d: no response, or %d bytes too many: %.200q", i, n-int(c.left), p.Payload())
			return
		}
		c.ack, c.left = c.ack.Add(packet.Size(n)), c.left-uint16(n)
		s.acknowledge(i)
		if c.left > 0 {
			return
		}
		c.seq = c.seq.Add(packet.Size(len(s.request)))
		slot := int(c.slot) - 1
		c.slot = 0
		s.busy--
		s.done++
		s.begin(slot, now)
	}
}

var good = []byte("HTTP/1.1 200 ")

// whole is the size of a response, head and body, by its first segment; 0 if
// that does not tell.
func whole(b []byte) uint16 {
	head, _, ok := bytes.Cut(b, []byte("\r\n\r\n"))
	_, length, ok2 := bytes.Cut(head, []byte("\r\nContent-Length: "))
	length, _, _ = bytes.Cut(length, []byte("\r\n"))
	n, err := strconv.Atoi(string(length))
	if !ok || !ok2 || err != nil || n < 0 || len(head)+4+n > 1<<15 {
		return 0
	}
	return uint16(len(head) + 4 + n)
}

func (s *swarm) fail(format string, args ...any) {
	if s.err == nil {
		s.err = fmt.Errorf("clients without sockets: "+format, args...)
	}
}

// receive handles what is in the ring and returns how many packets that was.
func (s *swarm) receive(now time.Time) (n int) {
	for n < ringFrames {
		f := s.ring[s.at*ringFrame : (s.at+1)*ringFrame]
		h := (*unix.Tpacket2Hdr)(unsafe.Pointer(&f[0]))
		if atomic.LoadUint32(&h.Status)&unix.TP_STATUS_USER == 0 {
			break
		}
		s.handle(f[h.Net:min(int(h.Net)+int(h.Snaplen), ringFrame)], now)
		atomic.StoreUint32(&h.Status, unix.TP_STATUS_KERNEL)
		s.at = (s.at + 1) % ringFrames
		n++
	}
	return n
}

// repeat asks again where no answer came.
func (s *swarm) repeat(now time.Time) {
	for k := range s.slots {
		u := &s.slots[k]
		c := &s.clients[u.client]
		if int(c.slot) != k+1 || now.Sub(u.since) < patience {
			continue
		}
		u.since = now
		s.repeats++
		switch {
		case c.state == opening:
			s.connect(u.client)
		case c.left == s.size:
			s.ask(u.client)
		default:
			s.acknowledge(u.client)
		}
	}
}

// run has so many exchanges under way at once until next ends them, and then
// waits until each is complete.
func (s *swarm) run(ctx context.Context, atOnce int, next func() (int, bool)) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	s.slots, s.next, s.busy = make([]underway, min(atOnce, mostAtOnce)), next, 0
	now := time.Now()
	s.receive(now) // what is left from before
	for k := range s.slots {
		s.begin(k, now)
	}
	looked, heard := now, now
	for s.busy > 0 && s.err == nil {
		n := s.receive(now)
		s.flush()
		if n == 0 {
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}, 10)
			if err != nil && err != unix.EINTR {
				return err
			}
		}
		now = time.Now()
		if n > 0 {
			heard = now
		}
		if now.Sub(looked) > 50*time.Millisecond {
			looked = now
			s.repeat(now)
			if now.Sub(heard) > 10*time.Second {
				s.fail("nothing comes back")
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
	}
	s.flush()
	return s.err
}

// open opens the connections and has each ask once. The very first one tells
// what a response is like.
func (s *swarm) open(ctx context.Context) error {
	i := 0
	upTo := func(end int) func() (int, bool) {
		return func() (int, bool) {
			if i == end {
				return 0, false
			}
			i++
			return i - 1, true
		}
	}
	if err := s.run(ctx, 1, upTo(1)); err != nil {
		return err
	}
	return s.run(ctx, 128, upTo(len(s.clients)))
}
