// SPDX-License-Identifier: Apache-2.0

package tcp

import "github.com/weirgate/weir/module/packet"

// flush sends what may be sent: data, and an acknowledgment if one is owed.
func (c *Conn) flush() {
	if c.busy || c.st == Closed {
		return
	}
	if c.st != SynSent && c.st != SynRcvd {
		c.output()
		if c.ackNow || c.ackDue > 0 && (c.opt.DelayedACK == 0 || c.ackDue >= 2*c.mss) {
			c.emit(packet.ACK, c.ackPlace(), 0)
		} else if c.ackDue > 0 && c.ackAt == 0 {
			c.ackAt = c.env.Now() + c.opt.DelayedACK
		}
	}
	c.rearm()
}

// ackPlace is the sequence position of a segment without data: snd.nxt, which
// after a timeout is what was sent at most.
func (c *Conn) ackPlace() uint64 { return max(c.nxt, c.top) }

// last is the position after everything that there is to send.
func (c *Conn) last() uint64 {
	if c.fin {
		return c.end + 1
	}
	return c.end
}

func (c *Conn) flight() uint64 { return c.nxt - c.una - c.sacked.Size(c.una, c.nxt) }

func (c *Conn) output() {
	for {
		pos := c.nxt
		if pos < c.top {
			if r, ok := c.sacked.At(pos); ok {
				c.nxt = r.To // received already
				continue
			}
		}
		if pos >= c.last() {
			break
		}
		again := pos < c.top
		limit := c.mss
		if c.opt.GSO > limit && !again {
			limit = c.opt.GSO / c.mss * c.mss
		}
		n := min(uint64(limit), c.end-pos)
		if again {
			n = min(n, c.sacked.Next(pos)-pos)
		}
		whole := n
		if edge := c.una + c.wnd; pos+n > edge && !(again && c.opt.NoTrim) {
			n = 0
			if pos < edge {
				n = edge - pos
			}
		}
		flight := c.flight()
		if flight > 0 && flight+min(n, uint64(c.mss)) > c.cwnd {
			break
		}
		if n > uint64(c.mss) && flight+n > c.cwnd {
			// A super-segment within the congestion window.
			n = max(uint64(c.mss), (c.cwnd-flight)/uint64(c.mss)*uint64(c.mss))
		}
		fin := c.fin && pos+n == c.end
		if n == 0 && !(fin && whole == 0) {
			break
		}
		if !again {
			// RFC 9293 section 3.8.6.2.1: no silly windows, and Nagle.
			if n < whole && n < uint64(c.mss) && n < c.maxWnd/2 {
				break
			}
			if c.opt.Nagle && n < uint64(c.mss) && !fin && c.nxt > c.una {
				break
			}
		}
		if n > uint64(c.mss) && n%uint64(c.mss) != 0 && pos+n < c.end {
			n -= n % uint64(c.mss)
			fin = false
		}
		fl := packet.ACK
		if pos+n == c.end {
			fl |= packet.PSH
		}
		size := n
		if fin {
			fl |= packet.FIN
			size++
		}
		if c.timed == 0 && !again {
			c.timed, c.timedAt = pos+size, c.env.Now()
		}
		c.emit(fl, pos, int(n))
		c.nxt = pos + size
		c.top = max(c.top, c.nxt)
	}
	switch {
	case c.nxt > c.una:
		c.persistAt = 0
		if c.rtxAt == 0 {
			c.rtxAt = c.env.Now() + c.rto
		}
	case c.una < c.last() && c.persistAt == 0:
		// Nothing is on its way and nothing may be sent: the window is closed.
		c.persistAt = c.env.Now() + c.rto<<min(c.probes, 6)
	}
}

