// SPDX-License-Identifier: Apache-2.0

// Command init is the first process of the guest, and its modprobe. It mounts what
// programs expect, runs the tests, says how they ended, and powers off.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	index   = "/lib/modules/index"
	command = "/etc/command" // one test program with its arguments, a line each
)

func main() {
	if filepath.Base(os.Args[0]) == "modprobe" {
		if err := modprobe(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "modprobe:", err)
			os.Exit(1)
		}
		return
	}
	code := 1
	err := prepare()
	if err == nil {
		code, err = run()
	}
	if err != nil {
		fmt.Println("init:", err)
	}
	fmt.Printf("\nguest: exit code %d\n", code)
	unix.Sync()
	time.Sleep(100 * time.Millisecond) // the console is slow
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func prepare() error {
	var errs []error
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			errs = append(errs, fmt.Errorf("mount %s: %w", m[1], err))
		}
	}
	for _, l := range [][2]string{{"/proc/self/fd", "/dev/fd"}, {"/proc/self/fd/0", "/dev/stdin"}} {
		if err := os.Symlink(l[0], l[1]); err != nil && !errors.Is(err, os.ErrExist) {
			errs = append(errs, err)
		}
	}
	if err := os.Chmod("/tmp", 0o1777); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// run runs the test programs one after the other; the code is that of the
// first that fails.
func run() (int, error) {
	b, err := os.ReadFile(command)
	if err != nil {
		return 1, err
	}
	result := 0
	for line := range strings.Lines(string(b)) {
		args := strings.Fields(line)
		if len(args) == 0 {
			continue
		}
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
		cmd.Env = []string{"PATH=/bin:/sbin", "HOME=/tmp", "TMPDIR=/tmp", "WEIR_GUEST=1", "WEIR_BIN=/bin", "WEIR_REQUIRE=netns,nfqueue"}
		if dir := path.Dir(args[0]); dir != "/bin" {
			cmd.Dir = dir
		}
		fmt.Println("guest: run", strings.Join(args, " "))
		err := cmd.Run()
		var exit *exec.ExitError
		switch {
		case errors.As(err, &exit) && result == 0:
			result = max(exit.ExitCode(), 1)
		case err != nil && exit == nil:
			return 1, err
		}
	}
	return result, nil
}

// modprobe does what the kernel asks for when it misses a module: it finds the
// name or alias in the index and loads the module, its dependencies first.
func modprobe(args []string) error {
	f, err := os.Open(index)
	if err != nil {
		return err
	}
	defer f.Close()
	file, depends := map[string]string{}, map[string][]string{}
	type alias struct{ pattern, name string }
	var aliases []alias
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		w := strings.Split(sc.Text(), " ")
		switch {
		case w[0] == "module" && len(w) == 4:
			file[w[1]] = w[2]
			if w[3] != "" {
				depends[w[1]] = strings.Split(w[3], ",")
			}
		case w[0] == "alias" && len(w) >= 3:
			aliases = append(aliases, alias{normal(strings.Join(w[1:len(w)-1], " ")), w[len(w)-1]})
		}
	}
	if err := sc.Err(); err != nil {
		return err
	}
	var load func(name string) error
	load = func(name string) error {
		name = normal(name)
		if file[name] == "" {
			return nil // built in
		}
		// The kernel asks again and again for what a batch of nftables needs.
		if _, err := os.Stat("/sys/module/" + name); err == nil {
			return nil
		}
		for _, d := range depends[name] {
			if err := load(d); err != nil {
				return err
			}
		}
		k, err := os.Open("/lib/modules/" + file[name])
		if err != nil {
			return err
		}
		defer k.Close()
		if err := unix.FinitModule(int(k.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	}
	for _, want := range args {
		if strings.HasPrefix(want, "-") {
			continue
		}
		want = normal(want)
		names := []string{want}
		for _, a := range aliases {
			if ok, _ := path.Match(a.pattern, want); ok || a.pattern == want {
				names = append(names, a.name)
			}
		}
		for _, n := range names {
			if err := load(n); err != nil {
				return err
			}
		}
	}
	return nil
}

// normal: to the kernel, dash and underscore are one.
func normal(s string) string { return strings.ReplaceAll(s, "-", "_") }
