// SPDX-License-Identifier: Apache-2.0

package config

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"github.com/go-viper/mapstructure/v2"
	kmaps "github.com/knadh/koanf/maps"
	"github.com/knadh/koanf/providers/env/v2"
	"github.com/knadh/koanf/providers/file"
	"github.com/knadh/koanf/v2"

	"github.com/weirgate/weir/internal/units"
)

// Where the configuration of an installed program is.
const (
	StandardFile = "/etc/weir/weir.yaml"
	StandardDir  = "/etc/weir/conf.d"
)

// EnvPrefix begins the names of environment variables that set keys.
const EnvPrefix = "WEIR_"

// LoadOptions names the layers, lowest first. The defaults lie below all.
type LoadOptions struct {
	// Files are read in this order. Each must exist. A directory stands for
	// its *.yaml files in the order of their names, hidden ones left out.
	Files []string

	// Dir is a directory whose *.yaml files are read after Files. It may be
	// absent.
	Dir string

	// Env are environment variables, NAME=VALUE as from os.Environ. A variable
	// sets a key if its name is WEIR_ and the key path in capitals with two
	// underscores between levels: WEIR_ADMIN__SOCKET, WEIR_STOP_TIMEOUT. Only
	// single values outside lists can be set.
	//
	// A name with two underscores in it is always meant for this, and so is a
	// name that begins with the name of a section and would be right with two
	// underscores (WEIR_LOG_LEVEL); they are errors if no key fits. Every other
	// WEIR_ variable belongs to someone else and is ignored.
	Env []string

	// Overrides are single values from the command line, by key path with dots.
	Overrides map[string]any
}

// StandardOptions returns the layers of a program that was started with these
// --config arguments: they replace both /etc layers; without any, the /etc
// layers are read.
func StandardOptions(configs []string, environ []string) LoadOptions {
	if len(configs) > 0 {
		return LoadOptions{Files: configs, Env: environ}
	}
	opts := LoadOptions{Dir: StandardDir, Env: environ}
	if _, err := os.Stat(StandardFile); err == nil || len(yamlFiles(StandardDir)) == 0 {
		opts.Files = []string{StandardFile}
	}
	return opts
}

// yamlFiles lists the configuration files of a directory by name.
func yamlFiles(dir string) []string {
	// The pattern cannot be wrong, and an unreadable directory is empty here;
	// a directory that must exist is checked by the caller.
	entries, _ := os.ReadDir(dir)
	var out []string
	for _, e := range entries {
		if !e.IsDir() && strings.HasSuffix(e.Name(), ".yaml") && !strings.HasPrefix(e.Name(), ".") {
			out = append(out, filepath.Join(dir, e.Name()))
		}
	}
	return out
}

// Load reads all layers, checks them and returns the complete configuration.
// The error is an Errors with every problem found.
func Load(opts LoadOptions) (*Config, error) {
	b := newBuilder()
	var files []string
	for _, f := range opts.Files {
		st, err := os.Stat(f)
		switch {
		case err == nil && st.IsDir():
			list := yamlFiles(f)
			if len(list) == 0 {
				b.errs = append(b.errs, &Error{File: f, Problem: "the directory has no *.yaml file", Expected: "a configuration file, or a directory of them"})
			}
			files = append(files, list...)
		default:
			files = append(files, f)
		}
	}
	if opts.Dir != "" {
		files = append(files, yamlFiles(opts.Dir)...)
	}
	for _, f := range files {
		b.addFile(f, summing{file.Provider(f), f, b.sums})
	}
	b.addEnv(opts.Env)
	b.addOverrides(opts.Overrides)
	return b.finish(files)
}

// builder collects the layers into one koanf instance. A new one serves every
// load.
type builder struct {
	ko     *koanf.Koanf
	at     map[string]position
	sums   map[string]checksum // of the files that were read
	errs   Errors
	layers int
	// lengths are those of the lists that are appended to, so far.
	lengths map[string]int
}

// checksum tells contents of files apart.
type checksum = [sha256.Size]byte

// summing is the provider of a file that remembers what it has read.
type summing struct {
	*file.File
	name string
	sums map[string]checksum
}

// ReadBytes reads the file.
func (s summing) ReadBytes() ([]byte, error) {
	b, err := s.File.ReadBytes()
	if err == nil {
		s.sums[s.name] = sha256.Sum256(b)
	}
	return b, err
}

func newBuilder() *builder {
	b := &builder{ko: koanf.New("."), at: map[string]position{}, sums: map[string]checksum{}, lengths: map[string]int{}}
	b.load(mapProvider(schema.defaults()), nil, nil)
	return b
}

// appended are the lists that files append to, instead of replacing them.
var appended = [...]string{"farms", "plugins"}

// merge is the merge function of every layer. Lists are replaced, but for the
// two that are appended to.
func merge(src, dest map[string]any) error {
	for _, name := range appended {
		more, ok := src[name].([]any)
		if !ok {
			continue
		}
		old, _ := dest[name].([]any)
		dest[name] = append(slices.Clip(old), more...)
		delete(src, name)
	}
	kmaps.Merge(src, dest)
	return nil
}

