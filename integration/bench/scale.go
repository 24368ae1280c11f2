// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/pool"
	"github.com/weirgate/weir/module/splice"
)

// This file measures the engine alone, without a kernel: what a packet costs
// and what memory a client takes when the table holds a thousand clients, and
// when it holds a million. Every client has opened its connection by a
// handshake with a cookie, has had one response, and is idle then. The packets
// are made beforehand, so that what is timed is the engine.
//
// What a packet costs with a million clients depends on which of them speak: a
// thousand that speak again and again are in the processor's caches, and each
// of a million in turn is not.

// scaled is what one size of the table gave.
type scaled struct {
	Flows int `json:"flows"`
	// Bytes of the process for all flows, the memory of the flow store and
	// the rest of the process included, without what the driver holds.
	Memory int64   `json:"memory"`
	Opened float64 `json:"opened"` // nanoseconds for each connection with its first exchange
	// Nanoseconds for each packet of an exchange: request, response and
	// acknowledgment in turn, best of several rounds.
	Few float64 `json:"few"` // of a thousand clients, drawn at random
	All float64 `json:"all"` // of all clients, drawn at random
	// Blind is All without looking ahead, see engine.Ahead.
	Blind float64 `json:"blind"`
	Idle  float64 `json:"idle"` // nanoseconds a second for the timers of the idle ones
}

// runScale measures both ways: through the kernel (see crowded.go) and the
// engine alone.
func runScale(ctx context.Context, args []string, w io.Writer) error {
	fs := flag.NewFlagSet("bench scale", flag.ContinueOnError)
	fs.SetOutput(w)
	sizes := fs.String("flows", "1000,10000,100000,1000000", "client connections in the table")
	dir := fs.String("dir", inMemory(), "directory for the flow store's file; best one in memory")
	rounds := fs.Int("rounds", 3, "how often every size is measured; the best counts")
	one := fs.Int("one", 0, "measure this size here and write JSON")
	only := fs.String("only", "", "engine or kernel: only that part, to standard output alone")
	weir := fs.String("weir", "bin/weir", "the weir executable, for what goes through the kernel")
	tables := [2]int{1000, 1_000_000}
	fs.IntVar(&tables[0], "small", tables[0], "connections in the table that a large one is compared with")
	fs.IntVar(&tables[1], "large", tables[1], "connections in the large table, at most a million")
	speak := fs.String("speak", "", "comma-separated loads through the kernel, of: "+strings.Join(names(speakers), ", "))
	loads := fs.Int("loads", 7, "how often every load through the kernel is measured")
	measure := fs.Duration("measure", time.Second, "time of one of these measurements")
	realtime := fs.Bool("realtime", false, "as for the comparison")
	out := fs.String("out", "docs/bench", "directory of the report; empty: standard output alone")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *one > 0 {
		s, err := scale(*one, *dir)
		if err != nil {
			return err
		}
		return json.NewEncoder(w).Encode(s)
	}
	if *only != "kernel" && *only != "engine" && *only != "" {
		return fmt.Errorf("-only %q: there are engine and kernel", *only)
	}
	bin, err := filepath.Abs(*weir)
	if err != nil {
		return err
	}
	if *only != "engine" {
		if err := asRoot(" BENCH=scale (or BENCH='scale -only engine')"); err != nil {
			return err
		}
		if _, err := os.Stat(bin); err != nil {
			return fmt.Errorf("the weir executable: %w (make build makes it)", err)
		}
	}
	who, err := choose(speakers, *speak, nil)
	if err != nil {
		return err
	}
	if err := firstIf(*realtime); err != nil {
		return err
	}
	var text strings.Builder
	fmt.Fprintf(&text, "# Client connections in the table\n\nMade by `make bench BENCH=scale`.\n\n")
	for _, m := range describe("") {
		fmt.Fprintf(&text, "- %s\n", m)
	}
	if *realtime {
		fmt.Fprintf(&text, "\nEverything ran with real-time priority, because others used the machine at the same time.\n")
	}
	if *only != "engine" {
		if err := crowded(ctx, bin, tables, who, *loads, *measure, w, &text); err != nil {
			return err
		}
	}
	if *only != "kernel" {
		if err := engineAlone(ctx, strings.Split(*sizes, ","), *dir, *rounds, &text); err != nil {
			return err
		}
	}
	if _, err := io.WriteString(w, "\n"+text.String()); err != nil || *out == "" || *only != "" {
		return err
	}
	path := filepath.Join(*out, "scale.md")
	if err := os.WriteFile(path, []byte(text.String()), 0o644); err != nil {
		return err
	}
	return sameOwner(path, filepath.Dir(*out))
}

