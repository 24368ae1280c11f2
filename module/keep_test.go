// SPDX-License-Identifier: Apache-2.0

package module

import (
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/weirgate/weir/module/farm"
)

// TestSealed: no byte of a small file can change without being noticed. Without
// the checksum a changed digit would have connections of one server taken for
// another's.
func TestSealed(t *testing.T) {
	seed := rand.Uint64()
	if v, err := strconv.ParseUint(os.Getenv("WEIR_SEED"), 10, 64); err == nil {
		seed = v
	}
	t.Logf("WEIR_SEED=%d", seed)
	rnd := rand.New(rand.NewPCG(seed, 2))
	was := kept{
		Version: keptVersion, Boot: "a life", Clock: 1234567, Since: 89, Secret: "00ff", Shards: 2,
		Numbers: farm.Numbers{Farms: []farm.Numbered{{ID: 1, Name: "web", Servers: []farm.NumberedServer{
			{ID: 1, Name: "s1", Address: netip.MustParseAddrPort("198.51.100.11:80")},
			{ID: 2, Name: "s2", Address: netip.MustParseAddrPort("198.51.100.12:80")},
		}}}},
	}
	good, err := seal(&was)
	if err != nil {
		t.Fatal(err)
	}
	var now kept
	if err := unseal(good, &now); err != nil || now.Numbers.Farms[0].Servers[1] != was.Numbers.Farms[0].Servers[1] || now.Clock != was.Clock {
		t.Fatalf("%+v, %v", now, err)
	}
	same := 0
	for range 5000 {
		bad := append([]byte(nil), good...)
		at := rnd.IntN(len(bad))
		bad[at] ^= byte(1 + rnd.IntN(255))
		var x kept
		if unseal(bad, &x) == nil {
			// The names of the envelope may be written in capitals.
			if again, err := seal(&x); err != nil || string(again) != string(good) {
				t.Errorf("byte %d is changed, and the file means something else: %s", at, bad)
			}
			same++
		}
	}
	if same > 500 {
		t.Errorf("%d of 5000 damaged files are believed", same)
	}
	for n := range len(good) {
		if unseal(good[:n], &now) == nil {
			t.Errorf("%d bytes of %d are believed", n, len(good))
		}
	}
}

// TestDrainsKept: what drains has until its instant, whoever serves by then, and
// what nobody gave one before has its own.
func TestDrainsKept(t *testing.T) {
	now := time.Now()
	vip, other := netip.MustParseAddrPort("203.0.113.10:80"), netip.MustParseAddrPort("[2001:db8::1]:80")
	was := drains{
		servers: map[uint16]drainingServer{7: {farm: "web", name: "s7", until: now.Add(40 * time.Second)}},
		vips:    map[netip.AddrPort]drainingVIP{vip: {farm: "web", until: now.Add(50 * time.Second)}},
	}
	const host = int64(1e12)
	b, err := seal(&kept{Drains: was.kept(now, host)})
	if err != nil {
		t.Fatal(err)
	}
	var state kept
	if err := unseal(b, &state); err != nil || len(state.Drains) != 2 {
		t.Fatalf("%+v, %v", state, err)
	}
	// 15 seconds later, by another process' clock.
	later := now.Add(-time.Hour)
	own := later.Add(time.Minute)
	next := drains{
		servers: map[uint16]drainingServer{7: {farm: "web", name: "s7", until: own}, 8: {farm: "web", name: "s8", until: own}},
		vips:    map[netip.AddrPort]drainingVIP{vip: {farm: "web", until: own}, other: {farm: "gone", until: own}},
	}
	next.recall(state.Drains, later, host+15e9)
	for what, x := range map[string]struct {
		until time.Time
		want  time.Duration
	}{
		"server 7":     {next.servers[7].until, 25 * time.Second},
		"server 8":     {next.servers[8].until, time.Minute},
		"the VIP":      {next.vips[vip].until, 35 * time.Second},
		"an other VIP": {next.vips[other].until, time.Minute},
	} {
		if left := x.until.Sub(later); left != x.want {
			t.Errorf("%s has %v left, want %v", what, left, x.want)
		}
	}
	if len(next.servers) != 2 || len(next.vips) != 2 {
		t.Errorf("%d servers and %d VIPs drain", len(next.servers), len(next.vips))
	}
}
