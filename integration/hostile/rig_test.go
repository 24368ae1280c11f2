// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/built"
	"github.com/weirgate/weir/integration/lab/trial"
	"github.com/weirgate/weir/internal/require"
)

// What the tests wait by, and draw by.
var (
	within = trial.Within
	until  = trial.Until
	seed   = trial.Seed
)

func TestMain(m *testing.M) { built.Main(m) }

// A rig is a farm with weir on its router.
type rig struct {
	*lab.Farm
	t     *testing.T
	weir  *lab.Weir
	farms int    // more farms, each on a port of its own
	pools string // their pool section

	bin, socket string
}

// event reports whether weir has told an event of that name.
func (r *rig) event(name string) bool {
	r.t.Helper()
	out, err := exec.CommandContext(within(r.t, 10*time.Second), r.bin, "events", "-o", "json", "--socket", r.socket).CombinedOutput()
	if err != nil {
		r.t.Fatalf("weir events: %v: %s", err, out)
	}
	return strings.Contains(string(out), `"`+name+`"`)
}

// vip and server are the addresses of the n-th of these.
func (r *rig) vip(n int) string {
	return netip.AddrPortFrom(r.VIP().Addr(), uint16(8000+n)).String()
}
func (r *rig) server(n int) string {
	return netip.AddrPortFrom(r.ServerAddr(0), uint16(9000+n)).String()
}

// newRig builds the standard topology and skips the test where that is
// impossible. Everything goes away with the test.
func newRig(t *testing.T, o lab.FarmOptions) *rig {
	t.Helper()
	require.NFQueue(t)
	l := trial.Lab(t, "weirhostile")
	o.NoIPv6 = true
	f, err := l.Farm(o)
	if err != nil {
		t.Fatal(err)
	}
	return &rig{Farm: f, t: t}
}

// reason reads a counter of the engine's from the metrics.
func (r *rig) reason(name string) (n uint64) {
	r.t.Helper()
	resp, err := r.Router.HTTPClient(lab.HTTPClientOptions{Timeout: 10 * time.Second}).Get("http://127.0.0.1:9464/metrics")
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^weir_engine_events_total\{reason="` + name + `"\} (\S+)$`).FindSubmatch(text)
	if m == nil {
		r.t.Fatalf("the metrics have no reason %q", name)
	}
	v, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		r.t.Fatal(err)
	}
	return uint64(v)
}

// start runs weir with a pool section and more lines at top level, and waits
// until it is ready. What it wrote is shown when the test fails.
func (r *rig) start(pool, extra string) {
	r.t.Helper()
	bin := built.Weir(r.t)
	dir, err := r.Lab.Subdir("weir")
	if err != nil {
		r.t.Fatal(err)
	}
	run, err := r.Lab.Subdir("weir/run")
	if err != nil {
		r.t.Fatal(err)
	}
	c := lab.ConfigOptions{Dir: run, Pool: pool, Extra: extra}
	text := r.Config(c)
	for i := range r.farms {
		text = strings.Replace(text, "\nfarms:\n", fmt.Sprintf("\nfarms:\n  - {name: w%d, listen: %q, protocol: http, servers: [{name: s1, address: %q}]%s}\n",
			i, r.vip(i), r.server(i), r.pools), 1)
	}
	w, err := lab.StartWeir(within(r.t, 30*time.Second), r.Router, lab.WeirOptions{Binary: bin, Config: text, Dir: dir, Socket: c.Socket()})
	if err != nil {
		r.t.Fatal(err)
	}
	r.weir, r.bin, r.socket = w, bin, c.Socket()
	r.t.Cleanup(func() {
		if r.t.Failed() {
			r.t.Logf("weir (process %d) wrote:\n%s", w.Proc.Pid(), w.Log())
		}
	})
}

// stop ends weir by SIGTERM, which must succeed.
func (r *rig) stop() {
	r.t.Helper()
	code, err := r.weir.Stop(within(r.t, 30*time.Second))
	if err != nil {
		r.t.Fatal(err)
	}
	if code != 0 {
		r.t.Errorf("exit code %d after SIGTERM, want 0", code)
	}
}

// counts is the part of weir's status that these tests read.
type counts struct {
	ClientConnections uint64 `json:"client_connections"`
	Requests          uint64 `json:"requests"`
	OwnAnswers        uint64 `json:"own_answers"`
	Redispatched      uint64 `json:"redispatched"`
	Opened            uint64 `json:"opened"`
	Reused            uint64 `json:"reused"`
	Waiting           int    `json:"waiting"`
	Servers           []struct {
		Open   int               `json:"open"`
		Closed map[string]uint64 `json:"closed"`
	} `json:"servers"`
}

// counts asks weir for its state and adds up its farms.
func (r *rig) counts() counts {
	r.t.Helper()
	raw, err := r.weir.Status(within(r.t, 10*time.Second))
	if err != nil {
		r.t.Fatal(err)
	}
	var st struct{ Farms []counts }
	if err := json.Unmarshal(raw, &st); err != nil {
		r.t.Fatal(err)
	}
	var all counts
	for _, f := range st.Farms {
		all.ClientConnections += f.ClientConnections
		all.Requests += f.Requests
		all.OwnAnswers += f.OwnAnswers
		all.Redispatched += f.Redispatched
		all.Opened += f.Opened
		all.Reused += f.Reused
		all.Waiting += f.Waiting
		all.Servers = append(all.Servers, f.Servers...)
	}
	return all
}

// lossy has a host lose one packet in a hundred, in both directions.
func (r *rig) lossy(h *lab.Host) {
	r.t.Helper()
	require.Tool(r.t, "nft")
	_, err := h.Run(within(r.t, 10*time.Second), "nft", `table inet loss {
	chain in { type filter hook input priority -300; meta l4proto tcp numgen random mod 100 == 0 counter drop; }
	chain out { type filter hook output priority -300; meta l4proto tcp numgen random mod 100 == 0 counter drop; }
}`)
	if err != nil {
		r.t.Fatal(err)
	}
}

// lost counts the packets that a lossy host has lost.
func (r *rig) lost(h *lab.Host) (n int) {
	r.t.Helper()
	out, err := h.Run(within(r.t, 10*time.Second), "nft", "list", "table", "inet", "loss")
	if err != nil {
		r.t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`counter packets (\d+)`).FindAllSubmatch(out, -1) {
		k, _ := strconv.Atoi(string(m[1]))
		n += k
	}
	return n
}
