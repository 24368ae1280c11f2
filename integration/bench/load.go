// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/bits"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// This file is the load generator. It runs as a process of its own in the
// client's namespace: a closed loop of some connections on one thread, each
// of which has one request under way. It speaks to the kernel directly,
// because what it costs is taken from those that it measures: both share the
// machine's processors.

// loadJob says what the load generator does.
type loadJob struct {
	Target      netip.AddrPort
	Sources     []netip.Addr // client addresses, taken in turn; empty: the kernel's choice
	Paths       []string     // what is asked for, in turn
	Connections int
	Close       bool // a connection for each request
	HTTP10      bool // of HTTP/1.0, as a client that knows nothing else
	Upload      int  // bytes of a body that goes with each request, 0 = none
	// Rate is how many requests are made in a second, whether or not the ones
	// before are answered; 0: each connection asks when it has its answer. The
	// time of a request counts from when it was due, not from when a
	// connection was free for it.
	Rate    int
	Warm    time.Duration // after every connection has had one answer
	Measure time.Duration
}

// args is the command line of a job, for runLoad.
func (j loadJob) args() []string {
	var sources []string
	for _, s := range j.Sources {
		sources = append(sources, s.String())
	}
	return []string{
		"load", "-target", j.Target.String(), "-sources", strings.Join(sources, ","), "-paths", strings.Join(j.Paths, ","),
		"-connections", strconv.Itoa(j.Connections), "-close=" + strconv.FormatBool(j.Close), "-http10=" + strconv.FormatBool(j.HTTP10),
		"-upload", strconv.Itoa(j.Upload), "-rate", strconv.Itoa(j.Rate), "-warm", j.Warm.String(), "-measure", j.Measure.String(),
	}
}

// loadResult is what the load generator has seen in the measured time.
type loadResult struct {
	Requests uint64 `json:"requests"` // complete responses
	Bytes    uint64 `json:"bytes"`    // received, heads included; of uploads: sent
	// AllRequests and AllBytes are the same with the warm-up: what others
	// count while the load generator lives belongs to these.
	AllRequests uint64 `json:"all_requests"`
	AllBytes    uint64 `json:"all_bytes"`

	Errors  uint64        `json:"errors"`          // of all
	Error   string        `json:"error,omitempty"` // the first one
	Elapsed time.Duration `json:"elapsed"`
	P50     time.Duration `json:"p50"` // of complete responses
	P99     time.Duration `json:"p99"`
	P999    time.Duration `json:"p999"`
	Max     time.Duration `json:"max"`
}

// runLoad is the load generator's main function. It writes a loadResult.
func runLoad(args []string, stdout io.Writer) error {
	var j loadJob
	var sources, paths string
	fs := flag.NewFlagSet("load", flag.ContinueOnError)
	fs.TextVar(&j.Target, "target", netip.AddrPort{}, "address and port")
	fs.StringVar(&sources, "sources", "", "client addresses")
	fs.StringVar(&paths, "paths", "/", "paths of the requests, comma-separated")
	fs.IntVar(&j.Connections, "connections", 1, "connections at once")
	fs.BoolVar(&j.Close, "close", false, "one connection for each request")
	fs.BoolVar(&j.HTTP10, "http10", false, "speak HTTP/1.0")
	fs.IntVar(&j.Upload, "upload", 0, "bytes of each request's body")
	fs.IntVar(&j.Rate, "rate", 0, "requests a second, 0: as fast as they are answered")
	fs.DurationVar(&j.Warm, "warm", 0, "time before what is measured")
	fs.DurationVar(&j.Measure, "measure", time.Second, "time that is measured")
	if err := fs.Parse(args); err != nil {
		return err
	}
	j.Paths = strings.Split(paths, ",")
	for s := range strings.SplitSeq(sources, ",") {
		if s == "" {
			continue
		}
		a, err := netip.ParseAddr(s)
		if err != nil {
			return err
		}
		j.Sources = append(j.Sources, a)
	}
	res, err := j.run()
	if err != nil {
		return err
	}
	return json.NewEncoder(stdout).Encode(res)
}

