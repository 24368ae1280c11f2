// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/snapshot"
)

// config is the plugin's configuration for one farm.
type config struct {
	Routes   []route   `json:"routes"`
	Default  []string  `json:"default"`
	Affinity *affinity `json:"affinity"`
}

// route has Host, Path or Prefix, Headers and Cookies to match, and one of the
// others to do.
type route struct {
	Host     string            `json:"host"`
	Path     string            `json:"path"`
	Prefix   string            `json:"prefix"`
	Headers  map[string]string `json:"headers"` // value "": any, but it has to be there
	Cookies  map[string]string `json:"cookies"`
	Servers  []string          `json:"servers"`
	Reject   *uint16           `json:"reject"`
	Redirect *redirect         `json:"redirect"`
}

// affinity has one of Header, Cookie and Client.
type affinity struct {
	Header  string            `json:"header"`
	Cookie  string            `json:"cookie"`
	Client  *prefixes         `json:"client"`
	Table   map[string]string `json:"table"` // value to server
	Hash    *bool             `json:"hash"`  // default: true without a table
	Servers []string          `json:"servers"`
}

// prefixes are how many bits of a client's address count, 0: all.
type prefixes struct {
	IPv4 uint8 `json:"ipv4"`
	IPv6 uint8 `json:"ipv6"`
}

type redirect struct {
	Status   uint16 `json:"status"`
	Location string `json:"location"`
}

// defaultRedirect is the status of a redirection that names none: the method
// is kept, and nothing is remembered for ever.
const defaultRedirect = 307

// path is the policy of one farm. Its snapshot changes with the configuration
// and the farm's servers only.
type path struct {
	snap *policies.Snapshot
}

