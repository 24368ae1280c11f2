// SPDX-License-Identifier: Apache-2.0

// Command weir is the daemon and the operator's tool. All of it is in package
// internal/cli and below; this file only puts the parts together.
package main

import (
	"os"

	"github.com/weirgate/weir/internal/cli"
	"github.com/weirgate/weir/internal/hooks"
)

func main() {
	os.Exit(cli.Main(os.Args, os.Environ(), os.Stdout, os.Stderr, hooks.All()))
}