// engineAlone measures each size in a process of its own, because memory that
// was used once is not given back, and writes its part of the report.
func engineAlone(ctx context.Context, sizes []string, dir string, rounds int, text *strings.Builder) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var all []scaled
	for round := range rounds {
		for i, n := range sizes {
			cmd := exec.CommandContext(ctx, self, "scale", "-one", n, "-dir", dir)
			cmd.Stderr = os.Stderr
			b, err := cmd.Output()
			if err != nil {
				return fmt.Errorf("%s flows: %w", n, err)
			}
			var s scaled
			if err := json.Unmarshal(b, &s); err != nil {
				return err
			}
			if round == 0 {
				all = append(all, s)
				continue
			}
			a := &all[i]
			a.Few, a.All, a.Blind = min(a.Few, s.Few), min(a.All, s.All), min(a.Blind, s.Blind)
			a.Idle, a.Opened = min(a.Idle, s.Idle), min(a.Opened, s.Opened)
		}
	}
	fmt.Fprintf(text, `
## The engine alone

Without a kernel, with its flow store in a file that is mapped shared: what a packet of an exchange (request, response, acknowledgment) costs the engine; the kernel's part is some ten times that. *A thousand speak*: the packets are of a thousand clients, drawn at random, while the others are idle. *All speak*: they are of all clients, drawn at random, so that no cache holds them. *Memory* is the whole process, resident, with the flow store's. A record is %d bytes, with key, checksum and journal mark. Best of %d rounds, each size in a process of its own.

| clients | memory | for each | a thousand speak | ratio | all speak | ratio | the same, not read ahead | timers of the idle | connect and first exchange |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
`, flowstore.SlotSize[splice.Client](), rounds)
	for _, s := range all {
		fmt.Fprintf(text, "| %d | %.0f MiB | %.0f | %.0f ns | %.2f | %.0f ns | %.2f | %.0f ns | %.3f %% | %.2f µs |\n",
			s.Flows, float64(s.Memory)/(1<<20), float64(s.Memory)/float64(s.Flows), s.Few, s.Few/all[0].Few, s.All, s.All/all[0].All, s.Blind, s.Idle/1e7, s.Opened/1000)
	}
	return nil
}

var (
	scaleVIP    = netip.MustParseAddrPort("203.0.113.10:80")
	scaleServer = netip.MustParseAddrPort("198.51.100.11:80")
	scaleSNIP   = netip.MustParseAddr("198.51.100.1")
)

// crowd is an engine with clients and a server that answers at once.
type crowd struct {
	e     *engine.Engine
	hs    *engine.Handshake
	now   int64
	out   engine.Output
	seq   []packet.Seq // by client: the next number of its own
	ack   []packet.Seq // and the server's, as it sees them
	peers map[uint16]*peer
	blind bool // without looking ahead
	timed bool
	vip   packet.Endpoint
	srv   packet.Endpoint
}

// peer is the server's end of a connection, by SNIP port.
type peer struct{ seq, ack packet.Seq }

const (
	requestSize  = 100
	responseSize = 1100
	inParallel   = 64 // requests under way at once, as in a batch of packets
)

