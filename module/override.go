// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/policies/snapshot"
)

// An override stands in place of what the files say about one server, until
// the files say something else about just that. It is a layer between the
// files and the configuration in force.

// overridesFile is the name in runtime_dir of the overrides that are to outlive
// the instance.
const overridesFile = "overrides.json"

func findOverride(list []control.Override, farm, server string) *control.Override {
	for i := range list {
		if list[i].Farm == farm && list[i].Server == server {
			return &list[i]
		}
	}
	return nil
}

func findServer(c *config.Config, farm, server string) *config.Server {
	f := c.Farm(farm)
	if f == nil {
		return nil
	}
	for i := range f.Servers {
		if f.Servers[i].Name == server {
			return &f.Servers[i]
		}
	}
	return nil
}

// withOverrides lays overrides over the files' configuration. They are those
// that keptOverrides left.
func withOverrides(file *config.Config, list []control.Override) *config.Config {
	if len(list) == 0 {
		return file
	}
	c := file.Clone()
	for i := range list {
		o := &list[i]
		f := c.Farm(o.Farm)
		if f == nil {
			continue
		}
		switch {
		case o.Added:
			s := config.Server{Name: o.Server, Weight: max(o.Weight, 1), Backup: o.Backup}
			_ = s.Address.UnmarshalText([]byte(o.Address)) // It was checked; a bad one is refused by Check.
			f.Servers = append(f.Servers, s)
		case o.Removed:
			f.Servers = slices.DeleteFunc(f.Servers, func(s config.Server) bool { return s.Name == o.Server })
		case o.Weight != 0:
			if s := findServer(c, o.Farm, o.Server); s != nil {
				s.Weight = o.Weight
			}
		}
	}
	return c
}

// keptOverrides returns the overrides that still hold over what the files say
// now, and a sentence for each one that does not.
func keptOverrides(list []control.Override, file *config.Config) (kept []control.Override, notes []string) {
	for _, o := range list {
		s := findServer(file, o.Farm, o.Server)
		drop := func(why string) {
			notes = append(notes, fmt.Sprintf("the run-time change of server %s in farm %s is dropped: %s", o.Server, o.Farm, why))
		}
		switch {
		case file.Farm(o.Farm) == nil:
			drop("the files have the farm no more")
		case o.Added && s != nil:
			drop("the files have the server now")
		case o.Added:
			kept = append(kept, o)
		case s == nil:
			drop("the files have the server no more")
		case s.Address.String() != o.FileAddress:
			drop("the files give it another address")
		case o.Weight != 0 && s.Weight != o.FileWeight:
			drop(fmt.Sprintf("the files give it the weight %d", s.Weight))
			if o.Weight = 0; o.State != "" {
				kept = append(kept, o) // Its state stays.
			}
		default:
			kept = append(kept, o)
		}
	}
	return kept, notes
}

// override makes one change and puts it into force. change edits the server's
// override, which is a new one where there was none; one that says nothing any
// more is dropped.
func (m *Module) override(ctx context.Context, farm, server string, change func(o *control.Override, inFile, inForce *config.Server) error) (*control.Override, error) {
	select {
	case <-m.serving:
	default:
		return nil, errNotServing
	}
	m.op.Lock()
	defer m.op.Unlock()
	if m.config().Farm(farm) == nil {
		return nil, control.NotFound(fmt.Sprintf("there is no farm %q", farm))
	}
	inFile := findServer(m.op.file, farm, server)
	list := slices.Clone(m.op.overrides)
	o := control.Override{Farm: farm, Server: server}
	if old := findOverride(list, farm, server); old != nil {
		o = *old
	}
	if inFile != nil {
		o.FileWeight, o.FileAddress = inFile.Weight, inFile.Address.String()
	}
	if err := change(&o, inFile, findServer(m.config(), farm, server)); err != nil {
		return nil, err
	}
	o.Since = time.Now()
	list = slices.DeleteFunc(list, func(x control.Override) bool { return x.Farm == farm && x.Server == server })
	if o.Added || o.Removed || o.State != "" || o.Weight != 0 {
		list = append(list, o)
	}
	next := withOverrides(m.op.file, list)
	if len(config.Compare(m.config(), next)) > 0 {
		if err := m.apply(ctx, next, list); err != nil {
			if problem := (*config.Error)(nil); errors.As(err, &problem) {
				return nil, control.Invalid(plain(problem))
			}
			return nil, err
		}
	} else {
		setStates(m.db.Load(), list)
		m.putOverrides(list)
		m.drainNow(ctx)
	}
	return &o, nil
}

