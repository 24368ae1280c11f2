// SPDX-License-Identifier: Apache-2.0

package r1

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/wire"
)

// controls: the negative controls of the cases. The wires make of the engine one
// that lacks a defence, and the same exchanges, with the same judgement, fail.
func controls(r *rig, t *testing.T) {
	t.Run("without repetitions", func(t *testing.T) { r.within(t, withoutRepetitions) })
	t.Run("corruption made right", func(t *testing.T) { r.within(t, corruptionMadeRight) })
	t.Run("path MTU without errors", func(t *testing.T) { r.within(t, pathMTUWithoutErrors) })
	t.Run("a server that lies", func(t *testing.T) { r.within(t, lyingServer) })
	t.Run("without early acknowledgments", func(t *testing.T) { r.within(t, withoutEarlyAcknowledgments) })
	t.Run("windows made large", func(t *testing.T) { r.within(t, windowsMadeLarge) })
	t.Run("a connection that stays", func(t *testing.T) { r.within(t, connectionThatStays) })
}

// within runs a part of a case.
func (r *rig) within(t *testing.T, f func(*rig, *testing.T)) {
	was := r.t
	r.t = t
	f(r, t)
	r.impair(wire.Impairment{})
	r.t = was
}

// segment returns the TCP header of an IPv4 segment and what it carries; nil
// where the packet is something else.
func segment(ip []byte) (header, data []byte) {
	if ip[0]>>4 != 4 || ip[9] != 6 {
		return nil, nil
	}
	tcp := ip[int(ip[0]&15)*4:]
	n := int(tcp[12]>>4) * 4
	return tcp[:n], tcp[n:]
}

// repetitions finds segments whose bytes have all been seen.
type repetitions map[string]uint32

// again says whether this one is.
func (m repetitions) again(ip []byte) bool {
	h, data := segment(ip)
	if len(data) == 0 {
		return false
	}
	flow := string(ip[12:20]) + string(h[:4])
	end := binary.BigEndian.Uint32(h[4:]) + uint32(len(data))
	if high, ok := m[flow]; ok && int32(end-high) <= 0 {
		return true
	}
	m[flow] = end
	return false
}

// withoutRepetitions: with an engine that lets no byte out twice the exchanges
// do not survive the losses.
func withoutRepetitions(r *rig, t *testing.T) {
	for _, w := range []*wire.Wire{r.lan, r.dmz} {
		w.Set(wire.BA, wire.Impairment{Loss: 0.01, Reorder: 0.02, Duplicate: 0.01})
		seen := repetitions{}
		w.Set(wire.AB, wire.Impairment{Loss: 0.01, Duplicate: 0.01, Tamper: func(ip []byte) bool { return !seen.again(ip) }})
	}
	// A TCP repeats within 200 ms, in its second and third try within 2 s.
	sum, err := r.attempt(t.Context(), 2000, 20<<32, 3*time.Second)
	t.Logf("%d requests before the first failure", sum.done)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("with losses that nobody repairs: %v", err)
	}
}

// corruptionMadeRight: an engine that computed checksums anew over bytes that it
// has not verified would let a corrupted packet reach an endpoint.
func corruptionMadeRight(r *rig, t *testing.T) {
	n := 0
	r.lan.Set(wire.AB, wire.Impairment{Tamper: func(ip []byte) bool {
		if _, data := segment(ip); len(data) > 600 {
			if n++; n%20 == 0 {
				data[len(data)-1] ^= 4
				wire.FillTCP(ip)
			}
		}
		return true
	}})
	sum, err := r.attempt(t.Context(), 2000, 21<<32, patience)
	t.Logf("%d requests before the first failure", sum.done)
	if !errors.Is(err, errWrong) {
		t.Errorf("with wrong bytes under right checksums: %v", err)
	}
}

// pathMTUWithoutErrors: where the errors do not come through, a transfer stands
// still for longer than the case allows. It ends when the path is wide again.
func pathMTUWithoutErrors(r *rig, t *testing.T) {
	wide := false
	standstill := r.narrows(t, transfer{"response, errors lost", r.VIP(), false}, r.seed>>1+uint64(9)<<40,
		wire.Impairment{MTU: 1280, BlackHole: true, Delay: time.Millisecond}, func(d time.Duration) {
			if d > recovery+100*time.Millisecond && !wide {
				wide = true
				r.lan.Set(wire.AB, wire.Impairment{Delay: time.Millisecond})
			}
		})
	if standstill <= recovery {
		t.Errorf("it stood still for %s only", standstill)
	}
}

