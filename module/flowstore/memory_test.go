// SPDX-License-Identifier: Apache-2.0

package flowstore

import (
	"errors"
	"os"
	"path/filepath"
	"runtime/debug"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/internal/require"
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

// tight is a directory in a small file system.
func tight(t *testing.T) string {
	t.Helper()
	require.Netns(t) // whose rights are those of a mount, too
	dir := t.TempDir()
	if err := unix.Mount("weir-room", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill leaves no room there.
func fill(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "other"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for b := make([]byte, 4096); err == nil; {
		_, err = f.Write(b)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
}

// faults tells whether the process would die of a store.
func faults(b *byte) (fault bool) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { fault = recover() != nil }()
	*b = 1
	return false
}

// TestRoom: a table in a full file system takes no more records, keeps those
// that it has, and grows again when there is room.
func TestRoom(t *testing.T) {
	dir := tight(t)
	m, j, tab, err := kept(filepath.Join(dir, "shard0"), 5, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, dir)
	n := uint32(0)
	insert := func() bool {
		k := tuple(n + 1)
		r := tab.Insert(&k)
		if r == 0 {
			return false
		}
		tab.At(r).A = uint64(n)
		j.Commit(nil)
		n++
		return true
	}
	for insert() {
		if n == 1<<20 {
			t.Fatal("there was room for all")
		}
	}
	if n < 1000 {
		t.Errorf("only %d records", n)
	}
	// A record that was believed to have memory would be the end.
	if !faults(&tab.sec.b[tab.sec.ready]) {
		t.Error("memory that nobody has asked for is there: this test shows nothing")
	}
	for range 3 * askAgain {
		if insert() {
			t.Fatal("there is no room, and a record more")
		}
	}
	if err := os.Remove(filepath.Join(dir, "other")); err != nil {
		t.Fatal(err)
	}
	full := n
	for range askAgain {
		insert()
	}
	if n == full {
		t.Errorf("there is room again, and %d records, as before", n)
	}
	fill(t, dir)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	// What is there needs no room to be taken over.
	if m, _, tab, err = kept(filepath.Join(dir, "shard0"), 5, 1<<20); err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if got := tab.Recover(believe); got != (Recovered{Taken: int(n)}) {
		t.Errorf("%+v of %d records", got, n)
	}
}

// TestRingRoom: what a successor does with a ring touches nothing that has no
// memory, whether the ring came round or not.
func TestRingRoom(t *testing.T) {
	const capacity, life = 1 << 20, 100
	for name, c := range map[string]struct{ puts, least int }{
		"a few":      {10, 10},
		"come round": {1<<20/int(unsafe.Sizeof(Brief{})) + 1000, 1<<20/int(unsafe.Sizeof(Brief{})) - 10},
	} {
		t.Run(name, func(t *testing.T) {
			dir := tight(t)
			path := filepath.Join(dir, "shard0")
			open := func() (*Memory, *Ring) {
				t.Helper()
				m, err := Open(path, 5)
				if err != nil {
					t.Fatal(err)
				}
				g, err := NewRingIn(m, 1, capacity, life, 1)
				if err != nil {
					t.Fatal(err)
				}
				m.Complete()
				return m, g
			}
			m, g := open()
			fill(t, dir)
			for i := range c.puts {
				g.Put(Brief{Key: tuple(uint32(i + 1))}, 1000)
			}
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
			m, g = open()
			defer m.Close()
			defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
			if n := g.Recover(1001); n < c.least || n > c.puts {
				t.Errorf("%d of %d entries", n, c.puts)
			}
			for i := range 100 {
				k := tuple(uint32(c.puts - i%10))
				if g.Get(&k, 1001) == nil {
					t.Fatalf("an entry is lost")
				}
				g.Put(Brief{Key: tuple(uint32(1<<24 + i))}, 1001)
			}
			if g.Expire(1000 + life); g.Len() != 100 {
				t.Errorf("%d entries, want 100", g.Len())
			}
			if g.Expire(1001 + life); g.Len() != 0 {
				t.Errorf("%d entries are left", g.Len())
			}
			for i := range c.puts {
				g.Put(Brief{Key: tuple(uint32(i + 1))}, 2000)
			}
			if g.Expire(2000 + life); g.Len() != 0 {
				t.Errorf("%d entries are left", g.Len())
			}
		})
	}
}
