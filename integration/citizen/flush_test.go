// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// TestFlushUnderLoad: somebody flushes the ruleset ten times, and deletes and
// changes rules, while clients download and ask. No connection breaks, all
// bytes are right, and where the table is not owned, it is back at once, and
// events say so.
func TestFlushUnderLoad(t *testing.T) {
	restart := "flush ruleset\n" + string(testdata(t, "router.nft")) +
		"insert rule inet filter forward " + acceptMark + "\ninsert rule inet filter output " + acceptMark +
		"\ninsert rule inet filter reverse_path " + acceptMark + "\n"
	for _, owned := range []string{"auto", "never"} {
		t.Run("owned "+owned, func(t *testing.T) {
			r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
			r.serve(r.both)
			r.config.Extra = "firewall: {owned: " + owned + "}\n"
			w := r.start()
			watch := r.watch()
			stop := make(chan struct{})
			var wg sync.WaitGroup
			var done atomic.Int64
			var mu sync.Mutex
			var errs []error
			for i := range 8 {
				wg.Go(func() {
					c := r.Clients[0].HTTPClient(lab.HTTPClientOptions{Close: i == 7, Timeout: 30 * time.Second, MaxConns: 1})
					vip := r.VIP()
					if i%2 == 1 {
						vip = r.VIP6()
					}
					for n := 0; ; n++ {
						select {
						case <-stop:
							return
						default:
						}
						path := fmt.Sprintf("/request-%d-%d", i, n)
						if i < 4 {
							path = "/bytes/2000000"
						}
						if err := get(c, vip, path); err != nil {
							mu.Lock()
							errs = append(errs, fmt.Errorf("client %d, request %d: %w", i, n, err))
							mu.Unlock()
							return
						}
						done.Add(1)
					}
				})
			}
			restored := 0
			for i, attack := range []string{
				"flush ruleset", "flush ruleset", restart, "flush ruleset", "flush chain inet weir divert\ndelete chain inet weir divert", "flush ruleset",
				"delete table inet weir", "flush ruleset", "insert rule inet weir divert accept", "flush ruleset", "flush ruleset", "flush ruleset", "flush ruleset",
			} {
				// Between attacks there is traffic again.
				from := done.Load()
				until(t, 20*time.Second, "requests", func() bool { return done.Load() > from+20 })
				mine := strings.Contains(attack, " weir") || strings.HasPrefix(attack, "flush")
				file := r.Lab.Dir() + "/attack.nft"
				if err := os.WriteFile(file, []byte(attack), 0o644); err != nil {
					t.Fatal(err)
				}
				r.shell("nft -f " + file + " || true") // what is owned refuses
				if owned == "never" && mine {
					restored++
					until(t, time.Second, fmt.Sprintf("the table after attack %d, %.40q", i, attack), func() bool {
						return strings.Count(w.Log(), "event=rules-restored") >= restored
					})
				}
			}
			from := done.Load()
			until(t, 20*time.Second, "requests", func() bool { return done.Load() > from+20 })
			close(stop)
			wg.Wait()
			for i, err := range errs {
				if i < 5 {
					t.Error(err)
				}
			}
			t.Logf("%d requests, %d errors; restored %d times", done.Load(), len(errs), strings.Count(w.Log(), "event=rules-restored"))
			if owned == "auto" && strings.Contains(w.Log(), "event=rules-restored") {
				t.Error("an owned table was restored")
			}
			if counted := r.metric("weir_firewall_restored_total"); counted != float64(strings.Count(w.Log(), "event=rules-restored")) || (counted > 0) != (owned == "never") {
				t.Errorf("the counter of restorations says %v", counted)
			}
			watch.judge()
			r.stop(w)
		})
	}
}

func testdata(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