// lyingServer: servers execute each POST and then reset the connection. Their
// acknowledgments tell the engine that they may have had it, and it does not
// repeat the request. With numbers that tell of nothing it does, and a POST is
// executed twice: the case would see it.
func lyingServer(r *rig, t *testing.T) {
	rnd := rand.New(rand.NewPCG(r.seed, 22<<32))
	const n = 12
	posts := func() (twice, refused int) {
		for range n {
			k, err := dial(t.Context(), r.Clients[0], &net.Dialer{}, r.vip(portRace))
			if err != nil {
				t.Fatal(err)
			}
			q := request{nonce: rnd.Uint64() >> 1}
			q.post, q.want = body(q.nonce+1, 300), body(q.nonce, 10)
			q.path = fmt.Sprintf("/n/%d/10", q.nonce)
			status, err := k.do(&q)
			_ = k.c.Close()
			if err == nil {
				t.Error("a POST is answered")
			}
			if status == http.StatusBadGateway {
				refused++
			}
			if r.race.executed(q.nonce) > 1 {
				twice++
			}
		}
		return twice, refused
	}
	r.race.reset.Store(true)
	defer r.race.reset.Store(false)
	if twice, refused := posts(); twice > 0 || refused < n {
		t.Errorf("of %d POSTs %d were refused and %d were executed twice", n, refused, twice)
	}
	// The number that a connection's last packet with data, or its SYN-ACK,
	// acknowledged is where the next request begins.
	begins := map[string][]byte{}
	r.dmz.Set(wire.BA, wire.Impairment{Tamper: func(ip []byte) bool {
		h, data := segment(ip)
		if h == nil || binary.BigEndian.Uint16(h) != portRace {
			return true
		}
		flow := string(ip[12:20]) + string(h[:4])
		if len(data) > 0 || h[13]&flagSYN != 0 {
			begins[flow] = slices.Clone(h[8:12])
		} else if begins[flow] != nil {
			copy(h[8:12], begins[flow])
			wire.FillTCP(ip)
		}
		return true
	}})
	if twice, _ := posts(); twice == 0 {
		t.Errorf("none of %d POSTs was executed twice", n)
	}
}

// withoutEarlyAcknowledgments: with an engine that acknowledges nothing before
// the answer, each request that comes line by line waits for the client's
// retransmission timer, which is twice as long as the case allows.
func withoutEarlyAcknowledgments(r *rig, t *testing.T) {
	r.lan.Set(wire.AB, wire.Impairment{Tamper: func(ip []byte) bool {
		h, data := segment(ip)
		return h == nil || h[13] != flagACK || len(data) > 0
	}})
	took := byLines(r, t, 3)
	t.Logf("the fastest took %s", took[0])
	if took[0] <= served {
		t.Errorf("without early acknowledgments a request was served in %s", took[0])
	}
}

// windowsMadeLarge: an engine that tells a server of more than the window of the
// client that has the connection now has far more sent to it.
func windowsMadeLarge(r *rig, t *testing.T) {
	rnd := rand.New(rand.NewPCG(r.seed, 23<<32))
	beyond, segments := r.handOver(t, rnd, func() {
		r.dmz.Set(wire.AB, wire.Impairment{Tamper: func(ip []byte) bool {
			if h, _ := segment(ip); h != nil && h[13]&flagSYN == 0 && binary.BigEndian.Uint16(h[2:]) == portOne {
				binary.BigEndian.PutUint16(h[14:], 8192) // 1 MB
				wire.FillTCP(ip)
			}
			return true
		}})
	})
	t.Logf("%d segments, at most %d bytes beyond the window", segments, beyond)
	if beyond <= tolerated {
		t.Errorf("with windows of 1 MB for the server a segment reaches at most %d bytes beyond the client's", beyond)
	}
}

// connectionThatStays: a client that does not go is seen by the baseline, and so
// are the server's connection for as long as the pool keeps it, and the timer of
// either.
func connectionThatStays(r *rig, t *testing.T) {
	k, err := dial(t.Context(), r.Clients[0], &net.Dialer{}, r.vip(portOne))
	if err != nil {
		t.Fatal(err)
	}
	defer k.c.Close()
	rnd := rand.New(rand.NewPCG(r.seed, 25<<32))
	q := newRequest(rnd, 0)
	if _, err := k.do(&q); err != nil {
		t.Fatal(err)
	}
	for _, g := range []string{"client_connections", "timers"} {
		if len(r.left(t, g)) == 0 {
			t.Errorf("with a client connected the baseline does not show %s", g)
		}
	}
	// The pool keeps the server's connection for a second, which a busy machine
	// may let pass.
	until(t, patience, "a connection to the server in the baseline", func() bool {
		q := newRequest(rnd, 0)
		if _, err := k.do(&q); err != nil {
			t.Fatal(err)
		}
		return len(r.left(t, "server_connections")) > 0
	})
}

// cookieLife is how long a cookie lives at least.
const cookieLife = 8 * time.Second

// withoutTombstones: a weir that comes after another, knows its cookies, and
// finds none of its records, executes the POST of a late first segment once
// more. It is what the cases of late first segments and of port reuse would see.
// It comes last, because it ends the weir that all cases share.
func withoutTombstones(r *rig, t *testing.T) {
	f := newForger(t, r.Clients[0])
	rnd := rand.New(rand.NewPCG(r.seed, 24<<32))
	twice := func() bool {
		begun := time.Now()
		first, nonce := firstSegment(r, t, rnd, false, false)
		if err := r.weir.Proc.Kill(); err != nil {
			t.Fatal(err)
		}
		stores, err := filepath.Glob(filepath.Join(r.options.Dir, "run", "flows", "shard*"))
		if err != nil || len(stores) == 0 {
			t.Fatalf("%d flow stores, %v", len(stores), err)
		}
		for _, path := range stores {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
		if r.weir, err = lab.StartWeir(within(t, 30*time.Second), r.Router, r.options); err != nil {
			t.Fatal(err)
		}
		again := time.Since(begun)
		for time.Since(begun) < cookieLife {
			f.send(t, first)
			if r.web.executed(nonce) > 1 {
				t.Logf("a new weir after %s, the POST executed again after %s", again, time.Since(begun))
				return true
			}
			time.Sleep(20 * time.Millisecond)
		}
		return false
	}
	// On a busy machine a cookie may be too old before the second weir is there.
	for range 5 {
		if twice() {
			return
		}
	}
	t.Error("without tombstones no POST was executed twice")
}
