// SPDX-License-Identifier: Apache-2.0

package continuity

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
)

// This file runs the packaged unit as it is, under a real systemd: one that is
// process 1 of a container in the router's network namespace. The container has
// the host's files, with the package's laid over them, and no other unit than
// Weir's and what it needs to be started at all.

// boot is the first program of the container. $1 is the directory with what is
// laid over /usr and /etc, $2 the type of the control groups.
const boot = `set -e
mount --make-rprivate /
mount -t overlay -o ro,lowerdir=$1/usr:/usr overlay /usr
mount -t overlay -o ro,lowerdir=$1/etc:/etc overlay /etc
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs tmpfs /var/log
umount -R -l /sys/fs/cgroup
if [ "$2" = cgroup2 ]; then
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
else
  mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
  mkdir /sys/fs/cgroup/systemd
  mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
fi
mkdir -p /run/systemd/system/weir.service.d /run/weir
cp "$1"/units/* /run/systemd/system/
cp /usr/lib/systemd/system/weir.service /run/systemd/system/
# The only thing that is different: there is no journal here.
printf '[Service]\nStandardOutput=append:/run/weir.log\nStandardError=inherit\n' >/run/systemd/system/weir.service.d/log.conf
export container=weir SYSTEMD_UNIT_PATH=/run/systemd/system SYSTEMD_GENERATOR_PATH=/run/none
exec /lib/systemd/systemd --system --unit=empty.target --log-target=console --show-status=no
`

// systemd is the container.
type systemd struct {
	r    *rig
	proc *lab.Process
	init int    // the process id of systemd, seen from here
	root string // its root, seen from here
}

// cgroups finds where control groups can be made for a systemd.
func cgroups(t *testing.T) (typ, dir string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		before, after, _ := strings.Cut(line, " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if len(f) < 5 || len(g) < 3 {
			continue
		}
		switch {
		case g[0] == "cgroup" && strings.Contains(g[2], "name=systemd"):
			return "cgroup", f[4]
		case g[0] == "cgroup2" && f[4] == "/sys/fs/cgroup":
			typ, dir = "cgroup2", f[4]
		}
	}
	if typ == "" {
		require.Missing(t, "systemd", "control groups for one")
	}
	return typ, dir
}

// systemd starts one with the package's files and the configuration c.
func (r *rig) systemd(c lab.ConfigOptions) *systemd {
	t := r.t
	t.Helper()
	const manager = "/lib/systemd/systemd"
	if _, err := os.Stat(manager); err != nil {
		require.Missing(t, "systemd", err.Error())
	}
	unshare := require.Tool(t, "unshare")
	require.Tool(t, "nsenter")
	typ, groups := cgroups(t)
	dir, err := r.Lab.Subdir("systemd")
	r.must(err)
	put := func(name string, b []byte, mode os.FileMode) {
		t.Helper()
		path := filepath.Join(dir, name)
		r.must(os.MkdirAll(filepath.Dir(path), 0o755))
		r.must(os.WriteFile(path, b, mode))
		r.must(os.Chmod(path, mode))
	}
	for from, to := range map[string]string{
		r.bin: "usr/bin/weir", filepath.Join(filepath.Dir(r.bin), "plugins/path"): "usr/lib/weir/plugins/path",
		"../../cmd/weir/packaging/weir.service": "usr/lib/systemd/system/weir.service",
	} {
		b, err := os.ReadFile(from)
		r.must(err)
		put(to, b, 0o755)
	}
	r.must(os.Chmod(filepath.Join(dir, "usr/lib/systemd/system/weir.service"), 0o644))
	put("etc/weir/weir.yaml", []byte(r.Config(c)), 0o640)
	for _, name := range []string{"sysinit", "basic", "shutdown", "empty"} {
		put("units/"+name+".target", []byte("[Unit]\nDefaultDependencies=no\n"), 0o644)
	}
	put("boot.sh", []byte(boot), 0o755)

	group := filepath.Join(groups, r.Lab.Name()+"-systemd")
	r.must(os.Mkdir(group, 0o755))
	t.Cleanup(func() { removeGroups(t, group) })
	log := new(bytes.Buffer) // read when the process has ended
	cmd := r.Router.Command("/bin/sh", "-c", `echo $$ >"$1/cgroup.procs"; shift; exec "$@"`, "sh", group,
		unshare, "--mount", "--pid", "--cgroup", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc", "/bin/sh", filepath.Join(dir, "boot.sh"), dir, typ)
	cmd.Stdout, cmd.Stderr = log, log
	s := &systemd{r: r}
	s.proc, err = r.Router.Start(cmd)
	r.must(err)
	t.Cleanup(func() {
		if t.Failed() && s.root != "" {
			b, _ := os.ReadFile(s.path("/run/weir.log"))
			t.Logf("weir wrote:\n%s", b)
		}
		_ = s.proc.Kill() // and all of the container with it
		if t.Failed() {
			t.Logf("systemd wrote:\n%s", log)
		}
	})
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if s.init = s.find(); s.init != 0 {
			s.root = fmt.Sprintf("/proc/%d/root", s.init)
			if _, err := s.ctl("show", "--property=Version"); err == nil {
				return s
			}
		}
		select {
		case <-s.proc.Done():
			require.Missing(t, "systemd", "a container for one: "+log.String())
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("systemd does not answer")
		}
	}
}

