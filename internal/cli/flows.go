// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/weirgate/weir/module/control"
)

// clearScreen moves to the top left corner and clears what is below.
const clearScreen = "\x1b[H\x1b[J"

func (a *app) flowsCommand() *cobra.Command {
	var q inquiry
	var client, vip, farm, server, state string
	var most int
	var watch bool
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "List client connections and the server connections they are spliced to",
		Long: "flows lists client connections. With -o json every connection is one line. " +
			"States: head (waits for a request or collects its head), waiting (for capacity), binding (a server connection is being opened), spliced, answering (by the engine itself), closing.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			want, err := control.ParseFlowFilter(func(key string) string {
				return map[string]string{"client": client, "vip": vip, "farm": farm, "server": server, "state": state}[key]
			})
			if err != nil {
				return fmt.Errorf("--%w", err)
			}
			want.Limit = most
			return a.ask(cmd, &q, func(ctx context.Context, c *control.Client) error {
				if !watch {
					return a.listFlows(ctx, c, &q, want)
				}
				for {
					if q.output == "table" {
						if _, err := fmt.Fprint(a.out, clearScreen); err != nil {
							return err
						}
					}
					if err := a.listFlows(ctx, c, &q, want); err != nil {
						return err
					}
					select {
					case <-ctx.Done():
						return ctx.Err()
					case <-time.After(time.Second):
					}
				}
			})
		},
	}
	a.inquiryFlags(cmd, &q, "table", "json")
	f := cmd.Flags()
	f.StringVar(&client, "client", "", "only this `CLIENT`: ADDRESS, ADDRESS:PORT or NETWORK/BITS")
	f.StringVar(&vip, "vip", "", "only this VIP, `ADDRESS:PORT`")
	f.StringVar(&farm, "farm", "", "only this `FARM`")
	f.StringVar(&server, "server", "", "only those at this `SERVER`")
	f.StringVar(&state, "state", "", "only those in this `STATE`")
	f.IntVar(&most, "limit", 0, "at most so many; 0: all")
	f.BoolVarP(&watch, "watch", "w", false, "show them again every second")
	_ = cmd.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(control.FlowStates[:], cobra.ShellCompDirectiveNoFileComp)) // The flag is there.
	cmd.AddCommand(a.killCommand())
	return cmd
}

// listFlows writes as it reads: there may be a hundred thousand, so columns
// have fixed widths.
func (a *app) listFlows(ctx context.Context, c *control.Client, q *inquiry, want control.FlowFilter) error {
	w := bufio.NewWriterSize(a.out, 64<<10)
	if q.output == "json" {
		err := c.FlowLines(ctx, want, func(b []byte) error {
			if _, err := w.Write(b); err != nil {
				return err
			}
			return w.WriteByte('\n')
		})
		if err != nil {
			return err
		}
		return w.Flush()
	}
	var b []byte
	line := func(cells ...string) error {
		b = b[:0]
		for i, c := range cells {
			width := flowWidths[i]
			if width < 0 { // to the right
				b = append(appendSpaces(b, -width-len(c)), c...)
			} else {
				b = appendSpaces(append(b, c...), width-len(c))
			}
			b = append(b, ' ')
		}
		_, err := w.Write(append(bytes.TrimRight(b, " "), '\n'))
		return err
	}
	if err := line("CLIENT", "VIP", "FARM", "STATE", "SERVER", "SNIP", "METHOD", "AGE", "IDLE", "HELD"); err != nil {
		return err
	}
	n := 0
	err := c.Flows(ctx, want, func(f *control.Flow) error {
		n++
		return line(f.Client, f.VIP, f.Farm, f.State, orDash(f.Server), orDash(f.SNIP), orDash(f.Method), millis(f.AgeMS), millis(f.IdleMS), strconv.Itoa(f.Held))
	})
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(w, "%s\n", plural(n, "connection")); err != nil {
		return err
	}
	return w.Flush()
}

// flowWidths are the columns' widths, negative for those aligned to the right.
var flowWidths = [...]int{22, 22, 10, 9, 12, 22, 7, -8, -8, -7}

func appendSpaces(b []byte, n int) []byte {
	for range n {
		b = append(b, ' ')
	}
	return b
}

func (a *app) killCommand() *cobra.Command {
	var q inquiry
	var vip string
	cmd := &cobra.Command{
		Use: "kill ADDRESS:PORT", Short: "Reset the connections of one client port", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := netip.ParseAddrPort(args[0])
			if err != nil {
				return fmt.Errorf("%q: expected the ADDRESS:PORT of a client", args[0])
			}
			var v netip.AddrPort
			if vip != "" {
				if v, err = netip.ParseAddrPort(vip); err != nil {
					return fmt.Errorf("--vip %q: expected ADDRESS:PORT", vip)
				}
			}
			return a.shortly(cmd, &q, func(ctx context.Context, c *control.Client) error {
				n, err := c.Kill(ctx, client, v)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(a.out, "%s killed\n", plural(n, "connection"))
				return err
			})
		},
	}
	a.inquiryFlags(cmd, &q)
	cmd.Flags().StringVar(&vip, "vip", "", "only the one to this VIP, `ADDRESS:PORT`")
	return cmd
}

func (a *app) eventsCommand() *cobra.Command {
	var q inquiry
	var follow bool
	var last int
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show what happened, and with -f what happens",
		Long:  "events shows what the instance remembers: reloads, changes of servers, failures of servers and plugins. With -o json every event is one line.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o := control.EventOptions{Last: last, Follow: follow}
			if !follow && !cmd.Flags().Changed("last") {
				o.Last = -1
			}
			return a.ask(cmd, &q, func(ctx context.Context, c *control.Client) error {
				if q.output == "json" {
					return c.EventLines(ctx, o, func(b []byte) error {
						_, err := fmt.Fprintf(a.out, "%s\n", b)
						return err
					})
				}
				return c.Events(ctx, o, func(e *control.Event) error {
					_, err := fmt.Fprintf(a.out, "%s %-5s %-16s %s\n", e.Time.Local().Format("2006-01-02 15:04:05.000"), e.Level, e.Name, e.Text)
					return err
				})
			})
		},
	}
	a.inquiryFlags(cmd, &q, "table", "json")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until interrupted")
	cmd.Flags().IntVarP(&last, "last", "n", 10, "how many of the past to show; without -f the default is all")
	return cmd
}
