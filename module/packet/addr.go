// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
)

// Addr is an IP address without pointers, so that a flow record may live in
// memory that outlives the process. An IPv4 address a.b.c.d is kept in its
// mapped form, ::ffff:a.b.c.d; ParseTCP refuses IPv6 packets that carry such
// addresses, so the two cannot be confused.
type Addr [16]byte

// AddrFrom converts a. The zero netip.Addr gives the zero Addr; an IPv6 zone
// is dropped.
func AddrFrom(a netip.Addr) Addr {
	if !a.IsValid() {
		return Addr{}
	}
	return Addr(a.As16())
}

// IsLoopback reports whether the address is in 127.0.0.0/8 or ::1.
func (a Addr) IsLoopback() bool { return a.Is4() && a[12] == 127 || a == Addr{15: 1} }

// Netip returns the address as a netip.Addr, IPv4 unmapped. The zero Addr is
// the IPv6 address ::.
func (a Addr) Netip() netip.Addr { return netip.AddrFrom16(a).Unmap() }

// Is4 reports whether the address is an IPv4 one.
func (a Addr) Is4() bool {
	return binary.BigEndian.Uint64(a[0:8]) == 0 && binary.BigEndian.Uint32(a[8:12]) == 0xffff
}

// String returns the usual text form.
func (a Addr) String() string { return a.Netip().String() }

// addr4 maps four bytes of an IPv4 header.
func addr4(b []byte) (a Addr) {
	a[10], a[11] = 0xff, 0xff
	copy(a[12:], b[:4])
	return a
}

// Endpoint is one end of a TCP connection.
type Endpoint struct {
	Addr Addr
	Port uint16
}

// EndpointFrom converts a.
func EndpointFrom(a netip.AddrPort) Endpoint {
	return Endpoint{Addr: AddrFrom(a.Addr()), Port: a.Port()}
}

// AddrPort returns the endpoint as a netip.AddrPort, IPv4 unmapped.
func (e Endpoint) AddrPort() netip.AddrPort {
	return netip.AddrPortFrom(e.Addr.Netip(), e.Port)
}

// String returns addr:port.
func (e Endpoint) String() string { return e.AddrPort().String() }

// Tuple names one direction of a connection. It is comparable and has no
// pointers and no padding.
type Tuple struct{ Src, Dst Endpoint }

// Reverse returns the tuple of the other direction.
func (t Tuple) Reverse() Tuple { return Tuple{Src: t.Dst, Dst: t.Src} }

// String returns "src -> dst".
func (t Tuple) String() string { return t.Src.String() + " -> " + t.Dst.String() }

// Hash mixes the tuple with the seed: 128-bit multiplications whose halves
// are folded, as wyhash does. It gives the same value on every machine and in
// every process, so a table that outlives the process may be indexed by it.
// It is no MAC: a seed that nobody else knows keeps others from aiming at one
// bucket, and that is all.
func (t *Tuple) Hash(seed uint64) uint64 {
	const (
		k0 = 0xa0761d6478bd642f
		k1 = 0xe7037ed1a0b428db
		k2 = 0x8ebc6af09c88c6e3
		k3 = 0x589965cc75374cc3
		k4 = 0x1d8e4e27c47d124f
	)
	seed ^= k4
	ports := uint64(t.Src.Port)<<16 | uint64(t.Dst.Port)
	a := fold128(le64(t.Src.Addr[0:])^k0^seed, le64(t.Src.Addr[8:])^k1^bits.RotateLeft64(seed, 17))
	b := fold128(le64(t.Dst.Addr[0:])^k2^bits.RotateLeft64(seed, 31), le64(t.Dst.Addr[8:])^k3^bits.RotateLeft64(seed, 47))
	return fold128(a^ports^k1, bits.RotateLeft64(b, 29)^ports<<32^seed)
}

func fold128(x, y uint64) uint64 {
	hi, lo := bits.Mul64(x, y)
	return hi ^ lo
}

func le64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }
