// SPDX-License-Identifier: Apache-2.0

package tcp

import "github.com/weirgate/weir/module/packet"

// maxWindow is the largest window that a scale can express.
const maxWindow = 1 << 30

// at widens a sequence number to the position nearest to near.
func at(seq, iss uint32, near uint64) int64 {
	return int64(near) + int64(int32(seq-iss-uint32(near)))
}

// segment handles a verified segment of this connection, in the order of RFC
// 9293 section 3.10.7.
func (c *Conn) segment(p *packet.TCP) {
	c.busy = true
	c.process(p)
	c.busy = false
	c.flush()
}

func (c *Conn) process(p *packet.TCP) {
	fl := p.Flags()
	if c.st == SynSent {
		c.synSent(p, fl)
		return
	}
	n := p.PayloadLen()
	pos := at(uint32(p.Seq()), c.irs, c.next)
	end := pos + int64(n)
	if fl.Has(packet.FIN) {
		end++
	}
	if fl.Has(packet.SYN) {
		c.synAgain(p, fl, pos)
		return
	}
	// First: is it acceptable? Linux's rule (tcp_sequence): it ends not before
	// what was acknowledged and begins inside the window.
	if end < int64(c.told) || pos > int64(max(c.edge, c.next)) {
		if !fl.Has(packet.RST) {
			if n > 0 && pos >= 1 && end <= int64(c.next) {
				c.dsack = Range{uint64(pos), uint64(pos) + uint64(n)}
			}
			c.challenge(n > 0)
		}
		return
	}
	// Second: RST (RFC 5961 section 3.2).
	if fl.Has(packet.RST) {
		if pos == int64(c.next) || len(c.oooSet) > 0 && pos == int64(c.oooSet.End()) {
			c.reset()
		} else {
			c.challenge(false)
		}
		return
	}
	if !fl.Has(packet.ACK) {
		return
	}
	// Fifth: the acknowledgment.
	ack := at(uint32(p.Ack()), c.iss, c.una)
	if c.st == SynRcvd {
		if ack < 1 || ack > int64(c.top) {
			c.host.refuse(p)
			return
		}
		c.established(p)
	}
	if ack > int64(c.top) || ack < int64(c.una)-maxWindow {
		c.challenge(n > 0)
		return
	}
	c.heard = c.env.Now()
	if ack >= int64(c.una) {
		c.acked(p, pos, uint64(ack), n > 0 || fl.Has(packet.FIN))
		if c.st == Closed {
			return
		}
	} else {
		c.readSACK(p)
	}
	// Seventh and eighth: data and FIN.
	if n > 0 {
		c.data(pos, p.Payload())
		if c.st == Closed {
			return
		}
	}
	if fl.Has(packet.FIN) {
		c.peerFIN(pos + int64(n))
	}
}

// challenge answers a segment that does not fit; without data at most twice a
// second, so that two ends that disagree do not talk for ever.
func (c *Conn) challenge(data bool) {
	now := c.env.Now()
	if !data {
		if c.lastOOW != 0 && now-c.lastOOW < oowEvery {
			return
		}
		c.lastOOW = now
	}
	c.ackNow = true
}

func (c *Conn) reset() {
	if c.st == TimeWait {
		c.remove(nil)
		return
	}
	if c.st == LastAck && c.una == c.top || c.st == Closing {
		c.remove(nil)
		return
	}
	c.remove(ErrReset)
}

// synSent is RFC 9293 section 3.10.7.3.
func (c *Conn) synSent(p *packet.TCP, fl packet.Flags) {
	if fl.Has(packet.ACK) && uint32(p.Ack()) != c.iss+1 {
		c.host.refuse(p)
		return
	}
	if fl.Has(packet.RST) {
		if fl.Has(packet.ACK) {
			c.remove(ErrReset)
		}
		return
	}
	if !fl.Has(packet.SYN | packet.ACK) {
		return
	}
	c.take(p)
	c.una, c.timed = 1, 0
	c.retries, c.rtxAt = 0, 0
	c.rto = c.opt.FirstRTO
	c.opened(uint64(p.Window()))
	c.ackNow = true
}

// take reads what the peer's SYN offers.
func (c *Conn) take(p *packet.TCP) {
	o := p.SYNOptions()
	c.irs, c.synced = uint32(p.Seq()), true
	c.next = 1
	c.edge = max(c.edge, 1)
	if o.MSS != 0 {
		c.mss = int(o.MSS)
	}
	if c.opt.PathMSS > 0 {
		c.mss = min(c.mss, c.opt.PathMSS)
	}
	c.sackOK = o.SACKPermitted && c.opt.SACK
	c.scaleOK = o.WindowScale >= 0 && c.opt.Scale >= 0
	if c.scaleOK {
		c.snd, c.rcv = uint8(o.WindowScale), uint8(c.opt.Scale)
	}
	c.cwnd = uint64(c.opt.Cwnd * c.mss)
}

