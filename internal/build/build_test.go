// SPDX-License-Identifier: Apache-2.0

package build

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// fakes writes shell scripts of these names and texts into a directory.
func fakes(t *testing.T, scripts map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range scripts {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// shell runs a script with nothing but these variables and returns its exit
// code and output.
func shell(t *testing.T, env []string, args ...string) (int, string) {
	t.Helper()
	c := exec.Command("bash", args...)
	c.Env = env
	out, err := c.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return c.ProcessState.ExitCode(), string(out)
}

// TestDeps installs a package with an apt-get that is none, and looks at
// policy-rc.d while that runs and afterwards.
func TestDeps(t *testing.T) {
	const foreign = "#!/bin/sh\nexit 101\n"
	for _, c := range []struct {
		name      string
		installed bool   // the package is there already
		before    string // policy-rc.d before; "" for none
		install   string // what apt-get install does
		args      []string
		code      int
		policy    string // what policy-rc.d says while apt-get install runs; "" when that must not run
		after     string
		updates   int
	}{
		{name: "nothing missing", installed: true},
		{name: "nothing missing, administrator's policy", installed: true, before: foreign, after: foreign},
		{name: "installed", install: "exit 0", policy: "101"},
		{name: "failed once", install: `[ -e "$STATE/again" ] || { touch "$STATE/again"; exit 100; }`, policy: "101", updates: 1},
		{name: "failed", install: "exit 100", policy: "101", code: 1, updates: 1},
		{name: "failed, soft", install: "exit 100", args: []string{"--soft"}, policy: "101", updates: 1},
		{name: "interrupted", install: "kill -TERM $PPID; exit 1", policy: "101", code: 143},
		{name: "administrator's policy forbids", before: foreign, install: "exit 0", policy: "101", after: foreign},
		{name: "administrator's policy allows", before: "#!/bin/sh\nexit 0\n", code: 1, after: "#!/bin/sh\nexit 0\n"},
		{name: "left by a killed run", before: "#!/bin/sh\n# placed by deps.sh of Weir; may be deleted\nexit 101\n", install: "exit 0", policy: "101"},
	} {
		t.Run(c.name, func(t *testing.T) {
			state := t.TempDir()
			policy := filepath.Join(state, "policy-rc.d")
			if c.before != "" {
				if err := os.WriteFile(policy, []byte(c.before), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			status := "not-installed"
			if c.installed {
				status = "installed"
			}
			// The programs that deps.sh looks for are all there: only the
			// package that is named is missing.
			bin := fakes(t, map[string]string{
				"nginx": "", "apache2": "", "haproxy": "", "lighttpd": "", "curl": "", "ab": "", "wrk": "", "nft": "", "sysctl": "", "iptables-nft": "", "keepalived": "",
				"tshark": "", "promtool": "", "systemd-analyze": "",
				"gcc": "", "dpkg-query": "echo " + status, "apt-cache": "exit 0", "id": "echo 0",
				"apt-get": `case "$*" in
*update*) echo update >>"$STATE/updates" ;;
*install*) "$WEIR_POLICY_RC_D" nginx start; echo $? >"$STATE/policy"; ` + c.install + ` ;;
esac`,
			})
			if _, err := os.Stat("/usr/include/stdlib.h"); err != nil {
				t.Skip("needs the C library's headers, which deps.sh looks for")
			}
			env := []string{"PATH=" + bin + ":/usr/bin:/bin", "STATE=" + state, "WEIR_POLICY_RC_D=" + policy, "TMPDIR=" + state}
			code, out := shell(t, env, append(append([]string{"deps.sh"}, c.args...), "some-package")...)
			if code != c.code {
				t.Errorf("exit code %d, want %d\n%s", code, c.code, out)
			}
			if got := read(t, filepath.Join(state, "policy")); strings.TrimSpace(got) != c.policy {
				t.Errorf("policy-rc.d said %q during the installation, want %q\n%s", got, c.policy, out)
			}
			if got := read(t, policy); got != c.after {
				t.Errorf("policy-rc.d afterwards: %q, want %q", got, c.after)
			}
			if got := strings.Count(read(t, filepath.Join(state, "updates")), "update"); got != c.updates {
				t.Errorf("%d apt-get update, want %d", got, c.updates)
			}
			if left, _ := filepath.Glob(policy + ".*"); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(b)
}

// TestFindGo puts Gos of several versions into a home and looks which one is
// taken.
func TestFindGo(t *testing.T) {
	goVersion := func(v string) string {
		return "#!/bin/sh\necho go version go" + v + " linux/amd64\n"
	}
	for _, c := range []struct {
		name string
		gos  map[string]string // path below the home -> version
		path string            // version in PATH, "" for none
		want string            // path below the home, "PATH", or "" for none
		says string
	}{
		{name: "in PATH", path: "1.26.8", gos: map[string]string{"go/bin/go": "1.27.0"}, want: "PATH"},
		{name: "newer than needed", path: "1.27.1", want: "PATH"},
		{name: "below sdk", gos: map[string]string{"sdk/go1.26.9/bin/go": "1.26.9"}, want: "sdk/go1.26.9/bin/go"},
		{name: "PATH too old", path: "1.19.8", gos: map[string]string{".local/go/bin/go": "1.26.8"}, want: ".local/go/bin/go"},
		{name: "one that can fetch", path: "1.19.8", gos: map[string]string{"sdk/go1.22.1/bin/go": "1.22.1", "sdk/go1.24rc1/bin/go": "1.24rc1"}, want: "sdk/go1.24rc1/bin/go"},
		{name: "too old", path: "1.19.8", says: "found too old:"},
		{name: "none", says: "no usable Go"},
	} {
		t.Run(c.name, func(t *testing.T) {
			home := t.TempDir()
			for p, v := range c.gos {
				full := filepath.Join(home, p)
				if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(full, []byte(goVersion(v)), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			scripts := map[string]string{
				"getent": fmt.Sprintf("echo tester:x:1:1::%s:/bin/sh", home),
				"id":     "echo tester",
			}
			if c.path != "" {
				scripts["go"] = "echo go version go" + c.path + " linux/amd64"
			}
			bin := fakes(t, scripts)
			// What this machine has outside the home is taken away: a function
			// stands for the list.
			const script = `. ./env.sh
eval "$(declare -f go_candidates | grep -v '^ *echo /usr/local/go/bin/go' | sed 's#/usr/local/go\*[^ ]*##; s#/opt/go[^ ]*##; s#/usr/lib/go[^ ]*##g; s#/snap/[^ ]*##; s#/home/linuxbrew[^ ;]*##')"
sed() { case "$*" in *s/^go*) echo 1.26.8 ;; *) command sed "$@" ;; esac; }
find_go tester`
			code, out := shell(t, []string{"PATH=" + bin + ":/usr/bin:/bin", "HOME=" + home}, "-c", script)
			want := filepath.Join(home, c.want)
			switch c.want {
			case "":
				if code == 0 || !strings.Contains(out, c.says) || !strings.Contains(out, "WEIR_GO=") {
					t.Errorf("exit code %d:\n%s", code, out)
				}
				return
			case "PATH":
				want = filepath.Join(bin, "go")
			}
			if code != 0 || strings.TrimSpace(out) != want {
				t.Errorf("exit code %d, %q, want %q", code, out, want)
			}
		})
	}
}

// TestSyntax has bash look at every script without running it.
func TestSyntax(t *testing.T) {
	scripts, err := filepath.Glob("*.sh")
	if err != nil || len(scripts) < 4 {
		t.Fatalf("scripts: %v, %v", scripts, err)
	}
	for _, s := range append(scripts, "../../.ci/run") {
		if code, out := shell(t, os.Environ(), "-n", s); code != 0 {
			t.Errorf("%s: %s", s, out)
		}
	}
}
