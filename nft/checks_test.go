// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseSockets(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("skipped: the lines are those of a little-endian machine")
	}
	const lines = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1 0000000000000000 100 0 0 10 0
   1: 0A7100CB:0050 026412C6:D431 01 00000000:00000000 00:00000000 00000000     0        0 77 1 0000000000000000 20 4 30 10 -1
   2: B80D0120000000000000000010000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 78 1 0000000000000000 100 0 0 10 0
   3: 0000000000000000FFFF00000A7100CB:0050 00000000000000000000000000000000:0000 06 00000000:00000000 00:00000000 00000000     0        0 0 1 0000000000000000 100 0 0 10 0
`
	got, err := parseSockets(strings.NewReader(lines))
	if err != nil {
		t.Fatal(err)
	}
	want := []socket{
		{netip.MustParseAddrPort("127.0.0.1:8080"), 10, 12345},
		{netip.MustParseAddrPort("203.0.113.10:80"), 1, 77},
		{netip.MustParseAddrPort("[2001:db8::10]:80"), 10, 78},
		{netip.MustParseAddrPort("203.0.113.10:80"), 6, 0},
	}
	if !slices.Equal(got, want) {
		t.Fatalf("got %v\nwant %v", got, want)
	}
	if _, err := parseSockets(strings.NewReader("\n 0: zz:1 x 0A x x x x x 5\n")); err == nil {
		t.Error("no error for a damaged line")
	}
}

func TestLocalPorts(t *testing.T) {
	ap, a := netip.MustParseAddrPort, netip.MustParseAddr
	conn := func(s string) socket { return socket{local: ap(s), state: 1} }
	listen := func(s string) socket { return socket{local: ap(s), state: tcpListen} }
	snips := []netip.Addr{a("198.51.100.1"), a("2001:db8::1")}
	for name, c := range map[string]struct {
		socks  []socket
		snips  []netip.Addr
		used   []uint16
		refuse bool
	}{
		"nothing":                     {nil, snips, nil, false},
		"connection":                  {[]socket{conn("198.51.100.1:20001"), conn("198.51.100.1:20000"), conn("198.51.100.1:20001")}, snips, []uint16{20000, 20001}, false},
		"outside":                     {[]socket{conn("198.51.100.1:9999"), listen("0.0.0.0:32768")}, snips, nil, false},
		"connection of other address": {[]socket{conn("198.18.0.1:20000")}, snips, nil, false},
		"the same, SNIPs unknown":     {[]socket{conn("198.18.0.1:20000")}, nil, []uint16{20000}, false},
		"listener":                    {[]socket{listen("198.51.100.1:20000")}, snips, nil, true},
		"wildcard listener":           {[]socket{listen("0.0.0.0:20000")}, snips, nil, true},
		"IPv6 wildcard listener":      {[]socket{listen("[::]:20000")}, snips, nil, true},
		"listener on another address": {[]socket{listen("198.18.0.1:20000")}, snips, nil, false},
		"the same, SNIPs not known":   {[]socket{listen("198.18.0.1:20000")}, nil, nil, true},
		"loopback listener":           {[]socket{listen("127.0.0.1:11211"), listen("[::1]:11211")}, nil, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			used, err := localPorts(c.socks, 10240, 32767, c.snips)
			if !slices.Equal(used, c.used) || errors.Is(err, ErrListener) != c.refuse {
				t.Fatalf("got %v, %v", used, err)
			}
		})
	}
}

func TestQueueFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nfnetlink_queue")
	if err := checkQueues(path, 1, 10, nil); err != nil {
		t.Fatalf("no file: %v", err)
	}
	const lines = "    5  4242      0 2 65531     0     0        1  1\n22275   999999999     3 2 65531     0     0      100  1\n"
	if err := os.WriteFile(path, []byte(lines), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := checkQueues(path, 22276, 3, nil); err != nil {
		t.Errorf("free numbers: %v", err)
	}
	if err := checkQueues(path, 22272, 3, nil); err != nil {
		t.Errorf("free numbers: %v", err)
	}
	if err := checkQueues(path, 22272, 4, nil); !errors.Is(err, ErrQueueInUse) || !strings.Contains(err.Error(), "22275") {
		t.Errorf("a number in use: %v", err)
	}
}

// listener opens a TCP listener in the thread's namespace.
func listener(t *testing.T, addr string, v6only bool) {
	t.Helper()
	a := netip.MustParseAddrPort(addr)
	family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(a.Port())})
	if a.Addr().Is6() {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	} else {
		sa.(*unix.SockaddrInet4).Addr = a.Addr().As4()
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if v6only {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(unix.Bind(fd, sa), unix.Listen(fd, 1)); err != nil {
		t.Fatal(err)
	}
}

// TestListeners: the kernel's list of listeners is what /proc says of them, of
// both families, and has no connections in it.
func TestListeners(t *testing.T) {
	newNetns(t)
	address(t, "lo", "203.0.113.10/32", "2001:db8:9::10/128")
	for i, a := range []string{"203.0.113.10:80", "0.0.0.0:81", "[2001:db8:9::10]:82", "[::]:83", "127.0.0.1:84"} {
		listener(t, a, i == 3)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: 80, Addr: [4]byte{203, 0, 113, 10}}); err != nil {
		t.Fatal(err)
	}
	byText := func(a, b socket) int { return strings.Compare(a.local.String(), b.local.String()) }
	want, err := tcpSockets(procNet)
	if err != nil {
		t.Fatal(err)
	}
	if len(want) < 7 {
		t.Fatalf("/proc has %d sockets, want listeners and connections: %v", len(want), want)
	}
	want = slices.DeleteFunc(want, func(s socket) bool { return !s.listens() })
	slices.SortFunc(want, byText)
	for name, list := range map[string]func() ([]socket, error){"SOCK_DIAG": dumpListeners, "either": tcpListeners} {
		got, err := list()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		slices.SortFunc(got, byText)
		if len(got) != 5 || !slices.Equal(got, want) {
			t.Errorf("%s: %v\nwant %v", name, got, want)
		}
	}
	for _, b := range [][]byte{nil, make([]byte, diagMessageLen-1), make([]byte, diagMessageLen)} {
		if s, ok := parseDiag(b); ok {
			t.Errorf("%d bytes of nothing are taken for %v", len(b), s)
		}
	}
}

// TestNoVIPs: where there is nothing to compare, no socket is looked at. Most
// reloads are so.
func TestNoVIPs(t *testing.T) {
	asked := 0
	list := func() ([]socket, error) { asked++; return nil, errors.New("asked") }
	if err := checkVIPListeners(nil, list); err != nil || asked != 0 {
		t.Errorf("no VIPs: %v, asked %d times", err, asked)
	}
	if err := checkVIPListeners([]netip.AddrPort{netip.MustParseAddrPort("203.0.113.10:80")}, list); err == nil || asked != 1 {
		t.Errorf("a VIP: %v, asked %d times", err, asked)
	}
}

func TestVIPListeners(t *testing.T) {
	local4, local6 := "203.0.113.10:80", "[2001:db8:9::10]:80"
	routed := "198.51.100.99:80"
	for name, c := range map[string]struct {
		listen string
		v6only bool
		vip    string
		refuse bool
	}{
		"the address":                 {local4, false, local4, true},
		"the address, IPv6":           {local6, false, local6, true},
		"another port":                {"203.0.113.10:81", false, local4, false},
		"another address":             {"127.0.0.1:80", false, local4, false},
		"wildcard":                    {"0.0.0.0:80", false, local4, true},
		"wildcard, VIP of IPv6":       {"0.0.0.0:80", false, local6, false},
		"wildcard, VIP routed":        {"0.0.0.0:80", false, routed, false},
		"IPv6 wildcard":               {"[::]:80", true, local6, true},
		"dual wildcard, VIP of IPv4":  {"[::]:80", false, local4, true},
		"v6only wildcard, VIP of v4":  {"[::]:80", true, local4, false},
		"dual wildcard, VIP routed":   {"[::]:80", false, routed, false},
		"address of a VIP not served": {"203.0.113.10:80", false, routed, false},
	} {
		t.Run(name, func(t *testing.T) {
			newNetns(t)
			address(t, "lo", "203.0.113.10/32", "2001:db8:9::10/128")
			vips := []netip.AddrPort{netip.MustParseAddrPort(c.vip)}
			if err := CheckVIPListeners(vips); err != nil {
				t.Fatalf("before anybody listens: %v", err)
			}
			listener(t, c.listen, c.v6only)
			err := CheckVIPListeners(vips)
			if errors.Is(err, ErrListener) != c.refuse {
				t.Fatalf("got %v", err)
			}
			if err != nil && (!strings.Contains(err.Error(), c.vip) || !strings.Contains(err.Error(), "pid ")) {
				t.Errorf("the error does not name the VIP and the program: %v", err)
			}
		})
	}
}

func TestLocalPortsInRange(t *testing.T) {
	newNetns(t)
	if used, err := LocalPortsInRange(10240, 32767); err != nil || used != nil {
		t.Fatalf("got %v, %v in an empty namespace", used, err)
	}
	listener(t, "0.0.0.0:20000", false)
	if _, err := LocalPortsInRange(10240, 32767, snip4); !errors.Is(err, ErrListener) || !strings.Contains(err.Error(), "20000") {
		t.Fatalf("got %v", err)
	}
}

func TestCheckForwarding(t *testing.T) {
	l := newLab(t)
	_ = l
	p := labParams()
	if err := CheckForwarding(p); err != nil {
		t.Fatal(err)
	}
	sysctl(t, "net.ipv4.ip_forward", "0")
	if err := CheckForwarding(p); !errors.Is(err, ErrForwarding) || !strings.Contains(err.Error(), forwardCommand4) || strings.Contains(err.Error(), "IPv6") {
		t.Fatalf("IPv4 off: %v", err)
	}
	sysctl(t, "net.ipv4.conf.cli.forwarding", "1")
	sysctl(t, "net.ipv4.conf.srv.forwarding", "1")
	if err := CheckForwarding(p, "cli", "srv"); err != nil {
		t.Fatalf("on for each interface: %v", err)
	}
	sysctl(t, "net.ipv6.conf.all.forwarding", "0")
	if err := CheckForwarding(p, "cli", "srv"); !errors.Is(err, ErrForwarding) || !strings.Contains(err.Error(), forwardCommand6) {
		t.Fatalf("IPv6 off: %v", err)
	}
	for i := range p.Servers { // on the router itself
		p.Servers[i] = netip.AddrPortFrom([]netip.Addr{snip4, snip6}[i], 8080)
	}
	if err := CheckForwarding(p); err != nil {
		t.Fatalf("servers on the router itself: %v", err)
	}
}

func TestInterfaces(t *testing.T) {
	newLab(t)
	p := labParams()
	if got, err := Interfaces(p); err != nil || !slices.Equal(got, []string{"cli", "srv"}) {
		t.Fatalf("got %v, %v", got, err)
	}
	p.VIPs, p.SNIPs = nil, nil
	p.Servers = p.Servers[1:]
	if got, err := Interfaces(p); err != nil || !slices.Equal(got, []string{"srv"}) {
		t.Fatalf("servers only: got %v, %v", got, err)
	}
}

// TestHostSysctls applies and restores on the kernel, in a namespace.
func TestHostSysctls(t *testing.T) {
	newLab(t)
	sysctl(t, "net.ipv4.conf.srv.rp_filter", "1")
	names := []string{"net.ipv4.conf.cli.accept_local", "net.ipv4.conf.srv.rp_filter", "net.ipv4.ip_local_reserved_ports"}
	before := hostSysctls.all(t, names...)
	p, dir := labParams(), t.TempDir()
	if _, err := ApplySysctls(dir, Needs(p, "cli", "srv")); err != nil {
		t.Fatal(err)
	}
	if got, want := hostSysctls.all(t, names...), "1 | 2 | 10240-32767"; got != want {
		t.Fatalf("got %s, want %s", got, want)
	}
	if got, err := StrictInterfaces(dir, "cli", "srv"); err != nil || !slices.Equal(got, []string{"srv"}) {
		t.Fatalf("strict: %v, %v", got, err)
	}
	j, err := OpenJournal(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Restore(); err != nil {
		t.Fatal(err)
	}
	if got := hostSysctls.all(t, names...); got != before {
		t.Fatalf("restored %q, want %q", got, before)
	}
}

// TestCheckTransparent: a server may be its own VIP, unless on this host.
func TestCheckTransparent(t *testing.T) {
	newRouter(t)
	p := citizenParams()
	if err := CheckTransparent(p); err != nil {
		t.Error(err)
	}
	p.VIPs = append(p.VIPs, p.Servers[0])
	if err := CheckTransparent(p); err != nil {
		t.Errorf("a server on another host: %v", err)
	}
	p.Servers = append(p.Servers, p.VIPs[0])
	if err := CheckTransparent(p); !errors.Is(err, ErrLocalServer) || !strings.Contains(err.Error(), "203.0.113.10:80") {
		t.Errorf("a server on this host: %v", err)
	}
}
