// SPDX-License-Identifier: Apache-2.0

package policytest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/policypb"
)

// process is one run of the plugin, started as Weir starts it.
type process struct {
	cmd   *exec.Cmd
	stdin io.Closer // its end tells the plugin that Weir is gone
	conn  *grpc.ClientConn
	errs  lockedBuffer
	ended chan struct{}
	err   error // of waiting; set before ended is closed

	base policypb.BaseClient
	push policypb.PushClient
	ask  policypb.AskClient
}

// lockedBuffer is written by the process and read by the test.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start starts the plugin and connects to it. The process ends with the test.
func start(t *testing.T, o *Options) *process {
	t.Helper()
	// A short path: that of a unix socket has at most 107 bytes.
	dir, err := os.MkdirTemp("", "weir-kit-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	p := &process{cmd: exec.Command(o.Command[0], o.Command[1:]...), ended: make(chan struct{})}
	p.cmd.Env = append([]string{
		policies.Handshake.MagicCookieKey + "=" + policies.Handshake.MagicCookieValue,
		fmt.Sprintf("PLUGIN_PROTOCOL_VERSIONS=%d", policies.ProtocolVersion),
		"PLUGIN_UNIX_SOCKET_DIR=" + dir,
		policies.EnvParentStdin + "=1",
		"PATH=" + os.Getenv("PATH"), "HOME=/",
	}, o.Env...)
	p.cmd.Dir = "/"
	p.cmd.Stderr = &p.errs
	in, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stdin = in
	out, w := io.Pipe()
	p.cmd.Stdout = w
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start: %v", err)
	}
	go func() {
		p.err = p.cmd.Wait()
		_ = w.Close()
		close(p.ended)
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // It may have ended by itself.
		<-p.ended
		if p.conn != nil {
			_ = p.conn.Close()
		}
		if t.Failed() && p.errs.String() != "" {
			t.Logf("the plugin wrote:\n%s", p.errs.String())
		}
	})
	lines := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(out).ReadString('\n')
		lines <- strings.TrimSpace(line)
		_, _ = io.Copy(io.Discard, out)
	}()
	var line string
	select {
	case line = <-lines:
	case <-time.After(o.StartTimeout):
		t.Fatalf("start: no line on standard output within %s", o.StartTimeout)
	}
	path, err := handshake(line)
	if err != nil {
		t.Fatalf("start: %v", err)
	}
	if filepath.Dir(path) != dir {
		t.Errorf("start: the socket %s is not in PLUGIN_UNIX_SOCKET_DIR, where alone Weir finds it", path)
	}
	p.conn, err = grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(policies.MaxMessage), grpc.MaxCallSendMsgSize(policies.MaxMessage)))
	if err != nil {
		t.Fatalf("start: %v", err)
	}
	p.base, p.push, p.ask = policypb.NewBaseClient(p.conn), policypb.NewPushClient(p.conn), policypb.NewAskClient(p.conn)
	ctx, cancel := context.WithTimeout(t.Context(), o.StartTimeout)
	defer cancel()
	r, err := healthpb.NewHealthClient(p.conn).Check(ctx, &healthpb.HealthCheckRequest{Service: "plugin"}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatalf("start: the health service of gRPC: %v", err)
	}
	if r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("start: the health service says %s of \"plugin\", expected SERVING", r.GetStatus())
	}
	return p
}

// handshake reads the line by which a plugin says where it listens.
func handshake(line string) (path string, err error) {
	f := strings.Split(line, "|")
	want := fmt.Sprintf("1|%d|unix|PATH|grpc|", policies.ProtocolVersion)
	if len(f) < 5 || f[0] != "1" || f[1] != fmt.Sprint(policies.ProtocolVersion) || f[2] != "unix" || f[4] != "grpc" {
		return "", fmt.Errorf("the first line on standard output is %q, expected %q", line, want)
	}
	if !filepath.IsAbs(f[3]) {
		return "", fmt.Errorf("the socket %q has no absolute path", f[3])
	}
	return f[3], nil
}

// waitEnd waits for the process to end.
func (p *process) waitEnd(d time.Duration) error {
	select {
	case <-p.ended:
		return nil
	case <-time.After(d):
		return errors.New("it still runs")
	}
}
