// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/weirgate/weir/internal/units"
)

// valueError says what is wrong with one value and what would be right.
type valueError struct{ problem, expected string }

func (e *valueError) Error() string { return e.problem + "; expected " + e.expected }

func badValue(s, expected string) error {
	return &valueError{fmt.Sprintf("cannot read %q", s), expected}
}

// Duration is a time span, written as Go does: 300ms, 10s, 1h30m. Never
// negative.
type Duration time.Duration

const expectDuration = "a duration with its unit, such as 300ms, 10s or 1h30m"

// Std returns the span as the standard library has it.
func (d Duration) Std() time.Duration { return time.Duration(d) }

// Nanoseconds returns the span in nanoseconds.
func (d Duration) Nanoseconds() int64 { return int64(d) }

// String returns the shortest form that reads back: 1h30m, not 1h30m0s.
func (d Duration) String() string {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = s[:len(s)-2]
	}
	if strings.HasSuffix(s, "h0m") {
		s = s[:len(s)-2]
	}
	return s
}

// MarshalText writes what UnmarshalText reads.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads a Go duration.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return badValue(string(b), expectDuration)
	}
	if v < 0 {
		return &valueError{string(b) + " is negative", expectDuration}
	}
	*d = Duration(v)
	return nil
}

// ByteSize is a number of bytes, written plainly or with KiB, MiB, GiB. Never
// negative.
type ByteSize int64

const expectByteSize = "a size such as 65536, 64KiB, 1MiB or 2GiB"

// String returns the size in the largest unit that divides it.
func (b ByteSize) String() string {
	for _, u := range units.Sizes {
		if b != 0 && int64(b)%u.Bytes == 0 {
			return strconv.FormatInt(int64(b)/u.Bytes, 10) + u.Name
		}
	}
	return strconv.FormatInt(int64(b), 10)
}

// MarshalText writes what UnmarshalText reads.
func (b ByteSize) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// UnmarshalText reads a size.
func (b *ByteSize) UnmarshalText(t []byte) error {
	n, ok := units.ParseSize(string(t))
	if !ok {
		return badValue(string(t), expectByteSize)
	}
	*b = ByteSize(n)
	return nil
}

// Rate is a number of bytes per second, written as tc does: 100Mbit, 12mbps
// (bytes), 1gibit; a plain number is bits per second.
type Rate uint64

const expectRate = "a rate as in tc, such as 100Mbit, 1Gbit or 12mbps (bytes)"

// String returns the rate in bits per second in the largest decimal unit that
// divides it.
func (r Rate) String() string {
	if uint64(r) > math.MaxUint64/8 {
		return strconv.FormatUint(uint64(r), 10) + "bps"
	}
	bits := uint64(r) * 8
	for _, u := range [...]struct {
		name string
		size uint64
	}{{"Tbit", 1e12}, {"Gbit", 1e9}, {"Mbit", 1e6}, {"Kbit", 1e3}} {
		if bits != 0 && bits%u.size == 0 {
			return strconv.FormatUint(bits/u.size, 10) + u.name
		}
	}
	return strconv.FormatUint(bits, 10) + "bit"
}

// MarshalText writes what UnmarshalText reads.
func (r Rate) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads a rate, see units.ParseRate.
func (r *Rate) UnmarshalText(t []byte) error {
	v, ok := units.ParseRate(string(t))
	if !ok {
		return badValue(string(t), expectRate)
	}
	if v >= 1<<62 {
		return &valueError{string(t) + " is too large", expectRate}
	}
	*r = Rate(v)
	return nil
}

// Mark is a masked packet mark.
type Mark struct{ Value, Mask uint32 }

const expectMark = "VALUE/MASK, such as 0x57000000/0xff000000"

// String returns VALUE/MASK in hexadecimal.
func (m Mark) String() string { return fmt.Sprintf("0x%08x/0x%08x", m.Value, m.Mask) }

