// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/florianl/go-nfqueue/v2"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ends are the addresses of the lab in one family.
type ends struct {
	name                      string
	client, server, snip, vip netip.Addr
}

var bothFamilies = []ends{{"IPv4", client4, server4, snip4, vip4}, {"IPv6", client6, server6, snip6, vip6}}

func eachFamily(t *testing.T, f func(t *testing.T, e ends)) {
	for _, e := range bothFamilies {
		t.Run(e.name, func(t *testing.T) { f(t, e) })
	}
}

func at(a netip.Addr, port int) netip.AddrPort { return netip.AddrPortFrom(a, uint16(port)) }

func (e *ends) fromClient(port int, flags byte) []byte {
	return tcpPacket(at(e.client, port), at(e.vip, 80), flags, "")
}

// TestDivert: every kind of packet comes to the queue that it belongs to.
func TestDivert(t *testing.T) {
	for _, shards := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d shards", shards), func(t *testing.T) {
			eachFamily(t, func(t *testing.T, e ends) { testDivert(t, e, shards) })
		})
	}
}

func testDivert(t *testing.T, e ends, shards int) {
	l := newLab(t)
	p := labParams()
	p.Shards, p.ExceptPorts = shards, []uint16{11111}
	f := install(t, p, probed(t), nil)
	q := listen(t, p.QueueFirst, p.Queues(), nil)
	n := 0
	next := func(what string) queued {
		t.Helper()
		n++
		all := q.wait(t, n)
		return all[n-1]
	}
	expect := func(what string, queue uint16, hook uint8) {
		t.Helper()
		if got := next(what); got.queue != queue || got.hook != hook {
			t.Fatalf("%s came to queue %d at hook %d, want %d at %d", what, got.queue, got.hook, queue, hook)
		}
	}

	l.send(t, l.client, 0, e.fromClient(40000, syn))
	expect("a SYN", p.SYNQueue(), hookInput)
	l.send(t, l.client, 0, e.fromClient(40000, syn|0x40|0x80))
	expect("a SYN with ECN bits", p.SYNQueue(), hookInput)

	// All packets of a connection go to one shard, and some connection to each.
	used := make(map[uint16]bool)
	for port := 40000; port < 40000+8*shards; port++ {
		var queue uint16
		for _, flags := range []byte{ackFlag, ackFlag | psh, ackFlag | fin, rst, syn | ackFlag, syn | fin, 0} {
			l.send(t, l.client, 0, e.fromClient(port, flags))
			got := next("a client's packet")
			if queue == 0 {
				queue = got.queue
			}
			if got.queue != queue || queue < p.ShardQueue(0) || queue > p.ShardQueue(shards-1) {
				t.Fatalf("flags %#x of port %d came to queue %d after %d", flags, port, got.queue, queue)
			}
		}
		used[queue] = true
	}
	if len(used) != shards {
		t.Errorf("clients reach the queues %v only, of %d shards", used, shards)
	}
	waitCounter(t, f, CounterSYN, 2)
	waitCounter(t, f, CounterClient, 8*shards*7)

	// A server's packet goes to the shard that owns the port.
	server := 0
	for i := range shards {
		lo, hi := Slice(p.PortFirst, p.PortLast, shards, i)
		for _, port := range []uint16{lo, lo + 1, hi} {
			for _, flags := range []byte{syn | ackFlag, ackFlag, rst} {
				l.send(t, l.server, 0, tcpPacket(at(e.server, 8080), at(e.snip, int(port)), flags, ""))
				expect(fmt.Sprintf("a server's packet to port %d", port), p.ShardQueue(i), 0)
				server++
			}
		}
	}
	waitCounter(t, f, CounterServer, server)

	// What is not ours is not queued: each would be answered with a RST. The
	// last one is ours again, so that all others have arrived before it.
	before := resets(t)
	l.send(t, l.client, 0, tcpPacket(at(e.client, 40000), at(e.vip, 81), ackFlag, ""))
	l.send(t, l.server, 0,
		tcpPacket(at(e.server, 8081), at(e.snip, 10239), ackFlag, ""),
		tcpPacket(at(e.server, 8080), at(e.snip, 32768), ackFlag, ""),
		tcpPacket(at(e.server, 8080), at(e.snip, 11111), ackFlag, ""))
	eventually(t, "four RSTs", func() bool { return resets(t) >= before+4 })
	l.send(t, l.client, 0, e.fromClient(40000, ackFlag))
	next("the last packet")
	if got := resets(t); got != before+4 {
		t.Fatalf("%d RSTs of the router's own TCP, want 4", got-before)
	}
}

