// SPDX-License-Identifier: Apache-2.0

package module

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/plugins/host"
	"github.com/weirgate/weir/policies/snapshot"
)

// loaded reads a configuration of farms, written as "web: s1=11 s2=12*3;
// other: …" with the last numbers of servers' addresses and weights.
func loaded(t *testing.T, farms string) *config.Config {
	t.Helper()
	var b strings.Builder
	b.WriteString("source: {addresses: [198.51.100.1]}\nfarms:\n")
	for i, f := range strings.Split(farms, ";") {
		name, servers, _ := strings.Cut(strings.TrimSpace(f), ":")
		fmt.Fprintf(&b, "  - name: %s\n    listen: 203.0.113.%d:80\n    servers:\n", name, 10+i)
		for s := range strings.FieldsSeq(servers) {
			name, rest, _ := strings.Cut(s, "=")
			host, weight, ok := strings.Cut(rest, "*")
			if !ok {
				weight = "1"
			}
			fmt.Fprintf(&b, "      - {name: %s, address: 198.51.100.%s:80, weight: %s}\n", name, host, weight)
		}
	}
	file := filepath.Join(t.TempDir(), "weir.yaml")
	if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(config.LoadOptions{Files: []string{file}})
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// servers writes a farm's servers as loaded reads them.
func servers(c *config.Config, farm string) string {
	f := c.Farm(farm)
	if f == nil {
		return "none"
	}
	var out []string
	for _, s := range f.Servers {
		b := s.Address.Addr().As4()
		out = append(out, fmt.Sprintf("%s=%d*%d", s.Name, b[3], s.Weight))
	}
	return strings.Join(out, " ")
}

// TestOverrides: an override stands over what the files say, until they say
// something else about just that.
func TestOverrides(t *testing.T) {
	const base = "web: s1=11 s2=12*2; api: s1=11"
	weight := control.Override{Farm: "web", Server: "s2", Weight: 9, FileWeight: 2, FileAddress: "198.51.100.12:80"}
	drain := control.Override{Farm: "web", Server: "s2", State: "drain", FileWeight: 2, FileAddress: "198.51.100.12:80"}
	both := weight
	both.State = "maint"
	added := control.Override{Farm: "web", Server: "s3", Added: true, Weight: 4, Address: "198.51.100.13:80"}
	removed := control.Override{Farm: "web", Server: "s1", Removed: true, FileWeight: 1, FileAddress: "198.51.100.11:80"}
	for _, c := range []struct {
		name  string
		o     control.Override
		files string // what they say after the change
		want  string // of farm web
		notes int
		state string // of the override that is kept
	}{
		{"weight", weight, base, "s1=11*1 s2=12*9", 0, ""},
		{"weight, the other server changes", weight, "web: s1=11*7 s2=12*2", "s1=11*7 s2=12*9", 0, ""},
		{"weight, the file's too", weight, "web: s1=11 s2=12*3", "s1=11*1 s2=12*3", 1, ""},
		{"weight, the server moves", weight, "web: s1=11 s2=22*2", "s1=11*1 s2=22*2", 1, ""},
		{"weight, the server goes", weight, "web: s1=11", "s1=11*1", 1, ""},
		{"weight, the farm goes", weight, "api: s1=11", "none", 1, ""},
		{"state", drain, base, "s1=11*1 s2=12*2", 0, "drain"},
		{"state, the weight changes", drain, "web: s1=11 s2=12*5", "s1=11*1 s2=12*5", 0, "drain"},
		{"state, the server moves", drain, "web: s1=11 s2=22*2", "s1=11*1 s2=22*2", 1, ""},
		{"both, the weight changes", both, "web: s1=11 s2=12*5", "s1=11*1 s2=12*5", 1, "maint"},
		{"added", added, base, "s1=11*1 s2=12*2 s3=13*4", 0, ""},
		{"added, then in the files", added, "web: s1=11 s3=33", "s1=11*1 s3=33*1", 1, ""},
		{"removed", removed, base, "s2=12*2", 0, ""},
		{"removed, then moved", removed, "web: s1=21 s2=12*2", "s1=21*1 s2=12*2", 1, ""},
		{"removed, then gone", removed, "web: s2=12*2", "s2=12*2", 1, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := loaded(t, c.files)
			before := servers(file, "web")
			kept, notes := keptOverrides([]control.Override{c.o}, file)
			if got := servers(withOverrides(file, kept), "web"); got != c.want || len(notes) != c.notes {
				t.Errorf("%s with %d notes %q, want %s with %d", got, len(notes), notes, c.want, c.notes)
			}
			if servers(file, "web") != before {
				t.Error("the files' configuration itself changed")
			}
			state := ""
			if len(kept) > 0 {
				state = kept[0].State
			}
			if state != c.state {
				t.Errorf("state %q, want %q", state, c.state)
			}
		})
	}
	if file := loaded(t, base); withOverrides(file, nil) != file {
		t.Error("without overrides it is another configuration")
	}
}

