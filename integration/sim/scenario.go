// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"math/rand/v2"

	"github.com/weirgate/weir/integration/sim/tcp"
	"github.com/weirgate/weir/module/farm"
)

const (
	microsecond = int64(1e3)
	millisecond = int64(1e6)
	second      = int64(1e9)
)

// Kind is how the end of a response is found.
type Kind uint8

// The kinds.
const (
	KindLength Kind = iota
	KindChunked
	KindUntilClose
)

// Fault is what a server does instead of answering well.
type Fault uint8

// The faults.
const (
	FaultNone  Fault = iota
	FaultReset       // resets in the middle of the response
	FaultTrunc       // closes in the middle of the response
	FaultMute        // never answers
	FaultExtra       // sends more than its response
)

// ReplyPlan is what a server answers to a request.
type ReplyPlan struct {
	Status  int
	Minor   int // HTTP/1.x
	Kind    Kind
	Body    uint64
	Interim int  // 103 responses before
	Close   bool // Connection: close, and the server closes
	Early   bool // answers before it has read the body
	Think   int64
	Pieces  int // written in so many pieces
	Gap     int64
	Fault   Fault
	At      float64 // where the fault strikes, share of the response
	Lag     int64   // of FaultExtra: so long after the response, and the server goes on
}

// ReqPlan is one request.
type ReqPlan struct {
	Method  string
	Minor   int
	Keep    bool // Connection: keep-alive
	Close   bool // Connection: close
	Spoof   bool // sends an X-Forwarded-For of its own
	Expect  bool
	Chunked bool
	Body    uint64
	Pad     int // bytes of filler in the head
	Pause   int64
	Reply   ReplyPlan
}

// Ending is how a client leaves.
type Ending uint8

// The endings.
const (
	EndClose  Ending = iota // closes when it has everything
	EndHalf                 // closes its half with the last request, reads the rest
	EndStay                 // stays until the other side closes
	EndReset                // resets when it has everything
	EndVanish               // is gone without a word when it has everything
)

// Abort is how a client breaks off.
type Abort uint8

// The aborts.
const (
	AbortNone Abort = iota
	AbortReset
	AbortClose
	AbortVanish
	AbortHalf // FIN inside a request
)

// ConnPlan is one client connection.
type ConnPlan struct {
	Host      int // which client
	Port      uint16
	Start     int64
	Opt       tcp.Options
	Wait      int64 // between the handshake and the first request
	Requests  []ReqPlan
	Pipeline  int // requests that may be under way at a time
	Lines     bool
	Pieces    int // a request is written in so many pieces, by random cuts
	Gap       int64
	ReadPause int64 // stops reading for so long, now and then
	End       Ending
	Abort     Abort
	AbortSent uint64 // breaks off after so many bytes were written,
	AbortRead uint64 // or read, whichever comes first and is not 0
	After     int    // index + 1 of a connection that must be over before: reuses its port
}

// ServerPlan is one server.
type ServerPlan struct {
	Opt        tcp.Options
	IdleClose  int64   // closes an idle connection after a random time up to this, 0 = never
	CloseReset bool    // by a reset
	MaxReq     int     // closes after so many requests, without saying so; 0 = never
	Refuse     float64 // refuses connections
	Lazy       int64   // stops reading for so long, now and then
}

// Kill is one death of the engine.
type Kill struct {
	Step  int // in which step, from 1; 0 = none
	Point int // 0: before it; n: before its n-th change of another record; more than there are: after it
	Lose  int // packets that are lost afterwards
}

// Scenario is a whole run. It is plain data: what is not in it follows from
// Seed.
type Scenario struct {
	Seed    uint64
	V6      bool
	MSS6    uint16 // announced to clients of IPv6; 0: olderMSS6
	Wires   [directions]Wire
	Conns   []ConnPlan
	Servers []ServerPlan
	Pool    farm.PoolLimits
	Forward bool // the farm tells the clients' addresses
	Ports   int  // SNIP ports
	Quiet   int64
	Clients int // size of the engine's tables
	Tables  int
	// ServerISS and ClientISS fix the numbers that the engine chooses, when set.
	EngineToServer []uint32
	EngineToClient []uint32

	Bound int64 // virtual time within which an exchange must be over
	Idle  int64 // virtual time after which the engine must be at its baseline
	// Kills is how often the engine dies, per step; a successor goes on with
	// what the memory holds at that instant.
	Kills float64
	// Kill is one death at a certain instant, beside those.
	Kill  Kill
	Stall Stall
	// Strict forbids every reset that no plan accounts for.
	Strict bool
}

