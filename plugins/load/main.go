// SPDX-License-Identifier: Apache-2.0

// Command load is the policy plugin that scores servers by how they do: those
// that answer slower than the others get less, never nothing. It takes this
// from what Weir sees of the requests, and from the servers themselves where an
// agent on them tells. Its configuration, with the defaults:
//
//	half_life: 5s        # of the running mean of the time to the first byte
//	peak: 0              # how much the worst of late counts beside that, 0 to 1
//	tolerance: 0.4       # a server that is worse by less than this share is like the others
//	floor: 1ms           # added to all times: below it, differences are noise
//	min: 0.1             # bounds of the score
//	max: 4
//	slow_start: 10s      # how long a server that comes back takes to its full share
//	agent:               # none: the servers are not asked
//	  http: /load        # JSON: {"load": 0.3, "weight": 75, "state": "ready"}, any of these
//	  line: false        # or a line as HAProxy's agent-check reads it: "ready 75%"
//	  send: ""           # with line: sent first
//	  port: 0            # of the agent; needed with line
//	  interval: 2s
//	  timeout: 1s
//	  expiry: 6s         # after which a report does not count any more; default: three intervals
//
// A load of 0 is an idle server, 1 a full one; a weight is a percentage. States
// drain, maint, down, stopped and failed, and a weight of 0, keep requests away.
package main

import (
	"runtime/debug"
	"time"

	"github.com/weirgate/weir/policies"
)

func main() {
	policies.Serve(policies.Plugin{
		Name: "load", Version: version(), Sends: []policies.Kind{policies.SendsScores, policies.SendsEligibility},
		Tick: 250 * time.Millisecond,
		New:  func() policies.Policy { return newLoad(time.Now) },
	})
}

// version is that of the module it was built from.
func version() string {
	if b, ok := debug.ReadBuildInfo(); ok && b.Main.Version != "" {
		return b.Main.Version
	}
	return "unknown"
}