// removeGroups removes control groups whose processes have just died.
func removeGroups(t *testing.T, top string) {
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		var dirs []string
		_ = filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		slices.Reverse(dirs)
		var err error
		for _, d := range dirs {
			if e := unix.Rmdir(d); e != nil && !errors.Is(e, unix.ENOENT) {
				err = fmt.Errorf("rmdir %s: %w", d, e)
			}
		}
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Error(err)
			return
		}
	}
}

// find is the process of systemd, 0 if it is not there yet.
func (s *systemd) find() int {
	all, err := s.r.Router.Processes()
	s.r.must(err)
	for _, pid := range all {
		if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); string(b) == "systemd\n" && inner(pid) == 1 {
			return pid
		}
	}
	return 0
}

// inner is the number of a process in its innermost namespace.
func inner(pid int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	n := 0
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "NSpid:"); ok {
			f := strings.Fields(v)
			n, _ = strconv.Atoi(f[len(f)-1])
		}
	}
	return n
}

// outer is the process of the container with that number there.
func (s *systemd) outer(pid int) int {
	if pid == 0 {
		return 0
	}
	all, err := s.r.Router.Processes()
	s.r.must(err)
	for _, p := range all {
		if p != s.init && inner(p) == pid {
			if ns, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", p)); ns == s.namespace() {
				return p
			}
		}
	}
	return 0
}

func (s *systemd) namespace() string {
	ns, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", s.init))
	return ns
}

// path is a path of the container, seen from here.
func (s *systemd) path(p string) string { return s.root + p }

// ctl is systemctl in the container.
func (s *systemd) ctl(args ...string) (string, error) {
	args = append([]string{"-t", strconv.Itoa(s.init), "-m", "-p", "-n", "systemctl", "--no-pager"}, args...)
	out, err := exec.CommandContext(within(s.r.t, 90*time.Second), "nsenter", args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("systemctl %v: %w: %s", args[6:], err, out)
	}
	return strings.TrimSpace(string(out)), err
}

func (s *systemd) must(args ...string) string {
	s.r.t.Helper()
	out, err := s.ctl(args...)
	s.r.must(err)
	return out
}

// show is a property of Weir's unit.
func (s *systemd) show(property string) string {
	s.r.t.Helper()
	return s.must("show", "--value", "--property="+property, "weir")
}

