// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding"
	"fmt"
	"net/netip"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
)

// kind says how a value is written.
type kind int

const (
	kindScalar  kind = iota // one word; see field.parse
	kindSection             // a mapping with known keys
	kindList                // a list of scalars or sections
	kindFree                // a mapping whose keys the owner of the value knows
)

// field is one key of the schema, made from a struct field.
type field struct {
	name    string // key in the file
	path    string // key path from the top, with [] for list elements
	kind    kind
	fields  []*field // of a section, or of the elements of a list of sections
	elem    *field   // of a list
	single  bool     // a list that may be written as one value without brackets
	short   string   // a section that may be written as one word, the value of this key
	typ     reflect.Type
	def     string
	hasDef  bool
	doc     string
	enum    []string
	need    string
	min     int
	max     int // 0: none
	index   int // of the struct field
	numeric bool
}

// child returns the key of a section or of a list's elements.
func (f *field) child(name string) *field {
	for _, c := range f.fields {
		if c.name == name {
			return c
		}
	}
	return nil
}

func (f *field) names() []string {
	out := make([]string, len(f.fields))
	for i, c := range f.fields {
		out[i] = c.name
	}
	return out
}

var (
	typeAddr      = reflect.TypeFor[netip.Addr]()
	typeAddrPort  = reflect.TypeFor[netip.AddrPort]()
	typePolicyUse = reflect.TypeFor[PolicyUse]()
	typeFree      = reflect.TypeFor[map[string]any]()
	textReader    = reflect.TypeFor[encoding.TextUnmarshaler]()
)

// schema is the root section. It is built once and never changed.
var schema = func() *field {
	root := &field{kind: kindSection, typ: reflect.TypeFor[Config]()}
	root.fields = structFields(root.typ, "")
	return root
}()

func structFields(t reflect.Type, prefix string) []*field {
	var out []*field
	for i := range t.NumField() {
		sf := t.Field(i)
		name := sf.Tag.Get("koanf")
		if name == "" || name == "-" {
			continue
		}
		f := newField(sf.Type, prefix+name)
		f.name, f.index = name, i
		f.doc, f.need = sf.Tag.Get("doc"), sf.Tag.Get("need")
		f.def, f.hasDef = sf.Tag.Lookup("default")
		if e, ok := sf.Tag.Lookup("enum"); ok {
			f.enum = strings.Split(e, "|")
		}
		f.min = tagInt(sf, "min")
		f.max = tagInt(sf, "max")
		out = append(out, f)
	}
	return out
}

func tagInt(sf reflect.StructField, tag string) int {
	s := sf.Tag.Get(tag)
	if s == "" {
		return 0
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		panic(fmt.Sprintf("config: tag %s of %s: %v", tag, sf.Name, err))
	}
	return n
}

func newField(t reflect.Type, path string) *field {
	f := &field{typ: t, path: path}
	switch {
	case t == typeFree:
		f.kind = kindFree
	case t == typeAddr, t == typeAddrPort, reflect.PointerTo(t).Implements(textReader):
		f.kind = kindScalar
	case t.Kind() == reflect.Slice:
		f.kind = kindList
		f.elem = newField(t.Elem(), path+"[]")
		f.single = t.Elem() == typeAddrPort
		f.fields = f.elem.fields
	case t.Kind() == reflect.Struct:
		f.kind = kindSection
		f.fields = structFields(t, path+".")
		if t == typePolicyUse {
			f.short = "use"
		}
	case t.Kind() == reflect.Int:
		f.kind, f.numeric = kindScalar, true
	case t.Kind() == reflect.String, t.Kind() == reflect.Bool:
		f.kind = kindScalar
	default:
		panic("config: no rule for type " + t.String() + " of " + path)
	}
	return f
}

// isText reports whether the value is text, so that a bare number or boolean
// in its place is a mistake.
func (f *field) isText() bool { return f.typ.Kind() == reflect.String }

