// SPDX-License-Identifier: Apache-2.0

package framing

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestPrivateTriggers: whatever shows that a server connection has become
// somebody's, in the request or in the response, keeps it his: his next request
// goes over it, nobody else's ever does, and it ends with him. The controls are
// schemes that authenticate requests: there the connection is pooled, and this
// server takes the next client for the last one.
func TestPrivateTriggers(t *testing.T) {
	r := newRig(t, 1)
	ln, err := r.Servers[0].Listen("tcp", r.at(0, 80))
	if err != nil {
		t.Fatal(err)
	}
	type key struct{}
	s := &http.Server{
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, key{}, new(atomic.Value))
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			user := q.Context().Value(key{}).(*atomic.Value)
			if name, ok := strings.CutPrefix(q.URL.Path, "/login/"); ok {
				user.Store(name)
			}
			for name, values := range q.URL.Query() { // what the answer is to say
				if name != "status" {
					w.Header().Set(name, values[0])
				}
			}
			if q.URL.Query().Get("status") != "" {
				w.WriteHeader(http.StatusUnauthorized)
			}
			fmt.Fprint(w, user.Load())
		}),
	}
	go func() { _ = s.Serve(ln) }()
	t.Cleanup(func() { _ = s.Close() })
	r.start(farmText{name: "web", port: 80, servers: []string{r.at(0, 80)}, extra: "    pool: {max_idle: 4}\n"})

	ask := func(c net.Conn, br *bufio.Reader, target, fields string) (string, error) {
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: a\r\n%s\r\n", target, fields)
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			return "", err
		}
		b, err := io.ReadAll(resp.Body)
		return string(b), err
	}
	for i, x := range []struct {
		name, fields, query string
		private             bool
	}{
		{"request, NTLM", "Authorization: NTLM TlRMTVNTUAADAAAA\r\n", "", true},
		{"request, Negotiate", "Authorization: Negotiate YIIJvwYGKwYBBQUC\r\n", "", true},
		{"request, case", "AUTHORIZATION:\tnegotiate YIIJvwYGKwYBBQUC\r\n", "", true},
		{"request, to a proxy", "Proxy-Authorization: NTLM TlRMTVNTUAADAAAA\r\n", "", true},
		{"response, NTLM", "", "?status=401&WWW-Authenticate=NTLM", true},
		{"response, Negotiate", "", "?status=401&WWW-Authenticate=Negotiate", true},
		{"response, in a list", "", "?status=401&WWW-Authenticate=Basic+realm%3D%22a%22,+Negotiate", true},
		{"response, of a proxy", "", "?status=401&Proxy-Authenticate=NTLM+TlRMTVNTUAACAAAA", true},
		{"response, of success", "", "?WWW-Authenticate=Negotiate+oRQwEqAD", true},
		{"both", "Authorization: Negotiate YIIJ\r\n", "?WWW-Authenticate=Negotiate+oRQwEqAD", true},
		{"control, Basic", "Authorization: Basic dTpw\r\n", "?status=401&WWW-Authenticate=Basic+realm%3D%22a%22", false},
		{"control, Bearer", "Authorization: Bearer ntlm.negotiate\r\n", "", false},
		{"control, nothing", "", "", false},
	} {
		t.Run(x.name, func(t *testing.T) {
			c, err := r.dial(80)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			br := bufio.NewReader(c)
			me := fmt.Sprintf("user%d", i)
			for _, target := range []string{"/login/" + me + x.query, "/who", "/who"} {
				got, err := ask(c, br, target, x.fields)
				if err != nil || got != me {
					t.Fatalf("%s: %q, %v, want %q", target, got, err, me)
				}
				x.fields = "" // the connection knows
			}
			// Somebody else, while he is there and when he has gone.
			other := func() string {
				c, err := r.dial(80)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				got, err := ask(c, bufio.NewReader(c), "/who", "")
				if err != nil {
					t.Fatal(err)
				}
				return got
			}
			if x.private {
				if got := other(); got == me {
					t.Errorf("somebody else is %s at once", me)
				}
			}
			c.Close()
			until(t, 10*time.Second, "the end of his connection", func() bool {
				f := r.farm("web").Servers[0]
				return f.Active == 0 && (!x.private || f.Open == f.Idle)
			})
			leaked := false
			for range 4 {
				leaked = other() == me || leaked
			}
			if leaked == x.private {
				t.Errorf("private %v, and somebody else is %s: %v", x.private, me, leaked)
			}
		})
	}
}
