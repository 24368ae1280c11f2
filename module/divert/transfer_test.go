// SPDX-License-Identifier: Apache-2.0

package divert_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/module/divert"
)

// stream writes n bytes of a stream that is the same for the same seed.
func stream(w io.Writer, s uint64, n int) error {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], s)
	_, err := io.CopyN(w, rand.NewChaCha8(key), int64(n))
	return err
}

// transfer sends bytes both ways over connections through the translator and
// compares what arrives.
func (l *lab) transfer(x *translator, s uint64, down, up int) {
	l.t.Helper()
	var ln *net.TCPListener
	l.in(l.server, func() {
		var err error
		ln, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(x.server, x.serverPort)))
		l.must(err)
	})
	defer ln.Close()
	serverDone := make(chan error, 1)
	go func() {
		serverDone <- func() error {
			c, err := ln.AcceptTCP()
			if err != nil {
				return err
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
			got := sha256.New()
			if _, err := io.CopyN(got, c, int64(up)); err != nil {
				return fmt.Errorf("server reads: %w", err)
			}
			want := sha256.New()
			_ = stream(want, s+1, up)
			if string(got.Sum(nil)) != string(want.Sum(nil)) {
				return errors.New("the upload arrived damaged")
			}
			if err := stream(c, s, down); err != nil {
				return fmt.Errorf("server writes: %w", err)
			}
			return nil
		}()
	}()
	var c net.Conn
	l.in(l.client, func() {
		var err error
		c, err = net.DialTimeout("tcp", netip.AddrPortFrom(x.vip, x.vipPort).String(), 20*time.Second)
		l.must(err)
	})
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	l.must(stream(c, s+1, up))
	got, want := sha256.New(), sha256.New()
	n, err := io.Copy(got, c)
	if err != nil {
		l.t.Fatalf("client reads: after %d bytes: %v", n, err)
	}
	l.must(<-serverDone)
	l.must(stream(want, s, down))
	if n != int64(down) || string(got.Sum(nil)) != string(want.Sum(nil)) {
		l.t.Fatalf("the download arrived damaged: %d bytes instead of %d", n, down)
	}
}

// TestTransfer is the essential test: more than 100 MB through a translation,
// byte-exact, over both IP versions, with super-packets and without, with
// checksums that are not ready, verified and unverified.
func TestTransfer(t *testing.T) {
	const full, part = 104 << 20, 24 << 20
	cases := []struct {
		name    string
		v6, gso bool
		// without switches transmit checksum offload off at the ends, so that
		// complete checksums arrive; merge lets the router's devices merge
		// segments (GRO), which verifies them.
		without, merge bool
		check          func(x *translator) error
	}{
		{name: "ipv4/gso", gso: true, check: wantGSO},
		{name: "ipv6/gso", v6: true, gso: true, check: wantGSO},
		{name: "ipv4/segments", check: wantNoGSO},
		{name: "ipv6/segments", v6: true, check: wantNoGSO},
		{name: "ipv4/unverified", gso: true, without: true, check: func(x *translator) error {
			return atLeast("unverified packets", x.unknown.Load(), 5_000)
		}},
		{name: "ipv6/unverified", v6: true, gso: true, without: true, check: func(x *translator) error {
			return atLeast("unverified packets", x.unknown.Load(), 5_000)
		}},
		{name: "ipv4/verified", gso: true, without: true, merge: true, check: func(x *translator) error {
			return errors.Join(atLeast("verified packets", x.verified.Load(), 100), wantGSO(x))
		}},
	}
	both(t, func(t *testing.T, open func(divert.Config) (divert.Queue, error)) {
		r := seed(t)
		for _, c := range cases {
			t.Run(c.name, func(t *testing.T) {
				l := newLab(t)
				marked := l.queueRule()
				if c.without {
					l.offload(l.client, "c0", ethtoolTXChecksum, false)
					l.offload(l.server, "s0", ethtoolTXChecksum, false)
				}
				if c.merge {
					l.offload(l.router, "rc", ethtoolGRO, true)
					l.offload(l.router, "rs", ethtoolGRO, true)
				}
				x := newTranslator(c.v6)
				q := l.open(open, divert.Config{GSO: c.gso})
				stop := l.serve(q, 64, x.handle)
				down := full
				if c.without {
					down = part
				}
				l.transfer(x, r.Uint64(), down, part)
				s := q.Stats()
				stop()
				t.Logf("partial %d, verified %d, unknown %d, gso %d (mean %d bytes), batches %d, kernel %+v",
					x.partial.Load(), x.verified.Load(), x.unknown.Load(), x.gso.Load(),
					x.gsoBytes.Load()/max(1, x.gso.Load()), s.Batches, s.Kernel)
				if err := c.check(x); err != nil {
					t.Error(err)
				}
				if s.KernelErr != nil {
					t.Error(s.KernelErr)
				}
				if s.Rewritten == 0 || s.Refused+s.Malformed+s.SendErrors+s.ReceiveErrors+s.Unanswered != 0 {
					t.Errorf("counters: %+v", s)
				}
				if n := marked(); n == 0 {
					t.Error("no forwarded packet had the mark")
				}
			})
		}
	})
}

