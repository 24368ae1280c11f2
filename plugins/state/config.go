// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/weirgate/weir/policies"
)

// config is the plugin's configuration for one farm, complete with defaults.
type config struct {
	Probe   *probeConfig      `json:"probe"`
	Passive passiveConfig     `json:"passive"`
	Damping dampingConfig     `json:"damping"`
	Servers map[string]string `json:"servers"`
}

type probeConfig struct {
	TCP          bool          `json:"tcp"`
	HTTP         string        `json:"http"`
	Method       string        `json:"method"`
	Host         string        `json:"host"`
	Port         uint16        `json:"port"`
	Expect       expectation   `json:"expect"`
	Interval     time.Duration `json:"interval"`
	FastInterval time.Duration `json:"fast_interval"`
	Jitter       *float64      `json:"jitter"`
	Timeout      time.Duration `json:"timeout"`
	Fall         int           `json:"fall"`
	Rise         int           `json:"rise"`
}

type expectation struct {
	Status []statusRange `json:"status"`
	Body   string        `json:"body"`
}

type passiveConfig struct {
	Off          bool          `json:"off"`
	Errors       int           `json:"errors"`
	Window       time.Duration `json:"window"`
	Ratio        float64       `json:"ratio"`
	ServerErrors bool          `json:"server_errors"`
	Late         time.Duration `json:"late"`
	Hold         time.Duration `json:"hold"`
	Most         float64       `json:"most"`
}

type dampingConfig struct {
	Flaps  int           `json:"flaps"`
	Window time.Duration `json:"window"`
	Hold   time.Duration `json:"hold"`
	Max    time.Duration `json:"max"`
}

// statusRange is a status, or FIRST-LAST.
type statusRange struct{ first, last int }

// UnmarshalText reads "200" or "200-399".
func (r *statusRange) UnmarshalText(t []byte) error {
	a, b, two := strings.Cut(string(t), "-")
	if !two {
		b = a
	}
	var err1, err2 error
	r.first, err1 = strconv.Atoi(a)
	r.last, err2 = strconv.Atoi(b)
	if err1 != nil || err2 != nil || r.first < 100 || r.last > 599 || r.first > r.last {
		return fmt.Errorf(`%q is neither a status nor a range such as "200-399"`, t)
	}
	return nil
}

// words are what an operator can say about a server.
var words = []string{"ready", "drain", "maint", "down"}

// read reads the configuration strictly. Every error is reported.
func read(farm policies.Farm, raw []byte) (*config, error) {
	c := &config{
		Passive: passiveConfig{Errors: 5, Window: 10 * time.Second, Ratio: 0.5, ServerErrors: true, Hold: 10 * time.Second, Most: 0.5},
		Damping: dampingConfig{Flaps: 3, Window: 5 * time.Minute, Hold: 30 * time.Second, Max: 10 * time.Minute},
	}
	if err := policies.Decode(raw, c); err != nil {
		return nil, err
	}
	var errs []error
	fail := func(key, format string, args ...any) { errs = append(errs, policies.Errorf(key, format, args...)) }
	between := func(key string, d, least, most time.Duration) {
		if d < least || d > most {
			fail(key, "is %s, expected %s to %s", d, least, most)
		}
	}
	fraction := func(key string, v, most float64) {
		if !(v >= 0 && v <= most) {
			fail(key, "is %g, expected 0 to %g", v, most)
		}
	}
	number := func(key string, n, most int) {
		if n < 1 || n > most {
			fail(key, "is %d, expected 1 to %d", n, most)
		}
	}
	if p := c.Probe; p != nil {
		def := func(d *time.Duration, v time.Duration) {
			if *d == 0 {
				*d = v
			}
		}
		def(&p.Interval, 2*time.Second)
		def(&p.FastInterval, p.Interval/4)
		def(&p.Timeout, p.Interval)
		if p.Fall == 0 {
			p.Fall = 3
		}
		if p.Rise == 0 {
			p.Rise = 2
		}
		if p.Jitter == nil {
			p.Jitter = new(float64)
			*p.Jitter = 0.1
		}
		between("config.probe.interval", p.Interval, 50*time.Millisecond, time.Hour)
		between("config.probe.fast_interval", p.FastInterval, 10*time.Millisecond, p.Interval)
		between("config.probe.timeout", p.Timeout, 10*time.Millisecond, time.Hour)
		fraction("config.probe.jitter", *p.Jitter, 0.5)
		number("config.probe.fall", p.Fall, 100)
		number("config.probe.rise", p.Rise, 100)
		if p.TCP == (p.HTTP != "") {
			fail("config.probe", "has %s of tcp and http, expected exactly one", map[bool]string{true: "both", false: "none"}[p.TCP])
		}
		if p.HTTP == "" && (p.Method != "" || p.Host != "" || p.Expect.Status != nil || p.Expect.Body != "") {
			fail("config.probe", "has method, host or expect, which are for http")
		}
		if p.HTTP != "" {
			if !strings.HasPrefix(p.HTTP, "/") || strings.ContainsAny(p.HTTP, " \r\n\t#") {
				fail("config.probe.http", "is %q, expected a path such as /healthz", p.HTTP)
			}
			if p.Method == "" {
				p.Method = "GET"
			}
			if p.Method != "GET" && p.Method != "HEAD" {
				fail("config.probe.method", "is %q, expected GET or HEAD", p.Method)
			}
			if p.Method == "HEAD" && p.Expect.Body != "" {
				fail("config.probe.expect.body", "cannot be expected of HEAD")
			}
			if strings.ContainsAny(p.Host, " \r\n\t/") {
				fail("config.probe.host", "is %q, expected a host, with a port or not", p.Host)
			}
			if p.Expect.Status == nil {
				p.Expect.Status = []statusRange{{200, 399}}
			}
		}
	}
	if !c.Passive.Off {
		number("config.passive.errors", c.Passive.Errors, 1_000_000)
		between("config.passive.window", c.Passive.Window, time.Second, time.Hour)
		between("config.passive.hold", c.Passive.Hold, 100*time.Millisecond, time.Hour)
		between("config.passive.late", c.Passive.Late, 0, time.Hour)
		fraction("config.passive.ratio", c.Passive.Ratio, 1)
		fraction("config.passive.most", c.Passive.Most, 1)
	}
	number("config.damping.flaps", c.Damping.Flaps, 1000)
	between("config.damping.window", c.Damping.Window, time.Second, 24*time.Hour)
	between("config.damping.hold", c.Damping.Hold, 0, 24*time.Hour)
	between("config.damping.max", c.Damping.Max, c.Damping.Hold, 24*time.Hour)
	for _, name := range slices.Sorted(maps.Keys(c.Servers)) {
		if err := farm.CheckServer("config.servers."+name, name); err != nil {
			errs = append(errs, err)
		} else if !slices.Contains(words, c.Servers[name]) {
			fail("config.servers."+name, "is %q, expected one of %s", c.Servers[name], strings.Join(words, ", "))
		}
	}
	return c, errors.Join(errs...)
}
