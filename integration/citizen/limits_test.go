// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// burst is how many new connections the rules of TestRateLimits let in at once.
const burst = 20

// limits are rate limits as people write them, on new connections: for each
// source address in front of routing, and for one client in the filter's chain.
// One more connection comes in in an hour.
const limits = `table inet limits {
	counter early4 { }
	counter early6 { }
	counter late4 { }
	counter late6 { }
	set seen4 { type ipv4_addr; flags dynamic; }
	set seen6 { type ipv6_addr; flags dynamic; }
	chain early {
		type filter hook prerouting priority mangle;
		ip saddr 198.18.0.13 accept
		ip6 saddr 2001:db8:18::d accept
		ip saddr != 198.18.0.12 tcp dport 80 ct state new add @seen4 { ip saddr limit rate over 1/hour burst %[2]d packets } counter name early4 drop
		ip6 saddr != 2001:db8:18::c tcp dport 80 ct state new add @seen6 { ip6 saddr limit rate over 1/hour burst %[2]d packets } counter name early6 drop
	}
	chain late {
		type filter hook %[1]s priority filter;
		ip saddr 198.18.0.12 tcp dport 80 tcp flags & (fin | syn | rst | ack) == syn limit rate over 1/hour burst %[2]d packets counter name late4 drop
		ip6 saddr 2001:db8:18::c tcp dport 80 tcp flags & (fin | syn | rst | ack) == syn limit rate over 1/hour burst %[2]d packets counter name late6 drop
	}
}
`

// TestRateLimits: rate limits of others count new connections of a client and
// refuse what is too much, whichever of their chains they stand in, with
// firewall.inspect: all too. Running connections of that client and all of
// others are served. The control is the same client without the rules.
func TestRateLimits(t *testing.T) {
	for _, inspect := range []string{"syn", "all"} {
		for _, hook := range []string{"input", "forward"} {
			t.Run("inspect "+inspect+", "+hook, func(t *testing.T) {
				r := newRig(t, lab.FarmOptions{Clients: 3, Servers: 2, Routed: hook == "forward"})
				r.serve(r.both)
				r.config.Extra = "firewall: {inspect: " + inspect + "}\n"
				r.nft(fmt.Sprintf(limits, hook, burst))
				w := r.start()
				watch := r.watch()
				vips := map[string]netip.AddrPort{"4": r.VIP(), "6": r.VIP6()}
				for i, chain := range []string{"early", "late"} {
					for family, vip := range vips {
						running := keep(t, r.Clients[i], vip)
						n := r.openUntil(r.Clients[i], vip, chain+family)
						// A SYN that was repeated has counted twice.
						if n < 2 || n > burst+1 {
							t.Errorf("%s: %d connections were let in, want about %d", chain+family, n, burst)
						}
						for range 2 * burst {
							if err := running.get("/running", 20*time.Second); err != nil {
								t.Errorf("%s: the running connection: %v", chain+family, err)
								break
							}
						}
					}
				}
				every := func(h *lab.Host, who string) {
					t.Helper()
					for _, vip := range vips {
						for range 2 * burst {
							if err := ask(h, vip, "/new", 20*time.Second); err != nil {
								t.Errorf("%s to %v: %v", who, vip, err)
								break
							}
						}
					}
				}
				every(r.Clients[2], "the client without a limit")
				r.nft("flush chain inet limits early\nflush chain inet limits late\n")
				every(r.Clients[0], "the first client without the rules")
				every(r.Clients[1], "the second client without the rules")
				watch.judge()
				r.stop(w)
			})
		}
	}
}

// openUntil opens connections from a host, each for one request, until a rule
// has counted one that it refuses, and says how many were served, with one that
// was there before.
func (r *rig) openUntil(h *lab.Host, to netip.AddrPort, counter string) int {
	r.t.Helper()
	for n := 1; ; n++ {
		ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
		done := make(chan error, 1)
		go func() {
			c, err := h.Dial(ctx, "tcp", to.String())
			if err == nil {
				err = once(c)
			}
			done <- err
		}()
		select {
		case err := <-done:
			cancel()
			if err != nil {
				r.t.Fatalf("connection %d to %v, refused by no rule: %v", n, to, err)
			}
			if n > 10*burst {
				r.t.Fatalf("%d connections to %v, and no rule refuses any", n, to)
			}
			continue
		case <-time.After(300 * time.Millisecond):
		}
		// Slow, or refused: the counter knows.
		for {
			if r.countedBy("inet limits", counter) > 0 {
				cancel()
				if err := <-done; err == nil {
					break // a SYN of it was repeated, and that one was refused
				}
				return n
			}
			select {
			case err := <-done:
				if err != nil {
					r.t.Fatalf("connection %d to %v, refused by no rule: %v", n, to, err)
				}
			case <-time.After(100 * time.Millisecond):
				continue
			}
			break
		}
		cancel()
	}
}

// once makes one request on a connection and closes it.
func once(c net.Conn) error {
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	if _, err := fmt.Fprint(c, "GET /once HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		return err
	}
	var b strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := c.Read(buf)
		b.Write(buf[:n])
		if strings.Contains(b.String(), " has /once ") {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w after %q", err, b.String())
		}
	}
}
