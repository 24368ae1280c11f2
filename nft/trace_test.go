// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/weirgate/weir/internal/require"
)

// admit sets what a running instance sets, so that translated packets may come
// in, and forwards.
func admit(t *testing.T) {
	t.Helper()
	for name, value := range map[string]string{
		"net/ipv4/conf/lan/accept_local": "1", "net/ipv4/conf/dmz/accept_local": "1",
		"net/ipv4/conf/all/rp_filter": "0", "net/ipv4/conf/lan/rp_filter": "0", "net/ipv4/conf/dmz/rp_filter": "0",
		"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1",
	} {
		if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTrace: in each ruleset the probes end at the first of the chains that
// reading finds on their way, by the same rule, and nowhere else; after the
// changes all of them pass. The tables are as before.
func TestTrace(t *testing.T) {
	for _, c := range foreignCases {
		if c.name == "iptables-legacy" {
			continue // nftables cannot trace it, see below
		}
		t.Run(c.name, func(t *testing.T) {
			newRouter(t)
			admit(t)
			c.load(t)
			before, err := nftRun(t, "", "-s", "list", "tables")
			if err != nil {
				t.Fatal(err)
			}
			found, err := Foreign(citizenParams())
			if err != nil {
				t.Fatal(err)
			}
			list, err := Trace(citizenParams())
			if err != nil {
				t.Fatal(err)
			}
			if len(list) < 10 {
				t.Errorf("only %d probes: %+v", len(list), list)
			}
			// A packet ends once: of the chains that reading finds, each but
			// those behind another is where a probe ends.
			ended := map[string]bool{}
			for _, p := range list {
				switch {
				case p.Lost != "":
					t.Errorf("%s %s: lost: %s", p.Kind, p.Packet, p.Lost)
				case p.Ended != nil:
					at := brief(p.Ended)
					ended[at] = true
					// Reading reports a chain once, with the first rule that it
					// finds; packets of other kinds may end at another one.
					if !slices.ContainsFunc(found, func(f Finding) bool {
						return f.Trouble == p.Ended.Trouble && f.Family == p.Ended.Family && f.Table == p.Ended.Table && f.Chain == p.Ended.Chain
					}) {
						t.Errorf("%s %s ended at %s (handle %d), which reading does not find: %v", p.Kind, p.Packet, at, p.Ended.Handle, found)
					}
				case !p.Passed:
					t.Errorf("%s %s: nothing is known of it", p.Kind, p.Packet)
				}
			}
			for i := range found {
				at := brief(&found[i])
				behind := slices.ContainsFunc(found[:i], func(f Finding) bool {
					return f.Hook == "prerouting" && found[i].Hook != "output"
				})
				if !ended[at] && !behind {
					t.Errorf("no probe ended at %s", at)
				}
			}
			if c.applied != nil {
				c.applied(t)
			} else {
				for _, f := range found {
					carryOut(t, f.Fix)
				}
			}
			if list, err = Trace(citizenParams()); err != nil {
				t.Fatal(err)
			}
			for _, p := range list {
				if !p.Passed {
					t.Errorf("after the change: %s %s: %+v %s", p.Kind, p.Packet, p.Ended, p.Lost)
				}
			}
			after, err := nftRun(t, "", "-s", "list", "tables")
			if err != nil {
				t.Fatal(err)
			}
			if after != before {
				t.Errorf("tables are now\n%s\nbefore\n%s", after, before)
			}
		})
	}
}

// TestTraceLegacy: what iptables-legacy ends is told as lost, with the last
// place that nftables saw it at.
func TestTraceLegacy(t *testing.T) {
	require.Tool(t, "iptables-legacy-restore")
	newRouter(t)
	admit(t)
	restore(t, "iptables-legacy-restore", citizenData+"iptables.v4")
	list, err := Trace(citizenParams())
	if err != nil {
		t.Fatal(err)
	}
	lost := 0
	for _, p := range list {
		if p.Lost != "" {
			lost++
			if !strings.Contains(p.Lost, "iptables-legacy") {
				t.Errorf("%s: %s", p.Packet, p.Lost)
			}
		}
	}
	if lost == 0 {
		t.Errorf("nothing is lost: %+v", list)
	}
}

// TestTraceNotSent: without an instance the kernel itself would refuse packets
// in the router's own name; they are not sent, and that is said.
func TestTraceNotSent(t *testing.T) {
	newRouter(t)
	list, err := Trace(citizenParams())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, p := range list {
		if strings.Contains(p.Lost, "accept_local") {
			n++
		}
	}
	if n == 0 {
		t.Errorf("all are sent: %+v", list)
	}
}
