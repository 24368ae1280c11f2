// SPDX-License-Identifier: Apache-2.0

package flowstore

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/weirgate/weir/module/packet"
)

type small struct {
	A, B uint64
}

// kept is a store of one table in a file.
func kept(path string, record uint32, capacity int) (*Memory, *Journal, *Table[small], error) {
	m, err := Open(path, record)
	if err != nil {
		return nil, nil, nil, err
	}
	j, err := NewJournal(m, SlotSize[small]())
	if err != nil {
		m.Close()
		return nil, nil, nil, err
	}
	tab, err := NewIn[small](m, j, 2, capacity, 1)
	if err != nil {
		m.Close()
		return nil, nil, nil, err
	}
	m.Complete()
	return m, j, tab, nil
}

func believe(Ref, *packet.Tuple, *small) bool { return true }

// TestFileVersions: a file is taken over by the version that wrote it, the one
// before and the one after, and by no other; with other sizes it is refused.
func TestFileVersions(t *testing.T) {
	path := filepath.Join(t.TempDir(), "shard0")
	for _, c := range []struct {
		record   uint32
		capacity int
		ok       bool
	}{{5, 10, true}, {6, 10, true}, {5, 10, true}, {7, 10, false}, {3, 10, false}, {5, 2000, false}, {4, 10, true}, {6, 10, false}} {
		m, j, tab, err := kept(path, c.record, c.capacity)
		if (err == nil) != c.ok || err != nil && !errors.Is(err, ErrRefused) {
			t.Fatalf("%+v: %v", c, err)
		}
		if err != nil {
			continue
		}
		n := tab.Recover(believe)
		if want := 0; m.Found() && n.Taken <= want {
			t.Errorf("%+v: %+v", c, n)
		}
		k := tuple(uint32(100 + n.Taken))
		tab.At(tab.Insert(&k)).A = 7
		j.Commit(nil)
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestUndo: what an unfinished step changed is as before it, what a finished one
// changed stays; a record that others wrote into is refused alone.
func TestUndo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "shard0")
	m, j, tab, err := kept(path, 5, 200)
	if err != nil {
		t.Fatal(err)
	}
	var refs []Ref
	for i := range uint32(10) {
		k := tuple(i + 1)
		r := tab.Insert(&k)
		tab.At(r).A = uint64(i)
		refs = append(refs, r)
	}
	j.Commit(nil)
	for _, r := range refs[:3] {
		tab.At(r).B = 99
	}
	tab.Remove(refs[3])
	k := tuple(77)
	tab.Insert(&k)           // in the place of the removed one
	tab.Peek(refs[9]).A ^= 1 // nobody's change
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if m, j, tab, err = kept(path, 5, 200); err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if n := j.Undo(nil); n != 4 {
		t.Errorf("%d records are put back, want 4", n)
	}
	if got := tab.Recover(believe); got != (Recovered{Taken: 9, Refused: 1}) {
		t.Errorf("%+v", got)
	}
	for i := range uint32(9) {
		k := tuple(i + 1)
		r := tab.Lookup(&k)
		if r == 0 || tab.Peek(r).A != uint64(i) || tab.Peek(r).B != 0 {
			t.Errorf("record %d: %d, %+v", i, r, tab.Peek(r))
		}
	}
}

// TestDamagedFile: whatever is written over a file, or cut off, it is refused,
// or taken over without the damaged records; nothing panics, and what is taken
// is as it was.
func TestDamagedFile(t *testing.T) {
	rnd := seed(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "good")
	m, j, tab, err := kept(path, 5, 500)
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint32(300) {
		k := tuple(i + 1)
		*tab.At(tab.Insert(&k)) = small{uint64(i), ^uint64(i)}
		j.Commit(nil)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	refused, taken := 0, 0
	for i := range 400 {
		bad := append([]byte(nil), good...)
		switch i % 4 {
		case 0: // anywhere
			for range 1 + rnd.IntN(50) {
				bad[rnd.IntN(len(bad))] = byte(rnd.Uint32())
			}
		case 1: // in the first page
			for range 1 + rnd.IntN(3) {
				bad[rnd.IntN(1024)] = byte(rnd.Uint32())
			}
		case 2:
			bad = bad[:rnd.IntN(len(bad))]
		case 3: // everything behind a place
			for k := rnd.IntN(len(bad)); k < len(bad); k++ {
				bad[k] = byte(rnd.Uint32())
			}
		}
		p := filepath.Join(dir, "bad")
		if err := os.WriteFile(p, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		m, j, tab, err := kept(p, 5, 500)
		if err != nil {
			refused++
			continue
		}
		j.Undo(nil)
		tab.Recover(believe)
		tab.Range(func(r Ref, s *small) bool {
			taken++
			if s.B != ^s.A || s.A >= 300 {
				t.Errorf("damage %d: a record is taken that nobody wrote: %+v", i, s)
			}
			return true
		})
		m.Close()
	}
	t.Logf("%d files of 400 refused, %d records taken", refused, taken)
	if refused == 0 || taken == 0 {
		t.Error("the test shows nothing")
	}
}
