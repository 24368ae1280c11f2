// SPDX-License-Identifier: Apache-2.0

package sim

import "math/rand/v2"

// Canary draws a scenario of a crowd: so many clients at the same time, over a
// few connections of one server, on wires that lose one packet in a hundred.
// Two clients in five leave at a drawn byte of what they send or receive, by
// FIN, by RST or without a word; the others after their last answer. Every
// request has a nonce, from which its bodies and those of its answer follow,
// and the observer checks each byte that anybody gets against it.
func Canary(seed uint64, clients, connections int) *Scenario {
	s := Base(seed)
	r := stream(seed, partShape, 1)
	s.V6 = r.IntN(8) == 0
	s.MSS6 = []uint16{olderMSS6, engineMSS}[r.IntN(2)]
	for d := range s.Wires {
		s.Wires[d] = Wire{Delay: 200 * microsecond, Jitter: 100 * microsecond, Loss: 0.01}
	}
	s.Servers = []ServerPlan{{Opt: plainOptions()}}
	s.Pool.MaxConnections, s.Pool.MaxIdle = int32(connections), int32(connections)
	s.Pool.MaxWaiting, s.Pool.WaitTimeout = int32(clients), 600*second
	s.Pool.DrainTimeout = 2 * second
	s.Clients, s.Ports = 2*clients, 2000
	s.Bound = 3000 * second
	for i := range clients {
		s.Conns = append(s.Conns, canaryConn(stream(seed, partConn, uint64(i)), i))
	}
	return s
}

func canaryConn(r *rand.Rand, host int) ConnPlan {
	p := ConnPlan{Host: host, Start: r.Int64N(2 * second), Opt: plainOptions(), Pipeline: 1, Pieces: 1}
	p.Opt.ISS = r.Uint32()
	if r.IntN(8) == 0 {
		p.Pipeline = 2 + r.IntN(3)
	}
	for range 1 + r.IntN(9) {
		q := ReqPlan{Method: "GET", Minor: 1, Reply: ReplyPlan{Status: 200, Minor: 1, Body: uint64(r.IntN(3000)), Pieces: 1 + r.IntN(2)}}
		if r.IntN(2) == 0 {
			q.Method, q.Body, q.Chunked = "POST", uint64(r.IntN(2000)), r.IntN(3) == 0
		}
		if r.IntN(2) == 0 {
			q.Reply.Kind = KindChunked
		}
		q.Reply.Think = r.Int64N(2 * millisecond)
		p.Requests = append(p.Requests, q)
	}
	p.End = []Ending{EndClose, EndClose, EndHalf, EndStay, EndReset}[r.IntN(5)]
	if r.IntN(5) < 2 {
		p.Abort = []Abort{AbortReset, AbortReset, AbortClose, AbortVanish, AbortHalf}[r.IntN(5)]
		if r.IntN(2) == 0 {
			p.AbortSent = uint64(1 + r.IntN(4000))
		} else {
			p.AbortRead = uint64(1 + r.IntN(8000))
		}
	}
	return p
}