// TestCheckQueues sees a queue that somebody has bound, in this namespace.
func TestCheckQueues(t *testing.T) {
	newNetns(t)
	probed(t)
	if err := CheckQueues(22272, 4); err != nil {
		t.Fatal(err)
	}
	listen(t, 22275, 1, nil)
	if err := CheckQueues(22272, 4); !errors.Is(err, ErrQueueInUse) || !strings.Contains(err.Error(), "22275") {
		t.Fatalf("got %v", err)
	}
	if err := CheckQueues(22272, 3); err != nil {
		t.Fatal(err)
	}
}

// TestRoutedVIP: a VIP that is not the router's own address has its SYNs
// queued in forward.
func TestRoutedVIP(t *testing.T) {
	l := newLab(t)
	p := labParams()
	routed := netip.MustParseAddr("198.51.100.80")
	p.VIPs = append(p.VIPs, at(routed, 80))
	if err := netlink.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: routed.AsSlice(), Mask: net.CIDRMask(32, 32)}, Gw: server4.AsSlice()}); err != nil {
		t.Fatal(err)
	}
	install(t, p, probed(t), nil)
	q := listen(t, p.QueueFirst, p.Queues(), nil)
	arrived := l.tap(t, l.server, true)
	l.send(t, l.client, 0, tcpPacket(at(client4, 40000), at(routed, 80), syn, ""))
	if got := q.wait(t, 1)[0]; got.queue != p.SYNQueue() || got.hook != hookForward {
		t.Fatalf("the SYN came to queue %d at hook %d", got.queue, got.hook)
	}
	l.send(t, l.client, 0, tcpPacket(at(client4, 40000), at(routed, 80), ackFlag, ""))
	if got := q.wait(t, 2)[1]; got.queue != p.ShardQueue(0) || got.hook != 0 {
		t.Fatalf("the ACK came to queue %d at hook %d", got.queue, got.hook)
	}
	if n := len(arrived()); n != 0 {
		t.Fatalf("%d packets for the VIP were routed on", n)
	}
}

// TestExistingRulesDecide: a SYN that the administrator's rules refuse never
// reaches the queue, whatever the order of the chains' registration.
func TestExistingRulesDecide(t *testing.T) {
	const banned = `table inet admin {
	chain input {
		type filter hook input priority filter + 199; policy accept;
		tcp sport 40001 drop
	}
}`
	l := newLab(t)
	p := labParams()
	f := install(t, p, probed(t), nil)
	q := listen(t, p.QueueFirst, p.Queues(), nil)
	nftLoad(t, banned)
	eachFamily(t, func(t *testing.T, e ends) {
		n := len(q.all())
		l.send(t, l.client, 0, e.fromClient(40001, syn), e.fromClient(40002, syn))
		got := q.wait(t, n+1)[n]
		head := 20
		if e.client.Is6() {
			head = 40
		}
		if port := binary.BigEndian.Uint16(got.data[head:]); port != 40002 {
			t.Fatalf("the SYN from port %d came through", port)
		}
	})
	if got := counter(t, f, CounterSYN); got != 2 {
		t.Fatalf("%d SYNs counted, want 2", got)
	}
}

// TestNobodyAnswers: without an engine the packets of diverted flows are
// dropped, and the router's own TCP does not end them (INV-3). Without the
// rules it does: the control.
func TestNobodyAnswers(t *testing.T) {
	eachFamily(t, func(t *testing.T, e ends) {
		l := newLab(t)
		f := install(t, labParams(), probed(t), nil)
		before := resets(t)
		packets := [][]byte{e.fromClient(40000, syn), e.fromClient(40000, ackFlag)}
		answer := tcpPacket(at(e.server, 8080), at(e.snip, 20000), ackFlag, "")
		l.send(t, l.client, 0, packets...)
		l.send(t, l.server, 0, answer)
		for _, name := range []string{CounterSYN, CounterClient, CounterServer} {
			waitCounter(t, f, name, 1)
		}
		// A packet that nothing diverts shows that the ones before it are done.
		l.send(t, l.client, 0, tcpPacket(at(e.client, 40000), at(e.vip, 81), ackFlag, ""))
		l.send(t, l.server, 0, tcpPacket(at(e.server, 8080), at(e.snip, 81), ackFlag, ""))
		eventually(t, "two RSTs", func() bool { return resets(t) >= before+2 })
		if got := resets(t) - before; got != 2 {
			t.Fatalf("%d RSTs, want 2", got)
		}
		if err := f.Remove(); err != nil {
			t.Fatal(err)
		}
		l.send(t, l.client, 0, packets...)
		l.send(t, l.server, 0, answer)
		eventually(t, "the control: a RST for each", func() bool { return resets(t) == before+5 })
	})
}

