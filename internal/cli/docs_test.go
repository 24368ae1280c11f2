// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/weirgate/weir/module/config"
)

// everyHook makes every command exist. None of them is run.
var everyHook = Hooks{
	Run:          func(context.Context, Instance) (int, error) { return 0, nil },
	Upgrade:      func(context.Context, *config.Config, string, io.Writer) error { return nil },
	Demo:         func(context.Context, DemoOptions, io.Writer) error { return nil },
	Cleanup:      func(context.Context, *config.Config, io.Writer) error { return nil },
	Doctor:       func(context.Context, *config.Config, bool) ([]Finding, error) { return nil, nil },
	Replay:       func(context.Context, *config.Config, io.Reader, io.Writer, bool) error { return nil },
	CheckPlugins: func(context.Context, *config.Config) error { return nil },
}

var (
	shellBlock = regexp.MustCompile("(?ms)^ *```sh\n(.*?)^ *```$")
	inlineCode = regexp.MustCompile("`([^`]+)`")
	// placeholder stands in prose for what the reader puts there.
	placeholder = regexp.MustCompile(`\b[A-Z]{3,}\b|…`)
)

// commandsOf returns the calls of weir in a document: lines of shell blocks, and
// code between backticks, over line ends too.
func commandsOf(text string) (out []string) {
	add := func(s string) {
		s = strings.Join(strings.Fields(strings.Split(s, "#")[0]), " ")
		s = strings.TrimPrefix(s, "sudo ")
		if rest, ok := strings.CutPrefix(s, "weir "); ok {
			out = append(out, rest)
		}
	}
	for _, b := range shellBlock.FindAllStringSubmatch(text, -1) {
		for line := range strings.Lines(b[1]) {
			add(line)
		}
	}
	prose := regexp.MustCompile("(?ms)^ *```.*?^ *```$").ReplaceAllString(text, "")
	for _, m := range inlineCode.FindAllStringSubmatch(prose, -1) {
		add(m[1])
	}
	return out
}

// parses says what is wrong with a call, without running it.
func parses(call string) string {
	a := &app{out: io.Discard, err: io.Discard, hooks: everyHook}
	root := a.root()
	root.InitDefaultCompletionCmd()
	cmd, rest, err := root.Find(strings.Fields(call))
	if err != nil {
		return err.Error()
	}
	if cmd == root {
		return "no such command"
	}
	if err := cmd.ParseFlags(rest); err != nil {
		return err.Error()
	}
	args := cmd.Flags().Args()
	if cmd.HasSubCommands() && len(args) > 0 && !cmd.HasParent() {
		return "no such subcommand"
	}
	if !placeholder.MatchString(call) {
		if err := check(cmd, args); err != nil {
			return err.Error()
		}
	}
	return ""
}

func check(cmd *cobra.Command, args []string) error {
	if len(args) == 0 && cmd.HasSubCommands() {
		return nil
	}
	return cmd.ValidateArgs(args)
}

// TestDocumentedCommands parses every call of weir in the documents.
func TestDocumentedCommands(t *testing.T) {
	paths, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, path := range append(paths, "../../README.md", "../../cmd/weir/packaging/weir.yaml", "../../docs/monitoring/alerts.yaml") {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, call := range commandsOf(string(b)) {
			n++
			if problem := parses(call); problem != "" {
				t.Errorf("%s: weir %s: %s", path, call, problem)
			}
		}
	}
	if n < 30 {
		t.Errorf("only %d calls were found", n)
	}
}

// TestDocumentedCommandsControl is the negative control.
func TestDocumentedCommandsControl(t *testing.T) {
	for _, call := range []string{"stauts", "status --sockte x", "flows --client", "servers dran web/s1"} {
		if parses(call) == "" {
			t.Errorf("weir %s is taken for right", call)
		}
	}
	got := commandsOf("a `weir\nstatus` b\n```sh\nsudo weir check # comment\nls\n```\n")
	if strings.Join(got, "|") != "check|status" {
		t.Errorf("found %q", got)
	}
}
