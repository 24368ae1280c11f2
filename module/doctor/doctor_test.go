// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/divert"
	"github.com/weirgate/weir/nft"
)

// healthy is a host on which everything is well.
func healthy(t *testing.T) *Host {
	t.Helper()
	return &Host{
		Capabilities: func() (uint64, error) { return 1<<40 - 1, nil },
		Probe: func() (nft.Kernel, error) {
			return nft.Kernel{NativeQueue: true, Owner: true, TProxy4: true, TProxy6: true, Ct: true}, nil
		},
		Guard:      func() error { return nil },
		Queue:      func(uint16) error { return nil },
		Foreign:    func(nft.Params) ([]nft.Finding, error) { return nil, nil },
		Interfaces: func(nft.Params) ([]string, error) { return []string{"lan", "dmz.5"}, nil },
		Strict:     func(string, ...string) ([]string, error) { return nil, nil },
		Merging:    func(...string) ([]string, error) { return nil, nil },
		Forwarding: func(nft.Params, ...string) error { return nil },
		Listeners:  func([]netip.AddrPort) error { return nil },
		Ports:      func(uint16, uint16, ...netip.Addr) ([]uint16, error) { return nil, nil },
		Queues:     func(uint16, int) error { return nil },
		Journal:    func(string) ([]nft.Change, error) { return nil, nil },
		Addresses:  func() ([]netip.Addr, error) { return []netip.Addr{netip.MustParseAddr("198.51.100.1")}, nil },
		Route:      func(netip.AddrPort) error { return nil },
		Running:    func(context.Context, string) (*control.Status, error) { return nil, errors.New("nobody") },
		Stat:       func(string) (fs.FileInfo, error) { return os.Stat(t.TempDir()) },
	}
}

func params() nft.Params {
	return nft.Params{
		Table: "weir", Mark: 1 << 24, MarkMask: 0xff << 24, Shards: 1, QueueFirst: 22272, PortFirst: 10240, PortLast: 32767,
		VIPs: []netip.AddrPort{netip.MustParseAddrPort("203.0.113.10:80")}, Servers: []netip.AddrPort{netip.MustParseAddrPort("198.51.100.11:80")},
		SNIPs: []netip.Addr{netip.MustParseAddr("198.51.100.1")},
	}
}

func TestHealthy(t *testing.T) {
	for _, f := range Examine(t.Context(), healthy(t), &config.Config{RuntimeDir: "/run/weir"}, params()) {
		if f.Level != OK || f.Text == "" || f.Command != "" {
			t.Errorf("on a healthy host: %+v", f)
		}
	}
}