// plain is the message of a problem without its place, which is not a file's.
func plain(e *config.Error) string {
	if e.Expected == "" {
		return e.Problem
	}
	return e.Problem + "; expected " + e.Expected
}

func noServer(farm, server string) error {
	return control.NotFound(fmt.Sprintf("there is no server %q in farm %q", server, farm))
}

// ChangeServer sets the state or the weight of a server until the files say
// something else about it.
func (m *Module) ChangeServer(ctx context.Context, farm, server string, c control.ServerChange) (*control.Override, error) {
	if c.State != nil && !slices.Contains([]string{snapshot.Ready.String(), snapshot.Drain.String(), snapshot.Maint.String()}, *c.State) {
		return nil, control.Invalid(fmt.Sprintf("state %q: expected ready, drain or maint", *c.State))
	}
	if c.Weight != nil && (*c.Weight < 1 || *c.Weight > 256) {
		return nil, control.Invalid(fmt.Sprintf("weight %d: expected 1 to 256", *c.Weight))
	}
	if c.State == nil && c.Weight == nil {
		return nil, control.Invalid("nothing to change: expected state or weight")
	}
	o, err := m.override(ctx, farm, server, func(o *control.Override, inFile, inForce *config.Server) error {
		if inForce == nil {
			return noServer(farm, server)
		}
		if c.State != nil {
			if o.State = *c.State; o.State == snapshot.Ready.String() {
				o.State = ""
			}
		}
		if c.Weight != nil {
			if o.Weight = *c.Weight; inFile != nil && o.Weight == inFile.Weight {
				o.Weight = 0
			}
		}
		o.Persist = o.Persist || c.Persist
		return nil
	})
	if err == nil && c.State != nil {
		m.event(control.Event{Name: control.EventServerState, Farm: farm, Server: server, Text: fmt.Sprintf("server %s of farm %s is set to %s", server, farm, *c.State)})
	}
	return o, err
}

// AddServer adds a server that the files do not have.
func (m *Module) AddServer(ctx context.Context, farm string, s control.ServerSpec) (*control.Override, error) {
	if s.Weight == 0 {
		s.Weight = 1
	}
	if s.Weight < 1 || s.Weight > 256 {
		return nil, control.Invalid(fmt.Sprintf("weight %d: expected 1 to 256", s.Weight))
	}
	if !config.ValidName(s.Name) {
		return nil, control.Invalid(fmt.Sprintf("name %q: expected a letter or digit, then letters, digits, dots, underscores or hyphens, at most 63", s.Name))
	}
	return m.override(ctx, farm, s.Name, func(o *control.Override, inFile, inForce *config.Server) error {
		switch {
		case inForce != nil:
			return control.Conflict(fmt.Sprintf("farm %q has a server %q", farm, s.Name))
		case inFile != nil:
			return control.Conflict(fmt.Sprintf("server %q of farm %q is in the files and was removed at run time; drop that change instead", s.Name, farm))
		}
		o.Added, o.Address, o.Weight, o.Backup = true, s.Address.String(), s.Weight, s.Backup
		o.Persist = s.Persist
		return nil
	})
}

// RemoveServer takes a server out; its connections drain.
func (m *Module) RemoveServer(ctx context.Context, farm, server string, persist bool) (*control.Override, error) {
	return m.override(ctx, farm, server, func(o *control.Override, inFile, inForce *config.Server) error {
		if inForce == nil {
			return noServer(farm, server)
		}
		removed := inFile != nil
		*o = control.Override{
			Farm: farm, Server: server, Removed: removed, Persist: persist || o.Persist,
			FileWeight: o.FileWeight, FileAddress: o.FileAddress,
		}
		return nil
	})
}

