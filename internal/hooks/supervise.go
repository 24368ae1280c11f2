// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/weirgate/weir/internal/cli"
	"github.com/weirgate/weir/internal/supervise"
	"github.com/weirgate/weir/module"
	"github.com/weirgate/weir/module/config"
)

// runSupervisor is the parent of "weir run --supervise"; its child is started
// with the same arguments and finds in its environment that it is one.
func runSupervisor(ctx context.Context, in cli.Instance) (int, error) {
	env := os.Environ()
	boss := findSupervisor()
	return supervise.Run(ctx, supervise.Options{
		Log: in.Log, Dir: in.Config.RuntimeDir, Hang: in.HangTimeout,
		Args: os.Args[1:], Cleanup: append([]string{"cleanup"}, in.ConfigArgs...),
		Env: env, ChildEnv: withoutManager(env), Last: module.LastConfigPath(in.Config.RuntimeDir),
		Notify:   func(state string) { boss.tell(in.Log, state) },
		Watchdog: boss.watchdog,
	})
}

// lastConfig is the configuration that this process starts with in place of
// what the files say: the one that was in force when the engine died whose
// successor it is. nil: the files count.
func lastConfig() (*config.Config, error) {
	path := supervise.Last()
	if path == "" {
		return nil, nil
	}
	c, err := module.LastConfig(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // It died before it had one.
	}
	return c, err
}

// withoutManager is an environment in which nobody but this process is the
// service manager's.
func withoutManager(env []string) []string {
	return slices.DeleteFunc(slices.Clone(env), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains([]string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}, name) ||
			strings.HasPrefix(name, supervise.EnvPrefix)
	})
}

// upgrade asks the supervisor of a configuration's runtime directory.
func upgrade(ctx context.Context, cfg *config.Config, path string, out io.Writer) error {
	err := supervise.Upgrade(ctx, cfg.RuntimeDir, path, out)
	if errors.Is(err, supervise.ErrNotSupervised) {
		return errors.Join(err, errors.New("an instance without a supervisor goes over to a new version by a restart"))
	}
	return err
}
