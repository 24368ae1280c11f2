// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/nft"
	"github.com/weirgate/weir/plugins/host"
	"github.com/weirgate/weir/policies/snapshot"
)

// OfflineDB builds the database of farms of a configuration without an
// instance, with what its plugins say first: they are started, asked and
// stopped again. It needs no privileges. A plugin that says nothing within its
// start timeout is an error.
func OfflineDB(ctx context.Context, cfg *config.Config, log *slog.Logger) (*farm.DB, error) {
	var mu sync.Mutex
	last := map[[2]string]*snapshot.Snapshot{}
	came := make(chan struct{}, 1)
	h := host.New(host.Options{Log: log, OnSnapshot: func(farm, plugin string, s *snapshot.Snapshot) {
		mu.Lock()
		last[[2]string{farm, plugin}] = s
		mu.Unlock()
		select {
		case came <- struct{}{}:
		default:
		}
	}})
	plugins, farms := PluginSpecs(cfg)
	if err := h.Start(ctx, plugins, farms); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	db, err := awaitOffline(ctx, cfg, h, came, func(f, p string) *snapshot.Snapshot {
		mu.Lock()
		defer mu.Unlock()
		return last[[2]string{f, p}]
	})
	return db, errors.Join(err, h.Close())
}

func awaitOffline(ctx context.Context, cfg *config.Config, h *host.Host, came <-chan struct{}, last func(farm, plugin string) *snapshot.Snapshot) (*farm.DB, error) {
	deadline := time.After(longestStart(cfg))
	for {
		missing := ""
		for i := range cfg.Farms {
			for _, p := range cfg.Farms[i].Policies {
				if last(cfg.Farms[i].Name, p.Use) == nil {
					missing = fmt.Sprintf("plugin %s has not said anything about farm %s", p.Use, cfg.Farms[i].Name)
				}
			}
		}
		if missing == "" {
			break
		}
		select {
		case <-came:
		case <-deadline:
			return nil, errors.New(missing)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	spec, err := farmSpec(cfg, func(f, p string) (*snapshot.Snapshot, host.About) { return last(f, p), h.About(p) })
	if err != nil {
		return nil, err
	}
	return farm.Build(nil, spec)
}

func longestStart(cfg *config.Config) time.Duration {
	longest := time.Second
	for _, p := range cfg.UsedPlugins() {
		longest = max(longest, p.StartTimeout.Std())
	}
	return longest
}

// Ruleset gives the parameters of the ruleset that an instance of the
// configuration would install on this machine.
func Ruleset(cfg *config.Config) nft.Params { return firewallParams(cfg, cfg.ShardCount(0)) }
