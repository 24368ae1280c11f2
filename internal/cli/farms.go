// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/weirgate/weir/module/control"
)

func (a *app) farmsCommand() *cobra.Command {
	var q inquiry
	cmd := &cobra.Command{
		Use:   "farms",
		Short: "List the farms and what they did",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.shortly(cmd, &q, func(ctx context.Context, c *control.Client) error {
				st, err := c.Status(ctx)
				if err != nil {
					return err
				}
				if q.output == "json" {
					return a.asJSON(st.Farms)
				}
				t := newTable("FARM", "LISTEN", ">CLIENTS", ">REQUESTS", ">OPENED", ">REUSED", ">REUSE", ">WAITING", ">OWN ANSWERS", ">REDISPATCHED", ">IN", ">OUT")
				for i := range st.Farms {
					f := &st.Farms[i]
					t.row(farmName(f), strings.Join(f.Listen, ","), f.ClientConnections, f.Requests, f.Opened, f.Reused, ratio(f), f.Waiting, f.OwnAnswers, f.Redispatched, size(f.BytesIn), size(f.BytesOut))
				}
				return t.write(a.out)
			})
		},
	}
	a.inquiryFlags(cmd, &q, "table", "json")
	return cmd
}

func farmName(f *control.Farm) string {
	if f.Removed {
		return f.Name + " (removed)"
	}
	return f.Name
}

// size writes bytes as people read them.
func size(n uint64) string {
	const unit = 1024
	if n < unit {
		return strconv.FormatUint(n, 10)
	}
	v, i := float64(n), 0
	for v >= unit && i < 5 {
		v /= unit
		i++
	}
	return fmt.Sprintf("%.1f%ci", v, " KMGTP"[i])
}

// millis writes a time span as people read it.
func millis(ms int64) string {
	switch {
	case ms < 10_000:
		return strconv.FormatFloat(float64(ms)/1000, 'g', 3, 64) + "s"
	default:
		return (time.Duration(ms) * time.Millisecond).Round(time.Second).String()
	}
}

// serverRow is one server with the farm that it is in.
type serverRow struct {
	Farm string `json:"farm"`
	control.Server
	Override *control.Override `json:"override,omitempty"` // what was changed at run time
}

func (a *app) serversCommand() *cobra.Command {
	var q inquiry
	var persist bool
	cmd := &cobra.Command{
		Use:   "servers",
		Short: "List the servers, or change one at run time",
		Long: "servers lists the servers of all farms. The commands below it change one while the instance runs; a change stands until the configuration's files say something else about just that, " +
			"and until the next start unless --persist keeps it. A server is written SERVER, or FARM/SERVER where farms share the name.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.shortly(cmd, &q, func(ctx context.Context, c *control.Client) error { return a.listServers(ctx, c, &q) })
		},
	}
	a.inquiryFlags(cmd, &q, "table", "json")
	change := func(use, short string, args cobra.PositionalArgs, do func(ctx context.Context, c *control.Client, farm, server string, args []string) error) *cobra.Command {
		var q inquiry
		sub := &cobra.Command{
			Use: use, Short: short, Args: args,
			RunE: func(cmd *cobra.Command, args []string) error {
				return a.ask(cmd, &q, func(ctx context.Context, c *control.Client) error {
					farm, server, err := findServer(ctx, c, args[0])
					if err != nil {
						return err
					}
					if err := do(ctx, c, farm, server, args[1:]); err != nil {
						return err
					}
					said := map[string]string{"drain": "drains", "maint": "drains for maintenance", "remove": "removed; what runs drains"}
					word := strings.Fields(use)[0]
					if said[word] != "" {
						word = said[word]
					}
					_, err = fmt.Fprintf(a.out, "%s/%s: %s\n", farm, server, strings.Join(append([]string{word}, args[1:]...), " "))
					return err
				})
			},
			ValidArgsFunction: a.completeServers,
		}
		a.inquiryFlags(sub, &q)
		sub.Flags().BoolVar(&persist, "persist", false, "keep the change over a restart")
		cmd.AddCommand(sub)
		return sub
	}
	state := func(word, short string) {
		change(word+" SERVER", short, cobra.ExactArgs(1), func(ctx context.Context, c *control.Client, farm, server string, _ []string) error {
			_, err := c.ChangeServer(ctx, farm, server, control.ServerChange{State: &word, Persist: persist})
			return err
		})
	}
	state("ready", "Let a server take requests again")
	state("drain", "Give a server nothing new; what runs finishes, idle connections close")
	state("maint", "The same, for a server that is worked on")
	change("weight SERVER WEIGHT", "Change a server's weight, 1 to 256", cobra.ExactArgs(2), func(ctx context.Context, c *control.Client, farm, server string, args []string) error {
		w, err := strconv.Atoi(args[0])
		if err != nil {
			return usage("weight %q: expected a number from 1 to 256", args[0])
		}
		_, err = c.ChangeServer(ctx, farm, server, control.ServerChange{Weight: &w, Persist: persist})
		return err
	})
	change("remove SERVER", "Take a server out of its farm; its connections drain", cobra.ExactArgs(1), func(ctx context.Context, c *control.Client, farm, server string, _ []string) error {
		_, err := c.RemoveServer(ctx, farm, server, persist)
		return err
	})
	cmd.AddCommand(a.addServerCommand(), a.resetServerCommand())
	return cmd
}

