// SPDX-License-Identifier: Apache-2.0

package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// send makes one request. The caller closes the answer's body. An answer of
// 400 and more is an *AnswerError, but for the codes in also.
func (c *Client) send(ctx context.Context, method, path string, content []byte, also ...int) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://weir"+path, bytes.NewReader(content))
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var d *DialError
		if errors.As(err, &d) {
			return nil, d
		}
		return nil, fmt.Errorf("%s on %s: %w", path, c.socket, err)
	}
	ok := resp.StatusCode < 400
	for _, code := range also {
		ok = ok || resp.StatusCode == code
	}
	if ok {
		return resp, nil
	}
	defer func() { _ = resp.Body.Close() }() // All of it that matters was read.
	b, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	var f failure
	if json.Unmarshal(b, &f) != nil || f.Error == "" {
		f.Error = http.StatusText(resp.StatusCode)
	}
	return nil, &AnswerError{resp.StatusCode, f.Error}
}

// call sends a value, nil for none, and reads one.
func (c *Client) call(ctx context.Context, method, path string, value, into any, also ...int) error {
	var content []byte
	switch v := value.(type) {
	case nil:
	case []byte:
		content = v
	default:
		var err error
		if content, err = json.Marshal(v); err != nil {
			return err
		}
	}
	resp, err := c.send(ctx, method, path, content, also...)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }() // It was read to its end, or does not matter any more.
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("%s on %s: %w", path, c.socket, err)
	}
	if text, ok := into.(*string); ok {
		*text = string(b)
		return nil
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%s on %s: the answer is not understood: %w", path, c.socket, err)
	}
	return nil
}

// longestLine bounds one line of a stream: a step with super-packets in base64.
const longestLine = 4 << 20

// lines calls f with each line of an answer, which is valid during the call.
// An answer that is cut off is an error.
func (c *Client) lines(ctx context.Context, path string, f func([]byte) error) error {
	resp, err := c.send(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }() // It was read to its end, or does not matter any more.
	sc := bufio.NewScanner(resp.Body)
	sc.Buffer(make([]byte, 64<<10), longestLine)
	for sc.Scan() {
		if err := f(sc.Bytes()); err != nil {
			return err
		}
	}
	if err := sc.Err(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("%s on %s: %w", path, c.socket, err)
	}
	return ctx.Err()
}

// decoded makes a function of a line from one of a value.
func decoded[T any](f func(*T) error) func([]byte) error {
	return func(b []byte) error {
		var v T
		if err := json.Unmarshal(b, &v); err != nil {
			return fmt.Errorf("the answer is not understood: %w", err)
		}
		return f(&v)
	}
}

// Reload asks for POST /v1/reload. That the files are refused is no error.
func (c *Client) Reload(ctx context.Context) (*ReloadResult, error) {
	var r ReloadResult
	if err := c.call(ctx, http.MethodPost, "/v1/reload", nil, &r, http.StatusUnprocessableEntity); err != nil {
		return nil, err
	}
	return &r, nil
}

// Plan asks for POST /v1/plan.
func (c *Client) Plan(ctx context.Context, dump []byte) (*PlanResult, error) {
	var r PlanResult
	if err := c.call(ctx, http.MethodPost, "/v1/plan", dump, &r); err != nil {
		return nil, err
	}
	return &r, nil
}

// Pools asks for GET /v1/pools.
func (c *Client) Pools(ctx context.Context) ([]Pool, error) {
	var l []Pool
	err := c.call(ctx, http.MethodGet, "/v1/pools", nil, &l)
	return l, err
}

// Rules asks for GET /v1/rules.
func (c *Client) Rules(ctx context.Context) (string, error) {
	var s string
	err := c.call(ctx, http.MethodGet, "/v1/rules", nil, &s)
	return s, err
}

// Query writes the filter as the query of /v1/flows.
func (f *FlowFilter) Query() url.Values {
	q := url.Values{}
	if f.Client.IsValid() {
		s := f.Client.String()
		switch {
		case f.Port != 0:
			s = netip.AddrPortFrom(f.Client.Addr(), f.Port).String()
		case f.Client.IsSingleIP():
			s = f.Client.Addr().String()
		}
		q.Set("client", s)
	}
	if f.VIP.IsValid() {
		q.Set("vip", f.VIP.String())
	}
	for _, o := range [...][2]string{{"farm", f.Farm}, {"server", f.Server}, {"state", f.State}} {
		if o[1] != "" {
			q.Set(o[0], o[1])
		}
	}
	if f.Limit > 0 {
		q.Set("limit", strconv.Itoa(f.Limit))
	}
	return q
}

