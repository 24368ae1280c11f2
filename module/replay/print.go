// SPDX-License-Identifier: Apache-2.0

package replay

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/weirgate/weir/module/control/capture"
)

// Print runs a capture and writes every decision and the summary, as lines for
// people or as lines of JSON.
func Print(r *capture.Reader, o Options, w io.Writer, asJSON bool) error {
	enc := json.NewEncoder(w)
	var began time.Time
	if !asJSON {
		fmt.Fprintf(w, "%10s  %-22s  %-40s  %-20s  %s\n", "SECONDS", "CLIENT", "REQUEST", "DECISION", "WHY")
	}
	sum, err := Run(r, o, func(d *Decision) error {
		if asJSON {
			return enc.Encode(d)
		}
		if began.IsZero() {
			began = d.Time
		}
		what := "waits for a connection"
		switch {
		case d.Answer != 0:
			what = fmt.Sprintf("answer %d", d.Answer)
		case d.Server != "":
			what = d.Farm + "/" + d.Server
			if d.Reused {
				what += " (reused)"
			}
		}
		_, err := fmt.Fprintf(w, "%10.6f  %-22s  %-40s  %-20s  %s\n", d.Time.Sub(began).Seconds(), d.Client, d.Request, what, strings.Join(d.Why, "; "))
		return err
	})
	if err != nil {
		return err
	}
	if asJSON {
		return enc.Encode(sum)
	}
	_, err = io.WriteString(w, sum.String())
	return err
}

// count writes "1 request" or "2 requests".
func count(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return fmt.Sprintf("%d %ss", n, word)
}

// String is the summary in a few lines.
func (s *Summary) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n%s on %s, %s of clients\n", count(s.Requests, "request"), count(s.Clients, "connection"), count(s.Packets, "packet"))
	list := func(what string, m map[string]int) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			fmt.Fprintf(&b, "  %s %-24s %d\n", what, k, m[k])
		}
	}
	list("server", s.Servers)
	list("answer", s.Answers)
	if s.Midway > 0 {
		fmt.Fprintf(&b, "  %d packets belong to connections that began before the capture\n", s.Midway)
	}
	if s.Unplayed > 0 {
		fmt.Fprintf(&b, "  %d bytes of responses were not played: nothing was bound to them\n", s.Unplayed)
	}
	if s.Others > 0 {
		fmt.Fprintf(&b, "  %s left out: not between a client and a VIP of this configuration\n", count(s.Others, "packet"))
	}
	return b.String()
}