// opened enters ESTABLISHED with the peer's first window.
func (c *Conn) opened(wnd uint64) {
	c.st = Established
	c.wnd, c.maxWnd = wnd, max(wnd, c.maxWnd)
	c.wl1, c.wl2 = c.next, c.una
	c.sackFree()
	if c.opt.KeepAlive > 0 {
		c.keepAt = c.env.Now() + c.opt.KeepAlive
	}
	c.app.Connected(c)
}

func (c *Conn) sackFree() { c.sacked = c.sacked[:0] }

// established completes the handshake of a server.
func (c *Conn) established(p *packet.TCP) {
	c.una, c.timed = 1, 0
	c.retries, c.rtxAt = 0, 0
	c.rto = c.opt.FirstRTO
	c.opened(uint64(p.Window()) << c.snd)
}

// synAgain handles a SYN on a connection that has one.
func (c *Conn) synAgain(p *packet.TCP, fl packet.Flags, pos int64) {
	switch {
	case c.st == SynRcvd && !fl.Has(packet.ACK) && pos == 0:
		c.sendSYN(packet.SYN | packet.ACK)
	case c.st == TimeWait && !fl.Has(packet.ACK) && pos > int64(c.next) && c.host.again != nil:
		// RFC 9293 section 3.6.1: a new incarnation with higher numbers.
		c.host.again(c, p)
	default:
		// RFC 5961 section 4: a challenge.
		c.challenge(false)
	}
}

// acked takes over what an acceptable acknowledgment says.
func (c *Conn) acked(p *packet.TCP, pos int64, ack uint64, more bool) {
	// The window. Linux: tcp_may_update_window; the RFC: section 3.10.7.4.
	w := uint64(p.Window()) << c.snd
	take := ack > c.una || pos > int64(c.wl1) || pos == int64(c.wl1) && (w > c.wnd || w == 0)
	if c.opt.WL1 {
		take = int64(c.wl1) < pos || int64(c.wl1) == pos && c.wl2 <= ack
	}
	grew := false
	if take {
		grew = w != c.wnd
		c.wnd, c.wl1, c.wl2 = w, uint64(max(pos, 0)), ack
		c.maxWnd = max(c.maxWnd, w)
		if w > 0 {
			c.probes = 0
			c.persistAt = 0
		}
	}
	fresh := c.readSACK(p)
	if ack > c.una {
		c.progress(ack)
		return
	}
	// A duplicate acknowledgment: with SACK one that tells something new, as
	// Linux counts, else RFC 5681 section 2.
	if c.una == c.nxt || c.sackOK && !fresh || !c.sackOK && (more || grew) {
		return
	}
	c.dups++
	if c.recovery {
		c.cwnd += uint64(c.mss)
		if c.sackOK {
			c.hole()
		}
		return
	}
	if c.dups >= 3 && c.una >= c.recover {
		c.recovery = true
		c.recover = c.top
		c.thresh = max(c.flight()/2, uint64(2*c.mss))
		c.cwnd = c.thresh + uint64(3*c.mss)
		c.again = 0
		c.hole()
	}
}

// progress handles an acknowledgment of something new.
func (c *Conn) progress(ack uint64) {
	n := ack - c.una
	now := c.env.Now()
	if c.timed != 0 && ack >= c.timed {
		c.sample(now - c.timedAt)
		c.timed = 0
	}
	if c.retries > 0 {
		c.retries = 0
		c.rto = c.fromRTT()
	}
	c.una = ack
	c.nxt = max(c.nxt, ack)
	c.buf.acked(min(ack, c.end))
	c.sacked.Below(ack)
	c.dups = 0
	switch {
	case c.recovery && ack < c.recover:
		// A partial acknowledgment: the next hole (RFC 6582, RFC 6675).
		c.cwnd = max(c.cwnd-min(n, c.cwnd), uint64(c.mss)) + uint64(c.mss)
		c.hole()
	case c.recovery:
		c.recovery = false
		c.cwnd = max(c.thresh, uint64(c.mss))
	case c.cwnd < c.thresh:
		c.cwnd += min(n, uint64(2*c.mss))
	default:
		c.cwnd += uint64(c.mss) * uint64(c.mss) / c.cwnd
	}
	c.cwnd = min(c.cwnd, 1<<26)
	c.rtxAt = 0
	if c.nxt > c.una {
		c.rtxAt = now + c.rto
	}
	if !c.fin || ack <= c.end {
		return
	}
	// Our FIN is acknowledged.
	switch c.st {
	case FinWait1:
		c.st = FinWait2
	case Closing:
		c.timeWait()
	case LastAck:
		c.remove(nil)
	}
}

