// SPDX-License-Identifier: Apache-2.0

// Package structure holds the tests that keep the layout of the source tree: who
// may import whom, which packages stay pure (no I/O, no clock, no goroutine), and
// what every file and package begins with. It has no code of its own, and it
// must not look at what the code does, only at what it is made of.
package structure
