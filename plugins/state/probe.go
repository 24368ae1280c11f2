// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"syscall"
	"time"
)

// maxBody is how much of a probe's response is read, in bytes.
const maxBody = 64 << 10

// probe asks a server once and says what is wrong with it, nil if nothing.
func (p *probeConfig) probe(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, p.Timeout)
	defer cancel()
	if p.Port != 0 {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return err
		}
		address = net.JoinHostPort(host, strconv.Itoa(int(p.Port)))
	}
	var err error
	if p.TCP {
		err = probeTCP(ctx, address)
	} else {
		err = p.probeHTTP(ctx, address)
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("no answer within %s", p.Timeout)
	case errors.Is(err, syscall.ECONNREFUSED):
		return errors.New("connection refused")
	case errors.Is(err, syscall.ECONNRESET):
		return errors.New("connection reset")
	}
	return err
}

func probeTCP(ctx context.Context, address string) error {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return c.Close()
}

func (p *probeConfig) probeHTTP(ctx context.Context, address string) error {
	// A connection of its own each time: a kept one would show that the
	// connection is well, and not that the server takes new ones.
	t := &http.Transport{DisableKeepAlives: true, DisableCompression: true}
	defer t.CloseIdleConnections()
	req := &http.Request{
		Method: p.Method, URL: &url.URL{Scheme: "http", Host: address}, Host: p.Host,
		Header: http.Header{"User-Agent": {"weir-state"}}, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	path, query, _ := bytes.Cut([]byte(p.HTTP), []byte("?"))
	req.URL.Opaque = string(path)
	req.URL.RawQuery = string(query)
	resp, err := t.RoundTrip(req.WithContext(ctx))
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	good := false
	for _, r := range p.Expect.Status {
		good = good || resp.StatusCode >= r.first && resp.StatusCode <= r.last
	}
	if !good {
		return fmt.Errorf("status %d", resp.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return fmt.Errorf("the response breaks off: %w", err)
	}
	if want := p.Expect.Body; want != "" && !bytes.Contains(body, []byte(want)) {
		return fmt.Errorf("the body is without %q", want)
	}
	return nil
}

// pause returns how long to wait before the next probe. Jitter keeps many
// instances from asking in step.
func (p *probeConfig) pause(fast bool) time.Duration {
	d := p.Interval
	if fast {
		d = p.FastInterval
	}
	return time.Duration(float64(d) * (1 + *p.Jitter*(2*rand.Float64()-1)))
}