// MarshalText writes what UnmarshalText reads.
func (m Mark) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads VALUE/MASK in any base that Go's literals have. A mark
// of zero is refused, because every packet has it; so is a value with bits
// outside the mask, because no packet could have it.
func (m *Mark) UnmarshalText(t []byte) error {
	v, k, ok := strings.Cut(string(t), "/")
	value, err1 := strconv.ParseUint(v, 0, 32)
	mask, err2 := strconv.ParseUint(k, 0, 32)
	switch {
	case !ok || err1 != nil || err2 != nil:
		return badValue(string(t), expectMark)
	case mask == 0:
		return &valueError{"the mask is zero", "a mask with at least one bit"}
	case value&^mask != 0:
		return &valueError{fmt.Sprintf("the value 0x%x has bits outside the mask 0x%x", value, mask), "a value inside the mask"}
	case value == 0:
		return &valueError{"the value is zero, which unmarked packets have too", "a value with at least one bit"}
	}
	*m = Mark{uint32(value), uint32(mask)}
	return nil
}

// PortRange is a range of ports, both ends included.
type PortRange struct{ Low, High uint16 }

const expectPortRange = "LOW-HIGH, such as 10240-32767"

// Size returns the number of ports, 0 for the zero range.
func (p PortRange) Size() int {
	if p.Low == 0 || p.High < p.Low {
		return 0
	}
	return int(p.High) - int(p.Low) + 1
}

// Contains reports whether the port is in the range.
func (p PortRange) Contains(port uint16) bool {
	return p.Size() > 0 && p.Low <= port && port <= p.High
}

// String returns LOW-HIGH.
func (p PortRange) String() string { return fmt.Sprintf("%d-%d", p.Low, p.High) }

// MarshalText writes what UnmarshalText reads.
func (p PortRange) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads LOW-HIGH.
func (p *PortRange) UnmarshalText(t []byte) error {
	l, h, ok := strings.Cut(string(t), "-")
	low, ok1 := units.ParseDigits(strings.TrimSpace(l))
	high, ok2 := units.ParseDigits(strings.TrimSpace(h))
	switch {
	case !ok || !ok1 || !ok2:
		return badValue(string(t), expectPortRange)
	case low < 1 || low > 65535 || high < 1 || high > 65535:
		return &valueError{"a port is outside 1-65535", expectPortRange}
	case high < low:
		return &valueError{fmt.Sprintf("the range ends (%d) before it begins (%d)", high, low), expectPortRange}
	}
	*p = PortRange{uint16(low), uint16(high)}
	return nil
}

// Prefix is a network of addresses.
type Prefix netip.Prefix

const expectPrefix = "a prefix such as 192.0.2.0/24 or 2001:db8::/32, or one address"

// Netip returns the prefix as the standard library has it.
func (p Prefix) Netip() netip.Prefix { return netip.Prefix(p) }

// String returns ADDRESS/BITS.
func (p Prefix) String() string { return netip.Prefix(p).String() }

// MarshalText writes what UnmarshalText reads.
func (p Prefix) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads ADDRESS/BITS or an address alone. Bits of the address
// beyond the length are refused: one of the two is a slip.
func (p *Prefix) UnmarshalText(t []byte) error {
	s := string(t)
	if a, err := netip.ParseAddr(s); err == nil {
		if err := checkAddr(a, expectPrefix); err != nil {
			return err
		}
		*p = Prefix(netip.PrefixFrom(a, a.BitLen()))
		return nil
	}
	n, err := netip.ParsePrefix(s)
	if err != nil {
		return badValue(s, expectPrefix)
	}
	if err := checkAddr(n.Addr(), expectPrefix); err != nil {
		return err
	}
	if n != n.Masked() {
		return &valueError{fmt.Sprintf("%s has bits beyond its length", n), n.Masked().String()}
	}
	*p = Prefix(n)
	return nil
}

// Shards is a number of shards, or ShardsAuto.
type Shards int

// ShardsAuto leaves the number of shards to the number of processors.
const ShardsAuto Shards = 0

