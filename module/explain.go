// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/plugins/host"
	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/snapshot"
)

var _ control.PolicyProvider = operator{}

// ExplainPolicy implements control.PolicyProvider. Plugins that want to be
// asked about requests are asked.
func (o operator) ExplainPolicy(ctx context.Context, q control.PolicyQuery) (*control.PolicyExplanation, error) {
	return explain(ctx, o.db.Load(), o.host, o.clock.now(), q)
}

// ExplainOffline explains a choice from a configuration alone: its plugins are
// started, asked and stopped again. Every server is ready and without load.
func ExplainOffline(ctx context.Context, cfg *config.Config, log *slog.Logger, q control.PolicyQuery) (*control.PolicyExplanation, error) {
	var x *control.PolicyExplanation
	err := offline(ctx, cfg, log, func(db *farm.DB, h *host.Host) (err error) {
		x, err = explain(ctx, db, h, time.Now().UnixNano(), q)
		return err
	})
	return x, err
}

// offline calls f with a database of farms made of a configuration and of what
// its plugins say that is no measurement: routes, affinity and budgets. What
// they find out about servers depends on where one asks from.
func offline(ctx context.Context, cfg *config.Config, log *slog.Logger, f func(*farm.DB, *host.Host) error) (err error) {
	h := host.New(host.Options{Log: log})
	defer func() { err = errors.Join(err, h.Close()) }()
	plugins, farms := PluginSpecs(cfg)
	// Whatever does not start, or refuses its configuration, is the answer.
	if err := h.CheckConfig(ctx, plugins, farms); err != nil {
		return err
	}
	if err := h.Start(ctx, plugins, farms); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, longestStart(cfg))
	defer cancel()
	for {
		missing := ""
		for i := range cfg.Farms {
			for _, p := range cfg.Farms[i].Policies {
				about := h.About(p.Use)
				says := !about.Known || slices.ContainsFunc(about.Sends, func(k policies.Kind) bool {
					return k == policies.SendsRoutes || k == policies.SendsAffinity || k == policies.SendsBudgets
				})
				if says && h.Snapshot(cfg.Farms[i].Name, p.Use) == nil {
					missing = fmt.Sprintf("plugin %s has not said anything about farm %s", p.Use, cfg.Farms[i].Name)
				}
			}
		}
		if missing == "" {
			break
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return errors.New(missing)
		}
	}
	spec, err := farmSpec(cfg, func(f, p string) (*snapshot.Snapshot, host.About) {
		s := h.Snapshot(f, p)
		if s != nil {
			fixed := *s
			fixed.Eligibility, fixed.Scores = nil, nil
			s = &fixed
		}
		return s, h.About(p)
	})
	if err != nil {
		return err
	}
	db, err := farm.Build(nil, spec)
	if err != nil {
		return err
	}
	return f(db, h)
}

// explain runs the choice for a request that is made up.
func explain(ctx context.Context, db *farm.DB, h *host.Host, now int64, q control.PolicyQuery) (*control.PolicyExplanation, error) {
	u, err := url.Parse(q.URL)
	if err != nil || q.URL == "" {
		return nil, control.Invalid(fmt.Sprintf("url %q: expected one such as http://shop.example/sales/ or a path", q.URL))
	}
	if q.Method == "" || strings.ToUpper(q.Method) != q.Method {
		return nil, control.Invalid(fmt.Sprintf("method %q: expected one such as GET", q.Method))
	}
	f, err := farmFor(db, q.Farm, u.Host)
	if err != nil {
		return nil, err
	}
	client := netip.MustParseAddr("198.18.0.1")
	if q.Client != "" {
		if client, err = netip.ParseAddr(q.Client); err != nil {
			return nil, control.Invalid(fmt.Sprintf("client %q: expected an address", q.Client))
		}
	}
	fields := map[string]string{}
	for _, line := range q.Headers {
		name, value, ok := strings.Cut(line, ":")
		if name = strings.ToLower(strings.TrimSpace(name)); !ok || name == "" {
			return nil, control.Invalid(fmt.Sprintf("header %q: expected NAME: VALUE", line))
		}
		if _, twice := fields[name]; !twice { // of several the first counts
			fields[name] = strings.TrimSpace(value)
		}
	}
	path := u.EscapedPath()
	if path == "" {
		path = "/"
	}
	if u.RawQuery != "" {
		path += "?" + u.RawQuery
	}
	hostname := u.Host
	if v, ok := fields["host"]; ok {
		hostname = v
	}
	sel := f.Selector.Load()
	r := &snapshot.Request{
		Method: []byte(q.Method), Host: []byte(hostname), Path: []byte(path), Client: client.As16(), Now: now, Farm: &f.Stats.Live,
	}
	for _, name := range sel.Fields() {
		var v []byte
		if s, ok := fields[name]; ok {
			v = []byte(s)
		}
		r.Fields = append(r.Fields, v)
	}
	rnd, sc := rand.Uint64(), new(snapshot.Scratch)
	c := sel.Choose(r, f.Lives, nil, rnd, sc)
	for range snapshot.MaxAsks {
		if c.Kind != snapshot.ChoiceAsk {
			break
		}
		a, err := askOnce(ctx, h, f, sel, int(c.Policy), r, sc)
		if err != nil {
			return nil, err
		}
		r.Answers = append(r.Answers, a)
		c = sel.Choose(r, f.Lives, nil, rnd, sc)
	}
	x := &control.PolicyExplanation{Farm: f.Name, Outcome: c.Kind.String(), Reason: c.Reason.String(), Status: int(c.Status)}
	if c.Kind == snapshot.ChoiceServer {
		x.Server = f.Servers[c.Server].Name
	}
	for _, s := range sel.Explain(r, f.Lives, nil, rnd) {
		x.Steps = append(x.Steps, control.PolicyStep{Policy: s.Policy, Text: s.Text, Candidates: s.Candidates})
	}
	return x, nil
}

