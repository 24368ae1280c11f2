// SPDX-License-Identifier: Apache-2.0

package module

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/divert"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/farm"
)

// This file has the counters go on in a successor. They are written to the file
// "counters" of the store every second, and at the end of each scrape, before
// its answer leaves: so a successor begins with numbers that are not below any
// that a scrape has shown. What was counted since the last of these is lost.

// countersVersion is of the file's form. Counters have names, so that another
// version of the program takes those that it knows.
const countersVersion = 1

// ledger is the writer of the file.
type ledger struct {
	sync.Mutex
	accounts []account
	db       *farm.DB // whose farms and servers the accounts are of
	head     []byte   // the beginning of the state, up to the first account
	state    []byte
	file     []byte
	last     [sha256.Size]byte
	failed   bool // it was told that the file cannot be written
}

// account is some counters of one owner.
type account struct {
	kind, id string
	each     func(farm.Counter)
}

// Kinds of accounts.
const (
	ofFarm      = "farm"      // by number
	ofServer    = "server"    // by number
	ofPolicy    = "policy"    // number of the farm and name
	ofEngine    = "engine"    // all shards together
	ofHandshake = "handshake" // one
	ofQueue     = "queue"     // by the name of metrics
	ofEmitter   = "emitter"
	ofTimes     = "times"
)

// accountsOf lists what is counted. For the counters that are no atomic numbers
// it makes one that is set to their present value.
func (m *Module) accountsOf(db *farm.DB) (all []account) {
	add := func(kind, id string, each func(farm.Counter)) { all = append(all, account{kind, id, each}) }
	for _, f := range append(append([]*farm.Farm(nil), db.Farms...), db.Removed...) {
		id := strconv.Itoa(int(f.ID))
		add(ofFarm, id, f.Stats.Each)
		for i, p := range f.PolicyStats {
			add(ofPolicy, id+" "+f.Policies[i].Name, p.Each)
		}
		if f.Removed {
			continue
		}
		for _, s := range f.Servers {
			add(ofServer, strconv.Itoa(int(s.ID)), s.Stats.Each)
		}
	}
	for _, s := range db.Draining {
		add(ofServer, strconv.Itoa(int(s.ID)), s.Stats.Each)
	}
	add(ofEngine, "", func(f farm.Counter) {
		var n atomic.Uint64
		for r := range engine.Reason(engine.Reasons) {
			n.Store(0)
			for _, s := range m.shards {
				if s.engine != nil {
					n.Add(s.engine.Count.Get(r))
				}
			}
			f(r.String(), 0, &n)
		}
	})
	if h := m.handshake; h != nil {
		add(ofHandshake, "", func(f farm.Counter) {
			f("answered", 0, &h.Answered)
			f("ignored", 0, &h.Ignored)
			f("refused", 0, &h.Refused)
			f("elsewhere", 0, h.Elsewhere())
		})
	}
	for i, s := range m.shards {
		id := s.label(i - 2)
		add(ofQueue, id, func(f farm.Counter) {
			var n atomic.Uint64
			st := s.stats()
			st.Each(func(name string, v *uint64) { n.Store(*v); f(name, 0, &n) })
		})
		add(ofEmitter, id, func(f farm.Counter) {
			var n atomic.Uint64
			st := s.emitted()
			st.Each(func(name string, v *uint64) { n.Store(*v); f(name, 0, &n) })
		})
		add(ofTimes, id, func(f farm.Counter) { s.spent.Each("batch", f) })
	}
	return all
}

// label is the name of a thread's queue in metrics; n is the number of a shard.
func (s *shard) label(n int) string {
	switch s.role {
	case roleSYN:
		return "syn"
	case roleControl:
		return "control"
	}
	return strconv.Itoa(n)
}

// stats are the queue's counters, with those of predecessors.
func (s *shard) stats() divert.Stats {
	st := s.queue.Stats()
	var was []uint64
	s.before.Each(func(_ string, n *uint64) { was = append(was, *n) })
	i := 0
	st.Each(func(_ string, n *uint64) { *n += was[i]; i++ })
	return st
}

// emitted are the emitter's counters, with those of predecessors.
func (s *shard) emitted() divert.EmitStats {
	st := s.emit.Stats()
	var was []uint64
	s.beforeEmit.Each(func(_ string, n *uint64) { was = append(was, *n) })
	i := 0
	st.Each(func(_ string, n *uint64) { *n += was[i]; i++ })
	return st
}

// counted is the file "counters".
type counted struct {
	Version int `json:"version"`
	// Names are those of each kind of account, in the order of its numbers.
	Names    map[string][]string `json:"names"`
	Accounts []struct {
		Kind string   `json:"kind"`
		ID   string   `json:"id"`
		N    []uint64 `json:"n"`
	} `json:"accounts"`
}

