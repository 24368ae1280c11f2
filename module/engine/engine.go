// SPDX-License-Identifier: Apache-2.0

// Package engine is the verdict engine: what happens to the packets of a
// diverted flow. One Engine is one shard, a single-threaded state machine:
//
//	Step(now, event) → verdict on the event's packet + crafted packets
//
// The same events in the same order with the same clock and seed give the same
// outputs (INV-8). The engine does no I/O, reads no clock, starts no goroutine
// and writes no log; in steady translation it allocates nothing. Its records may
// live in memory that outlives the process: package flowstore asks the kernel for
// that, at most once per mebibyte of records. Somebody else
// brings packets and the time, and carries out what Step says: first what the
// records need, then the crafted packets, then the verdict.
//
// The life of a packet, in the order of the files:
//
//	cookie.go    SYN → SYN-ACK with a cookie, no state (another thread may do this)
//	census.go    how many connections each client has; limits of that
//	client.go    packets of clients: embryo, request head, everything outside a splice
//	dispatch.go  a complete head → policies → a server connection, idle or new
//	screen.go    what a farm refuses although its framing is certain; its limits
//	splice.go    both directions of a splice, response boundary, release
//	response.go  heads, bodies and ends of responses
//	body.go      request bodies: 100 (Continue), framing bytes, early answers, pace
//	tunnel.go    behind a 101: both directions without framing
//	private.go   connections whose authentication belongs to one client
//	server.go    packets of servers outside a splice; the pooled connection's life
//	answer.go    the engine's own responses, closing, tombstones
//	timers.go    what happens when nothing happens
//	ahead.go     reading ahead for a batch of packets
//	store.go     what a successor needs; takeover.go: how it goes on
package engine

import (
	"math/bits"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/pool"
	"github.com/weirgate/weir/module/splice"
	"github.com/weirgate/weir/policies/snapshot"
)

// HoldWindow is W_hold, the window in bytes that a client gets before its
// request is bound to a server.
const HoldWindow = 16 << 10

// Verdict is what becomes of an event's packet.
type Verdict uint8

// The verdicts. Drop is the zero value: nothing leaves untranslated (INV-3).
const (
	Drop    Verdict = iota
	Accept          // unchanged and unmarked: not ours
	Rewrite         // Event.Data goes on, with the mark
)

// Kind says what an event is.
type Kind uint8

// The kinds of events.
const (
	Packet  Kind = iota // a TCP packet to a VIP or to a SNIP port
	ICMP                // an ICMP error to a VIP or a SNIP
	Tick                // time has passed
	Stop                // begin to stop: nothing new, running responses finish
	Abort               // stop at once: reset what still runs
	Relieve             // another shard wants a connection, or gave one back
)

// Event is the input of a Step. The packet fields are in and out.
type Event struct {
	Kind     Kind
	Verdict  Verdict
	Checksum packet.ChecksumState
	GSO      bool // a super-packet that the kernel will segment
	Loopback bool // arrived on lo: a rewritten packet would not be routed
	Short    bool // truncated copy: must not be rewritten
	// Mark is what a policy wants the rewritten packet to carry beside the
	// engine's own mark, 0 = nothing. Packets of the Output do not carry it.
	Mark uint32
	Data []byte
}

// Output collects the packets that a batch of steps emits. Its memory is used
// again after Reset.
type Output struct {
	// Relieve asks for a Step of that kind in all other shards. Reset clears
	// it.
	Relieve bool
	// Questions are for plugins, each to be answered by Engine.Answer; Bans
	// are clients that plugins want to be kept away. Reset clears both.
	Questions []Question
	Bans      []Ban

	buf  []byte
	ends []int
}

// Reset forgets the packets.
func (o *Output) Reset() {
	o.buf, o.ends, o.Relieve = o.buf[:0], o.ends[:0], false
	clear(o.Questions)
	o.Questions, o.Bans = o.Questions[:0], o.Bans[:0]
}

// Len is the number of packets.
func (o *Output) Len() int { return len(o.ends) }

// Packet returns the i-th packet: a complete IP packet, valid until the next
// Step or Reset.
func (o *Output) Packet(i int) []byte {
	start := 0
	if i > 0 {
		start = o.ends[i-1]
	}
	return o.buf[start:o.ends[i]:o.ends[i]]
}

func (o *Output) segment(s *packet.Segment, payload []byte) {
	o.buf = packet.AppendSegment(o.buf, s, payload)
	o.ends = append(o.ends, len(o.buf))
}

func (o *Output) raw(b []byte) {
	o.buf = append(o.buf, b...)
	o.ends = append(o.ends, len(o.buf))
}

