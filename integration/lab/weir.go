// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// WeirOptions says how a weir of the lab is run.
type WeirOptions struct {
	Binary string // the executable; its plugins lie in plugins/ beside it
	Config string // text of the configuration; Farm.Config makes one
	// Dir holds the configuration file and is the working directory. It is
	// made if it does not exist.
	Dir string
	// Socket is the admin socket that the configuration names.
	Socket string
	// Args are more arguments of "weir run".
	Args []string
	// Env is added to the environment, NAME=VALUE.
	Env []string
	// Credential runs it as another user.
	Credential *syscall.Credential
}

// Weir is a real weir daemon that runs in a host.
type Weir struct {
	Host    *Host
	Proc    *Process
	options WeirOptions
	log     Buffer
}

// NewWeir starts "weir run" inside the namespace and returns at once.
func NewWeir(h *Host, o WeirOptions) (*Weir, error) {
	tmp := filepath.Join(o.Dir, "tmp")
	if err := os.MkdirAll(tmp, 0o777); err != nil {
		return nil, fmt.Errorf("lab: weir: %w", err)
	}
	if err := os.Chmod(tmp, 0o777); err != nil {
		return nil, fmt.Errorf("lab: weir: %w", err)
	}
	file := filepath.Join(o.Dir, "weir.yaml")
	if err := os.WriteFile(file, []byte(o.Config), 0o644); err != nil {
		return nil, fmt.Errorf("lab: weir: %w", err)
	}
	w := &Weir{Host: h, options: o}
	cmd := h.Command(o.Binary, append([]string{"run", "--config", file}, o.Args...)...)
	cmd.Dir = o.Dir
	cmd.Stdout, cmd.Stderr = &w.log, &w.log
	cmd.Env = w.env()
	if o.Credential != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: o.Credential}
	}
	var err error
	if w.Proc, err = h.Start(cmd); err != nil {
		return nil, err
	}
	return w, nil
}