var (
	theRequest  = []byte("GET /1024.bin HTTP/1.1\r\nHost: 203.0.113.10\r\nUser-Agent: bench\r\nAccept: */*\r\nX-Padding: ")
	theResponse = []byte("HTTP/1.1 200 OK\r\nServer: bench\r\nContent-Type: application/octet-stream\r\nContent-Length: ")
)

func newCrowd(flows int, dir string) (*crowd, func(), error) {
	const second = int64(time.Second)
	db, err := farm.Build(nil, farm.Spec{
		SNIPs: []netip.Addr{scaleSNIP},
		Farms: []farm.FarmSpec{{
			Name: "web", VIPs: []netip.AddrPort{scaleVIP}, Servers: []farm.ServerSpec{{Name: "s1", Endpoint: scaleServer}},
			Pool: farm.PoolLimits{MaxIdle: 1024, MaxConnections: 1024, MaxConnecting: 1024, IdleTimeout: 3600 * second, MaxWaiting: 1024, WaitTimeout: 5 * second, DrainLimit: 1 << 20, DrainTimeout: 10 * second},
			Timeouts: farm.Timeouts{
				Connect: 5 * second, Head: 15 * second, Body: 20 * second, Idle: 3600 * second, Response: 60 * second, Tunnel: 3600 * second,
			},
		}},
	})
	if err != nil {
		return nil, nil, err
	}
	file, err := os.CreateTemp(dir, "weirscale")
	if err != nil {
		return nil, nil, err
	}
	file.Close()
	mem, err := flowstore.Open(file.Name(), splice.RecordVersion)
	if err != nil {
		return nil, nil, err
	}
	free := func() { _ = mem.Close(); _ = os.Remove(file.Name()) }
	c := &crowd{
		now: 1000 * second, seq: make([]packet.Seq, flows), ack: make([]packet.Seq, flows), peers: map[uint16]*peer{},
		vip: packet.EndpointFrom(scaleVIP), srv: packet.EndpointFrom(scaleServer),
	}
	c.hs = engine.NewHandshake(engine.NewMACCookies([16]byte{1}), pool.LargeMSS, pool.LargeMSS, func(packet.Endpoint) bool { return true })
	c.e, err = engine.Open(engine.Options{
		Clients: flows, Servers: 1 << 14, Seed: 1, Handshake: c.hs, Shards: 1,
		SNIPs: []*pool.Ports{pool.NewPorts(packet.AddrFrom(scaleSNIP), 10240, 32767, 10*second, nil)},
	}, mem, db)
	if err != nil {
		free()
		return nil, nil, err
	}
	c.e.Recover(c.now)
	return c, free, nil
}

// endpoint is the address of a client.
func (c *crowd) endpoint(i int) packet.Endpoint {
	return packet.Endpoint{Addr: packet.AddrFrom(netip.AddrFrom4([4]byte{198, 18, byte(i >> 17), byte(i >> 9)})), Port: uint16(1024 + i&0x1ff)}
}

func pad(head []byte, n int) []byte {
	b := append(make([]byte, 0, n), head...)
	for len(b) < n-4 {
		b = append(b, 'x')
	}
	return append(b, "\r\n\r\n"...)
}

// response is one of responseSize bytes in all.
func response() []byte {
	head := fmt.Appendf(slices.Clone(theResponse), "%d\r\n\r\n", 1000)
	return append(head, make([]byte, 1000)...)
}

// event is one packet for the engine.
type event struct {
	buf []byte // with room behind
	n   int
}

func (v *event) put(s *packet.Segment, payload []byte) {
	b := packet.AppendSegment(v.buf[:0], s, payload)
	v.buf, v.n = b[:cap(b)], len(b)
}

// step gives a packet to the engine and returns the packets that leave.
func (c *crowd) step(ev *engine.Event, v *event) {
	c.out.Reset()
	*ev = engine.Event{Kind: engine.Packet, Checksum: packet.ChecksumVerified, Data: v.buf[:v.n]}
	c.e.Step(c.now, ev, &c.out)
}