// Options configure an engine. Everything that the world decides is here, so
// that a test decides it.
type Options struct {
	Clients, Servers int          // table sizes, records
	Seed             uint64       // of the engine's own choices
	Handshake        *Handshake   // shared with the SYN thread; must not be nil
	Limits           http1.Limits // of message heads
	// SNIPs are the source addresses with this shard's slice of ports.
	SNIPs []*pool.Ports
	// ISS gives the initial sequence number of a server connection; nil takes
	// the scheme of RFC 6528 under Seed.
	ISS func(t *packet.Tuple, now int64) packet.Seq
	// ShareSNIP is source.shared: a packet to a port that the engine does not
	// hold belongs to somebody else on this host.
	ShareSNIP bool
	// Census counts the connections of each client; shards share one. nil makes
	// one for this engine alone.
	Census *Census
	// Shard and Shards tell the engine which part of a farm-wide number is
	// its own.
	Shard, Shards int
}

// Engine is one shard.
type Engine struct {
	opt     Options
	db      *farm.DB
	clients *flowstore.Table[splice.Client]
	servers *flowstore.Table[splice.Server]
	embryos *flowstore.Ring
	tombs   *flowstore.Ring
	idle    *pool.Pool
	sides   sides
	kepts   kepts
	wheel   wheel
	waits   map[uint16]*line // by farm ID

	now     int64
	out     *Output
	rnd     uint64
	lastOld [2]oldSegment
	owed    splice.Ref // a server connection to which an ACK is owed at the end of this step
	wakes   []uint16   // farms whose waiting line may move
	scratch snapshot.Scratch
	// limitsOf is the farm whose limits farmLimits holds, see limits.
	limitsOf   *farm.Farm
	farmLimits http1.Limits
	skip       snapshot.Tried             // servers without capacity for the request at hand
	values     [snapshot.MaxFields][]byte // of fields of the request at hand
	said       [snapshot.MaxAsks]snapshot.Answered
	rescan     http1.RequestHead
	asking     asks
	opts       [40]byte // option bytes of a crafted segment
	rstSlot    int64    // rate limit of stateless resets: second
	rstCount   int
	holding    bool   // timers wait, see HoldTimers
	resumed    int64  // when they had to wait last, 0: never
	waste      uint64 // see Ahead
	stopping   bool
	// preopening: the timer for min_idle is in order for the present database.
	preopening bool

	access *access // nil: no access log
	store  store

	Count Counters
}

// New makes an engine over a database of farms.
func New(opt Options, db *farm.DB) *Engine {
	e := newEngine(opt, db)
	opt = e.opt
	e.clients = flowstore.New[splice.Client](opt.Clients, mix(opt.Seed, 1))
	e.servers = flowstore.New[splice.Server](opt.Servers, mix(opt.Seed, 2))
	e.embryos = flowstore.NewRing(embryoPlaces(opt), embryoLife, mix(opt.Seed, 3))
	e.tombs = flowstore.NewRing(tombPlaces(opt), tombLife, mix(opt.Seed, 4))
	return e
}

func embryoPlaces(opt Options) int { return max(opt.Clients/4, 1024) }

// tombPlaces is for 14,500 connections a second, each over at once, with the
// default number of clients.
func tombPlaces(opt Options) int { return max(2*opt.Clients, 1024) }

func newEngine(opt Options, db *farm.DB) *Engine {
	if opt.Limits == (http1.Limits{}) {
		opt.Limits = http1.DefaultLimits()
	}
	opt.Clients, opt.Servers = max(opt.Clients, 1), max(opt.Servers, 1)
	if opt.Census == nil {
		opt.Census = NewCensus(opt.Clients, opt.Seed)
	}
	e := &Engine{
		opt:   opt,
		db:    db,
		idle:  pool.New(opt.Servers),
		waits: map[uint16]*line{},
		rnd:   mix(opt.Seed, 5),
	}
	e.wheel.init(opt.Clients + opt.Servers + 5)
	return e
}

// SetDB replaces the database of farms. Established splices keep going: their
// farms and servers are found by ID as long as the database knows them.
func (e *Engine) SetDB(db *farm.DB) {
	e.db = db
	e.preopening = false // look again
}

// Step handles one event at the given time (nanoseconds, monotonic). It sets
// ev.Verdict and ev.Data and appends crafted packets to out.
func (e *Engine) Step(now int64, ev *Event, out *Output) {
	e.now, e.out = now, out
	ev.Verdict = Drop
	if !e.preopening {
		e.advance() // the wheel must stand at now before the first timer is set
		e.armPreopen()
	}
	if !e.holding {
		e.advance()
	}
	if len(e.store.resume) > 0 {
		e.goOn()
	}
	switch ev.Kind {
	case Packet:
		e.packet(ev)
	case ICMP:
		e.icmp(ev)
	case Stop:
		e.stop()
	case Abort:
		e.abort()
	case Relieve:
		e.relieve()
	}
	for len(e.wakes) > 0 {
		id := e.wakes[len(e.wakes)-1]
		e.wakes = e.wakes[:len(e.wakes)-1]
		e.wakeFarm(id)
	}
	e.payOwed()
	e.commit()
	e.out = nil
}

// HoldTimers says whether steps leave out the timers that are due, because
// nobody has called Step for a while, and packets that came meanwhile wait to be
// handled. They fire later. The time until now is nobody's silence: what was
// lost could not be sent again in it.
func (e *Engine) HoldTimers(now int64, hold bool) {
	if e.holding = hold; hold {
		e.resumed = now
	}
}

