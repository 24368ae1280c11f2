// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// TestKilled: while nobody translates, the rules hold back all packets of
// diverted connections: none of a download that runs goes on untranslated, and
// a new connection waits by repeating its SYN until the next start answers. The
// download goes on or ends, but what came of it is right.
func TestKilled(t *testing.T) {
	for _, routed := range []bool{false, true} {
		t.Run(map[bool]string{false: "VIP local", true: "VIP routed"}[routed], func(t *testing.T) {
			r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, Routed: routed})
			slow := make(chan struct{})
			for i, h := range r.Servers {
				for _, a := range r.both(i) {
					_, err := lab.HTTPServer(h, a.String(), http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
						if q.URL.Path != "/slow" {
							handler(h.Name()).ServeHTTP(w, q)
							return
						}
						w.Header().Set("Content-Length", "2000000")
						_, _ = w.Write(pattern(1_000_000))
						_ = http.NewResponseController(w).Flush()
						<-slow
						_, _ = w.Write(pattern(2_000_000)[1_000_000:])
					}))
					if err != nil {
						t.Fatal(err)
					}
				}
			}
			w := r.start()
			watch := r.watch()
			r.mustLoad(100, r.VIP(), r.VIP6())
			// Two downloads get stuck in the middle.
			type download struct {
				net.Conn
				body io.Reader
				got  []byte
			}
			var downloads []*download
			for _, vip := range []netip.AddrPort{r.VIP(), r.VIP6()} {
				c, err := r.Clients[0].Dial(within(t, 60*time.Second), "tcp", vip.String())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(60 * time.Second))
				if _, err := io.WriteString(c, "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
					t.Fatal(err)
				}
				resp, err := http.ReadResponse(bufio.NewReader(c), nil)
				if err != nil {
					t.Fatal(err)
				}
				d := &download{c, resp.Body, make([]byte, 1_000_000)}
				if _, err := io.ReadFull(d.body, d.got); err != nil {
					t.Fatal(err)
				}
				downloads = append(downloads, d)
			}
			if err := w.Crash(); err != nil {
				t.Fatal(err)
			}
			// The servers send on, to nobody.
			close(slow)
			fresh := make(chan error, 2)
			for _, vip := range []netip.AddrPort{r.VIP(), r.VIP6()} {
				go func() { fresh <- ask(r.Clients[0], vip, "/meanwhile", 40*time.Second) }()
			}
			// Both sides knock: SYNs and the servers' segments are counted by
			// the rules that nobody stands behind.
			for _, counter := range []string{"syn", "server"} {
				before := r.counted(counter)
				until(t, 20*time.Second, "packets at the counter "+counter, func() bool { return r.counted(counter) > before })
			}
			select {
			case err := <-fresh:
				t.Errorf("somebody answers in the place of a killed instance: %v", err)
			default:
			}
			w = r.start()
			for range 2 {
				if err := <-fresh; err != nil {
					t.Errorf("a connection that was begun meanwhile: %v", err)
				}
			}
			r.mustLoad(100, r.VIP(), r.VIP6())
			for i, d := range downloads {
				_ = d.SetDeadline(time.Now().Add(time.Second))
				rest, err := io.ReadAll(d.body)
				got := append(d.got, rest...)
				if !bytes.Equal(got, pattern(2_000_000)[:len(got)]) || err == nil && len(got) != 2_000_000 {
					t.Errorf("download %d has %d bytes, not all of them right", i, len(got))
				}
				t.Logf("download %d: %d bytes, %v", i, len(got), err)
			}
			watch.judge()
			r.stop(w)
		})
	}
}

// counted reads a counter of weir's table.
func (r *rig) counted(name string) int { r.t.Helper(); return r.countedBy("inet weir", name) }

// countedBy reads a counter of somebody's table.
func (r *rig) countedBy(table, name string) (packets int) {
	r.t.Helper()
	text := r.shell("nft list counter " + table + " " + name)
	if _, err := fmt.Sscanf(text[max(strings.Index(text, "packets"), 0):], "packets %d", &packets); err != nil {
		r.t.Fatalf("counter %s: %v: %s", name, err, text)
	}
	return packets
}
