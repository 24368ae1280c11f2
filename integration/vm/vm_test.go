// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/internal/require"
)

// limit is how long the guest may run. It takes about a minute; a machine that
// is busy with other things may need several.
const limit = 9 * time.Minute

// TestStockKernel boots the kernel in the directory that WEIR_VM names (make
// test-vm fetches one) and runs the tests of package guest on it.
func TestStockKernel(t *testing.T) {
	dir := os.Getenv("WEIR_VM")
	if dir == "" {
		require.Missing(t, "vm", "WEIR_VM, a directory with a kernel (make test-vm)")
	}
	qemu := require.Tool(t, "qemu-system-x86_64")
	gotool := require.Tool(t, "go")
	kernels, err := filepath.Glob(dir + "/boot/vmlinuz-*")
	if err != nil || len(kernels) == 0 {
		t.Fatalf("%s/boot has no kernel: %v", dir, err)
	}
	tmp := t.TempDir()
	m := newImage()
	for _, b := range []struct {
		name string
		args []string
		to   string
	}{
		{"init", []string{"build", "-o"}, "github.com/weirgate/weir/integration/vm/init"},
		{"weir", []string{"build", "-o"}, "github.com/weirgate/weir/cmd/weir"},
		{"path", []string{"build", "-o"}, "github.com/weirgate/weir/plugins/path"},
		{"guest.test", []string{"test", "-c", "-o"}, "github.com/weirgate/weir/integration/vm/guest"},
	} {
		out := filepath.Join(tmp, b.name)
		cmd := exec.Command(gotool, append(b.args, out, "-ldflags=-s -w", b.to)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(b.args, " "), err, text)
		}
		data, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		place := map[string]string{"init": "init", "path": "bin/plugins/path"}[b.name]
		if place == "" {
			place = "bin/" + b.name
		}
		m.add(place, modeExec, data)
	}
	m.link("sbin/modprobe", "/init")
	m.add("etc/command", modeFile, []byte("/bin/guest.test -test.v -test.timeout 8m\n"))
	if err := m.modules(dir + "/lib/modules"); err != nil {
		t.Fatal(err)
	}
	ram := filepath.Join(tmp, "initrd")
	f, err := os.Create(ram)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.write(f); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	// Not KVM: it is not to be had everywhere, and hangs in places.
	cmd := exec.CommandContext(ctx, qemu, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1536",
		"-nographic", "-no-reboot", "-nic", "none", "-kernel", kernels[0], "-initrd", ram,
		"-append", "console=ttyS0 quiet panic=-1 rdinit=/init")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	start := time.Now()
	err = cmd.Run()
	text := strings.ReplaceAll(out.String(), "\r", "")
	verdict := regexp.MustCompile(`(?m)^guest: exit code (\d+)$`).FindStringSubmatch(text)
	switch {
	case verdict == nil:
		t.Fatalf("the guest did not end: %v (%v)\n%s", err, ctx.Err(), tail(text))
	case verdict[1] != "0":
		t.Errorf("the guest's tests ended with exit code %s\n%s", verdict[1], tail(text))
	case strings.Count(text, "--- PASS: ") < 4 || strings.Contains(text, "--- SKIP: "):
		t.Errorf("the guest has not run all tests\n%s", text)
	default:
		t.Logf("%s: %v\n%s", filepath.Base(kernels[0]), time.Since(start).Round(time.Second), text)
	}
}

func tail(s string) string {
	const most = 20000
	if len(s) > most {
		return fmt.Sprintf("… %s", s[len(s)-most:])
	}
	return s
}

// TestImage: the archive is what the kernel's unpacker expects.
func TestImage(t *testing.T) {
	cpio := require.Tool(t, "cpio")
	m := newImage()
	m.add("a/b/c", modeExec, []byte("hello"))
	m.link("sbin/modprobe", "/init")
	var b bytes.Buffer
	if err := m.write(&b); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", "gunzip | "+cpio+" -itv")
	cmd.Stdin = &b
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{`-rwxr-xr-x .* 5 .* a/b/c\n`, `drwxr-xr-x .* a/b\n`, `lrwxrwxrwx .* sbin/modprobe -> /init\n`, `crw------- .* 5, +1 .* dev/console\n`} {
		if !regexp.MustCompile(want).Match(out) {
			t.Errorf("the listing has no %q:\n%s", want, out)
		}
	}
}
