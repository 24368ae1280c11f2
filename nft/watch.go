// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	rtnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// EventKind says what happened to the rules.
type EventKind uint8

const (
	// Restored: somebody removed or changed our table, and it is back.
	Restored EventKind = iota + 1

	// NotRestored: somebody did, and it could not be put back; Err says why.
	// It is tried again.
	NotRestored

	// OthersChanged: somebody changed tables of his own, and what Foreign
	// finds there is not what it was. Findings is what it finds now.
	OthersChanged

	// Unguarded: there is no guard, or not on every interface; Err says why.
	// The table is not owned, so that a flush opens a gap in which the
	// router's own TCP ends connections.
	Unguarded
)

// String gives the kind in one word.
func (k EventKind) String() string {
	switch k {
	case Restored:
		return "restored"
	case NotRestored:
		return "not_restored"
	case OthersChanged:
		return "others_changed"
	case Unguarded:
		return "unguarded"
	}
	return fmt.Sprintf("event(%d)", uint8(k))
}

// Event is something that happened to the rules.
type Event struct {
	Kind EventKind

	// By is the name of the process whose transaction it was, as the kernel
	// cuts it; empty if that is not known.
	By string

	// Took is the time from the notification to the commit of our table.
	Took time.Duration

	Err      error
	Findings []Finding
}

// Watcher keeps the rules in force while somebody else works on the tables. It
// listens to the kernel's notifications about nftables. Where the table is not
// owned, it keeps a guard on the interfaces and puts the table back when it
// was removed or changed.
type Watcher struct {
	f     *Firewall
	ns    int // the network namespace to act in; owned
	nl    *netlink.Conn
	links chan rtnetlink.LinkUpdate
	done  chan struct{} // ends the subscription to links

	guard    *Guard
	guardErr error
}

// Watcher prepares to watch, in the network namespace of the calling thread:
// from here on no change is missed, and the guard stands. Run does the work;
// Close gives everything back.
func (f *Firewall) Watcher() (*Watcher, error) {
	w := &Watcher{f: f, ns: -1, done: make(chan struct{})}
	if err := w.open(); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

// nftablesGroup is NFNLGRP_NFTABLES.
const nftablesGroup = 7

// eventBuffer holds the notifications of a large ruleset that is loaded while
// we restore; when it overflows, the state is read anew.
const eventBuffer = 4 << 20

func (w *Watcher) open() error {
	var err error
	if w.ns, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("nft: watching: own network namespace: %w", err)
	}
	if w.nl, err = netlink.Dial(unix.NETLINK_NETFILTER, nil); err != nil {
		return fmt.Errorf("nft: watching: %w", err)
	}
	_ = w.nl.SetReadBuffer(eventBuffer)
	if err := w.nl.JoinGroup(nftablesGroup); err != nil {
		return fmt.Errorf("nft: watching: %w", err)
	}
	w.f.mu.Lock()
	defer w.f.mu.Unlock()
	if w.f.k.Owner {
		return nil
	}
	if w.f.seen, err = fingerprint(w.f.r); err != nil {
		return err
	}
	if w.guard, w.guardErr = NewGuard(w.f.p); w.guardErr != nil {
		return nil // a kernel without BPF: the gap stays, and Run says so
	}
	w.links = make(chan rtnetlink.LinkUpdate, 64)
	if err := rtnetlink.LinkSubscribe(w.links, w.done); err != nil {
		return fmt.Errorf("nft: watching interfaces: %w", err)
	}
	w.guardErr = w.guard.Attach()
	w.f.guard = w.guard
	return nil
}

// Guarded reports whether a guard stands. A table that is owned needs none.
func (w *Watcher) Guarded() bool { return w.guard != nil && w.guardErr == nil }

// Drops is how many untranslated packets the guard has dropped.
func (w *Watcher) Drops() uint64 {
	if w.guard == nil {
		return 0
	}
	return w.guard.Drops()
}

