// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab/ladder"
	"github.com/weirgate/weir/internal/require"
)

func newLab(t *testing.T) *Lab {
	t.Helper()
	require.Netns(t)
	l, err := New("weirtest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return l
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func netnsInode(t *testing.T) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// TestDoLeavesThreadsAtHome: whatever happens inside of Do, no thread that
// others may run on stays in the namespace.
func TestDoLeavesThreadsAtHome(t *testing.T) {
	l := newLab(t)
	h := l.Host("a")
	home := netnsInode(t)
	want := errors.New("told")
	if err := h.Do(func() error {
		if netnsInode(t) == home {
			t.Error("Do does not enter the namespace")
		}
		return want
	}); !errors.Is(err, want) {
		t.Errorf("Do returns %v, want the function's error", err)
	}
	if err := h.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("a function that ends its goroutine is no error")
	}
	func() {
		defer func() {
			if p := recover(); p != "boom" {
				t.Errorf("recovered %v, want the function's panic", p)
			}
		}()
		_ = h.Do(func() error { panic("boom") })
	}()
	// Look at the namespace of many threads at once.
	const n = 64
	inodes := make(chan uint64, n)
	release := make(chan struct{})
	for range n {
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			var st unix.Stat_t
			_ = unix.Stat("/proc/thread-self/ns/net", &st)
			inodes <- st.Ino
			<-release
		}()
	}
	for range n {
		if got := <-inodes; got != home {
			t.Errorf("a thread is in namespace %d instead of %d", got, home)
		}
	}
	close(release)
}

// TestCommandOnlyThroughHost: a command that is started by its own method
// would run outside of the namespace, so it refuses.
func TestCommandOnlyThroughHost(t *testing.T) {
	l := newLab(t)
	h := l.Host("a")
	if err := h.Command("true").Run(); !errors.Is(err, errOutside) {
		t.Errorf("Run outside of the host: %v, want %v", err, errOutside)
	}
	if _, err := h.Run(testContext(t), "true"); err != nil {
		t.Error(err)
	}
	if _, err := h.Run(testContext(t), "/nonexistent/program"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a program that does not exist: %v", err)
	}
	out, err := h.Run(testContext(t), "readlink", "/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.TrimSpace(string(out)), fmt.Sprintf("net:[%d]", h.inode); got != want {
		t.Errorf("the program runs in %s, want %s", got, want)
	}
}

// TestCloseLeavesNothing: programs, grandchildren that escaped their parent,
// the namespace itself, names and scratch files are gone after Close.
func TestCloseLeavesNothing(t *testing.T) {
	witness := newLab(t).Host("witness")
	l := newLab(t)
	a := l.Host("a")
	if _, err := l.Link(witness, a, nil, nil, LinkOptions{}); err != nil {
		t.Fatal(err)
	}
	p, err := a.Start(a.Command("sleep", "1000"))
	if err != nil {
		t.Fatal(err)
	}
	// The subshell ends at once and leaves its child to the system's reaper.
	if _, err := a.Run(testContext(t), "sh", "-c", "setsid sleep 1000 </dev/null >/dev/null 2>&1 &"); err != nil {
		t.Fatal(err)
	}
	pids, err := a.Processes()
	if err != nil || len(pids) != 2 {
		t.Errorf("processes of the host: %v, %v; want two", pids, err)
	}
	names, err := l.Expose()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(namesDir, names["a"])); err != nil {
		t.Error(err)
	}
	ran := false
	l.Cleanup(func() error { ran = true; return errors.New("clean-up failed") })

	err = l.Close()
	if err == nil || !strings.Contains(err.Error(), "clean-up failed") {
		t.Errorf("close: %v, want the clean-up's error", err)
	}
	if again := l.Close(); again == nil || again.Error() != err.Error() {
		t.Errorf("second close: %v, want the same as the first", again)
	}
	l.closeErr = nil // the deferred close of this test is not to fail by it
	if !ran {
		t.Error("the clean-up did not run")
	}
	select {
	case <-p.Done():
	default:
		t.Error("a program outlives its lab")
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) && !isZombie(pid) {
			t.Errorf("process %d is still there", pid)
		}
	}
	if _, err := os.Stat(filepath.Join(namesDir, names["a"])); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the namespace keeps its name: %v", err)
	}
	if _, err := os.Stat(l.Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the scratch directory is still there: %v", err)
	}
	if _, err := l.NewHost("late"); !errors.Is(err, ErrClosed) {
		t.Errorf("a host in a closed lab: %v", err)
	}
	// A namespace takes its end of a veth pair along, and the kernel the other.
	deadline := time.Now().Add(20 * time.Second)
	for {
		_, err := witness.nl.LinkByName("a")
		var gone netlink.LinkNotFoundError
		if errors.As(err, &gone) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the namespace still exists: its link is there (%v)", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func isZombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && bytes.Contains(b, []byte(") Z "))
}