// TestSick: each illness is found, explained, and has a command; nothing else
// is reported with it.
func TestSick(t *testing.T) {
	for _, c := range []struct {
		name   string
		infect func(*Host)
		check  string
		level  Level
		text   string // a part of the finding
		mend   string // a part of the command
	}{
		{"no privileges", func(h *Host) { h.Capabilities = func() (uint64, error) { return 1 << capNetRaw, nil } },
			"privileges", Fail, "CAP_NET_ADMIN", "sudo"},
		{"no queue in nftables", func(h *Host) {
			h.Probe = func() (nft.Kernel, error) { return nft.Kernel{}, fmt.Errorf("nft: %w: load it", nft.ErrNoQueue) }
		}, "kernel", Fail, "", "modprobe nft_queue"},
		{"no nftables", func(h *Host) {
			h.Probe = func() (nft.Kernel, error) { return nft.Kernel{}, fmt.Errorf("nft: %w", nft.ErrNoNftables) }
		}, "kernel", Fail, "", "modprobe nf_tables"},
		{"a feature missing", func(h *Host) {
			h.Probe = func() (nft.Kernel, error) { return nft.Kernel{}, &nft.MissingError{Features: []string{"fib"}} }
		}, "kernel", Fail, "fib", "modprobe"},
		{"no fragments", func(h *Host) {
			h.Probe = func() (nft.Kernel, error) { return nft.Kernel{CompatQueue: true, Owner: true}, nil }
		}, "kernel", Warn, "reassemble", "modprobe"},
		{"neither owner nor guard", func(h *Host) {
			h.Probe = func() (nft.Kernel, error) { return nft.Kernel{NativeQueue: true, Ct: true}, nil }
			h.Guard = func() error { return nft.ErrNoGuard }
		}, "kernel", Warn, "there is no guard", "6.9"},
		{"no nfqueue", func(h *Host) {
			h.Queue = func(q uint16) error {
				return &divert.QueueError{Queue: q, Op: "open", Reason: divert.ErrUnsupported, Err: errors.New("x")}
			}
		}, "queues", Fail, "no queues", "modprobe nfnetlink_queue"},
		{"queue in use", func(h *Host) {
			h.Queues = func(uint16, int) error { return fmt.Errorf("nft: queue 22272 is bound by evil: %w", nft.ErrQueueInUse) }
		}, "queues", Fail, "22272 is bound by evil", "queue.first"},
		{"LRO", func(h *Host) { h.Merging = func(...string) ([]string, error) { return []string{"lan"}, nil } },
			"offload", Warn, "lan merges", "ethtool -K lan lro off"},
		{"no forwarding", func(h *Host) {
			h.Forwarding = func(nft.Params, ...string) error { return nft.ForwardingError(true, false) }
		}, "forwarding", Fail, "forwarding is off", "sysctl -w net.ipv4.ip_forward=1"},
		{"listener", func(h *Host) {
			h.Listeners = func(v []netip.AddrPort) error {
				return fmt.Errorf("nft: listen %v: by nginx: %w", v[0], nft.ErrListener)
			}
		}, "listeners", Fail, "by nginx", "ss -ltnp"},
		{"no SNIP", func(h *Host) { h.Addresses = func() ([]netip.Addr, error) { return nil, nil } },
			"source", Fail, "198.51.100.1 is no address", "ip address add 198.51.100.1/32"},
		{"listener in the range", func(h *Host) {
			h.Ports = func(uint16, uint16, ...netip.Addr) ([]uint16, error) {
				return nil, fmt.Errorf("nft: port 11111: %w", nft.ErrListener)
			}
		}, "source", Fail, "11111", "source.ports"},
		{"strict rp_filter", func(h *Host) { h.Strict = func(string, ...string) ([]string, error) { return []string{"dmz.5"}, nil } },
			"rp_filter", Note, "strict on dmz.5", "sysctl -w net.ipv4.conf.dmz/5.rp_filter=2"},
		{"forward policy drop", func(h *Host) {
			h.Foreign = func(nft.Params) ([]nft.Finding, error) {
				return []nft.Finding{{Trouble: nft.DropsMarked, Certain: true, Family: "inet", Table: "filter", Chain: "forward", Rule: "policy drop", Fix: "nft add rule x"}}, nil
			}
		}, "tables", Fail, "inet filter forward: drops packets", "nft add rule x"},
		{"SYN refused", func(h *Host) {
			h.Foreign = func(nft.Params) ([]nft.Finding, error) {
				return []nft.Finding{{Trouble: nft.DropsSYN, Certain: true, Table: "filter", Fix: "accept it"}}, nil
			}
		}, "tables", Warn, "refuses new connections", "accept it"},
		{"no route", func(h *Host) {
			h.Route = func(a netip.AddrPort) error {
				if a.Addr() == netip.MustParseAddr("198.51.100.11") {
					return errors.New("unreachable")
				}
				return nil
			}
		}, "routes", Fail, "no route to server", "ip route add 198.51.100.11/32"},
		{"killed", func(h *Host) { h.Journal = func(string) ([]nft.Change, error) { return make([]nft.Change, 2), nil } },
			"runtime_dir", Warn, "was killed", "weir cleanup"},
		{"a file in the way", func(h *Host) {
			h.Stat = func(string) (fs.FileInfo, error) { return os.Stat("doctor.go") }
		}, "runtime_dir", Fail, "no directory", "rm "},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := healthy(t)
			c.infect(h)
			var hits []Finding
			for _, f := range Examine(t.Context(), h, &config.Config{RuntimeDir: "/run/weir"}, params()) {
				if f.Level != OK {
					hits = append(hits, f)
				}
			}
			if len(hits) != 1 {
				t.Fatalf("%d findings: %+v", len(hits), hits)
			}
			f := hits[0]
			if f.Check != c.check || f.Level != c.level || !strings.Contains(f.Text, c.text) || !strings.Contains(f.Command, c.mend) || f.Command == "" {
				t.Errorf("%+v, want %s %s with %q, mended by %q", f, c.level, c.check, c.text, c.mend)
			}
			if strings.HasPrefix(f.Text, "nft: ") || strings.HasPrefix(f.Text, "divert: ") {
				t.Errorf("the text is a programmer's: %q", f.Text)
			}
		})
	}
}

// TestRunning: beside a running instance its own queues are not in the way, and
// what it changed is not left over.
func TestRunning(t *testing.T) {
	h := healthy(t)
	h.Running = func(context.Context, string) (*control.Status, error) {
		return &control.Status{PID: 7, Condition: control.Ready}, nil
	}
	h.Queues = func(uint16, int) error { return nft.ErrQueueInUse }
	h.Journal = func(string) ([]nft.Change, error) { return make([]nft.Change, 2), nil }
	for _, f := range Examine(t.Context(), h, &config.Config{RuntimeDir: "/run/weir"}, params()) {
		if f.Level == Warn || f.Level == Fail {
			t.Errorf("%+v", f)
		}
	}
}

