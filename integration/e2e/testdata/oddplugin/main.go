// SPDX-License-Identifier: Apache-2.0

// Command oddplugin is a policy plugin for tests: it misbehaves as the file says
// that its first argument names, or, without a file, as that argument says; or
// it answers questions as its configuration says.
package main

import (
	"crypto/rand"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/weirgate/weir/policies"
)

type odd struct {
	Delay time.Duration `json:"delay"` // of Decide; below 0: for ever, or until there is a file that the second argument names
	Score float64       `json:"score"`
	mode  string
	began time.Time
}

func (o *odd) Configure(_ policies.Farm, config []byte) error {
	return policies.Decode(config, o)
}

func (o *odd) Tick(farm policies.Farm, _ *policies.Telemetry) (*policies.Snapshot, error) {
	switch {
	case o.mode == "late" && !o.began.IsZero():
		time.Sleep(10 * time.Second)
	case o.mode == "crash" && !o.began.IsZero():
		os.Exit(3)
	}
	o.began = time.Now()
	return &policies.Snapshot{Scores: &policies.Scores{Servers: []policies.Score{{Server: farm.Servers[0].Name, Score: max(o.Score, 0.5)}}}}, nil
}

func (o *odd) Decide(farm policies.Farm, q *policies.Question) (*policies.Answer, error) {
	for o.Delay < 0 && !opened() {
		time.Sleep(10 * time.Millisecond)
	}
	time.Sleep(max(o.Delay, 0))
	last := []string{farm.Servers[len(farm.Servers)-1].Name}
	switch {
	case strings.HasPrefix(q.Path, "/forbidden"):
		return &policies.Answer{Reject: 403}, nil
	case strings.HasPrefix(q.Path, "/banned"):
		return &policies.Answer{Reject: 403, Ban: 3 * time.Second}, nil
	case strings.HasPrefix(q.Path, "/marked"):
		return &policies.Answer{Servers: last, Mark: 0x10}, nil
	}
	return &policies.Answer{Servers: last}, nil
}

// opened says whether the file is there that ends the wait.
func opened() bool {
	if len(os.Args) < 3 {
		return false
	}
	_, err := os.Stat(os.Args[2])
	return err == nil
}

func main() {
	mode := ""
	if len(os.Args) > 1 {
		mode = os.Args[1]
		if b, err := os.ReadFile(mode); err == nil {
			mode = string(b)
		}
	}
	p := policies.Plugin{Name: "odd", Version: "1", New: func() policies.Policy { return &odd{mode: mode} }}
	switch mode {
	case "ask":
		p.Ask = &policies.AskKey{Path: true, Client: true}
	case "garbage":
		b := make([]byte, 100_000)
		_, _ = rand.Read(b)
		_, _ = os.Stdout.Write(b)
		time.Sleep(time.Minute)
	case "version":
		fmt.Println("1|9|unix|/proc/self/fd/3/x|grpc|")
		time.Sleep(time.Minute)
	case "exit":
		os.Exit(7)
	default:
		p.Sends = []policies.Kind{policies.SendsScores}
	}
	policies.Serve(p)
}
