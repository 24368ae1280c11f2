// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"

	"github.com/weirgate/weir/module/packet"
)

// TestSwarmEnds: each client has an end of its own in the network that is routed
// to it, and is found by it; others are nobody's.
func TestSwarmEnds(t *testing.T) {
	b := swarmNet.Addr().As4()
	s := &swarm{base: uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3]) + 1, clients: make([]swarmClient, 1_000_000)}
	seen := map[packet.Endpoint]bool{}
	for i := 0; i < len(s.clients); i += 997 {
		e := s.end(i)
		if seen[e] || !swarmNet.Contains(e.Addr.Netip()) || s.index(e) != i {
			t.Fatalf("client %d is %v, which is client %d", i, e, s.index(e))
		}
		seen[e] = true
	}
	last := s.end(len(s.clients) - 1)
	for _, e := range []packet.Endpoint{
		{Addr: last.Addr, Port: last.Port + 1}, {Addr: last.Addr, Port: firstPort - 1}, {Addr: packet.AddrFrom(swarmNet.Addr()), Port: firstPort},
		{Addr: packet.AddrFrom(swarmNet.Addr().Prev()), Port: firstPort}, {},
	} {
		if i := s.index(e); i != -1 {
			t.Errorf("%v is client %d", e, i)
		}
	}
}

// TestWhole: the size of a response is told by its head, and by nothing less.
func TestWhole(t *testing.T) {
	for text, want := range map[string]uint16{
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel":         43,
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nA: b\r\n\r\n":    49,
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nA: b\r\n":        0,
		"HTTP/1.1 200 OK\r\nA: b\r\n\r\n":                         0,
		"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\nbody": 0,
	} {
		if got := whole([]byte(text)); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}
