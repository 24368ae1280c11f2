// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// A connection is one of a client's, over which requests go until it ends.
type connection struct {
	net.Conn
	in *bufio.Reader
}

// keep opens a connection and makes a first request.
func keep(t *testing.T, h *lab.Host, to netip.AddrPort) *connection {
	t.Helper()
	c, err := h.Dial(within(t, 20*time.Second), "tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	k := &connection{c, bufio.NewReader(c)}
	if err := k.get("/kept", 20*time.Second); err != nil {
		t.Fatalf("the first request to %v: %v", to, err)
	}
	return k
}

// begin sends a request and reads the head of the response.
func (c *connection) begin(path string, timeout time.Duration) (*http.Response, error) {
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path); err != nil {
		return nil, err
	}
	return http.ReadResponse(c.in, nil)
}

// get makes a request of a server of serve and checks what comes.
func (c *connection) get(path string, timeout time.Duration) error {
	resp, err := c.begin(path, timeout)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if !strings.Contains(string(b), " has "+path+" ") {
		return fmt.Errorf("GET %s: %s, %q", path, resp.Status, b)
	}
	return nil
}
