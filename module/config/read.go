// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Limits of one file. They only keep a hostile or broken file from taking the
// memory; aliases make small files large.
const (
	maxFileBytes = 16 << 20
	maxNodes     = 1 << 20
	maxDepth     = 64
)

// position is where a value was written.
type position struct {
	file         string
	line, column int
	order        int    // layer
	key          string // key path as the reader of that file would count
	bad          bool   // already reported; nothing is concluded from its absence
}

// layer is one source of configuration: checked values, and where they stand.
type layer struct {
	name   string
	order  int
	at     map[string]position
	values map[string]any
	errs   Errors
	nodes  int
}

func newLayer(name string, order int) *layer {
	return &layer{name: name, order: order, at: map[string]position{}}
}

// fail reports a problem at a node and marks the key as bad.
func (l *layer) fail(n *yaml.Node, key, problem, expected, hint string) {
	e := &Error{File: l.name, Key: key, Problem: problem, Expected: expected, Hint: hint, order: l.order}
	if n != nil {
		e.Line, e.Column = n.Line, n.Column
	}
	l.errs = append(l.errs, e)
	l.mark(n, key, true)
}

func (l *layer) mark(n *yaml.Node, key string, bad bool) {
	p := position{file: l.name, order: l.order, key: key, bad: bad}
	if n != nil {
		p.line, p.column = n.Line, n.Column
	}
	l.at[key] = p
}

// yamlParser is the koanf parser for YAML. Besides the map it makes the
// layer's positions and its list of problems; a problem in a value is not an
// error of Unmarshal, so that one load finds the problems of all files.
type yamlParser struct{ layer *layer }

// Unmarshal reads one document. The error is an *Error where the text is no
// YAML at all.
func (p yamlParser) Unmarshal(b []byte) (map[string]any, error) {
	l := p.layer
	if len(b) > maxFileBytes {
		return nil, &Error{File: l.name, Problem: "the file is too large", Expected: "at most 16 MiB", order: l.order}
	}
	dec := yaml.NewDecoder(bytes.NewReader(b))
	var doc, more yaml.Node
	err := dec.Decode(&doc)
	if err == nil {
		if err2 := dec.Decode(&more); err2 == nil {
			return nil, &Error{File: l.name, Line: more.Line, Problem: "a second YAML document begins here", Expected: "one document per file", order: l.order}
		} else if !errors.Is(err2, io.EOF) {
			err = err2
		}
	}
	switch {
	case errors.Is(err, io.EOF):
		l.values = map[string]any{}
	case err != nil:
		return nil, syntaxError(l, err)
	default:
		l.values = l.section(schema, doc.Content[0], "", 0)
	}
	return l.values, nil
}

// Marshal writes a map as YAML.
func (yamlParser) Marshal(m map[string]any) ([]byte, error) { return yaml.Marshal(m) }

var yamlLine = regexp.MustCompile(`^(?:yaml: )?(?:line (\d+): )?`)

// parserError matches the messages of the library's parser, as opposed to its
// scanner. They are matched by text only to name a better line.
var parserError = regexp.MustCompile(`^did not find expected (node content|'-' indicator|key|',' or|<)`)

func syntaxError(l *layer, err error) *Error {
	text, _, _ := strings.Cut(err.Error(), "\n")
	e := &Error{File: l.name, Problem: "not valid YAML", Expected: "YAML with spaces for indentation", order: l.order}
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		e.Line, _ = strconv.Atoi(m[1])
		text = text[len(m[0]):]
		// The parser's own errors count lines from 0, the scanner's from 1.
		if m[1] == "" || parserError.MatchString(text) {
			e.Line++
		}
	}
	switch text {
	case "did not find expected key", "did not find expected '-' indicator":
		// The library names the beginning of the block, or the line itself.
		text += " in the block that this line belongs to"
	}
	e.Problem += ": " + text
	return e
}

