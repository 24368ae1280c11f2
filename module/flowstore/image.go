// SPDX-License-Identifier: Apache-2.0

package flowstore

// This file is for tests of packages that use a store: it kills without a
// process, thousands of times a second.

// Image copies a Memory that NewHeap made as it stands, also in the middle of
// a step: what a successor would find if the process died now. It is for tests.
func (m *Memory) Image() *Memory {
	c := &Memory{head: &memoryHead{seed: m.head.seed, record: m.head.record}, found: true, wrote: m.head.record}
	c.head.failed.Store(m.head.failed.Load())
	for _, s := range m.sections {
		b := clean(len(s.b))
		n := s.ready
		if s.used > 0 {
			n = s.used
		}
		copy(b[:n], s.b)
		c.images = append(c.images, &Section{b: b, ready: s.ready, used: s.used, note: new(readyMark)})
	}
	return c
}

// LoseJournal makes an Image one in which the journal was never written: what a
// step had begun stays half done. It is the negative control of tests.
func (m *Memory) LoseJournal() {
	if len(m.images) > 0 {
		clear(m.images[0].b[:8])
	}
}

// Free gives the memory of NewHeap or Image back, to be used again by those.
// It is for tests that make thousands of them.
func (m *Memory) Free() {
	for _, s := range append(m.sections, m.images...) {
		clear(s.b[:max(s.ready, s.used)])
		heaps.Lock()
		heaps.free[len(s.b)] = append(heaps.free[len(s.b)], s.b)
		heaps.Unlock()
		s.b = nil
	}
	m.sections, m.images = nil, nil
}
