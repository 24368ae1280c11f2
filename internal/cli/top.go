// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/weirgate/weir/module/control"
)

func (a *app) topCommand() *cobra.Command {
	var q inquiry
	var every time.Duration
	var count int
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Live view of farms and servers",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if every < 100*time.Millisecond {
				return fmt.Errorf("--interval %s: expected at least 100ms", every)
			}
			return a.ask(cmd, &q, func(ctx context.Context, c *control.Client) error {
				var before *control.Status
				var at time.Time
				for n := 0; ; n++ {
					st, err := c.Status(ctx)
					if err != nil {
						return err
					}
					now := time.Now()
					if before != nil {
						text := topText(before, st, now.Sub(at))
						if count == 0 {
							text = clearScreen + text
						}
						if _, err := fmt.Fprint(a.out, text); err != nil {
							return err
						}
						if count > 0 && n == count {
							return nil
						}
					}
					before, at = st, now
					select {
					case <-ctx.Done():
						return ctx.Err()
					case <-time.After(every):
					}
				}
			})
		},
	}
	a.inquiryFlags(cmd, &q)
	cmd.Flags().DurationVarP(&every, "interval", "i", time.Second, "time between two looks")
	cmd.Flags().IntVarP(&count, "count", "n", 0, "show so many and end, without clearing the screen; 0: until interrupted")
	return cmd
}

// topText shows what happened between two looks.
func topText(before, now *control.Status, span time.Duration) string {
	sec := span.Seconds()
	rate := func(a, b uint64) string {
		if b < a { // the farm was removed and is back
			a = 0
		}
		r := float64(b-a) / sec
		if r < 10 {
			return fmt.Sprintf("%.1f", r)
		}
		return fmt.Sprintf("%.0f", r)
	}
	bytes := func(a, b uint64) string { return size(uint64(float64(b-min(a, b))/sec)) + "B" }
	farms := map[string]*control.Farm{}
	servers := map[string]*control.Server{}
	for i := range before.Farms {
		f := &before.Farms[i]
		farms[f.Name] = f
		for j := range f.Servers {
			servers[f.Name+"/"+f.Servers[j].Name+f.Servers[j].Address] = &f.Servers[j]
		}
	}
	ft := newTable("FARM", ">REQ/S", ">CONN/S", ">OPENED/S", ">REUSE", ">WAITING", ">IN/S", ">OUT/S")
	sv := newTable("FARM", "SERVER", "STATE", ">WEIGHT", ">REQ/S", ">ACTIVE", ">IDLE", ">OPENED/S", ">OUT/S", "FAILED")
	for i := range now.Farms {
		f := &now.Farms[i]
		old := farms[f.Name]
		if old == nil {
			old = &control.Farm{}
		}
		opened, reused := f.Opened-min(old.Opened, f.Opened), f.Reused-min(old.Reused, f.Reused)
		share := "-"
		if opened+reused > 0 {
			share = fmt.Sprintf("%.1f %%", 100*float64(reused)/float64(opened+reused))
		}
		ft.row(farmName(f), rate(old.Requests, f.Requests), rate(old.ClientConnections, f.ClientConnections), rate(old.Opened, f.Opened), share, f.Waiting, bytes(old.BytesIn, f.BytesIn), bytes(old.BytesOut, f.BytesOut))
		for j := range f.Servers {
			s := &f.Servers[j]
			o := servers[f.Name+"/"+s.Name+s.Address]
			if o == nil {
				o = &control.Server{}
			}
			sv.row(f.Name, s.Name, s.State, s.Weight, rate(o.Requests, s.Requests), s.Active, s.Idle, rate(o.Opened, s.Opened), bytes(o.BytesOut, s.BytesOut), kinds(s.Failed))
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "weir %s  %s  configuration %d  %s\n", now.Version, now.Condition, now.Generation, time.Now().Format(time.TimeOnly))
	for _, r := range now.Reasons {
		fmt.Fprintf(&b, "  %s\n", r)
	}
	b.WriteByte('\n')
	_ = ft.write(&b) // A strings.Builder takes everything.
	b.WriteByte('\n')
	_ = sv.write(&b)
	for _, p := range now.Plugins {
		if p.State != "up" {
			fmt.Fprintf(&b, "\nplugin %s is %s: %s\n", p.Name, p.State, orDash(p.Error))
		}
	}
	return b.String()
}
