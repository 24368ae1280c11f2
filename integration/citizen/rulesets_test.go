// SPDX-License-Identifier: Apache-2.0

package citizen

import (
	"encoding/json"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/nft"
)

// A ruleset of somebody else and how it is loaded and changed.
type ruleset struct {
	name string
	load func(r *rig)
	// blocked: without the change requests get no answer.
	blocked bool
	// change makes the change that docs/firewalls.md tells of; nil for none.
	change func(r *rig)
	// forwards is a port forward of that ruleset to the first server.
	forwards bool
}

const acceptMark = "meta mark & 0xff000000 == 0x57000000 accept"

// file loads a ruleset from testdata by its ending: nft's syntax, or that of
// iptables-restore in the variant.
func file(name, variant string) func(r *rig) {
	return func(r *rig) {
		r.t.Helper()
		abs, err := filepath.Abs("testdata/" + name)
		if err != nil {
			r.t.Fatal(err)
		}
		tool := "nft -f "
		switch filepath.Ext(name) {
		case ".v4":
			tool = "iptables-" + variant + "-restore < "
		case ".v6":
			tool = "ip6tables-" + variant + "-restore < "
		}
		require.Tool(r.t, strings.Fields(tool)[0])
		r.shell(tool + abs)
	}
}

func several(fs ...func(r *rig)) func(r *rig) {
	return func(r *rig) {
		r.t.Helper()
		for _, f := range fs {
			f(r)
		}
	}
}

// rules applies a block of docs/firewalls.md in nft's syntax.
func rules(info string) func(r *rig) {
	return func(r *rig) { r.t.Helper(); r.nft(documented(r.t, "firewalls.md", info)) }
}

// commands runs a block of docs/firewalls.md that calls iptables, in one of the
// variants.
func commands(info, variant string) func(r *rig) {
	return func(r *rig) {
		r.t.Helper()
		r.shell(regexp.MustCompile(`(?m)^(ip6?tables) `).ReplaceAllString(documented(r.t, "firewalls.md", info), "$1-"+variant+" "))
	}
}

var rulesets = []ruleset{
	{name: "router", load: file("router.nft", ""), blocked: true, forwards: true, change: rules("nft router")},
	{
		name: "iptables-nft", load: several(file("iptables.v4", "nft"), file("iptables.v6", "nft")), blocked: true, forwards: true,
		change: commands("sh iptables", "nft"),
	},
	{
		name: "iptables-legacy", load: several(file("iptables.v4", "legacy"), file("iptables.v6", "legacy")), blocked: true, forwards: true,
		change: commands("sh iptables", "legacy"),
	},
	{
		name: "ufw", load: several(file("ufw.v4", "nft"), file("ufw.v6", "nft")), blocked: true,
		change: func(r *rig) {
			// What ufw makes of the lines: they are the first of their chains.
			for program, block := range map[string]string{"iptables-nft": "text before.rules", "ip6tables-nft": "text before6.rules"} {
				for line := range strings.Lines(documented(r.t, "firewalls.md", block)) {
					r.shell(program + strings.Replace(" "+line, " -A ", " -I ", 1))
				}
			}
		},
	},
	{
		name: "firewalld", load: file("firewalld.nft", ""), blocked: true,
		change: func(r *rig) {
			// The commands need a running firewalld; they are the ones that the
			// doctor gives. What firewalld makes of the policy is a file; its
			// reload replaces its table.
			want := strings.Split(strings.TrimSpace(documented(r.t, "firewalls.md", "sh firewalld")), "\n")
			told := slices.ContainsFunc(r.foreign(), func(f nft.Finding) bool { return slices.Equal(strings.Split(f.Fix, " && "), want) })
			if !told {
				r.t.Error("docs/firewalls.md and weir doctor tell different commands for firewalld")
			}
			r.shell("nft delete table inet firewalld")
			file("firewalld-changed.nft", "")(r)
		},
	},
	{name: "docker", load: several(file("docker.v4", "nft"), file("docker.v6", "nft")), blocked: true, change: commands("sh docker", "nft")},
	{
		name: "fw4", load: file("fw4.nft", ""), blocked: true, forwards: true,
		// What fw4 makes of the file that it includes.
		change: func(r *rig) { r.nft("insert rule inet fw4 forward " + documented(r.t, "firewalls.md", "nft fw4")) },
	},
	{name: "bans", load: file("bans.nft", "")},
	{
		name: "synproxy", load: file("synproxy.nft", ""), blocked: true,
		change: func(r *rig) {
			rules("nft synproxy")(r)
			// The file has no ban list of its own.
			r.nft("table inet bans {\nchain i {\ntype filter hook input priority 0;\nip saddr 198.18.0.12 drop\nip6 saddr 2001:db8:18::c drop\n}\n}\n")
		},
	},
}

// others is the text of all tables but ours, with handles and without what
// changes by traffic and time.
func (r *rig) others() string {
	r.t.Helper()
	text := r.shell("nft -s -a list ruleset")
	var out strings.Builder
	skip := false
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "table ") {
			family, table, _ := strings.Cut(strings.TrimPrefix(line, "table "), " ")
			skip = strings.HasPrefix(table, "weir ") && strings.HasPrefix(family, "i") // inet, ip, ip6
		}
		if !skip {
			out.WriteString(line)
		}
	}
	for _, tool := range []string{"iptables-legacy-save", "ip6tables-legacy-save"} {
		for line := range strings.Lines(r.shell("command -v " + tool + " >/dev/null && " + tool + " || true")) {
			if !strings.HasPrefix(line, "#") {
				out.WriteString(line)
			}
		}
	}
	return regexp.MustCompile(` expires \w+|\[\d+:\d+\]|packets \d+ bytes \d+`).ReplaceAllString(out.String(), "")
}

