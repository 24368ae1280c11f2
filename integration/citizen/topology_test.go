// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
)

// custom is a configuration for a farm of each family of one's own making,
// beside the rig's.
func (r *rig) custom(listen, servers []string, extra string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "runtime_dir: %q\nstop_timeout: 2s\nadmin: {socket: %q}\n", r.run, r.config.Socket())
	b.WriteString("farms:\n")
	for _, farm := range []struct {
		name string
		six  bool
	}{{"web", false}, {"web6", true}} {
		of := func(in []string) (out []string) {
			for _, a := range in {
				if strings.HasPrefix(a, "[") == farm.six {
					out = append(out, a)
				}
			}
			return out
		}
		if len(of(listen)) == 0 {
			continue
		}
		fmt.Fprintf(&b, "  - name: %s\n    listen: [%s]\n    servers:\n", farm.name, strings.Join(quoted(of(listen)), ", "))
		for i, s := range of(servers) {
			fmt.Fprintf(&b, "      - {name: s%d, address: %q}\n", i+1, s)
		}
	}
	if !strings.Contains(extra, "source:") {
		extra += "source: {addresses: [198.51.100.1, \"2001:db8:51::1\"]}\n"
	}
	return b.String() + extra
}

// texts are addresses as one writes them.
func texts(in []netip.AddrPort) []string {
	out := make([]string, len(in))
	for i, a := range in {
		out[i] = a.String()
	}
	return out
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
	vips := []netip.AddrPort{r.Server(0), r.Server(1), r.Server6(0), r.Server6(1)}
	w := r.startWith(r.custom(texts(vips), texts(vips), ""))
	// The addresses of the servers are the VIPs here; none of a client's is
	// seen on the servers' side, so that all of it goes through the engine.
	watch := r.watchOn(
		leg{r.ClientLeg, r.isServer, nil},
		leg{r.ServerLeg, r.isSNIP, func(s ladder.Segment) bool { return r.isClient(s.Src) || r.isClient(s.Dst) }},
	)
	r.mustLoad(1000, vips...)
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
		{"beside one elsewhere", []string{"198.51.100.1:8080", "198.51.100.11:80"}, 4, "198.51.100.1"},
		{"own address, IPv6", []string{"[2001:db8:18::1]:8080", "[2001:db8:51::1]:8081"}, 6, "\"2001:db8:51::1\""},
		{"loopback, IPv6", []string{"[::1]:8080", "[::1]:8081"}, 6, "\"::1\""},
		{"beside one elsewhere, IPv6", []string{"[2001:db8:51::1]:8080", "[2001:db8:51::b]:80"}, 6, "\"2001:db8:51::1\""},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 1})
			for i, s := range c.servers {
				on := r.Router
				if s == r.Server(0).String() || s == r.Server6(0).String() {
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
