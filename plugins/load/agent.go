// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// report is what a server says about itself.
type report struct {
	at     time.Time
	factor float64 // on the score; 1 says nothing
	away   string  // why it wants no requests; "": it takes them
}

// maxReport is how much of a report is read, in bytes.
const maxReport = 16 << 10

// ask asks the agent of a server.
func (a *agentConfig) ask(ctx context.Context, address string) (report, error) {
	ctx, cancel := context.WithTimeout(ctx, a.Timeout)
	defer cancel()
	if a.Port != 0 {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return report{}, err
		}
		address = net.JoinHostPort(host, strconv.Itoa(int(a.Port)))
	}
	if a.Line {
		return a.askLine(ctx, address)
	}
	return a.askHTTP(ctx, address)
}

func (a *agentConfig) askHTTP(ctx context.Context, address string) (report, error) {
	t := &http.Transport{DisableKeepAlives: true, DisableCompression: true}
	defer t.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+a.HTTP, nil)
	if err != nil {
		return report{}, err
	}
	req.Header.Set("User-Agent", "weir-load")
	resp, err := t.RoundTrip(req)
	if err != nil {
		return report{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return report{}, fmt.Errorf("status %d", resp.StatusCode)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxReport))
	if err != nil {
		return report{}, err
	}
	return parseJSON(b)
}

// parseJSON reads {"load": 0.3, "weight": 75, "state": "ready"}. Other keys are
// the agent's own business.
func parseJSON(b []byte) (report, error) {
	var in struct {
		Load   *float64 `json:"load"`
		Weight *float64 `json:"weight"`
		State  *string  `json:"state"`
	}
	if err := json.Unmarshal(b, &in); err != nil {
		return report{}, err
	}
	if in.Load == nil && in.Weight == nil && in.State == nil {
		return report{}, errors.New("the report has none of load, weight and state")
	}
	r := report{factor: 1}
	if in.Load != nil {
		if !(*in.Load >= 0) {
			return r, fmt.Errorf("a load of %g", *in.Load)
		}
		r.factor = max(1-*in.Load, fullest)
	}
	if in.Weight != nil {
		if err := r.weight(*in.Weight); err != nil {
			return r, err
		}
	}
	if in.State != nil {
		if known := r.word(*in.State); !known {
			return r, fmt.Errorf("a state %q", *in.State)
		}
	}
	return r, nil
}

// fullest is the factor of a server that says it is full: it gets little, so
// that somebody notices when it is not full any more.
const fullest = 0.05

// weight takes a percentage, of which 0 means no requests at all.
func (r *report) weight(percent float64) error {
	if !(percent >= 0 && percent <= 10000) {
		return fmt.Errorf("a weight of %g %%", percent)
	}
	if percent == 0 {
		r.away = "agent: weight 0"
	}
	r.factor *= percent / 100
	return nil
}

// word takes a state, and reports whether it is one.
func (r *report) word(w string) bool {
	switch strings.ToLower(w) {
	case "ready", "up":
		return true
	case "drain", "maint", "down", "stopped", "stop", "failed", "fail":
		r.away = "agent: " + strings.ToLower(w)
		return true
	}
	return false
}

func (a *agentConfig) askLine(ctx context.Context, address string) (report, error) {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return report{}, err
	}
	defer func() { _ = c.Close() }()
	if d, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(d)
	}
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	if a.Send != "" {
		if _, err := io.WriteString(c, a.Send); err != nil {
			return report{}, err
		}
	}
	// The line ends with a line feed or with the connection.
	var line []byte
	buf := make([]byte, 256)
	for len(line) < maxReport {
		n, err := c.Read(buf)
		line = append(line, buf[:n]...)
		if i := strings.IndexAny(string(line), "\r\n"); i >= 0 {
			line = line[:i]
			break
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return report{}, err
		}
	}
	return parseLine(string(line))
}

// parseLine reads a line as HAProxy's agent-check does (its configuration
// manual, section 5.2): words apart by spaces, tabs or commas; what follows a
// number sign is for people.
func parseLine(line string) (report, error) {
	r := report{factor: 1}
	line, why, _ := strings.Cut(line, "#")
	some := false
	for _, w := range strings.FieldsFunc(line, func(c rune) bool { return c == ' ' || c == '\t' || c == ',' }) {
		switch {
		case strings.HasSuffix(w, "%"):
			v, err := strconv.ParseFloat(strings.TrimSuffix(w, "%"), 64)
			if err != nil {
				return r, fmt.Errorf("a weight of %q", w)
			}
			if err := r.weight(v); err != nil {
				return r, err
			}
		case strings.HasPrefix(w, "maxconn:"): // the pool's limits are the operator's
		case r.word(w):
		default:
			return r, fmt.Errorf("the word %q", w)
		}
		some = true
	}
	if !some {
		return r, errors.New("the line is empty")
	}
	if why = strings.TrimSpace(why); why != "" && r.away != "" {
		r.away += " (" + why + ")"
	}
	return r, nil
}
