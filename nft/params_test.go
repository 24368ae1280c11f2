// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// random gives a generator whose seed is printed, and can be given in
// WEIR_SEED.
func random(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("WEIR_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 0, 64); err != nil {
			t.Fatalf("WEIR_SEED: %v", err)
		}
	}
	t.Logf("WEIR_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

func TestSlice(t *testing.T) {
	r := random(t)
	for range 2000 {
		shards := 1 + r.IntN(MaxShards)
		first := r.IntN(65536 - shards + 1)
		last := first + shards - 1 + r.IntN(65536-first-shards+1)
		next, least, most := first, 1<<16, 0
		for i := range shards {
			lo, hi := Slice(uint16(first), uint16(last), shards, i)
			if int(lo) != next || hi < lo {
				t.Fatalf("slice %d of %d in %d-%d is %d-%d, want it to begin at %d", i, shards, first, last, lo, hi, next)
			}
			next = int(hi) + 1
			least, most = min(least, int(hi-lo)+1), max(most, int(hi-lo)+1)
		}
		if next != last+1 || most-least > 1 {
			t.Fatalf("%d slices of %d-%d end at %d, sizes %d to %d", shards, first, last, next-1, least, most)
		}
	}
}

func TestValidate(t *testing.T) {
	ap, a := netip.MustParseAddrPort, netip.MustParseAddr
	good := fixed(2)
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*Params)
		want   string
	}{
		"table":            {func(p *Params) { p.Table = "we ir" }, "firewall.table"},
		"no table":         {func(p *Params) { p.Table = "" }, "firewall.table"},
		"mark zero":        {func(p *Params) { p.Mark = 0 }, "firewall.mark"},
		"mark mask":        {func(p *Params) { p.MarkMask = 0x0f000000 }, "outside the mask"},
		"ports reversed":   {func(p *Params) { p.PortFirst = 40000 }, "source.ports"},
		"ports low":        {func(p *Params) { p.PortFirst = 80 }, "source.ports"},
		"no shards":        {func(p *Params) { p.Shards = 0 }, "queue.shards"},
		"many shards":      {func(p *Params) { p.Shards = 65 }, "queue.shards"},
		"queue numbers":    {func(p *Params) { p.QueueFirst = 65533 }, "queue.first"},
		"ports and shards": {func(p *Params) { p.PortLast = p.PortFirst; p.ExceptPorts = nil }, "fewer ports"},
		"listen twice":     {func(p *Params) { p.VIPs = append(p.VIPs, p.VIPs[0]) }, "given twice"},
		"listen mapped twice": {func(p *Params) { p.VIPs = append(p.VIPs, ap("[::ffff:203.0.113.10]:80")) },
			"given twice"},
		"listen port 0":   {func(p *Params) { p.VIPs = append(p.VIPs, ap("203.0.113.1:0")) }, "port must be"},
		"listen any":      {func(p *Params) { p.VIPs = append(p.VIPs, ap("0.0.0.0:80")) }, "literal address"},
		"listen on SNIP":  {func(p *Params) { p.VIPs = append(p.VIPs, ap("198.51.100.1:20001")) }, "lies within source.ports"},
		"server family":   {func(p *Params) { p.SNIPs = p.SNIPs[:1] }, "no address of its family"},
		"server nothing":  {func(p *Params) { p.Servers = append(p.Servers, netip.AddrPort{}) }, "server address"},
		"SNIP multicast":  {func(p *Params) { p.SNIPs = append(p.SNIPs, a("224.0.0.1")) }, "multicast"},
		"SNIP link-local": {func(p *Params) { p.SNIPs = append(p.SNIPs, a("fe80::1%eth0")) }, "link-local"},
		"except outside":  {func(p *Params) { p.ExceptPorts = []uint16{80} }, "outside source.ports"},
		"interface":       {func(p *Params) { p.StrictRPFilter = []string{"../eth0"} }, "not an interface name"},
	} {
		t.Run(name, func(t *testing.T) {
			q := fixed(2)
			p := q.clone()
			c.change(&p)
			err := p.Validate()
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want an error with %q", err, c.want)
			}
			if _, err2 := Build(p, full); err2 == nil {
				t.Fatal("Build accepts it")
			}
		})
	}
}

func TestBuildRefuses(t *testing.T) {
	if _, err := Build(fixed(1), Kernel{Ct: true}); !errors.Is(err, ErrNoQueue) {
		t.Errorf("no queue: %v", err)
	}
}

