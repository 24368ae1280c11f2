// SPDX-License-Identifier: Apache-2.0

package divert_test

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"testing"
	"time"
	"unsafe"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module/divert"
)

func TestMain(m *testing.M) {
	if os.Getenv(victimEnv) != "" {
		victim()
	}
	goleak.VerifyTestMain(m)
}

// backends are the two queues, which must behave alike.
var backends = []struct {
	name string
	open func(divert.Config) (divert.Queue, error)
}{
	{"plain", divert.OpenPlain},
	{"batched", divert.OpenBatched},
}

// both runs a test for each backend.
func both(t *testing.T, run func(t *testing.T, open func(divert.Config) (divert.Queue, error))) {
	require.NFQueue(t)
	for _, b := range backends {
		t.Run(b.name, func(t *testing.T) { run(t, b.open) })
	}
}

// seed returns the seed of a random test and prints it. WEIR_SEED replays one.
func seed(t testing.TB) *rand.Rand {
	s := rand.Uint64()
	if v := os.Getenv("WEIR_SEED"); v != "" {
		var err error
		if s, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("WEIR_SEED: %v", err)
		}
	}
	t.Logf("WEIR_SEED=%d", s)
	return rand.New(rand.NewPCG(s, s))
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); {
		if time.Now().After(end) {
			t.Fatalf("did not happen: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// The lab is a client, a router and a server in network namespaces of their
// own, joined by veth pairs. The VIPs are routed to the router and belong to
// nobody.
var (
	client4 = netip.MustParseAddr("198.18.0.2")
	server4 = netip.MustParseAddr("198.51.100.2")
	snip4   = netip.MustParseAddr("198.51.100.1")
	vip4    = netip.MustParseAddr("203.0.113.10")
	client6 = netip.MustParseAddr("2001:db8:1::2")
	server6 = netip.MustParseAddr("2001:db8:2::2")
	snip6   = netip.MustParseAddr("2001:db8:2::1")
	vip6    = netip.MustParseAddr("2001:db8:3::10")
)

const (
	testQueue = 7
	testMark  = 0x57000001
)

type lab struct {
	t                      testing.TB
	client, router, server netns.NsHandle
}

func newLab(t testing.TB) *lab {
	t.Helper()
	require.NFQueue(t)
	l := &lab{t: t, client: newNS(t), router: newNS(t), server: newNS(t)}
	l.link(l.client, "c0", l.router, "rc")
	l.link(l.server, "s0", l.router, "rs")
	l.in(l.router, func() {
		for _, s := range []struct{ key, value string }{
			{"ipv4/ip_forward", "1"}, {"ipv6/conf/all/forwarding", "1"},
			{"ipv4/conf/all/rp_filter", "0"}, {"ipv4/conf/rc/rp_filter", "0"}, {"ipv4/conf/rs/rp_filter", "0"},
			{"ipv4/conf/rc/accept_local", "1"}, {"ipv4/conf/rs/accept_local", "1"},
			// No redirects and no answers of the router's own to what is tested.
			{"ipv4/conf/all/send_redirects", "0"},
		} {
			if err := os.WriteFile("/proc/sys/net/"+s.key, []byte(s.value), 0); err != nil {
				t.Fatal(err)
			}
		}
	})
	l.addr(l.router, "rc", "198.18.0.1/24", "2001:db8:1::1/64")
	l.addr(l.router, "rs", "198.51.100.1/24", "2001:db8:2::1/64")
	l.addr(l.client, "c0", "198.18.0.2/24", "2001:db8:1::2/64")
	l.addr(l.server, "s0", "198.51.100.2/24", "2001:db8:2::2/64")
	l.gateway(l.client, "198.18.0.1", "2001:db8:1::1")
	l.gateway(l.server, "198.51.100.1", "2001:db8:2::1")
	return l
}

// newNS makes a namespace without a name, which lives as long as the handle
// and the sockets in it.
func newNS(t testing.TB) netns.NsHandle {
	t.Helper()
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	if err := netns.Set(home); err != nil {
		t.Fatal(err) // the thread stays locked and ends with the test
	}
	runtime.UnlockOSThread()
	_ = home.Close()
	t.Cleanup(func() { _ = ns.Close() })
	return ns
}

// in runs f on a thread in the namespace.
func (l *lab) in(ns netns.NsHandle, f func()) {
	l.t.Helper()
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		l.t.Fatal(err)
	}
	if err := netns.Set(ns); err != nil {
		l.t.Fatal(err)
	}
	defer func() {
		if err := netns.Set(home); err != nil {
			panic(err) // a thread must not go back to others in a wrong place
		}
		runtime.UnlockOSThread()
		_ = home.Close()
	}()
	f()
}

func (l *lab) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) handle(ns netns.NsHandle) *netlink.Handle {
	l.t.Helper()
	h, err := netlink.NewHandleAt(ns)
	l.must(err)
	return h
}

// link joins two namespaces.
func (l *lab) link(a netns.NsHandle, nameA string, b netns.NsHandle, nameB string) {
	l.t.Helper()
	ha, hb := l.handle(a), l.handle(b)
	defer ha.Close()
	defer hb.Close()
	l.must(ha.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: nameA, MTU: 1500, TxQLen: 1000},
		PeerName:  nameB, PeerNamespace: netlink.NsFd(int(b)),
	}))
	for h, name := range map[*netlink.Handle]string{ha: nameA, hb: nameB} {
		for _, n := range []string{"lo", name} {
			i, err := h.LinkByName(n)
			l.must(err)
			l.must(h.LinkSetUp(i))
		}
	}
}