var (
	namePattern     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	tablePattern    = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]{0,62}$`)
	checksumPattern = regexp.MustCompile(`^(sha256:)?[0-9A-Fa-f]{64}$`)
)

// parse checks one scalar and returns it as the configuration maps hold it: a
// string for everything that reads text, an int or a bool otherwise.
func (f *field) parse(s string) (any, *valueError) {
	switch {
	case f.numeric:
		n, err := strconv.Atoi(s)
		if err != nil {
			return nil, &valueError{fmt.Sprintf("%q is not a whole number", s), f.expected()}
		}
		if n < f.min || f.max != 0 && n > f.max {
			return nil, &valueError{fmt.Sprintf("%d is out of range", n), f.expected()}
		}
		return n, nil
	case f.typ.Kind() == reflect.Bool:
		switch s {
		case "true":
			return true, nil
		case "false":
			return false, nil
		}
		return nil, &valueError{fmt.Sprintf("%q is not a truth value", s), f.expected()}
	case f.typ == typeAddr:
		if _, err := parseAddr(s); err != nil {
			return nil, asValueError(err, s, f.expected())
		}
	case f.typ == typeAddrPort:
		if s == "" && f.hasDef { // A default can be switched off.
			return s, nil
		}
		if _, err := parseAddrPort(s); err != nil {
			return nil, asValueError(err, s, f.expected())
		}
	case f.isText():
		if v := f.checkText(s); v != nil {
			return nil, v
		}
	default:
		v := reflect.New(f.typ)
		if err := v.Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(s)); err != nil {
			return nil, asValueError(err, s, f.expected())
		}
		if f.need == "positive" && v.Elem().Int() <= 0 {
			return nil, &valueError{"the value is 0", "more than 0"}
		}
	}
	return s, nil
}

func (f *field) checkText(s string) *valueError {
	bad := func(ok bool) *valueError {
		if ok {
			return nil
		}
		return &valueError{fmt.Sprintf("%q is not allowed here", s), f.expected()}
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return &valueError{fmt.Sprintf("%q has control characters", s), f.expected()}
	}
	if f.enum != nil {
		for _, e := range f.enum {
			if s == e {
				return nil
			}
		}
		return bad(false)
	}
	switch f.need {
	case "name":
		return bad(namePattern.MatchString(s))
	case "table":
		return bad(tablePattern.MatchString(s))
	case "checksum":
		return bad(s == "" || checksumPattern.MatchString(s))
	case "value":
		return bad(s != "")
	case "socket":
		return bad(strings.HasPrefix(s, "/") && len(s) <= maxSocket && len(filepath.Dir(s)) <= maxSocketDir)
	}
	return nil
}

// How long the path of the control socket and its directory may be. A struct
// sockaddr_un has 108 bytes, the last one a zero, and the socket is made under
// a temporary name of up to 14 bytes beside its place.
const (
	maxSocket    = 107
	maxSocketDir = 92
)

// expected says in words what the value must look like.
func (f *field) expected() string {
	switch f.kind {
	case kindSection:
		if f.short != "" {
			return "a name, or a mapping with the keys " + strings.Join(f.names(), ", ")
		}
		return "a mapping with the keys " + strings.Join(f.names(), ", ")
	case kindFree:
		return "a mapping"
	case kindList:
		switch {
		case f.single:
			return "one value or a list: " + f.elem.expected()
		case f.elem.kind == kindScalar:
			return "a list: " + f.elem.expected()
		case f.elem.short != "":
			return "a list of names or mappings"
		}
		return "a list of mappings"
	}
	switch f.typ {
	case typeAddr:
		return expectAddr
	case typeAddrPort:
		return expectAddrPort
	case reflect.TypeFor[Duration]():
		return expectDuration
	case reflect.TypeFor[ByteSize]():
		return expectByteSize
	case reflect.TypeFor[Rate]():
		return expectRate
	case reflect.TypeFor[Mark]():
		return expectMark
	case reflect.TypeFor[PortRange]():
		return expectPortRange
	case reflect.TypeFor[Shards]():
		return expectShards
	case reflect.TypeFor[Prefix]():
		return expectPrefix
	}
	switch {
	case f.numeric && f.max != 0:
		return fmt.Sprintf("a whole number from %d to %d", f.min, f.max)
	case f.numeric && f.min == 0:
		return "a whole number, 0 or more"
	case f.numeric:
		return fmt.Sprintf("a whole number, %d or more", f.min)
	case f.typ.Kind() == reflect.Bool:
		return "true or false"
	case f.enum != nil:
		var words []string
		for _, e := range f.enum {
			if e != "" {
				words = append(words, e)
			}
		}
		return oneOf(words)
	}
	switch f.need {
	case "name":
		return "a name: a letter or digit, then letters, digits, dots, underscores or hyphens, at most 63"
	case "table":
		return "a table name: a letter or underscore, then letters, digits, dots, underscores or hyphens, at most 63"
	case "checksum":
		return "64 hexadecimal digits (SHA-256)"
	case "socket":
		return fmt.Sprintf("an absolute path of at most %d bytes, %d for its directory", maxSocket, maxSocketDir)
	case "value":
		return "a word"
	}
	return "text"
}

// defaults returns the default values of a section as a map. Lists are not in
// it: a list has no default, its elements have (see fill).
func (f *field) defaults() map[string]any {
	out := map[string]any{}
	for _, c := range f.fields {
		switch {
		case c.kind == kindSection:
			out[c.name] = c.defaults()
		case c.kind == kindScalar && c.hasDef:
			v, err := c.parse(c.def)
			if err != nil {
				panic("config: default of " + c.path + ": " + err.Error())
			}
			out[c.name] = v
		}
	}
	return out
}

// fill lays the defaults under every section that stands in a list.
func (f *field) fill(m map[string]any) {
	for _, c := range f.fields {
		switch c.kind {
		case kindSection:
			if s, ok := m[c.name].(map[string]any); ok {
				c.fill(s)
			}
		case kindList:
			list, _ := m[c.name].([]any)
			for i, e := range list {
				s, ok := e.(map[string]any)
				if !ok {
					continue
				}
				whole := c.elem.defaults()
				overlay(whole, s)
				c.elem.fill(whole)
				list[i] = whole
			}
		}
	}
}
