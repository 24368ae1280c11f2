// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"encoding"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Dump returns the whole configuration as YAML, defaults included, in the
// order of the schema. Load reads it back as the same configuration.
func (c *Config) Dump() ([]byte, error) { return c.dump(false) }

// Redacted is Dump for other people's eyes: the values of plugin settings
// whose names speak of passwords, secrets, tokens or keys are replaced.
func (c *Config) Redacted() ([]byte, error) { return c.dump(true) }

func (c *Config) dump(redact bool) ([]byte, error) {
	n, err := dumpSection(schema, reflect.ValueOf(c).Elem(), redact)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	if err := enc.Encode(n); err != nil {
		return nil, fmt.Errorf("config: dump: %w", err)
	}
	return b.Bytes(), enc.Close()
}

// Compact is Dump for programs: the same values, mostly in YAML's flow style and
// in a fraction of the time. Load reads it back as the same configuration.
func (c *Config) Compact() ([]byte, error) {
	n, err := dumpSection(schema, reflect.ValueOf(c).Elem(), false)
	if err != nil {
		return nil, err
	}
	if b, ok := appendFlow(nil, n); ok {
		return b, nil
	}
	return c.Dump()
}

// appendFlow writes a node with quoted strings, a line for each element. It
// returns false if there is a value in it that needs the library's care.
func appendFlow(b []byte, n *yaml.Node) ([]byte, bool) {
	ok := true
	switch n.Kind {
	case yaml.MappingNode:
		b = append(b, '{')
		for i := 0; ok && i+1 < len(n.Content); i += 2 {
			start := len(b)
			if b, ok = appendFlow(b, n.Content[i]); ok {
				ok = len(b)-start <= longestKey
				b = append(b, ": "...)
				var whole bool
				b, whole = appendFlow(b, n.Content[i+1])
				b = append(b, ",\n"...)
				ok = ok && whole
			}
		}
		return append(b, '}'), ok
	case yaml.SequenceNode:
		b = append(b, '[')
		for i := 0; ok && i < len(n.Content); i++ {
			b, ok = appendFlow(b, n.Content[i])
			b = append(b, ",\n"...)
		}
		return append(b, ']'), ok
	case yaml.ScalarNode:
		switch n.ShortTag() {
		case "!!bool", "!!int", "!!float", "!!null":
			return append(b, n.Value...), true
		case "!!str":
			// JSON's strings are YAML's (YAML 1.2.2, section 1.3), but for what
			// YAML wants escaped and JSON does not.
			text, err := json.Marshal(n.Value)
			return append(b, text...), err == nil && !strings.ContainsFunc(n.Value, unprintable)
		}
	}
	return b, false
}

// longestKey is how long a key may be whose ": " follows in the same line (YAML
// 1.2.2, section 7.4.2, in characters), quotes included.
const longestKey = 1024

// unprintable: YAML 1.2.2, section 5.1.
func unprintable(r rune) bool {
	return r >= 0x7f && r < 0xa0 || r == 0xfeff || r >= 0xfffe && r < 0x10000
}

func dumpSection(f *field, v reflect.Value, redact bool) (*yaml.Node, error) {
	m := &yaml.Node{Kind: yaml.MappingNode}
	for _, c := range f.fields {
		n, err := dumpValue(c, v.Field(c.index), redact)
		if err != nil {
			return nil, fmt.Errorf("config: dump %s: %w", c.path, err)
		}
		if n != nil {
			m.Content = append(m.Content, text(c.name), n)
		}
	}
	return m, nil
}

// dumpValue returns nil for what was not given and has no default.
func dumpValue(f *field, v reflect.Value, redact bool) (*yaml.Node, error) {
	switch f.kind {
	case kindSection:
		return dumpSection(f, v, redact)
	case kindList:
		l := &yaml.Node{Kind: yaml.SequenceNode}
		if f.elem.kind == kindScalar || v.Len() == 0 {
			l.Style = yaml.FlowStyle
		}
		for i := range v.Len() {
			n, err := dumpValue(f.elem, v.Index(i), redact)
			if err != nil {
				return nil, err
			}
			l.Content = append(l.Content, n)
		}
		return l, nil
	case kindFree:
		m := v.Interface().(map[string]any)
		if len(m) == 0 {
			return nil, nil
		}
		if redact {
			m = redacted(m)
		}
		n := new(yaml.Node)
		return n, n.Encode(m)
	}
	if len(f.enum) > 0 && f.enum[0] == "" && v.String() == "" {
		return nil, nil
	}
	if isZeroAddr(v) {
		return text(""), nil
	}
	if t, ok := v.Interface().(encoding.TextMarshaler); ok {
		b, err := t.MarshalText()
		return &yaml.Node{Kind: yaml.ScalarNode, Value: string(b)}, err
	}
	n := new(yaml.Node)
	return n, n.Encode(v.Interface())
}

func isZeroAddr(v reflect.Value) bool {
	return (v.Type() == typeAddr || v.Type() == typeAddrPort) && v.IsZero()
}

func text(s string) *yaml.Node {
	n := new(yaml.Node)
	n.SetString(s)
	if s == "" {
		n.Style = yaml.DoubleQuotedStyle
	}
	return n
}

// secretWords are parts of setting names whose values are not shown.
var secretWords = [...]string{"password", "passwd", "secret", "token", "credential", "apikey", "api_key", "private_key"}

const hidden = "(hidden)"

// redacted copies the map without secrets.
func redacted(m map[string]any) map[string]any {
	out := make(map[string]any, len(m))
	for k, v := range m {
		out[k] = redactedValue(k, v)
	}
	return out
}

func redactedValue(k string, v any) any {
	for _, w := range secretWords {
		if strings.Contains(strings.ToLower(k), w) {
			return hidden
		}
	}
	switch v := v.(type) {
	case map[string]any:
		return redacted(v)
	case []any:
		l := make([]any, len(v))
		for i, e := range v {
			l[i] = redactedValue("", e)
		}
		return l
	}
	return v
}
