// SPDX-License-Identifier: Apache-2.0

package policies

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Size is a number of bytes in a configuration: 65536, 64KiB, 1MiB, 2GiB.
type Size int64

// UnmarshalText reads a size.
func (s *Size) UnmarshalText(t []byte) error {
	num, mult := string(t), int64(1)
	for i, unit := range []string{"KiB", "MiB", "GiB"} {
		if n, ok := strings.CutSuffix(num, unit); ok {
			num, mult = n, 1<<(10*(i+1))
			break
		}
	}
	n, err := strconv.ParseUint(num, 10, 63)
	if err != nil || int64(n) > math.MaxInt64/mult || strings.HasPrefix(num, "+") {
		return fmt.Errorf("%q is not a size such as 65536, 64KiB or 1MiB", t)
	}
	*s = Size(int64(n) * mult)
	return nil
}

// Rate is a number of bytes per second in a configuration, written as tc does
// (tc(8), "PARAMETERS: RATES"): 100Mbit, 1Gbit, 12mbps for bytes; a plain
// number is bits per second.
type Rate float64

// UnmarshalText reads a rate. The unit is not case sensitive.
func (r *Rate) UnmarshalText(t []byte) error {
	bad := fmt.Errorf("%q is not a rate as in tc, such as 100Mbit, 1Gbit or 12mbps (bytes)", t)
	s := strings.ToLower(string(t))
	end := strings.LastIndexAny(s, "0123456789.") + 1
	num, unit := s[:end], s[end:]
	bits := 1.0
	switch {
	case strings.HasSuffix(unit, "bit"):
		unit = strings.TrimSuffix(unit, "bit")
	case strings.HasSuffix(unit, "bps"):
		unit, bits = strings.TrimSuffix(unit, "bps"), 8
	case unit != "":
		return bad
	}
	scale, ok := map[string]float64{
		"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12,
		"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40,
	}[unit]
	if !ok || num == "" || strings.Trim(num, "0123456789.") != "" {
		return bad
	}
	v, err := strconv.ParseFloat(num, 64)
	if err != nil {
		return bad
	}
	*r = Rate(v * scale * bits / 8)
	return nil
}

// String returns the rate in bits per second.
func (r Rate) String() string {
	v := float64(r) * 8
	for _, u := range []struct {
		name string
		size float64
	}{{"Gbit", 1e9}, {"Mbit", 1e6}, {"Kbit", 1e3}} {
		if v >= u.size {
			return strconv.FormatFloat(v/u.size, 'g', 4, 64) + u.name
		}
	}
	return strconv.FormatFloat(v, 'g', 4, 64) + "bit"
}
