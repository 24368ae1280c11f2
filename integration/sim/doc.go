// SPDX-License-Identifier: Apache-2.0

// Package sim is R0, the simulator: the engine between TCP endpoints that are
// not its own, over wires that lose, repeat, reorder, corrupt, delay, cut and
// join packets, in virtual time. A whole run, every choice in it included, comes
// from one seed, so a run that fails is repeated exactly:
//
//	go test ./integration/sim -run TestReplay -seed N
//
// An observer looks at every packet that enters and leaves the engine and checks
// the invariants after every step. It knows what the applications wrote, because
// every request carries a nonce of 128 bits from which the request, its answer
// and both bodies follow; it shares no code with the engine and does not look
// into it, but for what the engine says of its own use of memory (INV-9) and its
// counters of redispatches (INV-4).
//
// The package must not read a clock, start a goroutine or draw a number that
// does not come from the scenario's seed.
package sim
