// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
)

// politic is an instance that knows about policies.
type politic struct{}

func (politic) Status(context.Context) (*control.Status, error) { return &control.Status{}, nil }

func (politic) ExplainPolicy(_ context.Context, q control.PolicyQuery) (*control.PolicyExplanation, error) {
	if q.Farm == "none" {
		return nil, control.NotFound("there is no farm")
	}
	return &control.PolicyExplanation{Farm: "web", Outcome: "server", Server: "s1", Reason: "picked", Steps: []control.PolicyStep{
		{Text: "2 of 2 servers are candidates", Candidates: 2},
		{Policy: "path", Text: fmt.Sprintf("%s %s %s %v", q.Method, q.URL, q.Client, q.Headers), Candidates: 1},
	}}, nil
}

func (politic) Plugins(context.Context) ([]control.PluginDetail, error) {
	return []control.PluginDetail{
		{Name: "path", Version: "1.2.3", State: "up", Restarts: 2, Farms: []control.PluginFarm{
			{Farm: "web", Generation: 7, LastTick: time.Now(), Decided: 5, Asked: 1, Cached: 2, Late: 1},
			{Farm: "api", Shadow: true, Generation: 1, Compared: 8, Agreed: 6},
		}},
		{Name: "mine", State: "down", Resting: true, Error: "exit status 1"},
	}, nil
}

func TestPolicyCommands(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := control.Listen(socket, politic{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Serve(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	offline := func(context.Context, *config.Config, control.PolicyQuery) (*control.PolicyExplanation, error) {
		t.Error("asked the files although an instance is named")
		return nil, nil
	}
	for _, c := range []struct {
		args string
		code int
		want []string
	}{
		{"policy explain --socket S GET /x", 0, []string{"POLICY", "farm web  2 ", "path      1             GET /x  []"}},
		{"policy explain --socket S -o json -H A:b -H C:d --client 198.18.0.7 GET /x", 0, []string{`"server": "s1"`, "GET /x 198.18.0.7 [A:b C:d]"}},
		{"policy explain --socket S --farm none GET /x", 1, []string{"there is no farm"}},
		{"policy explain --socket S GET", 2, []string{"accepts 2 arg"}},
		{"policy", 2, []string{"explain"}},
		{"plugins --socket S", 0, []string{"path    1.2.3    up             2         web   7           0s", "75.0 %", "down, resting", "exit status 1"}},
		{"plugins --socket S -o json", 0, []string{`"agreed": 6`, `"resting": true`}},
		{"plugins --socket S -o yaml", 2, []string{"expected table or json"}},
	} {
		args := strings.Fields(strings.ReplaceAll(c.args, " S", " "+socket))
		var out bytes.Buffer
		if code := Main(append([]string{"weir"}, args...), nil, &out, &out, Hooks{Explain: offline}); code != c.code {
			t.Errorf("%s: exit code %d:\n%s", c.args, code, out.String())
		}
		for _, w := range c.want {
			if !strings.Contains(out.String(), w) {
				t.Errorf("%s: no %q in\n%s", c.args, w, out.String())
			}
		}
	}
	// The command to drive a plugin is there only with its hook.
	var run PluginRun
	var out bytes.Buffer
	code := Main([]string{"weir", "plugins", "run", "./x", "--servers", "a,b", "--ticks", "2", "--", "-v"}, nil, &out, &out, Hooks{RunPlugin: func(_ context.Context, r PluginRun, _ io.Writer) error {
		run = r
		return nil
	}})
	if code != 0 || fmt.Sprint(run.Command) != "[./x -v]" || fmt.Sprint(run.Servers) != "[a b]" || run.Ticks != 2 {
		t.Errorf("exit code %d, %+v\n%s", code, run, out.String())
	}
}