// TestProbes: what probe packets show is told beside what reading shows, once.
func TestProbes(t *testing.T) {
	read := nft.Finding{Trouble: nft.DropsMarked, Family: "inet", Table: "filter", Chain: "forward", Rule: "a rate", Fix: "read"}
	sure := read
	sure.Certain, sure.Fix = true, "probed"
	other := nft.Finding{Trouble: nft.DropsMarked, Certain: true, Family: "ip", Table: "raw", Chain: "PREROUTING", Rule: "policy drop", Fix: "other"}
	syn := nft.Finding{Trouble: nft.DropsSYN, Certain: true, Family: "inet", Table: "filter", Chain: "input", Rule: "policy drop", Fix: "let in"}
	new1, new2 := "198.18.0.11:40000 -> 203.0.113.10:80, in lan", "198.19.0.11:40000 -> 203.0.113.10:80, in dmz"
	for _, c := range []struct {
		name  string
		found []nft.Finding
		list  []nft.Traced
		err   error
		want  []string // level, check and a part of the command or text of all but the other checks
	}{
		{"all pass", nil, []nft.Traced{{Passed: true}, {Passed: true}}, nil, []string{"ok tables", "ok probes 2 probe packets"}},
		{"what was possible is certain", []nft.Finding{read}, []nft.Traced{{Passed: true}, {Ended: &sure}, {Ended: &sure}}, nil, []string{"note probes 1 of 3", "fail tables probed"}},
		{"what reading has not found", []nft.Finding{sure}, []nft.Traced{{Ended: &other}}, nil, []string{"note probes 0 of 1", "fail tables probed", "fail tables other"}},
		{"refused on one way, let in on the other", nil, []nft.Traced{{Kind: "new connection", Packet: new1, Passed: true}, {Kind: "new connection", Packet: new2, Ended: &syn}}, nil, []string{"ok tables", "note probes 1 of 2"}},
		{"refused on all ways", nil, []nft.Traced{{Kind: "new connection", Packet: new1, Ended: &syn}, {Kind: "new connection", Packet: new2, Ended: &syn}}, nil, []string{"ok tables", "note probes 0 of 2", "warn tables let in"}},
		{"lost", nil, []nft.Traced{{Kind: "response", Lost: "by iptables-legacy"}, {Kind: "response", Lost: "by iptables-legacy"}, {Kind: "request", Lost: "not sent: x"}}, nil,
			[]string{"ok tables", "warn probes by iptables-legacy", "note probes not sent: x", "note probes 0 of 3"}},
		{"no BPF", nil, nil, nft.ErrNoInjection, []string{"ok tables", "warn probes CONFIG_BPF_SYSCALL"}},
	} {
		h := healthy(t)
		h.Foreign = func(nft.Params) ([]nft.Finding, error) { return c.found, nil }
		h.Trace = func(nft.Params) ([]nft.Traced, error) { return c.list, c.err }
		var got []Finding
		for _, f := range Examine(t.Context(), h, &config.Config{RuntimeDir: "/run/weir"}, params()) {
			if f.Check == "tables" || f.Check == "probes" {
				got = append(got, f)
			}
		}
		fits := len(got) == len(c.want)
		for i := 0; fits && i < len(got); i++ {
			w := strings.SplitN(c.want[i]+" ", " ", 3)
			fits = string(got[i].Level) == w[0] && got[i].Check == w[1] && strings.Contains(got[i].Text+" "+got[i].Command+" ", strings.TrimSpace(w[2]))
		}
		if !fits {
			t.Errorf("%s: %+v, want %q", c.name, got, c.want)
		}
	}
}

// TestUnknown: what cannot be asked is said, and the rest goes on.
func TestUnknown(t *testing.T) {
	h := healthy(t)
	h.Interfaces = func(nft.Params) ([]string, error) { return nil, fmt.Errorf("nft: %w", nft.ErrPermission) }
	h.Capabilities = func() (uint64, error) { return 0, errors.New("no /proc") }
	n := 0
	for _, f := range Examine(t.Context(), h, &config.Config{RuntimeDir: "/run/weir"}, params()) {
		if strings.HasPrefix(f.Text, "not looked at: ") {
			n++
		}
	}
	if n != 3 {
		t.Errorf("%d checks are told to be impossible, want 3", n)
	}
}
