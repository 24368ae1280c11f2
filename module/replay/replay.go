// SPDX-License-Identifier: Apache-2.0

// Package replay runs a capture through an engine, without a network: what
// would this configuration have done with these clients?
//
// Of the capture it takes the client's leg alone, both directions. The clients'
// packets go into the engine at their times. What went to the clients is played
// by model servers, which always work: when the engine has bound a request to
// one, it sends the bytes that the client got then. The numbers of the
// handshakes are taken from the capture, so that everything fits.
//
// The package must not do I/O other than reading the capture that it is given,
// and nothing in it reads a clock: two runs say the same.
package replay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/weirgate/weir/module/control/capture"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/pool"
	"github.com/weirgate/weir/policies/snapshot"
)

// maxPackets bounds a capture.
const maxPackets = 4 << 20

// Options say what the engine has.
type Options struct {
	DB        *farm.DB
	SNIPs     []netip.Addr
	PortFirst uint16
	PortLast  uint16
}

// Decision is what the engine made of one request.
type Decision struct {
	Time    time.Time `json:"time"`
	Client  string    `json:"client"`
	VIP     string    `json:"vip"`
	Farm    string    `json:"farm"`
	Request string    `json:"request"`          // the first line's method and target, as far as the capture has it
	Server  string    `json:"server,omitempty"` // that got it
	Reused  bool      `json:"reused,omitempty"` // on a connection that was there
	Answer  int       `json:"answer,omitempty"` // status of the engine's own answer
	Waits   bool      `json:"waits,omitempty"`  // in the line for a connection, at the end of the step
	Why     []string  `json:"why,omitempty"`    // steps of the choice
	Reasons []string  `json:"reasons,omitempty"`
}

// Summary counts what was in a capture and what became of it.
type Summary struct {
	Packets  int            `json:"packets"`  // of clients to VIPs
	Others   int            `json:"others"`   // of anybody else, not played
	Clients  int            `json:"clients"`  // connections of which the capture has the beginning
	Midway   int            `json:"midway"`   // packets of connections that began before the capture
	Requests int            `json:"requests"` // that reached a decision
	Unplayed int            `json:"unplayed"` // bytes of responses for which no request was bound
	Servers  map[string]int `json:"servers"`  // requests, by farm/server
	Answers  map[string]int `json:"answers"`  // the engine's own, by status
	Reasons  map[string]int `json:"reasons"`  // what the engine counted
}

// Run plays the capture and calls emit for each decision. An error of emit ends
// it.
func Run(r *capture.Reader, o Options, emit func(*Decision) error) (*Summary, error) {
	p := &player{
		o: o, emit: emit, sum: &Summary{Servers: map[string]int{}, Answers: map[string]int{}, Reasons: map[string]int{}},
		cookies: &cookies{iss: map[opening]packet.Seq{}, opts: map[packet.Tuple]uint8{}},
		servers: map[packet.Tuple]*server{}, clients: map[packet.Tuple]*client{}, asks: map[packet.Tuple]string{},
	}
	if err := p.load(r); err != nil {
		return nil, err
	}
	p.makeEngine()
	for i := range p.packets {
		if err := p.play(&p.packets[i]); err != nil {
			return nil, err
		}
	}
	p.settle()
	for i := range engine.Reasons {
		if n := p.e.Count.Get(engine.Reason(i)); n > 0 {
			p.sum.Reasons[engine.Reason(i).String()] = int(n)
		}
	}
	return p.sum, nil
}

// recorded is one packet of the client's leg.
type recorded struct {
	at       int64
	data     []byte
	toClient bool
}

// opening names a handshake.
type opening struct {
	tuple packet.Tuple // client to VIP
	isn   packet.Seq
}

// cookies give the handshakes of the capture their numbers.
type cookies struct {
	iss  map[opening]packet.Seq
	opts map[packet.Tuple]uint8
}

// defaultISS is for handshakes of which the capture has no answer.
const defaultISS = packet.Seq(1_000_000)

// defaultOptions are for clients whose SYN the capture has not: MSS 1460,
// window scale 7, SACK; see the layout of a cookie.
const defaultOptions = 7<<4 | 6<<1 | 1

// Make implements engine.Cookies.
func (c *cookies) Make(t packet.Tuple, isn packet.Seq, opt uint8, _ int64) packet.Seq {
	c.opts[t] = opt
	if iss, ok := c.iss[opening{t, isn}]; ok {
		return iss
	}
	return defaultISS
}

