// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"testing"

	"github.com/weirgate/weir/module/packet"
)

// The promise about cookies, in words: a first request is served so much after
// its SYN was answered whatever happened to the acknowledgment in between, and
// beyond the second figure it is not.
const (
	cookieAtLeast = (cookieSlots - 1) * slotNanos
	cookieAtMost  = cookieSlots * slotNanos
)

// TestLateFirstRequest: the acknowledgment of a handshake is lost, or waits
// behind a thread that does not run, and the client asks only after a while. It
// is served within 24 seconds of its handshake, wherever these lie in the slots,
// and whether or not SYNs of others were answered meanwhile. The controls:
// beyond 32 seconds it is reset, and so is a request whose SYN nobody answered.
func TestLateFirstRequest(t *testing.T) {
	if cookieAtLeast < 24*second || int64(tombLife)*second <= cookieAtMost {
		t.Fatalf("a cookie lives for at least %d s, a tombstone for %d s", cookieAtLeast/second, tombLife)
	}
	rnd := seeded(t)
	opts := packet.AppendSYNOptions(nil, packet.SYNOptions{MSS: 1460, WindowScale: 7, SACKPermitted: true})
	for range 200 {
		g := newRig(t, oneServer, keepIdle)
		g.hs.Cookies = &MACCookies{k0: rnd.Uint64(), k1: rnd.Uint64()}
		g.now += rnd.Int64N(cookieAtMost)
		connect := func(isn packet.Seq) packet.Seq {
			g.out.Reset()
			g.hs.SYN(g.now, g.raw(c1, vip, seg{fl: syn, seq: isn, opts: opts}), packet.ChecksumUnknown, &g.out)
			return g.gather(nil)[0].seq
		}
		isn := packet.Seq(rnd.Uint32())
		iss := connect(isn)
		late := rnd.Int64N(2 * cookieAtMost)
		for until := g.now + late; g.now < until; g.now += min(second, until-g.now) {
			if rnd.IntN(2) == 0 { // others come, and begin the next slots
				g.hs.SYN(g.now, g.raw(user(rnd.IntN(1000)), vip, seg{fl: syn, seq: packet.Seq(rnd.Uint32()), opts: opts}), packet.ChecksumUnknown, &g.out)
			}
		}
		first := seg{fl: ack | psh, seq: isn + 1, ack: iss + 1, data: get("/", 60)}
		served, reset := 0, 0
		for _, s := range g.play(g.raw(c1, vip, first)) {
			if s.fl.Has(rst) {
				reset++
			} else if s.fl.Has(syn) {
				served++
			}
		}
		if late < cookieAtLeast && served != 1 || late >= cookieAtMost && reset != 1 || served+reset != 1 {
			t.Fatalf("%d ms after the handshake: %d served, %d reset: %s", late/millisecond, served, reset, g.counts())
		}
	}
	g := newRig(t, oneServer, keepIdle)
	if all := g.play(g.raw(c1, vip, seg{fl: ack | psh, seq: 1, ack: 1_000_001, data: get("/", 60)})); len(all) != 1 || !all[0].fl.Has(rst) {
		t.Errorf("a request without a handshake: %+v", all)
	}
}

// TestDuplicateInTheLifeOfACookie: the first segment of a connection that is
// over comes again, at any time at which its cookie may be good. It never runs
// its request again. The control is TestStaleFirstSegment's.
func TestDuplicateInTheLifeOfACookie(t *testing.T) {
	for late := int64(0); late <= cookieAtMost+6*second; late += 500 * millisecond {
		g := newRig(t, oneServer, keepIdle)
		g.hs.Cookies = &MACCookies{k0: 1, k1: 2}
		g.now += late * 7 % slotNanos
		g.out.Reset()
		g.hs.SYN(g.now, g.raw(c1, vip, seg{fl: syn, seq: 100, opts: sackPermitted}), packet.ChecksumUnknown, &g.out)
		iss := g.gather(nil)[0].seq
		first := g.raw(c1, vip, seg{fl: ack | psh, seq: 101, ack: iss + 1, data: get("/", 60)})
		g.play(first)
		g.play(g.raw(c1, vip, seg{fl: rst, seq: 161}))
		if u := g.e.Usage(); u.Clients != 0 || u.Tombs != 1 {
			t.Fatalf("%+v", u)
		}
		g.wait(late)
		g.play(first)
		if u := g.e.Usage(); u.Clients != 0 {
			t.Fatalf("%d ms later the duplicate makes a connection", late/millisecond)
		}
	}
}

// TestValidateWithoutMAC: what belongs to nothing costs no MAC. The control: what
// answers a SYN-ACK does.
func TestValidateWithoutMAC(t *testing.T) {
	c := &countedCookies{Cookies: &MACCookies{k0: 1, k1: 2}}
	g := newRig(t, oneServer)
	g.hs.Cookies = c
	for i := range 1000 {
		g.play(g.raw(user(i), vip, seg{fl: ack, seq: packet.Seq(i * 1000), ack: packet.Seq(i * 77_777)}))
	}
	if c.checks != 0 {
		t.Errorf("%d cookies of strangers were checked", c.checks)
	}
	g.SYN(c1, 100)
	g.play(g.raw(c1, vip, seg{fl: ack, seq: 101, ack: 5}))
	if c.checks == 0 {
		t.Error("no cookie is checked at all")
	}
}

type countedCookies struct {
	Cookies
	checks int
}

func (c *countedCookies) Check(t packet.Tuple, isn, iss packet.Seq, now int64) (uint8, bool) {
	c.checks++
	return c.Cookies.Check(t, isn, iss, now)
}

// TestCookiesAfterBoot: the clock may have begun a moment ago, with no slots
// before.
func TestCookiesAfterBoot(t *testing.T) {
	g := newRig(t, oneServer)
	g.hs.Cookies = &MACCookies{k0: 1, k1: 2}
	for g.now = 1; g.now < 2*cookieAtMost; g.now += 3 * second {
		g.SYN(c1, 100)
		key := packet.Tuple{Src: ep(c1), Dst: ep(vip)}
		if !g.hs.Recent(&key, g.now) {
			t.Errorf("a SYN at %d ms is not known", g.now/millisecond)
		}
		g.play(g.raw(c2, vip, seg{fl: ack, seq: 1, ack: 2}))
	}
}
