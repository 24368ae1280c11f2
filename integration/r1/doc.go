// SPDX-License-Identifier: Apache-2.0

// Package r1 holds the hard cases of TCP with the host kernel's own TCP at both
// ends: clients and servers in network namespaces, the real weir binary on the
// router between them, and on either side of the router a bad link (package
// wire) that loses, repeats, reorders, corrupts, or grows narrow. What needs no
// kernel is shown by the simulator (package sim) in larger numbers.
//
// All cases share one network and one weir, because it takes as long for its
// memory of closed connections to expire as all cases together: after each case
// everything else must be at its baseline, at the end these too (INV-9).
//
// The package must not judge by speed: time bounds are those that a protocol's
// timers give, not those of a machine.
package r1
