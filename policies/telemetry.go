// SPDX-License-Identifier: Apache-2.0

package policies

import (
	"math"
	"time"

	"github.com/weirgate/weir/policies/policypb"
)

// Histogram counts durations; see the message of that name.
type Histogram = policypb.Histogram

// BoundOf returns the bound below which the durations of a histogram's count
// are, for the count's index.
func BoundOf(index int) time.Duration { return time.Duration(1) << (15 + min(index, 45)) }

// Mean returns the mean of the durations that came between two readings of a
// histogram, and how many these were. before may be nil. After a restart of
// Weir counters begin anew; then before does not count.
func Mean(now, before *Histogram) (mean time.Duration, n uint64) {
	n, sum := count(now), now.GetSumNanos()
	if m := count(before); m <= n && before.GetSumNanos() <= sum {
		n, sum = n-m, sum-before.GetSumNanos()
	}
	if n == 0 {
		return 0, 0
	}
	return time.Duration(sum / n), n
}

// Middle returns the geometric mean of the durations that came between two
// readings of a histogram: what is usual, which a few that took very long hardly
// move. It is as exact as the histogram's counts, which is a factor of two.
func Middle(now, before *Histogram) time.Duration {
	was := before.GetCounts()
	if count(before) > count(now) {
		was = nil
	}
	n, sum := 0.0, 0.0
	for i, c := range now.GetCounts() {
		if i < len(was) {
			c = Since(c, was[i])
		}
		n += float64(c)
		sum += float64(c) * math.Log2(0.75*float64(BoundOf(i)))
	}
	if n == 0 {
		return 0
	}
	return time.Duration(math.Exp2(sum / n))
}

// Peak returns a bound of the longest duration that came between two readings
// of a histogram, 0 if none did.
func Peak(now, before *Histogram) time.Duration {
	was := before.GetCounts()
	if count(before) > count(now) {
		was = nil
	}
	for i := len(now.GetCounts()) - 1; i >= 0; i-- {
		if i >= len(was) && now.Counts[i] > 0 || i < len(was) && now.Counts[i] > was[i] {
			return BoundOf(i)
		}
	}
	return 0
}

func count(h *Histogram) (n uint64) {
	for _, c := range h.GetCounts() {
		n += c
	}
	return n
}

// Since returns how much a counter grew; after a restart of Weir it begins at
// zero.
func Since(now, before uint64) uint64 {
	if now < before {
		return now
	}
	return now - before
}

// TelemetryOf returns what is known about one server, never nil.
func TelemetryOf(t *Telemetry, server string) *ServerTelemetry {
	for _, s := range t.GetServers() {
		if s.GetName() == server {
			return s
		}
	}
	return &ServerTelemetry{Name: server}
}