// client is one connection of the load generator.
type client struct {
	fd      int
	begun   int64  // when its request began, or its connection in close mode
	missing int    // bytes of the response that are still to come; -1: the head is not complete
	unsent  []byte // of the request, still to go
	sent    bool
	served  bool   // has had one response
	idle    bool   // waits for a request that is due
	whole   bool   // the response is complete, the end of the connection is awaited
	polled  uint32 // what epoll waits for
	head    []byte // of a response, while it is incomplete
}

type generator struct {
	job       loadJob
	requests  [][]byte // in turn; with an upload all of the request
	turn      int      // of the requests
	epoll     int
	clients   []client
	next      int // of the sources
	unserved  int // clients that have had no response yet
	connected int // clients that were begun; the others follow as these are served
	idle      []int32
	due       int64   // when the next request of a rate is due
	late      []int64 // requests that were due and that no connection was free for
	timer     int     // wakes for the next one
	res       loadResult
	hist      histogram
	buf       []byte
	clock     func() int64
}

// atOnce is how many connections are begun before those before them have had
// an answer, so that thousands do not overrun anybody's backlog.
const atOnce = 256

func (j loadJob) run() (loadResult, error) {
	runtime.LockOSThread()
	g := &generator{job: j, buf: make([]byte, 256<<10), clients: make([]client, j.Connections), unserved: j.Connections}
	g.compose()
	var err error
	if g.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return g.res, err
	}
	defer unix.Close(g.epoll)
	if g.timer, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK); err != nil {
		return g.res, err
	}
	defer unix.Close(g.timer)
	if err := unix.EpollCtl(g.epoll, unix.EPOLL_CTL_ADD, g.timer, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: -1}); err != nil {
		return g.res, err
	}
	start := time.Now()
	g.clock = func() int64 { return int64(time.Since(start)) }
	for range min(j.Connections, atOnce) {
		if err := g.more(); err != nil {
			return g.res, err
		}
	}
	events := make([]unix.EpollEvent, 256)
	measuring, warming := false, false
	var warm loadResult
	var from, until int64
	for {
		n, err := unix.EpollWait(g.epoll, events, 100)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return g.res, err
		}
		now := g.clock()
		switch {
		case measuring && now >= until:
			g.res.Elapsed = time.Duration(now - from)
			g.res.AllRequests, g.res.AllBytes = g.res.Requests, g.res.Bytes
			g.res.Requests -= warm.Requests
			g.res.Bytes -= warm.Bytes
			g.res.P50, g.res.P99 = g.hist.quantile(0.5), g.hist.quantile(0.99)
			g.res.P999, g.res.Max = g.hist.quantile(0.999), g.hist.quantile(1)
			return g.res, nil
		case measuring:
		case !warming && (g.unserved == 0 || g.res.Errors >= uint64(len(g.clients)) || now > int64(settle)):
			// Connections that nobody answers are counted as they fail, and
			// not waited for.
			warming, from = true, now+int64(j.Warm)
			if j.Rate > 0 {
				g.due = now
				if err := g.arm(now); err != nil {
					return g.res, err
				}
			}
		case warming && now >= from:
			// What went wrong while the connections were made counts.
			measuring, from, until = true, now, now+int64(j.Measure)
			warm, g.hist = g.res, histogram{}
		}
		for i := range max(n, 0) {
			c := int(events[i].Fd)
			now := g.clock()
			if c < 0 {
				if err := g.tick(now); err != nil {
					return g.res, err
				}
				continue
			}
			if err := g.ready(c, now); err != nil {
				g.trouble(err)
				_ = unix.Close(g.clients[c].fd)
				if err := g.connect(c, now); err != nil {
					return g.res, err
				}
			}
		}
	}
}

// settle bounds the time until every connection has had one answer.
const settle = 5 * time.Second

// compose makes the requests.
func (g *generator) compose() {
	j := &g.job
	method, version, more := "GET", "HTTP/1.1", ""
	var body []byte
	if j.HTTP10 {
		version = "HTTP/1.0"
	}
	if j.Close && !j.HTTP10 {
		more = "Connection: close\r\n"
	}
	if j.Upload > 0 {
		method, body = "POST", make([]byte, j.Upload)
		more += fmt.Sprintf("Content-Length: %d\r\n", j.Upload)
	}
	for _, p := range j.Paths {
		head := fmt.Appendf(nil, "%s %s %s\r\nHost: %s\r\nUser-Agent: bench\r\nAccept: */*\r\n%s\r\n", method, p, version, j.Target, more)
		g.requests = append(g.requests, append(head, body...))
	}
}