// What the engine announces to clients. The program announces engineMSS to all;
// with a little less a client is served over connections of the small class,
// which is what all of IPv6 was until the seed newMSS6.
const (
	engineMSS = 1400
	olderMSS6 = 1380
	newMSS6   = 1795437000000000000
)

// defaultPool is what the scenarios start from.
func defaultPool() farm.PoolLimits {
	return farm.PoolLimits{
		MaxIdle: 64, MaxConnections: 512, IdleTimeout: 30 * second, MaxWaiting: 1024, WaitTimeout: 5 * second,
		DrainLimit: 1 << 20, DrainTimeout: 10 * second,
	}
}

// Base is a scenario without clients and without trouble.
func Base(seed uint64) *Scenario {
	s := &Scenario{
		Seed: seed, Pool: defaultPool(), Ports: 200, Quiet: second, Clients: 128, Tables: 128, Bound: 30 * second, Idle: 400 * second,
	}
	for d := range s.Wires {
		s.Wires[d].Delay = 200 * microsecond
	}
	s.Servers = []ServerPlan{{Opt: plainOptions()}, {Opt: plainOptions()}}
	return s
}

func plainOptions() tcp.Options {
	return tcp.Options{MSS: 1460, Scale: 7, SACK: true, Buffer: 256 << 10, PathMSS: 1400, DelayedACK: 40 * millisecond, DSACK: true}
}

// streams of random numbers, so that leaving out one part of a scenario does
// not change the others.
func stream(seed, part, index uint64) *rand.Rand {
	return rand.New(rand.NewPCG(seed^part*0x9e3779b97f4a7c15, index*0xd1342543de82ef95+part))
}

const (
	partShape = iota + 1
	partConn
	partServer
	partWire
	partBytes
	partWorld
	partNemesis
	partMTU
)

// Random draws a scenario.
func Random(seed uint64) *Scenario {
	r := stream(seed, partShape, 0)
	s := Base(seed)
	s.V6 = r.IntN(5) == 0
	if seed >= newMSS6 && seed%4 != 0 {
		s.MSS6 = engineMSS // no draw: older seeds keep their meaning
	}
	trouble := r.IntN(4) // 0: none
	for d := range s.Wires {
		s.Wires[d] = randomWire(r, trouble)
	}
	s.Forward = r.IntN(6) == 0
	if r.IntN(4) == 0 {
		s.Pool.MaxIdle = int32(1 + r.IntN(3))
	}
	if r.IntN(6) == 0 {
		s.Pool.MaxRequests = uint32(1 + r.IntN(4))
	}
	if r.IntN(6) == 0 {
		s.Pool.MaxAge = int64(1+r.IntN(20)) * 100 * millisecond
	}
	if r.IntN(8) == 0 {
		s.Pool.DrainLimit = int64(1 + r.IntN(8000))
	}
	n := 1 + r.IntN(12)
	spread := int64(1+r.IntN(3000)) * millisecond
	clean := trouble == 0
	for i := range n {
		s.Conns = append(s.Conns, randomConn(stream(seed, partConn, uint64(i)), spread, clean))
	}
	for i := range n {
		// Some take the port of an earlier one when that is over.
		if c := &s.Conns[i]; i > 0 && r.IntN(5) == 0 {
			c.After = 1 + r.IntN(i)
			if s.Conns[c.After-1].After != 0 || taken(s.Conns[:i], c.After) {
				c.After = 0
				continue
			}
			c.Host = s.Conns[c.After-1].Host
		}
	}
	s.Servers = s.Servers[:0]
	for i := range 1 + r.IntN(4) {
		s.Servers = append(s.Servers, randomServer(stream(seed, partServer, uint64(i))))
	}
	s.Bound = 60 * second
	if trouble > 0 {
		s.Bound = 240 * second
	}
	if seed%11 == 4 {
		randomMTU(s, stream(seed, partMTU, 0))
	}
	return s
}