// timeout is RFC 6298 section 5.4: the first segment again, twice the time,
// one segment of congestion window (RFC 5681 section 3.1).
func (c *Conn) timeout() {
	c.retries++
	if c.retries > c.opt.MaxRetries {
		c.remove(ErrTimeout)
		return
	}
	c.rto = min(c.rto*2, maxRTO)
	c.timed = 0
	c.rtxAt = c.env.Now() + c.rto
	switch c.st {
	case SynSent:
		c.sendSYN(packet.SYN)
		return
	case SynRcvd:
		c.sendSYN(packet.SYN | packet.ACK)
		return
	}
	c.thresh = max(c.flight()/2, uint64(2*c.mss))
	c.cwnd = uint64(c.mss)
	c.recovery, c.dups, c.again = false, 0, 0
	c.recover = c.top
	c.nxt = c.una
	if _, reneged := c.sacked.At(c.una); reneged {
		// What was reported as received is not acknowledged after all this
		// time: the reports are worth nothing (RFC 2018 section 8; Linux:
		// tcp_timeout_mark_lost).
		c.sacked = c.sacked[:0]
	}
	c.first(c.mss)
}

// first sends the first unacknowledged segment, of size bytes at most: what of
// it lies inside the window, all of it if nothing does (Linux:
// tcp_retransmit_skb).
func (c *Conn) first(size int) {
	pos := c.una
	if c.wnd > 0 && c.wnd < uint64(size) && !(c.opt.NoTrim && c.top > c.una) {
		size = int(c.wnd)
	}
	n := min(uint64(size), c.sacked.Next(pos)-pos)
	if pos < c.end {
		n = min(n, c.end-pos)
	} else {
		n = 0
	}
	fl := packet.ACK
	places := n
	if pos+n == c.end {
		fl |= packet.PSH
		if c.fin {
			fl |= packet.FIN
			places++
		}
	}
	c.emit(fl, pos, int(n))
	c.nxt = max(c.nxt, pos+places)
	c.top = max(c.top, c.nxt)
}

// hole sends the next segment again that the peer seems to lack; it reports
// whether there was one.
func (c *Conn) hole() bool {
	pos := max(c.una, c.again)
	for {
		r, ok := c.sacked.At(pos)
		if !ok {
			break
		}
		pos = r.To
	}
	if pos != c.una && pos >= c.sacked.End() || pos >= c.top {
		return false
	}
	n := min(uint64(c.mss), c.sacked.Next(pos)-pos, c.top-pos)
	fl := packet.ACK
	size := n
	if pos+n > c.end { // the FIN is in it
		n = c.end - pos
		fl |= packet.FIN
	} else if pos+n == c.end && c.fin && c.top > c.end && n < uint64(c.mss) {
		fl |= packet.FIN
		size++
	}
	c.emit(fl, pos, int(n))
	c.again = pos + size
	c.timed = 0
	return true
}

// probe asks for the window (RFC 9293 section 3.8.6.1).
func (c *Conn) probe() {
	c.probes++
	if c.probes > c.opt.MaxRetries*2 {
		c.remove(ErrTimeout)
		return
	}
	if c.wnd > 0 || c.opt.ProbeByte {
		size := c.mss
		if c.wnd < uint64(size) {
			size = int(max(c.wnd, 1))
		}
		c.first(size)
		if c.wnd == 0 {
			// The byte counts as sent only if it is acknowledged.
			c.rtxAt = 0
			c.nxt = c.una
			c.persistAt = c.env.Now() + c.rto<<min(c.probes, 6)
		}
		return
	}
	c.emit(packet.ACK, c.una-1, 0)
	c.persistAt = c.env.Now() + c.rto<<min(c.probes, 6)
}

// keepalive is RFC 9293 section 3.8.4.
func (c *Conn) keepalive(now int64) {
	if c.st != Established && c.st != CloseWait {
		return
	}
	if now-c.heard >= c.opt.KeepAlive {
		if now-c.heard > 10*c.opt.KeepAlive {
			c.remove(ErrTimeout)
			return
		}
		c.emit(packet.ACK, c.una-1, 0)
	}
	c.keepAt = now + c.opt.KeepAlive
}

// window is the field for the present state of the buffer. The right edge that
// was advertised never moves back (RFC 9293 section 3.8.6.2.2), so the window
// is rounded up where rounding down would do that (Linux does the same).
func (c *Conn) window() uint16 {
	free := max(c.opt.Buffer-len(c.unread), 0)
	if free < min(c.mss, c.opt.Buffer/2) {
		free = 0
	}
	w := uint64(free) >> c.rcv << c.rcv
	if c.next+w < c.edge {
		unit := uint64(1) << c.rcv
		w = (c.edge - c.next + unit - 1) / unit * unit
	}
	w = min(w, 0xffff<<c.rcv)
	c.edge = max(c.edge, c.next+w)
	return uint16(w >> c.rcv)
}