// Check implements engine.Cookies: whoever is in the capture had a handshake.
func (c *cookies) Check(t packet.Tuple, isn, iss packet.Seq, _ int64) (uint8, bool) {
	if want, ok := c.iss[opening{t, isn}]; ok && want != iss {
		return 0, false
	}
	if opt, ok := c.opts[t]; ok {
		return opt, true
	}
	return defaultOptions, true
}

// client is a client connection as the player sees it.
type client struct {
	line string // of the last request that began in a packet
}

// server is one model connection.
type server struct {
	next packet.Seq // expected from the engine
	seq  packet.Seq // of our next byte
}

type player struct {
	o       Options
	emit    func(*Decision) error
	sum     *Summary
	packets []recorded

	e       *engine.Engine
	hs      *engine.Handshake
	cookies *cookies
	out     engine.Output
	now     int64
	tap     engine.Tap
	steps   []engine.Passage // of the packet at hand

	servers map[packet.Tuple]*server // by server to SNIP
	clients map[packet.Tuple]*client // by client to VIP
	asks    map[packet.Tuple]string
}

// load reads the capture and finds the handshakes.
func (p *player) load(r *capture.Reader) error {
	for {
		k, err := r.Next()
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break // one that was cut off while it was written is played as far as it goes
		}
		if err != nil {
			return err
		}
		v, problem := packet.ParseTCP(k.Data)
		if problem != packet.OK {
			p.sum.Others++
			continue
		}
		t := v.Tuple()
		toClient := p.o.DB.ByVIP(t.Src) != nil
		if !toClient && p.o.DB.ByVIP(t.Dst) == nil {
			p.sum.Others++
			continue
		}
		if len(p.packets) == maxPackets {
			return fmt.Errorf("the capture has more than %d packets of clients", maxPackets)
		}
		p.packets = append(p.packets, recorded{k.Time.UnixNano(), bytes.Clone(k.Data), toClient})
		if toClient && v.Flags().Has(packet.SYN|packet.ACK) {
			p.cookies.iss[opening{t.Reverse(), v.Ack().Sub(1)}] = v.Seq()
		}
	}
	return nil
}

func (p *player) makeEngine() {
	p.hs = engine.NewHandshake(p.cookies, pool.LargeMSS, pool.LargeMSS, func(v packet.Endpoint) bool { return p.o.DB.ByVIP(v) != nil })
	p.hs.Strict.Store(false)
	var ports []*pool.Ports
	for _, a := range p.o.SNIPs {
		ports = append(ports, pool.NewPorts(packet.AddrFrom(a), p.o.PortFirst, p.o.PortLast, int64(time.Second), nil))
	}
	p.e = engine.New(engine.Options{
		Clients: 1 << 17, Servers: 1 << 14, Seed: 1, Handshake: p.hs, SNIPs: ports, Shards: 1,
	}, p.o.DB)
	p.tap = engine.Tap{
		Client: func(packet.Addr) bool { return true },
		Record: func(s engine.Passage) { p.steps = append(p.steps, s) },
	}
}

// play handles one packet of the capture.
func (p *player) play(k *recorded) error {
	p.until(k.at)
	v, problem := packet.ParseTCP(k.data)
	if problem != packet.OK {
		return nil
	}
	if k.toClient {
		p.respond(&v)
		return nil
	}
	p.sum.Packets++
	key := v.Tuple()
	fl := v.Flags()
	if fl&(packet.SYN|packet.ACK) == packet.SYN {
		p.sum.Clients++
		p.clients[key] = &client{}
		p.out.Reset()
		p.hs.SYN(p.now, k.data, packet.ChecksumVerified, &p.out)
		return nil
	}
	c := p.clients[key]
	if c == nil {
		p.sum.Midway++
		c = &client{}
		p.clients[key] = c
	}
	if line := requestLine(v.Payload()); line != "" {
		c.line = line
		p.asks[key] = string(v.Payload())
	}
	f := p.o.DB.ByVIP(key.Dst)
	requests, own, reused := f.Stats.Requests.Load(), f.Stats.OwnAnswers.Load(), f.Stats.Reused.Load()
	p.steps = p.steps[:0]
	p.feed(k.data)
	more := f.Stats.Requests.Load() > requests
	answered := f.Stats.OwnAnswers.Load() > own
	if !more && !answered {
		return nil
	}
	return p.decided(&key, f, c, answered, f.Stats.Reused.Load() > reused)
}

