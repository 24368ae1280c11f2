// SPDX-License-Identifier: Apache-2.0

package bare

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/trial"
	"github.com/weirgate/weir/internal/require"
)

// TestTranslate: many connections from several addresses with the same ports,
// each with bytes of its own in both directions, more than a super-packet.
func TestTranslate(t *testing.T) {
	require.Netns(t)
	require.NFQueue(t)
	for name, way := range map[string]func(context.Context, Config, func()) error{"queue": Queue, "tc": TC} {
		t.Run(name, func(t *testing.T) {
			l := trial.Lab(t, "bare")
			must := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			client, router, server := l.Host("client"), l.Host("router"), l.Host("server")
			clients := []netip.Prefix{netip.MustParsePrefix("198.18.0.11/16"), netip.MustParsePrefix("198.18.0.12/16")}
			_, err := l.Link(client, router, clients, []netip.Prefix{netip.MustParsePrefix("198.18.0.1/16")}, lab.LinkOptions{})
			must(err)
			cfg := Config{
				VIP: netip.MustParseAddrPort("203.0.113.10:80"), Server: netip.MustParseAddrPort("198.51.100.11:8080"),
				SNIP: netip.MustParseAddr("198.51.100.1"),
			}
			_, err = l.Link(router, server, []netip.Prefix{netip.PrefixFrom(cfg.SNIP, 24)}, []netip.Prefix{netip.PrefixFrom(cfg.Server.Addr(), 24)}, lab.LinkOptions{})
			must(err)
			must(client.AddRoute(netip.Prefix{}, netip.MustParseAddr("198.18.0.1")))
			must(router.AddAddr("lo", netip.PrefixFrom(cfg.VIP.Addr(), 32)))
			must(router.Forwarding(true))
			must(router.SetSysctl("net/ipv4/conf/all/accept_local", "1"))

			ln, err := server.Listen("tcp", cfg.Server.String())
			must(err)
			defer ln.Close()
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					go func() {
						defer c.Close()
						_, _ = io.Copy(c, c)
					}()
				}
			}()

			ctx, stop := context.WithCancel(t.Context())
			ready, ended := make(chan struct{}), make(chan error, 1)
			go func() { ended <- router.Do(func() error { return way(ctx, cfg, func() { close(ready) }) }) }()
			select {
			case <-ready:
			case err := <-ended:
				if name == "tc" && errors.Is(err, ebpf.ErrNotSupported) {
					require.Missing(t, "tcx", err.Error())
				}
				t.Fatal(err)
			}
			const many = 40
			errs := make(chan error, many)
			for i := range many {
				go func() {
					from := netip.AddrPortFrom(clients[i%2].Addr(), uint16(20_000+i/2))
					errs <- echo(ctx, client, from, cfg.VIP, i)
				}()
			}
			for range many {
				if err := <-errs; err != nil {
					t.Error(err)
				}
			}
			stop()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
}

// echo sends half a megabyte and reads it back.
func echo(ctx context.Context, h *lab.Host, from, to netip.AddrPort, i int) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	c, err := h.DialWith(ctx, &net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from)}, "tcp", to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	end, _ := ctx.Deadline()
	if err := c.SetDeadline(end); err != nil {
		return err
	}
	sent := strings.Repeat(fmt.Sprintf("connection %3d;", i), 40_000)
	go func() {
		_, _ = io.WriteString(c, sent)
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil {
		return fmt.Errorf("connection %d from %v: %w", i, from, err)
	}
	if string(got) != sent {
		return fmt.Errorf("connection %d: %d bytes came back, not the %d that were sent", i, len(got), len(sent))
	}
	return nil
}
