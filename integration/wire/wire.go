// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"container/heap"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
)

// Options says how a wire behaves.
type Options struct {
	Seed uint64
	// By direction: AB, BA.
	Impair [2]Impairment
	// Hop4 and Hop6 are the source addresses of ICMP errors. Zero values mean
	// 192.0.0.8, the dummy address of RFC 7600, and 2001:db8::8.
	Hop4, Hop6 netip.Addr
}

// Bad impairs both directions alike.
func Bad(i Impairment) [2]Impairment { return [2]Impairment{i, i} }

// A Wire passes frames between two interfaces. Its methods may be called from
// any goroutine.
type Wire struct {
	seed       atomic.Uint64
	hop4, hop6 netip.Addr
	way        [2]*way
	once       sync.Once
	err        error
	group      sync.WaitGroup
}

// A way is one direction: a reader that decides, and a sender for what leaves
// later than it came.
type way struct {
	w      *Wire
	dir    Direction
	in     *port
	out    *port
	impair atomic.Pointer[Impairment]
	n      uint64 // packets since the seed was given; of the reader alone
	anew   atomic.Bool

	mu     sync.Mutex
	late   laterFrames
	serial uint64
	last   time.Time // when the latest frame that keeps the order leaves
	wake   chan struct{}
	closed bool

	packets, lost, reordered, duplicated, corrupted, tooBig, fragmented, bad, overrun atomic.Uint64
}

// Join makes a wire between two interfaces of a host, whose two ends do not
// see each other otherwise. The caller switches offload off on whatever leads
// to them. The wire lives until Close, or until the lab closes.
func Join(h *lab.Host, a, b string, o Options) (*Wire, error) {
	w := &Wire{hop4: o.Hop4, hop6: o.Hop6}
	w.seed.Store(o.Seed)
	if !w.hop4.IsValid() {
		w.hop4 = netip.MustParseAddr("192.0.0.8")
	}
	if !w.hop6.IsValid() {
		w.hop6 = netip.MustParseAddr("2001:db8::8")
	}
	pa, err := openPort(h, a)
	if err != nil {
		return nil, err
	}
	pb, err := openPort(h, b)
	if err != nil {
		return nil, errors.Join(err, pa.file.Close())
	}
	for d, ends := range [2][2]*port{{pa, pb}, {pb, pa}} {
		x := &way{w: w, dir: Direction(d), in: ends[0], out: ends[1], wake: make(chan struct{}, 1)}
		x.impair.Store(&o.Impair[d])
		w.way[d] = x
		w.group.Go(x.read)
		w.group.Go(x.send)
	}
	h.Lab().Cleanup(w.Close)
	return w, nil
}

