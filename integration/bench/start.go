// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// This file measures how long a start and a reload take with many farms,
// servers and routes.

// installation is the size of a configuration.
type installation struct{ farms, servers, routes int } // servers and routes for each farm

var installations = []installation{{10, 10, 100}, {100, 10, 100}, {1000, 10, 100}, {1, 1000, 100_000}}

// text writes a configuration. weight is that of the very last server, change
// goes into every route.
func (n installation) text(run, change string, weight int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "runtime_dir: %q\nadmin: {socket: %q, metrics: \"127.0.0.1:9464\"}\nsource: {addresses: [198.51.100.1]}\nqueue: {shards: 1}\nstop_timeout: 0s\nfarms:\n",
		run, filepath.Join(run, "admin.sock"))
	first := netip.MustParseAddr("198.19.0.1").As4()
	next := 0
	for f := range n.farms {
		fmt.Fprintf(&b, "  - name: farm%d\n    listen: 203.0.113.%d:%d\n    servers:\n", f, 1+f%250, 80+f/250)
		for s := range n.servers {
			a := first
			a[2], a[3] = byte(next/200), byte(1+next%200)
			next++
			w := 1
			if f == n.farms-1 && s == n.servers-1 {
				w = weight
			}
			fmt.Fprintf(&b, "      - {name: s%d, address: \"%s:80\", weight: %d}\n", s, netip.AddrFrom4(a), w)
		}
		fmt.Fprint(&b, "    policies:\n      - use: path\n        config:\n          routes:\n")
		for i := range n.routes {
			fmt.Fprintf(&b, "            - {prefix: \"/%s/section%d/\", servers: [s%d]}\n", change, i, i%n.servers)
		}
	}
	return b.String()
}

// started is what one size took.
type started struct {
	installation
	bytes         int
	serve, routed time.Duration // until it answers, until every farm has its routes
	one, all      time.Duration // reloads: one weight, every route
	processor     time.Duration // of the start, of the module's process
	memory        int64
}

func runStart(ctx context.Context, args []string, w io.Writer) (err error) {
	fs := flag.NewFlagSet("bench start", flag.ContinueOnError)
	fs.SetOutput(w)
	weir := fs.String("weir", "bin/weir", "the weir executable")
	only := fs.String("farms", "", "only the sizes with that many farms")
	out := fs.String("out", "docs/bench", "directory of the report; empty: standard output alone")
	realtime := fs.Bool("realtime", false, "as for the comparison")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if err := asRoot(" BENCH=start"); err != nil {
		return err
	}
	if err := firstIf(*realtime); err != nil {
		return err
	}
	bin, err := filepath.Abs(*weir)
	if err != nil {
		return err
	}
	r, err := newRig(bin, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	var b strings.Builder
	fmt.Fprint(&b, "# Start and reload\n\nMade by `make bench BENCH=start`.\n\n")
	for _, m := range describe("") {
		fmt.Fprintf(&b, "- %s\n", m)
	}
	fmt.Fprint(&b, "\n*Serves* is the time from the start of the process until it answers clients and operators, *routed* until every farm has its routes from the plugin. *One weight* and *every route* are `weir reload` after such a change, until it is in force.\n\n| farms | servers | routes | configuration | serves | routed | processor | resident | one weight | every route |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")
	for _, n := range installations {
		if *only != "" && *only != strconv.Itoa(n.farms) {
			continue
		}
		s, err := r.install(ctx, n)
		if err != nil {
			return fmt.Errorf("%d farms: %w", n.farms, err)
		}
		fmt.Fprintf(&b, "| %d | %d | %d | %.1f MB | %s | %s | %s | %d MiB | %s | %s |\n", n.farms, n.farms*n.servers, n.farms*n.routes, float64(s.bytes)/1e6,
			short(s.serve), short(s.routed), short(s.processor), s.memory>>20, short(s.one), short(s.all))
		fmt.Fprintf(w, "%d farms: serves after %s, routed after %s, reloads %s and %s\n", n.farms, short(s.serve), short(s.routed), short(s.one), short(s.all))
	}
	if _, err := io.WriteString(w, "\n"+b.String()); err != nil || *out == "" {
		return err
	}
	path := filepath.Join(*out, "start.md")
	if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
		return err
	}
	return sameOwner(path, filepath.Dir(*out))
}

// install starts weir with one size and reloads it twice.
func (r *rig) install(ctx context.Context, n installation) (s started, err error) {
	s.installation = n
	run := r.run
	text := n.text(run, "a", 1)
	s.bytes = len(text)
	socket := filepath.Join(run, "admin.sock")
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	began := time.Now()
	weir, err := lab.StartWeir(ctx, r.router, lab.WeirOptions{Binary: r.weir, Dir: r.dir, Socket: socket, Config: text})
	if err != nil {
		return s, err
	}
	defer func() {
		_ = weir.Proc.Signal(syscall.SIGTERM)
		select {
		case <-weir.Proc.Done():
		case <-time.After(30 * time.Second):
			_ = weir.Proc.Kill()
		}
	}()
	s.serve = time.Since(began)
	for {
		st, err := weir.Status(ctx)
		if err != nil {
			return s, err
		}
		var v struct {
			Condition string   `json:"condition"`
			Reasons   []string `json:"reasons"`
		}
		if err := json.Unmarshal(st, &v); err != nil {
			return s, err
		}
		if v.Condition == "ready" {
			break
		}
		if ctx.Err() != nil {
			return s, fmt.Errorf("it is %s after %s: %.300q", v.Condition, time.Since(began), v.Reasons)
		}
		time.Sleep(20 * time.Millisecond)
	}
	s.routed = time.Since(began)
	if s.processor, err = weir.Proc.CPU(); err != nil {
		return s, err
	}
	if s.memory, err = resident(weir.Proc.Pid()); err != nil {
		return s, err
	}
	reload := func(text string) (time.Duration, error) {
		if err := os.WriteFile(filepath.Join(r.dir, "weir.yaml"), []byte(text), 0o644); err != nil {
			return 0, err
		}
		began := time.Now()
		cmd := exec.CommandContext(ctx, r.weir, "reload", "--socket", socket)
		var said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &said, &said
		if err := cmd.Run(); err != nil {
			return 0, fmt.Errorf("weir reload: %w: %.300s", err, said.String())
		}
		return time.Since(began), nil
	}
	if s.one, err = reload(n.text(run, "a", 7)); err != nil {
		return s, err
	}
	s.all, err = reload(n.text(run, "b", 7))
	return s, err
}
