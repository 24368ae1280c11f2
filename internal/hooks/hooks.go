// SPDX-License-Identifier: Apache-2.0

// Package hooks puts the parts that act on the host under the command line:
// the daemon, its clean-up, the check of plugin configurations and the
// demonstration. It holds no logic beyond joining them.
package hooks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/weirgate/weir/integration/demo"
	"github.com/weirgate/weir/internal/cli"
	"github.com/weirgate/weir/module"
	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/nft"
	"github.com/weirgate/weir/plugins/host"
)

// All are the hooks of the weir command.
func All() cli.Hooks {
	return cli.Hooks{Run: run, Demo: show, Cleanup: cleanup, CheckPlugins: checkPlugins}
}

func run(ctx context.Context, in cli.Instance) error {
	m, err := module.New(in.Config, module.Options{Log: in.Log, Version: in.Version})
	if err != nil {
		return located(in.Config, err)
	}
	return located(in.Config, m.Run(ctx))
}

func show(ctx context.Context, scene string, out io.Writer) error {
	return demo.Run(ctx, out, scene, demo.Options{})
}

// checkTime bounds a check of plugins: they are local programs.
const checkTime = 30 * time.Second

func checkPlugins(ctx context.Context, cfg *config.Config) error {
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	h := host.New(host.Options{Log: slog.New(slog.DiscardHandler)})
	plugins, farms := module.PluginSpecs(cfg)
	return located(cfg, h.CheckConfig(ctx, plugins, farms))
}

// located gives the errors of plugins about their configuration the file and
// line that they speak of.
func located(cfg *config.Config, err error) error {
	var list config.Errors
	for _, e := range flatten(err) {
		var ce *host.ConfigError
		var se *host.SpecError
		switch {
		case errors.As(e, &ce):
			key := policyKey(cfg, ce.Farm, ce.Plugin, ce.Path)
			file, line := cfg.Where(key)
			list = append(list, &config.Error{File: file, Line: line, Key: key, Problem: fmt.Sprintf("plugin %s: %s", ce.Plugin, ce.Message)})
		case errors.As(e, &se):
			key := "plugins"
			for i := range cfg.Plugins {
				if cfg.Plugins[i].Name == se.Plugin {
					key = fmt.Sprintf("plugins[%d]", i)
				}
			}
			file, line := cfg.Where(key)
			list = append(list, &config.Error{File: file, Line: line, Key: key, Problem: fmt.Sprintf("plugin %s: %s", se.Plugin, se.Message)})
		default:
			return err
		}
	}
	if len(list) == 0 {
		return err
	}
	return list
}

// policyKey is the key path of a policy's own configuration: the farm's entry
// where it has the key, else the plugin's.
func policyKey(cfg *config.Config, farm, plugin, path string) string {
	for i := range cfg.Farms {
		if cfg.Farms[i].Name != farm {
			continue
		}
		for j := range cfg.Farms[i].Policies {
			if cfg.Farms[i].Policies[j].Use == plugin {
				return join(fmt.Sprintf("farms[%d].policies[%d]", i, j), path)
			}
		}
	}
	return join("plugins", path)
}

func join(key, path string) string {
	if path == "" {
		return key
	}
	return key + "." + path
}

func flatten(err error) []error {
	if err == nil {
		return nil
	}
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		var out []error
		for _, e := range many.Unwrap() {
			out = append(out, flatten(e)...)
		}
		return out
	}
	return []error{err}
}

// cleanup removes what a killed instance left.
func cleanup(_ context.Context, cfg *config.Config, out io.Writer) error {
	var errs []error
	errs = append(errs, nft.Cleanup(cfg.Firewall.Table))
	journal, err := nft.OpenJournal(cfg.RuntimeDir)
	if err == nil {
		changes := journal.Changes()
		err = journal.Restore()
		for _, c := range changes {
			fmt.Fprintf(out, "restored %s\n", c.Name)
		}
	}
	errs = append(errs, err)
	for _, name := range []string{"lock", "plugins"} {
		path := filepath.Join(cfg.RuntimeDir, name)
		if _, err := os.Lstat(path); err == nil {
			if err := os.RemoveAll(path); err != nil {
				errs = append(errs, err)
			} else {
				fmt.Fprintf(out, "removed %s\n", path)
			}
		}
	}
	if err := os.Remove(cfg.Admin.Socket); err == nil {
		fmt.Fprintf(out, "removed %s\n", cfg.Admin.Socket)
	}
	return errors.Join(errs...)
}
