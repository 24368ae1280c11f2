// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"net/http"
	"net/url"
	"time"
)

// PolicyProvider is what a Provider is that can tell about policies too.
type PolicyProvider interface {
	// ExplainPolicy chooses a server for a request that is made up, and says
	// why. Nothing is sent and nothing counted.
	ExplainPolicy(ctx context.Context, q PolicyQuery) (*PolicyExplanation, error)

	// Plugins tells about every plugin, by name.
	Plugins(ctx context.Context) ([]PluginDetail, error)
}

// PolicyQuery is a request to explain.
type PolicyQuery struct {
	Farm    string // "": the farm that the URL's host means, or the only one
	Method  string
	URL     string   // absolute, or a path
	Client  string   // the client's address; "": a made-up one
	Headers []string // "Name: value"
}

// PolicyExplanation is how a choice came about.
type PolicyExplanation struct {
	Farm    string       `json:"farm"`
	Outcome string       `json:"outcome"` // server, reject, redirect, wait or ask
	Server  string       `json:"server,omitempty"`
	Status  int          `json:"status,omitempty"`
	Reason  string       `json:"reason"`
	Steps   []PolicyStep `json:"steps"`
}

// PolicyStep is one step of a choice.
type PolicyStep struct {
	Policy     string `json:"policy,omitempty"` // "": the farm itself
	Text       string `json:"text"`
	Candidates int    `json:"candidates"` // servers left behind this step
}

// PluginDetail is one plugin process with what it said about its farms.
type PluginDetail struct {
	Name      string          `json:"name"`
	Version   string          `json:"version,omitempty"`
	Command   []string        `json:"command"`
	State     string          `json:"state"`
	Since     time.Time       `json:"since"`
	PID       int             `json:"pid,omitempty"`
	Restarts  uint64          `json:"restarts"`
	Resting   bool            `json:"resting,omitempty"` // it was started too often lately
	Error     string          `json:"error,omitempty"`   // why it last ended
	Decisions PluginDecisions `json:"decisions"`
	Farms     []PluginFarm    `json:"farms"`
}

// PluginDecisions counts the questions that a plugin was asked.
type PluginDecisions struct {
	Asked    uint64 `json:"asked"`
	Answered uint64 `json:"answered"`
	Late     uint64 `json:"late"`
	Failed   uint64 `json:"failed"`
	Busy     uint64 `json:"busy"`    // not sent: as many were open as may be
	Refused  uint64 `json:"refused"` // not sent: it does not run, or is given a rest
}

// PluginFarm is what a plugin said about a farm, and what came of it. The
// counts are since the farm has the policy.
type PluginFarm struct {
	Farm       string    `json:"farm"`
	Shadow     bool      `json:"shadow,omitempty"`
	Generation uint64    `json:"generation"` // of its snapshot; 0: none yet
	Received   time.Time `json:"received,omitzero"`
	LastTick   time.Time `json:"last_tick,omitzero"` // answered
	Expires    time.Time `json:"expires,omitzero"`
	Error      string    `json:"error,omitempty"` // of the last tick
	Decided    uint64    `json:"decided"`         // requests that it rejected, redirected, held or pinned
	Emptied    uint64    `json:"emptied"`         // it left no server, and was ignored
	Skipped    uint64    `json:"skipped"`         // its affinity's server was not to be had
	Asked      uint64    `json:"asked"`           // requests for which it was asked
	Cached     uint64    `json:"cached"`          // requests for which an answer was at hand
	Late       uint64    `json:"late"`            // requests that got no answer
	Compared   uint64    `json:"compared"`        // shadow: requests about which it had an opinion
	Agreed     uint64    `json:"agreed"`          // shadow: those that it would have allowed
}

// policyRoutes adds what is served for a PolicyProvider.
func policyRoutes(table map[string]map[string]handler, p Provider) {
	pp, ok := p.(PolicyProvider)
	if !ok {
		return
	}
	table["/v1/policy/explain"] = map[string]handler{http.MethodGet: func(w http.ResponseWriter, r *http.Request) error {
		v := r.URL.Query()
		x, err := pp.ExplainPolicy(r.Context(), PolicyQuery{
			Farm: v.Get("farm"), Method: v.Get("method"), URL: v.Get("url"), Client: v.Get("client"), Headers: v["header"],
		})
		if err == nil {
			answer(w, http.StatusOK, x)
		}
		return err
	}}
	table["/v1/plugins"] = map[string]handler{http.MethodGet: func(w http.ResponseWriter, r *http.Request) error {
		list, err := pp.Plugins(r.Context())
		if err == nil {
			answer(w, http.StatusOK, notNil(list))
		}
		return err
	}}
}

// ExplainPolicy asks for GET /v1/policy/explain.
func (c *Client) ExplainPolicy(ctx context.Context, q PolicyQuery) (*PolicyExplanation, error) {
	v := url.Values{"method": {q.Method}, "url": {q.URL}, "header": q.Headers}
	if q.Farm != "" {
		v.Set("farm", q.Farm)
	}
	if q.Client != "" {
		v.Set("client", q.Client)
	}
	var x PolicyExplanation
	if err := c.get(ctx, "/v1/policy/explain?"+v.Encode(), &x); err != nil {
		return nil, err
	}
	return &x, nil
}

// Plugins asks for GET /v1/plugins.
func (c *Client) Plugins(ctx context.Context) ([]PluginDetail, error) {
	var list []PluginDetail
	err := c.get(ctx, "/v1/plugins", &list)
	return list, err
}
