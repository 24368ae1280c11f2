// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
)

// The addresses of the family that is played.

func (s *stage) vip() netip.AddrPort {
	if s.opts.IPv6 {
		return s.VIP6()
	}
	return s.VIP()
}

func (s *stage) server(i int) netip.AddrPort {
	if s.opts.IPv6 {
		return s.Server6(i)
	}
	return s.Server(i)
}

func (s *stage) snip() netip.Addr {
	if s.opts.IPv6 {
		return s.SNIP6()
	}
	return s.SNIP()
}

func (s *stage) clientAddr(i int) netip.Addr {
	if s.opts.IPv6 {
		return s.ClientAddr6(i)
	}
	return s.ClientAddr(i)
}

// serve has the first n servers answer with handler until the scene ends.
func (s *stage) serve(n int, handler http.Handler) ([]*lab.Server, error) {
	var servers []*lab.Server
	for i := range n {
		srv, err := lab.HTTPServer(s.Servers[i], s.server(i).String(), handler)
		if err != nil {
			return nil, err
		}
		s.exit = append(s.exit, srv.Close)
		servers = append(servers, srv)
	}
	return servers, nil
}

// start runs weir on the router and waits until it is ready.
func (s *stage) start(ctx context.Context, c lab.ConfigOptions) error {
	c.Dir = filepath.Join(s.dir, "run")
	c.IPv6, c.NoIPv4 = s.opts.IPv6, s.opts.IPv6
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return err
	}
	var err error
	s.weir, err = lab.StartWeir(ctx, s.Router, lab.WeirOptions{
		Binary: s.opts.Weir, Config: s.Config(c), Dir: s.dir, Socket: c.Socket(),
	})
	return err
}

// capture starts to record what passes on both sides of the interface unit.
func (s *stage) capture() (*lab.Capture, error) {
	return s.Router.CaptureOn(lab.CaptureOptions{}, s.ClientLeg, s.ServerLeg)
}

// stop ends a capture, writes its two files where these are asked for, and
// returns the segments.
func (s *stage) stop(c *lab.Capture) ([]ladder.Segment, error) {
	recs, err := c.Stop()
	if err != nil {
		return nil, err
	}
	for leg, iface := range map[string]string{"client": s.ClientLeg, "server": s.ServerLeg} {
		if s.opts.Pcap == "" {
			break
		}
		one := slices.DeleteFunc(slices.Clone(recs), func(r lab.Record) bool { return r.Iface != iface })
		var b bytes.Buffer
		if err := lab.WritePcap(&b, one); err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(s.opts.Pcap, s.name+"-"+leg+".pcap"), b.Bytes(), 0o644); err != nil {
			return nil, err
		}
	}
	return lab.Segments(recs, s.Sides()), nil
}

// verdict writes the scene's last line and returns an error if the claim does
// not hold.
func (s *stage) verdict(facts string, problems []string) error {
	word := "PASS"
	if len(problems) > 0 {
		word = "FAIL"
	}
	fmt.Fprintf(s.w, "%s  %s\n", word, facts)
	for _, p := range problems {
		fmt.Fprintf(s.w, "      %s\n", p)
	}
	if len(problems) > 0 {
		return fmt.Errorf("%w: %s", ErrFailed, strings.Join(problems, "; "))
	}
	return nil
}

// keep leaves the lab up until the context ends.
func (s *stage) keep(ctx context.Context) error {
	names, err := s.Lab.Expose()
	if err != nil {
		return err
	}
	fmt.Fprintf(s.w, "\nThe lab stays up until Ctrl-C. To try:\n")
	fmt.Fprintf(s.w, "  ip netns exec %s curl -v 'http://%s/sales/forecast.html'\n", names[s.Clients[0].Name()], s.vip())
	fmt.Fprintf(s.w, "  ip netns exec %s nft list ruleset\n", names[s.Router.Name()])
	fmt.Fprintf(s.w, "  ip netns exec %s tcpdump -n -i %s\n", names[s.Router.Name()], s.ServerLeg)
	fmt.Fprintf(s.w, "  %s status --socket %s\n", s.opts.Weir, filepath.Join(s.dir, "run", "admin.sock"))
	fmt.Fprintf(s.w, "Hosts: %s\n", strings.Join(slices.Sorted(maps.Values(names)), " "))
	<-ctx.Done()
	return nil
}

// shownHosts bounds the hosts that the topology draws on each side.
const shownHosts = 6

// topology draws every host with its address. The interface unit hangs on both
// buses at the second row.
func (s *stage) topology() []string {
	unit := []string{
		"+------ interface unit ------+",
		fmt.Sprintf("| VIP  %-21s |", s.vip()),
		fmt.Sprintf("| SNIP %-21s |", s.snip()),
		"+----------------------------+",
	}
	clients := hosts(len(s.Clients), func(i int) string { return fmt.Sprintf("C%d %s", i+1, s.clientAddr(i)) })
	servers := hosts(len(s.Servers), func(i int) string { return fmt.Sprintf("S%d %s", i+1, s.server(i)) })
	var lines []string
	width := 16
	if s.opts.IPv6 {
		width = 20
	}
	for i := range max(len(unit), len(clients), len(servers)) {
		left, right, mid := "", "", strings.Repeat(" ", len(unit[0]))
		if i < len(clients) {
			left = clients[i]
		}
		if i < len(servers) {
			right = servers[i]
		}
		if i < len(unit) {
			mid = unit[i]
		}
		leftBus := bus(i, len(clients))
		rightBus := bus(i, len(servers))
		stem := "   "
		if i == 1 {
			stem = "---"
		}
		l, r := "   ", ""
		if left != "" {
			l = " --"
		}
		if right != "" {
			r = "-- " + right
		}
		lines = append(lines, strings.TrimRight(fmt.Sprintf("  %-*s%s%s%s%s%s%s%s", width, left, l, leftBus, stem, mid, stem, rightBus, r), " "))
	}
	return lines
}

// hosts returns the labels of n hosts, at most shownHosts of them.
func hosts(n int, label func(int) string) []string {
	var ls []string
	for i := range n {
		if i == shownHosts-1 && n > shownHosts {
			return append(ls, fmt.Sprintf("... %d more", n-i))
		}
		ls = append(ls, label(i))
	}
	return ls
}

// bus is one row of the line that hosts on one side share. It reaches from the
// first row to the last host, and at least to the unit's stem in the second.
func bus(row, n int) string {
	switch {
	case row < n || row == 1:
		return "+"
	default:
		return " "
	}
}