// resolve follows an alias and counts. It returns nil when the limits are
// reached, after reporting that once.
func (l *layer) resolve(n *yaml.Node, key string, depth int) *yaml.Node {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	l.nodes++
	if l.nodes <= maxNodes && depth <= maxDepth {
		return n
	}
	if depth > maxDepth || l.nodes == maxNodes+1 {
		l.fail(n, key, "too many values or levels", "fewer aliases and levels", "")
	}
	return nil
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// entries calls f for every key of a mapping, reporting keys that are not
// words and keys that come twice.
func (l *layer) entries(n *yaml.Node, path string, f func(name string, key, value *yaml.Node)) {
	seen := map[string]*yaml.Node{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		switch {
		case k.Kind != yaml.ScalarNode:
			l.fail(k, path, "a key is not a word", "plain keys", "")
			continue
		case k.ShortTag() == "!!merge":
			l.fail(k, join(path, k.Value), "merge keys are not supported", "the keys written out", "")
			continue
		}
		if first := seen[k.Value]; first != nil {
			l.fail(k, join(path, k.Value), "the key is given twice", fmt.Sprintf("one of it (the first is in line %d)", first.Line), "")
			continue
		}
		seen[k.Value] = k
		f(k.Value, k, v)
	}
}

// value reads one value of the schema. ok is false if it was bad or absent.
func (l *layer) value(f *field, n *yaml.Node, path string, depth int) (v any, ok bool) {
	at := n
	if n = l.resolve(n, path, depth); n == nil {
		return nil, false
	}
	l.mark(at, path, false)
	switch f.kind {
	case kindScalar:
		return l.scalar(f, n, path)
	case kindList:
		return l.list(f, n, path, depth)
	case kindFree:
		if isNull(n) {
			return nil, false
		}
		if n.Kind != yaml.MappingNode {
			l.fail(n, path, "the value is "+describe(n), f.expected(), "")
			return nil, false
		}
		v := l.free(n, path, depth)
		return v, v != nil
	}
	if f.short != "" && n.Kind == yaml.ScalarNode && !isNull(n) {
		v, ok := l.scalar(f.child(f.short), n, path)
		return map[string]any{f.short: v}, ok
	}
	m := l.section(f, n, path, depth)
	return m, m != nil
}

func (l *layer) section(f *field, n *yaml.Node, path string, depth int) map[string]any {
	if path == "" {
		if n = l.resolve(n, path, depth); n == nil {
			return nil
		}
	}
	out := map[string]any{}
	if isNull(n) {
		return out
	}
	if n.Kind != yaml.MappingNode {
		l.fail(n, path, "the value is "+describe(n), f.expected(), "")
		return nil
	}
	l.entries(n, path, func(name string, key, value *yaml.Node) {
		c := f.child(name)
		if c == nil {
			l.unknown(f, key, path)
			return
		}
		if v, ok := l.value(c, value, join(path, name), depth+1); ok {
			out[name] = v
		}
	})
	return out
}

// unknown reports a key that the schema does not have. The key that was
// probably meant is not reported as missing too.
func (l *layer) unknown(f *field, key *yaml.Node, path string) {
	hint := didYouMean(key.Value, f.names())
	l.fail(key, join(path, key.Value), "unknown key", oneOf(f.names()), hint)
	if c := closest(key.Value, f.names()); c != "" {
		if _, ok := l.at[join(path, c)]; !ok {
			l.mark(key, join(path, c), true)
		}
	}
}

func (l *layer) list(f *field, n *yaml.Node, path string, depth int) (any, bool) {
	if isNull(n) {
		return nil, false
	}
	if n.Kind != yaml.SequenceNode {
		if f.single && n.Kind == yaml.ScalarNode {
			v, ok := l.scalar(f.elem, n, path)
			return []any{v}, ok
		}
		l.fail(n, path, "the value is "+describe(n), f.expected(), "")
		return nil, false
	}
	out := make([]any, 0, len(n.Content))
	for i, e := range n.Content {
		p := fmt.Sprintf("%s[%d]", path, i)
		v, ok := l.value(f.elem, e, p, depth+1)
		if ok && v == nil || !ok && f.elem.kind == kindSection {
			// Keep the place, so that the indexes of the others stay right.
			out = append(out, map[string]any{})
			l.mark(e, p, true)
			continue
		}
		if !ok {
			l.mark(n, path, true)
			continue
		}
		out = append(out, v)
	}
	return out, true
}

func (l *layer) scalar(f *field, n *yaml.Node, path string) (any, bool) {
	switch {
	case isNull(n):
		l.fail(n, path, "the key has no value", f.expected(), "")
		return nil, false
	case n.Kind != yaml.ScalarNode:
		l.fail(n, path, "the value is "+describe(n), f.expected(), "")
		return nil, false
	case f.isText() && n.ShortTag() != "!!str" && n.ShortTag() != "!!timestamp":
		hint := ""
		if _, err := f.parse(n.Value); err == nil {
			hint = fmt.Sprintf("put it in quotes if it is meant: %q", n.Value)
		}
		l.fail(n, path, "the value is "+describe(n), f.expected(), hint)
		return nil, false
	case f.typ.Kind() == reflect.Bool && n.ShortTag() == "!!str", f.numeric && n.ShortTag() == "!!str":
		l.fail(n, path, fmt.Sprintf("%q is text", n.Value), f.expected(), "")
		return nil, false
	}
	v, err := f.parse(n.Value)
	if err != nil {
		l.fail(n, path, err.problem, err.expected, "")
		return nil, false
	}
	return v, true
}

// free reads a mapping whose keys are not ours. It returns nil when a limit
// was reached.
func (l *layer) free(n *yaml.Node, path string, depth int) map[string]any {
	out := map[string]any{}
	l.entries(n, path, func(name string, key, value *yaml.Node) {
		out[name] = l.any(value, join(path, name), depth+1)
	})
	return out
}

func (l *layer) any(n *yaml.Node, path string, depth int) any {
	at := n
	if n = l.resolve(n, path, depth); n == nil {
		return nil
	}
	l.mark(at, path, false)
	switch n.Kind {
	case yaml.MappingNode:
		return l.free(n, path, depth)
	case yaml.SequenceNode:
		out := make([]any, len(n.Content))
		for i, e := range n.Content {
			out[i] = l.any(e, fmt.Sprintf("%s[%d]", path, i), depth+1)
		}
		return out
	}
	var v any
	if err := n.Decode(&v); err != nil {
		l.fail(n, path, fmt.Sprintf("cannot read %q", n.Value), "a plain value", "")
		return nil
	}
	switch x := v.(type) {
	case nil, bool, int, int64, uint64, string:
		return v
	case float64:
		if math.IsNaN(x) || math.IsInf(x, 0) {
			l.fail(n, path, n.Value+" is not a finite number", "a finite number", "")
			return nil
		}
		return v
	case time.Time:
		return n.Value
	}
	return n.Value
}

// describe names the kind of a node for people.
func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	switch n.ShortTag() {
	case "!!null":
		return "empty"
	case "!!int", "!!float":
		return "the number " + n.Value
	case "!!bool":
		return "the truth value " + n.Value
	}
	return fmt.Sprintf("the word %q", n.Value)
}
