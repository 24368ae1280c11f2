// SPDX-License-Identifier: Apache-2.0

package syncookie

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/packet"
)

const (
	testMark, testMask = 0x57000000, 0xff000000
	testMSS            = 8960

	redirected = 7 // TC_ACT_REDIRECT
)

var testVIPs = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:80"), netip.MustParseAddrPort("[2001:db8::1]:8080")}

// router puts the test's thread into a network namespace of its own that
// forwards and has a route to everybody.
func router(t *testing.T) {
	t.Helper()
	require.Netns(t)
	runtime.LockOSThread() // for good: the namespace goes with the thread
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "out"}, PeerName: "peer"}
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	must(netlink.LinkAdd(link))
	must(netlink.LinkSetUp(link))
	peer, err := netlink.LinkByName("peer")
	must(err)
	must(netlink.LinkSetUp(peer))
	for _, family := range []string{"ipv4", "ipv6"} {
		must(os.WriteFile("/proc/sys/net/"+family+"/conf/all/forwarding", []byte("1"), 0o644))
	}
	for _, dst := range []string{"0.0.0.0/0", "::/0"} {
		to, err := netlink.ParseIPNet(dst)
		must(err)
		must(netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: to, Scope: netlink.SCOPE_LINK}))
	}
}

// rig is a program and a handshake with the same memory.
type rig struct {
	a  *Answerer
	hs *engine.Handshake
	// offset is that of the engine's clock.
	offset int64
}

func newRig(t *testing.T, memory int) *rig {
	t.Helper()
	require.Netns(t)
	r := &rig{offset: 1_700_000_000_000_000_000}
	secret := [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255}
	var err error
	r.a, err = New(Config{Secret: secret, Mark: testMark, MarkMask: testMask, MSS4: testMSS, MSS6: testMSS, Offset: r.offset, Memory: memory})
	if err == nil {
		err = r.a.Load()
	}
	if errors.Is(err, ErrUnsupported) || errors.Is(err, os.ErrPermission) {
		require.Missing(t, "syncookie", err.Error())
	}
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() {
		if err := r.a.Close(); err != nil {
			t.Error(err)
		}
	})
	r.hs = engine.NewHandshake(engine.NewMACCookies(secret), testMSS, testMSS, func(packet.Endpoint) bool { return true })
	mem, _ := r.a.Memory()
	if err := r.hs.Share(mem); err != nil {
		t.Fatal(err)
	}
	if err := r.a.Update(testVIPs); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) now() int64 { return flowstore.HostTime() + r.offset }

// skb are the fields of struct __sk_buff that a run may set.
type skb struct {
	_    [2]uint32
	Mark uint32
	_    [6]uint32
	InIf uint32
	_    [38]uint32
}

// run has the program look at an IP packet: what became of it, and the verdict.
func (r *rig) run(t *testing.T, b []byte, mark, in uint32) ([]byte, int32) {
	t.Helper()
	frame := make([]byte, ethLen, ethLen+len(b))
	binary.BigEndian.PutUint16(frame[12:], 0x0800)
	if b[0]>>4 == 6 {
		binary.BigEndian.PutUint16(frame[12:], 0x86dd)
	}
	out := make([]byte, 512)
	o := ebpf.RunOptions{Data: append(frame, b...), DataOut: out, Context: skb{Mark: mark, InIf: in}}
	code, err := r.a.prog.Run(&o)
	if err != nil {
		t.Fatal(err)
	}
	return o.DataOut[ethLen:], int32(code)
}

// syn makes a SYN from random numbers.
func syn(rnd *rand.Rand, options []byte) []byte {
	vip := packet.EndpointFrom(testVIPs[rnd.IntN(2)])
	var src [16]byte
	for i := range src {
		src[i] = byte(rnd.Uint32())
	}
	src[0] = 0x20
	from := netip.AddrFrom16(src)
	if vip.Addr.Is4() {
		from = netip.AddrFrom4([4]byte(src[:4]))
	}
	return packet.AppendSegment(nil, &packet.Segment{
		Src: packet.Endpoint{Addr: packet.AddrFrom(from), Port: uint16(rnd.Uint32())}, Dst: vip,
		Seq: packet.Seq(rnd.Uint32()), Flags: packet.SYN, Window: 64240, Options: options, TTL: uint8(rnd.Uint32() | 1),
	}, nil)
}

// usual are the options of real hosts, with random values.
func usual(rnd *rand.Rand) []byte {
	mss := []byte{2, 4, byte(rnd.Uint32()) >> uint(rnd.IntN(8)), byte(rnd.Uint32())}
	ws := byte(rnd.IntN(17))
	ts := make([]byte, 8)
	binary.BigEndian.PutUint32(ts, rnd.Uint32())
	var o []byte
	switch rnd.IntN(7) {
	case 0:
	case 1:
		o = mss
	case 2: // Linux
		o = append(append(append(mss, 4, 2, 8, 10), ts...), 1, 3, 3, ws)
	case 3: // without timestamps
		o = append(mss, 1, 1, 4, 2, 1, 3, 3, ws)
	case 4: // Windows
		o = append(mss, 1, 3, 3, ws, 1, 1, 4, 2)
	case 5: // macOS
		o = append(append(append(mss, 1, 3, 3, ws, 1, 1, 8, 10), ts...), 4, 2, 0, 0)
	case 6: // FreeBSD
		o = append(append(mss, 1, 3, 3, ws, 4, 2, 8, 10), ts...)
	}
	return o
}