var expectShards = fmt.Sprintf("auto, or a number from 1 to %d", maxShards)

// String returns the number or "auto".
func (s Shards) String() string {
	if s == ShardsAuto {
		return "auto"
	}
	return strconv.Itoa(int(s))
}

// MarshalText writes what UnmarshalText reads.
func (s Shards) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads "auto" or a number.
func (s *Shards) UnmarshalText(t []byte) error {
	if string(t) == "auto" {
		*s = ShardsAuto
		return nil
	}
	n, ok := units.ParseDigits(string(t))
	if !ok || n < 1 || n > maxShards {
		return badValue(string(t), expectShards)
	}
	*s = Shards(n)
	return nil
}

const (
	expectAddr     = "a literal IPv4 or IPv6 address"
	expectAddrPort = "a literal ADDRESS:PORT, such as 203.0.113.10:80 or [2001:db8::10]:80"
)

// parseAddr reads a literal unicast address without zone.
func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		if _, err := netip.ParseAddrPort(s); err == nil {
			return a, &valueError{fmt.Sprintf("%q has a port", s), expectAddr}
		}
		if looksLikeName(s) {
			return a, &valueError{fmt.Sprintf("%q is a name, and names are not looked up", s), expectAddr}
		}
		return a, badValue(s, expectAddr)
	}
	return a, checkAddr(a, expectAddr)
}

// parseAddrPort reads a literal unicast address with a port above zero.
func parseAddrPort(s string) (netip.AddrPort, error) {
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		host, port, cut := cutLastColon(s)
		switch {
		case s == "":
			return ap, &valueError{"the value is empty", expectAddrPort}
		case isAddr(strings.Trim(s, "[]")):
			return ap, &valueError{fmt.Sprintf("%q has no port", s), expectAddrPort}
		case !cut || host == "":
			return ap, badValue(s, expectAddrPort)
		case isAddr(strings.Trim(host, "[]")):
			return ap, &valueError{fmt.Sprintf("%q is no port", port), "a port from 1 to 65535"}
		case looksLikeName(host):
			return ap, &valueError{fmt.Sprintf("%q is a name, and names are not looked up", host), expectAddrPort}
		}
		return ap, badValue(s, expectAddrPort)
	}
	if ap.Port() == 0 {
		return ap, &valueError{"the port is 0", "a port from 1 to 65535"}
	}
	return ap, checkAddr(ap.Addr(), expectAddrPort)
}

func checkAddr(a netip.Addr, expected string) error {
	switch {
	case a.Zone() != "":
		return &valueError{fmt.Sprintf("%s has a zone", a), "an address that is routed without one"}
	case a.Is4In6():
		return &valueError{fmt.Sprintf("%s is an IPv4 address in IPv6 notation", a), a.Unmap().String()}
	}
	return nil
}

// checkUnicast refuses what cannot be one host's address.
func checkUnicast(a netip.Addr) error {
	switch {
	case a.IsUnspecified():
		return &valueError{fmt.Sprintf("%s stands for any address", a), "one literal address of its own"}
	case a.IsMulticast(), a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return &valueError{fmt.Sprintf("%s is not the address of one host", a), "a unicast address"}
	case a.IsLinkLocalUnicast():
		return &valueError{fmt.Sprintf("%s is link-local and cannot be routed", a), "a routable unicast address"}
	}
	return nil
}

func isAddr(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}

func cutLastColon(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

// looksLikeName reports whether someone probably wrote a host name.
func looksLikeName(s string) bool {
	letter := false
	for _, r := range s {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z':
			letter = true
		case r >= '0' && r <= '9', r == '.', r == '-', r == '_':
		default:
			return false
		}
	}
	return letter
}

// asValueError splits an error of one of the parsers above.
func asValueError(err error, text, expected string) *valueError {
	var v *valueError
	if errors.As(err, &v) {
		return v
	}
	return &valueError{fmt.Sprintf("cannot read %q", text), expected}
}
