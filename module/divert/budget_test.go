// SPDX-License-Identifier: Apache-2.0

package divert_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module/divert"
)

// flooder sends equal datagrams from the client without allocating.
type flooder struct {
	fd   int
	name unix.RawSockaddrInet4
	iov  [64]unix.Iovec
	msgs [64]unix.Mmsghdr
}

func (l *lab) flooder(to netip.AddrPort, size int) *flooder {
	l.t.Helper()
	f := &flooder{fd: -1}
	l.in(l.client, func() {
		var err error
		f.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		l.must(err)
	})
	l.t.Cleanup(func() { _ = unix.Close(f.fd) })
	l.must(unix.SetsockoptInt(f.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 64<<20))
	f.name = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: to.Addr().As4()}
	port := (*[2]byte)(unsafe.Pointer(&f.name.Port))
	port[0], port[1] = byte(to.Port()>>8), byte(to.Port())
	b := make([]byte, size)
	for i := range f.msgs {
		f.iov[i].Base = &b[0]
		f.iov[i].SetLen(len(b))
		h := &f.msgs[i].Hdr
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&f.name)), unix.SizeofSockaddrInet4
		h.Iov = &f.iov[i]
		h.SetIovlen(1)
	}
	return f
}

// send sends n datagrams. They are in the router's queue when it returns,
// because a veth pair hands them over on the sender's processor.
func (f *flooder) send(n int) bool {
	for n > 0 {
		r, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(f.fd), uintptr(unsafe.Pointer(&f.msgs[0])),
			uintptr(min(n, len(f.msgs))), 0, 0, 0)
		if errno != 0 && errno != unix.EINTR {
			return false
		}
		if errno == 0 {
			n -= int(r)
		}
	}
	return true
}

// drain answers packets until none comes for a while. It returns their number.
func drain(q divert.Queue, pkts []divert.Packet, handle func(*divert.Packet)) (total int) {
	for {
		n, err := q.Receive(pkts, 20*time.Millisecond)
		if n == 0 || err != nil {
			return total
		}
		for i := range pkts[:n] {
			handle(&pkts[i])
		}
		if q.Send(pkts[:n]) != nil {
			return total
		}
		total += n
	}
}

// TestNoAllocation pushes a million packets through the batched queue: a mix of
// all verdicts, filled while nobody reads and measured while nobody sends.
func TestNoAllocation(t *testing.T) {
	require.NFQueue(t)
	packets := 1_000_000
	if testing.Short() {
		packets = 50_000
	}
	const chunk = 4096
	l := newLab(t)
	l.queueRule()
	q := l.open(divert.OpenBatched, divert.Config{})
	f := l.flooder(at(vip4, 80), 64)
	x := newTranslator(false)
	pkts := make([]divert.Packet, 64)
	kind := 0
	handle := func(p *divert.Packet) {
		switch kind++; kind % 16 {
		case 1, 2, 3:
			p.Verdict = divert.Drop
		case 4:
			p.Verdict = divert.Accept
		case 5:
			p.Verdict = divert.AcceptMarked
		default:
			x.handle(p)
		}
	}
	total, rounds := 0, 0
	least, sum := ^uint64(0), uint64(0)
	var before, after runtime.MemStats
	for total < packets {
		if !f.send(chunk) {
			t.Fatal("the client could not send")
		}
		runtime.ReadMemStats(&before)
		n := drain(q, pkts, handle)
		runtime.ReadMemStats(&after)
		if n == 0 {
			t.Fatalf("no packets came: %+v", q.Stats())
		}
		least = min(least, after.Mallocs-before.Mallocs)
		sum += after.Mallocs - before.Mallocs
		total += n
		rounds++
	}
	t.Logf("%d packets in %d rounds: %d allocations in all, least %d in a round; %+v", total, rounds, sum, least, q.Stats())
	// The runtime itself allocates now and then; a packet's share would show
	// in every round.
	if least != 0 || sum > uint64(total)/1000 {
		t.Errorf("%d allocations over %d packets, at least %d in each round of %d", sum, total, least, chunk)
	}
}

// TestNoAllocationEmit does the same for emission.
func TestNoAllocationEmit(t *testing.T) {
	require.NFQueue(t)
	l := newLab(t)
	e := l.emitter()
	var pkts [][]byte
	for i := range 100 {
		pkts = append(pkts, datagram(at(vip4, uint16(i)), at(server4, 5000), "x"), datagram(at(vip6, uint16(i)), at(server6, 5000), "x"))
		if i%10 == 0 {
			pkts = append(pkts, datagram(at(vip4, 1), at(server4, 1), string(make([]byte, 1600)))) // too big
		}
	}
	least := testing.AllocsPerRun(1, func() {})
	for i := range 10 {
		n := testing.AllocsPerRun(20, func() {
			if _, err := e.Send(pkts); err != nil {
				t.Error(err)
			}
		})
		if i == 0 || n < least {
			least = n
		}
	}
	if least != 0 {
		t.Errorf("%v allocations per run", least)
	}
	if st := e.Stats(); st.Sent == 0 || st.TooBig == 0 {
		t.Errorf("counters: %+v", st)
	}
}

