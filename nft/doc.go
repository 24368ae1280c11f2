// SPDX-License-Identifier: Apache-2.0

// Package nft puts the rules into the kernel that bring the packets of
// diverted connections to the engine, and everything around them that the
// kernel has to know: it builds the ruleset as data, installs and replaces it
// in one transaction, finds out what the kernel can do, sets, journals and
// restores sysctls, and makes the checks before a start.
//
// It must not look at packets, must not touch a table other than its own, must
// not add addresses or switch forwarding on, and must never install rules that
// let a packet of a diverted flow pass when nobody answers the queue.
//
// The life of a start, in order: Probe; Interfaces; CheckForwarding,
// CheckVIPListeners, LocalPortsInRange, CheckQueues; StrictInterfaces; Install;
// ApplySysctls. Of a stop: Journal.Restore, Firewall.Remove. Install before
// ApplySysctls, and Remove after Restore: the antispoof chain stands while the
// kernel's own checks are loosened.
//
// # Threads and namespaces
//
// Everything acts in the network namespace of the calling thread, at the time
// of the call. A program with several namespaces locks its goroutine to the
// thread.
//
// # SYNs to lo
//
// With Params.SYNToLo a program at lo's output, which is not this package's,
// sees the SYNs to a VIP of the router's own that all rules let through before the
// SYN queue does. syn_local marks them, and behind it companions, tables of the
// same name in the families ip and ip6, duplicate them to lo and drop the original:
// the statement for it does not exist in family inet. What the program lets pass
// comes in by lo, with our mark, and goes to the SYN queue. Forward is left out:
// every translated packet would pay for a chain there. All tables change in one transaction, and the companions are
// there only where nobody else can remove them: a marked SYN that no companion
// takes would come to the router's own TCP.
//
// # The rules
//
// For one farm on one IPv4 address with one server and two shards:
//
//	table inet weir {
//		counter spoof { }
//		counter reverse_path { }
//		counter banned { }
//		counter fragment { }
//		counter client { }
//		counter misplaced { }
//		counter server { }
//		counter icmp_error { }
//		counter untracked { }
//		counter syn { }
//		counter guard { }
//
//		set vips4 {
//			type ipv4_addr . inet_service
//			elements = { 203.0.113.10 . 80 }
//		}
//
//		set vip_addrs4 {
//			type ipv4_addr
//			elements = { 203.0.113.10 }
//		}
//
//		set servers4 {
//			type ipv4_addr . inet_service
//			elements = { 198.51.100.11 . 80 }
//		}
//
//		set snips4 {
//			type ipv4_addr
//			elements = { 198.51.100.1 }
//		}
//
//		set bans4 {
//			type ipv4_addr
//			flags timeout
//		}
//
//		set vips6 {
//			type ipv6_addr . inet_service
//		}
//
//		set vip_addrs6 {
//			type ipv6_addr
//		}
//
//		set servers6 {
//			type ipv6_addr . inet_service
//		}
//
//		set snips6 {
//			type ipv6_addr
//		}
//
//		set bans6 {
//			type ipv6_addr
//			flags timeout
//		}
//
//		set except_ports {
//			type inet_service
//		}
//
//		set strict_rp {
//			type ifname
//		}
//
//		chain shard0 {
//			queue num 22274
//		}
//
//		chain shard1 {
//			queue num 22275
//		}
//
//		# What accept_local and a loosened rp_filter let in is stopped here.
//		# Looped-back multicast and broadcast have a local source by right.
//		chain antispoof {
//			type filter hook prerouting priority raw - 2; policy accept;
//			meta mark & 0xff000000 == 0x57000000 return
//			fib saddr type local iif != "lo" fib daddr type != multicast fib daddr type != broadcast counter name "spoof" drop
//			meta nfproto ipv4 iifname @strict_rp fib saddr . iif oif missing counter name "reverse_path" drop
//		}
//
//		# From clients to a VIP, which a policy may ban.
//		chain from_client4 {
//			ip saddr @bans4 counter name "banned" drop
//			ip frag-off & 0x3fff != 0 counter name "fragment" drop
//			tcp flags & (fin | syn | rst | ack) != syn counter name "client" jhash ip saddr . tcp sport mod 2 seed 0x57454952 vmap { 0 : goto shard0, 1 : goto shard1 }
//		}
//
//		# From servers to a SNIP port, by the interface that leads to them.
//		chain from_server4 {
//			fib saddr . iif oif missing counter name "misplaced" drop
//			ip frag-off & 0x3fff != 0 counter name "fragment" drop
//			counter name "server" tcp dport vmap { 10240-21503 : goto shard0, 21504-32767 : goto shard1 }
//		}
//
//		chain from_client6 {
//			ip6 saddr @bans6 counter name "banned" drop
//			exthdr frag exists counter name "fragment" drop
//			tcp flags & (fin | syn | rst | ack) != syn counter name "client" jhash ip6 saddr . tcp sport mod 2 seed 0x57454952 vmap { 0 : goto shard0, 1 : goto shard1 }
//		}
//
//		chain from_server6 {
//			fib saddr . iif oif missing counter name "misplaced" drop
//			exthdr frag exists counter name "fragment" drop
//			counter name "server" tcp dport vmap { 10240-21503 : goto shard0, 21504-32767 : goto shard1 }
//		}
//
//		# Packets of diverted flows go to the engine; what it rewrote comes by with the
//		# mark. A fragment that nobody reassembled cannot be told apart: never pass it.
//		# ICMP errors about TCP of a VIP or SNIP address, lo included, are the engine's.
//		chain divert {
//			type filter hook prerouting priority raw - 1; policy accept;
//			meta mark & 0xff000000 == 0x57000000 return
//			ip daddr . tcp dport @vips4 goto from_client4
//			ip saddr . tcp sport @servers4 ip daddr @snips4 tcp dport 10240-32767 tcp dport != @except_ports goto from_server4
//			ip6 daddr . tcp dport @vips6 goto from_client6
//			ip6 saddr . tcp sport @servers6 ip6 daddr @snips6 tcp dport 10240-32767 tcp dport != @except_ports goto from_server6
//			ip frag-off & 0x3fff != 0 meta l4proto tcp ip daddr @vip_addrs4 counter name "fragment" drop
//			ip frag-off & 0x3fff != 0 meta l4proto tcp ip daddr @snips4 counter name "fragment" drop
//			meta l4proto tcp ip6 daddr @vip_addrs6 exthdr frag exists counter name "fragment" drop
//			meta l4proto tcp ip6 daddr @snips6 exthdr frag exists counter name "fragment" drop
//			ip daddr @vip_addrs4 icmp type { destination-unreachable, time-exceeded, parameter-problem } @th,136,8 6 counter name "icmp_error" queue num 22273
//			ip daddr @snips4 icmp type { destination-unreachable, time-exceeded, parameter-problem } @th,136,8 6 counter name "icmp_error" queue num 22273
//			ip6 daddr @vip_addrs6 icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem } @th,112,8 6 counter name "icmp_error" queue num 22273
//			ip6 daddr @snips6 icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem } @th,112,8 6 counter name "icmp_error" queue num 22273
//		}
//
//		# Conntrack never sees what the engine translated or emitted.
//		chain untrack {
//			type filter hook prerouting priority raw + 1; policy accept;
//			meta mark & 0xff000000 == 0x57000000 counter name "untracked" notrack
//		}
//
//		chain untrack_output {
//			type filter hook output priority raw + 1; policy accept;
//			meta mark & 0xff000000 == 0x57000000 counter name "untracked" notrack
//		}
//
//		# SYNs to a VIP that all other rules let through: to an address of the router,
//		chain syn_local {
//			type filter hook input priority filter + 200; policy accept;
//			meta mark & 0xff000000 == 0x57000000 return
//			ip daddr . tcp dport @vips4 tcp flags & (fin | syn | rst | ack) == syn counter name "syn" queue num 22272
//			ip6 daddr . tcp dport @vips6 tcp flags & (fin | syn | rst | ack) == syn counter name "syn" queue num 22272
//		}
//
//		# or routed through it.
//		chain syn_routed {
//			type filter hook forward priority filter + 200; policy accept;
//			meta mark & 0xff000000 == 0x57000000 return
//			ip daddr . tcp dport @vips4 tcp flags & (fin | syn | rst | ack) == syn counter name "syn" queue num 22272
//			ip6 daddr . tcp dport @vips6 tcp flags & (fin | syn | rst | ack) == syn counter name "syn" queue num 22272
//		}
//
//		# Nothing addressed to a SNIP port reaches the router's own TCP.
//		chain local_guard {
//			type filter hook input priority filter + 201; policy accept;
//			ip daddr @snips4 tcp dport 10240-32767 tcp dport != @except_ports counter name "guard" drop
//			ip6 daddr @snips6 tcp dport 10240-32767 tcp dport != @except_ports counter name "guard" drop
//		}
//
//		# Never entered: that these rules exist switches defragmentation on.
//		chain defrag {
//			meta nfproto ipv4 meta l4proto tcp tproxy ip to :1
//			meta nfproto ipv6 meta l4proto tcp tproxy ip6 to :1
//		}
//	}
package nft