// TestSystemd: under systemd, with all the sandbox of the packaged unit, the
// engine's death, and the supervisor's too, cost no connection; a stop removes
// everything.
func TestSystemd(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	c := loaded
	c.Dir = "/run/weir"
	s := r.systemd(c)
	r.run = s.path("/run/weir")
	r.w = lab.AttachWeir(r.Router, s.proc, lab.WeirOptions{Binary: r.bin, Dir: r.dir, Socket: s.path(c.Socket())})
	r.before = r.state()

	s.must("start", "weir")
	if got := s.show("ActiveState"); got != "active" {
		t.Fatalf("the unit is %s", got)
	}
	// What is known from inside is found outside.
	engine := func() int { return s.outer(r.engine()) }
	pid := 0
	r.until("an engine", func() bool { pid = engine(); return pid != 0 })
	s.confined(pid)
	l := r.load(8, 6)
	opened := r.opened()
	goesOn := func() {
		t.Helper()
		n := l.requests.Load()
		r.until("requests go on", func() bool { return l.requests.Load() > n+30 || t.Failed() })
	}
	another := func() {
		t.Helper()
		was := pid
		r.until("another engine", func() bool { pid = engine(); return pid != 0 && pid != was })
		s.confined(pid)
		goesOn()
	}
	for range 3 {
		r.signal(pid, syscall.SIGKILL)
		another()
	}
	if n := s.show("NRestarts"); n != "0" {
		t.Errorf("systemd had to start it again, %s times: the supervisor should have", n)
	}
	for i := range 2 {
		main, err := strconv.Atoi(s.show("MainPID"))
		r.must(err)
		r.signal(s.outer(main), syscall.SIGKILL)
		another()
		if n := s.show("NRestarts"); n != strconv.Itoa(i+1) {
			t.Errorf("systemd started it again %s times, want %d", n, i+1)
		}
	}
	s.must("reload", "weir")
	goesOn()
	l.whole()
	if n := r.opened() - opened; n > 20 {
		t.Errorf("the servers got %d new connections: the pool was lost", n)
	}
	s.must("stop", "weir")
	if got := s.show("ActiveState") + ", " + s.show("Result"); got != "inactive, success" {
		t.Errorf("after the stop the unit is %s", got)
	}
	r.same("after the stop")
	b, err := os.ReadFile(s.path("/run/weir.log"))
	r.must(err)
	if regexp.MustCompile(`permitted|denied|read-only`).Match(b) {
		t.Error("a right was missing")
	}
}

// confined: a process is in the sandbox of the unit.
func (s *systemd) confined(pid int) {
	t := s.r.t
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	s.r.must(err)
	mask := uint64(0)
	for c := range strings.FieldsSeq(s.show("CapabilityBoundingSet")) {
		n, ok := map[string]uint{
			"cap_chown": unix.CAP_CHOWN, "cap_dac_override": unix.CAP_DAC_OVERRIDE, "cap_kill": unix.CAP_KILL, "cap_setgid": unix.CAP_SETGID,
			"cap_setuid": unix.CAP_SETUID, "cap_net_admin": unix.CAP_NET_ADMIN, "cap_net_raw": unix.CAP_NET_RAW, "cap_bpf": unix.CAP_BPF,
		}[c]
		if !ok {
			t.Errorf("the unit has the capability %s", c)
		}
		mask |= 1 << n
	}
	for _, want := range []string{"Seccomp:\t2\n", "NoNewPrivs:\t1\n", fmt.Sprintf("CapBnd:\t%016x\n", mask), fmt.Sprintf("CapEff:\t%016x\n", mask)} {
		if !bytes.Contains(b, []byte(want)) {
			t.Errorf("process %d has not %q:\n%s", pid, want, b)
		}
	}
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	s.r.must(err)
	if !regexp.MustCompile(`(?m)^\S+ \S+ \S+ \S+ / ro[, ]`).Match(mounts) || !regexp.MustCompile(`(?m)^\S+ \S+ \S+ \S+ /run/weir rw[, ]`).Match(mounts) {
		t.Errorf("process %d can write to more or less than it should:\n%s", pid, mounts)
	}
}
