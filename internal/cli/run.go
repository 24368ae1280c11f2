// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/weirgate/weir/module/config"
)

func (a *app) runCommand() *cobra.Command {
	var supervise bool
	var hang time.Duration
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run in the foreground until SIGTERM or SIGINT",
		Long: "run serves until it is told to stop, and then removes everything that it made. SIGHUP has it read its configuration again.\n\n" +
			"With --supervise a small parent process holds the sockets of the packet queues and runs the instance as its child: it starts it again when it dies, replaces it when it hangs, and goes over to another version by 'weir upgrade'.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if hang < shortestHang {
				return fmt.Errorf("--hang-timeout %v: at least %v", hang, shortestHang)
			}
			cfg, layers, err := a.load()
			var aside string // why something does not count that should
			if a.hooks.LastConfig != nil {
				last, lerr := a.hooks.LastConfig()
				switch {
				case lerr != nil:
					aside = lerr.Error()
				case last != nil:
					if err != nil {
						aside = err.Error()
					}
					cfg, err = last, nil
				}
			}
			if err != nil {
				return err
			}
			log, relog := SwitchedLogger(cfg.Log, a.err)
			code, err := a.hooks.Run(cmd.Context(), Instance{
				Config: cfg, Layers: layers, Log: log, Version: Version(),
				Supervise: supervise, HangTimeout: hang, ConfigArgs: a.configArgs(),
				Reread: func() config.LoadOptions {
					again, _ := a.layers() // The flags are right: they were read before.
					return again
				},
				Relog: relog, Aside: aside,
			})
			if err == nil && code != ExitOK {
				return &codeError{code: code}
			}
			return hookError(err)
		},
	}
	a.configFlags(cmd)
	cmd.Flags().BoolVar(&supervise, "supervise", false, "keep it running: hold its queues, start it again when it dies or hangs")
	cmd.Flags().DurationVar(&hang, "hang-timeout", 3*time.Second, "with --supervise: replace an instance that gives no sign of life for this `LONG`")
	return cmd
}

// shortestHang is the shortest silence that may count as a hang. A sign of life
// comes three times in it.
const shortestHang = 300 * time.Millisecond

// configArgs are the flags that name the configuration, for another command.
func (a *app) configArgs() (args []string) {
	for _, f := range a.config {
		args = append(args, "--config", f)
	}
	for _, s := range a.set {
		args = append(args, "--set", s)
	}
	return args
}

func (a *app) upgradeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "upgrade [PATH]",
		Short: "Go over to another version, without a stop",
		Long: "upgrade has the supervisor of a running instance (run --supervise) start the executable PATH, or the one that is now where the running one came from. " +
			"The new instance prepares itself beside the old one. Only when it is prepared the old one is killed, and the new one takes its connections over. " +
			"If it cannot be prepared, the old one serves on, and the exit code is 1.",
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			path := ""
			if len(args) > 0 {
				var err error
				if path, err = filepath.Abs(args[0]); err != nil {
					return failed(err)
				}
			}
			cfg, _, err := a.load()
			if err != nil {
				return err
			}
			return hookError(a.hooks.Upgrade(cmd.Context(), cfg, path, a.out))
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
