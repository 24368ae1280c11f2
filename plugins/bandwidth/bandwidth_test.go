// SPDX-License-Identifier: Apache-2.0

package main

import (
	"reflect"
	"strings"
	"testing"

	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/snapshot"
)

var farm = policies.Farm{Name: "web", Servers: []policies.Server{{Name: "s1"}, {Name: "s2"}, {Name: "s3"}}}

func TestBudgets(t *testing.T) {
	b := new(bandwidth)
	err := b.Configure(farm, []byte(`{
		"servers": {"s1": {"rate": "20Mbit", "burst": "256KiB"}, "s2": {"rate": "1Kbit", "at_cap": "ignore"}},
		"each": {"rate": "80Mbit"}, "farm": {"rate": "1Gbit"}, "at_cap": "wait"}`))
	if err != nil {
		t.Fatal(err)
	}
	snap, err := b.Tick(farm, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := policies.Budgets{
		Servers: []policies.Budget{
			{Server: "s1", Rate: 2.5e6, Burst: 262144, AtCap: snapshot.AtCapWait},
			{Server: "s2", Rate: 125, Burst: 65536, AtCap: snapshot.AtCapIgnore},
			{Server: "s3", Rate: 1e7, Burst: 1e6, AtCap: snapshot.AtCapWait},
		},
		Farm: &policies.Budget{Rate: 125e6, Burst: 12.5e6, AtCap: snapshot.AtCapWait},
	}
	if !reflect.DeepEqual(*snap.Budgets, want) {
		t.Errorf("%+v\nwant %+v", snap.Budgets, want)
	}
	if again, _ := b.Tick(farm, nil); again != snap {
		t.Error("the budgets are made anew although nothing changed")
	}
	if _, err := snapshot.NewSelector([]snapshot.ServerConfig{{Name: "s1"}, {Name: "s2"}, {Name: "s3"}}, []snapshot.Policy{{Name: "bandwidth", Snapshot: snap}}); err != nil {
		t.Error(err)
	}
}

func TestErrors(t *testing.T) {
	for _, c := range []struct{ config, want string }{
		{`{}`, "config: has none of servers, each and farm"},
		{`{"server": {}}`, "config.server: unknown key"},
		{`{"servers": {"s9": {"rate": "1Mbit"}}}`, `config.servers.s9: server "s9" is not in farm "web", which has s1, s2, s3`},
		{`{"servers": {"s1": {}}}`, "config.servers.s1.rate: is 0bit, expected a rate above 0"},
		{`{"servers": {"s1": null}}`, "config.servers.s1: is nothing"},
		{`{"servers": {"s1": {"rate": 5}}}`, "config.servers.s1.rate: is a number, expected a string"},
		{`{"servers": {"s1": {"rate": "fast"}}}`, `config.servers.s1.rate: "fast" is not a rate`},
		{`{"servers": {"s1": {"rate": "1Mbit", "burst": "1KB"}}}`, `config.servers.s1.burst: "1KB" is not a size`},
		{`{"each": {"rate": "1Mbit", "at_cap": "drop"}}`, `config.each.at_cap: is "drop", expected skip, wait or ignore`},
		{`{"farm": {"rate": "1Mbit"}, "at_cap": "drop"}`, `config.at_cap: is "drop"`},
	} {
		b := new(bandwidth)
		if err := b.Configure(farm, []byte(c.config)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", c.config, err, c.want)
		}
		if b.snap != nil {
			t.Errorf("%s: refused, and yet there are budgets", c.config)
		}
	}
}
