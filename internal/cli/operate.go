// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
)

func (a *app) reloadCommand() *cobra.Command {
	var q inquiry
	cmd := &cobra.Command{
		Use:   "reload",
		Short: "Have the running instance read its configuration again",
		Long: "reload tells what changed and how it was taken over, or every problem with file, line and key; nothing has changed then, and the exit code is 2. " +
			"If something waits for a restart, the rest is in force and the exit code is 3.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.ask(cmd, &q, func(ctx context.Context, c *control.Client) error {
				r, err := c.Reload(ctx)
				if err != nil {
					return err
				}
				if q.output == "json" {
					err = a.asJSON(r)
				} else {
					err = a.printReload(r)
				}
				switch {
				case err != nil:
					return err
				case r.Outcome == control.Refused:
					return &codeError{code: ExitUsage}
				case len(config.Plan(r.Changes).Of(config.Restart)) > 0:
					return &codeError{code: ExitDegraded}
				}
				return nil
			})
		},
	}
	a.inquiryFlags(cmd, &q, "table", "json")
	return cmd
}

func (a *app) printReload(r *control.ReloadResult) error {
	if r.Outcome == control.Refused {
		for _, p := range r.Problems {
			if _, err := fmt.Fprintln(a.err, p.Text); err != nil {
				return err
			}
		}
		_, err := fmt.Fprintln(a.err, "weir: the configuration is refused; the old one stays in force")
		return err
	}
	if err := printPlan(a.out, r.Changes); err != nil {
		return err
	}
	for _, n := range r.Notes {
		if _, err := fmt.Fprintln(a.out, n); err != nil {
			return err
		}
	}
	waits := len(config.Plan(r.Changes).Of(config.Restart))
	var text string
	switch {
	case r.Outcome == control.Unchanged && waits == 0:
		text = "nothing to change"
	case r.Outcome == control.Unchanged:
		text = "nothing to change without a restart"
	case waits > 0:
		text = fmt.Sprintf("configuration %d is in force; %s for a restart", r.Generation, plural(waits, "change")+" left")
	default:
		text = fmt.Sprintf("configuration %d is in force", r.Generation)
	}
	_, err := fmt.Fprintln(a.out, text)
	return err
}

// printPlan writes the changes as a table.
func printPlan(w io.Writer, changes []config.Change) error {
	if len(changes) == 0 {
		return nil
	}
	t := newTable("CHANGE", "TAKEN OVER", "AT")
	words := map[config.Class]string{config.Hot: "at once", config.Drain: "by draining", config.Restart: "at a restart"}
	for _, c := range changes {
		at := c.File
		if c.Line > 0 {
			at = fmt.Sprintf("%s:%d", c.File, c.Line)
		}
		c.From, c.To = elided(c.From), elided(c.To)
		t.row(c.String(), words[c.Class], at)
	}
	return t.write(w)
}

// maxValue is how much of a value a table shows, in characters: a list of routes
// would leave no place for the other columns. JSON has more of it.
const maxValue = 36

func elided(s string) string {
	if r := []rune(s); len(r) > maxValue {
		return string(r[:maxValue-1]) + "…"
	}
	return s
}

func (a *app) rulesCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "rules", Short: "The ruleset in the kernel", Args: cobra.NoArgs, RunE: needsSubcommand}
	var q inquiry
	show := &cobra.Command{
		Use: "show", Short: "Print the installed ruleset in nft's syntax", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.shortly(cmd, &q, func(ctx context.Context, c *control.Client) error {
				text, err := c.Rules(ctx)
				if err != nil {
					return err
				}
				_, err = io.WriteString(a.out, text)
				return err
			})
		},
	}
	a.inquiryFlags(show, &q)
	cmd.AddCommand(show)
	return cmd
}

func needsSubcommand(cmd *cobra.Command, _ []string) error {
	var names []string
	for _, c := range cmd.Commands() {
		names = append(names, c.Name())
	}
	return fmt.Errorf("%s needs one of its commands: %v", cmd.CommandPath(), names)
}
