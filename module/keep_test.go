// SPDX-License-Identifier: Apache-2.0

package module

import (
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"testing"

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
