// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
)

// closing is what both clients write: HTTP/1.0 without keep-alive, after which
// a server closes its connection.
const closing = "GET " + forecast + " HTTP/1.0\r\n\r\n"

// added is the field that the interface unit inserts, so that the server's
// connection stays.
const added = "Connection: Keep-Alive\r\n"

// insertion is the third of the patent's cases: the client knows nothing of
// keep-alive, the server must. The interface unit inserts the field and counts
// the bytes added in all numbers that follow; it closes the client's
// connection itself.
func insertion(ctx context.Context, s *stage) error {
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
	var ends [2]netip.AddrPort
	var marks [2]time.Time
	var problems []string
	for i := range ends {
		ends[i], err = s.call(ctx, i, w, []string{closing})
		marks[i] = time.Now()
		if err != nil {
			problems = append(problems, fmt.Sprintf("client C%d: %v", i+1, err))
			break
		}
	}
	segs, err := s.stop(w.Capture)
	if err != nil {
		return err
	}
	translated := 0
	begin := time.Time{}
	var got string // by the server
	for i := range ends {
		if marks[i].IsZero() {
			break
		}
		fig := ladder.Figure{
			Title: "HTTP/1.0", Client: ladder.Peer{Name: fmt.Sprintf("C%d", i+1), Addr: ends[i]}, VIP: s.vip(),
			Servers: []ladder.Peer{{Name: "S1", Addr: s.server(0)}},
		}
		part := between(segs, begin, marks[i])
		if err := fig.Write(s.w, part); err != nil {
			return err
		}
		fmt.Fprintln(s.w)
		n, err := checked(fig, part, uint32(len(added)))
		translated += n
		if err != nil {
			problems = append(problems, fmt.Sprintf("client C%d: %v", i+1, err))
		}
		for _, seg := range part {
			if seg.Side == ladder.ServerSide && seg.Dst == s.server(0) && seg.Len > 0 {
				got = string(seg.Payload)
			}
		}
		begin = marks[i]
	}
	s.compare(closing, got)
	if want := strings.TrimSuffix(closing, "\r\n") + added + "\r\n"; got != want {
		problems = append(problems, fmt.Sprintf("the server got %q instead of %q", got, want))
	}
	problems = append(problems, expect("S1", servers[0], 1, len(ends))...)
	return s.verdict(fmt.Sprintf("client connections: %d   server connections: %d   bytes added: %d   translations checked: %d",
		len(ends), servers[0].Accepted(), len(got)-len(closing), translated), problems)
}

// compare shows two requests beside each other, and marks the lines that only
// the second has.
func (s *stage) compare(sent, got string) {
	fmt.Fprintf(s.w, "  %-42s %s\n", fmt.Sprintf("The client writes %d bytes:", len(sent)), fmt.Sprintf("The server reads %d:", len(got)))
	left := strings.Split(strings.TrimRight(sent, "\r\n"), "\r\n")
	for line := range strings.SplitSeq(strings.TrimRight(got, "\r\n"), "\r\n") {
		if len(left) > 0 && left[0] == line {
			fmt.Fprintf(s.w, "    %-42s %s\n", left[0], line)
			left = left[1:]
			continue
		}
		fmt.Fprintf(s.w, "    %-40s + %s\n", "", line)
	}
	fmt.Fprintln(s.w)
}
