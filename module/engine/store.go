// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"hash/crc32"
	"strconv"
	"unsafe"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/pool"
	"github.com/weirgate/weir/module/splice"
)

// This file is what a successor needs (SPLICING.md, durability). The rule: at
// the end of a step everything that the step decided is in memory that
// outlives the process, before anything that it decided leaves. So a death is
// to the endpoints what TCP is made for: the loss of the packets that were
// waiting, and of the last step's outputs.
//
// Records are changed in place, under a journal that makes a step whole (see
// flowstore.Journal). What is not in records follows from them (indexes, the
// pool's lists, timers, waiting lines), or is mirrored: the bytes that the
// engine holds for a request, which it may have acknowledged, and an answer of
// its own. Not kept are packets beyond a gap (a receiver may forget what it
// only reported by SACK, RFC 2018 section 8), questions to plugins (they are
// asked again), and the framing bytes of a body under way (a client that
// repeats them says the same).

// mirrorArea is how much of a client's held bytes is mirrored: all that is ever
// held under the default limits. Where limits.head is larger, only what the
// endpoints themselves keep of such a head survives the process.
const mirrorArea = 96 << 10

// mirror is the durable copy of a side. Only those of its pages have memory
// that were used once.
type mirror struct {
	area   [2][mirrorArea]byte // held and next, see splice.ClientSwapped
	answer [mirrorPage]byte
}

const (
	mirrorPage   = 4096
	mirrorAnswer = 2 // the third area
)

// Sections of a shard's Memory, after the journal.
const (
	tagClients = iota + 2
	tagServers
	tagEmbryos
	tagTombs
	tagMirrors
	tagPorts
)

type store struct {
	mem     *flowstore.Memory // nil: nothing outlives the process
	journal *flowstore.Journal
	mirrors []mirror
	section *flowstore.Section
	pages   [][3]uint8               // of the mirrors, by area: pages that have memory
	since   []int64                  // of all SNIPs' ports
	ports   map[packet.Endpoint]bool // in use; while recovering
	reflect func(table uint32, r splice.Ref)
	resume  []resumption
	vips    map[packet.Endpoint]uint16 // of clients that were taken over, see TakenVIPs
	lastVIP packet.Endpoint            // that came last while recovering
}

// Open makes an engine whose state lives in mem. The caller calls Recover
// before the first Step. The errors are those of flowstore; with
// flowstore.ErrRefused the memory holds another engine's state, or none.
func Open(opt Options, mem *flowstore.Memory, db *farm.DB) (*Engine, error) {
	if s := mem.Seed(); s != 0 {
		opt.Seed = s // initial sequence numbers go on from the predecessor's
	} else {
		mem.SetSeed(opt.Seed)
	}
	e := newEngine(opt, db)
	opt = e.opt
	s := &e.store
	s.mem = mem
	var err error
	if s.journal, err = flowstore.NewJournal(mem, max(flowstore.SlotSize[splice.Client](), flowstore.SlotSize[splice.Server]())); err != nil {
		return nil, err
	}
	if e.clients, err = flowstore.NewIn[splice.Client](mem, s.journal, tagClients, opt.Clients, mix(opt.Seed, 1)); err != nil {
		return nil, err
	}
	if e.servers, err = flowstore.NewIn[splice.Server](mem, s.journal, tagServers, opt.Servers, mix(opt.Seed, 2)); err != nil {
		return nil, err
	}
	if e.embryos, err = flowstore.NewRingIn(mem, tagEmbryos, embryoPlaces(opt), embryoLife, mix(opt.Seed, 3)); err != nil {
		return nil, err
	}
	if e.tombs, err = flowstore.NewRingIn(mem, tagTombs, tombPlaces(opt), tombLife, mix(opt.Seed, 4)); err != nil {
		return nil, err
	}
	if s.mirrors, s.section, err = flowstore.Items[mirror](mem, tagMirrors, mirrorsFor(opt.Clients), 0); err != nil {
		return nil, err
	}
	s.pages = make([][3]uint8, len(s.mirrors))
	ports := 0
	for _, p := range opt.SNIPs {
		ports += p.Size()
	}
	if s.since, _, err = flowstore.Items[int64](mem, tagPorts, max(ports, 1), max(ports, 1)); err != nil {
		return nil, err
	}
	s.reflect = e.mirror
	mem.Complete()
	return e, nil
}

