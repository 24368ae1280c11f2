// SPDX-License-Identifier: Apache-2.0

package r1

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
)

// body is n bytes that follow from a nonce.
func body(nonce uint64, n int) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], nonce)
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(b)
	return b
}

// An origin answers /n/NONCE/SIZE with body(NONCE, SIZE). A POST must bring
// body(NONCE+1, its length). It counts what it has executed.
type origin struct {
	mu    sync.Mutex
	ran   map[uint64]int
	wrong []string
	// idle, if not nil, says how long an idle connection is kept.
	idle func() time.Duration
	// reset, when true, has each POST executed and then answered by a reset.
	reset atomic.Bool
}

func (o *origin) executed(nonce uint64) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.ran[nonce]
}

// handle executes a request and returns its answer's body, or nil.
func (o *origin) handle(q *http.Request) []byte {
	part := strings.Split(q.URL.Path, "/")
	if len(part) != 4 || part[1] != "n" {
		return nil
	}
	nonce, err := strconv.ParseUint(part[2], 10, 64)
	n, err2 := strconv.Atoi(part[3])
	if err != nil || err2 != nil {
		return nil
	}
	got, err := io.ReadAll(q.Body)
	if err != nil {
		return nil // broken off: nothing was executed
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ran[nonce]++
	if q.Method == http.MethodPost && !bytes.Equal(got, body(nonce+1, len(got))) {
		o.wrong = append(o.wrong, fmt.Sprintf("the server got wrong bytes in request %d", nonce))
	}
	return body(nonce, n)
}

// serve answers on one listener until that is closed. It is a plain loop over
// the kernel's TCP, so that when it closes is in its own hands.
func (o *origin) serve(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go o.conn(c)
	}
}

func (o *origin) conn(c net.Conn) {
	defer c.Close()
	br := bufio.NewReaderSize(c, 16<<10)
	for {
		q, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		_ = c.SetReadDeadline(time.Time{})
		b := o.handle(q)
		if b == nil {
			return
		}
		if o.reset.Load() && q.Method == http.MethodPost {
			if tcp, ok := c.(*net.TCPConn); ok {
				_ = tcp.SetLinger(0)
			}
			return
		}
		head := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", len(b))
		if _, err := c.Write(append([]byte(head), b...)); err != nil || q.Close {
			return
		}
		if o.idle != nil {
			_ = c.SetReadDeadline(time.Now().Add(o.idle()))
		}
	}
}

// fileSizes are the sizes of nginx's files, bytes.
var fileSizes = []int{1, 2, 100, 536, 1399, 1400, 1401, 2800, 4095, 4096, 10_000, 16_384, 20_001, 30_000, 40_000, 50_000, 60_000, 65_535, 65_536}

func fileNonce(n int) uint64 { return 1<<40 + uint64(n) }

// servers starts all servers on all server hosts.
func (r *rig) servers() {
	r.t.Helper()
	rnd := rand.New(rand.NewPCG(r.seed, 77))
	var mu sync.Mutex
	r.web, r.race, r.one = &origin{ran: map[uint64]int{}}, &origin{ran: map[uint64]int{}}, &origin{ran: map[uint64]int{}}
	r.race.idle = func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return time.Duration(rnd.Int64N(int64(20 * time.Millisecond)))
	}
	for i, h := range r.Servers {
		for _, s := range []struct {
			o    *origin
			addr netip.AddrPort
		}{
			{r.web, netip.AddrPortFrom(r.ServerAddr(i), portWeb)}, {r.web, netip.AddrPortFrom(r.ServerAddr6(i), portWeb)},
			{r.race, netip.AddrPortFrom(r.ServerAddr(i), portRace)}, {r.one, netip.AddrPortFrom(r.ServerAddr(i), portOne)},
		} {
			ln, err := h.Listen("tcp", s.addr.String())
			if err != nil {
				r.t.Fatal(err)
			}
			r.Lab.Cleanup(ln.Close)
			go s.o.serve(ln)
		}
	}
	require.Tool(r.t, "nginx")
	var err error
	if r.root, err = r.Lab.Subdir("root"); err != nil {
		r.t.Fatal(err)
	}
	for _, n := range fileSizes {
		if err := os.WriteFile(filepath.Join(r.root, strconv.Itoa(n)), body(fileNonce(n), n), 0o644); err != nil {
			r.t.Fatal(err)
		}
	}
	if _, err := lab.Nginx(r.Servers[0], lab.NginxOptions{
		Addrs: []netip.AddrPort{netip.AddrPortFrom(r.ServerAddr(0), portFiles)}, Root: r.root, NoAccessLog: true,
	}); err != nil {
		r.t.Fatal(err)
	}
}