func (l *lab) addr(ns netns.NsHandle, name string, addrs ...string) {
	l.t.Helper()
	h := l.handle(ns)
	defer h.Close()
	i, err := h.LinkByName(name)
	l.must(err)
	for _, s := range addrs {
		a, err := netlink.ParseAddr(s)
		l.must(err)
		a.Flags = unix.IFA_F_NODAD
		l.must(h.AddrAdd(i, a))
	}
}

func (l *lab) gateway(ns netns.NsHandle, gws ...string) {
	l.t.Helper()
	h := l.handle(ns)
	defer h.Close()
	for _, g := range gws {
		ip := net.ParseIP(g)
		all := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
		if ip.To4() == nil {
			all = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
		}
		l.must(h.RouteAdd(&netlink.Route{Dst: all, Gw: ip}))
	}
}

// offload switches a feature of a device off or on, as ethtool does.
func (l *lab) offload(ns netns.NsHandle, name string, command uint32, on bool) {
	l.t.Helper()
	const siocEthtool = 0x8946
	l.in(ns, func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		l.must(err)
		defer unix.Close(fd)
		value := [2]uint32{command, 0}
		if on {
			value[1] = 1
		}
		var req struct {
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			_    [16]byte
		}
		copy(req.name[:], name)
		req.data = unsafe.Pointer(&value[0])
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), siocEthtool, uintptr(unsafe.Pointer(&req)))
		if errno != 0 {
			l.t.Fatalf("ethtool command %#x on %s: %v", command, name, errno)
		}
	})
}

const (
	ethtoolTXChecksum = 0x17
	ethtoolGRO        = 0x2c
)

// queueRule queues all TCP and UDP that arrives at the router, except what has
// our mark, and returns the forward counter of packets with our mark. It uses
// the native expression where the kernel has it, the xtables target elsewhere.
func (l *lab) queueRule() (marked func() uint64) {
	l.t.Helper()
	native := []expr.Any{&expr.Queue{Num: testQueue}}
	info := xt.Unknown(make([]byte, 8))
	// struct xt_NFQ_info_v1: queue number, number of queues, padding.
	copy(info, binaryutil.NativeEndian.PutUint16(testQueue))
	copy(info[2:], binaryutil.NativeEndian.PutUint16(1))
	compat := []expr.Any{&expr.Target{Name: "NFQUEUE", Rev: 1, Info: &info}}
	err := l.install(native)
	if errors.Is(err, fs.ErrNotExist) {
		err = l.install(compat)
	}
	if err != nil {
		require.Missing(l.t, "nfqueue", "a rule that queues: "+err.Error())
	}
	return func() uint64 { return l.counter("forward") }
}

var labTable = &nftables.Table{Family: nftables.TableFamilyINet, Name: "divert_test"}

