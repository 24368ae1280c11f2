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
	n       *atomic.Uint32 // copies that count
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
	entryHead      = 8 // table, Ref
)

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
	return &Journal{
		n: (*atomic.Uint32)(unsafe.Pointer(&s.b[0])), entries: s.b[size:], size: size, cap: journalEntries, step: 1,
	}, nil
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
	n := j.n.Load()
	if n == j.cap {
		j.Overflows++
		j.extra = append(j.extra, [2]uint32{table, uint32(r)})
		return nil
	}
	e := unsafe.Pointer(&j.entries[uintptr(n)*j.size])
	*(*[2]uint32)(e) = [2]uint32{table, uint32(r)}
	return unsafe.Add(e, entryHead)
}

func (j *Journal) publish() { j.n.Store(j.n.Load() + 1) }

// Commit ends a step: what it changed stays. f, if it is not nil, is called
// before for every record that the step touched, with the index of its table
// in the order of their making, and may change that record.
func (j *Journal) Commit(f func(table uint32, r Ref)) {
	n := j.n.Load()
	if n == 0 {
		return
	}
	if j.Hook != nil {
		j.Hook()
	}
	for i := range n {
		j.seal(*(*[2]uint32)(unsafe.Pointer(&j.entries[uintptr(i)*j.size])), f)
	}
	for _, e := range j.extra {
		j.seal(e, f)
	}
	j.extra = j.extra[:0]
	if j.Hook != nil {
		j.Hook()
	}
	j.n.Store(0)
	if j.step++; j.step == 0 {
		j.step = 1
	}
	for _, t := range j.tables {
		t.begin(j.step)
	}
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
	n := j.n.Load()
	if n > j.cap {
		n = 0 // not written by us
	}
	for i := int(n) - 1; i >= 0; i-- {
		b := j.entries[uintptr(i)*j.size:][:j.size]
		e := *(*[2]uint32)(unsafe.Pointer(&b[0]))
		if int(e[0]) < len(j.tables) {
			j.tables[e[0]].restore(b[entryHead:], Ref(e[1]))
			if f != nil {
				f(e[0], Ref(e[1]))
			}
		}
	}
	j.n.Store(0)
	return int(n)
}
