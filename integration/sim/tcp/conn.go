// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"errors"

	"github.com/weirgate/weir/module/packet"
)

// State is that of RFC 9293 section 3.3.2. LISTEN belongs to the Host.
type State uint8

// The states.
const (
	Closed State = iota
	SynSent
	SynRcvd
	Established
	FinWait1
	FinWait2
	CloseWait
	Closing
	LastAck
	TimeWait
)

func (s State) String() string {
	return [...]string{
		"closed", "syn-sent", "syn-received", "established", "fin-wait-1", "fin-wait-2", "close-wait", "closing", "last-ack", "time-wait",
	}[s]
}

// Why a connection ended in disorder.
var (
	ErrReset   = errors.New("tcp: reset by the peer")
	ErrTimeout = errors.New("tcp: the peer does not answer")
	ErrAborted = errors.New("tcp: aborted by this end")
)

// Options are an endpoint's habits.
type Options struct {
	ISS    uint32
	MSS    uint16 // announced; 0: no option, and the peer takes 536
	Scale  int8   // window shift; -1: no option
	SACK   bool
	Buffer int // receive buffer, bytes

	PathMSS    int   // most payload bytes of a segment that is sent; 0: no bound but the peer's
	GSO        int   // most payload bytes of a super-segment; 0: none are sent
	Cwnd       int   // initial congestion window in segments; 0: 10 (RFC 6928)
	Nagle      bool  // RFC 9293 section 3.7.4
	DelayedACK int64 // ns, RFC 9293 section 3.8.6.3; 0: every segment is acknowledged at once
	DSACK      bool  // RFC 2883
	ProbeByte  bool  // a window probe carries a byte; else it is an old number without data, as Linux does
	NoTrim     bool  // what was sent once is sent again as it was, though the window shrank since; else it is trimmed, as Linux does
	WL1        bool  // windows are taken by the rule of RFC 9293, else by Linux's
	FirstRTO   int64 // ns; 0: 1 s
	MinRTO     int64 // ns; 0: 200 ms
	TimeWait   int64 // ns; 0: 1 s
	KeepAlive  int64 // ns of silence until a probe; 0: none
	MaxRetries int   // 0: 12
}

const (
	millisecond = int64(1e6)
	second      = int64(1e9)
	maxRTO      = 60 * second
	// oowEvery limits answers to segments without data that do not fit
	// (RFC 5961 section 7, Linux's tcp_invalid_ratelimit).
	oowEvery = 500 * millisecond
	// finTimeout ends a connection of which nobody reads any more.
	finTimeout = 60 * second
)

// App is what uses a connection. The calls come from inside Conn's methods; an
// App may write, read, close and abort in them.
type App interface {
	Connected(c *Conn)
	Readable(c *Conn)   // new bytes are in order
	PeerClosed(c *Conn) // the peer's FIN is in order
	// Closed is the last call: nil after an orderly end.
	Closed(c *Conn, why error)
}

// Env is the world around connections.
type Env struct {
	Now func() int64
	// Emit takes a complete IP packet over. mss is the size in which a
	// super-segment is to be cut, 0 for an ordinary one.
	Emit func(b []byte, mss int)
	// Arm asks for a call of Timer at the given time.
	Arm func(c *Conn, at int64)
	// Buf returns an empty buffer for n bytes; nil allocates.
	Buf func(n int) []byte
}

