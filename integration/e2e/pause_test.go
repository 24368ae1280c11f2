// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"syscall"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
)

// TestPause: the process stands still while a server answers, for longer than a
// server may take to acknowledge a request. Its acknowledgment and its answer
// are in the queue: the client gets the answer, not a 504. The control: where
// nothing is in the queue because the server's packets are lost, it is a 504.
func TestPause(t *testing.T) {
	t.Parallel() // mostly it waits
	require.Tool(t, "nft")
	const patience, pause = 4 * time.Second, 5500 * time.Millisecond
	r := newRig(t, lab.FarmOptions{Servers: 1, NoIPv6: true})
	asked, answer := make(chan struct{}), make(chan struct{})
	if _, err := lab.HTTPServer(r.Servers[0], r.Server(0).String(), http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		_, _ = io.Copy(io.Discard, q.Body)
		if q.Method == http.MethodPost {
			asked <- struct{}{}
			<-answer
		}
		fmt.Fprint(w, "served")
	})); err != nil {
		t.Fatal(err)
	}
	w := r.start(lab.ConfigOptions{Pool: fmt.Sprintf("{}\n    timeouts: {connect: %s}", patience)})
	client := r.Clients[0].HTTPClient(lab.HTTPClientOptions{Timeout: time.Minute})
	defer client.CloseIdleConnections()
	mute := func(on bool) {
		t.Helper()
		args := []string{"delete table inet mute"}
		if on {
			args = []string{"add table inet mute; add chain inet mute c { type filter hook output priority -300; }; add rule inet mute c tcp sport 80 drop"}
		}
		if _, err := r.Servers[0].Run(within(t, 10*time.Second), "nft", args...); err != nil {
			t.Fatal(err)
		}
	}
	signal := func(s syscall.Signal) {
		t.Helper()
		if err := w.Proc.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
	type result struct {
		status int
		body   []byte
		err    error
	}
	post := func() chan result {
		over := make(chan result, 1)
		go func() {
			var res result
			resp, err := client.Post("http://"+r.VIP().String()+"/", "text/plain", bytes.NewReader([]byte("a body")))
			if res.err = err; err == nil {
				res.status = resp.StatusCode
				res.body, res.err = io.ReadAll(resp.Body)
				resp.Body.Close()
			}
			over <- res
		}()
		return over
	}
	for round := 0; round < 2; {
		control := round == 1
		// A pooled connection, so that no handshake is in the way.
		if resp, err := client.Get("http://" + r.VIP().String() + "/"); err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%v %v", resp, err)
		} else {
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		mute(true)
		sent := time.Now()
		over := post()
		<-asked
		signal(syscall.SIGSTOP)
		began := time.Now()
		if !control || began.Sub(sent) > patience/2 {
			mute(false)
		}
		if began.Sub(sent) > patience/2 {
			// The machine stood still, and weir may have lost its patience
			// before: nothing is tested by that.
			t.Logf("the request took %v to its server: once more", began.Sub(sent))
			signal(syscall.SIGCONT)
			answer <- struct{}{}
			<-over
			continue
		}
		round++
		answer <- struct{}{}
		time.Sleep(pause - time.Since(began)) // nothing happens, and that is what is tested
		signal(syscall.SIGCONT)
		want := http.StatusOK
		if control {
			want = http.StatusGatewayTimeout
		}
		res := <-over
		if res.err != nil || res.status != want || !control && string(res.body) != "served" {
			t.Errorf("control %v: %d %q %v", control, res.status, res.body, res.err)
		}
		if control {
			mute(false)
		}
	}
	r.stop(w)
}
