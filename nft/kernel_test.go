// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/internal/require"
)

// install installs and removes at the end; mutate, if any, changes the ruleset
// first, for negative controls.
func install(t *testing.T, p Params, k Kernel, mutate func(*Ruleset)) *Firewall {
	t.Helper()
	r, err := Build(p, k)
	if err != nil {
		t.Fatal(err)
	}
	if mutate != nil {
		mutate(r)
	}
	f := &Firewall{p: p.clone(), k: k, r: r}
	if err := f.install(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Remove(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func TestProbe(t *testing.T) {
	newNetns(t)
	before := nftList(t, "ruleset")
	k := probed(t)
	t.Logf("%+v", k)
	if after := nftList(t, "ruleset"); after != before {
		t.Fatalf("Probe left something behind:\n%s", after)
	}
	if !k.Defragments() {
		t.Error("neither tproxy nor ct: fragments would be dropped")
	}
}

func TestProbeUnprivileged(t *testing.T) {
	newNetns(t)
	// Capabilities are per thread, so the thread is given up afterwards.
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&hdr, &none[0]); err != nil {
			done <- err
			return
		}
		_, err := Probe()
		done <- err
	}()
	if err := <-done; !errors.Is(err, ErrPermission) {
		t.Fatalf("got %v, want ErrPermission", err)
	}
}

// TestKernelSeesTheText installs a ruleset through netlink, and its text
// through nft, and lets nft list both: they must be the same. The queue
// statements become drops, because the text of one cannot name the target and
// this kernel may have no native one.
func TestKernelSeesTheText(t *testing.T) {
	require.Netns(t)
	for _, c := range []struct {
		shards         int
		inspectAll, lo bool
	}{{shards: 1}, {shards: 2}, {shards: 5}, {2, true, false}, {2, false, true}, {2, true, true}} {
		t.Run(fmt.Sprintf("%+v", c), func(t *testing.T) {
			newNetns(t)
			k := probed(t)
			if c.lo {
				requireSYNToLo(t, k)
			}
			p := fixed(c.shards)
			p.InspectAll, p.SYNToLo = c.inspectAll, c.lo
			dropInstead := func(r *Ruleset) {
				for i := range r.Chains {
					for _, rule := range r.Chains[i].Rules {
						for j := range rule.terms {
							if strings.HasPrefix(rule.terms[j].text, "queue num ") {
								rule.terms[j] = drop()
							}
						}
					}
				}
			}
			f := install(t, p, k, dropInstead)
			text := f.Ruleset().Text()
			got := nftList(t, "ruleset")
			if err := f.Remove(); err != nil {
				t.Fatal(err)
			}
			nftLoad(t, text)
			want := nftList(t, "ruleset")
			flags := regexp.MustCompile(`(?m)^table \w+ weir \{.*\n(\tflags .*\n\n?)?`)
			if got, want := flags.ReplaceAllString(got, ""), flags.ReplaceAllString(want, ""); got != want {
				g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
				for i := range min(len(g), len(w)) {
					if g[i] != w[i] {
						t.Errorf("through netlink:\n%s\nfrom the text:\n%s", g[i], w[i])
					}
				}
				t.Fatalf("%d and %d lines", len(g), len(w))
			}
		})
	}
}

// TestQueueStatements: both forms stand where they should, without bypass.
func TestQueueStatements(t *testing.T) {
	newNetns(t)
	k := probed(t)
	try := func(name string, k Kernel, compat bool) {
		t.Run(name, func(t *testing.T) {
			install(t, fixed(4), k, nil)
			list := nftList(t, "table", "inet", "weir")
			// 4 shards; 4 ICMP rules; 2 families of SYN in 2 hooks. nft shows
			// the target in the words of the native statement.
			if n := len(regexp.MustCompile(`queue (num|to) \d+`).FindAllString(list, -1)); n != 12 {
				t.Errorf("%d queue statements, want 12:\n%s", n, list)
			}
			if strings.Contains(list, "iptables-nft") != compat {
				t.Errorf("compat=%v, but the listing says:\n%s", compat, list)
			}
			if strings.Contains(list, "bypass") {
				t.Errorf("a rule with bypass:\n%s", list)
			}
		})
	}
	if k.NativeQueue {
		try("native", k, false)
	} else {
		t.Log("this kernel has no native queue expression")
	}
	if k.CompatQueue {
		k.NativeQueue = false
		try("compat", k, true)
	} else {
		t.Log("this kernel has no NFQUEUE target")
	}
}

const foreign = `table inet admin {
	set banned { type ipv4_addr; elements = { 198.18.1.99 } }
	counter seen { }
	chain input {
		type filter hook input priority filter; policy accept;
		ip saddr @banned drop
	}
	chain never {
		counter drop
	}
}
table ip weir {
	chain c {
		counter accept
	}
}
`

// TestForeignTables: whatever we do, the administrator's tables stay as they
// are, a table of our name in another family included.
func TestForeignTables(t *testing.T) {
	newNetns(t)
	k := probed(t)
	nftLoad(t, foreign)
	others := func() string { return nftList(t, "table", "inet", "admin") + nftList(t, "table", "ip", "weir") }
	before := others()
	check := func(when string) {
		t.Helper()
		if now := others(); now != before {
			t.Fatalf("%s the foreign tables are\n%s\nwant\n%s", when, now, before)
		}
	}
	f := install(t, fixed(2), k, nil)
	check("after Install")
	p := fixed(2)
	p.VIPs = p.VIPs[:1]
	if err := f.Update(p); err != nil {
		t.Fatal(err)
	}
	check("after Update")
	if err := f.Reinstall(); err != nil {
		t.Fatal(err)
	}
	check("after Reinstall")
	if err := f.Remove(); err != nil {
		t.Fatal(err)
	}
	check("after Remove")
	if _, err := Cleanup("weir"); err != nil {
		t.Fatal(err)
	}
	check("after Cleanup")
	if got := nftList(t, "tables"); got != "table inet admin\ntable ip weir\n" {
		t.Fatalf("left behind: %s", got)
	}
}

// TestTakeOver: a table left by a killed process, owned or not, is replaced;
// one whose owner lives is not.
func TestTakeOver(t *testing.T) {
	newNetns(t)
	k := probed(t)
	kernels := map[string]Kernel{"as probed": k}
	plain := k
	plain.Owner = false
	kernels["not owned"] = plain
	plain.Destroy = false
	kernels["before 6.3"] = plain
	for first, k1 := range kernels {
		for second, k2 := range kernels {
			if k1.Owner && !k2.Destroy {
				continue // no kernel has the one without the other
			}
			t.Run(first+", then "+second, func(t *testing.T) {
				old, err := Install(fixed(4), k1)
				if err != nil {
					t.Fatal(err)
				}
				if k1.Owner {
					if _, err := Install(fixed(1), k2); !errors.Is(err, ErrOwned) {
						t.Errorf("Install beside a living owner: %v, want ErrOwned", err)
					}
					if _, err := Cleanup("weir"); !errors.Is(err, ErrOwned) {
						t.Errorf("Cleanup beside a living owner: %v, want ErrOwned", err)
					}
					if out, err := nftRun(t, "", "flush", "ruleset"); err != nil {
						t.Logf("foreign flush: %v %s", err, out)
					}
				}
				// What the kernel does when the process dies: the socket goes.
				if err := old.Leave(); err != nil {
					t.Fatal(err)
				}
				if list := nftList(t, "chains"); !strings.Contains(list, "chain shard3") {
					t.Fatalf("the table is gone with its owner:\n%s", list)
				}
				install(t, fixed(1), k2, nil)
				if list := nftList(t, "chains"); strings.Contains(list, "shard") || !strings.Contains(list, "chain divert ") {
					t.Fatalf("not replaced:\n%s", list)
				}
			})
			if got := nftList(t, "tables"); got != "" {
				t.Fatalf("left behind: %s", got)
			}
		}
	}
}

// TestForeignFlush: an owned table survives it; a table that is not owned is
// gone (the control), and Update brings it back.
func TestForeignFlush(t *testing.T) {
	newNetns(t)
	k := probed(t)
	for _, owned := range []bool{true, false} {
		t.Run(fmt.Sprintf("owned=%v", owned), func(t *testing.T) {
			if owned && !k.Owner {
				require.Missing(t, "nft-owner", "a kernel with owned tables (6.9)")
			}
			k := k
			k.Owner = owned
			f := install(t, fixed(1), k, nil)
			if out, err := nftRun(t, "", "flush", "ruleset"); err != nil {
				t.Logf("foreign flush: %v %s", err, out)
			}
			_, err := f.Counters()
			if owned && err != nil || !owned && !errors.Is(err, ErrTableGone) {
				t.Fatalf("after a foreign flush: %v", err)
			}
			p := fixed(1)
			p.VIPs = p.VIPs[:1]
			if err := f.Update(p); err != nil {
				t.Fatal(err)
			}
			list := nftList(t, "table", "inet", "weir")
			if !strings.Contains(list, "chain divert") || !strings.Contains(list, "203.0.113.10 . 80 }") {
				t.Fatalf("after Update:\n%s", list)
			}
		})
	}
}

func TestUpdate(t *testing.T) {
	newNetns(t)
	k := probed(t)
	f := install(t, fixed(1), k, nil)
	elements := func(set string) string {
		list := nftList(t, "set", "inet", "weir", set)
		_, e, _ := strings.Cut(list, "elements = {")
		e, _, _ = strings.Cut(e, "}")
		return strings.Join(strings.Fields(e), " ")
	}
	// Handles number every object: what keeps its handle was not made anew.
	chains := func() string {
		list := nftList(t, "table", "inet", "weir", "-a")
		return list[strings.Index(list, "chain from_client4"):]
	}
	before := chains()
	p := fixed(1)
	p.VIPs = []netip.AddrPort{netip.MustParseAddrPort("203.0.113.11:81")}
	p.Servers = append(p.Servers, netip.MustParseAddrPort("198.51.100.13:80"))
	p.SNIPs = append(p.SNIPs, netip.MustParseAddr("198.51.100.2"))
	p.ExceptPorts, p.StrictRPFilter = nil, []string{"eth1", "eth2"}
	if err := f.Update(p); err != nil {
		t.Fatal(err)
	}
	for set, want := range map[string]string{
		"vips4": "203.0.113.11 . 81", "vip_addrs4": "203.0.113.11", "vips6": "", "vip_addrs6": "",
		"snips4": "198.51.100.1, 198.51.100.2", "except_ports": "", "strict_rp": `"eth1", "eth2"`,
	} {
		if got := elements(set); got != want && got != reversed(want) {
			t.Errorf("%s holds %q, want %q", set, got, want)
		}
	}
	if n := strings.Count(elements("servers4"), " . 80"); n != 3 {
		t.Errorf("%d servers, want 3", n)
	}
	if after := chains(); after != before {
		t.Errorf("chains changed:\n%s\nwere\n%s", after, before)
	}

	for key, change := range map[string]func(*Params){
		"firewall.table": func(p *Params) { p.Table = "other" },
		"firewall.mark":  func(p *Params) { p.Mark = 0x58000000 },
		"source.ports":   func(p *Params) { p.PortLast-- },
		"queue.first":    func(p *Params) { p.QueueFirst++ },
		"queue.shards":   func(p *Params) { p.Shards++ },
	} {
		q := p
		change(&q)
		if err := f.Update(q); !errors.Is(err, ErrNeedsRestart) || !strings.Contains(err.Error(), key) {
			t.Errorf("change of %s: %v", key, err)
		}
	}
	if err := f.Remove(); err != nil {
		t.Fatal(err)
	}
	if err := f.Update(p); !errors.Is(err, ErrTableGone) {
		t.Errorf("Update after Remove: %v", err)
	}
	if err := f.Remove(); err != nil {
		t.Errorf("second Remove: %v", err)
	}
}

func reversed(list string) string {
	p := strings.Split(list, ", ")
	for i, j := 0, len(p)-1; i < j; i, j = i+1, j-1 {
		p[i], p[j] = p[j], p[i]
	}
	return strings.Join(p, ", ")
}

// TestLargeSets: thousands of elements of both families install and change in
// one transaction each.
func TestLargeSets(t *testing.T) {
	newNetns(t)
	k := probed(t)
	p := fixed(MaxShards)
	p.VIPs, p.Servers = nil, nil
	for i := range 1000 {
		a4 := netip.AddrFrom4([4]byte{203, 0, 113, byte(i)})
		a6 := netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 14: byte(i >> 8), 15: byte(i)})
		p.VIPs = append(p.VIPs, netip.AddrPortFrom(a4, uint16(1000+i/256)), netip.AddrPortFrom(a6, 80))
	}
	for i := range 10000 {
		a4 := netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})
		a6 := netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, 1, 14: byte(i >> 8), 15: byte(i)})
		p.Servers = append(p.Servers, netip.AddrPortFrom(a4, 80), netip.AddrPortFrom(a6, 80))
	}
	f := install(t, p, k, nil)
	count := func(set string) int {
		return strings.Count(nftList(t, "set", "inet", "weir", set), " . ") - 1 // the type
	}
	for set, want := range map[string]int{"vips4": 1000, "vips6": 1000, "servers4": 10000, "servers6": 10000} {
		if n := count(set); n != want {
			t.Errorf("%s has %d elements, want %d", set, n, want)
		}
	}
	p.Servers = p.Servers[:19000]
	if err := f.Update(p); err != nil {
		t.Fatal(err)
	}
	if n := count("servers6"); n != 9500 {
		t.Errorf("servers6 has %d elements after Update, want 9500", n)
	}
}

// TestRefusedBatch: the error names the step and changes nothing.
func TestRefusedBatch(t *testing.T) {
	newNetns(t)
	k := probed(t)
	install(t, fixed(1), k, nil)
	before := nftList(t, "ruleset", "-a")
	r, err := Build(fixed(2), k)
	if err != nil {
		t.Fatal(err)
	}
	r.Table = "broken"
	r.Chain("from_client4").Rules[1].terms[2] = family4.destinationIn("nosuchset")
	b, err := rulesetBatch(r, k)
	if err != nil {
		t.Fatal(err)
	}
	c, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	err = c.send(b)
	var be *BatchError
	if !errors.As(err, &be) || be.Err != unix.ENOENT || !strings.Contains(be.What, "@nosuchset") {
		t.Fatalf("got %v, want ENOENT at the rule with @nosuchset", err)
	}
	if after := nftList(t, "ruleset", "-a"); after != before {
		t.Fatalf("a refused batch changed the ruleset:\n%s", after)
	}
}
