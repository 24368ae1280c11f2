// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/florianl/go-nfqueue/v2"
)

// waitingPackets is how many packets wait in the queues of this namespace.
func waitingPackets(t *testing.T) (n int) {
	t.Helper()
	b, err := os.ReadFile("/proc/thread-self/net/netfilter/nfnetlink_queue")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var queue, port, waiting int
		if _, err := fmt.Sscan(line, &queue, &port, &waiting); err != nil {
			t.Fatal(err)
		}
		n += waiting
	}
	return n
}

// TestRenew: the start after a kill leaves the packets that wait in the queues
// where they are, and what is installed is the same as after any other start.
// Replacing the table, as a start did once, drops them: the control.
func TestRenew(t *testing.T) {
	for _, c := range []struct{ owned, lo, before bool }{{true, false, false}, {false, false, false}, {true, true, true}, {true, true, false}} {
		t.Run(fmt.Sprintf("%+v", c), func(t *testing.T) {
			l := newLab(t)
			k := probed(t)
			k.Owner = k.Owner && c.owned
			p := labParams()
			if p.SYNToLo = c.before; c.lo {
				requireSYNToLo(t, k)
			}
			old, err := Install(p, k)
			if err != nil {
				t.Fatal(err)
			}
			q := listen(t, p.QueueFirst, p.Queues(), func(*nfqueue.Nfqueue, uint32, []byte) {})
			n := 0
			for _, e := range bothFamilies {
				l.send(t, l.client, 0, e.fromClient(40000, ackFlag), e.fromClient(40000, syn))
				n += 2
			}
			q.wait(t, n)
			if err := old.Leave(); err != nil {
				t.Fatal(err)
			}
			// A start asks first; the tables of its questions have no hooks.
			probed(t)
			p.SYNToLo = c.lo
			// Other elements, as after a change of the configuration.
			p.VIPs = append(p.VIPs, at(vip4, 8080))
			p.ExceptPorts = []uint16{12345}
			f, err := Install(p, k)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = f.Remove() })
			if got := waitingPackets(t); got != n {
				t.Errorf("%d packets wait after the start, want %d", got, n)
			}
			counters := regexp.MustCompile(`counter (\w+ \{\s+)?packets \d+ bytes \d+`)
			list := func() string {
				return counters.ReplaceAllString(nftList(t, "ruleset"), "counter")
			}
			renewed := list()
			before, err := f.Counters()
			if err != nil {
				t.Fatal(err)
			}
			if err := f.install(); err != nil {
				t.Fatal(err)
			}
			if got := waitingPackets(t); got != 0 {
				t.Errorf("control: %d packets wait after the table was replaced", got)
			}
			if fresh := list(); fresh != renewed {
				t.Errorf("renewed:\n%s\nfresh:\n%s", renewed, fresh)
			}
			if after, err := f.Counters(); err != nil || len(after) != len(before) {
				t.Errorf("%d counters renewed, %d fresh: %v", len(before), len(after), err)
			}
		})
	}
}

// TestRenewOther: a table that cannot be renewed is replaced whole: one with
// other chains, and one whose sets have other types.
func TestRenewOther(t *testing.T) {
	newNetns(t)
	k := probed(t)
	for name, text := range map[string]string{
		"other chains": "table inet weir { chain foo { type filter hook input priority 7; }; }",
		"other hook":   "table inet weir { chain divert { type filter hook input priority 7; }; }",
		"other sets":   "",
	} {
		t.Run(name, func(t *testing.T) {
			if text == "" {
				old := install(t, fixed(2), k, func(r *Ruleset) {
					r.Set("vips4").Type = SetAddr4
					r.Set("vips4").Elements = nil
					r.Chain("divert").Rules = nil
				})
				if err := old.Leave(); err != nil {
					t.Fatal(err)
				}
			} else {
				nftLoad(t, text)
			}
			p := fixed(2)
			f, err := Install(p, k)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Remove()
			got := nftList(t, "table", "inet", "weir")
			if strings.Contains(got, "foo") || strings.Contains(got, "priority 7") || !strings.Contains(got, p.VIPs[0].Addr().String()) {
				t.Errorf("installed:\n%s", got)
			}
		})
	}
}