// TestConntrack: beside a firewall that tracks connections, neither a queued
// SYN nor what the engine emits leaves an entry behind. Without the untrack
// chains it does: the control.
func TestConntrack(t *testing.T) {
	const tracking = `table inet admin { chain input { type filter hook input priority filter; policy accept; ct state invalid counter; }; }`
	eachFamily(t, func(t *testing.T, e ends) {
		family := netlink.InetFamily(unix.AF_INET)
		if e.client.Is6() {
			family = unix.AF_INET6
		}
		run := func(t *testing.T, mutate func(*Ruleset)) int {
			l := newLab(t)
			nftLoad(t, tracking)
			p := labParams()
			f := install(t, p, probed(t), mutate)
			q := listen(t, p.QueueFirst, p.Queues(), nil)
			l.send(t, l.client, 0, e.fromClient(40000, syn))
			q.wait(t, 1)
			// The engine's SYN-ACK and its own SYN to a server. Neither end
			// has a socket: each answers with a RST, and that is queued.
			l.send(t, l.router, int(p.Mark),
				tcpPacket(at(e.vip, 80), at(e.client, 40000), syn|ackFlag, ""),
				tcpPacket(at(e.snip, 20000), at(e.server, 8080), syn, ""))
			if mutate == nil {
				waitCounter(t, f, CounterUntracked, 2)
			}
			q.wait(t, 3)
			flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			for _, flow := range flows {
				if flow.Forward.Protocol == unix.IPPROTO_TCP {
					n++
				}
			}
			return n
		}
		t.Run("untracked", func(t *testing.T) {
			if n := run(t, nil); n != 0 {
				t.Fatalf("%d conntrack entries, want none", n)
			}
		})
		t.Run("control", func(t *testing.T) {
			n := run(t, func(r *Ruleset) {
				for i := range r.Chains {
					if strings.HasPrefix(r.Chains[i].Name, "untrack") {
						r.Chains[i].Rules = nil
					}
				}
			})
			if n == 0 {
				t.Fatal("no conntrack entry without the untrack chains: the test shows nothing")
			}
		})
	})
}

// TestRewrite: a client's packet that the engine rewrites in place and accepts
// with the mark goes to the server, past conntrack; what is marked already is
// not queued again.
func TestRewrite(t *testing.T) {
	eachFamily(t, func(t *testing.T, e ends) {
		l := newLab(t)
		p := labParams()
		dir := t.TempDir()
		ifaces, err := Interfaces(p)
		if err != nil {
			t.Fatal(err)
		}
		sysctl(t, "net.ipv4.conf.cli.rp_filter", "1")
		if p.StrictRPFilter, err = StrictInterfaces(dir, ifaces...); err != nil {
			t.Fatal(err)
		}
		f := install(t, p, probed(t), nil)
		j, err := ApplySysctls(dir, Needs(p, ifaces...))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := j.Restore(); err != nil {
				t.Error(err)
			}
		})
		rewritten := tcpPacket(at(e.snip, 20000), at(e.server, 8080), ackFlag|psh, "GET / HTTP/1.1\r\n\r\n")
		var first atomic.Bool
		q := listen(t, p.QueueFirst, p.Queues(), func(q *nfqueue.Nfqueue, id uint32, _ []byte) {
			if first.CompareAndSwap(false, true) {
				_ = q.SetVerdictWithOption(id, nfqueue.NfAccept, nfqueue.WithMark(p.Mark), nfqueue.WithAlteredPacket(rewritten))
			} else {
				_ = q.SetVerdict(id, nfqueue.NfDrop)
			}
		})
		arrived := l.tap(t, l.server, e.client.Is4())
		l.send(t, l.client, 0, tcpPacket(at(e.client, 40000), at(e.vip, 80), ackFlag|psh, "GET / HTTP/1.1\r\n\r\n"))
		eventually(t, "the rewritten packet arrives", func() bool { return len(arrived()) == 1 })
		segment := arrived()[0]
		if e.client.Is4() {
			segment = segment[20:]
		}
		want := rewritten[len(rewritten)-len(segment):]
		if !slices.Equal(segment, want) {
			t.Fatalf("arrived %x, want %x", segment, want)
		}
		waitCounter(t, f, CounterUntracked, 1)
		// The server has no socket either: its RST comes to the queue.
		q.wait(t, 2)

		// On lo a marked packet comes by prerouting again.
		n := counter(t, f, CounterUntracked)
		l.send(t, l.router, int(p.Mark), tcpPacket(at(e.snip, 20000), at(e.vip, 80), ackFlag, ""))
		waitCounter(t, f, CounterUntracked, n+2) // output and prerouting
		q.wait(t, 2)
	})
}

