// SPDX-License-Identifier: Apache-2.0

// Package doctor looks at a host for everything that keeps an instance from
// starting, or its packets from passing, and names the command that mends it.
//
// It changes nothing, opens a queue for a moment at most, and sends no packet,
// unless it is asked for probe packets (Host.Trace): these make a table for a
// moment, and none of them leaves the host.
// It must not decide what an instance may do: the start refuses by itself what
// cannot work, and says less.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/divert"
	"github.com/weirgate/weir/nft"
)

// Level says how bad a finding is.
type Level string

// The levels.
const (
	OK   Level = "ok"
	Note Level = "note" // worth knowing, nothing to do
	Warn Level = "warn" // works, but not for all or not for long
	Fail Level = "fail" // an instance does not start, or serves nobody
)

// Finding is one result.
type Finding struct {
	Check   string // what was looked at, one word
	Level   Level
	Text    string // what was found, in a sentence
	Why     string // what it means; may be empty
	Command string // that mends it; may be empty
}

// Host is what the doctor asks. A test puts another one in place of This.
type Host struct {
	Capabilities func() (uint64, error)     // effective ones, a bit each
	Probe        func() (nft.Kernel, error) // features of nftables
	Guard        func() error               // whether the guard of a table that cannot be owned can run
	Queue        func(first uint16) error   // opens a queue and closes it again
	Foreign      func(nft.Params) ([]nft.Finding, error)
	Trace        func(nft.Params) ([]nft.Traced, error) // sends probe packets; nil not to
	Interfaces   func(nft.Params) ([]string, error)
	Strict       func(dir string, ifaces ...string) ([]string, error)
	Merging      func(ifaces ...string) ([]string, error) // those that receive by LRO
	Forwarding   func(nft.Params, ...string) error
	Listeners    func([]netip.AddrPort) error
	Ports        func(first, last uint16, snips ...netip.Addr) ([]uint16, error)
	Queues       func(first uint16, n int) error
	Journal      func(dir string) ([]nft.Change, error)
	Addresses    func() ([]netip.Addr, error)                                      // of this host
	Route        func(netip.AddrPort) error                                        // whether there is one
	Running      func(ctx context.Context, socket string) (*control.Status, error) // the instance that answers
	Stat         func(path string) (fs.FileInfo, error)
}

// This is the host that the program runs on, in the network namespace of the
// calling thread.
func This() *Host {
	return &Host{
		Capabilities: capabilities,
		Probe:        nft.Probe,
		Guard:        nft.ProbeGuard,
		Queue: func(first uint16) error {
			q, err := divert.OpenPlain(divert.Config{Queue: first})
			if err != nil {
				return err
			}
			return q.Close()
		},
		Foreign: nft.Foreign, Interfaces: nft.Interfaces, Strict: nft.StrictInterfaces, Merging: nft.LargeReceive, Forwarding: nft.CheckForwarding,
		Listeners: nft.CheckVIPListeners, Ports: nft.LocalPortsInRange, Queues: func(first uint16, n int) error { return nft.CheckQueues(first, n) },
		Journal: func(dir string) ([]nft.Change, error) {
			j, err := nft.OpenJournal(dir)
			if err != nil {
				return nil, err
			}
			return j.Changes(), nil
		},
		Addresses: localAddresses,
		Route: func(a netip.AddrPort) error {
			// A datagram socket is connected by looking for a route; nothing is sent.
			c, err := net.Dial("udp", a.String())
			if err != nil {
				return err
			}
			return c.Close()
		},
		Running: func(ctx context.Context, socket string) (*control.Status, error) {
			c, err := control.Dial(socket)
			if err != nil {
				return nil, err
			}
			defer c.Close()
			ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
			defer cancel()
			return c.Status(ctx)
		},
		Stat: os.Stat,
	}
}

// The capabilities that an instance needs, by their numbers in
// linux/capability.h.
const (
	capNetAdmin = 12
	capNetRaw   = 13
)

