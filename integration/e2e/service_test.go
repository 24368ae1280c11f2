// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
)

// TestService runs weir with the capabilities of the packaged unit and no
// others, with a plugin of another user, and listens to what it tells the
// service manager.
func TestService(t *testing.T) {
	t.Run("supervised", func(t *testing.T) { testService(t, "--supervise") })
	t.Run("alone", func(t *testing.T) { testService(t) })
}

func testService(t *testing.T, args ...string) {
	setpriv := require.Tool(t, "setpriv")
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	unit, err := os.ReadFile("../../cmd/weir/packaging/weir.service")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^CapabilityBoundingSet=(.*)$`).FindSubmatch(unit)
	if m == nil {
		t.Fatal("the unit has no CapabilityBoundingSet")
	}
	caps := "-all"
	for c := range strings.FieldsSeq(string(m[1])) {
		caps += ",+" + strings.ToLower(strings.TrimPrefix(c, "CAP_"))
	}
	notify := filepath.Join(r.dir, "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	said := func(want string) {
		t.Helper()
		if err := manager.SetReadDeadline(time.Now().Add(15 * time.Second)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4096)
		for {
			n, err := manager.Read(b)
			if err != nil {
				t.Fatalf("waiting for %s: %v", want, err)
			}
			if strings.Contains("\n"+string(b[:n])+"\n", "\n"+want+"\n") {
				return
			}
		}
	}
	script := filepath.Join(r.dir, "weir.sh")
	text := fmt.Sprintf("#!/bin/sh\n[ \"$1\" = run ] || exec %[1]q \"$@\"\nexport NOTIFY_SOCKET=%[2]q WATCHDOG_USEC=900000\nexec %[3]q --bounding-set=%[4]s --inh-caps=-all --no-new-privs %[1]q \"$@\"\n", r.bin, notify, setpriv, caps)
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	r.hello()
	before := r.state()
	o := r.options(lab.ConfigOptions{Policies: "[{use: path, config: {routes: [{prefix: /, servers: [s1, s2]}]}}]"})
	o.Binary, o.Args = script, args
	w, err := lab.StartWeir(within(t, 20*time.Second), r.Router, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("weir wrote:\n%s", w.Log())
		}
	})
	said("READY=1")
	r.mustAsk("/one")
	said("WATCHDOG=1")
	r.mustAsk("/two")
	said("WATCHDOG=1")
	r.stop(w)
	said("STOPPING=1")
	if strings.Contains(w.Log(), "permitted") || strings.Contains(w.Log(), "level=ERROR") {
		t.Errorf("a right was missing:\n%s", w.Log())
	}
	r.sameAs(before, "after the stop")
}
