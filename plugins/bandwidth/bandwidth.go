// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"maps"
	"slices"

	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/snapshot"
)

// config is the plugin's configuration for one farm.
type config struct {
	Servers map[string]*budget `json:"servers"`
	Each    *budget            `json:"each"`
	Farm    *budget            `json:"farm"`
	AtCap   string             `json:"at_cap"`
}

type budget struct {
	Rate  policies.Rate `json:"rate"`
	Burst policies.Size `json:"burst"`
	AtCap string        `json:"at_cap"`
}

// bandwidth is the policy of one farm. Its snapshot changes with the
// configuration and the farm's servers only.
type bandwidth struct {
	snap *policies.Snapshot
}

// leastBurst is enough for what a server sends before anybody can act.
const leastBurst = 64 << 10

var atCaps = map[string]snapshot.AtCap{"skip": snapshot.AtCapSkip, "wait": snapshot.AtCapWait, "ignore": snapshot.AtCapIgnore}

// Configure makes the budgets. Every error in them is reported.
func (b *bandwidth) Configure(farm policies.Farm, raw []byte) error {
	var c config
	if err := policies.Decode(raw, &c); err != nil {
		return err
	}
	var errs []error
	fail := func(key, format string, args ...any) { errs = append(errs, policies.Errorf(key, format, args...)) }
	word := func(key, at, otherwise string) snapshot.AtCap {
		if at == "" {
			at = otherwise
		}
		v, ok := atCaps[at]
		if !ok {
			fail(key, "is %q, expected skip, wait or ignore", at)
		}
		return v
	}
	general := c.AtCap
	if general == "" {
		general = "skip"
	}
	if _, ok := atCaps[general]; !ok {
		word("config.at_cap", general, "")
		general = "skip"
	}
	one := func(key, server string, in *budget, otherwise string) policies.Budget {
		if in == nil {
			fail(key, "is nothing, expected a map with a rate")
			return policies.Budget{}
		}
		// Written so that what is not a number fails.
		if !(in.Rate > 0 && in.Rate <= 1e12) {
			fail(key+".rate", "is %s, expected a rate above 0, such as 100Mbit", in.Rate)
		}
		out := policies.Budget{Server: server, Rate: float64(in.Rate), Burst: float64(in.Burst)}
		if in.Burst == 0 {
			out.Burst = max(leastBurst, out.Rate/10)
		}
		out.AtCap = word(key+".at_cap", in.AtCap, otherwise)
		return out
	}
	if len(c.Servers) == 0 && c.Each == nil && c.Farm == nil {
		fail("config", "has none of servers, each and farm; expected at least one of them")
	}
	out := &policies.Budgets{}
	for _, name := range slices.Sorted(maps.Keys(c.Servers)) {
		key := "config.servers." + name
		if err := farm.CheckServer(key, name); err != nil {
			errs = append(errs, err)
			continue
		}
		out.Servers = append(out.Servers, one(key, name, c.Servers[name], general))
	}
	if c.Each != nil {
		each := one("config.each", "", c.Each, general)
		for _, s := range farm.Servers {
			if _, own := c.Servers[s.Name]; !own {
				each.Server = s.Name
				out.Servers = append(out.Servers, each)
			}
		}
	}
	if c.Farm != nil {
		// With no other server to go to, to skip would be to ignore.
		otherwise := "wait"
		if c.AtCap == "ignore" {
			otherwise = "ignore"
		}
		f := one("config.farm", "", c.Farm, otherwise)
		out.Farm = &f
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	b.snap = &policies.Snapshot{Budgets: out}
	return nil
}

// Tick sends the budgets, the same ones every time.
func (b *bandwidth) Tick(policies.Farm, *policies.Telemetry) (*policies.Snapshot, error) {
	return b.snap, nil
}