// DropOverrides gives a server back to the files.
func (m *Module) DropOverrides(ctx context.Context, farm, server string) (int, error) {
	m.op.Lock()
	known := findOverride(m.op.overrides, farm, server) != nil
	m.op.Unlock()
	if !known {
		return 0, control.NotFound(fmt.Sprintf("server %q of farm %q was not changed at run time", server, farm))
	}
	_, err := m.override(ctx, farm, server, func(o *control.Override, _, _ *config.Server) error {
		*o = control.Override{Farm: farm, Server: server}
		return nil
	})
	if err != nil {
		return 0, err
	}
	return 1, nil
}

// Overrides lists what was changed at run time.
func (m *Module) Overrides(context.Context) ([]control.Override, error) {
	m.op.Lock()
	defer m.op.Unlock()
	return slices.Clone(m.op.overrides), nil
}

// putOverrides makes a list the one in force and writes what is to outlive the
// instance. The caller holds m.op.
func (m *Module) putOverrides(list []control.Override) {
	m.op.overrides = list
	m.keepOverrides(list)
	if err := m.saveOverrides(list); err != nil {
		m.log.Error("run-time changes cannot be kept over a restart", "error", err)
	}
}

func (m *Module) saveOverrides(list []control.Override) error {
	var keep []control.Override
	for _, o := range list {
		if o.Persist {
			keep = append(keep, o)
		}
	}
	path := filepath.Join(m.config().RuntimeDir, overridesFile)
	if len(keep) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	b, err := json.MarshalIndent(keep, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".tmp", append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}

// keepOverrides has all overrides outlive the death of the process, those too
// that do not outlive a stop.
func (m *Module) keepOverrides(list []control.Override) {
	if m.keep.dir == "" {
		return
	}
	b, err := seal(list)
	if err == nil {
		err = replaceFile(filepath.Join(m.keep.dir, "overrides"), b)
	}
	if err != nil {
		m.log.Error("run-time changes will not outlive a death of the process", "error", err)
	}
}

// keptOverrides are those of a predecessor that died.
func (m *Module) keptOverrides() (list []control.Override, died bool) {
	if !m.keep.heir {
		return nil, false
	}
	path := filepath.Join(m.keep.dir, "overrides")
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false // there were none
	}
	if err == nil {
		err = unseal(b, &list)
	}
	if err != nil {
		const text = "the run-time changes of a predecessor are damaged; those count that were to be kept"
		m.log.Warn(text, "file", path, "error", err)
		m.events.Add(control.Event{Name: control.EventTakeover, Text: text})
		_ = os.RemoveAll(path)
		return nil, false
	}
	return list, true
}

// recallOverrides puts the overrides of an earlier instance into force, as far
// as they still hold. A file that cannot be read is told and left alone.
func (m *Module) recallOverrides() error {
	path := filepath.Join(m.config().RuntimeDir, overridesFile)
	list, died := m.keptOverrides()
	var err error
	if !died {
		var b []byte
		b, err = os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil {
			err = json.Unmarshal(b, &list)
		}
	}
	if err != nil {
		m.log.Error("the run-time changes that were to be kept cannot be read; the files alone count", "file", path, "error", err)
		return nil
	}
	kept, notes := keptOverrides(list, m.op.file)
	next := withOverrides(m.op.file, kept)
	if err := next.Check(); err != nil {
		m.log.Error("the run-time changes that were to be kept do not fit any more; the files alone count", "file", path, "error", err)
		return nil
	}
	for _, n := range notes {
		m.event(control.Event{Name: control.EventOverrideDropped, Text: n})
	}
	m.conf.Store(next)
	if err := m.buildDB(); err != nil {
		return err
	}
	setStates(m.db.Load(), kept)
	m.op.Lock()
	defer m.op.Unlock()
	m.putOverrides(kept)
	return nil
}
