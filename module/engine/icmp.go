// SPDX-License-Identifier: Apache-2.0

package engine

// icmp handles an ICMP error to a VIP or a SNIP. An error about a flow that is
// not ours belongs to somebody else on this host and goes on unmarked.
func (e *Engine) icmp(ev *Event) {
	e.Count.add(ReasonICMPForeign)
	ev.Verdict = Accept
}