// windowGrew says whether reading opened the window so far that the peer
// should know.
func (c *Conn) windowGrew() bool {
	if c.st == SynSent || c.st == SynRcvd || c.finAt != 0 && c.next > c.finAt {
		return false
	}
	free := max(c.opt.Buffer-len(c.unread), 0)
	now := c.edge - c.next
	return uint64(free) >= now+min(uint64(2*c.mss), uint64(c.opt.Buffer/2)) && uint64(free)>>c.rcv > 0
}

func (c *Conn) sendSYN(fl packet.Flags) {
	o := packet.SYNOptions{MSS: c.opt.MSS, WindowScale: c.opt.Scale, SACKPermitted: c.opt.SACK}
	if fl.Has(packet.ACK) {
		// An answer holds only what was offered (RFC 7323, RFC 2018).
		if !c.sackOK {
			o.SACKPermitted = false
		}
		if !c.scaleOK {
			o.WindowScale = -1
		}
	}
	var ob [40]byte
	opts := packet.AppendSYNOptions(ob[:0], o)
	w := min(c.opt.Buffer, 0xffff)
	c.edge = max(c.edge, 1+uint64(w))
	s := packet.Segment{
		Src: c.Local, Dst: c.Remote, Seq: packet.Seq(c.iss), Flags: fl, Window: uint16(w), TTL: 64, Options: opts,
	}
	if fl.Has(packet.ACK) {
		s.Ack = packet.Seq(c.irs + 1)
	}
	c.env.Emit(packet.AppendSegment(c.alloc(60+len(opts)), &s, nil), 0)
	c.nxt, c.top = 1, 1
}

func (c *Conn) alloc(n int) []byte {
	if c.env.Buf != nil {
		return c.env.Buf(n)
	}
	return make([]byte, 0, n)
}

// emit sends n bytes from pos on.
func (c *Conn) emit(fl packet.Flags, pos uint64, n int) {
	var ob [40]byte
	opts := ob[:0]
	// On a narrow path data leave no room for the blocks (RFC 6691 section 2).
	if c.sackOK && fl&packet.RST == 0 && (c.dsack.To != 0 || len(c.oooSet) > 0) && !(c.narrow && n > 0) {
		opts = c.sackOption(opts)
	}
	s := packet.Segment{
		Src: c.Local, Dst: c.Remote, Seq: packet.Seq(c.iss + uint32(pos)), Ack: packet.Seq(c.irs + uint32(c.next)),
		Flags: fl, TTL: 64, Options: opts,
	}
	if fl&packet.RST == 0 {
		s.Window = c.window()
	}
	b := c.alloc(60 + len(opts) + n)
	if n == 0 {
		b = packet.AppendSegment(b, &s, nil)
	} else {
		data := c.host.scratch(n)
		c.buf.fill(pos, data)
		b = packet.AppendSegment(b, &s, data)
	}
	c.ackNow, c.ackDue, c.ackAt, c.dsack = false, 0, 0, Range{}
	c.told = c.next
	mss := 0
	if n > c.mss {
		mss = c.mss
	}
	c.env.Emit(b, mss)
}

// sackOption writes up to four blocks (RFC 2018 section 4): a duplicate first
// (RFC 2883), then the block with the newest segment, then the others.
func (c *Conn) sackOption(opts []byte) []byte {
	var bl [4]packet.SACKBlock
	k := 0
	add := func(r Range) {
		if k < len(bl) {
			bl[k] = packet.SACKBlock{Left: packet.Seq(c.irs + uint32(r.From)), Right: packet.Seq(c.irs + uint32(r.To))}
			k++
		}
	}
	if c.dsack.To != 0 && c.opt.DSACK {
		add(c.dsack)
	}
	newest, ok := c.oooSet.At(c.lastOOO)
	if ok {
		add(newest)
	}
	for i := len(c.oooSet) - 1; i >= 0; i-- {
		if r := c.oooSet[i]; !ok || r != newest {
			add(r)
		}
	}
	return packet.AppendSACKOption(opts, bl[:k]...)
}
