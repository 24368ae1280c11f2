// SPDX-License-Identifier: Apache-2.0

package module

import (
	"errors"
	"fmt"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/plugins/host"
)

// Locate gives errors about the contents of a configuration, of plugins and of
// the database of farms, the file and line that they speak of. The result is a
// config.Errors then; other errors are returned as they are.
func Locate(cfg *config.Config, err error) error {
	var list config.Errors
	for _, e := range flatten(err) {
		var ce *host.ConfigError
		var se *host.SpecError
		var fe *farm.Error
		var have *config.Error
		switch {
		case errors.As(e, &have):
			list = append(list, have)
		case errors.As(e, &ce):
			list = append(list, located(cfg, policyKey(cfg, ce.Farm, ce.Plugin, ce.Path), fmt.Sprintf("plugin %s: %s", ce.Plugin, ce.Message)))
		case errors.As(e, &se):
			key := "plugins"
			for i := range cfg.Plugins {
				if cfg.Plugins[i].Name == se.Plugin {
					key = fmt.Sprintf("plugins[%d]", i)
				}
			}
			list = append(list, located(cfg, key, fmt.Sprintf("plugin %s: %s", se.Plugin, se.Message)))
		case errors.As(e, &fe):
			list = append(list, located(cfg, farmKey(cfg, fe.Farm, fe.Server), fe.Msg))
		default:
			return err
		}
	}
	if len(list) == 0 {
		return err
	}
	return list
}

func located(cfg *config.Config, key, problem string) *config.Error {
	file, line := cfg.Where(key)
	return &config.Error{File: file, Line: line, Key: key, Problem: problem}
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

func farmKey(cfg *config.Config, farm, server string) string {
	for i := range cfg.Farms {
		if cfg.Farms[i].Name != farm {
			continue
		}
		for j := range cfg.Farms[i].Servers {
			if cfg.Farms[i].Servers[j].Name == server {
				return fmt.Sprintf("farms[%d].servers[%d]", i, j)
			}
		}
		return fmt.Sprintf("farms[%d]", i)
	}
	return "farms"
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
