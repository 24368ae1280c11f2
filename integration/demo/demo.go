// SPDX-License-Identifier: Apache-2.0

// Package demo shows Weir at work on this machine: it builds a small network
// out of namespaces, runs the real daemon on its router, lets clients ask, and
// draws what passed on both sides of the interface unit.
//
// A scene is a story with a claim at its end that is checked, so that a demo
// that no longer holds fails. The package must not touch the network namespace
// of its caller, and leaves nothing behind.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
)

// Options say how a demo is run.
type Options struct {
	// Weir is the executable of the daemon; its plugins lie in plugins/ beside
	// it. Empty: the running program itself.
	Weir string
	// Keep leaves the lab up after the last scene until the context ends, with
	// names for its namespaces.
	Keep bool
	// Pcap is a directory in which each scene leaves its two captures as
	// SCENE-client.pcap and SCENE-server.pcap. Empty: none.
	Pcap string
}

// ErrUnknownScene is wrapped by the error of a scene that does not exist.
var ErrUnknownScene = errors.New("no such scene")

// ErrUnable is wrapped by errors that tell what the demo lacks on this machine.
var ErrUnable = errors.New("the demo cannot run here")

// ErrFailed is wrapped by the error of a scene whose claim did not hold.
var ErrFailed = errors.New("the scene's claim does not hold")

// scene is one story.
type scene struct {
	name  string
	title string
	size  lab.FarmOptions
	run   func(context.Context, *stage) error
}

// scenes in the order in which they are shown.
var scenes = []scene{
	{
		name:  "fig5",
		title: "FIG 5 and 6: two clients, one server connection",
		size:  lab.FarmOptions{Clients: 2, Servers: 1},
		run:   pooling,
	},
}

// Scenes returns the names of all scenes with their titles, in order.
func Scenes() [][2]string {
	var names [][2]string
	for _, s := range scenes {
		names = append(names, [2]string{s.name, s.title})
	}
	return names
}

// Run shows the scene of that name, or all of them where the name is empty. It returns an
// error that wraps ErrUnknownScene, ErrUnable or ErrFailed, where these apply.
func Run(ctx context.Context, w io.Writer, name string, opts Options) error {
	show := scenes
	if name != "" {
		i := slices.IndexFunc(scenes, func(s scene) bool { return s.name == name })
		if i < 0 {
			var names []string
			for _, s := range scenes {
				names = append(names, s.name)
			}
			return fmt.Errorf("demo: %w: %q; there are: %s", ErrUnknownScene, name, strings.Join(names, ", "))
		}
		show = scenes[i : i+1]
	}
	if err := able(); err != nil {
		return err
	}
	if opts.Weir == "" {
		exe, err := os.Executable()
		if err != nil {
			return fmt.Errorf("demo: %w: this program's own path: %w", ErrUnable, err)
		}
		opts.Weir = exe
	}
	for i, s := range show {
		if i > 0 {
			fmt.Fprintln(w)
		}
		last := i == len(show)-1
		if err := perform(ctx, w, s, opts, last && opts.Keep); err != nil {
			return fmt.Errorf("demo: scene %s: %w", s.name, err)
		}
	}
	return nil
}

// able says in one sentence what this machine or user lacks.
func able() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("demo: %w: it makes network namespaces, and needs root for that (sudo weir demo)", ErrUnable)
	}
	probe, err := lab.New("weirdemo")
	if err != nil {
		return err
	}
	defer probe.Close()
	h, err := probe.NewHost("probe")
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("demo: %w: this user may not make network namespaces (CAP_SYS_ADMIN)", ErrUnable)
	}
	if err != nil {
		return fmt.Errorf("demo: %w: %w", ErrUnable, err)
	}
	err = h.Do(func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		if err == nil {
			err = unix.Close(fd)
		}
		return err
	})
	if err == nil {
		// The kernel makes this file where nfnetlink_queue is built in or loaded.
		err = h.Do(func() error {
			_, err := os.Stat("/proc/thread-self/net/netfilter/nfnetlink_queue")
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("demo: %w: this kernel lacks nfnetlink_queue (CONFIG_NETFILTER_NETLINK_QUEUE; try: modprobe nfnetlink_queue)", ErrUnable)
	}
	return nil
}

// stage is what a scene plays on: the standard topology with weir running.
type stage struct {
	*lab.Farm
	w    io.Writer
	name string
	opts Options
	weir *lab.Weir
	dir  string
}

func perform(ctx context.Context, w io.Writer, s scene, opts Options, keep bool) (err error) {
	l, err := lab.New("weirdemo")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	// A second interface family would only bring packets that no scene shows.
	s.size.NoIPv6 = true
	// As on a real wire: no packet above the MTU.
	s.size.Link.NoOffload = true
	st := &stage{w: w, name: s.name, opts: opts}
	if st.Farm, err = l.Farm(s.size); err != nil {
		return err
	}
	if st.dir, err = l.Subdir("weir"); err != nil {
		return err
	}
	fmt.Fprintf(w, "%s\n\n", s.title)
	for _, line := range st.topology() {
		fmt.Fprintln(w, line)
	}
	fmt.Fprintln(w)

	sctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := s.run(sctx, st); err != nil {
		if st.weir != nil {
			fmt.Fprintf(w, "\nweir wrote:\n%s\n", strings.TrimSpace(st.weir.Log()))
		}
		return err
	}
	if keep {
		if err := st.keep(ctx); err != nil {
			return err
		}
	}
	if st.weir == nil {
		return nil
	}
	sctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
	defer cancel()
	code, err := st.weir.Stop(sctx)
	if err == nil && code != 0 {
		err = fmt.Errorf("weir ends with exit code %d on SIGTERM: %s", code, strings.TrimSpace(st.weir.Log()))
	}
	return err
}
