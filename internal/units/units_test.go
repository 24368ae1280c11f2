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
