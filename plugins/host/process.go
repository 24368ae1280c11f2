// SPDX-License-Identifier: Apache-2.0

package host

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/policypb"
)

// Descriptors that a plugin process is started with, beside the standard ones.
const (
	fdSocketDir  = 3 // the directory for its socket
	fdExecutable = 4 // itself, where its path is closed to it or was verified
)

// thread is the operating system's thread from which plugins are started. It
// has three reasons. The signal that the kernel sends to a child when its
// parent dies is sent when the thread dies that started it, so that thread has
// to live on. Ambient capabilities and the promise to gain no privileges
// belong to a thread and are inherited by what it starts. And so does the
// network namespace.
type thread struct {
	jobs chan func()
	done chan struct{}
}

func newThread(hook func() error) (*thread, error) {
	t := &thread{jobs: make(chan func()), done: make(chan struct{})}
	ready := make(chan error)
	go func() {
		defer close(t.done)
		// Never unlocked: the thread ends with this goroutine, because
		// nobody else may run on it after what is done to it here.
		runtime.LockOSThread()
		ready <- func() error {
			if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("give up ambient capabilities for plugins: %w", err)
			}
			if err := dropInheritable(); err != nil {
				return fmt.Errorf("keep capabilities from plugins: %w", err)
			}
			if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
				return fmt.Errorf("forbid new privileges to plugins: %w", err)
			}
			if hook != nil {
				return hook()
			}
			return nil
		}()
		for job := range t.jobs {
			job()
		}
	}()
	if err := <-ready; err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

// dropInheritable empties the set of capabilities that this thread's children
// may get by the files that they execute.
func dropInheritable() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if err := unix.Capget(&hdr, &sets[0]); err != nil {
		return err
	}
	sets[0].Inheritable, sets[1].Inheritable = 0, 0
	return unix.Capset(&hdr, &sets[0])
}

// do runs the function on the thread and waits for it.
func (t *thread) do(f func() error) (err error) {
	ran := make(chan struct{})
	t.jobs <- func() { err = f(); close(ran) }
	<-ran
	return err
}

func (t *thread) close() {
	close(t.jobs)
	<-t.done
}

// process is one running plugin process.
type process struct {
	client *plugin.Client
	child  *child
	calls  *policies.Clients
	about  *policypb.DescribeResponse

	mu    sync.Mutex // guards conns
	conns []*grpc.ClientConn
}

// newProcess makes what launch starts.
func (s *supervisor) newProcess() *process {
	p := &process{child: &child{spec: &s.spec, thread: s.thread}}
	p.client = plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig:  policies.Handshake,
		Plugins:          policies.ClientPlugins(),
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		StartTimeout:     s.spec.start,
		SkipHostEnv:      true,
		Logger:           &hclogger{log: s.log},
		SyncStdout:       newLineLogger(s.log, slog.LevelInfo),
		SyncStderr:       newLineLogger(s.log, slog.LevelWarn),
		UnixSocketConfig: &plugin.UnixSocketConfig{TempDir: s.dir},
		RunnerFunc: func(_ hclog.Logger, cmd *exec.Cmd, dir string) (runner.Runner, error) {
			return p.child, p.child.prepare(cmd.Env, dir)
		},
		GRPCDialOptions: []grpc.DialOption{
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(policies.MaxMessage), grpc.MaxCallSendMsgSize(policies.MaxMessage)),
			grpc.WithChainStreamInterceptor(p.remember),
		},
	})
	return p
}

// launch starts the plugin and asks what it is. It returns within the spec's
// start timeout, or soon after the supervisor is told to stop, and leaves
// nothing behind on error.
func (s *supervisor) launch() (*process, error) {
	ctx, cancel := context.WithTimeout(s.ctx, s.spec.start)
	defer cancel()
	p := s.newProcess()
	// go-plugin waits under its own lock and by its own clock; a dead process
	// is what makes all of it return at once.
	unwatch := context.AfterFunc(ctx, p.child.kill)
	err := p.connect(ctx, s.h.opts.Version)
	if !unwatch() {
		err = errors.Join(err, ctx.Err())
	}
	if err == nil {
		return p, nil
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("was not ready within %s: %w", s.spec.start, err)
	}
	p.child.kill()
	p.stop()
	return nil, err
}

// connect starts the process and asks what it is.
func (p *process) connect(ctx context.Context, version string) error {
	if _, err := p.client.Start(); err != nil {
		return p.diagnose(err)
	}
	c, err := p.client.Client()
	if err != nil {
		return err
	}
	raw, err := c.Dispense(policies.PluginKey)
	if err != nil {
		return err
	}
	p.calls = raw.(*policies.Clients)
	if p.about, err = p.calls.Base.Describe(ctx, &policypb.DescribeRequest{WeirVersion: version}); err != nil {
		return fmt.Errorf("describe: %w", err)
	}
	for _, c := range p.about.GetCapabilities() {
		if c.GetName() == policies.CapabilityPush && c.GetVersion() >= 1 {
			return nil
		}
	}
	return fmt.Errorf("the plugin does not offer the capability %q, which this version of Weir needs", policies.CapabilityPush)
}