// Conn is one connection. Positions count the places of a stream from the SYN,
// which is at 0: data begins at 1 and the FIN stands behind it.
type Conn struct {
	Local, Remote packet.Endpoint

	opt  Options
	app  App
	env  *Env
	host *Host
	st   State

	iss, irs uint32
	mss      int   // payload bytes per segment sent
	narrow   bool  // the path has less room than the handshake said
	snd, rcv uint8 // window shifts: the peer's and ours
	scaleOK  bool
	synced   bool
	sackOK   bool

	// sending
	una, nxt, top uint64 // acknowledged, next to send, highest sent
	end           uint64 // of the data written
	fin           bool   // a FIN follows the data
	buf           stream
	wnd           uint64 // the peer's, bytes
	wl1, wl2      uint64
	maxWnd        uint64
	cwnd, thresh  uint64
	dups          int
	recovery      bool
	recover       uint64 // recovery ends when this is acknowledged
	again         uint64 // holes before this were sent again
	sacked        Ranges
	rto           int64
	srtt, rttvar  int64
	timed         uint64 // position whose acknowledgment is being timed; 0: none
	timedAt       int64
	retries       int
	probes        int

	// receiving
	next    uint64 // position expected
	edge    uint64 // right edge advertised
	told    uint64 // position expected as the last segment sent told it
	unread  []byte
	ooo     []held
	oooSet  Ranges
	lastOOO uint64
	dsack   Range
	finAt   uint64 // position of the peer's FIN; 0: not seen
	noRead  bool   // closed for reading
	ackNow  bool
	ackDue  int // bytes received and not acknowledged
	lastOOW int64
	busy    bool // inside an event: output waits

	rtxAt, persistAt, ackAt, endAt, keepAt int64
	armed                                  int64
	heard                                  int64
}

type held struct {
	pos  uint64
	data []byte
}

func (o *Options) fill() {
	if o.FirstRTO == 0 {
		o.FirstRTO = second
	}
	if o.MinRTO == 0 {
		o.MinRTO = 200 * millisecond
	}
	if o.TimeWait == 0 {
		o.TimeWait = second
	}
	if o.Cwnd == 0 {
		o.Cwnd = 10
	}
	if o.MaxRetries == 0 {
		o.MaxRetries = 12
	}
	if o.Buffer == 0 {
		o.Buffer = 64 << 10
	}
}

func newConn(h *Host, local, remote packet.Endpoint, opt Options, app App) *Conn {
	opt.fill()
	c := &Conn{
		Local: local, Remote: remote, opt: opt, app: app, env: h.env, host: h,
		iss: opt.ISS, mss: 536, rto: opt.FirstRTO, end: 1, thresh: 1 << 40, heard: h.env.Now(),
	}
	return c
}

// State returns the connection's state.
func (c *Conn) State() State { return c.st }

// App returns what uses the connection.
func (c *Conn) App() App { return c.app }

// ISS and IRS are the two initial sequence numbers; the peer's is known from
// SYN-RECEIVED or ESTABLISHED on.
func (c *Conn) ISS() uint32 { return c.iss }

// IRS is the peer's initial sequence number.
func (c *Conn) IRS() uint32 { return c.irs }

// Written is the number of bytes that were written.
func (c *Conn) Written() uint64 { return c.end - 1 }

// Acked is the number of written bytes that the peer has acknowledged.
func (c *Conn) Acked() uint64 {
	if c.una == 0 {
		return 0
	}
	return min(c.una, c.end) - 1
}

// Received is the number of bytes that came in order.
func (c *Conn) Received() uint64 {
	n := c.next
	if c.finAt != 0 && n > c.finAt {
		n = c.finAt
	}
	if n == 0 {
		return 0
	}
	return n - 1
}

// PeerFIN reports whether the peer's FIN came in order.
func (c *Conn) PeerFIN() bool { return c.finAt != 0 && c.next > c.finAt }

// Synchronised reports whether the peer's SYN came, so that IRS is known.
func (c *Conn) Synchronised() bool { return c.synced }

// Scale is the shift that the peer applies to our windows and we announce, 0
// where it was not agreed on.
func (c *Conn) Scale() uint8 { return c.rcv }

// Write appends to the stream. The memory of b is kept.
func (c *Conn) Write(b []byte) { c.WriteSource(Bytes(b), 0, uint64(len(b))) }

// WriteSource appends n bytes of a source, from off on, to the stream.
func (c *Conn) WriteSource(src Source, off, n uint64) {
	if c.fin || c.st == Closed {
		return
	}
	c.buf.write(c.end, src, off, n)
	c.end += n
	c.flush()
}

