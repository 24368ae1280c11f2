// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/weirgate/weir/module/control"
)

// PluginRun says how a plugin is driven by hand.
type PluginRun struct {
	Command []string
	Config  string   // JSON or YAML
	Farm    string   // the name of the farm that is made up
	Servers []string // NAME or NAME=ADDRESS:PORT
	Ticks   int      // after which it ends; 0: until it is interrupted
	User    string
	Ask     string   // METHOD URL to ask about; "": nothing
	Client  string   // with Ask
	Headers []string // with Ask
}

func (a *app) pluginsCommand() *cobra.Command {
	var q inquiry
	cmd := &cobra.Command{
		Use:   "plugins",
		Short: "Show the policy plugins: state, snapshots, restarts, decisions",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.shortly(cmd, &q, func(ctx context.Context, c *control.Client) error {
				list, err := c.Plugins(ctx)
				if err != nil {
					return err
				}
				if q.output == "json" {
					return a.asJSON(list)
				}
				return printPlugins(a.out, list, time.Now())
			})
		},
	}
	a.inquiryFlags(cmd, &q, "table", "json")
	if a.hooks.RunPlugin != nil {
		cmd.AddCommand(a.runPluginCommand())
	}
	return cmd
}

func (a *app) runPluginCommand() *cobra.Command {
	var run PluginRun
	cmd := &cobra.Command{
		Use:   "run PATH [ARG]...",
		Short: "Drive a plugin by hand and print all that it says",
		Long: "run starts a plugin as an instance would, with a farm that is made up, and prints what it says about itself, about its configuration and, " +
			"as JSON, each new snapshot. It needs no privileges.",
		Args: cobra.MinimumNArgs(1),
		Example: "  weir plugins run ./myplugin --config '{server: s1}'\n" +
			"  weir plugins run ./tenant --ask 'GET /' -H 'X-Tenant: blue' --ticks 1",
		RunE: func(cmd *cobra.Command, args []string) error {
			run.Command = args
			return hookError(a.hooks.RunPlugin(cmd.Context(), run, a.out))
		},
	}
	cmd.Flags().StringVar(&run.Config, "config", "{}", "the plugin's configuration as `YAML` or JSON text")
	cmd.Flags().StringVar(&run.Farm, "farm", "web", "`NAME` of the farm")
	cmd.Flags().StringSliceVar(&run.Servers, "servers", []string{"s1", "s2", "s3"}, "servers of the farm, `NAME[=ADDRESS:PORT]`")
	cmd.Flags().IntVar(&run.Ticks, "ticks", 0, "end after so many ticks; 0: when interrupted")
	cmd.Flags().StringVar(&run.User, "user", "", "`USER` that runs it; default: an unprivileged one, or yourself")
	cmd.Flags().StringVar(&run.Ask, "ask", "", "ask it about a request, `METHOD URL`, once per tick")
	cmd.Flags().StringVar(&run.Client, "client", "198.18.0.1", "with --ask: `ADDRESS` of the client")
	cmd.Flags().StringArrayVarP(&run.Headers, "header", "H", nil, "with --ask: field of the request, `NAME: VALUE`; repeatable")
	return cmd
}

// printPlugins writes the table for people.
func printPlugins(w io.Writer, list []control.PluginDetail, now time.Time) error {
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "PLUGIN\tVERSION\tSTATE\tRESTARTS\tFARM\tGENERATION\tAGE\tDECISIONS\tASKED\tLATE\tAGREEMENT\tERROR\n")
	for i := range list {
		p := &list[i]
		state := p.State
		if p.Resting {
			state += ", resting"
		}
		farms := p.Farms
		if len(farms) == 0 {
			farms = []control.PluginFarm{{Farm: "-"}}
		}
		for j := range farms {
			f := &farms[j]
			age, agreement, trouble := "-", "-", p.Error
			if !f.LastTick.IsZero() {
				age = max(now.Sub(f.LastTick), 0).Round(100 * time.Millisecond).String()
			}
			if f.Shadow {
				agreement = "shadow"
				if f.Compared > 0 {
					agreement = fmt.Sprintf("%.1f %%", 100*float64(f.Agreed)/float64(f.Compared))
				}
			}
			if f.Error != "" {
				trouble = f.Error
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\t%d\t%s\t%d\t%d\t%d\t%s\t%s\n", p.Name, orDash(p.Version), state, p.Restarts,
				f.Farm, f.Generation, age, f.Decided, f.Asked+f.Cached, f.Late, agreement, orDash(trouble))
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(b.String()) {
		if _, err := io.WriteString(w, strings.TrimRight(line, " \n")+"\n"); err != nil {
			return err
		}
	}
	return nil
}
