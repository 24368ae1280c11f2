// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the golden files and the example in doc.go")

// fixed are parameters that never change, of both families.
func fixed(shards int) Params {
	return Params{
		Table: "weir", Mark: 0x57000000, MarkMask: 0xff000000,
		VIPs: []netip.AddrPort{
			netip.MustParseAddrPort("203.0.113.10:80"), netip.MustParseAddrPort("203.0.113.10:8080"),
			netip.MustParseAddrPort("[2001:db8::10]:80"),
		},
		Servers:   []netip.AddrPort{netip.MustParseAddrPort("198.51.100.12:80"), netip.MustParseAddrPort("198.51.100.11:80"), netip.MustParseAddrPort("[2001:db8:1::11]:80")},
		SNIPs:     []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:1::1")},
		PortFirst: 10240, PortLast: 32767, ExceptPorts: []uint16{20000},
		QueueFirst: 22272, Shards: shards, StrictRPFilter: []string{"eth0"},
	}
}

// full is a kernel with everything.
var full = Kernel{NativeQueue: true, CompatQueue: true, Owner: true, Destroy: true, TProxy4: true, TProxy6: true, Ct: true, IPv6: true, Dup4: true, Dup6: true}

// TestGolden pins the bytes that go to the kernel: any change of them is a
// decision, to be seen in review beside the text that they say. Run with
// -update after one.
func TestGolden(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("skipped: the golden bytes are those of a little-endian machine")
	}
	old := Kernel{CompatQueue: true, Ct: true, IPv6: true}
	compat := full
	compat.NativeQueue = false
	wide := fixed(1)
	wide.PortFirst, wide.PortLast = 1024, 65535
	wide.Shards = 3
	inspect := fixed(2)
	inspect.InspectAll = true
	lo := fixed(2)
	lo.SYNToLo = true
	for _, c := range []struct {
		name string
		p    Params
		k    Kernel
	}{
		{"lo-2", lo, full},
		{"inspect-2", inspect, full},
		{"native-1", fixed(1), full},
		{"native-4", fixed(4), full},
		{"compat-1", fixed(1), compat},
		{"compat-4", fixed(4), compat},
		{"old-kernel-3", wide, old},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := Build(c.p, c.k)
			if err != nil {
				t.Fatal(err)
			}
			b, err := rulesetBatch(r, c.k)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, c.name, r.Text(), b)
		})
	}
	t.Run("update", func(t *testing.T) {
		r, err := Build(fixed(1), full)
		if err != nil {
			t.Fatal(err)
		}
		b, err := elementsBatch(r.Table, r.Sets[:2])
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "update", "", b)
	})
	t.Run("lo-renew", func(t *testing.T) {
		r, err := Build(lo, full)
		if err != nil {
			t.Fatal(err)
		}
		b, err := renewBatch(r, full)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "lo-renew", "", b)
	})
	t.Run("lo-remove", func(t *testing.T) {
		b, err := deleteTableBatch("weir", families[:]...)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "lo-remove", "", b)
	})
	t.Run("remove", func(t *testing.T) {
		b, err := deleteTableBatch("weir")
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "remove", "", b)
	})
}

// golden compares with testdata/NAME.golden: the text as comment, then one
// message per line: type, flags, body.
func golden(t *testing.T, name, text string, batch *batch) {
	t.Helper()
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString("# " + line)
	}
	for i, m := range batch.messages {
		fmt.Fprintf(&b, "\n# %s\n%04x %04x %x\n", batch.what[i], uint16(m.Header.Type), uint16(m.Header.Flags), m.Data)
	}
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v (run go test -update)", err)
	}
	if got, want := strings.Split(b.String(), "\n"), strings.Split(string(want), "\n"); b.String() != strings.Join(want, "\n") {
		for i := range min(len(got), len(want)) {
			if got[i] != want[i] {
				t.Fatalf("%s:%d differs (run go test -update if that is meant)\n got %s\nwant %s", path, i+1, got[i], want[i])
			}
		}
		t.Fatalf("%s: %d lines, want %d", path, len(got), len(want))
	}
}

// TestDocExample keeps the example in the package comment what Build makes.
func TestDocExample(t *testing.T) {
	p := Params{
		Table: "weir", Mark: 0x57000000, MarkMask: 0xff000000,
		VIPs:      []netip.AddrPort{netip.MustParseAddrPort("203.0.113.10:80")},
		Servers:   []netip.AddrPort{netip.MustParseAddrPort("198.51.100.11:80")},
		SNIPs:     []netip.Addr{netip.MustParseAddr("198.51.100.1")},
		PortFirst: 10240, PortLast: 32767, QueueFirst: 22272, Shards: 2,
	}
	r, err := Build(p, full)
	if err != nil {
		t.Fatal(err)
	}
	var example strings.Builder
	for line := range strings.Lines(r.Text()) {
		if line = strings.TrimRight(line, "\n"); line == "" {
			example.WriteString("//\n")
		} else {
			example.WriteString("//\t" + line + "\n")
		}
	}
	src, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	// The example is the indented block at the end of the comment.
	block := regexp.MustCompile(`(?s)//\ttable inet .*//\t}\n`)
	want := block.ReplaceAllLiteral(src, []byte(example.String()))
	if *update {
		if err := os.WriteFile("doc.go", want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if !block.Match(src) || string(want) != string(src) {
		t.Fatal("the example in doc.go is not what Build makes: run go test -run TestDocExample -update")
	}
}
