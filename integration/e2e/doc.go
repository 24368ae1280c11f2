// SPDX-License-Identifier: Apache-2.0

// Package e2e holds the end-to-end tests: real clients and real servers in
// network namespaces, with the real weir binary and its plugins on the router
// between them, on the kernel of this machine. What can be shown without a
// kernel belongs into the tests of the engine.
//
// The tests use the binaries in the directory that WEIR_BIN names (weir, and
// the plugins under plugins/), or build them first where it is not set.
package e2e