func counterName(name string, i int) string { return name + "." + strconv.Itoa(i) }

// keepCounters writes the counters down. It may be called by any goroutine
// while the shards exist.
func (m *Module) keepCounters() {
	k := &m.keep
	if k.dir == "" || !k.owned() {
		return
	}
	l := &m.ledger
	l.Lock()
	defer l.Unlock()
	if err := l.write(m); err != nil && !l.failed {
		l.failed = true
		m.log.Warn("the counters are not kept for a successor", "error", err)
	}
}

func (l *ledger) write(m *Module) error {
	if db := m.db.Load(); db != l.db || l.head == nil {
		l.accounts, l.db = m.accountsOf(db), db
		names := map[string][]string{}
		for _, a := range l.accounts {
			if names[a.kind] == nil {
				a.each(func(name string, i int, _ *atomic.Uint64) {
					names[a.kind] = append(names[a.kind], counterName(name, i))
				})
			}
		}
		b, err := json.Marshal(names)
		if err != nil {
			return err
		}
		l.head = fmt.Appendf(l.head[:0], `{"version":%d,"names":%s,"accounts":[`, countersVersion, b)
	}
	b := append(l.state[:0], l.head...)
	for i := range l.accounts {
		a := &l.accounts[i]
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, `{"kind":"`...)
		b = append(b, a.kind...)
		b = append(b, `","id":`...)
		b = strconv.AppendQuote(b, a.id)
		b = append(b, `,"n":[`...)
		first := true
		a.each(func(_ string, _ int, n *atomic.Uint64) {
			if !first {
				b = append(b, ',')
			}
			first = false
			b = strconv.AppendUint(b, n.Load(), 10)
		})
		b = append(b, "]}"...)
	}
	b = append(b, "]}"...)
	l.state = b
	sum := sha256.Sum256(b)
	if sum == l.last {
		return nil
	}
	// As seal writes it.
	f := append(l.file[:0], `{"sum":"`...)
	f = hex.AppendEncode(f, sum[:])
	f = append(f, `","state":`...)
	f = append(append(f, b...), '}')
	l.file = f
	if err := replaceFile(filepath.Join(m.keep.dir, "counters"), f); err != nil {
		return err
	}
	l.last, l.failed = sum, false
	return nil
}

// recallCounters adds what a predecessor counted. It comes when the shards are
// made, and before the first packet.
func (m *Module) recallCounters() {
	k := &m.keep
	if !k.heir {
		return
	}
	path := filepath.Join(k.dir, "counters")
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return // It died within its first second.
	}
	var was counted
	if err == nil {
		err = unseal(b, &was)
	}
	if err == nil && was.Version != countersVersion {
		err = fmt.Errorf("it is of version %d, this program knows %d", was.Version, countersVersion)
	}
	if err != nil {
		const text = "the counters of a predecessor cannot be taken over and begin at 0"
		m.log.Warn(text, "file", path, "error", err)
		m.events.Add(control.Event{Name: control.EventTakeover, Text: text + ": " + err.Error()})
		_ = os.RemoveAll(path)
		return
	}
	numbers := map[[2]string]map[string]uint64{}
	for _, a := range was.Accounts {
		names := was.Names[a.Kind]
		if len(names) != len(a.N) {
			continue
		}
		of := make(map[string]uint64, len(names))
		for i, name := range names {
			of[name] = a.N[i]
		}
		numbers[[2]string{a.Kind, a.ID}] = of
	}
	for _, a := range m.accountsOf(m.db.Load()) {
		of := numbers[[2]string{a.kind, a.id}]
		switch a.kind {
		case ofEngine, ofQueue, ofEmitter: // below
		default:
			a.each(func(name string, i int, n *atomic.Uint64) { n.Add(of[counterName(name, i)]) })
		}
	}
	for i, s := range m.shards {
		id := s.label(i - 2)
		s.before.Each(func(name string, n *uint64) { *n = numbers[[2]string{ofQueue, id}][counterName(name, 0)] })
		s.beforeEmit.Each(func(name string, n *uint64) { *n = numbers[[2]string{ofEmitter, id}][counterName(name, 0)] })
	}
	for _, s := range m.shards {
		if s.engine == nil {
			continue
		}
		// Which shard it was says nothing.
		for r := range engine.Reason(engine.Reasons) {
			s.engine.Count.Add(r, numbers[[2]string{ofEngine, ""}][counterName(r.String(), 0)])
		}
		break
	}
}