// readSACK notes what the peer has beyond the gap; it reports whether that is
// news.
func (c *Conn) readSACK(p *packet.TCP) (fresh bool) {
	if !c.sackOK {
		return false
	}
	off, n := p.SACK()
	for i := range n {
		b := p.SACKBlock(off, i)
		l, r := at(uint32(b.Left), c.iss, c.una), at(uint32(b.Right), c.iss, c.una)
		if l <= int64(c.una) || l >= r || r > int64(c.top) {
			continue // a duplicate's report, or nonsense
		}
		if !c.sacked.Has(uint64(l), uint64(r)) {
			c.sacked.Add(uint64(l), uint64(r))
			fresh = true
		}
	}
	return fresh
}

func (c *Conn) sample(rtt int64) {
	if c.srtt == 0 {
		c.srtt, c.rttvar = rtt, rtt/2
	} else {
		d := c.srtt - rtt
		c.rttvar = (3*c.rttvar + max(d, -d)) / 4
		c.srtt = (7*c.srtt + rtt) / 8
	}
	c.rto = c.fromRTT()
}

func (c *Conn) fromRTT() int64 {
	if c.srtt == 0 {
		return c.opt.FirstRTO
	}
	return min(max(c.srtt+4*c.rttvar, c.opt.MinRTO), maxRTO)
}

// data takes a segment's payload.
func (c *Conn) data(pos int64, b []byte) {
	end := pos + int64(len(b))
	if end <= int64(c.next) {
		if pos >= 1 {
			c.dsack = Range{uint64(pos), uint64(end)}
		}
		c.ackNow = true
		return
	}
	if c.noRead {
		// Data for nobody (RFC 9293 section 3.6.1, RFC 1122 section 4.2.2.13).
		c.emit(packet.RST|packet.ACK, c.ackPlace(), 0)
		c.remove(ErrAborted)
		return
	}
	if c.finAt != 0 && end > int64(c.finAt) || c.st == TimeWait || c.st == Closing || c.st == LastAck || c.st == CloseWait {
		c.ackNow = true
		return
	}
	if edge := int64(c.edge); end > edge {
		b = b[:max(edge-pos, 0)]
		end = pos + int64(len(b))
		c.ackNow = true
		if len(b) == 0 {
			return
		}
	}
	if pos < int64(c.next) {
		if pos >= 1 {
			c.dsack = Range{uint64(pos), c.next}
		}
		b = b[int64(c.next)-pos:]
		pos = int64(c.next)
		if len(b) == 0 {
			return
		}
	}
	if pos > int64(c.next) {
		// Beyond a gap: kept, and told at once.
		if c.oooSet.Has(uint64(pos), uint64(end)) {
			c.dsack = Range{uint64(pos), uint64(end)}
		} else {
			c.ooo = append(c.ooo, held{uint64(pos), append([]byte(nil), b...)})
			c.oooSet.Add(uint64(pos), uint64(end))
		}
		c.lastOOO = uint64(pos)
		c.ackNow = true
		return
	}
	c.unread = append(c.unread, b...)
	c.next = uint64(end)
	c.ackDue += len(b)
	if len(c.ooo) > 0 {
		c.ackNow = true
		c.fillGap()
	}
	c.app.Readable(c)
	if c.st != Closed && c.finAt != 0 && c.next == c.finAt {
		c.peerFIN(int64(c.finAt))
	}
}

// fillGap appends what was kept and is in order now.
func (c *Conn) fillGap() {
	for moved := true; moved; {
		moved = false
		for i := range c.ooo {
			h := &c.ooo[i]
			if h.pos > c.next {
				continue
			}
			if end := h.pos + uint64(len(h.data)); end > c.next {
				c.unread = append(c.unread, h.data[c.next-h.pos:]...)
				c.next = end
			}
			c.ooo[i] = c.ooo[len(c.ooo)-1]
			c.ooo = c.ooo[:len(c.ooo)-1]
			moved = true
			break
		}
	}
	c.oooSet.Below(c.next)
}

// peerFIN notes a FIN and, when it is in order, takes it.
func (c *Conn) peerFIN(pos int64) {
	if c.next > 0 && c.finAt != 0 && c.next > c.finAt {
		c.ackNow = true // repeated
		if c.st == TimeWait {
			c.endAt = c.env.Now() + c.opt.TimeWait
		}
		return
	}
	if pos < int64(c.next) {
		c.ackNow = true
		return
	}
	if pos > int64(c.edge) {
		return
	}
	c.finAt = uint64(pos)
	c.ackNow = true
	if pos > int64(c.next) {
		return
	}
	c.next = c.finAt + 1
	c.edge = max(c.edge, c.next)
	switch c.st {
	case Established:
		c.st = CloseWait
	case FinWait1:
		c.st = Closing // our FIN is not acknowledged
	case FinWait2:
		c.timeWait()
	}
	c.app.PeerClosed(c)
}

func (c *Conn) timeWait() {
	c.st = TimeWait
	c.rtxAt, c.persistAt, c.keepAt = 0, 0, 0
	c.endAt = c.env.Now() + c.opt.TimeWait
}
