// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"cmp"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net/netip"
	"runtime/debug"
	"slices"

	"github.com/weirgate/weir/integration/sim/tcp"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/pool"
)

// The addresses of the simulated network.
var (
	vip4  = netip.MustParseAddrPort("203.0.113.10:80")
	vip6  = netip.MustParseAddrPort("[2001:db8:1::10]:80")
	snip4 = netip.MustParseAddr("198.51.100.1")
	snip6 = netip.MustParseAddr("2001:db8:2::1")
)

const firstPort = 10240

// Violation is an invariant that did not hold.
type Violation struct {
	Invariant string
	What      string
	At        int64
	client    packet.Endpoint // whose ladder tells the story
	server    packet.Tuple
}

func (v *Violation) Error() string {
	return fmt.Sprintf("%s at %.6f s: %s", v.Invariant, float64(v.At-startTime)/1e9, v.What)
}

// Result is what became of a run.
type Result struct {
	Violation *Violation
	Exchanges int // that were answered by a server
	Owned     int // that were answered by the engine itself
	Excused   int // that were not answered, for a reason of the plan's
	Steps     int
	Packets   int
	Time      int64  // virtual
	Hash      uint64 // over everything that the engine let out
	Counters  [engine.Reasons]uint64
	Requests  int // redispatches are not counted again
	Opened    uint64
	Reused    uint64
	// Of the nemesis: deaths, those in the middle of a step, records that were
	// put back, connections that could not go on.
	Kills, Inside, Undone, Lost int
	// Of a Stall: packets that found a queue full, and those in the longest one.
	Overflow, Peak int
}

// startTime is when a run begins: not 0, because 0 often means "never".
const startTime = 1000 * second

// Hooks let a test tamper with the run: the negative controls.
type Hooks struct {
	// Emitted may change or drop (nil) a packet that the engine lets out.
	Emitted func(w *World, d Direction, b []byte) []byte
	// Sent sees what endpoints send.
	Sent func(w *World, d Direction, b []byte)
	// Arriving may change a packet before the engine sees it.
	Arriving func(w *World, d Direction, b []byte) []byte
	// Lose says which packets a wire loses, beside the random ones.
	Lose func(d Direction, b []byte) bool
	// Delay is added to the delay of a packet, without changing the order.
	Delay func(d Direction, b []byte) int64
	// Renew says when the engine is to be replaced by a new one: an engine
	// that forgets everything.
	Renew func(w *World) bool
	// NoICMP has the wires swallow what does not fit without a word.
	NoICMP bool
	// Inherit may change what a successor of the engine finds.
	Inherit func(m *flowstore.Memory) *flowstore.Memory
	// Built may look at the world before it starts.
	Built func(w *World)
}

// World is one run.
type World struct {
	Scenario *Scenario
	Hooks    Hooks
	now      int64
	q        queue
	rnd      *rand.Rand
	eng      *engine.Engine
	hs       *engine.Handshake
	db       *farm.DB
	ports    *pool.Ports
	out      engine.Output
	wires    [directions]wire
	hosts    map[packet.Addr]*tcp.Host
	clients  []*client
	servers  []*server
	byNonce  map[Nonce]*Exchange
	obs      observer
	trace    *trace
	lose     func(d Direction, b []byte) bool
	vip      packet.Endpoint
	snip     packet.Addr
	res      Result
	viol     *Violation
	open     int // clients that are not through
	ticks    int
	buf      []byte
	let      []parcel // what the present step let out
	order    []int
	atEnd    func() // looks at a run that ended well
	spec     farm.Spec
	mem      *flowstore.Memory // what outlives the engine
	syns     *flowstore.Memory // that of the handshakes
	nemesis  nemesis
	stall    stall
}

func (w *World) after(d int64, do func()) { w.q.push(happening{at: w.now + d, do: do}) }

func (w *World) fail(inv, format string, args ...any) {
	if w.viol == nil {
		w.viol = &Violation{Invariant: inv, What: fmt.Sprintf(format, args...), At: w.now}
	}
}

// failFlow is fail with the connections that it is about.
func (w *World) failFlow(c packet.Endpoint, s packet.Tuple, inv, format string, args ...any) {
	if w.viol == nil {
		w.fail(inv, format, args...)
		w.viol.client, w.viol.server = c, s
	}
}

