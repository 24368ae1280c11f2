// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/weirgate/weir/module/packet"
)

// crowd makes a rig with so many clients that an engine looks ahead.
func crowd(t testing.TB) (*rig, func(i int) netip.AddrPort) {
	const n = crowdedFrom + 100
	g := newRigOf(&testing.T{}, n+100, oneServer)
	client := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}), uint16(1000+(i>>16)))
	}
	for i := range n {
		g.cookies[packet.Seq(i)] = 7000
		g.SYN(client(i), packet.Seq(i))
		g.client(client(i), seg{fl: ack | psh, seq: packet.Seq(i + 1), ack: 7001, data: "GET /half"})
	}
	if g.e.clients.Len() < crowdedFrom {
		t.Fatalf("%d clients", g.e.clients.Len())
	}
	return g, client
}

// TestAhead: what is read ahead changes nothing: the same packets have the same
// results, whatever they are.
func TestAhead(t *testing.T) {
	one, client := crowd(t)
	two, _ := crowd(t)
	var batch [][]byte
	for i := range 60 {
		batch = append(batch, one.raw(client(i*31), vip, seg{fl: ack | psh, seq: packet.Seq(i*31 + 1 + 9), ack: 7001, data: " HTTP/1.1\r\nHost: a\r\n\r\n"}))
	}
	batch = append(batch, nil, []byte{0x45}, []byte("nonsense"),
		one.raw(netip.MustParseAddrPort("203.0.113.99:9"), vip, seg{fl: ack, seq: 1, ack: 2}),
		one.raw(s1, ep2(10240), seg{fl: ack, seq: 1, ack: 2}))
	one.e.Ahead(len(batch), func(i int) []byte { return batch[i] })
	if one.e.waste == 0 {
		t.Error("nothing was read")
	}
	for i, b := range batch {
		if x, y := one.step(Packet, b), two.step(Packet, slices.Clone(b)); fmt.Sprint(x) != fmt.Sprint(y) {
			t.Errorf("packet %d: %v, and without looking ahead %v", i, x, y)
		}
	}
	if one.e.Usage() != two.e.Usage() {
		t.Errorf("%+v, and without looking ahead %+v", one.e.Usage(), two.e.Usage())
	}
}

// TestAheadAllocs: it allocates nothing.
func TestAheadAllocs(t *testing.T) {
	g, client := crowd(t)
	var batch [][]byte
	for i := range 64 {
		batch = append(batch, g.raw(client(i), vip, seg{fl: ack, seq: packet.Seq(i + 10), ack: 7001}))
	}
	if n := testing.AllocsPerRun(100, func() { g.e.Ahead(len(batch), func(i int) []byte { return batch[i] }) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