// BenchmarkForward moves datagrams through the queue, rewritten. Filling the
// queue is not measured; one operation is one packet.
func BenchmarkForward(b *testing.B) {
	for _, backend := range backends {
		for _, size := range []int{64, 1400} {
			b.Run(fmt.Sprintf("%s/%d", backend.name, size), func(b *testing.B) {
				l := newLab(b)
				l.queueRule()
				q := l.open(backend.open, divert.Config{})
				f := l.flooder(at(vip4, 80), size)
				x := newTranslator(false)
				pkts := make([]divert.Packet, 64)
				b.ReportAllocs()
				for b.Loop() {
					b.StopTimer()
					if !f.send(4096) {
						b.Fatal("the client could not send")
					}
					b.StartTimer()
					for n := 0; n < 4096; {
						k, err := q.Receive(pkts, time.Second)
						if k == 0 || err != nil {
							b.Fatalf("received %d of 4096: %v, %+v", n, err, q.Stats())
						}
						for i := range pkts[:k] {
							x.handle(&pkts[i])
						}
						if err := q.Send(pkts[:k]); err != nil {
							b.Fatal(err)
						}
						n += k
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/4096, "ns/packet")
			})
		}
	}
}

// startServer answers each 100 bytes it reads by 1 KiB, until the test ends.
func (l *lab) startServer(port uint16) {
	l.t.Helper()
	var ln net.Listener
	l.in(l.server, func() {
		var err error
		ln, err = net.Listen("tcp", at(server4, port).String())
		l.must(err)
	})
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			closer := context.AfterFunc(l.t.Context(), func() { _ = c.Close() })
			all.Go(func() {
				defer closer()
				defer c.Close()
				req, res := make([]byte, 100), make([]byte, 1024)
				for {
					if _, err := c.Read(req); err != nil {
						return
					}
					if _, err := c.Write(res); err != nil {
						return
					}
				}
			})
		}
	})
	l.t.Cleanup(func() {
		_ = ln.Close()
		all.Wait()
	})
}

// BenchmarkRequests measures requests of 100 bytes answered by 1 KiB over 32
// connections through the translation; one operation is one request.
func BenchmarkRequests(b *testing.B) {
	const conns = 32
	run := func(b *testing.B, l *lab, dst netip.AddrPort) {
		l.startServer(8080)
		cs := make([]net.Conn, conns)
		l.in(l.client, func() {
			for i := range cs {
				c, err := net.DialTimeout("tcp", dst.String(), 10*time.Second)
				l.must(err)
				cs[i] = c
			}
		})
		b.ResetTimer()
		each := b.N/conns + 1
		errs := make(chan error, conns)
		for _, c := range cs {
			go func() {
				errs <- func() error {
					req, res := make([]byte, 100), make([]byte, 1024)
					for range each {
						if _, err := c.Write(req); err != nil {
							return err
						}
						for n := 0; n < len(res); {
							k, err := c.Read(res)
							if err != nil {
								return err
							}
							n += k
						}
					}
					return nil
				}()
			}()
		}
		for range cs {
			l.must(<-errs)
		}
		b.StopTimer()
		for _, c := range cs {
			_ = c.Close()
		}
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "requests/s")
	}
	b.Run("direct", func(b *testing.B) {
		l := newLab(b)
		run(b, l, at(server4, 8080))
	})
	for _, backend := range backends {
		b.Run(backend.name, func(b *testing.B) {
			l := newLab(b)
			l.queueRule()
			q := l.open(backend.open, divert.Config{GSO: true})
			stop := l.serveLocked(q, 64, newTranslator(false).handle)
			run(b, l, at(vip4, 80))
			stop()
		})
	}
}

// serveLocked is serve on a thread of its own, as a shard runs.
func (l *lab) serveLocked(q divert.Queue, batch int, handle func(*divert.Packet)) (stop func()) {
	done := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(done)
		pkts := make([]divert.Packet, batch)
		for {
			n, err := q.Receive(pkts, time.Minute)
			if err != nil {
				return
			}
			for i := range pkts[:n] {
				handle(&pkts[i])
			}
			if q.Send(pkts[:n]) != nil {
				return
			}
		}
	}()
	return func() { _ = q.Close(); <-done }
}

// BenchmarkBulk downloads 64 MiB per operation through the translation.
func BenchmarkBulk(b *testing.B) {
	const size = 64 << 20
	run := func(b *testing.B, l *lab, dst netip.AddrPort) {
		var ln net.Listener
		l.in(l.server, func() {
			var err error
			ln, err = net.Listen("tcp", at(server4, 8080).String())
			l.must(err)
		})
		done := make(chan struct{})
		go func() {
			defer close(done)
			buf := make([]byte, 1<<20)
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				for n := 0; n < size; n += len(buf) {
					if _, err := c.Write(buf); err != nil {
						break
					}
				}
				_ = c.Close()
			}
		}()
		buf := make([]byte, 1<<20)
		b.SetBytes(size)
		b.ResetTimer()
		for range b.N {
			var c net.Conn
			l.in(l.client, func() {
				var err error
				c, err = net.DialTimeout("tcp", dst.String(), 10*time.Second)
				l.must(err)
			})
			n := 0
			for {
				k, err := c.Read(buf)
				n += k
				if err != nil {
					break
				}
			}
			_ = c.Close()
			if n != size {
				b.Fatalf("%d bytes instead of %d", n, size)
			}
		}
		b.StopTimer()
		_ = ln.Close()
		<-done
	}
	b.Run("direct", func(b *testing.B) {
		l := newLab(b)
		run(b, l, at(server4, 8080))
	})
	for _, backend := range backends {
		b.Run(backend.name, func(b *testing.B) {
			l := newLab(b)
			l.queueRule()
			q := l.open(backend.open, divert.Config{GSO: true})
			stop := l.serveLocked(q, 64, newTranslator(false).handle)
			run(b, l, at(vip4, 80))
			stop()
		})
	}
}
