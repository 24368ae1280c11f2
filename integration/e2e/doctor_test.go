// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
)

// A finding is what weir doctor -o json says of one thing.
type finding struct{ Check, Level, Text, Why, Command string }

// inRouter runs weir inside the router's namespace, with the rig's
// configuration.
func (r *rig) inRouter(cred *syscall.Credential, bin string, args ...string) (code int, stdout, stderr string) {
	r.t.Helper()
	cmd := r.Router.Command(bin, append(args, "--config", r.file())...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if cred != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	}
	p, err := r.Router.Start(cmd)
	if err != nil {
		r.t.Fatal(err)
	}
	err = p.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.t.Fatal(err)
	}
	return p.ExitCode(), out.String(), errs.String()
}

// TestDoctor gives a router one illness after the other: each is found and
// explained with the command that mends it, the command does, and the doctor
// itself changes nothing.
func TestDoctor(t *testing.T) {
	nftTool := require.Tool(t, "nft")
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, NoIPv6: true})
	r.hello()
	r.rewrite(r.text(setup{servers: []string{"s1=0", "s2=1"}}))
	before := r.state()
	doctor := func(cred *syscall.Credential, bin string) (int, []finding) {
		t.Helper()
		code, out, errs := r.inRouter(cred, bin, "doctor", "-o", "json")
		var list []finding
		if err := json.Unmarshal([]byte(out), &list); err != nil {
			t.Fatalf("%v: exit code %d\n%s%s", err, code, out, errs)
		}
		return code, list
	}
	healthy := func(when string) {
		t.Helper()
		code, list := doctor(nil, r.bin)
		for _, f := range list {
			if f.Level == "warn" || f.Level == "fail" {
				t.Errorf("%s: %+v", when, f)
			}
		}
		if code != 0 {
			t.Errorf("%s: exit code %d", when, code)
		}
	}
	healthy("at first")
	r.sameAs(before, "after the doctor")
	sh := func(script string) {
		t.Helper()
		if _, err := r.Router.Run(t.Context(), "/bin/sh", "-c", script); err != nil {
			t.Fatal(err)
		}
	}
	found := func(list []finding, check, level, text string) *finding {
		t.Helper()
		for i := range list {
			if f := &list[i]; f.Check == check && f.Level == level && strings.Contains(f.Text, text) {
				if f.Command == "" || f.Why == "" {
					t.Errorf("%+v does not explain or mend", f)
				}
				return f
			}
		}
		t.Errorf("no finding %s %s with %q: %+v", level, check, text, list)
		return &finding{}
	}

	t.Run("privileges", func(t *testing.T) {
		b, err := os.ReadFile(r.bin)
		if err != nil {
			t.Fatal(err)
		}
		reachable := filepath.Join(r.Lab.Dir(), "weir-copy")
		if err := os.WriteFile(reachable, b, 0o755); err != nil {
			t.Fatal(err)
		}
		code, list := doctor(&syscall.Credential{Uid: 65534, Gid: 65534}, reachable)
		if code != 1 {
			t.Errorf("exit code %d, want 1", code)
		}
		if f := found(list, "privileges", "fail", "CAP_NET_ADMIN"); !strings.Contains(f.Command, "sudo") {
			t.Errorf("%+v", f)
		}
	})
	t.Run("rp_filter", func(t *testing.T) {
		if err := r.Router.SetSysctl("net/ipv4/conf/"+r.ServerLeg+"/rp_filter", "1"); err != nil {
			t.Fatal(err)
		}
		_, list := doctor(nil, r.bin)
		f := found(list, "rp_filter", "note", "strict on "+r.ServerLeg)
		sh(f.Command)
		_, list = doctor(nil, r.bin)
		for _, f := range list {
			if f.Check == "rp_filter" && f.Level != "ok" {
				t.Errorf("after %q: %+v", f.Command, f)
			}
		}
		if err := r.Router.SetSysctl("net/ipv4/conf/"+r.ServerLeg+"/rp_filter", "0"); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("forward policy drop", func(t *testing.T) {
		sh(nftTool + ` add table inet fw && ` + nftTool + ` 'add chain inet fw forward { type filter hook forward priority filter; policy drop; }'`)
		code, list := doctor(nil, r.bin)
		if code != 1 {
			t.Errorf("exit code %d, want 1", code)
		}
		f := found(list, "tables", "fail", "inet fw forward")
		if !strings.Contains(f.Command, "0x57000000") {
			t.Errorf("the command does not accept the mark: %+v", f)
		}
		sh(f.Command)
		healthy(fmt.Sprintf("after %q", f.Command))
		sh(nftTool + " delete table inet fw")
	})
	t.Run("listener", func(t *testing.T) {
		ln, err := r.Router.Listen("tcp4", r.VIP().String())
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		code, list := doctor(nil, r.bin)
		if code != 1 {
			t.Errorf("exit code %d, want 1", code)
		}
		if f := found(list, "listeners", "fail", r.VIP().String()); !strings.Contains(f.Command, "ss -ltnp") {
			t.Errorf("%+v", f)
		}
	})
	t.Run("forwarding", func(t *testing.T) {
		if err := r.Router.Forwarding(false); err != nil {
			t.Fatal(err)
		}
		_, list := doctor(nil, r.bin)
		f := found(list, "forwarding", "fail", "forwarding is off")
		sh(f.Command)
		healthy("after " + f.Command)
		if err := r.Router.Forwarding(true); err != nil { // IPv6 too, as it was
			t.Fatal(err)
		}
	})
	t.Run("killed", func(t *testing.T) {
		w := r.startWith(r.text(setup{servers: []string{"s1=0", "s2=1"}}))
		healthy("beside an instance")
		// An instance that lives is left alone.
		if code, _, errs := r.inRouter(nil, r.bin, "cleanup"); code != 1 || !strings.Contains(errs, "an instance is running") {
			t.Errorf("weir cleanup beside an instance: exit code %d\n%s", code, errs)
		}
		r.mustAsk("/alive")
		if err := w.Crash(); err != nil {
			t.Fatal(err)
		}
		code, list := doctor(nil, r.bin)
		if f := found(list, "runtime_dir", "warn", "was killed"); code != 3 || !strings.Contains(f.Command, "weir cleanup") {
			t.Errorf("exit code %d: %+v", code, f)
		}
		if code, out, errs := r.inRouter(nil, r.bin, "cleanup"); code != 0 || !strings.Contains(out, "removed table inet weir") {
			t.Errorf("weir cleanup: exit code %d\n%s%s", code, out, errs)
		}
		if code, out, errs := r.inRouter(nil, r.bin, "cleanup"); code != 0 || out != "nothing was left\n" {
			t.Errorf("weir cleanup once more: exit code %d\n%s%s", code, out, errs)
		}
		healthy("after the clean-up")
	})
	// For people: the command stands in the line below.
	code, out, errs := r.inRouter(nil, r.bin, "doctor")
	if code != 0 || !strings.Contains(out, "nothing is in the way") {
		t.Errorf("exit code %d:\n%s%s", code, out, errs)
	}
	r.sameAs(before, "in the end")
}
