// SPDX-License-Identifier: Apache-2.0

package flowstore

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Memory is where the tables of one shard live: ordinary memory that goes with
// the process (NewHeap), or a file that is mapped shared (Open), so that a
// successor finds every store that the process made before it died. It holds
// named sections.
//
// A file protects against the death of the process, not of the host: the
// endpoints forget a host that is gone, too.
//
// A Memory is not safe for concurrent use, except Owned.
type Memory struct {
	file     *os.File // nil: heap
	head     *memoryHead
	sections []*Section
	found    bool
	wrote    uint32 // version of the records of who had it last
	owner    uint64
	images   []*Section // of an Image: sections that nobody asked for yet
}

// Section is one part of a Memory. Bytes beyond what was asked for with Ensure
// must not be touched: they may have no memory behind them.
type Section struct {
	b     []byte
	ready int // bytes that may be touched
	file  *os.File
	at    int64
	fails int        // times that Ensure was asked in vain since an extension failed
	note  *readyMark // where a successor reads ready
	used  int        // of a sparse section in ordinary memory
}

// memoryHead is the first page of a file.
type memoryHead struct {
	magic    uint64
	layout   uint32 // LayoutVersion of the writer
	record   uint32 // version of the records, as given to Open
	owner    atomic.Uint64
	seed     uint64
	boot     [40]byte
	complete atomic.Uint32 // the sections are made
	failed   atomic.Uint32 // see MarkFailed
	n        uint32
	sections [maxSections]sectionHead
}

type sectionHead struct {
	tag   uint32
	item  uint32 // bytes per item, to notice another layout
	size  int64
	start int64
	ready readyMark // bytes from the start that have memory
}

// readyMark is a number that is written while the file is in use, so that the
// sum over the head cannot have it: it stands there twice, once inverted. A
// death between the two stores would make it a wrong one, so there are two of
// these pairs, of which one is always right.
type readyMark [2][2]int64

func (r *readyMark) set(n int64) {
	for i := range r {
		r[i] = [2]int64{n, ^n}
	}
}

// get returns the number, or false if others wrote into it.
func (r *readyMark) get() (int64, bool) {
	for i := range r {
		if r[i][0] == ^r[i][1] {
			return r[i][0], true
		}
	}
	return 0, false
}

const (
	memoryMagic = 0x57656972666c6f77 // "Weirflow"
	// LayoutVersion changes when the order of things in a file does.
	LayoutVersion = 2
	maxSections   = 24
	page          = 4096
	// extendBy is how much memory a section gets at once.
	extendBy = 1 << 20
	// askAgain is how often more memory is asked for until the kernel is asked
	// again after it had none.
	askAgain = 256
)

// ErrRefused says that a file is not one of ours, is of another version or of
// another size: what it holds cannot be taken over. The error's text says what
// was found.
var ErrRefused = errors.New("the flow store cannot be taken over")

// NewHeap makes a Memory that nobody inherits.
func NewHeap() *Memory {
	return &Memory{head: &memoryHead{}}
}

// heaps are clean pieces of ordinary memory by their size, from Free.
var heaps = struct {
	sync.Mutex
	free map[int][][]byte
}{free: map[int][][]byte{}}

// clean returns zeroed memory that is aligned for every record.
func clean(size int) []byte {
	heaps.Lock()
	defer heaps.Unlock()
	if l := heaps.free[size]; len(l) > 0 {
		heaps.free[size] = l[:len(l)-1]
		return l[len(l)-1]
	}
	words := make([]uint64, size/8)
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(words))), size)
}

// Open maps the file at path and makes it if there is none. record is the
// version of the records; a file of the version before or after is taken over,
// because versions only add (see package splice). Where the file cannot be
// taken over the error is ErrRefused, and Remove makes room for a new one.
//
// The caller holds the instance's lock: two processes must not write.
func Open(path string, record uint32) (*Memory, error) {
	// Not to wait for the other end of something that is no file.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0o600)
	switch {
	case errors.Is(err, unix.EISDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENXIO):
		return nil, fmt.Errorf("flow store %s: %w: not a regular file", path, ErrRefused)
	case err != nil:
		return nil, fmt.Errorf("flow store: %w", err)
	}
	m, err := open(f, record)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("flow store %s: %w", path, err)
	}
	return m, nil
}

