// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
)

// newProducts is the second page of FIG 8.
const newProducts = "/products/new.html"

// tour is what C2 of FIG 8 asks for, in requests of 50 bytes as in FIG 9.
var tour = []string{
	"GET " + forecast + " HTTP/1.1\r\nHost: store\r\n\r\n",
	"GET " + newProducts + " HTTP/1.1\r\nHost: webshop\r\n\r\n",
}

// distribution is FIG 8: two requests on one client connection, which the path
// plugin sends to two servers, over connections that have been opened before
// (FIG 7, step 702). FIG 9 is the numbers of the segments.
func distribution(ctx context.Context, s *stage) error {
	servers, err := s.serve(2, http.HandlerFunc(page))
	if err != nil {
		return err
	}
	err = s.start(ctx, lab.ConfigOptions{
		Servers:  2,
		Policies: "[{use: path, config: {routes: [{prefix: /sales/, servers: [s1]}, {prefix: /products/, servers: [s2]}]}}]",
		Plugins:  "[{name: path}]",
		// One connection to each server, opened ahead.
		Pool: "{min_idle: 1, max_connections: 1}",
	})
	if err != nil {
		return err
	}
	for ready := 0; ready < len(servers); {
		ready = 0
		for _, srv := range servers {
			ready += min(srv.Accepted(), 1)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("connections that are opened ahead: %w", ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	w, err := s.watch()
	if err != nil {
		return err
	}
	var problems []string
	end, err := s.call(ctx, 1, w, tour)
	if err != nil {
		problems = append(problems, fmt.Sprintf("client C2: %v", err))
	}
	segs, err := s.stop(w.Capture)
	if err != nil {
		return err
	}

	fig := ladder.Figure{
		Title: "FIG 9", Client: ladder.Peer{Name: "C2", Addr: end}, VIP: s.vip(),
		Servers: []ladder.Peer{{Name: "S1", Addr: s.server(0)}, {Name: "S2", Addr: s.server(1)}},
	}
	if err := fig.Write(s.w, segs); err != nil {
		return err
	}
	fmt.Fprintln(s.w)
	// Each server has its own distances: the second request divides them.
	divide := len(segs)
	requests := 0
	for i, seg := range segs {
		if seg.Side == ladder.ClientSide && seg.Src == end && seg.Len > 0 {
			if requests++; requests == 2 {
				divide = i
			}
		}
	}
	translated := 0
	for i, part := range [][]ladder.Segment{segs[:divide], segs[divide:]} {
		one := fig
		one.Servers = fig.Servers[i : i+1]
		n, err := checked(one, part, 0)
		translated += n
		if err != nil {
			problems = append(problems, fmt.Sprintf("server %s: %v", one.Servers[0].Name, err))
		}
		problems = append(problems, expect(one.Servers[0].Name, servers[i], 1, 1)...)
	}
	return s.verdict(fmt.Sprintf("client connections: 1   server connections opened: %d   requests: %d   translations checked: %d",
		servers[0].Accepted()+servers[1].Accepted(), servers[0].Requests()+servers[1].Requests(), translated), problems)
}