// capabilities reads the effective capabilities of this process.
func capabilities() (uint64, error) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(v), 16, 64)
		}
	}
	return 0, errors.New("/proc/self/status has no line CapEff")
}

func localAddresses() ([]netip.Addr, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, p.Addr().Unmap())
		}
	}
	return out, nil
}

// Examine looks at a host for an instance of a configuration, whose ruleset
// would have these parameters. Findings come in the order in which they would
// stop a start.
func Examine(ctx context.Context, h *Host, cfg *config.Config, params nft.Params) []Finding {
	d := &doctor{h: h, cfg: cfg, params: params}
	if st, err := h.Running(ctx, cfg.Admin.Socket); err == nil {
		d.running = st
		d.add("instance", Note, fmt.Sprintf("an instance runs on %s: process %d, %s", cfg.Admin.Socket, st.PID, st.Condition), "", "")
	}
	d.privileges()
	d.kernel()
	d.queues()
	d.forwarding()
	d.listeners()
	d.source()
	d.reversePath()
	d.foreign()
	d.routes()
	d.remains()
	return d.list
}

type doctor struct {
	h       *Host
	cfg     *config.Config
	params  nft.Params
	running *control.Status // nil: none
	list    []Finding
	denied  bool // what needs privileges cannot be asked
}

func (d *doctor) add(check string, level Level, text, why, command string) {
	d.list = append(d.list, Finding{Check: check, Level: level, Text: text, Why: why, Command: command})
}

// broken reports that a check could not be made.
func (d *doctor) broken(check string, err error) {
	if errors.Is(err, nft.ErrPermission) || errors.Is(err, fs.ErrPermission) {
		d.add(check, Note, "not looked at: "+sentence(err), "It takes the rights of an instance.", "sudo weir doctor")
		return
	}
	d.add(check, Warn, "not looked at: "+sentence(err), "", "")
}

// sentence takes the package's name off a message.
func sentence(err error) string {
	s := err.Error()
	for _, p := range []string{"nft: ", "divert: "} {
		s = strings.TrimPrefix(s, p)
	}
	return s
}

// each splits joined errors.
func each(err error) []error {
	if err == nil {
		return nil
	}
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		var out []error
		for _, e := range many.Unwrap() {
			out = append(out, each(e)...)
		}
		return out
	}
	return []error{err}
}

func (d *doctor) privileges() {
	caps, err := d.h.Capabilities()
	if err != nil {
		d.broken("privileges", err)
		return
	}
	var missing []string
	if caps&(1<<capNetAdmin) == 0 {
		missing = append(missing, "CAP_NET_ADMIN")
	}
	if caps&(1<<capNetRaw) == 0 {
		missing = append(missing, "CAP_NET_RAW")
	}
	if len(missing) == 0 {
		d.add("privileges", OK, "this process may change rules, queues and raw sockets", "", "")
		return
	}
	d.denied = true
	d.add("privileges", Fail, "this process has no "+strings.Join(missing, " and no "),
		"An instance needs both: for rules, sysctls and queues, and to emit packets. Without them some of what follows cannot be looked at.",
		"sudo weir doctor, and for the service: AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW")
}

