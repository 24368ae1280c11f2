// SPDX-License-Identifier: Apache-2.0

package r1

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/wire"
)

// A tally is what exchanges have come to.
type tally struct {
	done, connections, posts int64
	// repeated is how often a GET was executed once more.
	repeated int64
}

// exchanges makes n requests of all kinds. None may fail, no byte may be wrong,
// and no POST may be executed more than once.
func (r *rig) exchanges(t *testing.T, n int, stream uint64) {
	t.Helper()
	before := r.metrics()
	sum, err := r.attempt(t.Context(), n, stream, patience)
	after := r.metrics()
	t.Logf("%d requests, %d of them POST, on %d connections", sum.done, sum.posts, sum.connections)
	if err != nil {
		t.Error(err)
	} else if int(sum.done) < n {
		t.Errorf("only %d requests", sum.done)
	}
	for _, w := range r.web.wrong {
		t.Error(w)
	}
	if again := events(after, "redispatch-idempotent") - events(before, "redispatch-idempotent"); int(sum.repeated) > again {
		t.Errorf("GETs were executed %d times more than once, %d redispatches without proof are counted", sum.repeated, again)
	}
}

// attempt makes n requests of all kinds: GET and POST, to Go servers and to
// nginx, kept-alive and one-shot. It ends soon after one that failed, had wrong
// bytes, or was a POST that was not executed exactly once. stream separates the
// cases' random numbers, bound is the time of one exchange.
func (r *rig) attempt(ctx context.Context, n int, stream uint64, bound time.Duration) (tally, error) {
	var done, connections, posts, repeated atomic.Int64
	const perConnection = 12
	err := parallel(n/(perConnection/2-1), 24, func(i int) error {
		rnd := rand.New(rand.NewPCG(r.seed, stream+uint64(i)))
		host := r.Clients[i%len(r.Clients)]
		files := rnd.IntN(4) == 0
		port := uint16(portWeb)
		if files {
			port = portFiles
		}
		var k *caller
		defer func() {
			if k != nil {
				_ = k.c.Close()
			}
		}()
		oneShot := rnd.IntN(3) == 0
		for range 1 + rnd.IntN(perConnection-1) {
			q := newRequest(rnd, 0.4)
			if files {
				size := fileSizes[rnd.IntN(len(fileSizes))]
				q = request{path: fmt.Sprintf("/%d", size), want: body(fileNonce(size), size)}
			}
			q.close = oneShot
			if k == nil {
				var err error
				if k, err = dial(ctx, host, &net.Dialer{}, r.vip(port)); err != nil {
					return err
				}
				k.patience = bound
				connections.Add(1)
			}
			if _, err := k.do(&q); err != nil {
				return err
			}
			done.Add(1)
			if q.post != nil {
				posts.Add(1)
				if x := r.web.executed(q.nonce); x != 1 {
					return fmt.Errorf("POST %d was executed %d times", q.nonce, x)
				}
			} else if !files {
				repeated.Add(int64(r.web.executed(q.nonce) - 1))
			}
			if oneShot {
				_ = k.c.Close()
				k = nil
			}
		}
		return nil
	})
	return tally{done.Load(), connections.Load(), posts.Load(), repeated.Load()}, err
}

// losses: requests of 1 B to 64 KB through 1 % loss, 2 % reordering and 1 %
// duplication, in both directions on both sides of the router.
func losses(r *rig, t *testing.T) {
	r.impair(wire.Impairment{Loss: 0.01, Reorder: 0.02, Duplicate: 0.01})
	r.exchanges(t, size(5000, 100_000), 1<<32)
	for _, w := range []*wire.Wire{r.lan, r.dmz} {
		for _, d := range []wire.Direction{wire.AB, wire.BA} {
			if s := w.Stats(d); s.Lost == 0 || s.Reordered == 0 || s.Duplicated == 0 {
				t.Errorf("the wire did nothing: %+v", s)
			}
		}
	}
}

// corruption: one packet in a thousand has a wrong byte. No endpoint takes one:
// every byte is right, and nothing that left the router has a wrong checksum.
func corruption(r *rig, t *testing.T) {
	before := r.metrics()
	r.impair(wire.Impairment{Corrupt: 0.001})
	r.exchanges(t, size(2000, 100_000), 2<<32)
	seen := uint64(0)
	for _, w := range []*wire.Wire{r.lan, r.dmz} {
		seen += w.Stats(wire.BA).Corrupted // on the way to the router
	}
	n := events(r.metrics(), "bad-checksum") - events(before, "bad-checksum")
	t.Logf("%d corrupted packets on the way to the router, %d of them refused by the engine, others by the kernel", seen, n)
	if seen == 0 || n == 0 {
		t.Errorf("%d corrupted packets, %d refused: the case shows nothing", seen, n)
	}
}
