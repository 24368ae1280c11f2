// SPDX-License-Identifier: Apache-2.0

package build

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/internal/require"
)

// installed installs the Debian package with dpkg, starts what it
// installed with the configuration that it brings, upgrades it, kills it, and
// removes the package, all of it in a copy of this machine's root: an overlay
// in mount, network and process namespaces of its own, so that this machine
// sees nothing of it.
func installed(t *testing.T, deb string) {
	require.NFQueue(t)
	for _, tool := range []string{"dpkg", "dpkg-deb", "unshare", "ip", "nft"} {
		require.Tool(t, tool)
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "root"), 0o755); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(deb)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "weir.deb"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), "timeout", "--kill-after=5", "120",
		"unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "bash", "testdata/install.sh", dir)
	c.WaitDelay = 5 * time.Second
	out, err := c.CombinedOutput()
	if c.ProcessState != nil && c.ProcessState.ExitCode() == 77 {
		require.Missing(t, "overlayfs", string(out))
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// Said on the way, in this order.
	rest := string(out)
	for _, want := range []string{
		"installed", "no instance was started", "ok: 1 farm, 2 servers", "serving", "is upgraded while it runs", "killed: the rules stand",
		"removed table inet weir", "removed", "purged",
	} {
		_, after, ok := strings.Cut(rest, want)
		if !ok {
			t.Fatalf("it did not say %q, or too early:\n%s", want, out)
		}
		rest = after
	}
}
