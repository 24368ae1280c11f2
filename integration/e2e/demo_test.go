// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/demo"
	"github.com/weirgate/weir/integration/lab/built"
	"github.com/weirgate/weir/internal/require"
)

// TestDemoScenes: every scene of the demo keeps its promise, over both address
// families, and its drawing its size. FIG 5 and FIG 8 of the patent are among
// them, live.
func TestDemoScenes(t *testing.T) {
	require.NFQueue(t)
	bin := built.Weir(t)
	for _, s := range demo.Scenes() {
		for name, ipv6 := range map[string]bool{"": false, " over IPv6": true} {
			t.Run(s[0]+name, func(t *testing.T) {
				var out strings.Builder
				if err := demo.Run(within(t, 60*time.Second), &out, s[0], demo.Options{Weir: bin, IPv6: ipv6}); err != nil {
					t.Fatalf("%v\n%s", err, out.String())
				}
				readable(t, out.String())
			})
		}
	}
}

// readable holds the size of what the demo draws: 100 columns, and 16 lines
// for a figure.
func readable(t *testing.T, out string) {
	t.Helper()
	figure := 0
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\n")
		if len([]rune(line)) > 100 {
			t.Errorf("%d columns: %s", len([]rune(line)), line)
		}
		if figure++; line == "" {
			figure = 0
		}
		if figure > 16 {
			t.Errorf("a figure goes beyond 16 lines at: %s", line)
		}
	}
	if !strings.Contains(out, "PASS") {
		t.Errorf("no verdict:\n%s", out)
	}
}

// output can be read while a demo writes it.
type output struct {
	mu sync.Mutex
	b  strings.Builder
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// TestDemoAll: all scenes on one network, the topology first, one table last.
// With Keep the network stays up under the names that are told, and nothing of
// it is left afterwards.
func TestDemoAll(t *testing.T) {
	require.NFQueue(t)
	bin := built.Weir(t)
	ctx, interrupt := context.WithCancel(within(t, 120*time.Second))
	defer interrupt()
	var out output
	done := make(chan error, 1)
	go func() { done <- demo.Run(ctx, &out, "", demo.Options{Weir: bin, Keep: true}) }()
	var hosts []string
	until(t, 100*time.Second, "the network to be kept", func() bool {
		select {
		case err := <-done:
			t.Fatalf("%v\n%s", err, out.String())
		default:
		}
		_, names, ok := strings.Cut(out.String(), "\nHosts: ")
		hosts = strings.Fields(names)
		return ok && strings.HasSuffix(names, "\n")
	})
	if len(hosts) < 6 {
		t.Errorf("hosts %q", hosts)
	}
	for _, h := range hosts {
		if _, err := os.Stat(filepath.Join("/run/netns", h)); err != nil {
			t.Error(err)
		}
	}
	interrupt()
	if err := <-done; err != nil {
		t.Error(err)
	}
	for _, h := range hosts {
		if _, err := os.Lstat(filepath.Join("/run/netns", h)); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", h, err)
		}
	}
	text := out.String()
	for _, s := range demo.Scenes() {
		if !strings.Contains(text, "\n"+s[0]+": "+s[1]+"\n") {
			t.Errorf("no scene %s", s[0])
		}
	}
	if n := strings.Count(text, "interface unit ---"); n != 1 || strings.Index(text, "interface unit ---") > strings.Index(text, "fig5: ") {
		t.Errorf("the topology is drawn %d times, or not first:\n%s", n, text)
	}
	table := regexp.MustCompile(`(?s)without Weir +with Weir\n.*server connections opened +2,000 +\d+\n.*PASS[^\n]*\n\nThe lab stays`)
	if !table.MatchString(text) {
		t.Errorf("no table at the end:\n%s", text)
	}
}