func (d *doctor) kernel() {
	if d.denied {
		return
	}
	k, err := d.h.Probe()
	var missing *nft.MissingError
	switch {
	case err == nil:
		d.params.SYNToLo = d.cfg.KernelSYNs() && k.SYNToLo()
		way := "the native queue expression"
		if !k.NativeQueue {
			way = "the NFQUEUE target through nft_compat"
		}
		owned := "the table is owned: a foreign flush does not take it"
		var guard error
		if !k.Owner || d.cfg.Firewall.Owned == "never" {
			owned = "tables cannot be owned (from Linux 6.9 on): a foreign flush is repaired at once, and a guard outside nftables holds untranslated packets back meanwhile"
			if d.cfg.Firewall.Owned == "never" {
				owned = strings.Replace(owned, "tables cannot be owned (from Linux 6.9 on)", "the table is not to be owned (firewall.owned)", 1)
			}
			if guard = d.h.Guard(); guard != nil {
				owned = "a foreign flush is repaired at once"
			}
		}
		d.add("kernel", OK, fmt.Sprintf("nftables can all that is needed; packets are queued by %s; %s", way, owned), "", "")
		if guard != nil {
			d.add("kernel", Warn, "the table cannot be owned, and there is no guard: "+sentence(guard),
				"A foreign \"nft flush ruleset\" takes the table for some milliseconds; in that gap the router's own TCP resets connections that Weir holds.",
				"a kernel from 6.9 on, or one with BPF for traffic control (modprobe -a sch_ingress cls_bpf); until then change single tables instead of flushing the ruleset")
		}
		if !k.Defragments() {
			d.add("kernel", Warn, "the kernel cannot be made to reassemble fragments", "Fragments to VIPs and SNIPs are dropped and counted.", "modprobe nft_tproxy nf_conntrack")
		}
	case errors.Is(err, nft.ErrNoQueue):
		d.add("kernel", Fail, sentence(err), "Packets reach the engine through a queue of netfilter.", "modprobe nft_queue || modprobe -a nft_compat xt_NFQUEUE")
	case errors.Is(err, nft.ErrNoNftables):
		d.add("kernel", Fail, sentence(err), "The rules are an nftables table.", "modprobe nf_tables")
	case errors.As(err, &missing):
		d.add("kernel", Fail, sentence(err), "The rules use these expressions.", "modprobe -a nft_fib_inet nft_hash nft_ct nft_objref")
	default:
		d.broken("kernel", err)
	}
}

func (d *doctor) queues() {
	if d.running != nil || d.denied {
		return
	}
	first, n := d.params.QueueFirst, d.params.Queues()
	if err := d.h.Queues(first, n); err != nil {
		for _, e := range each(err) {
			if !errors.Is(e, nft.ErrQueueInUse) {
				d.broken("queues", e)
				continue
			}
			d.add("queues", Fail, sentence(e), "Each number has one owner.", fmt.Sprintf("weir cleanup if an instance was killed, else another queue.first in the configuration, such as %d", (int(first)+1000)%60000))
		}
		return
	}
	switch err := d.h.Queue(first); {
	case err == nil:
		d.add("queues", OK, fmt.Sprintf("queues %d to %d are free and can be opened", first, int(first)+n-1), "", "")
	case errors.Is(err, divert.ErrUnsupported):
		d.add("queues", Fail, "the kernel has no queues for programs: "+sentence(err), "The module nfnetlink_queue hands packets to the engine.", "modprobe nfnetlink_queue")
	case errors.Is(err, divert.ErrQueueInUse):
		d.add("queues", Fail, sentence(err), "Each number has one owner.", "another queue.first in the configuration")
	default:
		d.broken("queues", err)
	}
}

func (d *doctor) forwarding() {
	ifaces, err := d.h.Interfaces(d.params)
	if err != nil {
		d.broken("forwarding", err)
		return
	}
	if merging, err := d.h.Merging(ifaces...); err != nil {
		d.broken("offload", err)
	} else {
		for _, name := range merging {
			d.add("offload", Warn, name+" merges packets as it receives them (LRO)",
				"The kernel forwards no packet that was merged so; transfers hang.", "ethtool -K "+name+" lro off")
		}
	}
	err = d.h.Forwarding(d.params, ifaces...)
	if err == nil {
		d.add("forwarding", OK, "the kernel forwards between clients and servers", "", "")
		return
	}
	for _, e := range each(err) {
		text := sentence(e)
		if !errors.Is(e, nft.ErrForwarding) {
			d.broken("forwarding", e)
			continue
		}
		what, command, _ := strings.Cut(text, ": run: ")
		d.add("forwarding", Fail, what, "Translated packets are routed to the servers and back to the clients.", command)
	}
}

