// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/policies/snapshot"
)

// side is the part of a client connection that is not in its record, because
// most connections do not need it most of the time: bytes held for a request
// that is not at a server yet, or that the server has not acknowledged. The
// endpoints keep all other data.
type side struct {
	// held are the client's bytes of the present request from Epoch.ReqBase
	// on: the head, and what came of the body before the request was bound.
	held []byte
	// sent is what the server gets for held: the same bytes, or a copy with
	// the overlay applied. Valid while sentOK.
	sent   []byte
	sentOK bool
	edited []byte // memory of such a copy
	// next are bytes after the end of the present request (pipelining).
	next []byte
	// frames are the framing bytes of a chunked body, in order, from the first
	// one on that the server has not acknowledged; see feedBody.
	frames     []frame
	frameBytes []byte
	// answer is the engine's own response.
	answer []byte

	req     http1.RequestHead // scanner, then result
	scanned int               // bytes of held that req has consumed
	want    *http1.Wanted     // the fields that req was scanned for
	tried   snapshot.Tried
	// answered are the plugins' answers about the request, question the one
	// that is open, 0 = none.
	answered []answerOf
	question uint64

	// How much of held and next stands in the mirror.
	heldMirrored, nextMirrored int
	// charged are the bytes of held and next that account counts.
	charged int
	account *farm.FarmStats
	why     Reason // why the last attempt failed
}

// keptSides is how many free sides keep their buffers: after a crowd the memory
// goes back.
const keptSides = 1024

// maxKeptBuffer bounds what a free side keeps of its buffers, bytes.
const maxKeptBuffer = 32 << 10

// sides is a free list of side memory. It grows with the number of requests
// that are held at the same time and is used again.
type sides struct {
	list []*side
	free []uint32
	used int
}

// get returns the number of a clean side, never 0.
func (s *sides) get() uint32 {
	s.used++
	if n := len(s.free); n > 0 {
		i := s.free[n-1]
		s.free = s.free[:n-1]
		return i
	}
	if len(s.list) == 0 {
		s.list = append(s.list, nil)
	}
	s.list = append(s.list, &side{})
	return uint32(len(s.list) - 1)
}

func (s *sides) at(i uint32) *side { return s.list[i] }

func (s *sides) put(i uint32) {
	d := s.list[i]
	if d.charged > 0 {
		d.account.Held.Add(-int64(d.charged))
		d.charged, d.account = 0, nil
	}
	if len(s.free) >= keptSides {
		*d = side{}
	}
	d.held, d.edited, d.next, d.answer = trim(d.held), trim(d.edited), trim(d.next), trim(d.answer)
	d.frames, d.frameBytes = d.frames[:0], trim(d.frameBytes)
	d.sent = nil
	d.sentOK, d.scanned, d.why = false, 0, ReasonNone
	clear(d.answered)
	d.want, d.answered, d.question = nil, d.answered[:0], 0
	d.heldMirrored, d.nextMirrored = 0, 0
	s.free = append(s.free, i)
	s.used--
}

func trim(b []byte) []byte {
	if cap(b) > maxKeptBuffer {
		return nil
	}
	return b[:0]
}