func spec(t *testing.T, c *config.Config) farm.Spec {
	t.Helper()
	s, err := farmSpec(c, func(_, _ string) (*snapshot.Snapshot, host.About) { return nil, host.About{} })
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestDrains: what is gone from the configuration drains, what comes back does
// not.
func TestDrains(t *testing.T) {
	a, b := loaded(t, "web: s1=11 s2=12; old: s1=31"), loaded(t, "web: s1=11 s2=22")
	db, err := farm.Build(nil, spec(t, a))
	if err != nil {
		t.Fatal(err)
	}
	at := time.Unix(1000, 0)
	var d drains
	if !d.empty() {
		t.Error("nothing drains")
	}
	after := d.with(a, b, db, at)
	var names []string
	for id, s := range after.servers {
		if db.Server(id).Name != s.name || !s.until.Equal(at.Add(time.Minute)) {
			t.Errorf("%d: %+v", id, s)
		}
		names = append(names, s.farm+"/"+s.name+" "+s.addr.String())
	}
	if len(names) != 2 || !strings.Contains(strings.Join(names, ","), "web/s2 198.51.100.12:80") || !strings.Contains(strings.Join(names, ","), "old/s1 198.51.100.31:80") {
		t.Errorf("%q", names)
	}
	vip := netip.MustParseAddrPort("203.0.113.11:80")
	if _, ok := after.vips[vip]; !ok || len(after.vips) != 1 {
		t.Errorf("%v", after.vips)
	}
	if !d.empty() {
		t.Error("the receiver changed")
	}
	// Draining goes on under its first deadline; what comes back is out of it.
	db2, err := farm.Build(db, spec(t, b))
	if err != nil {
		t.Fatal(err)
	}
	again := after.with(b, loaded(t, "web: s1=11 s2=12"), db2, at.Add(time.Hour))
	for _, s := range again.servers {
		switch s.farm + "/" + s.name + " " + s.addr.String() {
		case "old/s1 198.51.100.31:80":
			if !s.until.Equal(at.Add(time.Minute)) {
				t.Errorf("the deadline moved: %+v", s)
			}
		case "web/s2 198.51.100.22:80":
		default:
			t.Errorf("%+v", s)
		}
	}
	if len(again.servers) != 2 {
		t.Errorf("%+v", again.servers)
	}
}

// TestSetStates: states follow the overrides, and a server that is down stays.
func TestSetStates(t *testing.T) {
	db, err := farm.Build(nil, spec(t, loaded(t, "web: s1=11 s2=12 s3=13")))
	if err != nil {
		t.Fatal(err)
	}
	s := db.Farms[0].Servers
	s[1].Live.State.Store(uint32(snapshot.Drain))
	s[2].Live.State.Store(uint32(snapshot.Down))
	setStates(db, []control.Override{{Farm: "web", Server: "s1", State: "maint"}, {Farm: "no", Server: "s2", State: "maint"}})
	for i, want := range []snapshot.State{snapshot.Maint, snapshot.Ready, snapshot.Down} {
		if got := snapshot.State(s[i].Live.State.Load()); got != want {
			t.Errorf("%s is %v, want %v", s[i].Name, got, want)
		}
	}
}

// TestSchemaPath takes names out of paths.
func TestSchemaPath(t *testing.T) {
	for in, want := range map[string]string{
		"farms[web].servers[s1].weight": "farms[].servers[].weight", "queue.first": "queue.first",
		"farms[a].listen[203.0.113.1:80]": "farms[].listen[]", "farms[a].listen[[2001:db8::1]:80]": "farms[].listen[]",
	} {
		if got := schemaPath(in); got != want {
			t.Errorf("%s: %s", in, got)
		}
	}
	for in, want := range map[string][2]string{
		"farms[web].servers[s1].weight": {"web", "s1"}, "farms[web].listen[[2001:db8::1]:80]": {"web", ""}, "queue.first": {},
	} {
		if farm, server := namesIn(in); farm != want[0] || server != want[1] {
			t.Errorf("%s: %q, %q", in, farm, server)
		}
	}
}
