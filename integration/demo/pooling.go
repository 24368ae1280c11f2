// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
)

// forecast is the page that both clients of FIG 5 ask for.
const forecast = "/sales/forecast.html"

// visit is one client of FIG 5. The lengths are those of FIG 6A and 6B; the
// sequence numbers are this machine's own, since every TCP draws its own.
type visit struct {
	figure   string
	client   string
	request  string // 49 and 50 bytes
	response int    // bytes, head included
}

var visits = []visit{
	{"FIG 6A", "C1", "GET " + forecast + " HTTP/1.1\r\nHost: shop\r\n\r\n", 999},
	{"FIG 6B", "C2", "GET " + forecast + " HTTP/1.1\r\nHost: store\r\n\r\n", 500},
}

// pooling is FIG 5: client C1 connects, asks and goes, then C2 does the same.
// The interface unit opens one connection to the server, for C1, and uses it
// again for C2. FIG 6A and 6B are the numbers of the segments.
func pooling(ctx context.Context, s *stage) error {
	server, err := lab.HTTPServer(s.Servers[0], s.Server(0).String(), http.HandlerFunc(page))
	if err != nil {
		return err
	}
	if err := s.start(ctx, lab.ConfigOptions{}); err != nil {
		return err
	}
	l, err := s.capture()
	if err != nil {
		return err
	}
	ends := make([]netip.AddrPort, len(visits))
	done := make([]time.Time, len(visits)) // on the clock of the captures
	var problems []string
	for i, v := range visits {
		wctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		wait := func(cond func([]ladder.Segment) bool) error {
			return l.Wait(wctx, func(recs []lab.Record) bool { return cond(lab.Segments(recs, s.Sides())) })
		}
		ends[i], err = v.make(wctx, s.Clients[i], s.VIP().String(), func() error {
			// As in the figure, the client goes when its acknowledgment has
			// reached the server, not into the middle of that.
			return wait(func(segs []ladder.Segment) bool { return acknowledged(segs, s.Server(0)) })
		})
		if err == nil {
			// The closing handshake passes while nobody waits for it.
			err = wait(func(segs []ladder.Segment) bool { return closed(segs, ends[i]) })
		}
		cancel()
		done[i] = time.Now()
		if err != nil {
			// What has passed until now is drawn all the same.
			problems = append(problems, fmt.Sprintf("client %s: %v", v.client, err))
			break
		}
	}
	segs, err := s.stop(l)
	if err != nil {
		return err
	}

	translated := 0
	begin := time.Time{}
	for i, v := range visits {
		if done[i].IsZero() {
			break
		}
		// The server side has no client's name on it: time divides it between
		// the figures.
		end := done[i]
		fig := ladder.Figure{
			Title: v.figure, Client: ladder.Peer{Name: v.client, Addr: ends[i]}, VIP: s.VIP(),
			Servers: []ladder.Peer{{Name: "S1", Addr: s.Server(0)}},
		}
		part := between(segs, begin, end)
		if err := fig.Write(s.w, part); err != nil {
			return err
		}
		fmt.Fprintln(s.w)
		pairs := fig.Pairs(part)
		translated += len(pairs)
		if err := ladder.Check(pairs, 0); err != nil {
			problems = append(problems, v.figure+": "+err.Error())
		}
		if len(pairs) == 0 {
			problems = append(problems, v.figure+": no segment was seen on both sides")
		}
		begin = end
	}
	if n := server.Accepted(); n != 1 {
		problems = append(problems, fmt.Sprintf("the server accepted %d connections instead of 1", n))
	}
	if n := server.Requests(); n != len(visits) {
		problems = append(problems, fmt.Sprintf("the server got %d requests instead of %d", n, len(visits)))
	}
	return s.verdict(fmt.Sprintf("client connections: %d   server connections opened: %d   requests: %d   translations checked: %d",
		len(visits), server.Accepted(), server.Requests(), translated), problems)
}

// make plays one visit: connect, ask, take the response, linger, close. It
// returns the client's end of the connection.
func (v visit) make(ctx context.Context, h *lab.Host, vip string, linger func() error) (netip.AddrPort, error) {
	conn, err := h.Dial(ctx, "tcp", vip)
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer conn.Close()
	end, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		return end, err
	}
	if d, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(d)
	}
	if _, err := io.WriteString(conn, v.request); err != nil {
		return end, err
	}
	counted := &countingReader{r: conn}
	resp, err := http.ReadResponse(bufio.NewReader(counted), nil)
	if err != nil {
		return end, err
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return end, err
	}
	if resp.StatusCode != http.StatusOK || counted.n != v.response {
		return end, fmt.Errorf("the response is %s with %d bytes, expected %d", resp.Status, counted.n, v.response)
	}
	return end, linger()
}

// page answers with as many bytes as the figure shows.
func page(w http.ResponseWriter, r *http.Request) {
	want := 0
	for _, v := range visits {
		if strings.Contains(v.request, "Host: "+r.Host+"\r\n") {
			want = v.response
		}
	}
	// The head that net/http makes of these fields has a fixed length; the
	// body fills up the rest.
	h := w.Header()
	h.Set("Date", "Mon, 09 Nov 1998 00:00:00 GMT")
	h.Set("Content-Type", "text/html")
	const digits = 3
	head := len("HTTP/1.1 200 OK\r\n") + len("\r\n")
	for k := range h {
		head += len(k) + len(": \r\n") + len(h.Get(k))
	}
	head += len("Content-Length: \r\n") + digits
	h.Set("Content-Length", fmt.Sprint(want-head))
	_, _ = io.WriteString(w, strings.Repeat("x", want-head))
}

type countingReader struct {
	r io.Reader
	n int
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += n
	return n, err
}

// closed reports whether both ends of a client connection have sent their FIN
// and had it acknowledged, or one has reset it.
func closed(segs []ladder.Segment, client netip.AddrPort) bool {
	var fin [2]uint32
	var sent, acked [2]bool
	for _, s := range segs {
		d := 0
		switch {
		case s.Side != ladder.ClientSide || (s.Src != client && s.Dst != client):
			continue
		case s.Dst == client:
			d = 1
		}
		if s.Flags&ladder.RST != 0 {
			return true
		}
		if s.Flags&ladder.FIN != 0 {
			fin[d], sent[d] = s.Seq+uint32(s.Len)+1, true
		}
		if s.Flags&ladder.ACK != 0 && sent[1-d] && s.Ack == fin[1-d] {
			acked[1-d] = true
		}
	}
	return acked[0] && acked[1]
}

// acknowledged reports whether every byte that a server has sent has been
// acknowledged to it.
func acknowledged(segs []ladder.Segment, server netip.AddrPort) bool {
	var sent, acked uint32
	any := false
	for _, s := range segs {
		switch {
		case s.Side != ladder.ServerSide:
		case s.Src == server && s.Len > 0:
			sent, any = s.Seq+uint32(s.Len), true
		case s.Dst == server && s.Flags&ladder.ACK != 0:
			acked = s.Ack
		}
	}
	// A server that closes has its FIN acknowledged too.
	return any && int32(acked-sent) >= 0
}

// between returns the segments after begin and up to end.
func between(segs []ladder.Segment, begin, end time.Time) []ladder.Segment {
	var part []ladder.Segment
	for _, s := range segs {
		if s.Time.After(begin) && !s.Time.After(end) {
			part = append(part, s)
		}
	}
	return part
}