// Into makes a wire between a switch and one of its ports: side A is the host
// behind the port. Offload is switched off on the interfaces in the switch.
func Into(sw *lab.Host, portName string, o Options) (*Wire, error) {
	wrap := func(err error) error { return fmt.Errorf("wire: switch %s, port %s: %w", sw.Name(), portName, err) }
	nl := sw.Netlink()
	p, err := nl.LinkByName(portName)
	if err != nil {
		return nil, wrap(err)
	}
	if p.Attrs().MasterIndex == 0 {
		return nil, wrap(errors.New("it is not plugged in"))
	}
	br, err := nl.LinkByIndex(p.Attrs().MasterIndex)
	if err != nil {
		return nil, wrap(err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "w" + portName
	pair := netlink.NewVeth(attrs)
	pair.PeerName = "b" + portName
	if err := nl.LinkAdd(pair); err != nil {
		return nil, wrap(err)
	}
	for _, name := range []string{attrs.Name, pair.PeerName, portName} {
		if err := sw.SetOffload(name, false); err != nil {
			return nil, wrap(err)
		}
		if err := sw.SetUp(name); err != nil {
			return nil, wrap(err)
		}
	}
	peer, err := nl.LinkByName(pair.PeerName)
	if err != nil {
		return nil, wrap(err)
	}
	if err := nl.LinkSetNoMaster(p); err != nil {
		return nil, wrap(err)
	}
	if err := nl.LinkSetMaster(peer, br); err != nil {
		return nil, wrap(err)
	}
	return Join(sw, portName, attrs.Name, o)
}

// Set changes the impairments of a direction for all packets from now on.
func (w *Wire) Set(d Direction, i Impairment) { w.way[d].impair.Store(&i) }

// Seed is what Fate needs to repeat the run.
func (w *Wire) Seed() uint64 { return w.seed.Load() }

// Begin has what becomes of packets follow from a seed and count from 0 again,
// in both directions: of two measurements, each after a Begin with the same
// seed, the n-th packets have the same fate.
func (w *Wire) Begin(seed uint64) {
	w.seed.Store(seed)
	for _, x := range w.way {
		x.anew.Store(true)
	}
}

// Stats reads the counters of a direction.
func (w *Wire) Stats(d Direction) Stats {
	x := w.way[d]
	return Stats{
		Packets: x.packets.Load(), Lost: x.lost.Load(), Reordered: x.reordered.Load(), Duplicated: x.duplicated.Load(),
		Corrupted: x.corrupted.Load(), TooBig: x.tooBig.Load(), Fragmented: x.fragmented.Load(),
		BadChecksum: x.bad.Load(), Overrun: x.overrun.Load(),
	}
}

// Close ends the wire: from then on nothing passes. It may be called more than
// once.
func (w *Wire) Close() error {
	w.once.Do(func() {
		for _, x := range w.way {
			x.mu.Lock()
			x.closed = true
			x.mu.Unlock()
			x.poke()
			w.err = errors.Join(w.err, x.in.file.Close())
		}
		w.group.Wait()
	})
	return w.err
}

// A port is a packet socket on an interface.
type port struct {
	name string
	file *os.File
	raw  syscall.RawConn
}

func openPort(h *lab.Host, name string) (*port, error) {
	wrap := func(err error) error { return fmt.Errorf("wire: host %s, interface %s: %w", h.Name(), name, err) }
	k, err := h.Netlink().LinkByName(name)
	if err != nil {
		return nil, wrap(err)
	}
	fd := -1
	err = h.Do(func() (err error) {
		// Protocol 0: nothing is received before the socket is bound.
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return err
	})
	if err != nil {
		return nil, wrap(err)
	}
	set := func(level, opt, v int) {
		if err == nil {
			err = unix.SetsockoptInt(fd, level, opt, v)
		}
	}
	set(unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)
	// Frames for other machines' addresses pass too.
	if err == nil {
		err = unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP,
			&unix.PacketMreq{Ifindex: int32(k.Attrs().Index), Type: unix.PACKET_MR_PROMISC})
	}
	set(unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20)
	set(unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 8<<20)
	if err == nil {
		var all [2]byte
		binary.BigEndian.PutUint16(all[:], unix.ETH_P_ALL)
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: binary.NativeEndian.Uint16(all[:]), Ifindex: k.Attrs().Index})
	}
	if err != nil {
		return nil, wrap(errors.Join(err, unix.Close(fd)))
	}
	p := &port{name: name, file: os.NewFile(uintptr(fd), "wire")}
	if p.raw, err = p.file.SyscallConn(); err != nil {
		return nil, wrap(errors.Join(err, p.file.Close()))
	}
	return p, nil
}

// write sends a frame. What a full queue refuses is lost, and counted.
func (p *port) write(b []byte) bool {
	ok := false
	_ = p.raw.Control(func(fd uintptr) {
		for {
			_, err := unix.Write(int(fd), b)
			if err == unix.EINTR {
				continue
			}
			ok = err == nil
			return
		}
	})
	return ok
}

func (x *way) read() {
	buf := make([]byte, 1<<17)
	for {
		var n int
		var rerr error
		err := x.in.raw.Read(func(fd uintptr) bool {
			n, rerr = unix.Read(int(fd), buf)
			return rerr != unix.EAGAIN
		})
		switch {
		case err != nil:
			return // closed
		case rerr == unix.EINTR || rerr == unix.ENETDOWN:
		case rerr != nil:
			return
		default:
			x.frame(buf[:n])
		}
	}
}

