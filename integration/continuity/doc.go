// SPDX-License-Identifier: Apache-2.0

// Package continuity holds tests that kill: real weir processes on a router of
// network namespaces are killed, stopped, replaced and upgraded while they
// serve, and whoever talks through them must not notice. It holds no code that
// is not a test, and nothing that needs no kernel: that is for the simulator.
package continuity