// Close ends the watch and takes the guard away, in the network namespace of
// the calling thread. Run must have returned. It does not touch the table.
func (w *Watcher) Close() error {
	var errs []error
	w.f.mu.Lock()
	w.f.guard = nil
	w.f.mu.Unlock()
	select {
	case <-w.done:
	default:
		close(w.done)
	}
	if w.nl != nil {
		errs = append(errs, w.nl.Close())
		w.nl = nil
	}
	if w.guard != nil {
		errs = append(errs, w.guard.Close())
		w.guard = nil
	}
	if w.ns >= 0 {
		errs = append(errs, unix.Close(w.ns))
		w.ns = -1
	}
	return errors.Join(errs...)
}

const (
	// settle is how long the tables have to be quiet before others' rules are
	// looked at again.
	settle = 250 * time.Millisecond

	// lookForLinks is how soon a new interface gets its guard.
	lookForLinks = time.Second

	// retry is how long to wait after a restoration that failed.
	retry = 100 * time.Millisecond

	// calm bounds a fight with a program that removes our table again and
	// again: after burst restorations they come at this interval.
	calm  = time.Second
	burst = 100
)

// Run watches until ctx ends, and calls on for everything that happens, one
// event after the other; on must not call the Firewall. It may run on any
// goroutine: it acts in the network namespace in which the Watcher was made.
// The error says why it ended early.
func (w *Watcher) Run(ctx context.Context, on func(Event)) error {
	result := make(chan error, 1)
	go func() {
		// The thread belongs to that namespace from here on, and ends with
		// the goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(w.ns, unix.CLONE_NEWNET); err != nil && !sameNamespace(w.ns) {
			result <- fmt.Errorf("nft: watching: entering the network namespace: %w", err)
			return
		}
		result <- w.run(ctx, on)
	}()
	return <-result
}

// sameNamespace: a process without the right to change namespaces need not,
// where it is in the right one.
func sameNamespace(fd int) bool {
	var a, b unix.Stat_t
	if unix.Fstat(fd, &a) != nil || unix.Stat("/proc/thread-self/ns/net", &b) != nil {
		return false
	}
	return a.Ino == b.Ino && a.Dev == b.Dev
}

// watching is the state of one Run.
type watching struct {
	*Watcher
	on       func(Event)
	last     []Finding
	ours     bool      // the transaction that is being told of touched our table
	others   bool      // or chains and rules of others
	by       string    // who did
	lookAt   time.Time // when to look at others' tables; zero for no need
	again    time.Time // when to try to restore; zero for no need
	restored []time.Time
}

func (w *Watcher) run(ctx context.Context, on func(Event)) error {
	s := &watching{Watcher: w, on: on, lookAt: time.Now()}
	if w.guardErr != nil {
		on(Event{Kind: Unguarded, Err: w.guardErr})
	}
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_ = w.nl.SetReadDeadline(time.Unix(1, 0))
	})
	defer func() {
		if !stop() {
			<-woken // The caller may close it all.
		}
	}()
	for ctx.Err() == nil {
		s.due()
		deadline := s.next()
		if err := w.nl.SetReadDeadline(deadline); err != nil {
			return fmt.Errorf("nft: watching: %w", err)
		}
		if ctx.Err() != nil {
			break
		}
		msgs, err := w.nl.Receive()
		switch {
		case err == nil:
			for i := range msgs {
				s.told(&msgs[i])
			}
		case errors.Is(err, os.ErrDeadlineExceeded):
		case errors.Is(err, unix.ENOBUFS):
			// Notifications were lost: anything may have happened.
			s.ours, s.others = true, true
			s.committed("")
		case errors.Is(err, unix.EINTR):
		default:
			return fmt.Errorf("nft: watching: %w", err)
		}
	}
	return nil
}

// next is when something has to be done that no message tells of.
func (s *watching) next() time.Time {
	t := time.Now().Add(time.Minute)
	if s.links != nil {
		t = time.Now().Add(lookForLinks)
	}
	for _, d := range []time.Time{s.lookAt, s.again} {
		if !d.IsZero() && d.Before(t) {
			t = d
		}
	}
	return t
}