func clientAddr(v6 bool, i int) netip.Addr {
	if v6 {
		a := netip.MustParseAddr("2001:db8:3::").As16()
		a[15], a[14] = byte(i+1), byte((i+1)>>8)
		return netip.AddrFrom16(a)
	}
	return netip.AddrFrom4([4]byte{198, 18, byte((i + 1) >> 8), byte(i + 1)})
}

func serverAddr(v6 bool, i int) netip.AddrPort {
	if v6 {
		a := netip.MustParseAddr("2001:db8:2::").As16()
		a[15] = byte(i + 11)
		return netip.AddrPortFrom(netip.AddrFrom16(a), 80)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(i + 11)}), 80)
}

// NewWorld builds the world of a scenario.
func NewWorld(s *Scenario, h Hooks) *World {
	w := &World{
		Scenario: s, Hooks: h, now: startTime, rnd: stream(s.Seed, partWorld, 0),
		hosts: map[packet.Addr]*tcp.Host{}, byNonce: map[Nonce]*Exchange{}, lose: h.Lose,
	}
	vip, snip := vip4, snip4
	if s.V6 {
		vip, snip = vip6, snip6
	}
	w.vip, w.snip = packet.EndpointFrom(vip), packet.AddrFrom(snip)
	spec := farm.Spec{SNIPs: []netip.Addr{snip}, Farms: []farm.FarmSpec{{
		Name: "web", VIPs: []netip.AddrPort{vip}, Pool: s.Pool,
		Timeouts: farm.Timeouts{Connect: 5 * second, Head: 60 * second, Idle: 60 * second, Response: patience},
	}}}
	if s.Forward {
		spec.Farms[0].Forwarded = farm.ForwardedXFF
	}
	for i := range s.Servers {
		spec.Farms[0].Servers = append(spec.Farms[0].Servers, farm.ServerSpec{Name: fmt.Sprintf("s%d", i+1), Endpoint: serverAddr(s.V6, i)})
	}
	db, err := farm.Build(nil, spec)
	if err != nil {
		panic("sim: the scenario's farm is not valid: " + err.Error())
	}
	w.db, w.spec = db, spec
	for d := range w.wires {
		w.wires[d] = wire{w: w, dir: Direction(d), spec: s.Wires[d], rnd: stream(s.Seed, partWire, uint64(d))}
	}
	w.obs.init(w)
	w.hs = engine.OpenHandshake(w.cookies(), engineMSS, cmp.Or(s.MSS6, olderMSS6), func(ep packet.Endpoint) bool { return ep == w.vip })
	w.syns = flowstore.NewHeap()
	if err := w.hs.Keep(w.syns); err != nil {
		panic("sim: " + err.Error())
	}
	w.renew()
	for i := range s.Servers {
		w.servers = append(w.servers, newServer(w, i))
	}
	for i := range s.Conns {
		w.clients = append(w.clients, newClient(w, i))
	}
	w.open = len(w.clients)
	for _, c := range w.clients {
		if c.plan.After == 0 {
			c.schedule(c.plan.Start)
		}
	}
	w.stall.plan(w)
	if h.Built != nil {
		h.Built(w)
	}
	return w
}

// renew makes the engine.
func (w *World) renew() {
	s := w.Scenario
	w.ports = pool.NewPorts(w.snip, firstPort, uint16(firstPort+s.Ports-1), s.Quiet, nil)
	opt := engine.Options{
		Clients: s.Clients, Servers: s.Tables, Seed: s.Seed, Handshake: w.hs, SNIPs: []*pool.Ports{w.ports},
	}
	if len(s.EngineToServer) > 0 {
		n := 0
		opt.ISS = func(*packet.Tuple, int64) packet.Seq {
			n++
			return packet.Seq(s.EngineToServer[(n-1)%len(s.EngineToServer)])
		}
	}
	if !s.mortal() {
		w.eng = engine.New(opt, w.db)
		return
	}
	if w.mem == nil {
		w.mem = flowstore.NewHeap()
		w.nemesis.init(w)
	}
	var err error
	if w.eng, err = engine.Open(opt, w.mem, w.db); err != nil {
		panic("sim: " + err.Error())
	}
	w.nemesis.took = w.eng.Recover(w.now)
}

