// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/internal/require"
)

// TestCounters: what the lab counts is what has happened, seen with one
// exchange of known size.
func TestCounters(t *testing.T) {
	l := newLab(t)
	a, b := l.Host("a"), l.Host("b")
	aNet, bNet := netip.MustParsePrefix("198.18.0.1/24"), netip.MustParsePrefix("198.18.0.2/24")
	if _, err := l.Link(a, b, []netip.Prefix{aNet}, []netip.Prefix{bNet}, LinkOptions{}); err != nil {
		t.Fatal(err)
	}
	ln, err := b.Listen("tcp", "198.18.0.2:80")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	before, err := b.Traffic("a")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := a.Dial(testContext(t), "tcp", "198.18.0.2:80")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	peer, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	if _, err := io.WriteString(conn, strings.Repeat("x", 1000)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(peer, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	after, err := b.Traffic("a")
	if err != nil {
		t.Fatal(err)
	}
	// SYN, ACK and data came, SYN-ACK went; ARP and the last ACK are not
	// counted on.
	if d := after.Since(before); d.InPackets < 3 || d.OutPackets < 1 || d.Packets() > 20 || d.InBytes < 1000 || d.InBytes > 3000 {
		t.Errorf("traffic %+v", d)
	}
	if _, err := b.Traffic("none"); err == nil {
		t.Error("an interface that does not exist has counters")
	}

	client := netip.MustParseAddrPort(conn.LocalAddr().String())
	server := netip.MustParseAddrPort("198.18.0.2:80")
	socks, err := b.Sockets()
	if err != nil {
		t.Fatal(err)
	}
	var listening, established int
	for _, s := range socks {
		switch {
		case s.State == TCPListen && s.Local == server:
			listening++
		case s.State == TCPEstablished && s.Local == server && s.Remote == client:
			established++
		default:
			t.Errorf("socket %+v", s)
		}
	}
	if listening != 1 || established != 1 {
		t.Errorf("%d listening, %d established: %+v", listening, established, socks)
	}
	for h, want := range map[*Host]int{a: 0, b: 1} {
		if n, err := h.Accepted(); err != nil || n != want {
			t.Errorf("host %s accepted %d connections, %v; want %d", h.Name(), n, err, want)
		}
	}
	if qs, err := a.PacketQueues(); err != nil || len(qs) != 0 {
		t.Errorf("queues %v, %v; want none", qs, err)
	}
}

func TestProcessorTime(t *testing.T) {
	l := newLab(t)
	h := l.Host("a")
	p, err := h.Start(h.Command("/bin/sh", "-c", "while :; do :; done"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		cpu, err := p.CPU()
		if err != nil {
			t.Fatal(err)
		}
		if cpu > 20*time.Millisecond {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("a busy loop used %v", cpu)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// TestApache: it serves files of both families and logs what it served.
func TestApache(t *testing.T) {
	require.Tool(t, "apache2")
	l := newLab(t)
	h := l.Host("a")
	root, err := l.Subdir("root")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "x.txt"), []byte("hello"), 0o644); err != nil {
		t.Fatal(err)
	}
	a, err := Apache(h, ApacheOptions{Addrs: []netip.AddrPort{
		netip.MustParseAddrPort("127.0.0.1:80"), netip.MustParseAddrPort("[::1]:80"),
	}, Root: root})
	if err != nil {
		t.Fatal(err)
	}
	client := h.HTTPClient(HTTPClientOptions{})
	defer client.CloseIdleConnections()
	for _, url := range []string{"http://127.0.0.1/x.txt", "http://[::1]/x.txt", "http://127.0.0.1/x.txt"} {
		resp, err := client.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(b) != "hello" {
			t.Errorf("GET %s: %s, %q, %v", url, resp.Status, b, err)
		}
	}
	ctx := testContext(t)
	for {
		as, err := a.Accesses()
		if err != nil {
			t.Fatal(err)
		}
		if len(as) == 3 {
			// Lines of different connections come in any order.
			again := 0
			for _, x := range as {
				if x.Path != "/x.txt" || x.Status != 200 || x.BodyBytes != 5 || x.Method != "GET" || x.Protocol != "HTTP/1.1" {
					t.Errorf("access %+v", x)
				}
				if x.Request == 2 && x.Remote.Addr() == netip.MustParseAddr("127.0.0.1") {
					again++
				}
			}
			if again != 1 {
				t.Errorf("%d second requests on a connection: %+v", again, as)
			}
			break
		}
		select {
		case <-ctx.Done():
			t.Fatalf("accesses %+v", as)
		case <-time.After(10 * time.Millisecond):
		}
	}
	if err := a.Stop(); err != nil {
		t.Error(err)
	}
}
