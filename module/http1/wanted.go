// SPDX-License-Identifier: Apache-2.0

package http1

import "fmt"

// MaxWanted is the largest number of field names that routing may ask for.
const MaxWanted = 16

// Wanted is a set of field names whose values a RequestHead reports. It is built
// once, when the configuration is read, and only read afterwards. It is flat and
// may be copied.
type Wanted struct {
	byLen [keptName + 1]uint16 // for each length, the bits of the names that have it
	n     uint8
	len   [MaxWanted]uint8
	name  [MaxWanted][keptName]byte // lower case
}

// NewWanted builds a set. Names are compared without case; index i of the
// results belongs to names[i]. It refuses more than MaxWanted names, names that
// are no tokens or longer than 40 bytes, and repetitions.
func NewWanted(names ...string) (*Wanted, error) {
	if len(names) > MaxWanted {
		return nil, fmt.Errorf("http1: %d wanted field names, at most %d are possible: route on fewer", len(names), MaxWanted)
	}
	w := new(Wanted)
	for i, n := range names {
		if n == "" || len(n) > keptName || tokenEnd([]byte(n), 0) != len(n) {
			return nil, fmt.Errorf("http1: wanted field name %q: must be a token of 1 to %d bytes", n, keptName)
		}
		for k := range len(n) {
			w.name[i][k] = lower(n[k])
		}
		if w.index(w.name[i][:len(n)]) != 0 {
			return nil, fmt.Errorf("http1: wanted field name %q is named twice", n)
		}
		w.len[i] = uint8(len(n))
		w.byLen[len(n)] |= 1 << i
		w.n++
	}
	return w, nil
}

// Len returns the number of names.
func (w *Wanted) Len() int { return int(w.n) }

// Name returns name i in lower case.
func (w *Wanted) Name(i int) string { return string(w.name[i][:w.len[i]]) }

// Index returns the index of a name, in lower case, or -1.
func (w *Wanted) Index(name string) int {
	if len(name) > keptName {
		return -1
	}
	for i, m := 0, w.byLen[len(name)]; m != 0; i, m = i+1, m>>1 {
		if m&1 != 0 && string(w.name[i][:len(name)]) == name {
			return i
		}
	}
	return -1
}

// index returns the index of a name, plus one, or zero.
func (w *Wanted) index(name []byte) uint8 {
	if len(name) > keptName {
		return 0
	}
	m := w.byLen[len(name)]
	for i := uint8(0); m != 0; i, m = i+1, m>>1 {
		if m&1 == 0 {
			continue
		}
		k := 0
		for k < len(name) && lower(name[k]) == w.name[i][k] {
			k++
		}
		if k == len(name) {
			return i + 1
		}
	}
	return 0
}