func atLeast(what string, got, want uint64) error {
	if got < want {
		return fmt.Errorf("%d %s instead of at least %d: the case tests something else", got, what, want)
	}
	return nil
}

func wantGSO(x *translator) error {
	mean := x.gsoBytes.Load() / max(1, x.gso.Load())
	return errors.Join(atLeast("super-packets", x.gso.Load(), 300), atLeast("bytes in the mean super-packet", mean, 5000))
}

func wantNoGSO(x *translator) error {
	if n := x.gso.Load(); n != 0 {
		return fmt.Errorf("%d super-packets although none were asked for", n)
	}
	return nil
}

// TestShortenedSuperPacket pins down what handlers must know: a super-packet
// whose payload was cut down to one segment is refused by segmentation. TCP
// repairs it, as any loss.
func TestShortenedSuperPacket(t *testing.T) {
	both(t, func(t *testing.T, open opener) {
		l := newLab(t)
		l.queueRule()
		q := l.open(open, divert.Config{GSO: true})
		x := newTranslator(false)
		cut := false
		stop := l.serve(q, 64, func(p *divert.Packet) {
			if h, ok := parse(p.Data); ok && p.GSO && !cut && h.src.Addr() == server4 && len(p.Data) > 4000 {
				cut = true
				p.Data = p.Data[:h.payload+100]
			}
			x.handle(p)
		})
		before := l.txDropped("rc")
		l.transfer(x, 1, 4<<20, 4<<20)
		stop()
		if n := l.txDropped("rc") - before; !cut || n == 0 {
			t.Errorf("cut: %v; the device dropped %d packets", cut, n)
		}
	})
}

func (l *lab) txDropped(name string) uint64 {
	l.t.Helper()
	h := l.handle(l.router)
	defer h.Close()
	i, err := h.LinkByName(name)
	l.must(err)
	return i.Attrs().Statistics.TxDropped
}

