// SPDX-License-Identifier: Apache-2.0

package module

import "time"

// pause notices that a thread has not run for a while: the process was stopped,
// the machine moved, or others had all the processors. What endpoints sent
// meanwhile is in the queue. Were timers to fire first, those who have answered
// in time would be taken for silent: the engine's timers wait until the queue
// has been read.
type pause struct {
	last int64 // when the thread was seen last, 0: never
	left int   // packets for which timers wait at most
}

const (
	// pauseAfter is longer than a thread ever waits for packets.
	pauseAfter = int64(longestWait + 250*time.Millisecond)
	// pauseBacklog is more than the queues hold by default.
	pauseBacklog = 1 << 16
)

// look says whether timers have to wait in a pass of the thread that begins at
// now and got n packets, of batchSize at most.
func (p *pause) look(now int64, n int) bool {
	begins := p.last != 0 && now-p.last > pauseAfter
	p.last = now
	if begins {
		p.left = pauseBacklog
	}
	if p.left == 0 {
		return false
	}
	p.left = max(p.left-n, 0)
	if n < batchSize && !begins {
		p.left = 0 // these are the last
	}
	return n > 0 || begins
}
