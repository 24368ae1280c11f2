// SPDX-License-Identifier: Apache-2.0

package divert_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module/divert"
)

// victimEnv makes the test's executable an engine that is going to be killed:
// "hold" reads a packet and answers none, "serve" answers all.
const victimEnv = "WEIR_DIVERT_VICTIM"

// victim reads the queue whose socket is descriptor 3, or one that it binds
// itself if there is none, and writes a line per batch.
func victim() {
	cfg := divert.Config{Queue: testQueue, GSO: true}
	if os.Getenv(victimEnv+"_FD") != "" {
		cfg.FD = 3
	}
	q, err := divert.OpenBatched(cfg)
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	fmt.Println(0)
	batch := make([]divert.Packet, 64)
	for {
		n, err := q.Receive(batch, time.Minute)
		if err != nil {
			os.Exit(1)
		}
		fmt.Println(n)
		if os.Getenv(victimEnv) == "hold" {
			select {}
		}
		for i := range batch[:n] {
			batch[i].Verdict = divert.Accept
		}
		if q.Send(batch[:n]) != nil {
			os.Exit(1)
		}
	}
}

// prey is a running victim.
type prey struct {
	l   *lab
	cmd *exec.Cmd
	out *bufio.Scanner
}

// victim starts one in the router. fd is the queue's socket, 0 for none.
func (l *lab) victim(kind string, fd int) *prey {
	l.t.Helper()
	p := &prey{l: l, cmd: exec.Command(os.Args[0], "-test.run=^$")}
	p.cmd.Env = append(os.Environ(), victimEnv+"="+kind)
	if fd != 0 {
		own, err := unix.Dup(fd)
		l.must(err)
		f := os.NewFile(uintptr(own), "queue")
		defer f.Close()
		p.cmd.ExtraFiles = []*os.File{f}
		p.cmd.Env = append(p.cmd.Env, victimEnv+"_FD=3")
	}
	r, w, err := os.Pipe()
	l.must(err)
	l.t.Cleanup(func() { _ = r.Close() })
	p.cmd.Stdout, p.cmd.Stderr = w, os.Stderr
	l.in(l.router, func() { l.must(p.cmd.Start()) })
	_ = w.Close()
	l.t.Cleanup(func() { _ = p.cmd.Process.Kill(); _ = p.cmd.Wait() })
	p.out = bufio.NewScanner(r)
	if n := p.read(); n != 0 {
		l.t.Fatalf("the victim begins with %d", n)
	}
	return p
}

// read waits for the next batch and returns its size.
func (p *prey) read() int {
	p.l.t.Helper()
	if !p.out.Scan() {
		p.l.t.Fatalf("the victim ended: %v", p.out.Err())
	}
	n, err := strconv.Atoi(p.out.Text())
	if err != nil {
		p.l.t.Fatalf("the victim wrote %q", p.out.Text())
	}
	return n
}

func (p *prey) kill() {
	p.l.t.Helper()
	p.l.must(p.cmd.Process.Kill())
	_ = p.cmd.Wait()
}

// hold binds the queue in the router, as a supervisor does.
func (l *lab) hold(cfg divert.Config) int {
	l.t.Helper()
	cfg.Queue = testQueue
	fd := -1
	l.in(l.router, func() {
		var err error
		fd, err = divert.Bind(cfg)
		l.must(err)
	})
	l.t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// successor opens a copy of the held socket.
func (l *lab) successor(fd int, cfg divert.Config) divert.Queue {
	l.t.Helper()
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	l.must(err)
	cfg.FD = own
	return l.open(divert.OpenBatched, cfg)
}

// queued waits until n packets are in the queue, which somebody else may have.
func (l *lab) queued(n int) {
	l.t.Helper()
	eventually(l.t, fmt.Sprintf("%d packets wait in the queue", n), func() (ok bool) {
		l.in(l.router, func() {
			k, err := divert.ReadKernelStats(testQueue)
			l.must(err)
			ok = len(k) == 1 && k[0].Waiting == uint64(n)
		})
		return ok
	})
}

const earlyMark = 0x0badcafe

// markEarly has an earlier chain mark all packets to a port and count them.
func (l *lab) markEarly(port uint16) (passed func() uint64) {
	l.t.Helper()
	c, err := nftables.New(nftables.WithNetNSFd(int(l.router)))
	l.must(err)
	early := c.AddChain(&nftables.Chain{
		Name: "early", Table: labTable, Hooknum: nftables.ChainHookPrerouting,
		Priority: nftables.ChainPriorityRef(-500), Type: nftables.ChainTypeFilter,
	})
	c.AddRule(&nftables.Rule{Table: labTable, Chain: early, Exprs: []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint32(earlyMark)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
		&expr.Counter{},
	}})
	l.must(c.Flush())
	return func() uint64 { return l.counter("early") }
}

