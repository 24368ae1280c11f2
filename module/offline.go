// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"log/slog"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/nft"
	"github.com/weirgate/weir/plugins/host"
)

// OfflineDB builds the database of farms of a configuration without an
// instance. Its plugins are started, asked what they say that is no
// measurement, and stopped again. It needs no privileges. A plugin that says
// nothing within its start timeout is an error.
func OfflineDB(ctx context.Context, cfg *config.Config, log *slog.Logger) (db *farm.DB, err error) {
	err = offline(ctx, cfg, log, func(made *farm.DB, _ *host.Host) error {
		db = made
		return nil
	})
	return db, err
}

// Ruleset gives the parameters of the ruleset that an instance of the
// configuration would install on this machine.
func Ruleset(cfg *config.Config) nft.Params { return firewallParams(cfg, cfg.ShardCount(0)) }

// longestStart is how long the plugins of a configuration may take for their
// first word.
func longestStart(cfg *config.Config) time.Duration {
	longest := time.Second
	for _, p := range cfg.UsedPlugins() {
		longest = max(longest, p.StartTimeout.Std())
	}
	return longest
}
