// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/weirgate/weir/integration/lab/ladder"
	"golang.org/x/sys/unix"
)

// CaptureOptions says what a capture keeps.
type CaptureOptions struct {
	// SnapLen bounds the bytes kept of each packet; 0 keeps them all.
	SnapLen int
	// Buffer is the socket's receive buffer in bytes; 0 means 32 MiB.
	Buffer int
}

// A Record is one captured packet.
type Record struct {
	// Time never runs backwards within a capture: records are in the order in
	// which the packets passed, on whichever of the interfaces.
	Time     time.Time
	Iface    string
	Outgoing bool // sent by the host itself, as opposed to received by it
	// NoChecksum says that the sender left the checksum to hardware that does
	// not exist on a virtual link: it need not be right.
	NoChecksum bool
	Len        int    // length on the wire, in bytes
	Data       []byte // from the IP header on, at most SnapLen bytes
}

// A Capture collects the IP packets that pass some interfaces of a host.
type Capture struct {
	host *Host
	on   map[int]string // interface names by index
	file *os.File
	raw  syscall.RawConn
	snap int
	done chan struct{}

	mu      sync.Mutex
	records []Record
	changed chan struct{} // closed and replaced whenever a record comes in
	err     error
	stopped bool
	drops   int
}

// Capture starts to collect the IP packets that pass the interface in either
// direction. It runs until Stop, or until the lab closes.
func (h *Host) Capture(iface string, o CaptureOptions) (*Capture, error) {
	return h.CaptureOn(o, iface)
}

// CaptureOn is Capture on several interfaces at once. What causes what is told
// by the order of its records; timestamps of different captures do not tell
// it, because the kernel leaves stamping to the reader at first.
func (h *Host) CaptureOn(o CaptureOptions, ifaces ...string) (*Capture, error) {
	wrap := func(err error) error {
		return fmt.Errorf("lab: host %s: capture on %s: %w", h.name, strings.Join(ifaces, " and "), err)
	}
	if o.Buffer == 0 {
		o.Buffer = 32 << 20
	}
	if o.SnapLen <= 0 || o.SnapLen > 1<<16 {
		o.SnapLen = 1 << 16
	}
	on := map[int]string{}
	for _, iface := range ifaces {
		k, err := h.nl.LinkByName(iface)
		if err != nil {
			return nil, wrap(err)
		}
		on[k.Attrs().Index] = iface
	}
	fd := -1
	err := h.Do(func() (err error) {
		// Protocol 0: nothing is received before the socket is bound.
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
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
	set(unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, o.Buffer)
	set(unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1)
	set(unix.SOL_PACKET, unix.PACKET_AUXDATA, 1)
	if err == nil {
		// Bound to all interfaces: one socket has one queue, in order.
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: hton16(unix.ETH_P_ALL)})
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, wrap(err)
	}
	c := &Capture{host: h, on: on, file: os.NewFile(uintptr(fd), "capture"), snap: o.SnapLen,
		done: make(chan struct{}), changed: make(chan struct{})}
	if c.raw, err = c.file.SyscallConn(); err != nil {
		_ = c.file.Close()
		return nil, wrap(err)
	}
	h.lab.Cleanup(func() error { _, _ = c.Stop(); return nil })
	go c.run()
	return c, nil
}

func (c *Capture) run() {
	defer close(c.done)
	buf := make([]byte, 1<<16+256)
	oob := make([]byte, 512)
	for {
		var n, oobn int
		var from unix.Sockaddr
		var rerr error
		err := c.raw.Read(func(fd uintptr) bool {
			n, oobn, _, from, rerr = unix.Recvmsg(int(fd), buf, oob, unix.MSG_TRUNC)
			return rerr != unix.EAGAIN
		})
		switch {
		case err != nil:
			// The deadline that Stop has set, or the closed file.
			return
		case rerr == unix.ENETDOWN || rerr == unix.EINTR:
			continue
		case rerr != nil:
			c.mu.Lock()
			c.err = fmt.Errorf("lab: host %s: capture: %w", c.host.name, rerr)
			c.mu.Unlock()
			return
		}
		c.keep(buf[:min(n, len(buf))], n, oob[:oobn], from)
	}
}