// randomMTU makes some wires narrow, at once or in the middle of it all. Which
// seeds have that is no draw, so that the others keep their meaning.
func randomMTU(s *Scenario, r *rand.Rand) {
	least := 576
	if s.V6 {
		least = 1280
	}
	for d := range s.Wires {
		if r.IntN(2) == 0 {
			s.Wires[d].MTU = least + r.IntN(1440-least)
			s.Wires[d].Narrows = r.Int64N(3 * second)
		}
	}
}

func taken(conns []ConnPlan, after int) bool {
	for i := range conns {
		if conns[i].After == after {
			return true
		}
	}
	return false
}

func randomWire(r *rand.Rand, trouble int) Wire {
	w := Wire{Delay: int64(1+r.IntN(100)) * 100 * microsecond}
	if r.IntN(4) == 0 {
		w.Delay = int64(1+r.IntN(50)) * millisecond
	}
	w.Jitter = w.Delay / int64(1+r.IntN(8))
	if r.IntN(4) == 0 {
		w.Join, w.JoinWait = 0.5, 20*microsecond
	}
	if r.IntN(4) == 0 {
		w.Partial = 0.5
	}
	if trouble == 0 {
		return w
	}
	p := []float64{0.002, 0.01, 0.03}[trouble-1]
	w.Loss = p * r.Float64() * 2
	if r.IntN(2) == 0 {
		w.Duplicate = p * r.Float64() * 2
	}
	if r.IntN(2) == 0 {
		w.Reorder = p * r.Float64() * 4
	}
	w.Late = int64(1+r.IntN(30)) * millisecond
	if r.IntN(3) == 0 {
		w.Corrupt = p * r.Float64()
	}
	if r.IntN(3) == 0 {
		w.Cut = 0.2 * r.Float64()
	}
	return w
}

// RandomOptions draws the habits of an endpoint.
func randomOptions(r *rand.Rand) tcp.Options {
	o := tcp.Options{
		ISS: r.Uint32(), MSS: 1460, Scale: 7, SACK: r.IntN(6) != 0, Buffer: 64 << 10 << r.IntN(4), PathMSS: 1400,
		Nagle: r.IntN(2) == 0, DSACK: r.IntN(2) == 0, ProbeByte: r.IntN(4) == 0, WL1: r.IntN(4) == 0,
	}
	o.NoTrim = o.ISS%16 == 5 // no draw of its own: seeds keep their meaning
	switch r.IntN(6) {
	case 0:
		o.MSS = []uint16{536, 200, 1200, 8960, 0, 1380}[r.IntN(6)]
	case 1:
		o.ISS = -uint32(r.IntN(5000))
	}
	switch r.IntN(4) {
	case 0:
		o.Scale = int8(r.IntN(16) - 1)
	case 1:
		o.Buffer = 2<<10 + r.IntN(30<<10)
	}
	if o.Scale >= 0 {
		o.Buffer = max(o.Buffer, 4<<uint(o.Scale))
	}
	if r.IntN(2) == 0 {
		o.DelayedACK = 40 * millisecond
	}
	if r.IntN(6) == 0 {
		o.PathMSS = 300 + r.IntN(1000)
	}
	if r.IntN(4) == 0 {
		o.GSO = 60000
	}
	if r.IntN(8) == 0 {
		o.KeepAlive = int64(1+r.IntN(20)) * second
	}
	return o
}

func randomServer(r *rand.Rand) ServerPlan {
	p := ServerPlan{Opt: randomOptions(r)}
	if r.IntN(4) == 0 {
		p.IdleClose = int64(1+r.IntN(200)) * 10 * millisecond
		p.CloseReset = r.IntN(4) == 0
	}
	if r.IntN(6) == 0 {
		p.MaxReq = 1 + r.IntN(5)
	}
	if r.IntN(8) == 0 {
		p.Lazy = int64(1+r.IntN(300)) * millisecond
	}
	return p
}

