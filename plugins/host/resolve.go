// SPDX-License-Identifier: Apache-2.0

package host

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// resolved is a PluginSpec with everything looked up.
type resolved struct {
	name     string
	path     string   // of the executable, absolute
	args     []string // from args[0] on
	cred     *syscall.Credential
	checksum []byte // SHA-256 of the executable; nil: unchecked
	start    time.Duration
	expiry   time.Duration // 0: never

	askDeadline    time.Duration
	askConcurrency int
	backoffMin     time.Duration
	backoffMax     time.Duration
	restarts       int // 0: no limit
}

// sameProcess reports whether a process of one spec can go on under the other.
func (r *resolved) sameProcess(o *resolved) bool {
	cred := func(c *syscall.Credential) string {
		if c == nil {
			return ""
		}
		return fmt.Sprint(c.Uid, ":", c.Gid)
	}
	return r.path == o.path && slices.Equal(r.args, o.args) && cred(r.cred) == cred(o.cred) && string(r.checksum) == string(o.checksum)
}

func (h *Host) resolveSpec(p PluginSpec) (*resolved, error) {
	fail := func(format string, args ...any) error { return &SpecError{p.Name, fmt.Sprintf(format, args...)} }
	r := &resolved{name: p.Name, args: slices.Clone(p.Command), start: p.StartTimeout, expiry: p.Expiry}
	if p.Name == "" {
		return nil, fail("has no name")
	}
	if len(r.args) == 0 {
		r.args = []string{p.Name}
	}
	var err error
	if r.path, err = lookup(r.args[0], h.opts.Dirs); err != nil {
		return nil, fail("%v", err)
	}
	if r.cred, err = credential(p.User); err != nil {
		return nil, fail("user: %v", err)
	}
	if p.Checksum != "" {
		sum, err := hex.DecodeString(strings.TrimPrefix(p.Checksum, "sha256:"))
		if err != nil || len(sum) != sha256.Size {
			return nil, fail("checksum: %q is not a SHA-256 in hexadecimal (64 digits)", p.Checksum)
		}
		r.checksum = sum
		f, err := r.open()
		if err != nil {
			return nil, fail("%v", err)
		}
		f.Close()
	}
	if r.start <= 0 {
		r.start = DefaultStartTimeout
	}
	if r.expiry == 0 {
		r.expiry = DefaultExpiry
	}
	r.expiry = max(r.expiry, 0)
	or := func(v, otherwise time.Duration) time.Duration {
		if v <= 0 {
			return otherwise
		}
		return v
	}
	r.askDeadline = or(p.AskDeadline, DefaultAskDeadline)
	r.backoffMin = or(p.BackoffMin, h.opts.BackoffMin)
	r.backoffMax = max(or(p.BackoffMax, h.opts.BackoffMax), r.backoffMin)
	if r.askConcurrency = p.AskConcurrency; r.askConcurrency <= 0 {
		r.askConcurrency = DefaultAskConcurrency
	}
	if r.restarts = p.Restarts; r.restarts == 0 {
		r.restarts = h.opts.Restarts
	}
	r.restarts = max(r.restarts, 0)
	return r, nil
}

// lookup finds a plugin's executable.
func lookup(command string, dirs []string) (string, error) {
	if command == "" {
		return "", errors.New("command is empty")
	}
	var notExecutable string
	try := func(path string) bool {
		st, err := os.Stat(path)
		if err != nil || st.IsDir() {
			return false
		}
		if st.Mode()&0o111 == 0 {
			notExecutable = path
			return false
		}
		return true
	}
	if strings.Contains(command, "/") {
		path, err := filepath.Abs(command)
		if err != nil {
			return "", fmt.Errorf("command %q: %w", command, err)
		}
		if try(path) {
			return path, nil
		}
		if notExecutable != "" {
			return "", fmt.Errorf("command %s is not executable", path)
		}
		return "", fmt.Errorf("command: there is no file %s", path)
	}
	for _, d := range dirs {
		if path := filepath.Join(d, command); try(path) {
			return filepath.Abs(path)
		}
	}
	msg := fmt.Sprintf("command %q is neither in %s; install it there, or write command with the path of the executable",
		command, strings.Join(dirs, " nor in "))
	if notExecutable != "" {
		msg += fmt.Sprintf(" (%s is not executable)", notExecutable)
	}
	return "", errors.New(msg)
}

// credential returns the user to switch to, nil for none.
func credential(name string) (*syscall.Credential, error) {
	self := os.Geteuid()
	if name == "" {
		if self != 0 {
			return nil, nil
		}
		name = DefaultUser
	}
	uid, gid, err := lookupUser(name)
	if err != nil {
		if name != DefaultUser {
			return nil, err
		}
		uid, gid = 65534, 65534 // what the kernel calls nobody
	}
	if int(uid) == self {
		return nil, nil
	}
	if self != 0 {
		return nil, fmt.Errorf("only root can run a plugin as %q; leave user out to run it as yourself", name)
	}
	return &syscall.Credential{Uid: uid, Gid: gid}, nil
}

// lookupUser reads "name", "uid" or "uid:gid".
func lookupUser(name string) (uid, gid uint32, err error) {
	number := func(s string) (uint32, error) {
		n, err := strconv.ParseUint(s, 10, 32)
		return uint32(n), err
	}
	u, g, both := strings.Cut(name, ":")
	if n, err := number(u); err == nil {
		if !both {
			return n, n, nil
		}
		m, err := number(g)
		if err != nil {
			return 0, 0, fmt.Errorf("%q is neither a user's name nor uid:gid", name)
		}
		return n, m, nil
	}
	e, err := user.Lookup(name)
	if err != nil {
		return 0, 0, fmt.Errorf("there is no user %q on this system", name)
	}
	if uid, err = number(e.Uid); err != nil {
		return 0, 0, err
	}
	gid, err = number(e.Gid)
	return uid, gid, err
}

// open opens the executable and verifies its checksum. What is executed later
// is this open file and not its name, so that it cannot be exchanged between.
func (r *resolved) open() (*os.File, error) {
	f, err := os.Open(r.path)
	if err != nil {
		return nil, err
	}
	if r.checksum == nil {
		return f, nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		f.Close()
		return nil, err
	}
	if sum := h.Sum(nil); string(sum) != string(r.checksum) {
		f.Close()
		return nil, fmt.Errorf("checksum: %s has %x, expected %x", r.path, sum, r.checksum)
	}
	return f, nil
}

// reachable reports whether the user can pass through all directories above
// the file. Home directories and temporary ones are often closed to others.
func reachable(path string, cred *syscall.Credential) bool {
	for d := filepath.Dir(path); ; d = filepath.Dir(d) {
		st, err := os.Stat(d)
		if err != nil {
			return false
		}
		sys, ok := st.Sys().(*syscall.Stat_t)
		bit := fs.FileMode(0o001)
		if ok && sys.Uid == cred.Uid {
			bit = 0o100
		} else if ok && sys.Gid == cred.Gid {
			bit = 0o010
		}
		if st.Mode()&bit == 0 {
			return false
		}
		if d == filepath.Dir(d) {
			return true
		}
	}
}
