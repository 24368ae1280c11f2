// SPDX-License-Identifier: Apache-2.0

// Package hostile holds the tests in which peers misbehave, packets get lost
// and floods arrive, with the real weir binary in network namespaces: nobody
// gets another's bytes, nobody outside breaks an established connection, and
// nothing that an attacker sends for free costs memory. What needs no kernel is
// in the tests of the engine; docs/security.md says what is shown where.
//
// The tests use the binaries in the directory that WEIR_BIN names (weir, and
// the plugins under plugins/), or build them first where it is not set. With
// WEIR_SOAK=1 the canary runs a million requests.
package hostile
