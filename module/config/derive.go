// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"reflect"
	"slices"
)

// Clone returns a copy of which farms and their servers may be changed before
// anybody else sees it. Everything below them is shared, and stays as it is.
func (c *Config) Clone() *Config {
	d := *c
	d.Farms = slices.Clone(c.Farms)
	for i := range d.Farms {
		d.Farms[i].Servers = slices.Clone(d.Farms[i].Servers)
	}
	return &d
}

// Check makes the checks of Load that concern several values again, after a
// Clone was changed. The error is an Errors.
func (c *Config) Check() error {
	d := c.Clone()
	v := validator{cfg: d, at: c.at}
	v.validate()
	if len(v.errs) > 0 {
		return v.errs.sorted()
	}
	return nil
}

// Parse reads what Dump wrote. name stands for the file in errors, which are
// an Errors.
func Parse(name string, text []byte) (*Config, error) {
	b := newBuilder()
	b.addFile(name, bytesProvider(text))
	cfg, err := b.finish([]string{name})
	if err != nil {
		return nil, err
	}
	// Dump writes what Load has implied, too.
	for i := range cfg.Plugins {
		p := &cfg.Plugins[i]
		same := cfg.defaultPlugin(p.Name)
		p.Implied = same != nil && len(p.Config) == 0 && reflect.DeepEqual(p.Command, same.Command) &&
			p.User == same.User && p.Checksum == same.Checksum && p.StartTimeout == same.StartTimeout && p.Expiry == same.Expiry
	}
	return cfg, nil
}

// defaultPlugin is the entry that Load implies for a built-in plugin, nil for
// a name that is none.
func (c *Config) defaultPlugin(name string) *Plugin {
	if !slices.Contains(builtin[:], name) {
		return nil
	}
	p := &Plugin{Name: name, Command: []string{name}}
	v := reflect.ValueOf(p).Elem()
	for _, f := range schema.child("plugins").elem.fields {
		if !f.hasDef {
			continue
		}
		if u, ok := v.Field(f.index).Addr().Interface().(interface{ UnmarshalText([]byte) error }); ok {
			_ = u.UnmarshalText([]byte(f.def)) // The schema's defaults are right.
		}
	}
	return p
}

// bytesProvider is a koanf provider of text that is at hand.
type bytesProvider []byte

// ReadBytes returns the text.
func (b bytesProvider) ReadBytes() ([]byte, error) { return b, nil }

// Read is not supported: the text has to be parsed.
func (bytesProvider) Read() (map[string]any, error) {
	return nil, errors.New("config: text is not a map")
}

// ValidName reports whether a farm or server may have this name.
func ValidName(s string) bool { return namePattern.MatchString(s) }
