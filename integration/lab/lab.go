// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrClosed is returned by everything that is asked of a closed lab.
var ErrClosed = errors.New("lab: closed")

// namesDir is where iproute2 looks for namespaces with a name.
const namesDir = "/run/netns"

// A Lab is a set of hosts and the links between them. Its methods and those of
// its hosts may be called from several goroutines.
type Lab struct {
	name string // <prefix>-<pid>-<random>, unique on this machine
	dir  string // scratch directory, removed by Close

	mu       sync.Mutex
	closed   bool
	hosts    []*Host
	byName   map[string]*Host
	cleanups []func() error // run last in, first out, before hosts are closed
	exposed  []string       // bind mounts made by Expose
	closeErr error
	once     sync.Once
}

// New makes an empty lab. The prefix only serves to recognise the lab in names
// that it leaves visible (its scratch directory, exposed namespaces). The
// caller owns the lab and closes it.
func New(prefix string) (*Lab, error) {
	var r [4]byte
	if _, err := rand.Read(r[:]); err != nil {
		return nil, fmt.Errorf("lab: random name: %w", err)
	}
	name := fmt.Sprintf("%s-%d-%s", prefix, os.Getpid(), hex.EncodeToString(r[:]))
	dir, err := os.MkdirTemp("", name+"-")
	if err != nil {
		return nil, fmt.Errorf("lab: scratch directory: %w", err)
	}
	// Programs of the lab may run as another user and must reach their files.
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, errors.Join(fmt.Errorf("lab: scratch directory: %w", err), os.RemoveAll(dir))
	}
	return &Lab{name: name, dir: dir, byName: map[string]*Host{}}, nil
}

// Name returns the lab's unique name.
func (l *Lab) Name() string { return l.name }

// Dir returns a scratch directory that everybody on this machine may enter and
// that Close removes.
func (l *Lab) Dir() string { return l.dir }

// Subdir makes a directory below Dir, open to every user of the machine, and
// returns its path.
func (l *Lab) Subdir(name string) (string, error) {
	p := filepath.Join(l.dir, name)
	if err := os.MkdirAll(p, 0o755); err != nil {
		return "", fmt.Errorf("lab: %w", err)
	}
	// Past the umask: a program under test may have given up its privileges.
	if err := os.Chmod(p, 0o777); err != nil {
		return "", fmt.Errorf("lab: %w", err)
	}
	return p, nil
}

// Cleanup registers f to run at Close, last in, first out, while hosts and
// their programs still exist.
func (l *Lab) Cleanup(f func() error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cleanups = append(l.cleanups, f)
}

// NewHost makes a host with that name: a network namespace with lo up and
// nothing else in it. Names are unique in a lab, at most 12 characters long,
// because interfaces are named after the host that they lead to.
func (l *Lab) NewHost(name string) (*Host, error) {
	if name == "" || len(name) > maxHostName || strings.ContainsAny(name, "/ \t\n%:") {
		return nil, fmt.Errorf("lab: host name %q: want 1 to %d characters that an interface name may have", name, maxHostName)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, ErrClosed
	}
	if l.byName[name] != nil {
		return nil, fmt.Errorf("lab: host %s exists already", name)
	}
	h, err := newHost(l, name)
	if err != nil {
		return nil, fmt.Errorf("lab: host %s: %w", name, err)
	}
	l.hosts = append(l.hosts, h)
	l.byName[name] = h
	return h, nil
}

// Host returns the host of that name and makes it where there is none. It
// panics when that is impossible; NewHost returns the error instead.
func (l *Lab) Host(name string) *Host {
	l.mu.Lock()
	h := l.byName[name]
	l.mu.Unlock()
	if h != nil {
		return h
	}
	h, err := l.NewHost(name)
	if err != nil {
		panic(err)
	}
	return h
}

// Hosts returns the hosts in the order in which they were made.
func (l *Lab) Hosts() []*Host {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]*Host(nil), l.hosts...)
}

// Expose gives every host a name under /run/netns, so that "ip netns exec
// NAME" and the like work while the lab lives. It returns the names by host.
// Close takes the names away; a process that is killed leaves them behind.
func (l *Lab) Expose() (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, ErrClosed
	}
	if err := os.MkdirAll(namesDir, 0o755); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	names := make(map[string]string, len(l.hosts))
	for _, h := range l.hosts {
		name := l.name + "-" + h.name
		path := filepath.Join(namesDir, name)
		f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
		if err != nil {
			return names, fmt.Errorf("lab: expose %s: %w", h.name, err)
		}
		_ = f.Close()
		l.exposed = append(l.exposed, path)
		if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", h.fd), path, "none", unix.MS_BIND, ""); err != nil {
			return names, fmt.Errorf("lab: expose %s at %s: %w", h.name, path, err)
		}
		names[h.name] = name
	}
	return names, nil
}

// Close ends every program of the lab, runs the registered clean-ups and lets
// the namespaces go. It may be called more than once; all calls return the
// same joined errors.
func (l *Lab) Close() error {
	l.once.Do(func() { l.closeErr = l.close() })
	return l.closeErr
}

func (l *Lab) close() error {
	l.mu.Lock()
	l.closed = true
	hosts, cleanups, exposed := l.hosts, l.cleanups, l.exposed
	l.mu.Unlock()

	var errs []error
	for i := len(cleanups) - 1; i >= 0; i-- {
		errs = append(errs, cleanups[i]())
	}
	for i := len(hosts) - 1; i >= 0; i-- {
		errs = append(errs, hosts[i].close())
	}
	for _, p := range exposed {
		if err := unix.Unmount(p, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("lab: unmount %s: %w", p, err))
		}
		errs = append(errs, os.Remove(p))
	}
	errs = append(errs, os.RemoveAll(l.dir))
	return errors.Join(errs...)
}
