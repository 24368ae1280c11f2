// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/weirgate/weir/module/config"
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
			page, err := mainPage(root, header)
			if err != nil {
				return failed(err)
			}
			if dir == "" {
				_, err := io.WriteString(a.out, page)
				return asFailed(err)
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return failed(err)
			}
			if err := doc.GenManTree(root, header, dir); err != nil {
				return failed(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "weir.8"), []byte(page), 0o644); err != nil {
				return failed(err)
			}
			_, err = fmt.Fprintln(a.out, "manual pages are in", dir)
			return asFailed(err)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "`DIRECTORY` for the pages of all commands")
	return cmd
}

// mainSections are what the page of weir has beyond its commands.
const mainSections = `.SH EXIT STATUS
.TP
.B 0
It worked.
.TP
.B 1
It failed: no instance answers, a wish was refused, this host is in the way (\fBweir doctor\fP).
.TP
.B 2
Wrong arguments, or a configuration that is refused. Nothing has changed.
.TP
.B 3
It works, but not all of it: the instance is degraded, a change waits for a restart, the doctor has a warning.
.SH FILES
.TP
.I ` + config.StandardFile + `
The configuration.
.TP
.I ` + config.StandardDir + `/*.yaml
More of it, in the order of the names.
.TP
.I /run/weir
Control socket, lock, journal of changed sysctls, plugins' sockets.
.TP
.I /usr/lib/weir/plugins
Policy plugins.
.TP
.I /usr/share/doc/weir
config.md explains every key, operations.md is the operator's guide, plugins.md tells how to write a plugin.
.SH ENVIRONMENT
A variable sets a single value of the configuration, above the files and below the arguments: \fB` + config.EnvPrefix + `\fP and the key in capitals, with two underscores between levels, such as \fB` + config.EnvPrefix + `LOG__LEVEL=debug\fP.
`

// mainPage is the manual page of weir itself.
func mainPage(root *cobra.Command, header *doc.GenManHeader) (string, error) {
	var b bytes.Buffer
	if err := doc.GenMan(root, header, &b); err != nil {
		return "", err
	}
	before, after, found := strings.Cut(b.String(), ".SH SEE ALSO\n")
	if !found {
		return before + mainSections, nil
	}
	return before + mainSections + ".SH SEE ALSO\n" + after, nil
}
