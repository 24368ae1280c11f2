// SPDX-License-Identifier: Apache-2.0

package divert

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestLinger: a queue lingers after short sleeps that packets ended, for as long
// as it may, and not again until there were such sleeps again.
func TestLinger(t *testing.T) {
	const most, near, far = 100 * time.Microsecond, 20 * time.Microsecond, time.Millisecond
	now := time.Second
	// last is for how long it lingers when no packet comes.
	last := func(l *linger) time.Duration {
		begin := now
		for l.goOn(now) {
			now += time.Microsecond
		}
		l.over()
		return now - begin
	}
	expect := func(l *linger, what string, want time.Duration) {
		t.Helper()
		if got := last(l); got != want {
			t.Errorf("%s: it lingers for %v, not %v", what, got, want)
		}
	}
	l := &linger{most: most}
	expect(l, "at first", 0)
	l.slept(near, true)
	expect(l, "after one short sleep", 0)
	l.slept(near, true)
	expect(l, "after two", most)
	expect(l, "after it did so in vain", 0)
	l.slept(near, true)
	l.slept(near, true)
	for range 3 {
		// A packet comes in time: the next wait is a new one.
		if !l.goOn(now) {
			t.Fatal("it does not linger for the next packet")
		}
		now += most - 1
		l.over()
	}
	expect(l, "after packets that came in time", most)
	for what, spoil := range map[string]func(*linger){
		"a long sleep":        func(l *linger) { l.slept(far, true) },
		"a sleep that a wake": func(l *linger) { l.slept(near, false) },
	} {
		l := &linger{most: most}
		l.slept(near, true)
		spoil(l)
		l.slept(near, true)
		expect(l, what+" between", 0)
	}
	never := &linger{}
	for range 10 {
		never.slept(0, true)
	}
	expect(never, "with nothing allowed", 0)
}

// TestLingerTimeouts: a sleep that a timer ended says nothing of packets,
// however short it was.
func TestLingerTimeouts(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	cfg, err := Config{Linger: maxLinger}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	q := &batched{cfg: cfg, fd: pair[0], wakeFD: -1, opened: time.Now(), linger: linger{most: cfg.Linger}}
	if err := q.buffers(); err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	batch := make([]Packet, 1)
	for range 100 {
		if n, err := q.Receive(batch, time.Microsecond); n != 0 || err != nil {
			t.Fatalf("%d packets, %v", n, err)
		}
		if q.linger.short != 0 {
			t.Fatal("a timeout counts as a packet")
		}
	}
}
