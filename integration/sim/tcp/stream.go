// SPDX-License-Identifier: Apache-2.0

package tcp

// Source makes bytes by their place, so that a stream of many gigabytes needs
// no memory.
type Source interface {
	// Fill writes the bytes from off on into b.
	Fill(off uint64, b []byte)
}

// Bytes is a Source that has its bytes.
type Bytes []byte

// Fill implements Source.
func (s Bytes) Fill(off uint64, b []byte) { copy(b, s[off:]) }

// piece is a run of the sent stream.
type piece struct {
	from, to uint64 // positions
	src      Source
	off      uint64 // of from in src
}

// stream is what an endpoint has written and the peer not acknowledged.
type stream struct{ pieces []piece }

func (s *stream) write(at uint64, src Source, off, n uint64) {
	if n > 0 {
		s.pieces = append(s.pieces, piece{from: at, to: at + n, src: src, off: off})
	}
}

// fill copies the bytes from pos on.
func (s *stream) fill(pos uint64, b []byte) {
	for i := range s.pieces {
		p := &s.pieces[i]
		if pos >= p.to {
			continue
		}
		n := min(uint64(len(b)), p.to-pos)
		p.src.Fill(p.off+pos-p.from, b[:n])
		pos, b = pos+n, b[n:]
		if len(b) == 0 {
			return
		}
	}
}

// acked forgets what lies before pos.
func (s *stream) acked(pos uint64) {
	i := 0
	for i < len(s.pieces) && s.pieces[i].to <= pos {
		i++
	}
	if i > 0 {
		s.pieces = append(s.pieces[:0], s.pieces[i:]...)
	}
}
