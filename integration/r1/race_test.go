// SPDX-License-Identifier: Apache-2.0

package r1

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/wire"
)

// portReuse: clients that have ten source ports in all and use each again as
// soon as they may, over wires that bring old segments late. Every request is
// executed once, whatever was on its port before.
func portReuse(r *rig, t *testing.T) {
	r.impair(wire.Impairment{Loss: 0.002, Reorder: 0.03, Duplicate: 0.03, Late: 30 * time.Millisecond})
	const ports = 10
	each := size(150, 5000)
	var posts, busy atomic.Int64
	err := parallel(ports, ports, func(i int) error {
		rnd := rand.New(rand.NewPCG(r.seed, 3<<32+uint64(i)))
		d := &net.Dialer{
			LocalAddr: &net.TCPAddr{IP: r.ClientAddr(0).AsSlice(), Port: 40_000 + i},
			Control: func(_, _ string, c syscall.RawConn) error {
				var err error
				_ = c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
				return err
			},
		}
		for range each {
			var k *caller
			for begun := time.Now(); ; time.Sleep(2 * time.Millisecond) {
				var err error
				if k, err = dial(t.Context(), r.Clients[0], d, r.vip(portWeb)); err == nil {
					break
				}
				// The kernel still has the connection before on the port.
				if !errors.Is(err, unix.EADDRNOTAVAIL) && !errors.Is(err, unix.EADDRINUSE) || time.Since(begun) > patience {
					return err
				}
				busy.Add(1)
			}
			q := newRequest(rnd, 0.5)
			q.close = true
			reset := rnd.IntN(3) == 0
			if reset {
				q.close = false
				_ = k.c.SetLinger(0) // close by a reset: the port is free at once
			}
			if _, err := k.do(&q); err != nil {
				return err
			}
			_ = k.c.Close()
			if x := r.web.executed(q.nonce); x != 1 && q.post != nil {
				return fmt.Errorf("POST %d was executed %d times", q.nonce, x)
			}
			if q.post != nil {
				posts.Add(1)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	for _, w := range r.web.wrong {
		t.Error(w)
	}
	if n := r.web.twice(); len(n) > 0 {
		t.Errorf("executed more than once: %v", n)
	}
	m := r.metrics()
	t.Logf("%d requests on %d ports, %d of them POST; %d times a port was busy; reincarnated %d, tombstones met %d",
		ports*each, ports, posts.Load(), busy.Load(), events(m, "reincarnated"), events(m, "tombstone"))
}

// twice lists what was executed more than once.
func (o *origin) twice() (nonces []uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for n, k := range o.ran {
		if k > 1 {
			nonces = append(nonces, n)
		}
	}
	return nonces
}

// keepAliveRace: servers that close idle connections at random within 20 ms,
// while requests come. No GET fails, no POST is executed twice, and each
// redispatch is counted by its evidence.
func keepAliveRace(r *rig, t *testing.T) {
	before := r.metrics()
	n := size(5000, 100_000)
	const each = 25
	var gets, posts, refused, repeated atomic.Int64
	err := parallel(n/each, 16, func(i int) error {
		rnd := rand.New(rand.NewPCG(r.seed, 4<<32+uint64(i)))
		var k *caller
		defer func() {
			if k != nil {
				_ = k.c.Close()
			}
		}()
		for range each {
			if k == nil {
				var err error
				if k, err = dial(t.Context(), r.Clients[i%2], &net.Dialer{}, r.vip(portRace)); err != nil {
					return err
				}
			}
			q := newRequest(rnd, 0.33)
			if len(q.want) > 4000 {
				q.want = q.want[:4000]
				q.path = fmt.Sprintf("/n/%d/4000", q.nonce)
			}
			time.Sleep(time.Duration(rnd.Int64N(int64(25 * time.Millisecond)))) // the race is about when it comes
			status, err := k.do(&q)
			ran := r.race.executed(q.nonce)
			if q.post == nil {
				gets.Add(1)
				if err != nil {
					return err
				}
				repeated.Add(int64(max(ran-1, 0)))
				continue
			}
			posts.Add(1)
			if ran > 1 {
				return fmt.Errorf("POST %d was executed %d times", q.nonce, ran)
			}
			if err == nil {
				continue
			}
			// It must not be repeated without proof, and then it fails.
			if status != http.StatusBadGateway {
				return err
			}
			refused.Add(1)
			_ = k.c.Close()
			k = nil
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	for _, w := range r.race.wrong {
		t.Error(w)
	}
	after := r.metrics()
	since := func(reason string) int { return events(after, reason) - events(before, reason) }
	proof, idem, connect := since("redispatch-proof"), since("redispatch-idempotent"), since("redispatch-connect")
	total := int(after["weir_farm_requests_redispatched_total"] - before["weir_farm_requests_redispatched_total"])
	t.Logf("%d GETs, %d POSTs of which %d got 502; redispatched with proof %d, without (idempotent) %d, not connected %d; GETs executed again %d",
		gets.Load(), posts.Load(), refused.Load(), proof, idem, connect, repeated.Load())
	if proof+idem+connect != total {
		t.Errorf("%d redispatches, and %d by evidence", total, proof+idem+connect)
	}
	if int(repeated.Load()) > idem {
		t.Errorf("GETs were executed %d times again, %d redispatches without proof are counted", repeated.Load(), idem)
	}
	if proof == 0 {
		t.Error("no request crossed a close: the case shows nothing")
	}
}