// TestGrownSuperPacket inserts bytes at the end of a super-packet and shifts
// the sequence numbers of all that follows.
func TestGrownSuperPacket(t *testing.T) {
	both(t, func(t *testing.T, open opener) {
		l := newLab(t)
		l.queueRule()
		// Blocks of selective acknowledgments are beyond this test's handler.
		l.in(l.client, func() {
			l.must(os.WriteFile("/proc/sys/net/ipv4/tcp_sack", []byte("0"), 0))
		})
		q := l.open(open, divert.Config{GSO: true})
		x := newTranslator(false)
		var isn, start uint32 // of the client; where the insertion begins
		inserted := strings.Repeat("inserted", divert.Headroom/8)
		n := uint32(len(inserted))
		stop := l.serve(q, 64, func(p *divert.Packet) {
			h, ok := parse(p.Data)
			if !ok {
				return
			}
			tcp := p.Data[h.l4:]
			seq, ack := binary.BigEndian.Uint32(tcp[4:]), binary.BigEndian.Uint32(tcp[8:])
			if h.src.Addr() == client4 {
				end := seq + uint32(len(p.Data)-h.payload)
				switch {
				case tcp[13]&2 != 0:
					isn = seq // of a SYN
				case start == 0 && p.GSO && end-isn > 100_000 && len(p.Data) < 60_000:
					start = end
					p.Data = append(p.Data, inserted...)
				case start != 0 && int32(end-start) >= 0 && int32(seq-start) >= 0:
					binary.BigEndian.PutUint32(tcp[4:], seq+n)
				}
			} else {
				// The client must leave room for the insertion: a receiver
				// drops what goes beyond its window. Half is more than enough.
				binary.BigEndian.PutUint16(tcp[14:], binary.BigEndian.Uint16(tcp[14:])/2)
				if start != 0 && int32(ack-start-n) >= 0 {
					ack -= n
				} else if start != 0 && int32(ack-start) > 0 {
					ack = start
				}
				binary.BigEndian.PutUint32(tcp[8:], ack)
			}
			x.handle(p)
			if !p.GSO {
				h.fill(p.Data) // this test does not care for damage on the way
			}
		})
		var ln net.Listener
		l.in(l.server, func() {
			var err error
			ln, err = net.Listen("tcp", at(server4, 8080).String())
			l.must(err)
		})
		defer ln.Close()
		var out net.Conn
		l.in(l.client, func() {
			var err error
			out, err = net.DialTimeout("tcp", at(vip4, 80).String(), 20*time.Second)
			l.must(err)
		})
		in, err := ln.Accept()
		l.must(err)
		defer in.Close()
		const size = 8 << 20
		written := make(chan error, 1)
		go func() {
			_ = out.SetDeadline(time.Now().Add(time.Minute))
			err := stream(out, 5, size)
			written <- errors.Join(err, out.Close())
		}()
		_ = in.SetDeadline(time.Now().Add(time.Minute))
		got, err := io.ReadAll(in)
		l.must(err)
		l.must(<-written)
		stop()
		var want bytes.Buffer
		l.must(stream(&want, 5, size))
		if start == 0 {
			t.Fatal("no super-packet came by")
		}
		at := int(start - isn - 1)
		expect := slices.Concat(want.Bytes()[:at], []byte(inserted), want.Bytes()[at:])
		if !bytes.Equal(got, expect) {
			t.Errorf("%d bytes arrived, want %d with an insertion at %d", len(got), len(expect), at)
		}
	})
}

// TestChecksumNotReady is the negative control: when a packet whose checksum
// is not ready goes back as it is, the server finds it wrong.
func TestChecksumNotReady(t *testing.T) {
	both(t, func(t *testing.T, open func(divert.Config) (divert.Queue, error)) {
		l := newLab(t)
		l.queueRule()
		x := newTranslator(false)
		x.noFill = true
		q := l.open(open, divert.Config{GSO: true})
		l.serve(q, 64, x.handle)
		var ln net.Listener
		l.in(l.server, func() {
			var err error
			ln, err = net.Listen("tcp", netip.AddrPortFrom(server4, 8080).String())
			l.must(err)
		})
		defer ln.Close()
		dialed := make(chan error, 1)
		d := net.Dialer{Timeout: 300 * time.Millisecond}
		l.in(l.client, func() {
			c, err := d.Dial("tcp", netip.AddrPortFrom(vip4, 80).String())
			if err == nil {
				_ = c.Close()
			}
			dialed <- err
		})
		if err := <-dialed; err == nil {
			t.Error("connected with a checksum that was not ready")
		}
		if n := l.tcpChecksumErrors(); n == 0 {
			t.Error("the server found no wrong checksum")
		}
	})
}

// tcpChecksumErrors reads the server's counter.
func (l *lab) tcpChecksumErrors() (n int) {
	l.t.Helper()
	var b []byte
	l.in(l.server, func() {
		var err error
		b, err = os.ReadFile("/proc/thread-self/net/snmp")
		l.must(err)
	})
	var names []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != "Tcp:" {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		for i, name := range names {
			if name == "InCsumErrors" {
				_, err := fmt.Sscan(f[i], &n)
				l.must(err)
				return n
			}
		}
	}
	l.t.Fatal("no TCP checksum errors in snmp")
	return 0
}
