// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
)

// TestBulk: large bodies both ways are right to the last byte, over IPv4 and
// IPv6, through both queue backends, with super-packets in the queue, with
// super-packets that the kernel cuts before it queues them, and with links
// that have none.
func TestBulk(t *testing.T) {
	require.NFQueue(t)
	require.Tool(t, "nginx")
	const down, up = 100 << 20, 50 << 20
	download, upload := content(100, down), content(200, up)
	for _, wire := range []struct {
		name    string
		offload bool
		queues  []string
	}{
		{"offload", true, []string{"backend: batched, gso: true", "backend: batched, gso: false, shards: 2", "backend: plain, gso: true, shards: 2", "backend: plain, gso: false"}},
		{"plain packets", false, []string{"backend: batched, gso: true, shards: 2"}},
	} {
		r := newRig(t, lab.FarmOptions{Servers: 1, Link: lab.LinkOptions{NoOffload: !wire.offload}})
		root, err := r.Lab.Subdir("site")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "bulk.bin"), download, 0o644); err != nil {
			t.Fatal(err)
		}
		r.nginxAll(root)
		for _, queue := range wire.queues {
			t.Run(wire.name+", "+queue, func(t *testing.T) {
				r.t = t
				w := r.start(lab.ConfigOptions{IPv6: true, Extra: "queue: {" + queue + "}\n"})
				for _, vip := range []netip.AddrPort{r.VIP(), r.VIP6()} {
					if err := bulk(r.Clients[0], vip, download, upload); err != nil {
						t.Errorf("%s: %v", vip, err)
					}
				}
				r.stop(w)
			})
		}
	}
}

// bulk downloads and uploads over one kept-alive connection.
func bulk(h *lab.Host, vip netip.AddrPort, download, upload []byte) error {
	client := h.HTTPClient(lab.HTTPClientOptions{Timeout: 60 * time.Second})
	defer client.CloseIdleConnections()
	resp, err := client.Get(fmt.Sprintf("http://%s/bulk.bin", vip))
	if err != nil {
		return err
	}
	at, err := compare(resp.Body, download)
	resp.Body.Close()
	if err != nil {
		return fmt.Errorf("download: after %d right bytes of %d: %w", at, len(download), err)
	}
	resp, err = client.Post(fmt.Sprintf("http://%s/upload", vip), "application/octet-stream", bytes.NewReader(upload))
	if err != nil {
		return err
	}
	name, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || resp.StatusCode != http.StatusOK {
		return fmt.Errorf("upload: %s, %w", resp.Status, err)
	}
	f, err := os.Open(strings.TrimSpace(string(name)))
	if err != nil {
		return err
	}
	at, err = compare(f, upload)
	_ = f.Close()
	if err != nil {
		return fmt.Errorf("upload: after %d right bytes of %d: %w", at, len(upload), err)
	}
	return os.Remove(f.Name())
}

// compare reads r to its end and compares it with what is expected. It returns
// how much was right.
func compare(r io.Reader, want []byte) (int, error) {
	buf := make([]byte, 256<<10)
	at := 0
	for {
		n, err := r.Read(buf)
		if n > len(want)-at {
			return at, fmt.Errorf("%d bytes too many", n-(len(want)-at))
		}
		if !bytes.Equal(buf[:n], want[at:at+n]) {
			return at, fmt.Errorf("the next %d bytes are wrong", n)
		}
		at += n
		switch {
		case err == io.EOF && at == len(want):
			return at, nil
		case err == io.EOF:
			return at, io.ErrUnexpectedEOF
		case err != nil:
			return at, err
		}
	}
}
