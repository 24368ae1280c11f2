// SPDX-License-Identifier: Apache-2.0

package farm

import "sync/atomic"

// Counter is told of every number that only grows, with a name that stays over
// versions, and with an index where several have the name. A process leaves
// these numbers to its successor.
type Counter func(name string, i int, n *atomic.Uint64)

// Each calls f for every counter of a farm, in an order that stays while the
// program runs.
func (s *FarmStats) Each(f Counter) {
	f("client_connections", 0, &s.ClientConnections)
	f("requests", 0, &s.Requests)
	f("responses", 0, &s.Responses)
	f("own_answers", 0, &s.OwnAnswers)
	f("opened", 0, &s.Opened)
	f("reused", 0, &s.Reused)
	f("redispatched", 0, &s.Redispatched)
	f("waited", 0, &s.Waited)
	f("wait_refused", 0, &s.WaitRefused)
	f("wait_timed_out", 0, &s.WaitTimedOut)
	f("bytes_in", 0, &s.BytesIn)
	f("bytes_out", 0, &s.BytesOut)
	f("retransmitted", 0, &s.Retransmitted)
	for i := range s.ConnectionsRefused {
		f("connections_refused", i, &s.ConnectionsRefused[i])
	}
	s.Dispatch.Each("dispatch", f)
	s.ClientRoundTrip.Each("client_round_trip", f)
}

// Each calls f for every counter of a policy.
func (s *PolicyStats) Each(f Counter) {
	f("decided", 0, &s.Decided)
	f("emptied", 0, &s.Emptied)
	f("skipped", 0, &s.Skipped)
	f("compared", 0, &s.Compared)
	f("disagreed", 0, &s.Disagreed)
	f("asked", 0, &s.Asked)
	f("cached", 0, &s.Cached)
	f("late", 0, &s.Late)
}

// Each calls f for every counter of a server.
func (s *ServerStats) Each(f Counter) {
	f("requests", 0, &s.Requests)
	f("responses", 0, &s.Responses)
	f("opened", 0, &s.Opened)
	f("established", 0, &s.Established)
	f("reused", 0, &s.Reused)
	f("redispatched", 0, &s.Redispatched)
	f("bytes_in", 0, &s.BytesIn)
	f("bytes_out", 0, &s.BytesOut)
	for i := range s.Closed {
		f("closed", i, &s.Closed[i])
	}
	for i := range s.Failed {
		f("failed", i, &s.Failed[i])
	}
	f("server_errors", 0, &s.ServerErrors)
	f("retransmitted", 0, &s.Retransmitted)
	f("request_retransmitted", 0, &s.RequestRetransmitted)
	s.ConnectTime.Each("connect_time", f)
	s.FirstByte.Each("first_byte", f)
	s.Latency.Each("latency", f)
}

// Each calls f for the counts of a histogram, and then for its sum under the
// index after theirs.
func (h *Histogram) Each(name string, f Counter) {
	for i := range h.Counts {
		f(name, i, &h.Counts[i])
	}
	f(name, HistogramBuckets, &h.Sum)
}
