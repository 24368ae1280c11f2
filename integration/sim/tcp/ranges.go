// SPDX-License-Identifier: Apache-2.0

package tcp

import "slices"

// Range is a half-open range of stream positions.
type Range struct{ From, To uint64 }

// Ranges is a set of positions: sorted ranges that neither overlap nor touch.
type Ranges []Range

// Add puts a range into the set.
func (s *Ranges) Add(from, to uint64) {
	if from >= to {
		return
	}
	v := *s
	if n := len(v); n > 0 && v[n-1].From <= from && from <= v[n-1].To {
		// The usual case: the last range grows.
		v[n-1].To = max(v[n-1].To, to)
		return
	}
	i := 0
	for i < len(v) && v[i].To < from {
		i++
	}
	j := i
	for j < len(v) && v[j].From <= to {
		from, to = min(from, v[j].From), max(to, v[j].To)
		j++
	}
	*s = slices.Replace(v, i, j, Range{from, to})
}

// Has reports whether all of [from, to) is in the set.
func (s Ranges) Has(from, to uint64) bool {
	if from >= to {
		return true
	}
	for _, r := range s {
		if r.From <= from && from < r.To {
			return to <= r.To
		}
	}
	return false
}

// At returns the range that holds the position.
func (s Ranges) At(pos uint64) (Range, bool) {
	for _, r := range s {
		if r.From <= pos && pos < r.To {
			return r, true
		}
	}
	return Range{}, false
}

// Next returns the first position from pos on that is in the set, or the
// largest number if there is none.
func (s Ranges) Next(pos uint64) uint64 {
	for _, r := range s {
		if pos < r.To {
			return max(pos, r.From)
		}
	}
	return ^uint64(0)
}

// End is the position after the last one of the set.
func (s Ranges) End() uint64 {
	if len(s) == 0 {
		return 0
	}
	return s[len(s)-1].To
}

// Prefix is how far the set reaches from pos without a gap.
func (s Ranges) Prefix(pos uint64) uint64 {
	if r, ok := s.At(pos); ok {
		return r.To
	}
	return pos
}

// Below removes everything before pos.
func (s *Ranges) Below(pos uint64) {
	v := *s
	for len(v) > 0 && v[0].To <= pos {
		v = v[1:]
	}
	if len(v) > 0 && v[0].From < pos {
		v[0].From = pos
	}
	if len(v) != len(*s) {
		*s = append((*s)[:0], v...)
	}
}

// Size is the number of positions between from and to that are in the set.
func (s Ranges) Size(from, to uint64) uint64 {
	var n uint64
	for _, r := range s {
		if a, b := max(r.From, from), min(r.To, to); a < b {
			n += b - a
		}
	}
	return n
}
