// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// journalFile is the journal's name in runtime_dir.
const journalFile = "sysctl.json"

const journalVersion = 1

// Change is one sysctl that we changed: its name in sysctl(8)'s form, the
// value that we found and the one that we wrote.
type Change struct {
	Name string `json:"name"`
	Old  string `json:"old"`
	New  string `json:"new"`

	// Earlier are other values of ours that may still stand there: a process
	// can be killed between writing the journal and writing the sysctl.
	Earlier []string `json:"earlier,omitempty"`
}

// ours reports whether the value is one that we wrote.
func (c *Change) ours(value string) bool {
	return value == c.New || slices.Contains(c.Earlier, value)
}

func (c *Change) equal(d *Change) bool {
	return c.Name == d.Name && c.Old == d.Old && c.New == d.New && slices.Equal(c.Earlier, d.Earlier)
}

// Journal remembers what sysctls were before the first process of ours changed
// them. Its file is written, and on the disk, before the first change; a
// successor of a killed process finds it and so does not take our values for
// the original ones. It is not safe for concurrent use.
type Journal struct {
	path string
	sys  procSys
	data journalData
}

type journalData struct {
	Version int `json:"version"`

	// Boot and Netns say where the values are valid: after a reboot, or in
	// another network namespace that uses the same directory, they are not.
	Boot  string `json:"boot_id"`
	Netns string `json:"netns"`

	Changes []Change `json:"changes"`
}

// ApplySysctls makes the kernel's sysctls, in the network namespace of the
// calling thread, say what is needed, and journals in runtimeDir (which must
// exist) the values that it changes. What already suffices is left alone, and
// needs no permission. When it fails, what it changed is restored. It may be
// called again with other needs while the first journal is in force, in this
// process or a successor; the last one returned restores all.
func ApplySysctls(runtimeDir string, need []Sysctl) (*Journal, error) {
	return applySysctls(hostSysctls, runtimeDir, need)
}

// OpenJournal gives what a killed predecessor changed, with nothing to restore
// when there is none.
func OpenJournal(runtimeDir string) (*Journal, error) {
	return openJournal(hostSysctls, runtimeDir)
}

func openJournal(sys procSys, runtimeDir string) (*Journal, error) {
	j := &Journal{path: filepath.Join(runtimeDir, journalFile), sys: sys}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("nft: journal of sysctls: %w", err)
	}
	var ns unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &ns); err != nil {
		return nil, fmt.Errorf("nft: journal of sysctls: network namespace: %w", err)
	}
	fresh := journalData{Version: journalVersion, Boot: strings.TrimSpace(string(boot)), Netns: fmt.Sprintf("%d:%d", ns.Dev, ns.Ino)}
	j.data = fresh

	b, err := os.ReadFile(j.path)
	if errors.Is(err, fs.ErrNotExist) {
		return j, nil
	}
	if err != nil {
		return nil, fmt.Errorf("nft: journal of sysctls: %w", err)
	}
	var old journalData
	if err := json.Unmarshal(b, &old); err != nil || old.Version != journalVersion {
		return nil, fmt.Errorf("nft: journal of sysctls %s: unreadable (version %d, %v): it holds the values to restore; look at it, set the sysctls by hand and remove it", j.path, old.Version, err)
	}
	if old.Boot == fresh.Boot && old.Netns == fresh.Netns {
		j.data = old
	}
	return j, nil
}

func applySysctls(sys procSys, runtimeDir string, need []Sysctl) (*Journal, error) {
	j, err := openJournal(sys, runtimeDir)
	if err != nil {
		return nil, err
	}
	before := slices.Clone(j.data.Changes)
	var todo []Change
	for _, n := range need {
		name := dotted(n.name())
		now, err := sys.read(name)
		if err != nil {
			return nil, err
		}
		old := j.original(name, now)
		want, err := n.want(sys, old)
		if err != nil {
			return nil, err
		}
		c := Change{Name: name, Old: old, New: want}
		if now != old && now != want {
			c.Earlier = []string{now}
		}
		j.data.Changes = slices.DeleteFunc(j.data.Changes, func(c Change) bool { return c.Name == name })
		if c.Old != c.New || c.Earlier != nil {
			j.data.Changes = append(j.data.Changes, c)
		}
		if want != now {
			todo = append(todo, Change{Name: name, Old: now, New: want})
		}
	}
	if !slices.EqualFunc(before, j.data.Changes, func(a, b Change) bool { return a.equal(&b) }) {
		if err := j.save(); err != nil {
			return nil, err
		}
	}
	for i, c := range todo {
		if err := sys.write(c.Name, c.New); err != nil {
			for _, done := range slices.Backward(todo[:i]) {
				err = errors.Join(err, sys.write(done.Name, done.Old))
			}
			j.data.Changes = before
			return nil, errors.Join(err, j.save())
		}
	}
	return j, nil
}