// diagnose says more about a failed start than go-plugin does.
func (p *process) diagnose(err error) error {
	if line := p.child.lastWords(); line != "" {
		return fmt.Errorf("%w; its last words: %s", err, line)
	}
	return err
}

// remember keeps the connection of every stream. go-plugin opens one on each
// connection that it makes and, where that fails, forgets the connection
// without closing it.
func (p *process) remember(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, method string, s grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	p.mu.Lock()
	p.conns = append(p.conns, cc)
	p.mu.Unlock()
	return s(ctx, d, cc, method, opts...)
}

// stop tells the process to end, kills it if it does not, and returns when it
// and all that belongs to it are gone.
func (p *process) stop() {
	// A process that hangs never answers go-plugin's request to end, which
	// has no deadline.
	t := time.AfterFunc(stopGrace, p.child.kill)
	p.client.Kill()
	t.Stop()
	p.child.kill()
	p.mu.Lock()
	for _, c := range p.conns {
		c.Close() // most are closed already, which is no matter
	}
	p.mu.Unlock()
	p.child.clean()
}

// testCommand lets a test take away one of the ways by which a plugin learns
// that its host is gone.
var testCommand func(*exec.Cmd)

// child is the process as go-plugin sees it: a runner.Runner.
type child struct {
	spec   *resolved
	thread *thread

	cmd    *exec.Cmd
	dir    string   // of the socket
	dirFD  *os.File // the same; also our way to the socket, whatever the path's length
	exe    *os.File // nil: by path
	parent *os.File // our end of its standard input; its end tells it that we are gone
	out    *io.PipeReader
	errs   *tail
	exited chan struct{} // closed when it is reaped; nil until started

	mu     sync.Mutex // guards what follows
	pid    int
	killed bool
	err    error // of waiting
}

var _ runner.Runner = (*child)(nil)

// prepare makes the command. env is what go-plugin wants to tell the process.
func (c *child) prepare(env []string, dir string) error {
	c.dir = dir
	var err error
	if c.dirFD, err = os.Open(dir); err != nil {
		return err
	}
	if cred := c.spec.cred; cred != nil {
		if err := os.Chown(dir, int(cred.Uid), int(cred.Gid)); err != nil {
			return err
		}
	}
	exe, err := c.spec.open()
	if err != nil {
		return err
	}
	path, files := c.spec.path, []*os.File{c.dirFD}
	if c.spec.checksum != nil || (c.spec.cred != nil && !reachable(path, c.spec.cred)) {
		c.exe = exe
		files = append(files, exe)
		path = "/proc/self/fd/" + strconv.Itoa(fdExecutable)
	} else {
		exe.Close()
	}
	c.cmd = &exec.Cmd{
		Path:       path,
		Args:       c.spec.args,
		Dir:        "/",
		Env:        environment(env),
		ExtraFiles: files,
		SysProcAttr: &syscall.SysProcAttr{
			Credential: c.spec.cred,
			Setpgid:    true, // a terminal's interrupt is for us; and so that its children go with it
			Pdeathsig:  syscall.SIGKILL,
		},
	}
	if testCommand != nil {
		testCommand(c.cmd)
	}
	return nil
}

// environment is all that a plugin gets: what go-plugin says, how to find the
// socket's directory and its parent, and what programs need to run at all.
// Secrets in our environment are not for plugins.
func environment(goPlugin []string) []string {
	var out []string
	for _, kv := range goPlugin {
		if k, _, _ := strings.Cut(kv, "="); k != plugin.EnvUnixSocketDir {
			out = append(out, kv)
		}
	}
	for _, k := range []string{"PATH", "LANG", "TZ"} {
		if v, ok := os.LookupEnv(k); ok {
			out = append(out, k+"="+v)
		}
	}
	return append(out, "HOME=/", policies.EnvParentStdin+"=1",
		plugin.EnvUnixSocketDir+"=/proc/self/fd/"+strconv.Itoa(fdSocketDir))
}

