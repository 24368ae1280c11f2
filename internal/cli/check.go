// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
)

func (a *app) checkCommand() *cobra.Command {
	var noPlugins, print, diff bool
	var from []string
	var q inquiry
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check the configuration without using it",
		Long: "check reads all layers of the configuration and prints every problem with file, line and key; the exit code is then 2. " +
			"It needs no privileges and does not look at this host; weir doctor does.\n\n" +
			"With --diff it prints what a reload of the running instance would change, and how it would be taken over: at once, by draining connections, or at a restart. " +
			"With --from FILE it compares with that configuration instead of the running instance.",
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
			if diff || len(from) > 0 {
				return a.showDifference(cmd, &q, cfg, from)
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
	a.inquiryFlags(cmd, &q, "table", "json")
	cmd.Flags().BoolVar(&diff, "diff", false, "print what a reload of the running instance would change")
	cmd.Flags().StringArrayVar(&from, "from", nil, "print what changes from the configuration in this `FILE` or directory; repeatable")
	cmd.Flags().BoolVar(&noPlugins, "no-plugins", false, "do not start the plugins to check their part")
	cmd.Flags().BoolVar(&print, "print", false, "print the whole configuration with all defaults; secrets of plugins are hidden")
	return cmd
}

// showDifference prints what changes from the running instance, or from other
// files, to a configuration.
func (a *app) showDifference(cmd *cobra.Command, q *inquiry, cfg *config.Config, from []string) error {
	show := func(r *control.PlanResult) error {
		if q.output == "json" {
			if r.Changes == nil {
				r.Changes = []config.Change{}
			}
			return asFailed(a.asJSON(r))
		}
		if err := printPlan(a.out, r.Changes); err != nil {
			return failed(err)
		}
		for _, o := range r.Overrides {
			if _, err := fmt.Fprintf(a.out, "%s/%s was changed at run time, and stays so\n", o.Farm, o.Server); err != nil {
				return failed(err)
			}
		}
		if len(r.Changes) == 0 {
			_, err := fmt.Fprintln(a.out, "nothing to change")
			return asFailed(err)
		}
		return nil
	}
	if len(from) > 0 {
		old, err := config.Load(config.LoadOptions{Files: from})
		if err != nil {
			return loadError(err)
		}
		return show(&control.PlanResult{Changes: config.Compare(old, cfg)})
	}
	dump, err := cfg.Dump()
	if err != nil {
		return failed(err)
	}
	return a.shortly(cmd, q, func(ctx context.Context, c *control.Client) error {
		r, err := c.Plan(ctx, dump)
		if err != nil {
			return err
		}
		// The instance saw a copy: here it is known where a value stands.
		for i := range r.Changes {
			ch := &r.Changes[i]
			if ch.Action == config.Removed {
				continue
			}
			ch.File, ch.Line = cfg.WhereNamed(ch.Path)
		}
		return show(r)
	})
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
