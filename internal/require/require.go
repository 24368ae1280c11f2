// SPDX-License-Identifier: Apache-2.0

// Package require decides what happens when a test needs something that this
// machine lacks: a visible skip by default, a failure where the environment
// variable WEIR_REQUIRE names the feature. A continuous-integration run sets
// it, so that a missing kernel feature cannot hide a regression.
//
// WEIR_REQUIRE is a comma-separated list of feature names (netns, nfqueue,
// tool names such as nginx) or "all".
package require

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Demanded reports whether WEIR_REQUIRE names the feature.
func Demanded(feature string) bool {
	for f := range strings.SplitSeq(os.Getenv("WEIR_REQUIRE"), ",") {
		f = strings.TrimSpace(f)
		if f == feature || f == "all" {
			return true
		}
	}
	return false
}

// Missing skips the test, or fails it when WEIR_REQUIRE names the feature.
func Missing(t testing.TB, feature, why string) {
	t.Helper()
	if Demanded(feature) {
		t.Fatalf("%s is required by WEIR_REQUIRE and missing: %s", feature, why)
	}
	t.Skipf("skipped: needs %s: %s", feature, why)
}

// Netns needs the right to make network namespaces (CAP_SYS_ADMIN and
// CAP_NET_ADMIN).
func Netns(t testing.TB) {
	t.Helper()
	if !capable(unix.CAP_SYS_ADMIN) || !capable(unix.CAP_NET_ADMIN) {
		Missing(t, "netns", "the right to make network namespaces (run as root)")
	}
}

// NFQueue needs Netns and a kernel with NFQUEUE support.
func NFQueue(t testing.TB) {
	t.Helper()
	Netns(t)
	if _, err := os.Stat("/proc/sys/net/netfilter"); err != nil {
		Missing(t, "nfqueue", "a kernel with netfilter: "+err.Error())
	}
}

// Tool needs an executable of that name and returns its path. System
// directories are searched too, because an unprivileged PATH often lacks them.
func Tool(t testing.TB, name string) string {
	t.Helper()
	if p, err := exec.LookPath(name); err == nil {
		return p
	}
	for _, d := range []string{"/usr/sbin/", "/sbin/", "/usr/local/sbin/"} {
		if p, err := exec.LookPath(d + name); err == nil {
			return p
		}
	}
	Missing(t, name, "the program "+name+" (make deps installs it)")
	return ""
}

func capable(c int) bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	return data[c/32].Effective&(1<<uint(c%32)) != 0
}
