// SPDX-License-Identifier: Apache-2.0

// Command broken is a plugin that breaks the promise that its argument names.
package main

import (
	"fmt"
	"os"
	"time"

	"github.com/weirgate/weir/policies"
)

type broken struct {
	mode  string
	snap  *policies.Snapshot
	ticks int
}

func (b *broken) Configure(farm policies.Farm, config []byte) error {
	if b.mode != "lenient" {
		if err := policies.Decode(config, b); err != nil {
			return err
		}
	}
	server := farm.Servers[0].Name
	if b.mode == "stranger" {
		server = "nobody"
	}
	b.snap = &policies.Snapshot{Scores: &policies.Scores{Servers: []policies.Score{{Server: server, Score: 2}}}}
	if b.mode == "undeclared" {
		b.snap.Eligibility = &policies.Eligibility{}
	}
	return nil
}

func (b *broken) Tick(_ policies.Farm, t *policies.Telemetry) (*policies.Snapshot, error) {
	switch b.mode {
	case "silent":
		return nil, nil
	case "slow":
		if b.ticks++; b.ticks <= 2 {
			time.Sleep(1100 * time.Millisecond)
		}
	case "dies":
		if t.GetRequests() > 1<<60 {
			panic("out of cheese")
		}
	}
	return b.snap, nil
}

func main() {
	mode := os.Args[1]
	switch mode {
	case "mute":
		time.Sleep(time.Minute)
	case "greets":
		fmt.Println("hello")
		time.Sleep(time.Minute)
	case "stays":
		_ = os.Unsetenv(policies.EnvParentStdin)
	}
	p := policies.Plugin{Name: "broken", Version: "1", Sends: []policies.Kind{policies.SendsScores}, New: func() policies.Policy { return &broken{mode: mode} }}
	if mode == "nameless" {
		p.Version = ""
	}
	policies.Serve(p)
}
