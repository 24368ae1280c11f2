// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// Listen opens a listening socket inside the namespace. The address is
// literal; the caller owns the listener.
func (h *Host) Listen(network, addr string) (net.Listener, error) {
	var ln net.Listener
	err := h.Do(func() (err error) {
		ln, err = net.Listen(network, addr)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("lab: host %s: %w", h.name, err)
	}
	return ln, nil
}

// ListenPacket opens a datagram socket inside the namespace.
func (h *Host) ListenPacket(network, addr string) (net.PacketConn, error) {
	var pc net.PacketConn
	err := h.Do(func() (err error) {
		pc, err = net.ListenPacket(network, addr)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("lab: host %s: %w", h.name, err)
	}
	return pc, nil
}

// Dial connects from inside the namespace to a literal address. It can stand
// as DialContext in an http.Transport. The error is net.Dialer's own.
func (h *Host) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return h.DialWith(ctx, &net.Dialer{}, network, addr)
}

// DialWith is Dial with the settings of a dialer.
func (h *Host) DialWith(ctx context.Context, d *net.Dialer, network, addr string) (net.Conn, error) {
	var c net.Conn
	err := h.Do(func() (err error) {
		c, err = d.DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// HTTPClientOptions says how a client of a host behaves.
type HTTPClientOptions struct {
	// Close asks for one connection per request, with "Connection: close".
	Close bool
	// Timeout bounds a whole exchange; 0 means 30 seconds.
	Timeout time.Duration
	// MaxConns bounds the connections at a time; 0 means no bound.
	MaxConns int
}

// HTTPClient returns an HTTP/1.1 client whose connections come from this host.
// It neither compresses nor follows redirects, so that a test sees what was
// sent.
func (h *Host) HTTPClient(o HTTPClientOptions) *http.Client {
	if o.Timeout == 0 {
		o.Timeout = 30 * time.Second
	}
	return &http.Client{
		Timeout: o.Timeout,
		Transport: &http.Transport{
			DialContext:         h.Dial,
			DisableCompression:  true,
			DisableKeepAlives:   o.Close,
			MaxConnsPerHost:     o.MaxConns,
			MaxIdleConnsPerHost: 1024,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// A Server is an HTTP server of the lab, with counters.
type Server struct {
	Addr     string
	srv      *http.Server
	accepted atomic.Int64
	requests atomic.Int64
}

// HTTPServer serves handler on a literal address inside the namespace until
// the lab closes. Idle connections are kept for ever.
func HTTPServer(h *Host, addr string, handler http.Handler) (*Server, error) {
	ln, err := h.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	s := &Server{Addr: ln.Addr().String()}
	s.srv = &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.requests.Add(1)
			handler.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: time.Minute,
	}
	go func() { _ = s.srv.Serve(&countingListener{Listener: ln, n: &s.accepted}) }()
	h.lab.Cleanup(s.Close)
	return s, nil
}

// Accepted returns the number of connections that the server has accepted.
func (s *Server) Accepted() int { return int(s.accepted.Load()) }

// Requests returns the number of requests that have reached the handler.
func (s *Server) Requests() int { return int(s.requests.Load()) }

// Close ends the server and its connections. It may be called more than once.
func (s *Server) Close() error {
	if err := s.srv.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

type countingListener struct {
	net.Listener
	n *atomic.Int64
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.n.Add(1)
	}
	return c, err
}
