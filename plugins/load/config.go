// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"strings"
	"time"

	"github.com/weirgate/weir/policies"
)

// config is the plugin's configuration for one farm, complete with defaults.
type config struct {
	HalfLife  time.Duration `json:"half_life"`
	Peak      float64       `json:"peak"`
	Tolerance float64       `json:"tolerance"`
	Floor     time.Duration `json:"floor"`
	Min       float64       `json:"min"`
	Max       float64       `json:"max"`
	SlowStart time.Duration `json:"slow_start"`
	Agent     *agentConfig  `json:"agent"`
}

type agentConfig struct {
	HTTP     string        `json:"http"`
	Line     bool          `json:"line"`
	Send     string        `json:"send"`
	Port     uint16        `json:"port"`
	Interval time.Duration `json:"interval"`
	Timeout  time.Duration `json:"timeout"`
	Expiry   time.Duration `json:"expiry"`
}

// read reads the configuration strictly. Every error is reported.
func read(raw []byte) (*config, error) {
	c := &config{HalfLife: 5 * time.Second, Tolerance: 0.4, Floor: time.Millisecond, Min: 0.1, Max: 4, SlowStart: 10 * time.Second}
	if err := policies.Decode(raw, c); err != nil {
		return nil, err
	}
	var errs []error
	fail := func(key, format string, args ...any) { errs = append(errs, policies.Errorf(key, format, args...)) }
	number := func(key string, v, least, most float64) {
		if !(v >= least && v <= most) {
			fail(key, "is %g, expected %g to %g", v, least, most)
		}
	}
	between := func(key string, d, least, most time.Duration) {
		if d < least || d > most {
			fail(key, "is %s, expected %s to %s", d, least, most)
		}
	}
	between("config.half_life", c.HalfLife, 100*time.Millisecond, time.Hour)
	between("config.slow_start", c.SlowStart, 0, time.Hour)
	between("config.floor", c.Floor, 0, time.Minute)
	number("config.peak", c.Peak, 0, 1)
	number("config.tolerance", c.Tolerance, 0, 0.9)
	number("config.min", c.Min, 0.01, 1)
	number("config.max", c.Max, 1, 100)
	if a := c.Agent; a != nil {
		def := func(d *time.Duration, v time.Duration) {
			if *d == 0 {
				*d = v
			}
		}
		def(&a.Interval, 2*time.Second)
		def(&a.Timeout, min(a.Interval, time.Second))
		def(&a.Expiry, 3*a.Interval)
		between("config.agent.interval", a.Interval, 50*time.Millisecond, time.Hour)
		between("config.agent.timeout", a.Timeout, 10*time.Millisecond, time.Minute)
		between("config.agent.expiry", a.Expiry, a.Interval, 24*time.Hour)
		switch {
		case a.Line == (a.HTTP != ""):
			fail("config.agent", "has %s of http and line, expected exactly one", map[bool]string{true: "both", false: "none"}[a.Line])
		case a.Line && a.Port == 0:
			fail("config.agent.port", "is needed with line")
		case a.HTTP != "" && a.Send != "":
			fail("config.agent.send", "is for line")
		case a.HTTP != "" && (!strings.HasPrefix(a.HTTP, "/") || strings.ContainsAny(a.HTTP, " \r\n\t#")):
			fail("config.agent.http", "is %q, expected a path such as /load", a.HTTP)
		}
	}
	return c, errors.Join(errs...)
}
