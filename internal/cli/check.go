// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/weirgate/weir/module/config"
)

func (a *app) checkCommand() *cobra.Command {
	var noPlugins, print bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check the configuration without using it",
		Long: "check reads all layers of the configuration and prints every problem with file, line and key; the exit code is then 2. " +
			"It needs no privileges and does not look at this host; weir doctor does.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, _, err := a.load()
			if err != nil {
				return err
			}
			if a.hooks.CheckPlugins != nil && !noPlugins {
				if err := a.hooks.CheckPlugins(cmd.Context(), cfg); err != nil {
					return loadError(err)
				}
			}
			if print {
				b, err := cfg.Redacted()
				if err != nil {
					return failed(err)
				}
				_, err = a.out.Write(b)
				return asFailed(err)
			}
			_, err = fmt.Fprintln(a.out, summary(cfg))
			return asFailed(err)
		},
	}
	a.configFlags(cmd)
	cmd.Flags().BoolVar(&noPlugins, "no-plugins", false, "do not start the plugins to check their part")
	cmd.Flags().BoolVar(&print, "print", false, "print the whole configuration with all defaults; secrets of plugins are hidden")
	return cmd
}

func asFailed(err error) error {
	if err == nil {
		return nil
	}
	return failed(err)
}

// summary says in one line what a valid configuration has.
func summary(cfg *config.Config) string {
	servers := 0
	for i := range cfg.Farms {
		servers += len(cfg.Farms[i].Servers)
	}
	from := "the defaults alone"
	if len(cfg.Files) > 0 {
		from = strings.Join(cfg.Files, ", ")
	}
	return fmt.Sprintf("ok: %s, %s, %s in use; from %s",
		plural(len(cfg.Farms), "farm"), plural(servers, "server"), plural(len(cfg.UsedPlugins()), "plugin"), from)
}

func plural(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return fmt.Sprintf("%d %ss", n, word)
}
