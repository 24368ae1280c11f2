// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
)

// forecast is the page that both clients of FIG 5 ask for.
const forecast = "/sales/forecast.html"

// visit is one client of FIG 5. The lengths are those of FIG 6A and 6B; the
// sequence numbers are this machine's own, since every TCP draws its own.
type visit struct {
	figure  string
	client  string
	request string // 49 and 50 bytes
}

var visits = []visit{
	{"FIG 6A", "C1", "GET " + forecast + " HTTP/1.1\r\nHost: shop\r\n\r\n"},
	{"FIG 6B", "C2", "GET " + forecast + " HTTP/1.1\r\nHost: store\r\n\r\n"},
}

// pooling is FIG 5: client C1 connects, asks and goes, then C2 does the same.
// The interface unit opens one connection to the server, for C1, and uses it
// again for C2. FIG 6A and 6B are the numbers of the segments.
func pooling(ctx context.Context, s *stage) error {
	servers, err := s.serve(1, http.HandlerFunc(page))
	if err != nil {
		return err
	}
	if err := s.start(ctx, lab.ConfigOptions{Servers: 1}); err != nil {
		return err
	}
	w, err := s.watch()
	if err != nil {
		return err
	}
	ends := make([]netip.AddrPort, len(visits))
	marks := make([]time.Time, len(visits)) // on the clock of the captures
	var problems []string
	for i, v := range visits {
		ends[i], err = s.call(ctx, i, w, []string{v.request})
		marks[i] = time.Now()
		if err != nil {
			// What has passed until now is drawn all the same.
			problems = append(problems, fmt.Sprintf("client %s: %v", v.client, err))
			break
		}
	}
	segs, err := s.stop(w.Capture)
	if err != nil {
		return err
	}

	translated := 0
	begin := time.Time{}
	for i, v := range visits {
		if marks[i].IsZero() {
			break
		}
		// The server side has no client's name on it: time divides it between
		// the figures.
		fig := ladder.Figure{
			Title: v.figure, Client: ladder.Peer{Name: v.client, Addr: ends[i]}, VIP: s.vip(),
			Servers: []ladder.Peer{{Name: "S1", Addr: s.server(0)}},
		}
		part := between(segs, begin, marks[i])
		if err := fig.Write(s.w, part); err != nil {
			return err
		}
		fmt.Fprintln(s.w)
		n, err := checked(fig, part, 0)
		translated += n
		if err != nil {
			problems = append(problems, v.figure+": "+err.Error())
		}
		begin = marks[i]
	}
	problems = append(problems, expect("S1", servers[0], 1, len(visits))...)
	return s.verdict(fmt.Sprintf("client connections: %d   server connections opened: %d   requests: %d   translations checked: %d",
		len(visits), servers[0].Accepted(), servers[0].Requests(), translated), problems)
}

// expect compares what a server has seen with what it should have.
func expect(name string, s *lab.Server, connections, requests int) (problems []string) {
	if n := s.Accepted(); n != connections {
		problems = append(problems, fmt.Sprintf("server %s accepted %d connections instead of %d", name, n, connections))
	}
	if n := s.Requests(); n != requests {
		problems = append(problems, fmt.Sprintf("server %s got %d requests instead of %d", name, n, requests))
	}
	return problems
}

// checked verifies the patent's equations on the translated segments of a
// figure, and returns how many there are.
func checked(fig ladder.Figure, segs []ladder.Segment, bytesAdded uint32) (int, error) {
	pairs := fig.Pairs(segs)
	if len(pairs) == 0 {
		return 0, fmt.Errorf("no segment was seen on both sides")
	}
	return len(pairs), ladder.Check(pairs, bytesAdded)
}