func (l *lab) install(queue []expr.Any) error {
	c, err := nftables.New(nftables.WithNetNSFd(int(l.router)))
	if err != nil {
		return err
	}
	c.AddTable(labTable)
	chain := func(name string, hook *nftables.ChainHook, prio *nftables.ChainPriority) *nftables.Chain {
		return c.AddChain(&nftables.Chain{Name: name, Table: labTable, Hooknum: hook, Priority: prio, Type: nftables.ChainTypeFilter})
	}
	pre := chain("pre", nftables.ChainHookPrerouting, nftables.ChainPriorityRaw)
	for _, proto := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		// meta l4proto tcp queue num 7
		c.AddRule(&nftables.Rule{Table: labTable, Chain: pre, Exprs: append([]expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
		}, queue...)})
	}
	// meta mark 0x57000001 counter
	count := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(testMark)},
		&expr.Counter{},
	}
	forward := chain("forward", nftables.ChainHookForward, nftables.ChainPriorityFilter)
	c.AddRule(&nftables.Rule{Table: labTable, Chain: forward, Exprs: count})
	output := chain("output", nftables.ChainHookOutput, nftables.ChainPriorityFilter)
	c.AddRule(&nftables.Rule{Table: labTable, Chain: output, Exprs: count})
	// udp dport 9 drop, for errors of emission
	c.AddRule(&nftables.Rule{Table: labTable, Chain: output, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0, 9}},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}})
	return c.Flush()
}

// counter reads the counter of a chain's first rule.
func (l *lab) counter(chain string) uint64 {
	l.t.Helper()
	c, err := nftables.New(nftables.WithNetNSFd(int(l.router)))
	l.must(err)
	rules, err := c.GetRules(labTable, &nftables.Chain{Name: chain})
	l.must(err)
	for _, r := range rules {
		for _, e := range r.Exprs {
			if n, ok := e.(*expr.Counter); ok {
				return n.Packets
			}
		}
	}
	l.t.Fatalf("chain %s has no counter", chain)
	return 0
}

// open opens a queue in the router and closes it at the end of the test.
func (l *lab) open(open func(divert.Config) (divert.Queue, error), cfg divert.Config) divert.Queue {
	l.t.Helper()
	cfg.Queue = testQueue
	var q divert.Queue
	l.in(l.router, func() {
		var err error
		q, err = open(cfg)
		l.must(err)
	})
	l.t.Cleanup(func() { _ = q.Close() })
	return q
}

// serve answers packets in a goroutine until the queue is closed, which the
// returned function does.
func (l *lab) serve(q divert.Queue, batch int, handle func(*divert.Packet)) (stop func()) {
	done := make(chan error, 1)
	go func() {
		pkts := make([]divert.Packet, batch)
		for {
			n, err := q.Receive(pkts, time.Minute)
			if err == nil {
				for i := range pkts[:n] {
					handle(&pkts[i])
				}
				err = q.Send(pkts[:n])
			}
			if err != nil {
				done <- err
				return
			}
		}
	}()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		_ = q.Close()
		if err := <-done; !errors.Is(err, divert.ErrClosed) {
			l.t.Errorf("the loop ended with %v", err)
		}
	}
	l.t.Cleanup(stop)
	return stop
}

// udp opens a UDP socket in a namespace.
func (l *lab) udp(ns netns.NsHandle, local netip.AddrPort) *net.UDPConn {
	l.t.Helper()
	var c *net.UDPConn
	l.in(ns, func() {
		var err error
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(local))
		l.must(err)
	})
	l.must(c.SetReadBuffer(8 << 20))
	l.t.Cleanup(func() { _ = c.Close() })
	return c
}

func (l *lab) sendUDP(c *net.UDPConn, to netip.AddrPort, payload []byte) {
	l.t.Helper()
	_, err := c.WriteToUDPAddrPort(payload, to)
	l.must(err)
}

// readUDP reads one datagram, which must come in time.
func (l *lab) readUDP(c *net.UDPConn) (string, netip.AddrPort) {
	l.t.Helper()
	l.must(c.SetReadDeadline(time.Now().Add(20 * time.Second)))
	b := make([]byte, 65536)
	n, from, err := c.ReadFromUDPAddrPort(b)
	l.must(err)
	return string(b[:n]), netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

// answer handles exactly n packets, in as many pieces as they come.
func (l *lab) answer(q divert.Queue, n int, handle func(i int, p *divert.Packet)) {
	l.t.Helper()
	for i := 0; i < n; {
		pkts := make([]divert.Packet, n-i)
		got, err := q.Receive(pkts, 20*time.Second)
		l.must(err)
		if got == 0 {
			l.t.Fatalf("received %d packets instead of %d", i, n)
		}
		for j := range pkts[:got] {
			handle(i, &pkts[j])
			i++
		}
		l.must(q.Send(pkts[:got]))
	}
}

// waiting waits until the kernel holds n packets without a verdict.
func (l *lab) waiting(q divert.Queue, n uint64) {
	l.t.Helper()
	eventually(l.t, fmt.Sprintf("%d packets wait in the queue", n), func() bool {
		s := q.Stats()
		l.must(s.KernelErr)
		return s.Kernel.Waiting == n
	})
}
