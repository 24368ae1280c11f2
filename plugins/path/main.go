// SPDX-License-Identifier: Apache-2.0

// Command path is the policy plugin that sends requests to servers by host,
// path, header fields and cookies: content partitions, default servers,
// refusals and redirections, and the affinity of clients to servers. It
// only turns its configuration into routes; it looks at no request and at no
// server. Its configuration, with the defaults of Weir for what is left out:
//
//	routes:
//	  - {prefix: /sales/, servers: [s1]}
//	  - {host: "*.example.org", path: /exact, servers: [s1, s2]}
//	  - {prefix: /private/, reject: 403}
//	  - {host: old.example.org, redirect: {status: 308, location: "https://example.org/"}}
//	  - {prefix: /, headers: {X-Tenant: blue}, cookies: {beta: ""}, servers: [s2]}   # "": any value
//	default: [s2]    # for requests that no route matches; without it: 404
//	affinity: {cookie: sid, table: {a: s1}, hash: true, servers: [s1, s2]}
//
// An affinity has one of header, cookie and client; client: {ipv4: 24, ipv6: 56}
// says how many bits of the address count. What is not in the table is spread by
// a hash where hash is true, which it is by default without a table.
package main

import (
	"runtime/debug"

	"github.com/weirgate/weir/policies"
)

func main() {
	policies.Serve(policies.Plugin{
		Name: "path", Version: version(), Sends: []policies.Kind{policies.SendsRoutes, policies.SendsAffinity},
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