// mirrorsFor bounds the requests whose bytes are mirrored at the same time.
// Their address space is reserved at once, their memory as it is used.
func mirrorsFor(clients int) int {
	if strconv.IntSize == 32 {
		return min(clients, max(clients/16, 16), 1<<9)
	}
	return min(clients, max(clients/16, 16))
}

// commit ends a step, or a part of one that may stand alone: what was decided
// survives the process from here on. No pointer to a record may be used for a
// change afterwards.
func (e *Engine) commit() {
	if e.store.journal != nil {
		e.store.journal.Commit(e.store.reflect)
	}
}

// OnJournal has f called wherever a step is about to change another record,
// with the memory as a death at that instant would leave it. It is for tests.
func (e *Engine) OnJournal(f func()) { e.store.journal.Hook = f }

// The tables' indexes in the journal.
const (
	clientTable = iota
	serverTable
)

// mirror brings the durable copy of a client's side up to date.
func (e *Engine) mirror(table uint32, r splice.Ref) {
	if table != clientTable || !e.clients.Held(r) {
		return
	}
	c := e.clients.Peek(r)
	c.Flags &^= splice.ClientCopy | splice.ClientNoMirror
	if c.Side == 0 {
		c.Held, c.Next = 0, 0
		return
	}
	d := e.sides.at(c.Side)
	if d.sentOK {
		c.Flags |= splice.ClientCopy
	}
	c.Held, c.Next = uint32(len(d.held)), uint32(len(d.next))
	if c.State == splice.ClientAnswering {
		c.Held = uint32(len(d.answer))
	}
	if c.Held|c.Next == 0 {
		d.heldMirrored, d.nextMirrored = 0, 0
		return
	}
	s := &e.store
	if !s.prepare(c) {
		c.Flags |= splice.ClientNoMirror
		return
	}
	m := &s.mirrors[c.Side]
	held, next := m.areas(c)
	if c.State == splice.ClientAnswering {
		copy(m.answer[:], d.answer)
		c.HeldSum = sumOf(d.answer)
		d.heldMirrored = 0
	} else {
		reflect(held, d.held, &d.heldMirrored, &c.HeldSum)
	}
	reflect(next, d.next, &d.nextMirrored, &c.NextSum)
}

// prepare sees to it that a client's mirror has memory for what it holds. It
// returns false where there is none, or it is too small.
func (s *store) prepare(c *splice.Client) bool {
	if int(c.Side) >= len(s.mirrors) {
		return false
	}
	held, next := 0, 1
	if c.Flags&splice.ClientSwapped != 0 {
		held, next = 1, 0
	}
	if c.State == splice.ClientAnswering {
		held = mirrorAnswer
	}
	return s.need(c.Side, held, int(c.Held)) && s.need(c.Side, next, int(c.Next))
}

func (s *store) need(side uint32, area, n int) bool {
	pages := (n + mirrorPage - 1) / mirrorPage
	have := int(s.pages[side][area])
	if pages <= have {
		return true
	}
	if area == mirrorAnswer && pages > 1 || pages > mirrorArea/mirrorPage {
		return false
	}
	at := int(side)*int(unsafe.Sizeof(mirror{})) + area*mirrorArea
	if !s.section.Prepare(at+have*mirrorPage, at+pages*mirrorPage) {
		return false
	}
	s.pages[side][area] = uint8(pages)
	return true
}