// since is from when on it counts that nothing has come since t.
func (e *Engine) since(t int64) int64 { return max(t, e.resumed) }

// NextDue is the time of the next timer, or 0 when there is none. Calling Step
// with a Tick earlier changes nothing.
func (e *Engine) NextDue() int64 { return e.wheel.next() }

func (e *Engine) packet(ev *Event) {
	p, problem := packet.ParseTCP(ev.Data)
	if problem != packet.OK {
		e.Count.add(malformed(problem))
		return
	}
	if ev.Short {
		e.Count.add(ReasonTruncatedCopy)
		return
	}
	// INV-6: nothing is parsed further, no state changes, on a segment whose
	// checksum neither the kernel nor we have verified. A partial checksum
	// comes from this host or a virtual link.
	if ev.Checksum == packet.ChecksumUnknown {
		if !p.IPHeaderOK() || !p.VerifyChecksum() {
			e.Count.add(ReasonBadChecksum)
			return
		}
		ev.Checksum = packet.ChecksumVerified
	}
	key := p.Tuple()
	for _, ports := range e.opt.SNIPs {
		if ports.Addr == key.Dst.Addr && ports.Has(key.Dst.Port) {
			e.fromServer(&key, &p, ev)
			if e.kepts.used > 0 {
				e.replay(&key, true)
			}
			return
		}
	}
	e.fromClient(&key, &p, ev)
	if e.kepts.used > 0 {
		e.replay(&key, false)
	}
}

// rewrite carries out a translation on the packet under verdict.
// mss is the largest payload that the receiver's path takes.
func (e *Engine) rewrite(p *packet.TCP, ev *Event, w *packet.Rewrite, dirty bool, mss uint16) {
	p.Rewrite(w, ev.Checksum)
	switch {
	case ev.Checksum == packet.ChecksumPartial && !ev.GSO, dirty && ev.Checksum != packet.ChecksumPartial:
		p.FillChecksum()
	}
	ev.Data = p.Raw
	if !ev.Loopback && !w.Dst.Addr.IsLoopback() {
		ev.Verdict = Rewrite
		return
	}
	// A packet from lo is not routed again, one rewritten to lo is a martian
	// where it came in, and one that was kept has no verdict: emit it instead. A super-packet exceeds every MTU, so it goes
	// out in pieces.
	if ev.GSO {
		e.pieces(w, p.Payload(), int(mss))
		return
	}
	e.out.raw(p.Raw)
}

// pieces emits data under a translated header, cut to size. A FIN rides on the
// last piece.
func (e *Engine) pieces(w *packet.Rewrite, data []byte, size int) {
	g := packet.Segment{Src: w.Src, Dst: w.Dst, Seq: w.Seq, Ack: w.Ack, Flags: w.Flags &^ packet.FIN, Window: w.Window, TTL: 64}
	for {
		n := min(len(data), size)
		if n == len(data) {
			g.Flags = w.Flags
		}
		e.out.segment(&g, data[:n])
		g.Seq = g.Seq.Add(packet.Size(n))
		data = data[n:]
		if len(data) == 0 {
			return
		}
	}
}

// random is a xorshift-multiply generator: cheap, seeded, good enough to draw
// servers.
func (e *Engine) random() uint64 {
	e.rnd ^= e.rnd >> 12
	e.rnd ^= e.rnd << 25
	e.rnd ^= e.rnd >> 27
	return e.rnd * 0x2545f4914f6cdd1d
}

// mix derives independent seeds from one (the finaliser of splitmix64).
func mix(seed, n uint64) uint64 {
	z := seed + n*0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return bits.RotateLeft64(z^z>>31, int(n)) | 1
}

func (e *Engine) seconds() uint32 { return uint32(e.now / second) }

const (
	millisecond = int64(1e6)
	second      = int64(1e9)
)

// Usage says how much an engine holds; all zero when everything is idle and
// aged out (INV-9).
type Usage struct {
	Clients, Servers, Idle, Embryos, Tombs, Held, Kept, Timers, Waiting int
}

// Usage counts what the engine holds. It is not for the packet path.
func (e *Engine) Usage() Usage {
	u := Usage{
		Clients: e.clients.Len(), Servers: e.servers.Len(), Idle: e.idle.Len(),
		Embryos: e.embryos.Len(), Tombs: e.tombs.Len(), Held: e.sides.used, Kept: e.kepts.used, Timers: e.wheel.armed,
	}
	for _, l := range e.waits {
		u.Waiting += l.n
	}
	return u
}

// Running is, for a stop, the number of client connections with a request or
// response under way, and of connections of both sides that only wait for
// their peer's last words.
func (e *Engine) Running() (busy, closing int) {
	e.clients.Range(func(_ splice.Ref, c *splice.Client) bool {
		if c.State == splice.ClientClosing {
			closing++
		} else {
			busy++
		}
		return true
	})
	return busy, closing + e.servers.Len()
}
