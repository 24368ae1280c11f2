// SPDX-License-Identifier: Apache-2.0

// Command state is the policy plugin that keeps requests away from servers that
// cannot serve them. It looks at two things: what the servers answer to its own
// probes, and how requests fare that Weir sends them. What an operator says
// about a server goes before both. Its configuration, with the defaults:
//
//	probe:                 # none: only passive evidence counts
//	  tcp: true            # or http: /healthz
//	  method: GET          # with http: GET or HEAD
//	  host: ""             # with http: the Host field; "": the server's address
//	  port: 0              # 0: the server's
//	  expect: {status: ["200-399"], body: ""}   # body: a part of it
//	  interval: 2s
//	  fast_interval: 500ms # while a verdict is in the making; default: a quarter of interval
//	  jitter: 0.1          # of the interval, up and down
//	  timeout: 2s          # default: interval
//	  fall: 3              # failures in a row that take a server out
//	  rise: 2              # successes in a row that bring it back
//	passive:               # passive: {off: true} switches it off
//	  errors: 5            # so many failed requests within window take a server out
//	  window: 10s
//	  ratio: 0.5           # if they are so many of all
//	  server_errors: true  # a status of 5xx is a failure
//	  late: 0s             # so is a response later than this; 0s: none
//	  hold: 10s            # for so long, then it is tried again
//	  most: 0.5            # of a farm's servers that passive evidence takes out
//	damping:               # of servers that come and go
//	  flaps: 3             # so many times out within window
//	  window: 5m
//	  hold: 30s            # stays out for so long; twice as long each further time
//	  max: 10m
//	servers: {s1: drain}   # ready, drain, maint or down, whatever the rest says
package main

import (
	"runtime/debug"
	"time"

	"github.com/weirgate/weir/policies"
)

func main() {
	policies.Serve(policies.Plugin{
		Name: "state", Version: version(), Sends: []policies.Kind{policies.SendsEligibility},
		Tick: 200 * time.Millisecond,
		New:  func() policies.Policy { return newState(time.Now) },
	})
}

// version is that of the module it was built from.
func version() string {
	if b, ok := debug.ReadBuildInfo(); ok && b.Main.Version != "" {
		return b.Main.Version
	}
	return "unknown"
}