func (m *mirror) areas(c *splice.Client) (held, next *[mirrorArea]byte) {
	if c.Flags&splice.ClientSwapped != 0 {
		return &m.area[1], &m.area[0]
	}
	return &m.area[0], &m.area[1]
}

// reflect copies what was appended since the last time.
func reflect(area *[mirrorArea]byte, b []byte, done *int, sum *uint32) {
	if *done == len(b) {
		return
	}
	if *done < len(b) && *done < mirrorArea {
		copy(area[*done:], b[*done:])
	}
	*done, *sum = len(b), sumOf(b)
}

// sumOf notices bytes that others wrote into: a server must not get them.
func sumOf(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// summed is the first version of records that has the sums.
const summed = 5

// swap says that the bytes of the next request have become the held ones: the
// two areas change their roles, so that the step can still be undone.
func (d *side) swap(c *splice.Client) {
	c.Flags ^= splice.ClientSwapped
	c.HeldSum, c.NextSum = c.NextSum, 0
	d.heldMirrored, d.nextMirrored = d.nextMirrored, 0
}

// restore gives a client its side back as it was mirrored. It returns false
// when bytes are missing.
func (e *Engine) restore(c *splice.Client) bool {
	s := &e.store
	i := c.Side
	c.Side = 0
	if c.Flags&splice.ClientNoMirror != 0 || c.Held > mirrorArea || c.Next > mirrorArea || i == 0 || int(i) >= len(s.mirrors) {
		return false
	}
	c.Side = i
	if !s.prepare(c) {
		c.Side = 0
		return false
	}
	m := &s.mirrors[i]
	held, next := m.areas(c)
	if !s.intact(c, m) || !e.sides.take(i) {
		c.Side = 0
		return false
	}
	d := e.sides.at(i)
	d.req.Reset()
	if c.State == splice.ClientAnswering {
		d.answer = append(d.answer[:0], m.answer[:c.Held]...)
	} else {
		d.held = append(d.held[:0], held[:c.Held]...)
		d.heldMirrored = len(d.held)
	}
	d.next = append(d.next[:0], next[:c.Next]...)
	d.nextMirrored = len(d.next)
	c.HeldSum, c.NextSum = sumOf(d.held), sumOf(d.next) // of a predecessor that had none
	if c.State == splice.ClientAnswering {
		c.HeldSum = sumOf(d.answer)
	}
	return true
}

// intact tells whether a mirror holds what was put into it.
func (s *store) intact(c *splice.Client, m *mirror) bool {
	if s.mem.WrittenBy() < summed {
		return true // nobody knows
	}
	held, next := m.areas(c)
	b := held[:c.Held]
	if c.State == splice.ClientAnswering {
		b = m.answer[:c.Held]
	}
	return (c.Held == 0 || sumOf(b) == c.HeldSum) && (c.Next == 0 || sumOf(next[:c.Next]) == c.NextSum)
}

// take gives out the side of a certain number, once. When all are taken that
// shall be, fill has to follow before the next get.
func (s *sides) take(i uint32) bool {
	if n := int(i) + 1 - len(s.list); n > 0 {
		s.list = append(s.list, make([]*side, n)...)
	}
	if i == 0 || s.list[i] != nil {
		return false
	}
	s.list[i] = &side{}
	s.used++
	return true
}

// fill makes the sides whose numbers nobody took.
func (s *sides) fill() {
	for i := 1; i < len(s.list); i++ {
		if s.list[i] == nil {
			s.list[i] = &side{}
			s.free = append(s.free, uint32(i))
		}
	}
}

// keepPorts has the ports' quarantine outlive the process.
func (e *Engine) keepPorts() {
	at := 0
	for _, p := range e.opt.SNIPs {
		p.Keep(e.store.since[at:at+p.Size()], e.now, func(port uint16) bool { return e.portUsed(p, port) })
		at += p.Size()
	}
}

func (e *Engine) portUsed(p *pool.Ports, port uint16) bool {
	return e.store.ports[packet.Endpoint{Addr: p.Addr, Port: port}]
}