// Check tells whether Open would take the file at path over, and changes
// nothing. The file may be in use by another process. The error is ErrRefused
// if not.
func Check(path string, record uint32) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("flow store: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("flow store: %w", err)
	}
	if st.Size() < 2*page {
		return fmt.Errorf("flow store %s: %w: %d bytes are too few", path, ErrRefused, st.Size())
	}
	b, err := unix.Mmap(int(f.Fd()), 0, page, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("flow store %s: %w", path, err)
	}
	defer unix.Munmap(b)
	if err := (*memoryHead)(unsafe.Pointer(&b[0])).check(st.Size(), record, bootID()); err != nil {
		return fmt.Errorf("flow store %s: %w", path, err)
	}
	return nil
}

func open(f *os.File, record uint32) (*Memory, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: not a regular file", ErrRefused)
	}
	found := st.Size() != 0
	if found && st.Size() < 2*page {
		return nil, fmt.Errorf("%w: %d bytes are too few", ErrRefused, st.Size())
	}
	m := &Memory{file: f, found: found}
	s, err := m.mapped(0, page, found)
	if err != nil {
		return nil, err
	}
	m.head = (*memoryHead)(unsafe.Pointer(&s.b[0]))
	boot := bootID()
	if !found {
		m.head.layout, m.head.record, m.head.boot = LayoutVersion, record, boot
		m.head.magic = memoryMagic
	} else if err := m.head.check(st.Size(), record, boot); err != nil {
		m.Close()
		return nil, err
	}
	m.wrote, m.head.record = m.head.record, record
	m.owner = m.head.owner.Add(1)
	return m, nil
}

// check refuses a file that was not written by a relative of ours.
func (h *memoryHead) check(size int64, record uint32, boot [40]byte) error {
	switch {
	case h.magic != memoryMagic:
		return fmt.Errorf("%w: its first bytes are not those of a flow store", ErrRefused)
	case h.layout != LayoutVersion:
		return fmt.Errorf("%w: layout %d, this program reads %d", ErrRefused, h.layout, LayoutVersion)
	case h.record+1 < record || h.record > record+1:
		return fmt.Errorf("%w: records of version %d, this program reads %d to %d", ErrRefused, h.record, record-1, record+1)
	case h.boot != boot:
		return fmt.Errorf("%w: the host was started anew since", ErrRefused)
	case h.complete.Load() == 0:
		return fmt.Errorf("%w: its writer died while it made it", ErrRefused)
	case h.n > maxSections:
		return fmt.Errorf("%w: %d sections", ErrRefused, h.n)
	}
	start := int64(page)
	for i := range h.n {
		s := &h.sections[i]
		ready, ok := s.ready.get()
		if !ok || s.start != start || s.size < 0 || s.size > size-start || ready < 0 || ready > s.size {
			return fmt.Errorf("%w: section %d does not follow on the one before, or lies outside its %d bytes, or is damaged", ErrRefused, i, size)
		}
		start += s.size
	}
	return nil
}

// HostLife names the present life of the host: times and packets of an earlier
// one mean nothing. It is empty where the kernel does not tell.
func HostLife() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

func bootID() (id [40]byte) {
	copy(id[:], HostLife())
	return id
}

// Found reports whether the file was there before, so that there may be
// something to take over.
func (m *Memory) Found() bool { return m.found }

// WrittenBy is the version of the records of the program that had the file
// last; that of this one where there was none.
func (m *Memory) WrittenBy() uint32 { return m.wrote }

// Complete says that all sections are made.
func (m *Memory) Complete() { m.head.complete.Store(1) }

// Owned reports whether this process is still the one that opened the file
// last. It may be called from any goroutine; one that was stopped and replaced
// finds out by it before it sends anything.
func (m *Memory) Owned() bool { return m.head.owner.Load() == m.owner }

// MarkFailed notes that the process is about to die of an error of its own, in
// the middle of a step. It may be called from any goroutine.
func (m *Memory) MarkFailed() { m.head.failed.Store(1) }

// Failed reports whether the predecessor died so, and forgets it.
func (m *Memory) Failed() bool { return m.head.failed.Swap(0) != 0 }

// Seed is a number that stays with the file, 0 until it is set.
func (m *Memory) Seed() uint64 { return m.head.seed }

// SetSeed sets it.
func (m *Memory) SetSeed(s uint64) { m.head.seed = s }

// Close unmaps the file. Nothing that came from the Memory may be used any
// more.
func (m *Memory) Close() error {
	for _, s := range m.sections {
		if s.file != nil && s.b != nil {
			_ = unix.Munmap(s.b)
			s.b, s.ready = nil, 0
		}
	}
	m.sections = nil
	if m.file == nil {
		return nil
	}
	return m.file.Close()
}

