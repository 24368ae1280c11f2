// SPDX-License-Identifier: Apache-2.0

// Command path is the policy plugin that sends requests to servers by host and
// path: content partitions, default servers, refusals and redirections. It
// only turns its configuration into routes; it looks at no request and at no
// server. Its configuration, with the defaults of Weir for what is left out:
//
//	routes:
//	  - {prefix: /sales/, servers: [s1]}
//	  - {host: "*.example.org", path: /exact, servers: [s1, s2]}
//	  - {prefix: /private/, reject: 403}
//	  - {host: old.example.org, redirect: {status: 308, location: "https://example.org/"}}
//	default: [s2]    # for requests that no route matches; without it: 404
package main

import (
	"runtime/debug"

	"github.com/weirgate/weir/policies"
)

func main() {
	policies.Serve(policies.Plugin{
		Name: "path", Version: version(), Sends: []policies.Kind{policies.SendsRoutes},
		New: func() policies.Policy { return new(path) },
	})
}

// version is that of the module it was built from.
func version() string {
	if b, ok := debug.ReadBuildInfo(); ok && b.Main.Version != "" {
		return b.Main.Version
	}
	return "unknown"
}
