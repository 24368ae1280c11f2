// SPDX-License-Identifier: Apache-2.0

package framing

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestForwarded: what servers are told about the client's address, over the
// wire as it is: inserted in any segmentation, after losses, and not to be
// forged by anybody but a trusted proxy.
func TestForwarded(t *testing.T) {
	r := newRig(t, 1)
	ln, err := r.Servers[0].Listen("tcp", r.at(0, 80))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		b, _ := io.ReadAll(q.Body)
		for name := range q.Header {
			// A gateway makes one of '-' and '_'.
			if folded := strings.ReplaceAll(strings.ToLower(name), "_", "-"); folded == "x-forwarded-for" && name != "X-Forwarded-For" {
				fmt.Fprintf(w, "%s, ", name)
			}
		}
		fmt.Fprintf(w, "xff=%q fwd=%q body=%d", q.Header.Values("X-Forwarded-For"), q.Header.Values("Forwarded"), len(b))
	})}
	go func() { _ = s.Serve(ln) }()
	t.Cleanup(func() { _ = s.Close() })
	servers := []string{r.at(0, 80)}
	r.start(
		farmText{name: "xff", port: 8001, servers: servers, extra: "    forwarded: x-forwarded-for\n"},
		farmText{name: "rfc", port: 8002, servers: servers, extra: "    forwarded: forwarded\n    forwarded_trust: [192.0.2.0/24]\n"},
		farmText{name: "trusting", port: 8003, servers: servers, extra: fmt.Sprintf("    forwarded: x-forwarded-for\n    forwarded_trust: [%s/32]\n", r.ClientAddr(0))},
		farmText{name: "none", port: 8004, servers: servers},
	)
	me := r.ClientAddr(0).String()
	r.lose(r.Clients[0], 3)
	const claims = "X-Forwarded-For: 10.9.8.7\r\nForwarded: for=10.9.8.7\r\n"
	// Several, up to four; a fifth is refused.
	const more = "X_FORWARDED_FOR: 10.9.8.6\r\nX: y\r\nx-forwarded-for: 10.9.8.5\r\nforwarded: for=10.9.8.4\r\nX_Forwarded-For: 10.9.8.3\r\n"
	for _, x := range []struct {
		fields, want string
	}{
		{more, fmt.Sprintf("HTTP/1.1 200 xff=[%q] fwd=[]", me)},
		{more + "Forwarded: for=10.9.8.2\r\n", "HTTP/1.1 400 "},
	} {
		c, err := r.dial(8001)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: a\r\n%sConnection: close\r\n\r\n", x.fields)
		b, err := io.ReadAll(c)
		c.Close()
		status, told, _ := strings.Cut(string(b), "OK\r\n")
		_, told, _ = strings.Cut(told, "\r\n\r\n")
		if err != nil || !strings.HasPrefix(status+told, x.want) {
			t.Errorf("%q: %q, want %q, %v", x.fields, b, x.want, err)
		}
	}
	for port, want := range map[uint16]string{
		8001: fmt.Sprintf("xff=[%q] fwd=[]", me),
		8002: fmt.Sprintf("xff=[] fwd=[%q]", "for="+me),
		8003: fmt.Sprintf("xff=[%q %q] fwd=[%q]", "10.9.8.7", me, "for=10.9.8.7"),
		8004: fmt.Sprintf("xff=[%q] fwd=[%q]", "10.9.8.7", "for=10.9.8.7"),
	} {
		parallel(t, size(12, 400), 4, func(i int) error {
			c, err := r.dial(port)
			if err != nil {
				return err
			}
			defer c.Close()
			br := bufio.NewReader(c)
			for n := range 5 {
				body := strings.Repeat("b", (i*5+n)*997%20_000)
				text := fmt.Sprintf("POST / HTTP/1.1\r\nHost: a\r\n%sContent-Length: %d\r\n\r\n%s", claims, len(body), body)
				for k := 0; k < len(text); {
					step := 1 + (i*31+n*17+k)%1900
					if _, err := io.WriteString(c, text[k:min(k+step, len(text))]); err != nil {
						return err
					}
					k += step
				}
				resp, err := http.ReadResponse(br, nil)
				if err != nil {
					return err
				}
				b, err := io.ReadAll(resp.Body)
				if err != nil || string(b) != want+fmt.Sprintf(" body=%d", len(body)) {
					return fmt.Errorf("port %d: %q, want %q, %w", port, b, want, err)
				}
			}
			return nil
		})
	}
}

