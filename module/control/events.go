// SPDX-License-Identifier: Apache-2.0

package control

import (
	"sync"
	"time"
)

// Event is one happening that an operator may want to know of: a reload, a
// change of a server, a plugin that died. Packets make no events; what happens
// to them is counted, and counters that move make one event per look.
type Event struct {
	Seq   uint64    `json:"seq"` // counts up by one, from 1
	Time  time.Time `json:"time"`
	Level string    `json:"level"` // info, warn or error
	Name  string    `json:"name"`  // what happened, one of the Event constants or a reason of the engine
	Text  string    `json:"text"`  // the same in a sentence

	Farm   string `json:"farm,omitempty"`
	Server string `json:"server,omitempty"`
	Plugin string `json:"plugin,omitempty"`
	Count  uint64 `json:"count,omitempty"` // how often since the last event of this kind
}

// The names of events. Others are the engine's reasons.
const (
	EventReady           = "ready"
	EventTakeover        = "takeover"
	EventNoStore         = "no-store" // connections will not outlive the process
	EventStopping        = "stopping"
	EventReloaded        = "reloaded"
	EventReloadRefused   = "reload-refused"
	EventNeedsRestart    = "needs-restart"
	EventServerState     = "server-state"
	EventServerWeight    = "server-weight"
	EventServerAdded     = "server-added"
	EventServerRemoved   = "server-removed"
	EventServerGone      = "server-gone"    // a removed server has no connection left
	EventDrainDeadline   = "drain-deadline" // the time to drain is over
	EventVIPAdded        = "vip-added"
	EventVIPRemoved      = "vip-removed"
	EventVIPGone         = "vip-gone"
	EventOverrideDropped = "override-dropped"
	EventFlowKilled      = "flow-killed"
	EventPlugin          = "plugin-state"
	EventServerFailed    = "server-failed"
	EventQueueOverflow   = "queue-overflow" // the kernel dropped packets that found a queue full
	EventFarmWaits       = "farm-waits"     // requests were refused or timed out in the waiting line
	EventLost            = "lost"           // made for a reader who was too slow
)

// Levels of events.
const (
	LevelInfo  = "info"
	LevelWarn  = "warn"
	LevelError = "error"
)

// eventsKept bounds the memory of events.
const eventsKept = 4096

// Events keeps the last happenings. Adding never waits for a reader: one who
// is too slow loses the oldest. The zero value is ready; all methods may be
// called from any goroutine, but none on a packet's path.
type Events struct {
	mu   sync.Mutex
	ring []Event
	next uint64 // Seq of the next one, minus 1
	more chan struct{}
}

// Add remembers an event. Seq is set, Time and Level where they are zero.
func (e *Events) Add(ev Event) {
	if ev.Time.IsZero() {
		ev.Time = time.Now()
	}
	if ev.Level == "" {
		ev.Level = LevelInfo
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.ring) < eventsKept {
		e.ring = append(e.ring, ev)
	}
	e.ring[e.next%eventsKept] = ev
	e.ring[e.next%eventsKept].Seq = e.next + 1
	e.next++
	if e.more != nil {
		close(e.more)
		e.more = nil
	}
}

// After returns the events behind the one with that number, oldest first, and
// how many of them are lost. more is closed when another comes.
func (e *Events) After(seq uint64) (list []Event, lost uint64, more <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.more == nil {
		e.more = make(chan struct{})
	}
	if seq >= e.next {
		return nil, 0, e.more
	}
	if first := e.next - min(e.next, eventsKept); seq < first {
		lost, seq = first-seq, first
	}
	for ; seq < e.next; seq++ {
		list = append(list, e.ring[seq%eventsKept])
	}
	return list, lost, e.more
}

// Last returns the number of the newest event, 0 before the first.
func (e *Events) Last() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.next
}
