// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"io"
	"log/slog"

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
			err = a.hooks.Run(cmd.Context(), Instance{
				Config: cfg, Layers: layers, Log: Logger(cfg.Log, a.err), Version: Version(),
			})
			return hookError(err)
		},
	}
	a.configFlags(cmd)
	return cmd
}

func (a *app) demoCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "demo [SCENE]",
		Short: "Show how it works, live, in network namespaces of its own (needs root)",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			scene := ""
			if len(args) > 0 {
				scene = args[0]
			}
			return hookError(a.hooks.Demo(cmd.Context(), scene, a.out))
		},
	}
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

// Logger returns the program log that the configuration asks for.
func Logger(c config.Log, w io.Writer) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		level = slog.LevelInfo // Load has checked it; the zero Config has none.
	}
	opts := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}
