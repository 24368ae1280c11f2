// SPDX-License-Identifier: Apache-2.0

// Command tenant is an example of a plugin that is asked about requests: it
// sends each tenant, named by a header field, to servers of its own, and
// refuses tenants that it does not know.
package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/weirgate/weir/policies"
)

// tenant is the policy of one farm.
type tenant struct {
	Tenants map[string][]string `json:"tenants"` // to servers
	Unknown uint16              `json:"unknown"` // status for others
	TTL     time.Duration       `json:"ttl"`     // how long Weir may keep an answer
}

// Configure reads {"tenants": {"blue": ["s1"]}, "unknown": 403, "ttl": "10s"}.
func (p *tenant) Configure(farm policies.Farm, config []byte) error {
	*p = tenant{Unknown: 403, TTL: 10 * time.Second}
	if err := policies.Decode(config, p); err != nil {
		return err
	}
	var errs []error
	for name, servers := range p.Tenants {
		if len(servers) == 0 {
			errs = append(errs, policies.Errorf("config.tenants."+name, "has no servers"))
		}
		for i, s := range servers {
			if err := farm.CheckServer(fmt.Sprintf("config.tenants.%s[%d]", name, i), s); err != nil {
				errs = append(errs, err)
			}
		}
	}
	if p.Unknown < 400 || p.Unknown > 599 {
		errs = append(errs, policies.Errorf("config.unknown", "is %d, expected a status from 400 to 599", p.Unknown))
	}
	return errors.Join(errs...)
}

// Tick has nothing to send: this plugin is only asked.
func (p *tenant) Tick(policies.Farm, *policies.Telemetry) (*policies.Snapshot, error) {
	return nil, nil
}

// Decide looks the tenant up. Weir keeps the answer under the field's value, so
// that the next request of the tenant waits for nobody.
func (p *tenant) Decide(_ policies.Farm, q *policies.Question) (*policies.Answer, error) {
	servers, ok := p.Tenants[q.Header("X-Tenant")]
	if !ok {
		return &policies.Answer{Reject: p.Unknown, TTL: p.TTL}, nil
	}
	return &policies.Answer{Servers: servers, TTL: p.TTL}, nil
}

func main() {
	policies.Serve(policies.Plugin{
		Name: "tenant", Version: "1.0.0",
		New: func() policies.Policy { return new(tenant) },
		Ask: &policies.AskKey{Fields: []policies.Field{{Name: "X-Tenant"}}},
	})
}