// Unread is the number of bytes that wait to be read.
func (c *Conn) Unread() int { return len(c.unread) }

// Read takes up to n bytes. They are valid until the next packet arrives.
func (c *Conn) Read(n int) []byte {
	n = min(n, len(c.unread))
	b := c.unread[:n:n]
	c.unread = c.unread[n:]
	if !c.busy && c.st != Closed && c.windowGrew() {
		c.ackNow = true
		c.flush()
	}
	return b
}

// CloseWrite ends our stream with a FIN; reading goes on.
func (c *Conn) CloseWrite() {
	if c.fin || c.st == Closed || c.st == SynSent {
		return
	}
	c.fin = true
	switch c.st {
	case SynRcvd, Established:
		c.st = FinWait1
	case CloseWait:
		c.st = LastAck
	}
	c.flush()
}

// Close ends both directions: a FIN for ours, and a reset for whatever still
// comes (RFC 9293 section 3.6.1, as Linux does). Unread data means a reset at
// once.
func (c *Conn) Close() {
	switch c.st {
	case Closed:
		return
	case SynSent:
		c.remove(ErrAborted)
		return
	}
	if len(c.unread) > 0 {
		c.Abort()
		return
	}
	c.noRead = true
	if c.endAt == 0 {
		c.endAt = c.env.Now() + finTimeout
	}
	c.CloseWrite()
	c.rearm()
}

// Abort resets the connection.
func (c *Conn) Abort() {
	if c.st == Closed {
		return
	}
	if c.st != SynSent {
		c.emit(packet.RST|packet.ACK, c.nxt, 0)
	}
	c.remove(ErrAborted)
}

// Vanish forgets the connection without a word, as a host that loses power.
func (c *Conn) Vanish() {
	if c.st != Closed {
		c.remove(ErrAborted)
	}
}

func (c *Conn) remove(why error) {
	c.st = Closed
	c.rtxAt, c.persistAt, c.ackAt, c.endAt, c.keepAt = 0, 0, 0, 0, 0
	c.host.forget(c)
	c.app.Closed(c, why)
}

// deadline is the earliest time at which something is due, 0 = never.
func (c *Conn) deadline() int64 {
	var d int64
	for _, t := range [...]int64{c.rtxAt, c.persistAt, c.ackAt, c.endAt, c.keepAt} {
		if t != 0 && (d == 0 || t < d) {
			d = t
		}
	}
	return d
}

func (c *Conn) rearm() {
	if d := c.deadline(); d != 0 && (c.armed == 0 || d < c.armed) {
		c.armed = d
		c.env.Arm(c, d)
	}
}

// Timer is called at a time that was asked for.
func (c *Conn) Timer() {
	now := c.env.Now()
	if c.armed == 0 || now < c.armed {
		return
	}
	c.armed = 0
	if c.st == Closed {
		return
	}
	due := func(t *int64) bool {
		if *t == 0 || now < *t {
			return false
		}
		*t = 0
		return true
	}
	if due(&c.endAt) {
		c.remove(nil)
		return
	}
	if due(&c.ackAt) {
		c.ackNow = true
	}
	if due(&c.rtxAt) {
		c.timeout()
		if c.st == Closed {
			return
		}
	}
	if due(&c.persistAt) {
		c.probe()
		if c.st == Closed {
			return
		}
	}
	if due(&c.keepAt) {
		c.keepalive(now)
		if c.st == Closed {
			return
		}
	}
	c.flush()
}

// Options returns the connection's habits.
func (c *Conn) Options() *Options { return &c.opt }

// PeerScaled reports whether window scales were agreed on, so that windows in
// both directions are shifted.
func (c *Conn) PeerScaled() bool { return c.scaleOK }

// FINSent reports whether this end has ended its stream.
func (c *Conn) FINSent() bool { return c.fin }
