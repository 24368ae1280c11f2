// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// errOutside is what a command of a host answers to exec.Cmd's own Start and
// Run: these would fork it from whatever thread they are called on, outside of
// the namespace.
var errOutside = errors.New("lab: a host's command is started by Host.Start or Host.Run, not by the command itself")

// Command returns a command that Start runs inside the namespace. It is
// started by the host, never by its own methods: these fail.
func (h *Host) Command(name string, args ...string) *exec.Cmd {
	return h.CommandContext(context.Background(), name, args...)
}

// CommandContext is Command with a context that kills the program when it ends.
func (h *Host) CommandContext(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	if cmd.Err == nil {
		cmd.Err = errOutside
	}
	return cmd
}

// A Process is a program that runs in a host. The lab waits for it, so its
// end is seen by everybody who asks.
type Process struct {
	Cmd  *exec.Cmd
	host *Host
	done chan struct{}
	err  error // how it ended; set before done is closed
	once sync.Once
}

// Start starts a command inside the namespace. The program gets a process
// group of its own, dies with this process, and is killed when the lab closes.
// The command's Stdin, Stdout and Stderr are files, readers and writers, not
// pipes of exec.Cmd, because the lab waits for the program at once.
func (h *Host) Start(cmd *exec.Cmd) (*Process, error) {
	if errors.Is(cmd.Err, errOutside) {
		cmd.Err = nil
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	cmd.SysProcAttr.Setpgid = true
	if cmd.WaitDelay == 0 {
		// A grandchild that keeps the output open must not hold up Wait.
		cmd.WaitDelay = 2 * time.Second
	}
	p := &Process{Cmd: cmd, host: h, done: make(chan struct{})}
	err := h.onThread(func() error {
		if err := cmd.Start(); err != nil {
			return err
		}
		h.procs[p] = struct{}{} // onThread holds the lock
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("lab: host %s: start %s: %w", h.name, cmd.Path, err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
		h.mu.Lock()
		delete(h.procs, p)
		h.mu.Unlock()
	}()
	return p, nil
}

// Run runs a program inside the namespace to its end and returns what it
// wrote on standard output; the error tells what it wrote on standard error.
func (h *Host) Run(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := h.CommandContext(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	p, err := h.Start(cmd)
	if err != nil {
		return nil, err
	}
	if err := p.Wait(); err != nil {
		return stdout.Bytes(), fmt.Errorf("lab: host %s: %s %s: %w: %s", h.name, name, strings.Join(args, " "), err,
			strings.TrimSpace(stderr.String()))
	}
	return stdout.Bytes(), nil
}

// Pid returns the process id.
func (p *Process) Pid() int { return p.Cmd.Process.Pid }

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the program's end and returns what exec.Cmd.Wait returned.
// It may be called any number of times.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// ExitCode waits for the program's end and returns its exit code, -1 after a
// signal.
func (p *Process) ExitCode() int {
	<-p.done
	return p.Cmd.ProcessState.ExitCode()
}

// Signal sends a signal to the program alone. A program that has ended is not
// an error.
func (p *Process) Signal(sig syscall.Signal) error {
	select {
	case <-p.done:
		return nil
	default:
	}
	if err := p.Cmd.Process.Signal(sig); err != nil && !errors.Is(err, syscall.ESRCH) && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("lab: host %s: %s to %s: %w", p.host.name, sig, p.Cmd.Path, err)
	}
	return nil
}

// Kill kills the program's process group and waits for its end.
func (p *Process) Kill() error {
	p.once.Do(func() {
		select {
		case <-p.done:
		default:
			// The process is not reaped before done is closed, so the id is
			// still its own.
			_ = syscall.Kill(-p.Pid(), syscall.SIGKILL)
		}
	})
	select {
	case <-p.done:
		return nil
	case <-time.After(10 * time.Second):
		return fmt.Errorf("lab: host %s: %s survives SIGKILL", p.host.name, p.Cmd.Path)
	}
}
