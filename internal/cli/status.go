// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
)

// answerTimeout is how long an instance may take to answer.
const answerTimeout = 10 * time.Second

func (a *app) statusCommand() *cobra.Command {
	var socket, output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what the running instance does",
		Long:  "status asks the running instance over its control socket. The exit code is 3 if the instance is degraded.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "table" && output != "json" {
				return fmt.Errorf("-o %s: expected table or json", output)
			}
			path, err := a.socket(socket)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), answerTimeout)
			defer cancel()
			c, err := control.Dial(path)
			if err != nil {
				return failed(err)
			}
			defer c.Close()
			st, err := c.Status(ctx)
			if err != nil {
				return failed(err)
			}
			if output == "json" {
				enc := json.NewEncoder(a.out)
				enc.SetIndent("", "  ")
				err = enc.Encode(st)
			} else {
				err = printStatus(a.out, st)
			}
			if err != nil {
				return failed(err)
			}
			if st.Condition == control.Degraded {
				return &codeError{code: ExitDegraded}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&socket, "socket", "", "control `SOCKET` of the instance; default: admin.socket of the configuration")
	cmd.Flags().StringVarP(&output, "output", "o", "table", "`FORMAT` of the output: table or json")
	a.configFlags(cmd)
	return cmd
}

// socket returns the control socket that is meant: the flag's, else that of
// the configuration. A configuration in /etc that cannot be read does not keep
// anybody from asking the instance that runs.
func (a *app) socket(flag string) (string, error) {
	if flag != "" {
		return flag, nil
	}
	cfg, opts, err := a.load()
	if err != nil && len(a.config) == 0 {
		cfg, err = config.Load(config.LoadOptions{Env: opts.Env, Overrides: opts.Overrides})
		if err != nil {
			err = loadError(err)
		}
	}
	if err != nil {
		return "", err
	}
	return cfg.Admin.Socket, nil
}

// printStatus writes the tables for people.
func printStatus(w io.Writer, st *control.Status) error {
	var b strings.Builder
	fmt.Fprintf(&b, "weir %s  pid %d  since %s  configuration %d  %s\n", st.Version, st.PID, st.Started.Local().Format(time.DateTime), st.Generation, st.Condition)
	for _, r := range st.Reasons {
		fmt.Fprintf(&b, "  %s\n", r)
	}
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(cells ...any) {
		for i, c := range cells {
			if i > 0 {
				fmt.Fprint(t, "\t")
			}
			fmt.Fprint(t, c)
		}
		fmt.Fprintln(t)
	}
	row()
	row("FARM", "LISTEN", "REQUESTS", "OPENED", "REUSED", "REUSE RATIO")
	for i := range st.Farms {
		f := &st.Farms[i]
		name := f.Name
		if f.Removed {
			name += " (removed)"
		}
		row(name, strings.Join(f.Listen, ","), f.Requests, f.Opened, f.Reused, ratio(f))
	}
	row()
	row("FARM", "SERVER", "ADDRESS", "STATE", "IDLE", "ACTIVE", "OPENED")
	for i := range st.Farms {
		for j := range st.Farms[i].Servers {
			s := &st.Farms[i].Servers[j]
			state := s.State
			if s.Avoided {
				state += ", avoided" // weir policy explain says why
			}
			row(st.Farms[i].Name, s.Name, s.Address, state, s.Idle, s.Active, s.Opened)
		}
	}
	if len(st.Plugins) > 0 {
		row()
		row("PLUGIN", "VERSION", "STATE", "RESTARTS", "ERROR")
		for _, p := range st.Plugins {
			row(p.Name, orDash(p.Version), p.State, p.Restarts, orDash(p.Error))
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	// A table's last cells are padded; nobody wants that in a file.
	for line := range strings.Lines(b.String()) {
		if _, err := io.WriteString(w, strings.TrimRight(line, " \n")+"\n"); err != nil {
			return err
		}
	}
	return nil
}

func ratio(f *control.Farm) string {
	if f.Opened+f.Reused == 0 {
		return "-"
	}
	return strconv.FormatFloat(100*f.ReuseRatio, 'f', 1, 64) + " %"
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
