// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/florianl/go-nfqueue/v2"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	fin, syn, rst, psh, ackFlag = 1, 2, 4, 8, 16

	hookInput, hookForward = 1, 2
)

// tcpPacket is an IPv4 or IPv6 packet with a TCP segment, checksums included.
func tcpPacket(src, dst netip.AddrPort, flags byte, data string) []byte {
	seg := make([]byte, 20, 20+len(data))
	be := binary.BigEndian
	be.PutUint16(seg[0:], src.Port())
	be.PutUint16(seg[2:], dst.Port())
	be.PutUint32(seg[4:], 1000)
	if flags&ackFlag != 0 {
		be.PutUint32(seg[8:], 2000)
	}
	seg[12], seg[13] = 5<<4, flags
	be.PutUint16(seg[14:], 65535)
	seg = append(seg, data...)
	return ipPacket(src.Addr(), dst.Addr(), unix.IPPROTO_TCP, seg, 16)
}

// icmpError says "too big" to dst, about a packet with these ends.
func icmpTooBig(src, dst netip.Addr, innerSrc, innerDst netip.AddrPort, innerProto byte) []byte {
	inner := tcpPacket(innerSrc, innerDst, ackFlag, "xxxx")
	msg := make([]byte, 8)
	proto := byte(unix.IPPROTO_ICMP)
	if dst.Is4() {
		inner[9] = innerProto
		msg[0], msg[1] = 3, 4
		binary.BigEndian.PutUint16(msg[6:], 1280)
	} else {
		inner[6] = innerProto
		proto = unix.IPPROTO_ICMPV6
		msg[0] = 2
		binary.BigEndian.PutUint32(msg[4:], 1280)
	}
	return ipPacket(src, dst, proto, append(msg, inner...), 2)
}

// ipPacket puts a header before the payload, and the checksum at sumAt of it.
func ipPacket(src, dst netip.Addr, proto byte, payload []byte, sumAt int) []byte {
	be := binary.BigEndian
	var head []byte
	var sum uint32
	if proto != unix.IPPROTO_ICMP {
		sum = add(add(uint32(proto)+uint32(len(payload)), src.AsSlice()), dst.AsSlice())
	}
	be.PutUint16(payload[sumAt:], 0)
	be.PutUint16(payload[sumAt:], ^fold(add(sum, payload)))
	if src.Is4() {
		head = make([]byte, 20)
		head[0], head[8], head[9] = 0x45, 64, proto
		be.PutUint16(head[2:], uint16(20+len(payload)))
		copy(head[12:], src.AsSlice())
		copy(head[16:], dst.AsSlice())
		be.PutUint16(head[10:], ^fold(add(0, head)))
	} else {
		head = make([]byte, 40)
		head[0], head[6], head[7] = 0x60, proto, 64
		be.PutUint16(head[4:], uint16(len(payload)))
		copy(head[8:], src.AsSlice())
		copy(head[24:], dst.AsSlice())
	}
	return append(head, payload...)
}

func add(sum uint32, b []byte) uint32 {
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	return sum
}

func fold(sum uint32) uint16 {
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// fragments cuts a packet in two behind n bytes of its payload, n a multiple
// of 8.
func fragments(p []byte, n int) [][]byte {
	be := binary.BigEndian
	cut := func(offset int, more bool, part []byte) []byte {
		field := uint16(offset)
		if p[0]>>4 == 4 {
			field = uint16(offset / 8)
			if more {
				field |= 0x2000
			}
			h := append([]byte(nil), p[:20]...)
			be.PutUint16(h[2:], uint16(20+len(part)))
			be.PutUint16(h[4:], 77)
			be.PutUint16(h[6:], field)
			be.PutUint16(h[10:], 0)
			be.PutUint16(h[10:], ^fold(add(0, h)))
			return append(h, part...)
		}
		if more {
			field |= 1
		}
		h := append([]byte(nil), p[:48]...)
		copy(h[40:], []byte{p[6], 0, byte(field >> 8), byte(field), 0, 0, 0, 77})
		h[6] = unix.IPPROTO_FRAGMENT
		be.PutUint16(h[4:], uint16(8+len(part)))
		return append(h, part...)
	}
	head := 20
	if p[0]>>4 == 6 {
		head = 40
	}
	body := p[head:]
	return [][]byte{cut(0, true, body[:n]), cut(n, false, body[n:])}
}

// send emits whole packets from a namespace, with a mark if not zero.
func (l *lab) send(t *testing.T, ns netns.NsHandle, mark int, packets ...[]byte) {
	t.Helper()
	l.in(t, ns, func() {
		if err := emit(mark, packets...); err != nil {
			t.Fatal(err)
		}
	})
}

func emit(mark int, packets ...[]byte) error {
	for _, p := range packets {
		family, sa := unix.AF_INET, unix.Sockaddr(nil)
		if p[0]>>4 == 4 {
			sa = &unix.SockaddrInet4{Addr: [4]byte(p[16:20])}
		} else {
			family, sa = unix.AF_INET6, &unix.SockaddrInet6{Addr: [16]byte(p[24:40])}
		}
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		if mark != 0 {
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark)
		}
		if err == nil {
			err = unix.Sendto(fd, p, 0, sa)
		}
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("sending %x: %w", p[:20], err)
		}
	}
	return nil
}

