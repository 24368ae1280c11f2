// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// maxHostName leaves room in the 15 characters of an interface name for the
// number of a second link between the same two hosts.
const maxHostName = 12

// A Host is one network namespace of a lab, and what runs in it.
type Host struct {
	lab   *Lab
	name  string
	fd    int             // holds the namespace; owned by the host
	inode uint64          // identifies the namespace among those of processes
	nl    *netlink.Handle // route netlink socket inside the namespace
	jobs  chan func()     // work for the spawner thread; closed by close

	mu     sync.Mutex
	closed bool
	procs  map[*Process]struct{}
	links  map[string]int // interfaces by the name of the host at the other end
}

func newHost(l *Lab, name string) (*Host, error) {
	fd, err := newNamespace()
	if err != nil {
		return nil, err
	}
	h := &Host{lab: l, name: name, fd: fd, procs: map[*Process]struct{}{}, links: map[string]int{}}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	h.inode = st.Ino
	if h.nl, err = netlink.NewHandleAt(netns.NsHandle(fd), unix.NETLINK_ROUTE); err != nil {
		return nil, errors.Join(fmt.Errorf("route netlink: %w", err), unix.Close(fd))
	}
	h.jobs = make(chan func())
	if err := h.spawner(); err != nil {
		h.nl.Close()
		return nil, errors.Join(err, unix.Close(fd))
	}
	if err := h.prepare(); err != nil {
		return nil, errors.Join(err, h.close())
	}
	return h, nil
}

// prepare gives a fresh namespace its lo and takes away the second that IPv6
// spends on looking for duplicates of an address before it can be used.
func (h *Host) prepare() error {
	if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
		for _, k := range []string{"all", "default"} {
			for _, s := range []string{"accept_dad", "dad_transmits", "router_solicitations"} {
				if err := h.SetSysctl("net/ipv6/conf/"+k+"/"+s, "0"); err != nil {
					return err
				}
			}
		}
	}
	lo, err := h.nl.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("lo: %w", err)
	}
	if err := h.nl.LinkSetUp(lo); err != nil {
		return fmt.Errorf("lo up: %w", err)
	}
	return nil
}

// Name returns the host's name in its lab.
func (h *Host) Name() string { return h.name }

// Lab returns the lab that the host belongs to.
func (h *Host) Lab() *Lab { return h.lab }

// NetNS returns the file descriptor of the namespace, for sockets that take
// one. The host owns it.
func (h *Host) NetNS() int { return h.fd }

// Netlink returns a route netlink handle inside the namespace. The host owns it.
func (h *Host) Netlink() *netlink.Handle { return h.nl }

// Do runs f inside the host's namespace, on an operating system thread that
// nothing else uses meanwhile. Sockets that f opens stay in the namespace and
// may be used anywhere afterwards; goroutines that f starts run outside of it.
// A thread that cannot be brought back is thrown away.
func (h *Host) Do(f func() error) error {
	type outcome struct {
		err      error
		panicked any
	}
	done := make(chan outcome, 1)
	onSideThread(func() {
		out := outcome{err: fmt.Errorf("lab: host %s: the function ended its goroutine", h.name)}
		home := -1
		defer func() {
			if p := recover(); p != nil {
				out.panicked = p
			}
			if home >= 0 {
				err := unix.Setns(home, unix.CLONE_NEWNET)
				_ = unix.Close(home)
				if err == nil {
					runtime.UnlockOSThread()
				}
			}
			done <- out
		}()
		fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			out.err = fmt.Errorf("lab: host %s: own namespace: %w", h.name, err)
			return
		}
		if err := unix.Setns(h.fd, unix.CLONE_NEWNET); err != nil {
			_ = unix.Close(fd)
			out.err = fmt.Errorf("lab: host %s: enter namespace: %w", h.name, err)
			return
		}
		home = fd
		out.err = f()
	})
	out := <-done
	if out.panicked != nil {
		panic(out.panicked)
	}
	return out.err
}

// spawner starts the host's spawner thread: it stays in the namespace from
// here to the host's end, and every program of the host is forked from it.
// The kernel sends a parent-death signal when the forking *thread* ends, so
// the programs need a thread that lives as long as they should.
func (h *Host) spawner() error {
	ready := make(chan error, 1)
	onSideThread(func() {
		if err := unix.Setns(h.fd, unix.CLONE_NEWNET); err != nil {
			ready <- fmt.Errorf("spawner thread: enter namespace: %w", err)
			return
		}
		ready <- nil
		for job := range h.jobs {
			job()
		}
		// The goroutine ends locked, and the thread with it.
	})
	return <-ready
}

// onThread runs f on the spawner thread.
func (h *Host) onThread(f func() error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return ErrClosed
	}
	done := make(chan error, 1)
	h.jobs <- func() { done <- f() }
	return <-done
}

// close ends the host's programs and lets the namespace go. It is called once.
func (h *Host) close() error {
	h.mu.Lock()
	h.closed = true
	var procs []*Process
	for p := range h.procs {
		procs = append(procs, p)
	}
	h.mu.Unlock()

	var errs []error
	for _, p := range procs {
		errs = append(errs, p.Kill())
	}
	errs = append(errs, h.killStragglers())
	close(h.jobs)
	h.nl.Close()
	if err := unix.Close(h.fd); err != nil {
		errs = append(errs, fmt.Errorf("lab: host %s: %w", h.name, err))
	}
	return errors.Join(errs...)
}

// Processes returns the process ids of the programs in the namespace, whoever
// started them, in no order. The lab's own process is not among them.
func (h *Host) Processes() ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	want := fmt.Sprintf("net:[%d]", h.inode)
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if ns, err := os.Readlink("/proc/" + e.Name() + "/ns/net"); err == nil && ns == want {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// killStragglers ends what the host's programs left running in the namespace:
// daemons, and children of programs that were killed.
func (h *Host) killStragglers() error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		pids, err := h.Processes()
		if err != nil || len(pids) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("lab: host %s: processes %s survive SIGKILL", h.name, strings.Trim(fmt.Sprint(pids), "[]"))
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// newNamespace makes a network namespace and returns a descriptor for it. The
// thread that made it is thrown away.
func newNamespace() (int, error) {
	type result struct {
		fd  int
		err error
	}
	done := make(chan result, 1)
	onSideThread(func() {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- result{-1, fmt.Errorf("make a network namespace: %w", err)}
			return
		}
		fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		done <- result{fd, err}
	})
	r := <-done
	return r.fd, r.err
}

// onSideThread runs f on a goroutine locked to a thread that is not the
// process's first one: that one cannot be thrown away, and its namespace is
// what /proc/self shows to everybody else. f unlocks the thread if it leaves
// it as it was; otherwise the thread ends with f.
func onSideThread(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != os.Getpid() {
			f()
			return
		}
		// Hold the first thread until another goroutine has found one.
		found := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(found)
			f()
		}()
		<-found
		runtime.UnlockOSThread()
	}()
}