// TestAntispoof: the checks that accept_local=1 and a loose rp_filter switch
// off are made by the rules. Without these the packets pass: the control.
func TestAntispoof(t *testing.T) {
	without := func(r *Ruleset) {
		for i := range r.Chains {
			r.Chains[i].Rules = slices.DeleteFunc(r.Chains[i].Rules, func(rule Rule) bool {
				text := rule.Text()
				return strings.Contains(text, CounterSpoof) || strings.Contains(text, CounterReversePath) || strings.Contains(text, CounterMisplaced)
			})
		}
	}
	setup := func(t *testing.T, strict bool, mutate func(*Ruleset)) (*lab, *Firewall, *queues) {
		l := newLab(t)
		for _, name := range []string{"cli", "srv"} {
			sysctl(t, "net.ipv4.conf."+name+".accept_local", "1")
			sysctl(t, "net.ipv4.conf."+name+".rp_filter", "0")
		}
		p := labParams()
		if strict {
			p.StrictRPFilter = []string{"cli"}
		}
		f := install(t, p, probed(t), mutate)
		return l, f, listen(t, p.QueueFirst, p.Queues(), nil)
	}
	for _, c := range []struct {
		name, counter string
		packet        func(e ends) []byte
		only4         bool // and rp_filter was strict
	}{
		{"local source", CounterSpoof, func(e ends) []byte {
			return tcpPacket(at(e.vip, 80), at(e.server, 9), ackFlag, "")
		}, false},
		{"local source to a VIP", CounterSpoof, func(e ends) []byte {
			return tcpPacket(at(e.snip, 7), at(e.vip, 80), ackFlag, "")
		}, false},
		{"source not routed through the interface, to a VIP", CounterReversePath, func(e ends) []byte {
			return tcpPacket(at(netip.MustParseAddr("198.18.2.99"), 7), at(e.vip, 80), ackFlag, "")
		}, true},
		{"server's address from the client side", CounterMisplaced, func(e ends) []byte {
			return tcpPacket(at(e.server, 8080), at(e.snip, 20000), ackFlag, "")
		}, false},
		{"source not routed through the interface", CounterReversePath, func(e ends) []byte {
			return tcpPacket(at(netip.MustParseAddr("198.18.2.99"), 7), at(e.server, 9), ackFlag, "")
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, e ends) {
				if c.only4 && e.client.Is6() {
					return
				}
				t.Run("dropped", func(t *testing.T) {
					l, f, q := setup(t, c.only4, nil)
					arrived := l.tap(t, l.server, e.client.Is4())
					l.send(t, l.client, 0, c.packet(e))
					waitCounter(t, f, c.counter, 1)
					// An honest packet passes, and shows that the other is done.
					l.send(t, l.client, 0, tcpPacket(at(e.client, 1), at(e.server, 9), ackFlag, ""))
					eventually(t, "the honest packet arrives", func() bool { return len(arrived()) > 0 })
					if n := len(arrived()); n != 1 || len(q.all()) != 0 {
						t.Fatalf("%d packets arrived and %d were queued, want the honest one", n, len(q.all()))
					}
				})
				t.Run("control", func(t *testing.T) {
					l, _, q := setup(t, c.only4, without)
					arrived := l.tap(t, l.server, e.client.Is4())
					l.send(t, l.client, 0, c.packet(e))
					eventually(t, "the packet passes", func() bool { return len(arrived())+len(q.all()) > 0 })
				})
			})
		})
	}
}