// queued is a packet that came to a queue.
type queued struct {
	queue uint16
	hook  uint8
	in    uint32 // the interface that it came in by
	mark  uint32
	data  []byte
}

// queues listens on queues and remembers what came.
type queues struct {
	mu   sync.Mutex
	seen []queued
}

// listen binds n queues from first. answer gives the verdict by the library's
// handle; nil drops everything, as the engine does with what it emits itself.
func listen(t *testing.T, first uint16, n int, answer func(q *nfqueue.Nfqueue, id uint32, data []byte)) *queues {
	t.Helper()
	qs := &queues{}
	for i := range n {
		num := first + uint16(i)
		q, err := nfqueue.Open(&nfqueue.Config{NfQueue: num, MaxPacketLen: 65535, MaxQueueLen: 4096, Copymode: nfqueue.NfQnlCopyPacket})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		err = q.RegisterWithErrorFunc(ctx, func(a nfqueue.Attribute) int {
			data := append([]byte(nil), *a.Payload...)
			if answer != nil {
				answer(q, *a.PacketID, data)
			} else if err := q.SetVerdict(*a.PacketID, nfqueue.NfDrop); err != nil {
				return 1
			}
			qs.mu.Lock()
			got := queued{queue: num, hook: *a.Hook, data: data}
			if a.InDev != nil {
				got.in = *a.InDev
			}
			if a.Mark != nil {
				got.mark = *a.Mark
			}
			qs.seen = append(qs.seen, got)
			qs.mu.Unlock()
			return 0
		}, func(error) int { return 0 })
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cancel()
			q.Close()
		})
	}
	return qs
}

func (q *queues) all() []queued {
	q.mu.Lock()
	defer q.mu.Unlock()
	return append([]queued(nil), q.seen...)
}

// wait waits until n packets came in all, and gives them.
func (q *queues) wait(t *testing.T, n int) []queued {
	t.Helper()
	eventually(t, fmt.Sprintf("%d packets in the queues", n), func() bool { return len(q.all()) >= n })
	all := q.all()
	if len(all) != n {
		t.Fatalf("%d packets in the queues, want %d", len(all), n)
	}
	return all
}

// resets is how many RSTs the namespace's own TCP has sent.
func resets(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(procNet + "/snmp")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if f[0] != "Tcp:" {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		for i, n := range names {
			if n == "OutRsts" {
				v, err := strconv.Atoi(f[i])
				if err != nil {
					t.Fatal(err)
				}
				return v
			}
		}
	}
	t.Fatal("no OutRsts in /proc/net/snmp")
	return 0
}

// counter reads one named counter.
func counter(t *testing.T, f *Firewall, name string) int {
	t.Helper()
	all, err := f.Counters()
	if err != nil {
		t.Fatal(err)
	}
	c, ok := all[name]
	if !ok {
		t.Fatalf("no counter %s in %v", name, all)
	}
	return int(c.Packets)
}

// counted waits for a counter's value.
func waitCounter(t *testing.T, f *Firewall, name string, want int) {
	t.Helper()
	eventually(t, fmt.Sprintf("counter %s is %d", name, want), func() bool { return counter(t, f, name) >= want })
	if got := counter(t, f, name); got != want {
		t.Fatalf("counter %s is %d, want %d", name, got, want)
	}
}

// tap receives the TCP segments that reach a namespace, as its sockets would.
func (l *lab) tap(t *testing.T, ns netns.NsHandle, is4 bool) func() [][]byte {
	t.Helper()
	family := unix.AF_INET6
	if is4 {
		family = unix.AF_INET
	}
	var fd int
	l.in(t, ns, func() {
		var err error
		if fd, err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { unix.Close(fd) })
	var got [][]byte
	return func() [][]byte {
		buf := make([]byte, 65536)
		for {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				return got
			}
			got = append(got, append([]byte(nil), buf[:n]...))
		}
	}
}