// StartWeir starts "weir run" inside the namespace and waits until it answers
// on its admin socket. The error holds what it wrote if it ends instead.
func StartWeir(ctx context.Context, h *Host, o WeirOptions) (*Weir, error) {
	w, err := NewWeir(h, o)
	if err != nil {
		return nil, err
	}
	for {
		if _, err = os.Stat(o.Socket); err == nil {
			if _, err = w.Status(ctx); err == nil {
				return w, nil
			}
		}
		select {
		case <-w.Proc.Done():
			return nil, fmt.Errorf("lab: weir ended with exit code %d: %s", w.Proc.ExitCode(), strings.TrimSpace(w.Log()))
		case <-ctx.Done():
			_ = w.Proc.Kill()
			return nil, fmt.Errorf("lab: weir does not answer on %s: %w (%w): %s", o.Socket, ctx.Err(), err, strings.TrimSpace(w.Log()))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// AttachWeir makes a Weir of a daemon that something else runs, such as a
// service manager. Proc is what runs it; Log stays empty.
func AttachWeir(h *Host, p *Process, o WeirOptions) *Weir {
	return &Weir{Host: h, Proc: p, options: o}
}

// env is the environment of the daemon: of ours what a program needs, and a
// directory for temporary files of its own, so that what it leaves can be seen.
func (w *Weir) env() []string {
	env := []string{"TMPDIR=" + w.TempDir()}
	for _, k := range []string{"PATH", "HOME", "USER", "LANG"} {
		if v, ok := os.LookupEnv(k); ok {
			env = append(env, k+"="+v)
		}
	}
	return append(env, w.options.Env...)
}

// TempDir is the directory that the daemon is told to put temporary files in.
func (w *Weir) TempDir() string { return filepath.Join(w.options.Dir, "tmp") }

// Log returns what the daemon has written so far.
func (w *Weir) Log() string { return w.log.String() }

// Status asks the daemon for its state by "weir status -o json".
func (w *Weir) Status(ctx context.Context) (json.RawMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	// A unix socket has a path, not a network: this may run anywhere.
	cmd := exec.CommandContext(ctx, w.options.Binary, "status", "-o", "json", "--socket", w.options.Socket)
	cmd.Env = w.env()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	const degraded = 3 // it serves, and says what is not in order
	if err := cmd.Run(); err != nil && cmd.ProcessState.ExitCode() != degraded {
		return nil, fmt.Errorf("lab: weir status: %w: %s", err, strings.TrimSpace(stderr.String()))
	}
	if !json.Valid(stdout.Bytes()) {
		return nil, fmt.Errorf("lab: weir status: not JSON: %.200s", stdout.String())
	}
	return stdout.Bytes(), nil
}

// Stop sends SIGTERM and waits for the orderly end. It returns the exit code.
func (w *Weir) Stop(ctx context.Context) (int, error) {
	if err := w.Proc.Signal(syscall.SIGTERM); err != nil {
		return -1, err
	}
	select {
	case <-w.Proc.Done():
		return w.Proc.ExitCode(), nil
	case <-ctx.Done():
		return -1, fmt.Errorf("lab: weir (process %d) does not end on SIGTERM: %w: %s", w.Proc.Pid(), ctx.Err(), strings.TrimSpace(w.Log()))
	}
}

// Crash kills the daemon alone, as kill -9 does: its plugins see their parent
// die.
func (w *Weir) Crash() error {
	if err := w.Proc.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	select {
	case <-w.Proc.Done():
		return nil
	case <-time.After(10 * time.Second):
		return errors.New("lab: weir survives SIGKILL")
	}
}

// ConfigOptions says what goes into a configuration beside the addresses.
type ConfigOptions struct {
	// Dir is the run-time directory, which has the admin socket.
	Dir string
	// Policies is the farm's list of policies in YAML flow notation, empty for
	// none; Plugins is the list of plugins.
	Policies, Plugins string
	// Pool is the farm's pool section in YAML flow notation, empty for defaults.
	Pool string
	// IPv6 adds a second farm "web6" with the VIP, the SNIP and the servers'
	// addresses of that family.
	IPv6 bool
	// NoIPv4 leaves the farm "web" out.
	NoIPv4 bool
	// Servers is how many of the servers the farms have, the first ones; 0
	// means all.
	Servers int
	// Extra is added at top level as it is.
	Extra string
}

// Socket returns the admin socket of a configuration with that directory.
func (o ConfigOptions) Socket() string { return filepath.Join(o.Dir, "admin.sock") }

// Config writes a configuration of weir for this topology: the farm "web" on
// the VIP, with all its servers by their names.
func (f *Farm) Config(o ConfigOptions) string {
	var b strings.Builder
	var snips []string
	if !o.NoIPv4 {
		snips = append(snips, f.SNIP().String())
	}
	if o.IPv6 {
		snips = append(snips, `"`+f.SNIP6().String()+`"`)
	}
	fmt.Fprintf(&b, "runtime_dir: %q\nstop_timeout: 2s\nsource:\n  addresses: [%s]\nfarms:\n", o.Dir, strings.Join(snips, ", "))
	farm := func(name string, vip netip.AddrPort, server func(int) netip.AddrPort) {
		fmt.Fprintf(&b, "  - name: %s\n    listen: \"%s\"\n    protocol: http\n    servers:\n", name, vip)
		for i, s := range f.Servers {
			if i > 0 && i == o.Servers {
				break
			}
			fmt.Fprintf(&b, "      - {name: %s, address: \"%s\"}\n", s.name, server(i))
		}
		for _, part := range [][2]string{{"policies", o.Policies}, {"pool", o.Pool}} {
			if part[1] != "" {
				fmt.Fprintf(&b, "    %s: %s\n", part[0], part[1])
			}
		}
	}
	if !o.NoIPv4 {
		farm("web", f.VIP(), f.Server)
	}
	if o.IPv6 {
		farm("web6", f.VIP6(), f.Server6)
	}
	if o.Plugins != "" {
		fmt.Fprintf(&b, "plugins: %s\n", o.Plugins)
	}
	fmt.Fprintf(&b, "admin: {socket: %q}\n", o.Socket())
	b.WriteString(o.Extra)
	return b.String()
}
