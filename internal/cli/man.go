// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// manDate stands on the pages: they are made from the source alone, so that
// two builds make the same ones.
var manDate = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func (a *app) manCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "man",
		Short: "Write the manual pages",
		Long:  "man writes the page of weir to the standard output, or with --dir the pages of all commands into a directory, one file each.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			root := cmd.Root()
			root.DisableAutoGenTag = true
			header := &doc.GenManHeader{Title: "WEIR", Section: "8", Source: "weir", Manual: "System administration", Date: &manDate}
			if dir == "" {
				return asFailed(doc.GenMan(root, header, a.out))
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return failed(err)
			}
			if err := doc.GenManTree(root, header, dir); err != nil {
				return failed(err)
			}
			_, err := fmt.Fprintln(a.out, "manual pages are in", dir)
			return asFailed(err)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "`DIRECTORY` for the pages of all commands")
	return cmd
}