// doctorFinds runs weir doctor --probe beside the running instance. It has to
// name the chains of these findings and no others, by reading and by probe
// packets; without any, all probes have to pass.
func (r *rig) doctorFinds(want []nft.Finding) {
	r.t.Helper()
	out := r.shell(r.bin + " doctor --probe -o json --config " + r.dir + "/weir.yaml || true")
	var list []struct{ Check, Level, Text string }
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		r.t.Fatalf("%v: %s", err, out)
	}
	named, passed := 0, false
	for _, f := range list {
		switch {
		case f.Check == "tables" && f.Level != "ok":
			named++
			if !slices.ContainsFunc(want, func(w nft.Finding) bool {
				return strings.HasPrefix(f.Text, w.Place()+": ") && strings.Contains(f.Text, w.Rule)
			}) {
				r.t.Errorf("the doctor finds without need: %+v", f)
			}
		case f.Check == "probes" && f.Level == "ok":
			passed = true
		case len(want) == 0 && (f.Level == "warn" || f.Level == "fail"):
			r.t.Errorf("the doctor finds without need: %+v", f)
		}
	}
	if named != len(want) || passed != (len(want) == 0) {
		r.t.Errorf("the doctor names %d chains, want %d; all probes came through: %v\n%s", named, len(want), passed, out)
	}
}

// TestBesideRulesets: beside each ruleset, weir serves after the documented
// change, the ruleset goes on deciding who may come, and stays as it is.
func TestBesideRulesets(t *testing.T) {
	for _, c := range rulesets {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, lab.FarmOptions{Clients: 2, Servers: 2})
			r.serve(r.both)
			// Something that others forward ports to.
			for i, h := range r.Servers {
				if _, err := lab.HTTPServer(h, netip.AddrPortFrom(r.ServerAddr(i), 8081).String(), handler(h.Name())); err != nil {
					t.Fatal(err)
				}
			}
			c.load(r)
			w := r.start()
			watch := r.watch()
			found := r.foreign()
			vips := []netip.AddrPort{r.VIP(), r.VIP6()}
			if c.blocked {
				// The negative control of the change, and of the findings.
				if len(found) == 0 {
					t.Error("nothing is found that stands in the way")
				}
				atOnce(vips, func(v netip.AddrPort) {
					if err := ask(r.Clients[0], v, "/before", 1500*time.Millisecond); err == nil {
						t.Errorf("%v: a request is served without the change", v)
					}
				})
			} else {
				for i := range found {
					t.Errorf("found without need: %s", &found[i])
				}
			}
			r.doctorFinds(found)
			if c.change != nil {
				c.change(r)
			}
			r.doctorFinds(nil)
			still := r.foreign()
			for i := range still {
				t.Errorf("after the change there is still: %s", &still[i])
			}
			before := r.others()
			for _, v := range vips {
				if err := ask(r.Clients[0], v, "/first", 20*time.Second); err != nil {
					t.Fatalf("%v: %v", v, err)
				}
			}
			r.mustLoad(1000, vips...)
			atOnce(vips, func(v netip.AddrPort) {
				if err := ask(r.Clients[1], v, "/banned", 700*time.Millisecond); err == nil {
					t.Errorf("the banned client is served by %v", v)
				}
			})
			if c.forwards {
				fwd := netip.MustParseAddrPort("198.18.0.1:8081")
				if err := ask(r.Clients[0], fwd, "/forwarded", 10*time.Second); err != nil {
					t.Errorf("the port forward: %v", err)
				}
			}
			if now := r.others(); now != before {
				t.Errorf("the tables of others are now\n%s\nbefore\n%s", now, before)
			}
			watch.judge()
			r.stop(w)
			if now := r.others(); now != before {
				t.Errorf("after the stop the tables of others are\n%s\nbefore\n%s", now, before)
			}
		})
	}
}

// TestBanOfOneServed: a ban acts on a client's next connection, not on its
// running ones, as with any firewall that accepts what is established.
func TestBanOfOneServed(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 1})
	r.serve(r.both)
	r.nft("table inet bans {\nset banned { type ipv4_addr; }\nset banned6 { type ipv6_addr; }\n" +
		"chain i {\ntype filter hook input priority 0;\nip saddr @banned drop\nip6 saddr @banned6 drop\n}\n}\n")
	w := r.start()
	watch := r.watch()
	vips := []netip.AddrPort{r.VIP(), r.VIP6()}
	running := map[netip.AddrPort]*connection{}
	for _, vip := range vips {
		running[vip] = keep(t, r.Clients[0], vip)
	}
	r.nft("add element inet bans banned { 198.18.0.11 }\nadd element inet bans banned6 { 2001:db8:18::b }")
	for _, vip := range vips {
		if err := running[vip].get("/two", 20*time.Second); err != nil {
			t.Errorf("%v: the running connection: %v", vip, err)
		}
		if err := ask(r.Clients[0], vip, "/new", 700*time.Millisecond); err == nil {
			t.Errorf("%v: the banned client opens a new connection", vip)
		}
	}
	watch.judge()
	r.stop(w)
}

// TestFindingsAreExact: the places that Foreign names are those where packets
// end, told by counters in front of each.
func TestFindingsNamePlaces(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 1})
	file("router.nft", "")(r)
	var places []string
	for _, f := range r.foreign() {
		if f.Trouble == nft.DropsMarked {
			places = append(places, f.Place())
		}
	}
	want := []string{"inet filter reverse_path", "inet filter forward", "inet filter output"}
	if !slices.Equal(places, want) {
		t.Errorf("found %q, want %q", places, want)
	}
}
