// SPDX-License-Identifier: Apache-2.0

// Package cli is the command line of weir: arguments, configuration, output
// and exit codes. What the commands do on the host is handed to it as Hooks.
//
// The package must not touch the network, the kernel or another process by
// itself, apart from reading configuration files and speaking to the control
// socket.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/signal"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
)

// Exit codes of every command.
const (
	ExitOK       = 0
	ExitFailed   = 1
	ExitUsage    = 2 // wrong arguments or configuration
	ExitDegraded = 3 // it works, but not all of it
)

// Hooks are the parts of the program that act on the host. A command whose
// hook is nil does not exist.
type Hooks struct {
	// Run runs an instance until ctx ends, and returns when everything it made
	// is removed. The code is the program's exit code where err is nil.
	Run func(ctx context.Context, in Instance) (code int, err error)

	// LastConfig is the configuration that counts in place of the files, because
	// this process goes on for one that died; nil for none.
	LastConfig func() (*config.Config, error)

	// Upgrade has a supervised instance of the configuration go over to another
	// executable, "" for the one at the path that it was started from, and says
	// what happens.
	Upgrade func(ctx context.Context, cfg *config.Config, path string, out io.Writer) error

	// Demo runs a scene of the demonstration ("" is all of them).
	Demo func(ctx context.Context, o DemoOptions, out io.Writer) error

	// DemoServer is a server of the demonstration, in a process of its own.
	DemoServer func(ctx context.Context, addr string) error

	// Cleanup removes what a killed instance of this configuration left, and
	// says what it removed.
	Cleanup func(ctx context.Context, cfg *config.Config, out io.Writer) error

	// Doctor looks at this host and reports what is in the way of an instance
	// of this configuration.
	Doctor func(ctx context.Context, cfg *config.Config, probe bool) ([]Finding, error)

	// Replay runs a capture through an engine of this configuration.
	Replay func(ctx context.Context, cfg *config.Config, capture io.Reader, out io.Writer, asJSON bool) error

	// CheckPlugins asks the plugins of a configuration about theirs. The error
	// may be a config.Errors. Without it, check looks at files alone.
	CheckPlugins func(ctx context.Context, cfg *config.Config) error

	// Explain says which server a request would get by a configuration alone.
	Explain func(ctx context.Context, cfg *config.Config, q control.PolicyQuery) (*control.PolicyExplanation, error)

	// RunPlugin drives a plugin by hand.
	RunPlugin func(ctx context.Context, run PluginRun, out io.Writer) error
}

// Finding is one result of Doctor.
type Finding struct {
	Check   string `json:"check"`         // what was looked at, one word
	Level   string `json:"level"`         // ok, note, warn or fail
	Text    string `json:"text"`          // what was found, in a sentence
	Why     string `json:"why,omitempty"` // what it means
	Command string `json:"command,omitempty"`
}

// Levels of a Finding.
const (
	LevelOK   = "ok"
	LevelNote = "note" // worth knowing, nothing to do
	LevelWarn = "warn" // works, but not for all or not for long
	LevelFail = "fail" // an instance does not start, or serves nobody
)

// Instance is what Run gets.
type Instance struct {
	Config  *config.Config
	Layers  config.LoadOptions // to read the configuration again
	Log     *slog.Logger
	Version string

	// Supervise asks for a parent that keeps the instance running; HangTimeout
	// is how long that waits for a sign of life, and ConfigArgs are the flags
	// that name the configuration.
	Supervise   bool
	HangTimeout time.Duration
	ConfigArgs  []string

	// Reread returns the layers anew: files may have come to /etc.
	Reread func() config.LoadOptions
	// Relog has Log follow another configuration.
	Relog func(config.Log)
	// Aside says why the files, or the configuration of LastConfig, do not count,
	// where they should.
	Aside string
}

// codeError is an error with the exit code that it stands for. Errors without
// one come from the argument parser: they are usage errors.
type codeError struct {
	code int
	err  error // nil: everything has been said
}

func (e *codeError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *codeError) Unwrap() error { return e.err }

func failed(err error) error { return &codeError{ExitFailed, err} }

// loadError marks an error of the configuration.
func loadError(err error) error { return &codeError{ExitUsage, err} }

