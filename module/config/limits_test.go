// SPDX-License-Identifier: Apache-2.0

package config

import (
	"net/netip"
	"testing"
)

// TestFramingKeys: the keys that concern what clients may send, from the file
// to the typed configuration and back.
func TestFramingKeys(t *testing.T) {
	c, err := Parse("weir.yaml", []byte(`
source: {addresses: [198.51.100.1]}
farms:
  - name: web
    listen: 203.0.113.10:80
    servers: [{name: s1, address: "198.51.100.11:80"}]
    forwarded: forwarded
    forwarded_trust: [198.18.0.0/16, 198.18.5.7, "2001:db8::/32"]
    route_safety: pass
    limits: {head: 2KiB, fields: 20, chunk_extension: 16, trailers: 100, body_rate: 0, connections: 1000, per_client: 50, held: 1MiB}
    timeouts: {body: 5s, tunnel: 10m}
`))
	if err != nil {
		t.Fatal(err)
	}
	f := c.Farm("web")
	want := []netip.Prefix{
		netip.MustParsePrefix("198.18.0.0/16"), netip.MustParsePrefix("198.18.5.7/32"), netip.MustParsePrefix("2001:db8::/32"),
	}
	for i, p := range f.ForwardedTrust {
		if p.Netip() != want[i] {
			t.Errorf("forwarded_trust[%d] is %v, want %v", i, p, want[i])
		}
	}
	if len(f.ForwardedTrust) != len(want) || f.RouteSafety != "pass" {
		t.Errorf("forwarded_trust %v, route_safety %q", f.ForwardedTrust, f.RouteSafety)
	}
	// A target that nobody wrote follows the head down.
	if w := (Limits{Head: 2048, Fields: 20, Target: 2047, ChunkExtension: 16, Trailers: 100, Connections: 1000, PerClient: 50, Held: 1 << 20}); f.Limits != w {
		t.Errorf("limits %+v, want %+v", f.Limits, w)
	}
	text, err := c.Dump()
	if err != nil {
		t.Fatal(err)
	}
	again, err := Parse("dump.yaml", text)
	if err != nil {
		t.Fatalf("what Dump writes does not load: %v\n%s", err, text)
	}
	if d := Compare(c, again); len(d) != 0 {
		t.Errorf("the dump is another configuration: %v", d)
	}
}