// host returns the machine with an address.
func (w *World) host(a packet.Addr, d Direction) *tcp.Host {
	h := w.hosts[a]
	if h == nil {
		h = tcp.NewHost(&tcp.Env{
			Now:  func() int64 { return w.now },
			Emit: func(b []byte, mss int) { w.fromEndpoint(d, b, mss) },
			Arm:  func(c *tcp.Conn, at int64) { w.q.push(happening{at: at, conn: c}) },
		})
		w.hosts[a] = h
	}
	return h
}

// fromEndpoint puts what an endpoint sends onto its wire.
func (w *World) fromEndpoint(d Direction, b []byte, mss int) {
	w.res.Packets++
	w.noteParcel(noteSent, d, &parcel{b: b, mss: mss})
	w.obs.sent(d, b)
	if w.Hooks.Sent != nil {
		w.Hooks.Sent(w, d, b)
	}
	w.wires[d].send(&parcel{b: b, mss: mss})
}

// Inject puts a packet onto a wire as if somebody had sent it again.
func (w *World) Inject(d Direction, b []byte, after int64) {
	w.after(after, func() { w.wires[d].schedule(&parcel{b: append([]byte(nil), b...)}) })
}

// Run lets everything happen. A panic is a violation too: of the engine's, or of
// the simulator's.
func (w *World) Run() (r *Result) {
	r = &w.res
	defer func() {
		if p := recover(); p != nil {
			w.viol = nil
			w.fail("panic", "%v\n%s", p, debug.Stack())
			w.finish()
		}
	}()
	w.run()
	return r
}

func (w *World) run() {
	limit := startTime + 3600*second
	for w.viol == nil && w.open > 0 {
		if !w.advance(limit) {
			c := w.waiting()
			w.failFlow(c.local, packet.Tuple{}, "liveness", "nothing happens any more, but %d clients are not through: %s", w.open, c)
		}
	}
	// Everything that is under way arrives, everything that waits times out.
	end := w.now + w.Scenario.Idle
	for w.viol == nil && w.advance(end) {
	}
	if w.viol == nil {
		w.now = max(w.now, end)
		w.baseline()
	}
	w.finish()
}

func (w *World) waiting() *client {
	for _, c := range w.clients {
		if !c.through {
			return c
		}
	}
	return nil
}

// advance lets the next thing happen; it returns false when that lies beyond
// the limit.
func (w *World) advance(limit int64) bool {
	at := int64(-1)
	if len(w.q.items) > 0 {
		at = w.q.items[0].at
	}
	if due := w.eng.NextDue(); due != 0 && (at < 0 || due <= at) && !w.stall.on {
		if due > limit {
			return false
		}
		if due <= w.now {
			if w.ticks++; w.ticks > 1000 {
				w.fail("INV-9", "the engine wants to be ticked at one time again and again")
				return false
			}
		} else {
			w.ticks = 0
			w.now = due
		}
		w.step(&engine.Event{Kind: engine.Tick}, FromClient, nil)
		return true
	}
	if at < 0 || at > limit {
		return false
	}
	h := w.q.pop()
	if h.at > w.now {
		w.now, w.ticks = h.at, 0
	}
	switch {
	case h.conn != nil:
		h.conn.Timer()
	case h.p != nil:
		w.arrive(h.wire.dir, h.p)
	default:
		h.do()
	}
	return true
}

// arrive hands a packet to the engine or to an endpoint.
func (w *World) arrive(d Direction, p *parcel) {
	switch d {
	case FromClient, FromServer:
		w.toEngine(d, p)
	case ToClient, ToServer:
		t, problem := packet.ParseTCP(p.b)
		if problem != packet.OK && !p.spoilt {
			w.fail("INV-3", "a packet for an endpoint is %v", problem)
			return
		}
		w.noteParcel(noteArrived, d, p)
		if p.partial {
			// What a virtual link delivers: the checksum was never there.
			t.FillChecksum()
		}
		var dst packet.Addr
		if problem == packet.OK {
			dst = t.Dst().Addr
		}
		if h := w.hosts[dst]; h != nil {
			h.Packet(p.b)
		}
	}
}

