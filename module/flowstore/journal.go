// SPDX-License-Identifier: Apache-2.0

package flowstore

import (
	"sync/atomic"
	"unsafe"
)

// Journal makes the steps of an engine atomic. Before a step changes a record
// for the first time, the record is copied here; when the step is complete,
// Commit forgets the copies. A successor that finds copies puts them back: the
// step did not happen, and its outputs were never sent. So all records that a
// step touches change together, or none does.
//
// The processor's own order of stores is enough: a process that is killed
// leaves behind what it stored, in program order, because the memory outlives
// it. Only the compiler must be kept from reordering, which the atomic counter
// does.
type Journal struct {
	word    *atomic.Uint64 // number of the step, and copies that count: step<<32 | n
	entries []byte
	size    uintptr // of an entry
	cap     uint32
	step    uint32
	tables  []journaled
	// Hook, if it is set, is called before each copy is made, with the records
	// as they stand in the middle of a step. It is for tests, which die here.
	Hook func()
	// Overflows counts the records that were touched when there was no room for
	// a copy: steps that touch so many are not atomic in them.
	Overflows uint64

	extra [][2]uint32 // those records
}

// journaled is a table under a journal.
type journaled interface {
	seal(Ref)            // the record is complete
	restore([]byte, Ref) // put a copy back
	begin(step uint32)   // records touched from now on are copied first
}

const (
	journalEntries = 64
	entryHead      = 16 // see entryMark
)

// entryMark stands before a copy. Only copies of the step that is under way are
// put back: if others write into the number of copies, older ones must not come
// to life again.
type entryMark struct{ table, ref, step, _ uint32 }

func (j *Journal) mark(i uint32) *entryMark {
	return (*entryMark)(unsafe.Pointer(&j.entries[uintptr(i)*j.size]))
}

// count is how many copies count.
func (j *Journal) count() uint32 { return uint32(j.word.Load()) }

// next begins another step, whose copies are told from all before.
func (j *Journal) next() {
	if j.step++; j.step == 0 {
		j.step = 1
	}
	j.word.Store(uint64(j.step) << 32)
	for _, t := range j.tables {
		t.begin(j.step)
	}
}

// NewJournal makes the journal of a Memory. Tables are added by NewIn.
func NewJournal(m *Memory, largest uintptr) (*Journal, error) {
	size := (entryHead + largest + 63) &^ 63
	s, err := m.Section(1, journalEntries+1, size)
	if err != nil {
		return nil, err
	}
	if !s.Ensure(len(s.b)) {
		return nil, errNoRoom
	}
	j := &Journal{word: (*atomic.Uint64)(unsafe.Pointer(&s.b[0])), entries: s.b[size:], size: size, cap: journalEntries}
	j.step = uint32(j.word.Load() >> 32)
	if j.count() == 0 {
		j.next()
	}
	return j, nil
}

func (j *Journal) add(t journaled) uint32 {
	j.tables = append(j.tables, t)
	t.begin(j.step)
	return uint32(len(j.tables) - 1)
}

// entry returns the place for the next copy, or nil when there is none.
// publish makes it count.
func (j *Journal) entry(table uint32, r Ref) unsafe.Pointer {
	if j.Hook != nil {
		j.Hook()
	}
	n := j.count()
	if n == j.cap {
		j.Overflows++
		j.extra = append(j.extra, [2]uint32{table, uint32(r)})
		return nil
	}
	e := j.mark(n)
	*e = entryMark{table: table, ref: uint32(r), step: j.step}
	return unsafe.Add(unsafe.Pointer(e), entryHead)
}

func (j *Journal) publish() { j.word.Store(j.word.Load() + 1) }

// Commit ends a step: what it changed stays. f, if it is not nil, is called
// before for every record that the step touched, with the index of its table
// in the order of their making, and may change that record.
func (j *Journal) Commit(f func(table uint32, r Ref)) {
	n := j.count()
	if n == 0 {
		return
	}
	if j.Hook != nil {
		j.Hook()
	}
	for i := range n {
		e := j.mark(i)
		j.seal([2]uint32{e.table, e.ref}, f)
	}
	for _, e := range j.extra {
		j.seal(e, f)
	}
	j.extra = j.extra[:0]
	if j.Hook != nil {
		j.Hook()
	}
	j.next()
}

func (j *Journal) seal(e [2]uint32, f func(uint32, Ref)) {
	if f != nil {
		f(e[0], Ref(e[1]))
	}
	j.tables[e[0]].seal(Ref(e[1]))
}

// Undo puts back what an unfinished step of a predecessor changed, before the
// tables recover. It reports how many records that were.
//
// f, if it is not nil, is told of each.
func (j *Journal) Undo(f func(table uint32, r Ref)) int {
	n := j.count()
	if n > j.cap {
		n = 0 // not written by us
	}
	undone := 0
	for i := int(n) - 1; i >= 0; i-- {
		e := j.mark(uint32(i))
		if e.step != j.step || int(e.table) >= len(j.tables) {
			continue // not of this step
		}
		j.tables[e.table].restore(j.entries[uintptr(i)*j.size:][entryHead:j.size], Ref(e.ref))
		undone++
		if f != nil {
			f(e.table, Ref(e.ref))
		}
	}
	j.next()
	return undone
}
