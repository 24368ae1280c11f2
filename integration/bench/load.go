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
	Path        string
	Connections int
	Close       bool // a connection for each request
	Warm        time.Duration
	Measure     time.Duration
}

// args is the command line of a job, for runLoad.
func (j loadJob) args() []string {
	var sources []string
	for _, s := range j.Sources {
		sources = append(sources, s.String())
	}
	return []string{
		"load", "-target", j.Target.String(), "-sources", strings.Join(sources, ","), "-path", j.Path,
		"-connections", strconv.Itoa(j.Connections), "-close=" + strconv.FormatBool(j.Close),
		"-warm", j.Warm.String(), "-measure", j.Measure.String(),
	}
}

// loadResult is what the load generator has seen in the measured time.
type loadResult struct {
	Requests uint64 `json:"requests"` // complete responses
	Bytes    uint64 `json:"bytes"`    // received, heads included
	// AllRequests and AllBytes are the same with the warm-up: what others
	// count while the load generator lives belongs to these.
	AllRequests uint64 `json:"all_requests"`
	AllBytes    uint64 `json:"all_bytes"`

	Errors  uint64        `json:"errors"`          // of all
	Error   string        `json:"error,omitempty"` // the first one
	Elapsed time.Duration `json:"elapsed"`
	P50     time.Duration `json:"p50"` // of complete responses
	P99     time.Duration `json:"p99"`
}

// runLoad is the load generator's main function. It writes a loadResult.
func runLoad(args []string, stdout io.Writer) error {
	var j loadJob
	var sources string
	fs := flag.NewFlagSet("load", flag.ContinueOnError)
	fs.TextVar(&j.Target, "target", netip.AddrPort{}, "address and port")
	fs.StringVar(&sources, "sources", "", "client addresses")
	fs.StringVar(&j.Path, "path", "/", "path of the request")
	fs.IntVar(&j.Connections, "connections", 1, "connections at once")
	fs.BoolVar(&j.Close, "close", false, "one connection for each request")
	fs.DurationVar(&j.Warm, "warm", 0, "time before what is measured")
	fs.DurationVar(&j.Measure, "measure", time.Second, "time that is measured")
	if err := fs.Parse(args); err != nil {
		return err
	}
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
	begun   int64 // when its request began, or its connection in close mode
	missing int   // bytes of the response that are still to come; -1: the head is not complete
	sent    bool
	whole   bool   // the response is complete, the end of the connection is awaited
	head    []byte // of a response, while it is incomplete
}

type generator struct {
	job     loadJob
	request []byte
	epoll   int
	clients []client
	next    int // of the sources
	res     loadResult
	hist    histogram
	buf     []byte
}

func (j loadJob) run() (loadResult, error) {
	runtime.LockOSThread()
	g := &generator{job: j, buf: make([]byte, 256<<10), clients: make([]client, j.Connections)}
	connection := ""
	if j.Close {
		connection = "Connection: close\r\n"
	}
	g.request = fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: bench\r\nAccept: */*\r\n%s\r\n", j.Path, j.Target, connection)
	var err error
	if g.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return g.res, err
	}
	defer unix.Close(g.epoll)
	start := time.Now()
	clock := func() int64 { return int64(time.Since(start)) }
	for i := range g.clients {
		if err := g.connect(i, clock()); err != nil {
			return g.res, err
		}
	}
	events := make([]unix.EpollEvent, 256)
	measuring := false
	var warm loadResult
	from, until := int64(j.Warm), int64(j.Warm+j.Measure)
	for {
		n, err := unix.EpollWait(g.epoll, events, 100)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return g.res, err
		}
		now := clock()
		switch {
		case measuring && now >= until:
			g.res.Elapsed = time.Duration(now - from)
			g.res.AllRequests, g.res.AllBytes = g.res.Requests, g.res.Bytes
			g.res.Requests -= warm.Requests
			g.res.Bytes -= warm.Bytes
			g.res.P50, g.res.P99 = g.hist.quantile(0.5), g.hist.quantile(0.99)
			return g.res, nil
		case !measuring && now >= from:
			// What went wrong while the connections were made counts.
			measuring, from, until = true, now, now+int64(j.Measure)
			warm, g.hist = g.res, histogram{}
		}
		for i := range max(n, 0) {
			c := int(events[i].Fd)
			now := clock()
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
	*c = client{fd: fd, begun: now, missing: -1, head: c.head[:0]}
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
		ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(i)}
		if err := unix.EpollCtl(g.epoll, unix.EPOLL_CTL_MOD, c.fd, &ev); err != nil {
			return err
		}
		return g.ask(c)
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
	g.res.Bytes += uint64(n)
	if c.whole {
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
	if g.job.Close {
		c.whole = true
		return nil
	}
	c.begun = now
	return g.ask(c)
}

// ask sends the request. It is small: it fits into an empty socket.
func (g *generator) ask(c *client) error {
	c.sent = true
	n, err := unix.Write(c.fd, g.request)
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if n < len(g.request) {
		return errors.New("a socket without room for a request")
	}
	return nil
}

var (
	headEnd       = []byte("\r\n\r\n")
	statusOK      = []byte("HTTP/1.1 200 ")
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
	if !bytes.HasPrefix(head, statusOK) {
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
	rank := uint64(q * float64(h.n))
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
