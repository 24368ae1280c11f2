// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/weirgate/weir/module/control"
)

func (a *app) policyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "Ask what the policies do",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cmd.SetOut(a.err)
			_ = cmd.Help() // It fails only if stderr does.
			return &codeError{code: ExitUsage}
		},
	}
	cmd.AddCommand(a.explainCommand())
	return cmd
}

func (a *app) explainCommand() *cobra.Command {
	var q inquiry
	var query control.PolicyQuery
	cmd := &cobra.Command{
		Use:   "explain METHOD URL",
		Short: "Say which server a request would get, and why",
		Long: "explain prints every step of the choice of a server for a request that is made up. It asks the running instance, with the servers' " +
			"states and load at this moment; with --config it needs none: the plugins of that configuration are started, asked and stopped again.\n\n" +
			"Where several servers may be drawn, each call draws anew.",
		Args: cobra.ExactArgs(2),
		Example: "  weir policy explain GET http://shop.example/sales/forecast.html\n" +
			"  weir policy explain --config weir.yaml --client 198.51.100.7 -H 'Cookie: sid=42' GET /basket",
		RunE: func(cmd *cobra.Command, args []string) error {
			query.Method, query.URL = args[0], args[1]
			show := func(x *control.PolicyExplanation) error {
				if q.output == "json" {
					return a.asJSON(x)
				}
				return printExplanation(a.out, x)
			}
			if len(a.config) > 0 && a.hooks.Explain != nil && q.socket == "" {
				cfg, _, err := a.load()
				if err != nil {
					return err
				}
				x, err := a.hooks.Explain(cmd.Context(), cfg, query)
				if err != nil {
					return askError(hookError(err))
				}
				return asFailed(show(x))
			}
			return a.shortly(cmd, &q, func(ctx context.Context, c *control.Client) error {
				x, err := c.ExplainPolicy(ctx, query)
				if err != nil {
					return err
				}
				return show(x)
			})
		},
	}
	cmd.Flags().StringVar(&query.Farm, "farm", "", "`FARM` that is asked; default: the one whose VIP the URL names, or the only one")
	cmd.Flags().StringVar(&query.Client, "client", "", "`ADDRESS` of the client")
	cmd.Flags().StringArrayVarP(&query.Headers, "header", "H", nil, "field of the request, `NAME: VALUE`; repeatable")
	a.inquiryFlags(cmd, &q, "table", "json")
	return cmd
}

// printExplanation writes the steps for people.
func printExplanation(w io.Writer, x *control.PolicyExplanation) error {
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "POLICY\tSERVERS LEFT\tSTEP\n")
	for _, s := range x.Steps {
		name := s.Policy
		if name == "" {
			name = "farm " + x.Farm
		}
		fmt.Fprintf(t, "%s\t%d\t%s\n", name, s.Candidates, s.Text)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := io.WriteString(w, b.String())
	return err
}