// Unmet names, in sysctl(8)'s form, those of the needs that the kernel does not
// meet now, in the network namespace of the calling thread: somebody has set a
// value anew since ApplySysctls. What cannot be read, such as the value of an
// interface that is gone, is met.
func Unmet(need []Sysctl) []string { return unmet(hostSysctls, need) }

func unmet(sys procSys, need []Sysctl) []string {
	var out []string
	for _, n := range need {
		now, err := sys.read(n.name())
		if err != nil {
			continue
		}
		if want, err := n.want(sys, now); err == nil && want != now {
			out = append(out, dotted(n.name()))
		}
	}
	return out
}

// original is the value that stood before we came. When the sysctl still has
// the value that a predecessor gave it, that is what the predecessor found;
// otherwise somebody has set it since, and means it.
func (j *Journal) original(name, now string) string {
	for i := range j.data.Changes {
		c := &j.data.Changes[i]
		if c.Name != name {
			continue
		}
		if c.ours(now) {
			return c.Old
		}
		if name == dotted(sysctlReserved) {
			// Others add to this list and take from it: another instance, too.
			if rest, err := c.without(now); err == nil {
				return rest
			}
		}
	}
	return now
}

// without takes what the change added out of a list of ports.
func (c *Change) without(now string) (string, error) {
	sets := make([]portSet, 3)
	for i, s := range []string{now, c.New, c.Old} {
		var err error
		if sets[i], err = parsePorts(s); err != nil {
			return "", fmt.Errorf("nft: sysctl %s: %w", c.Name, err)
		}
	}
	return sets[0].minus(sets[1].minus(sets[2])).String(), nil
}

// StrictInterfaces gives those of the interfaces whose reverse path filter is
// strict, or was before a predecessor loosened it: what belongs into
// Params.StrictRPFilter. Ask before ApplySysctls, and Install between the two:
// then the interface is never without a check.
func StrictInterfaces(runtimeDir string, ifaces ...string) ([]string, error) {
	return strictInterfaces(hostSysctls, runtimeDir, ifaces)
}

func strictInterfaces(sys procSys, runtimeDir string, ifaces []string) ([]string, error) {
	j, err := openJournal(sys, runtimeDir)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, name := range ifaces {
		key := dotted(fmt.Sprintf(sysctlRPFilter, name))
		now, err := sys.read(key)
		if err != nil {
			return nil, err
		}
		strict, err := strictRPFilter(sys, j.original(key, now))
		if err != nil {
			return nil, err
		}
		if strict {
			out = append(out, name)
		}
	}
	return out, nil
}

// Changes lists what is changed now, for the operator.
func (j *Journal) Changes() []Change { return slices.Clone(j.data.Changes) }

// Restore puts the old values back, in reverse order, and removes the journal.
// A value that somebody changed after us stays; of a changed list of reserved
// ports only what we added is taken out. An interface that is gone needs
// nothing. After an error the journal stays for another attempt.
func (j *Journal) Restore() error {
	var errs []error
	for _, c := range slices.Backward(j.data.Changes) {
		now, err := j.sys.read(c.Name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		switch {
		case c.ours(now):
			errs = append(errs, j.sys.write(c.Name, c.Old))
		case c.Name == dotted(sysctlReserved):
			errs = append(errs, j.unreserve(c, now))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	j.data.Changes = nil
	return j.save()
}

func (j *Journal) unreserve(c Change, now string) error {
	rest, err := c.without(now)
	if err != nil || rest == now {
		return err
	}
	return j.sys.write(c.Name, rest)
}

// save replaces the file in one step, and returns when it is on the disk. With
// nothing changed there is no file.
func (j *Journal) save() error {
	if len(j.data.Changes) == 0 {
		for _, name := range []string{j.path, j.path + ".tmp"} {
			if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("nft: journal of sysctls: %w", err)
			}
		}
		return nil
	}
	b, err := json.MarshalIndent(&j.data, "", "  ")
	if err != nil {
		return fmt.Errorf("nft: journal of sysctls: %w", err)
	}
	dir := filepath.Dir(j.path)
	// A fixed name: a killed process leaves at most one, and Restore removes it.
	f, err := os.OpenFile(j.path+".tmp", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("nft: journal of sysctls: %w", err)
	}
	_, err = f.Write(append(b, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), j.path)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("nft: journal of sysctls: %w", err)
	}
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("nft: journal of sysctls: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("nft: journal of sysctls: %w", err)
	}
	return nil
}
