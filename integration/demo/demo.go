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
	// IPv6 plays on that family's addresses.
	IPv6 bool
	// Pcap is a directory in which each scene that draws leaves its two
	// captures as SCENE-client.pcap and SCENE-server.pcap. Empty: none.
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
	name             string
	title            string
	clients, servers int
	run              func(context.Context, *stage) error
}

// scenes in the order in which they are shown.
var scenes = []scene{
	{"fig5", "FIG 5 and 6: two clients, one server connection", 2, 1, pooling},
	{"fig8", "FIG 8 and 9: one client connection, two paths, two servers", 2, 2, distribution},
	{"http10", "Clients that close after each request, on a server connection that stays", 2, 1, insertion},
	{"farm", "Two thousand clients with one request each, with and without Weir", 2, 3, offload},
	{"policies", "A server with a budget, a slow one, and one that dies", 1, 4, policing},
	{"kill", "Sixty downloads, and a kill -9 in the middle", 1, 2, killing},
}

// Scenes returns the names of all scenes with their titles, in order.
func Scenes() [][2]string {
	var names [][2]string
	for _, s := range scenes {
		names = append(names, [2]string{s.name, s.title})
	}
	return names
}

// Run shows the scene of that name, or all of them where the name is empty. It
// returns an error that wraps ErrUnknownScene, ErrUnable or ErrFailed, where
// these apply.
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
	return play(ctx, w, show, opts)
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

// stage is what the scenes play on: one network for all of them. Each starts
// weir on the router as it needs it.
type stage struct {
	*lab.Farm
	w    io.Writer
	opts Options
	name string         // of the scene
	dir  string         // of the scene's weir
	weir *lab.Weir      // of the scene; nil before its start
	exit []func() error // what the scene has to end, last in, first out
}

// play builds the network, draws it, and shows the scenes.
func play(ctx context.Context, w io.Writer, show []scene, opts Options) (err error) {
	l, err := lab.New("weirdemo")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	size := lab.FarmOptions{
		// Another family would only bring packets that no scene shows.
		NoIPv6: !opts.IPv6,
		// As on a real wire: no packet above the MTU.
		Link: lab.LinkOptions{NoOffload: true},
	}
	for _, s := range show {
		size.Clients, size.Servers = max(size.Clients, s.clients), max(size.Servers, s.servers)
	}
	st := &stage{w: w, opts: opts}
	if st.Farm, err = l.Farm(size); err != nil {
		return err
	}
	for _, line := range st.topology() {
		fmt.Fprintln(w, line)
	}
	for i, s := range show {
		fmt.Fprintf(w, "\n%s: %s\n\n", s.name, s.title)
		st.name = s.name
		if st.dir, err = l.Subdir("weir-" + s.name); err != nil {
			return err
		}
		err := st.perform(ctx, s)
		if err == nil && opts.Keep && i == len(show)-1 {
			err = st.keep(ctx)
		}
		if err := errors.Join(err, st.leave(ctx)); err != nil {
			return fmt.Errorf("demo: scene %s: %w", s.name, err)
		}
	}
	return nil
}

// sceneTime bounds one scene.
const sceneTime = 30 * time.Second

func (s *stage) perform(ctx context.Context, sc scene) error {
	ctx, cancel := context.WithTimeout(ctx, sceneTime)
	defer cancel()
	err := sc.run(ctx, s)
	if err != nil && s.weir != nil {
		fmt.Fprintf(s.w, "\nweir wrote:\n%s\n", strings.TrimSpace(s.weir.Log()))
	}
	return err
}

// leave ends what a scene has started, so that the next one finds the network
// as it was.
func (s *stage) leave(ctx context.Context) error {
	var errs []error
	if s.weir != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
		defer cancel()
		code, err := s.weir.Stop(ctx)
		if err == nil && code != 0 {
			err = fmt.Errorf("weir ends with exit code %d on SIGTERM: %s", code, strings.TrimSpace(s.weir.Log()))
		}
		errs = append(errs, err)
		s.weir = nil
	}
	for _, f := range slices.Backward(s.exit) {
		errs = append(errs, f())
	}
	s.exit = nil
	return errors.Join(errs...)
}
