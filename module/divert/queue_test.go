// SPDX-License-Identifier: Apache-2.0

package divert_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module/divert"
	"github.com/weirgate/weir/module/packet"
)

type opener = func(divert.Config) (divert.Queue, error)

// families are the addresses of both IP versions.
var families = []struct {
	name                      string
	client, vip, snip, server netip.Addr
}{
	{"ipv4", client4, vip4, snip4, server4},
	{"ipv6", client6, vip6, snip6, server6},
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// TestVerdicts sends numbered datagrams, answers each in its own way and looks
// at what arrives.
func TestVerdicts(t *testing.T) {
	both(t, func(t *testing.T, open opener) {
		for _, f := range families {
			t.Run(f.name, func(t *testing.T) {
				l := newLab(t)
				marked := l.queueRule()
				q := l.open(open, divert.Config{GSO: true})
				c := l.udp(l.client, at(f.client, 4000))
				s := l.udp(l.server, at(f.server, 5000))
				vip := at(f.vip, 80)
				l.sendUDP(c, at(f.server, 5000), []byte("accepted"))
				l.sendUDP(c, at(f.server, 5000), []byte("dropped"))
				l.sendUDP(c, at(f.server, 5000), []byte("accepted with a mark"))
				l.sendUDP(c, vip, []byte("to be rewritten"))
				l.sendUDP(c, vip, []byte("to be grown"))
				l.sendUDP(c, vip, []byte("to be shortened"))
				l.sendUDP(c, vip, []byte("dropped"))
				l.sendUDP(c, vip, []byte("to be put elsewhere"))
				l.waiting(q, 8)
				last := uint32(0)
				l.answer(q, 8, func(i int, p *divert.Packet) {
					h, ok := parse(p.Data)
					if !ok || p.GSO || p.Truncated || p.InIf == 0 || p.Mark != 0 {
						t.Fatalf("packet %d: %+v", i, p)
					}
					if p.ID <= last {
						t.Errorf("packet %d has id %d after %d", i, p.ID, last)
					}
					last = p.ID
					if p.Checksum != packet.ChecksumPartial {
						t.Errorf("packet %d: checksum is %v", i, p.Checksum)
					}
					if room := cap(p.Data) - len(p.Data); room < divert.Headroom {
						t.Errorf("packet %d has room for %d bytes", i, room)
					}
					text := string(p.Data[h.payload:])
					switch {
					case text == "accepted":
						p.Verdict = divert.Accept
					case text == "accepted with a mark":
						p.Verdict, p.Mark = divert.AcceptMarked, testMark
					case text == "dropped":
						p.Verdict = divert.Drop
					default:
						switch text {
						case "to be rewritten":
							copy(p.Data[h.payload:], "HAS BEEN")
						case "to be grown":
							more := strings.Repeat("+", divert.Headroom)
							p.Data = append(p.Data, more...)
						case "to be shortened":
							p.Data = p.Data[:h.payload+5]
						case "to be put elsewhere":
							p.Data = append([]byte(nil), p.Data...)
						}
						binary.BigEndian.PutUint16(p.Data[h.l4+4:], uint16(len(p.Data)-h.l4))
						h.rewrite(p, at(f.snip, 6000), at(f.server, 5000))
						if !h.valid(p.Data) {
							t.Errorf("packet %d: the test made a wrong checksum", i)
						}
					}
				})
				snip := at(f.snip, 6000)
				for _, want := range []struct {
					text string
					from netip.AddrPort
				}{
					{"accepted", at(f.client, 4000)},
					{"accepted with a mark", at(f.client, 4000)},
					{"HAS BEENwritten", snip},
					{"to be grown" + strings.Repeat("+", divert.Headroom), snip},
					{"to be", snip},
					{"to be put elsewhere", snip},
				} {
					text, from := l.readUDP(s)
					if text != want.text || from != want.from {
						t.Errorf("the server got %q from %v, want %q from %v", text, from, want.text, want.from)
					}
				}
				l.waiting(q, 0)
				if n := marked(); n != 5 {
					t.Errorf("%d forwarded packets had the mark, want 5", n)
				}
				st := q.Stats()
				if st.Received != 8 || st.Dropped != 2 || st.Accepted != 2 || st.Rewritten != 4 || st.Refused != 0 || st.VerdictErrors != 0 {
					t.Errorf("counters: %+v", st)
				}
			})
		}
	})
}

// TestRandomVerdicts answers long runs of datagrams at random, with batches of
// random size. Those let through must arrive in order, and no others.
func TestRandomVerdicts(t *testing.T) {
	both(t, func(t *testing.T, open opener) {
		r := seed(t)
		l := newLab(t)
		l.queueRule()
		q := l.open(open, divert.Config{Batch: 1 + r.IntN(100)})
		c := l.udp(l.client, at(client4, 4000))
		s := l.udp(l.server, at(server4, 5000))
		const rounds, most = 60, 50
		number := uint32(0)
		for range rounds {
			n := 1 + r.IntN(most)
			for range n {
				b := binary.BigEndian.AppendUint32(nil, number)
				number++
				l.sendUDP(c, at(server4, 5000), append(b, make([]byte, r.IntN(1400))...))
			}
			var pass []uint32
			drops := r.Float64()
			for n > 0 {
				pkts := make([]divert.Packet, 1+r.IntN(n))
				got, err := q.Receive(pkts, 20*time.Second)
				l.must(err)
				n -= got
				pkts = pkts[:got]
				for i := range pkts {
					p := &pkts[i]
					h, ok := parse(p.Data)
					if !ok {
						t.Fatalf("not a datagram: %x", p.Data)
					}
					if r.Float64() < drops {
						continue
					}
					pass = append(pass, binary.BigEndian.Uint32(p.Data[h.payload:]))
					switch r.IntN(3) {
					case 0:
						p.Verdict = divert.Accept
					case 1:
						p.Verdict, p.Mark = divert.AcceptMarked, testMark
					case 2:
						h.rewrite(p, h.src, h.dst)
					}
				}
				// Answers may come in pieces, as long as they are in order.
				for len(pkts) > 0 {
					k := 1 + r.IntN(len(pkts))
					l.must(q.Send(pkts[:k]))
					pkts = pkts[k:]
				}
			}
			for _, want := range pass {
				text, _ := l.readUDP(s)
				if got := binary.BigEndian.Uint32([]byte(text)); got != want {
					t.Fatalf("the server got number %d, want %d", got, want)
				}
			}
			l.waiting(q, 0)
		}
		l.must(s.SetReadDeadline(time.Now()))
		if n, _, err := s.ReadFromUDPAddrPort(make([]byte, 4)); err == nil {
			t.Errorf("the server got a datagram of %d bytes that was not let through", n)
		}
		st := q.Stats()
		if st.Received != uint64(number) || st.Dropped+st.Accepted+st.Rewritten != uint64(number) ||
			st.VerdictErrors+st.SendErrors+st.Unanswered+st.Refused != 0 {
			t.Errorf("counters: %+v", st)
		}
	})
}

// TestTruncated: a packet of which only a part was copied can pass whole, but
// not be rewritten, because that would trim it.
func TestTruncated(t *testing.T) {
	both(t, func(t *testing.T, open opener) {
		l := newLab(t)
		l.queueRule()
		q := l.open(open, divert.Config{CopyRange: 128})
		c := l.udp(l.client, at(client4, 4000))
		s := l.udp(l.server, at(server4, 5000))
		long := strings.Repeat("long ", 200)
		l.sendUDP(c, at(server4, 5000), []byte(long))
		l.sendUDP(c, at(server4, 5000), []byte(long))
		l.waiting(q, 2)
		l.answer(q, 2, func(i int, p *divert.Packet) {
			if !p.Truncated || len(p.Data) != 128 {
				t.Errorf("packet %d: truncated %v, %d bytes", i, p.Truncated, len(p.Data))
			}
			p.Verdict = []divert.Verdict{divert.Rewritten, divert.Accept}[i]
		})
		if text, _ := l.readUDP(s); text != long {
			t.Errorf("%d bytes arrived instead of %d", len(text), len(long))
		}
		l.waiting(q, 0)
		if st := q.Stats(); st.Truncated != 2 || st.Refused != 1 || st.Dropped != 1 || st.Accepted != 1 {
			t.Errorf("counters: %+v", st)
		}
	})
}

// TestRefused: packets that cannot go back are dropped, and nothing is left
// behind in the kernel.
func TestRefused(t *testing.T) {
	both(t, func(t *testing.T, open opener) {
		l := newLab(t)
		l.queueRule()
		q := l.open(open, divert.Config{})
		c := l.udp(l.client, at(client4, 4000))
		for range 3 {
			l.sendUDP(c, at(server4, 5000), []byte("x"))
		}
		l.waiting(q, 3)
		l.answer(q, 3, func(i int, p *divert.Packet) {
			switch i {
			case 0:
				p.Verdict, p.Data = divert.Rewritten, nil
			case 1:
				p.Verdict, p.Data = divert.Rewritten, make([]byte, divert.MaxPacket+1)
			case 2:
				p.Verdict = divert.Verdict(99)
			}
		})
		l.waiting(q, 0)
		if st := q.Stats(); st.Refused != 2 || st.Dropped != 3 {
			t.Errorf("counters: %+v", st)
		}
	})
}

// TestUnanswered: what Send forgot is dropped by the next Receive.
func TestUnanswered(t *testing.T) {
	both(t, func(t *testing.T, open opener) {
		l := newLab(t)
		l.queueRule()
		q := l.open(open, divert.Config{})
		c := l.udp(l.client, at(client4, 4000))
		s := l.udp(l.server, at(server4, 5000))
		for i := range 6 {
			l.sendUDP(c, at(server4, 5000), []byte{byte('0' + i)})
		}
		for i := range 6 {
			pkts := make([]divert.Packet, 1)
			n, err := q.Receive(pkts, 20*time.Second)
			if n != 1 || err != nil {
				t.Fatalf("packet %d: %d, %v", i, n, err)
			}
			pkts[0].Verdict = divert.Accept
			if i%2 == 1 {
				l.must(q.Send(pkts))
			}
		}
		for _, want := range []string{"1", "3", "5"} {
			if text, _ := l.readUDP(s); text != want {
				t.Errorf("the server got %q, want %q", text, want)
			}
		}
		l.waiting(q, 0)
		if st := q.Stats(); st.Unanswered != 3 || st.Dropped != 3 || st.Accepted != 3 {
			t.Errorf("counters: %+v", st)
		}
	})
}

// TestOutOfOrder answers one batch in pieces, out of order, twice and not at
// all: no verdict may reach another packet than its own.
func TestOutOfOrder(t *testing.T) {
	require.NFQueue(t)
	l := newLab(t)
	l.queueRule()
	q := l.open(divert.OpenBatched, divert.Config{})
	c := l.udp(l.client, at(client4, 4000))
	s := l.udp(l.server, at(server4, 5000))
	for i := range 10 {
		l.sendUDP(c, at(server4, 5000), []byte{byte('0' + i)})
	}
	l.waiting(q, 10)
	pkts := make([]divert.Packet, 10)
	if n, err := q.Receive(pkts, 20*time.Second); n != 10 || err != nil {
		t.Fatal(n, err)
	}
	accept := func(ps []divert.Packet) {
		for i := range ps {
			ps[i].Verdict = divert.Accept
		}
		l.must(q.Send(ps))
	}
	accept(pkts[1:2])
	l.must(q.Send(pkts[0:2])) // 0 is dropped; 1 has its answer
	l.must(q.Send(pkts[8:10]))
	accept(pkts[4:6])
	l.must(q.Send(pkts[2:4]))
	accept(pkts[2:4]) // too late
	// 6 and 7 are forgotten.
	if n, err := q.Receive(pkts, 0); n != 0 || err != nil {
		t.Fatal(n, err)
	}
	for _, want := range []string{"1", "4", "5"} {
		if text, _ := l.readUDP(s); text != want {
			t.Errorf("the server got %q, want %q", text, want)
		}
	}
	l.waiting(q, 0)
	if st := q.Stats(); st.Unanswered != 2 || st.Dropped != 7 || st.Accepted != 3 || st.VerdictErrors != 0 {
		t.Errorf("counters: %+v", st)
	}
}

// TestInUse: a number has one owner, and is free again after Close.
func TestInUse(t *testing.T) {
	both(t, func(t *testing.T, open opener) {
		l := newLab(t)
		q := l.open(open, divert.Config{})
		for _, second := range backends {
			l.in(l.router, func() {
				q2, err := second.open(divert.Config{Queue: testQueue})
				if err == nil {
					_ = q2.Close()
				}
				var e *divert.QueueError
				if !errors.Is(err, divert.ErrQueueInUse) || !errors.As(err, &e) || e.Queue != testQueue ||
					errors.Is(err, divert.ErrPermission) {
					t.Errorf("%s: %v", second.name, err)
				}
			})
		}
		l.must(q.Close())
		l.must(q.Close())
		l.must(l.open(open, divert.Config{}).Close())
		if _, err := q.Receive(make([]divert.Packet, 1), time.Minute); !errors.Is(err, divert.ErrClosed) {
			t.Errorf("Receive after Close: %v", err)
		}
		if err := q.Send(nil); !errors.Is(err, divert.ErrClosed) {
			t.Errorf("Send after Close: %v", err)
		}
		q.Wake()
		if st := q.Stats(); st.KernelErr == nil {
			t.Error("kernel counters of a closed queue")
		}
	})
}

// withoutCapabilities runs f on a thread of its own that lost the effective
// capabilities. The thread ends with it.
func withoutCapabilities(t *testing.T, l *lab, f func()) {
	var wg sync.WaitGroup
	wg.Go(func() {
		l.in(l.router, func() {
			runtime.LockOSThread() // once more: never unlocked, so the thread ends
			hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var data [2]unix.CapUserData
			if err := unix.Capget(&hdr, &data[0]); err != nil {
				t.Error(err)
				return
			}
			saved := data
			data[0].Effective, data[1].Effective = 0, 0
			if err := unix.Capset(&hdr, &data[0]); err != nil {
				t.Error(err)
				return
			}
			f()
			if err := unix.Capset(&hdr, &saved[0]); err != nil {
				t.Error(err)
			}
		})
	})
	wg.Wait()
}

func TestPermission(t *testing.T) {
	both(t, func(t *testing.T, open opener) {
		l := newLab(t)
		withoutCapabilities(t, l, func() {
			q, err := open(divert.Config{Queue: testQueue})
			if err == nil {
				_ = q.Close()
			}
			if !errors.Is(err, divert.ErrPermission) || errors.Is(err, divert.ErrQueueInUse) {
				t.Errorf("open: %v", err)
			}
			e, err := divert.OpenEmitter(testMark)
			if err == nil {
				e.Close()
			}
			if !errors.Is(err, divert.ErrPermission) {
				t.Errorf("open emitter: %v", err)
			}
		})
	})
}

func TestConfig(t *testing.T) {
	both(t, func(t *testing.T, open opener) {
		for _, c := range []divert.Config{{Batch: -1}, {Batch: 5000}, {CopyRange: 20}, {BufferBytes: -1}} {
			q, err := open(c)
			if err == nil {
				_ = q.Close()
				t.Errorf("%+v was accepted", c)
			}
		}
	})
}

// TestOverflow stops reading: the kernel drops what does not fit and counts it,
// and afterwards all is as before.
func TestOverflow(t *testing.T) {
	const length, sent = 16, 200
	both(t, func(t *testing.T, open opener) {
		for _, c := range []struct {
			name string
			cfg  divert.Config
			lost func(k divert.KernelStats) uint64
			kept uint64 // 0: not known beforehand
		}{
			{"length", divert.Config{Length: length, Batch: 1}, func(k divert.KernelStats) uint64 { return k.DroppedQueueFull }, length},
			{"buffer", divert.Config{BufferBytes: 1, Batch: 1}, func(k divert.KernelStats) uint64 { return k.DroppedUser }, 0},
		} {
			t.Run(c.name, func(t *testing.T) {
				l := newLab(t)
				l.queueRule()
				q := l.open(open, c.cfg)
				cl := l.udp(l.client, at(client4, 4000))
				s := l.udp(l.server, at(server4, 5000))
				for range sent {
					l.sendUDP(cl, at(server4, 5000), make([]byte, 1000))
				}
				var st divert.Stats
				eventually(t, "packets wait or are dropped", func() bool {
					st = q.Stats()
					l.must(st.KernelErr)
					return st.Kernel.Waiting+c.lost(st.Kernel) == sent
				})
				kept := st.Kernel.Waiting
				if kept == 0 || kept == sent || (c.kept != 0 && kept != c.kept) {
					t.Fatalf("the kernel keeps %d of %d packets: %+v", kept, sent, st.Kernel)
				}
				var handled atomic.Uint64
				stop := l.serve(q, 64, func(p *divert.Packet) {
					p.Verdict = divert.Accept
					handled.Add(1)
				})
				for range kept {
					l.readUDP(s)
				}
				l.waiting(q, 0)
				for i := range sent {
					text := fmt.Sprint("again ", i)
					l.sendUDP(cl, at(server4, 5000), []byte(text))
					if got, _ := l.readUDP(s); got != text {
						t.Fatalf("after the overflow the server got %q, want %q", got, text)
					}
				}
				stop() // so that the last Send has counted
				st = q.Stats()
				if n := handled.Load(); n != kept+sent || st.Received != n || st.Accepted != n || st.SendErrors+st.VerdictErrors != 0 {
					t.Errorf("%d packets handled, want %d; counters: %+v", n, kept+sent, st)
				}
			})
		}
	})
}

func TestWake(t *testing.T) {
	both(t, func(t *testing.T, open opener) {
		l := newLab(t)
		q := l.open(open, divert.Config{})
		back := make(chan int)
		errs := make(chan error, 1)
		const rounds = 500
		go func() {
			pkts := make([]divert.Packet, 8)
			for range rounds {
				n, err := q.Receive(pkts, time.Minute)
				if err != nil {
					errs <- err
					close(back)
					return
				}
				back <- n
			}
			errs <- nil
		}()
		for i := range rounds {
			q.Wake()
			if i%3 == 0 {
				q.Wake() // may be seen by the next wait
			}
			if n := <-back; n != 0 {
				t.Fatalf("received %d packets out of nothing", n)
			}
		}
		l.must(<-errs)
		if n, err := q.Receive(make([]divert.Packet, 1), 0); n != 0 || err != nil {
			t.Errorf("without waiting: %d, %v", n, err)
		}
		if st := q.Stats(); st.Wakes != rounds {
			t.Errorf("%d wakes counted, want %d", st.Wakes, rounds)
		}
		for range 2 { // the first may consume a wake that was left
			if n, err := q.Receive(make([]divert.Packet, 1), time.Millisecond); n != 0 || err != nil {
				t.Errorf("with a timeout: %d, %v", n, err)
			}
		}
	})
}

// TestSignals bombards the thread that waits with the signal by which Go's
// scheduler preempts: the wait lasts as long as was asked for, and a wake in the
// midst of it ends it and is counted.
func TestSignals(t *testing.T) {
	both(t, func(t *testing.T, open opener) {
		l := newLab(t)
		q := l.open(open, divert.Config{})
		var tid atomic.Int64
		var sent atomic.Int64
		quit := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				select {
				case <-quit:
					return
				case <-time.After(100 * time.Microsecond):
				}
				if id := int(tid.Load()); id != 0 && unix.Tgkill(os.Getpid(), id, unix.SIGURG) == nil {
					sent.Add(1)
				}
			}
		})
		defer wg.Wait()
		defer close(quit)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		tid.Store(int64(unix.Gettid()))
		const wait = 100 * time.Millisecond
		for range 3 {
			began := time.Now()
			n, err := q.Receive(make([]divert.Packet, 1), wait)
			if took := time.Since(began); n != 0 || err != nil || took < wait {
				t.Errorf("a wait of %v ended after %v: %d, %v", wait, took, n, err)
			}
		}
		for i := range 50 {
			wg.Go(func() {
				time.Sleep(time.Millisecond)
				q.Wake()
			})
			if n, err := q.Receive(make([]divert.Packet, 1), time.Minute); n != 0 || err != nil {
				t.Errorf("wait for a wake: %d, %v", n, err)
			}
			if st := q.Stats(); st.Wakes != uint64(i+1) {
				t.Fatalf("%d wakes counted, want %d", st.Wakes, i+1)
			}
		}
		tid.Store(0)
		if sent.Load() == 0 {
			t.Error("no signal was sent")
		}
	})
}

