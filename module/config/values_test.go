// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
)

func TestValues(t *testing.T) {
	dur := func() encoding.TextUnmarshaler { return new(Duration) }
	size := func() encoding.TextUnmarshaler { return new(ByteSize) }
	rate := func() encoding.TextUnmarshaler { return new(Rate) }
	mark := func() encoding.TextUnmarshaler { return new(Mark) }
	ports := func() encoding.TextUnmarshaler { return new(PortRange) }
	shards := func() encoding.TextUnmarshaler { return new(Shards) }
	for _, tc := range []struct {
		make func() encoding.TextUnmarshaler
		in   string
		want string // as String writes it, "" for an error
	}{
		{dur, "10s", "10s"}, {dur, "0", "0s"}, {dur, "0s", "0s"}, {dur, "1h30m", "1h30m"}, {dur, "60s", "1m"},
		{dur, "3600s", "1h"}, {dur, "1m30s", "1m30s"}, {dur, "300ms", "300ms"}, {dur, "100h", "100h"},
		{dur, "10", ""}, {dur, "-1s", ""}, {dur, "", ""}, {dur, "1d", ""}, {dur, "1e99h", ""},

		{size, "0", "0"}, {size, "65536", "64KiB"}, {size, "1MiB", "1MiB"}, {size, "1024KiB", "1MiB"}, {size, "3GiB", "3GiB"}, {size, "1000", "1000"},
		{size, "1MB", ""}, {size, "1 MiB", ""}, {size, "-1", ""}, {size, "+1", ""}, {size, "1.5MiB", ""}, {size, "KiB", ""}, {size, "9999999999GiB", ""}, {size, "", ""},

		{rate, "100Mbit", "100Mbit"}, {rate, "100mbit", "100Mbit"}, {rate, "1gbit", "1Gbit"}, {rate, "8", "8bit"}, {rate, "12mbps", "96Mbit"},
		{rate, "1kibit", "1024bit"}, {rate, "1.5Mbit", "1500Kbit"}, {rate, "0", "0bit"}, {rate, "1kibps", "8192bit"},
		{rate, "100M", ""}, {rate, "Mbit", ""}, {rate, "-1bit", ""}, {rate, "1..5bit", ""}, {rate, "1 Mbit", ""}, {rate, "100%", ""}, {rate, "", ""}, {rate, "99999999999999999999tbit", ""},

		{mark, "0x57000000/0xff000000", "0x57000000/0xff000000"}, {mark, "1/1", "0x00000001/0x00000001"},
		{mark, "0x57", ""}, {mark, "0/1", ""}, {mark, "1/0", ""}, {mark, "2/1", ""}, {mark, "0x100000000/0x1ffffffff", ""}, {mark, "/", ""},

		{ports, "10240-32767", "10240-32767"}, {ports, "1024 - 2048", "1024-2048"}, {ports, "5-5", "5-5"},
		{ports, "5", ""}, {ports, "6-5", ""}, {ports, "0-5", ""}, {ports, "1-65536", ""}, {ports, "-5-6", ""}, {ports, "", ""},

		{shards, "auto", "auto"}, {shards, "1", "1"}, {shards, "64", "64"}, {shards, "0", ""}, {shards, "65", ""}, {shards, "Auto", ""}, {shards, "-1", ""},
	} {
		v := tc.make()
		err := v.UnmarshalText([]byte(tc.in))
		got := ""
		if err == nil {
			got = fmt.Sprint(v)
		}
		if got != tc.want {
			t.Errorf("%T %q: got %q (%v), want %q", v, tc.in, got, err, tc.want)
		}
		if err != nil && asValueError(err, "", "").expected == "" {
			t.Errorf("%T %q: the error does not say what is expected: %v", v, tc.in, err)
		}
	}
}

// seed returns the seed of a random test: WEIR_SEED, or a new one. It is
// printed when the test fails.
func seed(t *testing.T) *rand.Rand {
	n := rand.Uint64()
	if s := os.Getenv("WEIR_SEED"); s != "" {
		var err error
		if n, err = strconv.ParseUint(s, 0, 64); err != nil {
			t.Fatalf("WEIR_SEED: %v", err)
		}
	}
	t.Logf("WEIR_SEED=%d", n)
	return rand.New(rand.NewPCG(n, 0))
}

// TestValuesReadBack: what String writes reads back as the same value.
func TestValuesReadBack(t *testing.T) {
	r := seed(t)
	for range 5000 {
		d, s, b := Duration(r.Int64()>>r.IntN(63)), ByteSize(r.Int64()>>r.IntN(63)), Rate(r.Uint64()>>(12+r.IntN(50)))
		var d2 Duration
		var s2 ByteSize
		var b2 Rate
		if err := d2.UnmarshalText([]byte(d.String())); err != nil || d2 != d {
			t.Fatalf("%s → %s: %v", d, d2, err)
		}
		if err := s2.UnmarshalText([]byte(s.String())); err != nil || s2 != s {
			t.Fatalf("%s → %s: %v", s, s2, err)
		}
		// Rates are read as floating point: exact up to 2^50 bytes per second.
		if b>>50 != 0 {
			continue
		}
		if err := b2.UnmarshalText([]byte(b.String())); err != nil || b2 != b {
			t.Fatalf("%s → %s (%d, %d): %v", b, b2, b, b2, err)
		}
	}
}

func TestClosest(t *testing.T) {
	words := []string{"path", "load", "state", "bandwidth"}
	for in, want := range map[string]string{"pth": "path", "Path": "path", "bandwith": "bandwidth", "satte": "state", "xyz": "", "": "", "loda": "load"} {
		if got := closest(in, words); got != want {
			t.Errorf("closest(%q) = %q, want %q", in, got, want)
		}
	}
}