// TestTakeOver kills an engine with packets that it has read and not answered,
// and others that nobody has read. The successor gets every one of them, in
// order as long as none arrive meanwhile, with its mark; nothing is dropped, and no chain is passed twice.
func TestTakeOver(t *testing.T) {
	require.NFQueue(t)
	const before, after = 50, 30
	for _, rounds := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d deaths", rounds), func(t *testing.T) {
			l := newLab(t)
			l.queueRule()
			passed := l.markEarly(5000)
			fd := l.hold(divert.Config{GSO: true})
			c := l.udp(l.client, at(client4, 4000))
			s := l.udp(l.server, at(server4, 5000))
			sent := 0
			send := func(n int) {
				for range n {
					l.sendUDP(c, at(server4, 5000), []byte(strconv.Itoa(sent)))
					sent++
				}
			}
			for range rounds {
				v := l.victim("hold", fd)
				send(before)
				v.read()
				v.kill()
				send(after)
				l.queued(sent)
			}
			q := l.successor(fd, divert.Config{GSO: true})
			seen := map[string]bool{}
			l.answer(q, sent, func(i int, p *divert.Packet) {
				h, _ := parse(p.Data)
				text := string(p.Data[h.payload:])
				if p.Mark != earlyMark || p.Hook != 0 || p.InIf == 0 || seen[text] || rounds == 1 && text != strconv.Itoa(i) {
					t.Errorf("packet %d is %q: id %d, mark %#x, hook %d, interface %d", i, text, p.ID, p.Mark, p.Hook, p.InIf)
				}
				seen[text] = true
				p.Verdict = divert.Accept
			})
			for range sent {
				text, _ := l.readUDP(s)
				if !seen[text] {
					t.Errorf("the server got %q again, or never sent", text)
				}
				delete(seen, text)
			}
			st := q.Stats()
			k := st.Kernel
			if k.DroppedQueueFull != 0 || k.DroppedUser != 0 || k.Waiting != 0 || st.Dropped != 0 || st.VerdictErrors != 0 {
				t.Errorf("something was lost: %+v", st)
			}
			if st.Requeued != uint64(sent) || passed() != uint64(sent) {
				t.Errorf("%d packets: %d queued again, the chain before ours passed %d times", sent, st.Requeued, passed())
			}
			// And it serves on as any queue does.
			send(10)
			l.answer(q, 10, func(_ int, p *divert.Packet) { p.Verdict = divert.Drop })
			l.waiting(q, 0)
		})
	}
}

// TestTakeOverControl: without a held socket, the packets of a killed engine
// are lost.
func TestTakeOverControl(t *testing.T) {
	l := newLab(t)
	l.queueRule()
	v := l.victim("hold", 0)
	c := l.udp(l.client, at(client4, 4000))
	for range 20 {
		l.sendUDP(c, at(server4, 5000), []byte("x"))
	}
	v.read()
	v.kill()
	q := l.open(divert.OpenBatched, divert.Config{})
	l.sendUDP(c, at(server4, 5000), []byte("last"))
	n := 0
	l.answer(q, 1, func(_ int, p *divert.Packet) {
		h, _ := parse(p.Data)
		if string(p.Data[h.payload:]) != "last" {
			n++
		}
	})
	if n != 0 {
		t.Error("a packet of the dead engine's queue came")
	}
}

// TestTakeOverTCP: a TCP transfer with super-packets goes on through the death
// of an engine, again and again.
func TestTakeOverTCP(t *testing.T) {
	l := newLab(t)
	l.queueRule()
	fd := l.hold(divert.Config{GSO: true})
	const size = 64 << 20
	want := sha256.New()
	var ln net.Listener
	l.in(l.server, func() {
		var err error
		ln, err = net.Listen("tcp", at(server4, 80).String())
		l.must(err)
	})
	defer ln.Close()
	v := l.victim("serve", fd)
	sent := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			sent <- err
			return
		}
		defer c.Close()
		block := bytes.Repeat([]byte("0123456789abcdef"), 4096)
		for n := 0; n < size && err == nil; n += len(block) {
			block[n>>16&0xffff]++
			want.Write(block)
			_, err = c.Write(block)
		}
		sent <- err
	}()
	var c net.Conn
	l.in(l.client, func() {
		var err error
		c, err = net.DialTimeout("tcp", at(server4, 80).String(), 20*time.Second)
		l.must(err)
	})
	defer c.Close()
	l.must(c.SetDeadline(time.Now().Add(60 * time.Second)))
	got := sha256.New()
	part := int64(size / 8)
	for range 6 {
		_, err := io.CopyN(got, c, part)
		l.must(err)
		v.kill()
		v = l.victim("serve", fd)
	}
	v.kill()
	q := l.successor(fd, divert.Config{GSO: true})
	stop := l.serve(q, 64, func(p *divert.Packet) { p.Verdict = divert.Accept })
	_, err := io.Copy(got, c)
	l.must(err)
	l.must(<-sent)
	if !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Error("the bytes differ")
	}
	st := q.Stats()
	stop()
	if st.Kernel.DroppedQueueFull != 0 || st.Kernel.DroppedUser != 0 {
		t.Errorf("dropped: %+v", st.Kernel)
	}
	if st.GSO == 0 || st.VerdictErrors != 0 {
		t.Errorf("no super-packets, or refused answers: %+v", st)
	}
}

// TestTakeOverRefuses: a socket that does not hold the queue is refused and
// closed, and the plain queue refuses every one.
func TestTakeOverRefuses(t *testing.T) {
	l := newLab(t)
	fd := l.hold(divert.Config{})
	l.in(l.router, func() {
		own, err := unix.Dup(fd)
		l.must(err)
		if _, err := divert.OpenBatched(divert.Config{Queue: testQueue + 1, FD: own}); !errors.Is(err, divert.ErrNotHeld) {
			t.Errorf("a socket of another queue: %v", err)
		}
		if _, err := unix.FcntlInt(uintptr(own), unix.F_GETFD, 0); err != unix.EBADF {
			t.Error("the refused socket is still open")
		}
		if _, err := divert.OpenPlain(divert.Config{Queue: testQueue, FD: fd}); !errors.Is(err, divert.ErrUnsupported) {
			t.Errorf("plain: %v", err)
		}
		if _, err := divert.Bind(divert.Config{Queue: testQueue}); !errors.Is(err, divert.ErrQueueInUse) {
			t.Errorf("bound twice: %v", err)
		}
	})
}