// load puts one layer over the others and adds its problems and positions.
func (b *builder) load(p koanf.Provider, parser koanf.Parser, l *layer) {
	base := maps.Clone(b.lengths)
	// A look into koanf's own map would copy all of it.
	err := b.ko.Load(p, parser, koanf.WithMergeFunc(func(src, dest map[string]any) error {
		err := merge(src, dest)
		for _, name := range appended {
			list, _ := dest[name].([]any)
			b.lengths[name] = len(list)
		}
		return err
	}))
	if l == nil {
		return
	}
	b.errs = append(b.errs, l.errs...)
	if err != nil {
		var e *Error
		if !errors.As(err, &e) {
			e = &Error{File: l.name, Problem: "cannot be read: " + reason(err), Expected: "a readable configuration file", order: l.order}
		}
		b.errs = append(b.errs, e)
		return
	}
	for key := range l.at {
		if !strings.Contains(key, "[") {
			b.forgetElements(key)
		}
	}
	for key, pos := range l.at {
		b.at[shift(key, base)] = pos
	}
}

// forgetElements drops the positions of a list's elements that a higher layer
// replaced.
func (b *builder) forgetElements(key string) {
	if slices.Contains(appended[:], key) {
		return
	}
	for old := range b.at {
		if strings.HasPrefix(old, key+"[") {
			delete(b.at, old)
		}
	}
}

// shift changes farms[i] of one file into farms[base+i] of the whole.
func shift(key string, base map[string]int) string {
	for _, name := range appended {
		rest, ok := strings.CutPrefix(key, name+"[")
		if !ok || base[name] == 0 {
			continue
		}
		num, rest, _ := strings.Cut(rest, "]")
		n, _ := units.ParseDigits(num)
		return fmt.Sprintf("%s[%d]%s", name, base[name]+int(n), rest)
	}
	return key
}

func reason(err error) string {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err.Error()
	}
	return err.Error()
}

func (b *builder) next(name string) *layer {
	b.layers++
	return newLayer(name, b.layers)
}

func (b *builder) addFile(name string, p koanf.Provider) {
	l := b.next(name)
	b.load(p, yamlParser{l}, l)
}

func (b *builder) addEnv(environ []string) {
	environ = slices.DeleteFunc(slices.Sorted(slices.Values(environ)), func(v string) bool { return !strings.HasPrefix(v, EnvPrefix) })
	l := b.next("")
	if len(environ) == 0 {
		return
	}
	p := env.Provider(".", env.Opt{
		Prefix:      EnvPrefix,
		EnvironFunc: func() []string { return environ },
		TransformFunc: func(name, value string) (string, any) {
			l.name = "environment variable " + name
			key, ours := envKey(name)
			if !ours {
				return "", nil
			}
			if v, ok := l.single(key, value, func(k string) string {
				return EnvPrefix + strings.ToUpper(strings.ReplaceAll(k, ".", "__"))
			}); ok {
				return key, v
			}
			return "", nil
		},
	})
	b.load(p, nil, l)
}

// envKey returns the key path that a variable is meant to set. See
// LoadOptions.Env for the rule.
func envKey(name string) (key string, ours bool) {
	rest := strings.ToLower(strings.TrimPrefix(name, EnvPrefix))
	if strings.Contains(rest, "__") {
		return strings.ReplaceAll(rest, "__", "."), true
	}
	if schema.child(rest) != nil {
		return rest, true
	}
	for _, c := range schema.fields {
		if sub, ok := strings.CutPrefix(rest, c.name+"_"); ok && c.kind == kindSection && withUnderscores(c, sub) {
			return rest, true
		}
	}
	return "", false
}

// withUnderscores reports whether some way to read the underscores of s as
// steps leads to a key of the section.
func withUnderscores(f *field, s string) bool {
	for _, c := range f.fields {
		if c.name == s {
			return true
		}
		if sub, ok := strings.CutPrefix(s, c.name+"_"); ok && c.kind == kindSection && withUnderscores(c, sub) {
			return true
		}
	}
	return false
}

func (b *builder) addOverrides(overrides map[string]any) {
	l := b.next("command line")
	values := map[string]any{}
	for _, key := range sortedKeys(overrides) {
		if v, ok := l.single(key, fmt.Sprint(overrides[key]), func(k string) string { return k }); ok {
			values[key] = v
		}
	}
	if len(values) == 0 {
		b.errs = append(b.errs, l.errs...)
		return
	}
	b.load(mapProvider(kmaps.Unflatten(values, ".")), nil, l)
}

