// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module/syncookie"
)

// TestSYNsInTheKernel: where the kernel can, it answers SYNs to a VIP on the
// router, and the SYN queue sees hardly one; with queue.syn: queue, and where the
// VIP is routed through, it sees all (the control). Either way
// all clients are served, a rule of the administrator's keeps out whom it means,
// and a stop leaves nothing behind.
func TestSYNsInTheKernel(t *testing.T) {
	if a, err := syncookie.New(syncookie.Config{Mark: 1, MarkMask: 1}); err != nil {
		require.Missing(t, "syncookie", err.Error())
	} else if err := a.Close(); err != nil {
		t.Error(err)
	}
	nft := require.Tool(t, "nft")
	const requests = 60
	for _, c := range []struct {
		syn    string
		routed bool
		still  bool // the kernel would answer, but lo must not forward
	}{{"auto", false, false}, {"auto", true, false}, {"queue", false, false}, {"auto", false, true}} {
		t.Run(fmt.Sprintf("%s,routed=%v,still=%v", c.syn, c.routed, c.still), func(t *testing.T) {
			r := newRig(t, lab.FarmOptions{Clients: 2, Servers: 1, NoIPv6: true, Routed: c.routed})
			r.hello()
			if c.still {
				if err := r.Router.SetSysctl("net/ipv4/conf/lo/forwarding", "0"); err != nil {
					t.Fatal(err)
				}
			}
			before := r.state()
			addr := r.SNIP().String() + ":9464"
			text := strings.Replace(r.text(setup{servers: []string{"s1=0"}, extra: "queue: {syn: " + c.syn + "}\n"}), `metrics: ""`, fmt.Sprintf("metrics: %q", addr), 1)
			w := r.startWith(text)
			ask := func() {
				for i := range requests {
					r.mustAsk(fmt.Sprint("/", i))
				}
			}
			ask()
			got := r.scrape(addr)
			answered, queued := sample(got, "weir_syn_answered_total"), sample(got, `weir_queue_received_packets_total{queue="syn"}`)
			if answered != requests {
				t.Errorf("%v SYNs answered, %d connections", answered, requests)
			}
			// The first of a slot of eight seconds comes to the queue.
			if in := queued < requests/4; in != (c.syn == "auto" && !c.still && !c.routed) || queued < 1 {
				t.Errorf("%v of %d SYNs came to the queue", queued, requests)
			}

			// Existing rules decide, whoever answers.
			hook := "input"
			if c.routed {
				hook = "forward"
			}
			rules := func(script string) {
				if _, err := r.Router.Run(t.Context(), nft, script); err != nil {
					t.Fatal(err)
				}
			}
			rules(fmt.Sprintf("table inet others { chain c { type filter hook %s priority filter; ip saddr %v tcp flags syn / syn,ack drop; }; }", hook, r.ClientAddr(1)))
			client := r.Clients[1].HTTPClient(lab.HTTPClientOptions{Close: true, Timeout: 1500 * time.Millisecond})
			if resp, err := client.Get("http://" + r.VIP().String() + "/"); err == nil {
				resp.Body.Close()
				t.Error("a client whose SYNs are dropped is served")
			}
			ask()
			if n := sample(r.scrape(addr), "weir_syn_answered_total"); n != 2*requests {
				t.Errorf("%v SYNs answered, of which %d are let through", n, 2*requests)
			}
			rules("delete table inet others")
			r.stop(w)
			r.sameAs(before, "after the stop")
		})
	}
}
