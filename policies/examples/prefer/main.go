// SPDX-License-Identifier: Apache-2.0

// Command prefer is a complete policy plugin: it gives one server a better
// score than the others.
package main

import "github.com/weirgate/weir/policies"

type prefer struct {
	Server string  `json:"server"`
	Score  float64 `json:"score"`
}

func (p *prefer) Configure(farm policies.Farm, config []byte) error {
	*p = prefer{Score: 10}
	if err := policies.Decode(config, p); err != nil {
		return err
	}
	return farm.CheckServer("config.server", p.Server)
}

func (p *prefer) Tick(policies.Farm, *policies.Telemetry) (*policies.Snapshot, error) {
	scores := []policies.Score{{Server: p.Server, Score: p.Score}}
	return &policies.Snapshot{Scores: &policies.Scores{Servers: scores}}, nil
}

func main() {
	policies.Serve(policies.Plugin{
		Name: "prefer", Version: "1.0.0", Sends: []policies.Kind{policies.SendsScores},
		New: func() policies.Policy { return new(prefer) },
	})
}