// more begins the next of the connections, if there is one.
func (g *generator) more() error {
	if g.connected == len(g.clients) {
		return nil
	}
	g.connected++
	return g.connect(g.connected-1, g.clock())
}

// arm sets the timer for the next request that is due.
func (g *generator) arm(now int64) error {
	v := unix.NsecToTimespec(max(g.due-now, 1))
	return unix.TimerfdSettime(g.timer, 0, &unix.ItimerSpec{Value: v}, nil)
}

// tick makes the requests that are due.
func (g *generator) tick(now int64) error {
	var b [8]byte
	_, _ = unix.Read(g.timer, b[:])
	for ; g.due <= now; g.due += int64(time.Second) / int64(g.job.Rate) {
		if len(g.idle) == 0 {
			g.late = append(g.late, g.due)
			continue
		}
		i := int(g.idle[0])
		g.idle = g.idle[1:]
		if err := g.begin(i, g.due); err != nil {
			return err
		}
	}
	return g.arm(now)
}

// begin has a free connection ask, for a request that was due at that time.
func (g *generator) begin(i int, due int64) error {
	c := &g.clients[i]
	c.begun, c.idle = due, false
	if err := g.ask(i); err != nil {
		g.trouble(err)
		_ = unix.Close(c.fd)
		return g.connect(i, due)
	}
	return nil
}

// free is called when a connection has its answer and may ask again.
func (g *generator) free(i int, now int64) error {
	c := &g.clients[i]
	switch {
	case g.job.Rate == 0:
		c.begun = now
		return g.ask(i)
	case len(g.late) > 0:
		due := g.late[0]
		g.late = g.late[1:]
		c.begun = due
		return g.ask(i)
	}
	c.idle = true
	g.idle = append(g.idle, int32(i))
	return nil
}

func (g *generator) trouble(err error) {
	if g.res.Errors++; g.res.Errors == 1 {
		g.res.Error = err.Error()
	}
}

