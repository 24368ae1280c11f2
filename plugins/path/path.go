// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/snapshot"
)

// config is the plugin's configuration for one farm.
type config struct {
	Routes  []route  `json:"routes"`
	Default []string `json:"default"`
}

// route has Host, and Path or Prefix, to match, and one of the others to do.
type route struct {
	Host     string    `json:"host"`
	Path     string    `json:"path"`
	Prefix   string    `json:"prefix"`
	Servers  []string  `json:"servers"`
	Reject   *uint16   `json:"reject"`
	Redirect *redirect `json:"redirect"`
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
	if len(c.Routes) == 0 && len(c.Default) == 0 {
		errs = append(errs, policies.Errorf("config", "has neither routes nor default; expected at least one of them"))
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
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	p.snap = &policies.Snapshot{Routes: routes}
	return nil
}

// identity is equal for two routes that match the same requests.
func identity(r *route) string {
	host := strings.TrimSuffix(strings.ToLower(r.Host), ".")
	if host == "*" {
		host = ""
	}
	return fmt.Sprintf("%s %q %q", host, r.Path, r.Prefix)
}

// Tick sends the routes, the same ones every time.
func (p *path) Tick(policies.Farm, *policies.Telemetry) (*policies.Snapshot, error) {
	return p.snap, nil
}