// decided reports what a request came to.
func (p *player) decided(key *packet.Tuple, f *farm.Farm, c *client, answered, reused bool) error {
	d := &Decision{
		Time: time.Unix(0, p.now).UTC(), Client: key.Src.String(), VIP: key.Dst.String(), Farm: f.Name, Request: c.line, Reused: reused,
	}
	seen := map[string]bool{}
	for _, s := range p.steps {
		for _, r := range s.Reasons {
			if name := r.String(); !seen[name] {
				seen[name] = true
				d.Reasons = append(d.Reasons, name)
			}
		}
		if answered {
			for _, b := range s.Out {
				if n := status(b, key); n != 0 && d.Answer == 0 {
					d.Answer = n
				}
			}
		}
	}
	p.sum.Requests++
	switch flow, ok := p.e.FlowOf(key.Src, key.Dst); {
	case d.Answer != 0:
		p.sum.Answers[fmt.Sprint(d.Answer)]++
	case ok && flow.Server != 0:
		if sv := p.o.DB.Server(flow.Server); sv != nil {
			d.Server = sv.Name
			p.sum.Servers[f.Name+"/"+sv.Name]++
		}
	case ok:
		d.Waits = true
	}
	d.Why = p.why(key, f)
	return p.emit(d)
}

// why asks the farm's policies again, with words.
func (p *player) why(key *packet.Tuple, f *farm.Farm) []string {
	text := p.asks[*key]
	head, _, _ := bytes.Cut([]byte(text), []byte("\r\n\r\n"))
	lines := bytes.Split(head, []byte("\r\n"))
	words := bytes.SplitN(lines[0], []byte(" "), 3)
	if len(words) < 2 {
		return nil
	}
	req := snapshot.Request{Method: words[0], Path: words[1], Client: key.Src.Addr, Now: p.now}
	if rest, ok := bytes.CutPrefix(req.Path, []byte("http://")); ok {
		if i := bytes.IndexByte(rest, '/'); i >= 0 {
			req.Host, req.Path = rest[:i], rest[i:]
		}
	}
	for _, l := range lines[1:] {
		if name, v, ok := bytes.Cut(l, []byte(":")); ok && req.Host == nil && bytes.EqualFold(name, []byte("host")) {
			req.Host = bytes.TrimSpace(v)
		}
	}
	steps := f.Selector.Load().Explain(&req, f.Lives, nil, 1)
	var out []string
	for i, s := range steps {
		// What this second choice draws is another one, and is not told.
		if i == len(steps)-1 || s.Policy == "" && strings.HasPrefix(s.Text, "drawn: ") {
			continue
		}
		t := s.Text
		if s.Policy != "" {
			t = s.Policy + ": " + t
		}
		out = append(out, t)
	}
	return out
}

// status is the status of a response that begins in a packet to the client.
func status(b []byte, key *packet.Tuple) int {
	v, problem := packet.ParseTCP(b)
	if problem != packet.OK || v.Dst() != key.Src {
		return 0
	}
	var n int
	if rest, ok := bytes.CutPrefix(v.Payload(), []byte("HTTP/1.1 ")); ok && len(rest) >= 3 {
		for _, d := range rest[:3] {
			if d < '0' || d > '9' {
				return 0
			}
			n = n*10 + int(d-'0')
		}
	}
	return n
}

// requestLine returns method and target of a request that begins here.
func requestLine(b []byte) string {
	line, _, ok := bytes.Cut(b, []byte("\r\n"))
	if !ok || !bytes.Contains(line, []byte(" HTTP/1.")) {
		return ""
	}
	const longest = 200
	line = line[:bytes.LastIndex(line, []byte(" HTTP/1."))]
	return string(bytes.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, line[:min(len(line), longest)]))
}

// until lets time pass.
func (p *player) until(at int64) {
	for {
		due := p.e.NextDue()
		if due == 0 || due > at {
			break
		}
		p.now = max(p.now, due)
		p.step(&engine.Event{Kind: engine.Tick})
	}
	p.now = max(p.now, at)
}

// settle lets what is open at the end of the capture time out.
func (p *player) settle() { p.until(p.now + int64(100*time.Millisecond)) }

