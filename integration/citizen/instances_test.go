// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
)

// second is the configuration of another instance on the same router: another
// VIP, table, mark, queues, ports and directory.
func (r *rig) second(change func(string) string) lab.WeirOptions {
	r.t.Helper()
	dir, err := r.Lab.Subdir("weir2")
	if err != nil {
		r.t.Fatal(err)
	}
	run, err := r.Lab.Subdir("weir2/run")
	if err != nil {
		r.t.Fatal(err)
	}
	socket := filepath.Join(run, "admin.sock")
	config := fmt.Sprintf(`runtime_dir: %q
stop_timeout: 2s
source: {addresses: [198.51.100.1, "2001:db8:51::1"], ports: 5000-9999}
queue: {first: 30000}
firewall: {table: weir2, mark: 0x58000000/0xff000000}
admin: {socket: %q, metrics: 127.0.0.1:9465}
farms:
  - name: web
    listen: 203.0.113.11:80
    servers: [{name: s1, address: %q}]
  - name: web6
    listen: "[2001:db8:203::11]:80"
    servers: [{name: s1, address: %q}]
`, run, socket, r.Server(1), r.Server6(1))
	if change != nil {
		config = change(config)
	}
	return lab.WeirOptions{Binary: r.bin, Dir: dir, Socket: socket, Config: config}
}

// TestTwoInstances: two instances serve side by side, and one goes on when the
// other ends, in whichever order they came.
func TestTwoInstances(t *testing.T) {
	for _, first := range []bool{true, false} {
		t.Run(map[bool]string{true: "first ends", false: "second ends"}[first], func(t *testing.T) {
			r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
			r.serve(r.both)
			vipsOne := []netip.AddrPort{r.VIP(), r.VIP6()}
			vipsTwo := []netip.AddrPort{netip.MustParseAddrPort("203.0.113.11:80"), netip.MustParseAddrPort("[2001:db8:203::11]:80")}
			vips := slices.Concat(vipsOne, vipsTwo)
			for _, vip := range vipsTwo {
				if err := r.Router.AddAddr("lo", netip.PrefixFrom(vip.Addr(), vip.Addr().BitLen())); err != nil {
					t.Fatal(err)
				}
			}
			if err := r.Router.Settle(within(t, 20*time.Second)); err != nil {
				t.Fatal(err)
			}
			before, err := r.Router.Snapshot()
			if err != nil {
				t.Fatal(err)
			}
			one := r.start()
			two, err := lab.StartWeir(within(t, 20*time.Second), r.Router, r.second(nil))
			if err != nil {
				t.Fatal(err)
			}
			isVIP := func(a netip.AddrPort) bool { return slices.Contains(vips, a) }
			watch := r.watchOn(
				leg{r.ClientLeg, isVIP, nil},
				leg{r.ServerLeg, r.isSNIP, func(s ladder.Segment) bool { return isVIP(s.Src) || r.isClient(s.Src) || r.isClient(s.Dst) }},
			)
			r.mustLoad(500, vips...)
			ends, stays, left := one, two, vipsTwo
			if !first {
				ends, stays, left = two, one, vipsOne
			}
			r.stop(ends)
			log := stays.Log
			r.mustLoad(200, left...)
			for _, w := range []string{"foreign-rules", "level=ERROR"} {
				if strings.Contains(log(), w) {
					t.Errorf("the one that stays says: %s", log())
				}
			}
			watch.judge()
			r.stop(stays)
			after, err := r.Router.Snapshot()
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range before.Diff(after) {
				t.Errorf("after both have ended: %.200s", d)
			}
		})
	}
}

// TestInstancesRefused: an instance that would get into another's way says so
// and changes nothing.
func TestInstancesRefused(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.serve(r.both)
	w := r.start()
	for _, c := range []struct{ what, from, to, want string }{
		{"the queues", "first: 30000", "first: 22272", "queue 22272"},
		{"the table", "table: weir2", "table: weir", "owned by another process"},
		{"the directory", "runtime_dir: \"" + r.Lab.Dir() + "/weir2/run\"", "runtime_dir: \"" + r.run + "\"", "another instance"},
	} {
		o := r.second(func(s string) string { return strings.ReplaceAll(s, c.from, c.to) })
		two, err := lab.StartWeir(within(t, 20*time.Second), r.Router, o)
		if err == nil {
			t.Errorf("%s: a second instance starts", c.what)
			r.stop(two)
		} else if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want an error with %q", c.what, err, c.want)
		}
		r.mustLoad(50, r.VIP(), r.VIP6())
	}
	r.stop(w)
}
