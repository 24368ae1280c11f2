// SPDX-License-Identifier: Apache-2.0

package build

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/weirgate/weir/internal/require"
)

// output runs a program and returns what it wrote; it must succeed.
func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	var stderr bytes.Buffer
	c := exec.Command(name, args...)
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, stderr.String())
	}
	return string(out)
}

// packages makes the packages of this machine's architecture.
func packages(t *testing.T) (deb, rpm string) {
	t.Helper()
	require.Tool(t, "go")
	dir := t.TempDir()
	for p := dir; p != "/" && p != os.TempDir(); p = filepath.Dir(p) {
		if err := os.Chmod(p, 0o777); err != nil { // whoever builds writes here
			t.Fatal(err)
		}
	}
	c := exec.Command("bash", "packages.sh", dir)
	c.Env = append(os.Environ(), "WEIR_VERSION=1.2.3-rc4", "WEIR_ARCHES="+runtime.GOARCH)
	out, err := c.CombinedOutput()
	if c.ProcessState != nil && c.ProcessState.ExitCode() == 3 {
		require.Missing(t, "nfpm", "the modules of nfpm: "+string(out[max(0, len(out)-500):]))
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	find := func(pattern string) string {
		m, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil || len(m) != 1 {
			t.Fatalf("%s: %q, %v\n%s", pattern, m, err, out)
		}
		return m[0]
	}
	return find("*.deb"), find("*.rpm")
}

// TestPackages makes the packages, looks at what would be installed, and
// installs the Debian one.
func TestPackages(t *testing.T) {
	dpkg := require.Tool(t, "dpkg-deb")
	deb, rpm := packages(t)
	info := output(t, dpkg, "-I", deb)
	for _, want := range []string{"Package: weir\n", "Version: 1.2.3~rc4\n", "Architecture: " + runtime.GOARCH + "\n", "Depends: kmod\n", "Recommends: nftables, logrotate\n"} {
		if !strings.Contains(info, want) {
			t.Errorf("dpkg-deb -I does not say %q:\n%s", want, info)
		}
	}
	root, control := filepath.Join(t.TempDir(), "root"), filepath.Join(t.TempDir(), "control")
	output(t, dpkg, "-x", deb, root)
	output(t, dpkg, "-e", deb, control)
	for path, mode := range map[string]os.FileMode{
		"usr/bin/weir":                               0o755,
		"usr/lib/weir/plugins/path":                  0o755,
		"usr/lib/systemd/system/weir.service":        0o644,
		"usr/lib/modules-load.d/weir.conf":           0o644,
		"etc/weir/weir.yaml":                         0o640,
		"etc/logrotate.d/weir":                       0o644,
		"usr/share/man/man8/weir.8":                  0o644,
		"usr/share/bash-completion/completions/weir": 0o644,
		"usr/share/doc/weir/operations.md":           0o644,
		"usr/share/doc/weir/config.md":               0o644,
		"usr/share/doc/weir/weir.schema.json":        0o644,
		"usr/share/doc/weir/copyright":               0o644,
		"usr/share/doc/weir/monitoring/alerts.yaml":  0o644,
		"usr/share/doc/weir/monitoring/grafana.json": 0o644,
	} {
		st, err := os.Stat(filepath.Join(root, path))
		if err != nil || st.Mode().Perm() != mode || st.Size() == 0 {
			t.Errorf("%s: %v %v, want mode %v", path, st, err, mode)
		}
	}
	conf, err := os.ReadFile(filepath.Join(control, "conffiles"))
	if err != nil || !strings.Contains(string(conf), "/etc/weir/weir.yaml\n") {
		t.Errorf("conffiles: %q %v", conf, err)
	}
	for _, s := range []string{"postinst", "prerm", "postrm"} {
		output(t, "sh", "-n", filepath.Join(control, s))
	}
	weir := filepath.Join(root, "usr/bin/weir")
	out := output(t, weir, "check", "--config", filepath.Join(root, "etc/weir/weir.yaml"))
	if !strings.HasPrefix(out, "ok: 1 farms") && !strings.HasPrefix(out, "ok: 1 farm") {
		t.Errorf("weir check: %q", out)
	}
	t.Run("rpm", func(t *testing.T) {
		b, err := os.ReadFile(rpm)
		if err != nil || !bytes.HasPrefix(b, []byte{0xed, 0xab, 0xee, 0xdb}) {
			t.Fatalf("no RPM: %v", err)
		}
	})
	t.Run("unit", func(t *testing.T) { unit(t, root) })
	t.Run("installed", func(t *testing.T) { installed(t, deb) })
}

// unit has systemd look at the unit, with the programs where they were unpacked.
func unit(t *testing.T, root string) {
	analyze := require.Tool(t, "systemd-analyze")
	b, err := os.ReadFile(filepath.Join(root, "usr/lib/systemd/system/weir.service"))
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(string(b), "/usr/bin/weir", filepath.Join(root, "usr/bin/weir"))
	file := filepath.Join(t.TempDir(), "weir.service")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(analyze, "verify", "--man=no", "--recursive-errors=no", file).CombinedOutput()
	// What it says of other units is not ours.
	if bytes.Contains(out, []byte("weir.service")) {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	out, err = exec.Command(analyze, "security", "--offline=true", "--threshold=45", "--no-pager", file).CombinedOutput()
	if err != nil {
		t.Errorf("systemd-analyze security: %v\n%s", err, out)
	}
}

// TestUnit holds what the life of the process needs of the unit.
func TestUnit(t *testing.T) {
	b, err := os.ReadFile("../../cmd/weir/packaging/weir.service")
	if err != nil {
		t.Fatal(err)
	}
	settings := map[string][]string{}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(line, "#") {
			settings[k] = append(settings[k], v)
		}
	}
	for k, want := range map[string]string{
		"Type": "notify", "RuntimeDirectoryPreserve": "yes", "NoNewPrivileges": "yes", "KillMode": "mixed",
		"Restart": "on-failure", "StartLimitIntervalSec": "0", "WatchdogSec": "30s",
	} {
		if len(settings[k]) != 1 || settings[k][0] != want {
			t.Errorf("%s is %q, want %q", k, settings[k], want)
		}
	}
	// After a crash nothing may be cleaned up.
	for _, k := range []string{"ExecStopPost", "ExecStartPre", "ExecStop"} {
		if settings[k] != nil {
			t.Errorf("%s=%s: the next start takes over what is there", k, settings[k])
		}
	}
	// A Go program ends with exit code 2 after a panic, unless it is told to
	// end by a signal; 2 is also a wrong configuration, which is not retried.
	if slices.Contains(settings["RestartPreventExitStatus"], "2") && !slices.Contains(settings["Environment"], "GOTRACEBACK=crash") {
		t.Error("after a panic it would not be started again")
	}
	known := regexp.MustCompile(`^CAP_[A-Z_]+( CAP_[A-Z_]+)*$`)
	if len(settings["CapabilityBoundingSet"]) != 1 || !known.MatchString(settings["CapabilityBoundingSet"][0]) {
		t.Errorf("capabilities: %q", settings["CapabilityBoundingSet"])
	}
	for _, c := range []string{"CAP_SYS_ADMIN", "CAP_SYS_MODULE", "CAP_SYS_PTRACE", "CAP_SYS_RAWIO"} {
		if strings.Contains(fmt.Sprint(settings["CapabilityBoundingSet"]), c) {
			t.Errorf("%s is too much", c)
		}
	}
}
