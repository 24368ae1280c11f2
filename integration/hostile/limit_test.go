// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"errors"
	"fmt"
	"net/http"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
)

// TestConnectionLimits: one client opens twice as many connections as it may,
// on a router with two shards. What it may is served and stays, the rest is
// reset, another client is served meanwhile, and the counters and events say
// so. When a connection goes, its place is free.
func TestConnectionLimits(t *testing.T) {
	t.Parallel()
	const limit = 40
	r := newRig(t, lab.FarmOptions{Clients: 2, Servers: 1})
	_, err := lab.HTTPServer(r.Servers[0], r.Server(0).String(), http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		w.Header().Set("Nonce", q.URL.Path[1:])
		fmt.Fprint(w, "this is ", q.URL.Path)
	}))
	if err != nil {
		t.Fatal(err)
	}
	r.start(fmt.Sprintf("{max_connections: 100}\n    limits: {per_client: %d}", limit), "queue: {shards: 2}\n")
	ctx := within(t, 60*time.Second)
	var open []*caller
	refused := 0
	for i := range 2 * limit {
		k, err := call(ctx, r)
		if err != nil {
			t.Fatal(err)
		}
		defer k.c.Close()
		err = k.own(fmt.Sprintf("/%d", i), fmt.Sprint(i))
		switch {
		case err == nil:
			open = append(open, k)
		case errors.Is(err, unix.ECONNRESET):
			refused++
		default:
			t.Fatalf("connection %d: %v", i, err)
		}
	}
	if len(open) != limit || refused != limit {
		t.Errorf("%d served, %d reset, the limit is %d", len(open), refused, limit)
	}
	if err := honest(ctx, r, 1); err != nil {
		t.Errorf("another client: %v", err)
	}
	for i, k := range open {
		if err := k.own(fmt.Sprintf("/again%d", i), fmt.Sprintf("again%d", i)); err != nil {
			t.Errorf("connection %d, which was established: %v", i, err)
		}
	}
	until(t, 10*time.Second, "the event of the limit", func() bool { return r.event("client-limit") })
	open[0].c.Close()
	until(t, 10*time.Second, "the place of a connection that went", func() bool {
		k, err := call(ctx, r)
		if err != nil {
			t.Fatal(err)
		}
		if k.own("/new", "new") == nil {
			return true // and it stays open
		}
		k.c.Close()
		return false
	})
	r.stop()
}