// usage is an error of the arguments that is found late.
func usage(format string, args ...any) error { return loadError(fmt.Errorf(format, args...)) }

func (a *app) addServerCommand() *cobra.Command {
	var q inquiry
	var s control.ServerSpec
	cmd := &cobra.Command{
		Use: "add FARM/SERVER ADDRESS:PORT", Short: "Add a server to a farm", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			farm, name, ok := strings.Cut(args[0], "/")
			if !ok {
				return fmt.Errorf("%q: expected FARM/SERVER", args[0])
			}
			addr, err := netip.ParseAddrPort(args[1])
			if err != nil {
				return fmt.Errorf("%q: expected a literal ADDRESS:PORT", args[1])
			}
			s.Name, s.Address = name, addr
			return a.ask(cmd, &q, func(ctx context.Context, c *control.Client) error {
				if _, err := c.AddServer(ctx, farm, s); err != nil {
					return err
				}
				_, err := fmt.Fprintf(a.out, "%s/%s: added\n", farm, name)
				return err
			})
		},
	}
	a.inquiryFlags(cmd, &q)
	cmd.Flags().IntVar(&s.Weight, "weight", 1, "share of the requests, 1 to 256")
	cmd.Flags().BoolVar(&s.Backup, "backup", false, "serve only when no other server can")
	cmd.Flags().BoolVar(&s.Persist, "persist", false, "keep the change over a restart")
	return cmd
}

func (a *app) resetServerCommand() *cobra.Command {
	var q inquiry
	cmd := &cobra.Command{
		Use: "reset FARM/SERVER", Short: "Undo the run-time changes of a server: the files count again", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.ask(cmd, &q, func(ctx context.Context, c *control.Client) error {
				farm, server, ok := strings.Cut(args[0], "/")
				if !ok {
					// One that was removed is found by its override alone.
					list, err := c.Overrides(ctx)
					if err != nil {
						return err
					}
					var hits []string
					for _, o := range list {
						if o.Server == args[0] {
							hits = append(hits, o.Farm)
						}
					}
					if len(hits) != 1 {
						return usage("%q: expected FARM/SERVER", args[0])
					}
					farm, server = hits[0], args[0]
				}
				if _, err := c.DropOverrides(ctx, farm, server); err != nil {
					return err
				}
				_, err := fmt.Fprintf(a.out, "%s/%s: as in the files\n", farm, server)
				return err
			})
		},
		ValidArgsFunction: a.completeServers,
	}
	a.inquiryFlags(cmd, &q)
	return cmd
}

// findServer finds what a user means by SERVER or FARM/SERVER.
func findServer(ctx context.Context, c *control.Client, word string) (farm, server string, err error) {
	st, err := c.Status(ctx)
	if err != nil {
		return "", "", err
	}
	wantFarm, name, ok := strings.Cut(word, "/")
	if !ok {
		wantFarm, name = "", word
	}
	var hits, all []string
	for _, f := range st.Farms {
		for _, s := range f.Servers {
			if s.State == "removed" {
				continue
			}
			all = append(all, f.Name+"/"+s.Name)
			if s.Name == name && (wantFarm == "" || wantFarm == f.Name) {
				hits = append(hits, f.Name+"/"+s.Name)
			}
		}
	}
	switch len(hits) {
	case 1:
		farm, server, _ = strings.Cut(hits[0], "/")
		return farm, server, nil
	case 0:
		return "", "", errors.New("there is no server " + word + "; there are " + strings.Join(all, ", "))
	}
	return "", "", usage("there are several servers %s: %s", word, strings.Join(hits, ", "))
}