// TestLimits: each limit of a farm's configuration, at its value and beyond.
func TestLimits(t *testing.T) {
	r := newRig(t, 1)
	s := r.golang(80)
	r.start(farmText{name: "web", port: 80, servers: []string{r.at(0, s.port)}, extra: `    limits: {head: 1KiB, fields: 8, target: 100, chunk_extension: 16, trailers: 64, body_rate: 8kbit}
    timeouts: {head: 4s, body: 2s, idle: 2s}
`})
	const post = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5"
	for _, c := range []struct {
		name, text, want string
		pause            time.Duration // before the last byte
	}{
		{"all within", "GET /" + strings.Repeat("x", 99) + " HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("A: b\r\n", 7) + "\r\n", "200", 0},
		{"head", "GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 1000) + "\r\n\r\n", "431", 0},
		{"fields", "GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("A: b\r\n", 8) + "\r\n", "431", 0},
		{"target", "GET /" + strings.Repeat("x", 100) + " HTTP/1.1\r\nHost: a\r\n\r\n", "414", 0},
		{"extension within", post + ";" + strings.Repeat("x", 15) + "\r\nhello\r\n0\r\n\r\n", "200", 0},
		{"extension", post + ";" + strings.Repeat("x", 16) + "\r\nhello\r\n0\r\n\r\n", "400", 0},
		{"trailers within", post + "\r\nhello\r\n0\r\nX: " + strings.Repeat("x", 59) + "\r\n\r\n", "200", 0},
		{"trailers", post + "\r\nhello\r\n0\r\nX: " + strings.Repeat("x", 60) + "\r\n\r\n", "400", 0},
		{"head in time", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "200", 200 * time.Millisecond},
		{"slow head", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "408", 3 * time.Second},
		{"slow body", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", "408", 4 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			conn, err := r.dial(80)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			last := len(c.text) - 1
			if c.pause == 0 {
				last = len(c.text)
			}
			_, _ = io.WriteString(conn, c.text[:last])
			br := bufio.NewReader(conn)
			_ = conn.SetReadDeadline(time.Now().Add(30 * time.Second))
			if c.pause > 0 && c.want == "200" {
				time.Sleep(c.pause) // the client's own slowness is what is tested
				_, _ = io.WriteString(conn, c.text[last:])
			}
			resp, err := http.ReadResponse(br, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprint(resp.StatusCode); got != c.want {
				t.Errorf("status %s, want %s", got, c.want)
			}
		})
	}
	// Each refusal is an event with its reason, and without anything that a
	// client wrote.
	c0, err := r.dial(80)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(c0, "GET /secret-path HTTP/1.1\r\nHost: secret-host\r\nSecret-Name: secret-value\r\nX : y\r\n\r\n")
	_, _ = io.Copy(io.Discard, c0)
	c0.Close()
	until(t, 10*time.Second, "events of a refusal", func() bool {
		return strings.Contains(r.weir.Log(), "event=refused-space-before-colon") && strings.Contains(r.weir.Log(), "event=answer-400")
	})
	if strings.Contains(strings.ToLower(r.weir.Log()), "secret") {
		t.Error("an event shows what a client wrote")
	}
	// Idle: a connection without a request is closed without a word.
	c, err := r.dial(80)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if b, err := io.ReadAll(br); err != nil || len(b) > 0 {
		t.Errorf("an idle connection ends with %q, %v", b, err)
	}
}
