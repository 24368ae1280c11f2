// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/module/control"
)

// scrape reads the metrics on the router as text.
func (r *rig) scrape(addr string) string {
	r.t.Helper()
	res, err := r.Router.HTTPClient(lab.HTTPClientOptions{}).Get("http://" + addr + "/metrics")
	if err != nil {
		r.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != 200 {
		r.t.Fatalf("metrics: status %d: %v", res.StatusCode, err)
	}
	return string(b)
}

// sample returns the value of one line of a scrape, -1 if it has none.
func sample(text, series string) float64 {
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(series) + ` (\S+)$`).FindStringSubmatch(text)
	if m == nil {
		return -1
	}
	v, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		return -1
	}
	return v
}

// TestMetrics: the metrics say the same as the control socket, and those of the
// kernel are there.
func TestMetrics(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	r.hello()
	addr := r.SNIP().String() + ":9464"
	text := strings.Replace(r.text(setup{servers: []string{"s1=0", "s2=1"}}), `metrics: ""`, fmt.Sprintf("metrics: %q", addr), 1)
	w := r.startWith(text)
	for i := range 20 {
		r.mustAsk("/" + strconv.Itoa(i))
	}
	var st control.Status
	raw, err := w.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw, &st); err != nil {
		t.Fatal(err)
	}
	got := r.scrape(addr)
	for series, want := range map[string]float64{
		`weir_condition{condition="ready"}`:                                      1,
		`weir_farm_requests_total{farm="web"}`:                                   float64(st.Farms[0].Requests),
		`weir_farm_server_connections_opened_total{farm="web"}`:                  float64(st.Farms[0].Opened),
		`weir_syn_answered_total`:                                                20,
		`weir_firewall_up`:                                                       1,
		`weir_firewall_packets_total{counter="syn"}`:                             20,
		`weir_queue_kernel_dropped_packets_total{queue="0",reason="queue_full"}`: 0,
		`weir_server_state{farm="web",server="s1",state="ready"}`:                1,
		`weir_config_last_reload_successful`:                                     1,
		`weir_access_log_dropped_total`:                                          0,
	} {
		if v := sample(got, series); v != want {
			t.Errorf("%s is %v, want %v", series, v, want)
		}
	}
	if st.Farms[0].Requests < 20 {
		t.Errorf("%d requests", st.Farms[0].Requests)
	}
	if v := sample(got, `weir_engine_events_total{reason="served"}`); v < 19 {
		t.Errorf("%v exchanges served", v)
	}
	if v := sample(got, `weir_queue_batch_seconds_count{queue="0"}`); v < 1 {
		t.Errorf("no batch was timed: %v", v)
	}
	if t.Failed() {
		t.Log(got)
	}
	r.stop(w)
}

// TestAccessLog: one line per request, in the file of the configuration in
// force, in the new file after a rotation and SIGHUP, until the very end.
func TestAccessLog(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 1})
	r.hello()
	base := r.text(setup{servers: []string{"s1=0"}})
	path := filepath.Join(r.dir, "access.log")
	with := func(format string) string {
		return base + fmt.Sprintf("log: {access: {path: %q, format: %s}}\n", path, format)
	}
	w := r.startWith(with("common"))
	lines := func(p string) []string {
		b, err := os.ReadFile(p)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	}
	logged := func(p, what string) string {
		t.Helper()
		line := ""
		until(t, 10*time.Second, "a line with "+what, func() bool {
			for _, l := range lines(p) {
				if strings.Contains(l, what) {
					line = l
				}
			}
			return line != ""
		})
		return line
	}
	// The engines get their rings a moment after the start.
	until(t, 10*time.Second, "the first line", func() bool { r.mustAsk("/first"); return lines(path)[0] != "" })
	r.mustAsk("/one")
	want := regexp.MustCompile(`^198\.18\.\d+\.\d+ - - \[[^]]+\] "GET /one HTTP/1\.1" 200 \d+$`)
	if l := logged(path, "/one"); !want.MatchString(l) {
		t.Errorf("line %q", l)
	}
	// What a client sends cannot make a line of its own.
	c, err := r.Clients[0].Dial(t.Context(), "tcp", r.VIP().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, "GET /\x1b[2J\"x HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(c).ReadString('\n'); err != nil {
		t.Errorf("an answer: %v", err)
	}
	_ = c.Close()
	until(t, 10*time.Second, "the line of the bad request", func() bool { return strings.Contains(strings.Join(lines(path), "\n"), `" 400 `) })
	if b, _ := os.ReadFile(path); bytes.ContainsRune(b, 0x1b) {
		t.Errorf("a control character in the log: %q", b)
	}

	// Rotation.
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if err := w.Proc.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	until(t, 10*time.Second, "the new file", func() bool { r.mustAsk("/two"); _, err := os.Stat(path); return err == nil })

	// Another format, without a restart.
	r.rewrite(with("json"))
	r.mustWeir("reload")
	until(t, 10*time.Second, "a line of the new format", func() bool {
		r.mustAsk("/three")
		return strings.Contains(strings.Join(lines(path), "\n"), `"target":"/three"`)
	})
	var entry struct {
		Farm, Server, Method, Target, End string
		Status                            int
		Reused                            *bool
		Total                             *int64 `json:"total_us"`
	}
	if err := json.Unmarshal([]byte(logged(path, "/three")), &entry); err != nil {
		t.Fatal(err)
	}
	if entry.Farm != "web" || entry.Server != "s1" || entry.Method != "GET" || entry.Status != 200 || entry.End != "served" || entry.Reused == nil || entry.Total == nil {
		t.Errorf("entry %+v", entry)
	}

	// A socket that nobody reads costs lines, not requests.
	sock := filepath.Join(r.dir, "log.sock")
	u, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: sock, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	r.rewrite(base + fmt.Sprintf("log: {access: {path: %q, format: json}}\n", sock))
	r.mustWeir("reload")
	for i := range 300 {
		r.mustAsk("/flood" + strconv.Itoa(i))
	}
	// And off.
	r.rewrite(base)
	r.mustWeir("reload")
	r.mustAsk("/off")
	r.stop(w)
	if b, _ := os.ReadFile(path); bytes.Contains(b, []byte("/off")) {
		t.Error("a line although the log is off")
	}
}