var errScale = errors.New("the engine did not do what was expected of it")

// open brings a client to where it is idle after its first response.
func (c *crowd) open(i int, reply []byte) error {
	ep := c.endpoint(i)
	isn := packet.Seq(i * 7919)
	var opts [16]byte
	syn := packet.AppendSegment(nil, &packet.Segment{
		Src: ep, Dst: c.vip, Seq: isn, Flags: packet.SYN, Window: 64000,
		Options: packet.AppendSYNOptions(opts[:0], packet.SYNOptions{MSS: 1460, WindowScale: 7, SACKPermitted: true}),
	}, nil)
	c.out.Reset()
	c.hs.SYN(c.now, syn, packet.ChecksumVerified, &c.out)
	if c.out.Len() != 1 {
		return fmt.Errorf("%w: no SYN-ACK for client %d", errScale, i)
	}
	p, _ := packet.ParseTCP(c.out.Packet(0))
	c.seq[i], c.ack[i] = isn.Add(1), p.Seq().Add(1)
	one := []int{i}
	var t [3]time.Duration
	return c.exchange(one, reply, &t)
}

// exchange has clients ask and get their answers, all at once, and adds the
// time that the engine took for requests, responses and acknowledgments.
func (c *crowd) exchange(who []int, reply []byte, took *[3]time.Duration) error {
	var evs [inParallel]engine.Event
	ports := make([]uint16, 0, inParallel)
	for k, i := range who {
		c.evs(k).put(&packet.Segment{Src: c.endpoint(i), Dst: c.vip, Seq: c.seq[i], Ack: c.ack[i], Flags: packet.ACK | packet.PSH, Window: 500}, paddedRequest)
	}
	ahead := func(k int) []byte { return c.evs(k).buf[:c.evs(k).n] }
	began := c.clock()
	if !c.blind {
		c.e.Ahead(len(who), ahead)
	}
	for k := range who {
		c.step(&evs[k], c.evs(k))
		if evs[k].Verdict != engine.Rewrite {
			// A new server connection: it is opened on the spot.
			p, err := c.dial()
			if err != nil {
				return fmt.Errorf("client %d: %w", who[k], err)
			}
			ports = append(ports, p)
			continue
		}
		p, _ := packet.ParseTCP(evs[k].Data)
		ports = append(ports, p.Tuple().Src.Port)
	}
	took[0] += c.clock() - began
	for k := range who {
		v := c.peers[ports[k]]
		v.ack = v.ack.Add(requestSize)
		c.evs(k).put(&packet.Segment{
			Src: c.srv, Dst: packet.Endpoint{Addr: packet.AddrFrom(scaleSNIP), Port: ports[k]}, Seq: v.seq, Ack: v.ack, Flags: packet.ACK | packet.PSH, Window: 500,
		}, reply)
		v.seq = v.seq.Add(packet.Size(len(reply)))
	}
	began = c.clock()
	for k := range who {
		c.step(&evs[k], c.evs(k))
		if evs[k].Verdict != engine.Rewrite {
			return fmt.Errorf("%w: a response to client %d is not passed on", errScale, who[k])
		}
	}
	took[1] += c.clock() - began
	for k, i := range who {
		c.seq[i], c.ack[i] = c.seq[i].Add(requestSize), c.ack[i].Add(packet.Size(len(reply)))
		c.evs(k).put(&packet.Segment{Src: c.endpoint(i), Dst: c.vip, Seq: c.seq[i], Ack: c.ack[i], Flags: packet.ACK, Window: 500}, nil)
	}
	began = c.clock()
	for k := range who {
		c.step(&evs[k], c.evs(k))
	}
	took[2] += c.clock() - began
	return nil
}

var (
	paddedRequest = pad(theRequest, requestSize)
	bufs          = make([]event, inParallel)
)

func (c *crowd) evs(k int) *event { return &bufs[k] }

