// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
)

// TestIPv6ManyClients: clients of every kind over IPv6, on a router with two
// shards whose VIP lies behind it: few server connections, every byte right.
func TestIPv6ManyClients(t *testing.T) {
	curl := require.Tool(t, "curl")
	require.Tool(t, "nginx")
	for _, c := range []struct {
		name   string
		routed bool
	}{{"VIP on the router", false}, {"VIP behind the router", true}} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, lab.FarmOptions{Servers: 2, Routed: c.routed})
			root, err := r.Lab.Subdir("site")
			if err != nil {
				t.Fatal(err)
			}
			files := newSite(t, root, 0, 1, 200, 1000, 1460, 2920, 65_535, 200_000)
			servers := r.nginxAll(root)
			w := r.start(lab.ConfigOptions{IPv6: true, Extra: "queue: {shards: 2}\n"})
			scratch, err := r.Lab.Subdir("curl")
			if err != nil {
				t.Fatal(err)
			}
			crowd := &crowd{ctx: within(t, 60*time.Second), site: files, host: r.Clients[0], vip: r.VIP6().String()}
			crowd.play(t, crowd.mixture(curl, scratch, 5))
			if n := crowd.connections.Load(); n < 350 {
				t.Errorf("%d client connections, want 350", n)
			}
			opened := 0
			var accesses []func() ([]lab.Access, error)
			for _, n := range servers {
				accepted, err := n.Accepted()
				if err != nil {
					t.Fatal(err)
				}
				opened += accepted
				accesses = append(accesses, n.Accesses)
			}
			if opened > 60 {
				t.Errorf("%d server connections opened, want at most 60", opened)
			}
			r.answered(accesses, int(crowd.requests.Load()))
			r.stop(w)
		})
	}
}