func (d *doctor) listeners() {
	err := d.h.Listeners(d.params.VIPs)
	if err == nil {
		d.add("listeners", OK, "no program of this host listens on a VIP", "", "")
		return
	}
	for _, e := range each(err) {
		if !errors.Is(e, nft.ErrListener) {
			d.broken("listeners", e)
			continue
		}
		d.add("listeners", Fail, sentence(e), "Its clients would come to the farm instead, and the start refuses that.", "ss -ltnp shows the program; stop it, or bind it to another address")
	}
}

// source looks at the router's own side toward the servers.
func (d *doctor) source() {
	have, err := d.h.Addresses()
	if err != nil {
		d.broken("source", err)
		return
	}
	ok := true
	for _, a := range d.params.SNIPs {
		if !slices.Contains(have, a.Unmap()) {
			ok = false
			d.add("source", Fail, fmt.Sprintf("the SNIP %s is no address of this host", a),
				"Servers answer to it; Weir never adds addresses.", fmt.Sprintf("ip address add %s/%d dev INTERFACE-TOWARD-THE-SERVERS", a, a.BitLen()))
		}
	}
	used, err := d.h.Ports(d.params.PortFirst, d.params.PortLast, d.params.SNIPs...)
	for _, e := range each(err) {
		ok = false
		if !errors.Is(e, nft.ErrListener) {
			d.broken("source", e)
			continue
		}
		d.add("source", Fail, sentence(e), "The port range belongs to the engine.", "another source.ports in the configuration, or stop the program")
	}
	if len(used) > 0 && d.running == nil {
		d.add("source", Note, fmt.Sprintf("%d ports of source.ports are used by connections of this host and stay with them", len(used)), "", "")
	}
	if ok {
		d.add("source", OK, fmt.Sprintf("the SNIPs are addresses of this host, and ports %d-%d are free for them", d.params.PortFirst, d.params.PortLast), "", "")
	}
}

func (d *doctor) reversePath() {
	ifaces, err := d.h.Interfaces(d.params)
	if err != nil {
		d.broken("rp_filter", err)
		return
	}
	strict, err := d.h.Strict(d.cfg.RuntimeDir, ifaces...)
	if err != nil {
		d.broken("rp_filter", err)
		return
	}
	if len(strict) == 0 {
		d.add("rp_filter", OK, "the reverse path filter is off or loose on "+strings.Join(ifaces, ", "), "", "")
		return
	}
	var commands []string
	for _, name := range strict {
		commands = append(commands, "sysctl -w net.ipv4.conf."+strings.ReplaceAll(name, ".", "/")+".rp_filter=2")
	}
	d.add("rp_filter", Note, "the reverse path filter is strict on "+strings.Join(strict, ", "),
		"It would drop translated packets. A running instance makes it loose there, checks in its own rules instead, and restores it at its end; where sysctls cannot be written, set it before.",
		strings.Join(commands, "; "))
}

func (d *doctor) foreign() {
	if d.denied {
		return
	}
	list, err := d.h.Foreign(d.params)
	if err != nil {
		d.broken("tables", err)
		return
	}
	if len(list) == 0 {
		d.add("tables", OK, "the tables of others let new connections and translated packets through", "", "")
	}
	var traced []nft.Traced
	if d.h.Trace != nil {
		if traced, err = d.h.Trace(d.params); err != nil {
			d.broken("probes", err)
		}
	}
	list = d.probes(list, traced)
	for i := range list {
		f := &list[i]
		level, why := Warn, ""
		switch f.Trouble {
		case nft.DropsMarked:
			why = "Translated packets carry the mark and need one rule that accepts it in every chain that would drop them. Until then connections hang."
			if f.Certain {
				level = Fail
			}
		case nft.DropsSYN:
			why = "New connections obey the existing rules; without one that accepts them nobody reaches the VIP. If that is meant, nothing is wrong."
		case nft.TakesSYN:
			why = "New connections to the VIP go elsewhere before the engine sees them."
		case nft.TooLate:
			why = "What this chain refuses, the engine has answered already."
		}
		d.add("tables", level, f.String(), why, f.Fix)
	}
}

