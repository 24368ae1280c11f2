// SPDX-License-Identifier: Apache-2.0

package units_test

import (
	"testing"

	"github.com/weirgate/weir/internal/units"
)

func TestParseRate(t *testing.T) {
	for s, want := range map[string]float64{
		"8": 1, "0": 0, "8bit": 1, "1bps": 1, "8kbit": 1e3, "8Mbit": 1e6, "12mbps": 12e6, "1GIBIT": (1 << 30) / 8,
		"1.5kbps": 1500, "1tbps": 1e12,
	} {
		if v, ok := units.ParseRate(s); !ok || v != want {
			t.Errorf("%q is %v (%v), want %v", s, v, ok, want)
		}
	}
	for _, s := range []string{"", "bit", "-1", "+1", "1e3", "1_000", "0x10", "1 kbit", "1.2.3", "1pbit", "8K", "1kbits", "NaN", "inf"} {
		if v, ok := units.ParseRate(s); ok {
			t.Errorf("%q was read as %v", s, v)
		}
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "65536": 65536, "007": 7, "64KiB": 64 << 10, "1MiB": 1 << 20, "2GiB": 2 << 30,
		"9223372036854775807": 1<<63 - 1, "8589934591GiB": 8589934591 << 30,
	} {
		if v, ok := units.ParseSize(s); !ok || v != want {
			t.Errorf("%q is %v (%v), want %v", s, v, ok, want)
		}
	}
	for _, s := range []string{
		"", "KiB", "-1", "+1", "1_000", "0x10", "1 KiB", " 1", "1.5MiB", "1kib", "1KB", "1K", "1KiBKiB", "1TiB",
		"9223372036854775808", "8589934592GiB",
	} {
		if v, ok := units.ParseSize(s); ok {
			t.Errorf("%q was read as %v", s, v)
		}
	}
}
