// SPDX-License-Identifier: Apache-2.0

// Package packet is how the rest of the module looks at packets: views over
// the bytes that the kernel handed out, with accessors and setters in place,
// sequence numbers with types of their own, TCP options, ICMP errors, and
// checksums that are updated instead of computed.
//
// A packet is its bytes. A view (TCP, ICMPError) holds a slice and a few
// offsets that were checked once, when it was parsed; it is passed by value or
// by a pointer to the stack, and never allocates. Addresses and tuples are flat
// and comparable, so that a flow record may contain them.
//
// The package knows nothing about connections, splices or HTTP. It does no
// I/O, keeps no state and never looks at a clock. It must not verify what the
// caller did not ask for: who verifies which checksum, and when, is a decision
// of the packet loop.
package packet