func randomConn(r *rand.Rand, spread int64, clean bool) ConnPlan {
	p := ConnPlan{
		Host: r.IntN(4), Start: r.Int64N(spread), Opt: randomOptions(r), Pipeline: 1, Pieces: 1,
	}
	if r.IntN(8) == 0 {
		// A cookie lives for 24 to 32 s: who loses the acknowledgment of the
		// handshake and asks later than that is refused.
		p.Wait = r.Int64N(15 * second)
		if clean {
			p.Wait = r.Int64N(40 * second)
		} else if p.Opt.KeepAlive > 0 {
			// Nor are its probes answered, and it gives up after ten of them.
			p.Wait = min(p.Wait, 5*second)
		}
	}
	if r.IntN(4) == 0 {
		p.Pipeline = 1 + r.IntN(4)
	}
	switch r.IntN(6) {
	case 0:
		p.Lines = true
		p.Gap = r.Int64N(20 * millisecond)
	case 1:
		p.Pieces = 2 + r.IntN(6)
		p.Gap = r.Int64N(60 * millisecond)
	}
	if r.IntN(10) == 0 {
		p.ReadPause = r.Int64N(400 * millisecond)
	}
	for n := 1 + r.IntN(8); len(p.Requests) < n; {
		q := randomRequest(r)
		p.Requests = append(p.Requests, q)
		x := Exchange{ReqPlan: q}
		if x.closing() || q.Reply.Early || q.Reply.Fault != FaultNone {
			break
		}
	}
	p.End = []Ending{EndClose, EndClose, EndClose, EndHalf, EndStay, EndReset, EndVanish}[r.IntN(7)]
	if r.IntN(8) == 0 {
		p.Abort = Abort(1 + r.IntN(4))
		if r.IntN(2) == 0 {
			p.AbortSent = uint64(1 + r.IntN(1000))
		} else {
			p.AbortRead = uint64(1 + r.IntN(20000))
		}
	}
	return p
}

func randomSize(r *rand.Rand) uint64 {
	switch r.IntN(10) {
	case 0:
		return 0
	case 1, 2, 3:
		return uint64(r.IntN(300))
	case 4, 5, 6, 7:
		return uint64(r.IntN(6000))
	case 8:
		return uint64(r.IntN(60000))
	}
	return uint64(r.IntN(20000))
}

func randomRequest(r *rand.Rand) ReqPlan {
	q := ReqPlan{Method: "GET", Minor: 1}
	switch r.IntN(10) {
	case 0:
		q.Method = "HEAD"
	case 1, 2, 3:
		q.Method = "POST"
		q.Body = randomSize(r)
		q.Chunked = r.IntN(3) == 0
		q.Expect = r.IntN(5) == 0 && (q.Body > 0 || q.Chunked)
	}
	switch r.IntN(12) {
	case 0:
		q.Minor, q.Chunked, q.Expect = 0, false, false
		q.Keep = r.IntN(2) == 0
	case 1:
		q.Close = true
	case 2:
		q.Keep = true
	}
	if r.IntN(8) == 0 {
		q.Pad = r.IntN(4000)
	}
	if r.IntN(8) == 0 {
		q.Spoof = true
	}
	if r.IntN(4) == 0 {
		q.Pause = r.Int64N(300 * millisecond)
	}
	p := &q.Reply
	*p = ReplyPlan{Status: 200, Minor: 1, Kind: KindLength, Body: randomSize(r), Pieces: 1}
	switch r.IntN(16) {
	case 0:
		p.Status = 204
	case 1:
		p.Status = 304
	case 2:
		p.Kind = KindUntilClose
		p.Close = true
	case 3, 4, 5, 6:
		if q.Minor == 1 {
			p.Kind = KindChunked
		}
	}
	if q.Minor == 0 && r.IntN(2) == 0 && p.Kind == KindLength {
		p.Minor = 0
	}
	if r.IntN(12) == 0 && q.Minor == 1 {
		p.Interim = 1 + r.IntN(2)
	}
	if r.IntN(12) == 0 {
		p.Close = true
	}
	if r.IntN(4) == 0 {
		p.Think = r.Int64N(200 * millisecond)
	}
	if r.IntN(4) == 0 {
		p.Pieces = 2 + r.IntN(5)
		p.Gap = r.Int64N(50 * millisecond)
	}
	if q.Method == "POST" && r.IntN(12) == 0 && (q.Body > 0 || q.Chunked) {
		p.Early = true
	}
	if r.IntN(24) == 0 {
		p.Fault = Fault(1 + r.IntN(2))
		p.At = r.Float64()
		if p.Kind == KindUntilClose && !(&Exchange{ReqPlan: q}).bodyless() {
			p.Fault = FaultReset // nobody can see that such a response is truncated
		}
	}
	return q
}
