// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"time"
)

// health is what is known about one server. It is a pure machine: the time
// comes with every call, and whoever calls keeps others away.
type health struct {
	probed bool // at least one probe is over
	down   bool // by its probes
	why    string
	bad    int // failed probes in a row
	good   int // successful ones

	marks   []mark    // passive evidence within the window
	ejected time.Time // by passive evidence, until then

	out    bool        // as it was said last, before the operator's word
	flaps  []time.Time // when it was taken out
	held   time.Time   // by damping, until then
	rounds int         // how often it was held in a row
}

// mark is what came of requests in one tick.
type mark struct {
	at        time.Time
	bad, good uint64
	kind      string // the most frequent failure
}

// probe takes the result of a probe.
func (h *health) probe(c *probeConfig, err error) {
	first := !h.probed
	h.probed = true
	if err == nil {
		h.good++
		h.bad = 0
		if h.down && h.good >= c.Rise {
			h.down = false
		}
		return
	}
	h.bad++
	h.good = 0
	// Nothing is known about a server at first, so the first probe decides.
	if !h.down && (first || h.bad >= c.Fall) {
		h.down = true
		h.why = fmt.Sprintf("%d probes failed: %s", h.bad, err)
		if h.bad == 1 {
			h.why = "a probe failed: " + err.Error()
		}
	}
}

// undecided reports whether the next probe is urgent: the last ones may be the
// beginning of another verdict.
func (h *health) undecided() bool {
	return !h.down && h.bad > 0 || h.down && h.good > 0
}

// evidence takes what came of requests since the last tick, and reports whether
// there are failures among them.
func (h *health) evidence(c *passiveConfig, m mark) bool {
	if m.at.Before(h.ejected) {
		h.marks = nil // what was under way then says nothing new
	} else if m.bad+m.good > 0 {
		h.marks = append(h.marks, m)
	}
	old := 0
	for old < len(h.marks) && m.at.Sub(h.marks[old].at) > c.Window {
		old++
	}
	h.marks = slices.Delete(h.marks, 0, old)
	return m.bad > 0
}

// guilty reports whether the evidence is enough, and what it is.
func (h *health) guilty(c *passiveConfig) (string, bool) {
	var bad, good uint64
	kind := ""
	for i := range h.marks {
		bad += h.marks[i].bad
		good += h.marks[i].good
		if h.marks[i].kind != "" {
			kind = h.marks[i].kind
		}
	}
	if bad < uint64(c.Errors) || float64(bad) < c.Ratio*float64(bad+good) {
		return "", false
	}
	return fmt.Sprintf("%d of %d requests failed within %s: %s", bad, bad+good, c.Window, kind), true
}

// eject takes the server out by passive evidence.
func (h *health) eject(c *passiveConfig, now time.Time, why string) {
	h.ejected = now.Add(c.Hold)
	h.why = why
	h.marks = nil
}

// verdict says whether the server may be used and, if not, why. It is called
// once per tick, so that it sees every change.
func (h *health) verdict(c *config, now time.Time) (eligible bool, reason string) {
	bad := h.down || now.Before(h.ejected)
	if bad && !h.out {
		h.flaps = append(h.flaps, now)
	}
	old := 0
	for old < len(h.flaps) && now.Sub(h.flaps[old]) > c.Damping.Window {
		old++
	}
	h.flaps = slices.Delete(h.flaps, 0, old)
	if len(h.flaps) < c.Damping.Flaps {
		h.rounds = 0
	} else if bad && !h.out && c.Damping.Hold > 0 {
		hold := c.Damping.Max
		if h.rounds < 20 {
			hold = min(c.Damping.Hold<<h.rounds, c.Damping.Max)
		}
		h.held = now.Add(hold)
		h.rounds++
	}
	if !bad {
		h.ejected = time.Time{}
	}
	h.out = bad || now.Before(h.held)
	switch {
	case bad:
		return false, "down: " + h.why
	case h.out:
		return false, fmt.Sprintf("down: it was taken out %d times within %s, and stays out until it has been well for a while", len(h.flaps), c.Damping.Window)
	}
	return true, ""
}