// single checks one value that has no file around it. spell writes a key path
// as the user of this layer would.
func (l *layer) single(key, value string, spell func(string) string) (any, bool) {
	f := schema
	for i, name := range strings.Split(key, ".") {
		c := f.child(name)
		if c == nil || f.kind != kindSection {
			var all []string
			for _, p := range scalarPaths(schema) {
				all = append(all, p.path)
			}
			hint := ""
			if m := closest(strings.ReplaceAll(key, "_", "."), dotted(all)); m != "" {
				hint = fmt.Sprintf("did you mean %s?", spell(all[slices.Index(dotted(all), m)]))
			}
			if f.kind == kindList || f.kind == kindFree {
				l.fail(nil, key, "keys inside the list "+f.name+" cannot be set here", "the key in a file", "")
				return nil, false
			}
			if i == 0 {
				l.fail(nil, key, "unknown key", "a key outside lists", hint)
			} else {
				l.fail(nil, key, "unknown key", oneOf(f.names())+" in "+f.name, hint)
			}
			return nil, false
		}
		f = c
	}
	switch f.kind {
	case kindScalar:
	case kindSection:
		l.fail(nil, key, "this is a section", "one of its keys, such as "+spell(scalarPaths(f)[0].path), "")
		return nil, false
	default:
		l.fail(nil, key, "this is a list", "the list in a file; only single values can be set here", "")
		return nil, false
	}
	v, err := f.parse(value)
	if err != nil {
		l.fail(nil, key, err.problem, err.expected, "")
		return nil, false
	}
	l.mark(nil, key, false)
	return v, true
}

// dotted replaces underscores, so that a path with too few of them is near.
func dotted(paths []string) []string {
	out := make([]string, len(paths))
	for i, p := range paths {
		out[i] = strings.ReplaceAll(p, "_", ".")
	}
	return out
}

// scalarPaths lists the single values outside lists.
func scalarPaths(f *field) []*field {
	var out []*field
	for _, c := range f.fields {
		switch c.kind {
		case kindScalar:
			out = append(out, c)
		case kindSection:
			out = append(out, scalarPaths(c)...)
		}
	}
	return out
}

// mapProvider is a koanf provider of a map that is at hand.
type mapProvider map[string]any

// Read returns the map.
func (m mapProvider) Read() (map[string]any, error) { return m, nil }

// ReadBytes is not supported: there are no bytes.
func (mapProvider) ReadBytes() ([]byte, error) {
	return nil, errors.New("config: a map has no bytes")
}

// finish makes the typed configuration and checks it.
func (b *builder) finish(files []string) (*Config, error) {
	raw := b.ko.Raw()
	listed := implyPlugins(raw)
	schema.fill(raw)
	ko := koanf.New(".")
	if err := ko.Load(mapProvider(raw), nil); err != nil {
		return nil, Errors{{Problem: err.Error()}}
	}
	cfg := new(Config)
	err := ko.UnmarshalWithConf("", cfg, koanf.UnmarshalConf{DecoderConfig: &mapstructure.DecoderConfig{
		ErrorUnused: true,
		DecodeHook:  mapstructure.TextUnmarshallerHookFunc(),
		TagName:     "koanf",
	}})
	if err != nil {
		// The schema let something through that the types refuse. The message
		// has no line, but nothing wrong is ever accepted.
		b.errs = append(b.errs, &Error{Problem: err.Error(), order: b.layers + 1})
	} else {
		cfg.Files, cfg.sums = files, b.sums
		for i := listed; i < len(cfg.Plugins); i++ {
			cfg.Plugins[i].Implied = true
		}
		v := validator{cfg: cfg, at: b.at}
		v.validate()
		b.errs = append(b.errs, v.errs...)
		cfg.complete()
		cfg.at = b.at
	}
	if len(b.errs) > 0 {
		return nil, b.errs.sorted()
	}
	return cfg, nil
}

// implyPlugins adds an entry for every built-in plugin that a farm uses and
// no file lists. It returns the number of entries that were listed.
func implyPlugins(raw map[string]any) int {
	plugins, _ := raw["plugins"].([]any)
	used, listed := map[string]bool{}, map[string]bool{}
	for _, p := range plugins {
		if m, ok := p.(map[string]any); ok {
			name, _ := m["name"].(string)
			listed[name] = true
		}
	}
	farms, _ := raw["farms"].([]any)
	for _, f := range farms {
		m, _ := f.(map[string]any)
		policies, _ := m["policies"].([]any)
		for _, p := range policies {
			if m, ok := p.(map[string]any); ok {
				use, _ := m["use"].(string)
				used[use] = true
			}
		}
	}
	n := len(plugins)
	for _, name := range builtin {
		if used[name] && !listed[name] {
			plugins = append(plugins, map[string]any{"name": name})
		}
	}
	if len(plugins) > 0 {
		raw["plugins"] = plugins
	}
	return n
}

// Where returns the file and line of a key path, such as
// farms[0].servers[1].address, and the nearest key above it that a file has.
// Both are empty for a value that is a default.
func (c *Config) Where(key string) (file string, line int) {
	p, _ := lookup(c.at, key)
	return p.file, p.line
}

// lookup returns the position of a key or of the nearest one above it.
func lookup(at map[string]position, key string) (position, bool) {
	for k := key; k != ""; {
		if p, ok := at[k]; ok {
			return p, k == key
		}
		k = k[:max(0, strings.LastIndexAny(k, ".["))]
	}
	return position{}, false
}

// sortedKeys returns the keys of a map in order.
func sortedKeys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}
