// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

func (a *app) doctorCommand() *cobra.Command {
	var output string
	var all, probe bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look at this host, its kernel, sysctls and other tables",
		Long: "doctor looks for everything that keeps an instance of the configuration from starting or its packets from passing, says what it means, and names the command that mends it. " +
			"It changes nothing. With --probe it also sends packets like those of Weir and of clients through the tables of others, has nftables trace them, and tells where they end; none of them leaves the host. The exit code is 0 if all is well, 3 if it works but not for all, 1 if it cannot work.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "table" && output != "json" {
				return fmt.Errorf("-o %s: expected table or json", output)
			}
			cfg, _, err := a.load()
			if err != nil {
				return err
			}
			list, err := a.hooks.Doctor(cmd.Context(), cfg, probe)
			if err != nil {
				return hookError(err)
			}
			if output == "json" {
				err = a.asJSON(list)
			} else {
				err = a.printFindings(list, all)
			}
			if err != nil {
				return failed(err)
			}
			worst := 0
			for _, f := range list {
				switch f.Level {
				case LevelWarn:
					worst = max(worst, 1)
				case LevelFail:
					worst = max(worst, 2)
				}
			}
			return [...]error{nil, &codeError{code: ExitDegraded}, &codeError{code: ExitFailed}}[worst]
		},
	}
	a.configFlags(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "table", "`FORMAT` of the output: table or json")
	cmd.Flags().BoolVarP(&all, "verbose", "v", false, "explain also what is well")
	cmd.Flags().BoolVar(&probe, "probe", false, "follow probe packets through the tables of others; some are sent only while an instance runs")
	return cmd
}

func (a *app) printFindings(list []Finding, all bool) error {
	var b strings.Builder
	bad := 0
	for _, f := range list {
		fmt.Fprintf(&b, "%-5s %-12s %s\n", f.Level, f.Check, f.Text)
		if f.Level == LevelWarn || f.Level == LevelFail {
			bad++
		}
		if f.Why != "" && (f.Level != LevelOK || all) {
			fmt.Fprintf(&b, "%-18s %s\n", "", f.Why)
		}
		if f.Command != "" {
			fmt.Fprintf(&b, "%-18s mend it: %s\n", "", f.Command)
		}
	}
	if bad == 0 {
		b.WriteString("nothing is in the way\n")
	} else {
		fmt.Fprintf(&b, "%s to look after\n", plural(bad, "thing"))
	}
	_, err := fmt.Fprint(a.out, b.String())
	return err
}

func (a *app) replayCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "replay FILE",
		Short: "Run a capture through the engine, without a network",
		Long: "replay takes the packets between clients and VIPs out of a pcap or pcapng file, such as one of weir trace --pcap or of tcpdump on the clients' side, " +
			"gives them to an engine of the configuration, and shows for every request which server it would go to, or what would be answered, and why. " +
			"The responses of the capture are played by servers that always work. With another --config this answers: what if.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if output != "table" && output != "json" {
				return fmt.Errorf("-o %s: expected table or json", output)
			}
			cfg, _, err := a.load()
			if err != nil {
				return err
			}
			f, err := os.Open(args[0])
			if err != nil {
				return failed(err)
			}
			defer func() { _ = f.Close() }() // It was only read.
			return hookError(a.hooks.Replay(cmd.Context(), cfg, f, a.out, output == "json"))
		},
	}
	a.configFlags(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "table", "`FORMAT` of the output: table or json")
	return cmd
}