// feed gives a packet to the engine, and plays the servers' part of what comes
// out.
func (p *player) feed(b []byte) {
	// The step writes over it, and may grow it by a header's options.
	data := append(make([]byte, 0, len(b)+256), b...)
	p.step(&engine.Event{Kind: engine.Packet, Checksum: packet.ChecksumVerified, GSO: len(b) > 1500, Data: data})
}

func (p *player) step(ev *engine.Event) {
	p.out.Reset()
	p.tap.Step(p.e, p.now, ev, &p.out)
	var sent [][]byte
	for i := range p.out.Len() {
		sent = append(sent, bytes.Clone(p.out.Packet(i)))
	}
	if ev.Verdict == engine.Rewrite {
		sent = append(sent, bytes.Clone(ev.Data))
	}
	for _, b := range sent {
		if v, problem := packet.ParseTCP(b); problem == packet.OK && p.isSNIP(v.Src()) {
			p.serve(&v)
		}
	}
}

func (p *player) isSNIP(e packet.Endpoint) bool {
	if e.Port < p.o.PortFirst || e.Port > p.o.PortLast {
		return false
	}
	for _, a := range p.o.SNIPs {
		if packet.AddrFrom(a) == e.Addr {
			return true
		}
	}
	return false
}

// serve is a model server's answer to one segment: handshakes and closes are
// agreed to, data is acknowledged.
func (p *player) serve(v *packet.TCP) {
	key := v.Tuple().Reverse()
	s := p.servers[key]
	fl := v.Flags()
	say := func(seq packet.Seq, fl packet.Flags, options []byte) {
		p.feed(packet.AppendSegment(nil, &packet.Segment{
			Src: key.Src, Dst: key.Dst, Seq: seq, Ack: s.next, Flags: fl, Window: 0xffff, Options: options,
		}, nil))
	}
	switch {
	case fl.Has(packet.RST):
		delete(p.servers, key)
	case fl.Has(packet.SYN):
		s = &server{next: v.Seq().Add(1), seq: packet.Seq(len(p.servers)) * 1_000_000}
		p.servers[key] = s
		options := packet.AppendSYNOptions(nil, packet.SYNOptions{MSS: 1460, WindowScale: 7, SACKPermitted: true})
		first := s.seq
		s.seq = first.Add(1)
		say(first, packet.SYN|packet.ACK, options)
	case s == nil:
	case fl.Has(packet.FIN):
		s.next = packet.MaxSeq(s.next, v.End())
		delete(p.servers, key)
		say(s.seq, packet.FIN|packet.ACK, nil)
	case v.PayloadLen() > 0 && v.Seq().LessEq(s.next):
		s.next = packet.MaxSeq(s.next, v.End())
		say(s.seq, packet.ACK, nil)
	}
}

// respond plays what went to a client: the server that its request is bound to
// says it.
func (p *player) respond(v *packet.TCP) {
	n := v.PayloadLen()
	closes := v.Flags().Has(packet.FIN)
	if n == 0 && !closes || v.Flags().Has(packet.SYN) || v.Flags().Has(packet.RST) {
		return
	}
	f, ok := p.e.FlowOf(v.Dst(), v.Src())
	if !ok || f.Server == 0 {
		p.sum.Unplayed += n
		return
	}
	key := packet.Tuple{Src: f.Remote, Dst: f.SNIP}
	s := p.servers[key]
	if s == nil {
		p.sum.Unplayed += n
		return
	}
	// The place in the client's numbers is a place in the server's.
	seq := f.Epoch.AckToServer(v.Seq())
	if seq.Less(f.Epoch.RcvBase) {
		return // said before
	}
	fl := packet.ACK | packet.PSH
	// A FIN of the capture is the interface unit's own, or it ended a response
	// without a length: only then a server sent one.
	if closes && f.Epoch.RcvBase.Less(seq.Add(packet.Size(n))) && f.UntilClose {
		fl |= packet.FIN
	}
	if n == 0 && !fl.Has(packet.FIN) {
		return
	}
	s.seq = packet.MaxSeq(s.seq, seq.Add(packet.Size(n)))
	p.feed(packet.AppendSegment(nil, &packet.Segment{
		Src: key.Src, Dst: key.Dst, Seq: seq, Ack: s.next, Flags: fl, Window: 0xffff,
	}, v.Payload()))
	if fl.Has(packet.FIN) {
		s.seq = s.seq.Add(1)
	}
}
