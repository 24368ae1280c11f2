// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
)

// DialError says that no instance could be reached.
type DialError struct {
	Socket string
	Err    error
}

func (e *DialError) Error() string {
	var ne net.Error
	switch {
	case errors.Is(e.Err, fs.ErrNotExist):
		return fmt.Sprintf("no instance: there is no socket %s; is weir running, and is this its admin.socket (--socket)?", e.Socket)
	case errors.Is(e.Err, fs.ErrPermission):
		return fmt.Sprintf("no access to %s; use root or a member of the socket's group", e.Socket)
	case errors.As(e.Err, &ne) && ne.Timeout():
		return fmt.Sprintf("the instance on %s does not take connections: %v", e.Socket, e.Err)
	}
	return fmt.Sprintf("no instance: nobody answers on %s (%v); is weir running?", e.Socket, e.Err)
}

// Unwrap returns the reason.
func (e *DialError) Unwrap() error { return e.Err }

// AnswerError is an answer other than 200.
type AnswerError struct {
	Code int
	Msg  string
}

func (e *AnswerError) Error() string {
	return fmt.Sprintf("the instance answers %d: %s", e.Code, e.Msg)
}

// maxAnswer bounds what a client reads.
const maxAnswer = 64 << 20

// Client asks one instance. It may be used by several goroutines.
type Client struct {
	socket string
	http   http.Client
}

// Dial makes a client and checks that somebody answers. The error is a
// *DialError.
func Dial(socket string) (*Client, error) {
	c := &Client{socket: socket}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", socket)
		if err != nil {
			return nil, &DialError{socket, err}
		}
		return conn, nil
	}
	conn, err := dial(context.Background(), "", "")
	if err != nil {
		return nil, err
	}
	_ = conn.Close() // Only asked whether anybody is there.
	c.http.Transport = &http.Transport{DialContext: dial}
	return c, nil
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status asks for GET /v1/status.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	var st Status
	if err := c.get(ctx, "/v1/status", &st); err != nil {
		return nil, err
	}
	return &st, nil
}

func (c *Client) get(ctx context.Context, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://weir"+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var d *DialError
		if errors.As(err, &d) {
			return d
		}
		return fmt.Errorf("%s on %s: %w", path, c.socket, err)
	}
	defer func() { _ = resp.Body.Close() }() // The body was read to its end, or does not matter any more.
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("%s on %s: %w", path, c.socket, err)
	}
	if resp.StatusCode != http.StatusOK {
		var f failure
		if json.Unmarshal(body, &f) != nil || f.Error == "" {
			f.Error = http.StatusText(resp.StatusCode)
		}
		return &AnswerError{resp.StatusCode, f.Error}
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("%s on %s: the answer is not understood: %w", path, c.socket, err)
	}
	return nil
}
