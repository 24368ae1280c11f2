// SPDX-License-Identifier: Apache-2.0

package policies

import (
	"fmt"
	"strconv"

	"github.com/weirgate/weir/internal/units"
)

// Size is a number of bytes in a configuration: 65536, 64KiB, 1MiB, 2GiB.
type Size int64

// UnmarshalText reads a size.
func (s *Size) UnmarshalText(t []byte) error {
	n, ok := units.ParseSize(string(t))
	if !ok {
		return fmt.Errorf("%q is not a size such as 65536, 64KiB or 1MiB", t)
	}
	*s = Size(n)
	return nil
}

// Rate is a number of bytes per second in a configuration, written as tc does
// (tc(8), "PARAMETERS: RATES"): 100Mbit, 1Gbit, 12mbps for bytes; a plain
// number is bits per second.
type Rate float64

// UnmarshalText reads a rate. The unit is not case sensitive.
func (r *Rate) UnmarshalText(t []byte) error {
	v, ok := units.ParseRate(string(t))
	if !ok {
		return fmt.Errorf("%q is not a rate as in tc, such as 100Mbit, 1Gbit or 12mbps (bytes)", t)
	}
	*r = Rate(v)
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