// dial answers the SYN that the engine has just sent.
func (c *crowd) dial() (port uint16, err error) {
	if c.out.Len() != 1 {
		return 0, fmt.Errorf("%w: neither passed on nor a new connection", errScale)
	}
	p, _ := packet.ParseTCP(c.out.Packet(0))
	if p.Flags() != packet.SYN {
		return 0, fmt.Errorf("%w: flags %v instead of a SYN", errScale, p.Flags())
	}
	port = p.Tuple().Src.Port
	v := &peer{seq: packet.Seq(port) << 16, ack: p.Seq().Add(1)}
	c.peers[port] = v
	var opts [16]byte
	b := event{}
	b.put(&packet.Segment{
		Src: c.srv, Dst: p.Tuple().Src, Seq: v.seq, Ack: v.ack, Flags: packet.SYN | packet.ACK, Window: 64000,
		Options: packet.AppendSYNOptions(opts[:0], packet.SYNOptions{MSS: 1400, WindowScale: 7, SACKPermitted: true}),
	}, nil)
	v.seq = v.seq.Add(1)
	var ev engine.Event
	c.step(&ev, &b)
	return port, nil
}

// processor is the time that this thread has had a processor.
func processor() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return time.Duration(ts.Nano())
}

// clock is processor while exchanges are timed: it takes longer than a step.
func (c *crowd) clock() time.Duration {
	if !c.timed {
		return 0
	}
	return processor()
}

// scale measures one size.
func scale(flows int, dir string) (scaled, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for k := range bufs {
		bufs[k].buf = make([]byte, 0, 2048)
	}
	s := scaled{Flows: flows}
	c, free, err := newCrowd(flows, dir)
	if err != nil {
		return s, err
	}
	defer free()
	reply := response()
	began := processor()
	for i := range flows {
		if err := c.open(i, reply); err != nil {
			return s, err
		}
		c.now += 20_000
	}
	s.Opened = float64((processor() - began).Nanoseconds()) / float64(flows)
	if u := c.e.Usage(); u.Clients != flows || u.Held != 0 {
		return s, fmt.Errorf("%w: %d clients and %d held of %d", errScale, u.Clients, u.Held, flows)
	}
	runtime.GC()
	debug.FreeOSMemory()
	if s.Memory, err = resident(os.Getpid()); err != nil {
		return s, err
	}
	s.Memory -= int64(flows) * 8 // of the driver
	c.timed = true
	rnd := rand.New(rand.NewPCG(1, 2))
	few := make([]int, min(1000, flows))
	for i := range few {
		few[i] = rnd.IntN(flows)
	}
	for _, m := range []struct {
		to    *float64
		draw  func() int
		blind bool
	}{
		{&s.Few, func() int { return few[rnd.IntN(len(few))] }, false},
		{&s.All, func() int { return rnd.IntN(flows) }, false},
		{&s.Blind, func() int { return rnd.IntN(flows) }, true},
	} {
		c.blind = m.blind
		for round := range 12 {
			var took [3]time.Duration
			const batches = 400
			for range batches {
				who := make([]int, 0, inParallel)
				for len(who) < inParallel {
					if i := m.draw(); !slices.Contains(who, i) {
						who = append(who, i)
					}
				}
				if err := c.exchange(who, reply, &took); err != nil {
					return s, err
				}
				c.now += 1000_000
			}
			ns := float64((took[0] + took[1] + took[2]).Nanoseconds()) / (3 * inParallel * batches)
			if round > 1 && (*m.to == 0 || ns < *m.to) {
				*m.to = ns // the first rounds warm up
			}
		}
	}
	// What the clock alone costs while nobody speaks.
	var ev engine.Event
	began = processor()
	const seconds = 20
	for range seconds * 250 {
		c.now += 4_000_000
		c.out.Reset()
		ev = engine.Event{Kind: engine.Tick}
		c.e.Step(c.now, &ev, &c.out)
	}
	s.Idle = float64((processor() - began).Nanoseconds()) / seconds
	return s, nil
}