// completeServers completes the name of a server from the running instance.
func (a *app) completeServers(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []string
	socket, _ := cmd.Flags().GetString("socket") // The flag is there.
	_ = a.shortly(cmd, &inquiry{socket: socket}, func(ctx context.Context, c *control.Client) error {
		st, err := c.Status(ctx)
		if err != nil {
			return err
		}
		for _, f := range st.Farms {
			for _, s := range f.Servers {
				out = append(out, f.Name+"/"+s.Name)
			}
		}
		return nil
	}) // Nobody can be told while he completes a word.
	return out, cobra.ShellCompDirectiveNoFileComp
}

func (a *app) listServers(ctx context.Context, c *control.Client, q *inquiry) error {
	st, err := c.Status(ctx)
	if err != nil {
		return err
	}
	changed, err := c.Overrides(ctx)
	if err != nil {
		return err
	}
	var rows []serverRow
	for i := range st.Farms {
		for _, s := range st.Farms[i].Servers {
			r := serverRow{Farm: st.Farms[i].Name, Server: s}
			for j := range changed {
				if o := &changed[j]; o.Farm == r.Farm && o.Server == s.Name {
					r.Override = o
				}
			}
			rows = append(rows, r)
		}
	}
	if q.output == "json" {
		if rows == nil {
			rows = []serverRow{}
		}
		return a.asJSON(rows)
	}
	t := newTable("FARM", "SERVER", "ADDRESS", "STATE", ">WEIGHT", ">ACTIVE", ">IDLE", ">OPEN", ">REQUESTS", ">OPENED", ">REUSED", ">FAILED", "CHANGED")
	for i := range rows {
		s := &rows[i]
		weight := strconv.Itoa(s.Weight)
		if s.Backup {
			weight += " backup"
		}
		t.row(s.Farm, s.Name, s.Address, s.State, weight, s.Active, s.Idle, s.Open, s.Requests, s.Opened, s.Reused, kinds(s.Failed), changedText(s.Override))
	}
	if err := t.write(a.out); err != nil {
		return err
	}
	for _, o := range changed {
		if o.Removed {
			if _, err := fmt.Fprintf(a.out, "%s/%s was removed at run time; weir servers reset brings it back\n", o.Farm, o.Server); err != nil {
				return err
			}
		}
	}
	return nil
}

// kinds writes counters by kind: "refused 3, reset 1".
func kinds(m map[string]uint64) string {
	var names []string
	for k := range m {
		names = append(names, k)
	}
	sort.Strings(names)
	for i, k := range names {
		names[i] = fmt.Sprintf("%s %d", k, m[k])
	}
	return strings.Join(names, ", ")
}

// changedText says what was changed at run time.
func changedText(o *control.Override) string {
	if o == nil {
		return ""
	}
	var parts []string
	if o.Added {
		parts = append(parts, "added")
	}
	if o.State != "" {
		parts = append(parts, "state")
	}
	if o.Weight != 0 && !o.Added {
		parts = append(parts, "weight")
	}
	if o.Persist {
		parts = append(parts, "kept")
	}
	return strings.Join(parts, ",")
}

func (a *app) poolCommand() *cobra.Command {
	var q inquiry
	cmd := &cobra.Command{
		Use:   "pool",
		Short: "Show the pools of server connections",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.shortly(cmd, &q, func(ctx context.Context, c *control.Client) error {
				list, err := c.Pools(ctx)
				if err != nil {
					return err
				}
				if q.output == "json" {
					return a.asJSON(list)
				}
				t := newTable("FARM", "SERVER", "STATE", ">IDLE", ">ACTIVE", ">CONNECTING", ">DRAINING", ">CLOSING", ">WAITING", ">MAX IDLE", ">MAX", ">OLDEST IDLE", ">OPENED", ">REUSED", "CLOSED")
				for i := range list {
					p := &list[i]
					idle := "-"
					if p.Idle > 0 {
						idle = millis(p.OldestIdleMS)
					}
					t.row(p.Farm, p.Server, p.State, p.Idle, p.Active, p.Connecting, p.Draining, p.Closing, p.Waiting, limit(p.MaxIdle), limit(p.MaxConnections), idle, p.Opened, p.Reused, kinds(p.Closed))
				}
				return t.write(a.out)
			})
		},
	}
	a.inquiryFlags(cmd, &q, "table", "json")
	return cmd
}

func limit(n int) string {
	if n == 0 {
		return "none"
	}
	return strconv.Itoa(n)
}