// Start starts the process on the host's thread.
func (c *child) Start(context.Context) error {
	var theirs []*os.File
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
	}()
	pipe := func() (r, w *os.File, err error) {
		if r, w, err = os.Pipe(); err != nil {
			err = fmt.Errorf("make a pipe: %w", err)
		}
		return r, w, err
	}
	in, parent, err := pipe()
	if err != nil {
		return err
	}
	theirs = append(theirs, in)
	c.parent = parent
	outR, outW, err := pipe()
	if err != nil {
		return err
	}
	theirs = append(theirs, outW)
	errR, errW, err := pipe()
	if err != nil {
		outR.Close()
		return err
	}
	theirs = append(theirs, errW)
	c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = in, outW, errW

	c.mu.Lock()
	if c.killed {
		err = context.Canceled
	} else if err = c.thread.do(c.cmd.Start); err == nil {
		c.pid = c.cmd.Process.Pid
	}
	c.mu.Unlock()
	if err != nil {
		outR.Close()
		errR.Close()
		return fmt.Errorf("start %s: %w", c.spec.path, err)
	}
	c.exited = make(chan struct{})
	r, w := io.Pipe()
	c.out, c.errs = r, newTail(errR)
	go firstLine(w, outR)
	go c.reap(outR, errR)
	return nil
}

// firstLine passes on the line by which the plugin says where it listens, and
// throws the rest away: nobody reads it, and a full pipe would stop the plugin.
func firstLine(w *io.PipeWriter, r *os.File) {
	defer r.Close()
	line, err := bufio.NewReaderSize(io.LimitReader(r, 8192), 8192).ReadSlice('\n')
	if i := bytes.IndexFunc(line, func(c rune) bool { return c == utf8.RuneError || c < ' ' && c != '\n' || c == 0x7f }); i >= 0 || err != nil {
		// No word of a plugin: it becomes part of an error, which people read.
		line = bytes.Map(func(c rune) rune {
			if c == utf8.RuneError || !unicode.IsPrint(c) {
				return '?'
			}
			return c
		}, line[:min(len(line), 60)])
		if len(line) > 0 {
			line = append(line, '\n')
		}
	}
	_, _ = w.Write(line)
	_, _ = io.Copy(io.Discard, r)
	w.Close()
}

// reap waits for the process, ends what it left behind, and lets the readers
// of its output come to an end.
func (c *child) reap(out, errs *os.File) {
	// As long as the process is not reaped, its number and that of its group
	// cannot be given to another.
	for {
		err := unix.Waitid(unix.P_PID, c.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	c.mu.Lock()
	_ = syscall.Kill(-c.pid, syscall.SIGKILL)
	c.err = c.cmd.Wait()
	c.pid = 0
	c.mu.Unlock()
	// A descendant that left the group may hold the pipes open.
	soon := time.Now().Add(200 * time.Millisecond)
	_ = out.SetReadDeadline(soon)
	_ = errs.SetReadDeadline(soon)
	close(c.exited)
}

// kill ends the process and its group, also one that is not started yet.
func (c *child) kill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.killed = true
	if c.pid > 0 {
		_ = syscall.Kill(-c.pid, syscall.SIGKILL)
		_ = syscall.Kill(c.pid, syscall.SIGKILL)
	}
}

// clean releases what the process had. It is called when go-plugin is done.
func (c *child) clean() {
	if c.exited != nil {
		<-c.exited
		c.errs.r.Close()
	}
	for _, f := range []*os.File{c.parent, c.dirFD, c.exe} {
		if f != nil {
			f.Close()
		}
	}
	if c.dir != "" {
		_ = os.RemoveAll(c.dir)
	}
}

// lastWords returns the end of what the process wrote to standard error.
func (c *child) lastWords() string {
	if c.errs == nil {
		return ""
	}
	select {
	case <-c.exited:
	case <-time.After(stopGrace):
		return ""
	}
	// go-plugin reads it, by and by.
	select {
	case <-c.errs.ended:
	case <-time.After(stopGrace):
	}
	return c.errs.last()
}

func (c *child) Wait(context.Context) error {
	<-c.exited
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *child) Kill(context.Context) error                       { c.kill(); return nil }
func (c *child) Stdout() io.ReadCloser                            { return c.out }
func (c *child) Stderr() io.ReadCloser                            { return c.errs }
func (c *child) Name() string                                     { return c.spec.path }
func (c *child) Diagnose(context.Context) string                  { return "" }
func (c *child) HostToPlugin(n, a string) (string, string, error) { return n, a, nil }

// ID is not empty: go-plugin would take that for a process that is gone, and
// not clean up.
func (c *child) ID() string { return c.spec.name }

// PluginToHost turns the socket's path in the plugin into one for us.
func (c *child) PluginToHost(network, addr string) (string, string, error) {
	if network != "unix" {
		return network, addr, nil
	}
	for _, dir := range []string{"/proc/self/fd/" + strconv.Itoa(fdSocketDir), c.dir} {
		if filepath.Dir(addr) == dir {
			return network, fmt.Sprintf("/proc/self/fd/%d/%s", c.dirFD.Fd(), filepath.Base(addr)), nil
		}
	}
	return network, addr, nil
}
