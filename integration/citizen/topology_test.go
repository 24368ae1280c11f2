// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
)

// config is a configuration for one farm of one's own making, beside the
// rig's.
func (r *rig) custom(listen, servers []string, extra string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "runtime_dir: %q\nstop_timeout: 2s\nadmin: {socket: %q}\n", r.run, r.config.Socket())
	fmt.Fprintf(&b, "farms:\n  - name: web\n    listen: [%s]\n    servers:\n", strings.Join(quoted(listen), ", "))
	for i, s := range servers {
		fmt.Fprintf(&b, "      - {name: s%d, address: %q}\n", i+1, s)
	}
	if !strings.Contains(extra, "source:") {
		extra += "source: {addresses: [198.51.100.1]}\n"
	}
	return b.String() + extra
}

func quoted(in []string) []string {
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = fmt.Sprintf("%q", s)
	}
	return out
}

// TestVIPRouted: the VIP is not the router's own, but routed through it.
func TestVIPRouted(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, Routed: true})
	r.serve(r.both)
	w := r.start()
	watch := r.watch()
	r.mustLoad(1000, r.VIP(), r.VIP6())
	watch.judge()
	r.stop(w)
}

// TestVIPRoutedFlush: with a VIP that is routed through, a packet that slips
// by in a gap would go on to somebody; the guard holds it back.
func TestVIPRoutedFlush(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, Routed: true})
	r.serve(r.both)
	r.config.Extra = "firewall: {owned: never}\n"
	w := r.start()
	watch := r.watch()
	stop := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for n := 1; ; n++ {
			r.shell("nft flush ruleset")
			until(t, 5*time.Second, "the table", func() bool { return strings.Count(w.Log(), "event=rules-restored") >= n })
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	r.mustLoad(1000, r.VIP(), r.VIP6())
	close(stop)
	<-ended
	watch.judge()
	r.stop(w)
}

// TestTransparent: clients keep the servers' own public addresses, and are
// pooled all the same.
func TestTransparent(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.serve(r.both)
	vips := []string{r.Server(0).String(), r.Server(1).String()}
	w := r.startWith(r.custom(vips, vips, ""))
	// The addresses of the servers are the VIPs here; none of a client's is
	// seen on the servers' side, so that all of it goes through the engine.
	watch := r.watchOn(
		leg{r.ClientLeg, r.isServer, nil},
		leg{r.ServerLeg, r.isSNIP, func(s ladder.Segment) bool { return r.isClient(s.Src) || r.isClient(s.Dst) }},
	)
	r.mustLoad(1000, r.Server(0), r.Server(1))
	watch.judge()
	r.stop(w)
}

// TestTransparentLocal: a server cannot be its own VIP on the router itself.
func TestTransparentLocal(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 1})
	_, err := lab.StartWeir(within(t, 20*time.Second), r.Router, lab.WeirOptions{
		Binary: r.bin, Dir: r.dir, Socket: r.config.Socket(),
		Config: r.custom([]string{r.VIP().String()}, []string{r.VIP().String()}, ""),
	})
	if err == nil || !strings.Contains(err.Error(), "an address of this host") {
		t.Errorf("the start says %v", err)
	}
}

