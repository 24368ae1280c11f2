// SPDX-License-Identifier: Apache-2.0

// Package filelock holds a file against other processes for as long as this
// one lives. It does nothing else.
package filelock

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrHeld: another process holds the file.
var ErrHeld = errors.New("another process holds it")

// Lock is a held file. The kernel lets it go when the process ends.
type Lock struct{ f *os.File }

// Take makes the file, mode 0600, if it is not there and holds it. The error
// wraps ErrHeld if another process does.
func Take(path string) (*Lock, error) {
	for {
		l, err := take(path)
		if err != nil {
			return nil, err
		}
		// A holder that let it go in between has removed the file.
		now, err := os.Stat(path)
		if own, oerr := l.f.Stat(); err == nil && oerr == nil && os.SameFile(now, own) {
			return l, nil
		}
		_ = l.f.Close()
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
}

func take(path string) (*Lock, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s: %w", path, ErrHeld)
		}
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &Lock{f}, nil
}

// Remove removes the file and lets it go.
func (l *Lock) Remove() error {
	return errors.Join(os.Remove(l.f.Name()), l.f.Close())
}
