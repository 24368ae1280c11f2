// SPDX-License-Identifier: Apache-2.0

// Package wire is a bad link: it stands between two interfaces of a namespace
// of its own and passes Ethernet frames from one to the other, less those that
// it loses, later than others, twice, with a wrong bit, or not at all because
// they are larger than its MTU, which it says by ICMP as a router would. Each
// direction has impairments and counters of its own; both can be changed while
// traffic runs.
//
// What becomes of the n-th IP packet of a direction is a function of the seed,
// the direction and n alone (Fate), so a run is repeated by its seed as far as
// the kernels at both ends send the same packets again.
//
// The package must not look into the module that is tested through it: it sums
// and takes packets apart by itself. It counts packets that come to it with a
// wrong TCP checksum, so the tests that use it see whether anything between
// two wires lets a corrupted packet through. Offload must therefore be off on
// every interface that leads to it (lab.LinkOptions.NoOffload): with it, frames
// are larger than any wire carries and their checksums are not made yet.
package wire
