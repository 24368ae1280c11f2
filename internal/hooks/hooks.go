// SPDX-License-Identifier: Apache-2.0

// Package hooks puts the parts that act on the host under the command line:
// the daemon, its clean-up, the check of plugin configurations and the
// demonstration. It holds no logic beyond joining them.
package hooks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/demo"
	"github.com/weirgate/weir/internal/cli"
	"github.com/weirgate/weir/internal/filelock"
	"github.com/weirgate/weir/internal/supervise"
	"github.com/weirgate/weir/module"
	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/nft"
	"github.com/weirgate/weir/plugins/host"
)

// All are the hooks of the weir command.
func All() cli.Hooks {
	return cli.Hooks{Run: run, LastConfig: lastConfig, Upgrade: upgrade, Doctor: examine, Replay: replayCapture, Demo: show, DemoServer: demo.Serve, Cleanup: cleanup, CheckPlugins: checkPlugins, Explain: explainOffline, RunPlugin: runPlugin}
}

func run(ctx context.Context, in cli.Instance) (int, error) {
	if in.Supervise && !supervise.Supervised() {
		return runSupervisor(ctx, in)
	}
	return 0, runEngine(ctx, in)
}

func runEngine(ctx context.Context, in cli.Instance) error {
	link, err := supervise.Find()
	if err != nil {
		return err
	}
	boss := findSupervisor()
	opt := module.Options{
		Log: in.Log, Version: in.Version, Layers: in.Reread, Aside: in.Aside,
		Applied: func(c *config.Config) { in.Relog(c.Log) },
		Ready:   func() { boss.ready(in.Log, "serving") },
	}
	if link != nil {
		boss = supervisor{link: link, watchdog: link.Hang()}
		opt.Sockets = link
		if link.Succeeds() {
			opt.Prepared = link.Prepared
		}
	}
	m, err := module.New(in.Config, opt)
	if err != nil {
		return module.Locate(in.Config, err)
	}
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, unix.SIGHUP)
	go func() {
		for range hup {
			m.ReopenLogs()
			if _, err := m.ReloadFiles(ctx, "SIGHUP"); err != nil && ctx.Err() == nil {
				in.Log.Error("reload", "error", err)
			}
		}
	}()
	defer close(hup)
	defer signal.Stop(hup)
	// The signs of life go on while it stops, which may take longer than the
	// service manager's patience.
	living, dead := context.WithCancel(context.WithoutCancel(ctx))
	defer dead()
	go boss.watch(living, in.Log, m.Alive)
	defer context.AfterFunc(ctx, func() { boss.stopping(in.Log) })()
	return module.Locate(in.Config, m.Run(ctx))
}

func show(ctx context.Context, o cli.DemoOptions, out io.Writer) error {
	return demo.Run(ctx, out, o.Scene, demo.Options{Keep: o.Keep, IPv6: o.IPv6, Pcap: o.Pcap})
}

// checkTime bounds a check of plugins: they are local programs.
const checkTime = 30 * time.Second

func checkPlugins(ctx context.Context, cfg *config.Config) error {
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	h := host.New(host.Options{Log: slog.New(slog.DiscardHandler)})
	plugins, farms := module.PluginSpecs(cfg)
	return module.Locate(cfg, h.CheckConfig(ctx, plugins, farms))
}

// cleanup removes what a killed instance left, and nothing of one that lives:
// on older kernels only the lock tells the two apart.
func cleanup(_ context.Context, cfg *config.Config, out io.Writer) error {
	path := filepath.Join(cfg.RuntimeDir, "lock")
	lock, err := filelock.Take(path)
	switch {
	case err == nil:
		defer lock.Remove()
	case errors.Is(err, filelock.ErrHeld):
		return fmt.Errorf("an instance is running, it holds %s: stop it first", path)
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	left := false
	say := func(format string, args ...any) {
		left = true
		fmt.Fprintf(out, format+"\n", args...)
	}
	var errs []error
	found, err := nft.Cleanup(cfg.Firewall.Table)
	if found {
		say("removed table inet %s", cfg.Firewall.Table)
	}
	errs = append(errs, err)
	journal, err := nft.OpenJournal(cfg.RuntimeDir)
	if err == nil {
		changes := journal.Changes()
		err = journal.Restore()
		for _, c := range changes {
			say("restored %s", c.Name)
		}
	}
	errs = append(errs, err)
	names := []string{"plugins", "flows"}
	// A supervisor that runs this command removes its own files.
	if mark := filepath.Join(cfg.RuntimeDir, supervise.LockName); exists(mark) {
		if l, err := filelock.Take(mark); err == nil {
			defer l.Remove()
			names = append(names, supervise.SocketName)
		}
	}
	for _, name := range names {
		path := filepath.Join(cfg.RuntimeDir, name)
		if exists(path) {
			if err := os.RemoveAll(path); err != nil {
				errs = append(errs, err)
			} else {
				say("removed %s", path)
			}
		}
	}
	if err := os.Remove(cfg.Admin.Socket); err == nil {
		say("removed %s", cfg.Admin.Socket)
	}
	if err := errors.Join(errs...); err != nil || left {
		return err
	}
	_, err = fmt.Fprintln(out, "nothing was left")
	return err
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
