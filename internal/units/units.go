// SPDX-License-Identifier: Apache-2.0

// Package units reads the units that the configuration of Weir and that of its
// plugins share, so that a value means the same in both. It knows no default
// and no range; whoever reads a value says what was wrong with it.
package units

import (
	"math"
	"strconv"
	"strings"
)

// Sizes are the units of sizes, the largest first.
var Sizes = [...]struct {
	Name  string
	Bytes int64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}}

// ParseSize reads a number of bytes: digits, then KiB, MiB, GiB or nothing. ok is
// false for anything else, and for more than 2^63-1 bytes.
func ParseSize(s string) (bytes int64, ok bool) {
	mult := int64(1)
	for _, u := range Sizes {
		if n, found := strings.CutSuffix(s, u.Name); found {
			s, mult = n, u.Bytes
			break
		}
	}
	n, ok := ParseDigits(s)
	if !ok || n > math.MaxInt64/mult {
		return 0, false
	}
	return n * mult, true
}

// ParseDigits reads a number of digits only: no sign, no underscore, no space.
func ParseDigits(s string) (n int64, ok bool) {
	if strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil
}

// ParseRate reads a rate as tc does (tc(8), "PARAMETERS: RATES"): 100Mbit,
// 1gibit, 12mbps (bytes); a plain number is bits per second. The unit is not
// case sensitive. The result is in bytes per second; ok is false for anything
// else.
func ParseRate(s string) (bytesPerSecond float64, ok bool) {
	s = strings.ToLower(s)
	end := strings.LastIndexAny(s, "0123456789.") + 1
	num, unit := s[:end], s[end:]
	bits := 1.0
	switch {
	case strings.HasSuffix(unit, "bit"):
		unit = strings.TrimSuffix(unit, "bit")
	case strings.HasSuffix(unit, "bps"):
		unit, bits = strings.TrimSuffix(unit, "bps"), 8
	case unit != "":
		return 0, false
	}
	scale, ok := map[string]float64{
		"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12,
		"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40,
	}[unit]
	if !ok || num == "" || strings.Trim(num, "0123456789.") != "" {
		return 0, false
	}
	v, err := strconv.ParseFloat(num, 64)
	if err != nil {
		return 0, false
	}
	return v * scale * bits / 8, true
}