// TestGuard: a packet to a SNIP port from somebody who is not a server does
// not reach the router's own TCP; to an excepted port it does.
func TestGuard(t *testing.T) {
	eachFamily(t, func(t *testing.T, e ends) {
		for _, guarded := range []bool{true, false} {
			t.Run(fmt.Sprintf("guarded=%v", guarded), func(t *testing.T) {
				l := newLab(t)
				p := labParams()
				p.ExceptPorts = []uint16{20001}
				f := install(t, p, probed(t), func(r *Ruleset) {
					if !guarded {
						r.Chain("local_guard").Rules = nil
					}
				})
				before := resets(t)
				l.send(t, l.client, 0, tcpPacket(at(e.client, 40000), at(e.snip, 20000), syn, ""))
				if guarded {
					waitCounter(t, f, CounterGuard, 1)
				} else {
					eventually(t, "the control: a RST", func() bool { return resets(t) == before+1 })
					before++
				}
				l.send(t, l.client, 0, tcpPacket(at(e.client, 40000), at(e.snip, 20001), syn, ""))
				eventually(t, "a RST from the excepted port", func() bool { return resets(t) > before })
				if got := resets(t) - before; got != 1 {
					t.Fatalf("%d RSTs, want 1", got)
				}
			})
		}
	})
}

// TestFragments: the kernel reassembles what is for a VIP before the rules see
// it. Without the defrag chain the fragments are dropped and counted: the
// control, and the second line of defence.
func TestFragments(t *testing.T) {
	eachFamily(t, func(t *testing.T, e ends) {
		// IPv6 fragments but the last have at least 1280 bytes here.
		whole := tcpPacket(at(e.client, 40000), at(e.vip, 80), ackFlag|psh, strings.Repeat("x", 1480))
		parts := fragments(whole, 1440)
		newNetns(t)
		k := probed(t)
		kernels := map[string]Kernel{"tproxy": k}
		if k.Ct {
			ct := k
			ct.TProxy4, ct.TProxy6 = false, false
			kernels["ct"] = ct
		}
		for name, k := range kernels {
			t.Run(name, func(t *testing.T) {
				l := newLab(t)
				p := labParams()
				f := install(t, p, k, nil)
				q := listen(t, p.QueueFirst, p.Queues(), nil)
				l.send(t, l.client, 0, parts...)
				got := q.wait(t, 1)[0]
				if len(got.data) != len(whole) {
					t.Fatalf("%d bytes in the queue, want %d", len(got.data), len(whole))
				}
				if n := counter(t, f, CounterFragment); n != 0 {
					t.Fatalf("%d fragments dropped", n)
				}
			})
		}
		t.Run("control", func(t *testing.T) {
			l := newLab(t)
			p := labParams()
			f := install(t, p, k, func(r *Ruleset) { r.Chain("defrag").Rules = nil })
			q := listen(t, p.QueueFirst, p.Queues(), nil)
			l.send(t, l.client, 0, parts...)
			waitCounter(t, f, CounterFragment, 2)
			if n := len(q.all()); n != 0 {
				t.Fatalf("%d packets queued", n)
			}
		})
	})
}

// TestICMP: errors about TCP of a VIP or SNIP come to the control queue, from
// outside and on lo; others pass.
func TestICMP(t *testing.T) {
	eachFamily(t, func(t *testing.T, e ends) {
		l := newLab(t)
		p := labParams()
		f := install(t, p, probed(t), nil)
		q := listen(t, p.QueueFirst, p.Queues(), nil)
		toVIP := icmpTooBig(e.client, e.vip, at(e.vip, 80), at(e.client, 40000), unix.IPPROTO_TCP)
		toSNIP := icmpTooBig(e.server, e.snip, at(e.snip, 20000), at(e.server, 8080), unix.IPPROTO_TCP)
		aboutUDP := icmpTooBig(e.client, e.vip, at(e.vip, 53), at(e.client, 40000), unix.IPPROTO_UDP)
		l.send(t, l.client, 0, aboutUDP)
		for i, send := range []func(){
			func() { l.send(t, l.client, 0, toVIP) },
			func() { l.send(t, l.server, 0, toSNIP) },
			func() {
				l.send(t, l.router, 0, icmpTooBig(e.vip, e.vip, at(e.vip, 80), at(e.client, 40000), unix.IPPROTO_TCP))
			},
		} {
			send()
			if got := q.wait(t, i+1)[i]; got.queue != p.ControlQueue() {
				t.Fatalf("error %d came to queue %d, want %d", i, got.queue, p.ControlQueue())
			}
		}
		waitCounter(t, f, CounterICMP, 3)
	})
}