// answer is what the handshake says, in the same slot as the program before it.
func (r *rig) answer(b []byte) []byte {
	var out engine.Output
	out.Reset()
	r.hs.SYN(r.now(), b, packet.ChecksumUnknown, &out)
	if out.Len() != 1 {
		return nil
	}
	return bytes.Clone(out.Packet(0))
}

func TestSameAnswer(t *testing.T) {
	router(t)
	r := newRig(t, 0)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	if info, err := r.a.prog.Info(); err == nil {
		n, _ := info.VerifiedInstructions()
		t.Logf("%d instructions verified", n)
	}
	r.answer(syn(rnd, nil)) // opens the slot
	answered, other := 0, 0
	for i := range 20_000 {
		var o []byte
		if i%4 == 0 { // nonsense
			o = make([]byte, 4*rnd.IntN(11))
			for j := range o {
				o[j] = byte(rnd.IntN(6))
			}
		} else {
			o = usual(rnd)
		}
		b := syn(rnd, o)
		got, verdict := r.run(t, b, testMark|5, 2)
		if verdict == verdictNext {
			other++
			if i%4 != 0 && !bytes.Equal(got, b) {
				t.Fatalf("a packet that is passed on was changed:\n%x\n%x", b, got)
			}
			r.answer(b)
			continue
		}
		answered++
		p, problem := packet.ParseTCP(b)
		if problem != packet.OK {
			t.Fatalf("options %x: answered, but %v", o, problem)
		}
		tuple, isn := p.Tuple(), p.Seq()
		q, problem := packet.ParseTCP(got)
		if problem != packet.OK || !q.IPHeaderOK() || !q.VerifyChecksum() {
			t.Fatalf("options %x: answer %x: %v", o, got, problem)
		}
		now := r.now()
		if _, ok := r.hs.Validate(&tuple, isn, q.Seq(), now); !ok {
			t.Fatalf("options %x: the cookie of %x does not count", o, got)
		}
		if !r.hs.Recent(&tuple, now) {
			t.Fatalf("options %x: the tuple is not noted", o)
		}
		if rtt := r.hs.RTT(&tuple, isn, now); rtt < 0 || rtt > 1e9 {
			t.Fatalf("options %x: round-trip time %d", o, rtt)
		}
		if want := r.answer(b); !bytes.Equal(got, want) {
			if r.now()/engine.CookieFormat().Slot != now/engine.CookieFormat().Slot {
				continue
			}
			t.Fatalf("options %x:\n%x\nwant\n%x", o, got, want)
		}
	}
	t.Logf("%d answered, %d left", answered, other)
	if answered < 14_000 {
		t.Errorf("only %d of 20000 answered", answered)
	}
	if n := r.hs.Elsewhere().Load(); n != uint64(answered) {
		t.Errorf("%d counted, %d answered", n, answered)
	}
}

