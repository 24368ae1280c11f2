// SPDX-License-Identifier: Apache-2.0

package engine

import "testing"

// TestSidesTaken: a successor has the numbers that records name, each once, and
// gives out the others afterwards.
func TestSidesTaken(t *testing.T) {
	const last = 1000
	var s sides
	taken := map[uint32]bool{}
	for i := range uint32(last / 2) {
		n := 2 * (i*7%(last/2) + 1) // the even ones, in no order
		if !s.take(n) || s.take(n) {
			t.Fatalf("side %d is not taken once", n)
		}
		taken[n] = true
	}
	if s.take(0) {
		t.Error("side 0, which is none, is taken")
	}
	s.put(2) // a client that cannot go on
	delete(taken, 2)
	s.fill()
	if s.used != len(taken) {
		t.Errorf("%d sides are in use, want %d", s.used, len(taken))
	}
	for range 2 * last {
		n := s.get()
		if n == 0 || taken[n] || s.at(n) == nil {
			t.Fatalf("side %d is given out twice, or there is none", n)
		}
		taken[n] = true
	}
	for n := uint32(1); n <= last; n++ {
		if !taken[n] {
			t.Errorf("side %d is lost", n)
		}
	}
}