// frame decides on a frame; b is only lent.
func (x *way) frame(b []byte) {
	p := ipPacket(b)
	if p == nil {
		x.write(b)
		return
	}
	b = b[:etherLen+len(p)]
	i := x.impair.Load()
	if x.anew.CompareAndSwap(true, false) {
		x.n = 0
	}
	f := i.Fate(x.w.seed.Load(), x.dir, x.n)
	x.n++
	x.packets.Add(1)
	if !checksumOK(p) {
		x.bad.Add(1)
	}
	if i.Tamper != nil && !i.Tamper(p) {
		return
	}
	if f.Lost {
		x.lost.Add(1)
		return
	}
	if i.MTU > 0 && len(p) > i.MTU {
		if p[0]>>4 == 4 && binary.BigEndian.Uint16(p[6:])&dontFrag == 0 {
			x.fragmented.Add(1)
			for _, g := range fragments(b, p, i.MTU) {
				x.pass(g, i.Delay)
			}
			return
		}
		x.tooBig.Add(1)
		if !i.BlackHole && !x.in.write(answerTooBig(b, p, i.MTU, x.w.hop4, x.w.hop6)) {
			x.overrun.Add(1)
		}
		return
	}
	if f.Corrupted {
		x.corrupted.Add(1)
		corrupt(p, &f)
	}
	if f.Reordered {
		x.reordered.Add(1)
		x.later(b, i.Delay+f.Late, false)
	} else {
		x.pass(b, i.Delay)
	}
	if f.Duplicated {
		x.duplicated.Add(1)
		x.later(b, i.Delay+f.CopyLate, false)
	}
}

func (x *way) write(b []byte) {
	if !x.out.write(b) {
		x.overrun.Add(1)
	}
}

// pass sends a frame in its order.
func (x *way) pass(b []byte, delay time.Duration) {
	if delay <= 0 {
		x.write(b)
		return
	}
	x.later(b, delay, true)
}

// laterFrame is one that leaves later.
type laterFrame struct {
	at     time.Time
	serial uint64
	b      []byte
}

type laterFrames []laterFrame

func (l laterFrames) Len() int { return len(l) }
func (l laterFrames) Less(i, j int) bool {
	if l[i].at.Equal(l[j].at) {
		return l[i].serial < l[j].serial
	}
	return l[i].at.Before(l[j].at)
}
func (l laterFrames) Swap(i, j int) { l[i], l[j] = l[j], l[i] }
func (l *laterFrames) Push(v any)   { *l = append(*l, v.(laterFrame)) }
func (l *laterFrames) Pop() any {
	old := *l
	v := old[len(old)-1]
	old[len(old)-1] = laterFrame{}
	*l = old[:len(old)-1]
	return v
}

func (x *way) later(b []byte, d time.Duration, inOrder bool) {
	at := time.Now().Add(d)
	x.mu.Lock()
	if inOrder {
		if at.Before(x.last) {
			at = x.last
		}
		x.last = at
	}
	x.serial++
	heap.Push(&x.late, laterFrame{at, x.serial, append([]byte(nil), b...)})
	first := x.late[0].serial == x.serial
	x.mu.Unlock()
	if first {
		x.poke()
	}
}

func (x *way) poke() {
	select {
	case x.wake <- struct{}{}:
	default:
	}
}

// send lets those frames go whose time has come.
func (x *way) send() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		x.mu.Lock()
		if x.closed {
			x.mu.Unlock()
			return
		}
		wait := time.Hour
		var due []byte
		if len(x.late) > 0 {
			if wait = time.Until(x.late[0].at); wait <= 0 {
				due = heap.Pop(&x.late).(laterFrame).b
			}
		}
		x.mu.Unlock()
		if due != nil {
			x.write(due)
			continue
		}
		timer.Reset(wait)
		select {
		case <-timer.C:
		case <-x.wake:
		}
	}
}