// TestOneArmed: clients and servers are on the same segment as the router's
// only interface.
func TestOneArmed(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.serve(r.both)
	h, err := r.Lab.NewHost("neighbour")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Lab.Plug(h, r.Lab.Host("dmz"), []netip.Prefix{netip.MustParsePrefix("198.51.100.200/24"), netip.MustParsePrefix("2001:db8:51::200/64")}, lab.LinkOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, route := range [][2]string{{"203.0.113.0/24", "198.51.100.1"}, {"2001:db8:203::/64", "2001:db8:51::1"}} {
		if err := h.AddRoute(netip.MustParsePrefix(route[0]), netip.MustParseAddr(route[1])); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.Settle(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := r.Router.SetDown(r.ClientLeg); err != nil {
		t.Fatal(err)
	}
	w := r.start()
	neighbour := func(a netip.AddrPort) bool {
		return a.Addr() == netip.MustParseAddr("198.51.100.200") || a.Addr() == netip.MustParseAddr("2001:db8:51::200")
	}
	watch := r.watchOn(leg{
		r.ServerLeg, func(a netip.AddrPort) bool { return r.isVIP(a) || r.isSNIP(a) },
		func(s ladder.Segment) bool {
			return neighbour(s.Src) && r.isServer(s.Dst) || r.isServer(s.Src) && neighbour(s.Dst)
		},
	})
	for i, err := range load(h, 1000, r.VIP(), r.VIP6()) {
		if i < 5 {
			t.Error(err)
		}
	}
	watch.judge()
	r.stop(w)
}

// TestServersOnRouter: the servers are programs on the router itself, by an
// address of its own and by loopback; clients come from outside and from the
// router itself.
func TestServersOnRouter(t *testing.T) {
	for _, c := range []struct {
		name    string
		servers []string
		family  int
		source  string
	}{
		{"own address", []string{"198.18.0.1:8080", "198.51.100.1:8081"}, 4, "198.51.100.1"},
		{"loopback", []string{"127.0.0.1:8080", "127.0.0.2:8081"}, 4, "127.0.0.1"},
		{"own address, IPv6", []string{"[2001:db8:18::1]:8080"}, 6, "\"2001:db8:51::1\""},
		{"beside one elsewhere", []string{"198.51.100.1:8080", "198.51.100.11:80"}, 4, "198.51.100.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 1})
			for i, s := range c.servers {
				on := r.Router
				if strings.HasPrefix(s, "198.51.100.11:") {
					on = r.Servers[0]
				}
				if _, err := lab.HTTPServer(on, s, handler(fmt.Sprintf("s%d", i+1))); err != nil {
					t.Fatal(err)
				}
			}
			vip := r.VIP()
			if c.family == 6 {
				vip = r.VIP6()
			}
			w := r.startWith(r.custom([]string{vip.String()}, c.servers, "source: {addresses: ["+c.source+"]}\n"))
			watch := r.watchOn(leg{r.ClientLeg, r.isVIP, func(s ladder.Segment) bool {
				return slices.Contains(c.servers, s.Src.String()) || r.isSNIP(s.Src) || r.isSNIP(s.Dst)
			}})
			r.mustLoad(500, vip)
			if err := post(r.Clients[0], vip, 5_000_000); err != nil {
				t.Errorf("upload: %v", err)
			}
			for i, err := range load(r.Router, 500, vip) {
				if i < 5 {
					t.Errorf("from the router itself: %v", err)
				}
			}
			watch.judge()
			r.stop(w)
		})
	}
}

// post uploads n bytes, which the server counts.
func post(h *lab.Host, addr netip.AddrPort, n int) error {
	c := h.HTTPClient(lab.HTTPClientOptions{Close: true, Timeout: 20 * time.Second})
	resp, err := c.Post("http://"+addr.String()+"/upload", "application/octet-stream", bytes.NewReader(pattern(n)))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if want := fmt.Sprintf("took %d right bytes", n); string(b) != want {
		return fmt.Errorf("%s, %q, want %q", resp.Status, b, want)
	}
	return nil
}

// TestLocalClient: a client on the router itself is served by servers
// elsewhere.
func TestLocalClient(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.serve(r.both)
	w := r.start()
	watch := r.watchOn(leg{r.ServerLeg, r.isSNIP, func(s ladder.Segment) bool { return r.isVIP(s.Src) || r.isVIP(s.Dst) }})
	for i, err := range load(r.Router, 500, r.VIP(), r.VIP6()) {
		if i < 5 {
			t.Error(err)
		}
	}
	watch.judge()
	r.stop(w)
}

// TestOthersNAT: source NAT and port forwards of others go on working while
// weir serves, also from the SNIP itself when it is shared.
func TestOthersNAT(t *testing.T) {
	for _, shared := range []bool{false, true} {
		t.Run(map[bool]string{false: "SNIP of its own", true: "SNIP shared"}[shared], func(t *testing.T) {
			r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
			r.serve(r.both)
			for i, h := range r.Servers {
				if _, err := lab.HTTPServer(h, fmt.Sprintf("%v:8081", r.ServerAddr(i)), handler(h.Name())); err != nil {
					t.Fatal(err)
				}
			}
			snip := "198.51.100.1"
			if !shared {
				// Masquerading takes the interface's first address.
				snip = "198.51.100.2"
				if err := r.Router.AddAddr(r.ServerLeg, netip.MustParsePrefix("198.51.100.2/24")); err != nil {
					t.Fatal(err)
				}
			}
			r.nft("table ip nat {\nchain pre {\ntype nat hook prerouting priority dstnat;\nip daddr 198.18.0.1 tcp dport 8082 dnat to 198.51.100.12:8081\n}\n" +
				"chain post {\ntype nat hook postrouting priority srcnat;\noifname \"dmz\" masquerade\n}\n}\n")
			w := r.startWith(r.custom([]string{r.VIP().String()}, []string{r.Server(0).String(), r.Server(1).String()},
				fmt.Sprintf("source: {addresses: [%s], shared: %v}\n", snip, shared)))
			// Masqueraded connections use ports of the SNIP's range too, when it is
			// shared: they are judged like any others.
			watch := r.watchOn(
				leg{r.ClientLeg, r.isVIP, nil},
				leg{r.ServerLeg, func(a netip.AddrPort) bool { return r.isSNIP(a) || a.Addr().String() == snip },
					func(s ladder.Segment) bool { return r.isVIP(s.Src) || r.isClient(s.Src) || r.isClient(s.Dst) }},
			)
			stop := make(chan struct{})
			ended := make(chan []error)
			go func() {
				var errs []error
				for {
					select {
					case <-stop:
						ended <- errs
						return
					default:
						errs = append(errs, load(r.Clients[0], 100, r.VIP())...)
					}
				}
			}()
			// Ports within the SNIP range, which masquerading keeps.
			ask := func(to string, port int) error {
				d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: r.ClientAddr(0).AsSlice(), Port: port}, Timeout: 10 * time.Second}
				c, err := r.Clients[0].DialWith(within(t, 10*time.Second), d, "tcp", to)
				if err != nil {
					return err
				}
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(10 * time.Second))
				fmt.Fprintf(c, "GET /direct HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
				b, err := io.ReadAll(c)
				if err != nil {
					return err
				}
				if !strings.Contains(string(b), " has /direct for "+"198.51.100.1:"+fmt.Sprint(port)) {
					return fmt.Errorf("%q", b)
				}
				return nil
			}
			for i := range 20 {
				for _, to := range []string{"198.51.100.11:8081", "198.51.100.11:80"} {
					if err := ask(to, 20000+2*i+strings.Count(to, ":80")); err != nil {
						t.Errorf("masqueraded to %s: %v", to, err)
					}
				}
			}
			if err := ask("198.18.0.1:8082", 25000); err != nil {
				t.Errorf("the port forward: %v", err)
			}
			close(stop)
			for i, err := range <-ended {
				if i < 5 {
					t.Errorf("meanwhile: %v", err)
				}
			}
			watch.judge()
			r.stop(w)
		})
	}
}