// askOnce asks a plugin as the engine would.
func askOnce(ctx context.Context, h *host.Host, f *farm.Farm, sel *snapshot.Selector, index int, r *snapshot.Request, sc *snapshot.Scratch) (snapshot.Answered, error) {
	out := snapshot.Answered{Policy: sel.PolicyName(index), Answer: snapshot.Unanswered}
	about := h.About(out.Policy)
	b, fits := sel.AppendKey(nil, index, r, sc)
	if about.Ask == nil || !fits {
		return out, nil
	}
	k, err := about.Ask.ParseKey(b)
	if err != nil {
		return out, err
	}
	a, _, err := h.Ask(ctx, f.Name, out.Policy, &policies.Question{Key: k, Attempt: 1})
	if err != nil {
		return out, nil // what it does without an answer is the explanation
	}
	out.Answer, err = sel.CompileAnswer(out.Policy, a)
	return out, err
}

// farmFor finds the farm that a request is meant for.
func farmFor(db *farm.DB, name, hostport string) (*farm.Farm, error) {
	var names []string
	for _, f := range db.Farms {
		if f.Name == name {
			return f, nil
		}
		names = append(names, f.Name)
		for _, v := range f.VIPs {
			if name == "" && (v.AddrPort().String() == hostport || v.Port == 80 && v.AddrPort().Addr().String() == strings.Trim(hostport, "[]")) {
				return f, nil
			}
		}
	}
	if name != "" {
		return nil, control.NotFound(fmt.Sprintf("there is no farm %q, but %s", name, strings.Join(names, ", ")))
	}
	if len(db.Farms) == 1 {
		return db.Farms[0], nil
	}
	return nil, control.Invalid(fmt.Sprintf("which farm? %q is the VIP of none; name one of %s", hostport, strings.Join(names, ", ")))
}

// Plugins implements control.PolicyProvider.
func (o operator) Plugins(context.Context) ([]control.PluginDetail, error) {
	var out []control.PluginDetail
	for _, p := range o.host.Status() {
		d := control.PluginDetail{
			Name: p.Plugin, Version: p.Version, Command: p.Command, State: string(p.State), Since: p.Since, PID: p.PID,
			Restarts: p.Restarts, Resting: p.Resting, Error: p.LastError, Farms: o.pluginFarms(&p),
			Decisions: control.PluginDecisions(p.Decisions),
		}
		out = append(out, d)
	}
	return out, nil
}

// pluginFarms tells what a plugin said about its farms, and what came of it.
func (m *Module) pluginFarms(p *host.Status) []control.PluginFarm {
	db, cfg := m.db.Load(), m.config()
	out := []control.PluginFarm{}
	for _, pf := range p.Farms {
		x := control.PluginFarm{
			Farm: pf.Farm, Generation: pf.Generation, Received: pf.Received, LastTick: pf.LastTick, Expires: pf.Expires, Error: pf.LastError,
		}
		if f, c := db.FarmByName(pf.Farm), cfg.Farm(pf.Farm); f != nil && c != nil {
			for i := range c.Policies {
				if c.Policies[i].Use == p.Plugin {
					x.Shadow = c.Policies[i].Shadow
				}
			}
			if st := f.StatsOf(p.Plugin); st != nil {
				x.Decided, x.Emptied, x.Skipped = st.Decided.Load(), st.Emptied.Load(), st.Skipped.Load()
				x.Asked, x.Cached, x.Late = st.Asked.Load(), st.Cached.Load(), st.Late.Load()
				x.Compared = st.Compared.Load()
				x.Agreed = x.Compared - min(st.Disagreed.Load(), x.Compared)
			}
		}
		out = append(out, x)
	}
	return out
}
