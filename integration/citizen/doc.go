// SPDX-License-Identifier: Apache-2.0

// Package citizen holds the tests of how weir gets along with what else is on
// a router: the rulesets of other tools, which come, go and are flushed while
// it runs, other people's address translation, and the places in a network
// where a router may stand. testdata has the rulesets.
//
// Every test here watches both sides of the router, and a program (wire) sees
// to it that no packet with an untranslated sequence number has left it.
package citizen