// toEngine lets the engine handle a packet.
func (w *World) toEngine(d Direction, p *parcel) {
	if w.Hooks.Arriving != nil {
		p.b = w.Hooks.Arriving(w, d, p.b)
	}
	if !w.stall.takes(w, d, p) {
		w.handle(d, p)
	}
}

// handle lets the engine handle what it has taken from a queue.
func (w *World) handle(d Direction, p *parcel) {
	if w.Scenario.mortal() && w.nemesis.lost() {
		return // it waited for the engine that died
	}
	w.noteParcel(noteArrived, d, p)
	st := packet.ChecksumUnknown
	if p.partial {
		st = packet.ChecksumPartial
	}
	t, problem := packet.ParseTCP(p.b)
	good := problem == packet.OK && (p.partial || t.IPHeaderOK() && t.VerifyChecksum())
	if good {
		if p.spoilt && !p.partial {
			w.fail("simulator", "a corrupted packet has a right checksum")
			return
		}
		w.obs.seen(d, &t)
		if d == FromClient && t.Flags()&(packet.SYN|packet.ACK) == packet.SYN {
			w.out.Reset()
			w.hs.SYN(w.now, p.b, st, &w.out)
			w.emitAll(nil, 0)
			return
		}
	}
	w.buf = append(w.buf[:0], p.b...)
	ev := engine.Event{Kind: engine.Packet, Data: w.buf, Checksum: st, GSO: p.mss > 0}
	w.step(&ev, d, p)
}

// step is one step of the engine and what follows from it.
func (w *World) step(ev *engine.Event, d Direction, p *parcel) {
	w.res.Steps++
	if w.Hooks.Renew != nil && w.Hooks.Renew(w) {
		w.renew()
	}
	w.out.Reset()
	if w.Scenario.mortal() && w.nemesis.strikes() {
		w.nemesis.kill(ev)
		return
	}
	w.eng.Step(w.now, ev, &w.out)
	mss := 0
	if p != nil {
		mss = p.mss
	}
	w.emitAll(ev, mss)
	if w.res.Steps&63 == 0 {
		w.obs.limits()
	}
}

// emitAll takes what a step let out: crafted packets first, then the one under
// verdict.
func (w *World) emitAll(ev *engine.Event, mss int) {
	w.collect(ev, mss)
	if len(w.let) == 0 {
		return
	}
	if w.Hooks.Emitted != nil {
		w.tamper()
	}
	w.observe()
	for i := range w.let {
		w.emit(&w.let[i])
	}
}

// collect takes what a step let out.
func (w *World) collect(ev *engine.Event, mss int) {
	w.let = w.let[:0]
	for i := range w.out.Len() {
		if b := w.out.Packet(i); isICMP(b) {
			w.icmpOut(b)
		} else {
			w.let = append(w.let, parcel{b: append([]byte(nil), b...)})
		}
	}
	if ev != nil && ev.Kind == engine.Packet {
		switch ev.Verdict {
		case engine.Rewrite:
			w.let = append(w.let, parcel{b: append([]byte(nil), ev.Data...), mss: mss, partial: ev.GSO && ev.Checksum == packet.ChecksumPartial})
		case engine.Accept:
			w.fail("INV-3", "the engine lets a packet of a diverted flow go on unchanged")
		}
	}
}

// tamper lets a negative control change what the engine let out.
func (w *World) tamper() {
	kept := w.let[:0]
	for _, p := range w.let {
		d := ToClient
		if t, problem := packet.ParseTCP(p.b); problem == packet.OK && t.Src().Addr == w.snip {
			d = ToServer
		}
		if p.b = w.Hooks.Emitted(w, d, p.b); p.b != nil {
			kept = append(kept, p)
		}
	}
	w.let = kept
}

// observe shows the packets of one step to the observer: those of one
// connection in the order of their numbers, because what the engine kept leaves
// before the packet that filled the gap. Bare acknowledgments come last: a
// window that belongs to the request that begins in the step may be in them.
func (w *World) observe() {
	w.order = w.order[:0]
	for i := range w.let {
		w.order = append(w.order, i)
	}
	if len(w.let) > 1 {
		w.sortStep()
	}
	for _, i := range w.order {
		p := &w.let[i]
		var ok bool
		if p.dir, ok = w.obs.emitted(p.b, p.partial); !ok {
			return
		}
	}
}

