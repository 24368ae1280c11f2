// SPDX-License-Identifier: Apache-2.0

package divert

import "time"

// shortSleeps is how many sleeps in a row must have been short until a queue
// lingers.
const shortSleeps = 2

// linger decides whether a queue in which nothing waits is looked at again
// before its thread sleeps. To be woken takes tens of microseconds, more than a
// packet's way through the engine, most of all on a virtual machine, whose host
// takes an idle processor away: where the next packet is near, it costs less to
// wait for it awake, and to give way to other threads meanwhile. It is near if
// the sleeps before were shorter than it would have lingered; as soon as it
// lingers in vain once, they have to show that again. So a thread whose packets
// come seldom, or not at all, sleeps as if there were no linger.
type linger struct {
	most  time.Duration // how long at a time; 0: never
	short int           // short sleeps in a row
	since time.Duration // since when it lingers, 0 = it does not
}

// goOn says whether to look again at the time now, which is never 0.
func (l *linger) goOn(now time.Duration) bool {
	if l.most == 0 || l.short < shortSleeps {
		return false
	}
	if l.since == 0 {
		l.since = now
	}
	if now-l.since < l.most {
		return true
	}
	l.short = 0
	return false
}

// over is told when a packet was found, or the thread goes to sleep.
func (l *linger) over() { l.since = 0 }

// slept is told how long a sleep was, and whether a packet ended it.
func (l *linger) slept(d time.Duration, packet bool) {
	if packet && d < l.most {
		l.short++
	} else {
		l.short = 0
	}
}