// due does what is to be done by now.
func (s *watching) due() {
	now := time.Now()
	if !s.again.IsZero() && !now.Before(s.again) {
		s.again = time.Time{}
		s.restore(now)
	}
	if !s.lookAt.IsZero() && !now.Before(s.lookAt) {
		s.lookAt = time.Time{}
		s.look()
	}
	changed := false
	for more := s.links != nil; more; {
		select {
		case _, more = <-s.links:
			changed = changed || more
			if !more {
				s.links = nil
			}
		default:
			more = false
		}
	}
	if changed {
		if err := s.guard.Attach(); err != nil {
			s.on(Event{Kind: Unguarded, Err: err})
		}
	}
}

// told takes one notification. All of a transaction come before the one about
// the new generation, which says who it was.
func (s *watching) told(m *netlink.Message) {
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < 4 {
		return
	}
	a, err := parseAttrs(m.Data[4:])
	if err != nil {
		return
	}
	kind := int(m.Header.Type & 0xff)
	switch kind {
	case unix.NFT_MSG_NEWGEN:
		by := a.text(unix.NFTA_GEN_PROC_NAME)
		// The kernel names a thread. If it was one of ours, what is amiss came
		// before.
		if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", a.uint(unix.NFTA_GEN_PROC_PID))); err == nil {
			by = s.by
		}
		s.committed(by)
	case unix.NFT_MSG_TRACE:
	default:
		// Attribute 1 of every object names its table.
		if s.f.has(m.Data[0], a.text(unix.NFTA_TABLE_NAME)) {
			s.ours = true
		} else if kind != unix.NFT_MSG_NEWSETELEM && kind != unix.NFT_MSG_DELSETELEM {
			// Bans come and go all the time; what can drop does not change.
			s.others = true
		}
	}
}

func (s *watching) committed(by string) {
	if s.ours && !s.f.k.Owner {
		s.by = by
		s.restore(time.Now())
	}
	if s.others {
		s.lookAt = time.Now().Add(settle)
	}
	s.ours, s.others = false, false
}

// restore puts the table back if it is not what we made it.
func (s *watching) restore(noticed time.Time) {
	s.restored = slices.DeleteFunc(s.restored, func(t time.Time) bool { return noticed.Sub(t) > 10*calm })
	if len(s.restored) >= burst && noticed.Sub(s.restored[len(s.restored)-1]) < calm {
		s.again = s.restored[len(s.restored)-1].Add(calm)
		return
	}
	did, err := s.f.restore()
	if err != nil {
		s.again = time.Now().Add(retry)
		s.on(Event{Kind: NotRestored, By: s.by, Err: err})
		return
	}
	if did {
		s.restored = append(s.restored, noticed)
		s.on(Event{Kind: Restored, By: s.by, Took: time.Since(noticed)})
	}
}

// look asks what in others' tables stands in our way, and tells of a change.
func (s *watching) look() {
	found, err := Foreign(s.f.params())
	if err != nil {
		s.lookAt = time.Now().Add(10 * settle)
		return
	}
	same := func(a, b Finding) bool {
		a.Handle, b.Handle, a.Packet, b.Packet = 0, 0, "", ""
		return a == b
	}
	if !slices.EqualFunc(found, s.last, same) {
		s.last = found
		s.on(Event{Kind: OthersChanged, Findings: found})
	}
}

func (f *Firewall) params() Params {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.p.clone()
}

func (f *Firewall) tableName() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.p.Table
}

// has tells whether a table is ours, or a companion.
func (f *Firewall) has(family byte, table string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return table == f.r.Table && (family == unix.NFPROTO_INET ||
		slices.ContainsFunc(f.r.companions(), func(c *ipFamily) bool { return c.nf == family }))
}

