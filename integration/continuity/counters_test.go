// SPDX-License-Identifier: Apache-2.0

package continuity

import (
	"bufio"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// scrape reads all counters, those in histograms too, by name and labels.
func (r *rig) scrape() map[string]float64 {
	r.t.Helper()
	client := r.Router.HTTPClient(lab.HTTPClientOptions{Close: true, Timeout: 20 * time.Second})
	var resp *http.Response
	r.until("the metrics are served", func() (ok bool) {
		var err error
		resp, err = client.Get("http://127.0.0.1:9464/metrics")
		return err == nil
	})
	defer resp.Body.Close()
	all, grows := map[string]float64{}, false
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		line := lines.Text()
		if kind, ok := strings.CutPrefix(line, "# TYPE weir_"); ok {
			grows = strings.HasSuffix(kind, " counter") || strings.HasSuffix(kind, " histogram")
			continue
		}
		name, value, ok := strings.Cut(line, "} ")
		if !ok {
			name, value, ok = strings.Cut(line, " ")
		}
		if !ok || !grows || !strings.HasPrefix(name, "weir_") {
			continue
		}
		v, err := strconv.ParseFloat(value, 64)
		r.must(err)
		all[name] = v
	}
	r.must(lines.Err())
	return all
}

// TestCountersGoOn: what a scrape has shown is never undercut by a successor,
// neither after a death nor after an upgrade, and what was changed at run time
// stays so. Only what belongs to a process or to the ruleset begins anew.
func TestCountersGoOn(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.start(loaded)
	l := r.load(6, 2)
	pid := r.serving()
	if code, out := r.weir("servers", "drain", "web/s2"); code != 0 {
		t.Fatalf("drain: exit code %d: %s", code, out)
	}
	shown, requests := 0, 0.0
	for i := range 4 {
		n := l.requests.Load()
		r.until("requests go on", func() bool { return l.requests.Load() > n+50 || t.Failed() })
		before := r.scrape()
		if i < 3 {
			r.signal(pid, syscall.SIGKILL)
		} else if code, out := r.weir("upgrade"); code != 0 {
			t.Fatalf("upgrade: exit code %d: %s", code, out)
		}
		pid = r.successor(pid)
		after := r.scrape()
		for name, v := range before {
			if strings.HasPrefix(name, "weir_plugin_") || strings.HasPrefix(name, "weir_firewall_") {
				continue
			}
			if now, ok := after[name]; !ok || now < v {
				t.Errorf("death %d: %s was %v, and is %v (%v)", i, name, v, now, ok)
			}
			if v > 0 {
				shown++
			}
		}
		requests = after[`weir_farm_requests_total{farm="web"`]
		if _, out := r.weir("servers"); !strings.Contains(out, "drain") {
			t.Errorf("death %d: the server does not drain any more:\n%s", i, out)
		}
	}
	l.whole()
	if got := r.scrape()[`weir_farm_requests_total{farm="web"`]; got < requests || int64(got) > l.requests.Load()+l.big.Load()+10 {
		t.Errorf("%v requests are counted, and %d were made", got, l.requests.Load()+l.big.Load())
	}
	if shown < 200 {
		t.Errorf("only %d counters were above 0", shown)
	}
	r.stop()
}