func TestCloseUnblocks(t *testing.T) {
	both(t, func(t *testing.T, open opener) {
		l := newLab(t)
		for range 50 {
			q := l.open(open, divert.Config{})
			stop := l.serve(q, 8, func(*divert.Packet) {})
			q.Wake()
			stop() // waits for ErrClosed
		}
	})
}

// TestOpenUnderTraffic opens and closes queues while packets arrive, as after a
// crash. Opening must not take a packet for an answer, and what arrived too
// early must not stay in the kernel.
func TestOpenUnderTraffic(t *testing.T) {
	both(t, func(t *testing.T, open opener) {
		l := newLab(t)
		l.queueRule()
		c := l.udp(l.client, at(client4, 4000))
		s := l.udp(l.server, at(server4, 5000))
		var quit atomic.Bool
		var wg sync.WaitGroup
		var sendErr error
		var pause atomic.Bool
		wg.Go(func() {
			b := make([]byte, 900)
			for !quit.Load() && sendErr == nil {
				if pause.Load() {
					runtime.Gosched()
					continue
				}
				_, sendErr = c.WriteToUDPAddrPort(b, at(server4, 5000))
				if errors.Is(sendErr, unix.ECONNREFUSED) {
					sendErr = nil
				}
			}
		})
		defer func() {
			quit.Store(true)
			wg.Wait()
			l.must(sendErr)
		}()
		for i := range 40 {
			cfg := divert.Config{Queue: testQueue}
			var q divert.Queue
			l.in(l.router, func() {
				var err error
				if q, err = open(cfg); err != nil {
					t.Fatalf("open number %d: %v", i, err)
				}
			})
			var n atomic.Uint64
			stop := l.serve(q, 64, func(p *divert.Packet) {
				p.Verdict = divert.Accept
				n.Add(1)
			})
			eventually(t, "packets pass", func() bool { return n.Load() > 20 })
			l.readUDP(s)
			pause.Store(true)
			l.waiting(q, 0)
			stop()
			pause.Store(false)
		}
	})
}

// TestKernelStats compares the calling thread's namespace with others.
func TestKernelStats(t *testing.T) {
	require.NFQueue(t)
	l := newLab(t)
	l.open(divert.OpenBatched, divert.Config{Length: 100})
	l.in(l.router, func() {
		all, err := divert.ReadKernelStats()
		l.must(err)
		one, err := divert.ReadKernelStats(testQueue)
		l.must(err)
		none, err := divert.ReadKernelStats(testQueue + 1)
		l.must(err)
		if len(all) != 1 || len(one) != 1 || len(none) != 0 || one[0].Queue != testQueue || one[0].PortID == 0 ||
			one[0].CopyMode != 2 || one[0].CopyRange != divert.MaxPacket {
			t.Errorf("all %+v, one %+v, none %+v", all, one, none)
		}
	})
	l.in(l.client, func() {
		if all, err := divert.ReadKernelStats(); err != nil || len(all) != 0 {
			t.Errorf("in another namespace: %+v, %v", all, err)
		}
	})
}