// restore installs the table again unless it stands there as we made it, and
// reports whether it had to.
func (f *Firewall) restore() (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gone {
		return false, nil
	}
	// The most frequent case is the one that hurts: do not look further.
	there, err := tableExists(f.r.Table)
	if err != nil {
		return false, err
	}
	if there {
		now, err := fingerprint(f.r)
		if err != nil {
			return false, err
		}
		if now == f.seen {
			return false, nil
		}
	}
	if err := f.install(); err != nil {
		return false, err
	}
	f.restored.Add(1)
	return true, nil
}

// Restored is how often the table was put back after somebody removed or
// changed it.
func (f *Firewall) Restored() uint64 { return f.restored.Load() }

func tableExists(table string) (bool, error) {
	c, err := dialReader()
	if err != nil {
		return false, err
	}
	defer c.close()
	_, err = c.ask(unix.NFT_MSG_GETTABLE, unix.NFPROTO_INET, []netlink.Attribute{{Type: unix.NFTA_TABLE_NAME, Data: []byte(table + "\x00")}}, 0)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

// eachElement calls f for every element of a set.
func (c *conn) eachElement(table, set string, f func(attrs) error) error {
	body := []netlink.Attribute{
		{Type: unix.NFTA_SET_ELEM_LIST_TABLE, Data: []byte(table + "\x00")},
		{Type: unix.NFTA_SET_ELEM_LIST_SET, Data: []byte(set + "\x00")},
	}
	return c.list(unix.NFT_MSG_GETSETELEM, unix.NFPROTO_INET, body, func(_ byte, a attrs) error {
		return eachAttr(a[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(_ uint16, v []byte) error {
			el, err := parseAttrs(v)
			if err != nil {
				return err
			}
			return f(el)
		})
	})
}

// fingerprint is what stands in the kernel under our table's name, in a form
// that does not depend on counters and handles; empty when it is not there.
func fingerprint(r *Ruleset) (string, error) {
	c, err := dialReader()
	if err != nil {
		return "", err
	}
	defer c.close()
	var parts []string
	name := []netlink.Attribute{{Type: unix.NFTA_TABLE_NAME, Data: []byte(r.Table + "\x00")}}
	collect := func(msg int, body []netlink.Attribute, keep ...uint16) error {
		err := c.list(msg, unix.NFPROTO_INET, body, func(_ byte, a attrs) error {
			if a.text(unix.NFTA_TABLE_NAME) != r.Table {
				return nil
			}
			part := binary.BigEndian.AppendUint16(nil, uint16(msg))
			for _, typ := range keep {
				part = binary.BigEndian.AppendUint32(part, uint32(len(a[typ])))
				part = append(part, a[typ]...)
			}
			parts = append(parts, string(part))
			return nil
		})
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	}
	err = errors.Join(
		collect(unix.NFT_MSG_GETCHAIN, nil, unix.NFTA_CHAIN_NAME, unix.NFTA_CHAIN_HOOK, unix.NFTA_CHAIN_POLICY, unix.NFTA_CHAIN_TYPE),
		collect(unix.NFT_MSG_GETSET, name, unix.NFTA_SET_NAME, unix.NFTA_SET_KEY_TYPE),
	)
	// Elements have no order; chains, sets and rules are listed in theirs.
	for i := range r.Sets {
		if r.Sets[i].Timeout {
			continue // its elements go by themselves
		}
		n := len(parts)
		e := c.eachElement(r.Table, r.Sets[i].Name, func(el attrs) error {
			parts = append(parts, r.Sets[i].Name+" "+string(el[unix.NFTA_SET_ELEM_KEY]))
			return nil
		})
		if !errors.Is(e, unix.ENOENT) {
			err = errors.Join(err, e)
		}
		slices.Sort(parts[n:])
	}
	err = errors.Join(err, collect(unix.NFT_MSG_GETRULE, name, unix.NFTA_RULE_CHAIN, unix.NFTA_RULE_EXPRESSIONS))
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%q", parts), nil
}