// TestLeavesTheRest: what is no plain SYN of ours to a VIP goes on as it came,
// and is not noted. The first of each list is the control, which is answered.
func TestLeavesTheRest(t *testing.T) {
	router(t)
	r := newRig(t, 0)
	rnd := rand.New(rand.NewPCG(1, 1))
	linux := []byte{2, 4, 5, 0xb4, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7}
	r.answer(syn(rnd, nil))
	segment := func(change func(*packet.Segment), payload string) []byte {
		s := packet.Segment{
			Src: packet.EndpointFrom(netip.MustParseAddrPort("198.51.100.7:4000")), Dst: packet.EndpointFrom(testVIPs[0]),
			Seq: 99, Flags: packet.SYN, Window: 1000, Options: linux,
		}
		change(&s)
		return packet.AppendSegment(nil, &s, []byte(payload))
	}
	plain := func(*packet.Segment) {}
	flags := func(f packet.Flags) func(*packet.Segment) { return func(s *packet.Segment) { s.Flags = f } }
	with := func(o ...byte) func(*packet.Segment) { return func(s *packet.Segment) { s.Options = o } }
	withIPOptions := segment(plain, "")
	withIPOptions = append(append(append([]byte{}, withIPOptions[:20]...), 1, 1, 1, 1), withIPOptions[20:]...)
	withIPOptions[0] = 0x46
	binary.BigEndian.PutUint16(withIPOptions[2:], uint16(len(withIPOptions)))
	damaged := segment(plain, "")
	damaged[len(damaged)-1] ^= 1
	partial := segment(plain, "")
	binary.BigEndian.PutUint16(partial[20+16:], packet.Fold(packet.Sum(partial[12:20], 6+uint32(len(partial)-20))))
	other := func(s *packet.Segment) { s.Dst.Port = 81 }
	fragment := segment(plain, "")
	fragment[6] |= 0x20
	udp := segment(plain, "")
	udp[9] = 17
	for _, c := range []struct {
		name     string
		packet   []byte
		mark, in uint32
		answered bool
	}{
		{"plain", segment(plain, ""), testMark, 2, true},
		{"with bits of others in the mark", segment(plain, ""), testMark | 0xffffff, 7, true},
		{"with ECN", segment(flags(packet.SYN|0xc0), ""), testMark, 2, true},
		{"with the checksum left to the card", partial, testMark, 2, true},
		{"damaged", damaged, testMark, 2, false},
		{"without the mark", segment(plain, ""), 5, 2, false},
		{"of this host", segment(plain, ""), testMark, 0, false},
		{"by lo", segment(plain, ""), testMark, 1, false},
		{"with data", segment(plain, "x"), testMark, 2, false},
		{"to another port", segment(other, ""), testMark, 2, false},
		{"SYN-ACK", segment(flags(packet.SYN|packet.ACK), ""), testMark, 2, false},
		{"SYN-RST", segment(flags(packet.SYN|packet.RST), ""), testMark, 2, false},
		{"SYN-FIN", segment(flags(packet.SYN|packet.FIN), ""), testMark, 2, false},
		{"ACK", segment(flags(packet.ACK), ""), testMark, 2, false},
		{"an option that is too long", segment(with(2, 8, 1, 1), ""), testMark, 2, false},
		{"an option without a length", segment(with(1, 1, 1, 2), ""), testMark, 2, false},
		{"a SACK", segment(with(5, 4, 1, 1), ""), testMark, 2, false},
		{"IP options", withIPOptions, testMark, 2, false},
		{"a fragment", fragment, testMark, 2, false},
		{"no TCP", udp, testMark, 2, false},
		{"cut", segment(plain, "")[:39], testMark, 2, false},
	} {
		before := r.hs.Elsewhere().Load()
		got, verdict := r.run(t, c.packet, c.mark, c.in)
		if (verdict != verdictNext) != c.answered || r.hs.Elsewhere().Load()-before > 0 != c.answered {
			t.Errorf("%s: verdict %d, answered: want %v", c.name, verdict, c.answered)
		}
		if !c.answered && !bytes.Equal(got, c.packet) {
			t.Errorf("%s: changed to %x", c.name, got)
		}
	}
	if _, verdict := r.run(t, segment(plain, ""), testMark, 2); verdict != redirected {
		t.Errorf("not sent: verdict %d", verdict)
	}
	for _, forwarding := range []string{"0", "1"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/lo/forwarding", []byte(forwarding), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, verdict := r.run(t, segment(plain, ""), testMark, 2); (verdict == redirected) != (forwarding == "1") {
			t.Errorf("forwarding of lo %s: verdict %d", forwarding, verdict)
		}
	}
	if err := r.a.Update(nil); err != nil {
		t.Fatal(err)
	}
	if _, verdict := r.run(t, segment(plain, ""), testMark, 2); verdict != verdictNext {
		t.Errorf("answered for nobody: verdict %d", verdict)
	}
}

// TestSlotOpens: the first SYN of a slot is left to the handshake, which clears
// the bits of the generation.
func TestSlotOpens(t *testing.T) {
	router(t)
	r := newRig(t, 0)
	rnd := rand.New(rand.NewPCG(2, 2))
	b := syn(rnd, nil)
	if _, verdict := r.run(t, b, testMark, 2); verdict != verdictNext {
		t.Fatalf("answered before its slot was opened: verdict %d", verdict)
	}
	r.answer(b)
	if _, verdict := r.run(t, b, testMark, 2); verdict == verdictNext {
		t.Error("not answered in an open slot")
	}
}

// TestSuccessor: what was answered counts for one who inherits the memory, and
// for nobody else.
func TestSuccessor(t *testing.T) {
	router(t)
	r := newRig(t, 0)
	rnd := rand.New(rand.NewPCG(3, 3))
	b := syn(rnd, nil)
	r.answer(syn(rnd, nil))
	got, verdict := r.run(t, b, testMark, 2)
	if verdict == verdictNext {
		t.Fatal("not answered")
	}
	p, _ := packet.ParseTCP(b)
	q, _ := packet.ParseTCP(got)
	tuple := p.Tuple()
	_, fd := r.a.Memory()
	copied, err := unix.Dup(fd)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.a.Close(); err != nil {
		t.Fatal(err)
	}
	heir, stranger := newRig(t, copied), newRig(t, 0)
	if _, ok := heir.hs.Validate(&tuple, p.Seq(), q.Seq(), r.now()); !ok {
		t.Error("the heir does not know the cookie")
	}
	if _, ok := stranger.hs.Validate(&tuple, p.Seq(), q.Seq(), r.now()); ok {
		t.Error("the cookie counts without having been noted")
	}
	if fd, err := unix.MemfdCreate("other", 0); err == nil {
		if a, err := New(Config{Memory: fd}); err == nil {
			t.Error("any file is taken for the memory of a predecessor", a.Close())
		}
	}
}