// TestBuildIsIndependent: the order of the input does not matter, and changing
// it later changes nothing.
func TestBuildIsIndependent(t *testing.T) {
	p := fixed(3)
	a, err := Build(p, full)
	if err != nil {
		t.Fatal(err)
	}
	text := a.Text()
	p.VIPs[0], p.VIPs[1] = p.VIPs[1], p.VIPs[0]
	p.Servers[0], p.Servers[2] = p.Servers[2], p.Servers[0]
	b, err := Build(p, full)
	if err != nil {
		t.Fatal(err)
	}
	if b.Text() != text || a.Text() != text {
		t.Error("the ruleset depends on the order of its parameters")
	}
}

// TestNoBypass: in no ruleset is there a queue statement that lets packets pass
// when nobody listens, and every chain that queues by shard covers all shards.
func TestNoBypass(t *testing.T) {
	r := random(t)
	for range 50 {
		shards := 1 + r.IntN(MaxShards)
		k := full
		k.NativeQueue = r.IntN(2) == 0
		rs, err := Build(fixed(shards), k)
		if err != nil {
			t.Fatal(err)
		}
		text := rs.Text()
		if strings.Contains(text, "bypass") || strings.Contains(text, "fanout") {
			t.Fatal(text)
		}
		for _, name := range []string{"antispoof", "divert"} {
			if got := rs.Chain(name).Rules[0].Text(); got != "meta mark & 0xff000000 == 0x57000000 return" {
				t.Fatalf("first rule of %s is %q", name, got)
			}
		}
		for i := range shards {
			if p := fixed(shards); !strings.Contains(text, "queue num "+strconv.Itoa(int(p.ShardQueue(i)))+"\n") {
				t.Fatalf("no queue for shard %d of %d", i, shards)
			}
		}
	}
}

// TestAcks parses answers as the kernel writes them, and does not trip over
// damaged ones.
func TestAcks(t *testing.T) {
	ok := []byte{36, 0, 0, 0, 2, 0, 0, 1, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 20, 0, 0, 0, 0, 10, 5, 0, 7, 0, 0, 0, 1, 0, 0, 0}
	refused := append([]byte{48, 0, 0, 0, 2, 0, 0, 3, 8, 0, 0, 0, 1, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff, 60, 0, 0, 0, 0, 10, 5, 0, 8, 0, 0, 0, 1, 0, 0, 0},
		9, 0, 1, 0, 'w', 'h', 'y', '!', 0, 0, 0, 0)
	if a := acks(append(append([]byte(nil), ok...), refused...)); len(a) != 2 || a[0] != (ack{seq: 7}) || a[1].errno != 2 || a[1].text != "why!" || a[1].seq != 8 {
		t.Fatalf("got %+v", a)
	}
	r := random(t)
	for range 20000 {
		b := append(append([]byte(nil), refused...), ok...)
		for range 1 + r.IntN(8) {
			b[r.IntN(len(b))] = byte(r.Uint32())
		}
		acks(b[:r.IntN(len(b)+1)])
	}
}

// TestShortWay: a packet of a diverted flow meets a bounded number of expressions before it is
// queued, each of which costs it some ten nanoseconds: those that recognise it,
// before all other rules, and those of its own kind.
func TestShortWay(t *testing.T) {
	for _, k := range []Kernel{full, {CompatQueue: true, Ct: true, IPv6: true}} {
		r, err := Build(fixed(1), k)
		if err != nil {
			t.Fatal(err)
		}
		count := func(rules ...Rule) (n int) {
			for _, rule := range rules {
				nf, l4 := 0, 0 // of the family and the protocol, once a rule
				for _, t := range rule.terms {
					n += len(t.exprs)
					if t.nf != 0 {
						nf = 2
					}
					if t.l4 != 0 {
						l4 = 2
					}
				}
				n += nf + l4
			}
			return n
		}
		divert := r.Chain("divert").Rules
		for i, chain := range []string{"from_client4", "from_server4", "from_client6", "from_server6"} {
			if text := divert[1+i].Text(); !strings.HasSuffix(text, "goto "+chain) {
				t.Fatalf("rule %d of divert is %q, want one that goes to %s", 1+i, text, chain)
			}
		}
		client := count(r.Chain("antispoof").Rules...) + count(divert[:2]...) + count(r.Chain("from_client4").Rules...)
		server := count(r.Chain("antispoof").Rules...) + count(divert[:3]...) + count(r.Chain("from_server4").Rules...)
		t.Logf("expressions: %d for a client's packet, %d for a server's", client, server)
		if client > 54 || server > 62 {
			t.Errorf("%d expressions for a client's packet, %d for a server's", client, server)
		}
	}
}