// Configure makes the routes. Every error in them is reported.
func (p *path) Configure(farm policies.Farm, raw []byte) error {
	var c config
	if err := policies.Decode(raw, &c); err != nil {
		return err
	}
	var errs []error
	check := func(key string, err error) {
		if err != nil {
			errs = append(errs, policies.Errorf(key, "%v", err))
		}
	}
	if len(c.Routes) == 0 && len(c.Default) == 0 && c.Affinity == nil {
		errs = append(errs, policies.Errorf("config", "has none of routes, default and affinity; expected at least one of them"))
	}
	servers := func(key string, names []string) {
		seen := map[string]bool{}
		for i, name := range names {
			at := fmt.Sprintf("%s[%d]", key, i)
			if err := farm.CheckServer(at, name); err != nil {
				errs = append(errs, err)
			} else if seen[name] {
				errs = append(errs, policies.Errorf(at, "server %q is there twice", name))
			}
			seen[name] = true
		}
	}
	routes := &policies.Routes{Default: c.Default}
	seen := map[string]int{}
	for i := range c.Routes {
		r := &c.Routes[i]
		key := fmt.Sprintf("config.routes[%d]", i)
		check(key+".host", snapshot.CheckHost(r.Host))
		check(key+".path", snapshot.CheckPath(r.Path))
		check(key+".prefix", snapshot.CheckPath(r.Prefix))
		servers(key+".servers", r.Servers)
		out := policies.Route{Host: r.Host, Path: r.Path, Prefix: r.Prefix}
		for _, m := range []struct {
			key    string
			cookie bool
			values map[string]string
		}{{".headers", false, r.Headers}, {".cookies", true, r.Cookies}} {
			for _, name := range slices.Sorted(maps.Keys(m.values)) {
				f := policies.FieldMatch{Field: policies.Field{Name: name, Cookie: m.cookie}, Value: m.values[name]}
				check(key+m.key, snapshot.CheckField(f.Field))
				out.Fields = append(out.Fields, f)
			}
		}
		actions := 0
		if r.Servers != nil {
			actions++
			out.Servers = r.Servers
			if len(r.Servers) == 0 {
				errs = append(errs, policies.Errorf(key+".servers", "is empty; to refuse these requests write reject"))
			}
		}
		if r.Reject != nil {
			actions++
			out.Reject = *r.Reject
			if out.Reject < 400 || out.Reject > 599 {
				errs = append(errs, policies.Errorf(key+".reject", "is %d, expected a status from 400 to 599", out.Reject))
			}
		}
		if r.Redirect != nil {
			actions++
			out.Redirect, out.Location = r.Redirect.Status, r.Redirect.Location
			if out.Redirect == 0 {
				out.Redirect = defaultRedirect
			}
			check(key+".redirect", snapshot.CheckRedirect(out.Redirect, out.Location))
		}
		if actions != 1 {
			errs = append(errs, policies.Errorf(key, "has %d of servers, reject and redirect, expected exactly one", actions))
		}
		if r.Path != "" && r.Prefix != "" {
			errs = append(errs, policies.Errorf(key, "has both path and prefix, expected at most one"))
		}
		id := identity(r)
		if first, ok := seen[id]; ok {
			errs = append(errs, policies.Errorf(key, "matches the same requests as config.routes[%d]", first))
		} else {
			seen[id] = i
		}
		routes.Routes = append(routes.Routes, out)
	}
	servers("config.default", c.Default)
	snap := &policies.Snapshot{Routes: routes}
	if a := c.Affinity; a != nil {
		servers("config.affinity.servers", a.Servers)
		for _, v := range slices.Sorted(maps.Keys(a.Table)) {
			if err := farm.CheckServer("config.affinity.table."+v, a.Table[v]); err != nil {
				errs = append(errs, err)
			}
		}
		out, err := a.compile()
		if err != nil {
			errs = append(errs, err)
		}
		snap.Affinity = out
		if len(c.Routes) == 0 && len(c.Default) == 0 {
			// Without routes every server will do.
			for _, s := range farm.Servers {
				routes.Default = append(routes.Default, s.Name)
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	// What one key alone cannot show: what all of them together come to.
	if err := trial(farm, snap); err != nil {
		return policies.Errorf("config", "%v", err)
	}
	p.snap = snap
	return nil
}

// compile turns the configuration into an affinity.
func (a *affinity) compile() (*policies.Affinity, error) {
	out := &policies.Affinity{Hash: len(a.Table) == 0, Servers: a.Servers}
	kinds := 0
	if a.Header != "" {
		kinds++
		out.Key.Field.Name = a.Header
	}
	if a.Cookie != "" {
		kinds++
		out.Key.Field = policies.Field{Name: a.Cookie, Cookie: true}
	}
	if a.Client != nil {
		kinds++
		out.Key.Bits4, out.Key.Bits6 = a.Client.IPv4, a.Client.IPv6
		if a.Client.IPv4 > 32 {
			return nil, policies.Errorf("config.affinity.client.ipv4", "is %d, expected 0 to 32", a.Client.IPv4)
		}
		if a.Client.IPv6 > 128 {
			return nil, policies.Errorf("config.affinity.client.ipv6", "is %d, expected 0 to 128", a.Client.IPv6)
		}
	}
	if kinds != 1 {
		return nil, policies.Errorf("config.affinity", "has %d of header, cookie and client, expected exactly one", kinds)
	}
	if a.Hash != nil {
		out.Hash = *a.Hash
	}
	if !out.Hash && len(a.Table) == 0 {
		return nil, policies.Errorf("config.affinity", "has neither a table nor hash")
	}
	if !out.Hash && len(a.Servers) > 0 {
		return nil, policies.Errorf("config.affinity.servers", "is for hash, which is off")
	}
	for _, v := range slices.Sorted(maps.Keys(a.Table)) {
		out.Table = append(out.Table, policies.Pin{Value: v, Server: a.Table[v]})
	}
	return out, nil
}

// trial compiles the snapshot as Weir will.
func trial(farm policies.Farm, snap *policies.Snapshot) error {
	var servers []snapshot.ServerConfig
	for _, s := range farm.Servers {
		servers = append(servers, snapshot.ServerConfig{Name: s.Name, Weight: s.Weight, Backup: s.Backup})
	}
	_, err := snapshot.NewSelector(servers, []snapshot.Policy{{Name: "path", Snapshot: snap}})
	return err
}

// identity is equal for two routes that match the same requests.
func identity(r *route) string {
	host := strings.TrimSuffix(strings.ToLower(r.Host), ".")
	if host == "*" {
		host = ""
	}
	headers := map[string]string{}
	for k, v := range r.Headers {
		headers[strings.ToLower(k)] = v
	}
	return fmt.Sprintf("%s %q %q %q %q", host, r.Path, r.Prefix, headers, r.Cookies) // maps are printed in order
}

// Tick sends the routes, the same ones every time.
func (p *path) Tick(policies.Farm, *policies.Telemetry) (*policies.Snapshot, error) {
	return p.snap, nil
}
