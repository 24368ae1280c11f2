// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
)

// stuck is what TestStopped downloads: the first half comes at once, the rest
// when the test says so.
const stuck = 2_000_000

// TestStopped: on an orderly stop connections end cleanly in both families.
// Those that only wait are closed, a response that runs may end within
// stop_timeout, one that takes longer is reset, and no server keeps a
// connection. The rules and sysctls are as before, and the servers are reached
// directly. With on_stop: direct new connections to the VIP reach a server, and
// the next start takes over again; without, the VIP answers nobody.
func TestStopped(t *testing.T) {
	for _, how := range []string{"close", "direct"} {
		for _, routed := range []bool{false, true} {
			t.Run(how+map[bool]string{false: ", VIP local", true: ", VIP routed"}[routed], func(t *testing.T) {
				r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, Routed: routed})
				goOn, never := make(chan struct{}), make(chan struct{})
				t.Cleanup(func() { close(never) })
				for i, h := range r.Servers {
					for _, a := range r.both(i) {
						if _, err := lab.HTTPServer(h, a.String(), stucks(h.Name(), goOn, never)); err != nil {
							t.Fatal(err)
						}
					}
				}
				r.config.Extra = "firewall: {on_stop: " + how + "}\n"
				vips := []netip.AddrPort{r.VIP(), r.VIP6()}
				before, err := r.Router.Snapshot()
				if err != nil {
					t.Fatal(err)
				}
				watch := r.watchOn(leg{r.ClientLeg, r.isVIP, nil}, leg{r.ServerLeg, r.isSNIP, func(s ladder.Segment) bool { return r.isVIP(s.Src) && how == "close" }})
				w := r.start()
				r.mustLoad(50, vips...)
				type download struct {
					vip  netip.AddrPort
					body io.Reader
					got  []byte
					*connection
				}
				begin := func(vip netip.AddrPort, path string) *download {
					t.Helper()
					d := &download{vip: vip, connection: keep(t, r.Clients[0], vip), got: make([]byte, stuck/2)}
					resp, err := d.begin(path, 60*time.Second)
					if err != nil {
						t.Fatal(err)
					}
					d.body = resp.Body
					if _, err := io.ReadFull(d.body, d.got); err != nil {
						t.Fatal(err)
					}
					return d
				}
				var idle []*connection
				var ends, hangs []*download
				for _, vip := range vips {
					idle = append(idle, keep(t, r.Clients[0], vip))
					ends, hangs = append(ends, begin(vip, "/ends")), append(hangs, begin(vip, "/hangs"))
				}
				if err := w.Proc.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
				for _, c := range idle {
					_ = c.SetDeadline(time.Now().Add(20 * time.Second))
					if n, err := c.in.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
						t.Errorf("%v: an idle connection ends with %d bytes, %v; want its orderly end", c.RemoteAddr(), n, err)
					}
				}
				close(goOn)
				for _, d := range ends {
					rest, err := io.ReadAll(d.body)
					if got := append(d.got, rest...); err != nil || !bytes.Equal(got, pattern(stuck)) {
						t.Errorf("%v: a response that ended in time has %d bytes, %v", d.vip, len(got), err)
					}
				}
				for _, d := range hangs {
					if rest, err := io.ReadAll(d.body); len(rest) != 0 || !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("%v: a response that took too long ends with %d bytes, %v; want a reset", d.vip, len(rest), err)
					}
				}
				r.stop(w)
				for i, h := range r.Servers {
					until(t, 10*time.Second, "the end of all connections to server "+h.Name(), func() bool {
						out, err := h.Run(t.Context(), "/bin/sh", "-c", "PATH=$PATH:/usr/sbin:/sbin; ss -Htn state established state syn-recv")
						if err != nil {
							t.Fatal(err)
						}
						return strings.TrimSpace(string(out)) == ""
					})
					for _, a := range r.both(i) {
						if err := ask(r.Clients[0], a, "/server", 10*time.Second); err != nil {
							t.Errorf("a server itself after the stop: %v", err)
						}
					}
				}
				atOnce(vips, func(vip netip.AddrPort) {
					// Routed on, the VIP is the first server's, which has no such address.
					timeout := 20 * time.Second
					if how == "close" {
						timeout = time.Second
					}
					err := ask(r.Clients[0], vip, "/after", timeout)
					if (err == nil) != (how == "direct") {
						t.Errorf("after the stop, %v: %v", vip, err)
					}
				})
				if left := strings.Contains(r.shell("nft list tables"), "weir"); left != (how == "direct") {
					t.Errorf("a table is left: %v", left)
				}
				if how == "close" {
					after, err := r.Router.Snapshot()
					if err != nil {
						t.Fatal(err)
					}
					for _, d := range before.Diff(after) {
						t.Errorf("after the stop: %.200s", d)
					}
				}
				w = r.start()
				r.mustLoad(50, vips...)
				watch.judge()
				r.stop(w)
				// weir cleanup removes the stand-in.
				r.shell(r.bin + " cleanup --config " + r.dir + "/weir.yaml")
				if tables := r.shell("nft list tables"); strings.Contains(tables, "weir") {
					t.Errorf("after cleanup there are %s", tables)
				}
			})
		}
	}
}

// stucks answers as handler does, but for /ends and /hangs, which send half of
// their bytes and wait for the one or the other channel.
func stucks(name string, ends, hangs <-chan struct{}) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		wait := map[string]<-chan struct{}{"/ends": ends, "/hangs": hangs}[q.URL.Path]
		if wait == nil {
			handler(name).ServeHTTP(w, q)
			return
		}
		w.Header().Set("Content-Length", "2000000")
		_, _ = w.Write(pattern(stuck / 2))
		_ = http.NewResponseController(w).Flush()
		<-wait
		_, _ = w.Write(pattern(stuck)[stuck/2:])
	})
}
