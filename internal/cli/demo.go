// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"github.com/spf13/cobra"
)

// DemoOptions say what the demonstration shows.
type DemoOptions struct {
	Scene string // "" is all of them
	Keep  bool   // leave the last scene's network up until SIGINT
	IPv6  bool   // over IPv6
	Pcap  string // directory for captures; "" for none
}

func (a *app) demoCommand() *cobra.Command {
	var o DemoOptions
	cmd := &cobra.Command{
		Use:   "demo [SCENE]",
		Short: "Show how it works, live, in network namespaces of its own (needs root)",
		Long: "Show how it works, live, in network namespaces of its own (needs root).\n\nScenes: fig5 (two clients, one server connection), fig8 (one client connection, two servers), " +
			"http10 (a client without keep-alive on a pooled connection), farm (2,000 clients, with and without Weir). Without a scene: all of them.",
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.Scene = args[0]
			}
			return hookError(a.hooks.Demo(cmd.Context(), o, a.out))
		},
	}
	cmd.Flags().BoolVar(&o.Keep, "keep", false, "leave the network up after the last scene, with commands to try, until Ctrl-C")
	cmd.Flags().BoolVarP(&o.IPv6, "ipv6", "6", false, "over IPv6")
	cmd.Flags().StringVar(&o.Pcap, "pcap", "", "write what passed on both sides into this `DIRECTORY`")
	if a.hooks.DemoServer != nil {
		cmd.AddCommand(&cobra.Command{
			Use: "server ADDRESS:PORT", Hidden: true, Args: cobra.ExactArgs(1),
			Short: "A server of the demonstration, which runs it by itself",
			RunE: func(cmd *cobra.Command, args []string) error {
				return hookError(a.hooks.DemoServer(cmd.Context(), args[0]))
			},
		})
	}
	return cmd
}