// Section returns the next section: n items of the given size. A file gives
// the same sections in the same order to every process; where one differs the
// error is ErrRefused. New memory is zero.
func (m *Memory) Section(tag uint32, n int, item uintptr) (*Section, error) {
	size := (n*int(item) + page - 1) &^ (page - 1)
	if m.file == nil {
		if m.found {
			if len(m.images) == 0 || len(m.images[0].b) != size {
				return nil, fmt.Errorf("%w: another section", ErrRefused)
			}
			s := m.images[0]
			m.images, m.sections = m.images[1:], append(m.sections, s)
			return s, nil
		}
		s := &Section{b: clean(size), note: new(readyMark)}
		m.sections = append(m.sections, s)
		return s, nil
	}
	i := len(m.sections) - 1 // the head is one
	if i >= maxSections {
		return nil, fmt.Errorf("flow store: more than %d sections", maxSections)
	}
	h := &m.head.sections[i]
	if m.found {
		if i >= int(m.head.n) || h.tag != tag || h.item != uint32(item) || h.size != int64(size) {
			return nil, fmt.Errorf("%w: section %d has %d bytes of records of %d bytes, wanted are %d of %d",
				ErrRefused, i, h.size, h.item, size, item)
		}
	} else {
		*h = sectionHead{tag: tag, item: uint32(item), size: int64(size), start: page}
		h.ready.set(0)
		if i > 0 {
			h.start = m.head.sections[i-1].start + m.head.sections[i-1].size
		}
		m.head.n = uint32(i + 1)
	}
	s, err := m.mapped(h.start, size, m.found)
	if err != nil {
		return nil, err
	}
	ready, _ := h.ready.get() // It was checked.
	s.ready, s.note = int(ready), &h.ready
	if s.ready > 0 {
		// It has memory, unless somebody punched holes into the file: then the
		// first touch of one might find no room, which is a signal.
		if err := unix.Fallocate(int(m.file.Fd()), 0, s.at, int64(s.ready)); err != nil {
			return nil, fmt.Errorf("no room for %d bytes: %w", s.ready, err)
		}
	}
	return s, nil
}

// mapped maps a part of the file. The first page has memory at once.
func (m *Memory) mapped(start int64, size int, found bool) (*Section, error) {
	if !found {
		if err := m.file.Truncate(start + int64(max(size, page))); err != nil {
			return nil, err
		}
	}
	b, err := unix.Mmap(int(m.file.Fd()), start, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping %d bytes: %w", size, err)
	}
	s := &Section{b: b, file: m.file, at: start}
	if start == 0 {
		if err := unix.Fallocate(int(m.file.Fd()), 0, 0, page); err != nil {
			_ = unix.Munmap(b)
			return nil, fmt.Errorf("no room: %w", err)
		}
		s.ready = page
	}
	m.sections = append(m.sections, s)
	return s, nil
}

// Ensure makes the first n bytes usable. It returns false when there is no
// room for them. It costs a comparison as a rule, and a system call per
// mebibyte.
func (s *Section) Ensure(n int) bool { return n <= s.ready || s.extend(n) }

func (s *Section) extend(n int) bool {
	if n > len(s.b) {
		return false
	}
	// Not at every packet, but there may be room again.
	if s.fails > 0 && s.fails < askAgain {
		s.fails++
		return false
	}
	to := min((n+extendBy-1)&^(extendBy-1), len(s.b))
	if s.file == nil {
		s.ready = min(n, len(s.b))
		return true
	}
	if err := unix.Fallocate(int(s.file.Fd()), 0, s.at+int64(s.ready), int64(to-s.ready)); err != nil {
		s.fails = 1
		return false
	}
	s.ready, s.fails = to, 0
	s.note.set(int64(to))
	return true
}

// Prepare makes the bytes from begin to end of a sparse section usable: one in
// which items are used out of their order, and of which nobody asks Ensure. It
// is a system call.
func (s *Section) Prepare(begin, end int) bool {
	if end > len(s.b) {
		return false
	}
	if s.file == nil {
		s.used = max(s.used, end)
		return true
	}
	return unix.Fallocate(int(s.file.Fd()), 0, s.at+int64(begin), int64(end-begin)) == nil
}

// Items makes the next section of a Memory as a list of n items, the first few
// of which are usable at once.
func Items[T any](m *Memory, tag uint32, n, first int) ([]T, *Section, error) {
	var zero T
	s, err := m.Section(tag, n, unsafe.Sizeof(zero))
	if err != nil {
		return nil, nil, err
	}
	if !s.Ensure(first * int(unsafe.Sizeof(zero))) {
		return nil, nil, errNoRoom
	}
	return cast[T](s)[:n], s, nil
}

// cast views a section as items.
func cast[T any](s *Section) []T {
	var zero T
	return unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(s.b))), len(s.b)/int(unsafe.Sizeof(zero)))
}