// app is one call of the program.
type app struct {
	env    []string
	out    io.Writer
	err    io.Writer
	hooks  Hooks
	config []string
	set    []string
}

// Main runs the program with these arguments (the first is its name) and this
// environment and returns its exit code. SIGINT and SIGTERM end it.
func Main(args, env []string, stdout, stderr io.Writer, hooks Hooks) int {
	a := &app{env: env, out: stdout, err: stderr, hooks: hooks}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	cmd := a.root()
	cmd.SetArgs(args[1:])
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	err := cmd.ExecuteContext(ctx)
	var ce *codeError
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &ce):
		if ce.err != nil {
			a.complain(ce.err)
		}
		return ce.code
	}
	a.complain(err)
	_, _ = fmt.Fprintln(stderr, "Run 'weir --help' or 'weir COMMAND --help' for usage.")
	return ExitUsage
}

// complain prints an error. Errors of the configuration begin with the file,
// so that editors find it, and need no prefix.
func (a *app) complain(err error) {
	var one *config.Error // a config.Errors unwraps to it too
	if errors.As(err, &one) {
		_, _ = fmt.Fprintln(a.err, err)
		return
	}
	_, _ = fmt.Fprintln(a.err, "weir:", err)
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "weir",
		Short:         "Internet client-server multiplexer for Linux routers",
		Long:          "weir answers clients in place of a server farm and splices their requests onto pooled server connections.\n\nExit codes: 0 ok, 1 failed, 2 usage or configuration, 3 degraded.",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			err := fmt.Errorf("unknown command %q for %q", args[0], cmd.CommandPath())
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				err = fmt.Errorf("%w; did you mean %s?", err, strings.Join(near, " or "))
			}
			return err
		},
		SuggestionsMinimumDistance: 2,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cmd.SetOut(a.err)
			_ = cmd.Help() // It fails only if stderr does.
			return &codeError{code: ExitUsage}
		},
	}
	root.AddCommand(
		a.checkCommand(), a.statusCommand(), a.farmsCommand(), a.serversCommand(), a.poolCommand(), a.flowsCommand(),
		a.eventsCommand(), a.traceCommand(), a.topCommand(), a.reloadCommand(), a.rulesCommand(), a.versionCommand(), a.manCommand(),
	)
	root.AddCommand(a.policyCommand(), a.pluginsCommand())
	if a.hooks.Doctor != nil {
		root.AddCommand(a.doctorCommand())
	}
	if a.hooks.Replay != nil {
		root.AddCommand(a.replayCommand())
	}
	if a.hooks.Run != nil {
		root.AddCommand(a.runCommand())
	}
	if a.hooks.Upgrade != nil {
		root.AddCommand(a.upgradeCommand())
	}
	if a.hooks.Demo != nil {
		root.AddCommand(a.demoCommand())
	}
	if a.hooks.Cleanup != nil {
		root.AddCommand(a.cleanupCommand())
	}
	return root
}

// configFlags adds the flags of every command that reads the configuration.
func (a *app) configFlags(cmd *cobra.Command) {
	cmd.Flags().StringArrayVarP(&a.config, "config", "c", nil, "configuration `FILE` or directory instead of those in /etc/weir; repeatable")
	cmd.Flags().StringArrayVar(&a.set, "set", nil, "set a single value, `KEY=VALUE` with a key path such as admin.socket; repeatable")
}

// layers returns what the flags and the environment ask for.
func (a *app) layers() (config.LoadOptions, error) {
	opts := config.StandardOptions(a.config, a.env)
	for _, s := range a.set {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return opts, fmt.Errorf("--set %s: expected KEY=VALUE, such as --set log.level=debug", s)
		}
		if opts.Overrides == nil {
			opts.Overrides = map[string]any{}
		}
		opts.Overrides[k] = v
	}
	return opts, nil
}

// load reads the configuration. Its error has an exit code.
func (a *app) load() (*config.Config, config.LoadOptions, error) {
	opts, err := a.layers()
	if err != nil {
		return nil, opts, err
	}
	cfg, err := config.Load(opts)
	if err != nil {
		return nil, opts, loadError(err)
	}
	return cfg, opts, nil
}
