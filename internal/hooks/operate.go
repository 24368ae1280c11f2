// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"context"
	"io"
	"log/slog"

	"github.com/weirgate/weir/internal/cli"
	"github.com/weirgate/weir/module"
	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control/capture"
	"github.com/weirgate/weir/module/doctor"
	"github.com/weirgate/weir/module/replay"
	"github.com/weirgate/weir/nft"
)

// examine looks at this host for an instance of the configuration.
func examine(ctx context.Context, cfg *config.Config, probe bool) ([]cli.Finding, error) {
	var out []cli.Finding
	host := doctor.This()
	if probe {
		host.Trace = nft.Trace
	}
	for _, f := range doctor.Examine(ctx, host, cfg, module.Ruleset(cfg)) {
		out = append(out, cli.Finding{Check: f.Check, Level: string(f.Level), Text: f.Text, Why: f.Why, Command: f.Command})
	}
	return out, nil
}

// replayCapture runs a capture through an engine of the configuration, with
// what its plugins say.
func replayCapture(ctx context.Context, cfg *config.Config, in io.Reader, out io.Writer, asJSON bool) error {
	r, err := capture.NewReader(in)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	db, err := module.OfflineDB(ctx, cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return module.Locate(cfg, err)
	}
	return replay.Print(r, replay.Options{
		DB: db, SNIPs: cfg.Source.Addresses, PortFirst: cfg.Source.Ports.Low, PortLast: cfg.Source.Ports.High,
	}, out, asJSON)
}