// probes tells what became of probe packets. What ended one and was not found
// by reading is added to the findings, and what was merely possible is certain
// where one ended. A SYN that is refused by some ways and let in by others is
// as it should be.
func (d *doctor) probes(list []nft.Finding, traced []nft.Traced) []nft.Finding {
	if len(traced) == 0 {
		return list
	}
	let := map[string]bool{} // VIPs that a new connection came through to
	vip := func(t *nft.Traced) string {
		_, to, _ := strings.Cut(t.Packet, " -> ")
		to, _, _ = strings.Cut(to, ",")
		return to
	}
	for i := range traced {
		if t := &traced[i]; t.Kind == "new connection" && t.Passed {
			let[vip(t)] = true
		}
	}
	passed := 0
	lost := map[string]int{}
	for i := range traced {
		t := &traced[i]
		switch {
		case t.Passed:
			passed++
		case t.Ended == nil:
			lost[t.Lost]++
			if lost[t.Lost] == 1 {
				level := Warn
				if strings.HasPrefix(t.Lost, "not sent") {
					level = Note
				}
				d.add("probes", level, fmt.Sprintf("%s (%s): %s", t.Kind, t.Packet, t.Lost), "The probe stands for what Weir sends, or a client.", "")
			}
		case t.Ended.Trouble == nft.DropsSYN && let[vip(t)]:
		default:
			at := slices.IndexFunc(list, func(f nft.Finding) bool {
				return f.Trouble == t.Ended.Trouble && f.Family == t.Ended.Family && f.Table == t.Ended.Table && f.Chain == t.Ended.Chain
			})
			if at < 0 {
				list = append(list, *t.Ended)
			} else if !list[at].Certain {
				list[at] = *t.Ended
			}
		}
	}
	if passed == len(traced) {
		d.add("probes", OK, fmt.Sprintf("%d probe packets came through all tables", passed), "", "")
	} else {
		d.add("probes", Note, fmt.Sprintf("%d of %d probe packets came through all tables", passed, len(traced)), "", "")
	}
	return list
}

// routes looks for ways to VIPs and servers.
func (d *doctor) routes() {
	ok := true
	for _, s := range d.params.Servers {
		if err := d.h.Route(s); err != nil {
			ok = false
			d.add("routes", Fail, fmt.Sprintf("there is no route to server %s", s), "", fmt.Sprintf("ip route add %s/%d via ROUTER", s.Addr(), s.Addr().BitLen()))
		}
	}
	for _, v := range d.params.VIPs {
		if err := d.h.Route(v); err != nil {
			ok = false
			d.add("routes", Fail, fmt.Sprintf("the VIP %s is neither an address of this host nor routed through it", v),
				"Its packets would not get as far as the SYN queue.", fmt.Sprintf("ip address add %s/%d dev lo", v.Addr(), v.Addr().BitLen()))
		}
	}
	if ok {
		d.add("routes", OK, "VIPs and servers are reachable by the routing table", "", "")
	}
}

// remains looks for what a killed instance left.
func (d *doctor) remains() {
	st, err := d.h.Stat(d.cfg.RuntimeDir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return // an instance makes it
	case err != nil:
		d.broken("runtime_dir", err)
		return
	case !st.IsDir():
		d.add("runtime_dir", Fail, d.cfg.RuntimeDir+" is no directory", "", "rm "+d.cfg.RuntimeDir)
		return
	}
	changes, err := d.h.Journal(d.cfg.RuntimeDir)
	if err != nil {
		d.broken("runtime_dir", err)
		return
	}
	if len(changes) > 0 && d.running == nil {
		d.add("runtime_dir", Warn, fmt.Sprintf("an instance was killed: its rules stand, and %d sysctls are as it left them", len(changes)),
			"The next start takes over what is there. Until then connections to VIPs hang, by intent.", "weir run, or weir cleanup to remove all of it")
	}
}
