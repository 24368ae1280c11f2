// SPDX-License-Identifier: Apache-2.0

package host

import "time"

// pacing decides how long to wait before a plugin is started again. The time
// is handed in.
type pacing struct {
	min, max time.Duration
	limit    int // starts within DefaultRestartWindow; 0 or less: none

	next    time.Duration // the pause before the next start
	starts  []time.Time   // within the window
	resting bool          // it was started too often: one try per DefaultRestartRest
}

// started notes a start.
func (p *pacing) started(now time.Time) { p.starts = append(p.starts, now) }

// ended returns the pause after a process that was up at up, or failed to come
// up then. What has lived for backoffReset is started again at once, and is no
// longer given rests.
func (p *pacing) ended(up, now time.Time) time.Duration {
	if p.next == 0 || now.Sub(up) >= backoffReset {
		p.next, p.resting = p.min, false
	}
	for len(p.starts) > 0 && now.Sub(p.starts[0]) > DefaultRestartWindow {
		p.starts = p.starts[1:]
	}
	p.resting = p.resting || p.limit > 0 && len(p.starts) >= p.limit
	pause := p.next
	p.next = min(2*p.next, p.max)
	if p.resting {
		pause = max(pause, DefaultRestartRest)
	}
	return pause
}