// FlowLines calls f with each flow as a line of JSON, which is valid during
// the call.
func (c *Client) FlowLines(ctx context.Context, want FlowFilter, f func([]byte) error) error {
	return c.lines(ctx, withQuery("/v1/flows", want.Query()), f)
}

// Flows is FlowLines with the flows read. A Flow is valid during the call.
func (c *Client) Flows(ctx context.Context, want FlowFilter, f func(*Flow) error) error {
	var flow Flow
	return c.FlowLines(ctx, want, func(b []byte) error {
		if err := flow.ReadJSON(b); err != nil {
			return fmt.Errorf("the answer is not understood: %w", err)
		}
		return f(&flow)
	})
}

func withQuery(path string, q url.Values) string {
	if len(q) == 0 {
		return path
	}
	return path + "?" + q.Encode()
}

// Kill asks for DELETE /v1/flows. An invalid vip means all.
func (c *Client) Kill(ctx context.Context, client, vip netip.AddrPort) (int, error) {
	q := url.Values{"client": {client.String()}}
	if vip.IsValid() {
		q.Set("vip", vip.String())
	}
	var n Count
	err := c.call(ctx, http.MethodDelete, withQuery("/v1/flows", q), nil, &n)
	return n.Count, err
}

// EventOptions say which events are asked for.
type EventOptions struct {
	After  uint64 // those behind this number
	Last   int    // only the last so many of those that have been; -1: all
	Follow bool   // and those to come
}

// EventLines calls f with each event as a line of JSON, which is valid during
// the call.
func (c *Client) EventLines(ctx context.Context, o EventOptions, f func([]byte) error) error {
	q := url.Values{}
	if o.After > 0 {
		q.Set("after", strconv.FormatUint(o.After, 10))
	}
	if o.Last >= 0 {
		q.Set("last", strconv.Itoa(o.Last))
	}
	if o.Follow {
		q.Set("follow", "true")
	}
	return c.lines(ctx, withQuery("/v1/events", q), f)
}

// Events is EventLines with the events read.
func (c *Client) Events(ctx context.Context, o EventOptions, f func(*Event) error) error {
	return c.EventLines(ctx, o, decoded(f))
}

// Trace calls f with each record until ctx ends, whose error it returns then.
func (c *Client) Trace(ctx context.Context, want TraceFilter, f func(*TraceRecord) error) error {
	q := url.Values{"client": {want.Client.String()}}
	if want.Snap > 0 {
		q.Set("snap", strconv.Itoa(want.Snap))
	}
	return c.lines(ctx, withQuery("/v1/trace", q), decoded(f))
}

// segments makes a path of words that may hold anything.
func segments(words ...string) string {
	var b strings.Builder
	for _, w := range words {
		b.WriteByte('/')
		b.WriteString(url.PathEscape(w))
	}
	return b.String()
}

// ChangeServer asks for PATCH /v1/farms/{farm}/servers/{server}.
func (c *Client) ChangeServer(ctx context.Context, farm, server string, ch ServerChange) (*Override, error) {
	return c.override(ctx, http.MethodPatch, "/v1/farms"+segments(farm, "servers", server), ch)
}

// AddServer asks for POST /v1/farms/{farm}/servers.
func (c *Client) AddServer(ctx context.Context, farm string, s ServerSpec) (*Override, error) {
	return c.override(ctx, http.MethodPost, "/v1/farms"+segments(farm, "servers"), s)
}

// RemoveServer asks for DELETE /v1/farms/{farm}/servers/{server}.
func (c *Client) RemoveServer(ctx context.Context, farm, server string, persist bool) (*Override, error) {
	path := "/v1/farms" + segments(farm, "servers", server)
	if persist {
		path += "?persist=true"
	}
	return c.override(ctx, http.MethodDelete, path, nil)
}

func (c *Client) override(ctx context.Context, method, path string, value any) (*Override, error) {
	var o Override
	if err := c.call(ctx, method, path, value, &o); err != nil {
		return nil, err
	}
	return &o, nil
}

// Overrides asks for GET /v1/overrides.
func (c *Client) Overrides(ctx context.Context) ([]Override, error) {
	var l []Override
	err := c.call(ctx, http.MethodGet, "/v1/overrides", nil, &l)
	return l, err
}

// DropOverrides asks for DELETE /v1/overrides/{farm}/{server}.
func (c *Client) DropOverrides(ctx context.Context, farm, server string) (int, error) {
	var n Count
	err := c.call(ctx, http.MethodDelete, "/v1/overrides"+segments(farm, server), nil, &n)
	return n.Count, err
}
