// SPDX-License-Identifier: Apache-2.0

package farm

import (
	"math/bits"
	"sync/atomic"
)

// HistogramBuckets is how many counts a Histogram has.
const HistogramBuckets = 24

// histogramUnit is the logarithm of the first bucket's bound in nanoseconds:
// what takes less than 33 microseconds is alike.
const histogramUnit = 15

// Histogram counts durations by powers of two. To count one is two additions.
// Every shard adds, anybody reads.
type Histogram struct {
	Sum    atomic.Uint64 // of all durations, nanoseconds
	Counts [HistogramBuckets]atomic.Uint64
}

// Add counts a duration in nanoseconds. A negative one is taken for 0.
func (h *Histogram) Add(d int64) {
	d = max(d, 0)
	h.Sum.Add(uint64(d))
	h.Counts[min(bits.Len64(uint64(d)>>histogramUnit), HistogramBuckets-1)].Add(1)
}

// HistogramBound returns the bound of a bucket in nanoseconds: it counts what
// is below it, and not below that of the bucket before. The last has no bound,
// which is 0.
func HistogramBound(bucket int) int64 {
	if bucket >= HistogramBuckets-1 {
		return 0
	}
	return 1 << (histogramUnit + bucket)
}
