// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"

	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/snapshot"
)

var farm = policies.Farm{Name: "web", Servers: []policies.Server{{Name: "s1"}, {Name: "s2"}}}

func TestPathRoutes(t *testing.T) {
	p := new(path)
	err := p.Configure(farm, []byte(`{"routes": [
		{"prefix": "/sales/", "servers": ["s1"]},
		{"host": "*.example.org", "path": "/exact", "servers": ["s1", "s2"]},
		{"prefix": "/private/", "reject": 403},
		{"host": "old.example.org", "redirect": {"location": "https://example.org/"}}
	], "default": ["s2"]}`))
	if err != nil {
		t.Fatal(err)
	}
	snap, err := p.Tick(farm, nil)
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := p.Tick(farm, nil); again != snap {
		t.Error("the routes are made anew although nothing changed")
	}
	s, err := snapshot.NewSelector([]snapshot.ServerConfig{{Name: "s1"}, {Name: "s2"}}, []snapshot.Policy{{Name: "path", Snapshot: snap}})
	if err != nil {
		t.Fatal(err)
	}
	live := []*snapshot.Live{{}, {}}
	for _, c := range []struct {
		host, path string
		want       snapshot.Choice
	}{
		{"", "/sales/forecast.html", snapshot.Choice{Kind: snapshot.ChoiceServer, Server: 0}},
		{"", "/products/new.html", snapshot.Choice{Kind: snapshot.ChoiceServer, Server: 1}},
		{"", "/private/x", snapshot.Choice{Kind: snapshot.ChoiceReject, Status: 403}},
		{"old.example.org", "/", snapshot.Choice{Kind: snapshot.ChoiceRedirect, Status: 307, Location: "https://example.org/"}},
	} {
		got := s.Choose(&snapshot.Request{Host: []byte(c.host), Path: []byte(c.path)}, live, nil, 1, new(snapshot.Scratch))
		if got.Kind != c.want.Kind || got.Server != c.want.Server || got.Status != c.want.Status || got.Location != c.want.Location {
			t.Errorf("%s%s: %+v, want %+v", c.host, c.path, got, c.want)
		}
	}
}

func TestPathErrors(t *testing.T) {
	for _, c := range []struct{ config, want string }{
		{`{}`, "config: has none of routes, default and affinity"},
		{`{"route": []}`, "config.route: unknown key"},
		{`{"routes": [{"prefix": "/a/", "servers": ["s9"]}]}`, `config.routes[0].servers[0]: server "s9" is not in farm "web", which has s1, s2`},
		{`{"routes": [{"prefix": "/a/", "servers": ["s1", "s1"]}]}`, `config.routes[0].servers[1]: server "s1" is there twice`},
		{`{"routes": [{"prefix": "/a/", "servers": []}]}`, "config.routes[0].servers: is empty"},
		{`{"routes": [{"prefix": "/a/"}]}`, "config.routes[0]: has 0 of servers, reject and redirect, expected exactly one"},
		{`{"routes": [{"prefix": "/a/", "servers": ["s1"], "reject": 403}]}`, "config.routes[0]: has 2 of"},
		{`{"routes": [{"prefix": "a/", "servers": ["s1"]}]}`, `config.routes[0].prefix: "a/" does not begin with /`},
		{`{"routes": [{"path": "/a?b", "servers": ["s1"]}]}`, "config.routes[0].path: "},
		{`{"routes": [{"path": "/a", "prefix": "/a", "servers": ["s1"]}]}`, "config.routes[0]: has both path and prefix"},
		{`{"routes": [{"host": "a:80", "servers": ["s1"]}]}`, `config.routes[0].host: host "a:80" has a port`},
		{`{"routes": [{"reject": 200}]}`, "config.routes[0].reject: is 200, expected a status from 400 to 599"},
		{`{"routes": [{"reject": 0}]}`, "config.routes[0].reject: is 0"},
		{`{"routes": [{"redirect": {"status": 200, "location": "/"}}]}`, "config.routes[0].redirect: redirects with status 200"},
		{`{"routes": [{"redirect": {}}]}`, "config.routes[0].redirect: redirects without a location"},
		{`{"routes": [{"host": "a", "servers": ["s1"]}, {"host": "A.", "servers": ["s2"]}]}`, "config.routes[1]: matches the same requests as config.routes[0]"},
		{`{"routes": [{"headers": {"a b": "x"}, "servers": ["s1"]}]}`, `config.routes[0].headers: header field "a b"`},
		{`{"routes": [{"cookies": {"": "x"}, "servers": ["s1"]}]}`, `config.routes[0].cookies: cookie ""`},
		{`{"routes": [{"headers": {"A": "x"}, "servers": ["s1"]}, {"headers": {"a": "x"}, "servers": ["s1"]}]}`, "config.routes[1]: matches the same requests as config.routes[0]"},
		{`{"affinity": {}}`, "config.affinity: has 0 of header, cookie and client"},
		{`{"affinity": {"header": "a", "cookie": "b"}}`, "config.affinity: has 2 of"},
		{`{"affinity": {"header": "a b"}}`, `header field "a b"`},
		{`{"affinity": {"client": {"ipv4": 33}}}`, "config.affinity.client.ipv4: is 33"},
		{`{"affinity": {"client": {}, "table": {"here": "s1"}}}`, `"here" is not an address`},
		{`{"affinity": {"cookie": "b", "table": {"x": "s9"}}}`, `config.affinity.table.x: server "s9"`},
		{`{"affinity": {"cookie": "b", "servers": ["s9"]}}`, `config.affinity.servers[0]: server "s9"`},
		{`{"affinity": {"cookie": "b", "hash": false}}`, "config.affinity: has neither a table nor hash"},
		{`{"affinity": {"cookie": "b", "table": {"x": "s1"}, "servers": ["s1"]}}`, "config.affinity.servers: is for hash"},
		{`{"default": ["s3"]}`, `config.default[0]: server "s3"`},
	} {
		p := new(path)
		if err := p.Configure(farm, []byte(c.config)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", c.config, err, c.want)
		}
		if p.snap != nil {
			t.Errorf("%s: refused, and yet there are routes", c.config)
		}
	}
}

// TestPathComplete: what Configure accepts, the selector accepts.
func TestPathComplete(t *testing.T) {
	for _, c := range []string{`{"affinity": {"client": {"ipv4": 24}}}`, `{"routes": [{"headers": {"a": "x"}, "cookies": {"b": ""}, "reject": 403}], "affinity": {"header": "x", "table": {"a": "s1"}, "hash": true}}`, `{"default": ["s1"]}`, `{"routes": [{"host": "*", "servers": ["s1"]}]}`, `{"routes": [{"redirect": {"status": 303, "location": "/x"}}]}`} {
		p := new(path)
		if err := p.Configure(farm, []byte(c)); err != nil {
			t.Errorf("%s: %v", c, err)
			continue
		}
		if _, err := snapshot.NewSelector([]snapshot.ServerConfig{{Name: "s1"}, {Name: "s2"}}, []snapshot.Policy{{Name: "path", Snapshot: p.snap}}); err != nil {
			t.Errorf("%s: %v", c, err)
		}
	}
}