// connect begins a connection. epoll knows it by its index.
func (g *generator) connect(i int, now int64) error {
	c := &g.clients[i]
	family := unix.AF_INET
	if g.job.Target.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	if c.idle {
		g.idle = slices.DeleteFunc(g.idle, func(n int32) bool { return n == int32(i) })
	}
	*c = client{fd: fd, begun: now, missing: -1, served: c.served, head: c.head[:0], polled: unix.EPOLLOUT}
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	if len(g.job.Sources) > 0 {
		// The port is chosen by connect, which knows the peer.
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
		src := netip.AddrPortFrom(g.job.Sources[g.next], 0)
		g.next = (g.next + 1) % len(g.job.Sources)
		if err := unix.Bind(fd, sockaddr(src)); err != nil {
			return fmt.Errorf("bind to %s: %w", src, err)
		}
	}
	if err := unix.Connect(fd, sockaddr(g.job.Target)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return fmt.Errorf("connect to %s: %w", g.job.Target, err)
	}
	ev := unix.EpollEvent{Events: unix.EPOLLOUT, Fd: int32(i)}
	if err := unix.EpollCtl(g.epoll, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// ready goes on with a connection that can be written or read. An error means
// that the exchange failed.
func (g *generator) ready(i int, now int64) error {
	c := &g.clients[i]
	if !c.sent {
		return g.ask(i)
	}
	if len(c.unsent) > 0 {
		return g.send(c, i)
	}
	n, err := unix.Read(c.fd, g.buf)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return nil
	case err != nil:
		return fmt.Errorf("read: %w", err)
	case n == 0 && c.whole:
		// One exchange on one connection is over.
		if err := unix.Close(c.fd); err != nil {
			return err
		}
		return g.connect(i, now)
	case n == 0:
		return errors.New("the connection ended before the response did")
	}
	if g.job.Upload == 0 {
		g.res.Bytes += uint64(n)
	}
	if c.whole || c.idle {
		return errors.New("bytes after the response")
	}
	data := g.buf[:n]
	if c.missing < 0 {
		rest, err := c.parse(data)
		if err != nil || c.missing < 0 {
			return err
		}
		data = rest
	}
	if len(data) > c.missing {
		return errors.New("bytes after the response")
	}
	if c.missing -= len(data); c.missing > 0 {
		return nil
	}
	g.res.Requests++
	g.hist.add(now - c.begun)
	c.missing, c.head = -1, c.head[:0]
	if !c.served {
		c.served = true
		g.unserved--
		if err := g.more(); err != nil {
			return err
		}
	}
	if g.job.Close {
		c.whole = true
		return nil
	}
	return g.free(i, now)
}

// ask sends a request, or as much of it as there is room for.
func (g *generator) ask(i int) error {
	c := &g.clients[i]
	c.sent = true
	c.unsent = g.requests[g.turn%len(g.requests)]
	g.turn++
	return g.send(c, i)
}

// send goes on with a request.
func (g *generator) send(c *client, i int) error {
	n, err := unix.Write(c.fd, c.unsent)
	if err != nil && !errors.Is(err, unix.EAGAIN) {
		return fmt.Errorf("write: %w", err)
	}
	c.unsent = c.unsent[max(n, 0):]
	want := uint32(unix.EPOLLIN)
	if g.job.Upload > 0 {
		g.res.Bytes += uint64(max(n, 0))
	}
	if len(c.unsent) > 0 {
		want = unix.EPOLLOUT
	}
	if c.polled == want {
		return nil
	}
	c.polled = want
	return unix.EpollCtl(g.epoll, unix.EPOLL_CTL_MOD, c.fd, &unix.EpollEvent{Events: want, Fd: int32(i)})
}

var (
	headEnd       = []byte("\r\n\r\n")
	statusOK      = []byte(" 200 ") // behind the version
	contentLength = []byte("\r\nContent-Length: ")
	contentLower  = []byte("\r\ncontent-length: ")
)

// parse takes in the head of a response. It sets missing when the head is
// complete, and returns the bytes behind it.
func (c *client) parse(data []byte) ([]byte, error) {
	head := data
	if len(c.head) > 0 {
		c.head = append(c.head, data...)
		head = c.head
	}
	end := bytes.Index(head, headEnd)
	if end < 0 {
		if len(c.head) == 0 {
			c.head = append(c.head, data...)
		}
		return nil, nil
	}
	if len(head) < len("HTTP/1.1 200 ") || !bytes.HasPrefix(head, []byte("HTTP/1.")) || !bytes.HasPrefix(head[len("HTTP/1.1"):], statusOK) {
		return nil, fmt.Errorf("answered with %.40q", head)
	}
	at := bytes.Index(head[:end], contentLength)
	if at < 0 {
		at = bytes.Index(head[:end], contentLower)
	}
	if at < 0 {
		return nil, errors.New("a response without Content-Length")
	}
	c.missing = 0
	for _, b := range head[at+len(contentLength) : end] {
		if b < '0' || b > '9' {
			break
		}
		c.missing = c.missing*10 + int(b-'0')
	}
	return head[end+len(headEnd):], nil
}

// histogram counts durations with an error below 2 %: for each power of two of
// nanoseconds 64 buckets.
type histogram struct {
	n      uint64
	counts [64 * 64]uint32
}

const subBits = 6

func (h *histogram) add(ns int64) {
	h.n++
	h.counts[bucket(uint64(max(ns, 1)))]++
}

func bucket(v uint64) int {
	exp := bits.Len64(v) - 1
	if exp < subBits {
		return int(v)
	}
	return (exp-subBits+1)<<subBits | int(v>>(exp-subBits)&(1<<subBits-1))
}

// quantile returns the lower end of the bucket that has it.
func (h *histogram) quantile(q float64) time.Duration {
	rank := min(uint64(q*float64(h.n)), max(h.n, 1)-1)
	sum := uint64(0)
	for i, c := range h.counts {
		if sum += uint64(c); sum > rank {
			exp := i >> subBits
			if exp == 0 {
				return time.Duration(i)
			}
			return time.Duration(uint64(1<<subBits|i&(1<<subBits-1)) << (exp - 1))
		}
	}
	return 0
}
