// SPDX-License-Identifier: Apache-2.0

// Package framing shows, with real servers behind the real weir on this
// machine's kernel, that HTTP/1 framing cannot be smuggled past it: whatever a
// client sends, the requests that a server's own log has seen are those that
// went over the wire as weir reads them, and the connection of anything
// doubtful never serves anybody else. The other direction too: whatever a
// server sends is delivered as it is, and only what has a certain end is
// pooled.
//
// The witness of a server is its access log. What weir believes is read from a
// capture between weir and the servers, with weir's own scanner. What can be
// shown without a kernel belongs into the tests of the engine.
package framing
