// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/weirgate/weir/internal/cli"
	"github.com/weirgate/weir/module"
	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/plugins/host"
	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/snapshot"
)

// explainOffline says which server a request would get, from files alone.
func explainOffline(ctx context.Context, cfg *config.Config, q control.PolicyQuery) (*control.PolicyExplanation, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	x, err := module.ExplainOffline(ctx, cfg, slog.New(slog.DiscardHandler), q)
	return x, module.Locate(cfg, err)
}

// runPlugin drives a plugin by hand.
func runPlugin(ctx context.Context, run cli.PluginRun, out io.Writer) error {
	var conf map[string]any
	if err := yaml.Unmarshal([]byte(run.Config), &conf); err != nil {
		return fmt.Errorf("--config: %w", err)
	}
	const name = "plugin"
	farm := host.FarmSpec{Name: run.Farm, Policies: []host.PolicyUse{{Plugin: name, Config: conf}}}
	for i, s := range run.Servers {
		sv := host.ServerInfo{Name: s, Address: fmt.Sprintf("198.51.100.%d:80", 11+i%200), Weight: 1}
		if n, a, ok := strings.Cut(s, "="); ok {
			if _, err := netip.ParseAddrPort(a); err != nil {
				return fmt.Errorf("--servers %s: expected NAME=ADDRESS:PORT", s)
			}
			sv.Name, sv.Address = n, a
		}
		farm.Servers = append(farm.Servers, sv)
	}
	question, err := handQuestion(run)
	if err != nil {
		return err
	}
	var mu sync.Mutex // guards out
	say := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintf(out, format+"\n", args...)
	}
	h := host.New(host.Options{
		Log: slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelInfo})),
		OnSnapshot: func(_, _ string, s *snapshot.Snapshot) {
			p := policies.SnapshotToProto(s)
			p.Generation = s.Generation
			say("snapshot %s", protojson.Format(p))
		},
	})
	specs := []host.PluginSpec{{Name: name, Command: run.Command, User: run.User}}
	if err := h.CheckConfig(ctx, specs, []host.FarmSpec{farm}); err != nil {
		return errors.Join(err, h.Close())
	}
	say("the configuration is accepted")
	if err := h.Start(ctx, specs, []host.FarmSpec{farm}); err != nil {
		return errors.Join(err, h.Close())
	}
	last := time.Time{}
	for n := 0; run.Ticks == 0 || n < run.Ticks; {
		select {
		case <-ctx.Done():
			return h.Close()
		case <-time.After(20 * time.Millisecond):
		}
		st := h.Status()[0]
		if len(st.Farms) == 0 || !st.Farms[0].LastTick.After(last) {
			continue
		}
		n++
		if last = st.Farms[0].LastTick; st.Farms[0].LastError != "" {
			say("tick %d: error: %s", n, st.Farms[0].LastError)
		}
		if question != nil {
			handAsk(ctx, h, run.Farm, name, question, say)
		}
	}
	return h.Close()
}

// handQuestion makes the request of --ask.
func handQuestion(run cli.PluginRun) (*snapshot.Request, error) {
	if run.Ask == "" {
		return nil, nil
	}
	method, target, _ := strings.Cut(run.Ask, " ")
	u, err := url.Parse(strings.TrimSpace(target))
	if err != nil || method == "" || target == "" {
		return nil, fmt.Errorf("--ask %q: expected METHOD URL, such as GET http://shop.example/", run.Ask)
	}
	client, err := netip.ParseAddr(run.Client)
	if err != nil {
		return nil, fmt.Errorf("--client %s: expected an address", run.Client)
	}
	r := &snapshot.Request{Method: []byte(method), Host: []byte(u.Host), Path: []byte(u.EscapedPath()), Client: client.As16()}
	for _, line := range run.Headers {
		if !strings.Contains(line, ":") {
			return nil, fmt.Errorf("-H %q: expected NAME: VALUE", line)
		}
		r.Fields = append(r.Fields, []byte(line)) // sorted out once it is known what the plugin wants
	}
	return r, nil
}

// handAsk asks as the engine would, and prints the answer.
func handAsk(ctx context.Context, h *host.Host, farm, plugin string, r *snapshot.Request, say func(string, ...any)) {
	key := h.About(plugin).Ask
	if key == nil {
		say("the plugin does not want to be asked")
		return
	}
	sel, err := snapshot.NewSelector(nil, []snapshot.Policy{{Name: plugin, Ask: key}})
	if err != nil {
		say("ask: %v", err)
		return
	}
	q := *r
	q.Fields = nil
	for _, name := range sel.Fields() {
		var v []byte
		for _, line := range r.Fields {
			n, value, _ := strings.Cut(string(line), ":")
			if v == nil && strings.EqualFold(strings.TrimSpace(n), name) {
				v = []byte(strings.TrimSpace(value))
			}
		}
		q.Fields = append(q.Fields, v)
	}
	b, _ := sel.AppendKey(nil, 0, &q, new(snapshot.Scratch))
	k, err := key.ParseKey(b)
	if err != nil {
		say("ask: %v", err)
		return
	}
	began := time.Now()
	a, ttl, err := h.Ask(ctx, farm, plugin, &policies.Question{Key: k, Attempt: 1})
	took := time.Since(began).Round(10 * time.Microsecond)
	if err != nil {
		say("no answer after %s: %v", took, err)
		return
	}
	say("answer after %s: %+v, holds for %s", took, *a, ttl)
}
