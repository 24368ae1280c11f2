// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/weirgate/weir/integration/lab/forge"
	"github.com/weirgate/weir/module/packet"
)

// This file is what happens beside a load: a flood of packets that belong to
// nothing, from addresses that are nobody's, out of the client's namespace.

// floodRate is how many packets a second are offered, so that 20,000 are
// reached.
const floodRate = 22_000

// floods are the kinds, by name.
var floods = map[string][]packet.Flags{
	"SYN":  {packet.SYN},
	"data": {packet.ACK, packet.ACK | packet.PSH},
}

// strangers is the network that the forged addresses are from.
var strangers = netip.MustParsePrefix("198.19.0.0/16")

// quietTwin is the workload that a flooded one is compared with.
const quietTwin = "one-shot-4"

// flood begins a flood and returns what ends it and says how many packets a
// second were sent. Those who use the router's own TCP have SYN cookies for
// all connections meanwhile.
func (r *rig) flood(ctx context.Context, kind string, to netip.AddrPort) (stop func() (rate float64, err error), err error) {
	if err := r.router.SetSysctl("net/ipv4/tcp_syncookies", "2"); err != nil {
		return nil, err
	}
	f, err := forge.New(r.client)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	over := make(chan error, 1)
	rate := 0.0
	rnd := rand.New(rand.NewPCG(1, uint64(len(kind))))
	go func() {
		n, took, err := f.Flood(ctx, floodRate, math.MaxInt, forge.Strangers(rnd, to, floods[kind], []byte("GET / HTTP/1.1\r\nHost: flood\r\n\r\n")))
		if took > 0 {
			rate = float64(n) / took.Seconds()
		}
		over <- err
	}()
	time.Sleep(warmUp) // it has begun when the load does
	return func() (float64, error) {
		cancel()
		err := <-over
		f.Close()
		return rate, errors.Join(err, r.router.SetSysctl("net/ipv4/tcp_syncookies", "1"))
	}, nil
}

// floodTable compares what clients feel in a flood with what they feel without
// one, and each contender with HAProxy.
func (r *report) floodTable(b *bufio.Writer, l workload) {
	p99 := func(s sample) float64 { return float64(s.P99) }
	fmt.Fprintf(b, "\n| | packets a second | p99 quiet | p99 in the flood | of quiet | of haproxy |\n| --- | --- | --- | --- | --- | --- |\n")
	haproxy := r.of("haproxy", l.name)
	for _, c := range r.contenders {
		ss, quiet := r.of(c.name, l.name), r.of(c.name, quietTwin)
		if len(ss) == 0 {
			continue
		}
		before := "–"
		if len(quiet) > 0 {
			before = short(time.Duration(each(quiet, p99).median))
		}
		fmt.Fprintf(b, "| %s | %.1f k | %s | %s | %s | %s |\n", c.name, each(ss, func(s sample) float64 { return s.flooded }).median/1000,
			before, short(time.Duration(each(ss, p99).median)), ratio(ss, quiet, p99).ratio(), ratio(ss, haproxy, p99).ratio())
	}
}
