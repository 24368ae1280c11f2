// SPDX-License-Identifier: Apache-2.0

// Command bandwidth is the policy plugin that bounds the bytes of servers and
// of the whole farm. It hands budgets to Weir, which counts payload bytes both
// ways as they pass, and the length of a response when its head is there. What
// runs is never cut: a budget goes into debt, and until that is earned back its
// server gets no new request. Its configuration, with the defaults:
//
//	servers:
//	  s1: {rate: 100Mbit, burst: 256KiB, at_cap: skip}
//	each: {rate: 50Mbit}     # for every server that servers does not name
//	farm: {rate: 1Gbit}      # for all servers together
//	at_cap: skip             # for those that say nothing themselves; of farm: wait
//
// Rates are written as tc does. The burst is by default what the rate gives in
// 100 ms, and at least 64 KiB. At the cap, skip gives new requests to the other
// servers; wait does so too, and where there is no other they wait; ignore only
// counts. Where skip leaves no server, the policy's on_empty decides.
//
// To shape the packets themselves is for tc, by the mark that they carry.
package main

import (
	"runtime/debug"

	"github.com/weirgate/weir/policies"
)

func main() {
	policies.Serve(policies.Plugin{
		Name: "bandwidth", Version: version(), Sends: []policies.Kind{policies.SendsBudgets},
		New: func() policies.Policy { return new(bandwidth) },
	})
}

// version is that of the module it was built from.
func version() string {
	if b, ok := debug.ReadBuildInfo(); ok && b.Main.Version != "" {
		return b.Main.Version
	}
	return "unknown"
}