func (c *Capture) keep(b []byte, n int, oob []byte, from unix.Sockaddr) {
	ll, ok := from.(*unix.SockaddrLinklayer)
	if !ok || (ll.Protocol != hton16(unix.ETH_P_IP) && ll.Protocol != hton16(unix.ETH_P_IPV6)) {
		return
	}
	iface, ok := c.on[ll.Ifindex]
	if !ok {
		return
	}
	r := Record{Iface: iface, Len: n, Outgoing: ll.Pkttype == unix.PACKET_OUTGOING, Data: append([]byte(nil), b[:min(len(b), c.snap)]...)}
	if msgs, err := unix.ParseSocketControlMessage(oob); err == nil {
		for _, m := range msgs {
			switch {
			case m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SCM_TIMESTAMPNS:
				if len(m.Data) >= int(unsafe.Sizeof(unix.Timespec{})) {
					ts := (*unix.Timespec)(unsafe.Pointer(&m.Data[0]))
					r.Time = time.Unix(ts.Unix())
				}
			case m.Header.Level == unix.SOL_PACKET && m.Header.Type == unix.PACKET_AUXDATA:
				if len(m.Data) >= 4 {
					status := binary.NativeEndian.Uint32(m.Data)
					r.NoChecksum = status&unix.TP_STATUS_CSUMNOTREADY != 0
				}
			}
		}
	}
	c.mu.Lock()
	if n := len(c.records); n > 0 && r.Time.Before(c.records[n-1].Time) {
		r.Time = c.records[n-1].Time
	}
	c.records = append(c.records, r)
	close(c.changed)
	c.changed = make(chan struct{})
	c.mu.Unlock()
}

// Records returns what has been captured so far, in order of arrival.
func (c *Capture) Records() []Record {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.records[:len(c.records):len(c.records)]
}

// Wait waits until cond is true of the packets captured so far. It is asked
// again after every packet.
func (c *Capture) Wait(ctx context.Context, cond func([]Record) bool) error {
	for {
		c.mu.Lock()
		recs, changed, err := c.records[:len(c.records):len(c.records)], c.changed, c.err
		c.mu.Unlock()
		if cond(recs) {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-changed:
		case <-c.done:
			return fmt.Errorf("lab: host %s: the capture has ended before what it was to wait for", c.host.name)
		case <-ctx.Done():
			return fmt.Errorf("lab: host %s: capture of %d packets: %w", c.host.name, len(recs), ctx.Err())
		}
	}
}

// Stop takes in what has passed the interface until now, ends the capture and
// returns all packets. It may be called more than once. The error also tells
// of packets that the kernel could not hand over.
func (c *Capture) Stop() ([]Record, error) {
	c.mu.Lock()
	first := !c.stopped
	c.stopped = true
	c.mu.Unlock()
	if first {
		// The deadline ends the reading goroutine; drain takes in what had
		// arrived before it.
		_ = c.file.SetReadDeadline(time.Now())
		<-c.done
		c.drain()
		_ = c.raw.Control(func(fd uintptr) {
			if st, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
				c.drops = int(st.Drops)
			}
		})
		_ = c.file.Close()
	}
	<-c.done
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.err
	if err == nil && c.drops > 0 {
		err = fmt.Errorf("lab: host %s: capture: %d packets lost in the capture itself", c.host.name, c.drops)
	}
	return c.records, err
}

// drain reads what is left in the socket after the reading goroutine has gone.
func (c *Capture) drain() {
	buf := make([]byte, 1<<16+256)
	oob := make([]byte, 512)
	_ = c.raw.Control(func(fd uintptr) {
		for {
			n, oobn, _, from, err := unix.Recvmsg(int(fd), buf, oob, unix.MSG_TRUNC|unix.MSG_DONTWAIT)
			if err != nil {
				return
			}
			c.keep(buf[:min(n, len(buf))], n, oob[:oobn], from)
		}
	})
}

// Segments decodes the TCP segments of a capture and marks each with the side
// of the interface unit that its interface is on. Other packets, and those of
// other interfaces, are left out.
func Segments(recs []Record, sides map[string]ladder.Side) []ladder.Segment {
	var segs []ladder.Segment
	for _, r := range recs {
		side, ok := sides[r.Iface]
		if !ok {
			continue
		}
		s, err := ladder.Decode(r.Data)
		if err != nil {
			continue
		}
		s.Time, s.Side = r.Time, side
		segs = append(segs, s)
	}
	return segs
}

// WritePcap writes packets in the pcap format, with nanoseconds and without a
// link layer (LINKTYPE_RAW).
func WritePcap(w io.Writer, recs []Record) error {
	le := binary.LittleEndian
	hdr := le.AppendUint32(nil, 0xa1b23c4d)
	hdr = le.AppendUint16(hdr, 2)
	hdr = le.AppendUint16(hdr, 4)
	hdr = le.AppendUint64(hdr, 0)
	hdr = le.AppendUint32(hdr, 1<<18)
	hdr = le.AppendUint32(hdr, 101)
	if _, err := w.Write(hdr); err != nil {
		return err
	}
	for _, r := range recs {
		b := le.AppendUint32(nil, uint32(r.Time.Unix()))
		b = le.AppendUint32(b, uint32(r.Time.Nanosecond()))
		b = le.AppendUint32(b, uint32(len(r.Data)))
		b = le.AppendUint32(b, uint32(r.Len))
		if _, err := w.Write(append(b, r.Data...)); err != nil {
			return err
		}
	}
	return nil
}

// hton16 turns a number into network order as the kernel wants it in a native
// field.
func hton16(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}