// sortStep puts the packets of one connection together and in order.
func (w *World) sortStep() {
	type place struct {
		group int
		bare  int // 1: nothing but an acknowledgment
		seq   packet.Seq
	}
	places := make([]place, len(w.let))
	first := map[packet.Tuple]int{}
	for i := range w.let {
		t, problem := packet.ParseTCP(w.let[i].b)
		if problem != packet.OK {
			places[i] = place{group: -1}
			continue
		}
		g, ok := first[t.Tuple()]
		if !ok {
			g = i
			first[t.Tuple()] = i
		}
		places[i] = place{group: g, seq: t.Seq()}
		if t.PayloadLen() == 0 && t.Flags() == packet.ACK {
			places[i].bare = 1
		}
	}
	slices.SortStableFunc(w.order, func(a, b int) int {
		x, y := places[a], places[b]
		if x.group != y.group {
			return x.group - y.group
		}
		if x.bare != y.bare {
			return x.bare - y.bare
		}
		return int(int32(x.seq - y.seq))
	})
}

// emit puts one packet of the engine's onto its wire.
func (w *World) emit(p *parcel) {
	w.res.Packets++
	w.res.Hash = w.res.Hash*0x100000001b3 ^ uint64(crc32.ChecksumIEEE(p.b)) ^ uint64(w.now)
	if t, problem := packet.ParseTCP(p.b); problem == packet.OK && t.Src().Addr == w.snip {
		p.dir = ToServer
	}
	w.noteParcel(noteSent, p.dir, p)
	w.wires[p.dir].send(&parcel{b: p.b, mss: p.mss, partial: p.partial})
}

// baseline checks INV-9: nothing is left.
func (w *World) baseline() {
	if u := w.eng.Usage(); u != (engine.Usage{}) {
		w.fail("INV-9", "after %d s of silence the engine still holds %+v", w.Scenario.Idle/second, u)
		return
	}
	if n := w.ports.Free(); n != w.Scenario.Ports {
		w.fail("INV-9", "%d of %d SNIP ports are free", n, w.Scenario.Ports)
		return
	}
	for _, f := range w.db.Farms {
		if n := f.Stats.Waiting.Load(); n != 0 {
			w.fail("INV-9", "%d requests stand in the line of farm %s", n, f.Name)
		}
		for _, s := range f.Servers {
			a, i, q, o := s.Live.Active.Load(), s.Live.Idle.Load(), s.Live.Waiting.Load(), s.Stats.Open.Load()
			if a != 0 || i != 0 || q != 0 || o != 0 {
				w.fail("INV-9", "server %s: %d active, %d idle, %d waiting, %d open", s.Name, a, i, q, o)
				return
			}
		}
	}
	w.obs.final()
	if w.atEnd != nil {
		w.atEnd()
	}
}

// finish adds up.
func (w *World) finish() {
	r := &w.res
	r.Violation = w.viol
	r.Time = w.now - startTime
	for _, c := range w.clients {
		for _, x := range c.exchanges {
			r.Requests++
			switch {
			case x.own != 0:
				r.Owned++
			case x.answered:
				r.Exchanges++
			default:
				r.Excused++
			}
		}
	}
	if w.mem != nil {
		w.mem.Free()
	}
	w.syns.Free()
	for i := range r.Counters {
		r.Counters[i] = w.eng.Count.Get(engine.Reason(i))
	}
	r.Overflow, r.Peak = w.stall.overflow, w.stall.peak
	r.Kills, r.Inside, r.Undone, r.Lost = w.nemesis.kills, w.nemesis.inside, w.nemesis.undone, w.nemesis.lostBy
	f := w.db.Farms[0]
	r.Opened, r.Reused = f.Stats.Opened.Load(), f.Stats.Reused.Load()
}

// Run runs a scenario.
func Run(s *Scenario, h Hooks) *Result { return NewWorld(s, h).Run() }