func TestLinkOptions(t *testing.T) {
	l := newLab(t)
	a, b := l.Host("a"), l.Host("b")
	prefixes := func(s ...string) (ps []netip.Prefix) {
		for _, p := range s {
			ps = append(ps, netip.MustParsePrefix(p))
		}
		return ps
	}
	k, err := l.Link(a, b, prefixes("198.18.1.1/30", "2001:db8:1::1/64"), prefixes("198.18.1.2/30", "2001:db8:1::2/64"),
		LinkOptions{MTU: 1280, NoOffload: true})
	if err != nil {
		t.Fatal(err)
	}
	if k.AName != "b" || k.BName != "a" {
		t.Errorf("interfaces %s and %s, want b and a", k.AName, k.BName)
	}
	second, err := l.Link(a, b, nil, nil, LinkOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if second.AName != "b-2" || second.BName != "a-2" {
		t.Errorf("second pair %s and %s, want b-2 and a-2", second.AName, second.BName)
	}
	for iface, want := range map[string]bool{"b": false, "b-2": true} {
		if on, err := a.Offload(iface); err != nil || on != want {
			t.Errorf("segmentation offload of %s: %v, %v; want %v", iface, on, err, want)
		}
	}
	for h, iface := range map[*Host]string{a: "b", b: "a"} {
		link, err := h.Netlink().LinkByName(iface)
		if err != nil || link.Attrs().MTU != 1280 {
			t.Errorf("%s: mtu %v, %v", h.Name(), link, err)
		}
	}
	if err := a.SetOffload("b", true); err != nil {
		t.Error(err)
	}
	// Both families work at once, without waiting for duplicate detection.
	ctx := testContext(t)
	for _, addr := range []string{"198.18.1.2:80", "[2001:db8:1::2]:80"} {
		ln, err := b.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		c, err := a.Dial(ctx, "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
}

func TestHostNames(t *testing.T) {
	l := newLab(t)
	l.Host("a")
	for _, name := range []string{"", "a", "a/b", "thirteen-char", "with space"} {
		if _, err := l.NewHost(name); err == nil {
			t.Errorf("name %q is taken", name)
		}
	}
	if first, again := l.Host("b"), l.Host("b"); first != again {
		t.Error("Host makes a second host of one name")
	}
}

func TestSysctlBelongsToNamespace(t *testing.T) {
	l := newLab(t)
	a, b := l.Host("a"), l.Host("b")
	const key = "net/ipv4/ip_forward"
	if err := a.Forwarding(true); err != nil {
		t.Fatal(err)
	}
	for h, want := range map[*Host]string{a: "1", b: "0"} {
		if v, err := h.Sysctl(key); err != nil || v != want {
			t.Errorf("host %s: %s = %q, %v; want %s", h.Name(), key, v, err, want)
		}
	}
	if _, err := a.Sysctl("net/ipv4/no_such_key"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a key that does not exist: %v", err)
	}
}

// TestPlainFarm: without Weir, a client reaches nginx and the embedded server
// through the router, over both families, and the capture sees every segment.
func TestPlainFarm(t *testing.T) {
	require.Tool(t, "nginx")
	l := newLab(t)
	f, err := l.Farm(FarmOptions{Clients: 2, Servers: 2})
	if err != nil {
		t.Fatal(err)
	}
	n, err := Nginx(f.Servers[0], NginxOptions{Addrs: []netip.AddrPort{f.Server(0), f.Server6(0)}})
	if err != nil {
		t.Fatal(err)
	}
	file := bytes.Repeat([]byte("weir\n"), 40_000)
	if err := os.WriteFile(filepath.Join(n.Root, "file.txt"), file, 0o644); err != nil {
		t.Fatal(err)
	}
	srv, err := HTTPServer(f.Servers[1], f.Server(1).String(), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(w, "%s asks for %s", host, r.URL.Path)
	}))
	if err != nil {
		t.Fatal(err)
	}
	near, err := f.Router.Capture(f.ClientLeg, CaptureOptions{SnapLen: 128})
	if err != nil {
		t.Fatal(err)
	}

	client := f.Clients[0].HTTPClient(HTTPClientOptions{})
	get := func(url string) string {
		t.Helper()
		resp, err := client.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("GET %s: %s, %v", url, resp.Status, err)
		}
		return string(b)
	}
	for _, a := range []netip.AddrPort{f.Server(0), f.Server6(0)} {
		if got := get("http://" + a.String() + "/file.txt"); got != string(file) {
			t.Errorf("%s: %d bytes differ from the file's %d", a, len(got), len(file))
		}
	}
	for range 3 {
		if got, want := get("http://"+f.Server(1).String()+"/x"), f.ClientAddr(0).String()+" asks for /x"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if srv.Accepted() != 1 || srv.Requests() != 3 {
		t.Errorf("server counted %d connections and %d requests, want 1 and 3", srv.Accepted(), srv.Requests())
	}

	// An upload is stored byte by byte.
	resp, err := client.Post("http://"+f.Server(0).String()+"/upload", "application/octet-stream", bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	path, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil {
		t.Fatal(err)
	}
	stored, err := os.ReadFile(strings.TrimSpace(string(path)))
	if err != nil || sha256.Sum256(stored) != sha256.Sum256(file) {
		t.Errorf("upload of %d bytes to %q is stored as %d bytes, %v", len(file), path, len(stored), err)
	}

	// The access log tells connections apart: one over each family, and the
	// lab's own first one carried no request.
	ctx := testContext(t)
	var as []Access
	for {
		if as, err = n.Accesses(); err != nil {
			t.Fatal(err)
		}
		if len(as) == 3 {
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("%d lines in the access log, want 3", len(as))
		}
		time.Sleep(5 * time.Millisecond)
	}
	if c, err := n.Connections(); err != nil || c != 2 {
		t.Errorf("nginx saw %d connections, %v; want 2", c, err)
	}
	if c, err := n.Accepted(); err != nil || c != 2 {
		t.Errorf("nginx accepted %d connections, %v; want 2", c, err)
	}
	if a := as[2]; a.Method != "POST" || a.Path != "/upload" || a.Status != 200 || a.Remote.Addr() != f.ClientAddr(0) || a.Request != 2 {
		t.Errorf("last line of the access log: %+v", a)
	}

	client.CloseIdleConnections()
	if err := near.Wait(ctx, func(recs []Record) bool {
		fins := 0
		for _, s := range Segments(recs, f.Sides()) {
			if s.Flags&ladder.FIN != 0 {
				fins++
			}
		}
		return fins >= 6
	}); err != nil {
		t.Fatal(err)
	}
	recs, err := near.Stop()
	if err != nil {
		t.Fatal(err)
	}
	payload := 0
	for _, s := range Segments(recs, f.Sides()) {
		if s.Dst.Addr() == f.ClientAddr(0) && s.Src == f.Server(0) {
			payload += s.Len
		}
	}
	if payload < len(file) {
		t.Errorf("the capture holds %d bytes of the download, want %d and the heads", payload, len(file))
	}
	var pcap bytes.Buffer
	if err := WritePcap(&pcap, recs); err != nil || pcap.Len() < 24+16*len(recs) {
		t.Errorf("pcap of %d packets: %d bytes, %v", len(recs), pcap.Len(), err)
	}
}

// TestVIPIsLocalOrRouted: the VIP answers as an address of the router, or what
// is sent to it reaches the first server.
func TestVIPIsLocalOrRouted(t *testing.T) {
	require.Netns(t)
	for _, routed := range []bool{false, true} {
		t.Run(fmt.Sprintf("routed=%v", routed), func(t *testing.T) {
			l := newLab(t)
			f, err := l.Farm(FarmOptions{Servers: 1, Routed: routed})
			if err != nil {
				t.Fatal(err)
			}
			at := f.Router
			if routed {
				at = f.Servers[0]
				if err := at.AddAddr("lo", netip.PrefixFrom(f.VIP().Addr(), 32)); err != nil {
					t.Fatal(err)
				}
			}
			ln, err := at.Listen("tcp", f.VIP().String())
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			c, err := f.Clients[0].Dial(testContext(t), "tcp", f.VIP().String())
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
		})
	}
}

// TestSnapshotSeesChanges is the negative control of every test that finds
// nothing left: each kind of thing that a program may leave is seen.
func TestSnapshotSeesChanges(t *testing.T) {
	nft := require.Tool(t, "nft")
	l := newLab(t)
	f, err := l.Farm(FarmOptions{Servers: 1})
	if err != nil {
		t.Fatal(err)
	}
	r := f.Router
	ctx := testContext(t)
	script := filepath.Join(l.Dir(), "rules.nft")
	load := func(rules string) error {
		if err := os.WriteFile(script, []byte(rules), 0o644); err != nil {
			return err
		}
		_, err := r.Run(ctx, nft, "-f", script)
		return err
	}
	if err := load("table inet mine { set s { type ipv4_addr; elements = { 198.18.0.1 }; }\n chain c { type filter hook input priority 0; ip saddr @s accept; }\n}\n"); err != nil {
		t.Fatal(err)
	}
	take := func() Snapshot {
		t.Helper()
		s, err := r.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	before := take()
	if d := before.Diff(take()); len(d) != 0 {
		t.Fatalf("two snapshots in a row differ: %q", d)
	}
	if len(before.Select("nft 1 mine ")) < 5 || len(before.Select("sysctl ")) < 100 {
		t.Errorf("the snapshot has %v of the table and %d sysctls", before.Select("nft 1 mine "), len(before.Select("sysctl ")))
	}
	var ln net.Listener
	for _, change := range []struct {
		what string
		key  string
		f    func() error
	}{
		{"table", "+ nft 2 other table", func() error { return load("table ip other {}") }},
		{"rule", "+ nft 1 mine rule c", func() error { return load("add rule inet mine c ip daddr 198.18.0.2 drop") }},
		{"element", "~ nft 1 mine set s", func() error { return load("add element inet mine s { 198.18.0.9 }") }},
		{"sysctl", "~ sysctl net/ipv4/conf/lan/accept_local: 0 -> 1", func() error { return r.SetSysctl("net/ipv4/conf/lan/accept_local", "1") }},
		{"address", "+ address 198.18.200.1/32", func() error { return r.AddAddr("lo", netip.MustParsePrefix("198.18.200.1/32")) }},
		{"route", "+ route table 254 dst 203.0.113.128/25", func() error {
			return r.AddRoute(netip.MustParsePrefix("203.0.113.128/25"), f.ServerAddr(0))
		}},
		{"listener", "+ listener tcp ", func() (err error) { ln, err = r.Listen("tcp", "127.0.0.1:9464"); return err }},
	} {
		was := take()
		if err := change.f(); err != nil {
			t.Fatalf("%s: %v", change.what, err)
		}
		d := was.Diff(take())
		found := false
		for _, line := range d {
			found = found || strings.HasPrefix(line, change.key)
		}
		if !found {
			t.Errorf("%s: no line %q in the difference: %q", change.what, change.key, d)
		}
	}
	if ln != nil {
		ln.Close()
	}
}
