// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// fakeSys is a directory in the shape of /proc/sys.
func fakeSys(t *testing.T, values map[string]string) procSys {
	t.Helper()
	s := procSys{root: t.TempDir()}
	for name, v := range values {
		p := s.path(name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(v+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func (s procSys) all(t *testing.T, names ...string) string {
	t.Helper()
	var out []string
	for _, n := range names {
		v, err := s.read(n)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, v)
	}
	return strings.Join(out, " | ")
}

const (
	reserved = "net.ipv4.ip_local_reserved_ports"
	accept   = "net.ipv4.conf.eth0.accept_local"
	filter   = "net.ipv4.conf.eth0.rp_filter"
)

func router() map[string]string {
	return map[string]string{
		"net.ipv4.conf.all.accept_local": "0", "net.ipv4.conf.all.rp_filter": "0",
		accept: "0", filter: "1", reserved: "8080",
		"net/ipv4/conf/eth0.100/accept_local": "1", "net/ipv4/conf/eth0.100/rp_filter": "0",
	}
}

func needs() []Sysctl { return Needs(fixed(1), "eth0", "eth0.100") }

func TestSysctls(t *testing.T) {
	sys, dir := fakeSys(t, router()), t.TempDir()
	strict, err := strictInterfaces(sys, dir, []string{"eth0", "eth0.100"})
	if err != nil || !slices.Equal(strict, []string{"eth0"}) {
		t.Fatalf("strict %v, %v", strict, err)
	}
	j, err := applySysctls(sys, dir, needs())
	if err != nil {
		t.Fatal(err)
	}
	if got, want := sys.all(t, accept, filter, reserved), "1 | 2 | 8080,10240-32767"; got != want {
		t.Fatalf("got %s, want %s", got, want)
	}
	if got, want := sys.all(t, "net/ipv4/conf/eth0.100/accept_local", "net/ipv4/conf/eth0.100/rp_filter"), "1 | 0"; got != want {
		t.Fatalf("an interface that needs nothing: got %s, want %s", got, want)
	}
	if n := len(j.Changes()); n != 3 {
		t.Fatalf("%d changes, want 3: %+v", n, j.Changes())
	}
	if err := j.Restore(); err != nil {
		t.Fatal(err)
	}
	if got, want := sys.all(t, accept, filter, reserved), "0 | 1 | 8080"; got != want {
		t.Fatalf("after Restore %s, want %s", got, want)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Fatalf("left behind: %v", left)
	}
}

// TestUnmet: what somebody sets anew is noticed, and a second apply takes it
// for the value to restore.
func TestUnmet(t *testing.T) {
	sys, dir := fakeSys(t, router()), t.TempDir()
	if _, err := applySysctls(sys, dir, needs()); err != nil {
		t.Fatal(err)
	}
	if got := unmet(sys, needs()); len(got) != 0 {
		t.Fatalf("unmet after an apply: %q", got)
	}
	// As another instance does at its end, and sysctl --system.
	for name, value := range map[string]string{accept: "0", filter: "1", reserved: "9090"} {
		if err := sys.write(name, value); err != nil {
			t.Fatal(err)
		}
	}
	if got := unmet(sys, needs()); len(got) != 3 {
		t.Fatalf("unmet: %q, want three", got)
	}
	if strict, err := strictInterfaces(sys, dir, []string{"eth0", "eth0.100"}); err != nil || !slices.Equal(strict, []string{"eth0"}) {
		t.Fatalf("strict: %v, %v", strict, err)
	}
	j, err := applySysctls(sys, dir, needs())
	if err != nil {
		t.Fatal(err)
	}
	if got := unmet(sys, needs()); len(got) != 0 {
		t.Fatalf("unmet after the second apply: %q", got)
	}
	if err := j.Restore(); err != nil {
		t.Fatal(err)
	}
	if got, want := sys.all(t, accept, filter, reserved), "0 | 1 | 9090"; got != want {
		t.Fatalf("after Restore %s, want %s", got, want)
	}
}

// TestTwoJournals: two instances add their ports to the same list and take
// them away in any order, with a second apply between.
func TestTwoJournals(t *testing.T) {
	for _, again := range []bool{false, true} {
		sys := fakeSys(t, router())
		before := sys.all(t, accept, filter, reserved)
		need := func(first uint16) []Sysctl {
			p := fixed(1)
			p.PortFirst, p.PortLast = first, first+999
			return Needs(p, "eth0")
		}
		dirs := []string{t.TempDir(), t.TempDir()}
		var js []*Journal
		for i, dir := range dirs {
			j, err := applySysctls(sys, dir, need(uint16(5000+5000*i)))
			if err != nil {
				t.Fatal(err)
			}
			js = append(js, j)
		}
		if err := js[0].Restore(); err != nil {
			t.Fatal(err)
		}
		if again {
			var err error
			if js[1], err = applySysctls(sys, dirs[1], need(10000)); err != nil {
				t.Fatal(err)
			}
			if got := unmet(sys, need(10000)); len(got) != 0 {
				t.Errorf("unmet: %q", got)
			}
		}
		if err := js[1].Restore(); err != nil {
			t.Fatal(err)
		}
		if got := sys.all(t, accept, filter, reserved); got != before {
			t.Errorf("again %v: in the end %s, want %s", again, got, before)
		}
	}
}

func TestEffectiveValues(t *testing.T) {
	for _, c := range []struct{ all, iface, want string }{
		{"0", "0", "0"}, {"0", "1", "2"}, {"0", "2", "2"},
		{"1", "0", "2"}, {"1", "1", "2"}, {"1", "2", "2"},
		{"2", "0", "0"}, {"2", "1", "1"}, {"2", "2", "2"}, // the larger one, 2, is loose already
	} {
		sys := fakeSys(t, map[string]string{"net.ipv4.conf.all.rp_filter": c.all})
		if got, err := (Sysctl{Kind: LooseRPFilter, Interface: "eth0"}).want(sys, c.iface); err != nil || got != c.want {
			t.Errorf("all %s, interface %s: %s, %v, want %s", c.all, c.iface, got, err, c.want)
		}
	}
	for _, c := range []struct{ all, iface, want string }{{"0", "0", "1"}, {"0", "1", "1"}, {"1", "0", "0"}} {
		sys := fakeSys(t, map[string]string{"net.ipv4.conf.all.accept_local": c.all})
		if got, err := (Sysctl{Kind: AcceptLocal, Interface: "eth0"}).want(sys, c.iface); err != nil || got != c.want {
			t.Errorf("all %s, interface %s: %s, %v, want %s", c.all, c.iface, got, err, c.want)
		}
	}
}

// TestSuccessor kills the process at every step of an apply, any number of
// times, with changing needs, and lets the last one restore: the values must
// be those from before the first.
func TestSuccessor(t *testing.T) {
	r := random(t)
	for round := range 25 {
		sys, dir := fakeSys(t, router()), t.TempDir()
		before := sys.all(t, accept, filter, reserved)
		for range 1 + r.IntN(4) {
			p := fixed(1)
			p.PortFirst = uint16(10000 + 1000*r.IntN(5))
			need := Needs(p, "eth0")
			if r.IntN(3) == 0 {
				need = need[2:]
			}
			killAfter(t, sys, dir, need, r.IntN(5))
		}
		if strict, err := strictInterfaces(sys, dir, []string{"eth0"}); err != nil || !slices.Equal(strict, []string{"eth0"}) {
			t.Fatalf("round %d: a successor does not see that rp_filter was strict: %v, %v", round, strict, err)
		}
		j, err := applySysctls(sys, dir, needs())
		if err != nil {
			t.Fatal(err)
		}
		if got, want := sys.all(t, accept, filter, reserved), "1 | 2 | 8080,10240-32767"; got != want {
			t.Fatalf("round %d: applied %s, want %s", round, got, want)
		}
		if err := j.Restore(); err != nil {
			t.Fatal(err)
		}
		if got := sys.all(t, accept, filter, reserved); got != before {
			t.Fatalf("round %d: restored %s, want %s", round, got, before)
		}
		if left, _ := os.ReadDir(dir); len(left) != 0 {
			t.Fatalf("left behind: %v", left)
		}
	}
}

// killAfter applies with only the first n writes done; with 0 not even the
// journal is written.
func killAfter(t *testing.T, sys procSys, dir string, need []Sysctl, n int) {
	t.Helper()
	if n == 0 {
		return
	}
	type value struct{ name, text string }
	var now []value
	for _, s := range need {
		name := dotted(s.name())
		now = append(now, value{name, sys.all(t, name)})
	}
	if _, err := applySysctls(sys, dir, need); err != nil {
		t.Fatal(err)
	}
	for i, v := range now { // take the writes back that were not reached
		if i >= n-1 {
			if err := sys.write(v.name, v.text); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestJournalControl: without the journal a successor would take our values
// for the original ones.
func TestJournalControl(t *testing.T) {
	sys, dir := fakeSys(t, router()), t.TempDir()
	if _, err := applySysctls(sys, dir, needs()); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, journalFile)); err != nil {
		t.Fatal(err)
	}
	j, err := applySysctls(sys, dir, needs())
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Restore(); err != nil {
		t.Fatal(err)
	}
	if got := sys.all(t, accept); got != "1" {
		t.Fatalf("accept_local restored to %s with no journal: then the journal is of no use", got)
	}
}

// TestForeignChanges: what somebody sets after us stays.
func TestForeignChanges(t *testing.T) {
	sys, dir := fakeSys(t, router()), t.TempDir()
	j, err := applySysctls(sys, dir, needs())
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]string{filter: "0", reserved: "8080,9090,10240-32767"} {
		if err := sys.write(name, v); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(sys.path(accept)); err != nil { // the interface went
		t.Fatal(err)
	}
	if err := j.Restore(); err != nil {
		t.Fatal(err)
	}
	if got, want := sys.all(t, filter, reserved), "0 | 8080,9090"; got != want {
		t.Fatalf("got %s, want %s", got, want)
	}
}

// TestApplyFails: when one sysctl cannot be written, the others are as they
// were, and there is no journal.
func TestApplyFails(t *testing.T) {
	sys, dir := fakeSys(t, router()), t.TempDir()
	before := sys.all(t, accept, filter)
	if err := os.Remove(sys.path(reserved)); err != nil {
		t.Fatal(err)
	}
	if _, err := applySysctls(sys, dir, needs()); err == nil {
		t.Fatal("no error for a missing sysctl")
	}
	// This one holds a number and takes no write, not even from root.
	if err := os.Symlink("/proc/sys/kernel/cap_last_cap", sys.path(reserved)); err != nil {
		t.Fatal(err)
	}
	if _, err := applySysctls(sys, dir, needs()); !errors.Is(err, ErrSysctlPermission) {
		t.Fatalf("got %v, want ErrSysctlPermission", err)
	}
	if got := sys.all(t, accept, filter); got != before {
		t.Fatalf("after a failure %s, want %s", got, before)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Fatalf("left behind: %v", left)
	}
}

func TestJournalElsewhere(t *testing.T) {
	sys, dir := fakeSys(t, router()), t.TempDir()
	if _, err := applySysctls(sys, dir, needs()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, journalFile)
	edit := func(f func(*journalData)) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var d journalData
		if err := json.Unmarshal(b, &d); err != nil {
			t.Fatal(err)
		}
		f(&d)
		if b, err = json.Marshal(d); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, f := range map[string]func(*journalData){
		"another boot":      func(d *journalData) { d.Boot = "x" },
		"another namespace": func(d *journalData) { d.Netns = "0:1" },
	} {
		edit(f)
		if j, err := openJournal(sys, dir); err != nil || len(j.Changes()) != 0 {
			t.Errorf("%s: %v, %v", name, j.Changes(), err)
		}
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := applySysctls(sys, dir, needs()); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("an unreadable journal: %v", err)
	}
}

func TestPortSets(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "80": "80", "80,81,82": "80-82", "10-20,15-30": "10-30", "65535,0-5": "0-5,65535", " 7 , 9 ": "7,9",
	} {
		s, err := parsePorts(in)
		if err != nil || s.String() != want {
			t.Errorf("%q: %q, %v, want %q", in, s, err, want)
		}
	}
	for _, in := range []string{"a", "1-", "5-4", "65536", "-1"} {
		if s, err := parsePorts(in); err == nil {
			t.Errorf("%q: got %v, want an error", in, s)
		}
	}
	r := random(t)
	draw := func() (portSet, map[int]bool) {
		m := make(map[int]bool)
		var s portSet
		for range r.IntN(6) {
			lo := r.IntN(300)
			hi := lo + r.IntN(40)
			s = s.union(portSet{{uint16(lo), uint16(hi)}})
			for p := lo; p <= hi; p++ {
				m[p] = true
			}
		}
		return s, m
	}
	for range 50 {
		a, ma := draw()
		b, mb := draw()
		u, d := a.union(b), a.minus(b)
		for p := range 400 {
			q := uint16(p)
			if u.covers(q, q) != (ma[p] || mb[p]) || d.covers(q, q) != (ma[p] && !mb[p]) {
				t.Fatalf("%v and %v at %d: union %v, difference %v", a, b, p, u, d)
			}
		}
		if back, err := parsePorts(u.String()); err != nil || !slices.Equal(back, u) {
			t.Fatalf("%v does not survive writing: %v, %v", u, back, err)
		}
	}
}

func TestWriteRefused(t *testing.T) {
	err := procSys{root: "/proc/sys"}.write("kernel.osrelease", "x")
	if !errors.Is(err, ErrSysctlPermission) || !strings.Contains(err.Error(), `sysctl -w kernel.osrelease="x"`) {
		t.Fatal(err)
	}
}

func TestDotted(t *testing.T) {
	s := procSys{root: "/s"}
	for in, want := range map[string]string{
		"net.ipv4.conf.eth0/100.rp_filter": "/s/net/ipv4/conf/eth0.100/rp_filter",
		"net/ipv4/conf/eth0.100/rp_filter": "/s/net/ipv4/conf/eth0.100/rp_filter",
		"net.ipv4.ip_forward":              "/s/net/ipv4/ip_forward",
	} {
		if got := s.path(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
	if got := fmt.Sprint(dotted("net/ipv4/conf/eth0.100/rp_filter")); got != "net.ipv4.conf.eth0/100.rp_filter" {
		t.Error(got)
	}
}