// TestReplaceUnderTraffic replaces the table again and again while packets
// come in. One that found neither the old nor the new rules would be answered
// with a RST by the router's own TCP. Removing and installing in two steps
// shows that the test would notice: the control.
func TestReplaceUnderTraffic(t *testing.T) {
	for _, c := range []struct {
		name    string
		replace func(t *testing.T, f *Firewall)
		resets  bool
	}{
		{"in one transaction", func(t *testing.T, f *Firewall) {
			if err := f.Reinstall(); err != nil {
				t.Fatal(err)
			}
		}, false},
		{"changing elements", func(t *testing.T, f *Firewall) {
			p := labParams()
			// All sets are emptied and refilled around the ones in use.
			p.VIPs = append(p.VIPs, at(vip4, 1+f.Ruleset().Set("vips4").len()%2), at(vip6, 1+f.Ruleset().Set("vips6").len()%2))
			if f.Ruleset().Set("vips4").len() > 1 {
				p.VIPs = p.VIPs[:2]
			}
			if err := f.Update(p); err != nil {
				t.Fatal(err)
			}
		}, false},
		{"control: in two steps", func(t *testing.T, f *Firewall) {
			if err := f.Remove(); err != nil {
				t.Fatal(err)
			}
			f.gone = false
			if err := f.install(); err != nil {
				t.Fatal(err)
			}
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			p := labParams()
			f := install(t, p, probed(t), nil)
			listen(t, p.QueueFirst, p.Queues(), nil)
			before := resets(t)
			var sent atomic.Int64
			stop, done := make(chan struct{}), make(chan error, 1)
			go func() {
				runtime.LockOSThread() // given up in the client's namespace, and so ends
				if err := netns.Set(l.client); err != nil {
					done <- err
					return
				}
				for {
					select {
					case <-stop:
						done <- nil
						return
					default:
					}
					for _, e := range bothFamilies {
						if err := emit(0, e.fromClient(40000, ackFlag)); err != nil {
							done <- err
							return
						}
						sent.Add(1)
					}
				}
			}()
			for range 50 {
				at := sent.Load()
				c.replace(t, f)
				eventually(t, "traffic", func() bool { return sent.Load() > at+4 })
				if c.resets && resets(t) > before {
					break
				}
			}
			close(stop)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if got := resets(t) - before; got > 0 != c.resets {
				t.Fatalf("%d RSTs for %d packets", got, sent.Load())
			}
			t.Logf("%d packets, %d RSTs", sent.Load(), resets(t)-before)
		})
	}
}

func (s *Set) len() int { return len(s.Elements) }

// TestMain lets the test binary play a process that is killed.
func TestMain(m *testing.M) {
	if os.Getenv("WEIR_TEST_HOLD_TABLE") != "" {
		holdTable()
	}
	os.Exit(m.Run())
}

func holdTable() {
	k, err := Probe()
	if err == nil {
		_, err = Install(fixed(4), k)
	}
	fmt.Println(err)
	select {}
}

// TestKilledOwner: the table outlives a process that is killed, packets stay
// with the rules, and the next start takes over.
func TestKilledOwner(t *testing.T) {
	newNetns(t)
	k := probed(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "WEIR_TEST_HOLD_TABLE=1")
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 256)
	n, err := out.Read(line)
	if got := strings.TrimSpace(string(line[:n])); err != nil || got != "<nil>" {
		t.Fatalf("the process to be killed says %q, %v", got, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if list := nftList(t, "chains"); !strings.Contains(list, "chain shard3") {
		t.Fatalf("the table is gone with the process:\n%s", list)
	}
	f := install(t, fixed(1), k, nil)
	if list := nftList(t, "chains"); strings.Contains(list, "shard") {
		t.Fatalf("not replaced:\n%s", list)
	}
	if err := f.Remove(); err != nil {
		t.Fatal(err)
	}
	if list := nftList(t, "ruleset"); list != "" {
		t.Fatalf("left behind:\n%s", list)
	}
}
