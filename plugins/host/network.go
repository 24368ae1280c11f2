// SPDX-License-Identifier: Apache-2.0

package host

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Network is a network namespace that plugins can be started in.
type Network struct{ f *os.File }

// CurrentNetwork returns the network namespace of the calling thread. The
// caller closes it when no plugin is to be started any more.
func CurrentNetwork() (*Network, error) {
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("plugins: own network namespace: %w", err)
	}
	return &Network{f}, nil
}

// Enter moves the calling thread into the namespace; it is for
// Options.OnThread. Where the thread is there already, it needs no privileges.
func (n *Network) Enter() error {
	var now, want unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &now); err != nil {
		return fmt.Errorf("own network namespace: %w", err)
	}
	if err := unix.Fstat(int(n.f.Fd()), &want); err != nil {
		return fmt.Errorf("network namespace for plugins: %w", err)
	}
	if now.Ino == want.Ino && now.Dev == want.Dev {
		return nil
	}
	if err := unix.Setns(int(n.f.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter the network namespace for plugins: %w", err)
	}
	return nil
}

// Close forgets the namespace.
func (n *Network) Close() error { return n.f.Close() }
