// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/weirgate/weir/module/config"
)

func (a *app) runCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run in the foreground until SIGTERM or SIGINT",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, layers, err := a.load()
			if err != nil {
				return err
			}
			log, relog := SwitchedLogger(cfg.Log, a.err)
			err = a.hooks.Run(cmd.Context(), Instance{
				Config: cfg, Layers: layers, Log: log, Version: Version(),
				Reread: func() config.LoadOptions {
					again, _ := a.layers() // The flags are right: they were read before.
					return again
				},
				Relog: relog,
			})
			return hookError(err)
		},
	}
	a.configFlags(cmd)
	return cmd
}

func (a *app) cleanupCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove what a killed instance left: rules, sysctls, files",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, _, err := a.load()
			if err != nil {
				return err
			}
			return hookError(a.hooks.Cleanup(cmd.Context(), cfg, a.out))
		},
	}
	a.configFlags(cmd)
	return cmd
}

// hookError gives an error of a hook its exit code: 2 if it is about the
// configuration, else 1.
func hookError(err error) error {
	var one *config.Error // a config.Errors unwraps to it too
	switch {
	case err == nil:
		return nil
	case errors.As(err, &one):
		return loadError(err)
	}
	return failed(err)
}
