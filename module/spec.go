// SPDX-License-Identifier: Apache-2.0

package module

import (
	"net/netip"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/nft"
	"github.com/weirgate/weir/plugins/host"
	"github.com/weirgate/weir/policies/snapshot"
)

// This file says in the words of each part what a configuration means.

// farmSpec describes the database of farms. snap gives the last snapshot of a
// policy for a farm, and what is known about its plugin.
func farmSpec(c *config.Config, snap func(farm, plugin string) (*snapshot.Snapshot, host.About)) (farm.Spec, error) {
	spec := farm.Spec{SNIPs: c.Source.Addresses}
	for i := range c.Farms {
		f := &c.Farms[i]
		mode, _ := farm.ParseForwarded(f.Forwarded) // the configuration is valid
		safety, _ := farm.ParseRouteSafety(f.RouteSafety)
		fs := farm.FarmSpec{
			Name: f.Name, VIPs: f.Listen, Forwarded: mode,
			Pool: farm.PoolLimits{
				MaxIdle: int32(f.Pool.MaxIdle), MaxConnections: int32(f.Pool.MaxConnections), MinIdle: int32(f.Pool.MinIdle),
				MaxConnecting: int32(f.Pool.MaxConnecting),
				IdleTimeout:   int64(f.Pool.IdleTimeout), MaxRequests: uint32(f.Pool.MaxRequests), MaxAge: int64(f.Pool.MaxAge),
				MaxWaiting: int32(f.Pool.MaxWaiting), WaitTimeout: int64(f.Pool.WaitTimeout),
				DrainLimit: int64(f.Pool.DrainLimit), DrainTimeout: int64(f.Pool.DrainTimeout),
			},
			Timeouts: farm.Timeouts{
				Connect: int64(f.Timeouts.Connect), Head: int64(f.Timeouts.Head), Body: int64(f.Timeouts.Body),
				Idle: int64(f.Timeouts.Idle), Response: int64(f.Timeouts.Response), Tunnel: int64(f.Timeouts.Tunnel),
				Drain: int64(f.Timeouts.Drain),
			},
			Limits: farm.Limits{
				Head: uint32(f.Limits.Head), Fields: uint16(f.Limits.Fields), Target: uint16(f.Limits.Target),
				ChunkExt: uint16(f.Limits.ChunkExtension), Trailers: uint32(f.Limits.Trailers), BodyRate: int64(f.Limits.BodyRate),
				Connections: int32(f.Limits.Connections), PerClient: int32(f.Limits.PerClient), Held: int64(f.Limits.Held),
			},
			RouteSafety: safety,
		}
		for _, p := range f.ForwardedTrust {
			fs.ForwardedTrust = append(fs.ForwardedTrust, p.Netip())
		}
		for _, s := range f.Servers {
			fs.Servers = append(fs.Servers, farm.ServerSpec{Name: s.Name, Endpoint: s.Address, Weight: uint32(s.Weight), Backup: s.Backup})
		}
		policies, err := farmPolicies(f, snap)
		if err != nil {
			return spec, err
		}
		fs.Policies = policies
		spec.Farms = append(spec.Farms, fs)
	}
	return spec, nil
}

// farmPolicies lists a farm's policies with their last snapshots.
func farmPolicies(f *config.Farm, snap func(farm, plugin string) (*snapshot.Snapshot, host.About)) ([]snapshot.Policy, error) {
	var out []snapshot.Policy
	for _, p := range f.Policies {
		onEmpty, err := snapshot.ParseOnEmpty(p.OnEmpty)
		if err != nil {
			return nil, err
		}
		s, about := snap(f.Name, p.Use)
		one := snapshot.Policy{Name: p.Use, OnEmpty: onEmpty, Snapshot: s, RoutePolicy: about.Routes, Shadow: p.Shadow, Ask: about.Ask}
		if p.Fallback == "reject" {
			one.Fallback = snapshot.FallbackReject
		}
		out = append(out, one)
	}
	return out, nil
}

// PluginSpecs describes the plugin processes that a configuration needs and
// the farms that they serve.
func PluginSpecs(c *config.Config) ([]host.PluginSpec, []host.FarmSpec) {
	var plugins []host.PluginSpec
	for _, p := range c.UsedPlugins() {
		expiry := p.Expiry.Std()
		if expiry == 0 {
			expiry = -1 // no limit; the host takes 0 for its default
		}
		limit := p.Restart.Limit
		if limit == 0 {
			limit = -1
		}
		plugins = append(plugins, host.PluginSpec{
			Name: p.Name, Command: p.Command, Config: p.Config, User: p.User, Checksum: p.Checksum,
			StartTimeout: p.StartTimeout.Std(), Expiry: expiry,
			AskDeadline: p.Ask.Deadline.Std(), AskConcurrency: p.Ask.Concurrency,
			BackoffMin: p.Restart.Min.Std(), BackoffMax: p.Restart.Max.Std(), Restarts: limit,
		})
	}
	var farms []host.FarmSpec
	for i := range c.Farms {
		f := &c.Farms[i]
		fs := host.FarmSpec{Name: f.Name}
		for _, s := range f.Servers {
			fs.Servers = append(fs.Servers, host.ServerInfo{Name: s.Name, Address: s.Address.String(), Weight: uint32(s.Weight), Backup: s.Backup})
		}
		for _, p := range f.Policies {
			fs.Policies = append(fs.Policies, host.PolicyUse{Plugin: p.Use, Config: p.Config})
		}
		farms = append(farms, fs)
	}
	return plugins, farms
}

// firewallParams describes the ruleset.
func firewallParams(c *config.Config, shards int) nft.Params {
	p := nft.Params{
		Table: c.Firewall.Table, Mark: c.Firewall.Mark.Value, MarkMask: c.Firewall.Mark.Mask,
		SNIPs: c.Source.Addresses, PortFirst: c.Source.Ports.Low, PortLast: c.Source.Ports.High,
		Shared: c.Source.Shared, QueueFirst: uint16(c.Queue.First), Shards: shards,
		InspectAll: c.Firewall.Inspect == "all",
	}
	seen := map[netip.AddrPort]bool{}
	for i := range c.Farms {
		p.VIPs = append(p.VIPs, c.Farms[i].Listen...)
		for _, s := range c.Farms[i].Servers {
			if !seen[s.Address] {
				seen[s.Address] = true
				p.Servers = append(p.Servers, s.Address)
			}
		}
	}
	return p
}
